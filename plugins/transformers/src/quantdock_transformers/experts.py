"""Experts one by one, under the names that linear layers beside the fused parameters would have.

A family that has its experts in one parameter ``mlp.experts.gate_up_proj`` reads them one by one, too, under the names
of its original checkpoints (Mixtral's ``block_sparse_moe.experts.0.w1``). Tools that take the fused parameters apart
into linear layers write ``mlp.experts.0.gate_proj`` for every family; gptqmodel does, since transformers 5.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

MODULAR = re.compile(r"(?P<experts>.*\bexperts)\.\d+\.(?P<kind>gate|up|down)_proj\.weight")
"""A weight of one expert; what is stored quantized is looked up as one."""

FUSED = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}
"""What a weight is a part of."""

_JOINED = {
    # Parts of a fused parameter, and how they get there: (operation, dimension). Only families that stack and join
    # plain ``[out, in]`` weights are meant; what others transpose or interleave on the way can't be guessed.
    "gate_up_proj": (("gate_proj", "up_proj"), [("MergeModulelist", 0), ("Concatenate", 1)]),
    "down_proj": (("down_proj",), [("MergeModulelist", 0)]),
}


def modular(transforms: Sequence[Any]) -> list[Any]:
    """transformers' converters of experts once more, for the modular names, where they have others.

    Args:
        transforms: transformers' ``WeightTransform`` objects for one model.
    """
    from transformers.core_model_loading import WeightConverter

    result = []
    for converter in (entry for entry in transforms if isinstance(entry, WeightConverter)):
        prefix, experts, fused = converter.target_patterns[0].rpartition("experts.")
        if not experts or fused not in _JOINED or len(converter.target_patterns) > 1:
            continue
        parts, joined = _JOINED[fused]
        names = [f"{prefix}{experts}*.{part}.weight" for part in parts]
        operations = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
        if operations == joined and len(converter.source_patterns) == len(names) and converter.source_patterns != names:
            targets = list(converter.target_patterns)
            result.append(converter.copy(names, targets, operations=list(converter.operations)))
    return result
