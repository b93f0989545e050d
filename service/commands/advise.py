"""``moeplan advise``: does balancing the experts of a served model pay?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...planner.budget import Budget
from ...spec.advice import MAKERS, Maker
from ...spec.cluster import MAX_DEVICES
from ...spec.errors import MoeplanError
from ...spec.trace import Trace
from ..advising import of_cluster, of_tables, tried
from ..asked import named_model
from ..clock import began
from ..console import note, out, print_json, progress, say, stop_on_interrupt
from ..options import MAX_SECONDS, MAX_SEED, output_option
from ..pages.advice import advice_tables, verdict
from .place import parse_part

if TYPE_CHECKING:
    from ...planner.advise.imbalance import Phase

MOST_TOKENS = 2**20


def advise(
    model: Annotated[str, typer.Option("--model", "-m", help="A name of the catalogue, or a folder or file.")],
    trace: Annotated[Path, typer.Option(help="Recorded routing (.npz), token by token.")],
    device: Annotated[
        str | None,
        typer.Option(help="Type of GPU with measured tables, such as h200_sxm; `moeplan systems` lists them."),
    ] = None,
    engine: Annotated[str, typer.Option(help="Whose kernels: tensorrt-llm (trtllm), sglang or vllm.")] = "trtllm",
    tables: Annotated[
        Path | None, typer.Option(help="Folder of measured tables; by default those of the extra `silicon`.")
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="What `moeplan profile` wrote, in place of --device: its own curves are used.")
    ] = None,
    ep: Annotated[
        int | None, typer.Option(min=2, max=MAX_DEVICES, help="Devices that share the experts; of a cluster, its own.")
    ] = None,
    slots: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=2**16, help="Physical experts per layer, as often as are tried; by default 0 to 4 more a device."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Sequences of a decode step, all devices.")] = 512,
    prefill: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens of a prefill step, all devices.")] = 8192,
    step_ms: Annotated[
        float | None, typer.Option(min=1e-3, max=1e7, help="A whole decode step now, for the gain of the step.")
    ] = None,
    prefill_ms: Annotated[
        float | None, typer.Option(min=1e-3, max=1e7, help="A whole prefill step now, for the same.")
    ] = None,
    replan_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between re-plans that stop the engine; by default it never does.")
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(min=1e-3, max=1e6, help="GB/s at which a device loads experts; by default of the data sheet."),
    ] = None,
    number_format: Annotated[
        str | None,
        typer.Option("--format", help="Of the experts, as tables name it; by default as the model has them."),
    ] = None,
    placement: Annotated[
        Maker | None, typer.Option(help="Whose placements are tried, eplb or moeplan; by default both.")
    ] = None,
    fit: Annotated[str, typer.Option(help="Part of the trace to fit, FROM:TO; the rest judges.")] = "0:0.5",
    time_limit: Annotated[
        float, typer.Option(min=1, max=MAX_SECONDS, help="Ceiling in seconds for all placements together.")
    ] = 60.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Same seed, same steps.")] = 0,
    output: Annotated[Path, output_option("The advice.")] = Path("advice.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the advice as JSON instead of tables.")] = False,
) -> None:
    """Say whether a balanced expert placement pays: for prefill and decode, with how many redundant experts, how sure.

    Example: `moeplan advise --model deepseek-v3 --trace trace.npz --device h200_sxm --ep 32`
    """
    from ...planner.advise.advise import Question
    from ...planner.advise.advise import advise as answer

    start = began()
    if (device is None) == (cluster is None):
        raise MoeplanError("give either --device, a GPU with measured tables, or --cluster, a measured cluster")
    recorded = Trace.read(trace)
    named = named_model(model, recorded, trace, cluster is not None)
    assert named is not None
    if cluster is not None:
        source = of_cluster(cluster, named, model, recorded, ep, seed)
    else:
        source = of_tables(str(device), engine, tables, number_format, named, ep)
    rate = link * 1e9 if link else source.link
    if rate <= 0:
        raise MoeplanError("the cluster has no measured link: say how fast a device loads experts, with --link in GB/s")
    whole: dict[Phase, float | None] = {"prefill": prefill_ms, "decode": step_ms}
    question = Question(
        source.devices,
        tried(slots, recorded.num_experts, len(source.devices)),
        {"prefill": prefill, "decode": tokens},
        rate,
        {phase: ms / 1e3 for phase, ms in whole.items() if ms is not None},
        replan_every,
        parse_part(fit),
        seed,
        MAKERS if placement is None else (placement,),
    )
    with progress("advising") as show, stop_on_interrupt() as stop:
        budget = Budget.of(time_limit, start, stop=stop, on_event=show)
        where = {"device": device or str(cluster), "engine": engine if device else "moeplan"}
        found = answer(recorded, named, source.timer, question, trace_path=str(trace), budget=budget, **where)
    found.write(output)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    out.print(*advice_tables(found))
    for known_note in found.notes:
        note(known_note)
    out.print(verdict(found), soft_wrap=True)
    say(f"wrote {output}")
