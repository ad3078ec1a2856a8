"""A question that does not fit loses of its body, at the place that is asked for, and of nothing else."""

from typing import get_args

import pytest
from data.written_rows import read_trained
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hftcli import PACKAGE
from hftcli.data.tokens import tokenize_examples, tokenize_prompts
from hftcli.tasks.examples import Cut, Example

WORDS = ["fox", "hens", "the ", "Answer", "e", ".", ":", " ", "  ", "\n", "10"]
CUTS = st.sampled_from(get_args(Cut))
ROOMS = st.integers(-2, 30)  # tokens that are left for the body; below 0, the rest does not fit either


def write_texts(words: list[str], most: int, least: int = 0) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(words), min_size=least, max_size=most).map("".join)


def write_questions(words: list[str]) -> st.SearchStrategy[Example]:
    def join(instruction: str, body: str, cue: str, answer: str) -> Example:
        return Example(instruction + body + cue, answer, (len(instruction), len(instruction + body)))

    short = write_texts(words, 4, least=1)
    return st.builds(join, short, write_texts(words, 30, least=8), short, short)


@pytest.fixture(scope="module")
def bytewise() -> PreTrainedTokenizerBase:
    """A token for each byte: a character is up to four."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@pytest.fixture(scope="module")
def embedded() -> PreTrainedTokenizerBase:
    """Words and pieces of words, which a cut may break and join again."""
    return AutoTokenizer.from_pretrained(PACKAGE / "tinyworld" / "model")


def count_rest(example: Example, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of all but the body, with the end."""
    first, last = example.body
    return len(tokenizer(example.prompt[:first] + example.prompt[last:] + example.answer)["input_ids"]) + 1


def find_kept(text: str, example: Example, end: str, cut: Cut, most_left: int = 0) -> str:
    """What is left of the body; what stands around it is whole, and what is gone is one stretch, where the cut says.

    Args:
        most_left: characters that may be left in the stretch, where tokens stand across its ends.
    """
    first, last = example.body
    instruction, body, cue = example.prompt[:first], example.prompt[first:last], example.prompt[last:] + end
    assert text.startswith(instruction)
    assert text.endswith(cue)
    kept = text[len(instruction) : len(text) - len(cue)]
    places = {
        "start": lambda num_left: [0],
        "middle": lambda num_left: range(len(kept) - num_left + 1),
        "end": lambda num_left: [len(kept) - num_left],
    }[cut]
    assert any(
        body.startswith(kept[:place]) and body.endswith(kept[place + num_left :])
        for num_left in range(min(most_left, len(kept)) + 1)
        for place in places(num_left)
    )
    return kept


@given(example=write_questions([*WORDS, "é", "你好", "🙂"]), cut=CUTS, room=ROOMS)
def test_a_question_of_bytes(bytewise: PreTrainedTokenizerBase, example: Example, cut: Cut, room: int):
    max_length = count_rest(example, bytewise) + room
    [(ids, labels)], [length] = tokenize_examples([example], cut, max_length, bytewise)
    kept = find_kept(bytewise.decode(ids), example, example.answer + "<|end|>", cut)
    assert length == len((example.prompt + example.answer).encode()) + 1
    assert read_trained(ids, labels.tolist(), bytewise) == example.answer + "<|end|>"
    assert len(ids) <= max_length or not kept
    if length <= max_length:
        assert len(ids) == length
    elif room >= 0:
        assert len(ids) >= max_length - 6  # the rest of the characters at the two ends of what is gone

    [asked] = tokenize_prompts([example], cut, max_length, bytewise)
    kept = find_kept(bytewise.decode(asked), example, "", cut)
    assert len(asked) <= max_length or not kept


@given(example=write_questions(WORDS), cut=CUTS, room=ROOMS)
def test_a_question_of_words(embedded: PreTrainedTokenizerBase, example: Example, cut: Cut, room: int):
    longest, max_length = max(map(len, embedded.get_vocab())), count_rest(example, embedded) + room
    [(ids, labels)], [length] = tokenize_examples([example], cut, max_length, embedded)
    kept = find_kept(embedded.decode(ids), example, example.answer + embedded.eos_token, cut, longest)
    assert read_trained(ids, labels.tolist(), embedded).endswith(example.answer + embedded.eos_token)
    assert len(ids) <= max_length or not kept
    if length <= max_length:
        assert len(ids) == length

    [asked] = tokenize_prompts([example], cut, max_length, embedded)
    kept = find_kept(embedded.decode(asked), example, "", cut, longest)
    assert len(asked) <= max_length or not kept


@given(examples=st.lists(write_questions(WORDS), min_size=2, max_size=4), cut=CUTS, room=ROOMS)
def test_a_question_is_cut_as_if_it_were_alone(embedded: PreTrainedTokenizerBase, examples: list[Example], cut: Cut, room: int):
    max_length = count_rest(examples[0], embedded) + room
    rows, lengths = tokenize_examples(examples, cut, max_length, embedded)
    for example, (ids, labels), length in zip(examples, rows, lengths, strict=True):
        [(own_ids, own_labels)], [own_length] = tokenize_examples([example], cut, max_length, embedded)
        assert (ids, labels.tolist(), length) == (own_ids, own_labels.tolist(), own_length)
