"""The yardstick: a single process, one layer after the other, plain kernels.

Letters: T tokens, D model, V vocabulary, K top-k.
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..spec import Model, MoeplanError
from ..spec.model import Block
from ..spec.routing import Routing
from .attention import Batch, RotaryEmbedding, attention
from .cache import KVCache
from .dense import dense
from .kernels import expert_ffn
from .norms import rms_norm
from .router import Choice, Chooser, choose, route
from .vocabulary import embed, head
from .weights import LayerWeights, WeightSource, check_supported


class ReferenceModel:
    """A whole model on one device.

    ``sequences`` equal sequences, for each of which the cache has space for ``capacity`` tokens. ``kernel`` names an
    implementation of ``expert_ffn`` and ``linear``. Call ``prefill`` once, then ``decode`` as often as there is space;
    or ``fill_context`` and ``forward_hidden`` to run one step on hidden states. Layers are taken from ``weights`` when
    their turn comes and not kept, so that a model needs the memory of two layers.
    """

    def __init__(
        self,
        model: Model,
        weights: WeightSource,
        *,
        sequences: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kernel: str = "reference",
    ) -> None:
        check_supported(model)
        self.model, self.weights, self.sequences, self.kernel = model, weights, sequences, kernel
        self.cache = KVCache(model, (0, sequences), capacity, dtype, torch.device(device))
        self.rope = RotaryEmbedding(model.rope_theta) if model.rope_theta is not None else None
        self.context = 0

    def fill_context(self, context: int, seed: int) -> None:
        """Start from ``context`` random tokens in the cache; see ``KVCache.fill``."""
        self.cache.fill(context, seed)
        self.context = context

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Process prompts from an empty cache. tokens: [sequences, length] -> logits [sequences, length, V]."""
        self.context = 0
        return self._logits(tokens)

    @torch.no_grad()
    def decode(self, tokens: Tensor, chooser: Chooser = choose) -> Tensor:
        """Process the next token of each sequence. tokens: [sequences] -> logits [sequences, V]."""
        return self._logits(tokens[:, None], chooser)[:, 0]

    @cached_property
    def _embedding(self) -> Tensor:
        return self.weights.embedding()

    @cached_property
    def _head(self) -> Tensor:
        return self._embedding if self.model.tie_embeddings else self.weights.head()

    @cached_property
    def _norm(self) -> Tensor:
        return self.weights.final_norm()

    def _logits(self, tokens: Tensor, chooser: Chooser = choose) -> Tensor:
        x = self.forward_hidden(embed(tokens.reshape(-1), self._embedding), chooser=chooser)
        logits = head(x, self._norm, self.model.norm_eps, self._head, kernel=self.kernel)
        return logits.view(*tokens.shape, -1)

    @torch.no_grad()
    def forward_hidden(self, x: Tensor, routing: Routing | None = None, chooser: Chooser = choose) -> Tensor:
        """All layers on hidden states, without embedding and head; the context then grows by the new tokens.

        x: [T, D], sequence-major, T a multiple of the sequences -> [T, D]. With ``routing`` (rows for these T tokens)
        the experts and gate weights are forced, else the model's own router chooses, in a decoding step by ``chooser``.
        """
        batch = Batch(self.sequences, len(x) // self.sequences, self.context)
        chooser = chooser if batch.length == 1 else choose
        if batch.tokens != len(x) or batch.context + batch.length > self.cache.capacity:
            raise MoeplanError(
                f"reference: {len(x)} new tokens after {batch.context} do not fit {self.sequences} sequences of at "
                f"most {self.cache.capacity} tokens"
            )
        ordinal = 0
        before = middle = x  # of the preceding layer: its input, and its state after attention
        for i, block in enumerate(self.model.layers):
            layer, start, y = self.weights.layer(i), x, None
            if block.shortcut != "none":
                read = {"output": x, "mid": middle, "input": before}[block.shortcut]
                y = self._experts(read, layer, block, routing, ordinal, chooser)[1]
            if layer.attention is not None:
                x = x + attention(x, layer.attention, self.cache.layers[i], self.rope, batch, kernel=self.kernel)
            middle = x
            if layer.dense is not None:
                x = x + dense(x, layer.dense, kernel=self.kernel)
            if block.moe is not None:
                if y is None:
                    normed, y = self._experts(x, layer, block, routing, ordinal, chooser)
                else:
                    assert layer.router is not None
                    normed = rms_norm(x, layer.router.norm, layer.router.eps)
                x = x + y if layer.shared is None else x + y + dense(normed, layer.shared, kernel=self.kernel)
                ordinal += 1
            before = start
        self.context += batch.length
        return x

    def _experts(
        self, x: Tensor, layer: LayerWeights, block: Block, routing: Routing | None, ordinal: int, chooser: Chooser
    ) -> tuple[Tensor, Tensor]:
        """The normalised tokens and their routed experts' output; both [T, D]."""
        assert block.moe is not None
        assert layer.router is not None
        assert layer.gate_up is not None
        assert layer.down is not None
        forced = None if routing is None else forced_choice(routing, ordinal, x.device)
        normed, ids, gates = route(x, layer.router, block.moe, forced, kernel=self.kernel, chooser=chooser)
        experts, activation, count = (layer.gate_up, layer.down), block.moe.activation, block.moe.num_experts
        real = ids if block.moe.zero_experts == 0 else torch.where(ids < count, ids, -1)
        y = expert_ffn(normed, *experts, real, gates, activation=activation, implementation=self.kernel)
        for identity in (-1, *range(count, block.moe.router_outputs)) if block.moe.zero_experts else ():
            for k in range(ids.shape[1]):
                mine = ids[:, k] == identity
                y[mine] = (y[mine] + gates[mine, k, None] * normed[mine]).to(y.dtype)
        return normed, y


def forced_choice(routing: Routing, ordinal: int, device: torch.device, tokens: slice = slice(None)) -> Choice:
    """The routing of the ``ordinal``-th MoE layer for some tokens: ids [T, K] int64, gate weights [T, K] float32."""
    ids = torch.from_numpy(routing.expert_ids[tokens, ordinal].astype(np.int64))
    gates = torch.from_numpy(routing.expert_weights[tokens, ordinal].astype(np.float32))
    return ids.to(device), gates.to(device)
