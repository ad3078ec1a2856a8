"""A setting that would have no effect beside others is refused, and says beside which it has one."""

import json

import pytest

from hftcli.errors import RecipeError
from hftcli.recipe.effects import CONDITIONS, ROOTED
from hftcli.recipe.loading import dump_recipe, load_recipe
from hftcli.tasks import BENCHMARKS

BASE = ("model.path=m", "data.path=d.jsonl")
SYNC = ["dpo.sync_ref_model=true", "reference=full", "checkpoint.save_every_minutes=null"]
SELF_REPLAY, REPLAY_AFTER = "method.self_replay.fraction=0.5", ("method.replay.when=after", "data.path=null")


def fail(objective: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, [*BASE, *overrides], objective)
    return caught.value.message


@pytest.mark.parametrize(
    ("objective", "overrides", "expected"),
    [
        ("sft", ["train.lr_scheduler_type=constant", "train.warmup_steps=5"], "train.warmup_steps would have no effect beside"),
        ("sft", ["train.lr_scheduler_kwargs={num_cycles: 2}"], "train.lr_scheduler_kwargs would have no effect beside"),
        ("sft", ["train.optim=sgd", "train.adam_beta2=0.95"], "train.adam_beta2 would have no effect beside train.optim sgd"),
        ("sft", ["train.optim_args=momentum=0.9"], "beside train.optim adamw_torch_fused: drop it, or set train.optim to"),
        ("sft", ["train.optim=sgd", "train.optim_args=momentun=0.9"], "'momentun=0.9' is none of sgd's"),
        ("sft", ["train.optim=sgd", "train.optim_args=momentum=abc"], "'momentum=abc': give a finite number"),
        ("sft", ["train.optim=sgd", "train.optim_args=momentum=true"], "'momentum=true': give a finite number"),
        ("sft", ["train.optim=rmsprop", "train.optim_args=centered=1"], "'centered=1': give true or false"),
        ("sft", ["train.optim=sgd", "train.optim_args=weight_decay=0.1"], "no effect: give it as train.weight_decay"),
        ("sft", ["train.optim=rmsprop", "train.optim_args=eps=1e-6,weight_decay=0"], "give it as train.weight_decay"),
        ("sft", ["train.train_sampling_strategy=sequential", "train.packing=true"], "lays rows into sequences by their length"),
        ("sft", ["train.train_sampling_strategy=sequential", "data={sources: [{path: a.jsonl}, {path: b.jsonl}]}",
                 "data.path=null"], "data.sources are mixed in an order by chance"),
        ("sft", ["train.loss_type=dft", "train.label_smoothing_factor=0.1"], "beside train.loss_type dft: drop it"),
        ("sft", ["train.activation_checkpointing_kwargs={every_n_layers: 2}"], "beside train.activation_checkpointing false"),
        ("sft", ["launch.offload=optimizer", "train.optim=sgd"], "launch.offload keeps AdamW's state on the host"),
        ("sft", ["train.run_name=x"], "beside train.report_to none"),
        ("sft", ["train.report_to=tensorboard", "train.run_name=x"], "beside train.report_to tensorboard"),
        ("sft", ["train.report_to=tensorboard", "train.project=x"], "set train.report_to to wandb or mlflow or trackio"),
        ("sft", ["train.report_to=wandb", "train.trackio_space_id=x"], "beside train.report_to wandb"),
        ("sft", ["train.train_sampling_strategy=sequential", "train.data_seed=1"], "train.data_seed would have no effect"),
        ("sft", ["train.loss_kernel=chunked", "train.label_smoothing_factor=0.1"], "train.loss_kernel chunked would have no"),
        ("sft", ["train.fit=auto", "train.memory_bytes=9999999", "train.activation_checkpointing_kwargs={every_n_layers: 2}"],
         "train.activation_checkpointing_kwargs.every_n_layers is what train.fit chooses"),
        ("sft", ["checkpoint.keep=3", "checkpoint.save_every_minutes=null"], "checkpoint.keep would have no effect without"),
        *(
            ("sft", ["freeze={group: layer, balance: weights}", f"freeze.redraw={{every: 5, order: {order}}}"],
             f"freeze.balance weights would have no effect beside freeze.redraw.order {order}")
            for order in ("cyclic", "ascending", "descending")
        ),
        *(
            ("sft", [f"freeze={{grain: {grain}, balance: weights}}"],
             f"freeze.balance weights would have no effect beside freeze.grain {grain}")
            for grain in ("directions", "columns", "entries")
        ),
        ("sft", ["freeze={grain: biases, embeddings: freeze, head: freeze}", "train.weight_decay=0.1"],
         "train.weight_decay would have no effect beside freeze.grain biases"),
        ("sft", ["method.peft={type: LN_TUNING}", "train.weight_decay=0.1"], "beside method.peft.type LN_TUNING: only norms"),
        ("sft", ["method.token_weights={kind: stm, strength: 0.5}"], "strength 0.5 would have no effect beside kind stm"),
        ("sft", ["train.dataloader_prefetch_factor=2"], "set train.dataloader_num_workers to 1 or more"),
        ("sft", ["train.dataloader_in_order=false"], "set train.dataloader_num_workers to 1 or more"),
        ("sft", ["train.max_steps=9", "train.num_train_epochs=1"], "=1: train.num_train_epochs would have no effect beside "
         "train.max_steps 9: drop it, or set train.max_steps to -1"),
        ("sft", ["train={max_steps: 9, num_train_epochs: 2.5}"], "train.num_train_epochs would have no effect beside"),
        ("continual", ["data.path=null", "continual.protocol=paper", "train.num_train_epochs=1"],
         "train.num_train_epochs and the epochs of continual.protocol paper are two lengths"),
        ("continual", ["data.path=null", "continual.protocol=paper", "train.max_steps=9"],
         "train.max_steps and the epochs of continual.protocol paper are two lengths"),
        ("sft", ["data.seed=1"], "data.seed would have no effect without several data.sources"),
        ("sft", ["model.path=tinyworld", "model.revision=v1"], "model.revision would have no effect: tinyworld is a folder"),
        ("sft", [SELF_REPLAY, "train.train_sampling_strategy=sequential"], "method.self_replay mixes rows in among the others"),
        ("sft", [SELF_REPLAY, "train.loss_type=dft"], "set method.token_weights.kind: dft, which leaves them alone"),
        ("sft", [SELF_REPLAY, "train.label_smoothing_factor=0.1"], "train.label_smoothing_factor smooths it"),
        ("sft", [SELF_REPLAY, "method.ift.mix=0.2"], "method.self_replay holds it to the start, which read the texts'"),
        ("continual", ["method.replay={}", "train.train_sampling_strategy=sequential"], "method.replay mixes rows in among"),
        ("continual", [*REPLAY_AFTER, "eval.num_points=3", "stop.max_forgetting=0.1"], "may end the round, or go back, before"),
        ("continual", [*REPLAY_AFTER, "eval.num_points=3", "stop.min_learning=0.1"], "may end the round, or go back, before"),
        ("continual", [*REPLAY_AFTER, "eval.num_points=3", "checkpoint.best=learning"], "go back, before the rows"),
        ("continual", [*REPLAY_AFTER, "train.train_sampling_strategy=sequential"], "sequential would have no effect beside"),
        ("continual", [*REPLAY_AFTER, "train.train_sampling_strategy=group_by_length"], "lays the rows in an order of its own"),
        ("dpo", ["train.label_smoothing_factor=0.1"], "train.label_smoothing_factor would have no effect under `hft dpo`"),
        ("dpo", ["train.train_sampling_strategy=group_by_length"], "group_by_length looks for the rows' input_ids"),
        (
            "dpo",
            ["dpo.label_smoothing=0.1"],
            "beside dpo.loss_type sigmoid: drop it, or set dpo.loss_type to robust or exo_pair",
        ),
        ("dpo", ["dpo.loss_type=[sigmoid, hinge]", "dpo.label_smoothing=0.1"], "beside dpo.loss_type sigmoid, hinge"),
        ("dpo", ["dpo.loss_type=sft", "dpo.beta=0.5"], "dpo.beta would have no effect beside dpo.loss_type sft"),
        ("dpo", ["dpo.loss_type=sft", "dpo.ld_alpha=0.5"], "dpo.ld_alpha would have no effect beside dpo.loss_type sft"),
        ("dpo", ["dpo.loss_type=sft", "dpo.f_divergence_type=forward_kl"], "dpo.f_divergence_type would have no effect beside"),
        ("dpo", ["method.lora.lora_dropout=0.2"], "lora_dropout would have no effect beside dpo.disable_dropout true"),
        ("dpo", ["method.peft={type: LORA, lora_dropout: 0.1}"], "method.peft.lora_dropout would have no effect beside"),
        ("dpo", ["method.peft={type: DELORA, module_dropout: 0.1}"], "method.peft.module_dropout would have no effect beside"),
        ("dpo", ["dpo.loss_type=exo_pair"], "not defined at dpo.label_smoothing 0"),
        ("dpo", ["dpo.loss_weights=[1, 2]"], "dpo.loss_weights has 2 values for 1 losses"),
        ("dpo", ["dpo.loss_type=aot", "dpo.use_weighting=true"], "dpo.use_weighting weighs pairs"),
        ("dpo", ["dpo.loss_type=nca_pair", "dpo.f_divergence_type=forward_kl"], "is not defined for the loss nca_pair: "
         "take losses of sigmoid, sigmoid_norm, hinge, ipo, exo_pair, robust, discopop"),
        ("dpo", ["dpo.f_alpha_divergence_coef=0.2"], "beside dpo.f_divergence_type reverse_kl"),
        ("dpo", ["dpo.discopop_tau=0.2"], "beside dpo.loss_type sigmoid"),
        ("dpo", ["dpo.ref_model_sync_steps=5"], "beside dpo.sync_ref_model false"),
        ("dpo", ["dpo.sync_ref_model=true"], "moves a second model: set reference: full"),
        ("dpo", [*SYNC, "freeze=quiet"], "directions] trains no such: drop one"),
        ("dpo", [*SYNC, "method.lora={}"], "and method.lora trains no such"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_refused(objective, overrides, expected):
    assert expected in fail(objective, *overrides)


def test_steps_or_epochs_of_the_command_line_take_the_place_of_the_files(tmp_path):
    """The quick start has 200 steps, the paper's recipe 2 epochs; -1 is no length."""

    def read(name, *overrides):
        train = load_recipe(name, overrides).train
        return train.max_steps, train.num_train_epochs

    assert read(None, "data.path=my.jsonl", "train.num_train_epochs=3") == (-1, 3)
    assert read("tinyworld", "train.num_train_epochs=1") == (-1, 1)
    assert read("tulu", "train.max_steps=20") == (20, 1)
    assert read("tulu", "train.max_steps=-1") == (-1, 2)
    (file := tmp_path / "both.yaml").write_text(
        "model: {path: m}\ndata: {path: d}\ntrain:\n  max_steps: 9\n  num_train_epochs: 2\n"
    )
    with pytest.raises(
        RecipeError, match=r"both\.yaml:5: train\.num_train_epochs would have no effect beside train\.max_steps 9"
    ):
        load_recipe(file)
    assert read(file, "train.num_train_epochs=4") == (-1, 4)
    file.write_text(file.read_text().replace("num_train_epochs: 2", "num_train_epochs: 1"))  # as a run's own recipe has it
    assert read(file) == (9, 1)


def test_a_file_has_no_split(tmp_path):
    (file := tmp_path / "rows.jsonl").touch()
    for key, given in (
        ("data", [f"data.path={file}", "data.split=test"]),
        ("data.sources", ["data.path=null", f"data.sources=[{{path: {file}, split: test}}]"]),
        ("eval.held_out", [f"eval.held_out.path={file}", "eval.held_out.split=dev"]),
    ):
        assert f"{key}.split would have no effect: {file} is a file, so drop it" in fail("sft", *given)
    load_recipe(None, [*BASE, f"data.path={file}", f"eval.held_out.path={file}"])
    load_recipe(None, [*BASE, f"data.path={tmp_path}", "data.split=test"])
    for split in (None, "test"):  # as `datasets` leaves it
        (tmp_path / "state.json").write_text(json.dumps({"_data_files": [], "_split": split}))
        if split is None:
            found = fail("sft", f"data.path={tmp_path}", "data.split=test")
            assert "data.split would have no effect" in found
            assert "is one dataset, saved without a split's name" in found
        else:
            load_recipe(None, [*BASE, f"data.path={tmp_path}", "data.split=test"])


def test_a_root_needs_a_task_that_lies_there():
    benchmarks = {name for name, benchmark in BENCHMARKS.items() if benchmark.source is not None}
    assert set(ROOTED) == benchmarks
    quiet = "freeze.grain=directions"
    for given in (
        [], ["eval.tasks=[tinyworld/facts, known.jsonl]"], [quiet, "freeze.keep.path=kept.jsonl"],
        [quiet, "freeze.keep.path=tinyworld/facts"], ["freeze.rank=fisher"],
    ):  # fmt: skip
        for objective in ("sft", "dpo"):
            message = fail(objective, "data.root=r", *given)
            assert message.startswith("--set data.root=r: data.root would have no effect: no task of eval.tasks, freeze.keep,")
    for given in (
        ["eval.tasks=[tinyworld/facts, birds]"], ["eval.tasks=[standard/CB]"], [quiet, "freeze.keep.path=trace/FOMC"],
        ["freeze.rank=fisher", "freeze.importance.path=standard/CB"],
    ):  # fmt: skip
        for objective in ("sft", "dpo"):
            assert load_recipe(None, [*BASE, "data.root=r", *given], objective).data.root == "r"
    tasks = 'continual.tasks="tinyworld/sum, tinyworld/sale"'
    with pytest.raises(RecipeError, match="data.root would have no effect: no task of continual.tasks"):
        load_recipe(None, ["model.path=m", "data.root=r", tasks], "continual")
    for given in ("continual.tasks=[a, b]", "eval.tasks=[a]", "method.replay.extra=trace/Lima"):
        load_recipe(None, ["model.path=m", "data.root=r", tasks, given], "continual")


def test_with_what_it_needs_it_is_taken():
    for overrides in (
        ["train.lr_scheduler_type=cosine_with_restarts", "train.lr_scheduler_kwargs={num_cycles: 2}"],
        ["train.lr_scheduler_type=constant", "train.warmup_steps=0"],
        ["train.optim=sgd", "train.optim_args=momentum=0.9, nesterov=true"],
        *([f"train.optim={name}"] for name in ("sgd", "adagrad", "rmsprop", "adafactor")),
        ["model.revision=v1"],
        ["train.activation_checkpointing=true", "train.activation_checkpointing_kwargs={every_n_layers: 2}"],
        ["train.dataloader_num_workers=1", "train.dataloader_prefetch_factor=2"],
        *([f"train.report_to={name}", "train.project=x"] for name in ("wandb", "mlflow", "trackio")),
        ["train.train_sampling_strategy=group_by_length", "train.data_seed=1"],
        ["train.loss_kernel=plain", "train.label_smoothing_factor=0.1"],
        ["train.fit=auto", "train.memory_bytes=1000000000", "train.activation_checkpointing_kwargs={preserve_rng_state: true}"],
        ["checkpoint.keep=3", "checkpoint.save_every_minutes=null", "checkpoint.save_steps=5"],
        ["freeze={group: layer, balance: weights}", "freeze.redraw.every=5"],
        ["freeze={grain: [matrices, directions], balance: weights}"],
        ["freeze={grain: biases, balance: weights}", "train.weight_decay=0.1"],
        ["freeze={grain: biases, embeddings: freeze, head: freeze}", "train.weight_decay=0"],
        ["method.peft={type: LORA}", "train.weight_decay=0.1"],
        *([f"method.token_weights={{kind: stm, strength: {strength}}}"] for strength in (0, 1)),
    ):
        load_recipe(None, [*BASE, *overrides])
    for overrides in (
        ["dpo.loss_type=[sigmoid, robust]", "dpo.label_smoothing=0.1", "dpo.loss_weights=[1, 0.5]"],
        ["dpo.loss_type=exo_pair", "dpo.label_smoothing=1e-3"],
        ["dpo.loss_type=[sft, sigmoid]", "dpo.ld_alpha=0.5", "dpo.f_divergence_type=forward_kl"],
        ["method.lora.lora_dropout=0.2", "dpo.disable_dropout=false"],
        ["method.lora.lora_dropout=0"],
        ["method.peft={type: LOHA, module_dropout: 0.1}"],
    ):
        load_recipe(None, [*BASE, *overrides], "dpo")


def test_a_runs_own_recipe_is_taken_again(tmp_path):
    """It spells out every default: be that the default of what has no effect."""
    for objective, overrides in (
        ("sft", ["checkpoint.save_every_minutes=null", "method.token_weights.kind=stm"]),
        ("sft", ["freeze={group: layer}", "freeze.redraw={every: 5, order: cyclic}"]),
        ("dpo", ["method.lora={}", "dpo.loss_type=sft"]),
        ("dpo", ["method.olora=null", "method.peft.type=LORA"]),
    ):
        (file := tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe(None, [*BASE, *overrides], objective)))
        assert load_recipe(file).objective == objective


def test_every_condition_names_keys_that_exist():
    for condition in CONDITIONS:
        assert {condition.key.partition(".")[0], condition.other.partition(".")[0]} <= {"train", "dpo"}
        assert condition.values
