"""Clip the eigenvalues of symmetric matrices that change little from one call to the next.

A decomposition A = V diag(d) V' costs some twenty products of matrices of its size. The vectors of an earlier A serve
as long as V'AV is nearly diagonal: a function f of the eigenvalues is then, to first order in what is off the diagonal,

    f(A) = V F V',  F[i, i] = f(d[i]),  F[i, j] = (V'AV)[i, j] * (f(d[i]) - f(d[j])) / (d[i] - d[j])

(Daleckii and Krein 1965), whose quotients are in 0..1 for clipping. What is left out is of second order; ``OFF`` is how
much may be off the diagonal before a matrix is decomposed anew.
"""

# B matrices, N rows

import numpy as np

from ..jit import njit

OFF = 0.05  # of the norm of V'AV
CALLS = 10  # that vectors serve at most: what they leave out must vanish once A no longer changes


class EigenClip:
    """f(A) = V diag(min(max(d, 0), highest)) V' for symmetric A [B, N, N], one stack after the other."""

    def __init__(self, highest: float) -> None:
        self.highest = highest
        self.vectors = np.zeros((0, 0, 0))
        self.served = np.zeros(0, int)  # [B] calls since the vectors were found

    def __call__(self, matrices: np.ndarray) -> np.ndarray:
        """[B, N, N], symmetric to the last digit."""
        if self.vectors.shape != matrices.shape:
            self.vectors, self.served = np.zeros_like(matrices), np.full(len(matrices), CALLS)
        form = self.vectors.transpose(0, 2, 1) @ (matrices @ self.vectors)
        stale = _clip(form, self.highest, OFF**2) | (self.served >= CALLS)
        self.served[stale] = 0
        self.served += 1
        if stale.any():
            values, self.vectors[stale] = np.linalg.eigh(matrices[stale])
            form[stale] = np.clip(values, 0.0, self.highest)[:, :, None] * np.eye(values.shape[1])
        clipped = self.vectors @ form @ self.vectors.transpose(0, 2, 1)
        return (clipped + clipped.transpose(0, 2, 1)) / 2


@njit(cache=True, nogil=True)
def _clip(form, highest, most):
    """F in place of V'AV; [B] whether more is off its diagonal than the formula allows for."""
    count, size, _ = form.shape
    stale = np.zeros(count, np.bool_)
    diagonal = np.empty(size, form.dtype)
    clipped = np.empty(size, form.dtype)
    for matrix in range(count):
        rows = form[matrix]
        on, off = 0.0, 0.0
        for i in range(size):
            diagonal[i] = rows[i, i]
            clipped[i] = min(max(diagonal[i], 0.0), highest)
            on += diagonal[i] ** 2
            for j in range(i):
                off += rows[i, j] ** 2
        if 2 * off > most * (on + 2 * off):
            stale[matrix] = True
            continue
        for i in range(size):
            for j in range(i):
                apart = diagonal[i] - diagonal[j]
                inside = 1.0 if 0 < diagonal[i] < highest else 0.0
                slope = (clipped[i] - clipped[j]) / apart if apart != 0 else inside
                value = slope * 0.5 * (rows[i, j] + rows[j, i])
                rows[i, j] = value
                rows[j, i] = value
            rows[i, i] = clipped[i]
    return stale
