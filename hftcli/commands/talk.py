"""The commands that talk to a model: `hft chat`, `hft generate`."""

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hftcli.commands.options import Dtype, check_files
from hftcli.errors import DataError, InputError

if TYPE_CHECKING:
    from hftcli.measuring.talking import Manner, Message, Speaker

app = typer.Typer()

START = "start"
HELP = "/new begins again, /quit ends; Ctrl-C stops an answer, Ctrl-D ends"
CUT = "(the answer was cut before it ended: see --max-new-tokens, or /new where the model has no more places)"

ModelArgument = Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, a folder with a config.json, or a hub id.")]
LengthOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Where an answer that has not ended is cut.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")]
TopOption = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Draw from the likeliest of so much probability.")]
SystemOption = Annotated[str | None, typer.Option("--system", help="A system prompt.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Data type to compute in.")]


@app.command()
def chat(
    model: ModelArgument,
    beside: Annotated[
        str | None, typer.Option("--beside", help=f"Another model that answers too; `{START}` is what the run started from.")
    ] = None,
    system: SystemOption = None,
    max_new_tokens: LengthOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopOption = 1.0,
    dtype: DtypeOption = "float32",
) -> None:
    """Talk to a model; with --beside, to another one at the same time, such as what it was before training."""
    from hftcli.runners import resolve_subject

    check_drawing(temperature, top_p)
    subject = resolve_subject(model)
    if beside == START and subject.base is None:
        raise InputError(f"--beside {START}: {model} is no run, and does not say what it started from", "name the model")
    paths = {"model": subject.path}
    if beside is not None:
        paths = {"before" if beside == START else "beside": _resolve_beside(beside, subject.base), **paths}

    from hftcli.measuring.talking import Manner, Speaker

    speakers = {
        name: Speaker(path, dtype, needs_template=True, tuned=subject.path if name == "before" else None)
        for name, path in paths.items()
    }
    if system is not None:
        for speaker in speakers.values():  # a template that has no place for it says so before the first message
            speaker.render([{"role": "system", "content": system}, {"role": "user", "content": "Hello"}])
    print(HELP, file=sys.stderr)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it stops an answer, not the command
    talk(speakers, Manner(max_new_tokens, temperature, top_p), system)


def _resolve_beside(beside: str, base: str | None) -> str:
    from hftcli.runners import resolve_subject

    return str(base) if beside == START else resolve_subject(beside).path


def talk(speakers: "dict[str, Speaker]", manner: "Manner", system: str | None) -> None:
    """Read messages and have every model answer each, in a conversation of its own."""
    opening: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    told: dict[str, list[Message]] = {name: list(opening) for name in speakers}
    while True:
        try:
            said = _read_message()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if said == "/quit":
            return
        if said == "/new":
            told = {name: list(opening) for name in speakers}
            continue
        if not said.strip():
            continue
        for name, speaker in speakers.items():
            _answer(name if len(speakers) > 1 else "", speaker, told[name], said, manner)


def _read_message() -> str:
    """A line from the terminal, with its editing and its history; several, where they were pasted at once."""
    import contextlib

    with contextlib.suppress(ImportError):  # not on every platform
        import readline  # noqa: F401
    return input("> ")


def _answer(label: str, speaker: "Speaker", told: "list[Message]", said: str, manner: "Manner") -> None:
    told.append({"role": "user", "content": said})
    if label:
        print(f"[{label}] ", end="", flush=True)
    try:
        answer, num_left_out = speaker.answer(told, manner, lambda text: print(text, end="", flush=True))
    except InputError as error:
        told.pop()
        print(f"hft: {error.message}; {error.fix}", file=sys.stderr)
        return
    print()
    if num_left_out:
        print(f"(the oldest {num_left_out} messages had no room and were left out)", file=sys.stderr)
        first = len(told) > 0 and told[0]["role"] == "system"
        del told[first : first + num_left_out]
    if answer.is_cut:
        print(f"[{label}] {CUT}" if label else CUT, file=sys.stderr)
    if answer.text:
        told.append({"role": "assistant", "content": answer.text})
    else:
        told.pop()


@app.command()
def generate(
    model: ModelArgument,
    prompts: Annotated[
        str, typer.Option("--prompts", help='A file with a prompt on each line, as text or {"prompt": "..."}; - reads them.')
    ],
    output: Annotated[Path | None, typer.Option("--output", help="FILE.jsonl in place of the terminal.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Ask through the chat template; on where the model has one.")
    ] = None,
    system: SystemOption = None,
    max_new_tokens: LengthOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopOption = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn at a temperature.")] = 0,
    dtype: DtypeOption = "float32",
) -> None:
    """Answer prompts, one on each line of a file.

    What is written has {"prompt", "answer"} on each line, and "is_cut": true where the answer had not ended at the limit.
    """
    from hftcli.runners import resolve_subject

    subject = resolve_subject(model)
    check_files(output=output)
    if output is not None and not output.parent.is_dir():
        raise InputError(f"--output {output}: there is no folder {output.parent}", "make it, or give another")

    from hftcli.measuring.talking import Manner, Speaker, encode_prompts, read_prompt_lines, read_prompts_from
    from hftcli.reporting.progress import show_counts
    from hftcli.runs.files import write_text

    check_drawing(temperature, top_p, seed)
    if system is not None and chat is False:
        raise InputError("--system gives a turn, and --no-chat asks without turns", "drop one of the two")
    rows = read_prompt_lines(sys.stdin, "standard input") if prompts == "-" else read_prompts_from(Path(prompts))
    check_rows(rows, f"--prompts {prompts}", chat)
    speaker = Speaker(subject.path, dtype)
    encoded = encode_prompts(speaker, rows, chat, system)
    if chat is None and system is None and speaker.has_template and any(isinstance(row.get("prompt"), str) for row in rows):
        print("(texts are asked as a user's turn, through the chat template; --no-chat asks them as they are)", file=sys.stderr)
    with show_counts() as on_progress:
        answers = speaker.complete(
            encoded, Manner(max_new_tokens, temperature, top_p, seed), lambda done, total: on_progress("prompts", done, total)
        )
    written = [
        {**row, "answer": answer.text, **({"is_cut": True} if answer.is_cut else {})}
        for row, answer in zip(rows, answers, strict=True)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
    if output is None:
        print(text, end="")
    else:
        write_text(output, text)
    if num_cut := sum(answer.is_cut for answer in answers):
        print(f"({num_cut} of {len(answers)} answers were cut before they ended: see --max-new-tokens)", file=sys.stderr)


def check_rows(rows: Sequence[Mapping[str, Any]], place: str, chat: bool | None) -> None:
    """See that prompts lose nothing where their answers are written, and that they are asked as it is said.

    Args:
        chat: whether they are to be asked through the chat template; None leaves it to the prompts.

    Raises:
        DataError: naming the first with a key that an answer has, too.
        InputError: naming the first of messages, which are asked through the template anyway.
    """
    for number, row in enumerate(rows, start=1):
        for key in ("answer", "is_cut"):
            if key in row:
                raise DataError(f"{place}, prompt {number} has an `{key}`, which would be lost", "give it another name")
        if chat is False and not isinstance(row.get("messages", row.get("prompt")), str):
            raise InputError(
                f"--no-chat would have no effect on {place}, prompt {number}: messages are asked through the chat template",
                "drop it, or give texts alone",
            )


def check_drawing(temperature: float, top_p: float, seed: int = 0) -> None:
    """Raises: InputError: nothing is drawn, and yet it is said how."""
    if not temperature and (seed or top_p < 1):
        raise InputError(
            "--top-p and --seed say how answers are drawn, and at temperature 0 none are", "give --temperature, too"
        )
