"""Small recordings of engines, and how notes and refusals of importers must read."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moeplan.profiler.traces import import_trace
from moeplan.spec.errors import MoeplanError

E, P, LAYERS = 4, 6, 3
# Layer 0 is dense; physical experts 4 and 5 are copies of other logical ones in each layer.
MAP = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 2, 1, 3, 3, 0], [3, 2, 1, 0, 1, 2]])


def told(notes: list[str], *patterns: str) -> None:
    for pattern in patterns:
        assert any(re.search(pattern, note) for note in notes), (pattern, notes)


def refused(pattern: str, path: Path, kind: str | None = None, **options: int) -> None:
    with pytest.raises(MoeplanError, match=pattern) as stopped:
        import_trace(path, kind, **options)
    assert "\n" not in str(stopped.value)
    assert len(str(stopped.value)) < 600


def ids_of(tokens: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
    """Physical ids [tokens][2 layers with experts][K] as the file holds them: a dense layer 0, a width of 8."""
    full = torch.full((LAYERS, len(tokens), 8), -1, dtype=torch.int32)
    for t, token in enumerate(tokens):
        for layer, experts in enumerate(token, 1):
            full[layer, t, : len(experts)] = torch.tensor(experts)
    return full


def per_token(forward_pass: int, rank: int, inputs: list[int], lengths: list[int] | None, ids: torch.Tensor) -> dict:
    return {
        "forward_pass_id": forward_pass,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": inputs,
        "positions": list(range(len(inputs))),
        "extend_seq_lens": lengths,
        "forward_mode": 1,
        "misc_objects": [],
        "topk_ids_of_layer": ids,
        "global_physical_count": torch.zeros(LAYERS, P, dtype=torch.int32),
    }


def per_pass(forward_pass: int, rank: int, counts: torch.Tensor) -> dict:
    return {
        "forward_pass_id": forward_pass,
        "rank": rank,
        "gatherer_key": "primary",
        "global_physical_count": counts,
    }


def save_records(path: Path, records: object, logical: object = MAP) -> Path:
    torch.save({"records": records, "last_physical_to_logical_map": logical}, path)
    return path


FIRST = ids_of([[[1, 4], [0, 5]], [[5, 2], [4, 3]], [[3, 0], [1, 0]]])
# Layer 1 maps 1->2, 4->3, 5->0, 2->1, 3->3, 0->0; layer 2 maps 0->3, 5->2, 4->1, 3->0, 1->2.
FIRST_LOGICAL = [[[2, 3], [3, 2]], [[0, 1], [1, 0]], [[3, 0], [2, 3]]]
SECOND = ids_of([[[0, 1], [2, 3]], [[2, 3], [0, 1]]])
SECOND_LOGICAL = [[[0, 2], [1, 0]], [[1, 3], [3, 2]]]


A = np.array([[[0, 3], [2, 1]], [[1, 2], [0, 3]]], np.int16)
B = np.array([[[4, 3], [2, 4]]], np.int16)
UNROUTED = np.zeros((1, 2, 2), np.int16)  # the last token of an answer


def save_statistics(folder: Path, ranks: list[dict[str, Any]], meta: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    body = {"num_experts": 4, "num_experts_per_token": 2} if meta is None else meta
    (folder / "meta_info.json").write_text(json.dumps(body))
    for r, counts in enumerate(ranks):
        tensors = {name: torch.as_tensor(value) for name, value in counts.items()}
        save_file(tensors, folder / f"rank{r}.safetensors")
    return folder


LOGITS = torch.tensor([[[0.0, 2.0, 1.0, 1.0], [5.0, -1.0, 4.0, 0.0]], [[3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
