"""The data of a calibration: texts, token ids or model inputs, made into batches of equal length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from quantdock.errors import CalibrationError, ConfigError

if TYPE_CHECKING:
    from quantdock.architecture import Architecture, Blocks
    from quantdock.source import Source

Inputs = Mapping[str, torch.Tensor]
_IDS, _MASK = "input_ids", "attention_mask"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The data that a method wants to see activations of.

    Raises:
        ConfigError: it isn't a list of samples; the message names the field.
    """

    dataset: Sequence[Any] = field(repr=False)
    """Samples: texts, token ids (a list or a tensor), or mappings of the model's inputs to tensors that have a batch
    dimension."""
    tokenizer: Any = field(default=None, repr=False)
    """For texts: a tokenizer, the path of one, or ``None`` for the source's own."""
    batch_size: int = 1
    """Samples that go through a block together, if they are equally long; nothing is ever padded."""
    max_length: int | None = None
    """Tokens to which texts are cut; ``None`` cuts nothing."""

    def __post_init__(self) -> None:
        if isinstance(self.dataset, str):
            raise ConfigError(
                f"dataset={self.dataset!r} is the name of a data set, and nothing is downloaded beside the source; "
                "pass the samples themselves: a list of texts or of token ids"
            )
        if not isinstance(self.dataset, Sequence):
            raise ConfigError(
                f"dataset is {type(self.dataset).__name__}, expected a list of texts, of token ids, or of model inputs"
            )
        if not self.dataset:
            raise ConfigError("dataset is empty; pass texts or token ids, or no dataset at all")
        numbers: dict[str, Any] = {"batch_size": self.batch_size, "max_length": self.max_length}
        for name, value in numbers.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}, expected a positive number")


@dataclass(frozen=True, kw_only=True)
class Batches:
    """What a model is given to look at its activations."""

    inputs: tuple[Inputs, ...]
    """Arguments of the model's forward, batch by batch."""
    samples: int

    @property
    def rows(self) -> int:
        """Tokens of all batches."""
        return sum(map(_rows, self.inputs))

    @property
    def largest(self) -> int:
        """Tokens of the largest batch."""
        return max(map(_rows, self.inputs))

    @property
    def shapes(self) -> set[tuple[int, int]]:
        """Samples and tokens per sample, of each batch that differs."""
        return {_shape(inputs) for inputs in self.inputs}

    def equals(self, other: Batches) -> bool:
        """Whether these are the same inputs in the same order."""
        return len(self.inputs) == len(other.inputs) and all(
            one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
            for one, two in zip(self.inputs, other.inputs, strict=True)
        )


def make_batches(calibration: Calibration, architecture: Architecture, blocks: Blocks, source: Source) -> Batches:
    """Tokenize, check and batch the samples.

    Args:
        calibration: the data.
        architecture: has the tokenizer.
        blocks: say how long a sample may be.
        source: where the architecture's own tokenizer is.

    Raises:
        CalibrationError: a sample is empty, too long, padded, or nothing that a model takes; names it by its place.
        UnsupportedError: there is no tokenizer for texts.
    """
    samples = list(calibration.dataset)
    places = [place for place, sample in enumerate(samples) if isinstance(sample, str)]
    if places:
        found = architecture.tokenize([samples[place] for place in places], calibration.tokenizer, source)
        for place, ids in zip(places, found, strict=True):
            samples[place] = ids[: calibration.max_length]
    made = [_as_inputs(sample, place) for place, sample in enumerate(samples)]
    for place, inputs in enumerate(made):
        length = _shape(inputs)[1]
        if blocks.max_positions is not None and length > blocks.max_positions:
            raise CalibrationError(
                f"sample {place} of the dataset has {length} tokens, and the model takes {blocks.max_positions} at the "
                "most; cut it into several (texts are cut to max_length, if that is given)"
            )
    return Batches(inputs=tuple(_joined(made, calibration.batch_size)), samples=len(made))


def _as_inputs(sample: Any, place: int) -> Inputs:
    """One sample as arguments of the model's forward, with a batch dimension."""
    values = sample if isinstance(sample, Mapping) else {_IDS: sample}
    inputs = {str(name): _as_tensor(value, place) for name, value in values.items()}
    if not inputs or not all(tensor.numel() for tensor in inputs.values()):
        raise CalibrationError(f"sample {place} of the dataset is empty; leave it out")
    ids = inputs.get(_IDS)
    if ids is not None:
        if ids.dim() == 1:
            inputs[_IDS] = ids = ids[None]
        if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
            raise CalibrationError(
                f"sample {place} of the dataset is {ids.dtype} {list(ids.shape)}, expected whole numbers, one per token"
            )
    mask = inputs.get(_MASK)
    if mask is not None and bool((mask == 0).any()):
        raise CalibrationError(
            f"sample {place} of the dataset is padded (its attention_mask has zeros); pass it without padding, samples "
            "needn't be equally long"
        )
    return {name: tensor for name, tensor in inputs.items() if name != _MASK}


def _as_tensor(value: Any, place: int) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(
            f"sample {place} of the dataset holds {type(value).__name__}, expected a text, token ids or tensors "
            f"({error})"
        ) from error


def _shape(inputs: Inputs) -> tuple[int, int]:
    """Samples, and tokens per sample."""
    tensor = inputs.get(_IDS)
    if tensor is None:
        tensor = next(iter(inputs.values()))
    return (len(tensor), tensor.shape[1]) if tensor.dim() > 1 else (1, len(tensor))


def _rows(inputs: Inputs) -> int:
    samples, tokens = _shape(inputs)
    return samples * tokens


def _joined(samples: Sequence[Inputs], batch_size: int) -> list[Inputs]:
    """Samples of nothing but token ids, equally many, together; the rest alone. In order of their first samples."""
    batches: list[list[Inputs]] = []
    open_batch: dict[int, list[Inputs]] = {}
    for inputs in samples:
        length = _shape(inputs)[1]
        batch = open_batch.get(length)
        if inputs.keys() != {_IDS} or len(inputs[_IDS]) > 1:
            batches.append([inputs])
        elif batch is None or len(batch) >= batch_size:
            open_batch[length] = [inputs]
            batches.append(open_batch[length])
        else:
            batch.append(inputs)
    return [
        {name: torch.cat([inputs[name] for inputs in batch]) if len(batch) > 1 else batch[0][name] for name in batch[0]}
        for batch in batches
    ]
