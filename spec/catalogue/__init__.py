"""The model catalogue: published models by name, or any supported Hugging Face configuration by path."""

import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

from ..document import parse_object, read_text, show
from ..errors import MoeplanError
from ..executed import not_executed
from ..model import Model
from ..quantization import HF_QUANT_CONFIG
from ..readers import others
from .huggingface import READERS, read_config
from .papers import gpt_moe, swin_moe
from .published import PUBLISHED

__all__ = ["catalogue", "catalogue_rows", "load_model"]


class CatalogueRow(TypedDict):
    """One line of `moeplan models`; what differs between layers is that of the first one with experts."""

    name: str
    family: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    hidden: int
    expert_ffn: int
    total_parameters: int
    active_parameters: int
    expert_bytes: int
    expert_format: str
    weight_bytes: int
    dtype: str
    not_executed: str


def catalogue() -> dict[str, Model]:
    """Every model of the catalogue by name."""
    return dict(_catalogue())


@cache
def _catalogue() -> dict[str, Model]:
    models = [read_config(body, f"catalogue: {name}", name, source) for name, (source, body) in PUBLISHED.items()]
    models += [gpt_moe(experts) for experts in (8, 16, 32, 64)]
    models += [swin_moe(size) for size in ("small", "base")]
    return {model.name: model for model in models}


def catalogue_rows(names: Sequence[str] = ()) -> list[CatalogueRow]:
    """The rows of `moeplan models`, of the catalogue (smallest model first) or of these names and paths, as given.

    Bytes are as the weights are stored: ``expert_format``, scales included, or the model's dtype. ``not_executed``:
    what keeps moeplan's runtime from executing it, if anything.
    """
    rows = []
    for model in map(load_model, names) if names else sorted(catalogue().values(), key=Model.total_parameters):
        block = model.moe_block()
        assert block.moe is not None
        rows.append(
            CatalogueRow(
                name=model.name,
                family=model.family,
                layers=len(model.layers),
                moe_layers=len(model.moe_layers),
                experts=block.moe.num_experts,
                top_k=block.moe.top_k,
                hidden=block.hidden_size,
                expert_ffn=block.moe.ffn_size,
                total_parameters=model.total_parameters(),
                active_parameters=model.active_parameters(),
                expert_bytes=model.expert_bytes(),
                expert_format=block.moe.storage.name if block.moe.storage else model.dtype,
                weight_bytes=model.weight_bytes(),
                dtype=model.dtype,
                not_executed=not_executed(model),
            )
        )
    return rows


def load_model(name_or_path: str) -> Model:
    """A model by catalogue name (any case), or from a path.

    A path is a Hugging Face ``config.json``, a folder that holds one, or a Model document of moeplan. A catalogue name
    wins over a folder of the same name; ``./mixtral`` means the folder. Raises MoeplanError in one line.
    """
    name = name_or_path.strip().lower()
    if name in catalogue():
        return catalogue()[name]
    path = Path(name_or_path)
    try:
        if name and path.is_dir():
            path = path / "config.json"
        if path.is_file() or path.suffix == ".json":
            return _read(path)
    except OSError as error:  # such as a name that is too long for a file
        raise MoeplanError(f"model {show(name_or_path)}: {error.strerror}") from None
    near = difflib.get_close_matches(name, catalogue(), n=3, cutoff=0.5)
    nearest = f"nearest: {', '.join(near)}" if near else "`moeplan models` lists the names"
    raise MoeplanError(
        f"model {show(name_or_path)}: unknown; {nearest}; or give the path of a Hugging Face config.json"
    )


def _read(path: Path) -> Model:
    text = read_text(path)
    body = parse_object(text, str(path))
    if "kind" in body:
        return Model.parse(text, str(path))
    whole = path.name == "config.json"
    name = (path.resolve().parent.name if whole else path.stem) or "model"
    modelopt = _modelopt(path) if whole else None
    if others and isinstance(family := body.get("model_type"), str) and family not in READERS:
        stored = {} if modelopt is None else {"quantization_config": modelopt}
        return others[0](body | stored, str(path), name, path.name)
    return read_config(body, str(path), name, path.name, modelopt)


def _modelopt(path: Path) -> dict[str, Any] | None:
    """Content of modelopt's file beside a ``config.json``, where there is one."""
    beside = path.with_name(HF_QUANT_CONFIG)
    return parse_object(read_text(beside), str(beside)) if beside.exists() else None
