"""hft's scores beside lm-evaluation-harness's, on real questions; run with lm-eval installed (`pip install -e '.[eval]'`)."""

import json
import os
import random
import re
import time
from pathlib import Path

import pytest
import yaml

from hftcli.measuring.evaluation import Evaluation, Item
from hftcli.runs.files import read_model

NUM_QUESTIONS = int(os.environ.get("HFT_NUM_QUESTIONS", "200"))
NUM_TOKENS = int(os.environ.get("HFT_NUM_TOKENS", "96"))  # of what is generated of GSM8K and IFEval, on both sides

pytestmark = [
    pytest.mark.slow,
    # What the harness and its metrics warn of is theirs.
    pytest.mark.filterwarnings("ignore"),
]

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
# As in the harness's mmlu, but for the description, which it takes out of the prompt.
MMLU = CHOICE | {
    "doc_to_text": "The following are multiple choice questions (with answers) about {{subject|replace('_',' ')}}.\n\n"
    "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
    "doc_to_choice": ["A", "B", "C", "D"],
    "doc_to_target": "answer",
}
# As in the harness's gsm8k.yaml, with no examples.
GSM8K = {
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "num_fewshot": 0,
    "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False, "max_gen_toks": NUM_TOKENS},
    "metric_list": [
        {
            "metric": "exact_match",
            "ignore_case": True,
            "ignore_punctuation": False,
            "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"],
        }
    ],
    "filter_list": [
        {
            "name": name,
            "filter": [{"function": "regex", "group_select": place, "regex_pattern": pattern}, {"function": "take_first"}],
        }
        for name, place, pattern in (
            ("strict-match", 0, "#### (\\-?[0-9\\.\\,]+)"),
            ("flexible-extract", -1, "(-?[$0-9.,]{2,})|(-?[0-9]+)"),
        )
    ],
}
IFEVAL = {
    "output_type": "generate_until",
    "doc_to_text": "prompt",
    "doc_to_target": 0,
    "num_fewshot": 0,
    "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": NUM_TOKENS},
    "metric_list": [{"metric": "bypass"}],
}
# As in the harness's nq_open.yaml, but for the prompt, which is its TriviaQA's.
CLOSED_BOOK = {
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}{{'' if question.endswith('?') else '?'}}\nAnswer:",
    "doc_to_target": "{{answers}}",
    "generation_kwargs": {"until": ["\n", ".", ","], "do_sample": False, "temperature": 0.0, "max_gen_toks": 32},
    "filter_list": [{"name": "remove_whitespace", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    "metric_list": [
        {
            "metric": "exact_match",
            "ignore_case": True,
            "ignore_punctuation": True,
            "regexes_to_ignore": ["\\b(?:The |the |An |A |The |a |an )"],
        }
    ],
}


@pytest.fixture(scope="module")
def real_model(shared: Path) -> Path:
    """A model that knows more than the one in shared, such as SmolLM2, may be given."""
    return Path(os.environ.get("HFT_REAL_MODEL", shared / "models" / "MiniMind2-Small"))


@pytest.fixture(scope="module")
def lm(real_model: Path):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    return huggingface.HFLM(pretrained=str(real_model), dtype="float32", batch_size=16, device="cpu")


def write_task(folder: Path, name: str, rows: Path, config: dict) -> Path:
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(folder / "cache")}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"task": name, "test_split": "test", **source, **config}))
    return path


def ask_hft(hft, model: Path, task: object, output: Path, *options: object) -> tuple[Evaluation, list[Item]]:
    options = options or ("--no-chat",)
    hft("eval", "--model", model, "--tasks", task, "--max-examples", NUM_QUESTIONS, "--output", output, *options)
    lines = output.with_suffix(".items.jsonl").read_text().splitlines()
    return read_model(output, Evaluation), [Item.model_validate_json(line) for line in lines]


def ask_harness(lm, path: Path, chat: bool = False) -> tuple[dict, list[dict]]:
    from lm_eval import simple_evaluate

    results = simple_evaluate(model=lm, tasks=[str(path)], limit=NUM_QUESTIONS, bootstrap_iters=0, apply_chat_template=chat)
    samples = sorted(results["samples"][path.stem], key=lambda sample: sample["doc_id"])
    return results["results"][path.stem], samples


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize(("name", "config"), [("arc_easy_test", CHOICE), ("mmlu_test_40per_subject", MMLU)])
def test_multiple_choice_is_the_harness_s(hft, lm, real_model, shared, tmp_path, name, config, chat):
    rows = shared / "data" / "eval" / f"{name}.jsonl"
    evaluation, items = ask_hft(hft, real_model, rows, tmp_path / "hft.json", "--chat" if chat else "--no-chat")
    start = time.perf_counter()
    results, samples = ask_harness(lm, write_task(tmp_path, "choice", rows, config), chat)
    print(f"{name}: hft {evaluation.seconds[str(rows)]:.1f} s, the harness {time.perf_counter() - start:.1f} s")
    assert len(items) == len(samples) == NUM_QUESTIONS
    gaps = [
        [own - value for own, (value, _) in zip(item.log_likelihoods, sample["filtered_resps"], strict=True)]
        for item, sample in zip(items, samples, strict=True)
    ]
    # Of a chat, the harness reads the line break before the answer as a part of every choice: hft takes it as given.
    worst = max(max(gap) - min(gap) if chat else max(map(abs, gap)) for gap in gaps)
    print(f"{name}: {len(gaps)} questions, largest gap {worst:.1e}")
    assert worst < 1e-3
    assert [item.score for item in items] == [sample["acc"] for sample in samples]
    score = evaluation.tasks[str(rows)]
    assert score.score == pytest.approx(results["acc,none"])
    if not chat:
        assert [item.others["acc_norm"] for item in items] == [sample["acc_norm"] for sample in samples]
        assert score.others["acc_norm"] == pytest.approx(results["acc_norm,none"])


def test_closed_book_is_the_harness_s(hft, lm, real_model, shared, tmp_path):
    from lm_eval.api.instance import Instance

    rows = shared / "data" / "eval" / "nq_open_val.jsonl"
    evaluation, items = ask_hft(hft, real_model, rows, tmp_path / "hft.json")
    start = time.perf_counter()
    _, samples = ask_harness(lm, write_task(tmp_path, "closed_book", rows, CLOSED_BOOK))
    requests = [
        Instance("loglikelihood", sample["doc"], (sample["arguments"][0][0], f" {answer}"), place)
        for sample in samples
        for place, answer in enumerate(sample["doc"]["answers"])
    ]
    values = iter([value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)])
    print(f"hft {evaluation.seconds[str(rows)]:.1f} s, the harness {time.perf_counter() - start:.1f} s")
    assert len(items) == len(samples) == NUM_QUESTIONS
    gaps = [abs(own - next(values)) for item in items for own in item.log_likelihoods]
    assert next(values, None) is None
    print(f"{len(gaps)} log-likelihoods, largest gap {max(gaps):.1e}")
    assert max(gaps) < 1e-3
    # The harness cuts at the first full stop or comma, which stand in some right answers.
    for item, sample in zip(items, samples, strict=True):
        assert re.split("[.,]", item.prediction, maxsplit=1)[0].strip() == sample["filtered_resps"][0]
        if item.score != sample["exact_match"]:
            print(f"{item.prediction!r} of {item.answers}: {item.score}, the harness {sample['exact_match']}")
            stops = re.search("[.,]", item.prediction)
            assert stops is not None
            assert item.score == 1 or item.prediction[: stops.end() + 1][-1:].isdigit()


def test_gsm8k_is_the_harness_s(hft, lm, real_model, shared, tmp_path):
    rows = shared / "data" / "eval" / "gsm8k_test.jsonl"
    _, items = ask_hft(hft, real_model, rows, tmp_path / "hft.json", "--chat", "--max-new-tokens", NUM_TOKENS)
    _, samples = ask_harness(lm, write_task(tmp_path, "gsm8k", rows, GSM8K), chat=True)
    scored = {(sample["doc_id"], sample["filter"]): sample for sample in samples}
    for item in items:
        strict, last = scored[item.index, "strict-match"], scored[item.index, "flexible-extract"]
        assert item.prediction.partition("Question:")[0] == strict["resps"][0][0]
        assert item.score == strict["exact_match"]
        assert item.lenient == max(strict["exact_match"], last["exact_match"])


def test_ifeval_is_the_harness_s(hft, lm, real_model, shared, tmp_path):
    """Of the requests whose rules can be checked here; the harness's own scorer fails at the others."""
    from lm_eval.tasks.ifeval.utils import process_results

    rows = shared / "data" / "eval" / "ifeval.jsonl"
    _, items = ask_hft(hft, real_model, rows, tmp_path / "hft.json", "--chat", "--max-new-tokens", NUM_TOKENS)
    _, samples = ask_harness(lm, write_task(tmp_path, "ifeval", rows, IFEVAL), chat=True)
    said = {sample["doc"]["prompt"]: sample for sample in samples}
    shared_items = [item for item in items if item.question in said]
    assert len(shared_items) > 0.8 * NUM_QUESTIONS
    random.seed(1)  # hft's scores do not hang on it
    for item in shared_items:
        sample = said[item.question]
        doc = {**sample["doc"], "kwargs": [{k: v for k, v in one.items() if v is not None} for one in sample["doc"]["kwargs"]]}
        scored = process_results(doc, [sample["resps"][0][0]])
        assert item.prediction == sample["resps"][0][0]
        letters = [values["letter"] for values in doc["kwargs"] if "letter" in values]
        if all(map(str.isalpha, letters)):  # in place of another sign the harness draws a letter in every scoring
            assert (item.score, item.lenient) == (scored["prompt_level_strict_acc"], scored["prompt_level_loose_acc"])


def test_tasks_of_the_harness(hft, lm, shared, tmp_path):
    """Through `hft eval`, from a local file, the harness says what hft says itself."""
    rows = shared / "data" / "eval" / "arc_easy_test.jsonl"
    path = write_task(tmp_path, "local_arc", rows, CHOICE)
    model = shared / "models" / "stories260K"
    done = hft("eval", "--model", model, "--tasks", f"harness:{path},{rows}", "--max-examples", 12, "--json", "--no-chat")
    foreign, own = json.loads(done.stdout)["tasks"].values()
    assert foreign["num_examples"] == own["num_examples"] == 12
    assert foreign["score"] == own["score"]
    assert foreign["others"] == {"acc": own["score"], "acc_norm": own["others"]["acc_norm"]}
    assert "not a registered task" in hft("eval", "--model", model, "--tasks", "harness:nonsense", code=2).stderr
