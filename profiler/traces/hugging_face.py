"""A Transformers model and a text from local files: nothing is downloaded, no foreign code is run."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...spec import Model, MoeplanError
from ...spec.claims import check_unclaimed
from ...spec.files import read_bytes, read_text
from ..devices import memory_available

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
READ = {".json", ".safetensors", ".model", ".txt", ".jinja"}  # what Transformers may open in a model's folder
MAX_TEXT_BYTES = 2 * 2**30


def import_transformers() -> ModuleType:
    """Transformers, silenced; an extra of moeplan."""
    try:
        import transformers
    except ImportError:
        raise MoeplanError("capturing a trace and tokenizing need Transformers: pip install 'moeplan[hf]'") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def locate(path: Path, random_weights: bool) -> tuple[Path, Path]:
    """Folder and config.json of a model."""
    config = path / "config.json" if path.is_dir() else path
    if not config.is_file():
        raise MoeplanError(f"{config}: no such file; give a local model folder or a Hugging Face config.json")
    if not random_weights and not list(config.parent.glob("*.safetensors")):
        raise MoeplanError(
            f"{config.parent}: holds no *.safetensors; ask for random weights, or give the model's folder"
        )
    for file in config.parent.iterdir():
        if file.suffix in READ and file.is_file():
            check_unclaimed(file, file.stat())
    return config.parent, config


def read_config(transformers: ModuleType, path: Path) -> Any:
    """The configuration, of a type that this Transformers knows."""
    try:
        body = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise MoeplanError(f"{path}: not readable as JSON ({error})") from None
    kind = body.get("model_type") if isinstance(body, dict) else None
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise MoeplanError(f"{path}: model_type: {kind!r} is none that Transformers {transformers.__version__} knows")
    try:
        return transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise MoeplanError(f"{path}: Transformers refuses it ({_first_line(error)})") from None


def read_sequences(
    folder: Path, vocabulary: int, text: Path, tokens: int, length: int, seed: int
) -> tuple[list[Tensor], str]:
    """A seeded choice of the text's consecutive pieces, in the text's order, as int64 [length]; and how it was read."""
    ids, first, how = _tokenize(folder, text, vocabulary)
    if len(ids) and int(ids.max()) >= vocabulary:
        raise MoeplanError(f"{folder}: its tokenizer gives token {int(ids.max())}, vocab_size is {vocabulary}")
    first = first if length > 1 else []
    count, step = -(-tokens // length), length - len(first)
    pieces = len(ids) // step
    if pieces < count:
        raise MoeplanError(
            f"{text}: {len(ids)} tokens give {pieces} sequences of {length}, {count} are needed: "
            "give a longer text or ask for fewer tokens"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(pieces)[:count])
    body = ids[: pieces * step].view(pieces, step)[torch.from_numpy(chosen)]
    rows = list(torch.cat([torch.tensor(first, dtype=torch.long).expand(count, -1), body], dim=1))
    rows[-1] = rows[-1][: tokens - (count - 1) * length]
    return rows, how


def _tokenize(folder: Path, text: Path, vocabulary: int) -> tuple[Tensor, list[int], str]:
    """Token ids of a text, int64; the tokens that a sequence begins with; and what made them."""
    raw = read_bytes(text, MAX_TEXT_BYTES)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if vocabulary < 256:
            raise MoeplanError(f"{folder}: has no tokenizer, and vocab_size {vocabulary} is too small for bytes (256)")
        return torch.from_numpy(np.frombuffer(raw, np.uint8).astype(np.int64)), [], "bytes (no tokenizer)"
    transformers = import_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        ids = tokenizer(raw.decode("utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
        # A model that was trained with a first token routes oddly without it.
        begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    except UnicodeDecodeError:
        raise MoeplanError(f"{text}: not UTF-8 text, which the model's tokenizer needs") from None
    except Exception as error:
        raise MoeplanError(f"{folder}: its tokenizer does not work ({_first_line(error)})") from None
    first = [tokenizer.bos_token_id] if begins else []
    return torch.tensor(ids, dtype=torch.long), first, f"{type(tokenizer).__name__} tokens"


def read_prompts(folder: Path, model: Model, text: Path, sequences: int, length: int, seed: int) -> list[list[int]]:
    """Tokens [sequences, length] of a text, as the tokenizer of the model's folder gives them, or its bytes."""
    rows, _ = read_sequences(folder, model.vocab_size, text, sequences * length, length, seed)
    return [row.tolist() for row in rows]


def load_model(
    transformers: ModuleType,
    folder: Path,
    config: Any,
    config_path: Path,
    random_weights: bool,
    seed: int,
    device: str,
) -> torch.nn.Module:
    """The causal language model, in the dtype that its configuration states; refused where it cannot fit."""
    auto = transformers.AutoModelForCausalLM
    try:
        with torch.device("meta"):
            skeleton = auto.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise MoeplanError(f"{config_path}: is no causal language model that loads ({_first_line(error)})") from None
    needed = sum(p.numel() * p.element_size() for p in skeleton.parameters())
    available = _available(device)
    if needed > available:
        raise MoeplanError(
            f"{config_path}: {needed / 2**30:.1f} GiB of weights do not fit in the {available / 2**30:.1f} GiB "
            f"available on {device}: give a config.json with fewer layers"
        )
    missing: set[str] = set()
    try:
        if random_weights:
            torch.manual_seed(seed)
            net = auto.from_config(config, trust_remote_code=False)
        else:
            local = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
            net, report = auto.from_pretrained(folder, config=config, dtype="auto", output_loading_info=True, **local)
            missing = set(report["missing_keys"])
    except Exception as error:
        raise MoeplanError(f"{folder}: its weights do not load ({_first_line(error)})") from None
    if missing:
        raise MoeplanError(f"{folder}: its safetensors lack {len(missing)} tensors, the first {min(missing)}")
    return net.eval().to(device)


def _available(device: str) -> int:
    """Bytes of memory for weights."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MoeplanError(f"device {device!r} cannot be used: {_first_line(error)}") from None
    return memory_available(torch.device(device), ranks_on_host=1)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
