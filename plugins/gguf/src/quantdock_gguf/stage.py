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
        from quantdock_gguf.header import read_header
        from quantdock_gguf.reader import GGUFTensorReader

        paths = all_parts(source, name)
        headers = tuple(read_header(path) for path in paths)
        check_parts(headers)
        dtype, computed = _dtype(config, options), is_new_style(headers[0].architecture)
        readers = [GGUFTensorReader(header, dtype=dtype, compute_in_dtype=computed) for header in headers]
        return GGUFCheckpoint(
            format="gguf",
            files=tuple(paths),
            tensors={tensor.name: tensor for reader in readers for tensor in reader.tensors()},
            metadata={key: value for key, value in headers[0].metadata.items() if isinstance(value, str)},
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
    """The dtype of the model, as far as it is known before the checkpoint is; else what loses nothing."""
    wanted = options.dtype if isinstance(options.dtype, torch.dtype) else getattr(torch, config.dtype or "", None)
    return wanted if wanted in (torch.bfloat16, torch.float16, torch.float64) else torch.float32
