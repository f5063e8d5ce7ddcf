"""The stage plugin: every architecture that the installed transformers has."""

from __future__ import annotations

from quantdock import Checkpoint, LoadOptions, ModelConfig, Skeleton, Source, hookimpl


class TransformersStage:
    """Builds models from transformers' classes."""

    @hookimpl
    def build_model(
        self, source: Source, config: ModelConfig, checkpoint: Checkpoint, options: LoadOptions
    ) -> Skeleton | None:
        """The architecture that ``config.json`` names, on the meta device; not for ``model=`` factories."""
        if options.model is not None:
            return None
        from quantdock_transformers.building import build  # imports transformers, which takes seconds

        return build(source, config, checkpoint, options)
