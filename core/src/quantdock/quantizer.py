"""What the author of a quantizer writes: a config dataclass and a quantizer class."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, get_type_hints

import torch

from quantdock.conversion import Assembly
from quantdock.errors import ConfigError, UnsupportedError
from quantdock.layout import Capabilities, Layout
from quantdock.tensors import Parameter, StoredTensor, TensorSpec

if TYPE_CHECKING:
    from quantdock.calibration.block import CalibrationBlock
    from quantdock.calibration.data import Calibration

_STAGES = ("preprocess_model", "quantize_param", "postprocess_model")


def runtime(default: Any) -> Any:
    """A config field that only matters at run time (compute dtype, kernel): may be overridden for a saved checkpoint.

    Fields without this mark are *storage*: what is on disk fixes them.
    """
    return field(default=default, metadata={"runtime": True})


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """Data of a quantization method, in the JSON format that the ecosystem's checkpoints already use.

    Subclass it as a frozen, keyword-only dataclass whose fields are the JSON's. Validate in ``__post_init__`` and name
    the field in the message. ``torch.dtype`` fields are written as ``"bfloat16"``.
    """

    quant_method: ClassVar[str] = ""
    ignored_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that other writers add and that carry nothing this config needs."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON object of a ``quantization_config``.

        Raises:
            ConfigError: a field is unknown or missing, or a value doesn't fit; the message names it.
        """
        hints = get_type_hints(cls)
        fields = dataclasses.fields(cls)
        known = {item.name for item in fields}
        values = {name: value for name, value in data.items() if name != "quant_method"}
        unknown = sorted(values.keys() - known - cls.ignored_fields)
        if unknown:
            raise ConfigError(
                f"{cls.__name__} has no field {', '.join(map(repr, unknown))}; known fields: {', '.join(sorted(known))}"
            )
        none = dataclasses.MISSING
        needed = {item.name for item in fields if item.init and item.default is none and item.default_factory is none}
        missing = sorted(needed - values.keys())
        if missing:
            raise ConfigError(f"{cls.__name__} needs {', '.join(map(repr, missing))}, and the config doesn't say it")
        return cls(
            **{
                name: _dtype_from_json(cls, name, value) if "dtype" in str(hints[name]) else value
                for name, value in values.items()
                if name in known
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that ``from_dict`` reads, ``quant_method`` included."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {"quant_method": self.quant_method} | {
            name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for name, value in values.items()
        }

    @classmethod
    def runtime_fields(cls) -> frozenset[str]:
        """Names of the fields a user may override for a saved checkpoint."""
        return frozenset(item.name for item in dataclasses.fields(cls) if item.metadata.get("runtime"))

    def overridden_by(self, other: Self, asked: Collection[str] | None = None) -> Self:
        """This config, that of a saved checkpoint, with what a user overrides.

        Args:
            other: the user's config.
            asked: names of the fields that the user spelled out. If not given, every runtime field, and the storage
                fields that aren't at their defaults.

        Raises:
            ConfigError: a storage field would change, which the saved weights have fixed.
        """
        runtime_names = self.runtime_fields()
        if asked is None:
            asked = runtime_names | other.beside_defaults()
        changed = [name for name in asked if getattr(other, name, None) != getattr(self, name, None)]
        fixed = [name for name in changed if name not in runtime_names]
        if fixed:
            found = ", ".join(f"{name}={getattr(self, name)!r} (asked for {getattr(other, name)!r})" for name in fixed)
            raise ConfigError(
                f"the checkpoint is already quantized and fixes {found}; only {sorted(runtime_names)} can be "
                "overridden. Drop quantize=, or load the unquantized checkpoint."
            )
        return dataclasses.replace(self, **{name: getattr(other, name) for name in changed})

    def beside_defaults(self) -> frozenset[str]:
        """Names of the fields that aren't at their defaults."""
        return frozenset(item.name for item in dataclasses.fields(self) if getattr(self, item.name) != item.default)


def _dtype_from_json(cls: type, name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    dtype = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{cls.__name__}.{name}: {value!r} is not the name of a torch dtype")
    return dtype


ConfigT = TypeVar("ConfigT", bound=QuantizationConfig)


class Quantizer(ABC, Generic[ConfigT]):
    """A backend's object that serves one load.

    The core asks it, as data, which parameters it takes and what they will be stored as; then calls its stages:
    ``preprocess_model`` (swap modules on the meta device), ``quantize_param`` (one full-precision tensor in, the
    stored tensors out) and ``postprocess_model``. Decorate those with ``@quantdock.hookimpl``. Loading a checkpoint
    that is already quantized takes the same road without ``quantize_param``.

    Attributes:
        config: the config of this load.
        prequantized: whether the checkpoint holds quantized tensors already.
        parameters: what the plan gave to this quantizer, by name; set before ``preprocess_model``.
        stored: component specs as found in the checkpoint, per parameter; empty when quantizing on load.
        metadata: what the headers of the checkpoint's files say beside their tensors; set before anything is asked.
        stored_as: the name that each parameter stored quantized has in the checkpoint; set before ``refusal``.
        assemblies: the pieces that a parameter is put together from, where the checkpoint doesn't store it as one
            tensor; set before ``refusal``.
    """

    config_class: ClassVar[type[QuantizationConfig]]
    capabilities: ClassVar[Capabilities] = Capabilities()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _STAGES:
            method = cls.__dict__.get(name)
            if method is not None and not hasattr(method, "quantdock_impl"):
                raise TypeError(f"{cls.__name__}.{name} would never be called: decorate it with @quantdock.hookimpl")

    def __init__(self, config: ConfigT, *, prequantized: bool = False) -> None:
        self.config = config
        self.prequantized = prequantized
        self.parameters: Mapping[str, Parameter] = {}
        self.stored: Mapping[str, Mapping[str, TensorSpec]] = {}
        self.metadata: Mapping[str, str] = {}
        self.stored_as: Mapping[str, str] = {}
        self.assemblies: Mapping[str, Assembly] = {}

    # What the core asks -------------------------------------------------------------------------------------------

    @abstractmethod
    def refusal(self, parameter: Parameter) -> str | None:
        """Why this method doesn't quantize ``parameter``; ``None`` when it does.

        The reason appears in the plan's coverage ("3-D parameter", "not a linear layer").
        """

    @abstractmethod
    def layout(self, parameter: Parameter) -> Layout:
        """The components ``parameter`` is stored as, and their exact bytes.

        Raises:
            UnsupportedError: its shape doesn't fit the method; never a fallback.
        """

    def companions(self) -> Mapping[str, str]:
        """Stored names beside a parameter's own that belong to it: component -> the parameter's leaf name.

        For instance ``{"weight_scale": "weight"}``: the stored tensor ``x.y.weight_scale`` is a part of ``x.y.weight``.
        The default is for methods that never load what others have quantized.
        """
        return {}

    def stands_for(self, name: str, found: Mapping[str, TensorSpec]) -> TensorSpec | None:
        """Dtype and shape of the weight that components stand for; ``None`` when they don't tell.

        Where a weight goes, architectures are asked by its name and shape; codes that share words have another shape.

        Args:
            name: the weight's, as it would be stored in full precision.
            found: component -> dtype and shape.
        """
        return None

    def stored_layout(self, parameter: Parameter, found: Mapping[str, TensorSpec]) -> Layout:
        """The layout of a parameter that the checkpoint holds quantized, checked against what was found.

        Raises:
            UnsupportedError: components are missing or have the wrong dtype or shape; the message names them.
        """
        layout = self.layout(parameter)
        problems = [f"component {name!r} is missing" for name in layout.components.keys() - found.keys()]
        problems += [
            f"component {name!r} is not part of the format" for name in found.keys() - layout.components.keys()
        ]
        problems += [
            f"component {name!r} is {found[name]}, expected {spec}"
            for name, spec in layout.components.items()
            if name in found and found[name] != spec and name not in layout.variable
        ]
        if problems:
            raise UnsupportedError(f"{parameter.name}: " + "; ".join(sorted(problems)))
        return layout

    def assemble(
        self, parameter: Parameter, pieces: Mapping[str, Mapping[str, StoredTensor]]
    ) -> Mapping[str, Assembly]:
        """How the components of a parameter are put together from those of several quantized pieces.

        Asked where a checkpoint stores one by one what the architecture has as one parameter, such as the experts of a
        layer. ``self.assemblies[parameter.name]`` says where each piece goes in full precision.

        Args:
            parameter: which one.
            pieces: the name of a piece -> component -> stored tensor, with what is stored under the piece's own name
                by that name's leaf. A piece may lack components, or be in full precision.

        Returns:
            Component of the parameter -> its shape, and the stored tensors (by their names) that fill it. Each of them
            has to be used once and as a whole; the dtype is theirs.

        Raises:
            UnsupportedError: it can't be done; the message names the stored tensor and the reason.
        """
        raise UnsupportedError(f"{type(self).__name__} can't put {parameter.name!r} together")

    def stored_in_pieces(self, parameter: Parameter) -> bool:
        """Whether an architecture that stores ``parameter`` in pieces can save those of its components, too."""
        return False

    def disassemble(
        self, parameter: Parameter, exported: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> Mapping[str, torch.Tensor]:
        """The stored tensors of a parameter for which ``stored_in_pieces`` is true; the reverse of ``assemble``.

        Args:
            parameter: which one.
            exported: component -> what ``Architecture.export`` makes of it when it takes the parameter's place: the
                name of a piece, as if it were in full precision -> the piece's part of the component. One piece with
                the parameter's name where the architecture stores it as it is.

        Returns:
            Stored name -> tensor.
        """
        raise NotImplementedError(f"{type(self).__name__} takes pieces, but has no disassemble")

    def saved_config(self, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
        """The ``quantization_config`` of the model when it is saved.

        Args:
            parameters: every parameter of the model, so that a format that lists what it left alone can do so;
                ``self.parameters`` are those this quantizer has.
        """
        return self.config.to_dict()

    def saved_metadata(self, model: torch.nn.Module) -> Mapping[str, str]:
        """What the headers of saved weight files say beside their tensors, all of them alike; nothing by default."""
        return {}

    def check_device(self, device: torch.device) -> None:
        """Raise ``UnsupportedError`` with the reason and the fix when this method can't run on ``device``."""

    def shared_nbytes(self) -> int:
        """Exact bytes that all modules of this load hold together, beside each parameter's own (a code table)."""
        return 0

    def preferred_device(self) -> torch.device | None:
        """Where a model goes when the user names no device; ``None`` for no preference."""
        return None

    # What the core calls ------------------------------------------------------------------------------------------

    @abstractmethod
    def preprocess_model(self, model: torch.nn.Module) -> None:
        """Stage: swap the modules that own ``self.parameters``, on the meta device."""

    @abstractmethod
    def quantize_param(self, parameter: Parameter, tensor: torch.Tensor) -> Mapping[str, torch.Tensor] | None:
        """Stage: one full-precision tensor in, the components of ``layout(parameter)`` out."""

    def begin_slices(self, parameter: Parameter, device: torch.device) -> dict[str, torch.Tensor]:
        """Room for what ``quantize_slice`` makes, under names of your choice; for layouts that have ``slices``.

        The default makes uninitialised tensors of the layout's components.
        """
        components = self.layout(parameter).components
        return {name: torch.empty(spec.shape, dtype=spec.dtype, device=device) for name, spec in components.items()}

    def quantize_slice(
        self, parameter: Parameter, tensor: torch.Tensor, start: int, parts: Mapping[str, torch.Tensor]
    ) -> None:
        """Quantize one slice of a parameter into ``parts``.

        All slices together have to give the bits that ``quantize_param`` gives. Called from several threads at once,
        with slices that don't overlap. Don't mutate or keep ``tensor``.

        Args:
            parameter: which one; its ``spec`` is that of the whole.
            tensor: the slice, on the device of ``parts``; any strides.
            start: index of its first row, along the layout's ``slices.dim``.
            parts: what ``begin_slices`` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} declares slices, but has no quantize_slice")

    def finish_slices(self, parameter: Parameter, parts: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The components of ``layout(parameter)``, once every slice is in ``parts``; by default ``parts`` itself."""
        return parts

    def calibration(self) -> Calibration | None:
        """The data whose activations this load has to look at; ``None`` for a method, or a load, that needs none.

        With data, ``calibrate`` takes the place of ``quantize_param`` for all of ``parameters``.
        """
        return None

    def calibrate(self, block: CalibrationBlock) -> Iterator[tuple[Parameter, Mapping[str, torch.Tensor]]]:
        """Quantize the parameters of one block, in the thread that called ``load`` and without gradients.

        Called for one block after another, in order of execution. At each yield the core puts the dequantized
        components in the place of the weight, so what the block computes from then on is what it will compute
        quantized.

        Args:
            block: in full precision; the blocks before it are quantized already.

        Yields:
            Each of ``block.parameters`` once, in any order, with the components of ``layout(parameter)``.

        Raises:
            CalibrationError: its activations can't be used.
        """
        raise NotImplementedError(f"{type(self).__name__} asks for calibration, but has no calibrate")

    def calibration_bytes(self, parameters: Sequence[Parameter], rows: int) -> int:
        """Bytes that ``calibrate`` allocates at the most, its results not counted.

        Args:
            parameters: those of one block.
            rows: tokens of the largest batch.
        """
        return 0

    def install(self, model: torch.nn.Module, parameter: Parameter, components: Mapping[str, torch.Tensor]) -> None:
        """Put the components of one parameter into the model, on the device they are on.

        The default sets each component on the owning module under its own name: as a buffer where the module has a
        buffer of that name, as a parameter without gradient otherwise.
        """
        module = parameter.owner(model)
        for name, tensor in components.items():
            if name in module._buffers:
                module._buffers[name] = tensor
            else:
                module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))

    def components(self, model: torch.nn.Module, parameter: Parameter) -> Mapping[str, torch.Tensor]:
        """The stored tensors of one parameter of a loaded model, as they are saved; the reverse of ``install``."""
        module = parameter.owner(model)
        state = module.state_dict()
        return {name: state[name] for name in self.layout_of(parameter).components}

    def dequantize(self, components: Mapping[str, torch.Tensor], parameter: Parameter) -> torch.Tensor:
        """The full-precision tensor that the components stand for, in ``parameter.spec``'s dtype and shape.

        Raises:
            UnsupportedError: this method can't dequantize.
        """
        raise UnsupportedError(f"{type(self).__name__} can't dequantize {parameter.name}")

    def restore_module(self, module: torch.nn.Module, parameter: Parameter) -> torch.nn.Module:
        """The full-precision module that a swapped ``module`` stands for, on the meta device; for ``dequantize``.

        The default knows linear layers.

        Raises:
            UnsupportedError: the module was something else.
        """
        if parameter.role != "linear":
            raise UnsupportedError(f"{type(self).__name__} can't turn {type(module).__name__} back into its original")
        outputs, inputs = parameter.spec.shape
        bias = getattr(module, "bias", None) is not None
        return torch.nn.Linear(inputs, outputs, bias=bias, device="meta")

    # What the core knows ------------------------------------------------------------------------------------------

    def layout_of(self, parameter: Parameter) -> Layout:
        """The layout in force for ``parameter`` in this load: the stored one if it was stored quantized."""
        found = self.stored.get(parameter.name)
        return self.layout(parameter) if found is None else self.stored_layout(parameter, found)
