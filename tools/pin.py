"""Write constraints.txt, environment.yml and binder/environment.yml: exact versions that this
environment was tested with.

    make pins        (after changing pyproject.toml and installing what it asks for)

Takes the closure of the kit's dependencies (with all extras) among the installed packages. Local
version suffixes are cut off, because `2.13.0+cpu` exists only as one build; no index address is
written, because pip's own configuration names the index.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
SET_UP = ("lab", "smollm2", "sweep", "test")
EXTRAS = (*SET_UP, "site")
AUDITED = ROOT / "docs" / "dependencies.md"
NOTES = ROOT / "tools" / "pin_notes.md"
"""Written by hand: what is not the newest and why, and which changes mattered."""
AUDIT_HEAD = (
    "# What the kit stands on\n\n"
    "Written by `tools/pin.py` on {date}, with Python {python}: the {n} packages of "
    "`constraints.txt`, as installed on that day.\n"
    "What was tried with them, on which Python and when, stands in `verified/`.\n"
    "To hold them against the known vulnerabilities, where their lists can be reached: "
    "`pip install pip-audit`, then\n"
    "`pip-audit -r constraints.txt --no-deps --disable-pip`. The result belongs to a day, so it "
    "is not kept here.\n\n"
)


def closure(package: str, extras: tuple[str, ...] = ()) -> dict[str, str]:
    """Canonical name → installed version of everything a package needs here, itself left out."""
    found: dict[str, str] = {}
    todo, seen = [(package, extras)], set()
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        distribution = importlib.metadata.distribution(name)
        found[canonicalize_name(name)] = distribution.version.split("+")[0]
        for line in distribution.requires or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in wanted or ("",)):
                todo.append(
                    (canonicalize_name(requirement.name), tuple(sorted(requirement.extras)))
                )
    del found[canonicalize_name(package)]
    return found


def newer_python_only(name: str) -> str:
    """A marker where this release does not support the oldest Python we do; pip then chooses an
    older release there.
    """
    wanted = SpecifierSet(importlib.metadata.metadata(name).get("Requires-Python") or "")
    first = next((f"3.11.{n}" for n in range(30) if wanted.contains(f"3.11.{n}")), "3.12")
    return "" if first == "3.11.0" else f' ; python_full_version >= "{first}"'


def direct(extras: tuple[str, ...]) -> list[str]:
    """Names that pyproject.toml asks for, with these extras, in its order."""
    lines = importlib.metadata.requires("qlora-nb") or []
    wanted = [Requirement(line) for line in lines]
    chosen = [
        r
        for r in wanted
        if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)
    ]
    return [canonicalize_name(r.name) for r in chosen]


def conda_file(name: str, why: str, conda: list[str], pip: list[str], kit: bool) -> str:
    """A conda environment: a few packages from conda-forge, the rest pinned from pip."""
    lines = [
        f"# Written by tools/pin.py. {why}",
        f"name: {name}",
        "channels: [conda-forge]",
        "dependencies:",
    ]
    lines += [f"  - {item}" for item in [*conda, "pip", "pip:"]]
    lines += [f"      - {item}" for item in pip]
    if kit:
        lines.append("      - -e .")
    return "\n".join(lines) + "\n"


def main() -> None:
    pins = closure("qlora-nb", EXTRAS)
    lines = []
    for name, version in sorted(pins.items()):
        lines.append(f"{name}=={version}{newer_python_only(name)}\n")
    head = (
        "# Written by tools/pin.py: exact versions the kit was tested with. "
        "pip install -c constraints.txt -e .\n"
    )
    CONSTRAINTS.write_text(head + "".join(lines), encoding="utf-8")
    head = AUDIT_HEAD.format(
        date=time.strftime("%Y-%m-%d"), n=len(pins), python=platform.python_version()
    )
    notes = NOTES.read_text(encoding="utf-8")
    listed = "".join(f"- {line}" for line in lines)
    AUDITED.write_text(f"{head}{notes}## All of them\n\n{listed}", encoding="utf-8")
    text = conda_file(
        "qlora-nb",
        "For a GPU: torch comes from pip, because its Linux wheel brings the CUDA libraries that "
        "bitsandbytes looks for.",
        conda=["python=3.12"],
        pip=[f"{name}=={pins[name]}" for name in direct(SET_UP)],
        kit=True,
    )
    (ROOT / "environment.yml").write_text(text, encoding="utf-8")
    by_conda = ("torch", "numpy")
    rest = [f"{name}=={pins[name]}" for name in direct(("lab",)) if name not in by_conda]
    text = conda_file(
        "qlora-nb-binder",
        "For Binder: no GPU and little memory, so torch without CUDA; postBuild installs the kit "
        "itself.",
        conda=["python=3.12", "pytorch-cpu>=2.6", "numpy>=1.26"],
        pip=rest,
        kit=False,
    )
    (ROOT / "binder" / "environment.yml").write_text(text, encoding="utf-8")
    print(f"{len(pins)} pins in {CONSTRAINTS.name}; both conda files written")


if __name__ == "__main__":
    main()
