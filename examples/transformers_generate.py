"""Text from a Transformers model whose experts are divided over ranks by a plan, beside the whole model's.

python examples/transformers_generate.py
    a small Qwen3-MoE with random weights: measured and solved for on this machine, then run on two ranks of it
torchrun --nproc-per-node 2 examples/transformers_generate.py --model FOLDER --plan plan.json --prompt "Once" "There"
    a model of yours; every rank takes its share of the prompts
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moeplan import MoeplanError, profile, solve
from moeplan.transformers import apply_plan

PROMPTS = ["Mixture", "of experts", "on unequal", "hardware"]
RANKS = 2


def main() -> None:
    """Prints each rank's texts; ends with 1 where they differ from the whole model's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model")
    parser.add_argument("--plan", type=Path, help="plan for as many devices as there are ranks")
    parser.add_argument("--prompt", nargs="+", default=PROMPTS, help="at least one for each rank")
    parser.add_argument("--tokens", type=int, default=12, help="new ones of each prompt")
    options = parser.parse_args()
    if options.model and options.plan and "RANK" in os.environ:
        sys.exit(on_rank(options.model, options.plan, options.prompt, options.tokens))
    if options.model or options.plan:
        parser.error("give --model and --plan, and start it by torchrun")
    with tempfile.TemporaryDirectory() as folder:
        plan = make(Path(folder))
        ranks = ["-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
        ranks += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
        script = [str(Path(__file__).resolve()), "--model", folder, "--plan", str(plan)]
        sys.exit(subprocess.run([sys.executable, *ranks, *script], check=False).returncode)


def make(folder: Path) -> Path:
    """A random model in ``folder``, and a plan for it."""
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts=16, num_experts_per_tok=4, moe_intermediate_size=96, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    cluster = profile(str(folder / "config.json"), ranks=RANKS, dtype="f32", budget_seconds=15, accept_noise=True)
    plan = solve(str(folder / "config.json"), cluster, "prefill:64@8", time_limit=10)
    print(f"{plan.layers[0].strategy}: predicted {plan.predicted.step_seconds * 1e3:.2f} ms for 64 tokens", flush=True)
    return plan.write(folder / "plan.json")


def on_rank(folder: Path, plan: Path, prompts: list[str], tokens: int) -> int:
    """This rank's share of the prompts, one after the other; 1 where a text is not the whole model's."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if len(prompts) % ranks:
        raise SystemExit(f"{len(prompts)} prompts for {ranks} ranks: give every rank as many")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    has_tokenizer = (folder / "tokenizer.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None

    def texts() -> list[str]:
        found = []
        for prompt in prompts[rank::ranks]:
            ids = (
                tokenizer(prompt, return_tensors="pt").input_ids if tokenizer else torch.tensor([list(prompt.encode())])
            )
            # Ranks whose text has ended go on until all have: every rank waits for the others' experts.
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, synced_gpus=True
            )[0]
            found.append(tokenizer.decode(out) if tokenizer else bytes(out.tolist()).decode("latin-1"))
        return found

    whole = texts()
    apply_plan(model, plan)
    divided = texts()
    for text, wanted in zip(divided, whole, strict=True):
        print(f"rank {rank}: {text!r} {'as' if text == wanted else 'NOT as'} the whole model", flush=True)
    dist.destroy_process_group()
    return int(divided != whole)


if __name__ == "__main__":
    try:
        main()
    except MoeplanError as error:
        sys.exit(str(error))
