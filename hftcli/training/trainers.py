"""TRL's trainers as hft drives them: their arguments from a round's spec, rows that come tokenized, methods, references."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from trl import DPOConfig, SFTConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hftcli.errors import InputError
from hftcli.freezing.activations import LossKernel
from hftcli.launching.packages import list_trackers
from hftcli.methods.method import Method
from hftcli.models.device import find_device, is_mixed, is_sharded
from hftcli.runs.run import Round
from hftcli.runs.spec import RoundSpec
from hftcli.runs.tracked import PROJECT, find_mlflow_variables, find_run, list_variables
from hftcli.training.dealing import DealingTrainer, PlacingCollator
from hftcli.training.internals import PreparedPairs, PreparedRows, ResumableTrainer, forbid_shm_build
from hftcli.training.loss import DPO_OUTPUTS, SFT_OUTPUTS, find_columns, keep_logits, shape_loss
from hftcli.training.references import Reference

SPENT_KEYS = {
    "global_batch_size",
    "assistant_only_loss",
    "completion_only_loss",
    "fit",
    "memory_bytes",
    "loss_kernel",
}  # before the trainer exists


def make_training_arguments(spec: RoundSpec, folder: Path) -> SFTConfig | DPOConfig:
    """Translate a round's spec for TRL. With several processes, this is where they join.

    Raises:
        InputError: a value under `train` that TRL does not take, or another number of ranks than the round is prepared for.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks != spec.launch.num_ranks:  # started by hand: the global batch would be another one
        raise InputError(
            f"{folder} is prepared for {spec.launch.num_ranks} ranks, and {num_ranks} were started",
            "start as many, or prepare it again with another launch.num_processes or launch.num_nodes",
        )
    if "mlflow" in list_trackers(spec.train) and os.environ.get("RANK", "0") == "0":
        for name, value in find_mlflow_variables(Round(folder.parent)).items():
            os.environ.setdefault(name, value)
    if not is_sharded(spec):
        return build_arguments(spec, folder)
    from deepspeed import init_distributed

    has_gpu = torch.cuda.is_available()
    backend = {} if has_gpu else {"ddp_backend": "gloo"}
    args = build_arguments(spec, folder, deepspeed=make_deepspeed_config(spec), **backend)
    if not has_gpu:
        forbid_shm_build()
    # Without GPUs, accelerate joins the ranks through torch alone, and ZeRO 3 would load the model as if on one rank.
    init_distributed(dist_backend="nccl" if has_gpu else "gloo")
    return args


def build_arguments(spec: RoundSpec, folder: Path, **launch: Any) -> SFTConfig | DPOConfig:
    """A round's spec as TRL has it.

    Args:
        launch: what several processes need besides.

    Raises:
        InputError: a value under `train` that TRL does not take.
    """
    has_gpu = torch.cuda.is_available()
    values: dict[str, Any] = {
        "report_to": "none",
        **spec.train.model_dump(exclude=SPENT_KEYS),
        **launch,
        "output_dir": str(folder),
        "bf16": is_mixed(spec),
        "use_cpu": find_device(spec.launch.num_ranks).type == "cpu",
        "gradient_accumulation_steps": spec.num_accumulation_steps,
        "max_length": spec.data.max_length,
        "dataloader_pin_memory": has_gpu,
        "save_strategy": "no",  # steps.py says when
        "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
        "disable_tqdm": True,
    }
    if spec.objective == "dpo" or not spec.train.packing:
        values.setdefault("pad_to_multiple_of", find_padding(spec.data.max_length))
    if spec.train.activation_checkpointing:
        values["activation_checkpointing_kwargs"] = _choose_checkpointing(spec)
    if spec.dpo is None:
        kind = SFTConfig
        values["dataset_kwargs"] = {"skip_prepare_dataset": True}  # the rows come tokenized
    else:
        kind = DPOConfig
        del values["packing"]
        values |= spec.dpo.model_dump(mode="json")
        # TRL then loads no second model; the log-probabilities come from hft's reference.
        values["precompute_ref_log_probs"] = spec.reference != "full"
    if spec.train.extra.get("report_to", "none") != "none":
        name_in_trackers(values, Round(folder.parent))
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"train: TRL refuses these settings: {error}") from None


def name_in_trackers(values: dict[str, Any], round_: Round) -> None:
    """Call the round by its run's name and its own, whatever tracker is told of it, where the user gives no other name."""
    values.setdefault("project", PROJECT)
    values.setdefault("run_name", f"{find_run(round_).folder.name}/{round_.name}")
    for name, value in list_variables(round_, values["project"]).items():
        os.environ.setdefault(name, value)


def _choose_checkpointing(spec: RoundSpec) -> dict[str, Any]:
    return {**(spec.train.extra.get("activation_checkpointing_kwargs") or {}), "use_reentrant": False}


def find_padding(max_length: int) -> int | None:
    """What lengths are rounded up to: matrix kernels are made for every new length, and are slower at odd ones.

    A row gets at most 15 tokens longer, a thirty-second of the longest one, and never longer than that.
    """
    multiple = min(16, max_length // 32)
    return multiple if multiple > 1 and max_length % multiple == 0 else None


def make_deepspeed_config(spec: RoundSpec) -> dict[str, Any]:
    """DeepSpeed's settings; `auto` is filled in by transformers from the training arguments.

    Raises:
        InputError: stage 0 in bfloat16, where DeepSpeed keeps no float32 masters and small updates would be lost.
    """
    if is_mixed(spec) and spec.launch.zero_stage == 0:
        raise InputError(
            "launch.zero_stage 0 in bfloat16 trains without float32 masters, so that small updates are lost",
            "set launch.zero_stage: 1, which keeps them and shards them, or train.bf16: false",
        )
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": is_mixed(spec)},
        # As one process does: gradients are summed over micro-batches and ranks in float32, whatever they are computed in.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": spec.launch.zero_stage, **make_offloading(spec)},
        "zero_force_ds_cpu_optimizer": False,  # its own would be compiled first
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
    }


def make_offloading(spec: RoundSpec) -> dict[str, Any]:
    """DeepSpeed's setting for an optimizer in host memory."""
    if spec.launch.offload == "none":
        return {}
    return {"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}


class MethodTrainer(DealingTrainer, ResumableTrainer):
    """To stand before one of TRL's trainers among a class's bases: methods, with a hand on its loss and its gradients."""

    def __init__(self, methods: list[Method], args: SFTConfig | DPOConfig, **kwargs: Any):
        self.masters, self.totals = {}, {}
        for method in methods:
            method.set_arguments(args)
        self.methods = methods
        super().__init__(args=args, **kwargs)
        self.add_callback(MethodCallback(self))

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule, with a warm-up that leaves a step to train in."""
        if num_training_steps == 1 and self.args.warmup_steps < 1:
            self.args.warmup_steps = 0  # a share, which transformers would round up to the only step
        cycle = max((method.cycle_steps for method in self.methods), default=1)
        scheduler = super().create_scheduler(math.ceil(num_training_steps / cycle), *args, **kwargs)
        if cycle > 1:
            assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)  # as all of transformers' that hft takes
            scheduler.lr_lambdas = [partial(_take_cycles, inner, cycle) for inner in scheduler.lr_lambdas]
        return scheduler

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of all that ever trains in the round."""
        with self.counting_waiting():
            return super().create_optimizer(model)

    @contextmanager
    def counting_waiting(self) -> Iterator[None]:
        """What waits for its turn counts as trained."""
        waiting = [parameter for method in self.methods for parameter, _ in method.list_waiting().values()]
        for parameter in waiting:
            parameter.requires_grad_(True)
        yield
        for parameter in waiting:
            parameter.requires_grad_(False)

    def list_trained(self) -> dict[str, torch.Tensor]:
        """What trains in the round, by name, with its exact values."""
        waiting = {name: values for method in self.methods for name, (_, values) in method.list_waiting().items()}
        return super().list_trained() | waiting

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """TRL's loss, with the methods' penalties on top."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # With the number of tokens in a step, TRL's loss is that of the step, and its parts are added up.
        num_parts = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        for method in self.methods:
            for name, total_2 in method.list_totals().items():
                self.add_total(name, total_2)
            penalty = method.compute_penalty()
            if penalty is not None:
                self.add_metric("penalty", penalty.item())
                loss = loss + penalty / num_parts
        return loss


class TaskTrainer(MethodTrainer, PreparedRows):
    """TRL's SFTTrainer on rows that come tokenized."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTConfig,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
        methods: list[Method],
        loss_kernel: LossKernel,
    ):
        if any(method.asks_places for method in methods):
            dataset = dataset.add_column("place", list(range(len(dataset))))
        super().__init__(methods, args, model=model, train_dataset=dataset, processing_class=tokenizer, callbacks=callbacks)
        self.data_collator = PlacingCollator(self.data_collator)
        if loss_kernel == "plain":
            penalties = [method.penalize_tokens for method in methods if method.reads_distributions]
            keep_logits(model, SFT_OUTPUTS, penalties)
        shape_loss(model, [method.weigh_tokens for method in methods])

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's loss; what has to know what the start, or the model, expects asks it first."""
        inputs = dict(inputs)
        places_BT = inputs.pop("places", None)
        for method in self.methods:
            if method.asks_places and places_BT is not None:
                method.see_places(places_BT)
        if readers := [method for method in self.methods if method.reads_ahead]:
            columns_N = find_columns(inputs["labels"])
            for method in readers:
                method.read_ahead(self.model, inputs, columns_N)
        return super().compute_loss(model, inputs, *args, **kwargs)


class MethodCallback(TrainerCallback):
    """Calls the methods of a trainer before the first step, and before and after every step."""

    def __init__(self, trainer: MethodTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: transformers.TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the methods."""
        for method in self.trainer.methods:
            method.start(self.trainer)

    def on_pre_optimizer_step(
        self, args: transformers.TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the methods change the gradient."""
        for method in self.trainer.methods:
            method.change_gradient(self.trainer)

    def on_optimizer_step(
        self, args: transformers.TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the methods of the step."""
        for method in self.trainer.methods:
            method.end_step()


@dataclass
class PairCollator(DataCollatorForPreference):
    """Keeps the pairs' places in the dataset, by which their precomputed log-probabilities are found."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, with the pairs' places."""
        return {**super().torch_call(examples), "row": torch.tensor([example["row"] for example in examples])}


class PairTrainer(MethodTrainer, PreparedPairs):
    """TRL's DPOTrainer on pairs that come tokenized, with one of hft's references.

    Args:
        dataset: `prompt_ids`, `chosen_ids` and `rejected_ids`.
        reference: None leaves the reference to TRL, which asks `ref_model`.
        ref_model: the second model, where there is one.

    Raises:
        InputError: settings that do not go together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: DPOConfig,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
        methods: list[Method],
        loss_kernel: LossKernel,
        reference: Reference | None,
        ref_model: PreTrainedModel | None,
    ):
        self.reference = reference
        try:
            super().__init__(
                methods,
                args,
                model=model,
                ref_model=ref_model,
                data_collator=PairCollator(tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of),
                train_dataset=dataset.add_column("row", list(range(len(dataset)))),
                processing_class=tokenizer,
                callbacks=callbacks,
            )
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"dpo: TRL refuses these settings: {error}") from error
        if loss_kernel == "plain":
            keep_logits(model, DPO_OUTPUTS if args.use_weighting else DPO_OUTPUTS[:-1])

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's loss, with the reference's log-probabilities of this batch."""
        inputs = dict(inputs)
        rows_B = inputs.pop("row")
        if self.reference is not None:
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = self.reference.score(self, inputs, rows_B)
        checkpoint_layers(self.model, self.args)
        return super().compute_loss(model, inputs, *args, **kwargs)


def _take_cycles(schedule: Callable[[int], float], cycle: int, step: int) -> float:
    """The learning rate's factor in a step, where it changes once a cycle of so many steps."""
    return schedule(step // cycle)


def checkpoint_layers(model: PreTrainedModel, args: transformers.TrainingArguments) -> None:
    """Set up activation checkpointing anew, without the hook that gives the embeddings' output a gradient.

    transformers adds the hook for reentrant checkpoints. With others it is not needed, and where the lowest layers are frozen
    it would have them keep a graph, recompute, and pass gradients down to nobody. TRL sets checkpointing up anew after it
    asked a reference, with the hook and without `every_n_layers`.
    """
    if not args.activation_checkpointing:
        return
    kwargs = dict(args.activation_checkpointing_kwargs)
    own = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
    model.disable_input_require_grads()
    model.activation_checkpointing_enable(kwargs, **own)
    model.disable_input_require_grads()


def silence_libraries() -> None:
    """Libraries tell their users' maintainers about themselves and draw their own bars; here they do neither."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    transformers.utils.logging.disable_progress_bar()
