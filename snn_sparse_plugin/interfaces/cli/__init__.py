"""The command line: ``snn-sparse run | doctor | plugins | supported | demo | bench | tune | warm | ttfs | experiment``.

Exit codes: 0 fine, 1 a check or the work failed, 2 wrong usage. Heavy modules are imported inside the
commands.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from . import experiment, measure, script, show, ttfs
from .common import short

app = typer.Typer(
    name="snn-sparse",
    help="Sparse training of spiking networks in snnTorch and Norse.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes cut words and options on narrow terminals
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
# what follows the script is its own
app.command(
    short_help=short(script.run),
    context_settings={
        "allow_extra_args": True,
        "allow_interspersed_args": False,
        "token_normalize_func": script.spelled,
    },
)(script.run)
for command in (
    show.doctor,
    show.plugins,
    show.supported,
    measure.demo,
    measure.bench,
    measure.tune,
    measure.warm,
):
    app.command(short_help=short(command))(command)
app.add_typer(ttfs.app)
app.add_typer(experiment.app)


def main() -> None:
    """Entry point of the ``snn-sparse`` command; an error of a script is shown as ``python script`` shows it."""
    try:
        app()
    except Exception as error:
        from ..session import script_error

        if not script_error(error):
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    context.obj = {"debug": debug}
    if version:
        from ...core.version import VERSION

        typer.echo(VERSION)
        raise typer.Exit
