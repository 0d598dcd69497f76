"""The house: each floor imports only floors below, nothing imports in a circle, private is private, files and functions are
short, docstrings name a result.  Lazy and typing imports count."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = """
    activations
    arguments backend code devices extras files metrics penalty reference signals
    kernels
    ops
    objectives
    gradients
    functional
    nn
    optim
    data
    train
    interop
    analysis
    sae_fast
    demo runs
    cli
    __main__
"""  # "sae_fast" is the package's own face, its __init__; rooms on one floor do not import each other
FLOOR = {room: n for n, line in enumerate(FLOORS.strip().splitlines()) for room in line.split()}
LINES, FUNCTION = 400, 60  # docstrings apart
NO_NAME = re.compile(r"(How|Of|What|When|Where|Whether|Which|Who|Whose|Why)\b")  # with which no docstring begins


class House:
    """The modules below a root by name, and what each imports of the others."""

    def __init__(self, root: Path):
        self.root, self.files = root, {}
        for folder, package in (("sae_fast", "sae_fast"), ("kernels", "sae_fast.kernels")):
            for file in sorted((root / folder).rglob("*.py")):
                inside = file.relative_to(root / folder).with_suffix("").parts
                self.files[".".join([package, *(part for part in inside if part != "__init__")])] = file
        self.files = {name: file for name, file in self.files.items() if "kernels" not in file.relative_to(root).parts[1:]}
        self.trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in self.files.items()}
        self.imports = {name: set(self._imports(name)) - {name} for name in self.files}

    def _imports(self, module: str) -> Iterator[str]:
        package = module if self.files[module].name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                of = ".".join([*above, *filter(None, [node.module])])
                named = [f"{of}.{alias.name}" for alias in node.names if not alias.name.startswith("_C")]  # native
            elif isinstance(node, ast.Attribute) and node.attr == "iter_modules":  # all beside it, but the private ones
                beside = [name for name in self.files if name.rpartition(".")[0] == package]
                named = [name for name in beside if not name.rpartition(".")[2].startswith("_")]
            else:
                continue
            for name in named:
                while name and name not in self.files:
                    name = name.rpartition(".")[0]
                if name:
                    yield name

    def on_no_floor_or_upwards(self) -> Iterator[str]:
        for module, imported in self.imports.items():
            room = _room(module)
            if room not in FLOOR:
                yield f"{module}: on no floor"
                continue
            for other in sorted(imported):
                if _room(other) != room and FLOOR.get(_room(other), -1) >= FLOOR[room]:
                    yield f"{module}: imports {other}"

    def circles(self) -> Iterator[str]:
        left = {name: set(imported) for name, imported in self.imports.items()}
        while True:
            try:
                TopologicalSorter(left).prepare()
                return
            except CycleError as error:
                circle = error.args[1][1:]
                yield f"{', '.join(sorted(circle))}: in a circle"
                for name in circle:
                    left[name] -= set(circle)

    def private_from_outside(self) -> Iterator[str]:
        for module, imported in self.imports.items():
            for other in sorted(imported):
                folder, _, name = other.rpartition(".")
                if name.startswith("_") and module != folder and not module.startswith(f"{folder}."):
                    yield f"{module}: imports {other}"

    def too_long(self) -> Iterator[str]:
        native = (file for file in (self.root / "csrc").rglob("*") if file.is_file())
        for file in (*self.files.values(), *native):
            if file.read_text(encoding="utf-8").count("\n") > LINES:
                yield f"{file.relative_to(self.root)}: over {LINES} lines"
        for module, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and _lines(node) > FUNCTION:
                    yield f"{module}.{node.name}: over {FUNCTION} lines"

    def docstrings_that_name_nothing(self) -> Iterator[str]:
        """Those that begin with neither a verb nor a noun phrase for the result."""
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for module, tree in self.trees.items():
            for node in (node for node in ast.walk(tree) if isinstance(node, documented)):
                if begins := NO_NAME.match(ast.get_docstring(node) or ""):
                    name = ".".join([module, *filter(None, [getattr(node, "name", None)])])
                    yield f"{name}: begins with {begins[0]}"


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    docstring = ast.get_docstring(function, clean=False)
    return function.end_lineno - function.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)


RULES = [House.on_no_floor_or_upwards, House.circles, House.private_from_outside, House.too_long]
RULES += [House.docstrings_that_name_nothing]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)


@pytest.fixture(scope="module")
def house():
    house = House(ROOT)
    assert {"sae_fast", "sae_fast.ops.encode", "sae_fast.kernels.encode"} <= set(house.files)
    return house


@rules
def test_the_house_stands(house, rule):
    assert set(rule(house)) == set()


PLANTED = {  # a module, and what the rules say of it
    "ops/upwards.py": ("def later():\n    from sae_fast import nn\n", ["sae_fast.ops.upwards: imports sae_fast.nn"]),
    "files.py": ("import sae_fast.code\n", ["sae_fast.files: imports sae_fast.code"]),
    "attic.py": ("", ["sae_fast.attic: on no floor"]),
    "data/a.py": (
        "if TYPE_CHECKING:\n    from sae_fast.data import b\n",
        ["sae_fast.data.a, sae_fast.data.b: in a circle"],
    ),
    "data/b.py": ("from .a import x\n", []),
    "cli/thief.py": ("from sae_fast.nn._drawer import key\n", ["sae_fast.cli.thief: imports sae_fast.nn._drawer"]),
    "nn/_drawer.py": ("key = 1\n", []),
    "nn/user.py": ("from sae_fast.nn._drawer import key\n", []),
    "nn/long.py": (
        "def long():\n    '''A\n    docstring.'''\n" + "    pass\n" * 60,
        ["sae_fast.nn.long.long: over 60 lines"],
    ),
    "nn/fits.py": ("def fits():\n    '''A\n    docstring.'''\n" + "    pass\n" * 59, []),
    "nn/endless.py": ("\n" * 401, ["sae_fast/nn/endless.py: over 400 lines"]),
    "interop/__init__.py": (
        "import pkgutil\nall = pkgutil.iter_modules(__path__)\n",
        ["sae_fast.interop, sae_fast.interop.found: in a circle"],
    ),
    "nn/vague.py": (
        "'''Whether.'''\nclass A:\n    '''A.'''\n    def b(self):\n        '''What b is.'''\n",
        ["sae_fast.nn.vague: begins with Whether", "sae_fast.nn.vague.b: begins with What"],
    ),
    "interop/found.py": ("from sae_fast.interop import all\n", []),
}


def test_every_fault_is_seen(tmp_path):
    for name, (source, _) in PLANTED.items():
        (tmp_path / "sae_fast" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sae_fast" / name).write_text(textwrap.dedent(source))
    for package in ("", "ops/", "data/", "nn/", "cli/"):
        (tmp_path / "sae_fast" / f"{package}__init__.py").touch()
    (tmp_path / "sae_fast" / "code.py").touch()
    house = House(tmp_path)
    said = sorted(complaint for rule in RULES for complaint in rule(house))
    assert said == sorted(complaint for _, complaints in PLANTED.values() for complaint in complaints)
