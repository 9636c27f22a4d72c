"""The package is a house of rooms: each imports from those before it, and no two modules import
each other in a circle.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ORDER = (
    *("errors", "pythia", "cards", "processes", "machine", "pocket", "progress", "sources"),
    *("recorded", "spellings", "settings", "theory", "record", "model", "memory", "answer"),
    *("train", "batch", "ui", "lessons", "cli"),
)


def imports_of(package: Path) -> dict[str, set[str]]:
    """Module → the modules of the package it imports, inside functions too; the package itself is
    the module "".
    """
    name = package.name
    sources = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        sources[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    found = {}
    for module, path in sources.items():
        own_package = [name, *module.split(".")] if module else [name]
        if path.name != "__init__.py":
            own_package.pop()
        written = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                written |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                start = node.module or ""
                if node.level:
                    above = own_package[: len(own_package) - node.level + 1]
                    start = ".".join([*above, start]).removesuffix(".")
                written.add(start)
                written |= {f"{start}.{alias.name}" for alias in node.names}
        inside = {target for target in written if target.split(".")[0] == name}
        targets = {target.removeprefix(name).removeprefix(".") for target in inside}
        found[module] = {target for target in targets if target in sources} - {module, ""}
    return found


def upward(imports: dict[str, set[str]], order: tuple[str, ...]) -> list[str]:
    """Every import of a room that comes later, and every room without a place in the order."""
    wrong = []
    for module, targets in sorted(imports.items()):
        room = module.split(".")[0]
        if module and room not in order:
            wrong.append(f"{room} has no place")
            continue
        for target in sorted(targets):
            later = target.split(".")[0]
            if not module or later not in order or order.index(later) > order.index(room):
                wrong.append(f"{module or 'the package'} imports {target}")
    return wrong


def circles(imports: dict[str, set[str]]) -> list[str]:
    """The modules that reach themselves by following imports."""
    found = []
    for module in sorted(imports):
        reached = set()
        todo = set(imports[module])
        while todo:
            one = todo.pop()
            reached.add(one)
            todo |= imports[one] - reached
        if module in reached:
            found.append(module)
    return found


def test_no_import_goes_upward_and_none_in_a_circle(root):
    imports = imports_of(root / "qlora_nb")
    assert len(imports) > 50, "the whole package was read"
    assert {module.split(".")[0] for module in imports} - {""} == set(ORDER)
    assert upward(imports, ORDER) == []
    assert circles(imports) == []


@pytest.fixture
def toy_package(tmp_path):
    """A package `house` of two rooms, low and high, in which all is well."""
    files = {
        "__init__.py": "",
        "low/__init__.py": "",
        "low/a.py": "import os\n",
        "low/b.py": "from house.low import a\n",
        "high.py": "def f():\n    from house.low import a, b\n    import house.low.b\n",
    }
    for name, text in files.items():
        path = tmp_path / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "house"


def test_the_toy_package_is_read_as_it_is_written(toy_package):
    imports = imports_of(toy_package)
    assert imports == {
        "": set(),
        "low": set(),
        "low.a": set(),
        "low.b": {"low", "low.a"},
        "high": {"low", "low.a", "low.b"},
    }
    assert upward(imports, ("low", "high")) == []
    assert circles(imports) == []


@pytest.mark.parametrize(
    "line",
    [
        "import house.high",
        "from house import high",
        "from house.high import f",
        "from .. import high",
        "from ..high import f",
        "def f():\n    from house import high",
        "if False:\n    import house.high as h",
    ],
)
def test_a_planted_upward_import_is_found(toy_package, line):
    (toy_package / "low" / "a.py").write_text(line)
    imports = imports_of(toy_package)
    assert upward(imports, ("low", "high")) == ["low.a imports high"]
    assert circles(imports) == ["high", "low.a", "low.b"]


@pytest.mark.parametrize("line", ["from house.low import b", "from . import b", "from .b import x"])
def test_a_planted_circle_within_a_room_is_found(toy_package, line):
    (toy_package / "low" / "a.py").write_text(f"def f():\n    {line}")
    imports = imports_of(toy_package)
    assert upward(imports, ("low", "high")) == []
    assert circles(imports) == ["low.a", "low.b"]


def test_a_planted_room_and_an_import_of_the_package_itself_are_found(toy_package):
    (toy_package / "cellar.py").write_text("")
    (toy_package / "__init__.py").write_text("from house import high")
    imports = imports_of(toy_package)
    assert upward(imports, ("low", "high")) == ["the package imports high", "cellar has no place"]


def test_importing_every_module_says_nothing():
    """torch's builder of C++ extensions, which `torch.utils.benchmark` loads, writes to stderr where
    a CUDA build of torch finds no card.
    """
    program = """
        import importlib, pkgutil, sys
        import qlora_nb
        for module in pkgutil.walk_packages(qlora_nb.__path__, "qlora_nb."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        print("torch" in sys.modules, "torch.utils.cpp_extension" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "False"]
    assert done.stderr == ""


def test_importing_the_package_loads_no_torch_and_changes_what_it_says():
    """Environment variables, loggers: no more than the docstring names."""
    program = """
        import logging, os, sys
        for name in ("OMP_WAIT_POLICY", "TORCH_CPP_LOG_LEVEL", "KINETO_LOG_LEVEL"):
            os.environ.pop(name, None)
        before, known = dict(os.environ), set(logging.root.manager.loggerDict)
        import qlora_nb
        changed = {name for name, value in os.environ.items() if before.get(name) != value}
        loggers = {
            name for name, logger in logging.root.manager.loggerDict.items()
            if name not in known and isinstance(logger, logging.Logger)
        }
        assert "torch" not in sys.modules
        assert not {name for name in sys.modules if name.startswith("qlora_nb.")}
        assert len(changed) == 3 and len(loggers) == 1, (changed, loggers)
        for name in changed | loggers:
            assert f"`{name}`" in qlora_nb.__doc__, name
    """
    lines = [line.removeprefix(" " * 8) for line in program.splitlines()]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_docstring_names_every_room_in_order(root):
    docstring = ast.get_docstring(ast.parse((root / "qlora_nb" / "__init__.py").read_text()))
    places = [docstring.index(f"`{room}`") for room in ORDER]
    assert places == sorted(places)


def test_what_somebody_wrote_becomes_a_path_in_sources_alone(root):
    using = []
    for path in sorted((root / "qlora_nb").rglob("*.py")):
        if "expanduser" in path.read_text(encoding="utf-8"):
            using.append(path.name)
    assert using == ["sources.py"]
