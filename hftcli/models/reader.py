"""A checkpoint, full or delta, read by parameter, one at a time: values, and the bytes that its files have or would have."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from hftcli.errors import InputError, ModelError
from hftcli.freezing.held import Held
from hftcli.models.deltas import ROWS_SUFFIX, WEIGHTS_NAME, open_stack
from hftcli.models.description import split_revision
from hftcli.models.layout import Layout
from hftcli.models.masters import open_masters
from hftcli.models.tensors import CODES, DTYPES, Form, get_bytes, list_file, list_tensors
from hftcli.recipe.sections import ModelSection
from hftcli.runs.masters import MastersState

FLOATS = ("F32", "BF16", "F16")  # data types that float32 holds exactly


class CheckpointReader:
    """Tensors of a checkpoint.

    Args:
        names: parameters that it must have.
        base: for a delta: see `open_stack`.

    Attributes:
        layout: of the full checkpoint at the root.
        dtypes: the data type of every tensor, as the files of the full checkpoint name it.

    Raises:
        ModelError: a file is damaged, a parameter is in none, or a delta's base is not the one that it was made on.
    """

    def __init__(self, folder: Path, names: tuple[str, ...], base: Path | None = None):
        self.stack = open_stack(folder, base)
        self.stored = list_tensors(self.stack.root)
        self.layers = [list_file(delta.folder / WEIGHTS_NAME) for delta in self.stack.deltas]
        for delta, layer in zip(self.stack.deltas, self.layers, strict=True):
            expected = {*delta.record.tensors, *(name + ROWS_SUFFIX for name in delta.record.rows)}
            if odd := sorted(set(layer) ^ expected):
                raise ModelError(f"{delta.folder} is damaged: its delta.json and its weights differ in {odd[0]}")
        self.layout = Layout(self.stack.root, self.stored)
        self.layout.require(names)
        self.dtypes = {place: self._find_dtype(place) for place in self.stored}

    def _find_dtype(self, place: str) -> str:
        dtype, owner = self.stored[place].dtype, self.layout.owners.get(place)
        if owner is None:
            return dtype
        for delta, layer in zip(self.stack.deltas, self.layers, strict=True):
            if delta.dtype is not None:
                dtype = CODES[delta.dtype]
            if owner in layer and not self.layout.is_split(owner):
                dtype = layer[owner].dtype
        return dtype

    def read(self, name: str) -> torch.Tensor:
        """A parameter's values."""
        return self._read_at(name, len(self.stack.deltas))

    def _read_at(self, name: str, place: int) -> torch.Tensor:
        """A parameter as it is with that many deltas on the root."""
        if place == 0:
            return self.layout.join(name, {tensor: self.stored[tensor].read() for tensor in self.layout.places[name]})
        delta, layer = self.stack.deltas[place - 1], self.layers[place - 1]
        if name in delta.record.rows:
            rows = layer[name].read()
            values = convert(self._read_at(name, place - 1), rows.dtype).clone()
            values[layer[name + ROWS_SUFFIX].read()] = rows
            return values
        if name in layer:
            return layer[name].read()
        values = self._read_at(name, place - 1)
        return values if delta.dtype is None else convert(values, delta.dtype)

    def is_changed(self, name: str) -> bool:
        """Whether a delta holds something of a parameter, or converts it, be it only on the way."""
        dtypes = {self.stored[place].dtype for place in self.layout.places[name]}
        is_converted = any(dtypes != {CODES[delta.dtype]} for delta in self.stack.deltas if delta.dtype is not None)
        return is_converted or any(name in layer for layer in self.layers)

    def read_tensors(self, name: str) -> dict[str, np.ndarray]:
        """The bytes of a parameter's tensors, by their names: mapped from the files where no delta changes them."""
        if not self.is_changed(name):
            return {place: self.stored[place].read_bytes() for place in self.layout.places[name]}
        return cast_tensors(self.layout, name, self.read(name), self.dtypes)

    def read_extra(self, place: str) -> np.ndarray:
        """The bytes of a tensor that is no parameter's."""
        return self.stored[place].read_bytes()


class Start:
    """What a round starts from: a checkpoint whose tensors count as they are stored or, by `model.dtype`, as converted once.

    Attributes:
        dtype: what every parameter is converted to; None leaves each tensor its own data type.
        dtypes: the data type in which every tensor counts and is saved, as files name it.
        masters: by parameter, the float32 values that the files are the rounding of, where they lie beside the checkpoint.
        masters_state: whether they do, and are taken.

    Raises:
        ModelError: see `CheckpointReader`, `check_copies` and `open_masters`; or a data type would not survive.
    """

    def __init__(self, section: ModelSection, folder: Path, names: tuple[str, ...]):
        self.folder = folder
        self.reader = CheckpointReader(folder, names)
        self.layout = self.reader.layout
        self.layout.check_copies()
        self.dtype = None if section.dtype is None else getattr(torch, section.dtype)
        self.dtypes = convert_dtypes(self.reader, self.dtype)
        found = open_masters(folder)
        if found.state == "other":
            raise ModelError(
                f"{found.path} is not what was written beside {folder}: {found.find_damage()[0]}",
                "bring it back, or move it away to begin from the checkpoint's own weights",
            )
        is_converted = self.dtypes != self.reader.dtypes
        self.masters = {} if is_converted else found.tensors
        self.masters_state: MastersState = "missing" if found.state == "missing" else "none"
        if found.state == "here":
            self.masters_state = "converted" if is_converted else "taken"

    @property
    def held(self) -> Held:
        """How a round in one process in bfloat16 holds what does not train, so that its bits survive.

        A vector with a master is multiplied in float32, and a matrix rounded for that anyway.
        """
        dtypes = {name: self.get_dtype(name) for name in self.layout.places}
        vectors = {name for name in self.masters if len(self.layout.shapes[name]) == 1}
        wide = {name for name, dtype in dtypes.items() if dtype != torch.bfloat16}
        exact = {name for name, dtype in dtypes.items() if dtype == torch.float32}
        return Held(frozenset(wide | vectors), frozenset(exact | self.masters.keys()))

    def read_master(self, name: str) -> torch.Tensor:
        """A parameter's values as a round begins from them: float32 where they are carried, else as they count."""
        return self.masters[name].read() if name in self.masters else self.read(name)

    def is_rounded(self, name: str) -> bool:
        """Whether a file holds fewer bits of a parameter than its float32 master has."""
        return any(self.dtypes[place] != "F32" for place in self.layout.places[name])

    def read(self, name: str) -> torch.Tensor:
        """A parameter's values as they count."""
        values = self.reader.read(name)
        return values if self.dtype is None else convert(values, self.dtype)

    def get_dtype(self, name: str) -> torch.dtype:
        """The data type of a parameter; float32 where its tensors are of several."""
        found = {self.dtypes[place] for place in self.layout.places[name]}
        return DTYPES[found.pop()] if len(found) == 1 else torch.float32

    def read_tensors(self, name: str) -> dict[str, np.ndarray]:
        """The bytes of a parameter's tensors as they count."""
        if all(self.dtypes[place] == self.reader.dtypes[place] for place in self.layout.places[name]):
            return self.reader.read_tensors(name)
        return self.cast_tensors(name, self.read(name))

    def cast_tensors(self, name: str, values: torch.Tensor) -> dict[str, np.ndarray]:
        """The bytes of a parameter's tensors where it has other values."""
        return cast_tensors(self.layout, name, values, self.dtypes)

    def round(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """A parameter's values as a file holds them."""
        found = [self.dtypes[place] for place in self.layout.places[name]]
        if len(set(found)) == 1:
            return values.to(DTYPES[found[0]])
        parts = self.layout.split(name, values)
        return self.layout.join(name, {place: part.to(DTYPES[self.dtypes[place]]) for place, part in parts.items()})


def foresee_held(section: ModelSection, path: str, names: Iterable[str]) -> Held:
    """`Start.held` of a start that need not be here: by its files, or else by `model.dtype` or what its config says.

    Of a config that names no data type, the weights are taken to be float32, as transformers makes them then.

    Args:
        path: a folder, a config file or a hub id whose config loads.
        names: the model's parameters.
    """
    if next(Path(path).glob("*.safetensors"), None) is not None:
        try:
            return Start(section, Path(path), ()).held
        except InputError:
            pass  # whoever loads it says what is wrong with it
    name, revision = split_revision(path)
    config = AutoConfig.from_pretrained(name, revision=revision)
    found = config.dtype or config.get_text_config().dtype or torch.float32
    dtype = found if section.dtype is None else getattr(torch, section.dtype)
    every = frozenset(names)
    return Held(every if dtype != torch.bfloat16 else frozenset(), every if dtype == torch.float32 else frozenset())


def convert(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values in another data type, by way of float32, in which a model is loaded."""
    return values if values.dtype == dtype else values.float().to(dtype)


def convert_dtypes(reader: CheckpointReader, dtype: torch.dtype | None) -> dict[str, str]:
    """The data type of every tensor once the parameters are converted to `dtype`; None converts nothing.

    Raises:
        ModelError: a parameter is stored in a data type that cannot be trained from.
    """
    found = dict(reader.dtypes)
    for place in reader.layout.owners:
        if found[place] not in FLOATS and (dtype is None or found[place] != "F64"):
            fix = "set model.dtype: float32 or bfloat16" if found[place] == "F64" else "give a checkpoint that is not quantized"
            raise ModelError(f"{reader.stack.root} stores {place} as {found[place]}; known are {', '.join(FLOATS)}", fix)
        if dtype is not None:
            found[place] = CODES[dtype]
    return found


def cast_tensors(layout: Layout, name: str, values: torch.Tensor, dtypes: dict[str, str]) -> dict[str, np.ndarray]:
    """The bytes of a parameter's tensors, each in its data type."""
    return {place: get_bytes(part.to(DTYPES[dtypes[place]])) for place, part in layout.split(name, values).items()}


def list_forms(reader: CheckpointReader, dtypes: dict[str, str]) -> dict[str, Form]:
    """The form of every tensor of a checkpoint's files where the tensors have these data types."""
    forms = {}
    for place, stored in reader.stored.items():
        num_bytes = stored.num_bytes
        if dtypes[place] != stored.dtype:
            num_bytes = num_bytes // DTYPES[stored.dtype].itemsize * DTYPES[dtypes[place]].itemsize
        forms[place] = (dtypes[place], stored.shape, num_bytes)
    return forms
