"""Forgetting against room: tinyworld's model with fewer facts in as many weights, and what a skill then costs.

    python scripts/reproduce_room.py [--output FOLDER] [--jobs 2]

A model that is full of facts must overwrite some to learn; one with room need not. The embedded model holds 1,800 facts in 1.1
million weights. Three more of its shape are pretrained on a half, a quarter and an eighth of the people and places, in as many
steps (twelve minutes of one core each). All take the skill as in reproduce_skill.py: full, half, SSU's columns and the quiet
half, each at the learning rate that was chosen there, on five seeds (a minute of one core for a run). All facts that a model
holds are asked, 800 at most.

What is finished under --output, or in room.json beside this file, is not done again. The table and the figure of
scripts/README.md are made of room.json.
"""

import argparse
import json
import random
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reproduce_skill import FAMILY, NUM_STEPS, SKILL, WORLD, read_results
from reproduce_stream import run_hft
from tinyworld.world import PEOPLE, PLACES, World, invent_world

RESULTS = Path(__file__).with_name("room.json")
FIGURE = Path(__file__).parents[1] / ".github" / "room.svg"
DIVISORS = (8, 4, 2, 1)  # of the world's people and places
ARMS = ("full", "half", "columns, SSU", "quiet")
SEEDS = (1, 2, 3, 4, 5)
NUM_ASKED = 800
WORLD_SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/room"), metavar="FOLDER")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"worlds": {}, "runs": []}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        folders = [arguments.output / f"world-{divisor}" for divisor in DIVISORS]
        for divisor, world in zip(DIVISORS, pool.map(build_world, DIVISORS, folders), strict=True):
            found["worlds"][str(divisor)] = world
    known = {(run["world"], run["trains"], run["seed"]) for run in found["runs"]}
    jobs = [(divisor, arm, seed) for seed in SEEDS for divisor in DIVISORS for arm in ARMS if (divisor, arm, seed) not in known]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for run in pool.map(lambda job: measure(arguments.output, *job), jobs):
            found["runs"].append(run)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found)


def make_world(divisor: int) -> World:
    """The embedded model's world, with the facts of a part of its people and places alone."""
    whole = invent_world(random.Random(WORLD_SEED))
    subjects = list(whole.by_subject)  # people, then places
    kept = {*subjects[: PEOPLE // divisor], *subjects[PEOPLE : PEOPLE + PLACES // divisor]}
    return World([fact for fact in whole.facts if fact.subject in kept], whole.places, whole.strangers, whole.polite)


def build_world(divisor: int, folder: Path) -> dict[str, Any]:
    """Pretrain a model on a part of the world, unless it is there, and ask it; the whole world's ships with hft.

    Returns:
        The number of facts and of weights, and the share of the facts that are recalled.
    """
    record = folder / "world.json"
    if record.exists():
        return json.loads(record.read_text(encoding="utf-8"))
    import torch
    from tinyworld.pretraining import create_model, pack_sequences, pretrain
    from tinyworld.tokenizer import Encoder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    torch.manual_seed(WORLD_SEED)
    world, tokenizer = make_world(divisor), AutoTokenizer.from_pretrained(WORLD / "model")
    if divisor == 1:
        model = AutoModelForCausalLM.from_pretrained(WORLD / "model")
    else:
        model = create_model(tokenizer)
        pretrain(model, pack_sequences(world, Encoder(tokenizer), random.Random(WORLD_SEED + 1), frozenset()))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    built = {"facts": len(world.facts), "weights": model.num_parameters(), "recall": ask_facts(folder / "model", divisor)}
    record.write_text(json.dumps(built), encoding="utf-8")
    return built


def ask_facts(model: Path, divisor: int) -> float:
    """The share of a world's facts that a model answers to the letter."""
    from tinyworld.recall import measure_recall
    from tinyworld.rows import list_questions
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [row for row in list_questions(make_world(divisor).facts) if row["wording"] == "a"]
    asked = random.Random(WORLD_SEED).sample(rows, min(NUM_ASKED, len(rows)))
    return measure_recall(AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(WORLD / "model"), asked)


def measure(folder: Path, divisor: int, arm: str, seed: int) -> dict[str, Any]:
    """What a run learned of the skill and kept of the facts, in points."""
    output = folder / f"{arm.replace(', ', '-')}-{divisor}-{seed}"
    rates = {name: found["rate"] for bench in read_results().values() for name, found in bench.items()}
    given = FAMILY[arm].given | {
        "model.path": folder / f"world-{divisor}" / "model", "data.path": SKILL, "train.max_steps": NUM_STEPS,
        "train.learning_rate": rates[arm], "train.seed": seed, "freeze.seed": seed, "eval.generate": "false",
        "eval.tasks": f"[{SKILL}]",
    }  # fmt: skip
    options = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    run_hft(["sft", "--recipe", "tinyworld", "--output", str(output), *options])
    round_ = output / "rounds" / "00-sft"
    skill = json.loads((round_ / "scores.json").read_text(encoding="utf-8"))["after"][SKILL]["score"]
    points = {"skill": 100 * skill, "facts": 100 * ask_facts(round_ / "checkpoint", divisor)}
    print(f"{output.name}: skill {points['skill']:.1f}, facts {points['facts']:.1f}", file=sys.stderr, flush=True)
    return {"world": divisor, "trains": arm, "seed": seed, **points}


def draw(found: dict[str, Any]) -> None:
    """Facts that were lost against facts for each thousand weights, mean and 95 % interval over the seeds."""
    from matplotlib.figure import Figure

    from hftcli.comparing.statistics import estimate_mean
    from hftcli.reporting.figures import COLOURS, MARKERS

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for place, arm in enumerate(ARMS):
        points = []
        for divisor in DIVISORS:
            world = found["worlds"][str(divisor)]
            lost = [100 - run["facts"] for run in found["runs"] if (run["world"], run["trains"]) == (divisor, arm)]
            points.append((1000 * world["facts"] / world["weights"], estimate_mean(lost)))
        axes.errorbar(
            [room for room, _ in points], [estimate.mean for _, estimate in points],
            [estimate.high - estimate.mean for _, estimate in points],
            label=arm, color=COLOURS[place], marker=MARKERS[place], capsize=3,
        )  # fmt: skip
    axes.set_xlabel("facts for each thousand weights")
    axes.set_ylabel("facts lost, points")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
