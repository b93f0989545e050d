"""HEXA-MoE's re-index vector, which kernels with tiles are checked against."""

# T tokens, E experts, K top-k

from torch import Tensor

from moeplan.runtime.kernels.reindex import by_expert


def reindex_vector(ids: Tensor, experts: int, tile: int) -> Tensor:
    """HEXA's re-index vector: each expert's choices as whole tiles, the last one filled up with -1.

    ids: [T, K] -> [sum over experts of ceil(count / tile) tile] int64. A kernel reads a tile's rows through it and
    computes them with one expert's weight; only numbers are padded, never tokens.
    """
    order, counts = by_expert(ids, experts, "reindex_vector")
    tiles = [-(-n // tile) * tile for n in counts]
    vector = order.new_full((sum(tiles),), -1)
    for rows, own in zip(vector.split(tiles), order.split(counts), strict=True):
        rows[: len(own)] = own
    return vector
