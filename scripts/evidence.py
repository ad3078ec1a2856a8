"""Tables of scripts/README.md on learning, forgetting and what trains, out of the figures that scripts left. No torch."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from reproduce_stream import BENCHES, list_rates
from reproduce_stream import WAYS as STREAM_WAYS

from hftcli.comparing.frontiers import EqualLearning, Trail, compare_at_equal_learning, correct_by_holm
from hftcli.comparing.statistics import Seed, estimate_mean

FOLDER = Path(__file__).parent
STREAM, SKILL, WAYS = FOLDER / "stream.json", FOLDER / "skill.json", FOLDER / "ways.json"
MEASURES = {
    "left after each task": ("learned", ".2f"), "lost by the end": ("forgot", "+.2f"), "left at the end": ("left", ".2f"),
    "texts, lost": ("text", "+.2f"),
}  # fmt: skip
REPLAYS = {"": "", "with 1 %": " + replay 1 %", "with 10 %": " + replay 10 %"}
LESS = (("facts", "full"), ("facts", "half"), ("skill", "half"))
STAGES = {"one": "one process", "0": "ZeRO 0", "1": "1", "2": "2", "3": "3"}
Row = tuple[str, ...]


def make_evidence_tables(make_table: Callable[[Row, Iterable[Row]], str]) -> dict[str, str]:
    """By the place in the page."""
    streams = json.loads(STREAM.read_text(encoding="utf-8"))
    columns = ("trains", "rate", *MEASURES, "forgets more than half at equal learning")
    tables = {}
    for model, arms in streams.items():
        for bench, names in BENCHES.items():
            known = {name: arms[name] for name in names if name in arms and len(list_rates(model, name)) > 1}
            if bench == "ways" or not set(names) - set(BENCHES["ways"]) - set(known):
                tables[f"stream-{bench}-{model}"] = make_table(columns, list_arms(known))
        replayed = [how or name for name in list(MEASURES)[1:] for how in REPLAYS]
        tables[f"stream-replay-{model}"] = make_table(("trains", "rate", *replayed), list_replays(model, arms))
    tables["stream-beside"] = make_table(
        ("model", "trains", "less", "rate", "left after each task", "lost by the end", "texts, lost"), list_differences(streams)
    )
    for bench, arms in json.loads(SKILL.read_text(encoding="utf-8")).items():
        columns = ("trains", "rate", "skill", "facts", "facts reworded", *(f"{key} less {other}'s" for key, other in LESS))
        tables[f"skill-{bench}"] = make_table(columns, list_skills(arms))
    ways = json.loads(WAYS.read_text(encoding="utf-8"))
    for model, known in ways.items():
        columns = ("trains", "share", "gradients", "states", "FLOPs", "as counted", "frozen, as verified", "launches")
        has_times = any("time" in way for way in known.values())
        tables[f"ways-{model}"] = make_table((*columns, *(["step"] * has_times)), list_ways(known, has_times))
    return tables


def list_ways(known: dict[str, Any], has_times: bool) -> Iterator[Row]:
    """A row for each way to choose what trains: bytes as planned, and as measured where these are others."""
    for name, way in known.items():
        cells = [f"{way['trained'] / way['parameters']:.2%}"]
        for planned, measured in (way[key].values() for key in ("gradient_bytes", "state_bytes")):
            cells.append(f"{planned:,}" + ("" if planned == measured else f" (measured {measured:,})"))
        cells.append(f"{way['flops']['planned']:.3f}" + " + adapter" * (not way["counts_adapter"]))
        cells.append(f"{way['flops']['measured']:.3f}")
        cells += [way["frozen"] if way["passed"] else "**does not hold**"]
        cells.append(", ".join(STAGES[launch] for launch, refusal in way["launches"].items() if refusal is None))
        yield name, *cells, *([f"{way['time']['median']:.3f}" if "time" in way else ""] * has_times)


def list_arms(arms: dict[str, Any]) -> Iterator[Row]:
    """A row for each learning rate of each arm of a sequence, in nats per token; the comparison stands in the arm's first."""
    others = [name for name, rates in arms.items() if name != "half" and any(read_trails(rates).values())]
    found = [compare_at_equal_learning(read_trails(arms[name]), read_trails(arms["half"]), is_within=True) for name in others]
    p_values = correct_by_holm([one.p_value if one else None for one in found])
    told = {name: "measured at its end alone" for name in arms if name not in (*others, "half")}
    told |= {name: describe_difference(*one) for name, *one in zip(others, found, p_values, strict=True)}
    for name, rates in arms.items():
        for rate, runs in rates.items():
            cells = [describe([run[key] for run in runs], form) for key, form in MEASURES.values()]
            yield name, rate, *cells, told.pop(name, "")


def list_replays(model: str, arms: dict[str, Any]) -> Iterator[Row]:
    """A row for each way to choose what trains, at its higher rate: without replay, and with."""
    for way in STREAM_WAYS:
        rate = f"{list_rates(model, way)[-1]:g}"
        arms_of_way = [arms[way + replay][rate] for replay in REPLAYS.values()]
        cells = [
            describe([run[key] for run in runs], form) for key, form in list(MEASURES.values())[1:] for runs in arms_of_way
        ]
        yield way, rate, *cells


def list_differences(streams: dict[str, Any]) -> Iterator[Row]:
    """Every arm less another, seed by seed at the same learning rate, at the ends of the runs; in nats per token.

    The other is half; of quiet adapters it is those that are not, which train at rates of their own.
    """
    for model, arms in streams.items():
        for name, rates in arms.items():
            other = "LoRA" if name == "LoRA, quiet" else "half"
            for rate, runs in rates.items() if len(list_rates(model, name)) > 1 else ():
                beside = {run["seed"]: run for run in arms.get(other, {}).get(rate, [])}
                if name != other and beside:
                    differences = {
                        key: [run[key] - beside[run["seed"]][key] for run in runs] for key in ("learned", "forgot", "text")
                    }
                    yield model, name, other, rate, *(describe(values, "+.2f") for values in differences.values())


def read_trails(rates: dict[str, Any]) -> dict[Seed, list[Trail]]:
    """Learning against forgetting within the runs: by seed, that of every learning rate."""
    seeds = sorted({run["seed"] for runs in rates.values() for run in runs})
    return {
        (seed,): [
            tuple((gain, loss) for gain, loss in run["trail"])
            for runs in rates.values()
            for run in runs
            if run["seed"] == seed and run["trail"]
        ]
        for seed in seeds
    }


def list_skills(arms: dict[str, Any]) -> Iterator[Row]:
    """A row for each arm on tinyworld, in points."""
    beside = {other: {run["seed"]: run for run in arms[other]["runs"]} for _, other in LESS}
    for name, arm in arms.items():
        cells = [describe([run[key] for run in arm["runs"]], ".1f") for key in ("skill", "facts", "reworded")]
        less = [
            "" if name == other else describe([run[key] - beside[other][run["seed"]][key] for run in arm["runs"]], "+.1f")
            for key, other in LESS
        ]
        yield name, f"{arm['rate']:g}", *cells, *less


def describe(values: list[float], form: str) -> str:
    """Mean and the half of the 95 % interval (Student's t over the seeds)."""
    found = estimate_mean(values)
    assert found.high is not None
    return f"{found.mean:{form}} ± {found.high - found.mean:{form.replace('+', '')}}"


def describe_difference(found: EqualLearning | None, p_value: float | None) -> str:
    """Mean, interval with the curves' band in it, and Holm's p over the arms of the table."""
    if found is None or found.interval is None or p_value is None:
        return "never learned equally much"
    shown = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
    low, high = found.interval
    return f"{found.difference.mean:+.2f} ({low:+.2f} to {high:+.2f}; {shown})"
