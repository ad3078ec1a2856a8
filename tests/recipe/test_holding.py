"""What holds weights to the start, what redraws them, and what names their roles: combinations that contradict themselves."""

from pathlib import Path

import pytest

from hftcli.errors import RecipeError
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.sections import TrainSection

GIVEN = {
    "pull": "freeze.pull.strength=1",
    "interpolate": "freeze.interpolate=0.5",
    "redraw": "freeze.redraw.every=5",
}
CYCLES = (
    "freeze.group=layer", GIVEN["redraw"], "freeze.redraw.order=cyclic", "freeze.redraw.schedule=cycle", "train.warmup_steps=0",
)  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((GIVEN["pull"], "method.lora.r=4"), "freeze.pull holds the weights of the model, and lora trains others"),
        ((GIVEN["interpolate"], "method.ia3={}"), "freeze.interpolate holds the weights of the model, and ia3 trains others"),
        ((GIVEN["interpolate"], "freeze.grain=columns"), "freeze.interpolate goes by whole matrices"),
        (("freeze.grain=biases", "method.lora.r=4"), "freeze.grain: biases trains no matrix"),
        (("freeze.grain=biases", "freeze.part=random"), "freeze.part would have no effect beside freeze.grain biases"),
        (("freeze.grain=biases", "freeze.rank=magnitude"), "grain biases trains no matrix: drop one"),
        ((GIVEN["pull"], "freeze.pull.selective=true", "launch.offload=optimizer"), "freeze.pull.selective reads gradients"),
        ((GIVEN["pull"], "train.fit=auto"), "train.fit does not count the copy that freeze.pull holds"),
        (
            ("freeze.average=0.9", "eval.num_points=3", "checkpoint.best=learning"),
            "freeze.average leaves the mean of all steps, and checkpoint.best goes back to one",
        ),
        (
            ("freeze.average=0.9", "eval.num_points=3", "stop.max_forgetting=0.1"),
            "freeze.average leaves the mean of all steps, and stop.max_forgetting goes back to one",
        ),
        (
            ("method.peft={type: ADALORA}", "eval.num_points=3", "stop.max_forgetting=0.1"),
            "stop.max_forgetting goes back to an earlier step, and the ranks that ADALORA gave up since stay so",
        ),
        (
            ("freeze.grain=directions", "freeze.part=random", "freeze.keep.path=tinyworld/facts"),
            "freeze.keep would have no effect beside freeze.grain directions and freeze.part random",
        ),
        (
            ("method.lora={quiet: true}", "freeze.part=random", "freeze.keep.path=tinyworld/facts"),
            "freeze.keep would have no effect beside freeze.grain matrices and freeze.part random",
        ),
        (("eval.tasks=[]", "eval.generate=false"), "eval.generate would have no effect: name what to ask under eval.tasks"),
        (("eval.tasks=[]", "eval.shots=2"), "eval.shots would have no effect: name what to ask under eval.tasks"),
        ((GIVEN["redraw"], "method.l2sp.strength=1"), "freeze.redraw does not go with method.l2sp"),
        ((GIVEN["redraw"], "launch.offload=optimizer"), "freeze.redraw does not go with launch.offload"),
        ((GIVEN["redraw"], "eval.num_points=3"), "freeze.redraw does not go with eval.every_steps and eval.num_points"),
        ((GIVEN["redraw"], GIVEN["pull"]), "pull, average and interpolate go with one draw a round"),
        (
            ("freeze.group=layer", GIVEN["redraw"], "freeze.redraw.order=cyclic", "freeze.redraw.schedule=cycle"),
            "the whole first cycle would have a learning rate of 0",
        ),
        *(
            (
                (*CYCLES, f"train.lr_scheduler_type={name}", f"train.lr_scheduler_kwargs={{{key}: 9}}"),
                f"train.lr_scheduler_kwargs.{key} counts steps, and with freeze.redraw.schedule cycle",
            )
            for name, key in (
                ("warmup_stable_decay", "num_decay_steps"),
                ("warmup_stable_decay", "num_stable_steps"),
                ("inverse_sqrt", "timescale"),
            )
        ),
        (("freeze.redraw.order=cyclic",), "freeze.redraw.every is missing"),
        (("freeze.roles.attention=layers.*.(q|k",), "roles.attention: 'layers.*.(q|k' is no pattern"),
        (("freeze.roles.atention=layers.*.q",), "input should be 'attention', 'mixer'"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: tuple[str, ...], expected: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe("tinyworld", overrides)
    assert expected in caught.value.message


def test_what_a_schedule_does_not_count_in_steps_goes_with_cycles():
    given = (*CYCLES, "train.lr_scheduler_type=cosine_with_min_lr", "train.lr_scheduler_kwargs={min_lr_rate: 0.1}")
    assert load_recipe("tinyworld", given).freeze.redraw.schedule == "cycle"


def test_a_constant_rate_has_no_warm_up_that_cycles_would_lengthen():
    given = [override for override in CYCLES if not override.startswith("train.warmup_steps")]
    recipe = load_recipe(None, ["model.path=m", "data.path=d", *given, "train.lr_scheduler_type=constant"])
    assert recipe.train.warmup_steps == TrainSection.model_fields["warmup_steps"].default > 0


def test_a_role_that_is_given_twice_is_named(tmp_path: Path):
    path = tmp_path / "my.yaml"
    path.write_text("model: {path: m}\ndata: {path: d}\nfreeze:\n  roles:\n    mlp: layers.*.up\n    mlp: layers.*.down\n")
    with pytest.raises(RecipeError, match=r"my.yaml:6: key 'freeze.roles.mlp' is given twice, first at .*my.yaml:5"):
        load_recipe(path)
