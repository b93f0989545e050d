"""Real weights of a family's model: a folder of safetensors, whose tensors Transformers' own mapping brings to modules.

A checkpoint's tensors have other names than a family's modules, and often each expert by itself. Transformers says
how they become parameters (``core_model_loading``), and does it here as in ``from_pretrained``, for one layer at a
time: the experts of a layer are in memory together, those of a device stay. No code of a checkpoint is run.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...spec import Model
from ...spec.errors import DocumentError, MoeplanError
from ..dequantise import folder_quantization
from ..embedding.part import own_part
from ..tensors import TensorFolder
from .net import STACK, Net, build
from .package import first_line, import_transformers
from .source import FamilyWeights
from .weights import fixed, materialise

if TYPE_CHECKING:
    from ..embedding.form import Form

Part = tuple[int, bool]
"""A layer, -1 outside the layers, and whether these are its routed experts."""
OUTSIDE = -1


class FamilyCheckpoint(FamilyWeights):
    """As ``FamilyWeights``, with the values of a checkpoint; every layer has storage of its own.

    model: as many layers of ``whole`` as are run. Raises MoeplanError for quantised checkpoints, DocumentError for
    files that are missing or unreadable, or that lack a tensor of the model.
    """

    def __init__(
        self, whole: Model, model: Model, folder: str | Path, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__(model, dtype, 0, torch.device(device), len(whole.layers))
        self.whole, self.folder = whole, TensorFolder(folder)
        if folder_quantization(Path(folder)) is not None:
            raise MoeplanError(
                f"{folder}: quantised, which is not read for families that Transformers computes: give plain weights"
            )
        self._transformers = import_transformers(whole.name)
        self._net = build(whole, dtype, unmodified=True)
        self._empty = dict(_tensors(self._net.model))
        self._names = {module: name for name, module in self._net.model.named_modules()}
        self._keys: dict[Part, list[str]] = {}
        self.targets = self._mapped()
        for key, (target, _) in self.targets.items():
            self._keys.setdefault(self._part(target), []).append(key)

    def check(self) -> None:
        """Raise DocumentError, naming it, for a tensor of the model that the checkpoint does not have, or otherwise."""
        found = {target for target, _ in self.targets.values()}
        named = set(self._net.model.state_dict())
        tied = {id(self._empty[target]) for target in found}
        for name in sorted(named - found):
            if id(self._empty[name]) not in tied and not self._made_beside(name):
                raise DocumentError(f"{self.folder.folder}: no tensor for {name} of {self.whole.name}")
        for key, (target, pattern) in self.targets.items():
            if pattern is None:
                self.folder.check(key, tuple(self._empty[target].shape))
        self._check_experts()

    def fill(self, net: Net) -> None:
        super().fill(net)
        for part in [key for key in self._keys if not key[1]]:
            for name, tensor in self.load(self._keys[part]).items():
                _put(net.model, name, tensor.to(self.device))
        net.model.tie_weights()

    def experts(
        self, index: int, form: "Form", experts: Sequence[int], columns: tuple[int, int], adds_bias: bool = True
    ) -> list[Tensor]:
        prefix = self._names[self._net.experts[index]]
        loaded = self.load(self._keys.get((index, True), []))
        whole = []
        for name, shape in zip(form.names, form.shapes(), strict=True):
            tensor = loaded.get(f"{prefix}.{name}")
            if tensor is None or tuple(tensor.shape) != shape:
                got = "none" if tensor is None else str(list(tensor.shape))
                raise DocumentError(f"{self.folder.folder}: {prefix}.{name}: expected {list(shape)}, got {got}")
            whole.append(tensor)
        parts = own_part(whole, form, experts, columns, adds_bias)
        # Of a layer that is kept whole a part is a view, which would keep the layer.
        return [part.to(self.device, copy=True) for part in parts]

    def _materialise(self, net: Net, modules: list[tuple[str, nn.Module]], layer: int) -> None:
        def empty(name: str, like: Tensor) -> Tensor:
            return torch.zeros(like.shape, dtype=like.dtype, device=self.device)

        materialise(net.model, modules, empty, self.device)

    def _part(self, target: str) -> Part:
        found = STACK.match(target)
        if found is None:
            return OUTSIDE, False
        index = int(found[2])
        module = self._net.experts.get(index)
        return index, module is not None and target.rpartition(".")[0] == self._names[module]

    def _check_experts(self) -> None:
        """Of each matrix as many tensors as there are experts, or one."""
        for part in [key for key in self._keys if key[1]]:
            counts = Counter(self.targets[key] for key in self._keys[part])
            for target in dict.fromkeys(target for target, _ in counts):
                found = {count for (of, _), count in counts.items() if of == target}
                if len(found) > 1 or not found <= {1, len(self._empty[target])}:
                    raise DocumentError(
                        f"{self.folder.folder}: {' and '.join(map(str, sorted(found)))} tensors for {target} of "
                        f"{len(self._empty[target])} experts"
                    )

    def _made_beside(self, name: str) -> bool:
        """Whether a converter makes this parameter from tensors that are counted for another."""
        made = {t for _, pattern in self.targets.values() if pattern for t in self._also.get(pattern, ())}
        return any(name.endswith(target.lstrip(".")) for target in made)

    def _mapped(self) -> dict[str, tuple[str, str | None]]:
        """Of every tensor that the model has a place for: its parameter's name, and the pattern that converts it."""
        from transformers.core_model_loading import WeightConverter, rename_source_key

        model = self._net.model
        renamings, converters = self._mapping()
        self._also = {
            pattern: converter.target_patterns[1:]
            for converter in converters
            if isinstance(converter, WeightConverter)
            for pattern in converter.source_patterns
        }
        found = {}
        for key in self.folder.files:
            target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, self._empty)
            if target not in self._empty and key in self._empty:
                target, pattern = key, None
            if target in self._empty:
                found[key] = (target, pattern)
        return found

    def _mapping(self) -> tuple[list[Any], list[Any]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        mapping = get_model_conversion_mapping(self._net.model)
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        return [entry for entry in mapping if entry not in converters], converters

    def load(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Parameters and buffers that these tensors become, on the CPU, by name."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        model, (renamings, converters) = self._net.model, self._mapping()
        asked = LoadStateDictConfig(dtype=self.dtype, weight_mapping=[*renamings, *converters])
        self._transformers.utils.logging.disable_progress_bar()
        try:
            said, _ = convert_and_load_state_dict_in_model(model, {key: self.folder.lazy(key) for key in keys}, asked)
        except (MoeplanError, MemoryError):
            raise
        except Exception as error:  # whatever Transformers stumbles over
            raise self._refused(first_line(error)) from None
        for name, got, wanted in said.mismatched_keys:
            raise DocumentError(f"{self.folder.folder}: {name}: expected {list(wanted)}, got {list(got)}")
        for problem in said.conversion_errors.values():
            raise self._refused(problem.strip().splitlines()[-1])
        found = {name: tensor.detach() for name, tensor in _tensors(model) if not tensor.is_meta}
        for name in found:
            _put(model, name, self._empty[name])
        return found

    def _refused(self, reason: str) -> DocumentError:
        version = self._transformers.__version__
        return DocumentError(f"{self.folder.folder}: Transformers {version} does not read it ({reason[:200]})")


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Parameters and buffers that a checkpoint may have, tied ones under all of their names."""
    kept = model.state_dict(keep_vars=True)
    return kept.items()


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Have ``tensor`` as the parameter or buffer of this name."""
    inside, _, key = name.rpartition(".")
    module = model.get_submodule(inside)
    if key in module._buffers:
        module._buffers[key] = tensor
    else:
        module._parameters[key] = tensor if isinstance(tensor, nn.Parameter) else fixed(tensor)
