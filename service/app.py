"""The command line: ``moeplan COMMAND``."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..spec.claims import release
from ..spec.output import tell_of_folders
from . import where

COMMANDS = (
    "profile",
    "solve",
    "run",
    "place",
    "explain",
    "compare",
    "export",
    "report",
    "models",
    "trace",
    "cluster",
    "systems",
    "advise",
    "calibrate",
    "watch",
    "serve",
)


class Commands(TyperGroup):
    """Imports a command when it is asked for: start-up counts for time limits, and all of them take seconds."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands: Any = dict.fromkeys(COMMANDS)  # what typing mistakes are compared with

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f".commands.{cmd_name}", __package__)
        holder = typer.Typer(**SETTINGS)
        holder.callback()(_nothing)
        if hasattr(module, "app"):  # commands of its own
            holder.add_typer(module.app, name=cmd_name)
        else:
            holder.command(name=cmd_name)(getattr(module, cmd_name))
        group = typer.main.get_command(holder)
        return group.get_command(ctx, cmd_name) if isinstance(group, TyperGroup) else None


def _made(folder: Path) -> None:
    from .console import note

    note(f"made the folder {folder}")


def _nothing() -> None:
    """With a callback an app stays a group, also one of a single command."""


SETTINGS: dict[str, Any] = {
    "rich_markup_mode": "markdown",
    "pretty_exceptions_enable": False,
    "add_completion": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(name="moeplan", cls=Commands, no_args_is_help=True, **(SETTINGS | {"add_completion": True}))


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"moeplan {__version__}")
        raise typer.Exit


@app.callback()
def moeplan(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Have a service (`moeplan serve`) do solve, place, explain or export."),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="With --server: file of its token; or the variable MOEPLAN_TOKEN.")
    ] = None,
) -> None:
    """Plan mixture-of-experts models on unequal hardware: measure, solve with a proven bound, run, check.

    The loop, in an empty directory: `moeplan profile`, `moeplan solve --model mixtral`, `moeplan run plan.json`.

    Exit codes: 0 done; 1 beyond the tolerance; 2 bad input or an infeasible limit; 3 a rank failed; 130 Ctrl-C;
    141 nobody reads the output.
    """
    release()
    tell_of_folders(_made)
    where.choose(server, token_file, context.invoked_subcommand)
