"""The one place that touches what other libraries keep to themselves: names that begin with an underscore.

They are TRL's, transformers' and DeepSpeed's. `INTERNALS` lists them with what breaks when they go; a test holds the list
against the installed versions, and another finds such names anywhere else.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import TrainOutput
from trl import DPOTrainer, SFTTrainer

from hftcli.errors import InputError, TrainingError
from hftcli.models.tensors import write_tensors
from hftcli.training.offload import HostAdamW, Masters

INTERNALS = {
    "transformers.Trainer": {
        "_save_checkpoint": "step checkpoints would hold the frozen half, and a diverged state would be kept",
        "_prepare_for_training": "DeepSpeed would write and expect the frozen half",
        "_load_from_checkpoint": "a step checkpoint without the frozen half would not be laid in",
        "_load_optimizer_and_scheduler": "the schedule would start again under DeepSpeed",
        "_finalize_training": "the mean loss would count the last steps twice after a stop",
        "_run_epoch": "a round that was stopped after its last step would take another one",
        "_prepare_inputs": "GEM, EWC and the precomputed reference could not move a batch to the device",
        "_tr_loss": "the losses since the last row of metrics.jsonl would be lost in a stop",
        "_total_loss_scalar": "the mean loss would be that of the last start",
        "_globalstep_last_logged": "the first loss after a stop would be averaged over other steps",
        "_initial_global_step": "the mean loss would be that of the last start",
        "_clip_grad_norm": "gradients in host memory would not be clipped",
        "_get_grad_norm": "the norm of gradients in host memory would be logged as 0",
        "_set_signature_columns_if_needed": "the pairs' places would be dropped from the batches",
        "_signature_columns": "the pairs' places would be dropped from the batches",
    },
    "transformers.PreTrainedConfig": {
        "_attn_implementation": "a round's result would not name the attention kernel",
    },
    "trl.SFTTrainer": {
        "_metrics": "what is averaged between two rows of metrics.jsonl would be lost in a stop",
        "_total_train_tokens": "a round's tokens would be counted from the last start",
    },
    "trl.DPOTrainer": {
        "_metrics": "what is averaged between two rows of metrics.jsonl would be lost in a stop",
        "_total_train_tokens": "a round's tokens would be counted from the last start",
        "_prepare_dataset": "TRL would tokenize the pairs again",
        "_precompute_ref_logps": "TRL would ask the reference itself, under a key that is the same for different models",
    },
    "deepspeed.ops": {
        "__compatible_ops__": "CPU ranks would compile a kernel first, and wait for ever where such a build was killed",
    },
}

WEIGHTS_NAME = "trained.safetensors"

Memory = dict[str, Any]  # what a rank remembers: numbers, strings and tensors, in dicts and lists


class ResumableTrainer(Trainer):
    """To stand before one of TRL's trainers among a class's bases: what transformers saves, less what need not be saved.

    Attributes:
        saving_seconds: spent on writing step checkpoints, before they are completed.
        is_ended: whether the round has ended before its last step.
        totals: what this rank has added up since the last row of metrics.jsonl, by name, with how much of it there was, (2,).
    """

    saving_seconds = 0.0
    is_ended = False
    masters: Masters
    totals: dict[str, torch.Tensor]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, on the host where the masters are there."""
        optimizer = super().create_optimizer(model)
        if self.masters and not isinstance(optimizer, HostAdamW):
            options = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
            groups = [{key: group[key] for key in ("params", *options)} for group in optimizer.param_groups if group["params"]]
            self.optimizer = optimizer = HostAdamW(groups, self.masters, **options)
        return optimizer

    @property
    def attention(self) -> str:
        """The attention kernel, as transformers names it."""
        return str(self.model.config._attn_implementation)

    @property
    def host_optimizer(self) -> HostAdamW | None:
        """The optimizer on the host, below what accelerate puts around it."""
        inner = self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer
        return inner if isinstance(inner, HostAdamW) else None

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        if (optimizer := self.host_optimizer) is not None:
            return optimizer.clip(self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | None = None) -> Any:
        if grad_norm is None and (optimizer := self.host_optimizer) is not None:
            return optimizer.clip(float("inf"))
        return super()._get_grad_norm(model, grad_norm)

    def counting_waiting(self) -> AbstractContextManager[None]:
        """Have what waits for its turn to train count as trained, where DeepSpeed would leave it out as frozen."""
        return nullcontext()

    def list_trained(self) -> dict[str, torch.Tensor]:
        """What trains, by name: masters where there are any."""
        found = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        return {name: self.masters.get(value, value) for name, value in found.items()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What trains; the rest is the start's. DeepSpeed writes files of its own."""
        if not self.is_deepspeed_enabled:
            weights = {name: value.detach() for name, value in self.list_trained().items()}
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(folder / WEIGHTS_NAME, weights)

    def save_step(self) -> None:
        """Write a step checkpoint now, after the last step; all ranks together."""
        self._save_checkpoint(self.model_wrapped, None)
        self.callback_handler.on_save(self.args, self.state, self.control)

    def move_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch as the collator gives it, on the device."""
        return self._prepare_inputs(batch)

    def add_metric(self, name: str, value: float) -> None:
        """Take a number of this micro-batch into the next row of metrics.jsonl, which has the mean."""
        self._metrics["train"][name].append(value)

    def add_total(self, name: str, total_2: torch.Tensor) -> None:
        """Take a sum over something of this micro-batch, and how much of it there was, into the next row of metrics.jsonl.

        The row has the mean over all of it, of all micro-batches and ranks.
        """
        held_2 = self.totals.get(name)
        self.totals[name] = total_2.detach().float() + (0 if held_2 is None else held_2.to(total_2.device))

    def take_means(self) -> dict[str, float]:
        """The means of what was added up since the last time, nothing of what there was none of. All ranks together."""
        means = {}
        for name, total_2 in self.totals.items():
            if self.args.world_size > 1:
                total_2 = total_2.to(self.args.device)
                torch.distributed.all_reduce(total_2)
            total, count = total_2.tolist()
            if count:
                means[name] = total / count
        self.totals = {}
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A row of metrics.jsonl, with the means."""
        super().log({**logs, **self.take_means()}, start_time)

    @property
    def num_tokens(self) -> int:
        """Tokens read in the round so far, over all ranks."""
        return int(self._total_train_tokens)

    def recall_sums(self) -> Memory:
        """What the trainers sum up between two rows of metrics.jsonl and over the round, and save nowhere."""
        return {
            "loss_since_log": self._tr_loss.item(),
            "logged_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "metrics": dict(self._metrics["train"]),
            "totals": {name: total_2.cpu() for name, total_2 in self.totals.items()},
            "num_tokens": self._total_train_tokens,
        }

    def restore_sums(self, memory: Memory) -> None:
        """Go on with the sums that `recall_sums` gave."""
        self._tr_loss.fill_(memory["loss_since_log"])
        self._total_loss_scalar = memory["logged_loss"]
        self._globalstep_last_logged = memory["logged_step"]
        self._initial_global_step = 0  # the mean loss is that of the round, not of this start
        self._metrics["train"].update(memory["metrics"])
        self.totals = dict(memory.get("totals", {}))  # not in a checkpoint of an earlier hft
        self._total_train_tokens = memory["num_tokens"]

    def _save_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        if not torch.isfinite(self._tr_loss):
            raise TrainingError(f"the loss became {self._tr_loss.item()} before step {self.state.global_step}")
        started = time.perf_counter()
        with self.counting_waiting():
            Trainer._save_checkpoint(self, model, trial)  # TRL's own would write a model card each time
        self.saving_seconds += time.perf_counter() - started

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader[Any], resume_from_checkpoint: str | None
    ) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        # transformers has DeepSpeed leave out what is frozen below PEFT's adapters, and nowhere else.
        engine = self.model_wrapped
        engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        if resume_from_checkpoint is not None:
            if engine.load_checkpoint(resume_from_checkpoint, load_module_strict=False)[0] is None:
                raise InputError(f"{resume_from_checkpoint} holds no checkpoint of DeepSpeed's")
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / WEIGHTS_NAME)
        trained = self.list_trained()
        if weights.keys() != trained.keys():
            raise InputError(f"{resume_from_checkpoint} holds the trained half of another plan")
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(weights[name])
            for parameter, master in self.masters.items():
                parameter.copy_(master)

    def _finalize_training(self, *args: Any) -> TrainOutput:
        outcome = super()._finalize_training(*args)
        self._tr_loss.zero_()  # it was added to the sum, and would be again after a stop here
        return outcome

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers looks for the end only after a step, and so takes one too many from a checkpoint of the last.
        if self.state.global_step < self.state.max_steps and not self.is_ended:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True


class PreparedRows(SFTTrainer):
    """SFTTrainer on rows that come tokenized, which may have their places in the dataset in the column `place`."""

    _signature_columns: list[str]
    data_collator: Any

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, "place"]


class PreparedPairs(DPOTrainer):
    """DPOTrainer on pairs that come tokenized and cut, with their places in the dataset in the column `row`."""

    _signature_columns: list[str]

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # hft's references do it

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, "row"]


def forbid_shm_build() -> None:
    """Keep DeepSpeed from compiling a kernel for inference between CPU ranks.

    It takes a minute, and where such a build was killed, its lock stays, and every later run would wait for it forever.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
