"""``moeplan watch``: follows what an engine records, and moves experts where that pays."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...planner.export import ENGINES, engine_named
from ...planner.rebalance.decide import Prices
from ...planner.rebalance.document import expert_bytes, linear_start
from ...planner.rebalance.watcher import Rules, Watcher
from ...spec.catalogue import load_model
from ...spec.cluster import MAX_DEVICES
from ...spec.document import show
from ...spec.errors import MoeplanError
from ...spec.placement import Placement
from ...spec.quantities import parse_bytes, parse_seconds
from ..console import note, progress, say, stop_on_interrupt
from ..options import MAX_SEED

if TYPE_CHECKING:
    from ...spec.model import Model
    from ..watch_folder import Saved
    from ..watching import Look, Watching

RECORDERS = ("sglang", "vllm", "tensorrt-llm")
LINK_RATE = "10GiB"
SETTLE = 1.0  # seconds between the first two looks: what has not grown meanwhile is complete
MAX_BETWEEN = 10**9


def watch(
    recordings: Annotated[Path, typer.Argument(help="The folder that the engine's recorder writes to.")],
    placement: Annotated[
        Path | None, typer.Option(help="What serves now (`moeplan place`); without it --devices and --model.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A folder: place.json, the engine's files, a log, the state.")
    ] = Path("watch"),
    engine: Annotated[
        str | None, typer.Option(help=f"Whose recordings, and whose files to write: {', '.join(RECORDERS)}.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Catalogue name or config.json; --engine needs it.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=2, max=MAX_DEVICES, help="Without --placement: experts by number on so many.")
    ] = None,
    hosts: Annotated[int | None, typer.Option(min=1, max=MAX_DEVICES, help="With --devices; by default 1.")] = None,
    interval: Annotated[str, typer.Option(help="Time between looks at the folder, such as 60s.")] = "60s",
    window: Annotated[str, typer.Option(help="Recorded time that is learned from, such as 5m.")] = "5m",
    horizon: Annotated[str, typer.Option(help="How long a placement is expected to serve, such as 1h.")] = "1h",
    max_moves: Annotated[
        int | None, typer.Option(min=1, help="Copies that one decision may load; by default any number.")
    ] = None,
    expert_share: Annotated[
        float,
        typer.Option(min=0.001, max=1, help="Share of serving time that experts take, with waiting for the slowest."),
    ] = 0.5,
    link_rate: Annotated[
        str | None, typer.Option(help=f"Bytes a second at which experts load; by default {LINK_RATE}.")
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="Instead of --link-rate: the slowest link in what `moeplan profile` wrote.")
    ] = None,
    pause: Annotated[str, typer.Option(help="Serving time that is lost whenever anything moves, such as 1s.")] = "1s",
    between_alarms: Annotated[
        float, typer.Option(min=10, max=MAX_BETWEEN, help="Batches between false alarms of the drift test, at least.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Same seed and recordings, same decisions.")] = 0,
    once: Annotated[bool, typer.Option("--once", help="Read what is there, decide, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each decision instead of text.")] = False,
) -> None:
    """Follow an engine's recordings; when traffic changes, move the experts whose move pays, and say why.

    Example: `moeplan watch recordings/ --engine sglang --model deepseek-v3 --placement place.json -o watch`

    Ctrl-C ends it; the same command goes on where it was.
    """
    # Imported when it is needed: torch takes seconds to load.
    from ..watch_folder import owned, restore, save, tell
    from ..watching import Watching, move_seconds

    if not recordings.is_dir():
        raise MoeplanError(
            f"{show(str(recordings))}: no such folder; name the one that the engine's recorder writes to"
        )
    named = load_model(model) if model else None
    target = _engine(engine, named)
    seconds = {"--interval": interval, "--window": window, "--horizon": horizon, "--pause": pause}
    wait, span, ahead, lost = (parse_seconds(text, option) for option, text in seconds.items())
    rules = Rules(window=span, between=between_alarms)
    start = _start(placement, named, devices, hosts)
    rate = _rate(link_rate, cluster)
    with owned(output), stop_on_interrupt() as stop:
        saved = restore(output, recordings, target, rules, start)
        if saved is None:
            saved = _begin(recordings, target, rules, start)
        prices = Prices(ahead, expert_share, move_seconds(_sizes(saved.placement, named), rate), lost)
        watching = Watching(output, saved, prices, max_moves, seed, target, named, stop)
        watching.files(saved.placement)  # says now what the engine would refuse
        tell(output, saved)
        if not as_json:
            _introduce(watching)
        looks = 0
        while True:
            look = _look(watching)
            _show(look, watching, as_json)
            if stop.is_set() or (once and looks and not look.read):
                break
            if once and not looks and not look.read and not watching.saved.follower.waiting:
                note(f"{recordings}: holds no recording that has not been read")
            looks += 1
            if stop.wait(min(SETTLE, wait) if once or looks == 1 else wait):
                break
        save(output, saved)


def _engine(name: str | None, model: "Model | None") -> str | None:
    if name is None:
        return None
    engine = engine_named(name).name
    if engine not in RECORDERS:
        others = [one for one in ENGINES if one in RECORDERS]
        raise MoeplanError(f"--engine {engine}: its recordings are not followed; expected one of {', '.join(others)}")
    if model is None:
        raise MoeplanError(f"--engine {engine} needs --model: its files have rows for all layers of a model")
    return engine


def _start(path: Path | None, model: "Model | None", devices: int | None, hosts: int | None) -> Placement | None:
    """What serves now; None where the state must say so."""
    if path is not None:
        if devices is not None or hosts is not None:
            raise MoeplanError("--devices and --hosts do not go with --placement: it has its own")
        placement = Placement.read(path)
        if len(placement.devices) < 2:
            raise MoeplanError(f"{path}: a placement on 1 device: there is nothing to balance")
        return placement
    if devices is None:
        return None
    if model is None:
        raise MoeplanError("--devices needs --model: it says how many layers and experts there are")
    moe = model.moe_block().moe
    if moe is not None and moe.num_experts % devices:
        raise MoeplanError(
            f"--devices {devices}: {moe.num_experts} experts do not divide over them; give --placement instead"
        )
    return linear_start(model, devices, hosts or 1)


def _begin(recordings: Path, kind: str | None, rules: Rules, start: Placement | None) -> "Saved":
    from ...profiler.traces.follow import Follower
    from ..watch_folder import Saved

    if start is None:
        raise MoeplanError("watch: name what serves now: --placement place.json, or --devices N with --model")
    shape = (len(start.layers), start.num_experts)
    return Saved(Watcher(rules, *shape), Follower(recordings, kind, shape), start, start.digest())


def _rate(text: str | None, cluster: Path | None) -> float:
    """Bytes a second."""
    if cluster is None:
        return float(parse_bytes(LINK_RATE if text is None else text, "--link-rate"))
    if text is not None:
        raise MoeplanError("--link-rate does not go with --cluster: its links were measured")
    from ...spec.cluster import Cluster

    known = Cluster.read(cluster)
    used = known.link_counts().sum(axis=0) > 0
    rates = [link.bandwidth for link, there in zip(known.link_classes, used, strict=True) if there]
    if not rates:
        raise MoeplanError(f"{cluster}: has no links: give --link-rate instead")
    return min(rates)


def _sizes(placement: Placement, model: "Model | None") -> tuple[int, ...]:
    """[layers] bytes of an expert."""
    if model is not None:
        sizes = expert_bytes(model)
        if len(sizes) != len(placement.layers):
            raise MoeplanError(
                f"--model {model.name}: {len(sizes)} layers with experts, the placement has {len(placement.layers)}"
            )
        return sizes
    if placement.expert_bytes is None:
        raise MoeplanError("watch: the placement does not know how large its experts are: give --model")
    return placement.expert_bytes


def _introduce(watching: "Watching") -> None:
    """What is assumed, before anything is decided."""
    prices, saved = watching.prices, watching.saved
    each = 1e3 * float(prices.move_seconds.mean())
    note(
        f"assumed: experts are {prices.expert_share:.0%} of serving time, a move takes {each:.3g} ms, all moves pause "
        f"{prices.pause:g} s, a placement serves {prices.horizon:g} s"
    )
    if saved.watcher.seen:
        say(f"going on after batch {saved.watcher.seen}, decision {saved.decisions}")


def _look(watching: "Watching") -> "Look":
    with progress("deciding") as show:
        watching.on_event = show
        return watching.look()


def _show(look: "Look", watching: "Watching", as_json: bool) -> None:
    from ..watching import sentence

    for why in look.refused:
        note(why)
    for line in look.decided:
        if as_json:
            sys.stdout.write(json.dumps(line, allow_nan=False) + "\n")
        else:
            say(f"{line['time']} {sentence(line, watching.prices.horizon)}")
    if look.read and not as_json:
        say(_status(look, watching))
    sys.stdout.flush()


def _status(look: "Look", watching: "Watching") -> str:
    watcher = watching.saved.watcher
    rules, test, loads = watcher.rules, watcher.test, watcher.loads
    if test is None:
        held = len(loads.batches)
        state = f"learning: {held} of {rules.least} batches or more, {loads.covered:.0f} of {rules.window:.0f} s"
    else:
        state = f"evidence of change {test.evidence:.3g}, an alarm from {rules.between:g}"
    return f"read {look.read}; balance now {watching.balance:.3f}; {state}"
