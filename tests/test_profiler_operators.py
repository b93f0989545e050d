"""What a small operator is timed among."""

import pytest

from moeplan.profiler.operators import MOST_BETWEEN, Task
from moeplan.spec.catalogue import load_model
from moeplan.spec.model import DTYPE_BYTES


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("name", ["tiny-moe", "lab-moe", "mixtral", "deepseek-v2-lite"])
def test_small_operators_stand_among_the_weights_of_a_layer(name, devices):
    model = load_model(name)
    block = model.moe_block()
    attention, moe = block.attention, block.moe
    assert attention is not None
    assert moe is not None
    shared = moe.always_on_parameters(block.hidden_size) - block.hidden_size * moe.num_experts  # without the router
    routed = moe.num_experts * moe.expert_parameters(block.hidden_size) // devices
    read = (attention.parameters(block.hidden_size) + routed + shared) * DTYPE_BYTES["f32"]
    task = Task("ep_pack", model, block, "f32", devices)
    assert task.between == pytest.approx(min(read, MOST_BETWEEN), rel=0.02)
