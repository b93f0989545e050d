"""Valid files of every kind that a command reads, and the commands that read them."""

import base64
import contextlib
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from moeplan.planner.export import ENGINES
from moeplan.planner.export import export as make
from moeplan.spec import Model
from moeplan.spec.catalogue import load_model
from moeplan.spec.catalogue.published import PUBLISHED
from moeplan.spec.cluster import LinkException, Topology, TopologyEdge, TopologyNode
from moeplan.spec.plan import LayerPlan
from moeplan.tests.exports import linear_placement
from moeplan.tests.hostile_mutations import VALUES, mutate
from moeplan.tests.plans import even_slots, hand_made_plan
from moeplan.tests.routings import random_trace
from moeplan.tests.spelled_out import first_version, spelled_out
from moeplan.tests.synthetic import cluster

LAYERS, EXPERTS, HIDDEN, FFN, HEADS, VOCABULARY = 3, 4, 32, 48, 4, 64
CONFIG = {
    "model_type": "mixtral", "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "vocab_size": VOCABULARY, "torch_dtype": "float32",
}  # fmt: skip
QUICK = ["--steps", "50", "--time-limit", "2", "--devices", "2"]


@dataclass(frozen=True)
class Case:
    """A command in a folder whose files are ready; ``name`` says what was done to which file."""

    name: str
    argv: list[str]


def make_seeds(folder: Path) -> None:
    """Every valid file, in ``folder``."""
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    model = load_model(str(folder / "config.json"))
    measured = cluster(model, ((1.0, 0.5),))
    measured.write(folder / "cluster.json")
    (folder / "first-cluster.json").write_text(first_version(spelled_out(measured)))
    wires = tuple(TopologyEdge(source=f"device {i}", target="s", rate=1e9) for i in (0, 1))
    by_hand = {
        "link_exceptions": (LinkException(source=1, target=0, link="host"),),
        "topology": Topology(nodes=(TopologyNode(name="s", type="switch"),), edges=wires),
        "collectives": tuple(c.model_copy(update={"kinds": ("speed 0.5", "speed 1")}) for c in measured.collectives),
    }
    measured.model_copy(update=by_hand).write(folder / "hand-cluster.json")
    layer = LayerPlan(strategy="ep", slots=even_slots(EXPERTS, 2))
    hand_made_plan(model, "decode:4@8", [layer], tokens=[2, 2]).write(folder / "plan.json")
    random_trace(0, LAYERS, EXPERTS, 60, 2).write(folder / "trace.npz")
    linear_placement(model, 2).write(folder / "place.json")
    for name, (_, body) in PUBLISHED.items():
        (folder / f"published-{name}.json").write_text(json.dumps(body, indent=1))
    lab = "name: two\nhosts:\n  - {name: a, ranks: 1, cpu_share: 0.5}\n  - {name: b, ranks: 1, cpu_share: 0.2}\n"
    (folder / "lab.yaml").write_text(lab + "uplink_gbit: 1.0\n")
    for engine in ENGINES:
        target = load_model("qwen3-30b-a3b") if engine in ("sglang", "tensorrt-llm") else model
        for name, text in make(linear_placement(target, 2), engine, target).files.items():
            (folder / f"{engine}-{name}").write_text(text)
    _recordings(folder)
    _checkpoint(folder / "weights", model)


def _recordings(folder: Path) -> None:
    """One of each engine's recordings: 5 tokens, 3 layers, top-2 of 4."""
    ids = np.stack([np.random.default_rng(i).permutation(EXPERTS)[:2] for i in range(15)]).reshape(5, 3, 2)
    logical = torch.arange(EXPERTS).repeat(LAYERS, 1)
    record = {
        "forward_pass_id": 1, "rank": 0, "gatherer_key": "primary", "input_ids": [1, 2, 3, 4, 5],
        "positions": [0, 1, 2, 3, 4], "extend_seq_lens": [5], "forward_mode": 1, "misc_objects": [],
        "topk_ids_of_layer": torch.from_numpy(ids).transpose(0, 1).contiguous().int(),
        "global_physical_count": torch.zeros(LAYERS, EXPERTS, dtype=torch.int32),
    }  # fmt: skip
    torch.save({"records": [record], "last_physical_to_logical_map": logical}, folder / "sglang.pt")
    text = base64.b64encode(ids.astype("<i4").tobytes()).decode()
    answer = {"meta_info": {"prompt_tokens": 3, "completion_tokens": 3, "routed_experts": text}}
    (folder / "sglang.jsonl").write_text(json.dumps(answer))
    nested = {"prompt_routed_experts": ids[:2].tolist(), "outputs": [{"routed_experts": ids[2:].tolist()}]}
    (folder / "vllm.json").write_text(json.dumps(nested, indent=1))
    np.savez(folder / "vllm.npz", r0=ids.astype(np.int16))
    np.save(folder / "vllm.npy", ids.astype(np.int16))
    logits = [torch.randn(5, EXPERTS) for _ in range(LAYERS)]
    torch.save(tuple(logits), folder / "logits.pt")
    save_file({f"layer_{i}": value for i, value in enumerate(logits)}, folder / "logits.safetensors")
    np.savez(folder / "logits.npz", **{f"layer_{i}": value.numpy() for i, value in enumerate(logits)})
    np.savez(folder / "counts.npz", expert_counts=np.arange(12.0).reshape(3, 4))
    (folder / "statistics").mkdir()
    (folder / "statistics" / "meta_info.json").write_text('{"num_experts": 4, "num_experts_per_token": 2}')
    save_file({f"0_{i}": torch.arange(4) for i in range(3)}, folder / "statistics" / "rank0.safetensors")


def _checkpoint(folder: Path, model: Model) -> None:
    """Random weights of the small Mixtral, in two files with an index."""
    folder.mkdir()
    size = HIDDEN // HEADS
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    for i in range(LAYERS):
        layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        shapes |= {f"{layer}.input_layernorm": (HIDDEN,), f"{layer}.post_attention_layernorm": (HIDDEN,)}
        shapes |= {f"{attention}.{n}_proj": (HIDDEN, HIDDEN) for n in "qo"}
        shapes |= {f"{attention}.{n}_proj": (2 * size, HIDDEN) for n in "kv"}
        shapes[f"{layer}.block_sparse_moe.gate"] = (EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            expert = f"{layer}.block_sparse_moe.experts.{e}"
            shapes |= {f"{expert}.w1": (FFN, HIDDEN), f"{expert}.w3": (FFN, HIDDEN), f"{expert}.w2": (HIDDEN, FFN)}
    tensors = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _engine_check(folder: Path, file: str) -> list[str]:
    engine = next(name for name in sorted(ENGINES, key=len, reverse=True) if file.startswith(f"{name}-"))
    model = "qwen3-30b-a3b" if engine in ("sglang", "tensorrt-llm") else "config.json"
    return ["export", "--check", file, "--to", engine, "--model", model, "--devices", "2"]


def readers(folder: Path) -> dict[str, list[list[str]]]:
    """The commands that read each seed, by the seed's path in ``folder``; a list of more than one is drawn from."""
    named = ["-m", "config.json"]
    place = ["place", "--trace", "trace.npz", *QUICK]
    solve = ["solve", "-m", "config.json", "--workload", "decode:4@8", "--time-limit", "2"]
    found: dict[str, list[list[str]]] = {
        "config.json": [solve, [*place, *named], ["export", "place.json", "--to", "vllm", *named]],
        "cluster.json": [solve, [*place, *named, "--cluster", "cluster.json"], ["profile", *named]],
        "first-cluster.json": [[*solve, "--cluster", "first-cluster.json"]],
        "hand-cluster.json": [["explain", "hand-cluster.json"], [*solve, "--cluster", "hand-cluster.json"]],
        "plan.json": [["run", "plan.json"]],
        "lab.yaml": [["run", "plan.json", "--lab", "lab.yaml"]],
        "place.json": [
            ["explain", "place.json", "--trace", "trace.npz"],
            ["compare", "place.json", "place.json"],
            ["compare", "place.json", "place.json", "--trace", "trace.npz", "--json"],
            ["export", "place.json", "--to", "deepspeed", "-m", "config.json", "-o", "out"],
            [*place, "--previous", "place.json"],
            [*solve, "--placement", "place.json"],
            ["run", "--placement", "place.json", "-m", "config.json", "--workload", "decode:4@8"],
        ],
        "trace.npz": [
            place,
            ["trace", "stats", "trace.npz", "--devices", "2", "--json"],
            ["trace", "import", "trace.npz", "-o", "new.npz"],
            [*solve, "--trace", "trace.npz"],
        ],
        "counts.npz": [["place", "--trace", "counts.npz", *QUICK], ["trace", "stats", "counts.npz", "--json"],
                       ["trace", "import", "counts.npz", "-o", "new.npz"]],
        "sglang.jsonl": [["trace", "import", "sglang.jsonl", "--top-k", "2", "-o", "new.npz"]],
        "statistics/meta_info.json": [["trace", "import", "statistics", "-o", "new.npz"]],
        "statistics/rank0.safetensors": [["trace", "import", "statistics", "-o", "new.npz"]],
    }  # fmt: skip
    for file in ("sglang.pt", "vllm.json", "vllm.npz", "vllm.npy"):
        found[file] = [["trace", "import", file, "-o", "new.npz"]]
    for file in ("logits.pt", "logits.safetensors", "logits.npz"):
        found[file] = [["trace", "import", file, "--top-k", "2", "-o", "new.npz"]]
    for path in sorted(folder.iterdir()):
        if path.name.startswith("published-"):
            found[path.name] = [["place", "--trace", "trace.npz", "-m", path.name, *QUICK], ["solve", "-m", path.name]]
        elif path.name.startswith(tuple(f"{name}-" for name in ENGINES)):
            found[path.name] = [_engine_check(folder, path.name)]
    for path in sorted((folder / "weights").iterdir()):
        found[f"weights/{path.name}"] = [["run", "plan.json", "--weights", "weights"]]
    return found


OPTIONS = {
    "place": ["--devices", "--hosts", "--slots", "--groups", "--max-moves", "--balance-cap", "--fit", "--steps",
              "--seed", "--time-limit", "--workload", "--model", "--previous", "--output", "--pareto"],
    "solve": ["--workload", "--memory", "--seed", "--time-limit", "--strategy", "--dtype", "--output", "--model",
              "--placement"],
    "run": ["--tolerance", "--repetitions", "--timeout", "--port", "--output", "--picture", "--trace", "--placement",
            "--model", "--workload", "--cluster"],
    "profile": ["--ranks", "--budget", "--port", "--dtype", "--device", "--output", "--workload"],
}  # fmt: skip


def hostile_option(rng: random.Random) -> Case:
    """A command on valid files with a hostile value of one option."""
    command = rng.choice(list(OPTIONS))
    option = rng.choice(OPTIONS[command])
    value = str(rng.choice([*VALUES, "/dev/full", "/proc/x", ".", "trace.npz/x", "0:0", "1:0", "decode:9999999"]))
    value = value.replace("\x00", "0")  # no argument holds a null character
    base = {
        "place": ["place", "--trace", "trace.npz", "--steps", "50", "--time-limit", "2"],
        "solve": ["solve", "-m", "config.json", "--time-limit", "2"],
        "run": ["run", "plan.json"],
        "profile": ["profile", "-m", "config.json"],
    }[command]
    return Case(f"{command} {option} {value[:40]!r}", [*base, f"{option}={value}"])


def draw(seed: int, seeds: Path, folder: Path) -> Case:
    """The case of a number: fills the empty ``folder`` with copies of the seeds, one or two of them hostile."""
    rng = random.Random(seed)
    shutil.copytree(seeds, folder, dirs_exist_ok=True)
    if rng.random() < 0.1:
        return hostile_option(rng)
    commands = readers(seeds)
    rare = [file for file in commands if not file.startswith("published-")]
    file = rng.choice(rare if rng.random() < 0.9 else list(commands))
    mutate(rng, folder / file)
    if rng.random() < 0.2 and (folder / file).is_file() and not (folder / file).is_symlink():
        with contextlib.suppress(Exception):  # it may be no longer what a mutation can take apart
            mutate(rng, folder / file)
    return Case(f"{seed}: {file}", rng.choice(commands[file]))
