"""The rule by which a round chooses what trains: the recipe's section `freeze`."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from hftcli.freezing.directions import KeepRule, RowsPath
from hftcli.freezing.roles import OUTSIDE_ROLES, Role, compile_pattern, list_patterns

Grain = Literal["matrices", "biases", "directions", "columns", "entries"]
Choice = Literal["quiet", "random", "ssu", "ssu-code", "magnitude", "spiel"]
Rank = Literal["random", "magnitude", "wanda", "fisher", "gradient", "spectrum"]
GRAINS: tuple[Grain | tuple[Grain, ...], ...] = (
    "matrices", "biases", "directions", "columns", "entries", ("matrices", "directions"),
)  # fmt: skip
CHOICES: dict[str, tuple[Choice, ...]] = {  # of `part`, by grain; the first is what null means
    "columns": ("ssu", "ssu-code", "quiet", "random"),
    "entries": ("random", "magnitude", "spiel"),
}
QUIET: dict[str, Any] = {"grain": ("matrices", "directions"), "blocks": 32}  # what `freeze: quiet` is short for


class ImportanceRule(BaseModel):
    """How units are ranked by a score."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    freezes: Literal["most", "least"] = "most"
    """Which units of a group are frozen: those that matter `most`, which keeps what the score says is needed; or `least`, which
    trains where the most is."""

    path: RowsPath | None = None
    """With ranks `wanda` and `fisher`: rows, as under `data.path`, or a task, which means its test rows, that the scores are
    of. Null takes texts that the model writes of itself: 64 from nothing, the same every time."""

    samples: Annotated[int, Field(ge=1)] = 64
    """How many rows are read, of those at `path` or, with rank `gradient`, of the round's own, without those that methods add;
    drawn by `freeze.seed`."""


class PullRule(BaseModel):
    """How what trains is held to where the round starts."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    strength: Annotated[float, Field(ge=0)]
    """In every step, what trains goes back by the learning rate times this share of its distance from the start, before the
    optimizer's own step. Weight decay pulls to 0 in the same way."""

    selective: bool = False
    """Pull only those tensors whose gradient descent, too, leads back to the start: the condition of Selective Projection Decay
    (arXiv 2411.01713), whose strength is not that of this key, but a share of what the step adds to the distance."""


class RedrawRule(BaseModel):
    """How what trains changes within a round."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    every: Annotated[int, Field(ge=1)] | Literal["auto"]
    """Steps from one draw to the next, fewer than the round has. `auto`, for draws in turns, is BAdam's: as many as lead
    through all blocks in a pass over the rows, but at least 50 and at most 100."""

    order: Literal["random", "ascending", "descending", "cyclic"] = "random"
    """`random` draws anew each time, as a round does. The others take turns, with `group: layer`: the layers are blocks of
    `trainable_fraction` of them, of which each trains once in a cycle, from the input up (`ascending`), from the output down
    (`descending`), or in another random order in every cycle (`cyclic`). Embeddings and head, where they train, are then blocks
    of their own, bridges with the embeddings and the final norm with the head; where they are frozen, so are these, as in
    BAdam: no turn goes to a norm alone."""

    states: Literal["drop", "keep"] = "drop"
    """What becomes of the optimizer's state of what stops training: it is dropped, and begins from nothing at the next turn, as
    in BAdam; or kept in host memory until then, as in HiFT."""

    schedule: Literal["step", "cycle"] = "step"
    """Whether the learning rate goes on in every step or, for draws in turns, once a cycle, so that all blocks get the same, as
    in HiFT."""


class FreezeRule(BaseModel):
    """How a round chooses what trains."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    group: Literal["category", "layer", "model"] = "category"
    """What is halved: `category`, the units of one role in one layer; `layer`, the model's layers, each of which
    trains or is frozen as a whole; `model`, all units in the layers at once."""

    rank: Rank = "random"
    """Who comes first in a group: `random` draws anew in every round; the others freeze by a score of the round's start. It
    is a mean over a unit's weights: of their size (`magnitude`), of their size times the norm of what they read (`wanda`), of
    the squared gradient of the log-likelihood of labels that the model draws (`fisher`), of the size of the new rows'
    gradient (`gradient`); or the signal to noise of singular values (`spectrum`, arXiv 2406.06623). Norms, of which `wanda`
    and `spectrum` say nothing, are then drawn."""

    importance: Annotated[ImportanceRule | None, Field(exclude_if=lambda value: value is None)] = None
    """With every rank but `random`: whether the most or the least important is frozen, and by which rows."""

    trainable_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share that trains in the layers; 1.0 is full fine-tuning."""

    seed: int = 42
    """Another seed draws other halves. `train.seed` is another matter: the order of the data."""

    embeddings: Literal["train", "freeze"] = "train"
    """The token embeddings, and position embeddings where they are learned. Where the head is tied to the embeddings,
    both keys must be set alike."""

    head: Literal["train", "freeze"] = "train"
    """The output layer, from hidden states to logits."""

    balance: Literal["units", "weights"] = "units"
    """What the share is a share of: `units` counts matrices, as the paper does; `weights` counts their weights, which
    differs where the units of a group differ in size, as in grouped-query attention."""

    # What is off leaves no trace in a plan, so that plans keep the fingerprints that they had without it.
    frozen_prefix: Annotated[float, Field(ge=0, lt=1, exclude_if=lambda value: value == 0)] = 0.0
    """Share of the layers, counted from the input, that is frozen whole together with the embeddings, so that the backward pass
    ends above them. In the layers above so much more trains that `trainable_fraction` stays the share of all, where that is
    possible. A variant of the paper's rule; 0 is the paper's."""

    grain: Annotated[Grain | tuple[Grain, ...], Field(exclude_if=lambda value: value == "matrices")] = "matrices"
    """In what pieces the layers' matrices are halved: `matrices`, each trains or is frozen as a whole, as in the paper;
    `directions`, each trains in that share of its input space which the inputs of earlier data use least, and stays what it is
    in the rest; `columns`, each trains in that share of its input columns, and the others are frozen bit for bit; `entries`,
    of each that share of single weights trains, and the others are frozen bit for bit; `[matrices, directions]`, directions
    within the paper's half, which takes the share twice. `biases`, no matrix trains and no norm's
    weight, but of the modules that have a bias that share of the biases: all of them, `trainable_fraction: 1`, is BitFit
    (arXiv 2106.10199), which freezes `embeddings` and `head` too."""

    part: Annotated[Choice | None, Field(exclude_if=lambda value: value is None)] = None
    """With directions, columns or entries: which of them train. `quiet`, those in which the inputs of earlier data have least
    energy; `random`, any, as a control; of columns also `ssu`, those with the least sum of absolute weights times the norm of
    the column's input over earlier data (arXiv 2512.04844), or `ssu-code`, with the least norm of the column times the mean
    square of its input, which is what that paper's published code computes; of entries `random`, `magnitude`, the largest, as
    another control, or `spiel`, which begins at random and drops and grows some every 20 steps (SpIEL-AG, arXiv 2401.16405; for
    one process, or ZeRO 0). Null is `quiet` for directions, `ssu` for columns and `random` for entries."""

    blocks: Annotated[int | None, Field(ge=2, exclude_if=lambda value: value is None)] = None
    """With directions, of `grain` or of `method.lora.quiet`: they are taken within each head for the attention's output, and
    within each so many neighbouring inputs for the mlp's, which costs nearly nothing per token; null takes them from the whole
    input everywhere."""

    keep: Annotated[KeepRule | None, Field(exclude_if=lambda value: value is None)] = None
    """With directions or columns: rows that must not be forgotten. Besides, what the model writes of itself counts as earlier,
    and the rows of every round that it has learned so."""

    roles: Annotated[dict[Role, str | tuple[str, ...]] | None, Field(exclude_if=lambda value: value is None)] = None
    """Which module plays which role, for a family that hft does not know, or in place of what it knows: by role the names of
    modules, one pattern or a list. `(a|b)` means a or b, `(a)?` a or nothing, the first `*` is the index of the layer, others
    are any number, and all else is literal. `hft plan` prints a proposal for an unknown family, to be checked and pasted. Every
    parameter must have one role: `attention`, `mixer` (what stands in its place: linear attention, a state-space layer), `mlp`,
    `router`, `experts`, `norm` or `small` (of a layer, what is no matrix of its width: convolutions, decays, gates); outside
    the layers `embedding`, `head`, `final_norm`, or `bridge` (from embeddings to layers, or from these to the head; always
    trains, but with a `frozen_prefix` and in the turns of `redraw.order`)."""

    redraw: Annotated[RedrawRule | None, Field(exclude_if=lambda value: value is None)] = None
    """Draw what trains anew within the round: HFT's half, LISA's layers (arXiv 2403.17919), or blocks in turns, as in BAdam
    (arXiv 2404.02827) and HiFT (arXiv 2401.15207). A device holds gradients and states of one draw. For one
    process, or ZeRO 0."""

    pull: Annotated[PullRule | None, Field(exclude_if=lambda value: value is None)] = None
    """Decay to the start, in every step of the optimizer (L2-SP as AdamW does it). Keeps a float32 copy of what trains, which
    `hft plan` does not count; step checkpoints hold it as well."""

    average: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | Literal["dynamic"] | None, Field(exclude_if=lambda value: value is None)
    ] = None
    """Leave the exponential moving average of what trained, from the start on, with this share of the old average in every
    step, such as 0.99. `dynamic` measures each tensor's share anew in every step, by slope and curvature of the loss, as LCIA
    (arXiv 2410.10868) means it, but alike for tensors of any size; 0.99 is its control. Keeps a float32 copy, as `freeze.pull`
    does; `dynamic`, for one process or ZeRO 0, also one of the gradients, and for a moment a third."""

    interpolate: Annotated[float, Field(gt=0, le=1, exclude_if=lambda value: value == 1)] = 1.0
    """Share of its way from the start that what trained keeps at the end of a round (WiSE-FT, arXiv 2109.01903). A next round
    begins from what is then saved; `hft merge --interpolate` does the same to a finished model."""

    @property
    def divides(self) -> bool:
        """Whether matrices train in a part of their directions, columns or entries."""
        return self.grain not in ("matrices", "biases")

    @property
    def splits_each(self) -> bool:
        """Whether the share is one of each matrix, so that it does not matter what it is a share of."""
        return self.divides and "matrices" not in self.grain

    @property
    def reads_earlier(self) -> bool:
        """Whether that part goes by what the inputs of earlier data were, or leaves word of its own to later rounds."""
        return self.divides and self.grain != "entries"

    @property
    def grain_name(self) -> str:
        """The grain as a recipe has it."""
        return self.grain if isinstance(self.grain, str) else f"[{', '.join(self.grain)}]"

    @property
    def variant(self) -> str:
        """What a share is of and by what it is ranked, in words that follow it; nothing where that is the paper's."""
        ranked = "" if self.rank == "random" else f" by {self.rank}{'' if self.freezes_most else ', the least frozen'}"
        if self.grain == "biases":
            return " of biases"
        return f" of {self.grain_name} ({self.choice}){ranked}" if self.divides else ranked

    @property
    def additions(self) -> tuple[str, ...]:
        """What else acts while a round trains, or at its end."""
        interpolate = self.interpolate if self.interpolate < 1 else None
        given = {"redraw": self.redraw, "pull": self.pull, "average": self.average, "interpolate": interpolate}
        return tuple(f"freeze.{key}" for key, value in given.items() if value is not None)

    @property
    def choice(self) -> Choice:
        """Which directions, columns or entries train."""
        return self.part or self._choices[0]

    @property
    def _choices(self) -> tuple[Choice, ...]:
        return CHOICES.get(self.grain_name, ("quiet", "random"))

    @property
    def layer_fraction(self) -> float:
        """Share of the layers' weights that the rule asks for: halves of halves are quarters."""
        return self.trainable_fraction ** (2 if self.grain == ("matrices", "directions") else 1)

    def relocate(self, move: Callable[[str], str]) -> "FreezeRule":
        """The same rule with its rows at the place that `move` gives for their path."""
        moved = {
            name: section.model_copy(update={"path": move(section.path)})
            for name, section in (("keep", self.keep), ("importance", self.importance))
            if section is not None and section.path is not None
        }
        return self.model_copy(update=moved)

    @property
    def freezes_most(self) -> bool:
        """Whether the units that matter most are frozen, of a rank that scores them."""
        return self.importance is None or self.importance.freezes == "most"

    @model_validator(mode="before")
    @classmethod
    def _take_name(cls, value: Any) -> Any:
        return dict(QUIET) if value == "quiet" else value

    @model_validator(mode="after")
    def _check_roles(self) -> "FreezeRule":
        for role in self.roles or ():
            for pattern in list_patterns(self.roles or {}, role):
                try:
                    re.compile(compile_pattern(pattern))
                    is_plain = re.fullmatch(r"[\w.*()|?]+", pattern) is not None and "(?" not in pattern
                except re.error:
                    is_plain = False
                if not is_plain:
                    raise PydanticCustomError(
                        "pattern", f"roles.{role}: {pattern!r} is no pattern: give names with (a|b), (a)? and * alone"
                    )
                if role not in OUTSIDE_ROLES and "*" not in pattern:
                    raise PydanticCustomError(
                        "pattern", f"roles.{role}: {pattern!r} has no * for the index of the layer, and {role} is in the layers"
                    )
        return self

    @model_validator(mode="after")
    def _check_redraw(self) -> "FreezeRule":
        redraw = self.redraw
        if redraw is None:
            return self
        if self.grain != "matrices" or self.rank != "random":
            raise PydanticCustomError(
                "redraw", "redraw draws whole matrices by chance or in turns: drop it, or set grain: matrices and rank: random"
            )
        if self.pull is not None or self.interpolate < 1 or self.average is not None:
            raise PydanticCustomError("redraw", "pull, average and interpolate go with one draw a round: drop them, or redraw")
        if redraw.order == "random" and (redraw.every == "auto" or redraw.schedule == "cycle"):
            raise PydanticCustomError(
                "redraw",
                "redraw.every auto and redraw.schedule cycle count blocks in turns: set order, or give a number and step",
            )
        if redraw.order != "random" and (self.group != "layer" or self.frozen_prefix):
            raise PydanticCustomError(
                "redraw", f"redraw.order {redraw.order} goes through the layers: set group: layer, and no frozen_prefix"
            )
        return self

    @model_validator(mode="after")
    def _check_grain(self) -> "FreezeRule":
        if self.grain not in GRAINS:
            raise PydanticCustomError(
                "grain",
                f"grain is {self.grain_name}: give matrices, biases, directions, columns, entries, or [matrices, directions]",
            )
        if self.blocks is not None and self.grain in ("columns", "entries"):
            raise PydanticCustomError(
                "grain", f"blocks would have no effect beside grain {self.grain}: drop it, or set grain: directions"
            )
        if self.keep is not None and self.grain == "entries":
            raise PydanticCustomError("grain", "keep would have no effect: entries do not go by earlier inputs: drop it")
        if self.choice not in self._choices:
            raise PydanticCustomError(
                "grain",
                f"part is {self.part}, and grain {self.grain_name} has {', '.join(self._choices)}: give one of these, or the "
                "grain that has it",
            )
        return self

    @model_validator(mode="after")
    def _check_rank(self) -> "FreezeRule":
        given = self.importance
        if self.rank == "random":
            if given is not None:
                raise PydanticCustomError("rank", "importance would have no effect beside rank random: drop it, or set rank")
            return self
        if self.grain in ("biases", "directions", "columns", "entries"):
            trained = "no matrix" if self.grain == "biases" else "a part of each"
            raise PydanticCustomError(
                "rank", f"rank {self.rank} ranks whole matrices, and grain {self.grain_name} trains {trained}: drop one"
            )
        if self.group == "model" and self.rank in ("wanda", "spectrum"):
            raise PydanticCustomError(
                "rank", f"rank {self.rank} has no score for norms, which group model ranks among matrices: set group: category"
            )
        if given is not None and given.path is not None and self.rank not in ("wanda", "fisher"):
            raise PydanticCustomError("rank", f"importance.path would have no effect beside rank {self.rank}: drop it")
        if given is not None and given.samples != ImportanceRule().samples and given.path is None and self.rank != "gradient":
            raise PydanticCustomError("rank", f"importance.samples would have no effect beside rank {self.rank}: drop it")
        return self
