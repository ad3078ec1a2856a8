"""Tables of scripts/README.md on learning, forgetting and what trains, out of the figures that scripts left. No torch."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from reproduce_limits import ARMS as LIMITED
from reproduce_stream import BENCHES, LEVERS, REPLAYED, SEEDS, TASKS, list_rates
from reproduce_stream import WAYS as STREAM_WAYS

from hftcli.comparing.frontiers import EqualLearning, Trail, compare_at_equal_learning, correct_by_holm, find_p_value
from hftcli.comparing.statistics import Seed, estimate_mean

FOLDER = Path(__file__).parent
STREAM, SKILL, WAYS, ADVICE, LIMITS, ROOM, PREFERENCES, INSTRUCTIONS = (
    FOLDER / f"{name}.json" for name in ("stream", "skill", "ways", "advice", "limits", "room", "preferences", "instructions")
)
MEASURES = {
    "left after each task": ("learned", ".2f"), "lost by the end": ("forgot", "+.2f"), "left at the end": ("left", ".2f"),
    "texts, lost": ("text", "+.2f"),
}  # fmt: skip
DIFFERENCES = {name: key for name, (key, _) in MEASURES.items() if key != "left"}
REPLAYS = {"": "", "with 1 %": " + replay 1 %", "with 10 %": " + replay 10 %"}
PREFERRED = {
    "reward accuracy": ("accuracy", ".1f"), "margin": ("margin", ".2f"), "KL to the start": ("kl", ".3f"),
    "known, lost": ("lost", "+.3f"),
}  # fmt: skip
INSTRUCTED = {
    "held-out rows, gain": ("gained", "+.3f"), "ARC, lost": ("ARC", "+.3f"), "NQ-open, lost": ("NQ-open", "+.3f"),
    "Wikipedia, lost": ("Wikipedia", "+.3f"), "KL to the start": ("kl", ".4f"),
    "IFEval, points lost": ("IFEval points", "+.1f"),
    "ARC, points lost": ("ARC points", "+.1f"), "HellaSwag, points lost": ("HellaSwag points", "+.1f"),
}  # fmt: skip
COMPARED = {measure: key for measure, (key, _) in INSTRUCTED.items() if "points" not in measure}
LESS = (("facts", "full"), ("facts", "half"), ("skill", "half"))
SAME = "the same alone"
LESS_WITH_LEVERS = (("facts", SAME), ("skill", SAME), ("facts", "quiet"))
OWN_LEVERS = set(LEVERS) - set(REPLAYED)  # whose table says more than half
STAGES = {"one": "one process", "0": "ZeRO 0", "1": "1", "2": "2", "3": "3"}
Row = tuple[str, ...]


def make_evidence_tables(make_table: Callable[[Row, Iterable[Row]], str]) -> dict[str, str]:
    """By the place in the page."""
    streams = json.loads(STREAM.read_text(encoding="utf-8"))
    tables = {}
    for model, arms in streams.items():
        for bench, names in BENCHES.items():
            told = [name for name in names if bench != "ways" or len(list_rates(model, name)) > 1]
            known = {name: rates for name in told if (rates := pick_rates(model, name, arms))}
            if bench == "ways" or set(known) - set(BENCHES["ways"]):
                last = f"forgets more than {SAME if bench == 'levers' else 'half'} at equal learning"
                tables[f"stream-{bench}-{model}"] = make_table(("trains", "rate", *MEASURES, last), list_arms(known, bench))
        replayed = [how or name for name in list(MEASURES)[1:] for how in REPLAYS]
        tables[f"stream-replay-{model}"] = make_table(("trains", "rate", *replayed), list_replays(model, arms))
    tables["stream-beside"] = make_table(("model", "trains", "less", "rate", *DIFFERENCES), list_differences(streams))
    tables["stream-levers-beside"] = make_table(
        ("model", "trains", "rate", *(f"{measure}, less {SAME}" for measure in DIFFERENCES)), list_lever_differences(streams)
    )
    columns = (
        "model",
        "task",
        "named",
        "advised",
        "minutes",
        "to learn, at least",
        "to lose, at most",
        "learned",
        "lost",
        "kept",
    )
    tables["advice"] = make_table(columns, list_promises(json.loads(ADVICE.read_text(encoding="utf-8"))))
    for bench, arms in json.loads(SKILL.read_text(encoding="utf-8")).items():
        pairs = LESS_WITH_LEVERS if bench == "levers" else LESS
        columns = ("trains", "rate", "skill", "facts", "facts reworded", *(f"{key} less {other}'s" for key, other in pairs))
        tables[f"skill-{bench}"] = make_table(columns, list_skills(arms, pairs))
    limits = json.loads(LIMITS.read_text(encoding="utf-8"))
    less = [f"{measure}, less half's" for measure in DIFFERENCES]
    tables["limits"] = make_table(("model", "tasks", "trains", *MEASURES, *less), list_limits(limits, streams))
    columns = ("facts", "for each thousand weights", "known", "trains", "skill", "facts lost", "less full's")
    tables["room"] = make_table(columns, list_rooms(json.loads(ROOM.read_text(encoding="utf-8"))))
    for model, arms in json.loads(PREFERENCES.read_text(encoding="utf-8")).items():
        columns = ("trains", "rate", *PREFERRED, "loses more than full at an equal margin")
        tables[f"preferences-{model}"] = make_table(columns, list_beside(arms, "full", PREFERRED))
    for model, cases in json.loads(INSTRUCTIONS.read_text(encoding="utf-8")).items():
        for rows, found in cases.items():
            columns = ("trains", "rate", *INSTRUCTED, "forgets more than half at equal learning")
            arms = {arm: whole for arm, rates in found.items() if arm != "start" and (whole := pick_whole(rates))}
            tables[f"instructions-{model}-{rows}"] = make_table(columns, list_beside(arms, "half", INSTRUCTED))
            columns = ("trains", "rate", *(f"{measure}, less half's" for measure in COMPARED))
            tables[f"instructions-beside-{model}-{rows}"] = make_table(columns, list_less(arms, "half"))
    ways = json.loads(WAYS.read_text(encoding="utf-8"))
    for model, known in ways.items():
        columns = ("trains", "share", "gradients", "states", "FLOPs", "as counted", "frozen, as verified", "launches")
        has_times = any("time" in way for way in known.values())
        tables[f"ways-{model}"] = make_table((*columns, *(["step"] * has_times)), list_ways(known, has_times))
    return tables


def pick_rates(model: str, name: str, arms: dict[str, Any]) -> dict[str, Any]:
    """The runs of an arm at its learning rates, without one of which some are missing; nothing where that is the highest."""
    rates = {f"{rate:g}": arms.get(name, {}).get(f"{rate:g}", ()) for rate in list_rates(model, name)}
    whole = pick_whole(rates)
    return whole if [*rates][-1] in whole else {}


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


def list_arms(arms: dict[str, Any], bench: str) -> Iterator[Row]:
    """A row for each learning rate of each arm of a sequence, in nats per token; the comparison stands in the arm's first."""
    beside = {name: drop_lever(name) if bench == "levers" else "half" for name in arms}
    others = [name for name, other in beside.items() if name != other]
    measured = [name for name in others if any(read_trails(arms[name]).values())]
    found = []
    for name in measured:
        own, other = arms[name], arms[beside[name]]
        if bench == "levers":  # one that has a single learning rate is not compared with a choice of two
            other = {rate: other[rate] for rate in own}
        found.append(compare_at_equal_learning(read_trails(own), read_trails(other), is_within=True))
    p_values = correct_by_holm([one.p_value if one else None for one in found])
    told = {
        name: "stopped" if find_stopped(arms[name]) else "measured at its end alone" for name in others if name not in measured
    }
    told |= {name: describe_difference(*one) for name, *one in zip(measured, found, p_values, strict=True)}
    for name, rates in arms.items():
        for rate, runs in rates.items():
            yield name, rate, *describe_ends(runs), told.pop(name, "")


def describe_ends(runs: list[dict[str, Any]]) -> list[str]:
    """What an arm learned and lost at a learning rate; where hft stopped some of its runs, in which tasks."""
    if stopped := [run["stopped"] for run in runs if "stopped" in run]:
        where = " and ".join(dict.fromkeys(stopped))
        return [f"{len(stopped)} of {len(runs)} stopped, in {where}", *[""] * (len(MEASURES) - 1)]
    return [describe([run[key] for run in runs], form) for key, form in MEASURES.values()]


def find_stopped(rates: dict[str, Any]) -> set[str]:
    """The learning rates of an arm at which hft stopped a run, as weights that train did not move."""
    return {rate for rate, runs in rates.items() if any("stopped" in run for run in runs)}


def drop_lever(name: str) -> str:
    """The arm without what it adds."""
    return name.partition(" + ")[0]


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
            if len(list_rates(model, name)) == 1 or name in OWN_LEVERS:
                continue
            other = "LoRA" if name == "LoRA, quiet" else "half"
            for rate, runs in rates.items():
                beside = arms.get(other, {}).get(rate, [])
                if name != other and beside:
                    yield model, name, other, rate, *describe_differences(runs, beside)


def list_lever_differences(streams: dict[str, Any]) -> Iterator[Row]:
    """Every lever less the same way alone at the higher rate, seed by seed, at the ends of the runs; in nats per token."""
    for model, arms in streams.items():
        for name in (name for name in LEVERS if pick_rates(model, name, arms)):
            *_, (rate, runs) = pick_rates(model, name, arms).items()
            if rate not in find_stopped(arms[name]):
                yield model, name, rate, *describe_differences(runs, arms[drop_lever(name)][rate])


def describe_differences(runs: list[dict[str, Any]], beside: list[dict[str, Any]]) -> Iterator[str]:
    """What runs left and lost, less what others did on the same seeds."""
    for key in DIFFERENCES.values():
        yield describe(pair_seeds(runs, beside, key), "+.2f")


def list_promises(cases: list[dict[str, Any]]) -> Iterator[Row]:
    """A row for each search of `hft advise`: what it promised of a further seed, and what three did; in nats per token."""
    for case in cases:
        named = "yes" if case["named"] else "its own texts"
        minutes = "" if case["minutes"] is None else f"{case['minutes']:.1f}"
        if case["arm"] is None:
            yield case["model"], case["task"], named, case["sentence"], minutes, *[""] * 5
            continue
        ends = [", ".join(f"{end[key]:{form}}" for end in case["ends"]) for key, form in (("learned", ".3f"), ("lost", "+.3f"))]
        promise = f"{case['learning']['low']:.3f}", f"{case['forgetting']['high']:+.3f}"
        advised = f"{case['arm']}, {case['rate']:g}"
        kept = f"{case['num_kept']} of {len(case['ends'])}"
        yield case["model"], case["task"], named, advised, minutes, *promise, *ends, kept


def list_limits(limits: dict[str, Any], streams: dict[str, Any]) -> Iterator[Row]:
    """Half and the quiet half in each case, in nats per token; their differences by seed, with Holm's p over the cases."""
    for model, cases in limits.items():
        known = {arm: streams[model][arm][f"{list_rates(model, arm)[-1]:g}"] for arm in LIMITED}
        cases = {f"{len(TASKS)} tasks, as above": known, **cases}
        half, quiet = LIMITED
        tested = {
            key: test_differences([pair_seeds(arms[quiet], arms[half], key) for arms in cases.values()], "+.2f")
            for key in DIFFERENCES.values()
        }
        for place, (case, arms) in enumerate(cases.items()):
            for arm, runs in arms.items():
                less = [tested[key][place] if arm == quiet else "" for key in tested]
                yield model, case, arm, *describe_ends(runs), *less


def list_rooms(room: dict[str, Any]) -> Iterator[Row]:
    """What a skill costs in each world, in points; the difference from full, seed by seed, with Holm's p over all of them."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in room["runs"]:
        lost = 100 * room["worlds"][str(run["world"])]["recall"] - run["facts"]
        runs.setdefault((str(run["world"]), run["trains"]), []).append(run | {"lost": lost})
    others = [key for key in runs if key[1] != "full"]
    found = test_differences([pair_seeds(runs[key], runs[key[0], "full"], "lost") for key in others], "+.1f")
    told = dict(zip(others, found, strict=True))
    for (world, arm), own in runs.items():
        about = room["worlds"][world]
        cells = [describe([run[key] for run in own], ".1f") for key in ("skill", "lost")]
        size = f"{about['facts']:,}", f"{1000 * about['facts'] / about['weights']:.2f}", f"{100 * about['recall']:.1f}"
        yield *size, arm, *cells, told.get((world, arm), "")


def list_beside(arms: dict[str, Any], other: str, measures: dict[str, tuple[str, str]]) -> Iterator[Row]:
    """A row for each learning rate of each arm; against one of them along the curves within the runs, with Holm's p."""
    beside = [name for name in arms if name != other]
    found = [compare_at_equal_learning(read_trails(arms[name]), read_trails(arms[other]), is_within=True) for name in beside]
    p_values = correct_by_holm([one.p_value if one else None for one in found])
    told = {name: describe_difference(*one) for name, *one in zip(beside, found, p_values, strict=True)}
    for name, rates in arms.items():
        for rate, runs in rates.items():
            cells = [describe([run[key] for run in runs], form) for key, form in measures.values()]
            yield name, rate, *cells, told.pop(name, "")


def list_less(arms: dict[str, Any], other: str) -> Iterator[Row]:
    """Every arm less one of them at the same learning rate, seed by seed, in nats per token; Holm's p over each column."""
    places = [(name, rate) for name, rates in arms.items() if name != other for rate in rates if rate in arms[other]]
    columns = [
        test_differences([pair_seeds(arms[name][rate], arms[other][rate], key) for name, rate in places], "+.3f")
        for key in COMPARED.values()
    ]
    for place, cells in zip(places, zip(*columns, strict=True), strict=True):
        yield *place, *cells


def pick_whole(rates: dict[str, Any]) -> dict[str, Any]:
    """The learning rates that no seed is missing of."""
    return {rate: runs for rate, runs in rates.items() if len(runs) == len(SEEDS)}


def pair_seeds(runs: list[dict[str, Any]], beside: list[dict[str, Any]], key: str) -> list[float]:
    """A measure of runs less that of others, of the same seeds."""
    others = {run["seed"]: run[key] for run in beside}
    return [run[key] - others[run["seed"]] for run in runs]


def test_differences(differences: list[list[float]], form: str) -> list[str]:
    """Mean, half of the 95 % interval and Holm's p over all that are given, of differences by seed."""
    estimates = [estimate_mean(values) for values in differences]
    p_values = correct_by_holm([find_p_value(estimate, estimate) for estimate in estimates])
    return [
        f"{describe(values, form)} ({describe_p_value(p_value)})" for values, p_value in zip(differences, p_values, strict=True)
    ]


def read_trails(rates: dict[str, Any]) -> dict[Seed, list[Trail]]:
    """Learning against forgetting within the runs: by seed, that of every learning rate at which none was stopped."""
    rates = {rate: runs for rate, runs in rates.items() if rate not in find_stopped(rates)}
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


def list_skills(arms: dict[str, Any], pairs: tuple[tuple[str, str], ...]) -> Iterator[Row]:
    """A row for each arm on tinyworld, in points; last its differences from others, seed by seed."""
    for name, arm in arms.items():
        cells = [describe([run[key] for run in arm["runs"]], ".1f") for key in ("skill", "facts", "reworded")]
        for key, beside in pairs:
            other = drop_lever(name) if beside == SAME else beside
            cells.append("" if name == other else describe(pair_seeds(arm["runs"], arms[other]["runs"], key), "+.1f"))
        yield name, f"{arm['rate']:g}", *cells


def describe(values: list[float], form: str) -> str:
    """Mean and the half of the 95 % interval (Student's t over the seeds)."""
    found = estimate_mean(values)
    assert found.high is not None
    return f"{found.mean:{form.replace('.', 'z.')}} ± {found.high - found.mean:{form.replace('+', '')}}"


def describe_difference(found: EqualLearning | None, p_value: float | None) -> str:
    """Mean, interval with the curves' band in it, and Holm's p over the arms of the table."""
    if found is None or found.interval is None or p_value is None:
        return "never learned equally much"
    low, high = found.interval
    return f"{found.difference.mean:+z.2f} ({low:+z.2f} to {high:+z.2f}; {describe_p_value(p_value)})"


def describe_p_value(p_value: float | None) -> str:
    assert p_value is not None
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
