"""What the start of a round expects at each trained token: its likeliest tokens, kept on disk, so that it is asked once.

As the reference of DPO (training/references.py): the untouched model reads every row before the first step, the ranks share the
rows and all get the whole, rank 0 keeps it under a key of all that shapes it, and a step checkpoint holds it as well, since the
trained model could not give it again.

Shapes: R rows of the dataset, M tokens that are trained in all of them, N those of a batch, K tokens that are kept; B
sequences, T tokens of a sequence, C places before the trained tokens of some sequence, V the vocabulary.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import Trainer

from hftcli.data.cache import default_cache, hash_tokens
from hftcli.data.prepare import deal_rows
from hftcli.data.tokens import Progress
from hftcli.errors import InputError, TrainingError
from hftcli.launching.planning import find_arithmetic
from hftcli.models.description import identify_start
from hftcli.models.device import count_batch_tokens, is_mixed, name_device
from hftcli.models.start_copy import evaluating
from hftcli.models.tensors import write_tensors
from hftcli.runs.files import name_temporary
from hftcli.runs.spec import RoundSpec

SUMMED = 2**22  # numbers that the ranks add up at once


@dataclass(frozen=True)
class Expectations:
    """Of each trained token's place, row by row.

    Attributes:
        starts_R1: where the places of each row begin, and where the last ones end.
        ids_MK: the likeliest tokens.
        log_probs_MK: of these, float32.
        rest_M: logarithm of what is left for all others; -inf where there are none.
    """

    starts_R1: torch.Tensor
    ids_MK: torch.Tensor
    log_probs_MK: torch.Tensor
    rest_M: torch.Tensor

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, for a file."""
        return dict(vars(self))

    def find(self, places_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids and log-probabilities (N, K) and the rest (N) of a batch's trained tokens, where the batch is.

        Args:
            places_N: of their rows in the dataset, row after row.

        Raises:
            TrainingError: the batch trains on others than were read.
        """
        rows, counts = torch.unique_consecutive(places_N.cpu(), return_counts=True)
        firsts, ends = self.starts_R1[rows], self.starts_R1[rows + 1]
        if not torch.equal(ends - firsts, counts):
            raise TrainingError("a batch trains on other tokens than those that the start was asked about")
        found_N = torch.cat([torch.arange(*pair) for pair in zip(firsts.tolist(), ends.tolist(), strict=True)])
        ids_NK, log_probs_NK, rest_N = (values[found_N] for values in (self.ids_MK, self.log_probs_MK, self.rest_M))
        device = places_N.device
        return ids_NK.to(device), log_probs_NK.to(device), rest_N.to(device)


def take_likeliest(log_probs_NV: torch.Tensor, num_kept: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and log-probabilities (N, K) of the likeliest tokens, and that of all others together (N)."""
    log_probs_NK, ids_NK = log_probs_NV.topk(num_kept, dim=-1)
    return ids_NK.int(), log_probs_NK, log_probs_NV.scatter(-1, ids_NK, -torch.inf).logsumexp(-1)


def find_expectations(
    trainer: Trainer, spec: RoundSpec, start: Path, num_kept: int, without_target: bool, on_batch: Progress
) -> Expectations:
    """From the cache, or by asking the untouched model about every row; rank 0 decides for all.

    Args:
        without_target: leave the token that is taught out of the distribution.

    Raises:
        InputError: what is in the cache is damaged, or of another base or of other rows.
    """
    is_first = trainer.args.process_index == 0
    starts_R1 = count_tokens(trainer)
    found: list[Expectations | None] = [None]
    path = None
    if is_first:  # the weights are read whole for the key, and the ranks may be on machines with other caches
        key = make_key(trainer, spec, start, num_kept, without_target)
        path = default_cache("expectations") / f"{key}.safetensors"
        found = [read_expectations(path, starts_R1, num_kept) if path.exists() else None]
    if trainer.args.world_size > 1:
        torch.distributed.broadcast_object_list(found)
    if found[0] is not None:
        return found[0]
    asked = ask(trainer, starts_R1, num_kept, without_target, on_batch)
    if path is not None:
        write_expectations(path, asked)
    return asked


def count_tokens(trainer: Trainer) -> torch.Tensor:
    """Where each row's trained tokens begin, with their number in all (R + 1)."""
    counts = [
        int((trainer.data_collator([example])["places"][:, 1:] >= 0).sum())
        for example in trainer.train_dataset
    ]  # fmt: skip
    return torch.tensor([0, *counts]).cumsum(0)


@torch.no_grad()
def ask(trainer: Trainer, starts_R1: torch.Tensor, num_kept: int, without_target: bool, on_batch: Progress) -> Expectations:
    """What the model as it is now expects."""
    args, dataset, num_tokens = trainer.args, trainer.train_dataset, int(starts_R1[-1])
    ids_MK = torch.zeros(num_tokens, num_kept, dtype=torch.int32)
    log_probs_MK, rest_M = torch.zeros(num_tokens, num_kept), torch.zeros(num_tokens)
    batches = deal_rows(list(map(len, dataset["input_ids"])), count_batch_tokens(args.device), args.world_size)
    with evaluating(trainer.model_wrapped):
        for index, batch in enumerate(batches):
            own = batch[args.process_index :: args.world_size]
            # A rank without a row passes all the same, because under ZeRO 3 the ranks gather the weights together.
            inputs = trainer.move_batch(trainer.data_collator([dataset[row] for row in own or batch[:1]]))
            log_probs_NV = read_distributions(trainer.model_wrapped, inputs, without_target)
            if own:
                found_N = torch.cat([torch.arange(*starts_R1[row : row + 2].tolist()) for row in own])
                found = take_likeliest(log_probs_NV, num_kept)
                ids_MK[found_N], log_probs_MK[found_N], rest_M[found_N] = (values.cpu() for values in found)
            on_batch(index + 1, len(batches))
    if args.world_size > 1:
        for values in (ids_MK, log_probs_MK, rest_M):
            for part in values.view(-1).split(SUMMED):
                held = part.to(args.device)
                torch.distributed.all_reduce(held)
                part.copy_(held)
    return Expectations(starts_R1, ids_MK, log_probs_MK, rest_M)


def read_distributions(model: torch.nn.Module, inputs: dict[str, torch.Tensor], without_target: bool) -> torch.Tensor:
    """Log-probabilities at the places before the trained tokens of a batch (N, V), float32, row after row."""
    is_trained_BT = inputs["places"][:, 1:] >= 0
    columns_C = is_trained_BT.any(0).nonzero().squeeze(-1)
    rows = {name: values for name, values in inputs.items() if name not in ("labels", "places")}
    logits_BCV = model(**rows, use_cache=False, logits_to_keep=columns_C).logits
    is_trained_BC = is_trained_BT[:, columns_C]
    log_probs_NV = logits_BCV[is_trained_BC].float().log_softmax(-1)
    return leave_out(log_probs_NV, inputs["labels"][:, 1:][:, columns_C][is_trained_BC]) if without_target else log_probs_NV


def leave_out(log_probs_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """The distributions without a token each, which has -inf."""
    return log_probs_NV.scatter(-1, targets_N.unsqueeze(-1), -torch.inf).log_softmax(-1)


def make_key(trainer: Trainer, spec: RoundSpec, start: Path, num_kept: int, without_target: bool) -> str:
    """A hash of all that shapes what is expected. What it left out would be trained on stale."""
    columns = [name for name in trainer.train_dataset.column_names if name != "place"]
    shaping: dict[str, Any] = {
        "start": identify_start(start),
        "tokens": hash_tokens(trainer.train_dataset.select_columns(columns)),
        "model": spec.model.model_dump(include={"dtype", "attn_implementation"}),
        "arithmetic": find_arithmetic(is_mixed(spec), spec.launch.num_ranks, spec.launch.offload),
        "embeddings": str(trainer.model.get_input_embeddings().weight.dtype),  # frozen ones may be held in bfloat16
        "device": name_device(trainer.args.device),
        "packing": spec.train.packing,
        "num_kept": num_kept,
        "without_target": without_target,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()


def read_expectations(path: Path, starts_R1: torch.Tensor, num_kept: int) -> Expectations:
    """Raises: InputError: the file is damaged, or holds those of another base or of other rows."""
    try:
        with safe_open(path, framework="pt") as file:
            found = Expectations(**{name: file.get_tensor(name) for name in Expectations.__annotations__})
            key = file.metadata()["key"]
    except (SafetensorError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}", "remove it: it is computed again") from None
    is_fitting = torch.equal(found.starts_R1, starts_R1) and found.ids_MK.shape == (int(starts_R1[-1]), num_kept)
    if key != path.stem or not is_fitting:
        raise InputError(f"{path} holds what another base expects, or of other rows", "remove it: it is computed again")
    return found


def write_expectations(path: Path, found: Expectations) -> None:
    """Keep them under their key, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = name_temporary(path)
    write_tensors(temporary, found.tensors, {"key": path.stem})
    temporary.replace(path)
