"""AWQ's forms, packed and read word by word as their definitions say: what the plugin is compared with.

Nothing here is shared with the plugin. The definitions are those of AutoAWQ's ``WQLinear_GEMM``, ``WQLinear_GEMV`` and
``WQLinear_GEMVFast`` (``pack_intweight``), written as loops over single codes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantdock.testing import write_checkpoint

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Made:
    """A weight: codes ``[out, in]``, zero points and scales ``[out, groups]``."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    size: int

    def values(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """``[out, in]``, one by one."""
        result = torch.empty(self.codes.shape, dtype=torch.float64)
        for row, codes in enumerate(self.codes.tolist()):
            zeros, scales = self.zeros[row].tolist(), self.scales[row].tolist()
            for column, code in enumerate(codes):
                group = column // self.size
                result[row, column] = (code - zeros[group]) * scales[group]
        return result.to(dtype)


def make(outputs: int, inputs: int, size: int, *, seed: int = 0, zero_point: bool = True) -> Made:
    """A random weight, whose codes and zero points take all values."""
    generator = torch.Generator().manual_seed(seed)
    size = inputs if size == -1 else size
    groups = inputs // size
    codes = torch.randint(0, 16, (outputs, inputs), generator=generator)
    zeros = torch.randint(0, 16, (outputs, groups), generator=generator)
    scales = (0.001 + 0.02 * torch.rand(outputs, groups, generator=generator)).half()
    return Made(codes, zeros if zero_point else torch.full_like(zeros, 8), scales, size)


def word(nibbles: list[int], bits: int) -> int:
    """Nibbles from the lowest on, as a signed number."""
    value = sum(nibble << 4 * place for place, nibble in enumerate(nibbles))
    return value - (1 << bits) if value >> bits - 1 else value


def gemm_rows(matrix: list[list[int]]) -> list[list[int]]:
    return [[word([row[8 * c + ORDER[i]] for i in range(8)], 32) for c in range(len(row) // 8)] for row in matrix]


def gemm(made: Made) -> dict[str, Tensor]:
    return {
        "qweight": torch.tensor(gemm_rows(made.codes.t().tolist()), dtype=torch.int32),
        "qzeros": torch.tensor(gemm_rows(made.zeros.t().tolist()), dtype=torch.int32),
        "scales": made.scales.t().contiguous(),
    }


def width(groups: int, size: int) -> int:
    """Words for the zero points of an output."""
    multiple = {16: 8, 32: 4, 64: 2}.get(size, 1)
    words = (groups + 7) // 8
    return (words + multiple - 1) // multiple * multiple


def gemv(made: Made) -> dict[str, Tensor]:
    outputs, groups = made.zeros.shape
    columns = width(groups, made.size)
    codes, zeros = made.codes.tolist(), made.zeros.tolist()
    padded = [row + [0] * (8 * columns - groups) for row in zeros]
    scales = torch.zeros(outputs, 8 * columns, dtype=torch.float16)
    scales[:, :groups] = made.scales

    def words(matrix: list[list[int]]) -> Tensor:
        rows = [[word(row[8 * c : 8 * c + 8], 32) for c in range(len(row) // 8)] for row in matrix]
        return torch.tensor(rows, dtype=torch.int32)

    return {"qweight": words(codes), "qzeros": words(padded), "scales": scales}


def gemv_fast(made: Made, zeros_name: str = "qzeros") -> dict[str, Tensor]:
    outputs, inputs = made.codes.shape
    groups = made.scales.shape[1]
    codes = made.codes.tolist()
    packed = [[0] * inputs for _ in range(outputs // 4)]
    for row in range(outputs):
        for start in range(0, inputs, 32):
            block = codes[row][start : start + 32]
            # numpy: arange(32).reshape(4, 4, 2).transpose(1, 0, 2), and of each eight the even ones first
            turned = [block[8 * (p // 2 % 4) + 2 * (p // 8) + p % 2] for p in range(32)]
            ordered = [turned[8 * (p // 8) + ORDER[p % 8]] for p in range(32)]
            for p, code in enumerate(ordered):
                column = start + p  # in the row of 64-wide stripes, of which four rows stand side by side
                flat = column // 64 * 256 + row % 4 * 64 + column % 64
                packed[row // 4][flat // 4] |= code << 4 * (flat % 4)
    qweight = torch.tensor(packed, dtype=torch.int32)
    qweight = torch.where(qweight >= 1 << 15, qweight - (1 << 16), qweight).to(torch.int16)
    scales = torch.zeros(8 * width(groups, made.size), outputs, dtype=torch.float16)
    products = torch.zeros_like(scales)
    scales[:groups] = made.scales.t()
    products[:groups] = -(made.scales.float() * made.zeros.float()).half().t()
    return {"qweight": qweight, zeros_name: products, "scales": scales}


FORMS: dict[str, Callable[[Made], dict[str, Tensor]]] = {
    "gemm": gemm,
    "gemv": gemv,
    "gemv_fast": gemv_fast,
    "llm-awq": lambda made: gemv_fast(made, "scaled_zeros"),
}

LAYERS = tuple(f"blocks.{block}.{layer}" for block in range(2) for layer in ("up", "down"))
FEATURES = 128


def write(
    folder: Path, version: str, size: int = 64, *, zero_point: bool = True, form: str | None = None
) -> dict[str, Made]:
    """A checkpoint of quantdock's small model whose linear layers are in one of AWQ's forms.

    Returns:
        What each layer was made of.
    """
    write_checkpoint(folder, features=FEATURES, dtype=torch.float16)
    tensors = load_file(folder / "model.safetensors")
    made = {}
    for number, name in enumerate(LAYERS):
        outputs, inputs = tensors.pop(f"{name}.weight").shape
        made[name] = make(outputs, inputs, size, seed=number, zero_point=zero_point)
        tensors |= {f"{name}.{part}": tensor for part, tensor in FORMS[form or version](made[name]).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": size,
        "zero_point": zero_point,
        "version": version,
        "modules_to_not_convert": None,
    }
    say(folder, lambda config: config.update(quantization_config=quantization))
    return made


def say(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change ``config.json``."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the stored tensors."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
