"""What a small operator is timed among."""

import pytest

from moeplan.profiler.tasks import MOST_BETWEEN, Task
from moeplan.spec.catalogue import load_model
from moeplan.spec.model import DTYPE_BYTES


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("name", ["tiny-moe", "lab-moe", "mixtral", "deepseek-v2-lite"])
def test_small_operators_stand_among_what_a_layer_goes_through(name, devices):
    """All weights; and of each token what it leaves in memory, from some 20 to 60 vectors of the model's size."""
    model = load_model(name)
    block = model.moe_block()
    attention, moe = block.attention, block.moe
    assert attention is not None
    assert moe is not None
    shared = moe.always_on_parameters(block.hidden_size) - block.hidden_size * moe.num_experts  # without the router
    routed = moe.num_experts * moe.expert_parameters(block.hidden_size) // devices
    read = (attention.parameters(block.hidden_size) + routed + shared) * DTYPE_BYTES["f32"]
    task = Task("ep_pack", model, block, "f32", devices)
    vector = block.hidden_size * DTYPE_BYTES["f32"]
    assert task.between({"tokens": 1}) == pytest.approx(min(read, MOST_BETWEEN), rel=0.02)
    for tokens in (64, 2048):
        most = min(read + 60 * tokens * vector, MOST_BETWEEN)
        assert min(read + 20 * tokens * vector, MOST_BETWEEN) <= task.between({"tokens": tokens}) <= most


def test_the_tokens_of_a_call_are_those_of_the_device():
    model = load_model("tiny-moe")
    block = model.moe_block()
    assert block.moe is not None

    def tokens(operator: str, **at: int) -> int:
        return Task(operator, model, block, "f32", 2).tokens(at)

    assert tokens("route", tokens=512) == 512
    assert tokens("attention_prefill", sequences=4, length=128) == 512
    assert tokens("attention_decode", sequences=4, context=128) == 4
    assert tokens("expert_ffn", ffn=128, experts=16, tokens=64) == 16 * 64 // block.moe.top_k
