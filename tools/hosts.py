"""Checks of `make verify` for the machines that people really have: Python 3.12 and 3.13, Colab,
Binder, conda, one core with 2 GB.

Nothing here reaches Colab or Binder. What decides there is brought here: their versions, their way
of installing, their memory, Colab's Python. Binder runs on this Python, which the result says.

Another Python is looked for in QLORA_NB_PYTHON313 (a path), as `python3.13`, and among pyenv's
versions. Where there is none the check is skipped and says so. Each environment is made in a
folder of its own that is removed at the end, also after a failure: with a CUDA build of torch it
takes 6 GB.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from qlora_nb import machine

ROOT = Path(__file__).resolve().parent.parent
LIMIT_BYTES = 2_000_000_000
"""What a small shared host gives: Binder's 2 GB."""
SERVER_BYTES = 256 * 2**20
"""Of which JupyterLab itself, which runs beside the kernel, is left so much."""
COLAB_PYTHON = "3.13"
# Colab's own list (googlecolab/backend-info, pip-freeze.gpu.txt, 2026-08-19): what the kit needs of
# it and what that stands on, torch as PyPI has it. setuptools is left to this machine's index;
# bitsandbytes and papermill are not in Colab.
COLAB = """
accelerate==1.14.0 click==8.4.2 datasets==4.0.0 filelock==3.32.3 fsspec==2025.3.0
huggingface-hub==1.27.0 ipykernel==6.17.1 ipython==7.34.0 ipywidgets==7.7.1 jinja2==3.1.6
jupyter-client==7.4.9 jupyter-core==5.9.1 matplotlib==3.10.0 nbclient==0.10.4 nbconvert==7.17.1
nbformat==5.11.1 numpy==2.1.3 nvidia-ml-py==13.610.43 packaging==26.3 pandas==2.2.3 peft==0.20.0
pillow==11.3.0 protobuf==5.29.6 psutil==5.9.5 pyarrow==18.1.0 pydantic==2.13.4 pyyaml==6.0.3
pyzmq==26.2.1 regex==2025.11.3 requests==2.32.4 rich==13.9.4 safetensors==0.8.0
tokenizers==0.22.2 torch==2.11.0 tornado==6.5.7 tqdm==4.67.3 traitlets==5.7.1 transformers==5.15.0
typer==0.27.1 widgetsnbextension==3.6.10
""".split()
EXTRAS = "lab,smollm2,sweep,test"
TESTS = (
    "test_notebooks",
    "test_data",
    "test_training",
    "test_schema",
    "test_blockwise",
    "test_codebooks",
    "test_double_quant",
)
"""What is tested on another Python: notebooks, data, training, parameters and the quantizer."""
WIDGET_TESTS = ("test_panels", "test_quant_ui", "test_lora_paging_ui")


def python312() -> dict:
    """The pinned versions on Python 3.12: the whole sequence and the tests of what it rests on."""
    return pinned_on("3.12")


def python313() -> dict:
    """The pinned versions on Python 3.13: the whole sequence and the tests of what it rests on."""
    return pinned_on("3.13")


def pinned_on(version: str) -> dict:
    """What constraints.txt names, installed for this Python; then the sequence, and TESTS."""
    base = python_of(version)
    if base is None:
        return skipped_without(version)
    with tempfile.TemporaryDirectory(prefix=f"python{version}-") as name:
        folder = Path(name)
        kit = copy_of_the_kit(folder / "kit")
        python, pip = new_environment(folder / "venv", base)
        must([*pip, "-c", kit / "constraints.txt", "-e", f"{kit}[{EXTRAS}]"])
        torch = frozen(python)["torch"]
        result = sequence(python, kit, folder / "runs")
        files = [kit / "tests" / f"{test}.py" for test in TESTS]
        tests = call([python, "-m", "pytest", "-p", "no:cacheprovider", *files], cwd=kit)
    said = {"python": full_version(base), "torch": torch, "tests": closing_line(tests)}
    said["failed"] = re.findall(r"^FAILED (\S+)", tests.stdout, re.MULTILINE)
    return {**result, **said, "passed": result["passed"] and tests.returncode == 0}


def colab() -> dict:
    """The whole sequence and the widget tests with Colab's Python and versions, the kit installed
    as its first cell does.
    """
    base = python_of(COLAB_PYTHON)
    if base is None:
        return skipped_without(COLAB_PYTHON)
    with tempfile.TemporaryDirectory(prefix="colab-") as name:
        folder = Path(name)
        kit, content = copy_of_the_kit(folder / "kit"), folder / "content"
        python, pip = new_environment(folder / "venv", base)
        must([*pip, *COLAB])
        before = frozen(python)
        held = [f"{package}=={before[package]}\n" for package in ("torch", "numpy", "ipywidgets")]
        (folder / "keep.txt").write_text("".join(held))
        must([*pip, "-c", folder / "keep.txt", kit])
        after = frozen(python)
        replaced = [
            f"{p} {version} → {after.get(p)}"
            for p, version in before.items()
            if after.get(p) != version
        ]
        shutil.copytree(kit / "notebooks", content / "notebooks")  # all that a user has there
        result = sequence(python, content, folder / "runs")
        must([*pip, "pytest"])
        tests = call(
            [python, "-m", "pytest", *(kit / "tests" / f"{test}.py" for test in WIDGET_TESTS)],
            cwd=kit,
        )
    pythons = {"python": full_version(base), "torch": after["torch"]}
    added = {package: version for package, version in after.items() if package not in before}
    installed = {
        "versions": COLAB,
        "added_by_the_install": added,
        "replaced_by_the_install": replaced,
    }
    passed = result["passed"] and not replaced and tests.returncode == 0
    return {**result, "widget_tests": closing_line(tests), **pythons, **installed, "passed": passed}


def binder() -> dict:
    """What repo2docker would do with binder/, conda's part aside: install, postBuild, and whether a
    session fits.
    """
    declared = yaml.safe_load((ROOT / "binder" / "environment.yml").read_text())["dependencies"]
    (wanted,) = [item["pip"] for item in declared if isinstance(item, dict)]
    with tempfile.TemporaryDirectory(prefix="binder-") as name:
        folder = Path(name)
        kit = copy_of_the_kit(folder / "kit")
        python, pip = new_environment(folder / "venv")
        must([*pip, torch_here(), *wanted])  # there conda brings torch and numpy
        build = call(
            [kit / "binder" / "postBuild"],
            cwd=kit,
            env={"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"},
        )
        result = sequence(python, kit, folder / "runs")
    fits = result["peak_bytes"] + SERVER_BYTES <= LIMIT_BYTES
    said = (build.stdout + build.stderr).splitlines()[-3:]
    result |= {
        "post_build": build.returncode,
        "post_build_said": said,
        "fits_beside_the_server": fits,
    }
    result |= {
        "left_to_conda": [item for item in declared if isinstance(item, str)],
        "python": sys.version.split()[0],
    }
    return result | {"passed": result["passed"] and build.returncode == 0 and fits}


def conda() -> dict:
    """What conda is asked for in both environment files has a solution; nothing is installed."""
    for name in ("micromamba", "mamba", "conda"):
        program = shutil.which(name)
        if program is not None:
            break
    else:
        return {"passed": None, "skipped": "not solved here: no micromamba, mamba or conda"}
    said = {}
    passed = True
    for file in ("environment.yml", "binder/environment.yml"):
        command = [program, "env", "create"]
        if name == "micromamba":
            command = [program, "create", "--yes"]
        command += ["--dry-run", "--name", "qlora-nb-dry-run", "--file", ROOT / file]
        done = call(command)
        passed = passed and done.returncode == 0
        said[file] = (done.stdout + done.stderr)[-300:]
    return {"passed": passed, "solver": name, "said": said}


def one_core() -> dict:
    """The sequence on one core within 2 GB: under a cgroup's limit where one can be set, else by
    sampled resident memory.
    """
    core = min(os.sched_getaffinity(0))
    with (
        tempfile.TemporaryDirectory(prefix="one-core-") as name,
        memory_limit(LIMIT_BYTES) as (join, kind),
    ):

        def confine() -> None:
            os.sched_setaffinity(0, {core})
            join()

        too_much = [sys.executable, "-c", f"bytearray({LIMIT_BYTES + 100 * 2**20})"]
        enforced = bool(kind) and call(too_much, preexec_fn=confine).returncode != 0
        result = sequence(Path(sys.executable), ROOT, Path(name), preexec_fn=confine)
    how = (
        f"{kind}; a process that asked for more was killed"
        if enforced
        else "nothing: resident memory sampled 4 times a second"
    )
    result |= {"cores": 1, "limit_bytes": LIMIT_BYTES, "limited_by": how}
    return result | {"passed": result["passed"] and result["peak_bytes"] <= LIMIT_BYTES}


# ---- other Pythons


def python_of(version: str) -> str | None:
    """A Python of this version ("3.13") that can make environments; None if none is found.

    Raises:
        RuntimeError: QLORA_NB_PYTHON… names one that is not.
    """
    variable = f"QLORA_NB_PYTHON{version.replace('.', '')}"
    named = os.environ.get(variable)
    if named:
        if version_with_venv(named) != version:
            raise RuntimeError(f"{variable}={named} is not a Python {version} with venv")
        return named
    candidates = []
    on_path = shutil.which(f"python{version}")
    if on_path:
        candidates.append(on_path)
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates += sorted(map(str, root.glob(f"versions/{version}.*/bin/python{version}")))
    for candidate in candidates:
        if version_with_venv(candidate) == version:
            return candidate
    return None


def version_with_venv(python: str) -> str:
    """As "3.13", of a Python that has venv and brings pip; empty where there is no such Python."""
    program = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    with suppress(OSError):
        return call([python, "-c", program]).stdout.strip()
    return ""


def full_version(python: str) -> str:
    """As "3.13.0"."""
    return call([python, "-c", "import platform; print(platform.python_version())"]).stdout.strip()


def skipped_without(version: str) -> dict:
    """The result where this Python is not there: which one, and how to name it."""
    variable = f"QLORA_NB_PYTHON{version.replace('.', '')}"
    return {"passed": None, "skipped": f"no Python {version} here; {variable} can name one"}


# ---- what all share


def call(
    command: list, env: dict[str, str] | None = None, **options
) -> subprocess.CompletedProcess:
    """A finished process. Another Python is not given this one's PYTHONPATH, which would lead it to
    other code.
    """
    own = command[0] == sys.executable
    inherited = {name: value for name, value in os.environ.items() if own or name != "PYTHONPATH"}
    own_options = {"capture_output": True, "text": True, "timeout": 3600, **options}
    return subprocess.run(
        list(map(str, command)), env=inherited | (env or {}), check=False, **own_options
    )


def must(command: list) -> None:
    """The same, but it has to succeed."""
    done = call(command)
    if done.returncode:
        errors = [
            line
            for line in (done.stdout + done.stderr).splitlines()
            if not line.startswith("WARNING")
        ]
        raise RuntimeError(
            f"{' '.join(map(str, command[1:4]))} … failed: {' '.join(errors)[-600:]}"
        )


def new_environment(folder: Path, base: str = sys.executable) -> tuple[Path, list]:
    """Make an empty virtual environment of a Python; returns its own Python and the command that
    installs into it.
    """
    must([base, "-m", "venv", folder])
    python = folder / "bin" / "python"
    return python, [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        *shlex.split(os.environ.get("PIP_ARGS", "")),
    ]


def torch_here() -> str:
    """The release of torch that this environment has: one that is known to be in this machine's
    index.
    """
    return f"torch=={(machine.installed('torch') or '').split('+')[0]}"


def frozen(python: Path) -> dict[str, str]:
    """Package → version of an environment."""
    listed = json.loads(call([python, "-m", "pip", "list", "--format", "json"]).stdout)
    return {entry["name"].lower().replace("_", "-"): entry["version"] for entry in listed}


def copy_of_the_kit(folder: Path) -> Path:
    """What git knows of the working tree, in a folder of its own: an install writes beside its
    sources.
    """
    names = call(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT
    ).stdout.split("\0")
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def sequence(python: Path, cwd: Path, out: Path, **options) -> dict:
    """`qlora-nb run` with an environment's Python, judged by the summary it wrote."""
    done = call([str(python), "-m", "qlora_nb.cli", "run", "--out", out], cwd=cwd, **options)
    written = list(out.glob("tiny/sequence-*/summary.json"))
    if not written:
        return {"passed": False, "peak_bytes": 0, "said": (done.stdout + done.stderr)[-600:]}
    summary = json.loads(written[0].read_text())
    kept = ("notebook", "status", "wall_s", "peak_bytes", "problems")
    notebooks = [{key: outcome[key] for key in kept} for outcome in summary["notebooks"]]
    peak = max((notebook["peak_bytes"] for notebook in notebooks), default=0)
    passed = done.returncode == 0 and summary["status"] == "done"
    return {
        "passed": passed,
        "peak_bytes": peak,
        "sequence_s": summary["wall_s"],
        "notebooks": notebooks,
    }


def closing_line(done: subprocess.CompletedProcess) -> str:
    """pytest's last words: how many passed, in how long."""
    closing = [line for line in done.stdout.splitlines() if re.search(r" in [\d.]+s", line)]
    return closing[-1] if closing else (done.stdout + done.stderr)[-300:]


@contextmanager
def memory_limit(n_bytes: int) -> Iterator[tuple[Callable[[], None], str]]:
    """A memory cgroup below this process's own: a function that puts its caller into it, and its
    kind ("" if there is none).
    """
    group, kind = _new_cgroup(n_bytes)

    def join() -> None:
        if group:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield join, kind
    finally:
        if group:
            group.rmdir()


def _new_cgroup(n_bytes: int) -> tuple[Path | None, str]:
    """Version 1 and 2 of the kernel's interface; only root may make one, and not in every
    container.
    """
    files = {
        "memory": ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", n_bytes),
        "": ("memory.max", "memory.swap.max", 0),
    }
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controller, own = line.split(":", 2)
            group = (
                Path("/sys/fs/cgroup") / controller / own.lstrip("/") / f"qlora-nb-{os.getpid()}"
            )
            if controller not in files or not group.parent.is_dir():
                continue
            memory, swap, most_swap = files[controller]
            group.mkdir()
            try:
                (group / memory).write_text(str(n_bytes))
            except OSError:
                group.rmdir()
                continue
            with suppress(OSError):  # a kernel without accounting of swap
                (group / swap).write_text(str(most_swap))
            return group, f"cgroup {'v1' if controller else 'v2'} ({memory})"
    return None, ""
