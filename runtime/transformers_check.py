"""A checkpoint's logits beside those of Transformers, which loads, dequantises and computes by code of its own."""

import contextlib
import copy
import importlib.metadata
import importlib.util
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..spec import Model
from ..spec.quantization import Quantization
from .checkpoint import Checkpoint
from .reference import ReferenceModel
from .tensors import TensorFolder

TOKENS, TOLERANCE = 32, 1e-3  # one prompt; float32 on both sides, summed in another order
NEEDS = {"fp8": ("accelerate",), "compressed-tensors": ("compressed_tensors", "accelerate")}


class NotComparable(Exception):
    """Why Transformers cannot serve as the reference for this checkpoint; one line."""


def transformers_error(model: Model, folder: Path, quantization: Quantization | None, seed: int) -> float:
    """max |ours - theirs| / max |theirs| of the logits of a random prompt, on the CPU in float32.

    model: the first layers of the checkpoint's model, as many as are to be compared. Quantised weights are rounded to
    bf16 on both sides first: compressed-tensors multiplies in the dtype of its scales.
    Raises NotComparable.
    """
    transformers = _package(quantization)
    through = None if quantization is None or not quantization.weights else torch.bfloat16
    _refuse_ragged(folder, quantization, model)
    tokens = torch.randint(model.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
    with quietly(transformers):
        theirs = load(transformers, folder, len(model.layers), through or torch.float32, quantization)
        with torch.no_grad():
            wanted = theirs(tokens, use_cache=False).logits.float()
    del theirs
    source = Checkpoint(model, folder, torch.float32, through=through)
    got = ReferenceModel(model, source, sequences=1, capacity=TOKENS).prefill(tokens)
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    return error if math.isfinite(error) else sys.float_info.max


def version() -> str:
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _package(quantization: Quantization | None) -> Any:
    needed = ["transformers", *NEEDS.get(quantization.scheme if quantization else "", ())]
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise NotComparable(f"{package.replace('_', '-')} is not installed (pip install 'moeplan[hf]')")
    import transformers

    return transformers


def _refuse_ragged(folder: Path, quantization: Quantization | None, model: Model) -> None:
    """Transformers 5.23 stretches fp8 blocks over the rows there are, where the last one should be cut off."""
    block = (
        quantization.formats[0].block
        if quantization and quantization.scheme == "fp8" and quantization.formats
        else None
    )
    if block is None:
        return
    tensors = TensorFolder(folder)
    for name in tensors.files:
        layer = name.removeprefix("model.layers.").partition(".")[0]
        if not name.endswith("_scale_inv") or not (layer.isdigit() and int(layer) < len(model.layers)):
            continue
        rows, columns = tensors.stored(name.removesuffix("_scale_inv")).shape[-2:]
        if (rows % block[0] and rows > block[0]) or (columns % block[1] and columns > block[1]):
            raise NotComparable(
                f"{name.removesuffix('_scale_inv')} [{rows}, {columns}] does not divide into blocks of "
                f"{block[0]} x {block[1]}, which Transformers {version()} dequantises wrongly"
            )


def load(
    transformers: Any, folder: Path, layers: int | None, dtype: torch.dtype, quantization: Quantization | None
) -> Any:
    """The first ``layers`` of a checkpoint's model (None: all), in float32. Raises NotComparable."""
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = copy.deepcopy(transformers.AutoConfig.from_pretrained(folder, **local))
        if layers is not None:
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:layers]
        options = {}
        if quantization is not None and quantization.scheme == "fp8":
            options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
        elif quantization is not None and quantization.scheme == "compressed-tensors":
            options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
        loaded, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            output_loading_info=True,
            **options,
            **local,
        )
    except Exception as error:  # whatever it stumbles over: the reason goes into the report
        reason = " ".join(str(error).split())[:160]
        raise NotComparable(f"Transformers {version()} does not load it ({type(error).__name__}: {reason})") from None
    if found["missing_keys"]:
        some = ", ".join(sorted(found["missing_keys"])[:3])
        raise NotComparable(f"Transformers {version()} does not find {some}")
    for parameter in loaded.parameters():  # beside quantised weights it keeps what is stored in a wider dtype
        parameter.data = parameter.data.to(dtype).float()
    return loaded.float()  # from_pretrained leaves it in evaluation mode


@contextlib.contextmanager
def quietly(transformers: Any) -> Iterator[None]:
    """No progress bars and load reports between the run's own lines."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
