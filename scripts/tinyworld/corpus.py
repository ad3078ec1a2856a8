"""What the model reads while it is pretrained: paragraphs about the world, questions, and exercises."""

import random
from dataclasses import dataclass

from tinyworld.world import CURT, POLITE, WORDS, Fact, World


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
