"""Place: a trace in, a placement out, with its scores, its bound and what was assumed."""

# L layers, E experts, G devices

import numpy as np
from threadpoolctl import threadpool_limits

from ...solvers.result import SolverError
from ...spec.errors import InfeasibleError
from ...spec.model import Model
from ...spec.placement import Moves, Placement, PlacementLayer, TraceSource
from ...spec.repeats import repeated_rows
from ...spec.trace import Trace
from ..budget import Budget
from .compared import baseline_slots, compared_notes, rest_of, scored, scores
from .first import first_answer
from .fleet import Fleet
from .layers import document_layers
from .ready import solvers_ready
from .replan import copies_by_layer
from .request import Request, check


def place(
    trace: Trace,
    request: Request,
    *,
    trace_path: str = "",
    previous_path: str = "",
    model: Model | None = None,
    budget: Budget | None = None,
) -> Placement:
    """Solve, score and say how sure the answer is. Raises ``MoeplanError`` where the request cannot be met.

    budget: what ends the whole of it; by default the request's time limit, once the solvers are compiled and loaded.
    """
    if budget is None:
        solvers_ready(None)
        budget = Budget.of(request.time_limit)
    fitted = trace.part(*request.fit).for_placement()
    fleet = Fleet.of(request.devices)
    notes = check(trace, fitted, request, fleet)
    objective = "balance" if fitted.counts_only else request.objective
    digest = trace.digest()
    rest = rest_of(trace, request.fit)
    usual = baseline_slots(fitted, request, fleet)
    known, least = scored(usual, request, fitted, rest, budget)
    search = budget.before(least)
    try:
        # The arrays are small: more BLAS threads than one slow them down, and there are two searches at a time.
        with threadpool_limits(1, user_api="blas"):
            balancing = objective == "balance" or request.slots > trace.num_experts
            if solvers_ready(search, fitted.expert_counts.size, everything=balancing):
                # Imported when it is needed: a first answer must not wait for the solvers to load.
                from .searched import searched_answer

                answer = searched_answer(fitted, request, fleet, objective, search)
            else:
                answer = first_answer(fitted, request, fleet, objective, usual, known, search)
    except SolverError as error:
        raise InfeasibleError(str(error)) from None
    layers = document_layers(answer.slots)
    same = [name for name, slots in usual.items() if slots is answer.slots]
    mine = known[same[0]] if same else scores(layers, request, fitted, rest)
    sizes = None if model is None else _expert_bytes(model, request, trace.layers)
    return Placement(
        model=model.name if model else trace.model,
        expert_bytes=sizes,
        num_experts=trace.num_experts,
        devices=request.devices,
        layers=layers,
        objective=objective,
        movement=request.movement,
        share_rule=request.shares,
        groups=request.groups,
        balance_cap=answer.cap,
        balance_cap_of=None if answer.cap is None else "samples" if request.balance_cap is None else "fit",
        solver=answer.solver,
        scores={"placement": mine, **known},
        trace=TraceSource(
            path=trace_path,
            digest=digest,
            fit=request.fit,
            tokens=fitted.tokens,
            counts_only=fitted.counts_only,
        ),
        moves=_moves(request, layers, previous_path, model, sizes),
        notes=tuple(
            note
            for note in (
                *notes,
                repeated_rows(fitted),
                *compared_notes(usual, fitted, request, fleet),
                *answer.notes,
                *_cut_short(budget),
            )
            if note
        ),
        seed=request.seed,
    )


def _moves(
    request: Request,
    layers: tuple[PlacementLayer, ...],
    path: str,
    model: Model | None,
    sizes: tuple[int, ...] | None,
) -> Moves | None:
    """What is loaded against the previous placement, read from ``path``; sizes: [L] bytes of an expert."""
    if request.previous is None:
        return None
    copies = copies_by_layer(request.previous, layers)
    moved = None if model is None else int(np.dot(copies, sizes or [model.expert_bytes()] * len(layers)))
    return Moves(previous=path, copies=sum(copies), limit=request.max_moves, bytes=moved)


def _expert_bytes(model: Model, request: Request, layers: int) -> tuple[int, ...] | None:
    """[L] bytes of one expert as stored; None where the model has other layers than the trace."""
    dtype = request.timing.dtype if request.timing else model.dtype
    found = tuple(model.expert_bytes(ordinal, dtype) for ordinal in range(len(model.moe_layers)))
    return found if len(found) == layers else None


def _cut_short(budget: Budget) -> tuple[str, ...]:
    """What there was no time for."""
    return (f"no time for {', '.join(budget.skipped)}: raise --time-limit",) if budget.skipped else ()
