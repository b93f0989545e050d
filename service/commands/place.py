"""``moeplan place``: from recorded routing to an expert placement."""

from pathlib import Path
from typing import Annotated

import typer

from ...planner.place.fleet import even_fleet
from ...planner.place.page import scores_table, verdict
from ...planner.place.pareto import check_front
from ...planner.place.pareto import pareto as front_of
from ...planner.place.pareto_page import draw
from ...planner.place.pareto_page import page as front_page
from ...planner.place.request import Request
from ...planner.place.solve import place as solve
from ...planner.place.timed import Timing
from ...spec.catalogue import load_model
from ...spec.cluster import Cluster
from ...spec.errors import MoeplanError
from ...spec.model import DType
from ...spec.placement import Movement, Objective, Placement, Shares
from ...spec.trace import Trace
from ...spec.workload import Workload
from ..console import err, out, print_json, progress, stop_on_interrupt
from ..options import output_option, picture_option


def place(
    trace: Annotated[Path, typer.Option(help="Recorded routing (.npz); `moeplan trace import` makes one.")],
    fit: Annotated[str, typer.Option(help="Part of the trace to fit, FROM:TO; the rest scores it.")] = "0:1",
    devices: Annotated[int, typer.Option(min=1, help="Equal devices, where no cluster is given.")] = 8,
    hosts: Annotated[int, typer.Option(min=1, help="Hosts that the devices stand on, consecutively.")] = 1,
    cluster: Annotated[
        Path | None, typer.Option(help="What `moeplan profile` wrote: predicted time is then the objective.")
    ] = None,
    workload: Annotated[
        str, typer.Option(help="With --cluster: prefill:TOKENS[@LENGTH] or decode:SEQUENCES[@CONTEXT].")
    ] = "prefill:2048",
    dtype: Annotated[DType | None, typer.Option(help="With --cluster: by default the model's own.")] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Copies per layer in all; by default one per expert.")
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
    previous: Annotated[Path | None, typer.Option(help="Start from this placement.")] = None,
    max_moves: Annotated[int | None, typer.Option(min=0, help="Experts that may change device against it.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Names the model; moves are then in bytes.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Proposals of each search chain; by default in proportion to the experts.")
    ] = None,
    time_limit: Annotated[float, typer.Option(min=1, help="Ceiling in seconds; work is counted in steps.")] = 20.0,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same placement.")] = 0,
    pareto: Annotated[
        Path | None, picture_option("Up to the time limit once more: show what balance buys and draw it")
    ] = None,
    output: Annotated[Path, output_option("The placement.")] = Path("place.json"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the placement, with `pareto` if asked, instead of tables.")
    ] = False,
) -> None:
    """Place experts on devices so that tokens travel little and no device runs hot, with a proven bound.

    Example: `moeplan place --trace trace.npz --fit 0:0.5 --devices 8 --hosts 2 -o place.json`
    """
    recorded = Trace.read(trace)
    count = slots or recorded.num_experts
    named = load_model(model) if model else None
    timing = None
    if cluster is not None:
        if named is None:
            raise MoeplanError("--cluster needs --model: predicted time depends on the experts' sizes")
        timing = Timing(
            Cluster.read(cluster), named, Workload.from_text(workload), dtype or named.dtype, seed, model or ""
        )
        fleet = timing.devices(recorded, count, equal_slots)
    else:
        fleet = even_fleet(devices, hosts, count, equal_slots)
    request = Request(
        fleet,
        count,
        fit=parse_part(fit),
        objective=objective,
        movement=movement,
        shares=shares,
        equal_slots=equal_slots,
        groups=groups,
        balance_cap=balance_cap,
        previous=Placement.read(previous) if previous else None,
        max_moves=max_moves,
        steps=steps,
        time_limit=time_limit,
        seed=seed,
        timing=timing,
    )
    if pareto is not None:
        check_front(recorded, request)
    front = None
    with progress("placing") as show, stop_on_interrupt() as stop:
        placement = solve(
            recorded,
            request,
            trace_path=str(trace),
            previous_path=str(previous or ""),
            model=named,
            on_event=show,
            stop=stop,
        )
        placement.write(output)
        if pareto is not None:
            front = front_of(recorded, request, placement, on_event=show, stop=stop)
            draw(front, pareto)
    if as_json:
        shown = placement.model_dump(mode="json")
        print_json(shown if front is None else shown | {"pareto": front.to_dict()})
        return
    out.print(scores_table(placement))
    for note in placement.notes:
        err.print(f"[yellow]note:[/] {note}", highlight=False)
    out.print(verdict(placement), highlight=False)
    if front is not None:
        out.print(front_page(front))
        out.print(f"drew {pareto}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"wrote {output}; `moeplan explain {output}` says why", highlight=False)


def parse_part(text: str) -> tuple[float, float]:
    """``0:0.5`` as two fractions."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        raise MoeplanError(f"--fit {text}: expected FROM:TO as fractions of the trace, such as 0:0.5") from None
    return low, high
