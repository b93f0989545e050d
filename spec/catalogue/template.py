"""A Model document to fill in, for models that neither moeplan nor Transformers reads (code that comes with a model).

It describes two kinds of layers, dense ones and such with experts, by their sizes: enough for ``models``, ``place``,
``explain``, ``compare`` and ``export``.
"""

import json
from functools import partial
from pathlib import Path
from typing import IO, Any

from ..counted import Counted
from ..errors import MoeplanError
from ..gate import Gate
from ..model import Block, Model, Moe
from ..output import write_atomically

EXPLAINED: dict[str, str] = {
    "kind": "of document: leave it",
    "version": "of the format: leave it",
    "name": "any name; placements and tables show it",
    "family": "model_type of its config.json; `export` asks the engine whether it takes this family",
    "vocab_size": "rows of the token embedding",
    "blocks": "runs of equal layers in their order; as many runs as there are, `count` layers each",
    "blocks.count": "layers of this run",
    "blocks.hidden_size": "width of what goes from layer to layer",
    "blocks.counted": "everything of one layer but its routed experts, by its size",
    "blocks.counted.made_of": "name of the layer's class, for messages",
    "blocks.counted.parameters": "values of one layer: attention or another mixer, norms, router, shared experts, "
    "dense FFN (a matrix of r outputs and c inputs has r * c)",
    "blocks.counted.cache_values": "values that one layer caches for a token: 2 * key/value heads * head size; with "
    "latent attention its rank and rotary part; 0 where it keeps a state of fixed size",
    "blocks.moe": "the routed experts of one layer; leave it out of layers that have none",
    "blocks.moe.num_experts": "routed experts of one layer, shared ones not counted",
    "blocks.moe.top_k": "routed experts that a token uses",
    "blocks.moe.ffn_size": "width inside one expert",
    "blocks.moe.gated": "true: three matrices (gate, up, down); false: two",
    "blocks.moe.bias": "true where the experts' matrices have biases",
    "blocks.moe.activation": "own: nothing here computes it",
    "blocks.moe.gate": "how a token chooses its experts",
    "blocks.moe.gate.score": "own: nothing here computes it",
    "rope_theta": "null: nothing here computes positions",
    "tie_embeddings": "true where the output projection is the embedding",
    "dtype": "bf16, f16 or f32: what the weights are stored in",
    "other_parameters": "values outside the layers beside embedding, output projection and final norm; mostly 0",
    "source": "where the numbers come from",
}
"""What each field of the template means, by its path; lists are not numbered."""


def template() -> Model:
    """An example: a dense layer and 27 with 64 experts, top-6, and attention with as many key/value heads as others."""
    hidden, ffn, dense, experts = 2048, 1408, 10944, 64
    attention, norms, cache = 4 * hidden * hidden, 2 * hidden, 2 * hidden
    rest = attention + norms + hidden * experts + 3 * hidden * 2 * ffn
    moe = Moe(
        num_experts=experts,
        top_k=6,
        ffn_size=ffn,
        gated=True,
        bias=False,
        activation="own",
        gate=Gate(score="own"),
    )
    plain = Counted(made_of="DenseLayer", parameters=attention + norms + 3 * hidden * dense, cache_values=cache)
    counted = Counted(made_of="MoeLayer", parameters=rest, cache_values=cache)
    return Model(
        name="my-model",
        family="my_model",
        vocab_size=102400,
        blocks=(
            Block(count=1, hidden_size=hidden, counted=plain),
            Block(count=27, hidden_size=hidden, counted=counted, moe=moe),
        ),
        rope_theta=None,
        tie_embeddings=False,
        dtype="bf16",
        other_parameters=0,
        source="its config.json and modeling code",
    )


def write_template(path: str | Path) -> list[tuple[str, str, str]]:
    """Write the template; returns path, value and meaning of every field, in the order of the file.

    Raises MoeplanError where there is a file already: it may have been filled in.
    """
    if Path(path).exists():
        raise MoeplanError(f"{path}: exists already: name a file that does not")
    model = template()
    body = {"kind": model.kind, "version": model.version, **model.model_dump(mode="json", exclude_unset=True)}
    text = (json.dumps(body, indent=1) + "\n").encode()
    write_atomically(path, partial(_fill, text))
    seen: dict[str, str] = {}
    _fields(body, "", seen)
    return [(name, value, EXPLAINED[name]) for name, value in seen.items()]


def _fields(body: dict[str, Any], inside: str, seen: dict[str, str]) -> None:
    """Paths of all fields with their values, those of list items once; "" for what has fields of its own."""
    for key, value in body.items():
        parts = value if isinstance(value, list) else [value]
        nested = [part for part in parts if isinstance(part, dict)]
        shown = "" if nested else json.dumps(value)
        seen[inside + key] = shown if seen.get(inside + key, shown) == shown else "..."
        for part in nested:
            _fields(part, f"{inside}{key}.", seen)


def _fill(text: bytes, file: IO[bytes]) -> None:
    file.write(text)
