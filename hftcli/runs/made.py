"""What is kept of checkpoints that are made of others: deltas, and models that `hft merge` and `hft reset` write."""

from typing import Any, Literal

from pydantic import model_validator

from hftcli.freezing.selection import FreezePlan
from hftcli.recipe.section import FileSection, Section, Version

DELTA_NAME = "delta.json"  # its presence tells a delta checkpoint from a full one
MERGE_NAME = "merge.json"


class CheckpointIdentity(Section):
    """Which checkpoint it was, to the byte."""

    path: str
    """Its folder, where it was seen."""
    files: dict[str, str]
    """SHA-256 of its config, of its weight files, and of delta.json where it is a delta itself."""


class DeltaRecord(FileSection):
    """What a delta checkpoint lacks, and where that is."""

    version: Version = 2
    """Version of the file's form. The first has a `dtype` always: what comes from the base is converted to it."""
    base: CheckpointIdentity
    """The round's start, which holds all that this checkpoint does not; may be a delta itself."""
    fingerprint: str
    """Of the round's freeze plan."""
    dtype: Literal["float32", "bfloat16", "float16"] | None
    """What `model.dtype` converts every parameter of the base to; null where each keeps the data type that it has."""
    tensors: tuple[str, ...]
    """Names of the parameters stored here: trained ones whose bytes are not the base's."""
    rows: tuple[str, ...] = ()
    """Names of those of which only the rows that are not the base's are stored."""


class MergeManifest(FileSection):
    """How a model was made out of the weights of others."""

    version: Version = 4
    """Version of the file's form. The first has the version of hft under this name; the second knows no sparsification, and the
    third no `num_moved`."""
    kind: Literal["delta", "interpolation", "sparsification", "reset"]
    """A delta laid over its base, the mean of two models, or a tuned model with the smaller of its changes, or one half of its
    weights, back at its base."""
    command: tuple[str, ...]
    """The command line."""
    created: str
    """UTC time."""
    hft_version: str
    """Version of hft."""
    inputs: dict[str, CheckpointIdentity]
    """What it was made of: `base`, and `delta` or `tuned`."""
    weight: float | None = None
    """Of an interpolation: the share A of the tuned model in (1 - A) base + A tuned, in [0, 1]."""
    density: float | None = None
    """Of a sparsification: the share of all weights that was to differ from the base, in [0, 1]."""
    num_kept: int | None = None
    """Of a sparsification: the weights that differ from the base."""
    num_weights: int | None = None
    """Of a sparsification: all weights."""
    plan: FreezePlan | None = None
    """Of a reset: the frozen parameters are back at the base, the trained ones are the tuned model's."""
    num_moved: int | None = None
    """Of a reset: the parameters that are back at the base and differed from it in the tuned model. Null in older forms."""
    files: dict[str, str]
    """SHA-256 of the config and the weight files that were written."""

    @model_validator(mode="before")
    @classmethod
    def _read_first_form(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("version"), str):
            return {**values, "version": 1, "hft_version": values["version"]}
        return values
