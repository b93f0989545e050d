"""Every operator as a call: it runs, computes what its name says, and refuses what it cannot run."""

import pytest
import torch

from moeplan.runtime import calls, pools
from moeplan.runtime.calls import operator_call
from moeplan.runtime.pools import expert_weights
from moeplan.spec import Model, MoeplanError
from moeplan.spec.model import Attention, Block, Dense, Moe
from moeplan.spec.operators import OF_FAMILIES, OPERATORS

torch.set_num_threads(1)
CPU = torch.device("cpu")
MOE = Block(
    count=3,
    hidden_size=32,
    attention=Attention(heads=8, kv_heads=4, head_dim=8, qk_norm="full"),
    moe=Moe(num_experts=6, top_k=2, ffn_size=24, shared_ffn_size=16),
)
DENSE = Block(hidden_size=32, attention=MOE.attention, dense=Dense(ffn_size=40))
MODEL = Model(name="test", family="test", vocab_size=64, blocks=(DENSE, MOE))
AT = {"sequences": 2, "length": 5, "context": 7, "tokens": 9, "ffn": 10, "experts": 3, "copied": 2}


def call(operator, block=MOE, dtype=torch.float32, devices=4, tensor=1, hosts=1, **at):
    at = at or {axis: AT[axis] for axis in OPERATORS[operator].axes}
    return operator_call(operator, MODEL, block, dtype, CPU, devices=devices, tensor=tensor, hosts=hosts, **at)


@pytest.fixture
def recorded(monkeypatch):
    """Arguments and results of one of the functions that calls use."""

    def record(name, owner=calls):
        function, log = getattr(owner, name), []

        def recording(*args, **kwargs):
            result = function(*args, **kwargs)
            log.append((args, result))
            return result

        monkeypatch.setattr(owner, name, recording)
        return log

    return record


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("devices", "hosts"), [(1, 1), (4, 1), (4, 2), (3, 2)])
@pytest.mark.parametrize("operator", [name for name in OPERATORS if name not in OF_FAMILIES])
def test_every_operator_runs_again_and_again(operator, devices, hosts, dtype):
    run = call(operator, dtype=dtype, devices=devices, hosts=hosts)
    assert run() is None
    run()


def test_expert_ffn_gives_each_expert_its_tokens(recorded):
    log = recorded("expert_ffn")
    for experts, tokens in ((3, 9), (1, 4), (6, 1), (5, 3)):
        call("expert_ffn", ffn=10, experts=experts, tokens=tokens)()
        (x, gate_up, down, ids, gates), y = log[-1]
        assert gate_up.shape == (experts, 2, 10, 32)
        assert down.shape == (experts, 32, 10)
        assert torch.bincount(ids[ids >= 0], minlength=experts).tolist() == [tokens] * experts
        assert ids.shape[1] == gates.shape[1] == 2
        assert all(len(set(row)) == len(row) for row in ([i for i in r if i >= 0] for r in ids.tolist()))
        assert torch.isfinite(y).all()
        assert y.abs().max() > 1e-4
        assert len(x) == -(-experts * tokens // min(2, experts))


def test_expert_weights_are_those_of_another_layer_each_time(recorded):
    """As in a step: memory comes round again only after all layers, whichever call asks."""
    log = recorded("expert_ffn")
    one, two = call("expert_ffn", ffn=10, experts=3, tokens=2), call("expert_ffn", ffn=10, experts=3, tokens=5)
    for run in (one, two, one, two):
        run()
    places = [args[1].data_ptr() for args, _ in log]
    assert len(set(places)) == 3 == len(MODEL.moe_layers)
    assert places[3] == places[0]


def test_weights_of_large_calls_leave_the_caches(monkeypatch, recorded):
    expert_weights.cache_clear()
    each = 3 * 3 * 10 * 32 * 4
    monkeypatch.setattr(pools, "COLD_BYTES", 2 * each)
    log = recorded("expert_ffn")
    run = call("expert_ffn", ffn=10, experts=3, tokens=2)
    for _ in range(4):
        run()
    assert len({args[1].data_ptr() for args, _ in log}) == 2
    expert_weights.cache_clear()


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_attention_holds_its_share_of_the_heads(recorded, tensor):
    log = recorded("attention")
    call("attention_prefill", tensor=tensor)()
    call("attention_decode", tensor=tensor)()
    for (x, weights, cache, _rope, batch), tokens in zip([args for args, _ in log], (10, 2), strict=True):
        assert len(x) == batch.tokens == tokens
        assert weights.heads == (0, 8 // tensor)
        assert cache.keys.shape[1] == 4 // tensor
        assert cache.keys.shape[2] >= batch.context + batch.length
    assert log[0][0][4].context == 0
    assert log[1][0][4].context == 7


def test_dense_ffn_is_the_dense_layer_or_the_shared_expert(recorded):
    log = recorded("dense")
    call("dense_ffn", DENSE)()
    call("dense_ffn", MOE)()
    assert [args[1].down.shape for args, _ in log] == [(32, 40), (32, 16)]
    assert [args[1].norm is None for args, _ in log] == [False, True]


def test_packing_serves_all_devices(recorded):
    log = recorded("pack", calls.ep)
    call("ep_pack", tokens=50)()
    rows, token, counts = log[-1][1]
    assert counts.sum() == len(rows) == len(token)
    assert len(counts) == 4
    assert (counts > 0).all()


def test_a_relay_takes_as_many_rows_as_it_says_and_serves_its_whole_host(recorded):
    log, added = recorded("relay", calls.hierarchical), recorded("add_up", calls.hierarchical)
    call("hierarchical_relay", hosts=2, tokens=50)()
    call("hierarchical_add", hosts=2, tokens=50)()
    (rows, *_), (copies, row, counts) = log[-1]
    assert len(rows) == 50
    assert len(counts) == 2
    assert (counts > 0).all()
    assert 50 < len(copies) == len(row) == counts.sum()
    assert added[-1][1].shape == (50, 32)


def test_what_cannot_run_is_named():
    with pytest.raises(MoeplanError, match=r"operator: expected one of .*expert_ffn.*, got 'teleport'"):
        call("teleport", tokens=1)
    with pytest.raises(MoeplanError, match=r"route: expected positive values for \('tokens',\), got"):
        call("route", length=3)
    with pytest.raises(MoeplanError, match="expected positive values"):
        call("route", tokens=0)
    with pytest.raises(MoeplanError, match="tensor: 3 devices cannot divide 8 heads and 4 key/value heads"):
        call("attention_decode", tensor=3)
    with pytest.raises(MoeplanError, match="block: needs experts, this one of test has none"):
        call("route", DENSE)
    with pytest.raises(MoeplanError, match="block: must be one of test's"):
        call("route", MOE.model_copy(update={"hidden_size": 64}))
