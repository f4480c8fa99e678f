"""``snn-sparse run``."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from ...core.errors import ConfigError, InputError
from ...core.lines import terminal_width
from .common import readable_errors


def spelled(option: str) -> str:
    """Options of Python are taken as they are spelled there, and those of earlier versions."""
    older = {"threshold": "backprop-threshold", "fuse": "fuse-time", "no-fuse": "no-fuse-time"}
    name = option.replace("_", "-")
    return older.get(name, name)


def run(
    context: typer.Context,
    script: Annotated[str, typer.Argument(help="A script, or with -m a module; its own arguments follow.")],
    module: Annotated[bool, typer.Option("-m", help="Run a module, as python -m does.")] = False,
    threshold: Annotated[
        str,
        typer.Option("--backprop-threshold", help="auto, exact, or a distance from the threshold."),
    ] = "auto",
    exact: Annotated[bool, typer.Option("--exact", help="The whole gradient, as upstream's.")] = False,
    backend: Annotated[str, typer.Option(help="auto, or the name of a backend.")] = "auto",
    min_active: Annotated[
        float | None, typer.Option(help="Share of active neuron-steps below which a call runs exact.")
    ] = None,
    fuse: Annotated[
        bool,
        typer.Option("--fuse-time/--no-fuse-time", help="Run step loops as fused calls over all steps."),
    ] = True,
    max_steps: Annotated[int | None, typer.Option(help="Run a recorded loop after so many steps.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Check that inputs and weights are finite.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No summary at the end.")] = False,
) -> None:
    """Run an unmodified script in sparse mode, and say at the end what ran sparse."""
    from ..session import run_script, sparse_session, threshold_of

    session = None
    try:
        with ExitStack() as sparse:
            with readable_errors(context):  # of the options alone: an error of the script keeps its traceback
                if not module and not Path(script).is_file():
                    raise InputError(f"there is no script {script!r}. For a module use -m.{_advice(script)}")
                if module and not _is_module(script):
                    raise InputError(f"there is no module {script!r} that can be imported from here.")
                if exact and threshold not in ("auto", "exact", "None"):
                    raise ConfigError(f"--exact and --backprop-threshold {threshold} contradict each other.")
                options: dict[str, Any] = {
                    "backprop_threshold": None if exact else threshold_of(threshold),
                    "backend": backend,
                    "max_steps": max_steps,
                    "check": check,
                }
                if min_active is not None:
                    options["min_active"] = min_active
                if not fuse:
                    options["fuse_time"] = False
                session = sparse.enter_context(sparse_session(**options))
            run_script(script, context.args, module=module)
    finally:
        if session is not None and not quiet:
            for line in session.lines(terminal_width()):
                print(line, file=sys.stderr)


def _advice(script: str) -> str:
    return " Leave the name of the interpreter out." if Path(script).name.startswith("python") else ""


def _is_module(name: str) -> bool:
    """Whether ``python -m name`` would find it; packages above it are imported."""
    sys.path.insert(0, "")
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
    finally:
        sys.path.remove("")
