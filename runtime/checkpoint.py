"""Real weights: a Hugging Face folder with safetensors of Mixtral, Qwen2-MoE, Qwen3-MoE or OLMoE.

Only the slices that a device needs are read. Both namings of experts are known: one tensor per expert and projection
(what Transformers writes and the hub holds) and the fused one of Transformers' modules
(``mlp.experts.gate_up_proj`` [E, 2 H, D], ``mlp.experts.down_proj`` [E, D, H]).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..spec import Model, MoeplanError
from ..spec.errors import DocumentError
from ..spec.files import open_regular, read_text
from ..spec.texts import parse_object
from .weights import AttentionWeights, DenseWeights, LayerWeights, Range, RouterWeights, check_supported, kv_range


class _Names(NamedTuple):
    """Names inside ``model.layers.{i}.`` that differ between families."""

    moe: str
    gate: str
    up: str
    down: str


_FAMILIES = {
    "mixtral": _Names("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": _Names("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": _Names("mlp", "gate_proj", "up_proj", "down_proj"),
    "olmoe": _Names("mlp", "gate_proj", "up_proj", "down_proj"),
}
_FUSED = "mlp.experts"


class Checkpoint:
    """A WeightSource that reads a folder with ``model.safetensors`` or its shards and index.

    Raises MoeplanError for a model family without a name table, DocumentError for files that are missing, unreadable or
    hold a tensor of another shape than the model says.
    """

    def __init__(
        self, model: Model, folder: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        check_supported(model)
        if model.family not in _FAMILIES:
            known = ", ".join(_FAMILIES)
            raise MoeplanError(f"{folder}: weights of family {model.family!r} cannot be read (known: {known})")
        self.model, self.folder, self.dtype, self.device = model, Path(folder), dtype, torch.device(device)
        self._names = _FAMILIES[model.family]
        self._files: dict[str, Any] = {}
        self._where = _tensor_files(self.folder)

    def _slice(self, name: str, shape: Sequence[int]) -> Any:
        """A lazily read tensor, its shape checked."""
        file = self._where.get(name)
        if file is None:
            raise DocumentError(f"{self.folder}: tensor {name} is missing")
        try:
            if file not in self._files:
                _check_regular(self.folder / file)
                self._files[file] = safe_open(self.folder / file, framework="pt")
            found = self._files[file].get_slice(name)
        except (OSError, SafetensorError) as error:
            raise DocumentError(f"{self.folder / file}: not a readable safetensors file ({error})") from None
        if list(found.get_shape()) != list(shape):
            raise DocumentError(f"{self.folder}: {name}: expected shape {list(shape)}, got {list(found.get_shape())}")
        return found

    def _read(self, name: str, *shape: int, rows: Range | None = None, columns: Range | None = None) -> Tensor:
        """A tensor, or its rows (first dimension) or columns (second)."""
        found = self._slice(name, shape)
        if columns is not None:
            tensor = found[:, columns[0] : columns[1]]
        else:
            first, last = rows or (0, shape[0])
            tensor = found[first:last]
        return tensor.to(device=self.device, dtype=self.dtype)

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
            gate = gate if gate in self._where else f"{prefix}mlp.gate.weight"
            router = RouterWeights(eps, norm, self._read(gate, moe.num_experts, hidden), None, None)
            chosen = range(moe.num_experts) if experts is None else experts
            gate_up, down = self._experts(prefix, index, chosen, columns or (0, moe.ffn_size))
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

    def _experts(self, prefix: str, index: int, experts: Sequence[int], columns: Range) -> tuple[Tensor, Tensor]:
        """gate_up [E, 2, H, D] and down [E, D, H] of these experts and columns."""
        block, names = self.model.layers[index], self._names
        moe, hidden = block.moe, block.hidden_size
        assert moe is not None
        first, last = columns
        full = moe.ffn_size
        gate_up = torch.empty((len(experts), 2, last - first, hidden), dtype=self.dtype, device=self.device)
        down = torch.empty((len(experts), hidden, last - first), dtype=self.dtype, device=self.device)
        if last == first or not experts:
            return gate_up, down
        if f"{prefix}{_FUSED}.gate_up_proj" in self._where:
            both = self._slice(f"{prefix}{_FUSED}.gate_up_proj", (moe.num_experts, 2 * full, hidden))
            back = self._slice(f"{prefix}{_FUSED}.down_proj", (moe.num_experts, hidden, full))
            for local, e in enumerate(experts):
                gate_up[local, 0] = both[e, first:last]
                gate_up[local, 1] = both[e, full + first : full + last]
                down[local] = back[e, :, first:last]
            return gate_up, down
        for local, e in enumerate(experts):
            expert = f"{prefix}{names.moe}.experts.{e}."
            gate_up[local, 0] = self._read(f"{expert}{names.gate}.weight", full, hidden, rows=columns)
            gate_up[local, 1] = self._read(f"{expert}{names.up}.weight", full, hidden, rows=columns)
            down[local] = self._read(f"{expert}{names.down}.weight", hidden, full, columns=columns)
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


def _check_regular(path: Path) -> None:
    """safetensors would wait for a FIFO's writer, and map a device. Raises DocumentError."""
    open_regular(path, 2**63 - 1, ", not a readable safetensors file").close()


def _tensor_files(folder: Path) -> dict[str, str]:
    """File name of every tensor. Names in an index must be plain file names: nothing outside the folder is opened."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if index.exists():
            where = parse_object(read_text(index), str(index))["weight_map"]
            for file in set(where.values()):
                if Path(file).name != file or not file.endswith(".safetensors"):
                    raise DocumentError(f"{index}: weight_map: {file!r} is not the name of a safetensors file")
            return dict(where)
        if single.exists():
            _check_regular(single)
            with safe_open(single, framework="pt") as f:
                return dict.fromkeys(f.keys(), single.name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise DocumentError(f"{folder}: weights are not readable ({type(error).__name__}: {error})") from None
    raise DocumentError(f"{folder}: holds neither {index.name} nor {single.name}")
