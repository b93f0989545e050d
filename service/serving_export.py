"""``moeplan export`` of a served model's plan: the commands that start it."""

import shlex
from functools import partial
from pathlib import Path
from typing import IO

from ..planner.serving_search.commands import Start, starts
from ..spec.document import parse_object, read_text
from ..spec.engines import engine_name
from ..spec.errors import DocumentError, MoeplanError
from ..spec.output import check_output, write_atomically
from ..spec.serving import ServingPlan
from ..spec.texts import show
from .console import note, print_json, say

SCRIPT = "start.sh"
HEAD = "# Not to be run as a whole: start each command on its own GPUs, in the folder of this file.\n"


def is_serving_plan(path: Path) -> bool:
    """Whether a file is such a plan. A file that cannot be read is none: who reads it says what is wrong with it."""
    try:
        return parse_object(read_text(path), str(path)).get("kind") == ServingPlan.kind
    except DocumentError:
        return False


def export_serving(plan: ServingPlan, to: str | None, model: str | None, output: Path | None, as_json: bool) -> None:
    """Print the commands; write them and their files into a folder where one is given. Raises MoeplanError."""
    if to is not None and engine_name(to) != plan.engine:
        raise MoeplanError(f"--to {to}: the plan is for {plan.engine}; `moeplan solve --engine {to}` makes one for it")
    found = starts(plan, _loaded(plan, model))
    files = {name: text for start in found for name, text in start.files.items()}
    if output is not None:
        files[SCRIPT] = HEAD + "".join(f"# {start.count} x {start.what}\n{_line(start)}\n" for start in found)
    elif files:
        output = Path(plan.engine)
    paths = {name: output / name for name in files} if output is not None else {}
    for path in paths.values():
        check_output(path)
    for name, path in paths.items():
        write_atomically(path, partial(_fill, files[name].encode()))
    if as_json:
        body = [
            {
                "count": start.count,
                "what": start.what,
                "hosts": start.hosts,
                "environment": start.environment,
                "command": list(start.command),
                "notes": list(start.notes),
            }
            for start in found
        ]
        print_json({"engine": plan.engine, "replicas": body, "files": [str(path) for path in paths.values()]})
        return
    for start in found:
        say(f"{start.count} x {start.what}:")
        say(_line(start))
        for known in start.notes:
            note(known)
    for path in paths.values():
        say(f"wrote {path}")


def _loaded(plan: ServingPlan, model: str | None) -> str:
    """What the engine is given as model. Raises MoeplanError where the engine would take it for an option."""
    name = model or plan.asked or plan.model
    if name.startswith("-") or not name.isprintable():
        raise MoeplanError(f"model {show(name)}: expected a name or folder that the engine loads: give it with --model")
    if model is None and not Path(name).is_dir():
        note(f"engines may not know {name}: give what they load with --model, such as OWNER/NAME or a folder")
    return name


def _line(start: Start) -> str:
    environment = [f"{name}={shlex.quote(value)}" for name, value in start.environment.items()]
    return " ".join([*environment, shlex.join(start.command)])


def _fill(content: bytes, file: IO[bytes]) -> None:
    file.write(content)
