r"""Four benchmarks in the form in which their authors publish them, asked as the field asks them and scored by their own rules.

    {"question": "Ann has 3 ...", "answer": "She has ... <<3+4=7>>7\n#### 7"}                                       GSM8K
    {"subject": "abstract_algebra", "question": "...", "choices": ["0", "1", "2", "3"], "answer": 1}                MMLU
    {"prompt": "def add(a, b): ...", "entry_point": "add", "canonical_solution": "...", "test": "def check..."}    HumanEval
    {"key": 1, "prompt": "...", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}                    IFEval

Prompts, limits and what counts are those of lm-evaluation-harness's gsm8k, mmlu, humaneval and ifeval. IFEval's rules are its
own, from the extra `eval`.
"""

import random
import re
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from functools import cache
from types import ModuleType
from typing import Any

from hftcli.errors import DataError, InputError
from hftcli.tasks.examples import Example
from hftcli.tasks.programs import run_program

LETTERS = "ABCDEFGHIJ"
SUBJECTS = """
abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory professional_accounting
professional_law professional_medicine professional_psychology public_relations security_studies sociology
us_foreign_policy virology world_religions
""".split()
PROBE = "Here is one sentence. And here is another one."
GSM8K_STOPS = r"Question:|</s>|<\|im_end\|>"
HUMANEVAL_STOPS = r"\n(?:class|def|#|if|print)"


def convert_gsm8k(row: dict[str, Any], place: str) -> Example:
    """A word problem, whose answer shows the way and ends in `#### 7`."""
    question, answer = _read(row, "question", place), _read(row, "answer", place)
    if not re.search(r"#### -?[0-9.,]+\s*\Z", answer):
        raise DataError(f"{place}: 'answer': expected a text that ends in #### and a number, got {answer[-40:]!r}")
    return Example(f"Question: {question}\nAnswer:", f" {answer}")


def convert_mmlu(row: dict[str, Any], place: str) -> Example:
    """A question on a subject, of whose choices the letter is the answer."""
    subject, question = _read(row, "subject", place), _read(row, "question", place)
    choices, index = row.get("choices"), row.get("answer")
    if (
        not isinstance(choices, list)
        or not 2 <= len(choices) <= len(LETTERS)
        or type(index) is not int
        or not 0 <= index < len(choices)
    ):
        raise DataError(
            f'{place}: expected {{"subject": "...", "question": "...", "choices": 2 to {len(LETTERS)} texts, "answer": index}}'
        )
    letters = LETTERS[: len(choices)]
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, choices, strict=True))
    intro = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    options = tuple(f" {letter}" for letter in letters)
    prompt = f"{intro}{question.strip()}\n{listed}Answer:"
    return Example(prompt, options[index], options=options, intro=intro, subject=subject)


def convert_humaneval(row: dict[str, Any], place: str) -> Example:
    """A function to complete, with the tests that it must pass."""
    prompt, solution, test, name = (
        _read(row, key, place) for key in ("prompt", "canonical_solution", "test", "entry_point")
    )  # fmt: skip
    return Example(prompt, solution, rules={"test": test, "entry_point": name})


def convert_ifeval(row: dict[str, Any], place: str) -> Example:
    """A request with rules that can be checked."""
    prompt, names, values = _read(row, "prompt", place), row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(names, list) or not isinstance(values, list) or not names or len(names) != len(values):
        raise DataError(f"{place}: expected as many 'kwargs' as 'instruction_id_list' has names, and at least one")
    given = [{key: value for key, value in (one or {}).items() if value is not None} for one in values]
    return Example(prompt, "", rules={"key": row.get("key"), "instruction_id_list": names, "kwargs": given})


def _read(row: dict[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: '{key}': expected a text, got {value!r:.60}")
    return value


def is_subject(value: object) -> bool:
    """Whether it is one of MMLU's subjects, by which its rows are told from other multiple choice."""
    return value in SUBJECTS


def is_text(value: object) -> bool:
    """Whether an answer is a text, as GSM8K's, and no place of a choice."""
    return isinstance(value, str)


def match_gsm8k(prediction: str, example: Example) -> float:
    """1 where the first number after `####` is the answer's."""
    return _compare_numbers(re.findall(r"#### (-?[0-9.,]+)", _cut(prediction, GSM8K_STOPS))[:1], example)


def match_last_number(prediction: str, example: Example) -> float:
    """1 where the last number is the answer's."""
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", _cut(prediction, GSM8K_STOPS))
    return _compare_numbers([first or second for first, second in found[-1:]], example)


def _compare_numbers(found: Iterable[str], example: Example) -> float:
    return float(any(_clean_number(number) == _clean_number(example.answer) for number in found))


def _clean_number(text: str) -> str:
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.strip().lower()


def run_tests(prediction: str, example: Example) -> float:
    """1 where the completed function passes its tests."""
    prompt = str(example.rules.get("source", example.prompt))
    body = _cut(prediction, HUMANEVAL_STOPS)
    return float(run_program(f"{prompt}{body}\n{example.rules['test']}\ncheck({example.rules['entry_point']})\n"))


def _cut(text: str, stops: str) -> str:
    return re.split(stops, text, maxsplit=1)[0]


def follow_strictly(prediction: str, example: Example) -> float:
    """1 where all rules are kept."""
    return float(all(_check(example, prediction, "strict")))


def follow_loosely(prediction: str, example: Example) -> float:
    """1 where all rules are kept, be it without the first or the last line, or without asterisks."""
    return float(all(_check(example, prediction, "loose")))


def _check(example: Example, prediction: str, kind: str) -> list[bool]:
    rules, asked = _load_rules(), {key: example.rules[key] for key in ("key", "instruction_id_list", "kwargs")}
    prompt = str(example.rules.get("source", example.prompt))
    row = rules.InputExample(prompt=prompt, **asked)
    check = rules.test_instruction_following_strict if kind == "strict" else rules.test_instruction_following_loose
    state = random.getstate()
    random.seed(0)  # a rule about a letter that is none draws one
    try:
        followed: list[bool] = check(row, prediction).follow_instruction_list
    finally:
        random.setstate(state)
    return followed


@cache
def _load_rules() -> ModuleType:
    try:
        with redirect_stdout(sys.stderr):  # it says what it downloads, also where it could not
            from langdetect import DetectorFactory
            from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        raise InputError(
            f"IFEval's rules are lm-evaluation-harness's, which is not installed with them ({error})",
            "pip install 'hftcli[eval]'",
        ) from None
    DetectorFactory.seed = 0  # its guesses are drawn
    rules: ModuleType = utils
    return rules


def sift_ifeval(examples: tuple[Example, ...]) -> tuple[tuple[Example, ...], dict[str, int]]:
    """The requests whose rules can be checked here, and how many others there are, by what is missing."""
    kept, left_out = [], dict[str, int]()
    missing: dict[str, str] = {}
    for example in examples:
        for name, values in zip(example.rules["instruction_id_list"], example.rules["kwargs"], strict=True):
            if name not in missing:
                missing[name] = _find_missing(name, values, example)
        faults = sorted({missing[name] for name in example.rules["instruction_id_list"]} - {""})
        for fault in faults[:1]:
            left_out[fault] = left_out.get(fault, 0) + 1
        kept += [] if faults else [example]
    if not kept:
        raise DataError("no request of IFEval can be checked here", "; ".join(left_out))
    return tuple(kept), left_out


def _find_missing(name: str, values: dict[str, Any], example: Example) -> str:
    """What a rule needs that is not here; empty where it can be checked."""
    try:
        rules = {"key": 0, "instruction_id_list": [name], "kwargs": [values]}
        _check(Example(example.prompt, "", rules=rules), PROBE, "strict")
    except (LookupError, OSError) as error:
        found = re.search(r"nltk.download\('(\w+)'\)", str(error))
        return f"{name} needs nltk's {found[1]}" if found else f"{name}: {type(error).__name__}"
    return ""
