"""The engine: a budget that holds, errors that name their place, and Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantdock
from quantdock.budget import Budget

sys.path.insert(0, str(Path(__file__).parent))
from plain import Plain, write_plain


@settings(max_examples=50, deadline=None)
@given(amounts=st.lists(st.integers(0, 120), max_size=40), limit=st.integers(1, 100), threads=st.integers(1, 6))
def test_the_budget_is_never_exceeded_but_by_one_alone(amounts: list[int], limit: int, threads: int) -> None:
    budget = Budget(limit)
    inside: list[int] = []
    lock = threading.Lock()
    waiting = list(amounts)
    seen: list[tuple[int, int]] = []

    def work() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                amount = waiting.pop(0)
            assert budget.take(amount, lambda: False)
            with lock:
                inside.append(amount)
                seen.append((sum(inside), sum(1 for other in inside if other)))
                inside.remove(amount)
            budget.give(amount)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()
    assert all(total <= limit or count == 1 for total, count in seen)
    assert budget.taken == 0


def test_a_waiting_take_lets_go_when_stopped() -> None:
    budget = Budget(10)
    assert budget.take(10, lambda: False)
    stopped = threading.Event()
    result: list[bool] = []
    waiter = threading.Thread(target=lambda: result.append(budget.take(5, stopped.is_set)))
    waiter.start()
    stopped.set()
    budget.wake()
    waiter.join(5)
    assert result == [False]


def test_an_error_in_a_unit_stops_the_load_and_names_its_place(tmp_path: Path) -> None:
    from quantdock.testing import installed_plugin

    write_plain(tmp_path / "model")
    module = textwrap.dedent(
        """
        from collections.abc import Mapping
        from dataclasses import dataclass
        import quantdock, torch
        from quantdock import hookimpl, Layout, TensorSpec

        @dataclass(frozen=True, kw_only=True)
        class Config(quantdock.QuantizationConfig):
            quant_method = "breaks"

        class Breaks(quantdock.Quantizer[Config]):
            config_class = Config
            def refusal(self, parameter):
                return None if parameter.role == "linear" else "no linear weight"
            def layout(self, parameter):
                return Layout(components={"weight": parameter.spec})
            @hookimpl
            def preprocess_model(self, model): pass
            @hookimpl
            def quantize_param(self, parameter, tensor):
                if parameter.name == "layers.1.weight":
                    raise RuntimeError("the kernel said no")
                return {"weight": tensor}
        """
    )
    with (
        installed_plugin(
            tmp_path / "site",
            dist="quantdock-breaks",
            version="1.2.3",
            entry_points={"quantdock.quantizers": {"breaks": "breaks_plugin:Breaks"}},
            modules={"breaks_plugin": module},
        ),
        pytest.raises(quantdock.LoadError) as caught,
    ):
        quantdock.load(tmp_path / "model", model=Plain, quantize={"quant_method": "breaks"}, workers=2)
    error = caught.value
    assert error.parameter == "layers.1.weight"
    assert error.stored == ("layers.1.weight",)
    assert error.file == tmp_path / "model" / "model.safetensors"
    for part in ("RuntimeError: the kernel said no", "quantdock-breaks 1.2.3"):
        assert part in str(error)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("quantdock-")]


def test_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    """A load whose units take long is interrupted; the process is gone within seconds."""
    script = tmp_path / "load.py"
    folder = tmp_path / "model"
    write_plain(folder)
    script.write_text(
        textwrap.dedent(
            f"""
            import signal, sys, time
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            import quantdock
            from plain import Plain
            def slow(progress):
                print("unit", flush=True)
                time.sleep(30)
            quantdock.load({str(folder)!r}, model=Plain, progress=slow, workers=2, memory_budget=1)
            """
        )
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "unit"
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - started < 10
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors


def test_casting_goes_in_slices(tmp_path: Path) -> None:
    """A cast of a large parameter has one slice in flight, not the tensor."""
    from safetensors.torch import save_file

    from quantdock.units import SLICE

    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(4096, 2048))

    values = torch.randn(4096, 2048, dtype=torch.float64)
    save_file({"weight": values}, tmp_path / "model.safetensors")
    plan = quantdock.plan(tmp_path, model=Wide, dtype="float32")
    assert values.nbytes > 3 * SLICE
    assert plan.largest_unit_nbytes == SLICE
    model = plan.execute()
    assert torch.equal(model.weight, values.float())


def test_an_interrupted_load_leaves_torchs_threads_as_they_were(tmp_path: Path) -> None:
    """New threads get what the process had, not the workers' one."""
    write_plain(tmp_path)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    def threads_of_a_new_thread() -> int:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found[0]

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyboardInterrupt):
            quantdock.load(tmp_path, model=Plain, progress=interrupt)
        assert torch.get_num_threads() == 3
        assert threads_of_a_new_thread() == 3
    finally:
        torch.set_num_threads(before)
