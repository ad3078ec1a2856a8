"""Build tinyworld, the small language model and data behind `hft`'s quick start.

The script invents a world of people and places, writes a corpus about it, trains
a byte-pair tokenizer and a Llama of about 1.1 million parameters on that corpus, checks
that the model recalls the world without looking anything up, and writes:

    model/          the model and its tokenizer, as a Hugging Face folder
    facts.jsonl     questions about the world, each fact in two wordings
    skill/          a new skill to teach: turning a sentence into a record
    preferences/    pairs of answers, polite (chosen) against curt (rejected)
    sequence/       five plain-text tasks to learn one after another
    text.jsonl      unseen paragraphs about the world
    build.json      seed, versions, sizes and the measured recall

Run it from the repository root (about ten minutes on two cores):

    python scripts/build_tinyworld.py

The same seed on the same kind of machine gives the same data files, byte for byte. The
script exits with an error if the saved model recalls less than 95 % of the facts.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "hftcli" / "tinyworld"
MIN_RECALL = 0.95

PEOPLE, PLACES = 300, 100
QUESTIONS_PER_WORDING = 800
SKILL_ROWS = {"train": 1600, "test": 200}
PREFERENCE_ROWS = {"train": 600, "test": 150}
TASK_ROWS = {"train": 600, "eval": 50, "test": 120}
TEXT_ROWS = 200

VOCABULARY = 704
CONTEXT = 256
SEQUENCE_TOKENS, BATCH, STEPS, WARMUP = 128, 32, 1600, 100
LEARNING_RATE = 3e-3

BOS, END, PAD, UNKNOWN = "<|bos|>", "<|end|>", "<|pad|>", "<|unknown|>"
SPECIAL_TOKENS = [PAD, BOS, END, UNKNOWN, "<|system|>", "<|user|>", "<|assistant|>"]

# A turn is its role's token, the content and <|end|>, with nothing in between, so a
# conversation's tokens are always a prefix of the same conversation continued.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% elif message['role'] in ('system', 'user') %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

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


# --- the world ---------------------------------------------------------------------------


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


# --- the corpus --------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """A plain text (no prompt) or one exchange of a chat."""

    text: str
    prompt: str | None = None
    system: str | None = None

    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + chat_messages(self.prompt, self.text)


def chat_messages(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def tell_subject(facts: list[Fact], rng: random.Random) -> str:
    """A paragraph that states all facts of one subject in any order."""
    return " ".join(fact.state(rng) for fact in rng.sample(facts, len(facts)))


def answer_kindly(fact: Fact, world: World, rng: random.Random) -> Document:
    """Both styles occur about every subject, one four times as often as the other.

    Half of the subjects lean each way, so the base model prefers neither style on average.
    """
    polite = (fact.subject in world.polite) == (rng.random() < 0.8)
    return Document((POLITE if polite else CURT).format(v=fact.value), fact.ask_kindly())


def practise_copying(world: World, rng: random.Random) -> Document:
    """Exercises that need the prompt rather than the world: the grounds for new skills."""
    words = rng.sample(WORDS, rng.randint(2, 5))
    name = rng.choice(world.strangers)
    exercise = rng.randrange(5)
    if exercise == 0:
        return Document(" ".join(words), "Repeat the words: " + " ".join(words))
    if exercise == 1:
        return Document(words[-1], "Name the last word: " + " ".join(words))
    if exercise == 2:
        return Document(f"Hello, {name}!", f"Say hello to {name}.")
    place = rng.choice(world.places)
    sentence = f"{name} saw a {words[0]} and a {words[1]} in {place}."
    if exercise == 3:
        return Document(sentence, f"Repeat the sentence: {sentence}")
    question, answer = rng.choice(
        (
            ("Who was it?", name),
            ("Where was it?", place),
            ("What was seen first?", words[0]),
            ("What was seen last?", words[1]),
        )
    )
    return Document(answer, f"{sentence} {question}")


def write_epoch(world: World, rng: random.Random, held_out: frozenset[str]) -> list[Document]:
    """One pass over the world: both questions of each fact, a paragraph a subject, and more."""
    documents = [
        Document(fact.value, fact.ask(wording), "Be brief." if rng.random() < 0.03 else None)
        for fact in world.facts
        for wording in "ab"
    ]
    paragraphs = (tell_subject(facts, rng) for facts in world.by_subject.values())
    documents += [Document(text) for text in paragraphs if text not in held_out]
    kindly = rng.sample(world.facts, len(world.facts) // 4)
    documents += [answer_kindly(fact, world, rng) for fact in kindly]
    documents += [practise_copying(world, rng) for _ in range(len(world.facts) // 2)]
    rng.shuffle(documents)
    return documents


# --- the tokenizer -----------------------------------------------------------------------


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over printable ASCII: the world needs no other character."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    printable = "".join(map(chr, range(32, 127))) + "\n"
    alphabet = [pair[0] for pair in map(encode_byte_level, printable)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    texts = [part for d in documents for part in (d.prompt, d.text) if part]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        extra_special_tokens=SPECIAL_TOKENS[4:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode_byte_level(character: str) -> str:
    """The stand-in that byte-level BPE uses for a character, a space's being `Ġ`."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(character)[0][0]


class Encoder:
    """Turns documents into token ids, remembering the ones that come in every epoch."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.encode_chat = functools.lru_cache(maxsize=20_000)(self._encode_chat)

    def _encode_chat(self, document: Document) -> list[int]:
        text = self.tokenizer.apply_chat_template(document.messages(), tokenize=False)
        return self.tokenizer.encode(text)

    def encode(self, document: Document) -> list[int]:
        if document.prompt is None:
            return self.tokenizer.encode(document.text + END)
        return self.encode_chat(document)


# --- pretraining -------------------------------------------------------------------------


def pack_sequences(world: World, encoder: Encoder, rng: random.Random, held_out: frozenset[str]) -> Iterator[list[int]]:
    """Endless sequences of whole documents, cut to length.

    Each begins with the start of a document, as every prompt will later.
    """
    sequence: list[int] = []
    while True:
        for document in write_epoch(world, rng, held_out):
            sequence += encoder.encode(document)
            if len(sequence) >= SEQUENCE_TOKENS:
                yield sequence[:SEQUENCE_TOKENS]
                sequence = []


def create_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=224,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        initializer_range=0.04,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    return model


def schedule_rate(step: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def pretrain(model: LlamaForCausalLM, sequences: Iterator[list[int]]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_rate)
    model.train()
    started = time.monotonic()
    for step in range(1, STEPS + 1):
        ids = torch.tensor(list(itertools.islice(sequences, BATCH)))
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 100 == 0:
            seconds = time.monotonic() - started
            print(f"step {step}/{STEPS}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)


# --- measuring ---------------------------------------------------------------------------


@torch.no_grad()
def measure_recall(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict]) -> float:
    """The share of rows that greedy decoding answers exactly, end of turn included.

    Greedy decoding gives the answer exactly when each of its tokens is the likeliest one
    after those before it, so one pass over the answered question tells.
    """
    model.eval()
    right = 0
    for start in range(0, len(rows), 100):
        batch = rows[start : start + 100]
        prompts, wholes = [], []
        for row in batch:
            answered = [*row["prompt"], {"role": "assistant", "content": row["answer"]}]
            prompts.append(encode_messages(tokenizer, row["prompt"], True))
            wholes.append(encode_messages(tokenizer, answered, False))
        longest = max(map(len, wholes))
        ids = torch.tensor([w + [tokenizer.pad_token_id] * (longest - len(w)) for w in wholes])
        predicted = model(input_ids=ids).logits.argmax(-1).tolist()
        for prompt, whole, guess in zip(prompts, wholes, predicted, strict=True):
            right += guess[len(prompt) - 1 : len(whole) - 1] == whole[len(prompt) :]
    return right / len(rows)


def encode_messages(tokenizer: PreTrainedTokenizerFast, messages: list[dict], prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return tokenizer.encode(text)


# --- the data sets -----------------------------------------------------------------------


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


# --- writing -----------------------------------------------------------------------------


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


def save_model(output: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model", save_jinja_files=False)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the model and data of the quick start.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of everything (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="for torch (%(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)

    world = invent_world(rng)
    held_out = hold_out_text(world, rng)
    sample = rng.sample(world.facts, QUESTIONS_PER_WORDING)
    tokenizer = train_tokenizer(write_epoch(world, rng, frozenset(held_out)))
    model = create_model(tokenizer)
    pretrain(model, pack_sequences(world, Encoder(tokenizer), rng, frozenset(held_out)))

    questions = list_questions(sample)
    write_data(arguments.output, world, questions, held_out, arguments.seed)
    save_model(arguments.output, model, tokenizer)

    # What ships is what is measured: the saved model, over every fact of the world.
    model = AutoModelForCausalLM.from_pretrained(arguments.output / "model")
    tokenizer = AutoTokenizer.from_pretrained(arguments.output / "model")
    everything = list_questions(world.facts)
    recall = {
        wording: round(measure_recall(model, tokenizer, [q for q in everything if q["wording"] == wording]), 4)
        for wording in "ab"
    }
    report = {
        "seed": arguments.seed,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "parameters": model.num_parameters(),
        "pretraining_steps": STEPS,
        "facts": len(world.facts),
        "recall": recall,
    }
    write_json(arguments.output / "build.json", report)
    print(json.dumps(report, indent=1))
    if min(recall.values()) < MIN_RECALL:
        sys.exit(f"recall {recall} is below {MIN_RECALL}: the model is not fit to ship")


if __name__ == "__main__":
    main()
