"""Model: what a mixture-of-experts transformer is made of, block by block.

A model is a sequence of runs of identical transformer blocks, so first-dense models (DeepSeek), every-other-layer
models (Switch), staged vision models (Swin-MoE) and shortcut models (LongCat, ScMoE) need no special case.
"""

from functools import cached_property
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from .document import Document, Part

DType = Literal["f32", "bf16", "f16"]
DTYPE_BYTES: dict[str, int] = {"f32": 4, "bf16": 2, "f16": 2}
Activation = Literal["silu", "gelu", "relu", "swiglu_clamped"]
MAX_LAYERS = 4096
MAX_EXPERTS = 65536
Size = Annotated[int, Field(ge=1, lt=2**31)]


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

    @model_validator(mode="after")
    def _consistent(self) -> "Attention":
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.kind == "mla" and None in (self.kv_lora_rank, self.rope_head_dim, self.v_head_dim):
            raise ValueError("mla needs kv_lora_rank, rope_head_dim and v_head_dim")
        return self

    def parameters(self, hidden: int) -> int:
        """Weights (and biases) of the projections, norms and sinks."""
        if self.kind == "mla":
            # _consistent has seen them all
            assert self.kv_lora_rank is not None
            assert self.rope_head_dim is not None
            assert self.v_head_dim is not None
            q_size = self.heads * (self.head_dim + self.rope_head_dim)
            q = (
                hidden * self.q_lora_rank + self.q_lora_rank + self.q_lora_rank * q_size
                if self.q_lora_rank
                else hidden * q_size
            )
            kv = hidden * (self.kv_lora_rank + self.rope_head_dim) + self.kv_lora_rank
            kv += self.kv_lora_rank * self.heads * (self.head_dim + self.v_head_dim)
            count = q + kv + self.heads * self.v_head_dim * hidden
            down = (self.q_lora_rank or 0) + self.kv_lora_rank + self.rope_head_dim
            count += down + hidden * self.output_bias if self.bias else 0
        else:
            q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
            count = hidden * (q_size + 2 * kv_size) + q_size * hidden
            count += q_size + 2 * kv_size + hidden * self.output_bias if self.bias else 0
            count += {"none": 0, "head": 2 * self.head_dim, "full": q_size + kv_size}[self.qk_norm]
            count += self.heads if self.sinks else 0
        return count * (2 if self.cross else 1)

    def cache_values(self) -> int:
        """Elements that the key/value cache holds per token."""
        if self.kind == "mla":
            assert self.kv_lora_rank is not None
            assert self.rope_head_dim is not None
            return self.kv_lora_rank + self.rope_head_dim
        return 2 * self.kv_heads * self.head_dim


class Dense(Part):
    """A dense feed-forward network: gated (three matrices) or plain (two)."""

    ffn_size: Size
    gated: bool = True
    activation: Activation = "silu"
    bias: bool = False

    def parameters(self, hidden: int) -> int:
        count = (3 if self.gated else 2) * hidden * self.ffn_size
        return count + ((2 if self.gated else 1) * self.ffn_size + hidden if self.bias else 0)


class Gate(Part):
    """How a token chooses its experts and weighs them."""

    score: Literal["softmax", "sigmoid", "softmax_topk"] = Field(
        "softmax", description="softmax over all experts, sigmoid, or softmax over the chosen top-k only"
    )
    normalize: bool = Field(True, description="gate weights of the chosen experts are divided by their sum")
    scale: float = Field(1.0, gt=0, description="factor on the gate weights (routed scaling factor)")
    bias: bool = Field(False, description="the router's linear layer has a bias")
    correction_bias: bool = Field(
        False, description="a bias per expert enters the choice, not the weight (DeepSeek-V3)"
    )
    groups: Size = Field(1, description="group-limited routing: groups of experts")
    top_groups: Size = Field(1, description="group-limited routing: groups a token may use")


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
        0, ge=0, le=MAX_EXPERTS, description="identity experts beside the real ones (LongCat-Flash)"
    )
    gate: Gate = Gate()

    @model_validator(mode="after")
    def _consistent(self) -> "Moe":
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k ({self.top_k}) exceeds num_experts ({self.num_experts})")
        if self.num_experts % self.gate.groups:
            raise ValueError(f"num_experts ({self.num_experts}) must be a multiple of gate.groups ({self.gate.groups})")
        if self.gate.top_groups > self.gate.groups:
            raise ValueError(f"gate.top_groups ({self.gate.top_groups}) exceeds gate.groups ({self.gate.groups})")
        return self

    def expert_parameters(self, hidden: int) -> int:
        """Weights of one routed expert."""
        return Dense(ffn_size=self.ffn_size, gated=self.gated, bias=self.bias).parameters(hidden)

    def always_on_parameters(self, hidden: int) -> int:
        """Router and shared expert: what every token uses."""
        outputs = self.num_experts + self.zero_experts
        count = hidden * outputs + outputs * (self.gate.bias + self.gate.correction_bias)
        count += 3 * hidden * self.shared_ffn_size + (hidden if self.shared_gate else 0)
        return count


class Block(Part):
    """A run of ``count`` identical transformer blocks."""

    count: int = Field(1, ge=1, le=MAX_LAYERS)
    hidden_size: Size
    attention: Attention | None = None
    dense: Dense | None = None
    moe: Moe | None = None
    shortcut: Literal["none", "output", "mid", "input"] = Field(
        "none", description="where routed experts read: output/mid/input of the preceding block (ScMoE Pos-1/2/3)"
    )

    def always_on_parameters(self) -> int:
        """Everything of one block but its routed experts."""
        hidden = self.hidden_size
        count = 2 * hidden
        count += self.attention.parameters(hidden) if self.attention else 0
        count += self.dense.parameters(hidden) if self.dense else 0
        return count + (self.moe.always_on_parameters(hidden) if self.moe else 0)


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
    dtype: DType = "bf16"
    source: str = Field("", description="where the numbers come from")

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
        hidden = self.layers[0].hidden_size
        return self.vocab_size * hidden * (1 if self.tie_embeddings else 2) + self.layers[-1].hidden_size

    def total_parameters(self) -> int:
        routed = sum(b.moe.num_experts * b.moe.expert_parameters(b.hidden_size) for b in self.layers if b.moe)
        return routed + sum(b.always_on_parameters() for b in self.layers) + self.embedding_parameters()

    def active_parameters(self) -> int:
        """Parameters that one token uses, both embedding matrices included.

        A choice that falls on a zero expert uses none: with them it is the mean over evenly used experts.
        """
        routed = sum(
            b.moe.top_k
            * b.moe.num_experts
            * b.moe.expert_parameters(b.hidden_size)
            // (b.moe.num_experts + b.moe.zero_experts)
            for b in self.layers
            if b.moe
        )
        return routed + sum(b.always_on_parameters() for b in self.layers) + self.embedding_parameters()

    def expert_bytes(self, ordinal: int = 0, dtype: str | None = None) -> int:
        """Bytes of one routed expert of the ``ordinal``-th mixture-of-experts layer."""
        block = self.moe_block(ordinal)
        assert block.moe is not None
        return block.moe.expert_parameters(block.hidden_size) * DTYPE_BYTES[dtype or self.dtype]
