"""Pure optimisation over arrays: no device, no document, no torch.

One file per problem, each opening with its formulation, and one common result with a proven bound:

- ``split``: how many units of work each unequal device takes (exact);
- ``balance``: linear and greedy placements, and how even they are;
- ``annealing``: where single copies go, for few crossings at a given balance (scalable);
- ``affinity_layers``: the same, exact, where a layer has few ``arrangements``;
- ``affinity_exact``, ``affinity_fanout``: the same, exact, at small sizes; ``affinity_bound``: how good it can be;
- ``replication``: copies, places, shares (scalable), ``replication_exact``, ``replication_bound``; beside it ``eplb``;
- ``selection``: which strategy each layer uses under every device's memory (exact);
- ``mip``: the mixed-integer back ends (HiGHS and others through PuLP, CP-SAT);
- ``jit``, ``compiled``: numba, and the loops that it compiles, which are kept;
- ``result``: the common ``Solution`` and the solvers' own errors.
"""

from .result import Infeasible, NotFound, Solution, SolverError, SolverUnavailable

__all__ = ["Infeasible", "NotFound", "Solution", "SolverError", "SolverUnavailable"]
