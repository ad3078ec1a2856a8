"""The commands that make a model out of others: `hft merge`, `hft reset`."""

from pathlib import Path
from typing import Annotated

import typer

from hftcli.commands.options import fetch_folder
from hftcli.errors import InputError

app = typer.Typer()


@app.command()
def merge(
    output: Annotated[Path, typer.Option("--output", help="Folder to write; must not be there.")],
    base: Annotated[str | None, typer.Option("--base", help="The base: a folder, a run, or a hub id.")] = None,
    delta: Annotated[str | None, typer.Option("--delta", help="A delta checkpoint, or a run that ends in one.")] = None,
    tuned: Annotated[str | None, typer.Option("--tuned", help="A model tuned from the base.")] = None,
    weight: Annotated[
        float | None, typer.Option("--interpolate", min=0, max=1, metavar="A", help="Write (1 - A) base + A tuned.")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            "--sparsify", min=0, max=1, metavar="DENSITY", help="Keep the largest changes: this share of all weights."
        ),
    ] = None,
) -> None:
    """A full model out of a delta checkpoint; the mean of a model and its base, or its largest changes on its base.

    A delta knows its base; --base says where it is now, if it was moved.
    """
    from hftcli import runners
    from hftcli.reporting.card import write_made_card
    from hftcli.reporting.terminal import print_merge

    match delta, base, tuned, weight, density:
        case str(), _, None, None, None:
            from hftcli.models.arithmetic import merge_delta

            # Not fetched as a model is: the base may be found only through --base.
            folder = Path(runners.resolve_start(delta).path)
            manifest = merge_delta(folder, output, fetch_folder(base) if base is not None else None)
        case None, str(), str(), None, float():
            from hftcli.models.arithmetic import sparsify_model

            manifest = sparsify_model(fetch_folder(base), fetch_folder(tuned), density, output)
        case _, _, _, float(), float():
            raise InputError(
                "hft merge takes --interpolate or --sparsify: the largest changes do not depend on how far they are gone",
                "sparsify first, and then interpolate what that gave",
            )
        case None, str(), str(), float(), None:
            from hftcli.models.arithmetic import interpolate_models

            manifest = interpolate_models(fetch_folder(base), fetch_folder(tuned), weight, output)
        case _:
            raise InputError(
                "hft merge takes --delta, or --base with --tuned and --interpolate or --sparsify",
                "hft merge --base BASE --delta DELTA --output FOLDER, or "
                "hft merge --base BASE --tuned TUNED --interpolate 0.5 --output FOLDER",
            )
    write_made_card(manifest, output)
    print_merge(manifest, output)


@app.command()
def reset(
    base: Annotated[str, typer.Option("--base", help="The model that was tuned: a folder, a run, or a hub id.")],
    tuned: Annotated[str, typer.Option("--tuned", help="The tuned model: a folder, a run, or a hub id.")],
    output: Annotated[Path, typer.Option("--output", help="Folder to write; must not be there.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="freeze.KEY=VALUE", help="Draw the half by another rule: what it freezes goes back."),
    ] = None,
) -> None:
    """Half-Reset: a tuned model with a random half of its weight matrices back at the base, bit for bit."""
    for override in overrides or ():
        if not override.startswith("freeze."):
            raise InputError(f"--set {override}: a reset has no other keys than those of freeze", "--set freeze.seed=7")
    from hftcli.models.arithmetic import reset_half
    from hftcli.recipe.loading import load_recipe
    from hftcli.reporting.card import write_made_card
    from hftcli.reporting.terminal import print_merge

    rule = load_recipe(None, overrides or ()).freeze  # the quick start has the paper's rule
    manifest = reset_half(fetch_folder(base), fetch_folder(tuned), rule, output)
    write_made_card(manifest, output)
    print_merge(manifest, output)
