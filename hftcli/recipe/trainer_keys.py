"""What hft does with every field of the trainers' arguments.

These are TRL's SFTConfig and DPOConfig, and the TrainingArguments of transformers that both inherit from. A field is `Ours`:
hft sets it, from a key of its own. Or it is `Passed` on as it is given, of the type that stands here. Or it is `Refused`, with
the reason and what serves instead. A field that stands in no table is unknown, and a test goes through the installed versions
for one.

The tables are those of the sections: SHARED and SFT_ONLY of `train`, DPO_ONLY of `dpo`.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError


@dataclass(frozen=True)
class Ours:
    """Set by hft.

    Attributes:
        key: the recipe's key that it comes from.
    """

    key: str


@dataclass(frozen=True)
class Passed:
    """Given to the trainer as it is.

    Attributes:
        kind: its type, for pydantic.
    """

    kind: Any


@dataclass(frozen=True)
class Refused:
    """Not taken.

    Attributes:
        reason: why.
        instead: what to use; empty where nothing is missing.
    """

    reason: str
    instead: str = ""


Fate = Ours | Passed | Refused


Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]  # as numpy takes it
Share = Annotated[float, Field(ge=0, lt=1)]
Options = dict[str, Any]
LogLevel = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]

# The optimizers, and the package that each needs besides torch and transformers.
ADAMS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), None),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"), "bitsandbytes"),
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), "bitsandbytes"),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), "torchao"),
}
LIONS = dict.fromkeys(("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"), "bitsandbytes")
PLAIN = {
    **dict.fromkeys(("adafactor", "sgd", "adagrad", "rmsprop"), None),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), "bitsandbytes"),
}
OPTIMIZERS: dict[str, str | None] = {**ADAMS, **LIONS, **PLAIN}
# Settings that act under `train.optim_args`; TRL passes over any other without a word, and over a weight_decay, since it writes
# train.weight_decay into every group of parameters.
OPTIMIZER_ARGUMENTS = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    **dict.fromkeys(ADAMS.keys() - {"adamw_torch_4bit", "adamw_torch_8bit"}, ()),
    **{name: ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3") for name in ADAMS if "ademamix" in name},
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), ("block_size", "bf16_stochastic_round")),
    **dict.fromkeys(LIONS, ()),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), ("momentum", "alpha", "eps", "centered")),
    "adafactor": (),
}
REFUSED_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch_xla", "adamw_torch_npu_fused"), "is for devices that hft does not run on"),
    "adamw_anyprecision": "comes with torchdistx, which is kept up no more",
    **dict.fromkeys(
        ("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise",
         "galore_adafactor_layerwise", "apollo_adamw", "apollo_adamw_layerwise"),
        "chooses layers by name, whatever the freeze plan trains of them",
    ),
    **dict.fromkeys(("lomo", "adalomo"), "changes weights inside the backward pass, before the step is known"),
    **dict.fromkeys(
        ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
        "trains other weights than those that are to be saved",
    ),
    **dict.fromkeys(("grokadamw", "stable_adamw"), "has not been seen to act under hft"),
}  # fmt: skip
# The trackers, and the package that each needs.
TRACKERS = {
    "azure_ml": "azureml", "clearml": "clearml", "comet_ml": "comet_ml", "dagshub": "dagshub", "dvclive": "dvclive",
    "mlflow": "mlflow", "neptune": "neptune", "swanlab": "swanlab", "tensorboard": "tensorboard", "trackio": "trackio",
    "wandb": "wandb",
}  # fmt: skip
# Keys of a recipe that say who is told of a run, and change nothing of what comes out.
TELLING_KEYS = tuple(
    f"train.{name}"
    for name in ("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
)
REFUSED_TRACKERS = {
    "all": "would be other trackers on another machine: name them",
    "codecarbon": "writes into a folder that is cleared at the end of a round",
    "flyte": "works inside Flyte's own tasks only",
    "kubeflow": "works inside Kubeflow's own jobs only",
}


def _check_optimizer(name: str) -> str:
    if name in REFUSED_OPTIMIZERS:
        raise PydanticCustomError("refused", f"{name} {REFUSED_OPTIMIZERS[name]}: take another")
    if name not in OPTIMIZERS:
        raise PydanticCustomError("unknown", f"input should be one of {', '.join(OPTIMIZERS)}")
    return name


def _check_tracker(name: str) -> str:
    if name in REFUSED_TRACKERS:
        raise PydanticCustomError("refused", f"{name} {REFUSED_TRACKERS[name]}")
    if name not in TRACKERS and name != "none":
        raise PydanticCustomError("unknown", f"input should be one of none, {', '.join(TRACKERS)}")
    return name


Tracker = Annotated[str, AfterValidator(_check_tracker)]

_EVALUATION = "hft evaluates before and after a round, and not within it"
_BEST = "hft keeps the model of the last step, and chooses no other"
_SAVING = "hft writes step checkpoints itself"
_UPLOAD = "hft uploads nothing while it trains"
_UPLOAD_LATER = "`hft push RUN --repo OWNER/NAME` once the run is finished"
_DEALING = "hft deals the rows to the ranks itself, so that a recipe means the same on any number of them"
_DDP = "several ranks are DeepSpeed's, which has no such setting"
_TOKENS = "the rows come tokenized by hft"
_REST = "hft does that itself"

# The fields of transformers' TrainingArguments, in their order.
SHARED: dict[str, Fate] = {
    "output_dir": Ours("output"),
    "per_device_train_batch_size": Ours("train.per_device_train_batch_size"),
    "num_train_epochs": Ours("train.num_train_epochs"),
    "max_steps": Ours("train.max_steps"),
    "learning_rate": Ours("train.learning_rate"),
    "lr_scheduler_type": Ours("train.lr_scheduler_type"),
    "lr_scheduler_kwargs": Passed(Options),
    "warmup_steps": Ours("train.warmup_steps"),
    "optim": Passed(Annotated[str, AfterValidator(_check_optimizer)]),
    "optim_args": Passed(str),
    "weight_decay": Ours("train.weight_decay"),
    "adam_beta1": Passed(Share),
    "adam_beta2": Passed(Share),
    "adam_epsilon": Passed(Annotated[float, Field(ge=0)]),
    "optim_target_modules": Refused("it is for optimizers that choose layers by name, and the freeze plan chooses"),
    "gradient_accumulation_steps": Ours("train.global_batch_size (accumulation is derived from it)"),
    "average_tokens_across_devices": Refused("a step's loss is always the mean over the tokens of all ranks"),
    "max_grad_norm": Passed(Annotated[float, Field(ge=0)]),
    "label_smoothing_factor": Passed(Share),
    "bf16": Ours("train.bf16"),
    "fp16": Ours("train.bf16"),
    "bf16_full_eval": Refused("what is scored computes as the training does", "train.bf16"),
    "fp16_full_eval": Refused("what is scored computes as the training does", "train.bf16"),
    "tf32": Passed(bool | None),
    "activation_checkpointing": Ours("train.activation_checkpointing"),
    "activation_checkpointing_kwargs": Passed(Options | None),
    "gradient_checkpointing": Ours("train.activation_checkpointing"),
    "gradient_checkpointing_kwargs": Refused("it is called otherwise", "train.activation_checkpointing_kwargs"),
    "torch_compile": Refused("hft has its own forward pass around the loss, which has not been seen to compile"),
    "torch_compile_backend": Refused("hft compiles nothing"),
    "torch_compile_mode": Refused("hft compiles nothing"),
    "use_liger_kernel": Refused("TRL gives it up, and its gain is in the loss", "train.loss_kernel: chunked"),
    "liger_kernel_config": Refused("TRL gives it up, and its gain is in the loss", "train.loss_kernel: chunked"),
    "use_cache": Refused("a training step has no use for a cache, and the saved model keeps the start's setting"),
    "neftune_noise_alpha": Passed(Annotated[float, Field(gt=0)] | None),
    "torch_empty_cache_steps": Passed(Count | None),
    "auto_find_batch_size": Refused("it would try until memory fails", "train.fit: auto"),
    "logging_strategy": Refused("metrics.jsonl has a row every so many steps", "train.logging_steps"),
    "logging_steps": Ours("train.logging_steps"),
    "logging_first_step": Passed(bool),
    "log_on_each_node": Refused("rank 0 alone writes metrics.jsonl"),
    "logging_nan_inf_filter": Refused("a loss that is not a number must be seen: it stops the round"),
    "include_num_input_tokens_seen": Refused("metrics.jsonl has num_tokens, in which padding does not count"),
    "log_level": Passed(LogLevel),
    "log_level_replica": Passed(LogLevel),
    "disable_tqdm": Refused("hft shows its own progress"),
    "report_to": Passed(Tracker | list[Tracker]),
    "run_name": Passed(str),
    "project": Passed(str),
    "trackio_space_id": Passed(str | None),
    "trackio_bucket_id": Passed(str | None),
    "trackio_static_space_id": Passed(str | Literal[False] | None),
    "eval_strategy": Refused(_EVALUATION, "eval.tasks, or eval.held_out"),
    "eval_steps": Refused(_EVALUATION, "eval.tasks, or eval.held_out"),
    "eval_delay": Refused(_EVALUATION),
    "per_device_eval_batch_size": Refused("hft makes the batches of its evaluation by the length of the rows"),
    "prediction_loss_only": Refused(_EVALUATION),
    "eval_on_start": Refused("hft always evaluates before a round", "eval.tasks, or eval.held_out"),
    "eval_do_concat_batches": Refused(_EVALUATION),
    "eval_use_gather_object": Refused(_EVALUATION),
    "eval_accumulation_steps": Refused(_EVALUATION),
    "include_for_metrics": Refused(_EVALUATION),
    "batch_eval_metrics": Refused(_EVALUATION),
    "save_only_model": Refused("a step checkpoint without the optimizer could not be gone on from"),
    "save_strategy": Refused(_SAVING, "checkpoint.save_steps, checkpoint.save_every_minutes"),
    "save_steps": Ours("checkpoint.save_steps"),
    "save_on_each_node": Refused("the nodes share the run's folder"),
    "save_total_limit": Ours("checkpoint.keep"),
    "enable_jit_checkpoint": Refused("a signal has hft write a step checkpoint anyway"),
    "push_to_hub": Refused(_UPLOAD, _UPLOAD_LATER),
    "hub_token": Refused("it is a secret, and a recipe is written into its run", "HF_TOKEN, or `hf auth login`"),
    "hub_private_repo": Refused(_UPLOAD, _UPLOAD_LATER),
    "hub_model_id": Refused(_UPLOAD, _UPLOAD_LATER),
    "hub_strategy": Refused(_UPLOAD, _UPLOAD_LATER),
    "hub_always_push": Refused(_UPLOAD, _UPLOAD_LATER),
    "hub_revision": Refused(_UPLOAD, _UPLOAD_LATER),
    "load_best_model_at_end": Refused(_BEST),
    "metric_for_best_model": Refused(_BEST),
    "greater_is_better": Refused(_BEST),
    "ignore_data_skip": Refused("a resumed round goes on at its place in the rows"),
    "restore_callback_states_from_checkpoint": Refused("a resumed round restores all that it remembers"),
    "full_determinism": Passed(bool),
    "seed": Ours("train.seed"),
    "data_seed": Passed(Seed | None),
    "use_cpu": Refused("hft takes the GPU where there is one", "CUDA_VISIBLE_DEVICES= in front of the command"),
    "accelerator_config": Refused(_DEALING),
    "parallelism_config": Refused("hft shards with DeepSpeed", "launch.zero_stage"),
    "dataloader_drop_last": Refused("every row counts, those of a part-full step too: its loss is the mean over what is in it"),
    "dataloader_num_workers": Passed(Annotated[int, Field(ge=0)]),
    "dataloader_pin_memory": Refused("it is on where there is a GPU, and of no use elsewhere"),
    "dataloader_persistent_workers": Passed(bool),
    "dataloader_prefetch_factor": Passed(Count | None),
    "dataloader_multiprocessing_context": Passed(Literal["fork", "spawn", "forkserver"] | None),
    "dataloader_in_order": Passed(bool),
    "remove_unused_columns": Refused(_TOKENS),
    "label_names": Refused(_TOKENS),
    "train_sampling_strategy": Passed(Literal["random", "sequential", "group_by_length"]),
    "length_column_name": Refused(f"{_TOKENS}, and have no such column"),
    "ddp_find_unused_parameters": Refused(_DDP),
    "ddp_bucket_cap_mb": Refused(_DDP),
    "ddp_broadcast_buffers": Refused(_DDP),
    "ddp_static_graph": Refused(_DDP),
    "ddp_backend": Refused("it is nccl between GPUs and gloo between CPU ranks"),
    "ddp_timeout": Passed(Count),
    "fsdp": Refused("hft shards with DeepSpeed", "launch.zero_stage: 3"),
    "fsdp_config": Refused("hft shards with DeepSpeed", "launch.zero_stage: 3"),
    "deepspeed": Ours("launch.zero_stage"),
    "debug": Refused("hft stops a round whose loss is not a number, and names the step"),
    "skip_memory_metrics": Refused("result.json has the peak of memory"),
    "do_train": Refused("a round always trains"),
    "do_eval": Refused(_EVALUATION, "eval.tasks, or eval.held_out"),
    "do_predict": Refused("hft does not predict in training", "`hft eval`"),
    "resume_from_checkpoint": Refused("a stopped round goes on from its last step checkpoint", "the same command again"),
    "local_rank": Refused("the launcher says it"),
}  # fmt: skip

# What TRL's SFTConfig adds.
SFT_ONLY: dict[str, Fate] = {
    "model_init_kwargs": Refused("hft loads the model", "the keys of model"),
    "trust_remote_code": Refused("hft runs no code that comes with a model: it trains families that transformers has"),
    "router_aux_loss_coef": Passed(Annotated[float, Field(ge=0)] | None),
    "chat_template_path": Refused("it acts after the rows are tokenized", "model.chat_template"),
    "dataset_text_field": Refused("the format of the rows is found by their columns; `hft data` says which it is"),
    "dataset_kwargs": Refused(_TOKENS),
    "dataset_num_proc": Refused(_TOKENS),
    "eos_token": Refused("it acts after the rows are tokenized, so that another end would be saved than is trained",
                         "model.chat_template, or the tokenizer's own eos_token"),
    "max_length": Ours("data.max_length"),
    "truncation_mode": Refused(f"{_TOKENS}, and are cut at the end"),
    "shuffle_dataset": Refused("the rows are shuffled in every epoch", "train.train_sampling_strategy: sequential, else"),
    "packing": Ours("train.packing"),
    "packing_strategy": Refused("hft packs whole rows, and attention never crosses their borders", "train.packing"),
    "padding_free": Refused("it goes with packing only", "train.packing"),
    "pad_to_multiple_of": Passed(Count | None),
    "eval_packing": Refused("hft packs nothing that it evaluates"),
    "completion_only_loss": Ours("train.completion_only_loss"),
    "assistant_only_loss": Ours("train.assistant_only_loss"),
    "loss_type": Passed(Literal["nll", "dft"]),
    "activation_offloading": Passed(bool),
    "pad_token": Refused("TRL gives it up, and no padding is trained or attended to"),
}  # fmt: skip

# What TRL's DPOConfig adds; the names that SFTConfig has too are given under `dpo`.
DPO_ONLY: dict[str, Fate] = {
    **{name: SFT_ONLY[name] for name in (
        "model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "dataset_num_proc", "max_length", "truncation_mode",
        "pad_to_multiple_of", "activation_offloading", "pad_token",
    )},
    "padding_free": Refused("TRL's trainer of pairs takes it, and pads all the same"),
    "disable_dropout": Passed(bool),
    "precompute_ref_log_probs": Ours("reference: precompute"),
    "precompute_ref_batch_size": Refused("hft makes the batches of the reference by the length of the pairs"),
    "loss_type": Ours("dpo.loss_type"),
    "loss_weights": Ours("dpo.loss_weights"),
    "ld_alpha": Passed(Annotated[float, Field(ge=0, le=1)] | None),
    "f_divergence_type": Passed(Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]),
    "f_alpha_divergence_coef": Passed(float),
    "label_smoothing": Ours("dpo.label_smoothing"),
    "beta": Ours("dpo.beta"),
    "use_weighting": Passed(bool),
    "discopop_tau": Passed(Annotated[float, Field(gt=0)]),
    "sync_ref_model": Passed(bool),
    "ref_model_mixup_alpha": Passed(Annotated[float, Field(ge=0, le=1)]),
    "ref_model_sync_steps": Passed(Count),
}  # fmt: skip

# Names that transformers and TRL have given up.
GONE = {
    "max_seq_length": "data.max_length",
    "max_prompt_length": "data.max_length",
    "warmup_ratio": "train.warmup_steps (below 1 it is a share of all steps)",
    "overwrite_output_dir": "another output",
    "evaluation_strategy": "eval.tasks, or eval.held_out",
    "group_by_length": "train.train_sampling_strategy: group_by_length",
}
