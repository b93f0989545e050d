"""Model: what a mixture-of-experts transformer is made of, block by block.

A model is a sequence of runs of identical transformer blocks, so first-dense models (DeepSeek), every-other-layer
models (Switch), staged vision models (Swin-MoE) and shortcut models (LongCat, ScMoE) need no special case.

``dtype`` is what the model computes in. A part whose weights are stored in another format (fp8, mxfp4, ...) has a
``storage``. ``parameters`` count values; times the dtype's bytes they are what moeplan's runtime holds, which computes
in the dtype and dequantises on loading. ``..._bytes`` are as stored, scales included: what serving engines hold.
"""

from functools import cached_property
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from .counted import Counted
from .document import Document, Part
from .family import FamilyConfig
from .gate import Gate as Gate  # a part of Moe, and known by this address
from .storage import Extent, Shape, Storage, stored_bytes

DType = Literal["f32", "bf16", "f16"]
DTYPE_BYTES: dict[str, int] = {"f32": 4, "bf16": 2, "f16": 2}
Activation = Literal["silu", "gelu", "relu", "swiglu_clamped", "own"]  # own: only Transformers computes it
MAX_LAYERS = 512
"""Of a model, placement or trace: four times the deepest published one; each takes time and memory everywhere."""
MAX_EXPERTS = 65536
Size = Extent


class Attention(Part):
    """Self-attention of one block. ``gqa`` covers multi-head and multi-query attention too."""

    kind: Literal["gqa", "mla", "window"] = "gqa"
    heads: Size
    kv_heads: Size
    head_dim: Size
    bias: bool = False
    output_bias: bool = Field(True, description="where there is a bias, the output projection has one too (not Qwen2)")
    qk_norm: Literal["none", "head", "full"] = Field(
        "none", description="RMS norm of queries and keys: per head (Qwen3) or over all heads (OLMoE)"
    )
    sliding_window: Size | None = Field(None, description="tokens that one token attends to; kind window: its window")
    sinks: bool = Field(False, description="learned attention sinks, one per head (gpt-oss)")
    clip_qkv: float | None = Field(None, gt=0)
    q_lora_rank: Size | None = Field(None, description="mla: rank of the query compression")
    kv_lora_rank: Size | None = Field(None, description="mla: rank of the key-value compression")
    rope_head_dim: Size | None = Field(None, description="mla: rotary part of each head")
    v_head_dim: Size | None = Field(None, description="mla: value size of each head")
    cross: bool = Field(False, description="cross-attention of the same shape follows (decoder of an encoder-decoder)")
    position_buckets: int = Field(
        0,
        ge=0,
        lt=2**31,
        description="learned biases per head for so many relative positions (T5: a stack's first layer)",
    )
    rope_theta: float | None = Field(None, gt=0, description="base of the rotary embedding, if not the model's")
    storage: Storage | None = Field(None, description="how its matrices are stored, if not in the model's dtype")

    @model_validator(mode="after")
    def _consistent(self) -> "Attention":
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.kind == "mla" and None in (self.kv_lora_rank, self.rope_head_dim, self.v_head_dim):
            raise ValueError("mla needs kv_lora_rank, rope_head_dim and v_head_dim")
        return self

    def matrices(self, hidden: int) -> dict[str, Shape]:
        """[outputs, inputs] of the projections."""
        if self.kind == "mla":
            assert self.kv_lora_rank is not None  # _consistent has seen them all
            assert self.rope_head_dim is not None
            assert self.v_head_dim is not None
            q_size = self.heads * (self.head_dim + self.rope_head_dim)
            rank = self.q_lora_rank
            q = {"q_a": (rank, hidden), "q_b": (q_size, rank)} if rank else {"q": (q_size, hidden)}
            return q | {
                "kv_a": (self.kv_lora_rank + self.rope_head_dim, hidden),
                "kv_b": (self.heads * (self.head_dim + self.v_head_dim), self.kv_lora_rank),
                "o": (hidden, self.heads * self.v_head_dim),
            }
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        own = {"q": (q_size, hidden), "k": (kv_size, hidden), "v": (kv_size, hidden), "o": (hidden, q_size)}
        return own | ({f"cross_{name}": shape for name, shape in own.items()} if self.cross else {})

    def parameters(self, hidden: int) -> int:
        """Weights (and biases) of the projections, norms, sinks and relative positions."""
        return _size(self.matrices(hidden)) + self._vectors(hidden)

    def stored_bytes(self, hidden: int, element_bytes: int) -> int:
        """Bytes of all of it as stored."""
        matrices = stored_bytes(self.matrices(hidden), self.storage, element_bytes)
        return matrices + self._vectors(hidden) * element_bytes

    def _vectors(self, hidden: int) -> int:
        """Values outside the matrices."""
        out_bias = hidden * self.output_bias
        if self.kind == "mla":
            assert self.kv_lora_rank is not None
            assert self.rope_head_dim is not None
            norms = (self.q_lora_rank or 0) + self.kv_lora_rank
            return norms + (norms + self.rope_head_dim + out_bias if self.bias else 0)
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        count = q_size + 2 * kv_size + out_bias if self.bias else 0
        count += {"none": 0, "head": 2 * self.head_dim, "full": q_size + kv_size}[self.qk_norm]
        count += self.heads if self.sinks else 0
        return count * (2 if self.cross else 1) + self.heads * self.position_buckets

    def cache_values(self) -> int:
        """Elements that the key/value cache holds per token; of cross-attention as many more per source token."""
        if self.kind == "mla":
            assert self.kv_lora_rank is not None
            assert self.rope_head_dim is not None
            return self.kv_lora_rank + self.rope_head_dim
        return 2 * self.kv_heads * self.head_dim * (2 if self.cross else 1)


def _ffn_matrices(ffn_size: int, hidden: int, gated: bool) -> dict[str, Shape]:
    """[outputs, inputs] of a feed-forward network."""
    into = ("gate", "up") if gated else ("up",)
    return dict.fromkeys(into, (ffn_size, hidden)) | {"down": (hidden, ffn_size)}


def _size(matrices: dict[str, Shape]) -> int:
    return sum(rows * columns for rows, columns in matrices.values())


class Dense(Part):
    """A dense feed-forward network: gated (three matrices) or plain (two)."""

    ffn_size: Size
    gated: bool = True
    activation: Activation = "silu"
    bias: bool = False
    storage: Storage | None = Field(None, description="how its matrices are stored, if not in the model's dtype")

    def matrices(self, hidden: int) -> dict[str, Shape]:
        """[outputs, inputs]"""
        return _ffn_matrices(self.ffn_size, hidden, self.gated)

    def parameters(self, hidden: int) -> int:
        return _size(self.matrices(hidden)) + self._biases(hidden)

    def stored_bytes(self, hidden: int, element_bytes: int) -> int:
        """Bytes of all of it as stored."""
        return stored_bytes(self.matrices(hidden), self.storage, element_bytes) + self._biases(hidden) * element_bytes

    def _biases(self, hidden: int) -> int:
        return (2 if self.gated else 1) * self.ffn_size + hidden if self.bias else 0


class Moe(Part):
    """A mixture-of-experts feed-forward network."""

    num_experts: int = Field(ge=1, le=MAX_EXPERTS)
    top_k: Size
    ffn_size: Size
    gated: bool = True
    activation: Activation = "silu"
    bias: bool = False
    shared_ffn_size: int = Field(0, ge=0, lt=2**31, description="total FFN size of the shared experts, 0 for none")
    shared_gate: bool = Field(False, description="a sigmoid gate weighs the shared expert (Qwen2-MoE)")
    zero_experts: int = Field(
        0,
        ge=0,
        le=MAX_EXPERTS,
        description="identity experts (LongCat-Flash), whose output is the token that the experts read: the router's "
        "last outputs; nothing holds or computes them",
    )
    gate: Gate = Gate()
    storage: Storage | None = Field(None, description="how the experts' matrices are stored, if not in the dtype")
    shared_storage: Storage | None = Field(None, description="the same of the shared experts")

    @model_validator(mode="after")
    def _consistent(self) -> "Moe":
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k ({self.top_k}) exceeds num_experts ({self.num_experts})")
        if self.num_experts % self.gate.groups:
            raise ValueError(f"num_experts ({self.num_experts}) must be a multiple of gate.groups ({self.gate.groups})")
        if self.gate.top_groups > self.gate.groups:
            raise ValueError(f"gate.top_groups ({self.gate.top_groups}) exceeds gate.groups ({self.gate.groups})")
        return self

    @property
    def router_outputs(self) -> int:
        """What a token chooses among: the experts 0..num_experts - 1, then the identity experts."""
        return self.num_experts + self.zero_experts

    @property
    def expert_share(self) -> float:
        """Of the choices, those that fall on experts with weights, where all are used evenly."""
        return self.num_experts / self.router_outputs

    def expert_parameters(self, hidden: int) -> int:
        """Weights of one routed expert."""
        return self._expert().parameters(hidden)

    def expert_bytes(self, hidden: int, element_bytes: int) -> int:
        """Bytes of one routed expert as stored: its matrices with their scales, and its biases."""
        return self._expert().stored_bytes(hidden, element_bytes)

    def always_on_parameters(self, hidden: int) -> int:
        """Router and shared expert: what every token uses."""
        return self._routing(hidden) + _size(self.shared_matrices(hidden))

    def always_on_bytes(self, hidden: int, element_bytes: int) -> int:
        """Bytes of router and shared expert as stored."""
        shared = stored_bytes(self.shared_matrices(hidden), self.shared_storage, element_bytes)
        return self._routing(hidden) * element_bytes + shared

    def shared_matrices(self, hidden: int) -> dict[str, Shape]:
        """[outputs, inputs] of the shared expert; of several, as one."""
        return _ffn_matrices(self.shared_ffn_size, hidden, True) if self.shared_ffn_size else {}

    def _expert(self) -> Dense:
        return Dense(ffn_size=self.ffn_size, gated=self.gated, bias=self.bias, storage=self.storage)

    def _routing(self, hidden: int) -> int:
        """Values of the router and of the shared expert's gate."""
        return self.gate.parameters(hidden, self.router_outputs) + (hidden if self.shared_gate else 0)


class Block(Part):
    """A run of ``count`` identical transformer blocks."""

    count: int = Field(1, ge=1, le=MAX_LAYERS)
    hidden_size: Size
    attention: Attention | None = None
    dense: Dense | None = None
    moe: Moe | None = None
    counted: Counted | None = Field(None, description="the rest, counted whole: then without attention and dense")
    shortcut: Literal["none", "output", "mid", "input"] = Field(
        "none", description="where routed experts read: output/mid/input of the preceding block (ScMoE Pos-1/2/3)"
    )

    @model_validator(mode="after")
    def _once(self) -> "Block":
        if self.counted and (self.attention or self.dense or (self.moe and self.moe.shared_ffn_size)):
            raise ValueError("counted holds all but the routed experts: leave out attention, dense and shared experts")
        return self

    def always_on_parameters(self) -> int:
        """Everything of one block but its routed experts."""
        if self.counted:
            return self.counted.parameters
        hidden = self.hidden_size
        count = self._norms()
        count += self.attention.parameters(hidden) if self.attention else 0
        count += self.dense.parameters(hidden) if self.dense else 0
        return count + (self.moe.always_on_parameters(hidden) if self.moe else 0)

    def always_on_bytes(self, element_bytes: int) -> int:
        """Bytes of the same as stored; what no part stores otherwise has ``element_bytes`` a value."""
        if self.counted:
            return self.counted.stored_bytes(element_bytes)
        hidden = self.hidden_size
        count = self._norms() * element_bytes
        count += self.attention.stored_bytes(hidden, element_bytes) if self.attention else 0
        count += self.dense.stored_bytes(hidden, element_bytes) if self.dense else 0
        return count + (self.moe.always_on_bytes(hidden, element_bytes) if self.moe else 0)

    def dequantised(self) -> "Block":
        """The same block, all of it stored in the model's dtype."""
        parts = {
            "attention": self.attention and self.attention.model_copy(update={"storage": None}),
            "dense": self.dense and self.dense.model_copy(update={"storage": None}),
            "moe": self.moe and self.moe.model_copy(update={"storage": None, "shared_storage": None}),
            "counted": self.counted and self.counted.model_copy(update={"storage": None}),
        }
        return self.model_copy(update=parts)

    def _norms(self) -> int:
        return self.hidden_size * (3 if self.attention and self.attention.cross else 2)


class Model(Document):
    """A mixture-of-experts model."""

    kind: ClassVar[str] = "moeplan.model"

    name: str
    family: str = Field(description="Hugging Face model_type, or the paper's name")
    vocab_size: int = Field(ge=0, lt=2**31, description="0 for models without a token embedding")
    blocks: tuple[Block, ...] = Field(min_length=1)
    norm_eps: float = Field(1e-5, gt=0)
    rope_theta: float | None = Field(10000.0, gt=0, description="None: no rotary embedding")
    tie_embeddings: bool = False
    causal: bool = Field(True, description="a decoder; false for encoders and encoder-decoders")
    dtype: DType = Field("bf16", description="what it computes in; parts may be stored in another format")
    head_storage: Storage | None = Field(None, description="how the output projection is stored, if not in the dtype")
    other_parameters: int = Field(0, ge=0, le=2**50, description="outside the layers, beside embedding, head and norm")
    source: str = Field("", description="where the numbers come from")
    family_config: FamilyConfig | None = Field(None, description="what Transformers builds it from")

    @model_validator(mode="after")
    def _consistent(self) -> "Model":
        if sum(block.count for block in self.blocks) > MAX_LAYERS:
            raise ValueError(f"more than {MAX_LAYERS} layers")
        if not any(block.moe for block in self.blocks):
            raise ValueError("a mixture-of-experts model needs at least one block with moe")
        return self

    @cached_property
    def layers(self) -> tuple[Block, ...]:
        """One entry per layer, in order, each with count 1."""
        return tuple(b.model_copy(update={"count": 1}) for b in self.blocks for _ in range(b.count))

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        return tuple(i for i, block in enumerate(self.layers) if block.moe)

    def moe_block(self, ordinal: int = 0) -> Block:
        """The block of the ``ordinal``-th mixture-of-experts layer."""
        return self.layers[self.moe_layers[ordinal]]

    def embedding_parameters(self) -> int:
        """Embedding, output projection, the norm at the end of each stack, and what else is outside the layers.

        Untied, an encoder-decoder has the shared embedding, one of each stack, and the output projection.
        """
        hidden = self.layers[0].hidden_size
        stacks = 2 if any(block.attention and block.attention.cross for block in self.blocks) else 1
        matrices = 1 if self.tie_embeddings else 2 * stacks
        return self.vocab_size * hidden * matrices + stacks * self.layers[-1].hidden_size + self.other_parameters

    def total_parameters(self) -> int:
        routed = sum(b.moe.num_experts * b.moe.expert_parameters(b.hidden_size) for b in self.layers if b.moe)
        return routed + sum(b.always_on_parameters() for b in self.layers) + self.embedding_parameters()

    def active_parameters(self) -> int:
        """Parameters that one token uses, both embedding matrices included.

        A choice that falls on a zero expert uses none: with them it is the mean over evenly used experts.
        """
        routed = sum(
            b.moe.top_k * b.moe.num_experts * b.moe.expert_parameters(b.hidden_size) // b.moe.router_outputs
            for b in self.layers
            if b.moe
        )
        return routed + sum(b.always_on_parameters() for b in self.layers) + self.embedding_parameters()

    def cache_values(self) -> int:
        """Elements that the key/value cache holds per token, over all layers; encoders keep none.

        Layers with a window need no more than its tokens; per token they hold as much as the others.
        """
        decoders = [a for block in self.layers if (a := block.attention) and (self.causal or a.cross)]
        counted = sum(block.counted.cache_values for block in self.layers if block.counted)
        return sum(attention.cache_values() for attention in decoders) + counted

    def expert_bytes(self, ordinal: int = 0, dtype: str | None = None) -> int:
        """Bytes of one routed expert of the ``ordinal``-th mixture-of-experts layer as stored, scales included.

        ``dtype``: of what is not stored in a format of its own; by default the model's.
        """
        block = self.moe_block(ordinal)
        assert block.moe is not None
        return block.moe.expert_bytes(block.hidden_size, DTYPE_BYTES[dtype or self.dtype])

    def computed_expert_bytes(self, ordinal: int = 0, dtype: str | None = None) -> int:
        """Bytes of the same expert in moeplan's runtime, which holds every weight in the dtype that it computes in."""
        block = self.moe_block(ordinal)
        assert block.moe is not None
        return block.moe.expert_parameters(block.hidden_size) * DTYPE_BYTES[dtype or self.dtype]

    def rest_bytes(self, dtype: str | None = None) -> int:
        """Bytes of everything but the routed experts as stored."""
        element_bytes = DTYPE_BYTES[dtype or self.dtype]
        head = {} if self.tie_embeddings else {"head": (self.vocab_size, self.layers[-1].hidden_size)}
        embedding = (self.embedding_parameters() - _size(head)) * element_bytes
        embedding += stored_bytes(head, self.head_storage, element_bytes)
        return embedding + sum(block.always_on_bytes(element_bytes) for block in self.layers)

    def weight_bytes(self, dtype: str | None = None) -> int:
        """Bytes of all weights as stored."""
        experts = (
            self.expert_bytes(ordinal, dtype) * block.moe.num_experts
            for ordinal, block in enumerate(self.layers[i] for i in self.moe_layers)
            if block.moe
        )
        return self.rest_bytes(dtype) + sum(experts)

    def stored_in(self) -> dict[str, str]:
        """Name of the weight format of each part that has its own: experts, attention, rest (shared, dense, head)."""
        found: dict[str, dict[str, None]] = {"experts": {}, "attention": {}, "rest": {}}
        for block in self.blocks:
            parts = (
                ("experts", block.moe and block.moe.storage),
                ("attention", block.attention and block.attention.storage),
                ("rest", block.dense and block.dense.storage),
                ("rest", block.moe and block.moe.shared_storage),
                ("rest", block.counted and block.counted.storage),
            )
            for part, storage in parts:
                if storage:
                    found[part][storage.name] = None
        if self.head_storage:
            found["rest"][self.head_storage.name] = None
        return {part: ", ".join(names) for part, names in found.items() if names}
