"""The tables of scripts/README.md out of the figures that a whole check left, kept in results/. No torch."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu.plans import MODELS, list_cases, make_setting
from hftcli.freezing.activations import Workload
from hftcli.freezing.budget import Budget
from hftcli.launching.cards import CHECKPOINTED, OFFLOADED, judge_cards, list_ways, make_full

RESULTS = Path(__file__).parent / "results" / "h200.json"
FULL, TIGHT = "full", "full, in half's memory"
SPEED_GROUPS = ("1B, 4 x 2048", "1B, 2 x 4096", "7B, 8 layers, 4 x 2048")
Row = tuple[str, ...]


def make_gpu_tables(make_table: Callable[[Row, Iterator[Row]], str]) -> dict[str, str]:
    """By the place in the page."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    steps = {letter: {row["name"]: row for row in step["rows"]} for letter, step in found["steps"].items()}
    return {
        "gpu-speed": make_table(
            ("", "forward", "backward", "AdamW", "step, ms", "over full", "count", "tokens/s", "FLOPs used", "peak GB"),
            list_speeds(steps["e"]),
        ),
        "gpu-equal-memory": make_table(("", "half, ms", "full, ms", "ratio", "count"), list_equal_memory(steps["e"])),
        "gpu-whole": make_table(
            ("", "micro-batches a step", "s a step", "tokens/s", "peak GiB", "planned GiB", "host GiB"), list_whole(steps["f"])
        ),
        "gpu-memory": make_table(("", "planned GB", "measured GB", "measured over planned"), list_memory(steps["d"])),
        "gpu-kernels": make_table(("", "forward, ms", "backward, ms", "both, ms", "peak GB"), list_kernels(steps["h"])),
        "gpu-commands": make_table(("", "steps", "largest difference of a loss, nats"), list_commands(steps)),
        "gpu-models": make_table(
            (
                "",
                "billion weights",
                "half",
                "full",
                "half, offloaded",
                "full, offloaded",
                "24 GB cards for full",
                "80 GB cards for full",
            ),
            list_models(),
        ),
        "gpu-questions": make_table(("", "way", "questions per second"), list_questions(steps["g"])),
    }


def list_models() -> Iterator[Row]:
    """Half fine-tuning of well-known models by the plan: the least of a device, and what full fine-tuning takes beside it."""
    work = Workload(1, 2048, attention="flash", arithmetic="autocast")
    for name in MODELS:
        setting = make_setting(name, "half", work)
        cards = {verdict.card_gb: verdict for verdict in judge_cards(setting.budget)}
        ways, full_ways = dict(list_ways(setting.budget)), dict(list_ways(make_full(setting.budget)))

        def show(way: Budget) -> str:
            return f"{way.half.total_bytes / 1e9:,.1f}" + (f" + {way.host.host_bytes / 1e9:,.0f}" if way.host else "")

        yield (
            name, f"{setting.budget.plan.num_parameters / 1e9:.2f}", show(ways[CHECKPOINTED]), show(full_ways[CHECKPOINTED]),
            show(ways[OFFLOADED]), show(full_ways[OFFLOADED]), f"{cards[24].num_full_cards}", f"{cards[80].num_full_cards}",
        )  # fmt: skip


def format_ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def list_speeds(rows: dict[str, dict[str, Any]]) -> Iterator[Row]:
    for row in rows.values():
        if row["passed"] is not False:
            yield (
                row["name"], format_ms(row["forward_s"]), format_ms(row["backward_s"]),
                format_ms(row["optimizer_s"]) if row["optimizer_s"] > 1e-4 else "left out", format_ms(row["step_s"]),
                f"{row['ratio']:.3f}", f"{row['flop_ratio']:.3f}", f"{row['tokens_per_s']:,.0f}", f"{100 * row['mfu']:.1f} %",
                f"{row['peak_gb']:.1f}",
            )  # fmt: skip


def list_equal_memory(rows: dict[str, dict[str, Any]]) -> Iterator[Row]:
    for group in SPEED_GROUPS:
        half, full = rows[f"{group}, half"], rows[f"{group}, {TIGHT}"]
        yield (
            group, format_ms(half["step_s"]), format_ms(full["step_s"]), f"{half['step_s'] / full['step_s']:.3f}",
            f"{half['flop_ratio'] / full['flop_ratio']:.3f}",
        )  # fmt: skip


def list_whole(rows: dict[str, dict[str, Any]]) -> Iterator[Row]:
    work = Workload(1, 2048, attention="flash", arithmetic="autocast", checkpoint_every=1)
    planned = {rule: make_setting("7B", rule, work).planned.total_bytes / 2**30 for rule in ("half", FULL)}
    exact = make_setting("7B", "half", replace(work, arithmetic="bfloat16")).budget
    on_host = replace(exact, offload=True).half.total_bytes / 2**30
    for row in rows.values():
        if "tokens_per_s" in row:
            what, _, rest = row["name"].partition(", ")
            held = on_host if "host_gib" in row else planned["half"]
            yield (
                what, rest.split()[0], f"{row['step_s']:.2f}", f"{row['tokens_per_s']:,.0f}", f"{row['peak_gib']:.1f}",
                f"{held:.1f}", f"{row['host_gib']:.1f}" if "host_gib" in row else "",
            )  # fmt: skip
    yield "full on one card", "", "", "", "", f"{planned[FULL]:.1f}", ""


def list_memory(rows: dict[str, dict[str, Any]]) -> Iterator[Row]:
    """The plan is today's; only what was measured is from the card."""
    for shape in ("135M", "1B"):
        for case in list_cases(shape):
            planned, measured = case.make_setting().planned.total_bytes / 1e9, rows[case.name]["measured_gb"]
            yield case.name, f"{planned:.2f}", f"{measured:.2f}", f"{measured / planned:.3f}"


def list_kernels(rows: dict[str, dict[str, Any]]) -> Iterator[Row]:
    for row in rows.values():
        if "both_s" in row:
            yield (
                row["name"], format_ms(row["forward_s"]), format_ms(row["backward_s"]), format_ms(row["both_s"]),
                f"{row['peak_gb']:.1f}",
            )  # fmt: skip
        else:
            yield f"{row['name']}, {row['weights']:,} weights", "", "", format_ms(row["step_s"]), ""


def list_commands(steps: dict[str, dict[str, dict[str, Any]]]) -> Iterator[Row]:
    for row in (*steps["b"].values(), *steps["c"].values()):
        yield row["name"], f"{row['steps']}" if "steps" in row else "", f"{row['largest_gap']:.1g}"


def list_questions(rows: dict[str, dict[str, Any]]) -> Iterator[Row]:
    for row in rows.values():
        yield row["name"], row["way"], f"{row['questions_per_s']:,.0f}"
