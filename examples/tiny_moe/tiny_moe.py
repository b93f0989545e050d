"""A small mixture-of-experts language model over bytes, in plain PyTorch, with Mixtral's mathematics.

Shapes: T tokens, D hidden size, E experts, K top-k, H expert FFN columns, L layers.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from moeplan.spec import Model
from moeplan.spec.document import write_atomically
from moeplan.spec.model import Attention, Moe

INITIAL_STD = 0.06


class Layer(nn.Module):
    """Norm, causal grouped-query attention with rotary positions, norm, top-k of E gated experts; no biases."""

    def __init__(self, hidden: int, attention: Attention, moe: Moe, eps: float) -> None:
        super().__init__()
        self.attention, self.moe, self.eps = attention, moe, eps
        q_size, kv_size = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        self.input_norm, self.post_norm = (nn.Parameter(torch.ones(hidden)) for _ in range(2))
        self.q, self.k, self.v = _matrix(q_size, hidden), _matrix(kv_size, hidden), _matrix(kv_size, hidden)
        self.o = _matrix(hidden, q_size)
        self.router = _matrix(moe.num_experts, hidden)
        self.gate_up = _matrix(moe.num_experts, 2 * moe.ffn_size, hidden)  # [E, 2H, D]: H rows of gate, H of up
        self.down = _matrix(moe.num_experts, hidden, moe.ffn_size)  # [E, D, H]

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [sequences, length, D] -> output, expert ids [T, K], gate weights [T, K], load-balancing loss (scalar)."""
        x = x + self._attend(F.rms_norm(x, x.shape[-1:], self.input_norm, self.eps), rope)
        tokens = F.rms_norm(x, x.shape[-1:], self.post_norm, self.eps).flatten(0, 1)
        probabilities = (tokens @ self.router.T).softmax(-1)
        weights, ids = probabilities.topk(self.moe.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        # Switch Transformer, equation 4: E * sum_e (share of the choices) * (mean probability); 1 when even.
        load = torch.bincount(ids.flatten(), minlength=self.moe.num_experts) / ids.numel()
        balance = self.moe.num_experts * (load * probabilities.mean(0)).sum()
        return x + self._experts(tokens, ids, weights).view_as(x), ids, weights, balance

    def _attend(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (
            (x @ projection.T).unflatten(-1, (-1, self.attention.head_dim)).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(_rotate(q, rope), _rotate(k, rope), v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2) @ self.o.T

    def _experts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Dropless: (token, choice) pairs sorted by expert, one dense FFN per contiguous segment."""
        order = ids.flatten().argsort(stable=True)
        token = order // self.moe.top_k
        counts = torch.bincount(ids.flatten(), minlength=self.moe.num_experts).tolist()
        outputs = []
        for rows, gate_up, down in zip(
            x.index_select(0, token).split(counts), self.gate_up.unbind(), self.down.unbind(), strict=True
        ):
            gate, up = (rows @ gate_up.T).chunk(2, -1)
            outputs.append((F.silu(gate) * up) @ down.T)
        return torch.zeros_like(x).index_add(0, token, torch.cat(outputs) * weights.flatten()[order, None])


class TinyMoe(nn.Module):
    """The catalogue's ``tiny-moe`` (or another model of equal Mixtral-like layers)."""

    def __init__(self, model: Model, seed: int) -> None:
        super().__init__()
        self.model = model
        torch.manual_seed(seed)
        hidden = model.layers[0].hidden_size
        self.embed, self.head = _matrix(model.vocab_size, hidden), _matrix(model.vocab_size, hidden)
        self.norm = nn.Parameter(torch.ones(hidden))
        layers = []
        for block in model.layers:
            assert block.attention
            assert block.moe
            layers.append(Layer(hidden, block.attention, block.moe, model.norm_eps))
        self.layers = nn.ModuleList(layers)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids [sequences, length] -> logits, expert ids [T, L, K], gate weights [T, L, K], load-balancing loss."""
        rope = self._rope(ids.shape[1])
        x, chosen, weights, balance = F.embedding(ids, self.embed), [], [], []
        for layer in self.layers:
            x, *routing = layer(x, rope)
            for collected, value in zip((chosen, weights, balance), routing, strict=True):
                collected.append(value)
        x = F.rms_norm(x, x.shape[-1:], self.norm, self.model.norm_eps)
        return x @ self.head.T, torch.stack(chosen, 1), torch.stack(weights, 1), torch.stack(balance).mean()

    def _rope(self, length: int) -> tuple[Tensor, Tensor]:
        attention, theta = self.model.layers[0].attention, self.model.rope_theta
        assert attention
        assert theta
        frequency = theta ** (-torch.arange(0, attention.head_dim, 2) / attention.head_dim)
        angle = torch.outer(torch.arange(length), frequency).repeat(1, 2)
        return angle.cos(), angle.sin()


def _matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * INITIAL_STD)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * rope[0] + torch.cat((-second, first), -1) * rope[1]


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
