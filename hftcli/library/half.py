"""A half of a model that a trainer of one's own trains: frozen before, proved afterwards."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hftcli.errors import InputError, ModelError, VerificationError
from hftcli.freezing.directions import Columns, Directions, Entries, list_coordinates, list_inputs
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import FreezePlan, make_plan
from hftcli.library.given import hash_tensor, list_model_units, read_earlier, take_texts
from hftcli.library.plain import keep_plain, merge_part
from hftcli.measuring.moments import Inputs
from hftcli.models.checkpoint import freeze_model
from hftcli.models.closure import measure_leak
from hftcli.models.columned import find_columns, score_columns
from hftcli.models.directed import find_basis
from hftcli.models.division import divide_model, draw_choices
from hftcli.models.part import PartLinear
from hftcli.models.sparse import find_entries
from hftcli.models.tensors import CODES
from hftcli.runs.verification import Verification


@dataclass
class Half:
    """A model of which a half trains.

    Attributes:
        plan: which parameters train.
        digests: hashes of all of them as they were; of a matrix that trains in columns or entries, of the frozen ones.
        layers: the matrices of which a part trains, until `finish` has put plain ones in their place.
        bases: which part that is, by the name of the choice.
        parts: hashes of the parts as they were.
        proved: hashes of these matrices as plain ones.
        leaked: of these matrices, those that moved in what was closed.
        still: those whose part did not move.
    """

    plan: FreezePlan
    digests: dict[str, str]
    layers: dict[str, PartLinear] = field(default_factory=dict)
    bases: dict[str, torch.Tensor] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    proved: dict[str, str] = field(default_factory=dict)
    leaked: list[str] = field(default_factory=list)
    still: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """The share, and the plan's name."""
        plan = self.plan
        return f"{plan.trainable_fraction:.1%} of {plan.num_parameters:,} weights train, plan {plan.short_fingerprint}"

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Put plain layers in the place of those of which a part trained, so that the model is as it came, and freeze them."""
        for name, layer in self.layers.items():
            part = self.plan.parts[name]
            if hash_tensor(layer.part.detach()) == self.parts[name]:
                self.still.append(name)
            held_dtype, start = layer.weight.dtype, layer.weight.detach().clone()
            plain = nn.Linear(part.num_inputs, part.num_outputs, bias=layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(merge_part(layer), requires_grad=False)
            self.proved[name] = hash_tensor(plain.weight.detach())
            plain.bias = layer.bias
            if isinstance(part, Directions):
                before, after = (value.cpu().double().numpy() for value in (start, plain.weight.detach()))
                code = CODES[held_dtype]
                basis_NWR = self.bases[part.choice].cpu().double().numpy()
                if (
                    hash_tensor(start) != self.digests[name]
                    or not measure_leak(before, after, basis_NWR, code, code).is_rounding
                ):
                    self.leaked.append(name)
            elif hash_tensor(take_closed(plain.weight.detach(), part, self.bases[part.choice])) != self.digests[name]:
                self.leaked.append(name)
            model.set_submodule(name.removesuffix(".weight"), plain)
        self.layers = {}

    def verify(self, model: nn.Module) -> Verification:
        """Compare a model with what it was: frozen parameters are the same, bit for bit, and trained ones are not.

        It ends the half where directions, columns or entries trained: plain matrices, frozen whole, are then in their place.

        Raises:
            ModelError: it is another model.
            VerificationError: it is not so, or such a matrix moved after it was proved.
        """
        self.finish(model)
        now = dict(model.named_parameters())
        if missing := [name for name in self.digests if name not in now]:
            raise ModelError(
                f"the model has no {missing[0]}, which it had when it was frozen", "give the model that `freeze_half` was given"
            )
        if later := [name for name, digest in self.proved.items() if hash_tensor(now[name].detach()) != digest]:
            raise VerificationError(
                f"{len(later)} matrices of which a part trained moved after this was proved: {', '.join(later[:5])}",
                "call freeze_half again before a next training",
            )
        same = {name: hash_tensor(now[name].detach()) == digest for name, digest in self.digests.items()}
        whole = [name for name in self.plan.trained if name not in self.plan.parts]
        found = Verification(
            num_frozen=len(self.plan.frozen),
            num_trained=len(self.plan.trained),
            violations=tuple(name for name in self.plan.frozen if not same[name]),
            unmoved=(*(name for name in whole if same[name]), *self.still),
            leaked=tuple(self.leaked),
        )
        if not found.passed:
            raise VerificationError(
                f"{len(found.violations)} frozen parameters moved, {len(found.unmoved)} trained ones did not, "
                f"{len(found.leaked)} moved in what was closed: {', '.join(found.faults[:5])}",
                "see whether something set requires_grad, or changed the data type, behind the plan's back",
            )
        return found


def freeze_half(
    model: PreTrainedModel,
    seed: int = 42,
    round: int = 0,
    share: float = 0.5,
    tokenizer: PreTrainedTokenizerBase | None = None,
    keep: Iterable[str] = (),
    **rule: Any,
) -> Half:
    """Freeze a half of a model in place, before any optimizer exists.

    Args:
        round: place in the history of the model; every round draws another half.
        share: what trains in the layers; 1.0 is full fine-tuning.
        tokenizer: for the grains `directions` and `columns`, whose choice goes by what the model writes of itself.
        keep: with these grains, texts that must not be forgotten.
        rule: more keys of the recipe's section `freeze`, as `embeddings="freeze"` or `grain="directions"`; not those that act
            in every step, or when a round ends.

    Raises:
        InputError: a key or a combination that cannot be, or a model that is not known.
    """
    texts = take_texts(keep)
    freeze = make_rule(seed, share, rule, bool(texts))
    units, num_heads = list_model_units(model.named_parameters(), model, freeze.roles)
    plan = make_plan(units, freeze, round, num_heads)
    if not plan.is_ranked:
        raise InputError(f"freeze_half has no scores to rank by {freeze.rank}", "take rank: random, or run a recipe")
    if freeze.choice == "spiel" and plan.parts:
        raise InputError("freeze_half holds what trains the same in every step, and part spiel does not", "run a recipe")
    if plan.parts and freeze.reads_earlier and tokenizer is None and freeze.choice != "random":
        raise InputError(f"grain {freeze.grain_name} goes by what the model writes of itself", "give the tokenizer")
    bases = {}
    if plan.parts:
        is_columned = freeze.grain == "columns"
        inputs = list_coordinates(units) if is_columned else list_inputs(units, freeze.blocks, num_heads)
        bases = choose_parts(model, plan, inputs, tokenizer, texts)
    held = {name: value.detach() for name, value in model.named_parameters()}
    digests = {
        name: hash_tensor(
            take_closed(value, part, bases[part.choice])
            if isinstance(part := plan.parts.get(name), Columns | Entries)
            else value
        )
        for name, value in held.items()
    }
    freeze_model(model, plan)
    dtype = torch.float32 if not plan.parts else held[next(iter(plan.parts))].dtype
    layers = divide_model(model, plan.parts, bases, True, dtype) if plan.parts else {}
    for layer in layers.values():
        keep_plain(layer)
    return Half(plan, digests, layers, bases, {name: hash_tensor(layer.part.detach()) for name, layer in layers.items()})


def make_rule(seed: int, share: float, given: dict[str, Any], has_texts: bool) -> FreezeRule:
    """The rule of these keys.

    Args:
        has_texts: whether texts are to be kept.

    Raises:
        InputError: a key or a combination that cannot be, or that would have no effect on a model that is frozen once.
    """
    if "trainable_fraction" in given:
        raise InputError("freeze_half has share in place of freeze's trainable_fraction", "give share")
    try:
        rule = FreezeRule.model_validate({"seed": seed, "trainable_fraction": share, **given})
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'freeze'}: {fault['msg']}" for fault in error.errors())
        fix = "give keys of a recipe's section freeze, in the form that they have there"
        raise InputError(f"freeze_half: {faults}", fix) from None
    for key in rule.additions:
        raise InputError(f"freeze_half freezes once, and {key} acts while a round trains, or at its end", "run a recipe")
    for key in ("blocks", "part"):
        if getattr(rule, key) is not None and not rule.divides:
            raise InputError(f"{key} would have no effect beside grain {rule.grain_name}", "drop it, or set grain='directions'")
    if rule.splits_each and rule.balance == "weights":
        raise InputError(
            f"balance weights would have no effect beside grain {rule.grain_name}, with which the share is one of each matrix",
            "drop it, or set grain='matrices'",
        )
    if has_texts and not (rule.reads_earlier and rule.choice != "random"):
        part = f" and part {rule.choice}" if rule.divides else ""
        raise InputError(
            f"keep would have no effect beside grain {rule.grain_name}{part}", "drop it, or set grain='directions' or 'columns'"
        )
    return rule


def choose_parts(
    model: PreTrainedModel, plan: FreezePlan, inputs: Inputs, tokenizer: PreTrainedTokenizerBase | None, keep: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The directions, columns or entries of a plan, by the name of the choice."""
    weights = dict(model.named_parameters())
    if plan.rule.choice == "magnitude":
        entries = (plan.entries or {}).items()
        return {name: find_entries(weights[name].detach().cpu(), part.num_entries) for name, part in entries}
    if plan.rule.choice == "random" or tokenizer is None or not plan.rule.reads_earlier:
        return draw_choices(plan.parts, torch.float32, plan.rule.seed, plan.round_index)
    moments, found = read_earlier(model, inputs, tokenizer, keep), {}
    for name, part in plan.parts.items():
        own = moments[part.input]
        if part.choice in found:
            continue
        if isinstance(part, Columns):
            scores_I = score_columns(weights[name].detach().cpu(), own[:, 0, 0], plan.rule.choice)
            found[part.choice] = find_columns(scores_I, part.num_columns)
        elif isinstance(part, Directions):
            found[part.choice] = find_basis(own, part.num_open)[0].to(weights[name].dtype)
    return found


class HalfCallback(TrainerCallback):
    """Freezes a half of what a trainer is given, and proves it when training ends.

    Attributes:
        half: what `freeze_half` gave.
        verification: what was found.

    Args:
        options: those of `freeze_half`.
    """

    def __init__(self, **options: Any):
        self.options = options
        self.half: Half | None = None
        self.verification: Verification | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Freeze: the trainer has no optimizer yet."""
        self.half = freeze_half(kwargs["model"], **self.options)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raises: VerificationError: something frozen moved, or something trained did not."""
        assert self.half is not None  # transformers calls one after the other
        self.verification = self.half.verify(kwargs["model"])


def take_closed(weight_OI: torch.Tensor, part: Columns | Entries, index_C: torch.Tensor) -> torch.Tensor:
    """The columns or entries of a weight that do not train."""
    if isinstance(part, Entries):
        is_frozen = torch.ones(weight_OI.numel(), dtype=torch.bool, device=weight_OI.device)
        is_frozen[index_C.to(weight_OI.device).long()] = False
        return weight_OI.flatten()[is_frozen]
    is_closed = torch.ones(weight_OI.shape[1], dtype=torch.bool, device=weight_OI.device)
    is_closed[index_C.to(weight_OI.device)] = False
    return weight_OI[:, is_closed]
