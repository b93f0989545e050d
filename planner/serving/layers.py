"""Time of one pass through a model: the sum of its operators, layer kind by layer kind.

Letters: T tokens of one rank's share of the pass, B sequences of one rank, H hidden size.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ...spec.errors import MoeplanError
from .architecture import Architecture, Layers, Mixer
from .lookup import HALF_BYTES, Lookup
from .shapes import Degrees, Settings

Parts = defaultdict[str, float]
BESIDE_TOKENS = 256
"""Up to so many tokens engines run shared experts beside the routed ones (vLLM's default, 2026)."""


@dataclass(frozen=True)
class Formats:
    """In which format the matrices of each part are multiplied, as tables name them."""

    dense: str
    experts: str
    shared: str


def formats(precision: str, architecture: Architecture) -> Formats:
    """Of a precision as models are published in: bf16, fp8, fp4, int4.

    fp8 models keep all projections in fp8 by blocks; four-bit ones only feed-forward networks.
    """
    if precision == "bf16":
        return Formats("bfloat16", "bfloat16", "bfloat16")
    if precision == "fp8":
        return Formats("fp8_block", "fp8_block", "fp8_block")
    if precision == "int4":
        return Formats("bfloat16", "int4_wo", "bfloat16")
    if precision != "fp4":
        raise MoeplanError(f"precision {precision}: not known; there are bf16, fp8, fp4, int4")
    if architecture.experts_format == "mxfp4":
        return Formats("bfloat16", "w4a16_mxfp4", "bfloat16")
    return Formats("bfloat16", "nvfp4", "nvfp4")


class Passes:
    """Seconds of passes of one model under one choice of degrees, by part."""

    def __init__(
        self, lookup: Lookup, model: Architecture, precision: str, degrees: Degrees, settings: Settings, routing: str
    ) -> None:
        self.lookup, self.model, self.degrees, self.settings, self.routing = lookup, model, degrees, settings, routing
        self.formats = formats(precision, model)
        if settings.moe is not None:
            self.formats = Formats(self.formats.dense, settings.moe, self.formats.shared)

    def tokenwise(self, tokens: float, rows: float, graph: bool) -> Parts:
        """All that depends on the number of tokens alone: projections, experts, exchanges, norms, output.

        ``tokens``: of one attention copy (T). ``rows``: of them, those that get a next token. ``graph``: launched from
        a CUDA graph.
        """
        parts: Parts = defaultdict(float)
        for layers in self.model.layers:
            one = self._mixer(layers.mixer, tokens, graph)
            for part in (one, self._feed_forward(layers, tokens, graph)):
                for name, seconds in part.items():
                    parts[name] += seconds * layers.count
        for name, seconds in self._ends(tokens, rows).items():
            parts[name] += seconds
        return parts

    def decoding(self, batch: float, context: float) -> float:
        """What depends on the context: one new token of each of ``batch`` sequences (B) of ``context`` tokens."""
        return self._sequences("generation", batch, context)

    def prefilling(self, batch: float, tokens: float) -> float:
        """The same of ``batch`` prompts of ``tokens`` tokens."""
        return self._sequences("context", batch, tokens)

    def _sequences(self, phase: str, batch: float, length: float) -> float:
        total = 0.0
        for layers in self.model.layers:
            total += layers.count * self._one_mixer(layers.mixer, phase, batch, length)
        return total

    def _one_mixer(self, mixer: Mixer, phase: str, batch: float, length: float) -> float:
        heads = max(mixer.heads // self.degrees.tp, 1)
        cache = {"kv_dtype": self.settings.kv_cache}
        lookup = self.lookup
        if mixer.kind == "gdn":
            return lookup.gated_delta(phase, batch, length, heads, self.model.hidden)
        if mixer.kind == "gqa":
            kv_heads = max(mixer.kv_heads // self.degrees.tp, 1)
            ask = lookup.prefill_attention if phase == "context" else lookup.decode_attention
            return ask(batch, length, heads, kv_heads, mixer.head_dim, window=mixer.window, **cache)
        module = f"{phase}_{'dsa' if mixer.kind == 'dsa' else 'mla'}_module"
        if lookup.has(module, {}):
            how: dict[str, object] = {"gemm_dtype": self.formats.dense, **cache}
            if mixer.kind == "dsa":
                how |= {"architecture": "GlmMoeDsaForCausalLM", "kernel": lookup.kernels(module, without="skip")}
            return lookup.module(module, batch, length, heads, **how)
        tokens = batch * (length if phase == "context" else 1)
        return lookup.module(f"{phase}_mla", batch, length, heads, **cache) + self._latent(mixer, tokens, heads, phase)

    def _latent(self, mixer: Mixer, tokens: float, heads: int, phase: str) -> float:
        """Projections of latent attention, where the table has the attention alone."""
        gemm, hidden, dtype = self._project, self.model.hidden, self.formats.dense
        down = mixer.q_rank + mixer.kv_rank + mixer.rope_dim
        total = gemm(tokens, down, hidden, dtype)
        total += gemm(tokens, heads * (mixer.head_dim + mixer.rope_dim), mixer.q_rank or hidden, dtype)
        total += gemm(tokens, hidden, heads * mixer.value_dim, dtype)
        if phase == "context":
            return total + gemm(tokens, heads * (mixer.head_dim + mixer.value_dim), mixer.kv_rank, dtype)
        wanted = {"dtype": "fp8" if dtype.startswith("fp8") else "bfloat16"}
        for part in ("mla_gen_pre", "mla_gen_post"):
            total += self.lookup.batched(part, tokens, heads, wanted)
        return total

    def _mixer(self, mixer: Mixer, tokens: float, graph: bool) -> Parts:
        """Projections and small kernels around a mixer, and the exchange after it."""
        hidden, tp, lookup, dtype = self.model.hidden, self.degrees.tp, self.lookup, self.formats.dense
        heads, kv_heads = max(mixer.heads // tp, 1), max(mixer.kv_heads // tp, 1)
        parts: Parts = defaultdict(float)
        parts["small"] += self._norm(tokens)
        if mixer.kind == "gdn":
            keys, values = kv_heads * mixer.head_dim, heads * mixer.value_dim
            parts["projections"] += self._project(tokens, 2 * keys + 2 * values, hidden, dtype)
            parts["projections"] += lookup.gemm(tokens, 2 * heads, hidden, "bfloat16")
            parts["projections"] += self._project(tokens, hidden, values, dtype)
            parts["small"] += lookup.streamed(4 * tokens * (keys + values) * HALF_BYTES)  # taking it apart
            parts["small"] += lookup.streamed(3 * tokens * values * HALF_BYTES)  # gated norm
        elif mixer.kind == "gqa":
            q, kv = heads * mixer.head_dim, kv_heads * mixer.head_dim
            width = q * (2 if mixer.gated else 1) + 2 * kv
            parts["projections"] += self._project(tokens, width, hidden, dtype)
            parts["projections"] += self._project(tokens, hidden, q, dtype)
            parts["small"] += lookup.streamed(2 * tokens * width * HALF_BYTES)  # rotary embedding
            parts["small"] += lookup.streamed(4 * tokens * kv * HALF_BYTES)  # cache write
            if mixer.full_norm:
                # Squares summed and values scaled, of queries and of keys: kernels of their own.
                parts["small"] += 2 * (
                    lookup.streamed(2 * tokens * q * HALF_BYTES) + lookup.streamed(2 * tokens * kv * HALF_BYTES)
                )
                parts["exchange"] += lookup.all_reduce(tokens * 2 * 4, tp, graph)
        parts["exchange"] += lookup.all_reduce(tokens * hidden * HALF_BYTES, tp, graph)
        return parts

    def _feed_forward(self, layers: Layers, tokens: float, graph: bool) -> Parts:
        hidden, lookup, degrees = self.model.hidden, self.lookup, self.degrees
        parts: Parts = defaultdict(float)
        parts["small"] += self._norm(tokens)
        everyone = tokens * degrees.dp
        if not layers.experts:
            parts["dense"] += self._ffn(tokens, layers.ffn // degrees.tp, self.formats.shared)
            parts["exchange"] += lookup.all_reduce(tokens * hidden * HALF_BYTES, degrees.tp, graph)
            return parts
        parts["router"] += lookup.gemm(tokens, layers.experts, hidden, "bfloat16")
        parts["router"] += 2 * lookup.streamed(tokens * layers.experts * 4)  # scores, choice
        shape = {
            "hidden": hidden,
            "ffn": layers.ffn,
            "top_k": layers.top_k,
            "experts": layers.experts,
            "tp": degrees.moe_tp,
            "ep": degrees.moe_ep,
        }
        parts["experts"] += lookup.moe(everyone, shape, self.formats.experts, self.routing)
        if layers.shared:
            shared = self._ffn(tokens, layers.shared // degrees.tp, self.formats.shared)
            # In a CUDA graph few tokens leave room for them beside the routed experts, on a stream of their own.
            beside = parts["experts"] if self.settings.fused and graph and tokens <= BESIDE_TOKENS else 0.0
            parts["shared"] += max(shared - beside, 0.0)
            parts["small"] += lookup.streamed(3 * tokens * hidden * HALF_BYTES)
        if degrees.dp > 1:
            size = everyone * hidden * HALF_BYTES
            gpus = degrees.tp * degrees.dp
            parts["exchange"] += lookup.nccl("all_gather", size, gpus) + lookup.nccl("reduce_scatter", size, gpus)
        else:
            parts["exchange"] += lookup.all_reduce(tokens * hidden * HALF_BYTES, degrees.tp, graph)
        return parts

    def _project(self, tokens: float, columns: int, inputs: int, dtype: str) -> float:
        """One product, its input brought into the format of the weights by a kernel of its own."""
        quantised = 0.0 if dtype == "bfloat16" else self.lookup.streamed(3 * tokens * inputs)
        return quantised + self.lookup.gemm(tokens, columns, inputs, dtype)

    def _norm(self, tokens: float) -> float:
        """Residual and norm; a kernel of its own only where no all-reduce comes before, which else does both."""
        if self.settings.fused and self.degrees.tp > 1 and self.degrees.dp == 1:
            return 0.0
        return self.lookup.streamed(4 * tokens * self.model.hidden * HALF_BYTES)

    def _ffn(self, tokens: float, columns: int, dtype: str) -> float:
        """A dense network of ``columns`` columns on this rank."""
        hidden, lookup = self.model.hidden, self.lookup
        up = self._project(tokens, 2 * columns, hidden, dtype)
        return up + lookup.streamed(3 * tokens * columns * HALF_BYTES) + self._project(tokens, hidden, columns, dtype)

    def _ends(self, tokens: float, rows: float) -> Mapping[str, float]:
        """Embedding, output projection, sampling."""
        hidden, lookup, tp = self.model.hidden, self.lookup, self.degrees.tp
        vocab = self.model.vocab
        rows = max(rows, 1.0)
        head = lookup.gemm(rows, vocab // tp, hidden, "bfloat16")
        head += lookup.nccl("all_gather", rows * vocab * HALF_BYTES, tp)
        head += lookup.streamed(tokens * hidden * HALF_BYTES) + 2 * lookup.streamed(rows * vocab * 4)
        return {"output": head}
