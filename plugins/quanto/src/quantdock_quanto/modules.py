"""quanto's linear layer, made safe to copy."""

from __future__ import annotations

import copy
from typing import Any

from optimum.quanto import QLinear, WeightQBytesTensor
from torch import nn


class Linear(QLinear):  # type: ignore[misc]  # quanto is Any to the type checker
    """A linear layer of quanto whose frozen weight can be copied: quanto's own tensors can't."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Linear:
        weight: Any = self.weight
        if isinstance(weight, WeightQBytesTensor) and id(weight) not in memo:
            tensor = WeightQBytesTensor(
                weight.qtype,
                axis=weight.axis,
                size=weight.size(),
                stride=weight.stride(),
                data=weight._data.detach().clone(),
                scale=weight._scale.detach().clone(),
                activation_qtype=weight.activation_qtype,
            )
            memo[id(weight)] = nn.Parameter(tensor, requires_grad=weight.requires_grad)
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        result.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return result
