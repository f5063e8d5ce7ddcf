"""The layer: its stored tensors on the outside, whatever is fast on the inside."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantdock.linears import int4, int4_cuda, int8, triton_form, words
from quantdock.linears.affine import DEVICE_STEP, STEP, dequantize_columns, multiply_columns
from quantdock.linears.paths import HasPaths
from quantdock.linears.weights import Form, Maker, Weight, by_rows, dequantize

_MAKERS = tuple(module.MAKER for module in (words, int4, int8, int4_cuda, triton_form))
"""What makes kernels' forms; of those that fit a weight, the first that takes activations of a dtype is its path."""


class GroupedLinear(nn.Module, HasPaths, ABC):
    """A linear layer whose weight is a format's buffers.

    A subclass registers the buffers, and says what they mean. Their dtypes are the format's: moving the layer to
    another dtype changes its bias alone.

    Args:
        in_features, out_features: as of ``nn.Linear``.
        bias: ``[out]``, or ``None``.
        compute_dtype: what activations are cast to; ``None`` leaves them as they come, except that a kernel of CPUs
            takes float16 as bfloat16 where it computes in that.
    """

    code_buffers: ClassVar[tuple[str, ...]]
    """The buffers that hold the codes. A kernel's form may stand in for them."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: nn.Parameter | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", bias)
        self.compute_dtype = compute_dtype
        self._form: Form | None = None
        self._makers: tuple[Maker, ...] | None = None
        # What a form is known to be right for: activations' dtype and compute_dtype.
        self._taken: tuple[torch.dtype, torch.dtype | None, Form] | None = None

    # What a format says ---------------------------------------------------------------------------------------------

    @abstractmethod
    def stored_weight(self) -> Weight:
        """The weight, read from the buffers. While a kernel's form stands in for the codes, they aren't asked for."""

    @abstractmethod
    def encode(self, codes: Callable[[slice], Tensor]) -> Mapping[str, Tensor]:
        """The ``code_buffers``, from the codes of some outputs at a time (see ``Weight.codes``)."""

    # What users see -------------------------------------------------------------------------------------------------

    def path(self, dtype: torch.dtype) -> str:
        """How activations of ``dtype`` are multiplied in evaluation: ``words``, ``int4pack``, ``int8pack``, ``triton``
        or ``columns``."""
        maker = self._maker_for(dtype)
        return "columns" if maker is None else maker.path

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight in full precision, ``[out, in]``."""
        with torch.no_grad():
            self._restore()
            return dequantize(self.stored_weight(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        # A small layer's kernel takes 6 us, and so would five calls of torch that change nothing, or three of
        # __getattr__.
        given, inputs = x.dtype, self.in_features
        if x.shape[-1] != inputs:
            raise ValueError(f"activations have shape {tuple(x.shape)}, expected [..., {inputs}] (in_features)")
        form, bias = self._form_for(x), self._parameters["bias"]
        dtype = torch.bfloat16 if form is not None and form.rounds else self.compute_dtype or given
        if given != dtype:
            x = x.to(dtype)
        few = form is not None and 0 < x.numel() <= form.most_rows * inputs
        if form is not None and few and not (x.requires_grad and torch.is_grad_enabled()):
            result = form.multiply(x)
        else:
            result = by_rows(functools.partial(self._multiply_dequantizing, form), x)
        if bias is not None:
            result = result + bias.to(dtype)
        return result if given == dtype else result.to(given)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    # The kernel's form ----------------------------------------------------------------------------------------------

    def _maker_for(self, dtype: torch.dtype) -> Maker | None:
        """What makes the form for activations of ``dtype``, where the layer is now; ``None`` for ``columns``."""
        if self._makers is None:
            device = next(self.buffers()).device.type
            candidates = [maker for maker in _MAKERS if maker.device == device]
            weight = self.stored_weight() if candidates else None
            self._makers = tuple(maker for maker in candidates if weight is not None and maker.fits(weight))
        return next((maker for maker in self._makers if maker.takes(dtype, self.compute_dtype)), None)

    def _form_for(self, x: Tensor) -> Form | None:
        """The kernel's form for activations like ``x``, made if need be; ``None`` for the path ``columns``."""
        if self.training or torch.compiler.is_compiling():  # which sees plain tensors, and makes its own kernels
            return None
        form, makers, taken = self._form, self._makers, self._taken
        if taken is not None and taken == (x.dtype, self.compute_dtype, form):
            return form
        captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if captured and (form is None or makers is None):  # forms aren't for a graph to make, nor trials
            return None
        maker = self._maker_for(x.dtype)
        if maker is None or (captured and (form is None or form.path != maker.path)):
            return None
        if form is not None and form.path != maker.path:
            self._restore()
        weight = self.stored_weight()  # before looking for a form: another thread may be putting one in its place
        form = self._form
        if form is None:
            # Outside of inference mode, or what is made of it would be unfit for training later.
            with torch.inference_mode(False), torch.no_grad():
                form = self._form = maker.make(weight)
            for name in self.code_buffers:
                self._buffers[name] = None
        self._taken = x.dtype, self.compute_dtype, form
        return form

    def _multiply_dequantizing(self, form: Form | None, rows: Tensor) -> Tensor:
        """``[rows, in]`` to ``[rows, out]``, by ``form.columns`` or those of the path ``columns``."""
        if form is None:
            elements = STEP if rows.device.type == "cpu" else DEVICE_STEP
            return multiply_columns(rows, self._columns(rows.dtype), self.out_features, elements)
        columns = functools.partial(form.columns, dtype=rows.dtype)
        return multiply_columns(form.arranged(rows), columns, self.out_features, form.elements)

    def _columns(self, dtype: torch.dtype) -> Callable[[slice], Tensor]:
        weight = self.stored_weight()
        codes = weight.codes if self._form is None else self._form.codes
        grouping = weight.grouping()
        return lambda part: dequantize_columns(codes(part), weight.scales(part), weight.zeros(part), grouping, dtype)

    def _stored_codes(self) -> Mapping[str, Tensor]:
        """The ``code_buffers`` while a form stands in for them, without changing the layer."""
        if self._form is None:
            return {}
        with torch.inference_mode(False), torch.no_grad():
            return self.encode(self._form.codes)

    def _restore(self) -> None:
        """Put the stored codes back in place."""
        self._buffers.update(self._stored_codes())
        self._form = self._taken = None

    # Everybody else finds the stored codes --------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        found: Any = super().__getattr__(name)
        if found is None and name in type(self).code_buffers and self.__dict__.get("_form") is not None:
            return self._stored_codes()[name]
        return found

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_form": None, "_makers": None, "_taken": None}
        state["_buffers"] = {**self._buffers, **self._stored_codes()}
        return state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}{name}": codes for name, codes in self._stored_codes().items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore()
        self._makers = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupedLinear:
        self._restore()
        self._makers = None
        own = {id(buffer) for buffer in self._buffers.values()}

        def apply(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if id(tensor) in own and result.dtype != tensor.dtype else result

        super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> GroupedLinear:
        if mode:
            self._restore()
        return super().train(mode)
