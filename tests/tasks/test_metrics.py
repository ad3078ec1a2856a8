"""Metrics: numbers worked out by hand, and those of the reference libraries.

`golden_metrics.json` holds what rouge 1.0.1, a transcription of Hugging Face's sari script on sacrebleu 2.6.0's tokens, and
fuzzywuzzy 0.18.0 with python-Levenshtein 0.27.5 say of invented texts and of lines of this package: right answers with words
lost, doubled or moved, other rows' answers, and what the embedded model wrote. Where rouge and sacrebleu are installed, they
are asked again, and about real rows.
"""

import json
import random
from pathlib import Path

import pytest
from rapidfuzz import fuzz

from hftcli.tasks import load_task
from hftcli.tasks.examples import Example
from hftcli.tasks.metrics import METRICS, restore_literals, tokenize_13a

GOLDEN = json.loads((Path(__file__).parent / "golden_metrics.json").read_text(encoding="utf-8"))


def score(metric: str, prediction: str, answer: str, prompt: str = "") -> tuple[float, float]:
    """Strict and lenient."""
    example = Example(prompt, answer)
    return METRICS[metric].strict(prediction, example), METRICS[metric].lenient(prediction, example)


@pytest.mark.parametrize(
    ("metric", "prediction", "answer", "strict", "lenient"),
    [
        ("exact_match", " fox", " fox", 1, 1),
        ("exact_match", "fox.\nAnswer: hen", " fox", 0, 1),
        ("exact_match", "foxes", " fox", 0, 0),
        ("exact_match", "", "", 1, 1),
        ("exact_match", "", "fox", 0, 0),
        ("letter", "A", "A", 1, 1),
        ("letter", "A\nBecause it is so.", "A", 0, 1),
        ("letter", " (b) hawkish", "B", 0, 1),
        ("letter", "Because", "B", 0, 0),
        ("letter", "A支持", "A", 0, 1),
        ("letter", "", "A", 0, 0),
        ("number", "12.5", "12.5", 1, 1),
        ("number", " 12.50 km", "12.5", 0, 1),
        ("number", "It is 1,250.", "1250", 0, 1),
        ("number", "125", "12.5", 0, 0),
        ("number", "wednesday\n", "Wednesday", 0, 1),
        ("number", "3 days", "Wednesday", 0, 0),
        ("first_character", "B\nMetals conduct.", "B\nIt is a metal.", 1, 1),
        ("first_character", " b", "B\nIt is a metal.", 0, 1),
        ("first_character", "", "B\nIt is a metal.", 0, 0),
        ("normalized_match", "science or technology.", "Science or Technology", 1, 1),
        ("normalized_match", "World\nOption: Sports", "World", 0, 1),
        ("normalized_match", "", "...", 0, 0),
    ],
)
def test_whole_answers(metric, prediction, answer, strict, lenient):
    assert score(metric, prediction, answer) == (strict, lenient)


def test_rouge_counts_different_words_of_the_union():
    # The subsequences of the two sentences with the answer are "the cat" and "the mat": 3 different words. The prediction has
    # 5 of them, the answer 4.
    strict, _ = score("rouge_l", "the cat sleeps. the big mat", "the cat the mat here")
    assert strict == pytest.approx(2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4), abs=1e-7)


@pytest.mark.parametrize(("prediction", "answer"), [("", "a b"), (".", "a b"), ("...", "a b"), ("a b", "."), ("x y", "a b")])
def test_rouge_of_texts_without_a_common_word_is_zero(prediction, answer):
    assert score("rouge_l", prediction, answer) == (0, 0)


def test_rouge_takes_texts_of_any_length():
    words = " ".join(map(str, range(1200)))
    assert score("rouge_l", words + " end", words)[0] == pytest.approx(2 * 1200 / 2401, abs=1e-6)


def test_rouge_is_lenient_about_capitals_and_commas():
    strict, lenient = score("rouge_l", "The council agreed, and left.\n\nSummary: the", "the council agreed and left")
    # "council and left" and "the" of 7 different words and 5.
    assert strict == pytest.approx(2 * 4 / (7 + 5), abs=1e-7)
    assert lenient == pytest.approx(1, abs=1e-7)


def test_literals_are_restored_before_edits_are_counted():
    assert restore_literals("f ( <NUM_LIT> , <STR_LIT> , <NUM_LIT:42> , '<STR_LIT:a\nb>' )") == "f ( 0 ,  , 42 , 'a\nb' )"
    # "x = 12" against "x = 1": one deletion of 11 characters in all.
    assert score("edit_similarity", "x = <NUM_LIT:12>", "x = <NUM_LIT:1>")[0] == round(100 * 10 / 11) / 100
    assert score("edit_similarity", "<STR_LIT>", "x = 1") == (0, 0)


def test_code_is_scored_leniently_by_its_first_line():
    strict, lenient = score("edit_similarity", "return x <EOL> return y <EOL>", "return x")
    assert strict < 0.6
    assert lenient == 1


def test_sari_of_a_copy_by_hand():
    # The source "a b c" is copied where "a b" is wanted. n = 1: keep 2/3 and 2/2, so F1 4/5; n = 2: 1/2 and 1/1, so 2/3; n = 3:
    # nothing of the kept is wanted and nothing was to be kept, so 0 and 1: F1 0; n = 4: 1. Nothing is deleted or added: 1.
    keep = (4 / 5 + 2 / 3 + 0 + 1) / 4
    assert score("sari", "a b c", "a b", "a b c")[0] == pytest.approx((keep + 1 + 1) / 3)


def test_sari_of_the_answer_itself_is_one():
    assert score("sari", "Ein kurzer Satz.", "Ein kurzer Satz.", "Dies ist ein sehr langer Satz.")[0] == pytest.approx(1)


@pytest.mark.parametrize("metric", GOLDEN)
def test_golden_values(metric):
    rows = GOLDEN[metric]
    assert len(rows) >= 100
    assert len({round(row["score"], 3) for row in rows}) > 30
    for row in rows:
        strict, lenient = score(metric, row["prediction"], row["answer"], row.get("prompt", ""))
        assert strict == pytest.approx(row["score"], abs=1e-12), row
        assert strict <= lenient <= 1


# Against the libraries themselves


def draw_predictions(task: str, root: Path) -> list[tuple[str, Example]]:
    """What a model might say to 100 real questions: the answer, the answer cut and disturbed, and another row's."""
    examples = load_task(task, str(root)).examples[:100]
    rng = random.Random(0)
    pairs = []
    for index, example in enumerate(examples):
        disturbed = [word for word in example.answer.split(" ") if rng.random() > 0.2]
        middle = len(disturbed) // 2
        disturbed = disturbed[middle:] + disturbed[:middle]
        other = examples[index - 1].answer
        pairs += [(text, example) for text in (example.answer, " ".join(disturbed), other, f"{example.answer} {other}") if text]
    assert len(pairs) >= 300
    return pairs


def test_rouge_equals_its_library(shared):
    rouge = pytest.importorskip("rouge", reason="rouge 1.0.1 is not installed").Rouge(metrics=["rouge-l"])
    pairs = [(row["prediction"], Example("", row["answer"])) for row in GOLDEN["rouge_l"]]
    for prediction, example in pairs + draw_predictions("trace/MeetingBank", shared / "data" / "trace"):
        expected = rouge.get_scores(example.answer, prediction, avg=True)["rouge-l"]["f"]
        assert METRICS["rouge_l"].strict(prediction, example) == pytest.approx(expected, abs=1e-12)


def test_edit_similarity_equals_its_library(shared):
    pairs = [(row["prediction"], Example("", row["answer"])) for row in GOLDEN["edit_similarity"]]
    for prediction, example in pairs + draw_predictions("trace/Py150", shared / "data" / "trace"):
        texts = restore_literals(prediction), restore_literals(example.answer)
        expected = round(fuzz.ratio(*texts)) / 100 if all(texts) else 0
        assert METRICS["edit_similarity"].strict(prediction, example) == expected


def test_tokens_equal_those_of_sacrebleu(shared):
    tokenize = pytest.importorskip("sacrebleu.tokenizers.tokenizer_13a", reason="sacrebleu is not installed").Tokenizer13a()
    texts = [text for row in GOLDEN["sari"] for text in (row["prompt"], row["prediction"], row["answer"])]
    examples = load_task("trace/20Minuten", str(shared / "data" / "trace")).examples
    for text in texts + [text for example in examples for text in (example.prompt, example.answer)]:
        assert tokenize_13a(text) == tokenize(text)


@pytest.mark.parametrize(
    ("prediction", "answer", "strict", "lenient"),
    [
        ("Paris. It is the capital", "Paris", 1, 1),
        ("Washington, D.C. is", "Washington, D.C.", 1, 1),
        ("J. K. Rowling wrote it", "J. K. Rowling", 0, 0),
        ("J. K. Rowling, who wrote it", "J. K. Rowling", 1, 1),
        ("3.14 or so", "3", 0, 0),
        ("3.14", "3.14", 1, 1),
        ("1,000", "1", 0, 0),
        ("London, Paris", "Paris", 0, 0),
        ("It is Paris, London", "Paris", 0, 1),
        ("a", "A", 1, 1),
        ("the an", "A", 0, 0),
        ("?", "?", 1, 1),
        ("", "A", 0, 0),
    ],
)
def test_closed_books_go_on_after_full_stops(prediction, answer, strict, lenient):
    assert score("closed_book", prediction, answer) == (strict, lenient)


def test_empty_sides_are_equal():
    for metric in ("rouge_l", "edit_similarity", "normalized_match", "first_character"):
        assert score(metric, "", "")[0] == 1
    assert score("edit_similarity", "<STR_LIT>", "<STR_LIT>")[0] == 1
    assert score("normalized_match", "-", "-")[0] == 1
    assert score("normalized_match", "", "-")[0] == 0
