"""Which measured serving rows may be looked at while the predictor is designed, and which are hidden until its end.

Rows of one question (engine, its version, model, system, precision, prompt and output length) differ only in degrees
and concurrency, so they lie near each other: a question belongs to one half as a whole. Each family is halved alone.
"""

import hashlib

import pandas as pd

SEED = 20261201
QUESTION = ["backend", "backend_version", "model_path", "system", "precision", "isl", "osl"]


def hidden(rows: pd.DataFrame) -> pd.Series:
    """True for rows of the hidden half. ``rows`` has the columns of ``QUESTION`` and ``family``."""
    question = rows[QUESTION].astype(object).fillna("").astype(str).apply("|".join, axis=1)
    result = pd.Series(False, index=rows.index)
    for _, members in question.groupby(rows["family"]):
        sizes = members.value_counts()
        order = sorted(sizes.index, key=lambda name: hashlib.sha256(f"{SEED}|{name}".encode()).hexdigest())
        taken, names = 0, set()
        for name in order:
            if 2 * taken >= len(members):
                break
            names.add(name)
            taken += int(sizes[name])
        result[members.index] = members.isin(names)
    return result
