"""Tests of the kernels themselves, run in one of two ways that have to be chosen before Triton is imported: in Triton's
interpreter, on tensors of the CPU (TRITON_INTERPRET=1: a process of ../test_interpreted.py), or launched on a GPU
(PERP_GPU=1: `make gpu`). No other process collects them."""

import os

from .small import INTERPRETED, LAUNCHED

if not INTERPRETED and not LAUNCHED:
    collect_ignore_glob = ["test_*.py"]
elif INTERPRETED:
    collect_ignore = ["test_launched.py"]
elif os.environ.get("TRITON_INTERPRET", "0") == "1":
    raise RuntimeError("PERP_GPU=1 launches kernels, TRITON_INTERPRET=1 does not: set one of them.")
