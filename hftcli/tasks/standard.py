r"""The standard streams of continual learning, of 4 and of 15 classification tasks, as O-LoRA asks them (arXiv 2310.14152).

    {"sentence": "Title: The last train\nText: A film about waiting.\n", "label": "good"}      <group>/<task>/train.json
    ["very negative", "negative", "neutral", "positive", "very positive"]                     <group>/<task>/labels.json

The prompt is `<instruction of the group>Option: <labels> \n<sentence>\nAnswer:`. `dev.json` is `test.json` again in the
released rows, and 131 test rows of MNLI have the label `-`, which is no option; both are left as they are.
"""

from pathlib import Path

from hftcli.errors import DataError
from hftcli.tasks.examples import Benchmark, Protocol, Split, Task
from hftcli.tasks.folder import TaskSheet, read_json, read_rows

# COPA's sentences ask for themselves.
INSTRUCTIONS = {
    "TC": "What is the topic of the following paragraph? Choose one from the option.\n",
    "SC": "What is the sentiment of the following paragraph? Choose one from the option.\n",
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"? Choose one from the option.\n',
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning? Choose one from the option.\n',
    "BoolQA": "According to the following passage, is the question true or false? Choose one from the option.\n",
    "MultiRC": "According to the following passage and question, is the candidate answer true or false? "
    "Choose one from the option.\n",
    "WiC": "Given a word and two sentences, whether the word is used with the same sense in both sentence? "
    "Choose one from the option.\n",
    "COPA": None,
}
TASKS = {
    "TC": ("agnews", "dbpedia", "yahoo"),
    "SC": ("amazon", "yelp", "IMDB", "SST-2"),
    "NLI": ("MNLI", "CB", "RTE"),
    "QQP": ("QQP",),
    "BoolQA": ("BoolQA",),
    "MultiRC": ("MultiRC",),
    "WiC": ("WiC",),
    "COPA": ("COPA",),
}
GROUPS = {task: group for group, tasks in TASKS.items() for task in tasks}
ORDERS = {
    "1": "dbpedia amazon yahoo agnews",
    "2": "dbpedia amazon agnews yahoo",
    "3": "yahoo amazon agnews dbpedia",
    "4": "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
    "5": "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
    "6": "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
}
CUE = "\nAnswer:"
MAX_NEW_TOKENS = 16  # labels are a few words; O-LoRA allows 50, and a model that writes on is wrong at either
ONCE = Protocol(dict.fromkeys(GROUPS, 1))


def locate(task: str, root: Path, split: Split) -> Path:
    """The JSON file of a split, below the group of the task; `eval` is the group's `dev`."""
    return root / GROUPS[task] / task / f"{'dev' if split == 'eval' else split}.json"


def load(task: str, path: Path) -> Task:
    """The task, asked with the instruction that lists its labels."""
    sheet = TaskSheet(
        metric="normalized_match",
        max_new_tokens=MAX_NEW_TOKENS,
        instruction=write_instruction(task, path.with_name("labels.json")),
        cue=CUE,
        cut="end",
    )
    rows = read_rows(path, ("sentence", "label"))
    return sheet.make_task(f"standard/{task}", ((f"{sheet.instruction}{sentence}{CUE}", label) for sentence, label in rows))


def write_instruction(task: str, labels_path: Path) -> str:
    """What stands before a task's sentences.

    Raises:
        DataError: the labels are missing, or no list of words.
    """
    instruction = INSTRUCTIONS[GROUPS[task]]
    if instruction is None:
        return ""
    if not labels_path.is_file():
        raise DataError(f"{labels_path} is missing: it lists the labels of standard/{task}", SOURCE)
    labels = read_json(labels_path)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise DataError(f'{labels_path}: expected a list of labels, ["World", "Sports"]')
    return f"{instruction}Option: {', '.join(labels)} \n"


SOURCE = (
    "take the folder CL_Benchmark of github.com/cmnfriend/O-LoRA and set data.root to it; "
    "it must hold <group>/<task>/train.json, test.json and labels.json, such as TC/agnews/train.json"
)
STANDARD = Benchmark(
    tasks=tuple(GROUPS),
    orders={name: tuple(tasks.split()) for name, tasks in ORDERS.items()},
    locate=locate,
    load=load,
    source=SOURCE,
    protocols={"paper": ONCE, "scripts": ONCE},
)
