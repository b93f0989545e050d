"""Synthetic clusters of any size, with every curve that a plan for a model reads: for benchmarks of the search.

    python -m moeplan.benchmarks.synthetic_clusters --hosts 512 --devices 8 --model mixtral --output large.json

The curves are analytic: a device of speed v computes v * 100 GFLOP/s and moves v * 10 GB/s, every call costs 20 us; see
``tests/synthetic.py``. ``--speeds 1,0.5`` makes every second host half as fast, ``--switches 2`` gives a host two
switches. ``--first-version`` spells out every device, pair and group in version 1 of the document, which an older
moeplan reads.
"""

import argparse
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

from moeplan.spec import Cluster, Model
from moeplan.spec.catalogue import load_model
from moeplan.spec.cluster import MAX_DEVICES
from moeplan.spec.cluster.measurement import Measurement
from moeplan.spec.errors import MoeplanError
from moeplan.spec.model import Attention
from moeplan.spec.output import write_atomically
from moeplan.tests.spelled_out import first_version, spelled_out
from moeplan.tests.synthetic import cluster

MEMORY = 192 * 2**30  # bytes of a device: the layers of the catalogue's largest model fit, or share storage
TENSORS = (1, 2, 4, 8)
LIKE = "deepseek-v3-like"
LATER = (
    "attention_scattered",
    "by_batch",
    "coherent_",
    "hierarchical_",
    "offload_",
)  # operators that version 1 does not know
MOST_SPELLED_OUT = 64  # devices: a file of version 1 grows with their square


def deepseek_v3_like() -> Model:
    """DeepSeek-V3's layers, not quantised, with grouped attention: latent attention is not executed yet."""
    real = load_model("deepseek-v3")
    attention = Attention(heads=128, kv_heads=8, head_dim=128)
    blocks = tuple(block.dequantised().model_copy(update={"attention": attention}) for block in real.blocks)
    return real.model_copy(update={"name": LIKE, "blocks": blocks, "head_storage": None})


def known_first(measured: Measurement) -> Measurement:
    """Without operators that readers of version 1 refuse."""
    devices = tuple(
        device.model_copy(
            update={"operators": tuple(entry for entry in device.operators if not entry.operator.startswith(LATER))}
        )
        for device in measured.devices
    )
    return measured.model_copy(update={"devices": devices})


def synthetic_cluster(
    model: Model,
    hosts: int,
    devices: int,
    *,
    speeds: Sequence[float] = (1.0,),
    switches: int = 1,
    memory: float = MEMORY,
    dtype: str | None = None,
    disk: float | None = None,
) -> Cluster:
    """``hosts`` times ``devices``; host i has speed i of ``speeds``, in turn. dtype: the model's own by default. disk:
    bytes per second of the hosts' disks, where they have any.

    Raises ValueError for no device, too many, or a speed or memory that none has.
    """
    if min(hosts, devices, switches) < 1 or hosts * devices > MAX_DEVICES:
        raise ValueError(f"at least one host, device and switch, at most {MAX_DEVICES} devices")
    if not (min(speeds) > 0 and memory >= 1):
        raise ValueError("speeds and memory must be above 0")
    of_host = islice(cycle(speeds), hosts)
    return cluster(
        model,
        [[speed] * devices for speed in of_host],
        memory=memory,
        dtype=dtype or model.dtype,
        tensors=[t for t in TENSORS if t <= devices and _divides_heads(model, t)],
        switches=switches,
        disk=disk,
    )


def _divides_heads(model: Model, tensor: int) -> bool:
    attentions = [block.attention for block in model.blocks if block.attention]
    return all(a.heads % tensor == 0 and a.kv_heads % tensor == 0 for a in attentions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--devices", type=int, default=8, help="of each host")
    parser.add_argument("--model", default="mixtral", help=f"catalogue name, config.json or {LIKE}")
    parser.add_argument("--write-model", type=Path, help="also write the model, for --model of other commands")
    parser.add_argument("--speeds", default="1", help="of the hosts, in turn, such as 1,0.5")
    parser.add_argument("--switches", type=int, default=1, help="of each host")
    parser.add_argument("--memory-gib", type=float, default=MEMORY / 2**30, help="of each device")
    parser.add_argument("--first-version", action="store_true", help="write version 1 of the document")
    parser.add_argument("--output", type=Path, default=Path("cluster.json"))
    args = parser.parse_args()
    try:
        model = deepseek_v3_like() if args.model == LIKE else load_model(args.model)
        made = synthetic_cluster(
            model,
            args.hosts,
            args.devices,
            speeds=[float(speed) for speed in args.speeds.split(",")],
            switches=args.switches,
            memory=args.memory_gib * 2**30,
        )
        if args.first_version and len(made.devices) > MOST_SPELLED_OUT:
            raise ValueError(f"version 1 is written for at most {MOST_SPELLED_OUT} devices")
    except (MoeplanError, ValueError) as error:
        parser.error(str(error))
    if args.write_model:
        args.write_model.write_text(first_version(model))
    text = first_version(known_first(spelled_out(made))) if args.first_version else made.to_json()
    write_atomically(args.output, lambda file: file.write(text.encode()))
    print(f"{args.output}: {len(made.devices)} devices, {len(text) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
