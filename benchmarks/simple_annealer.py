"""A simple annealer, the yardstick of `benchmarks/anytime.py`: it swaps two experts of one layer.

    python benchmarks/simple_annealer.py TRACE.npz DEVICES HOSTS SECONDS OUT.json [CAP]

It fits the first half of the trace. Cost: the share of moves between layers that leave the host + 0.3 x that of those
that leave the device + 3 x what devices carry above ``CAP`` (1.15) times the mean, over all layers, in means.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from moeplan.solvers.jit import njit

DEVICE, OVER = 0.3, 3.0  # against 1 of a move between hosts
HOT, COLD = 1e-2, 1e-5  # temperatures at begin and end
TRIAL = 200_000  # steps that tell how many the time allows


@njit(cache=True)
def anneal(moves, load, place, hosts, cap, steps, seed):
    """moves [L, E, E], load [L, E] over the mean of a device, place [L, E] devices: changed and returned."""
    np.random.seed(seed)
    layers, experts = load.shape
    carried = np.zeros((layers, hosts.shape[0]))
    for layer in range(layers):
        for e in range(experts):
            carried[layer, place[layer, e]] += load[layer, e]
    for step in range(steps):
        temperature = HOT * (COLD / HOT) ** (step / steps)
        layer, a, b = np.random.randint(layers), np.random.randint(experts), np.random.randint(experts)
        p, q = place[layer, a], place[layer, b]
        if p == q:
            continue
        change = 0.0
        for other in (layer - 1, layer + 1):
            if other < 0 or other >= layers:
                continue
            for e in range(experts):
                if other < layer:
                    weight = moves[other, e, a] - moves[other, e, b]
                else:
                    weight = moves[layer, a, e] - moves[layer, b, e]
                if weight == 0:
                    continue
                r = place[other, e]
                from_p = 1.0 * (hosts[p] != hosts[r]) + DEVICE * (p != r)
                from_q = 1.0 * (hosts[q] != hosts[r]) + DEVICE * (q != r)
                change += weight * (from_q - from_p)
        more = load[layer, a] - load[layer, b]
        before = max(carried[layer, p] - cap, 0.0) + max(carried[layer, q] - cap, 0.0)
        after = max(carried[layer, p] - more - cap, 0.0) + max(carried[layer, q] + more - cap, 0.0)
        change += OVER * (after - before)
        if change <= 0 or np.random.random() < np.exp(-change / temperature):
            place[layer, a], place[layer, b] = q, p
            carried[layer, p] -= more
            carried[layer, q] += more
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("devices", type=int)
    parser.add_argument("hosts", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("out", type=Path)
    parser.add_argument("cap", type=float, nargs="?", default=1.15)
    args = parser.parse_args()
    with np.load(args.trace, allow_pickle=False) as trace:
        ids, experts = trace["expert_ids"].astype(np.int64), int(trace["num_experts"])
        ends = np.cumsum(trace["seq_len"]) if "seq_len" in trace else np.array([len(ids)])
    half = len(ids) // 2
    ids = ids[: int(ends[np.searchsorted(ends, half)]) if len(ends) > 1 else half]
    layers = ids.shape[1]
    load = np.stack([np.bincount(ids[:, i].ravel(), minlength=experts) for i in range(layers)]).astype(float)
    load *= args.devices / load.sum(1, keepdims=True)
    moves = np.zeros((layers, experts, experts))
    for i in range(layers - 1):
        np.add.at(moves[i], (ids[:, i, 0], ids[:, i + 1, 0]), 1.0 / len(ids))
    hosts = np.arange(args.devices) // (args.devices // args.hosts)
    start = np.tile(np.arange(experts) // (experts // args.devices), (layers, 1))
    anneal(moves, load, start.copy(), hosts, args.cap, 10, 0)  # compiles
    began = time.perf_counter()
    anneal(moves, load, start.copy(), hosts, args.cap, TRIAL, 0)
    steps = int(TRIAL * args.seconds / (time.perf_counter() - began))
    place = anneal(moves, load, start.copy(), hosts, args.cap, steps, 1)
    slots = [[np.flatnonzero(row == g).tolist() for g in range(args.devices)] for row in place]
    devices = [{"host": f"host{host}"} for host in hosts]
    args.out.write_text(json.dumps({"devices": devices, "layers": [{"slots": held} for held in slots]}))


if __name__ == "__main__":
    main()
