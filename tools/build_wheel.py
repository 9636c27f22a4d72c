"""Build the kit's wheel: one file with all that the notebooks need, to be uploaded where there is
no repository to install from, as in Colab.

    python tools/build_wheel.py            into dist/
    python tools/build_wheel.py FOLDER     into another folder

Where setuptools is installed here, no package index is asked.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 10_000_000
"""Larger than this takes too long to upload in a lesson."""
SETUPTOOLS = "77"
"""From here on setuptools reads pyproject.toml as it is written, and needs no other package."""


def build(target: Path) -> Path:
    """Build the wheel into `target`, where it is then the only one of the kit; returns its path.

    Raises:
        RuntimeError: pip could not build it, or it is not what it should be.
    """
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("qlora_nb-*.whl"):
        old.unlink()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    if setuptools_is_here():
        command += ["--no-build-isolation", "--no-index"]
    with tempfile.TemporaryDirectory() as folder:
        # a copy: setuptools would leave a build folder here, and find modules there that are gone
        sources = Path(folder) / "kit"
        sources.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, sources)
        left_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "qlora_nb", sources / "qlora_nb", ignore=left_out)
        command += ["--wheel-dir", str(target), str(sources)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip could not build the wheel: {done.stderr[-600:]}")
    [wheel] = target.glob("qlora_nb-*.whl")
    problems = problems_of(wheel)
    if problems:
        raise RuntimeError(f"{wheel.name}: {'; '.join(problems)}")
    return wheel


def setuptools_is_here() -> bool:
    try:
        return Version(version("setuptools")) >= Version(SETUPTOOLS)
    except PackageNotFoundError:
        return False


def problems_of(wheel: Path) -> list[str]:
    """What is wrong with a wheel: its size, what is missing in it, what does not belong there."""
    problems = []
    size = wheel.stat().st_size
    if size > MAX_BYTES:
        problems.append(f"{size:,} bytes, at most {MAX_BYTES:,}")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    wanted = set()
    for path in (ROOT / "qlora_nb").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            wanted.add(path.relative_to(ROOT).as_posix())
    missing = sorted(wanted - packed)
    if missing:
        problems.append(f"not in it: {', '.join(missing)}")
    foreign = sorted(name for name in packed - wanted if ".dist-info/" not in name)
    if foreign:
        problems.append(f"does not belong in it: {', '.join(foreign)}")
    return problems


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist"
    wheel = build(target)
    print(f"{wheel} ({wheel.stat().st_size / 1e6:.1f} MB)")
    print(
        "In Colab: open a notebook, upload this file into its folder (Files, on the left) or into "
        "your Drive, and run the first cell."
    )


if __name__ == "__main__":
    main()
