"""The house: which room may know which, and what the front leaves alone."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "hftcli"

# From the bottom up: a module may import, at its top, only modules that stand before it. `cli.py` alone may open the lower
# plane, inside the commands that need it.
FLOORS = [
    ["errors", "seals"],
    ["freezing.roles", "launching.signals"],
    ["freezing.selection", "freezing.activations"],
    ["freezing.budget"],
    ["recipe"],
    ["tasks.examples"],
    ["tasks.metrics"],
    ["tasks.folder"],
    ["tasks.tinyworld", "tasks.trace", "tasks.standard", "tasks.general"],
    ["tasks"],
    ["tasks.check"],
    ["run", "statistics"],
    ["planning"],
    ["launching.processes", "forgetting", "comparison", "items"],
    ["evaluation"],
    ["figures"],
    ["launching.hosts"],
    ["launching.slurm"],
    ["launching.command"],
    ["launching.watch", "launching.cluster"],
    ["doctor"],
    ["report"],
    ["page"],
    ["runners"],
    ["cli"],
]
METHODS = ["method", "replay", "ewc", "gem", "agem", "lora", "olora", "l2sp", "ia3"]
BELOW = [  # torch is imported here
    *["deltas", "models", "arithmetic", "rows", "chat", "data", "references", "checkpoints"],
    *[*(f"methods.{name}" for name in METHODS), "methods", "loss", "trainers", "options", "evaluate", "drift", "harness"],
    *["scoring", "probe", "machine", "worker"],
]


def read_imports(path: Path, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hftcli"):
            module = node.module.removeprefix("hftcli").lstrip(".")
            children = [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
            modules = {name for name in children if name_of(name)}
            found |= modules or {module}
    return found - {""}


def name_of(module: str) -> bool:
    path = PACKAGE / module.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def module_names() -> dict[str, Path]:
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__main__.py"]
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}
    return {name.removesuffix("__init__").rstrip("."): path for name, path in names.items()}


def test_floors():
    height = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
    for module, path in module_names().items():
        if module not in height:
            continue
        for imported in read_imports(path, top_level_only=True) - {"freezing", "launching"}:
            assert imported not in BELOW, f"{module} imports {imported}, which imports torch"
            assert height[imported] < height[module], f"{module} imports {imported}, which stands above it"
        if module != "cli":
            lazy = read_imports(path, top_level_only=False) & set(BELOW)
            assert not lazy, f"{module} opens the lower plane: {lazy}"


def test_every_module_has_a_floor():
    known = {module for floor in FLOORS for module in floor} | set(BELOW) | {"", "freezing", "launching"}
    assert set(module_names()) == known


def test_importing_the_front_leaves_torch_alone():
    code = "import sys, hftcli.cli, hftcli.runners, hftcli.report; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_every_module_says_what_it_is_for():
    for module, path in module_names().items():
        source = path.read_text()
        assert not source.strip() or ast.get_docstring(ast.parse(source)), f"{module} has no docstring"


def test_every_field_in_a_file_is_documented():
    from hftcli import evaluation, forgetting, recipe, run
    from hftcli.tasks import check, folder

    for room in (recipe, run, evaluation, forgetting, check, folder):
        for name, value in vars(room).items():
            if isinstance(value, type) and issubclass(value, recipe.Section) and value.__module__ == room.__name__:
                for field, info in value.model_fields.items():
                    is_section = isinstance(info.annotation, type) and issubclass(info.annotation, recipe.BaseModel)
                    assert info.description or is_section, f"{name}.{field} has no docstring"
