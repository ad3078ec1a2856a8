"""The house: which room may know which, what the front leaves alone, and how large a room may grow."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from pydantic import BaseModel

from hftcli.recipe.section import Section

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hftcli"

# From the bottom up: what stands in a room may import only from its own room and from those before it.
FLOORS = (
    "errors", "freezing", "recipe", "tasks", "runs", "models", "data", "comparing", "launching", "doctor", "methods",
    "measuring", "library", "training", "reporting", "runners", "advising", "commands",
)  # fmt: skip
# What imports no torch, neither itself nor through what it imports. `commands` opens the lower plane inside the commands that
# need it.
FRONT = (
    "errors", "freezing", "recipe", "tasks", "runs", "comparing", "launching", "doctor.doctor", "measuring.evaluation",
    "reporting", "runners", "commands",
)  # fmt: skip
TOP = {"hftcli", "recipes", "scripts", "tests", "Makefile", "pyproject.toml", "README.md", "LICENSE"}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_README_LINES = 400, 60, 220


def list_modules() -> dict[str, Path]:
    """By name without the package's: `data.rows`; a package by its folder's."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__main__.py" and path != PACKAGE / "__init__.py"]
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


MODULES = list_modules()


def find_imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules of the package that a file imports; what is for the type checker alone does not count."""
    found = set()
    for node in _walk(ast.parse(path.read_text(encoding="utf-8")), top_level_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("hftcli.")}
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "hftcli":
            children = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in children if name.removeprefix("hftcli.") in MODULES}
            found |= modules or {node.module}
    return {name.removeprefix("hftcli.") for name in found if name != "hftcli"}


def _walk(node: ast.AST, top_level_only: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        is_for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        is_inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not is_for_types and not (top_level_only and is_inside):
            yield child
            yield from _walk(child, top_level_only)


def is_front(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in FRONT)


def test_rooms_know_only_what_stands_below():
    height = {room: floor for floor, room in enumerate(FLOORS)}
    assert {module.partition(".")[0] for module in MODULES} == set(FLOORS)
    for module, path in MODULES.items():
        room = module.partition(".")[0]
        for imported in {name.partition(".")[0] for name in find_imports(path)}:
            assert height[imported] <= height[room], f"{module} imports from {imported}, which stands above {room}"


def test_modules_go_in_no_circle():
    imports = {module: find_imports(path) & MODULES.keys() for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for imported in imports[module] - {module}:
                visit(imported, (*path, module))
            done.add(module)

    for module in imports:
        visit(module, ())


def test_the_front_imports_nothing_of_the_plane_below():
    for module, path in MODULES.items():
        if is_front(module):
            lazy_too = not module.startswith("commands")
            for imported in find_imports(path, top_level_only=not lazy_too):
                is_package = imported in ("doctor", "measuring")  # their __init__ imports nothing
                assert is_front(imported) or is_package, f"{module} imports {imported}, which imports torch"


def test_importing_the_front_leaves_torch_alone():
    front = [f"hftcli.{module}" for module in MODULES if is_front(module)]
    heavy = {"torch", "transformers", "trl", "deepspeed", "peft", "scipy"}
    code = f"import sys, {', '.join(front)}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_types_are_strict_on_the_front():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    own = [pattern for rule in settings["overrides"] for pattern in rule["module"] if pattern.startswith("hftcli.")]
    assert settings["strict"]
    assert [module for module in MODULES if is_front(module) for pattern in own if fnmatch(f"hftcli.{module}", pattern)] == []


def test_every_module_says_what_it_is_for():
    for module, path in MODULES.items():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{module} has no docstring"


def list_sources() -> list[Path]:
    return [path for folder in ("hftcli", "tests", "scripts") for path in (ROOT / folder).rglob("*.py")]


def test_files_are_no_longer_than_one_reads_at_a_sitting():
    for path in list_sources():
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        assert num_lines <= MAX_FILE_LINES, f"{path.relative_to(ROOT)} has {num_lines} lines"


def test_functions_fit_on_a_page():
    for path in list_sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = node.end_lineno - node.lineno + 1
                assert num_lines <= MAX_FUNCTION_LINES, f"{path.relative_to(ROOT)}: {node.name} has {num_lines} lines"


def test_tests_stand_in_the_rooms_folders_and_import_no_other_test():
    """What tests share is in modules that are none; `test_*.py` moves and divides freely."""
    tests = ROOT / "tests"
    folders = {path.parent.relative_to(tests).parts[0] for path in tests.rglob("*/test_*.py")}
    assert folders - {"end_to_end", "gpu"} <= set(FLOORS)
    for path in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                parts = {part for module in modules for part in module.split(".")}
                assert not any(part.startswith("test_") for part in parts), f"{path.relative_to(ROOT)} imports {modules[0]}"


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


def list_sections(kind: type[Section] = Section) -> list[type[Section]]:
    return [found for child in kind.__subclasses__() for found in (child, *list_sections(child))]


@pytest.fixture(scope="module")
def sections() -> list[type[Section]]:
    """What crosses a file, in every module of the front."""
    for module in MODULES:
        if is_front(module):
            __import__(f"hftcli.{module}")
    return [section for section in list_sections() if section.__module__.startswith("hftcli.")]


def test_every_field_in_a_file_is_documented(sections: list[type[Section]]):
    assert len(sections) > 50
    for section in sections:
        for field, info in section.model_fields.items():
            is_section = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
            assert info.description or is_section, f"{section.__name__}.{field} has no docstring"


def test_nothing_else_stands_at_the_top():
    """What a test or a measurement left there was once committed unseen."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
    if not tracked:
        pytest.skip("this is no checkout of git")
    found = {Path(path).parts[0] for path in tracked}
    assert {name for name in found if not name.startswith(".")} <= TOP
