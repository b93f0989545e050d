"""Weights, caches and attention do not depend on how devices divide them; files that are wrong are named."""

import json
import struct
from dataclasses import fields, is_dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeplan.runtime.attention import Batch, RotaryEmbedding, attention
from moeplan.runtime.cache import KVCache
from moeplan.runtime.checkpoint import Checkpoint
from moeplan.runtime.kernels import expert_ffn
from moeplan.runtime.norms import rms_norm
from moeplan.runtime.random_weights import RandomWeights, random_tensor
from moeplan.runtime.router import choose
from moeplan.runtime.weights import check_supported
from moeplan.spec import Model, MoeplanError
from moeplan.spec.catalogue import catalogue
from moeplan.spec.errors import DocumentError
from moeplan.spec.model import Attention, Block, Dense, Gate, Moe

torch.set_num_threads(1)
F32 = torch.float32


def make_model(qk_norm="none", bias=False, family="olmoe", layers=4, **moe) -> Model:
    a = Attention(heads=8, kv_heads=4, head_dim=8, qk_norm=qk_norm, bias=bias)
    m = Moe(**{"num_experts": 6, "top_k": 2, "ffn_size": 20, "gate": Gate(normalize=False), **moe})
    return Model(
        name="test",
        family=family,
        vocab_size=50,
        blocks=(Block(count=layers, hidden_size=32, attention=a, moe=m),),
    )


def with_blocks(*blocks: Block) -> Model:
    return Model(name="test", family="olmoe", vocab_size=50, blocks=blocks)


def tensors(weights) -> dict[str, torch.Tensor]:
    """Every tensor of a tree of dataclasses by its path."""
    found = {}
    for f in fields(weights):
        value = getattr(weights, f.name)
        if isinstance(value, torch.Tensor):
            found[f.name] = value
        elif is_dataclass(value):
            found |= {f"{f.name}.{name}": t for name, t in tensors(value).items()}
    return found


def write_olmoe(model: Model, folder) -> None:
    """A checkpoint under the names that Transformers writes, with one bf16 tensor among float32 ones."""
    g = torch.Generator().manual_seed(0)
    a, m, d = model.layers[0].attention, model.layers[0].moe, 32
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    shapes = {"model.embed_tokens.weight": (50, d), "lm_head.weight": (50, d), "model.norm.weight": (d,)}
    for i in range(len(model.layers)):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (d,), p + "post_attention_layernorm.weight": (d,)}
        shapes |= {p + f"self_attn.{n}_proj.weight": (s, d) for n, s in (("q", q), ("k", kv), ("v", kv))}
        shapes |= {p + "self_attn.o_proj.weight": (d, q), p + "mlp.gate.weight": (m.num_experts, d)}
        shapes |= {p + "self_attn.q_norm.weight": (q,), p + "self_attn.k_norm.weight": (kv,)}
        for e in range(m.num_experts):
            shapes |= {p + f"mlp.experts.{e}.{n}_proj.weight": (m.ffn_size, d) for n in ("gate", "up")}
            shapes[p + f"mlp.experts.{e}.down_proj.weight"] = (d, m.ffn_size)
    values = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    values["model.norm.weight"] = values["model.norm.weight"].bfloat16()
    save_file(values, folder / "model.safetensors")


@pytest.fixture(params=["random", "checkpoint"])
def source(request, tmp_path):
    model = make_model("full")
    if request.param == "random":
        return RandomWeights(model, F32, seed=1)
    write_olmoe(model, tmp_path)
    return Checkpoint(model, tmp_path, F32)


def test_a_part_is_a_slice_of_the_whole(source):
    whole = source.layer(1)
    part = source.layer(1, experts=[4, 1], columns=(5, 12), heads=(4, 8))
    assert torch.equal(part.gate_up, whole.gate_up[[4, 1], :, 5:12])
    assert torch.equal(part.down, whole.down[[4, 1], :, 5:12])
    assert torch.equal(part.router.weight, whole.router.weight)
    got, want = part.attention, whole.attention
    q, k, v = want.qkv.split([64, 32, 32])
    assert torch.equal(got.qkv, torch.cat([q[32:], k[16:], v[16:]]))
    assert torch.equal(got.q_norm, want.q_norm[32:])
    assert torch.equal(got.k_norm, want.k_norm[16:])
    assert torch.equal(got.out, want.out[:, 32:])
    assert source.layer(1, experts=[]).gate_up.shape == (0, 2, 20, 32)
    assert source.layer(1, columns=(7, 7)).down.shape == (6, 32, 0)
    assert all(t.is_contiguous() for t in tensors(part).values())


def test_heads_of_a_group_add_up(source):
    """Attention with divided heads, also with queries and keys normalised over all of them."""
    x, rope, batch = torch.randn(6, 32), RotaryEmbedding(10000.0), Batch(2, 3)
    want = attention(x, source.layer(0).attention, None, rope, batch)
    halves = [source.layer(0, heads=heads).attention for heads in ((0, 4), (4, 8))]
    squares = []

    def record(part):
        squares.append(part)
        return part

    for half in halves:
        attention(x, half, None, rope, batch, sum_over_group=record)
    total = squares[0] + squares[1]
    got = sum(attention(x, half, None, rope, batch, sum_over_group=lambda _: total) for half in halves)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(MoeplanError, match="sum_over_group: needed"):
        attention(x, halves[0], None, rope, batch)
    with pytest.raises(MoeplanError, match=r"heads 0\.\.3 of 8 do not divide 4 key/value heads evenly"):
        source.layer(0, heads=(0, 3))


def test_biases_of_divided_heads_are_added_once():
    source = RandomWeights(make_model(bias=True), F32)
    x, batch = torch.randn(4, 32), Batch(1, 4)
    parts = [attention(x, source.layer(0, heads=heads).attention, None, None, batch) for heads in ((0, 4), (4, 8))]
    torch.testing.assert_close(sum(parts), attention(x, source.layer(0).attention, None, None, batch))


def test_columns_of_the_devices_add_up(source):
    x, ids = torch.randn(7, 32), torch.randint(6, (7, 2))
    gates = torch.rand(7, 2)
    whole, *parts = (source.layer(2, columns=c) for c in (None, (0, 3), (3, 3), (3, 20)))
    y = [expert_ffn(x, w.gate_up, w.down, ids, gates, activation="silu") for w in (whole, *parts)]
    torch.testing.assert_close(y[1] + y[2] + y[3], y[0], rtol=1e-4, atol=1e-5)


def test_random_weights_differ_where_they_should_and_nowhere_else():
    model = make_model(shared_ffn_size=12, shared_gate=True)
    one, two = RandomWeights(model, F32, seed=1), RandomWeights(model, F32, seed=1)
    for name, t in tensors(one.layer(0)).items():
        assert torch.equal(t, tensors(two.layer(0))[name])
        assert not torch.equal(t, tensors(one.layer(1))[name]), name
        assert not torch.equal(t, tensors(RandomWeights(model, F32, seed=2).layer(0))[name]), name
    experts = one.layer(0).gate_up
    assert not torch.equal(experts[0], experts[1])
    for name, t in tensors(RandomWeights(model, torch.bfloat16, seed=1).layer(0)).items():
        if "norm" not in name:
            assert torch.equal(t.float(), tensors(one.layer(0))[name]), name


def test_random_values_have_the_scale_of_their_fan_in():
    out = random_tensor(torch.empty(100_000), 0, 0, "x", fan_in=1024)
    assert 0.7 < out.std() * 32 < 1.42  # rounded to a power of two
    assert abs(out.mean()) * 32 < 0.02
    assert (out != 0).all()


def test_layers_share_storage():
    source = RandomWeights(make_model(layers=5), F32, stored_layers=2)
    layers = [source.layer(i, experts=[0, 3]) for i in range(5)]
    assert [layer is layers[i % 2] for i, layer in enumerate(layers)] == [True] * 5
    assert layers[0] is not layers[1]
    mixed = with_blocks(Block(hidden_size=32, dense=Dense(ffn_size=8)), *make_model().blocks)
    with pytest.raises(MoeplanError, match="stored_layers: 2 makes layer 2 share storage with layer 0"):
        RandomWeights(mixed, F32, stored_layers=2)


def test_cache_contents_do_not_depend_on_the_layout():
    model = make_model(layers=2)
    whole = KVCache(model, (0, 5), 9, F32, torch.device("cpu"))
    whole.fill(6, seed=4)
    part = KVCache(model, (2, 4), 12, F32, torch.device("cpu"), heads=(4, 8))
    part.fill(6, seed=4)
    for a, b in zip(whole.layers, part.layers, strict=True):
        assert torch.equal(b.keys[:, :, :6], a.keys[2:4, 2:, :6])
        assert torch.equal(b.values[:, :, :6], a.values[2:4, 2:, :6])
        assert not a.keys[:, :, 6:].any()
    first = whole.layers[0]
    different = [first.keys[0, 0, :6], first.keys[0, 1, :6], first.keys[1, 0, :6], first.values[0, 0, :6]]
    different.append(whole.layers[1].keys[0, 0, :6])
    assert all(not torch.equal(different[i], different[j]) for i in range(5) for j in range(i))
    longer = KVCache(model, (0, 1), 9, F32, torch.device("cpu"))
    longer.fill(8, seed=4)
    assert torch.equal(longer.layers[0].keys[0, :, :6], first.keys[0, :, :6])


def test_decode_against_the_cache_equals_plain_attention():
    """Grouped heads, window or none, against a softmax written out."""
    g = torch.Generator().manual_seed(0)
    for window in (None, 3):
        block = make_model().blocks[0]
        spec = block.attention.model_copy(update={"sliding_window": window})
        model = with_blocks(block.model_copy(update={"attention": spec}))
        weights = RandomWeights(model, F32).layer(0).attention
        cache = KVCache(model, (0, 2), 8, F32, torch.device("cpu"))
        cache.fill(5, seed=1)
        x = torch.randn(2, 32, generator=g)
        got = attention(x, weights, cache.layers[0], None, Batch(2, 1, 5))
        q = (rms_norm(x, weights.norm, weights.eps) @ weights.qkv[:64].T).view(2, 8, 8)
        keys, values = (t[:, :, :6].repeat_interleave(2, 1) for t in (cache.layers[0].keys, cache.layers[0].values))
        scores = torch.einsum("shd,shnd->shn", q, keys) / 8**0.5
        scores[:, :, : 6 - (window or 6)] = float("-inf")
        mixed = torch.einsum("shn,shnd->shd", scores.softmax(-1), values)
        torch.testing.assert_close(got, mixed.reshape(2, 64) @ weights.out.T, rtol=1e-4, atol=1e-5)


def test_attention_arguments_are_checked():
    weights = RandomWeights(make_model(), F32).layer(0).attention
    with pytest.raises(MoeplanError, match="x: expected 4 tokens, got 3"):
        attention(torch.randn(3, 32), weights, None, None, Batch(2, 2))
    with pytest.raises(MoeplanError, match="cache: expected one for 5 tokens of context, got none"):
        attention(torch.randn(2, 32), weights, None, None, Batch(2, 1, 5))
    assert attention(torch.empty(0, 32), weights, None, None, Batch(0, 1)).shape == (0, 32)


def test_routers():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    soft = logits.softmax(-1)
    ids, gates = choose(logits, Gate(normalize=False), 2)
    assert ids.tolist() == [[0, 1]]
    torch.testing.assert_close(gates, soft[:, :2])
    normalised = choose(logits, Gate(scale=3.0), 2)[1]
    torch.testing.assert_close(normalised, 3 * soft[:, :2] / soft[:, :2].sum())
    torch.testing.assert_close(choose(logits, Gate(score="softmax_topk"), 2)[1], soft[:, :2] / soft[:, :2].sum())
    # The correction bias enters the choice, not the weight.
    gate = Gate(score="sigmoid", normalize=False, correction_bias=True)
    ids, gates = choose(logits, gate, 2, torch.tensor([0.0, 0.0, 0.0, 9.0]))
    assert ids.tolist() == [[3, 0]]
    torch.testing.assert_close(gates, torch.tensor([[-1.0, 2.0]]).sigmoid())
    # Groups {0, 1} and {2, 3}: softmax ranks a group by its best expert, sigmoid by the sum of its best two.
    logits = torch.tensor([[3.0, -9.0, 2.9, 2.8]])
    assert choose(logits, Gate(groups=2), 2)[0].tolist() == [[0, 1]]
    assert choose(logits, Gate(groups=2, score="sigmoid"), 2)[0].tolist() == [[2, 3]]


def test_what_the_runtime_does_not_execute_is_named():
    expected = {
        "mixtral": "",
        "qwen3-30b-a3b": "",
        "olmoe": "",
        "deepseek-v3": "mla attention",
        "gpt-oss-20b": "attention sinks",
        "switch-base-8": "non-causal models",
        "gpt-moe-8": "biases in the FFN",
    }
    models = catalogue()
    for name, missing in expected.items():
        if not missing:
            check_supported(models[name])
            continue
        with pytest.raises(MoeplanError, match=f"{name}: layer 0: the runtime does not execute {missing}"):
            RandomWeights(models[name], F32)
    block = make_model().layers[0]
    details = {
        "a shortcut from inside a layer that has experts": {"shortcut": "mid"},
        "a dense FFN beside the experts": {"dense": Dense(ffn_size=8)},
        "window attention": {"attention": Attention(kind="window", heads=1, kv_heads=1, head_dim=8)},
        "cross-attention": {"attention": Attention(heads=1, kv_heads=1, head_dim=8, cross=True)},
        "the clamped SwiGLU": {"moe": block.moe.model_copy(update={"activation": "swiglu_clamped"})},
        "group-limited routing with identity experts": {
            "moe": block.moe.model_copy(
                update={"zero_experts": 2, "gate": block.moe.gate.model_copy(update={"groups": 2})}
            )
        },
        "hidden sizes that change": {"hidden_size": 64},
    }
    for missing, update in details.items():
        with pytest.raises(MoeplanError, match=f"test: layer 1: the runtime does not execute {missing}"):
            check_supported(with_blocks(block, block.model_copy(update=update)))


def test_wrong_checkpoints_are_named(tmp_path):
    model = make_model("full", layers=1)
    with pytest.raises(DocumentError, match="holds neither"):
        Checkpoint(model, tmp_path, F32)
    with pytest.raises(MoeplanError, match="weights of family 'other' cannot be read"):
        Checkpoint(make_model(family="other"), tmp_path, F32)
    write_olmoe(model, tmp_path)
    file = tmp_path / "model.safetensors"
    values = load_file(file)
    wider = make_model("full", layers=1, ffn_size=21)
    with pytest.raises(DocumentError, match=r"gate_proj.weight: expected shape \[21, 32\], got \[20, 32\]"):
        Checkpoint(wider, tmp_path, F32).layer(0)
    del values["lm_head.weight"]
    save_file(values, file)
    with pytest.raises(DocumentError, match=r"tensor lm_head\.weight is missing"):
        Checkpoint(model, tmp_path, F32).head()
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(DocumentError, match="weights are not readable"):
        Checkpoint(model, tmp_path, F32)
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(DocumentError, match="weights are not readable"):
        Checkpoint(model, tmp_path, F32)


def test_an_index_opens_nothing_outside_its_folder(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for file in ("../secret.safetensors", "/etc/passwd", "weights.bin", 7):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
        with pytest.raises(DocumentError):
            Checkpoint(make_model(), tmp_path, F32)
    index.write_text('{"weight_map": [1]}')
    with pytest.raises(DocumentError, match="not readable"):
        Checkpoint(make_model(), tmp_path, F32)
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "absent.safetensors"}}))
    with pytest.raises(DocumentError, match="not a readable safetensors file"):
        Checkpoint(make_model(), tmp_path, F32).head()
