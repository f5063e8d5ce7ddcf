"""The hooks: GGUF files give a config and a checkpoint, and rename what goes into the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

import torch

from quantdock import Checkpoint, LoadOptions, ModelConfig, Skeleton, Source, hookimpl
from quantdock_gguf.files import all_parts, check_parts, chosen_file

# This module is imported by every load, GGUF or not; gguf and transformers are imported where they are needed.


class GGUFStage:
    """GGUF files as checkpoints: their tensors are unpacked one by one, and go wherever any other tensor would."""

    @hookimpl
    def resolve_config(self, source: Source, options: LoadOptions) -> ModelConfig | None:
        """The config that the file's metadata describes, unless the user brought one."""
        if options.config is not None or (name := chosen_file(source, options)) is None:
            return None
        from quantdock_gguf.config import model_config
        from quantdock_gguf.header import read_header

        headers = [read_header(path) for path in all_parts(source, name)]
        check_parts(headers)
        return model_config(headers)

    @hookimpl
    def find_checkpoints(self, source: Source, config: ModelConfig, options: LoadOptions) -> Checkpoint | None:
        """The file's tensors under GGUF's names."""
        if (name := chosen_file(source, options)) is None:
            return None
        from quantdock_gguf.architecture import GGUFCheckpoint
        from quantdock_gguf.config import is_new_style
        from quantdock_gguf.reader import GGUFTensorReader

        paths = all_parts(source, name)
        readers = [GGUFTensorReader(path) for path in paths]
        headers = tuple(reader.header for reader in readers)
        check_parts(headers)
        # transformers unpacks the blocks of these architectures in the dtype of the model, of all others in float32.
        block_dtype = _dtype(config, options) if is_new_style(headers[0].architecture) else torch.float32
        return GGUFCheckpoint(
            format="gguf",
            files=tuple(paths),
            tensors={tensor.name: tensor for reader in readers for tensor in reader.tensors(block_dtype=block_dtype)},
            metadata={key: str(value) for key, value in headers[0].metadata.items() if key.startswith("general.")},
            headers=headers,
        )

    @hookimpl(wrapper=True)
    def build_model(self, checkpoint: Checkpoint) -> Generator[None, Skeleton | None, Skeleton | None]:
        """Whoever builds the model: its parameters get what the GGUF file has under other names."""
        skeleton = yield
        if skeleton is None or checkpoint.format != "gguf":
            return skeleton
        from quantdock_gguf.architecture import GGUFArchitecture, GGUFCheckpoint

        assert isinstance(checkpoint, GGUFCheckpoint)
        routed = GGUFArchitecture(skeleton.architecture, skeleton.model, checkpoint.headers)
        return dataclasses.replace(skeleton, architecture=routed)


def _dtype(config: ModelConfig, options: LoadOptions) -> torch.dtype:
    """The dtype the load will have, as far as it is known before the checkpoint is."""
    if isinstance(options.dtype, torch.dtype):
        return options.dtype
    found = getattr(torch, config.dtype or "float32", None)
    return found if isinstance(found, torch.dtype) else torch.float32
