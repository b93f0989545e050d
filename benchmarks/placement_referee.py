"""Scores an expert placement on a trace, with nothing of moeplan: for `benchmarks/placement.py` and `anytime.py`.

    python benchmarks/placement_referee.py PLACE.json TRACE.npz [--from 0.5] [--to 1.0]

Prints one JSON object for the part of the trace between two fractions of its tokens, cut at ends of sequences where
there are more than three: ``balance_mean`` and ``balance_max`` (tokens of the busiest device over the mean of all, over
layers), ``fanout_device`` and ``fanout_host`` (distinct devices or hosts of a token's experts in a layer), and, where
every expert has one copy, ``boundary_cross_device`` and ``boundary_cross_host`` (moves from a token's first expert of a
layer to that of the next which leave the device or host). A token of an expert with copies draws one, by their shares.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np


def part(ids: np.ndarray, seq_len: np.ndarray, low: float, high: float) -> np.ndarray:
    """Tokens [T, L, K] between two fractions of them."""
    cuts = [round(fraction * len(ids)) for fraction in (low, high)]
    if len(seq_len) > 3:
        ends = np.concatenate([[0], np.cumsum(seq_len)])
        cuts = [int(ends[np.abs(ends - cut).argmin()]) for cut in cuts]
    return ids[cuts[0] : cuts[1]]


def taken(layer: dict[str, Any], experts: int, where: str) -> np.ndarray:
    """[E, G] the share of an expert's tokens that a device takes; every expert is held, by no device twice."""
    share = np.zeros((experts, len(layer["slots"])))
    shares = layer.get("shares")
    for device, held in enumerate(layer["slots"]):
        if len(set(held)) != len(held):
            raise SystemExit(f"{where}: device {device} holds an expert twice")
        share[held, device] = 1.0 if shares is None else shares[device]
    if not (share.sum(1) > 0).all():
        raise SystemExit(f"{where}: {int((share.sum(1) > 0).sum())} of {experts} experts are held")
    return share / share.sum(1, keepdims=True)


def score(place: dict[str, Any], ids: np.ndarray, experts: int) -> dict[str, float]:
    """ids: [T, L, K], the first of a token has its highest gate weight."""
    tokens, layers, top_k = ids.shape
    if len(place["layers"]) != layers:
        raise SystemExit(f"the placement has {len(place['layers'])} layers, the trace {layers}")
    hosts = np.unique([device["host"] for device in place["devices"]], return_inverse=True)[1]
    shares = [taken(layer, experts, f"layer {i}") for i, layer in enumerate(place["layers"])]
    single = all(((share > 0).sum(1) == 1).all() for share in shares)
    rng = np.random.default_rng(0)
    device = np.empty((tokens, layers, top_k), np.int64)
    balance = []
    for layer, share in enumerate(shares):
        carried = np.bincount(ids[:, layer].ravel(), minlength=experts) @ share
        balance.append(carried.max() / carried.mean())
        draw = np.zeros((tokens, top_k)) if single else rng.random((tokens, top_k))
        device[:, layer] = (share.cumsum(1)[ids[:, layer]] > draw[..., None]).argmax(-1)
    found = {
        "balance_mean": float(np.mean(balance)),
        "balance_max": float(np.max(balance)),
        "fanout_device": distinct(device, len(hosts)),
        "fanout_host": distinct(hosts[device], int(hosts.max()) + 1),
    }
    if single:
        first = device[:, :, 0]
        found["boundary_cross_device"] = float((first[:, 1:] != first[:, :-1]).mean())
        found["boundary_cross_host"] = float((hosts[first[:, 1:]] != hosts[first[:, :-1]]).mean())
    return found


def distinct(places: np.ndarray, count: int) -> float:
    """Mean number of different places in the last axis; places: [T, L, K] below ``count``."""
    hit = np.zeros((*places.shape[:2], count), bool)
    np.put_along_axis(hit, places, True, axis=2)
    return float(hit.sum(2).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--from", dest="low", type=float, default=0.5)
    parser.add_argument("--to", dest="high", type=float, default=1.0)
    args = parser.parse_args()
    with np.load(args.trace, allow_pickle=False) as trace:
        ids, experts = trace["expert_ids"].astype(np.int64), int(trace["num_experts"])
        seq_len = trace["seq_len"] if "seq_len" in trace else np.array([len(ids)])
    print(json.dumps(score(json.loads(args.place.read_text()), part(ids, seq_len, args.low, args.high), experts)))


if __name__ == "__main__":
    main()
