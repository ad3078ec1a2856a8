"""Every way to choose what trains, on one real model: what `hft plan` says that it holds and computes, and what a run holds.

    python scripts/measure_ways.py --model MiniMind2-Small [--ways NAME...] [--output FOLDER]
    python scripts/measure_ways.py --model MiniMind2-Small --steps 8 --turns 3       times too, on a machine that is quiet

Each way is planned as `hft plan` plans it and trains two steps as `hft sft` trains them, in float32 in one process (halves that
are redrawn fifty, for the plan's largest draw is of as many). Bytes are those of all gradients before a step and of the
optimizer's tensors. FLOPs are those that torch counts in a step's forward and backward pass, over full fine-tuning's: in a step
of four rows of 2,048 tokens, or as many as the model takes, so that what a step does once hardly counts; of ways that redraw,
in the largest of all their steps. Frozen parts are those of `hft verify`. Launches are those that what runs before any weight
is read does not refuse. A model without biases is given some, all 0, for those that train.

With --steps, times too, of whole steps of longer rows: in every turn each way takes so many and two before that do not count;
the median of a run's steps (of ways that redraw, their mean), over full fine-tuning's in the same turn.

Leaves ways.json beside this file, from which the table of scripts/README.md is made. Ways that are not named stay as they are.
"""

import argparse
import functools
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer

from hftcli import runners
from hftcli.errors import InputError
from hftcli.launching.processes import StopRequest
from hftcli.methods.census import count_adapters
from hftcli.models.description import describe_model
from hftcli.models.proof import verify_round
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.recipe import Recipe
from hftcli.recipe.starter import read_max_positions
from hftcli.runs.run import Round
from hftcli.runs.verification import Verification
from hftcli.training.reading import read_assignment
from hftcli.training.round import run_round

RESULTS = Path(__file__).with_name("ways.json")
COMMON = {
    "data.max_length": 64, "model.dtype": "float32", "train.bf16": "false", "train.loss_kernel": "plain", "train.max_steps": 2,
    "train.global_batch_size": 2, "train.per_device_train_batch_size": 2, "train.learning_rate": 1e-4,
    "train.lr_scheduler_type": "constant", "train.warmup_steps": 0, "launch.num_processes": 1, "launch.zero_stage": 0,
    "checkpoint.save_every_minutes": "null",
}  # fmt: skip
FOUR_ROWS = {  # nothing to pad
    "data.max_examples": 4, "train.max_steps": 1, "train.global_batch_size": 4, "train.per_device_train_batch_size": 1,
}  # fmt: skip
MOST_TOKENS = 2048  # of a row, where the model has as many positions
FULL = {"freeze.trainable_fraction": 1.0}
INSIDE = {"freeze.embeddings": "freeze", "freeze.head": "freeze"}
BLOCK = {"freeze.group": "layer", "freeze.trainable_fraction": 0.125}  # one layer of eight
FEW = INSIDE | {"freeze.grain": "entries", "freeze.trainable_fraction": 0.05}


def adapt(kind: str, **values: object) -> dict[str, object]:
    """An adapter of PEFT's on every matrix."""
    return FULL | {"method.peft": json.dumps({"type": kind} | values)}


WAYS: dict[str, dict[str, object]] = {
    "full": FULL,
    "half": {},
    "half, by weights": {"freeze.balance": "weights"},
    "half of all units": {"freeze.group": "model"},
    "half, by Fisher": {"freeze.rank": "fisher"},
    "layers, half of them": {"freeze.group": "layer"},
    "half, prefix 0.25": INSIDE | {"freeze.frozen_prefix": 0.25},
    "top half": INSIDE | {"freeze.frozen_prefix": 0.5},
    "columns, SSU": {"freeze.grain": "columns"},
    "columns, quiet": {"freeze.grain": "columns", "freeze.part": "quiet"},
    "columns, random": {"freeze.grain": "columns", "freeze.part": "random"},
    "directions, quiet": {"freeze.grain": "directions"},
    "blocks, quiet": {"freeze.grain": "directions", "freeze.blocks": 32},
    "quiet": {"freeze": "quiet"},
    "entries, random": {"freeze.grain": "entries"},
    "entries, 5 %, largest": FEW | {"freeze.part": "magnitude"},
    "entries, 5 %, SpIEL": FEW | {"freeze.part": "spiel"},
    "biases (BitFit)": FULL | INSIDE | {"freeze.grain": "biases"},
    "redrawn: half": {"freeze.redraw": "{every: 1}", "train.max_steps": 50},
    "redrawn: LISA": {"freeze.group": "layer", "freeze.trainable_fraction": 0.25, "freeze.redraw": "{every: 1}"},
    "redrawn: BAdam": BLOCK | INSIDE | {"freeze.redraw": "{every: 1, order: cyclic}"},
    "redrawn: HiFT": BLOCK | {"freeze.redraw": "{every: 1, order: ascending, states: keep, schedule: cycle}"},
    "LoRA, r 8": FULL | {"method.lora": "{r: 8}"},
    "LoRA, r 8, on a half": {"method.lora": "{r: 8}"},
    "LoRA, r 8, quiet": FULL | {"method.lora": "{r: 8, quiet: true}"},
    "IA3": FULL | {"method.ia3": "{}"},
    "DoRA, r 8": adapt("LORA", r=8, use_dora=True),
    "AdaLoRA, r 8": adapt("ADALORA", init_r=8, target_r=4, tinit=0, tfinal=0),
    "VeRA": adapt("VERA"),
    "OFT": adapt("OFT", oft_block_size=32),
    "BOFT": adapt("BOFT", boft_block_size=4),
    "OSF": adapt("OSF"),
    "SHiRA": adapt("SHIRA"),
    "LoHa": adapt("LOHA"),
    "LoKr": adapt("LOKR"),
    "LN tuning": adapt("LN_TUNING"),
    "trainable tokens": adapt("TRAINABLE_TOKENS", token_indices=[10, 20, 30]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, metavar="NAME", help=f"of {'; '.join(WAYS)}")
    parser.add_argument("--output", type=Path, default=Path("runs/ways"), metavar="FOLDER", help="for the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--steps", type=int, default=0, help="measured steps of a way in a turn; 0 takes no times")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512, help="of each of two rows of a timed step")
    arguments = parser.parse_args()
    bench = Bench(arguments.model, arguments.output)
    for name in arguments.ways:
        keep_result(arguments.results, arguments.model.name, name, bench.measure(name))
    if arguments.steps:
        turns = [bench.time(arguments.ways, arguments.steps, arguments.tokens) for _ in range(arguments.turns)]
        for name in arguments.ways:
            ratios = [turn[name] for turn in turns]
            found = {"ratios": ratios, "median": statistics.median(ratios), "tokens": 2 * arguments.tokens}
            keep_result(arguments.results, arguments.model.name, name, {"time": found})


def keep_result(path: Path, model: str, name: str, found: dict[str, Any]) -> None:
    """Add what was found of a way, in the order of the ways."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = results.setdefault(model, {})
    known[name] = known.get(name, {}) | found
    results[model] = {way: known[way] for way in WAYS if way in known}
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{name}: {found}", file=sys.stderr, flush=True)


class Bench:
    """The runs on one model."""

    def __init__(self, model: Path, folder: Path):
        self.model = model
        self.folder = folder
        self.counted: dict[tuple[str, ...], float] = {}  # FLOPs, by way and what else its recipe says
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = folder / "rows.jsonl"
        words = [f"{number} {'times' * (number % 3)} {number * number}" for number in range(20_000)]
        texts = [" ".join(words[place : place + 1000]) for place in range(0, len(words), 1000)]  # long ones are divided
        self.rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")

    def read(self, name: str, **given: object) -> Recipe:
        """The recipe of a way."""
        model = self.add_biases() if WAYS[name].get("freeze.grain") == "biases" else self.model
        values = {"model.path": model, "data.path": self.rows, "output": self.folder / "run"} | COMMON | WAYS[name] | given
        return load_recipe(None, [f"{key}={value}" for key, value in values.items()], "sft")

    def add_biases(self) -> Path:
        """The model with biases of 0 in its attention, which its family has a key for."""
        folder = self.folder / "biased"
        if not (folder / "config.json").exists():
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.model, attention_bias=True))
            weights = {key: value for path in self.model.glob("*.safetensors") for key, value in load_file(path).items()}
            model.load_state_dict(weights, strict=False)
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(self.model).save_pretrained(folder)
        return folder

    def measure(self, name: str) -> dict[str, Any]:
        """A way as it is planned, run and refused."""
        budget = plan(self.read(name))
        adapters = budget.adapters is not None
        round_ = self.run(self.read(name))
        result, verification = round_.read_result(), verify_round(round_)
        return {
            "trained": budget.num_adapter_weights if adapters else budget.plan.num_trainable,
            "parameters": budget.plan.num_parameters,
            "gradient_bytes": {"planned": budget.half.gradients_bytes, "measured": result.gradient_bytes},
            "state_bytes": {"planned": budget.half.optimizer_bytes, "measured": result.optimizer_bytes},
            "flops": self.count_flops(name),
            "counts_adapter": not adapters or budget.adapters.is_counted,
            "passed": verification.passed,
            "frozen": describe_frozen(verification),
            "launches": {launch: self.try_launch(name, launch) for launch in ("one", 0, 1, 2, 3)},
        }

    def count_flops(self, name: str) -> dict[str, float]:
        """A step's, over full fine-tuning's, as planned and as counted."""
        length = min(MOST_TOKENS, read_max_positions(str(self.model)) or MOST_TOKENS)
        is_redrawn = "freeze.redraw" in WAYS[name]
        given = {} if is_redrawn else FOUR_ROWS | {"data.max_length": length}
        found = {way: self.read(way, **given) for way in ("full", name)}
        steps = {way: plan(recipe).half_step for way, recipe in found.items()}
        for way, recipe in found.items():
            if (way, *given) not in self.counted:
                with watching_steps(count_flops) as flops:
                    self.run(recipe)
                self.counted[way, *given] = max(flops) if is_redrawn else sum(flops)
        counted = {way: self.counted[way, *given] for way in found}
        return {"planned": steps[name][1].total / steps["full"][1].total, "measured": counted[name] / counted["full"]}

    def run(self, recipe: Recipe) -> Round:
        """A finished round in this process; of the last way, what it left is removed."""
        shutil.rmtree(recipe.folder, ignore_errors=True)
        _, round_ = runners.prepare_single(recipe)
        run_round(round_, StopRequest(round_))
        return round_

    def try_launch(self, name: str, launch: str | int) -> str | None:
        """Why one process, or two at a stage, do not carry a way; None where they do."""
        given = {} if launch == "one" else {"launch.num_processes": 2, "launch.zero_stage": launch}
        folder = self.folder / "launch"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            _, round_ = runners.prepare_single(self.read(name, output=folder, **given))
            read_assignment(round_.read_spec())
        except InputError as error:
            return error.message
        return None

    def time(self, names: list[str], num_steps: int, num_tokens: int) -> dict[str, float]:
        """A turn: a step's seconds over full fine-tuning's, by way."""
        seconds = {name: self.time_step(name, num_steps, num_tokens) for name in ("full", *names)}
        print(" ".join(f"{name}: {own / seconds['full']:.3f}" for name, own in seconds.items()), file=sys.stderr, flush=True)
        return {name: seconds[name] / seconds["full"] for name in names}

    def time_step(self, name: str, num_steps: int, num_tokens: int) -> float:
        """Seconds of a step, from its start to that of the next."""
        given = {"train.max_steps": num_steps + 3, "data.max_length": num_tokens}
        with watching_steps(read_clock) as starts:
            self.run(self.read(name, **given))
        steps = [later - earlier for earlier, later in pairwise(starts)][2:]
        return statistics.mean(steps) if "freeze.redraw" in WAYS[name] else statistics.median(steps)


@contextmanager
def watching_steps(watch: Callable[[Callable[[], torch.Tensor]], tuple[torch.Tensor, float]]) -> Iterator[list[float]]:
    """Have something else take every forward and backward pass of training, and keep what it finds."""
    step, found = Trainer.training_step, []

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss, figure = watch(functools.partial(step, *args, **kwargs))
        found.append(figure)
        return loss

    Trainer.training_step = watched
    try:
        yield found
    finally:
        Trainer.training_step = step


def read_clock(step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Seconds when it began."""
    start = time.perf_counter()
    return step(), start


def count_flops(step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """FLOPs of its matrix products and attention."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    with FlopCounterMode(display=False, custom_mapping={kernel: count_attention, backward: count_backward}) as counter:
        loss = step()
    return loss, float(counter.get_total_flops())


def count_attention(query: Any, key: Any, value: Any, dropout: float = 0, is_causal: bool = False, **_: Any) -> int:
    """A kernel that knows that attention is causal computes half."""
    return sdpa_flop_count(query, key, value) // (2 if is_causal else 1)


def count_backward(
    gradient: Any, query: Any, key: Any, value: Any, output: Any, sums: Any, dropout: float, is_causal: bool, **_: Any
) -> int:
    """Its backward pass."""
    return sdpa_backward_flop_count(gradient, query, key, value) // (2 if is_causal else 1)


def plan(recipe: Recipe) -> Any:
    """The budget that `hft plan` shows."""
    start = runners.resolve_start(recipe.model.place)
    described = describe_model(start.path)
    budget = runners.plan_recipe(recipe, start, described.model_type, described.parameters, described.num_heads)
    return count_adapters(budget, recipe.method, start.path)


def describe_frozen(found: Verification) -> str:
    """What was compared bit for bit, and what by rounding's measure."""
    parts = [f"{found.num_frozen} tensors"] * bool(found.num_frozen)
    parts += [f"{found.num_frozen_columns:,} columns"] * bool(found.num_frozen_columns)
    parts += [f"{found.num_frozen_entries:,} entries"] * bool(found.num_frozen_entries)
    parts += [f"directions of {len(found.closed_change)} matrices"] * bool(found.closed_change)
    parts += [f"directions of {len(found.closed_reading)} readers"] * bool(found.closed_reading)
    return ", ".join(parts) or "nothing is frozen"


if __name__ == "__main__":
    main()
