"""Which tensors of a checkpoint's files each parameter of its model is made of, as transformers finds them when it loads it.

Most parameters are one tensor, under their own name, or under another where the file is of an older form (no `transformer.`
before GPT-2's names). Tied parameters may stand in the file under each of their names. Fused experts are many tensors, one or
two for each expert. What is no parameter's, such as masks and rotary frequencies that older versions stored, is an extra.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from math import prod
from pathlib import Path

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from hftcli.errors import ModelError
from hftcli.models.description import build_empty_model
from hftcli.models.tensors import StoredTensor, has_same_bytes


class Layout:
    """The layout of a full checkpoint.

    Args:
        stored: the tensors of its files.

    Attributes:
        places: by parameter, the names of its tensors.
        owners: by tensor, the parameter that it is of.
        extras: tensors that are no parameter's.
        shapes: of the parameters.

    Raises:
        ModelError: a tensor holds several parameters.
    """

    def __init__(self, folder: Path, stored: Mapping[str, StoredTensor]):
        self.folder, self.stored = folder, stored
        self.model = build_empty_model(str(folder))
        self.shapes = {name: tuple(value.shape) for name, value in self.model.named_parameters()}
        mapping = get_model_conversion_mapping(self.model)
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.converters = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        self.patterns: dict[str, str] = {}
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        targets = self._find_targets(renamings, converters)
        self.renamings_back = [entry.reverse_transform() for entry in reversed(renamings) if entry.was_used()]
        names = {id(value): name for name, value in self.model.named_parameters()}
        aliases = {name: names[id(value)] for name, value in self.model.named_parameters(remove_duplicate=False)}
        self.owners = {name: aliases[target] for name, target in targets.items() if target in aliases}
        self.extras = tuple(name for name in stored if name not in self.owners)
        found: dict[str, list[str]] = {name: [] for name in self.shapes}
        for name in sorted(self.owners, key=dot_natural_key):
            found[self.owners[name]].append(name)
        self.places = {name: tuple(tensors) for name, tensors in found.items() if tensors}

    def _find_targets(self, renamings: list[WeightRenaming], converters: list[WeightConverter]) -> dict[str, str]:
        """Where transformers' loader lays every stored tensor in; the patterns of those that it converts are noted."""
        prefix, known, targets = self.model.base_model_prefix, self.model.state_dict(), {}
        for name in self.stored:
            target, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if target not in known and name in known:
                target, pattern = rename_source_key(name, [], [], prefix, known)
            targets[name] = target
            if pattern is not None and target in known:
                self.patterns[name] = pattern
                if len(self.converters[pattern].target_patterns) > 1:
                    raise ModelError(
                        f"{self.folder}: {name} holds several parameters, which hft cannot take apart",
                        "save the model with save_pretrained(..., save_original_format=False), which keeps them apart",
                    )
        return targets

    def require(self, names: Iterable[str]) -> None:
        """Raises: ModelError: a parameter is in none of the files: transformers would fill it with random numbers."""
        if missing := [name for name in names if name not in self.places]:
            raise ModelError(f"{self.folder} lacks {len(missing)} parameters, the first is {missing[0]}")

    def check_copies(self) -> None:
        """Raises: ModelError: a parameter stands in the files more than once, and not the same each time."""
        whole = [places for name, places in self.places.items() if len(places) > 1 and not self.is_split(name)]
        for first, *others in ([self.stored[place] for place in places] for places in whole):
            for other in others:
                if other.form != first.form or not has_same_bytes(first.read_bytes(), other.read_bytes()):
                    raise ModelError(
                        f"{self.folder}: {first.name} and {other.name} are tied, and their tensors differ",
                        "set tie_word_embeddings: false in its config.json, or remove one of the two from the file",
                    )

    @property
    def num_parameters(self) -> int:
        """Weights of the model; tied ones count once."""
        return sum(map(prod, self.shapes.values()))

    def is_split(self, name: str) -> bool:
        """Whether a parameter's tensors are parts of it; else each is the whole."""
        return any(place in self.patterns for place in self.places[name])

    def join(self, name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A parameter out of its tensors; where these are of several data types, in float32.

        Raises:
            ModelError: its shape is not the model's.
        """
        dtypes = {tensor.dtype for tensor in tensors.values()}
        places = self.places[name]
        values = tensors[places[0]]
        if self.is_split(name):
            pieces = {place: tensor if len(dtypes) == 1 else tensor.float() for place, tensor in tensors.items()}
            converter = deepcopy(self.converters[self.patterns[places[0]]])
            for place in places:
                converter.add_tensor(name, place, self.patterns[place], pieces[place])
            (values,) = converter.convert(name, model=self.model, config=self.model.config).values()
            values = values[0] if isinstance(values, list) else values
        if tuple(values.shape) != self.shapes[name]:
            raise ModelError(
                f"{self.folder}: {name} is {tuple(values.shape)} in the files, and {self.shapes[name]} by config.json"
            )
        return values

    def split(self, name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of a parameter: what `join` takes.

        Raises:
            ModelError: transformers gives them other names than the file has.
        """
        if not self.is_split(name):
            return dict.fromkeys(self.places[name], values)
        converter = self.converters[self.patterns[self.places[name][0]]].reverse_transform()
        key, pattern = converter.rename_source_key(name)
        converter.add_tensor(key, name, pattern, values)
        found = {}
        for place, part in converter.convert(key, model=self.model, config=self.model.config).items():
            found[self._find_name(apply_renamings(place, self.renamings_back))] = part[0] if isinstance(part, list) else part
        if found.keys() != set(self.places[name]):
            raise ModelError(f"{self.folder}: {name} comes apart into other tensors than those of the files, as {min(found)}")
        return found

    def _find_name(self, name: str) -> str:
        """The file's name of a tensor that transformers names, which has or has not the base model's prefix."""
        prefix = self.model.base_model_prefix + "."
        names = (name, name.removeprefix(prefix), prefix + name)
        return next((candidate for candidate in names if candidate in self.stored), name)
