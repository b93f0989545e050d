"""A byte-level language model of pairs of blocks, the second with experts, in plain PyTorch; two ways to wire it.

The first block of a pair is attention and a dense FFN, the second attention, a gated shared expert and routed experts.
``standard``: the routed experts read the state after their own block's attention, as the shared expert does.
``shortcut`` (ScMoE's Pos-2, moeplan's ``mid``): they read the state after the first block's attention. Their output is
added at the second block's end either way, and both forms have the same parameters of the same names and shapes.

Shapes: T tokens, D hidden size, E experts, K top-k, H FFN columns, L layers with experts.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from moeplan.examples.common.layers import Rope, attend, choose, experts, gated_ffn, matrix, rope_tables
from moeplan.spec import Model
from moeplan.spec.document import write_atomically
from moeplan.spec.model import Block

FORMS = ("standard", "shortcut")
HERE = Path(__file__).parent


def form_model(form: str) -> Model:
    """The document of a form, beside this file."""
    return Model.read(HERE / f"{form}.json")


class BlockNet(nn.Module):
    """One block's weights and operators; who reads what is ``ShortcutMoe.forward``'s."""

    def __init__(self, block: Block, eps: float) -> None:
        super().__init__()
        hidden, attention = block.hidden_size, block.attention
        assert attention
        self.head_dim, self.eps = attention.head_dim, eps
        q_size, kv_size = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        self.input_norm, self.post_norm = (nn.Parameter(torch.ones(hidden)) for _ in range(2))
        self.q, self.k, self.v = matrix(q_size, hidden), matrix(kv_size, hidden), matrix(kv_size, hidden)
        self.o = matrix(hidden, q_size)
        self.moe = block.moe
        if block.moe is None:
            assert block.dense
            self.gate_up, self.down = _ffn(hidden, block.dense.ffn_size)
            return
        self.gate_up, self.down = _ffn(hidden, block.moe.shared_ffn_size)
        self.shared_gate = matrix(1, hidden)
        self.router = matrix(block.moe.num_experts, hidden)
        self.expert_gate_up = matrix(block.moe.num_experts, 2 * block.moe.ffn_size, hidden)  # [E, 2H, D]
        self.expert_down = matrix(block.moe.num_experts, hidden, block.moe.ffn_size)  # [E, D, H]

    def attend(self, x: Tensor, rope: Rope) -> Tensor:
        """x [sequences, length, D] -> the same, to be added to it."""
        normed = F.rms_norm(x, x.shape[-1:], self.input_norm, self.eps)
        return attend(normed, (self.q, self.k, self.v, self.o), self.head_dim, rope)

    def every_token(self, x: Tensor) -> Tensor:
        """The dense FFN, or the shared expert weighed by its gate."""
        normed = self._normed(x)
        y = gated_ffn(normed, self.gate_up, self.down)
        return y if self.moe is None else (normed @ self.shared_gate.T).sigmoid() * y

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The routed experts' output, expert ids [T, K], gate weights [T, K], load-balancing loss (scalar)."""
        assert self.moe
        tokens = self._normed(x).flatten(0, 1)
        ids, weights, balance = choose(tokens, self.router, self.moe.top_k)
        y = experts(tokens, ids, weights, self.expert_gate_up, self.expert_down)
        return y.view_as(x), ids, weights, balance

    def _normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.post_norm, self.eps)


class ShortcutMoe(nn.Module):
    """The model of a form's document; the same seed gives both forms the same initial values."""

    def __init__(self, model: Model, seed: int) -> None:
        super().__init__()
        self.model = model
        torch.manual_seed(seed)
        hidden = model.layers[0].hidden_size
        self.embed, self.head = matrix(model.vocab_size, hidden), matrix(model.vocab_size, hidden)
        self.norm = nn.Parameter(torch.ones(hidden))
        self.layers = nn.ModuleList(BlockNet(block, model.norm_eps) for block in model.layers)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids [sequences, length] -> logits, expert ids [T, L, K], gate weights [T, L, K], load-balancing loss."""
        theta = self.model.rope_theta
        assert theta
        rope = rope_tables(ids.shape[1], self.layers[0].head_dim, theta)
        x = middle = F.embedding(ids, self.embed)
        found = []
        for block, layer in zip(self.model.layers, self.layers, strict=True):
            before = middle  # the preceding block's state after its attention
            middle = x + layer.attend(x, rope)
            x = middle + layer.every_token(middle)
            if block.moe is not None:
                y, *routing = layer.routed({"none": middle, "mid": before}[block.shortcut])
                x = x + y
                found.append(routing)
        x = F.rms_norm(x, x.shape[-1:], self.norm, self.model.norm_eps)
        chosen, weights, balance = zip(*found, strict=True)
        return x @ self.head.T, torch.stack(chosen, 1), torch.stack(weights, 1), torch.stack(balance).mean()


def _ffn(hidden: int, size: int) -> tuple[nn.Parameter, nn.Parameter]:
    """gate_up [2H, D] and down [D, H]."""
    return matrix(2 * size, hidden), matrix(hidden, size)


def save(net: ShortcutMoe, folder: Path, max_length: int) -> None:
    """Write model.json and model.safetensors, with Qwen2-MoE's tensor names; the standard form, which is a Qwen2-MoE,
    also its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    net.model.write(folder / "model.json")
    if net.model.family == "qwen2_moe":
        text = json.dumps(_config(net.model, max_length), indent=2).encode() + b"\n"
        write_atomically(folder / "config.json", lambda f: f.write(text))
    tensors = {"model.embed_tokens.weight": net.embed, "model.norm.weight": net.norm, "lm_head.weight": net.head}
    for i, layer in enumerate(net.layers):
        tensors |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in _named(layer).items()}
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def _named(layer: BlockNet) -> dict[str, Tensor]:
    """A layer's tensors by Qwen2-MoE's names."""
    named: dict[str, Tensor] = {"input_layernorm": layer.input_norm, "post_attention_layernorm": layer.post_norm}
    named |= {f"self_attn.{name}_proj": getattr(layer, name) for name in "qkvo"}
    ffns = {"mlp" if layer.moe is None else "mlp.shared_expert": (layer.gate_up, layer.down)}
    if layer.moe is not None:
        named |= {"mlp.gate": layer.router, "mlp.shared_expert_gate": layer.shared_gate}
        pairs = zip(layer.expert_gate_up, layer.expert_down, strict=True)
        ffns |= {f"mlp.experts.{e}": pair for e, pair in enumerate(pairs)}
    for prefix, (gate_up, down) in ffns.items():
        gate, up = gate_up.chunk(2)
        named |= {f"{prefix}.gate_proj": gate, f"{prefix}.up_proj": up, f"{prefix}.down_proj": down}
    return named


def _config(model: Model, max_length: int) -> dict[str, object]:
    dense, block = model.layers[0].dense, model.layers[1]
    assert dense
    assert block.attention
    assert block.moe
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "vocab_size": model.vocab_size,
        "hidden_size": block.hidden_size,
        "intermediate_size": dense.ffn_size,
        "moe_intermediate_size": block.moe.ffn_size,
        "shared_expert_intermediate_size": block.moe.shared_ffn_size,
        "num_hidden_layers": len(model.layers),
        "decoder_sparse_step": 2,
        "num_attention_heads": block.attention.heads,
        "num_key_value_heads": block.attention.kv_heads,
        "qkv_bias": block.attention.bias,
        "num_experts": block.moe.num_experts,
        "num_experts_per_tok": block.moe.top_k,
        "norm_topk_prob": block.moe.gate.normalize,
        "hidden_act": block.moe.activation,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "max_position_embeddings": max_length,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
    }
