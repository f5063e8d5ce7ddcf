"""bitsandbytes' linear layers, made safe to save, move and train after they have been used.

They compute what bitsandbytes' own layers compute, bit for bit, and are instances of them, so PEFT and transformers
treat them alike. What differs: bitsandbytes' layers rewrite their state in the first forward (weights and scales into
another layout and precision, the bias into the input's dtype) and save what they find afterwards.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from torch import Tensor, nn

from quantdock_bnb import repack


class Linear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]  # bitsandbytes is Any to the type checker
    """A 4-bit linear layer whose stored form survives use.

    In evaluation on CPUs with AVX512-BF16 the weight takes the layout of bitsandbytes' kernel, in memory of the same
    size; the stored scales are kept beside the kernel's. The stored codes come back exactly when the layer is saved,
    moved, or trained. Shapes that the kernel can't read are dequantized for each forward; bitsandbytes fails on those.
    """

    stored_state: QuantState | None = None
    """The state as stored, while ``weight`` has the kernel's layout; ``None`` while ``weight`` has the stored one."""

    def reset_parameters(self) -> None:
        """Nothing, on the meta device: drawing no numbers takes as long as all the rest of making a layer."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def twin(self) -> Linear4bit:
        """Another layer like this one, which must be empty and on the meta device.

        The constructor sets the same twenty attributes anew each time, which makes up a fifth of the time in which a
        checkpoint that is stored in 4 bits is loaded.
        """
        new = type(self).__new__(type(self))
        containers = (dict, OrderedDict, set)
        new.__dict__.update(
            {key: value.copy() if type(value) in containers else value for key, value in self.__dict__.items()}
        )
        weight, bias = self.weight, self.bias
        copy = torch.Tensor._make_subclass(type(weight), weight.data, False)
        copy.__dict__.update(weight.__dict__, module=new)
        new._parameters["weight"] = copy
        new._parameters["bias"] = None if bias is None else nn.Parameter(bias.data, requires_grad=bias.requires_grad)
        return new

    def stored(self) -> tuple[Tensor, QuantState | None]:
        """The weight's data and state as they are stored, without changing the layer."""
        if self.stored_state is None:
            return self.weight.data, getattr(self.weight, "quant_state", None)
        return repack.from_kernel(self.weight.data, self.weight.quant_storage), self.stored_state

    def forward(self, x: Tensor) -> Tensor:
        fix_4bit_weight_quant_state_from_module(self)
        self._arrange(for_kernel=self._kernel_serves(x))
        if not self.compute_type_is_set:  # type: ignore[has-type]
            self.set_compute_type(x)
            self.compute_type_is_set = True
        given, wanted = x.dtype, self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(wanted)
        state = self.weight.quant_state
        return bnb.matmul_4bit(x.to(wanted), self.weight, bias=bias, quant_state=state).to(given)  # type: ignore[no-any-return]

    def _kernel_serves(self, x: Tensor) -> bool:
        """As bitsandbytes decides it; but a gradient can't pass the kernel, and no rows make it divide by zero."""
        if x.device.type != "cpu" or not self.support_avx512bf16_for_cpu or self.training or x.requires_grad:
            return False
        return bool(x.numel()) and repack.fits(self.stored_state or self.weight.quant_state)

    def _arrange(self, *, for_kernel: bool) -> None:
        if for_kernel == (self.stored_state is not None):
            return
        # Outside of inference mode, or the weight would be unfit for training later.
        with torch.inference_mode(False), torch.no_grad():
            if for_kernel:
                state = self.weight.quant_state
                data, kernel_state = repack.to_kernel(self.weight.data, state)
                self.stored_state = state
            else:
                data, kernel_state = self.stored()
                self.stored_state = None
            self.weight.data = data
            self.weight.quant_state = self.quant_state = kernel_state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        data, state = self.stored()
        if state is None:
            return
        if self.stored_state is not None:
            destination[f"{prefix}weight"] = data
        for name, part in state.as_dict(packed=True).items():
            destination[f"{prefix}weight.{name}"] = part if keep_vars else part.detach()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _restore_class(self, bnb.nn.Params4bit)
        if isinstance(self.weight, bnb.nn.Params4bit):
            self.weight.module = self  # of a copy, it is the layer that was copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        self._arrange(for_kernel=False)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]


class Linear8bitLt(bnb.nn.Linear8bitLt):  # type: ignore[misc]  # bitsandbytes is Any to the type checker
    """An 8-bit linear layer that leaves its bias alone and can be moved after use, as a part of a model too."""

    def reset_parameters(self) -> None:
        """As in ``Linear4bit``."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def scales(self) -> Tensor | None:
        """The largest magnitude of each row, ``float32 [out]``, wherever bitsandbytes keeps it at the moment."""
        scales: Tensor | None = getattr(self.weight, "SCB", None)
        return self.state.SCB if scales is None else scales

    def forward(self, x: Tensor) -> Tensor:
        self.state.is_training = self.training
        if self.weight.CB is not None:
            self.init_8bit_state()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        result: Tensor = bnb.matmul(x, self.weight, bias=bias, state=self.state)
        if not self.state.has_fp16_weights and self.state.CB is not None:
            self.weight.data = self.state.CB
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _restore_class(self, bnb.nn.Int8Params)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear8bitLt:
        scales = None if self.state.has_fp16_weights else self.scales()
        result = super()._apply(fn, recurse)
        self.state.reset_grads()  # a quantized copy of weights that have moved
        if scales is not None:
            self.weight.CB = self.weight.data
            self.weight.SCB = scales.to(self.weight.device)
        return result  # type: ignore[no-any-return]


def _restore_class(layer: nn.Module, kind: type[nn.Parameter]) -> None:
    """Make the weight of an unpickled layer what it was: torch pickles every kind of parameter as a plain one, with its
    attributes, and those are lost as soon as that is copied."""
    weight = layer._parameters["weight"]
    if type(weight) is nn.Parameter:
        restored = torch.Tensor._make_subclass(kind, weight.data, weight.requires_grad)
        restored.__dict__.update(weight.__dict__)
        layer._parameters["weight"] = restored
