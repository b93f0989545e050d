"""``moeplan solve``: decide how the model should run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ...planner.budget import Budget
from ...planner.search import solve as search
from ...spec.catalogue.executed import load_executed
from ...spec.cluster import Cluster
from ...spec.placement import Placement
from ...spec.plan import Plan
from ...spec.quantities import parse_bytes
from ...spec.serving_load import is_serving
from ...spec.trace import Trace
from ...spec.workload import Workload
from .. import where
from ..clock import began
from ..console import note, out, print_json, progress, say
from ..options import CLUSTER, MAX_SECONDS, MAX_SEED, WORKLOAD, output_option, picture_option
from ..pages.plan import breakdown_table, candidates_table, memory_table, verdict
from ..serving import Serving


def solve(
    model: Annotated[str, typer.Option("--model", "-m", help="Catalogue name or path of a Hugging Face config.json.")],
    cluster: Annotated[Path, typer.Option(help="What `moeplan profile` wrote.")] = CLUSTER,
    trace: Annotated[
        Path | None, typer.Option(help="Recorded routing (.npz); without one a power law is assumed, and said.")
    ] = None,
    workload: Annotated[
        str,
        typer.Option(
            help="prefill:TOKENS[@LENGTH], decode:SEQUENCES[@CONTEXT], or of a served model "
            "serve:isl=1024,osl=512[,concurrency=64 or rate=20] or serve:LOG.csv."
        ),
    ] = WORKLOAD,
    placement: Annotated[
        Path | None,
        typer.Option(help="Your own, such as `moeplan place` writes: every layer keeps its slots and shares."),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="Only this one: ep, hierarchical, sharded, gathered, offload or (decode) coherent."),
    ] = None,
    even: Annotated[bool, typer.Option("--even", help="Divide as if all devices were equal, to compare.")] = False,
    by_batch: Annotated[
        bool, typer.Option("--by-batch", help="Copies of experts under ep take shares decided anew for every batch.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="f32, bf16 or f16; by default the model's own.")] = None,
    memory: Annotated[str | None, typer.Option(help="Limit per device, such as 8GiB; by default all.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Draws the step's tokens from the trace; breaks ties.")
    ] = 0,
    time_limit: Annotated[
        float, typer.Option(min=1, max=MAX_SECONDS, help="Ceiling in seconds, from start to end.")
    ] = 60.0,
    engine: Annotated[
        str | None, typer.Option(help="serve: vllm, sglang or tensorrt-llm; by default whichever does best.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="serve: weights in bf16, fp8, fp4 or int4; by default as the model stores them.")
    ] = None,
    ttft: Annotated[
        str | None, typer.Option(help="serve: limit on the time to the first token, such as 500ms.")
    ] = None,
    tpot: Annotated[str | None, typer.Option(help="serve: limit on the time between tokens, such as 30ms.")] = None,
    fewest: Annotated[
        bool, typer.Option("--fewest", help="serve: the fewest GPUs that do, instead of most tokens per second.")
    ] = False,
    apart: Annotated[
        bool | None,
        typer.Option(
            "--apart/--together", help="serve: prefill and decode on workers of their own; by default either."
        ),
    ] = None,
    tables: Annotated[
        Path | None, typer.Option(help="serve: a folder of measured tables, instead of the extra `silicon`.")
    ] = None,
    picture: Annotated[Path | None, picture_option("serve: draw the front of TPOT and tokens per GPU")] = None,
    output: Annotated[Path, output_option("The plan document.")] = Path("plan.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan instead of tables.")] = False,
) -> None:
    """Choose degrees, splits, placement and a strategy per layer by predicted step time, with a proven bound.

    Example: `moeplan solve --model mixtral --workload prefill:512 --memory 12GiB`

    On GPUs of measured tables: `moeplan solve --model gpt-oss-120b --workload serve:isl=1024,osl=512 --tpot 20ms`
    """
    start = began()
    asked = Serving(engine, precision, ttft, tpot, fewest, apart, tables, picture)
    if is_serving(workload):
        where.only_here("a workload serve:...")
        others = {"--trace": trace, "--placement": placement, "--strategy": strategy, "--even": even}
        others |= {"--by-batch": by_batch, "--dtype": dtype, "--memory": memory}
        asked.solve(model, cluster, workload, output, as_json, [name for name, value in others.items() if value])
        return
    asked.check_unused()
    options: dict[str, Any] = {
        "strategy": strategy,
        "even": even,
        "by_batch": by_batch,
        "dtype": dtype,
        "memory_bytes": parse_bytes(memory) if memory else None,
        "seed": seed,
    }
    with progress("solving") as show:
        budget = Budget.of(time_limit, start, on_event=show)

        def here() -> Plan:
            return search(
                load_executed(model),
                Cluster.read(cluster),
                Workload.from_text(workload),
                Trace.read(trace) if trace else None,
                trace_path=str(trace or ""),
                asked=model,
                placement=Placement.read(placement) if placement else None,
                placement_path=str(placement or ""),
                budget=budget,
                **options,
            )

        plan = where.solve(
            budget,
            time_limit,
            here=here,
            model=model,
            cluster=cluster,
            workload=workload,
            trace=trace,
            placement=placement,
            **options,
        )
    plan.write(output)
    if as_json:
        print_json(plan.model_dump(mode="json"))
        return
    out.print(candidates_table(plan), breakdown_table(plan), memory_table(plan))
    for known in plan.notes:
        note(known)
    out.print(verdict(plan))
    say(f"wrote {output}; run it with `moeplan run {output}`")
