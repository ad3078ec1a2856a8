"""What the READMEs say is what the code does."""

import json
import re
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import typer
import yaml
from freezing.shapes import make_llama

from hftcli import PACKAGE, runners
from hftcli.commands.cli import COMMANDS
from hftcli.recipe.faults import OPEN_SECTIONS
from hftcli.recipe.loading import list_recipes, load_recipe
from hftcli.recipe.recipe import Recipe
from hftcli.recipe.section import open_section
from hftcli.recipe.trainer_keys import Passed
from hftcli.tasks.metrics import METRICS

ROOT = Path(__file__).parent.parent
PAGES = sorted(page for folder in ("", "recipes", "scripts", "hftcli", ".github") for page in (ROOT / folder).glob("*.md"))
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = "|".join(name for name, field in Recipe.model_fields.items() if open_section(field.annotation))


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


@cache
def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@cache
def list_anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", CODE_BLOCK.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def find_blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in CODE_BLOCK.findall(read(page)) if found == language]


def find_commands(page: Path) -> list[str]:
    """Command lines of hft: those in code blocks without a language, and those between backticks."""
    lines = "\n".join(find_blocks(page, "")).replace("\\\n", " ").splitlines()
    shown = [line.partition(" # ")[0] for line in lines]
    return [line for line in (*shown, *re.findall(r"`([^`\n]+)`", read(page))) if line.startswith("hft ")]


def test_the_tables_are_those_of_the_code():
    script = ROOT / "scripts" / "write_reference.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_file_that_is_named_exists(page: Path):
    for name in set(re.findall(r"\b((?:recipes|scripts|hftcli|tests)/[\w./]+\.\w+)\b", read(page))):
        assert (ROOT / name).exists(), name


def find_source(name: str) -> Path:
    """The file that the page on the house means: its names are relative to the package, but for those of other folders."""
    return (ROOT if name.startswith(("tests/", "scripts/", "hftcli/")) else PACKAGE) / name


def test_every_name_in_the_house_is_where_the_page_says():
    text = CODE_BLOCK.sub("", read(PACKAGE / "README.md"))
    files = set(re.findall(r"`((?:\w+/)*\w+\.py)`", text))
    assert len(files) > 20
    for file in files:
        assert find_source(file).exists(), file
    places = re.findall(r"`(\w+)`(?: of `\w+`)? in\s`([\w/]+\.py)`", text)
    assert len(places) > 20
    for name, file in places:
        source = find_source(file).read_text(encoding="utf-8")
        assert re.search(rf"^ *(def |class )?{name}\b *[(:=\[]", source, re.MULTILINE), f"{file} has no {name}"


def test_every_link_between_pages_resolves(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE_BLOCK.sub("", read(page))):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in list_anchors(target), link


def test_every_test_that_is_named_exists(page: Path):
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in set(re.findall(r"`(test_\w+)`", read(page))):
        assert f"def {name}(" in sources, name


@cache
def list_options(command: str) -> set[str]:
    module, _ = COMMANDS[command]
    group = typer.main.get_group(import_module(f"hftcli.commands.{module}").app)
    return {option for parameter in group.commands[command].params for option in parameter.opts}


def test_every_command_that_is_shown_exists(page: Path):
    for line in find_commands(page):
        command, *words = line.split()[1:]
        if command not in ("--help", "COMMAND"):
            assert command in COMMANDS, line
            given = {word for word in words if re.fullmatch(r"--[a-z-]+", word)}
            keys = {"--freeze"} if "--set" in list_options(command) else set()  # the section that has a short name
            assert given <= {*list_options(command), *keys, "--help", "--traceback"}, line


def test_every_key_that_is_named_exists(page: Path):
    text = read(page)
    between_backticks = re.findall(rf"`((?:{SECTIONS})(?:\.(?!json)[a-z]\w*)+)(?=[`:= ])", text)
    for key in {*between_backticks, *re.findall(rf"--(?:set|vary) '?((?:{SECTIONS})(?:\.[a-z]\w*)+)=", text)}:
        section = Recipe
        fates = OPEN_SECTIONS[key.partition(".")[0]][1] if key.partition(".")[0] in OPEN_SECTIONS else {}
        for part in key.split("."):
            if part not in section.model_fields and part in fates:
                assert isinstance(fates[part], Passed), key
            else:
                section = open_section(section.model_fields[part].annotation)


@pytest.mark.parametrize("name", ["README.md", "recipes/README.md"])
def test_the_recipes_that_are_shown_load(name: str, tmp_path: Path):
    texts = find_blocks(ROOT / name, "yaml")
    assert texts
    for text in texts:
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        assert load_recipe(path, (), "sft").data.path == "my.jsonl"


def test_the_rows_that_are_shown_are_of_the_known_formats():
    from hftcli.data.formats import convert_row, detect_format
    from hftcli.data.turns import Lost

    for objective, block in zip(("sft", "dpo"), find_blocks(ROOT / "recipes" / "README.md", "json"), strict=False):
        rows = [json.loads(line) for line in block.splitlines()]
        names = [detect_format(list(row), objective) for row in rows]
        assert len(set(names)) == len(names)  # each format once
        for row, name in zip(rows, names, strict=True):
            assert convert_row(row, name, Lost())


def test_the_memory_of_preference_optimization_is_what_the_plan_says():
    """Llama-2-7B on eight devices: GiB of weights, gradients, optimizer and reference, their sum, and that over full's."""
    start, parameters = runners.Start("no folder"), make_llama(32, 4096, 11008, 4096, 32000)
    lines: dict[str, str] = {}
    for reference in ("full", "shared", "precompute"):
        given = [f"reference={reference}", "launch.num_processes=8"]
        recipe = load_recipe("ultrafeedback", given, "dpo", needs_rows=False)
        budget = runners.plan_recipe(recipe, start, "llama", parameters, 32)
        columns = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "reference_bytes")
        full, half = ([getattr(found, column) / 2**30 for column in columns] for found in (budget.full, budget.half))
        for name, parts in (("full fine-tuning, a second model", full), (f"half, `{reference}`", half)):
            shown = [f"{part:.1f}" if part else "0" for part in (*parts, sum(parts))]
            lines[name] = "| ".join([f"| {name} ", *(f"{cell} " for cell in shown), f"{sum(parts) / sum(full):.2g} |"])
    guide = read(ROOT / "recipes" / "README.md")
    assert len(lines) == 4
    for line in lines.values():
        assert f"\n{line}\n" in guide


def test_the_guide_names_every_metric_and_shipped_recipe():
    guide = read(ROOT / "recipes" / "README.md")
    for name in METRICS:
        assert re.search(rf"\b{name}\b", guide), name
    for recipe in list_recipes():
        assert f"[{recipe.stem}]({recipe.name})" in guide, recipe.name


def test_the_workflows_and_forms_are_yaml():
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    assert len(files) > 3
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict), file
