from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

import perp_kernels
from perp import demo, doctor


def shown() -> str:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(doctor.examine())
    return console.file.getvalue()


def test_versions_machine_and_every_op_are_told():
    told = shown()
    assert torch.__version__ in told
    assert perp_kernels.__version__ in told
    for op, (backend, _) in perp_kernels.active().items():
        assert any(line.split()[:2] == [op, backend] for line in told.splitlines())
    assert "GPU" in told
    assert "CUDA kernels" in told
    assert perp_kernels.cuda.active() in " ".join(told.split())


def test_what_is_missing_comes_with_its_command(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    told = " ".join(shown().split())
    assert demo.INSTALL in told
    assert "pip install 'perp[tasks]'" in told


def test_a_machine_without_the_native_extension_is_told_why(monkeypatch):
    monkeypatch.setattr(doctor.cpu, "available", False)
    monkeypatch.setattr(doctor.cpu, "why", "no compiler here")
    assert "unknown (no compiler here)" in shown()


@pytest.mark.parametrize("here, words", [(True, "bf16 products yes"), (False, "emulated and slow")])
def test_what_bf16_costs_here_is_told(here, words, monkeypatch):
    monkeypatch.setattr(doctor.machine, "multiplies_bf16", lambda device: here)
    assert words in " ".join(shown().split())
