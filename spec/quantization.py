"""Which scheme a checkpoint's weights are stored in: the ``quantization_config`` of a ``config.json``, as one value.

Pure: parsed JSON in, a ``Quantization`` (or None) out. Layouts as documented by Transformers (``quantization_config``),
compressed-tensors (``config_groups``), vLLM and ModelOpt (``hf_quant_config.json``). What the file of tensors really
holds is for its reader to see; a module that the scheme covers may still be stored in a plain dtype.
"""

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from .document import show
from .errors import DocumentError

Strategy = Literal["tensor", "channel", "block", "group"]
Pair = tuple[int, int]
HF_QUANT_CONFIG = "hf_quant_config.json"
_EXPERTS = "re:.*\\.experts(\\.|$)"  # experts' modules, by their usual name
MAX_PATTERN, MAX_REPEATS = 500, 4  # of a pattern of modules: a file from anywhere must not make matching take hours


@dataclass(frozen=True)
class WeightFormat:
    """How the weight [out, in] of one group of modules is stored.

    block: rows and columns that share one scale (strategies "block" and "group"), else None: "tensor" has one scale,
    "channel" one per row. symmetric: no zero points. storage: the scheme's own name of the layout, "" where it has one
    only. targets: class names ("Linear"), exact module names or "re:" patterns that this format covers.
    """

    type: Literal["float", "int"]
    bits: int
    strategy: Strategy
    block: Pair | None = None
    symmetric: bool = True
    scale_bytes: int = 4
    storage: str = ""
    targets: tuple[str, ...] = ("Linear",)

    def __str__(self) -> str:
        size = f" {self.block[0]}x{self.block[1]}" if self.block else ""
        return f"{'fp' if self.type == 'float' else 'int'}{self.bits} per {self.strategy}{size}"


@dataclass(frozen=True)
class Quantization:
    """scheme: ``quant_method`` as the field calls it ("fp8", "compressed-tensors", "mxfp4", "gptq", "modelopt", ...).

    detail: the variant where a scheme has several ("NVFP4" of modelopt, "nvfp4-pack-quantized" of compressed-tensors).
    formats: what is known of the layout; empty for schemes that are known by name only, and where nothing but
    activations or the key/value cache is quantised (``weights`` is then False).
    ignored: modules that stay in a plain dtype, in the scheme's own patterns. cache: the key/value cache has scales.
    """

    scheme: str
    detail: str = ""
    formats: tuple[WeightFormat, ...] = ()
    ignored: tuple[str, ...] = ()
    weights: bool = True
    cache: bool = False

    @property
    def name(self) -> str:
        return f"{self.scheme} ({self.detail})" if self.detail else self.scheme

    def ignores(self, module: str, kind: str = "Linear") -> bool:
        """Whether the module ("model.layers.0.mlp.experts.3.up_proj") is listed as not quantised."""
        if self.scheme == "modelopt":
            return any(fnmatch.fnmatchcase(module, p) or module.startswith(f"{p}.") for p in self.ignored)
        if self.scheme == "compressed-tensors":
            return module in self.ignored or kind in self.ignored or self._ignored_pattern.match(module) is not None
        return module.endswith(self.ignored) or self._ignored_pattern.match(module) is not None

    def format_of(self, module: str, kind: str = "Linear") -> WeightFormat | None:
        """The format of a module of this class; None where it stays in a plain dtype (or no layout is known)."""
        if self.ignores(module, kind):
            return None
        covering = (f for f in self.formats if any(_targets(target, module, kind) for target in f.targets))
        return next(covering, None)

    @cached_property
    def _ignored_pattern(self) -> re.Pattern[str]:
        """All at once, as checkpoints list hundreds. Transformers's patterns end where a part of a name ends."""
        if self.scheme == "compressed-tensors":
            return re.compile("|".join(f"(?:{p[3:]})" for p in self.ignored if p.startswith("re:")) or r"\b\B")
        return re.compile("(?:" + ("|".join(f"(?:{p})" for p in self.ignored) or r"\b\B") + r")(?:(?<=\.)|(?=\.|$))")


def _targets(target: str, module: str, kind: str) -> bool:
    """compressed-tensors: ``re:`` patterns match from the start, other names wholly, as a module's or a class's."""
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in (module, kind)


def _harmless(pattern: str) -> bool:
    """Whether a pattern compiles, also as a part of others, and takes no time: few repeats, none of a group."""
    plain = re.sub(r"\\.|\[[^\]]*\]", "x", pattern)
    repeats, special = len(re.findall(r"[*+{]", plain)), re.search(r"\)[*+{]|\(\?(?![:=!])", plain)
    if len(pattern) > MAX_PATTERN or repeats > MAX_REPEATS or special or re.search(r"\\[1-9]", pattern):
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def read_quantization(
    config: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None = None, where: str = "config.json"
) -> Quantization | None:
    """The scheme of a parsed ``config.json`` and, where the folder has one, ``hf_quant_config.json``.

    None: weights are in a plain dtype. Schemes that are not known by layout are still returned by their name.
    Raises DocumentError, naming ``where`` and the field, for a malformed configuration.
    """
    text = config.get("text_config")
    for body in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if body.get(key) is not None:
                fields = _Fields(body[key], f"{where}: {key}")
                if "expert_dtype" in body:  # DeepSeek-V4 names it beside the scheme
                    fields.body = {"expert_dtype": body["expert_dtype"], **fields.body}
                return _read(fields, hf_quant_config)
    if hf_quant_config is not None:
        return _modelopt(_Fields(hf_quant_config, where.replace("config.json", HF_QUANT_CONFIG)))
    return None


class _Fields:
    """A JSON object whose fields are read with their type checked."""

    def __init__(self, body: Any, where: str) -> None:
        if not isinstance(body, Mapping):
            raise DocumentError(f"{where}: expected an object (got {show(body)})")
        self.body, self.where = body, where

    def error(self, name: str, rule: str) -> DocumentError:
        return DocumentError(f"{self.where}: {name}: {rule} (got {show(self.body.get(name))})")

    def text(self, *names: str) -> str:
        for name in names:
            value = self.body.get(name)
            if value is not None and not isinstance(value, str):
                raise self.error(name, "expected a text")
            if value:
                return value
        return ""

    def size(self, *names: str) -> int | None:
        """A whole number from 1 (-1, "all", counts as absent)."""
        for name in names:
            value = self.body.get(name)
            if value is None or value == -1:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise self.error(name, "expected a whole number above 0")
            return value
        return None

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.body.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "expected true or false")
        return value

    def pair(self, name: str, default: Pair | None) -> Pair | None:
        """Rows and columns of a block; "128x128" was written once. Absent: ``default``; null: None."""
        value = self.body.get(name, default)
        if isinstance(value, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", value):
            value = [int(n) for n in value.split("x")]
        if value is None:
            return None
        whole = isinstance(value, (list, tuple)) and all(type(n) is int and 0 < n < 2**31 for n in value)
        if not whole or len(value) != 2:
            raise self.error(name, "expected two whole numbers above 0")
        return value[0], value[1]

    def texts(self, *names: str) -> tuple[str, ...]:
        for name in names:
            value = self.body.get(name)
            if value is None:
                continue
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise self.error(name, "expected a list of texts")
            return tuple(value)
        return ()

    def patterns(self, *names: str) -> tuple[str, ...]:
        """Names or patterns of modules."""
        for name in names:
            found = self.texts(name)
            if not all(_harmless(p.removeprefix("re:")) for p in found):
                bad = next(p for p in found if not _harmless(p.removeprefix("re:")))
                raise DocumentError(f"{self.where}: {name}: not a usable pattern of modules: {show(bad)}")
            if found:
                return found
        return ()

    def object(self, name: str) -> "_Fields | None":
        return None if self.body.get(name) is None else _Fields(self.body[name], f"{self.where}: {name}")


def _read(f: _Fields, hf_quant_config: Mapping[str, Any] | None) -> Quantization:
    method = f.text("quant_method").lower().replace("_", "-")
    if f.body.get("load_in_8bit") is True or f.body.get("load_in_4bit") is True or method == "bitsandbytes":
        return _bitsandbytes(f)
    if not method:
        if f.body.get("config_groups") is not None:
            method = "compressed-tensors"
        elif f.body.get("quant_algo") is not None or f.body.get("quantization") is not None:
            method = "modelopt"
        else:
            raise f.error("quant_method", "expected the name of the quantisation scheme")
    if method.startswith("modelopt"):
        return _modelopt(f, hf_quant_config)
    return _READERS.get(method, _by_name)(f)


def _skipped(f: _Fields) -> tuple[str, ...]:
    return f.patterns("modules_to_not_convert", "ignored_layers", "ignore")


def _by_name(f: _Fields) -> Quantization:
    return Quantization(f.text("quant_method"), ignored=_skipped(f))


def _fp8(f: _Fields) -> Quantization:
    """Transformers' default block is 128 x 128; null means one scale per tensor. Experts in fp4 have a scale for 32
    inputs (DeepSeek-V4)."""
    known = {"fmt": ("", "e4m3", "float8_e4m3fn"), "scale_fmt": ("", "float", "ue8m0")}
    known |= {"expert_dtype": ("", "fp8", "fp4")}
    detail = ", ".join(f"{name} {f.text(name)}" for name, values in known.items() if f.text(name) not in values)
    block = f.pair("weight_block_size", (128, 128))
    layout = WeightFormat("float", 8, "block" if block else "tensor", block)
    if f.text("scale_fmt") == "ue8m0":
        layout = replace(layout, scale_bytes=1)
    if f.text("expert_dtype") == "fp4":
        experts = replace(layout, bits=4, strategy="group", block=(1, 32), targets=(_EXPERTS,))
        return Quantization("fp8", detail or "expert_dtype fp4", () if detail else (experts, layout), _skipped(f))
    return Quantization("fp8", detail, () if detail else (layout,), _skipped(f))


def _mxfp4(f: _Fields) -> Quantization:
    layout = WeightFormat("float", 4, "group", (1, 32), scale_bytes=1, targets=(_EXPERTS,))
    return Quantization("mxfp4", formats=(layout,), ignored=_skipped(f))


def _fbgemm(f: _Fields) -> Quantization:
    return Quantization("fbgemm_fp8", formats=(WeightFormat("float", 8, "channel"),), ignored=_skipped(f))


def _packed_int(f: _Fields) -> Quantization:
    """gptq and awq: integers packed into int32, a float16 scale and a zero point per group of inputs."""
    bits = f.size("bits", "w_bit") or 4
    group = f.size("group_size", "q_group_size")
    layout = WeightFormat(
        "int", bits, "group" if group else "channel", (1, group) if group else None, symmetric=False, scale_bytes=2
    )
    return Quantization(f.text("quant_method"), formats=(layout,), ignored=_skipped(f))


def _bitsandbytes(f: _Fields) -> Quantization:
    ignored = f.patterns("llm_int8_skip_modules")
    if f.body.get("load_in_8bit") is True:
        return Quantization("bitsandbytes", "8-bit", (WeightFormat("int", 8, "channel"),), ignored)
    return Quantization("bitsandbytes", "4-bit", (WeightFormat("float", 4, "group", (1, 64)),), ignored)


def _compressed_tensors(f: _Fields) -> Quantization:
    groups, overall = f.object("config_groups"), f.text("format")
    formats = [] if groups is None else [_group(groups, name, overall) for name in groups.body]
    known = tuple(layout for layout in formats if layout is not None)
    ignored, cache = f.patterns("ignore"), f.body.get("kv_cache_scheme") is not None
    sparsity = f.object("sparsity_config")
    sparse = sparsity.text("format") if sparsity else ""
    for more, detail in ((sparse not in ("", "dense"), sparse), (f.body.get("transform_config"), "transform_config")):
        if more:  # weights are not what was stored times a scale
            return Quantization("compressed-tensors", detail, (), ignored, True, cache)
    detail = ", ".join(dict.fromkeys(k.storage for k in known if k.storage))
    return Quantization("compressed-tensors", detail, known, ignored, bool(known), cache)


def _group(groups: _Fields, name: str, overall: str) -> WeightFormat | None:
    """One of ``config_groups``; None where it leaves the weights alone. A preset's name is refused by the reader."""
    if isinstance(groups.body[name], list):
        return WeightFormat("float", 16, "tensor", storage=f"preset {name}", targets=groups.patterns(name))
    group = groups.object(name)
    weights = group.object("weights") if group else None
    if group is None or weights is None:
        return None
    size, kind = weights.size("group_size"), weights.text("type").lower() or "int"
    if kind not in ("int", "float"):
        raise weights.error("type", "expected int or float")
    strategy = weights.text("strategy").lower() or ("group" if size else "tensor")
    if weights.body.get("strategy") is None and weights.body.get("group_size") == -1:
        strategy = "channel"
    storage = group.text("format") or overall
    block: Pair | None = None
    if strategy == "block":
        block = weights.pair("block_structure", None)
        if block is None:
            raise weights.error("block_structure", "expected two whole numbers above 0")
    elif strategy in ("group", "tensor_group"):
        if size is None:
            raise weights.error("group_size", "expected a whole number above 0")
        block, strategy = (1, size), "group"
    elif strategy not in ("tensor", "channel"):
        raise weights.error("strategy", "expected tensor, channel, block or group")
    return WeightFormat(
        "float" if kind == "float" else "int",
        weights.size("num_bits") or 8,
        strategy,  # type: ignore[arg-type]
        block,
        symmetric=weights.flag("symmetric", default=True),
        scale_bytes=1 if storage.startswith(("nvfp4", "mxfp")) else 2,
        storage=storage,
        targets=group.patterns("targets") or ("Linear",),
    )


_MODELOPT = {
    "FP8": WeightFormat("float", 8, "tensor"),
    "FP8_PER_CHANNEL_PER_TOKEN": WeightFormat("float", 8, "channel"),
    "FP8_PB_WO": WeightFormat("float", 8, "block", (128, 128)),
    "NVFP4": WeightFormat("float", 4, "group", (1, 16), scale_bytes=1),
    "MXFP8": WeightFormat("float", 8, "group", (1, 32), scale_bytes=1),
}


def _modelopt(f: _Fields, hf_quant_config: Mapping[str, Any] | None = None) -> Quantization:
    """ModelOpt writes the same to ``hf_quant_config.json`` (under ``quantization``) and, lately, ``config.json``."""
    inner = f.object("quantization") or f
    algorithm = inner.text("quant_algo").upper()
    if not algorithm and hf_quant_config is not None:
        return _modelopt(_Fields(hf_quant_config, HF_QUANT_CONFIG))
    layout = _MODELOPT.get(algorithm)
    size = inner.size("group_size")
    if layout is not None and layout.strategy == "group" and size:
        layout = replace(layout, block=(1, size))
    ignored = inner.texts("exclude_modules", "ignore")  # wildcards, not regular expressions
    cache = bool(inner.text("kv_cache_quant_algo")) or inner.body.get("kv_cache_scheme") is not None
    return Quantization("modelopt", algorithm, (layout,) if layout else (), ignored, algorithm != "", cache)


_READERS = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "fbgemm-fp8": _fbgemm,
    "gptq": _packed_int,
    "awq": _packed_int,
    "compressed-tensors": _compressed_tensors,
}
