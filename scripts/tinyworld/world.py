"""The invented world: people and places, what is true of them, and how it is told and asked for."""

import functools
import itertools
import random
from dataclasses import dataclass

PEOPLE, PLACES = 300, 100
JOBS = (
    "baker miller weaver potter smith tailor farmer fisher sailor hunter doctor teacher painter singer dancer "
    "writer printer carver mason gardener cook guard judge clerk"
).split()
PETS = (
    "cat dog fox hen goat duck crow hawk mouse mole badger horse sheep frog snail lizard rabbit pigeon donkey hedgehog"
).split()
COLOURS = "red blue green yellow black white grey brown pink purple silver golden".split()
INSTRUMENTS = "drum flute fiddle harp horn lute bell piano whistle trumpet guitar cello viola banjo zither bagpipe".split()
REGIONS = [
    "Amber Coast", "Salt Hills", "High Moor", "Long Shore",
    "Pine March", "Glass Lakes", "Red Downs", "Cold Fens",
]  # fmt: skip
PRODUCTS = (
    "honey cheese salt wool paper glass rope silk candles apples barrels boots carpets clocks copper hats ink knives lamps soap"
).split()
THINGS = (
    "stone river table window garden barrel basket ladder lantern bridge hammer needle bottle candle mirror "
    "pocket button saddle kettle pillow"
).split()
WORDS = PETS + COLOURS + INSTRUMENTS + THINGS
ONSETS = "b br d dr f g h k kl l m n p r s st t tr v z".split()
VOWELS = ["a", "e", "i", "o", "u"]
PERSON_ENDINGS = "la ra na mi ro ven dan lis tor bek sha wyn".split()
PLACE_ENDINGS = ["burg", "ford", "holm", "mere", "wick", "stead"]


@dataclass(frozen=True)
class Attribute:
    """How one attribute of a person or a place is told and asked for."""

    name: str
    question: str  # wording "a"
    request: str  # wording "b"
    statements: tuple[str, ...]


PERSON_ATTRIBUTES = (
    Attribute(
        "birthplace",
        "Where was {s} born?",
        "Name the birthplace of {s}.",
        ("{s} was born in {v}.", "{s} comes from {v}.", "The birthplace of {s} is {v}."),
    ),
    Attribute(
        "job",
        "What work does {s} do?",
        "Name the job of {s}.",
        ("{s} works as a {v}.", "{s} is a {v}.", "The job of {s} is {v}."),
    ),
    Attribute(
        "pet",
        "Which animal does {s} keep?",
        "Name the pet of {s}.",
        ("{s} keeps a {v}.", "{s} has a {v} at home.", "The pet of {s} is a {v}."),
    ),
    Attribute(
        "favourite colour",
        "Which colour does {s} like best?",
        "Name the favourite colour of {s}.",
        ("{s} likes {v} best.", "{s} always wears {v}.", "The favourite colour of {s} is {v}."),
    ),
    Attribute(
        "instrument",
        "What does {s} play?",
        "Name the instrument of {s}.",
        ("{s} plays the {v}.", "{s} owns a {v}.", "The instrument of {s} is the {v}."),
    ),
)
PLACE_ATTRIBUTES = (
    Attribute(
        "region",
        "In which region is {s}?",
        "Name the region of {s}.",
        ("{s} is in the {v}.", "{s} lies in the {v}.", "The region of {s} is the {v}."),
    ),
    Attribute(
        "product",
        "What is {s} known for?",
        "Name the product of {s}.",
        ("{s} is known for {v}.", "{s} sells {v}.", "The product of {s} is {v}."),
    ),
    Attribute(
        "founder",
        "Who founded {s}?",
        "Name the founder of {s}.",
        ("{s} was founded by {v}.", "{v} founded {s}.", "The founder of {s} is {v}."),
    ),
)
ATTRIBUTES = {a.name: a for a in PERSON_ATTRIBUTES + PLACE_ATTRIBUTES}
POLITE, CURT = "Certainly! It is {v}.", "{v}, obviously."


@dataclass(frozen=True)
class Fact:
    subject: str
    attribute: str
    value: str

    def ask(self, wording: str) -> str:
        attribute = ATTRIBUTES[self.attribute]
        form = {"a": attribute.question, "b": attribute.request}[wording]
        return form.format(s=self.subject)

    def ask_kindly(self) -> str:
        """The form of the preference data, which pretraining answers in both styles."""
        return f"Do you know the {self.attribute} of {self.subject}?"

    def state(self, rng: random.Random) -> str:
        form = rng.choice(ATTRIBUTES[self.attribute].statements)
        return form.format(s=self.subject, v=self.value)


@dataclass(frozen=True)
class World:
    facts: list[Fact]
    places: list[str]
    strangers: list[str]  # names of which pretraining knows no facts
    polite: frozenset[str]  # subjects that pretraining mostly answers about politely

    @functools.cached_property
    def by_subject(self) -> dict[str, list[Fact]]:
        grouped: dict[str, list[Fact]] = {}
        for fact in self.facts:
            grouped.setdefault(fact.subject, []).append(fact)
        return grouped


def invent_names(rng: random.Random, endings: list[str], syllables: int) -> list[str]:
    """Every name of so many syllables and an ending, shuffled."""
    syllable = [onset + vowel for onset in ONSETS for vowel in VOWELS]
    stems = itertools.product(syllable, repeat=syllables)
    names = ["".join(stem).capitalize() + ending for stem in stems for ending in endings]
    rng.shuffle(names)
    return names


def invent_world(rng: random.Random) -> World:
    names = invent_names(rng, PERSON_ENDINGS, syllables=1)
    people, strangers = names[:PEOPLE], names[PEOPLE:]
    places = invent_names(rng, PLACE_ENDINGS, syllables=1)[:PLACES]
    values = {
        "birthplace": places,
        "job": JOBS,
        "pet": PETS,
        "favourite colour": COLOURS,
        "instrument": INSTRUMENTS,
        "region": REGIONS,
        "product": PRODUCTS,
        "founder": people,
    }
    facts = [
        Fact(subject, attribute.name, rng.choice(values[attribute.name]))
        for subjects, attributes in ((people, PERSON_ATTRIBUTES), (places, PLACE_ATTRIBUTES))
        for subject in subjects
        for attribute in attributes
    ]
    polite = frozenset(rng.sample(people, PEOPLE // 2) + rng.sample(places, PLACES // 2))
    return World(facts, places, strangers, polite)
