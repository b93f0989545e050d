"""Real weights: a Hugging Face folder with safetensors of Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE or ScMoE.

Only the slices that a device needs are read, and quantised ones become numbers (``dequantise``).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..spec import Model, MoeplanError
from .dequantise import open_reader
from .experts import FAMILIES, read_experts
from .tensors import TensorFolder
from .weights import AttentionWeights, DenseWeights, LayerWeights, Range, RouterWeights, check_supported, kv_range


class Checkpoint:
    """A WeightSource that reads a folder with ``model.safetensors`` or its shards and index.

    ``through``: values are rounded to this dtype before they become ``dtype``. On device "meta" everything is checked
    but the data, which is not read.
    Raises MoeplanError for a model family without a name table and for a quantisation scheme that cannot be read,
    DocumentError for files that are missing, unreadable or hold a tensor of another shape than the model says, or
    quantised values without what explains them.
    """

    def __init__(
        self,
        model: Model,
        folder: str | Path,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        through: torch.dtype | None = None,
    ) -> None:
        check_supported(model)
        if model.family not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise MoeplanError(f"{folder}: weights of family {model.family!r} cannot be read (known: {known})")
        self.model, self.folder, self.dtype, self.device = model, Path(folder), dtype, torch.device(device)
        self.through = through
        self._names = FAMILIES[model.family]
        self.reader = open_reader(TensorFolder(self.folder))
        self.reader.dry = self.device.type == "meta"

    def check(self) -> None:
        """Raise for anything that a later read of this model would be refused for, but for the data itself."""
        dry = Checkpoint(self.model, self.folder, self.dtype, "meta")
        for i in range(len(self.model.layers)):
            dry.layer(i)
        dry.final_norm()
        if self.model.vocab_size:
            dry.embedding()
            dry.head()

    def _read(self, name: str, *shape: int, rows: Range | None = None, columns: Range | None = None) -> Tensor:
        """A tensor, or its rows (first dimension) or columns (second)."""
        region = [rows or (0, shape[0]), *((0, n) for n in shape[1:])]
        if columns is not None:
            region[1] = columns
        return self._convert(self.reader.read(name, shape, region))

    def _convert(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.through or self.dtype).to(device=self.device, dtype=self.dtype)

    def layer(
        self,
        index: int,
        *,
        experts: Sequence[int] | None = None,
        columns: Range | None = None,
        heads: Range | None = None,
    ) -> LayerWeights:
        block, eps = self.model.layers[index], self.model.norm_eps
        hidden, prefix = block.hidden_size, f"model.layers.{index}."
        router = gate_up = down = shared = dense = None
        norm = self._read(f"{prefix}post_attention_layernorm.weight", hidden)
        if block.moe is not None:
            moe = block.moe
            gate = f"{prefix}{self._names.moe}.gate.weight"
            gate = gate if gate in self.reader else f"{prefix}mlp.gate.weight"
            router = RouterWeights(eps, norm, self._read(gate, moe.router_outputs, hidden), None, None)
            chosen = range(moe.num_experts) if experts is None else experts
            gate_up, down = self.experts(index, chosen, columns or (0, moe.ffn_size))
            if moe.shared_ffn_size:
                shared = self._ffn(f"{prefix}mlp.shared_expert.", hidden, moe.shared_ffn_size, moe.activation)
            if shared is not None and moe.shared_gate:
                shared = replace(shared, gate=self._read(f"{prefix}mlp.shared_expert_gate.weight", 1, hidden))
        elif block.dense is not None:
            ffn = block.dense
            dense = replace(self._ffn(f"{prefix}mlp.", hidden, ffn.ffn_size, ffn.activation), norm=norm)
        return LayerWeights(self._attention(index, heads), router, gate_up, down, shared, dense)

    def _ffn(self, prefix: str, hidden: int, width: int, activation: str) -> DenseWeights:
        """A dense FFN, without norm and gate."""
        pair = [self._read(f"{prefix}{name}.weight", width, hidden) for name in ("gate_proj", "up_proj")]
        down = self._read(f"{prefix}down_proj.weight", hidden, width)
        return DenseWeights(activation, self.model.norm_eps, None, torch.stack(pair), down, None)

    def experts(self, index: int, experts: Sequence[int], columns: Range) -> tuple[Tensor, Tensor]:
        """gate_up [E, 2, H, D] and down [E, D, H] of these experts and columns."""
        block, width, prefix = self.model.layers[index], columns[1] - columns[0], f"model.layers.{index}."
        gate_up = torch.empty((len(experts), 2, width, block.hidden_size), dtype=self.dtype, device=self.device)
        down = torch.empty((len(experts), block.hidden_size, width), dtype=self.dtype, device=self.device)
        if width:
            for local, parts in enumerate(read_experts(self.reader, prefix, self._names, block, experts, columns)):
                gate_up[local, 0], gate_up[local, 1], down[local] = (self._convert(part) for part in parts)
        return gate_up, down

    def _attention(self, index: int, heads: Range | None) -> AttentionWeights | None:
        block, prefix = self.model.layers[index], f"model.layers.{index}.self_attn."
        a, hidden = block.attention, block.hidden_size
        if a is None:
            return None
        heads = heads or (0, a.heads)
        kv = kv_range(a, heads)
        held = {"q": heads, "k": kv, "v": kv}
        rows = {n: (first * a.head_dim, last * a.head_dim) for n, (first, last) in held.items()}
        size = {"q": a.heads * a.head_dim, "k": a.kv_heads * a.head_dim, "v": a.kv_heads * a.head_dim}

        def norm(n: str) -> Tensor | None:
            if a.qk_norm == "none":
                return None
            name = f"{prefix}{n}_norm.weight"
            return self._read(name, size[n], rows=rows[n]) if a.qk_norm == "full" else self._read(name, a.head_dim)

        biases = [self._read(f"{prefix}{n}_proj.bias", size[n], rows=rows[n]) for n in rows] if a.bias else []
        return AttentionWeights(
            spec=a,
            eps=self.model.norm_eps,
            heads=heads,
            norm=self._read(f"model.layers.{index}.input_layernorm.weight", hidden),
            qkv=torch.cat([self._read(f"{prefix}{n}_proj.weight", size[n], hidden, rows=rows[n]) for n in rows]),
            qkv_bias=torch.cat(biases) if biases else None,
            q_norm=norm("q"),
            k_norm=norm("k"),
            out=self._read(f"{prefix}o_proj.weight", hidden, size["q"], columns=rows["q"]).contiguous(),
            out_bias=self._read(f"{prefix}o_proj.bias", hidden) if a.bias and a.output_bias and heads[0] == 0 else None,
        )

    def embedding(self) -> Tensor:
        return self._read("model.embed_tokens.weight", self.model.vocab_size, self.model.layers[0].hidden_size)

    def head(self) -> Tensor:
        if self.model.tie_embeddings:
            return self.embedding()
        return self._read("lm_head.weight", self.model.vocab_size, self.model.layers[-1].hidden_size)

    def final_norm(self) -> Tensor:
        return self._read("model.norm.weight", self.model.layers[-1].hidden_size)
