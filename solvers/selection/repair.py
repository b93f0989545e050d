"""A choice that fits from one that does not: the cheapest move per byte that it saves, then what is faster and fits."""

# C classes of layers, O options, D classes of devices

import numpy as np

from .problem import Problem


def repair(problem: Problem, chosen: np.ndarray, allowed: np.ndarray) -> np.ndarray | None:
    """A choice [C, O] within memory, near ``chosen`` [C, O] and of ``allowed`` [C, O] options; None if none is found.

    One layer moves at a time. Regions count at the largest of the allowed options until the choice fits.
    """
    chosen = chosen.copy()
    capacity = np.maximum(problem.capacity, 1)
    ceiling = np.where(allowed[:, :, None, None], problem.shared, 0).max((0, 1)).sum(0)  # [D]
    own = np.einsum("co,cod->d", chosen, problem.memory)
    over = np.maximum(own + ceiling - problem.capacity, 0)
    for _ in range(int(problem.count.sum()) * problem.cost.shape[1]):
        if not over.any():
            return _faster(problem, chosen, allowed)
        move = _cheapest_move(problem, chosen, allowed, own + ceiling, over / capacity)
        if move is None:
            return chosen if problem.fits(chosen) else None
        c, o, p = move
        chosen[c, o] -= 1
        chosen[c, p] += 1
        own = own + problem.memory[c, p] - problem.memory[c, o]
        over = np.maximum(own + ceiling - problem.capacity, 0)
    return None


def _cheapest_move(
    problem: Problem, chosen: np.ndarray, allowed: np.ndarray, used: np.ndarray, over: np.ndarray
) -> tuple[int, int, int] | None:
    """(class, from, to) of least seconds per part of capacity that is no longer overstepped."""
    best, found = np.inf, None
    capacity = np.maximum(problem.capacity, 1)
    for o in range(chosen.shape[1]):
        holds = np.flatnonzero(chosen[:, o])
        if not len(holds):
            continue
        change = problem.memory[holds] - problem.memory[holds, o, None]  # [C', O, D]
        left = np.maximum(used + change - problem.capacity, 0) / capacity
        saved = (over - left).sum(2)
        slower = problem.cost[holds] - problem.cost[holds, o, None]
        useful = allowed[holds] & (saved > 0)
        price = np.where(useful, slower / np.where(useful, saved, 1.0), np.inf)
        at = np.unravel_index(int(price.argmin()), price.shape)
        if price[at] < best:
            best, found = float(price[at]), (int(holds[at[0]]), o, int(at[1]))
    return found


def _faster(problem: Problem, chosen: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """One layer after another in its fastest option that still fits, the largest gain first, until none gains."""
    gains = []
    for c, o in np.argwhere(chosen).tolist():
        for p in np.flatnonzero(allowed[c] & (problem.cost[c] < problem.cost[c, o])).tolist():
            gains.append((problem.cost[c, o] - problem.cost[c, p], c, o, p))
    for _, c, o, p in sorted(gains, reverse=True):
        while chosen[c, o]:
            moved = chosen.copy()
            moved[c, o] -= 1
            moved[c, p] += 1
            if not problem.fits(moved):
                break
            chosen = moved
    return chosen
