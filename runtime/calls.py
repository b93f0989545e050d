"""Every operator of ``spec.operators`` as a call on realistic inputs: what the profiler times is what the runtime runs.

Letters: T tokens, D model, E experts, K top-k, H ffn columns, M 2 for a gated FFN or 1, G devices.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..spec import Model, MoeplanError
from ..spec.model import Block, Moe
from ..spec.operators import OF_FAMILIES, OPERATORS
from ..spec.plan import LayerPlan
from .attention import Batch, RotaryEmbedding, attention
from .cache import LayerCache, Stack
from .dense import dense
from .even_choices import even_choices
from .families.net import BY_FAMILY
from .kernels import expert_ffn
from .pools import COLD_BYTES, expert_weights, pool, resting_weights, values_of
from .random_weights import RandomWeights, random_tensor
from .router import Choice, routed
from .step_end import pack_cache, pack_home, unpack_home, write_cache
from .strategies import coherent, ep, gathered, hierarchical, offload, sharded
from .strategies.by_batch import ByBatch
from .tiers import HOST
from .vocabulary import embed, head
from .weights import AttentionWeights, DenseWeights, RouterWeights

Call = Callable[[], object]

DECODE_SPARE = 16  # positions that the cache has beyond the context, as in a run of several steps


class _PooledWeights(RandomWeights):
    """The parts of one block with values of a pool."""

    def _draw(self, layer: int, name: str, shape: Sequence[int], fan_in: int, number: int = 0) -> Tensor:
        return pool(self.dtype, self.device).cut(*shape)

    def _norm(self, layer: int, name: str, size: int) -> Tensor:
        return torch.ones(size, dtype=self.dtype, device=self.device)


class _Calls:
    """One method per operator; its keyword arguments are the operator's axes."""

    def __init__(
        self,
        model: Model,
        block: Block,
        dtype: torch.dtype,
        device: torch.device,
        devices: int,
        tensor: int,
        hosts: int,
    ) -> None:
        self.model, self.block, self.dtype, self.device = model, block, dtype, device
        self.devices, self.tensor, self.hidden = devices, tensor, block.hidden_size
        self.hosts = [g * hosts // devices for g in range(devices)]
        single = block.model_copy(update={"count": 1})
        if single not in model.layers:
            raise MoeplanError(f"operator_call: block: must be one of {model.name}'s")
        self.index = model.layers.index(single)
        self.weights = _PooledWeights(model, dtype, device=device)

    @property
    def moe(self) -> Moe:
        if self.block.moe is None:
            raise MoeplanError(f"operator_call: block: needs experts, this one of {self.model.name} has none")
        return self.block.moe

    def rows(self, count: int) -> Tensor:
        """Activations [count, D] of unit variance, in memory of their own."""
        out = torch.empty((count, self.hidden), dtype=self.dtype, device=self.device)
        return random_tensor(out, 0, 0, "rows", fan_in=1)

    def choice(self, tokens: int) -> Choice:
        """Random routing: ids [T, K] int64, distinct in a row or -1; even gate weights [T, K] float32."""
        generator, moe = torch.Generator().manual_seed(0), self.moe
        ids = torch.rand((tokens, moe.router_outputs), generator=generator).argsort(1)[:, : moe.top_k].to(self.device)
        return ids.masked_fill(ids >= moe.num_experts, -1), torch.full(ids.shape, 1 / moe.top_k, device=self.device)

    # attention ------------------------------------------------------------------------------------------------------

    def attention_prefill(self, sequences: int, length: int) -> Call:
        return self._attention(Batch(sequences, length))

    def attention_decode(self, sequences: int, context: int) -> Call:
        return self._attention(Batch(sequences, 1, context))

    def attention_scattered(self, sequences: int, context: int) -> Call:
        rows = torch.arange(0, 2 * sequences, 2, device=self.device)
        return self._attention(Batch(sequences, 1, context), rows)

    def _attention(self, batch: Batch, rows: Tensor | None = None) -> Call:
        """``rows``: every second sequence of the cache, or, without, all."""
        a = self.block.attention
        if a is None:
            raise MoeplanError(f"operator_call: block: needs attention, this one of {self.model.name} has none")
        if a.heads % self.tensor or a.kv_heads % self.tensor:
            raise MoeplanError(
                f"operator_call: tensor: {self.tensor} devices cannot divide {a.heads} heads "
                f"and {a.kv_heads} key/value heads"
            )
        weights = self.weights.attention(self.index, (0, a.heads // self.tensor))
        assert isinstance(weights, AttentionWeights)
        held = batch.sequences if rows is None else 2 * batch.sequences
        shape = (held, a.kv_heads // self.tensor, batch.context + batch.length + DECODE_SPARE, a.head_dim)
        keys, values = (pool(self.dtype, self.device).cut(*shape).clone() for _ in range(2))
        cache, x = LayerCache(keys, values), self.rows(batch.tokens)
        rope = RotaryEmbedding(self.model.rope_theta) if self.model.rope_theta is not None else None
        # The sum over the group is a collective, which is timed by itself.
        return lambda: x + attention(x, weights, cache, rope, batch, rows=rows, sum_over_group=lambda part: part)

    # feed-forward ---------------------------------------------------------------------------------------------------

    def route(self, tokens: int) -> Call:
        x, weights, moe = self.rows(tokens), self.weights.router(self.index), self.moe
        assert isinstance(weights, RouterWeights)
        return lambda: routed(x, weights, moe).onto(x)

    def expert_ffn(self, ffn: int, experts: int, tokens: int) -> Call:
        """Every one of ``experts`` gets ``tokens`` rows; a row goes to as many of them as the model's top-k allows."""
        moe = self.moe
        ids, gates = even_choices(experts, tokens, moe.top_k, self.device)
        x, layers = self.rows(len(ids)), len(self.model.moe_layers)
        sets = expert_weights(experts, 2 if moe.gated else 1, ffn, self.hidden, layers, self.dtype, self.device)
        return lambda: expert_ffn(x, *next(sets), ids, gates, activation=moe.activation)

    def dense_ffn(self, tokens: int) -> Call:
        x, weights = self.rows(tokens), self.weights.dense(self.index) or self.weights.shared(self.index)
        if not isinstance(weights, DenseWeights):
            raise MoeplanError(
                f"operator_call: block: needs a dense FFN or a shared expert, this one of {self.model.name} has none"
            )
        return lambda: x + dense(x, weights)

    # exchange -------------------------------------------------------------------------------------------------------

    def _plan(self) -> LayerPlan:
        """Experts divided over the devices in order."""
        experts = torch.arange(self.moe.num_experts).tensor_split(self.devices)
        return LayerPlan(strategy="ep", slots=tuple(tuple(part.tolist()) for part in experts))

    def _table(self) -> ep.Serving:
        """The same seen from rank 0."""
        return ep.serving(self._plan(), self.hosts, self.moe.num_experts, 0, self.device)

    def _packed(self, tokens: int) -> tuple[Callable[[], tuple[Tensor, Tensor, Tensor]], Tensor]:
        """Packing of rank 0's tokens; and the residual."""
        table = self._table()
        x, choice, phase = self.rows(tokens), self.choice(tokens), ep.phases(0, tokens, self.device)
        return lambda: ep.pack(x, *choice, table, phase), x

    def ep_pack(self, tokens: int) -> Call:
        return self._packed(tokens)[0]

    def by_batch(self, copied: int) -> Call:
        """The experts of one device after the other, ``copied`` of which the next device holds, too."""
        slots, random = [list(own) for own in self._plan().slots], torch.Generator().manual_seed(0)
        for expert in range(min(copied, self.moe.num_experts) if self.devices > 1 else 0):
            home = next(g for g, own in enumerate(slots) if expert in own)
            slots[(home + 1) % self.devices].append(expert)
        plan = LayerPlan(strategy="ep", slots=tuple(map(tuple, slots)), speeds=(1.0,) * self.devices)
        decide = ByBatch(plan, self.moe.num_experts, self.device)
        load = torch.rand(self.moe.num_experts, generator=random).mul_(1000).numpy()
        return lambda: decide.tables(load)

    def ep_unpack(self, tokens: int) -> Call:
        rows = sharded.pack(self.rows(tokens), *self.choice(tokens))
        return lambda: ep.unpack(rows, self.hidden, self.dtype, self.moe.top_k)

    def ep_combine(self, tokens: int) -> Call:
        pack, residual = self._packed(tokens)
        token = pack()[1]
        returned = self.rows(len(token))
        return lambda: ep.combine(returned, token, residual)

    def _way(self) -> hierarchical.Way:
        """The tables of rank 0."""
        return hierarchical.way(self._plan(), self.hosts, self.moe.num_experts, 0, self.device)

    def hierarchical_pack(self, tokens: int) -> Call:
        x, choice, phase, to = self.rows(tokens), self.choice(tokens), ep.phases(0, tokens, self.device), self._way()
        return lambda: hierarchical.pack(x, *choice, to, phase)

    def _arrived(self, tokens: int) -> tuple[Tensor, hierarchical.Way]:
        """Rows that reached rank 0 as a relay: of tokens with at least one expert on its host."""
        to, (ids, gates) = self._way(), self.choice(tokens)
        ids[:, 0] %= len(to.local) - 1
        phase = ep.phases(0, tokens, self.device)
        rows, _, counts = hierarchical.pack(self.rows(tokens), ids, gates, to, phase)
        return rows[: int(counts[0, 0])], to

    def hierarchical_relay(self, tokens: int) -> Call:
        rows, to = self._arrived(tokens)
        return lambda: hierarchical.relay(rows, self.hidden, self.dtype, self.moe.top_k, to)

    def hierarchical_add(self, tokens: int) -> Call:
        rows, to = self._arrived(tokens)
        row = hierarchical.relay(rows, self.hidden, self.dtype, self.moe.top_k, to)[1]
        returned = self.rows(len(row))
        return lambda: hierarchical.add_up(returned, row, tokens)

    def hierarchical_combine(self, tokens: int) -> Call:
        residual, phase = self.rows(tokens), ep.phases(0, tokens, self.device)
        token = hierarchical.pack(residual, *self.choice(tokens), self._way(), phase)[1]
        returned = self.rows(len(token))
        return lambda: hierarchical.combine(returned, token, residual)

    def sharded_pack(self, tokens: int) -> Call:
        x, choice = self.rows(tokens), self.choice(tokens)
        return lambda: sharded.pack(x, *choice)

    def sharded_unpack(self, tokens: int) -> Call:
        rows = sharded.pack(self.rows(tokens), *self.choice(tokens))
        return lambda: sharded.unpack(rows, self.hidden, self.dtype, self.moe.top_k)

    def sharded_combine(self, tokens: int) -> Call:
        partials = self.rows(self.devices * tokens).view(self.devices, tokens, self.hidden)
        residual = self.rows(tokens)
        return lambda: sharded.combine(partials, residual)

    def gathered_combine(self, tokens: int) -> Call:
        y, residual = self.rows(tokens), self.rows(tokens)
        return lambda: gathered.combine(y, residual)

    def offload_order(self, tokens: int) -> Call:
        """What devices are told of rank 0's tokens; received rows with its experts, and as many choices of others'."""
        table, ids, held = self._table(), self.choice(tokens)[0], -(-self.moe.num_experts // self.devices)
        here, phase = torch.where(ids < held, ids, -1).int(), ep.phases(0, tokens, self.device)
        return lambda: (offload.wanted(ids, table, phase, held), offload.by_expert(here, held))

    def offload_visit(self, tokens: int) -> Call:
        x, weights, part = self.rows(2 * tokens), self.choice(2 * tokens)[1], self.rows(tokens)
        total, choices = x.float(), torch.arange(tokens, device=self.device) * 2 * self.moe.top_k
        return lambda: offload.add(total, part, offload.select(x, weights, choices))

    def offload_host(self, tokens: int) -> Call:
        moe = self.moe
        x, choices = self.rows(tokens), torch.arange(tokens, device=self.device)
        sets = resting_weights(2 if moe.gated else 1, moe.ffn_size, self.hidden, self.dtype)
        weights = torch.ones((tokens, 1), device=self.device)

        def call() -> Tensor:
            there = offload.select(x, weights, choices).to(HOST)
            return offload.on_host(there, *next(sets), moe.activation).to(self.device)

        return call

    def coherent_pack(self, tokens: int) -> Call:
        table, x, choice = self._table(), self.rows(tokens), self.choice(tokens)
        number, home = torch.arange(tokens, device=self.device), 0 if self.moe.zero_experts else None
        return lambda: coherent.pack(x, *choice, number, table, coherent.phases(number), home)

    def _received(self, tokens: int) -> Callable[[], coherent.Received]:
        """Rank 0's receipt of so many rows: tokens of random experts, of which it has one at least."""
        table, router, (ids, gates) = self._table(), self.weights.router(self.index), self.choice(tokens)
        assert isinstance(router, RouterWeights)
        token = torch.arange(tokens, device=self.device)
        elsewhere = (table.device[ids] > 0).all(1)
        ids[elsewhere, token[elsewhere] % self.moe.top_k] = token[elsewhere] % -(-self.moe.num_experts // self.devices)
        rows, counts = coherent.pack(self.rows(tokens), ids, gates, token, table, coherent.phases(token))
        mine = rows[: int(counts[0])]
        return lambda: coherent.receive(mine, router, self.moe, 0, self.devices)

    def coherent_unpack(self, tokens: int) -> Call:
        return self._received(tokens)

    def coherent_combine(self, tokens: int) -> Call:
        came, y = self._received(tokens)(), self.rows(tokens)
        arrived = self.rows(len(came.place))
        return lambda: (y.index_select(0, came.away), coherent.combine(y, arrived, came))

    def coherent_home(self, tokens: int) -> Call:
        x, number = self.rows(tokens), torch.arange(0, tokens * self.devices, self.devices, device=self.device)
        arrived, _ = pack_home(x, torch.randperm(tokens).to(self.device), [tokens])

        def call() -> None:
            pack_home(x, number, [tokens] * self.devices)
            unpack_home(arrived, self.dtype, 0)

        return call

    def coherent_cache(self, tokens: int) -> Call:
        a = self.block.attention
        if a is None:
            raise MoeplanError(f"operator_call: block: needs attention, this one of {self.model.name} has none")
        keys, values = (
            pool(self.dtype, self.device).cut(tokens, a.kv_heads, DECODE_SPARE, a.head_dim).clone() for _ in range(2)
        )
        stack, places = Stack(keys, values, {}), torch.randperm(tokens).to(self.device)
        mine, everybody = places[: -(-tokens // self.devices)], pack_cache(stack, places, 0)

        def call() -> None:
            pack_cache(stack, mine, 0)
            write_cache(stack, everybody, 0)

        return call

    # vocabulary -----------------------------------------------------------------------------------------------------

    def embed(self, tokens: int) -> Call:
        table = self.weights.embedding()
        ids = torch.randint(self.model.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)).to(
            self.device
        )
        return lambda: embed(ids, table)

    def head(self, tokens: int) -> Call:
        x, norm, weight = self.rows(tokens), self.weights.final_norm(), self.weights.head()
        return lambda: head(x, norm, self.model.norm_eps, weight)


def operator_call(
    operator: str,
    model: Model,
    block: Block,
    dtype: torch.dtype,
    device: torch.device,
    *,
    devices: int,
    tensor: int,
    hosts: int = 1,
    **coordinates: int,
) -> Callable[[], None]:
    """Build inputs once; the result runs exactly one call of ``operator`` on them, as the executor does.

    ``block``: one of the model's; ``devices``: G of the exchange operators, on ``hosts`` in order; ``tensor``: devices
    that divide the attention heads; ``coordinates``: a positive value for each axis in ``OPERATORS[operator].axes``.
    Raises MoeplanError for an unknown operator, other axes, or a block that lacks what the operator runs.
    """
    if operator not in OPERATORS:
        raise MoeplanError(f"operator_call: operator: expected one of {', '.join(OPERATORS)}, got {operator!r}")
    if operator in OF_FAMILIES and model.family_config is None:
        raise MoeplanError(f"operator_call: {operator} is of models that Transformers computes, unlike {model.name}")
    axes = OPERATORS[operator].axes
    if set(coordinates) != set(axes) or min(coordinates.values()) < 1:
        raise MoeplanError(f"operator_call: {operator}: expected positive values for {axes}, got {coordinates}")
    with torch.inference_mode():
        calls: object = _Calls(model, block, dtype, device, devices, tensor, hosts)
        if model.family_config is not None and operator in BY_FAMILY:
            from .families.calls import FamilyCalls  # and Transformers with it

            calls = FamilyCalls(model, block, dtype, device, values_of(dtype, device), COLD_BYTES)
        call: Call = getattr(calls, operator)(**coordinates)

    @torch.inference_mode()
    def run() -> None:
        call()

    return run
