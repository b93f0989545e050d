"""``moeplan trace``: record and look at routing."""

from pathlib import Path
from typing import Annotated

import typer

from ...spec.cluster import MAX_DEVICES
from ...spec.repeats import repeated_rows
from ...spec.trace import Trace
from ..console import note, out, print_json, progress, say
from ..options import MAX_SEED, output_option, picture_option

PROGRAMS = "sglang|vllm|tensorrt-llm|megatron|llama.cpp|transformers|rows|npz"  # the names of profiler.traces.IMPORTERS

app = typer.Typer(no_args_is_help=True, help="Record how a model routes, and look at it.")


@app.command()
def capture(
    model: Annotated[Path, typer.Option("--model", "-m", help="Folder of a Transformers MoE model, or a config.json.")],
    text: Annotated[Path, typer.Option(help="Text file that the model reads.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to record.")] = 4096,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 128,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Do not load weights; draw them.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of random weights.")] = 0,
    output: Annotated[Path, output_option("The trace.")] = Path("trace.npz"),
) -> None:
    """Record the routing of any Transformers mixture-of-experts causal model on a text.

    Example: `moeplan trace capture --model ./olmoe --text book.txt -o trace.npz`
    """
    # torch takes seconds to import: only when it is needed.
    from ...profiler.traces import capture as record

    with progress("recording") as show:
        trace = record(
            model,
            text,
            tokens=tokens,
            sequence_length=sequence_length,
            seed=seed,
            random_weights=random_weights,
            on_event=show,
        )
    trace.write(output)
    say(f"wrote {output}: {_shape(trace)}")
    if trace.counts_only:
        say("- counts only, of the real experts: tokens also chose identity experts, which nothing has to hold")


@app.command(name="import")
def import_(
    path: Annotated[Path, typer.Argument(help="A recording: a file, or the folder with its files.")],
    program: Annotated[
        str | None,
        typer.Option("--from", metavar=PROGRAMS, help="Who recorded it; recognised if left out."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The model: a catalogue name or config.json; tells the numbers below."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts per token, where the recording lacks it.")] = None,
    num_experts: Annotated[int | None, typer.Option(help="Experts per layer, where it lacks them.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the recording, where it lacks them.")] = None,
    zero_experts: Annotated[
        int | None, typer.Option(help="Identity experts (LongCat): ids above the real experts, which are dropped.")
    ] = None,
    highest_logits: Annotated[
        bool, typer.Option("--highest-logits", help="Router logits: the model takes the highest (no bias, no groups).")
    ] = False,
    output: Annotated[Path, output_option("The trace.")] = Path("trace.npz"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Turn the routing that a serving engine or another program recorded into a trace.

    sglang: recorder files, answers with routed_experts, logical_count as JSON. vllm: routed_experts, expert load.
    tensorrt-llm: the folder of expert statistics. megatron: the folder of --moe-routing-trace-path. llama.cpp: CSV of
    layer,expert. transformers: router logits. rows: JSON lines of a token each. npz: expert_ids or expert_counts.

    Per-token recordings serve everything; counts serve balance alone, and the trace says so. What a recording lacks is
    taken from --model or the options, or inferred and told, or asked for.

    Example: `moeplan trace import expert_distribution/ --from sglang -o trace.npz`
    """
    # torch takes seconds to import: only when it is needed.
    from ...profiler.traces import import_trace

    trace, notes = import_trace(
        path,
        program,
        top_k=top_k,
        num_experts=num_experts,
        layers=layers,
        zero_experts=zero_experts,
        model=model,
        highest_logits=highest_logits,
    )
    trace.write(output)
    if as_json:
        print_json(
            {
                "output": str(output),
                "counts_only": trace.counts_only,
                "tokens": trace.tokens,
                "sequences": len(trace.seq_len),
                "layers": trace.layers,
                "top_k": trace.top_k,
                "num_experts": trace.num_experts,
                "source": trace.source,
                "notes": notes,
            }
        )
        return
    say(f"wrote {output}: {_shape(trace)}")
    for said in notes:
        say(f"- {said}")


def _shape(trace: Trace) -> str:
    """What a trace holds, in short."""
    if trace.counts_only:
        return f"counts of {trace.layers} layers x {trace.num_experts} experts"
    return f"{trace.tokens} tokens x {trace.layers} layers, top-{trace.top_k} of {trace.num_experts}"


@app.command()
def stats(
    trace: Annotated[Path, typer.Argument(help="The trace (.npz).")],
    other: Annotated[Path | None, typer.Argument(help="A second trace of the model: domain shift.")] = None,
    devices: Annotated[
        int, typer.Option(min=1, max=MAX_DEVICES, help="Devices of the linear placement whose balance is shown.")
    ] = 8,
    hosts: Annotated[int, typer.Option(min=1, max=MAX_DEVICES, help="Hosts of that placement.")] = 2,
    picture: Annotated[Path | None, picture_option("Draw it")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Balance, affinity between layers against a shuffled control, fan-out, domain shift.

    Example: `moeplan trace stats trace.npz --devices 8 --hosts 2 --picture trace.png`
    """
    # torch takes seconds to import: only when it is needed.
    from ...profiler.traces import trace_stats
    from ..pages.trace import draw_stats, stats_table

    recorded = Trace.read(trace)
    found = trace_stats(recorded, devices=devices, hosts=hosts, other=Trace.read(other) if other else None)
    if picture:
        draw_stats(found, picture)
    if as_json:
        print_json(found.to_dict())
    else:
        out.print(stats_table(found))
    if repeated := repeated_rows(recorded):
        note(repeated)
