"""A small mixture-of-experts language model over bytes, in plain PyTorch, with Mixtral's mathematics.

Shapes: T tokens, D hidden size, E experts, K top-k, H expert FFN columns, L layers.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from moeplan.examples.common.layers import Rope, attend, choose, experts, matrix, rope_tables
from moeplan.spec import Model
from moeplan.spec.document import write_atomically
from moeplan.spec.model import Attention, Moe


class Layer(nn.Module):
    """Norm, causal grouped-query attention with rotary positions, norm, top-k of E gated experts; no biases."""

    def __init__(self, hidden: int, attention: Attention, moe: Moe, eps: float) -> None:
        super().__init__()
        self.attention, self.moe, self.eps = attention, moe, eps
        q_size, kv_size = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        self.input_norm, self.post_norm = (nn.Parameter(torch.ones(hidden)) for _ in range(2))
        self.q, self.k, self.v = matrix(q_size, hidden), matrix(kv_size, hidden), matrix(kv_size, hidden)
        self.o = matrix(hidden, q_size)
        self.router = matrix(moe.num_experts, hidden)
        self.gate_up = matrix(moe.num_experts, 2 * moe.ffn_size, hidden)  # [E, 2H, D]: H rows of gate, H of up
        self.down = matrix(moe.num_experts, hidden, moe.ffn_size)  # [E, D, H]

    def forward(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [sequences, length, D] -> output, expert ids [T, K], gate weights [T, K], load-balancing loss (scalar)."""
        normed = F.rms_norm(x, x.shape[-1:], self.input_norm, self.eps)
        x = x + attend(normed, (self.q, self.k, self.v, self.o), self.attention.head_dim, rope)
        tokens = F.rms_norm(x, x.shape[-1:], self.post_norm, self.eps).flatten(0, 1)
        ids, weights, balance = choose(tokens, self.router, self.moe.top_k)
        return x + experts(tokens, ids, weights, self.gate_up, self.down).view_as(x), ids, weights, balance


class TinyMoe(nn.Module):
    """The catalogue's ``tiny-moe`` (or another model of equal Mixtral-like layers)."""

    def __init__(self, model: Model, seed: int) -> None:
        super().__init__()
        self.model = model
        torch.manual_seed(seed)
        hidden = model.layers[0].hidden_size
        self.embed, self.head = matrix(model.vocab_size, hidden), matrix(model.vocab_size, hidden)
        self.norm = nn.Parameter(torch.ones(hidden))
        layers = []
        for block in model.layers:
            assert block.attention
            assert block.moe
            layers.append(Layer(hidden, block.attention, block.moe, model.norm_eps))
        self.layers = nn.ModuleList(layers)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids [sequences, length] -> logits, expert ids [T, L, K], gate weights [T, L, K], load-balancing loss."""
        attention, theta = self.model.layers[0].attention, self.model.rope_theta
        assert attention
        assert theta
        rope = rope_tables(ids.shape[1], attention.head_dim, theta)
        x, chosen, weights, balance = F.embedding(ids, self.embed), [], [], []
        for layer in self.layers:
            x, *routing = layer(x, rope)
            for collected, value in zip((chosen, weights, balance), routing, strict=True):
                collected.append(value)
        x = F.rms_norm(x, x.shape[-1:], self.norm, self.model.norm_eps)
        return x @ self.head.T, torch.stack(chosen, 1), torch.stack(weights, 1), torch.stack(balance).mean()


def save(net: TinyMoe, folder: Path, max_length: int) -> None:
    """Write the Hugging Face Mixtral folder: config.json and model.safetensors, with the published tensor names."""
    folder.mkdir(parents=True, exist_ok=True)
    block, model = net.model.layers[0], net.model
    assert block.attention
    assert block.moe
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": model.vocab_size,
        "hidden_size": block.hidden_size,
        "intermediate_size": block.moe.ffn_size,
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": block.attention.heads,
        "num_key_value_heads": block.attention.kv_heads,
        "head_dim": block.attention.head_dim,
        "num_local_experts": block.moe.num_experts,
        "num_experts_per_tok": block.moe.top_k,
        "hidden_act": block.moe.activation,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "max_position_embeddings": max_length,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
    }
    text = json.dumps(config, indent=2).encode() + b"\n"
    write_atomically(folder / "config.json", lambda f: f.write(text))
    tensors = {"model.embed_tokens.weight": net.embed, "model.norm.weight": net.norm, "lm_head.weight": net.head}
    for i, layer in enumerate(net.layers):
        prefix = f"model.layers.{i}"
        tensors[f"{prefix}.input_layernorm.weight"] = layer.input_norm
        tensors[f"{prefix}.post_attention_layernorm.weight"] = layer.post_norm
        for name in "qkvo":
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = getattr(layer, name)
        tensors[f"{prefix}.block_sparse_moe.gate.weight"] = layer.router
        for e, (gate_up, down) in enumerate(zip(layer.gate_up, layer.down, strict=True)):
            gate, up = gate_up.chunk(2)
            for name, tensor in {"w1": gate, "w2": down, "w3": up}.items():
                tensors[f"{prefix}.block_sparse_moe.experts.{e}.{name}.weight"] = tensor
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
