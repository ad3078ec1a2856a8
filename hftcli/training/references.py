"""The reference of preference optimization: the model as it was before the round, without a second model in memory.

    precompute   the untouched model is asked once about every pair; its answers are kept on disk and looked up by row
    shared       the frozen half is the reference's already; a copy of the trained half is laid in for the reference's pass, but
                 for what trains in directions, which is the reference where nothing is added to it

The third way, a second model, is TRL's own (`reference: full`). All three compute the reference with TRL's
`compute_ref_log_probs`, so they give the same losses.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from trl import DPOTrainer

from hftcli.data.cache import default_cache
from hftcli.data.prepare import deal_pairs
from hftcli.data.tokens import Progress
from hftcli.errors import InputError
from hftcli.freezing.selection import FreezePlan
from hftcli.launching.planning import find_arithmetic
from hftcli.models.checkpoint import is_partitioned
from hftcli.models.description import identify_start
from hftcli.models.device import count_batch_tokens, find_device, is_offloaded, name_device
from hftcli.models.start_copy import StartCopy, evaluating
from hftcli.models.tensors import write_tensors
from hftcli.runs.files import name_temporary
from hftcli.runs.records import ReferenceReport
from hftcli.runs.spec import RoundSpec

Inputs = dict[str, torch.Tensor]
LogProbs = tuple[torch.Tensor, torch.Tensor]  # of the chosen and of the rejected answers, each (B,)


class Reference(Protocol):
    """What a trainer asks for the reference's log-probabilities."""

    @property
    def key(self) -> str | None:
        """Name of what is kept in the cache; None where nothing is."""

    @property
    def is_reused(self) -> bool:
        """Whether it was in the cache already."""

    @property
    def num_bytes(self) -> int:
        """What it takes on this rank while training."""

    def prepare(self, trainer: DPOTrainer) -> None:
        """Called by all ranks when the model is where it trains, and untouched."""

    def recall(self) -> torch.Tensor | None:
        """What a step checkpoint has to keep: what the trained model could not give again."""

    def restore(self, trainer: DPOTrainer, recalled: torch.Tensor | None) -> None:
        """Called in place of `prepare` where the model comes from a step checkpoint."""

    def score(self, trainer: DPOTrainer, inputs: Inputs, rows_B: torch.Tensor) -> LogProbs:
        """Log-probabilities of a batch's answers; `rows_B` are the pairs' places in the dataset."""


class PrecomputedReference:
    """Log-probabilities of every pair, computed once by the untouched model and kept on disk.

    Args:
        path: the file that keeps them, under a key of all that shapes them; rank 0 alone reads and writes it.
        on_batch: called with batches done and in all.
    """

    def __init__(self, path: Path, on_batch: Progress):
        self.path = path
        self.on_batch = on_batch
        self.is_reused = False
        self.log_probs_P2 = torch.empty(0, 2)

    @property
    def key(self) -> str:
        """The file's name."""
        return self.path.stem

    @property
    def num_bytes(self) -> int:
        """Two log-probabilities for each pair."""
        return self.log_probs_P2.nbytes

    def prepare(self, trainer: DPOTrainer) -> None:
        """Read what is kept, or ask the untouched model about every pair; rank 0 decides for all."""
        is_first = trainer.args.process_index == 0
        found = [read_log_probs(self.path, len(trainer.train_dataset)) if is_first and self.path.exists() else None]
        if trainer.args.world_size > 1:  # the ranks may be on machines with other caches
            torch.distributed.broadcast_object_list(found)
        (kept,) = found
        self.is_reused = kept is not None
        self.log_probs_P2 = compute_log_probs(trainer, self.on_batch) if kept is None else kept
        if is_first and not self.is_reused:
            write_log_probs(self.path, self.log_probs_P2)

    def recall(self) -> torch.Tensor:
        """All of them: the trained model could not give them again."""
        return self.log_probs_P2

    def restore(self, trainer: DPOTrainer, recalled: torch.Tensor | None) -> None:
        """Take up what the step checkpoint kept."""
        assert recalled is not None
        self.log_probs_P2, self.is_reused = recalled, True

    def score(self, trainer: DPOTrainer, inputs: Inputs, rows_B: torch.Tensor) -> LogProbs:
        """Look the batch's pairs up."""
        chosen_B, rejected_B = self.log_probs_P2[rows_B.cpu()].to(inputs["input_ids"].device).unbind(-1)
        return chosen_B, rejected_B


class SharedReference:
    """The model itself, with a copy of the trained half as it was. Every rank must hold whole parameters: not ZeRO 3."""

    key = None
    is_reused = False

    def __init__(self) -> None:
        self.copy: StartCopy | None = None

    @property
    def num_bytes(self) -> int:
        """The copy of the trained half."""
        return self.copy.num_bytes if self.copy is not None else 0

    def prepare(self, trainer: DPOTrainer) -> None:
        """Copy the trained half before it moves."""
        self.remember(trainer.model)

    def remember(self, model: torch.nn.Module) -> None:
        """Copy the trained half of a model as it is now."""
        self.copy = StartCopy(model)

    def recall(self) -> None:
        """Nothing: the start on disk has it."""

    def restore(self, trainer: DPOTrainer, recalled: torch.Tensor | None) -> None:
        """Take the copy, made of the start when it was loaded, to where the model trains."""
        assert self.copy is not None
        self.copy.move()

    def score(self, trainer: DPOTrainer, inputs: Inputs, rows_B: torch.Tensor) -> LogProbs:
        """Ask the model with the copy laid in."""
        assert self.copy is not None
        with self.copy.laid_in(), evaluating(trainer.model):
            return trainer.compute_ref_log_probs(trainer.model, inputs)


def compute_log_probs(trainer: DPOTrainer, on_batch: Progress) -> torch.Tensor:
    """Log-probabilities of every pair's answers (P, 2), float32 on the CPU; the ranks share the pairs and all get the whole."""
    args = trainer.args
    batches = deal_pairs(trainer.train_dataset, 2 * count_batch_tokens(args.device), args.world_size)
    log_probs_P2 = torch.zeros(len(trainer.train_dataset), 2)
    with evaluating(trainer.model_wrapped):
        for index, batch in enumerate(batches):
            own = batch[args.process_index :: args.world_size]
            # A rank without a pair passes all the same, because under ZeRO 3 the ranks gather the weights together.
            inputs = trainer.data_collator([trainer.train_dataset[row] for row in own or batch[:1]])
            rows_B = inputs.pop("row")
            inputs = trainer.move_batch(inputs)
            if own:
                log_probs_P2[rows_B] = torch.stack(_score(trainer, inputs), dim=-1).float().cpu()
            else:
                _score(trainer, inputs)
            on_batch(index + 1, len(batches))
    if args.world_size > 1:
        log_probs_P2 = log_probs_P2.to(args.device)
        torch.distributed.all_reduce(log_probs_P2)
    return log_probs_P2.cpu()


def _score(trainer: DPOTrainer, inputs: Inputs) -> LogProbs:
    return trainer.compute_ref_log_probs(trainer.model_wrapped, inputs)


def make_reference(
    spec: RoundSpec, start: Path, tokens_key: str, mixed: bool, plan: FreezePlan, is_first: bool, on_batch: Progress
) -> Reference | None:
    """What stands in for a second model; None where there is one, or nothing to refer to.

    Args:
        tokens_key: of the pairs to train on.
        mixed: whether the round computes in bfloat16.
        plan: which half trains.
        is_first: whether this is rank 0.
        on_batch: called with batches done and in all.
    """
    if spec.reference == "shared":
        return SharedReference()
    if spec.reference == "precompute":
        # The weights are read whole for the key, which rank 0 alone needs.
        key = make_reference_key(spec, start, tokens_key, mixed, plan) if is_first else ""
        path = default_cache("references") / f"{key}.safetensors"
        return PrecomputedReference(path, on_batch)
    return None


def describe_reference(spec: RoundSpec, reference: Reference | None, second: PreTrainedModel | None) -> ReferenceReport | None:
    """What the reference was and what it takes; None where there is none."""
    if second is not None:
        held = [value.ds_tensor if is_partitioned(value) else value for value in second.parameters()]
        return ReferenceReport(mode="full", key=None, is_reused=False, num_bytes=sum(value.nbytes for value in held))
    if reference is None or spec.reference is None:
        return None
    return ReferenceReport(mode=spec.reference, key=reference.key, is_reused=reference.is_reused, num_bytes=reference.num_bytes)


def make_reference_key(spec: RoundSpec, start: Path, tokens_key: str, mixed: bool, plan: FreezePlan) -> str:
    """A hash of all that shapes the reference's log-probabilities. What it left out would be trained on stale."""
    arithmetic = find_arithmetic(mixed, spec.launch.num_ranks, spec.launch.offload)
    by_half = mixed and is_offloaded(spec)
    shaping = {
        "start": identify_start(start),
        "tokens": tokens_key,
        "model": spec.model.model_dump(include={"dtype", "attn_implementation"}),
        "arithmetic": f"{arithmetic}, offloaded" if by_half else arithmetic,
        # What is frozen is held in bfloat16 beside autocast, and what trains beside masters on the host.
        "plan": plan.fingerprint if arithmetic == "autocast" or by_half else "",
        "device": name_device(find_device()),
        "ld_alpha": spec.dpo and spec.dpo.extra.get("ld_alpha"),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()


def read_log_probs(path: Path, num_pairs: int) -> torch.Tensor:
    """Raises: InputError: the file is damaged, or holds those of other pairs."""
    try:
        with safe_open(path, framework="pt") as file:
            log_probs_P2 = file.get_tensor("log_probs")
            key = file.metadata()["key"]
    except (SafetensorError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}", "remove it: it is computed again") from None
    if key != path.stem or log_probs_P2.shape != (num_pairs, 2):
        raise InputError(f"{path} holds the reference of another model or of other pairs", "remove it: it is computed again")
    return log_probs_P2


def write_log_probs(path: Path, log_probs_P2: torch.Tensor) -> None:
    """Keep the log-probabilities under their key, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = name_temporary(path)
    write_tensors(temporary, {"log_probs": log_probs_P2}, {"key": path.stem})
    temporary.replace(path)
