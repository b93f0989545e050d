"""The command line: ``moeplan COMMAND``."""

from typing import Annotated

import typer

from .. import __version__
from .commands import compare, explain, export, models, place, profile, run, solve, trace

app = typer.Typer(
    name="moeplan",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="profile")(profile.profile)
app.command(name="solve")(solve.solve)
app.command(name="run")(run.run)
app.command(name="place")(place.place)
app.command(name="explain")(explain.explain)
app.command(name="compare")(compare.compare)
app.command(name="export")(export.export)
app.command(name="models")(models.models)
app.add_typer(trace.app, name="trace")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"moeplan {__version__}")
        raise typer.Exit


@app.callback()
def moeplan(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Plan mixture-of-experts models on unequal hardware: measure, solve with a proven bound, run, check.

    The loop, in an empty directory: `moeplan profile`, `moeplan solve --model mixtral`, `moeplan run plan.json`.

    Exit codes: 0 done; 1 beyond the tolerance; 2 bad input or an infeasible limit; 3 a rank failed; 130 Ctrl-C;
    141 nobody reads the output.
    """
