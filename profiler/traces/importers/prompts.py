"""The prompt of a request with several choices (n > 1): vLLM repeats it in every choice, but routed it once."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Choice(Protocol):
    """Rows [tokens, layers, top_k] of one choice, those of the prompt first."""

    rows: np.ndarray


def count_prompt_once(choices: Sequence[Choice], request: Any, notes: list[str]) -> bool:
    """Take the prompt's rows from all choices but the first; whether there were any.

    Their number comes from the choices' token_ids, or from usage, or from the prompt's tokens; where the request tells
    none of these, the rows that all choices begin with are taken for the prompt, and the notes say so.
    """
    if not isinstance(request, dict) or request.get("prompt_routed_experts") is not None:
        return False  # before vLLM 0.33 the prompt stood apart
    if any(choice.rows.ndim != 3 or choice.rows.shape[1:] != choices[0].rows.shape[1:] for choice in choices):
        return False
    rows = [choice.rows for choice in choices]
    shared, (told, exact) = _shared(rows), _told(rows, request)
    if told is None or not (exact or shared):
        told = shared
        if shared:
            notes.append(
                f"the request does not tell its prompt_tokens: {shared} rows that its {len(rows)} choices share are "
                "taken for the prompt"
            )
    elif told > shared:
        notes.append(f"choices of one request differ in {told - shared} of {told} prompt rows: the first's are counted")
    for choice in choices[1:]:
        choice.rows = choice.rows[told:]
    return told > 0


def _shared(rows: list[np.ndarray]) -> int:
    """Rows that all choices begin with."""
    length = min(len(own) for own in rows)
    same = np.ones(length, bool)
    for own in rows[1:]:
        same &= (own[:length] == rows[0][:length]).all(axis=(1, 2))
    return length if same.all() else int(same.argmin())


def _told(rows: list[np.ndarray], request: dict[str, Any]) -> tuple[int | None, bool]:
    """Rows of the prompt that the request tells, and whether they surely stand in every choice.

    The last token of a choice is never routed, so a choice of C tokens has its prompt's rows and C - 1.
    """
    usage = request["usage"] if isinstance(request.get("usage"), dict) else {}
    prompt = usage.get("prompt_tokens")
    if isinstance(request.get("prompt_token_ids"), list):
        prompt = len(request["prompt_token_ids"])
    items: list[Any] = next(
        (request[name] for name in ("outputs", "choices") if isinstance(request.get(name), list)), []
    )
    ids_of = [item.get("token_ids") for item in items if isinstance(item, dict)]
    generated = [ids for ids in ids_of if isinstance(ids, list)]
    found: list[int] = []
    if len(generated) == len(ids_of) == len(rows):
        found = [len(own) + 1 - len(ids) for own, ids in zip(rows, generated, strict=True)]
    elif type(usage.get("completion_tokens")) is int:
        found = [(sum(map(len, rows)) + len(rows) - usage["completion_tokens"]) // len(rows)]
    exact = bool(found)
    if type(prompt) is int:
        found.append(prompt)
    told = min(found, default=None)
    fits = told is not None and 0 <= told <= min(map(len, rows))
    return (told, exact) if fits else (None, False)
