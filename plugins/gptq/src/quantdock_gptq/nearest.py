"""Weights of linear layers rounded to nearest, as they are stored."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantdock import UnsupportedError
from quantdock_gptq import forms, rounding
from quantdock_gptq.config import Settings


def layer(name: str, matrix: Tensor, settings: Settings, *, less_one: bool) -> dict[str, Tensor]:
    """The tensors of a weight.

    Args:
        name: of the parameter, for messages.
        matrix: ``[outputs, inputs]``, floating; not changed.
        settings: bits, group size and symmetry.
        less_one: whether zero points are stored less one.

    Raises:
        UnsupportedError: values that no scale fits.
    """
    shape = (matrix.shape[0], matrix.shape[1])
    specs = forms.components(name, shape, settings, rounding.SCALE_DTYPE, indexed=True)
    parts = {part: torch.empty(spec.shape, dtype=spec.dtype, device=matrix.device) for part, spec in specs.items()}
    number_groups(parts["g_idx"], settings)
    write(name, matrix, settings, parts, 0, less_one=less_one)
    return parts


def number_groups(index: Tensor, settings: Settings) -> None:
    """Write the ``g_idx`` of inputs in order, or several of them: ``[..., inputs]``."""
    inputs = index.shape[-1]
    size, _ = settings.groups(inputs)
    index.copy_(torch.arange(inputs, dtype=torch.int32, device=index.device).floor_divide_(size))


def write(
    name: str, rows: Tensor, settings: Settings, parts: Mapping[str, Tensor], start: int, *, less_one: bool
) -> None:
    """Some outputs of a weight (see ``rounding.quantize_into``).

    Raises:
        UnsupportedError: values that no scale fits.
    """
    if not rounding.quantize_into(rows, settings, parts, start, less_one=less_one):
        raise unscalable(name)


def unscalable(name: str) -> UnsupportedError:
    """What is wrong with a parameter whose scales aren't finite."""
    return UnsupportedError(
        f"{name} has weights that are infinite, not numbers, or too large for a scale in {rounding.SCALE_DTYPE}; leave "
        "it out, or repair the checkpoint"
    )
