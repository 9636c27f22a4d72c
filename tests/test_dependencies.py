"""pyproject.toml is the one source of dependencies; constraints and conda files must follow it, and
Colab must satisfy it.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from qlora_nb import cli

SET_UP = ("lab", "smollm2", "sweep", "test")
"""What `make setup` installs, and every check before a merge has."""
EXTRAS = (*SET_UP, "site")
# Read from Colab's published package list, 2026-08 (Python 3.13); bitsandbytes and papermill are
# not there.
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
    return core | {
        n: s
        for extra in EXTRAS
        for n, s in _ranges(project["optional-dependencies"][extra]).items()
    }


@pytest.fixture(scope="module")
def pins(root):
    lines = [
        line
        for line in (root / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    found = {}
    for line in lines:
        requirement = Requirement(line)
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), (
            f"not one exact public version: {line}"
        )
        found[canonicalize_name(requirement.name)] = str(requirement.specifier)[2:]
    assert len(found) == len(lines)
    return found


def test_every_dependency_is_pinned_within_its_range(every, pins, project):
    assert set(project["optional-dependencies"]) == set(EXTRAS)
    for name, specifier in every.items():
        assert name in pins, f"{name}: make pins"
        assert specifier.contains(pins[name]), (
            f"{name} {pins[name]} is outside {specifier}: make pins"
        )


def test_set_up_installs_these_extras_and_the_site_its_own(root):
    makefile = (root / "Makefile").read_text()
    installed = re.findall(r'-e "\.\[([\w,]+)\]"', makefile)
    assert installed == [",".join(SET_UP), "site"]


@pytest.mark.parametrize("extras", [SET_UP, ("site",)], ids=["make setup", "make site"])
def test_pins_are_complete_for_what_is_installed(pins, extras):
    """The closure of the installed packages: what pip would bring along is pinned too."""
    from pin import closure

    if extras == ("site",):
        pytest.importorskip("sphinx", reason="make site installs it")
    missing = set(closure("qlora-nb", extras)) - set(pins)
    assert not missing, f"make pins: {missing}"


def test_what_is_said_of_the_pins_is_said_of_these(root, pins):
    """The page lists them all, holds the notes, and the notes speak of the versions that are
    pinned.
    """
    page = (root / "docs" / "dependencies.md").read_text()
    assert re.search(r"on 20\d\d-\d\d-\d\d, with Python 3\.11\.", page)
    assert f"the {len(pins)} packages" in page
    notes = (root / "tools" / "pin_notes.md").read_text()
    assert notes in page, "make pins"
    listed = page.split("## All of them")[1]
    assert dict(re.findall(r"^- ([\w-]+)==([\w.]+)", listed, re.MULTILINE)) == pins
    named = re.findall(r"\b([a-z-]+)==([\w.]*\w)", notes)
    assert {name for name, _ in named} >= {"torch", "transformers"}
    for name, version in named:
        assert pins[name] == version, f"{name}: tools/pin_notes.md speaks of {version}"


def conda_drift(root, project, pins) -> list[str]:
    """What the two conda files say that pyproject.toml and constraints.txt do not, and the other
    way round.
    """
    found, core = [], _ranges(project["dependencies"])
    for file, extras in (("environment.yml", SET_UP), ("binder/environment.yml", ("lab",))):
        environment = yaml.safe_load((root / file).read_text())
        (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
        conda = [
            Requirement(re.sub(r"(?<![=<>!~])=(?!=)", "==", d))
            for d in environment["dependencies"]
            if isinstance(d, str)
        ]
        by_conda = {CONDA_NAMES.get(r.name, r.name): str(r.specifier) for r in conda}
        by_pip = {
            canonicalize_name(r.name): str(r.specifier)
            for r in map(Requirement, (p for p in pip if p != "-e ."))
        }
        if environment["channels"] != ["conda-forge"]:
            found.append(f"{file}: channels {environment['channels']}")
        if (pinned := by_conda.pop("python", "")) != "==3.12":
            found.append(f"{file}: python {pinned}")
        if by_conda.pop("pip", None) is None:
            found.append(f"{file}: no pip")
        if ("-e ." in pip) != (file == "environment.yml"):
            found.append(f"{file}: the kit itself")
        wanted = set(core) | {
            n for extra in extras for n in _ranges(project["optional-dependencies"][extra])
        }
        found += [
            f"{file}: {name} is missing or too much"
            for name in (set(by_conda) | set(by_pip)) ^ wanted
        ]
        found += [f"{file}: {name} twice" for name in set(by_conda) & set(by_pip)]
        found += [
            f"{file}: {n}{said}, pinned is {pins.get(n)}"
            for n, said in by_pip.items()
            if said != f"=={pins.get(n)}"
        ]
        found += [
            f"{file}: {n}{said}, asked for is {core.get(n)}"
            for n, said in by_conda.items()
            if said != str(core.get(n))
        ]
    return found


def read_pins(root) -> dict[str, str]:
    """Package → version of constraints.txt."""
    lines = [
        line
        for line in (root / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    return {canonicalize_name(r.name): str(r.specifier)[2:] for r in map(Requirement, lines)}


def test_conda_files_follow(root, project, pins):
    assert conda_drift(root, project, pins) == []


def from_conda(file: Path) -> set[str]:
    """The names that a conda environment does not leave to pip."""
    listed = yaml.safe_load(file.read_text())["dependencies"]
    return {re.match(r"[\w-]+", item)[0] for item in listed if isinstance(item, str)}


def test_conda_brings_four_packages_and_pip_the_rest(root, tmp_path):
    """Conda's bitsandbytes or transformers would be other builds than the pinned ones, and its
    solution of everything could not be tried here.
    """
    assert from_conda(root / "environment.yml") == {"python", "pip"}
    binder = root / "binder" / "environment.yml"
    assert from_conda(binder) == {"python", "pip", "pytorch-cpu", "numpy"}
    moved = re.sub(r"      - (pandas\S+)\n", "", binder.read_text())
    planted = tmp_path / "environment.yml"
    planted.write_text(moved.replace("  - pip\n", "  - pandas>=2.2\n  - pip\n"))
    assert "pandas" in from_conda(planted)


DRIFTS = {
    "a dependency more in the metadata": (
        "pyproject.toml",
        '    "jinja2>=3.1",',
        '    "jinja2>=3.1",\n    "einops>=0.8",',
    ),
    "one less in the metadata": ("pyproject.toml", '    "jinja2>=3.1",\n', ""),
    "another range of what conda brings": ("pyproject.toml", '"numpy>=1.26"', '"numpy>=2.0"'),
    "another pin": ("constraints.txt", r"peft==[\d.]+", "peft==0.20.0"),
    "a pin less": ("constraints.txt", r"peft==[\d.]+\n", ""),
    "a version only in the conda file": ("environment.yml", r"peft==[\d.]+", "peft==0.20.0"),
    "a package only in the conda file": (
        "environment.yml",
        "      - -e .",
        "      - einops==0.8.0\n      - -e .",
    ),
    "the kit left out": ("environment.yml", "      - -e .\n", ""),
    "another Python": ("environment.yml", "python=3.12", "python=3.10"),
    "another channel": ("environment.yml", "channels: .*", "channels: [defaults]"),
    "a version only in Binder's file": ("binder/environment.yml", r"peft==[\d.]+", "peft==0.20.0"),
    "a package missing in Binder's file": ("binder/environment.yml", r"      - peft==[\d.]+\n", ""),
    "Binder's Python not pinned": ("binder/environment.yml", "python=3.12", "python"),
    "Binder's torch from elsewhere": ("binder/environment.yml", "  - pytorch-cpu>=2.6\n", ""),
    "Binder's numpy twice": (
        "binder/environment.yml",
        "      - pandas",
        "      - numpy==2.4.6\n      - pandas",
    ),
}


@pytest.mark.parametrize("drift", DRIFTS)
def test_a_drift_in_any_of_the_four_files_is_found(root, tmp_path, drift):
    for file in ("pyproject.toml", "constraints.txt", "environment.yml", "binder/environment.yml"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(root / file, tmp_path / file)
    changed, before, after = DRIFTS[drift]
    text, n = re.subn(before, after, (tmp_path / changed).read_text())
    assert n == 1
    (tmp_path / changed).write_text(text)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    assert conda_drift(tmp_path, project, read_pins(tmp_path))


REPO2DOCKER = {"environment.yml", "postBuild"}
"""What repo2docker finds in binder/; apt.txt, requirements.txt, start and the like would be obeyed
too if they were there.
"""


def test_binder_is_ready_to_build(root):
    """repo2docker reads binder/ alone, so nothing may lie there by accident; postBuild must run and
    end at the first failure.
    """
    assert {path.name for path in (root / "binder").iterdir()} == REPO2DOCKER
    listed = subprocess.run(
        ["git", "ls-files", "-s", "binder"], cwd=root, capture_output=True, text=True, check=False
    ).stdout
    if listed:  # a copy without git has no modes to compare
        assert re.search(r"^100755 .*binder/postBuild$", listed, re.MULTILINE), (
            "the run bit must be committed"
        )
    post = root / "binder" / "postBuild"
    assert post.stat().st_mode & 0o111, "repo2docker needs the run bit"
    subprocess.run(["bash", "-n", str(post)], check=True)
    first, *lines = post.read_text().splitlines()
    assert first == "#!/usr/bin/env bash"
    commands = [line.split() for line in lines if line and not line.startswith("#")]
    assert commands[0] == ["set", "-e"]
    programs = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    for command in commands[1:]:
        assert shutil.which(command[0], path=programs), command
        assert "--no-deps" in command or command[0] != "python", "what conda brought stays"
    options = typer.main.get_command(cli.app).commands
    assert all(command[1] in options for command in commands if command[0] == "qlora-nb")


def test_the_long_check_installs_the_same_colab():
    """tools/hosts.py installs these versions and runs everything; here they are held against the
    metadata.
    """
    import hosts

    full = {r.name: str(r.specifier)[2:] for r in map(Requirement, hosts.COLAB)}
    for name, version in COLAB.items():
        if name != "torch":
            assert full[name].rsplit(".", 1)[0] == version.rsplit(".", 1)[0], name


@pytest.mark.parametrize(("name", "version"), COLAB.items())
def test_colabs_versions_satisfy_the_metadata(name, version, core):
    assert core[name].contains(version)


def test_every_colab_version_the_kit_asks_for_satisfies_it(core):
    import hosts

    for requirement in map(Requirement, hosts.COLAB):
        name = canonicalize_name(requirement.name)
        assert name not in core or core[name].contains(str(requirement.specifier)[2:]), requirement


def test_ruff_reads_the_oldest_python_that_is_allowed(root, project):
    ruff = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["ruff"]
    oldest = re.search(r">=3\.(\d+)", project["requires-python"])[1]
    assert ruff["target-version"] == f"py3{oldest}"


def test_pythons(project):
    specifier = Requirement(f"x{project['requires-python']}").specifier
    assert [
        v for v in ("3.10.9", "3.11.0", "3.12.0", "3.13.9", "3.14.0") if specifier.contains(v)
    ] == [
        "3.11.0",
        "3.12.0",
        "3.13.9",
    ]


def test_every_import_is_a_declared_dependency(root, core, every):
    """A package that only comes along with another one can go away with it."""
    modules = {
        "yaml": "pyyaml",
        "pynvml": "nvidia-ml-py",
        "IPython": "ipykernel",
    }  # ipykernel cannot be without IPython
    allowed_late = {"gguf", "optuna", "sqlalchemy"}
    for path in sorted((root / "qlora_nb").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += (
                [node.module]
                if isinstance(node, ast.ImportFrom) and node.module and not node.level
                else []
            )
            for name in (
                {n.split(".")[0] for n in names}
                - set(sys.stdlib_module_names)
                - {"qlora_nb", "__future__"}
            ):
                package = canonicalize_name(modules.get(name, name))
                assert package in core or name in allowed_late, (
                    f"{path.name} imports {name}, which pyproject.toml does not name"
                )


def test_no_address_of_an_index_and_no_path_of_a_machine(root):
    files = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.split("\n")
    words = [
        "pypi" + ".org",
        "python" + "hosted",
        "index" + "-url",
        "find" + "-links",
        "download.py" + "torch.org",
    ]
    words += [f"{folder}{os.sep}" for folder in (root, Path.home()) if folder.parent != folder]
    for name in filter(None, files):
        path = root / name
        if path.suffix in {".safetensors", ".png"} or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        assert not [w for w in words if w in text], name


def test_make_knows_its_names(root):
    """`make -n` walks every target without doing anything."""
    for target in ("run", "test", "lab", "verify", "site", "notebooks", "check", "pins"):
        done = subprocess.run(
            ["make", "-n", target], cwd=root, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, "there is no python-of-mine here. Install Python 3.11, 3.12 or 3.13"),
        (
            'case "$2" in *version_info*) exec {python} -c "import sys; sys.version_info = (3, 9, 1); $2";; esac',
            "is 3.9",
        ),
        ('case "$2" in *ensurepip*) exit 1;; esac', "comes without venv"),
        ('case "$*" in *pip\\ install*) exit 1;; esac', "pip could not install what the kit needs"),
    ],
)
def test_a_set_up_that_cannot_be_says_why(root, tmp_path, script, words):
    """`make` on a machine without the right Python, without venv, without network: one sentence,
    and no half set-up is kept.
    """
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, tmp_path / name)
    if script is not None:
        python = tmp_path / "python-of-mine"
        made = (
            'case "$*" in *"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; exit 0;; esac'
        )
        python.write_text(
            "\n".join(
                [
                    "#!/bin/sh",
                    script.replace("{python}", sys.executable),
                    made,
                    f'exec {sys.executable} "$@"',
                ]
            )
        )
        python.chmod(0o755)
    search = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["make", "setup", "PYTHON=python-of-mine"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | search, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / ".venv" / ".installed").exists()


def fake_python(folder: Path, name: str, version: str) -> None:
    """A program that says it is this version of Python, makes an environment of itself and installs
    nothing.
    """
    major, minor = version.split(".")
    told = f"import sys; sys.version_info = ({major}, {minor}, 0); "
    lines = [
        "#!/bin/sh",
        f'case "$2" in *version_info*) exec {sys.executable} -c "{told}$2";; esac',
        'case "$*" in *"-m venv"*)',
        '  rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; exit 0;; esac',
        'case "$*" in "-m pip"*) exit 0;; esac',
        f'exec {sys.executable} "$@"',
    ]
    program = folder / name
    program.write_text("\n".join(lines))
    program.chmod(0o755)


def test_another_python_is_not_ignored_for_the_environment_that_is_there(root, tmp_path):
    """Naming another version makes .venv anew and says so; naming the same, or none, leaves it; one
    that is not there or cannot be used is refused, and the environment stays.
    """
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, tmp_path / name)
    for version in ("3.9", "3.12", "3.13"):
        fake_python(tmp_path, f"python-{version}", version)
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"} | path

    def make(*arguments: str, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["make", "setup", *arguments],
            cwd=tmp_path,
            env=environment | more,
            capture_output=True,
            text=True,
            check=False,
        )

    def version_of_environment() -> str:
        found = re.search(
            r"version_info = \((\d), (\d+)", (tmp_path / ".venv/bin/python").read_text()
        )
        return f"{found[1]}.{found[2]}"

    first = make("PYTHON=python-3.12")
    assert first.returncode == 0, first.stderr
    assert "anew" not in first.stdout
    assert version_of_environment() == "3.12"
    for same in (make("PYTHON=python-3.12"), make()):
        assert same.returncode == 0, same.stderr
        assert "installing" not in same.stdout
        assert "anew" not in same.stdout
    for refused, words in (("python-3.9", "is 3.9"), ("python-3.99", "there is no python-3.99")):
        done = make(f"PYTHON={refused}")
        assert done.returncode != 0
        assert words in done.stderr
        assert version_of_environment() == "3.12"
        assert (tmp_path / ".venv" / ".installed").exists()
    for done in (make("PYTHON=python-3.13"), make(PYTHON="python-3.12")):
        assert done.returncode == 0, done.stderr
        assert re.search(
            r"\.venv has Python (3\.\d+), python-(?!\1)\S+ is (?!\1)3\.\d+", done.stdout
        )
        assert "installing into .venv" in done.stdout
    assert version_of_environment() == "3.12"
