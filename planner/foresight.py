"""How a trace lets foresee which experts the next layer needs (``spec.foresight``).

The step that is planned is itself drawn from the trace. Its tokens are left out, so that the prediction is of tokens
that the probabilities do not know, as it is for those to come.
"""

# T tokens, L layers, E experts, K top-k

from collections.abc import Sequence

import numpy as np

from ..spec.foresight import MAX_CHANCES, Foresight, resting, written
from ..spec.plan import LayerPlan
from ..spec.routing import traced_rows
from ..spec.trace import Trace
from ..spec.workload import Workload

PRIOR = 16.0  # tokens that a layer's own frequencies count as, beside those that chose an expert


def other_tokens(trace: Trace, workload: Workload, seed: int) -> np.ndarray:
    """[T, L, K] choices of the trace's tokens that the step of this seed does not consist of."""
    others = np.ones(trace.tokens, bool)
    others[traced_rows(trace, workload, seed)] = False
    return trace.expert_ids[others]


def follows(ids: np.ndarray, experts: int) -> np.ndarray:
    """[L - 1, E, E] of the tokens that choose expert f in a layer, how many choose e in the next: at f, e.

    ids: [T, L, K]. Few tokens say little: ``PRIOR`` more are taken to choose as all tokens do.
    """
    tokens, layers, top_k = ids.shape
    chose = np.stack([np.bincount(ids[:, j].ravel(), minlength=experts) for j in range(layers)])  # [L, E]
    often = chose / max(tokens, 1)
    found = np.empty((layers - 1, experts, experts))
    for j in range(layers - 1):
        both = np.zeros(experts**2)
        for a in range(top_k):
            before = ids[:, j, a].astype(np.int64) * experts
            for b in range(top_k):
                both += np.bincount(before + ids[:, j + 1, b], minlength=experts**2)
        pairs = both.reshape(experts, experts)
        found[j] = (pairs + PRIOR * often[j + 1]) / (chose[j, :, None] + PRIOR)
    return found


def can_foresee(trace: Trace | None, experts: int) -> bool:
    """Whether the trace says what follows what, in a table that a plan may have."""
    return trace is not None and trace.tells_movement and 0 < (trace.layers - 1) * experts**2 <= MAX_CHANCES


def foresight_of(chances: np.ndarray, tokens: int, plans: Sequence[LayerPlan], least: float) -> Foresight:
    """What ``follows`` found of so many tokens, for what rests under these plans."""
    rest = [resting(plan.slots, plan.resident or ()) for plan in plans[1:]]
    rows = (written(chances[j][:, experts].T) for j, experts in enumerate(rest))
    return Foresight(least=least, tokens=tokens, chances=tuple(rows))
