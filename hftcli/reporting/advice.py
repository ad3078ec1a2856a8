"""What `hft advise` found, on the terminal."""

import sys
from dataclasses import asdict

from hftcli.comparing.advice import Advice
from hftcli.reporting.lines import fold, say
from hftcli.reporting.places import name_hft, show_place
from hftcli.reporting.terminal import make_number_table, print_json, print_whole


def print_advice(advice: Advice, limit: float, as_json: bool) -> None:
    """Every arm's best, what is advised, and what of it may be expected."""
    if as_json:
        print_json({**asdict(advice), "recipe": _name(advice.recipe), "page": _name(advice.page)})
        return
    say(f"learned and lost in nats per token, at the step that learned most and lost at most {limit:g}:")
    table = make_number_table("trains", "learning rate", "steps", "learned", "lost")
    for one in advice.arms:
        candidate = one.candidate
        table.add_row(
            candidate.arm, f"{candidate.learning_rate:g}", str(one.num_steps), f"{one.learning:.3f}", f"{one.forgetting:+.3f}"
        )
    print_whole(table)
    for arm, reason in advice.left_out.items():
        say(f"left out: {arm}: {reason}")
    if advice.best is not None:
        say(
            f"advice: {advice.best.candidate.arm}, at {advice.best.candidate.learning_rate:g} for {advice.best.num_steps} steps"
        )
    say(advice.sentence)
    notes = [("page", advice.page), ("recipe", advice.recipe)]
    lines = [f"{name:7} {show_place(path)}" for name, path in notes if path is not None]
    if advice.recipe is not None:
        lines.append(f"next    {name_hft()} sft {show_place(advice.recipe)}")
    for line in lines:
        print(fold(line, sys.stderr), file=sys.stderr)


def _name(path: object) -> str | None:
    return None if path is None else str(path)
