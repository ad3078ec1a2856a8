"""`hft advise`: which recipe, for a model and rows."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from hftcli.commands.options import JsonOption, SetOption
from hftcli.errors import InputError

app = typer.Typer()
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
OWN_KEYS = (
    "model.path", "model.revision", "data.path", "data.sources", "data.root", "freeze", "method.self_replay", "method.anchor",
    "train.learning_rate", "train.max_steps", "train.num_train_epochs", "train.seed", "eval", "stop", "checkpoint.best",
    "output",
)  # fmt: skip


@app.command()
def advise(
    model: Annotated[str, typer.Option("--model", help="The model to start from: a folder, a run or a hub id.")],
    data: Annotated[str, typer.Option("--data", help="The rows to train on.")],
    keep: Annotated[
        str | None, typer.Option("--keep", help="Questions with answers that must not be lost; the model's own texts without.")
    ] = None,
    lose_at_most: Annotated[
        float, typer.Option("--lose-at-most", min=1e-6, help="What may be lost of them, in nats per token of their answers.")
    ] = 0.02,
    time: Annotated[str, typer.Option("--time", help="What the search may take, such as 90s, 30m or 2h.")] = "30m",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Fresh seeds on which the best is trained.")] = 3,
    overrides: SetOption = None,
    output: Annotated[Path, typer.Option("--output", help="Folder of the search.")] = Path("runs/advice"),
    as_json: JsonOption = False,
) -> None:
    """Search for the recipe that learns most of the rows and loses no more than allowed of what must be kept.

    Tries all weights, the coin's half and the quiet half, with and without what is to be kept, and all weights anchored to what
    the model expects, at several learning rates: many in short runs, the best in longer ones (successive halving), and the very
    best on fresh seeds. Given again, it goes on.
    """
    seconds = read_time(time)
    for key in (override.partition("=")[0] for override in overrides or ()):
        if any(f"{key}.".startswith(f"{own}.") or own.startswith(f"{key}.") for own in OWN_KEYS):
            fix = "drop it, or name one that it leaves alone"
            fix = "give it with the model: --model owner/name@REVISION" if key == "model.revision" else fix
            raise InputError(f"--set {key}: hft advise sets it, or a key in it, itself", fix)
    from hftcli.advising.rows import Order
    from hftcli.advising.search import Search
    from hftcli.reporting.advice import print_advice
    from hftcli.reporting.progress import show_progress

    order = Order(model, data, keep, lose_at_most, seconds, seeds, tuple(overrides or ()), output)
    with show_progress() as on_progress:
        advice = Search(order, on_progress, lambda line: print(line, file=sys.stderr)).run()
    print_advice(advice, lose_at_most, as_json)


def read_time(text: str) -> float:
    """Seconds.

    Raises:
        InputError: it is no time.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if found is None or not float(found[1]):
        raise InputError(f"--time {text} is no time", "give a number of seconds, minutes or hours: 90s, 30m, 2h")
    return float(found[1]) * UNITS[found[2]]
