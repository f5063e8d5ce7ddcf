"""What each block is called with: one run of the model in which no block computes anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantdock.architecture import Blocks
from quantdock.calibration.data import Inputs
from quantdock.errors import CalibrationError

_HIDDEN = "hidden_states"
_PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.Size)


class _Hidden:
    """Stands where the hidden states were."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of a block, beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states that ``block`` makes of ``hidden``."""
        args = tuple(hidden if value is _Hidden else value for value in self.args)
        kwargs = {name: hidden if value is _Hidden else _fresh(value) for name, value in self.kwargs.items()}
        result = block(*args, **kwargs)
        found = result[0] if isinstance(result, tuple | list) else result
        if not isinstance(found, torch.Tensor) or found.shape != hidden.shape:
            raise CalibrationError(f"{type(block).__name__} returned no hidden states of {list(hidden.shape)}")
        return found


@dataclass(kw_only=True)
class Captured:
    """The calls of all blocks, and the hidden states on their way through them."""

    hidden: list[torch.Tensor]
    """Of each batch: the next block's."""
    calls: dict[str, list[Call]]
    """Path of a block -> its calls, one of each batch."""
    shared_nbytes: int
    """Bytes of masks, position embeddings and the like; equal ones are kept once."""

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        return self.shared_nbytes + sum(tensor.nbytes for tensor in self.hidden)


@dataclass(kw_only=True)
class _Pool:
    """Tensors by their values."""

    tensors: dict[tuple[Any, ...], list[torch.Tensor]] = field(default_factory=dict)

    def kept(self, value: Any, where: str) -> Any:
        """``value`` with its tensors exchanged for equal ones that are kept already."""
        if value is None or value is _Hidden or isinstance(value, _PLAIN):
            return value
        if isinstance(value, torch.Tensor):
            same = self.tensors.setdefault((value.dtype, value.device, tuple(value.shape)), [])
            for tensor in same:
                if tensor is value or torch.equal(tensor, value):
                    return tensor
            same.append(value)
            return value
        if type(value) in (tuple, list):
            return type(value)(self.kept(item, where) for item in value)
        if type(value) is dict:
            return {key: self.kept(item, where) for key, item in value.items()}
        raise CalibrationError(
            f"{where} is called with an object of the class {type(value).__name__}, which may change from call to "
            "call; this model can't be calibrated block by block"
        )

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors)


class _Done(Exception):  # noqa: N818 - no error: the last block was reached
    """Everything was seen; the rest of the model isn't needed."""


class _NotARowError(Exception):
    """Hidden states didn't come out of one block and into the next as they were."""


@dataclass(kw_only=True)
class _Recorder:
    """Takes the place of the blocks' forward, and hands hidden states through."""

    paths: Sequence[str]
    pool: _Pool
    as_tuple: bool
    calls: list[Call] = field(default_factory=list)
    first: torch.Tensor | None = None
    last: torch.Tensor | None = None

    def see(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        expected = self.paths[len(self.calls)]
        if path != expected:
            raise CalibrationError(
                f"the model calls its block {path} where {expected} was expected; it is no plain row"
            )
        found = args[0] if args else kwargs.get(_HIDDEN)
        if not isinstance(found, torch.Tensor):
            raise CalibrationError(f"{path} is called without hidden states in the first place")
        if self.first is None:
            self.first = found
        elif self.last is None or found.shape != self.last.shape or not torch.equal(found, self.last):
            raise _NotARowError
        self.last = found
        mine = (_Hidden, *args[1:]) if args else ()
        others = kwargs if args else {**kwargs, _HIDDEN: _Hidden}
        self.calls.append(Call(args=self.pool.kept(mine, path), kwargs=self.pool.kept(others, path)))
        if len(self.calls) == len(self.paths):
            raise _Done
        return (found,) if self.as_tuple else found


def capture(model: nn.Module, blocks: Blocks, batches: Sequence[Inputs], device: torch.device) -> Captured:
    """Run every batch through what precedes the first block.

    Args:
        model: everything but the blocks is in place.
        blocks: the row of blocks.
        batches: arguments of the model's forward.
        device: of the model.

    Raises:
        CalibrationError: the model isn't a plain row of blocks.
    """
    pool = _Pool()
    captured = Captured(hidden=[], calls={path: [] for path in blocks.paths}, shared_nbytes=0)
    for inputs in batches:
        moved = {name: tensor.to(device) for name, tensor in inputs.items()}
        recorder = _recorded(model, blocks, moved, pool)
        assert recorder.first is not None
        captured.hidden.append(recorder.first)
        for path, call in zip(blocks.paths, recorder.calls, strict=True):
            captured.calls[path].append(call)
    captured.shared_nbytes = pool.nbytes
    return captured


def _recorded(model: nn.Module, blocks: Blocks, inputs: Inputs, pool: _Pool) -> _Recorder:
    for as_tuple in (False, True):  # models differ in what they expect of a block; the wrong one isn't handed through
        recorder = _Recorder(paths=blocks.paths, pool=pool, as_tuple=as_tuple)
        try:
            with _recording(model, recorder):
                model(**inputs, **blocks.arguments)
        except _Done:
            return recorder
        except _NotARowError:
            continue
        except CalibrationError:
            raise
        except Exception as error:
            if recorder.calls and not as_tuple:
                continue
            raise CalibrationError(
                f"the model can't be run on the calibration data: {type(error).__name__}: {error}"
            ) from error
        raise CalibrationError(
            f"the model called {len(recorder.calls)} of its {len(blocks.paths)} blocks; {blocks.paths[0]} to "
            f"{blocks.paths[-1]} is no row that it runs from end to end"
        )
    raise CalibrationError(
        f"the model changes hidden states between {blocks.paths[0]} and {blocks.paths[-1]}; it can't be calibrated "
        "block by block"
    )


@contextmanager
def _recording(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Put the recorder in the place of the blocks' own ``forward``; their attributes stay as they are."""
    modules = {path: model.get_submodule(path) for path in recorder.paths}
    try:
        for path, module in modules.items():
            module.__dict__["forward"] = lambda *args, path=path, **kwargs: recorder.see(path, args, kwargs)
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("forward", None)


def _fresh(value: Any) -> Any:
    """Containers of their own for each call, as some blocks write into them."""
    if type(value) is dict:
        return {key: _fresh(item) for key, item in value.items()}
    return [_fresh(item) for item in value] if type(value) is list else value
