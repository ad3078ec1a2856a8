"""What is wrong with the methods that change what is trained on and what it counts: self-replay, anchor, token weights, ..."""

from collections.abc import Iterator

from hftcli.recipe.recipe import Objective, Recipe
from hftcli.recipe.source import RecipeFile

# Keys of token weights, and the only kind that each counts for.
KINDS_KEYS = {"max_perplexity": "stm", "clip": "psft", "snapshot_steps": "psft"}


def check_levers(recipe: Recipe, objective: Objective, source: RecipeFile) -> Iterator[str]:
    """Settings with which one of them would have no effect, or would not be what its name says."""
    yield from _check_logits_readers(recipe, source)
    yield from _check_start_readers(recipe, objective, source)
    yield from _check_self_replay(recipe, objective, source)
    yield from _check_order(recipe, source)
    yield from _check_token_weights(recipe, objective, source)


def _check_logits_readers(recipe: Recipe, source: RecipeFile) -> Iterator[str]:
    """Losses in which no divergence of whole distributions can stand."""
    train = recipe.train
    if recipe.method.needs_logits and not recipe.method.logits_readers and train.loss_kernel == "chunked":
        yield (
            f"{source.place(('method', 'peft'))}: the rows that TRAINABLE_TOKENS trains stand in a tied head as well, whose "
            "own pass train.loss_kernel chunked goes round: set plain"
        )
    for name in recipe.method.logits_readers:
        place, key = source.place(("method", name)), f"method.{name}" + (".loss: kl" if name == "self_replay" else "")
        if train.loss_kernel == "chunked":
            yield f"{place}: {key} reads all logits of a token, and train.loss_kernel chunked never has all: set plain"
        if train.extra.get("label_smoothing_factor"):
            yield f"{place}: {key} would have no effect beside train.label_smoothing_factor: drop one of the two"
        if train.extra.get("loss_type", "nll") != "nll":
            yield (
                f"{place}: {key} adds a divergence to the loss, which train.loss_type {train.extra['loss_type']} would take "
                "for a likelihood: set method.token_weights.kind: dft, or drop one of the two"
            )


def _check_start_readers(recipe: Recipe, objective: Objective, source: RecipeFile) -> Iterator[str]:
    """Settings with which the start cannot be laid in, or not be compared."""
    for name in (name for name in ("anchor", "distill") if name in recipe.method.names):
        if objective == "dpo":
            place = source.place(("method", name))
            yield f"{place}: method.{name} holds what rows are taught on, and `hft dpo` has a reference of its own: drop it"
    if recipe.method.distill is not None and recipe.train.packing:
        yield (
            f"{source.place(('method', 'distill'))}: method.distill lays rows before each row, and train.packing lays several "
            "into one sequence: set train.packing: false"
        )


def _check_self_replay(recipe: Recipe, objective: Objective, source: RecipeFile) -> Iterator[str]:
    """Rows that texts cannot stand among, and losses with which they would not hold the model to the start."""
    place, replay = source.place(("method", "self_replay")), recipe.method.replay
    section, extra = recipe.method.self_replay, recipe.train.extra
    if section is None:
        return
    if objective == "dpo":
        yield f"{place}: method.self_replay adds texts, and `hft dpo` trains on pairs: drop it"
    if replay is not None and replay.when == "after":
        yield f"{place}: method.self_replay mixes texts in, and method.replay.when: after lays rows in order: drop one"
    if recipe.method.ift is not None:
        yield (
            f"{source.place(('method', 'ift'))}: method.ift has the model read tokens of its own, and method.self_replay holds "
            "it to the start, which read the texts': drop one of the two"
        )
    if section.loss == "ce" and section.weight == 1 and objective != "dpo":  # others are looked at with all that weighs tokens
        if extra.get("loss_type", "nll") != "nll":
            yield (
                f"{place}: method.self_replay takes the likelihood of its texts, and train.loss_type {extra['loss_type']} "
                f"weighs their tokens: set method.token_weights.kind: {extra['loss_type']}, which leaves them alone, or drop "
                "one of the two"
            )
        if extra.get("label_smoothing_factor"):
            yield (
                f"{place}: method.self_replay takes the likelihood of its texts, and train.label_smoothing_factor smooths it: "
                "drop one of the two"
            )


def _check_order(recipe: Recipe, source: RecipeFile) -> Iterator[str]:
    """Orders of the rows that contradict where a method has them stand."""
    strategy, replay = recipe.train.extra.get("train_sampling_strategy", "random"), recipe.method.replay
    place = source.place(("train", "train_sampling_strategy"))
    if replay is not None and replay.when == "after" and strategy != "random":
        yield (
            f"{place}: train.train_sampling_strategy {strategy} would have no effect beside method.replay.when: after, which "
            "lays the rows in an order of its own: drop one of the two"
        )
    goes_back = {
        "checkpoint.best": recipe.checkpoint.best, "stop.max_forgetting": recipe.stop.max_forgetting,
        "stop.min_learning": recipe.stop.min_learning,
    }  # fmt: skip
    for key in (key for key, value in goes_back.items() if value is not None and replay is not None and replay.when == "after"):
        yield (
            f"{source.place(tuple(key.split('.')))}: {key} may end the round, or go back, before the rows that "
            "method.replay.when: after has at its end: set method.replay.when: mixed, or drop one"
        )
    mixing = {"method.self_replay": recipe.method.self_replay is not None, "method.replay": replay and replay.when == "mixed"}
    for key in (key for key, is_mixing in mixing.items() if is_mixing and strategy == "sequential"):
        yield (
            f"{place}: {key} mixes rows in among the others, and train.train_sampling_strategy sequential has them trained "
            "after all others: drop one of the two"
        )
    laying = {
        "train.packing lays rows into sequences by their length": recipe.train.packing,
        "data.sources are mixed in an order by chance": len(recipe.data.sources) > 1,
    }
    for reason in (reason for reason, is_on in laying.items() if is_on and strategy == "sequential"):
        yield f"{place}: {reason}, and train.train_sampling_strategy sequential would not be their order: drop one of the two"


def _check_token_weights(recipe: Recipe, objective: Objective, source: RecipeFile) -> Iterator[str]:
    """Losses that are no sum over tokens which could count more or less."""
    section, extra = recipe.method.token_weights, recipe.train.extra
    for key, kind in KINDS_KEYS.items():
        if section and section.kind != kind and getattr(section, key) != type(section).model_fields[key].default:
            place = source.place(("method", "token_weights", key))
            yield f"{place}: method.token_weights.{key} would have no effect beside kind {section.kind}: drop it"
    if section and section.kind == "psft" and recipe.method.ift:
        yield (
            f"{source.place(('method', 'ift'))}: method.ift has the model read tokens of its own, and token_weights: psft "
            "compares it with a copy that reads the rows': drop one of the two"
        )
    weighing: list[str] = [name for name in ("token_weights", "ift") if name in recipe.method.names]
    if recipe.method.self_replay and recipe.method.self_replay.weight != 1 and objective != "dpo":
        weighing.append("self_replay.weight")
    for name in weighing:
        place = source.place(("method", *name.split(".")))
        if objective == "dpo":
            yield f"{place}: method.{name} weighs the tokens of answers, and `hft dpo` compares whole answers: drop it"
        if extra.get("loss_type", "nll") != "nll":
            other = f"train.loss_type {extra['loss_type']}"
            yield f"{place}: method.{name} and {other} both weigh the tokens: drop one of the two"
        if extra.get("label_smoothing_factor"):
            yield (
                f"{place}: method.{name} would have no effect beside train.label_smoothing_factor, whose loss is TRL's own: "
                "drop one of the two"
            )
