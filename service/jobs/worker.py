"""A worker: one process, one job. ``python -m moeplan.service.jobs.worker FOLDER``.

FOLDER/request.json says what to do. Standard output is for lines of JSON: ``{"event": ...}`` while it works, at the end
``{"done": true}``, with the answer in FOLDER/result, or ``{"error": line}``. A line on standard input asks for the best
found so far. Its end means that whoever started this is no more: then so is this, without a trace.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any


def main(folder: Path) -> None:
    """Work, and leave one last line in any case that Python can see."""
    words = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not for whoever reads the lines
    speech, stop = Lock(), Event()

    def say(line: dict[str, Any]) -> None:
        with speech:
            words.write(json.dumps(line) + "\n")
            words.flush()

    Thread(target=_listen, args=(folder, stop), daemon=True).start()
    say(_worked(folder, lambda event: say({"event": event}), stop))
    os._exit(0)  # threads of solvers, and exits of libraries, have nothing to add


def _worked(folder: Path, on_event: Any, stop: Event) -> dict[str, Any]:
    from ...spec.errors import MoeplanError

    try:
        from .execute import execute

        given = json.loads((folder / "request.json").read_text())
        paths = {name: Path(path) for name, path in given["paths"].items()}
        answer = execute(given["request"], paths, on_event, stop)
        partial = folder / "result.part"
        partial.write_text(answer)
        os.replace(partial, folder / "result")
    except MoeplanError as error:
        return {"error": " ".join(str(error).split())[:1500]}
    except MemoryError:
        return {"error": "not enough memory: give it less to do, or a machine with more"}
    except OSError as error:
        return {"error": f"the worker's machine: {error.strerror or error}", "unavailable": True}
    except Exception as error:  # a fault of this program: the log has it whole
        import traceback

        traceback.print_exc()
        return {"error": f"a fault of moeplan ({type(error).__name__}); the service's log says where"}
    return {"done": True}


def _listen(folder: Path, stop: Event) -> None:
    while os.read(0, 64):
        stop.set()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
