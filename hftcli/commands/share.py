"""The command that shares a model: `hft push`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="A finished run.")],
    repo: Annotated[str, typer.Option("--repo", help="OWNER/NAME on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Write into a repository that has files already.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded, and stop.")] = False,
) -> None:
    """Share a run's model on the Hugging Face hub, with its card and its page; --dry-run shows what would go."""
    from hftcli.reporting.publishing import prepare_upload, push_upload
    from hftcli.reporting.terminal import format_bytes
    from hftcli.runs.run import Run

    upload = prepare_upload(Run(run), repo)
    total = sum(map(upload.count_bytes, upload.files))
    for name in upload.files:
        print(f"{format_bytes(upload.count_bytes(name)):>12}  {name}", file=sys.stdout if dry_run else sys.stderr)
    if dry_run:
        print(f"{format_bytes(total):>12}  in all, to {repo}; nothing was uploaded")
        return
    address, stale = push_upload(upload, private, update)
    for name in stale:
        print(f"     removed  {name}, of the model that was there before", file=sys.stderr)
    print(address)
