"""``moeplan place``: from recorded routing to an expert placement."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...planner.budget import Budget
from ...planner.place.solve import place as solve
from ...spec.claims import replacing
from ...spec.cluster import MAX_DEVICES
from ...spec.errors import MoeplanError
from ...spec.model import DType
from ...spec.placement import Movement, Objective, Placement, Shares
from ...spec.trace import Trace
from .. import where
from ..asked import WORKLOAD, named_model, placement_request
from ..clock import began
from ..console import note, out, print_json, progress, say, stop_on_interrupt
from ..fronts import Fronts, Shown
from ..options import MAX_SECONDS, MAX_SEED, output_option, picture_option
from ..pages.placement import scores_table, verdict

if TYPE_CHECKING:
    from ...spec.cluster import Cluster
    from ...spec.workload import Workload

MAX_SLOTS = 2**16
PLACE_TIME = 0.5  # of the time limit, where a front is asked for too


def place(
    trace: Annotated[Path, typer.Option(help="Recorded routing (.npz); `moeplan trace import` makes one.")],
    fit: Annotated[str, typer.Option(help="Part of the trace to fit, FROM:TO; the rest scores it.")] = "0:1",
    devices: Annotated[
        int | None, typer.Option(min=1, max=MAX_DEVICES, help="Equal devices, where no cluster is given; by default 8.")
    ] = None,
    hosts: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_DEVICES, help="Hosts that the devices stand on, consecutively; by default 1."),
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="What `moeplan profile` wrote: predicted time is then the objective.")
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            help=f"With --cluster: prefill:TOKENS[@LENGTH] or decode:SEQUENCES[@CONTEXT]; by default {WORKLOAD}."
        ),
    ] = None,
    dtype: Annotated[DType | None, typer.Option(help="With --cluster: by default the model's own.")] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, max=MAX_SLOTS, help="Copies per layer in all; by default one per expert.")
    ] = None,
    slots_per_device: Annotated[
        str | None, typer.Option(help="Without a cluster: the slots of each device, such as 44,84.")
    ] = None,
    equal_slots: Annotated[
        bool, typer.Option("--equal-slots", help="As many experts on every device, as serving engines demand.")
    ] = False,
    shares: Annotated[Shares, typer.Option(help="How copies divide an expert's tokens: even or optimal.")] = "even",
    groups: Annotated[int, typer.Option(min=1, help="Expert groups that must each stay on one host.")] = 1,
    objective: Annotated[
        Objective, typer.Option(help="latency (locality at EPLB's balance), locality or balance.")
    ] = "latency",
    movement: Annotated[
        Movement, typer.Option(help="What travels: coherent (tokens stay with experts) or ep (out and back).")
    ] = "coherent",
    balance_cap: Annotated[
        float | None, typer.Option(help="Largest mean balance of the fitted part; by default EPLB's, made safe.")
    ] = None,
    previous: Annotated[
        Path | None, typer.Option(help="Start from this placement; --output may be the same file.")
    ] = None,
    max_moves: Annotated[int | None, typer.Option(min=0, help="Experts that may change device against it.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Names the model; moves are then in bytes.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Proposals of each search chain; by default in proportion to the experts.")
    ] = None,
    time_limit: Annotated[
        float,
        typer.Option(
            min=1,
            max=MAX_SECONDS,
            help="Ceiling in seconds, from start to end; a first search may overrun one of a second or two when busy.",
        ),
    ] = 20.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Same seed, same placement.")] = 0,
    pareto: Annotated[
        Path | None, picture_option("In half of the time limit: show what balance buys and draw it")
    ] = None,
    moves_front: Annotated[
        Path | None, picture_option("With --previous, in half of the time limit: show what each number of moves buys")
    ] = None,
    output: Annotated[Path, output_option("The placement.")] = Path("place.json"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the placement, with `pareto` if asked, instead of tables.")
    ] = False,
) -> None:
    """Place experts on devices so that tokens travel little and no device runs hot, with a proven bound.

    Example: `moeplan place --trace trace.npz --fit 0:0.5 --devices 8 --hosts 2 -o place.json`
    """
    start = began()
    recorded = Trace.read(trace)
    named = named_model(model, recorded, trace, cluster is not None)
    options: dict[str, Any] = {
        "devices": devices,
        "hosts": hosts,
        "dtype": dtype,
        "slots": slots,
        "slots_per_device": parse_slots(slots_per_device) if slots_per_device else None,
        "equal_slots": equal_slots,
        "seed": seed,
        "fit": parse_part(fit),
        "objective": objective,
        "movement": movement,
        "shares": shares,
        "groups": groups,
        "balance_cap": balance_cap,
        "max_moves": max_moves,
        "steps": steps,
    }
    old = read_previous(previous) if previous else None
    request = placement_request(
        recorded,
        cluster=_read_cluster(cluster),
        model=named,
        workload=_parse_workload(workload),
        asked=model or "",
        previous=old,
        time_limit=time_limit,
        **options,
    )
    fronts = Fronts(pareto, moves_front)
    fronts.check(recorded, request)
    shown: list[Shown] = []
    drawn: list[Path] = []
    with progress("placing") as show, stop_on_interrupt() as stop:
        budget = Budget.of(time_limit, start, stop=stop, on_event=show)
        mine = budget if not fronts.count else budget.part(PLACE_TIME)
        paths = {"trace_path": str(trace), "previous_path": str(previous or "")}
        placement = where.place(
            mine,
            time_limit * (PLACE_TIME if fronts.count else 1),
            here=lambda: solve(recorded, request, model=named, budget=mine, **paths),
            trace=trace,
            cluster=cluster,
            model=model or None,
            workload=workload,
            previous=old,
            previous_path=str(previous or ""),
            **options,
        )
        placement.write(output)
        if fronts.count:
            shown, drawn = fronts.search(recorded, request, placement, budget)
    if as_json:
        print_json(placement.model_dump(mode="json") | {front.name: front.content for front in shown})
        return
    out.print(scores_table(placement))
    if shown and budget.skipped:
        placement = placement.model_copy(update={"notes": (*placement.notes, *unsaid(placement, budget))})
    for known in placement.notes:
        note(known)
    out.print(verdict(placement, stop.is_set()))
    for front in shown:
        out.print(front.page)
    for path in drawn:
        say(f"drew {path}")
    say(f"wrote {output}; `moeplan explain {output}` says why")


def read_previous(path: Path) -> Placement:
    """The placement to start from. The new one may take its place: what serves today is replaced every day."""
    with replacing(path):
        return Placement.read(path)


def parse_part(text: str) -> tuple[float, float]:
    """``0:0.5`` as two fractions."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        raise MoeplanError(f"--fit {text}: expected FROM:TO as fractions of the trace, such as 0:0.5") from None
    return low, high


def parse_slots(text: str) -> list[int]:
    """``44,84`` as the slots of two devices."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 8 and int(part) > 0 for part in parts):
        raise MoeplanError(f"--slots-per-device {text}: expected a whole number from 1 for each device, such as 44,84")
    return [int(part) for part in parts]


def _read_cluster(path: Path | None) -> "Cluster | None":
    """Imported when it is needed: most placements are for devices alike."""
    if path is None:
        return None
    from ...spec.cluster import Cluster

    return Cluster.read(path)


def _parse_workload(text: str | None) -> "Workload | None":
    if text is None:
        return None
    from ...spec.workload import Workload

    return Workload.from_text(text)


def unsaid(placement: Placement, budget: Budget) -> list[str]:
    """What there was no time for after the placement was written."""
    said = " ".join(placement.notes)
    left = [what for what in budget.skipped if what not in said]
    return [f"no time for {', '.join(left)}: raise --time-limit"] if left else []
