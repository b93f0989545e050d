"""The best order of a layer's chunks on two streams, by CP-SAT (FSMoE's schedule, arXiv 2501.10714).

Chunk c is dispatched (network), computed (processor), combined (network). Intervals of one stream do not overlap; each
step of a chunk begins when the one before it has ended; nothing else is fixed. Minimise the end of the last.
"""

from collections.abc import Sequence

from ortools.sat.python import cp_model


def best_makespan(dispatch: Sequence[int], compute: Sequence[int], combine: Sequence[int]) -> int:
    """In the unit of the given durations; proven."""
    model, horizon = cp_model.CpModel(), sum(dispatch) + sum(compute) + sum(combine)
    end = model.new_int_var(0, horizon, "end")
    network, processor = [], []
    for c, steps in enumerate(zip(dispatch, compute, combine, strict=True)):
        before = None
        for name, stream, seconds in zip("dxc", (network, processor, network), steps, strict=True):
            start = model.new_int_var(0, horizon, f"{name}{c}")
            stream.append(model.new_fixed_size_interval_var(start, seconds, f"{name}{c}"))
            if before is not None:
                model.add(start >= before)
            before = start + seconds
        assert before is not None
        model.add(end >= before)
    model.add_no_overlap(network)
    model.add_no_overlap(processor)
    model.minimize(end)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    assert solver.solve(model) == cp_model.OPTIMAL
    return round(solver.objective_value)
