"""The command line: ``snn-sparse run | doctor | plugins | supported | demo | bench | ttfs | experiment``.

Exit codes: 0 fine, 1 a check or the work failed, 2 wrong usage. Heavy modules are imported inside the
commands.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .cli_experiment import app as experiment_app
from .cli_ttfs import app as ttfs_app
from .errors import ConfigError, SparsePluginError

app = typer.Typer(
    name="snn-sparse",
    help="Sparse training of spiking networks in snnTorch and Norse.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(ttfs_app)
app.add_typer(experiment_app)

_COLOURS = {
    "ok": "green",
    "loaded": "green",
    "unavailable": "yellow",
    "idle": "yellow",
    "failed": "red",
    "broken": "red",
}


class DataName(str, Enum):
    """Choices of ``--data``."""

    digits = "digits"
    mnist = "mnist"
    fashion_mnist = "fashion-mnist"


class LibraryName(str, Enum):
    """Choices of ``--library``."""

    snntorch = "snntorch"
    norse = "norse"


class SweepName(str, Enum):
    """Choices of ``--sweep``."""

    density = "density"
    size = "size"


class ProtocolName(str, Enum):
    """Choices of ``--protocol``."""

    network = "network"
    s3gd = "s3gd"


JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")]


def main() -> None:
    """Entry point of the ``snn-sparse`` command."""
    app()


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    context.obj = {"debug": debug}
    if version:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


@contextmanager
def _readable_errors(context: typer.Context) -> Iterator[None]:
    """Errors of this package end the command in one line; ``--debug`` lets them through."""
    try:
        yield
    except SparsePluginError as error:
        if context.obj["debug"]:
            raise
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {_escaped(str(error))}", highlight=False)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error


def _consoles(as_json: bool) -> tuple[Console, Callable[[Any], None]]:
    """A console for people, and a printer of JSON; with ``--json`` people are served on stderr."""
    return Console(stderr=as_json), lambda data: print(json.dumps(data, indent=2), file=sys.stdout)


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    }
)
def run(
    context: typer.Context,
    script: Annotated[str, typer.Argument(help="A script, or with -m a module; its own arguments follow.")],
    module: Annotated[bool, typer.Option("-m", help="Run a module, as python -m does.")] = False,
    threshold: Annotated[
        str, typer.Option(help="backprop_threshold: auto, exact, or a distance from the threshold.")
    ] = "auto",
    backend: Annotated[str, typer.Option(help="auto, or the name of a backend.")] = "auto",
    fuse: Annotated[bool, typer.Option(help="Run step loops as fused calls over all steps.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No summary at the end.")] = False,
) -> None:
    """Run an unmodified script in sparse mode, and say at the end what ran sparse."""
    with _readable_errors(context):
        from .session import run_script, sparse_session

        options: dict[str, Any] = {"backprop_threshold": _threshold(threshold), "backend": backend}
        if not fuse:
            options["fuse_time"] = False
        session = None
        try:
            with sparse_session(**options) as session:
                run_script(script, context.args, module=module)
        finally:
            if session is not None and not quiet:
                for line in session.lines():
                    print(line, file=sys.stderr)


def _threshold(text: str) -> Any:
    if text in ("auto", "exact"):
        return "auto" if text == "auto" else None
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"--threshold takes auto, exact or a number, got {text!r}.") from error


@app.command()
def doctor(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Show versions, devices and backends, and check each backend against the reference."""
    with _readable_errors(context):
        from .doctor import diagnose

        console, emit = _consoles(as_json)
        with console.status("running every backend against the reference"):
            found = diagnose()
        if as_json:
            emit(found)
        else:
            _show_diagnosis(console, found)
    if not found["ok"]:
        raise typer.Exit(1)


def _show_diagnosis(console: Console, found: dict[str, Any]) -> None:
    facts = Table.grid(padding=(0, 2))
    for name, value in found["versions"].items():
        facts.add_row(name, str(value))
    for device in found["devices"]:
        memory = f", {device['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in device else ""
        facts.add_row(device["device"], device["name"] + memory)
    threads = found["threads"]
    facts.add_row("threads", f"{threads['torch']} of {threads['cores']} cores")
    console.print(facts)

    optional = Table(title="optional libraries", title_justify="left", box=None, pad_edge=False)
    for column in ("library", "version", "tested", "for"):
        optional.add_column(column)
    for name, row in found["optional"].items():
        version = row["version"] or "[yellow]not installed[/]"
        tested = " to ".join(dict.fromkeys(row["tested"] or ()))
        optional.add_row(name, f"[red]{version}[/]" if row["warning"] else version, tested, row["for"])
    console.print(optional)
    for row in found["optional"].values():
        if row["warning"]:
            console.print(f"[red]{_escaped(row['warning'])}[/]")

    table = Table(title="backends", title_justify="left", box=None, pad_edge=False)
    for column in ("name", "state", "self-check", "reason"):
        table.add_column(column, overflow="fold")
    for row in found["backends"]:
        checks = "; ".join(
            f"{check['device']}: spikes equal, gradients within {check['gradient_error']:.1e}"
            if check["state"] == "ok"
            else f"{check['device']}: {check['reason']}"
            for check in row["checks"]
        )
        table.add_row(row["name"], _state(row["state"]), _escaped(checks), _escaped(row["reason"]))
    console.print(table)
    console.print("[green]all checks passed[/]" if found["ok"] else "[red]a check failed[/]")


def _state(state: str) -> str:
    return f"[{_COLOURS.get(state, 'white')}]{state}[/]"


@app.command()
def plugins(context: typer.Context, as_json: JsonFlag = False) -> None:
    """List every registered backend, adapter, learner and layer, with its state."""
    with _readable_errors(context):
        rows = _plugin_rows()
        console, emit = _consoles(as_json)
        if as_json:
            emit(rows)
            return
        table = Table(box=None, pad_edge=False)
        for column in ("group", "name", "version", "distribution", "state", "reason"):
            table.add_column(column, overflow="fold")
        for row in rows:
            cells = [_escaped(row[key]) for key in ("group", "name", "version", "distribution")]
            table.add_row(*cells, _state(row["state"]), _escaped(row["reason"]))
        console.print(table)


def _plugin_rows() -> list[dict[str, str]]:
    from . import registry

    rows = []
    for group in registry.GROUPS:
        for plugin in registry.plugins(group).values():
            row = {
                "group": group,
                "name": plugin.name,
                "version": plugin.version,
                "distribution": plugin.distribution,
                "state": "loaded",
                "reason": "",
            }
            try:
                loaded = plugin.load()
                if hasattr(loaded, "available"):
                    usable, row["reason"] = loaded.available()
                    row["state"] = "loaded" if usable else "unavailable"
            except SparsePluginError as error:
                row |= {"state": "broken", "reason": plugin.error or str(error)}
            except Exception as error:  # a third-party plugin may fail in any way
                row |= {"state": "broken", "reason": f"{type(error).__name__}: {error}"}
            rows.append(row)
    return rows


@app.command()
def supported(
    context: typer.Context,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/supported.md.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show every neuron class of the installed libraries: fused or not, with which options, and why."""
    with _readable_errors(context):
        from importlib import import_module

        from . import registry, supported

        for adapter in registry.load_all("adapters").values():
            if adapter.available()[0]:
                import_module(adapter.package)
        table = supported.rows()
        console, emit = _consoles(as_json)
        if as_json:
            emit(supported.as_dicts(table))
        elif as_markdown:
            typer.echo(supported.markdown(table), nl=False)
        else:
            shown = Table("library", "neuron", "fused", "not fused with", "exactness")
            for row in table:
                unfused = "\n".join(f"{option}: {why}" for option, why in row.fallback.items()) or "none"
                shown.add_row(row.library, row.neuron, row.fused, unfused, row.exactness)
            console.print(shown)


@app.command()
def demo(
    context: typer.Context,
    data: Annotated[DataName, typer.Option(help="Which images.")] = DataName.digits,
    root: Annotated[
        Path | None, typer.Option(help="Folder of the idx files of mnist or fashion-mnist.")
    ] = None,
    library: Annotated[LibraryName, typer.Option(help="Whose neurons.")] = LibraryName.snntorch,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 8,
    samples: Annotated[int, typer.Option(min=0, help="Training images to use; 0 is all.")] = 6000,
    steps: Annotated[int, typer.Option(min=10, help="Time steps T.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Batch size B.")] = 64,
    hidden: Annotated[int, typer.Option(min=1, help="Neurons in each of the two hidden layers.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves torch's choice.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo.png"),
    as_json: JsonFlag = False,
) -> None:
    """Train a network on real images, sparse and dense, and compare accuracy, time and memory."""
    with _readable_errors(context):
        from .demo import DemoOptions, run_demo, show

        console, emit = _consoles(as_json)
        options = DemoOptions(
            data=data.value,
            root=root,
            library=library.value,
            epochs=epochs,
            samples=samples,
            steps=steps,
            batch=batch,
            hidden=hidden,
            seed=seed,
            threads=threads,
            out=out,
        )
        result = run_demo(options, console)
        show(result, console)
        if as_json:
            emit(result.as_dict())


@app.command()
def bench(
    context: typer.Context,
    protocol: Annotated[
        ProtocolName, typer.Option(help="network: whole steps; s3gd: backward of layer 2 alone.")
    ] = ProtocolName.network,
    sweep: Annotated[
        SweepName | None, typer.Option(help="Instead: one layer over input density or over size.")
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option(min=1, help="Time steps T; repeat for several. Default: 100 and 500.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size B.")] = None,
    density: Annotated[
        float, typer.Option(min=1e-4, max=1.0, help="Input spikes per input and step.")
    ] = 0.02,
    providers: Annotated[
        str | None, typer.Option(help="Comma-separated; default: all but the opt-in ones.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Add torch.compile of snnTorch's loop: minutes to compile.")
    ] = False,
    reference: Annotated[bool, typer.Option("--reference", help="Add the slow reference backend.")] = False,
    points: Annotated[
        str | None, typer.Option(help="Points of the sweep, comma-separated: densities, or sizes N.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Alternating rounds; medians are over them.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads for everyone.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    peak: Annotated[bool, typer.Option(help="Measure peak memory, each provider in its own process.")] = True,
    out: Annotated[
        Path | None, typer.Option("--json", help="Write rows as JSON to FILE; - is stdout.")
    ] = None,
) -> None:
    """Compare with snnTorch, Norse and SpikingJelly in one alternating run."""
    with _readable_errors(context):
        from . import bench as suite

        to_stdout = out is not None and str(out) == "-"
        console, emit = _consoles(to_stdout)
        options = suite.BenchOptions(
            batch=batch,
            density=density,
            providers=tuple(p.strip() for p in providers.split(",")) if providers else None,
            compiled=compiled,
            reference=reference,
            rounds=rounds,
            threads=threads,
            device=device,
            peak=peak,
        )
        if sweep is not None:
            rows = suite.run_sweep(sweep.value, options, console, _numbers(points))
        elif protocol is ProtocolName.s3gd:
            rows = suite.run_s3gd(options, console, steps[0] if steps else 500)
        else:
            rows = suite.run_network(options, console, tuple(steps or (100, 500)))
        if to_stdout:
            emit(rows)
        elif out is not None:
            out.write_text(json.dumps(rows, indent=2) + "\n")
            console.print(f"{len(rows)} rows written to {out}")


def _numbers(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--points takes numbers separated by commas, got {text!r}.") from error
