"""A skill beside a file of what must not be lost, on tinyworld: named to the quiet half, replayed, or both (scripts/README.md).

    python scripts/reproduce_kept.py [--output FOLDER] [--jobs 2]

The embedded model takes the skill: 6,400 rows in batches of 32. Of the 800 facts that it knows, 200 are named: `freeze.keep`
has the quiet half stay off the directions in which they are read; replay makes them a quarter of the rows, on top of the
skill's. All 800 are asked, in two wordings. One seed chooses each arm's learning rate, by the mean of the skill's score and the
facts' (with replay, the rate is that of the arm without); three others are reported. Finished runs are not run again. Leaves
kept.json beside this file, from which the table is made.
"""

import argparse
import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from reproduce_stream import run_hft

RESULTS = Path(__file__).with_name("kept.json")
WORLD = Path(__file__).parents[1] / "hftcli" / "tinyworld"
NUM_KEPT = 200
NUM_STEPS = 200
TUNE_SEED = 100
SEEDS = (1, 2, 3)
SKILL, FACTS, REWORDED = "tinyworld/skill", "tinyworld/facts", "tinyworld/facts-reworded"
QUIET = {"freeze.grain": "[matrices, directions]", "freeze.blocks": 32}
FREEZES: dict[str, tuple[dict[str, object], tuple[float, ...]]] = {
    "full": ({"freeze.trainable_fraction": 1.0}, (4e-4, 6e-4)),
    "half": ({}, (7e-4, 1e-3)),
    "quiet": (QUIET, (1.4e-3, 2e-3)),
}


class Arm(NamedTuple):
    """What trains, whether it is told what to keep, and whether that is replayed."""

    freeze: str
    is_named: bool
    is_replayed: bool

    @property
    def label(self) -> str:
        """In the table."""
        return f"{self.freeze}{', named' * self.is_named}{' + replay' * self.is_replayed}"


ARMS = [
    Arm(name, is_named, is_replayed)
    for is_replayed in (False, True)
    for name in FREEZES
    for is_named in ((False, True) if name == "quiet" else (False,))
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/kept"), metavar="FOLDER")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    write_rows(arguments.output)
    alone = [arm for arm in ARMS if not arm.is_replayed]
    tried = [(arm, rate, TUNE_SEED) for arm in alone for rate in FREEZES[arm.freeze][1]]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        scores = dict(zip(tried, pool.map(lambda job: measure(arguments.output, *job), tried), strict=True))
        value = {job: score["skill"] + score["facts"] for job, score in scores.items()}
        best = {arm[:2]: max(FREEZES[arm.freeze][1], key=lambda rate, arm=arm: value[arm, rate, TUNE_SEED]) for arm in alone}
        jobs = [(arm, best[arm[:2]], seed) for arm in ARMS for seed in SEEDS]
        found = dict(zip(jobs, pool.map(lambda job: measure(arguments.output, *job), jobs), strict=True))
    results = {arm.label: {"rate": (rate := best[arm[:2]]), "runs": [found[arm, rate, seed] for seed in SEEDS]} for arm in ARMS}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


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


def measure(folder: Path, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
    """Scores of a run, in points."""
    output = folder / f"{arm.label.replace(', ', '-').replace(' + ', '-')}-{rate:g}-{seed}"
    given: dict[str, object] = FREEZES[arm.freeze][0] | {
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
