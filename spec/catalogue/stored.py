"""How the parts of a model are stored: the bytes that each documented quantisation scheme gives their matrices.

What counts is what an engine holds (Transformers' and vLLM's quantised layers): weights in the scheme's bits; a float32
scale for every block, row or matrix of fp8 and int8; a scale of two bytes, and a zero point where there is one, for
every group of packed integers; one byte for a block's scale where it is an exponent (mxfp4) or fp8 (nvfp4), which has a
float32 scale of the whole matrix as well; a float32 input scale where activations are scaled by a constant. Biases,
norms, routers and embeddings keep the compute dtype; so do the modules that the scheme says it leaves alone.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..document import show
from ..errors import DocumentError
from ..model import Block
from ..quantization import Quantization, WeightFormat, read_quantization
from ..storage import PerBlock, Storage
from .modules import LayerModules, Names

KNOWN = "fp8, fbgemm_fp8, compressed-tensors, gptq, awq, mxfp4, modelopt (FP8, NVFP4, MXFP8), bitsandbytes"
# Layouts of compressed-tensors that hold one value per byte, and those that pack values.
_PER_BYTE = ("float-quantized", "int-quantized", "naive-quantized")
_PACKED = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
_HEAD_TOO = ("compressed-tensors", "modelopt")  # schemes that store the output projection unless it is listed
_LAYER = re.compile(r"(?:[\w.\-]+\.)?layers\.(\d+)(?:\.[\w.\-]*)?")


def read_storage(
    body: dict[str, Any], where: str, family: str, layers: list[Block], hf_quant_config: Mapping[str, Any] | None
) -> tuple[list[Block], Storage | None]:
    """The layers with the storage of their parts, and that of the output projection.

    Raises DocumentError, naming the scheme, where its bytes are not known.
    """
    scheme = read_scheme(body, where, hf_quant_config)
    if scheme is None:
        return layers, None
    encoder = body.get("num_layers") if family == "switch_transformers" else 0
    stored = []
    for i, block in enumerate(layers):
        modules = LayerModules(family, i, block, encoder if isinstance(encoder, int) else 0)
        stored.append(_store(block, modules, scheme.for_layer(i // 2 if family == "longcat_flash" else i)))
    return stored, scheme.head()


def read_scheme(body: dict[str, Any], where: str, hf_quant_config: Mapping[str, Any] | None = None) -> "Scheme | None":
    """The scheme of a ``config.json``, and of modelopt's file beside it; None where weights are in a plain dtype.

    Raises DocumentError, naming the scheme, where its bytes are not known.
    """
    found = read_quantization(body, hf_quant_config, where)
    if found is None or not found.weights:
        return None
    return Scheme(found, _raw(body, hf_quant_config), where)


def _raw(body: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The object that describes the scheme, for what ``Quantization`` leaves out."""
    text = body.get("text_config")
    parts = (body, text if isinstance(text, dict) else {})
    named = (part.get(key) for part in parts for key in ("quantization_config", "compression_config"))
    given = next((each for each in named if each), hf_quant_config or {})
    inner = given.get("quantization")
    return {**given, **inner} if isinstance(inner, dict) else dict(given)


def _store(block: Block, modules: LayerModules, part: Callable[[str, Names], Storage | None]) -> Block:
    """The block with the storage of its parts."""
    attention, dense, moe = block.attention, block.dense, block.moe
    if attention:
        names = modules.attention()
        own = {k: names[k] for k in attention.matrices(block.hidden_size)}
        attention = attention.model_copy(update={"storage": part("attention", own)})
    if dense:
        own = {k: modules.dense()[k] for k in dense.matrices(block.hidden_size)}
        dense = dense.model_copy(update={"storage": part("dense FFN", own)})
    if moe:
        names, last = modules.expert(0), modules.expert(moe.num_experts - 1)
        kept = ("gate", "up", "down") if moe.gated else ("up", "down")
        first = part("experts", {k: names[k] for k in kept})
        if first != part("experts", {k: last[k] for k in kept}):
            raise DocumentError(f"{modules.prefix}: some experts are quantised and others not, which is not supported")
        update = {"storage": first}
        if moe.shared_ffn_size:
            update["shared_storage"] = part("shared experts", modules.shared())
        moe = moe.model_copy(update=update)
    return block.model_copy(update={"attention": attention, "dense": dense, "moe": moe})


class Scheme:
    """One ``Quantization`` with the storage of each of its formats."""

    def __init__(self, quantization: Quantization, raw: dict[str, Any], where: str) -> None:
        self.quantization, self.raw, self.where = quantization, raw, where
        self._check()
        self.storage = {
            layout: _storage(quantization.scheme, layout, details)
            for layout, details in zip(quantization.formats, self._details(), strict=True)
        }
        own = [(pattern, _LAYER.fullmatch(pattern)) for pattern in quantization.ignored]
        self._common = tuple(pattern for pattern, layer in own if layer is None)
        self._of_layer: dict[int, list[str]] = {}
        self._last: tuple[int, Quantization] | None = None
        for pattern, layer in own:
            if layer is not None:
                self._of_layer.setdefault(int(layer[1]), []).append(pattern)

    def for_layer(self, index: int) -> Callable[[str, Names], Storage | None]:
        """Gives the storage of a part of this layer. Lists name thousands of modules: others' are left out first."""
        mine = self._of(index)
        return lambda part, names: self._part(mine, f"layer {index}: {part}", names)

    def matrix(self, index: int, names: tuple[str, ...]) -> Storage | None:
        """Storage of one linear layer of this layer, which has these names; None where it keeps the dtype."""
        layout = self._layout(self._of(index), names)
        return self.storage[layout] if layout else None

    def head(self) -> Storage | None:
        covers = self.quantization.scheme in _HEAD_TOO or self.raw.get("lm_head") is True
        layout = self._layout(self.quantization, ("lm_head", "language_model.lm_head")) if covers else None
        return self.storage[layout] if layout else None

    def _of(self, index: int) -> Quantization:
        """The scheme with what it leaves alone in this layer; kept, as its patterns are compiled once."""
        if self._last is None or self._last[0] != index:
            mine = replace(self.quantization, ignored=(*self._common, *self._of_layer.get(index, ())))
            self._last = index, mine
        return self._last[1]

    def _part(self, quantization: Quantization, part: str, names: Names) -> Storage | None:
        """One storage for the matrices of a part, naming those that are left alone."""
        layouts = {matrix: self._layout(quantization, modules) for matrix, modules in names.items()}
        found = {layout for layout in layouts.values() if layout}
        if len(found) > 1:
            formats = ", ".join(sorted(self.storage[layout].name for layout in found))
            raise self.error(f"{part}: matrices in several formats ({formats}) are not supported")
        if not found:
            return None
        plain = tuple(matrix for matrix, layout in layouts.items() if layout is None)
        return self.storage[found.pop()].model_copy(update={"plain": plain})

    def _layout(self, quantization: Quantization, modules: tuple[str, ...]) -> WeightFormat | None:
        if any(quantization.ignores(module) for module in modules):
            return None
        only = self.raw.get("modules_in_block_to_quantize")  # gptq
        if only and not any(module.endswith(f".{name}") for name in _flat(only) for module in modules):
            return None
        found = (quantization.format_of(module) for module in modules)
        return next((layout for layout in found if layout), None)

    def _check(self) -> None:
        """Refuse, by name, what would be counted wrongly."""
        quantization, raw = self.quantization, self.raw
        sparsity = raw.get("sparsity_config")
        sparse = sparsity.get("format") if isinstance(sparsity, dict) else None
        if not quantization.formats or sparse not in (None, "", "dense"):
            raise self._unknown(quantization.name)
        for layout in quantization.formats:
            known = quantization.scheme != "compressed-tensors" or layout.storage in (*_PER_BYTE, *_PACKED, "")
            if not known:
                raise self._unknown(f"{quantization.scheme} ({layout.storage})")
        for field in ("dynamic", "modules_to_convert", "quantized_layers"):
            if raw.get(field):
                raise self._unknown(f"{quantization.name} with {field}")

    def _unknown(self, name: str) -> DocumentError:
        return self.error(
            f"how many bytes weights in {name} take is not known (known: {KNOWN}); without the field, the model is "
            "planned as if its weights were in its dtype"
        )

    def error(self, rule: str) -> DocumentError:
        return DocumentError(f"{self.where}: quantization_config: {rule}")

    def _details(self) -> list[dict[str, Any]]:
        """What each format's description says beyond its layout, in their order."""
        groups = self.raw.get("config_groups")
        if self.quantization.scheme != "compressed-tensors" or not isinstance(groups, dict):
            return [self.raw] * len(self.quantization.formats)
        return [group for group in groups.values() if isinstance(group, dict) and group.get("weights") is not None]


def _storage(scheme: str, layout: WeightFormat, details: dict[str, Any]) -> Storage:
    """Bits and scales of one format; ``details``: its description in the configuration."""
    kind = {"mxfp4": "mxfp4", "nvfp4": "nvfp4"}.get(layout.storage.split("-")[0])
    whole = layout.storage in _PER_BYTE
    bits = 8 if whole else layout.bits
    name = kind or f"{'fp' if layout.type == 'float' else 'int'}{layout.bits}"
    rows, columns = layout.block or {"channel": (1, None), "tensor": (None, None)}[layout.strategy]
    scale = 8 * (4 if whole else layout.scale_bytes)
    beside = []
    if scheme == "mxfp4":
        name = "mxfp4"
    elif scheme == "modelopt" and layout.bits == 4:
        name = kind = "nvfp4"
    if scheme == "bitsandbytes":
        return _bitsandbytes(layout, details)
    beside.append(PerBlock(what="scale", bits=scale, rows=rows, columns=columns))
    if not layout.symmetric:
        beside.append(PerBlock(what="zero point", bits=bits, rows=rows, columns=columns))
    if kind == "nvfp4":
        beside.append(PerBlock(what="scale of the matrix", bits=32))
    if _constant_inputs(scheme, layout, details):
        beside.append(PerBlock(what="input scale", bits=32))
    weights = details.get("weights")
    ordered = isinstance(weights, dict) and weights.get("actorder") in ("group", True)
    if ordered or (scheme == "gptq" and details.get("desc_act") is True):
        beside.append(PerBlock(what="group of an input", bits=32, columns=1))
    return Storage(name=name, bits=bits, beside=tuple(beside))


def _constant_inputs(scheme: str, layout: WeightFormat, details: dict[str, Any]) -> bool:
    """Whether every matrix has a constant by which its input is scaled."""
    if scheme == "fp8":
        return str(details.get("activation_scheme")).lower() == "static"
    if scheme == "modelopt":
        return layout.strategy == "tensor" or layout.bits == 4
    inputs = details.get("input_activations")
    if not isinstance(inputs, dict):
        return False
    return inputs.get("dynamic") is False or layout.storage.startswith("nvfp4")


def _bitsandbytes(layout: WeightFormat, details: dict[str, Any]) -> Storage:
    """8-bit: a float32 maximum per row. 4-bit: one per 64 weights of the flat matrix, and its 16 float32 values.

    Double quantisation has these maxima in one byte, with a float32 for every 256 of them, one for all, and their own
    256 float32 values.
    """
    if layout.bits == 8:
        return Storage(name="int8", bits=8, beside=(PerBlock(what="scale", bits=32, rows=1),))
    kind = details.get("bnb_4bit_quant_type")
    name = kind if kind in ("nf4", "fp4") else "fp4"
    codes = PerBlock(what="16 values", bits=512)
    if details.get("bnb_4bit_use_double_quant") is not True:
        scales: tuple[PerBlock, ...] = (PerBlock(what="scale", bits=32, columns=64), codes)
    else:
        scales = (
            PerBlock(what="scale", bits=8, columns=64),
            PerBlock(what="scale of scales", bits=32, columns=64 * 256),
            PerBlock(what="mean of scales", bits=32),
            PerBlock(what="256 values of scales", bits=256 * 32),
            codes,
        )
    return Storage(name=name, bits=4, flat=True, beside=scales)


def _flat(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [name for item in value for name in _flat(item)] if isinstance(value, list) else [show(value)]
