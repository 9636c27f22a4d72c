"""pyproject.toml is the one source of dependencies; constraints and conda files must follow it, and Colab must satisfy it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("lab", "smollm2", "test")
# Read from Colab's published package list, 2026-08 (Python 3.13); bitsandbytes and papermill are not there.
COLAB = {
    "torch": "2.11.0",
    "transformers": "5.15.0",
    "peft": "0.20.0",
    "accelerate": "1.14.0",
    "datasets": "4.0.0",
    "huggingface-hub": "1.27.0",
    "numpy": "2.1.0",
    "ipywidgets": "7.7.1",
}
CONDA_NAMES = {"pytorch-cpu": "torch", "pytorch-gpu": "torch", "pytorch": "torch"}


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def _ranges(lines):
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines)}


@pytest.fixture(scope="module")
def core(project):
    return _ranges(project["dependencies"])


@pytest.fixture(scope="module")
def every(project, core):
    return core | {n: s for extra in EXTRAS for n, s in _ranges(project["optional-dependencies"][extra]).items()}


@pytest.fixture(scope="module")
def pins(root):
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        requirement = Requirement(line)
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), f"not one exact public version: {line}"
        found[canonicalize_name(requirement.name)] = str(requirement.specifier)[2:]
    assert len(found) == len(lines)
    return found


def test_every_dependency_is_pinned_within_its_range(every, pins, project):
    assert set(project["optional-dependencies"]) == set(EXTRAS)
    for name, specifier in every.items():
        assert name in pins, f"{name}: make pins"
        assert specifier.contains(pins[name]), f"{name} {pins[name]} is outside {specifier}: make pins"


def test_pins_are_complete_for_what_is_installed(pins):
    """The closure of the installed packages: what pip would bring along is pinned too."""
    from pin import closure

    missing = set(closure("qlora-nb", EXTRAS)) - set(pins)
    assert not missing, f"make pins: {missing}"


@pytest.mark.parametrize(("file", "extras"), [("environment.yml", EXTRAS), ("binder/environment.yml", ("lab",))])
def test_conda_files_follow(root, file, extras, project, core, pins):
    environment = yaml.safe_load((root / file).read_text())
    assert environment["channels"] == ["conda-forge"]
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    conda = [Requirement(re.sub(r"(?<![=<>!~])=(?!=)", "==", d)) for d in environment["dependencies"] if isinstance(d, str)]
    by_conda = {CONDA_NAMES.get(r.name, r.name): r.specifier for r in conda}
    assert str(by_conda.pop("python")) == "==3.12"
    del by_conda["pip"]
    by_pip = {canonicalize_name(r.name): str(r.specifier) for r in map(Requirement, (line for line in pip if line != "-e ."))}
    wanted = set(core) | {n for extra in extras for n in _ranges(project["optional-dependencies"][extra])}
    assert set(by_conda) | set(by_pip) == wanted
    assert not set(by_conda) & set(by_pip)
    for name, specifier in by_pip.items():
        assert specifier == f"=={pins[name]}", f"{file}: {name}: make pins"
    for name, specifier in by_conda.items():
        assert str(specifier) == str(core[name]), f"{file}: {name} must say {core[name]}"


def test_binder_is_ready_to_build(root):
    post = root / "binder" / "postBuild"
    assert post.stat().st_mode & 0o111, "repo2docker needs the run bit"
    assert "\nset -e" in post.read_text()
    assert "pytorch-cpu" in (root / "binder" / "environment.yml").read_text()


@pytest.mark.parametrize(("name", "version"), COLAB.items())
def test_colabs_versions_satisfy_the_metadata(name, version, core):
    assert core[name].contains(version)


def test_pythons(project):
    specifier = Requirement(f"x{project['requires-python']}").specifier
    assert [v for v in ("3.10.9", "3.11.0", "3.12.0", "3.13.9", "3.14.0") if specifier.contains(v)] == [
        "3.11.0",
        "3.12.0",
        "3.13.9",
    ]


def test_every_import_is_a_declared_dependency(root, core, every):
    """A package that only comes along with another one can go away with it."""
    modules = {"yaml": "pyyaml", "pynvml": "nvidia-ml-py", "IPython": "ipykernel"}  # ipykernel cannot be without IPython
    allowed_late = {"gguf"}
    for path in sorted((root / "qlora_nb").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"qlora_nb", "__future__"}:
                package = canonicalize_name(modules.get(name, name))
                assert package in core or name in allowed_late, f"{path.name} imports {name}, which pyproject.toml does not name"


def test_no_address_of_an_index_and_no_path_of_a_machine(root):
    files = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False).stdout.split("\n")
    words = [
        "pypi" + ".org",
        "python" + "hosted",
        "index" + "-url",
        "find" + "-links",
        "download.py" + "torch.org",
        "/work/" + "main",
    ]
    for name in filter(None, files):
        path = root / name
        if path.suffix in {".safetensors", ".png"} or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        assert not [w for w in words if w in text], name


def test_make_knows_its_names(root):
    """`make -n` walks every target without doing anything."""
    for target in ("run", "test", "lab", "verify", "notebooks", "check", "pins"):
        done = subprocess.run(["make", "-n", target], cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
