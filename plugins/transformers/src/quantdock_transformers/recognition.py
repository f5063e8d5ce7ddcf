"""Make a model that quantdock quantized recognisable where transformers and its friends look for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.quantizers.base import HfQuantizer, _assign_is_quantized

from quantdock import Quantizer, dequantize


def mark(model: Any, quantizers: Sequence[Quantizer[Any]], quantization_config: Mapping[str, Any]) -> None:
    """Set what ``transformers`` sets on a quantized model: config, method, and the object it asks for abilities."""
    method = quantization_config["quant_method"]
    config = _foreign_config(quantization_config)
    model.config.quantization_config = config
    model.is_quantized = True
    model.quantization_method = getattr(config, "quant_method", method)
    model.hf_quantizer = QuantdockQuantizer(config, quantizers)
    _assign_is_quantized(model)


def forget(model: Any) -> None:
    """Undo ``mark``."""
    for holder, names in ((model, ("hf_quantizer", "quantization_method")), (model.config, ("quantization_config",))):
        for name in names:
            if hasattr(holder, name):
                delattr(holder, name)
    model.is_quantized = False
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, flag):
            setattr(model, flag, False)


def _foreign_config(data: Mapping[str, Any]) -> Any:
    """transformers' config object for a method that it knows and can make one for, else the plain data."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

    known = (
        data["quant_method"] in AUTO_QUANTIZATION_CONFIG_MAPPING or data.get("load_in_4bit") or data.get("load_in_8bit")
    )
    if not known:
        return dict(data)
    try:
        return AutoQuantizationConfig.from_dict(dict(data))
    except ImportError:  # the config object of compressed-tensors is made by that package, which isn't needed here
        return dict(data)


class QuantdockQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """Answers transformers' questions about a model that quantdock quantized."""

    def __init__(self, config: Any, quantizers: Sequence[Quantizer[Any]]) -> None:
        self.quantization_config = config
        self.pre_quantized = True
        self._quantizers = list(quantizers)

    def is_serializable(self) -> bool:
        return all(quantizer.capabilities.save for quantizer in self._quantizers)

    @property
    def is_trainable(self) -> bool:
        return all(quantizer.capabilities.train for quantizer in self._quantizers)

    @property
    def is_compileable(self) -> bool:
        return all(quantizer.capabilities.compile for quantizer in self._quantizers)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """What ``save_pretrained`` writes: the components of quantized parameters in the place of what modules keep,
        in pieces where the architecture has it so; transformers' own reversal knows no scales."""
        from transformers.core_model_loading import revert_weight_conversion

        state, metadata = dict(model.state_dict()), dict[str, str]()
        for quantizer in self._quantizers:
            for parameter in quantizer.parameters.values():
                state.pop(parameter.name, None)
                prefix = f"{parameter.module}." if parameter.module else ""
                components = quantizer.components(model, parameter)
                if quantizer.stored_in_pieces(parameter):
                    for name in components:
                        state.pop(prefix + name, None)
                    exported = {
                        name: dict(revert_weight_conversion(model, {parameter.name: part}))
                        for name, part in components.items()
                    }
                    state |= quantizer.disassemble(parameter, exported)
                else:
                    state |= {prefix + name: part for name, part in components.items()}
            metadata |= quantizer.saved_metadata(model) if quantizer.parameters else {}
        return state, metadata

    def dequantize(self, model: Any, dtype: Any = None) -> Any:
        return dequantize(model, dtype=dtype)
