"""The command line: one module for the commands of a kind; importing it registers them."""

from __future__ import annotations

from perp import boundary

# isort: off, since this is the order of the help
from perp.cli import evaluate, generate, plan, run
from perp.cli.application import app

__all__ = ["app", "evaluate", "generate", "main", "plan", "run"]


def main() -> None:
    with boundary.process():
        app()
