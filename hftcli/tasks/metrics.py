r"""How good one answer is, in [0, 1]: as the benchmark counts, and leniently.

Exact match counts a right answer in a new format as wrong: in the tables of TRACE's paper FOMC falls to 0 right after
ScienceQA, whose answers go on with "\nBecause". The lenient score beside each strict one tells such a drift of format from
forgetting; it is never below the strict one.

`rouge_l` and `sari` give the numbers of `rouge` 1.0.1 and of Hugging Face's `sari`, whose packages fall over on what models
write or are no longer to be had; `edit_similarity` is rapidfuzz's. Where a benchmark counts in points, these are points / 100.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean

from rapidfuzz.distance import Indel

from hftcli.tasks.examples import Example
from hftcli.tasks.official import follow_loosely, follow_strictly, match_gsm8k, match_last_number, run_tests

Score = Callable[[str, Example], float]


@dataclass(frozen=True)
class Metric:
    """Both scores of a prediction, the text without its end token, against an example; in [0, 1].

    Attributes:
        least: what the strict score gives to the right answer itself, at least.
    """

    strict: Score
    lenient: Score
    least: float = 1.0


# Whole answers


def exact_match(prediction: str, example: Example) -> float:
    """1 where the prediction is the answer to the letter, blanks and case included."""
    return float(prediction == example.answer)


def first_character(prediction: str, example: Example) -> float:
    """1 where the prediction begins with the answer's first character, or is as empty as the answer."""
    return float(prediction[:1] == example.answer[:1])


def normalized_match(prediction: str, example: Example) -> float:
    """Exact match but for case, ASCII punctuation and blanks, as Super-NaturalInstructions and O-LoRA count."""
    return float(_normalize(prediction) == _normalize(example.answer))


def _normalize(text: str) -> str:
    """Small letters without punctuation, or what there is where it is nothing else."""
    small = text.lower()
    return " ".join(small.translate(_WITHOUT_PUNCTUATION).split()) or small.strip()


_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def match_answers(prediction: str, example: Example) -> float:
    """1 where the prediction is one of the right answers but for case, ASCII punctuation, blanks and articles.

    It may go on after a full stop or comma outside a number, so that "Washington, D.C. is" and "3.14" count. Otherwise that is
    lm-evaluation-harness's exact match of NQ-open (and of TriviaQA, which keeps the articles), which cuts at the first of them.
    """
    answers = _list_answers(example)
    return float(any(_normalize_answer(part) in answers for part in _list_beginnings(prediction)))


def contain_answers(prediction: str, example: Example) -> float:
    """1 where one of the right answers stands before the first full stop or comma, in whole words; or as `match_answers`."""
    written = f" {_normalize_answer(_list_beginnings(prediction)[0])} "
    return float(any(answer != "" and f" {answer} " in written for answer in _list_answers(example)))


def _list_beginnings(text: str) -> list[str]:
    """A text up to each full stop or comma outside a number, and to its end."""
    return [*(text[: stop.start()] for stop in re.finditer(r"(?<!\d)[.,]|[.,](?!\d)", text)), text]


def _list_answers(example: Example) -> list[str]:
    return [_normalize_answer(option) for option in example.options or (example.answer,)]


def _normalize_answer(text: str) -> str:
    """Without its articles, unless it is nothing else."""
    normalized = _normalize(text)
    return " ".join(word for word in normalized.split() if word not in ("a", "an", "the")) or normalized


# Free text


def rouge_l(prediction: str, example: Example) -> float:
    """F1 of the longest common subsequences, as `rouge` 1.0.1 has it at summary level.

    Where a side has no sentence it is 1 for the same text and 0 for another. Sentences end at each full stop, words at blanks.
    Both lengths count different words, and so does the union of the common subsequences. TRACE passes the prediction as the
    reference, which decides between subsequences of one length.
    """
    reference, hypothesis = _split_sentences(prediction), _split_sentences(example.answer)
    if not reference or not hypothesis:
        return float(prediction == example.answer)
    if prediction == example.answer:  # every word is common: nothing is to be looked for
        return 2 / (2 + 1e-8)
    common = {word for one in reference for other in hypothesis for word in _find_common(one, other)}
    recall = len(common) / len({word for sentence in reference for word in sentence})
    precision = len(common) / len({word for sentence in hypothesis for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _split_sentences(text: str) -> list[list[str]]:
    # A sentence of blanks is one empty word, as it is to the package.
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _find_common(one: list[str], other: list[str]) -> list[str]:
    """A longest common subsequence, backwards; of several, the one that the package finds."""
    words = set(other)
    table = [[0] * (len(other) + 1)]
    for word in one:
        above = row = table[-1]
        if word in words:
            row = [left := 0]
            for candidate, diagonal, up in zip(other, above, above[1:], strict=False):
                left = diagonal + 1 if word == candidate else max(up, left)
                row.append(left)
        table.append(row)
    found: list[str] = []
    height, column = len(one), len(other)
    while height and column:
        if one[height - 1] == other[column - 1]:
            found.append(one[height - 1])
            height, column = height - 1, column - 1
        elif table[height - 1][column] > table[height][column - 1]:
            height -= 1
        else:
            column -= 1
    return found


def edit_similarity(prediction: str, example: Example) -> float:
    """1 - insertions and deletions / both lengths, after the literals are restored; in whole hundredths, as `fuzz.ratio` is.

    That is `fuzz.ratio` of rapidfuzz and of fuzzywuzzy with python-Levenshtein; fuzzywuzzy alone falls back to difflib's
    ratio, which is another number. 1 where both sides are empty, 0 where one is.
    """
    restored, answer = restore_literals(prediction), restore_literals(example.answer)
    return (
        round(100 * Indel.normalized_similarity(restored, answer)) / 100 if restored and answer else float(restored == answer)
    )


def restore_literals(code: str) -> str:
    """Put CodeXGLUE's placeholders back: `<NUM_LIT>` is 0, other literals without a value are empty, `<STR_LIT:x>` is x."""
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return re.sub(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", r"\1", code, flags=re.DOTALL)


def sari(prediction: str, example: Example) -> float:
    """How well a simplification adds, keeps and deletes n-grams of n = 1 to 4 (Xu et al. 2016, in tensor2tensor's variant).

    The mean of the F1 of what is kept and of what is added and of the precision of what is deleted, with 0/0 = 1. The text to
    simplify is the whole prompt with its instruction, as TRACE scores it.
    """
    texts = (example.rules.get("source", example.prompt), prediction, example.answer)
    source, written, wanted = (tokenize_13a(text.lower()).split(" ") for text in texts)
    return fmean(
        fmean(scores) for scores in zip(*(_score_operations(source, written, wanted, n) for n in range(1, 5)), strict=True)
    )


def _score_operations(source: list[str], written: list[str], wanted: list[str], n: int) -> tuple[float, float, float]:
    """Keep, delete and add, of n-grams."""
    before, after, right = (
        Counter(zip(*(words[start:] for start in range(n)), strict=False)) for words in (source, written, wanted)
    )
    kept, should_keep = before & after, before & right
    kept_well = kept & right
    keep_precision = _divide(sum(count / kept[gram] for gram, count in kept_well.items()), len(kept))
    keep_recall = _divide(kept_well.total(), should_keep.total())
    deleted = before - after
    deleted_well = deleted - right
    delete_precision = _divide(sum(count / deleted[gram] for gram, count in deleted_well.items()), len(deleted))
    added, should_add = after.keys() - before.keys(), right.keys() - before.keys()
    num_added_well = len(added & right.keys())
    add = _mean_harmonically(_divide(num_added_well, len(added)), _divide(num_added_well, len(should_add)))
    return _mean_harmonically(keep_precision, keep_recall), delete_precision, add


def _divide(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _mean_harmonically(one: float, other: float) -> float:
    return 2 * one * other / (one + other) if one or other else 0.0


def tokenize_13a(text: str) -> str:
    """mteval-v13a's tokens with one blank between them, as sacrebleu makes them."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES.items():
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, replacement in _SPLITS_13A:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}  # in this order: `&amp;lt;` is `<`
_SPLITS_13A = [
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),  # ASCII punctuation but for ' , - .
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),  # full stops and commas outside numbers
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
]

# Lenient


def match_letter(prediction: str, example: Example) -> float:
    r"""1 where the letter that stands alone at the start is the answer's, in either case: `(b)`, `B. hawkish`, `B\nBecause`."""
    return _match(_find_letter, prediction, example.answer)


def match_number(prediction: str, example: Example) -> float:
    """1 where the first number has the value of the answer's: `12.50 km` for `12.5`. Answers in words are matched by line."""
    return _match(_find_number if _find_number(example.answer) is not None else _find_line, prediction, example.answer)


def match_line(prediction: str, example: Example) -> float:
    """1 where the first line that is not blank is the answer's, but for case, ASCII punctuation and blanks."""
    return _match(_find_line, prediction, example.answer)


def _match(find: Callable[[str], object], prediction: str, answer: str) -> float:
    return float(find(prediction) == find(answer) is not None)


def _find_letter(text: str) -> str | None:
    # Chinese goes on without a blank, so only a Latin letter or digit makes a word of the first one.
    found = re.match(r"[\W_]*([A-Za-z])(?![A-Za-z0-9])", text)
    return found[1].lower() if found else None


def _find_number(text: str) -> float | None:
    found = re.search(r"-?\d+(?:,\d{3})*(?:\.\d+)?", text)
    return float(found[0].replace(",", "")) if found else None


def _find_line(text: str) -> str | None:
    line = next((line for line in text.splitlines() if line.strip()), "")
    return _normalize(line) or None


def _score_cleaned(score: Score, clean: Callable[[str], str]) -> Score:
    return lambda prediction, example: score(clean(prediction), replace(example, answer=clean(example.answer)))


def _clean_prose(text: str) -> str:
    """The first paragraph, in small letters, with no punctuation but full stops."""
    return re.sub(r"[^\w\s.]|_", " ", _take_paragraph(text).lower())


def _take_paragraph(text: str) -> str:
    return re.split(r"\n\s*\n", text.strip(), maxsplit=1)[0]


def _take_code_line(text: str) -> str:
    """The first line, without the blanks around it."""
    return re.split(r"\n|<EOL>", text.strip(), maxsplit=1)[0].strip()


def _make_metric(strict: Score, lenient: Score, least: float = 1.0) -> Metric:
    return Metric(strict, lambda prediction, example: max(strict(prediction, example), lenient(prediction, example)), least)


METRICS: Mapping[str, Metric] = {
    "exact_match": _make_metric(exact_match, match_line),
    "letter": _make_metric(exact_match, match_letter),
    "number": _make_metric(exact_match, match_number),
    "first_character": _make_metric(first_character, match_letter),
    "normalized_match": _make_metric(normalized_match, match_line),
    "closed_book": _make_metric(match_answers, contain_answers),
    "rouge_l": _make_metric(rouge_l, _score_cleaned(rouge_l, _clean_prose), least=1 - 1e-8),
    "edit_similarity": _make_metric(edit_similarity, _score_cleaned(edit_similarity, _take_code_line)),
    "gsm8k": _make_metric(match_gsm8k, match_last_number),
    "code": Metric(run_tests, run_tests),
    "instructions": Metric(follow_strictly, follow_loosely),
    # An n-gram that the text has more often than the answer counts as deleted and, in part, as deleted wrongly.
    "sari": _make_metric(sari, _score_cleaned(sari, _take_paragraph), least=0.95),
}
RULED = ("code", "instructions")  # those that know a right answer by an example's rules
