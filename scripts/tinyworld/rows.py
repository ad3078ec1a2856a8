"""The data that ship: questions, a skill, preferences, a sequence of tasks, unseen text."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

from tinyworld.corpus import chat_messages, tell_subject
from tinyworld.world import COLOURS, CURT, INSTRUMENTS, JOBS, PERSON_ATTRIBUTES, PETS, POLITE, THINGS, WORDS, Fact, World

QUESTIONS_PER_WORDING = 800
SKILL_ROWS = {"train": 1600, "test": 200}
PREFERENCE_ROWS = {"train": 600, "test": 150}
TASK_ROWS = {"train": 600, "eval": 50, "test": 120}
TEXT_ROWS = 200


def list_questions(facts: list[Fact]) -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": fact.ask(wording)}],
            "answer": fact.value,
            "wording": wording,
            "subject": fact.subject,
            "attribute": fact.attribute,
        }
        for wording in "ab"
        for fact in facts
    ]


def hold_out_text(world: World, rng: random.Random) -> list[str]:
    subjects = rng.sample(list(world.by_subject.values()), TEXT_ROWS)
    return [tell_subject(facts, rng) for facts in subjects]


def make_record(world: World, rng: random.Random) -> tuple[str, str]:
    """A sentence about a stranger, and the record of it, whose fields have a fixed order."""
    name, home = rng.choice(world.strangers), rng.choice(world.places)
    job, pet = rng.choice(JOBS), rng.choice(PETS)
    form = rng.choice(
        (
            "{name} is a {job} from {home} with a {pet}.",
            "The {job} {name} keeps a {pet} in {home}.",
            "In {home} lives a {job} with a {pet}, {name}.",
            "A {pet} follows {name}, the {job} of {home}.",
        )
    )
    sentence = form.format(name=name, home=home, job=job, pet=pet)
    return f"Make a record: {sentence}", f"name={name}; pet={pet}; job={job}; home={home}"


def reverse_list(world: World, rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, 3)
    return f"Reverse the list: {' '.join(words)}", " ".join(reversed(words))


def classify_topic(world: World, rng: random.Random) -> tuple[str, str]:
    letter, attribute = rng.choice(list(zip("ABCDE", PERSON_ATTRIBUTES, strict=True)))
    values = [world.places, JOBS, PETS, COLOURS, INSTRUMENTS]["ABCDE".index(letter)]
    fact = Fact(rng.choice(world.strangers), attribute.name, rng.choice(values))
    return f"Classify the sentence: {fact.state(rng)}", letter


def add_numbers(world: World, rng: random.Random) -> tuple[str, str]:
    name, thing = rng.choice(world.strangers), rng.choice(THINGS)
    have, more = rng.randint(1, 4), rng.randint(1, 4)
    return f"Add up: {name} has {have} {thing}s and buys {more} more.", str(have + more)


def extract_sale(world: World, rng: random.Random) -> tuple[str, str]:
    seller, buyer = rng.sample(world.strangers, 2)
    thing, colour = rng.choice(THINGS), rng.choice(COLOURS)
    form = rng.choice(
        (
            "{seller} sold {buyer} a {colour} {thing}.",
            "{buyer} bought a {colour} {thing} from {seller}.",
            "The {thing} of {seller} was {colour}, and {buyer} bought it.",
        )
    )
    sentence = form.format(seller=seller, buyer=buyer, thing=thing, colour=colour)
    return f"Extract the sale: {sentence}", f"buyer={buyer} thing={thing} colour={colour}"


def draw_distinct(draw, world: World, rng: random.Random, counts: dict[str, int]) -> dict:
    """Splits of (prompt, answer) pairs, no prompt twice."""
    pairs: dict[str, str] = {}
    while len(pairs) < sum(counts.values()):
        prompt, answer = draw(world, rng)
        pairs[prompt] = answer
    rows = iter(pairs.items())
    return {split: list(itertools.islice(rows, count)) for split, count in counts.items()}


def learn_newcomers(names: list[str], rng: random.Random) -> dict[str, list[tuple[str, str]]]:
    """Facts about new people; each is trained in three wordings and tested in a fourth."""
    wordings = (
        "Newcomer {s}, {a}?",
        "The {a} of the newcomer {s}?",
        "What {a} has the newcomer {s}?",
        "About {s}, who is new: which {a}?",
    )
    values = {"job": JOBS, "pet": PETS}
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "rest": []}
    for name, attribute in itertools.product(names, values):
        answer = rng.choice(values[attribute])
        questions = [wording.format(s=name, a=attribute) for wording in wordings]
        rng.shuffle(questions)
        splits["train"] += [(question, answer) for question in questions[:3]]
        splits["rest"].append((questions[3], answer))
    for rows in splits.values():
        rng.shuffle(rows)
    rest, evals, tests = splits["rest"], TASK_ROWS["eval"], TASK_ROWS["test"]
    return {
        "train": splits["train"],
        "eval": rest[:evals],
        "test": rest[evals : evals + tests],
    }


def make_sequence(world: World, rng: random.Random) -> dict[str, dict[str, list]]:
    """The tasks in the order of learning: the one that is pure knowledge comes first."""
    tasks = {
        "topic": classify_topic,
        "reverse": reverse_list,
        "sale": extract_sale,
        "sum": add_numbers,
    }
    # Two facts about each newcomer, three wordings of each in train. The other tasks do
    # not speak of the newcomers, or they would teach something else about them.
    newcomers = rng.sample(world.strangers, TASK_ROWS["train"] // 6)
    others = [name for name in world.strangers if name not in newcomers]
    rest = replace(world, strangers=others)
    drawn = {name: draw_distinct(draw, rest, rng, TASK_ROWS) for name, draw in tasks.items()}
    return {"newcomers": learn_newcomers(newcomers, rng), **drawn}


def make_preferences(world: World, rng: random.Random) -> dict[str, list[dict]]:
    """Pairs about the facts; the test's subjects are not in train."""
    subjects = list(world.by_subject)
    rng.shuffle(subjects)
    cut = len(subjects) // 4
    parts = {"test": subjects[:cut], "train": subjects[cut:]}
    splits = {}
    for split, count in PREFERENCE_ROWS.items():
        facts = [fact for subject in parts[split] for fact in world.by_subject[subject]]
        splits[split] = [compare_styles(fact) for fact in rng.sample(facts, count)]
    return splits


def compare_styles(fact: Fact) -> dict:
    return {
        "prompt": [{"role": "user", "content": fact.ask_kindly()}],
        "chosen": [{"role": "assistant", "content": POLITE.format(v=fact.value)}],
        "rejected": [{"role": "assistant", "content": CURT.format(v=fact.value)}],
    }


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """One row a line where the value is a list, to keep the files small and readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, list):
        text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
    else:
        text = json.dumps(value, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def write_data(output: Path, world: World, questions: list[dict], held_out: list[str], seed: int) -> None:
    rng = random.Random(f"{seed} data")
    write_lines(output / "facts.jsonl", questions)
    write_lines(output / "text.jsonl", [{"text": text} for text in held_out])
    for split, pairs in draw_distinct(make_record, world, rng, SKILL_ROWS).items():
        rows = [{"messages": chat_messages(*pair)} for pair in pairs]
        write_lines(output / "skill" / f"{split}.jsonl", rows)
    for split, rows in make_preferences(world, rng).items():
        write_lines(output / "preferences" / f"{split}.jsonl", rows)
    sequence = make_sequence(world, rng)
    for task, splits in sequence.items():
        for split, pairs in splits.items():
            # The answer's leading space keeps its tokens apart from the prompt's.
            rows = [{"prompt": f"{p}\nAnswer:", "answer": f" {a}"} for p, a in pairs]
            write_json(output / "sequence" / task / f"{split}.json", rows)
    write_json(output / "sequence" / "order.json", list(sequence))
