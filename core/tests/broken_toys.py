"""Toys for the tests of the conformance suite: the example plugin, broken in one way each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "tests" / "toy_plugin" / "quantdock_toy.py"

PRELUDE = """
from __future__ import annotations
import dataclasses, os, time
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import nn
from quantdock import Capabilities, Layout, Slices, UnsupportedError, hookimpl
from quantdock_toy import ToyConfig, ToyLinear, ToyQuantizer, dequantize, quantize

@dataclass(frozen=True, kw_only=True)
class BrokenConfig(ToyConfig):
    quant_method: ClassVar[str] = "broken"

class Broken(ToyQuantizer):
    config_class = BrokenConfig
"""


@dataclass(frozen=True, kw_only=True)
class Toy:
    """What is wrong with it, and what the suite has to say to that."""

    fails: frozenset[str]
    quantizer: str = ""
    """The body of its quantizer class."""
    module: str = ""
    """More of its module."""
    tests: str = ""
    """More of the class that inherits the suite."""
    entry_points: dict[str, dict[str, str]] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)


def toy(*fails: str, **parts: object) -> Toy:
    return Toy(fails=frozenset(f"test_{name}" for name in fails), **parts)  # type: ignore[arg-type]


GROUPED = """
def layout(self, parameter):
    if parameter.spec.shape[1] % 16:
        raise UnsupportedError("rows aren't a multiple of 16 long")
    return super().layout(parameter)
"""

SLICED = """
def layout(self, parameter):
    slices = Slices(dim=0, multiple=2, working_bytes=65536, working_copies=4)
    return dataclasses.replace(super().layout(parameter), slices=slices)
def quantize_slice(self, parameter, tensor, start, parts):
    weight, scale = quantize(tensor)
    parts["weight"][start : start + len(tensor)] = weight
    parts["weight_scale"][start : start + len(tensor)] = scale
"""

TOYS = {
    "sound": toy(),
    "sound, in slices": toy(quantizer=SLICED),
    "confuses its slices": toy(
        "slices_change_nothing",
        quantizer=SLICED.replace("+ len(tensor)] = scale", "+ len(tensor)] = scale.roll(min(start, 1))"),
    ),
    "writes to its slices": toy(
        "slices_change_nothing", quantizer=SLICED.replace("quantize(tensor)", "quantize(tensor.clamp_(-2, 2))")
    ),
    "lies about the memory of its slices": toy(
        "working_bytes_of_slices_are_enough",
        quantizer=SLICED.replace("working_bytes=65536, working_copies=4", "working_bytes=0"),
    ),
    "holds more than it says from slice to slice": toy(
        "working_bytes_of_slices_are_enough",
        quantizer=SLICED
        + """
def begin_slices(self, parameter, device):
    return super().begin_slices(parameter, device) | {"spare": torch.empty(parameter.spec.shape, device=device)}
def finish_slices(self, parameter, parts):
    return {name: part for name, part in parts.items() if name != "spare"}
""",
    ),
    "sound in all that it claims": toy(
        quantizer=GROUPED
        + """
capabilities = Capabilities(dequantize=True, train=True, compile=True)
def check_device(self, device):
    if device.type != "cpu":
        raise UnsupportedError(f"no kernel for {device}; load to the CPU")
""",
        tests='unsupported_shape = (10, 32)\nunsupported_device = "cuda"\nheavy_modules = ("colorsys",)',
    ),
    "sound, and only quantizes": toy(
        quantizer="capabilities = Capabilities(save=False, load=False)\n", tests="min_sqnr_db = 35.0"
    ),
    "sound, and only loads": toy(quantizer="capabilities = Capabilities(quantize=False)\n"),
    "lies about its bytes": toy(
        "declared_bytes_are_measured_bytes",
        "saved_model_loads_bit_for_bit",
        quantizer="""
def layout(self, parameter):
    return dataclasses.replace(super().layout(parameter), resident=parameter.spec.numel)
""",
    ),
    "keeps the weight in full precision too": toy(
        "declared_bytes_are_measured_bytes",
        "saved_model_loads_bit_for_bit",
        quantizer="""
def install(self, model, parameter, components):
    super().install(model, parameter, components)
    model.get_submodule(parameter.module).cache = self.dequantize(components, parameter)
""",
    ),
    "lies about its working memory": toy(
        "working_bytes_are_enough",
        quantizer="""
def layout(self, parameter):
    return dataclasses.replace(super().layout(parameter), working_bytes=parameter.spec.numel)
""",
    ),
    "swaps a module that isn't its own": toy(
        "preprocess_touches_only_its_own",
        "dequantized_model_is_the_same_model",
        module="class Norm(nn.LayerNorm): pass",
        quantizer="""
@hookimpl
def preprocess_model(self, model):
    super().preprocess_model(model)
    norm = Norm(model.norm.normalized_shape, dtype=model.norm.weight.dtype, device="meta")
    model.set_submodule("norm", norm)
""",
    ),
    "tags modules that aren't its own": toy(
        "preprocess_touches_only_its_own",
        quantizer="""
@hookimpl
def preprocess_model(self, model):
    super().preprocess_model(model)
    model.norm.quantized_by = "broken"
""",
    ),
    "swaps what is skipped": toy(
        "skip_lists_hold",
        quantizer="""
@hookimpl
def preprocess_model(self, model):
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "head":
            model.set_submodule(name, ToyLinear(module, self.config.compute_dtype))
""",
    ),
    "keeps state in its class": toy(
        "loads_share_no_state",
        quantizer="""
scales: ClassVar[dict] = {}
@hookimpl
def quantize_param(self, parameter, tensor):
    weight, scale = quantize(tensor)
    return {"weight": weight, "weight_scale": self.scales.setdefault((parameter.name, scale.shape), scale).clone()}
""",
    ),
    "keeps state between calls": toy(
        "workers_change_nothing",
        quantizer="""
@hookimpl
def quantize_param(self, parameter, tensor):
    self.made = quantize(tensor)
    mine = self.made[0].shape
    time.sleep(0.02)
    weight, scale = self.made
    if weight.shape != mine:
        weight, scale = (torch.zeros_like(part) for part in quantize(tensor))
    return {"weight": weight.clone(), "weight_scale": scale.clone()}
""",
    ),
    "rounds at random": toy(
        "two_loads_are_equal",
        "workers_change_nothing",
        "loads_share_no_state",
        quantizer="""
@hookimpl
def quantize_param(self, parameter, tensor):
    weight, scale = quantize(tensor)
    return {"weight": weight - torch.bernoulli(torch.full(weight.shape, 0.01)).to(torch.int8), "weight_scale": scale}
""",
    ),
    "sets a flag for everybody": toy(
        "load_leaves_no_trace",
        quantizer="""
@hookimpl
def postprocess_model(self, model):
    torch.set_float32_matmul_precision("highest" if os.environ.pop("AGAIN", None) else "high")
""",
    ),
    "writes to its input": toy(
        "quantize_param_leaves_its_input_alone",
        quantizer="""
@hookimpl
def quantize_param(self, parameter, tensor):
    return super().quantize_param(parameter, tensor.clamp_(-2, 2))
""",
    ),
    "keeps its input": toy(
        "quantize_param_leaves_its_input_alone",
        quantizer="""
@hookimpl
def quantize_param(self, parameter, tensor):
    self.last = tensor[0]
    return super().quantize_param(parameter, tensor)
""",
    ),
    "is too coarse": toy(
        "quantized_weights_are_close",
        quantizer="""
@hookimpl
def quantize_param(self, parameter, tensor):
    weight, scale = quantize(tensor)
    return {"weight": weight // 16 * 16, "weight_scale": scale}
""",
    ),
    "forgets the bias": toy(
        "dequantized_model_is_the_same_model",
        module="""
class Biasless(ToyLinear):
    def forward(self, x):
        return nn.functional.linear(x, dequantize(self.weight, self.weight_scale, x.dtype))
""",
        quantizer="""
@hookimpl
def preprocess_model(self, model):
    for parameter in self.parameters.values():
        linear = model.get_submodule(parameter.module)
        model.set_submodule(parameter.module, Biasless(linear, self.config.compute_dtype))
""",
    ),
    "says nothing about what it leaves alone": toy(
        "every_parameter_is_accounted_for",
        quantizer="""
def refusal(self, parameter):
    return None if parameter.role == "linear" else ""
""",
    ),
    "falls back when a shape doesn't fit": toy(
        "unfit_shape_is_an_error",
        quantizer="""
def refusal(self, parameter):
    unfit = parameter.role == "linear" and parameter.spec.shape[1] % 16
    return "rows aren't a multiple of 16 long" if unfit else super().refusal(parameter)
""",
        tests="unsupported_shape = (10, 32)",
    ),
    "says nothing about a device": toy("unfit_device_is_an_error", tests='unsupported_device = "cuda"'),
    "drops a component when it saves": toy(
        "declared_bytes_are_measured_bytes",
        "quantized_weights_are_close",
        "dequantized_model_is_the_same_model",
        "saved_model_loads_bit_for_bit",
        "saving_again_changes_nothing",
        "missing_component_is_named",
        "unexpected_component_is_named",
        "misshapen_component_is_named",
        "saved_runtime_fields_can_change",
        quantizer="""
@hookimpl
def preprocess_model(self, model):
    super().preprocess_model(model)
    for parameter in self.parameters.values():
        module = model.get_submodule(parameter.module)
        module.register_buffer("weight_scale", module._buffers.pop("weight_scale"), persistent=False)
def components(self, model, parameter):
    return {"weight": model.get_submodule(parameter.module).weight}
""",
    ),
    "saves the name of another method": toy(
        "saved_config_names_the_method",
        quantizer="""
def saved_config(self, parameters):
    return super().saved_config(parameters) | {"quant_method": "other"}
""",
        entry_points={"quantdock.quantizers": {"broken": "broken_toy:Broken", "other": "broken_toy:Broken"}},
    ),
    "unties what is tied": toy(
        "tied_weights_stay_tied",
        "declared_bytes_are_measured_bytes",
        "saved_model_loads_bit_for_bit",
        quantizer="""
@hookimpl
def postprocess_model(self, model):
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
""",
    ),
    "saves other values than it has": toy(
        "saved_model_loads_bit_for_bit",
        quantizer="""
def components(self, model, parameter):
    found = super().components(model, parameter)
    return found | {"weight_scale": found["weight_scale"].bfloat16().float()}
""",
    ),
    "loads components of any shape": toy(
        "missing_component_is_named",
        "misshapen_component_is_named",
        quantizer="""
def stored_layout(self, parameter, found):
    return Layout(components=found)
""",
    ),
    "reads past unknown config fields": toy(
        "unknown_config_field_is_named",
        module="""
class Lenient(BrokenConfig):
    @classmethod
    def from_dict(cls, data):
        return super().from_dict({name: value for name, value in data.items() if name in ("bits", "compute_dtype")})
Broken.config_class = Lenient
""",
    ),
    "has a config that JSON can't hold": toy(
        "config_survives_json",
        module="""
@dataclass(frozen=True, kw_only=True)
class Pair(BrokenConfig):
    pair: tuple[int, int] = (1, 2)
Broken.config_class = Pair
""",
    ),
    "has a config that can change": toy(
        "config_is_frozen_data",
        module="""
class Loose(BrokenConfig):
    __setattr__ = object.__setattr__
Broken.config_class = Loose
""",
    ),
    "lets nothing override, and everything": toy(
        "saved_storage_fields_are_fixed",
        "saved_runtime_fields_can_change",
        module="""
class Deaf(BrokenConfig):
    def overridden_by(self, other):
        return self
Broken.config_class = Deaf
""",
    ),
    "has a preset of another method": toy(
        "presets_are_configs_of_the_method",
        module="OTHER = ToyConfig()",
        entry_points={"quantdock.presets": {"broken-int8": "broken_toy:OTHER"}},
    ),
    "imports its library at once": toy(
        "naming_imports_nothing_heavy", module="import colorsys", tests='heavy_modules = ("colorsys",)'
    ),
    "is imported by every load": toy(
        "other_loads_leave_the_plugin_alone",
        module="class Stage: pass",
        entry_points={"quantdock.stages": {"broken": "broken_toy:Stage"}},
    ),
    "is imported when Python starts": toy(
        "listing_imports_nothing",
        "other_loads_leave_the_plugin_alone",
        modules={"sitecustomize": "import broken_toy"},
    ),
    "claims to train": toy(
        "gradients_flow",
        module="""
class Detached(ToyLinear):
    def forward(self, x):
        return super().forward(x.detach())
""",
        quantizer="""
capabilities = Capabilities(dequantize=True, train=True)
@hookimpl
def preprocess_model(self, model):
    for parameter in self.parameters.values():
        linear = model.get_submodule(parameter.module)
        model.set_submodule(parameter.module, Detached(linear, self.config.compute_dtype))
""",
    ),
    "claims to compile": toy(
        "compiles_in_one_graph",
        module="""
class Looking(ToyLinear):
    def forward(self, x):
        return super().forward(x) if float(x.sum()) < 1e30 else x
""",
        quantizer="""
capabilities = Capabilities(dequantize=True, compile=True)
@hookimpl
def preprocess_model(self, model):
    for parameter in self.parameters.values():
        linear = model.get_submodule(parameter.module)
        model.set_submodule(parameter.module, Looking(linear, self.config.compute_dtype))
""",
    ),
}
