"""``snn-sparse doctor | plugins | supported``."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ...core.errors import MissingDependencyError, SparsePluginError
from ...core.tables import show_words
from .common import JsonFlag, consoles, escaped, readable_errors

if TYPE_CHECKING:
    from ..supported import Row

_COLOURS = {
    "ok": "green",
    "loaded": "green",
    "unavailable": "yellow",
    "idle": "yellow",
    "failed": "red",
    "broken": "red",
}


KernelOf = Annotated[
    str | None, typer.Option("--kernel", metavar="NEURON", help="Print a neuron's GPU kernels instead.")
]


def doctor(context: typer.Context, as_json: JsonFlag = False, kernel: KernelOf = None) -> None:
    """Show versions, devices and backends, and check each backend against the reference."""
    with readable_errors(context):
        from ..doctor import diagnose, kernel_source

        if kernel is not None:
            _import_libraries()
            typer.echo(kernel_source(kernel))
            return
        console, emit = consoles(as_json)
        with console.status("running every backend against the reference"):
            found = diagnose()
        if as_json:
            emit(found)
        else:
            _show_diagnosis(console, found)
    if not found["ok"]:
        raise typer.Exit(1)


def _import_libraries() -> None:
    """Adapters know the neurons of a library once it is imported."""
    from importlib import import_module

    from ...core import registry

    for adapter in registry.load_all("adapters").values():
        if adapter.available()[0]:
            with suppress(ImportError):  # installed, but broken: it has no neurons
                import_module(adapter.package)


def _show_diagnosis(console: Console, found: dict[str, Any]) -> None:
    facts = {**found["versions"]}
    for device in found["devices"]:
        memory = f", {device['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in device else ""
        facts[device["device"]] = device["name"] + memory
    threads = found["threads"]
    facts["threads"] = f"{threads['torch']} of {threads['cores']} cores"
    for name, value in facts.items():
        _whole(console, f"{name:<18} {value}")
    cpu = found["caches"]["cpu"]
    where = (
        f"in {cpu['folder']}"
        if cpu["folder"]
        else "kept nowhere: set NUMBA_CACHE_DIR to a folder that can be written"
    )
    _whole(console, f"{'CPU kernels':<18} {cpu['files']} compiled, {cpu['bytes'] / 1e6:.1f} MB, {where}")

    optional = Table(title="optional libraries", title_justify="left", box=None, pad_edge=False)
    for column in ("library", "version", "tested", "for"):
        optional.add_column(column, no_wrap=column != "for")
    for name, row in found["optional"].items():
        version = row["version"] or "[yellow]not installed[/]"
        tested = " to ".join(dict.fromkeys(row["tested"] or ()))
        optional.add_row(name, f"[red]{version}[/]" if row["warning"] else version, tested, row["for"])
    console.print(optional)
    for row in found["optional"].values():
        if row["warning"]:
            console.print(f"[red]{escaped(row['warning'])}[/]")

    table = Table(title="backends", title_justify="left", box=None, pad_edge=False)
    for column in ("name", "state", "self-check"):
        table.add_column(column, no_wrap=column != "self-check")
    for row in found["backends"]:
        checks = "; ".join(
            f"{check['device']}: spikes equal, gradients within {check['gradient_error']:.1e}"
            if check["state"] == "ok"
            else f"{check['device']}: {check['reason']}"
            for check in row["checks"]
        )
        table.add_row(row["name"], _state(row["state"]), escaped(checks))
    console.print(table)
    for row in found["backends"]:  # below the table: what is to be typed or copied stays on one line
        if row["reason"]:
            _whole(console, f"{row['name']}: {row['reason']}")
    console.print("[green]all checks passed[/]" if found["ok"] else "[red]a check failed[/]")


def _whole(console: Console, line: str) -> None:
    """A line that no width breaks."""
    console.print(escaped(line), highlight=False, soft_wrap=True)


def _state(state: str) -> str:
    return f"[{_COLOURS.get(state, 'white')}]{state}[/]"


def plugins(context: typer.Context, as_json: JsonFlag = False) -> None:
    """List every registered backend, adapter, learner and layer, with its state."""
    with readable_errors(context):
        rows = _plugin_rows()
        console, emit = consoles(as_json)
        if as_json:
            emit(rows)
            return
        table = Table(box=None, pad_edge=False)
        for column in ("group", "name", "distribution", "state"):
            table.add_column(column, no_wrap=column != "distribution")
        for row in rows:
            source = f"{row['distribution']} {row['version']}"
            table.add_row(*map(escaped, (row["group"], row["name"], source)), _state(row["state"]))
        console.print(table)
        for row in rows:
            if row["reason"]:
                _whole(console, f"{row['name']}: {row['reason']}")


def _plugin_rows() -> list[dict[str, str]]:
    from ...core import registry

    rows = []
    for group in registry.GROUPS:
        for plugin in registry.listed(group):
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
                if plugin.trouble is not None:
                    row |= {"state": "broken", "reason": plugin.trouble}
            except SparsePluginError as error:
                row |= {"state": "broken", "reason": plugin.error or str(error)}
            rows.append(row)
    return rows


def supported(
    context: typer.Context,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/supported.md.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show every neuron class of the installed libraries: fused or not, with which options, and why."""
    with readable_errors(context):
        from .. import supported

        _import_libraries()
        table = supported.rows()
        if not table:
            raise MissingDependencyError(
                "neither snnTorch nor Norse is installed, whose neurons the table lists: pip install snntorch norse"
            )
        console, emit = consoles(as_json)
        if as_json:
            emit(supported.as_dicts(table))
        elif as_markdown:
            typer.echo(supported.markdown(table), nl=False)
        else:
            _show_supported(console, table)


def _show_supported(console: Console, table: list[Row]) -> None:
    """For each library its neurons, and below them each reason once, with the options and neurons it holds for."""
    for library in dict.fromkeys(row.library for row in table):
        rows = [row for row in table if row.library == library]
        shown = Table(box=None, pad_edge=False)
        for column in (library, "fused", "exactness"):
            shown.add_column(column, no_wrap=column == library)
        concerned: dict[str, list[str]] = {}
        for row in rows:
            fused, _, why = row.fused.replace("`", "").partition(": ")
            shown.add_row(row.neuron, escaped(fused), escaped(row.exactness))
            if fused == "no":
                reasons = [f"not fused: {why}"]
            else:
                reasons = [f"not fused with {option}: {reason}" for option, reason in row.fallback.items()]
                reasons += [f"{fused.rpartition('; ')[2]}: {why}"] if why else []
            for reason in reasons:
                concerned.setdefault(reason, []).append(row.neuron)
        console.print(shown)
        for reason, neurons in sorted(concerned.items()):
            show_words(console, f"{reason} ({', '.join(neurons)})")
        console.print()
