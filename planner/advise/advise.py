"""Does balancing pay: placements by EPLB and by moeplan, with and without redundant experts, timed on held-out tokens.

Everything is compared with experts by number, one copy each, which is what engines do by default. Placements are fitted
on a part of the trace; times are of steps drawn from the rest.
"""

# L layers, E experts, G devices, W windows, B batches

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from ...spec.advice import LEAST, MAKERS, Advice, Interval, Maker, OptionAdvice, PhaseAdvice
from ...spec.errors import MoeplanError
from ...spec.model import Model
from ...spec.placement import PlacementDevice, PlacementLayer, TraceSource
from ...spec.trace import Trace
from ..budget import Budget
from ..place.baselines import eplb_slots, linear_slots
from ..place.fleet import Fleet
from ..place.layers import document_layers
from ..place.request import Request
from ..place.solve import place
from .imbalance import Phase
from .moving import move
from .timing import Timer, expert_sizes, hottest
from .uncertain import gain_of, scaled, steps_of

WINDOWS = 8  # of the held-out part
FIT_PARTS = 4  # of the fitted part: what placements of successive parts differ by is what a re-plan moves
ENOUGH = 16  # tokens of a window


@dataclass(frozen=True)
class Question:
    """What is asked.

    slots: of each layer, to be tried. tokens: of a step, by phase. step_seconds: of a whole step without balancing,
    by phase, where known. link: bytes per second at which a device loads experts. replan_every: steps between re-plans
    that stop the engine; None: the placement stays. fit: the part of the trace that placements are fitted on. makers:
    whose placements are tried.
    """

    devices: tuple[PlacementDevice, ...]
    slots: tuple[int, ...]
    tokens: dict[Phase, int]
    link: float
    step_seconds: dict[Phase, float] = field(default_factory=dict)
    replan_every: int | None = None
    fit: tuple[float, float] = (0.0, 0.5)
    seed: int = 0
    makers: tuple[Maker, ...] = MAKERS


@dataclass(frozen=True, eq=False)
class _Asked:
    """The question with what was made of it: parts of the trace, and the placement without balancing."""

    question: Question
    model: Model
    timer: Timer
    fitted: Trace
    windows: list[Trace]
    before: tuple[PlacementLayer, ...]


def advise(
    trace: Trace,
    model: Model,
    timer: Timer,
    question: Question,
    *,
    device: str,
    engine: str,
    trace_path: str = "",
    budget: Budget | None = None,
) -> Advice:
    """The answer. Raises MoeplanError where the trace is of counts only, too short, or experts do not divide."""
    asked = _asked(trace, model, timer, question)
    notes = _notes(asked)
    options = []
    todo: list[tuple[Maker, int]] = [(maker, slots) for slots in question.slots for maker in question.makers]
    budget = budget or Budget.of(60.0)
    for i, (maker, slots) in enumerate(todo):
        budget.tell(done=i, of=len(todo), what=f"{maker}, {slots} slots")
        layers = _placed(maker, trace, slots, asked, budget.part(1 / (len(todo) - i)))
        if layers is not None:
            options.append(_option(maker, slots, layers, asked))
    if not options:
        raise MoeplanError("no placement fits: slots must be a multiple of the devices, and at least one per expert")
    phases = tuple(question.tokens)
    return Advice(
        model=model.name,
        device=device,
        engine=engine,
        devices=len(question.devices),
        kernel=timer.described,
        noise=timer.noise,
        link_bytes_per_second=question.link,
        replan_every=question.replan_every,
        options=tuple(options),
        best=tuple(_best(options, i) for i in range(len(phases))),
        phases=phases,
        trace=TraceSource(
            path=trace_path,
            digest=trace.digest(),
            fit=question.fit,
            tokens=asked.fitted.tokens,
            counts_only=False,
        ),
        notes=tuple(notes),
        seed=question.seed,
    )


def _asked(trace: Trace, model: Model, timer: Timer, question: Question) -> _Asked:
    if trace.counts_only:
        raise MoeplanError("the trace has counts only: how loads differ between steps needs expert_ids per token")
    low, high = question.fit
    if high >= 1 and low <= 0:
        raise MoeplanError("--fit 0:1 leaves nothing to judge the placement on: fit a part, such as 0:0.5")
    fitted, rest = trace.part(low, high), trace.part(high, 1.0) if high < 1 else trace.part(0.0, low)
    windows = [w for w in rest.parts(WINDOWS) if w.tokens >= ENOUGH]
    if len(windows) < 2:
        raise MoeplanError(
            f"{rest.tokens} tokens outside of the fitted part are too few to tell a spread: record at least "
            f"{2 * ENOUGH} more, or fit less of the trace (--fit)"
        )
    fleet = Fleet.of(question.devices)
    linear = linear_slots(trace.layers, trace.num_experts, fleet)
    if linear is None:
        raise MoeplanError(f"{trace.num_experts} experts do not fit {len(question.devices)} devices by number")
    return _Asked(question, model, timer, fitted, windows, document_layers(linear))


def _placed(maker: Maker, trace: Trace, slots: int, asked: _Asked, budget: Budget) -> tuple[PlacementLayer, ...] | None:
    """A placement in ``slots`` slots; None where its rules refuse them."""
    devices = _devices(asked.question.devices, slots)
    if devices is None:
        return None
    if maker == "eplb":
        found = eplb_slots(asked.fitted.expert_counts, slots, 1, Fleet.of(devices))
        return None if found is None else document_layers(found)
    request = Request(
        devices, slots, asked.question.fit, objective="balance", equal_slots=True, seed=asked.question.seed
    )
    return place(trace, request, budget=budget).layers


def _devices(devices: Sequence[PlacementDevice], slots: int) -> tuple[PlacementDevice, ...] | None:
    """With equal slots, as engines demand; None where they do not divide."""
    each, rest = divmod(slots, len(devices))
    return None if rest else tuple(d.model_copy(update={"capacity": each}) for d in devices)


def _option(maker: Maker, slots: int, layers: tuple[PlacementLayer, ...], asked: _Asked) -> OptionAdvice:
    question, sizes = asked.question, expert_sizes(asked.model)
    first = move(asked.before, layers, sizes)
    seconds = first.seconds(question.link)
    replan = _replan_seconds(slots, asked, sizes)
    spare = slots // len(question.devices) - max(len(e) for e in asked.before[0].slots)
    phases, back = [], []
    for phase, tokens in question.tokens.items():
        found, saved = _phase(phase, tokens, layers, slots, asked, replan)
        phases.append(found)
        back.append(seconds / saved if saved > 0 and seconds > 0 else None)
    return OptionAdvice(
        placement=maker,
        slots=slots,
        redundant=slots - len(asked.fitted.expert_counts[0]),
        memory_bytes=max(0, spare) * sum(sizes),
        moved_bytes=first.bytes,
        move_seconds=seconds,
        replan_seconds=replan,
        pays_back_steps=tuple(back),
        phases=tuple(phases),
    )


def _phase(
    phase: Phase, tokens: int, layers: tuple[PlacementLayer, ...], slots: int, asked: _Asked, replan: float
) -> tuple[PhaseAdvice, float]:
    """And the seconds that it saves in a step."""
    question, timer = asked.question, asked.timer
    where = (asked.windows, tokens, phase, question.seed)
    off, on = timer.seconds(asked.before, *where), timer.seconds(layers, *where)
    before = float(off.mean())
    lost = replan / question.replan_every / before if question.replan_every else 0.0
    gain = scaled(gain_of(off, on, timer.noise), 1.0, lost)
    even = timer.even(*where, slots // len(question.devices))
    step = question.step_seconds.get(phase)
    found = PhaseAdvice(
        phase=phase,
        tokens=tokens,
        hottest_before=hottest(asked.before, *where),
        hottest=hottest(layers, *where),
        seconds_before=before,
        gain=gain,
        steps=steps_of(off, on),
        most=gain.middle + lost if even is None else 1 - even / before,
        step_gain=None if step is None else _of_step(gain, before, step, phase),
        pays=gain.sign > 0 and gain.middle >= LEAST,
    )
    return found, before - float(on.mean())


def _of_step(gain: Interval, experts: float, step: float, phase: Phase) -> Interval:
    if step < experts:
        raise MoeplanError(
            f"a {phase} step of {1e3 * step:g} ms is shorter than its experts alone, which are predicted to take "
            f"{1e3 * experts:.3g} ms: give the time of a whole step, with as many tokens, on this GPU"
        )
    return scaled(gain, experts / step)


def _replan_seconds(slots: int, asked: _Asked, sizes: Sequence[int]) -> float:
    """Mean seconds between placements by EPLB of successive parts of the fitted tokens: what re-planning moves."""
    devices = _devices(asked.question.devices, slots)
    assert devices is not None
    placed = [eplb_slots(p.expert_counts, slots, 1, Fleet.of(devices)) for p in asked.fitted.parts(FIT_PARTS)]
    layers = [document_layers(found) for found in placed if found is not None]
    moves = [move(a, b, sizes).seconds(asked.question.link) for a, b in pairwise(layers)]
    return float(np.mean(moves)) if moves else 0.0


def _best(options: Sequence[OptionAdvice], phase: int) -> int | None:
    """The option with the largest sure gain; of two alike the one with fewer slots."""
    paying = [i for i, option in enumerate(options) if option.phases[phase].pays]
    key: Callable[[int], Any] = lambda i: (round(options[i].phases[phase].gain.low, 3), -options[i].slots)  # noqa: E731
    return max(paying, key=key, default=None)


def _notes(asked: _Asked) -> list[str]:
    notes = []
    least = min(w.tokens for w in asked.windows)
    for phase, tokens in asked.question.tokens.items():
        if tokens > least:
            notes.append(
                f"{phase}: windows of the held-out part have from {least} tokens, a step has {tokens}: steps repeat "
                "them, which makes loads steadier than they will be; record more tokens"
            )
    return notes
