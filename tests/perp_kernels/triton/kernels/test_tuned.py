"""Every subject of the tuner runs, asks for the configuration it names, and takes every candidate of its space."""

import pytest
import torch

from bench import device, tune
from bench.tune import SPACES, Subject, close
from perp_kernels.triton import launch
from tests.perp_kernels.oracles import DEVICE

from .small import LAUNCHED

device.use(DEVICE.type)
# A quarter of the tokens and of each side on a GPU, enough for several tiles; the interpreter gets less.
SUBJECTS = tune.subjects(4) if LAUNCHED else tune.subjects(64, torch.float16)
if not LAUNCHED:
    # One of each kernel, but for two that take the interpreter minutes: test_pruning.py runs them.
    SUBJECTS = [*{s.kernel: s for s in SUBJECTS if s.kernel not in ("prune_block", "select_row")}.values()]


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: f"{subject.op}-{subject.kernel}")
def test_subjects_run_under_a_candidate(subject: Subject) -> None:
    call = subject.make()
    with launch.observing() as (configured, _):
        expected = call()
    (asked,) = {one.kernel: one for one in configured if one.kernel == subject.kernel}.values()
    assert all(candidate.keys() <= asked.default.values().keys() for candidate in SPACES[subject.kernel])
    smallest = min(SPACES[subject.kernel], key=lambda candidate: sum(candidate.values()))
    with launch.override(**{subject.kernel: smallest}):
        assert close(call(), expected)
    assert not any(bool(leaf.isnan().any()) for leaf in torch.utils._pytree.tree_leaves(expected))
