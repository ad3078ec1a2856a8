"""A finished run on the Hugging Face hub: its checkpoint with the model card, and its page, in one commit.

What is uploaded names no path of the machine that made it, and no secret: the token is that of `hf auth login` or HF_TOKEN,
and a file that holds it, or what looks like another, is not uploaded.
"""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftcli.errors import HftError, InputError
from hftcli.reporting.card import CARD_NAME, SNAPSHOT, find_base, make_card
from hftcli.runs.files import read_model
from hftcli.runs.history import HISTORY_NAME, read_history
from hftcli.runs.made import DELTA_NAME, DeltaRecord
from hftcli.runs.run import Round, Run, find_checkpoint_damage

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")  # as the hub gives them out
FEW_CHARACTERS = 8  # of a token: what is shorter is none, and stands in many files
NUM_TRIES, PAUSE_SECONDS = 4, 2.0  # a connection that fails is tried again, after twice the pause each time
MOST_TEXT_BYTES = 1 << 24  # of a file that is looked through for secrets
EMPTY = {".gitattributes"}  # what a repository has that nobody wrote to
WEIGHTS = re.compile(r"(model|delta|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
MODEL_FILES = {
    "config.json", "generation_config.json", "adapter_config.json", "chat_template.jinja", "chat_template.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", HISTORY_NAME, DELTA_NAME,
}  # fmt: skip


@dataclass(frozen=True)
class Upload:
    """What goes to the hub.

    Attributes:
        files: by their names there; a path, or the bytes where they are not a file's.
    """

    repo: str
    files: dict[str, Path | bytes]

    def count_bytes(self, name: str) -> int:
        """Size of a file."""
        held = self.files[name]
        return len(held) if isinstance(held, bytes) else held.stat().st_size


def prepare_upload(run: Run, repo: str) -> Upload:
    """Gather a finished run's files, and look through them.

    Raises:
        InputError: the run is not finished or not verified, its files are not those that it wrote, nobody else has what its
            delta is laid over, the repository's name is none, or a file holds a secret.
    """
    if not REPO.fullmatch(repo):
        raise InputError(f"--repo {repo} is no name of a repository", "give OWNER/NAME")
    last = find_last(run)
    checkpoint = last.checkpoint
    check_base(checkpoint)
    if damage := find_checkpoint_damage(checkpoint):
        raise InputError(
            f"{checkpoint} is not what its round wrote, and is not shared: {'; '.join(damage)}",
            "restore it, or run its recipe again in a new folder",
        )
    files: dict[str, Path | bytes] = {
        path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*")) if path.is_file()
    }
    names = {"base": find_base(run).name}
    if CARD_NAME not in files or (checkpoint / CARD_NAME).read_text(encoding="utf-8") == make_card(run, last):
        files[CARD_NAME] = make_card(run, last, repo).encode()  # an edited one goes as it is
    for name, clean in ((HISTORY_NAME, clean_history), (DELTA_NAME, clean_delta)):
        if name in files:
            files[name] = clean((checkpoint / name).read_text(encoding="utf-8"), names["base"])
    if run.page_path.exists():
        files[run.page_path.name] = run.page_path
    upload = Upload(repo, files)
    check_secrets(upload)
    return upload


def find_last(run: Run) -> Round:
    """The round whose checkpoint is the run's model.

    Raises:
        InputError: the run is not finished, or its frozen half is not what it was.
    """
    if not run.recipe_path.exists():
        raise InputError(f"{run.folder} is no run", "give a folder that hft made with --output")
    last = run.last_finished
    if last is None or last != run.rounds[-1]:
        raise InputError(f"{run.folder} is a run that is not finished", "run its recipe again: it goes on")
    if not last.read_result().verification.passed:
        raise InputError(f"{run.folder} is not verified, and is not shared", f"hft verify {run.folder} says what is wrong")
    return last


def check_base(checkpoint: Path) -> None:
    """Raises: InputError: a delta over another delta, or over a model of hft's that is on no hub: others lack it."""
    if not (checkpoint / DELTA_NAME).exists():
        return
    base = read_model(checkpoint / DELTA_NAME, DeltaRecord).base
    is_made_here = len(read_history(checkpoint).rounds) > 1 and not SNAPSHOT.search(Path(base.path).as_posix())
    if is_made_here or DELTA_NAME in base.files:
        what = "a delta itself" if DELTA_NAME in base.files else "a model of hft's that is on no hub"
        raise InputError(
            f"{checkpoint} is a delta, and its base {base.path} is {what}: nobody else could make the model out of it",
            f"`hft merge --delta {checkpoint} --output FOLDER` writes it whole, and `hf upload OWNER/NAME FOLDER` shares that; "
            "or train with checkpoint.format=full",
        )


def clean_history(text: str, base: str) -> bytes:
    """hft.json with names in place of the folders that rounds started from."""
    history = json.loads(text)
    for place, round_ in enumerate(history["rounds"]):
        round_["parent"] = base if place == 0 else f"round {place - 1}"
    return (json.dumps(history, indent=2) + "\n").encode()


def clean_delta(text: str, base: str) -> bytes:
    """delta.json with the base's name in place of its folder; its hashes say which one it is."""
    delta = json.loads(text)
    delta["base"]["path"] = base
    return (json.dumps(delta, indent=2) + "\n").encode()


def check_secrets(upload: Upload) -> None:
    """Raises: InputError: a file holds the token, or what looks like a secret."""
    from huggingface_hub import get_token

    token = get_token()
    for name, held in upload.files.items():
        if upload.count_bytes(name) > MOST_TEXT_BYTES or name.endswith((".safetensors", "tokenizer.json")):
            continue
        content = held if isinstance(held, bytes) else held.read_bytes()
        text = content.decode("utf-8", errors="replace")
        if (token and len(token) >= FEW_CHARACTERS and token in text) or TOKEN.search(text):
            raise InputError(f"{name} holds what looks like a secret, and is not uploaded", "take it out, or make it void")


def push_upload(upload: Upload, is_private: bool, updates: bool) -> tuple[str, list[str]]:
    """Make the repository and commit all files at once: after a failure it holds none of them, or all.

    Args:
        updates: write into a repository that has files already.

    Returns:
        The address of the model, and the files of a model that stood there before, which were taken away.

    Raises:
        InputError: no token, one that is not valid or may not write, or a repository that is not empty, or is public and should
            not be.
        HftError: the hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set, and nothing is uploaded", "unset it, or look with --dry-run")
    if get_token() is None:
        raise InputError("there is no token of the hub", "hf auth login, or set HF_TOKEN to one that may write")
    api = HfApi()
    with explaining(upload.repo):
        _try("asking who you are", api.whoami)
        stale = sorted(
            name for name in check_repository(api, upload.repo, updates, is_private) - set(upload.files) if makes_model(name)
        )
        _try("making the repository", lambda: api.create_repo(upload.repo, private=is_private, exist_ok=True))
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, held if isinstance(held, bytes) else str(held)) for name, held in upload.files.items()),
            *(CommitOperationDelete(name) for name in stale),
        ]
        _try("uploading", lambda: api.create_commit(upload.repo, operations, commit_message="Add what hft trained"))
    return f"{constants.ENDPOINT}/{upload.repo}", stale


def makes_model(name: str) -> bool:
    """Whether a file says what a model or its tokenizer is: one of an earlier model would be read in place of this one's."""
    return WEIGHTS.fullmatch(name) is not None or name in MODEL_FILES


def check_repository(api: "HfApi", repo: str, updates: bool, is_private: bool) -> set[str]:
    """The files of a repository; none where it is not there yet.

    Raises:
        InputError: it has files, and is not to be updated; or all can see it, and nobody else should.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        held = set(_try("looking for the repository", lambda: api.list_repo_files(repo)))
    except RepositoryNotFoundError:
        return set()
    if is_private and not _try("asking who may see it", lambda: api.repo_info(repo)).private:
        raise InputError(
            f"{repo} is there already, and is public: --private makes new repositories private alone",
            "make it private in its settings on the hub, or give another --repo",
        )
    if held - EMPTY and not updates:
        raise InputError(f"{repo} is there already, with {len(held - EMPTY)} files", "give another --repo, or --update")
    return held


def _try(what: str, act: Any) -> Any:
    """Do it, again where the connection fails or the hub is overloaded."""
    from huggingface_hub.errors import HfHubHTTPError

    transport: type[Exception] = HfHubHTTPError.__mro__[1]  # the root of what the hub's HTTP library raises, whichever that is
    for number in range(NUM_TRIES):
        try:
            return act()
        except (transport, RuntimeError) as error:  # a part of a large file fails as the cause of a RuntimeError
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
            if not isinstance(cause, transport) or (status is not None and status < 500 and status != 429):
                raise
            if number == NUM_TRIES - 1:
                raise HftError(f"{what} failed {NUM_TRIES} times: {_first_line(cause or error)}", _RETRY) from error
        time.sleep(PAUSE_SECONDS * 2**number)
    raise AssertionError("unreachable")


_RETRY = "run the same command again: the hub has all of it or nothing; HF_ENDPOINT says which hub, if it is another one"


@contextmanager
def explaining(repo: str) -> Iterator[None]:
    """Say what an answer of the hub means.

    Raises:
        InputError: the token is not valid, or may not write.
        HftError: anything else.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise InputError("the hub does not know the token", "hf auth login, or set HF_TOKEN to a valid one") from error
        if status == 403:
            raise InputError(
                f"the token may not write to {repo}", "give a --repo of your own, or a token with the right to write"
            ) from error
        raise HftError(
            f"the hub refuses {repo}: {_first_line(error)}", "see what it says, then run the same command again"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
