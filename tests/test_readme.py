"""What the READMEs say is what the code does."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import click
import pytest
import typer
import yaml

from hftcli.recipe.loading import list_recipes, load_recipe
from hftcli.recipe.methods import MethodSection
from hftcli.recipe.recipe import Recipe
from hftcli.recipe.section import open_section
from hftcli.tasks import BENCHMARKS
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


def test_every_command_that_is_shown_exists(page: Path):
    from hftcli.commands.cli import app

    group = typer.main.get_command(app)
    for line in find_commands(page):
        words = line.split()
        command = group.get_command(click.Context(group), words[1])
        if words[1].startswith("-") or words[1].isupper():  # hft --help, hft COMMAND
            continue
        assert command is not None, line
        options = {option for parameter in command.params for option in parameter.opts} | {"--help", "--traceback"}
        assert {word for word in words if re.fullmatch(r"--[a-z-]+", word)} <= options, line


def test_every_key_that_is_named_exists(page: Path):
    text = read(page)
    between_backticks = re.findall(rf"`((?:{SECTIONS})(?:\.[a-z]\w*)+)(?=[`:= ])", text)
    for key in {*between_backticks, *re.findall(rf"--(?:set|vary) '?((?:{SECTIONS})(?:\.[a-z]\w*)+)=", text)}:
        section = Recipe
        for part in key.split("."):
            assert part in section.model_fields, key
            section = open_section(section.model_fields[part].annotation)


@pytest.mark.parametrize("name", ["README.md", "recipes/README.md"])
def test_the_recipes_that_are_shown_load(name: str, tmp_path: Path):
    (text,) = find_blocks(ROOT / name, "yaml")
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_recipe(path, (), "sft").data.path == "my.jsonl"


def test_the_guide_names_all_that_can_be_chosen():
    from hftcli.data.rows import FORMATS

    guide = read(ROOT / "recipes" / "README.md")
    for name in (*FORMATS, *BENCHMARKS, *MethodSection.model_fields):
        assert re.search(rf"^\| `{name}[`:]", guide, re.MULTILINE), f"no row of a table begins with {name}"
    for name in METRICS:
        assert re.search(rf"\b{name}\b", guide), name
    for recipe in list_recipes():
        assert guide.count(f"| {recipe.stem} |") + guide.count(f"[{recipe.stem}]({recipe.name})") == 2, recipe.stem


def test_the_workflows_and_forms_are_yaml():
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    assert len(files) > 3
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict), file
