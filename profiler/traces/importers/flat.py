"""The shape of routed experts that were returned flat: told by the user, or the only one that fits."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ....spec.errors import DocumentError
from ....spec.model import MAX_LAYERS
from .options import Options

SHOWN = 8  # numbers of layers that a message lists


class Flat(Protocol):
    """An answer whose rows have no shape yet, and what the engine tells of its tokens."""

    rows: np.ndarray
    where: str
    prompt: int | None
    completion: int | None
    start: int | None


def flat_shape(answers: Sequence[Flat], options: Options, where: str, notes: list[str]) -> tuple[int, int]:
    """Layers and top_k of answers without a shape, every answer checked against the tokens that its engine tells.

    Answers begin at any token of the prompt (SGLang's routed_experts_start_len), so tokens alone seldom tell layers:
    they are taken from --layers or --model, or are the one number that fits every answer, or are asked for.
    """
    top_k = options.top_k
    if top_k is None:
        raise DocumentError(f"{where}: base64 does not tell its shape: give --top-k and --layers, or --model")
    layers = options.layers
    if layers is None and options.model is not None:
        layers = options.model.layers
    if layers is None:
        layers = _only_fit(answers, top_k, where)
        notes.append(
            f"layers are not told: {layers} is the only number with which the {len(answers)} answers are whole rows "
            f"of top-{top_k}, no more than their prompt_tokens and completion_tokens"
        )
    late = told = 0
    for answer in answers:
        if answer.rows.size % (layers * top_k):
            raise DocumentError(f"{answer.where}: {answer.rows.size} integers are no multiple of {layers} x {top_k}")
        rows, most = answer.rows.size // (layers * top_k), _most(answer)
        if most is not None and rows > most:
            raise DocumentError(
                f"{answer.where}: {layers} layers of top-{top_k} give {rows} rows, the answer has at most {most} "
                "tokens: check --layers and --top-k"
            )
        told += most is not None
        late += most is not None and rows < most - 1
    if told:
        notes.append(f"{layers} layers x top-{top_k} checked against the tokens of {told} of {len(answers)} answers")
    if late:
        notes.append(
            f"{late} answers lack rows of their first tokens (routed_experts_start_len): the prompt is partly counted"
        )
    return layers, top_k


def _most(answer: Flat) -> int | None:
    """The most rows that an answer can have: some versions also return the last token, which is never routed."""
    if answer.prompt is None or answer.completion is None:
        return None
    return answer.prompt + answer.completion - (answer.start or 0)


def _only_fit(answers: Sequence[Flat], top_k: int, where: str) -> int:
    numbers = np.arange(1, MAX_LAYERS + 1)
    fits = np.ones(len(numbers), bool)
    for answer in answers:
        most = _most(answer)
        if most is None:
            raise DocumentError(f"{answer.where}: neither its shape nor its tokens are told: give --layers or --model")
        whole, rest = divmod(answer.rows.size, top_k)
        fits &= (rest == 0) & (whole % numbers == 0) & (whole // numbers <= most)
        if answer.start is not None:
            fits &= whole // numbers >= most - 1
    found = numbers[fits]
    if len(found) == 1:
        return int(found[0])
    if not len(found):
        raise DocumentError(f"{where}: no number of layers fits top-{top_k} and the answers' tokens: check --top-k")
    more = f", ... ({len(found)} in all)" if len(found) > SHOWN else ""
    raise DocumentError(
        f"{where}: {', '.join(map(str, found[:SHOWN]))}{more} layers all fit top-{top_k} and the answers' tokens: give "
        "--layers or --model"
    )
