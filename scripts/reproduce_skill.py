"""A skill beside old facts, on tinyworld: what each way to train learns of the one, and keeps of the others.

    python scripts/reproduce_skill.py [--bench kept | family | levers] [--output FOLDER] [--jobs 2]

The embedded model takes the skill: 200 steps of 32 of its 1,600 rows. All 800 facts that it knows are asked, in two wordings.
In the bench `kept` 200 of them are named: `freeze.keep` has the quiet half stay off the directions in which they are read, and
replay makes them a quarter of the rows, on top of the skill's. `family` has the ways to choose what trains, `levers` what
`method` does to the loss, beside full, half and the quiet half.

One seed chooses each arm's learning rate, by the mean of the skill's score and the facts'; an arm that adds something to
another takes its rate. Three other seeds are reported. An arm that skill.json beside this file has, in whichever bench, is not
run again; delete it there to measure it anew. The tables of scripts/README.md are made of skill.json.
"""

import argparse
import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from reproduce_stream import DEFENCES, FULL, REPLAY, run_hft

RESULTS = Path(__file__).with_name("skill.json")
WORLD = Path(__file__).parents[1] / "hftcli" / "tinyworld"
NUM_KEPT = 200
NUM_STEPS = 200
TUNE_SEED = 100
SEEDS = (1, 2, 3)
SKILL, FACTS, REWORDED = "tinyworld/skill", "tinyworld/facts", "tinyworld/facts-reworded"
INSIDE = {"freeze.embeddings": "freeze", "freeze.head": "freeze"}
ENTRIES = {"freeze.grain": "entries"}
LAYERS = {"freeze.group": "layer", "freeze.trainable_fraction": 0.17}  # one of six


class Arm(NamedTuple):
    """A way to train.

    Attributes:
        given: what the recipe says.
        rates: learning rates that are tried.
        like: an arm whose rate is taken instead.
        is_named: the rows to keep are named.
        is_replayed: they are trained on.
    """

    given: dict[str, object]
    rates: tuple[float, ...] = ()
    like: str | None = None
    is_named: bool = False
    is_replayed: bool = False


FREEZES = {
    "full": Arm(FULL, (4e-4, 6e-4)),
    "half": Arm({}, (7e-4, 1e-3)),
    "quiet": Arm({"freeze.grain": "[matrices, directions]", "freeze.blocks": 32}, (1.4e-3, 2e-3)),
}
NAMED = FREEZES["quiet"]._replace(is_named=True)
KEPT = FREEZES | {"quiet, named": NAMED}
FAMILY = FREEZES | {
    "columns, SSU": Arm({"freeze.grain": "columns"}, (7e-4, 1e-3)),
    "columns, quiet": Arm({"freeze.grain": "columns", "freeze.part": "quiet"}, (7e-4, 1e-3)),
    "directions, quiet": Arm({"freeze.grain": "directions"}, (1e-3, 1.4e-3)),
    "entries, random": Arm(ENTRIES, (5e-4, 7e-4)),
    "entries, largest": Arm(ENTRIES | {"freeze.part": "magnitude"}, (5e-4, 7e-4)),
    "SpIEL": Arm(ENTRIES | {"freeze.part": "spiel", "freeze.trainable_fraction": 0.05}, (2e-3, 4e-3)),
    "half, redrawn": Arm({"freeze.redraw": "{every: 20}"}, (5e-4, 7e-4)),
    "LISA": Arm({"freeze.group": "layer", "freeze.trainable_fraction": 0.34, "freeze.redraw": "{every: 20}"}, (5e-4, 1e-3)),
    "BAdam": Arm(LAYERS | INSIDE | {"freeze.redraw": "{every: 20, order: cyclic}"}, (1e-3, 2e-3)),
    "HiFT": Arm(
        LAYERS | {"freeze.redraw": "{every: 1, order: ascending, states: keep, schedule: cycle}", "train.warmup_steps": 0},
        (1e-3, 2e-3),
    ),
    "LoRA": Arm(FULL | {"method.lora": "{r: 16}"}, (3e-3, 5e-3)),
    "DoRA": Arm(FULL | {"method.peft": "{type: LORA, r: 16, use_dora: true}"}, (3e-3, 5e-3)),
    "IA3": Arm(FULL | {"method.ia3": "{}"}, (2e-2, 5e-2)),
    "OSF": Arm(FULL | {"method.peft": "{type: OSF}"}, (4e-4, 7e-4)),
    "decay to the start": Arm(FULL | {"freeze.pull.strength": 10}, (4e-4, 6e-4)),
}
LEVERS = {name: given for name, given in DEFENCES.items() if name not in REPLAY}  # here there are no earlier tasks
BENCHES = {
    "kept": KEPT | {f"{name} + replay": arm._replace(like=name, is_replayed=True) for name, arm in KEPT.items()},
    "family": FAMILY,
    "levers": FREEZES | {
        f"{name} + {lever}": arm._replace(given=arm.given | given, like=name)
        for lever, given in LEVERS.items()
        for name, arm in FREEZES.items()
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", choices=BENCHES, default="kept")
    parser.add_argument("--output", type=Path, default=Path("runs/skill"), metavar="FOLDER")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    arms, results = BENCHES[arguments.bench], read_results()
    known = {name: found for bench in results.values() for name, found in bench.items() if name in arms}
    write_rows(arguments.output)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for adds in (False, True):
            missing = [name for name, arm in arms.items() if name not in known and (arm.like is not None) == adds]
            found = pool.map(lambda name: find_runs(arguments.output, name, arms[name], known), missing)
            for name, runs in zip(missing, found, strict=True):
                known[name] = runs
                results[arguments.bench] = {name: known[name] for name in arms if name in known}
                ordered = {bench: results[bench] for bench in BENCHES if bench in results}
                RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def read_results() -> dict[str, Any]:
    """What is known: by bench and arm."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def find_runs(folder: Path, name: str, arm: Arm, known: dict[str, Any]) -> dict[str, Any]:
    """The learning rate of an arm, and its runs at it."""
    if arm.like is None:
        scores = {rate: measure(folder, name, arm, rate, TUNE_SEED) for rate in arm.rates}
        rate = max(scores, key=lambda tried: scores[tried]["skill"] + scores[tried]["facts"])
    else:
        rate = known[arm.like]["rate"]
    return {"rate": rate, "runs": [measure(folder, name, arm, rate, seed) for seed in SEEDS]}


def write_rows(folder: Path) -> None:
    """The rows to keep, and the skill's with them, of which they are a quarter."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = [json.loads(line) for line in (WORLD / "facts.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [row for row in facts if row["wording"] == "a"]
    kept = [
        {"messages": [*row["prompt"], {"role": "assistant", "content": row["answer"]}]}
        for row in random.Random(0).sample(asked, NUM_KEPT)
    ]
    skill = [json.loads(line) for line in (WORLD / "skill" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    repeated = [kept[place % NUM_KEPT] for place in range(len(skill) // 3)]
    for name, rows in (("kept", kept), ("mixed", [*skill, *repeated])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measure(folder: Path, name: str, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
    """Scores of a run, in points."""
    output = folder / f"{name.replace(',', '').replace(' + ', '-').replace(' ', '-')}-{rate:g}-{seed}"
    given: dict[str, object] = arm.given | {
        "data.path": folder / "mixed.jsonl" if arm.is_replayed else SKILL,
        "train.max_steps": round(NUM_STEPS * 4 / 3) if arm.is_replayed else NUM_STEPS,
        "train.learning_rate": rate, "train.seed": seed, "freeze.seed": seed, "eval.generate": "false",
    }  # fmt: skip
    if arm.is_named:
        given["freeze.keep"] = json.dumps({"path": str(folder / "kept.jsonl"), "samples": NUM_KEPT})
    options = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    run_hft(["sft", "--recipe", "tinyworld", "--output", str(output), *options])
    after = json.loads((output / "rounds" / "00-sft" / "scores.json").read_text(encoding="utf-8"))["after"]
    points = {task: 100 * after[task]["score"] for task in (SKILL, FACTS, REWORDED)}
    print(f"{output.name}: skill {points[SKILL]:.1f}, facts {points[FACTS]:.1f}", file=sys.stderr, flush=True)
    return {"seed": seed, "skill": points[SKILL], "facts": points[FACTS], "reworded": points[REWORDED]}


if __name__ == "__main__":
    main()
