"""hft's scores beside lm-evaluation-harness's, on real questions; run with lm-eval installed (`pip install -e '.[eval]'`)."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from hftcli.measuring.evaluation import Evaluation, Item
from hftcli.runs.files import read_model

NUM_QUESTIONS = 200

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


def ask_hft(hft, model: Path, task: object, output: Path) -> tuple[Evaluation, list[Item]]:
    hft("eval", "--model", model, "--tasks", task, "--max-examples", NUM_QUESTIONS, "--output", output)
    lines = output.with_suffix(".items.jsonl").read_text().splitlines()
    return read_model(output, Evaluation), [Item.model_validate_json(line) for line in lines]


def ask_harness(lm, path: Path) -> tuple[dict, list[dict]]:
    from lm_eval import simple_evaluate

    results = simple_evaluate(model=lm, tasks=[str(path)], limit=NUM_QUESTIONS, bootstrap_iters=0)
    samples = sorted(results["samples"][path.stem], key=lambda sample: sample["doc_id"])
    return results["results"][path.stem], samples


@pytest.mark.parametrize("name", ["arc_easy_test", "mmlu_test_40per_subject"])
def test_multiple_choice_is_the_harness_s(hft, lm, real_model, shared, tmp_path, name):
    rows = shared / "data" / "eval" / f"{name}.jsonl"
    evaluation, items = ask_hft(hft, real_model, rows, tmp_path / "hft.json")
    start = time.perf_counter()
    results, samples = ask_harness(lm, write_task(tmp_path, "choice", rows, CHOICE))
    print(f"{name}: hft {evaluation.seconds[str(rows)]:.1f} s, the harness {time.perf_counter() - start:.1f} s")
    assert len(items) == len(samples) == NUM_QUESTIONS
    gaps = [
        abs(own - value)
        for item, sample in zip(items, samples, strict=True)
        for own, (value, _) in zip(item.log_likelihoods, sample["filtered_resps"], strict=True)
    ]
    print(f"{name}: {len(gaps)} log-likelihoods, largest gap {max(gaps):.1e}")
    assert max(gaps) < 1e-3
    assert [item.score for item in items] == [sample["acc"] for sample in samples]
    assert [item.others["acc_norm"] for item in items] == [sample["acc_norm"] for sample in samples]
    score = evaluation.tasks[str(rows)]
    print(f"{name}: accuracy {score.score}, {score.others}")
    assert score.score == pytest.approx(results["acc,none"])
    assert score.others["acc_norm"] == pytest.approx(results["acc_norm,none"])


def test_closed_book_is_the_harness_s(hft, lm, real_model, shared, tmp_path):
    from lm_eval.api.instance import Instance

    rows = shared / "data" / "eval" / "nq_open_val.jsonl"
    evaluation, items = ask_hft(hft, real_model, rows, tmp_path / "hft.json")
    start = time.perf_counter()
    results, samples = ask_harness(lm, write_task(tmp_path, "closed_book", rows, CLOSED_BOOK))
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
    assert [item.prediction for item in items] == [sample["filtered_resps"][0] for sample in samples]
    assert [item.score for item in items] == [sample["exact_match"] for sample in samples]
    score = evaluation.tasks[str(rows)]
    print(f"exact match {score.score}, contains {score.lenient}")
    assert score.score == pytest.approx(results["exact_match,remove_whitespace"])


def test_tasks_of_the_harness(hft, lm, shared, tmp_path):
    """Through `hft eval`, from a local file, the harness says what hft says itself."""
    rows = shared / "data" / "eval" / "arc_easy_test.jsonl"
    path = write_task(tmp_path, "local_arc", rows, CHOICE)
    model = shared / "models" / "stories260K"
    done = hft("eval", "--model", model, "--tasks", f"harness:{path},{rows}", "--max-examples", 12, "--json")
    foreign, own = json.loads(done.stdout)["tasks"].values()
    assert foreign["num_examples"] == own["num_examples"] == 12
    assert foreign["score"] == own["score"]
    assert foreign["others"] == {"acc": own["score"], "acc_norm": own["others"]["acc_norm"]}
    assert "not a registered task" in hft("eval", "--model", model, "--tasks", "harness:nonsense", code=2).stderr
