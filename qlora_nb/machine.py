"""What this machine is and what it can run, found out before anything heavy.

A notebook that asks for pythia-12b on a laptop must be told so in two seconds, before any download.
So only what answers at once is asked: psutil for memory and disk, the packages' metadata for their
versions, and torch for the GPUs only where there seems to be one (`cards`).
"""

import importlib.metadata
import os
import platform
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from qlora_nb import cards, processes


@dataclass(frozen=True)
class Machine:
    """CPU, memory, disk and GPUs of this machine; sizes in bytes.

    `gpus` are the cards that torch sees, the one that is used first; empty if that one cannot be
    used. If there is none although the driver shows a card, `gpu_problem` says why and `gpu_remedy`
    what to do.
    """

    cpu: str
    n_cores: int
    ram_bytes: int
    ram_free_bytes: int
    disk_free_bytes: int
    gpus: tuple[cards.Gpu, ...]
    python: str = platform.python_version()
    system: str = f"{platform.system()} {platform.machine()}"
    gpu_problem: str = ""
    gpu_remedy: str = ""


def this_machine(folder: str | Path = ".") -> Machine:
    """Look at this machine; `folder` is where the disk is measured."""
    memory = psutil.virtual_memory()
    n_cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # a container may leave fewer
        n_cores = len(os.sched_getaffinity(0))
    found = gpus()
    problem = remedy = ""
    if not found:
        problem, remedy = cards.why_none()
    return Machine(
        cpu=_cpu_name(),
        n_cores=n_cores,
        ram_bytes=memory.total,
        ram_free_bytes=memory.available,
        disk_free_bytes=shutil.disk_usage(folder).free,
        gpus=found,
        gpu_problem=problem,
        gpu_remedy=remedy,
    )


def describe(here: Machine) -> dict[str, str]:
    """The machine as a table: what it is → how much of it (sizes in GiB)."""

    def gib(n_bytes: int) -> str:
        return f"{n_bytes / cards.GIB:.1f} GiB"

    used = card(here)
    if used:
        sizes = f"{gib(used.total_bytes)}, {gib(used.free_bytes)} free"
        bf16 = "with bfloat16" if used.has_bf16 else "without bfloat16"
        gpu = f"{used.name}, {sizes}, {bf16}"
    else:
        none = "none found"
        if here.gpu_problem:
            none = f"none that can be used: {here.gpu_problem}"
        gpu = f"{none}: profiles tiny and smollm2 run on the CPU"
    table = {
        "processor": f"{here.cpu}, {here.n_cores} cores",
        "memory": f"{gib(here.ram_bytes)}, {gib(here.ram_free_bytes)} free",
        "disk": f"{here.disk_free_bytes / cards.GIB:.0f} GiB free",
        "GPU": gpu,
    }
    if len(here.gpus) > 1:
        others = ", ".join(other.name for other in here.gpus[1:])
        table["other GPUs"] = f"{others}: not used; CUDA_VISIBLE_DEVICES chooses the card"
    table["Python"] = f"{here.python} on {here.system}"
    return table


def gpus() -> tuple[cards.Gpu, ...]:
    """The cards that can be computed on, cuda:0 first; empty where torch sees none, or where cuda:0
    is one that cannot be.
    """
    seen = cards.visible()
    if seen and seen[0].problem:
        return ()
    return tuple(seen)


def card(here: Machine | None = None) -> cards.Gpu | None:
    """The one card that this process computes on, torch's cuda:0 unless it is one of several; None
    without one. CUDA_VISIBLE_DEVICES chooses another.
    """
    found = here.gpus if here else gpus()
    return found[processes.card()] if found else None


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Version:
    """One dependency: what is installed, what the kit's metadata allows, what is loaded in this
    process.
    """

    package: str
    installed: str | None
    allowed: str
    loaded: str | None

    @property
    def problem(self) -> str:
        """Empty if all is well, else one line with the remedy."""
        install = f"pip install '{self.package}{self.allowed}'"
        if self.installed is None:
            return f"not installed: {install}"
        if self.loaded and self.loaded.split("+")[0] != self.installed.split("+")[0]:
            return (
                f"{self.loaded} is loaded but {self.installed} is installed: restart the kernel "
                "(Colab: restart the runtime)"
            )
        if not SpecifierSet(self.allowed).contains(self.installed, prereleases=True):
            return f"outside {self.allowed}: {install}"
        return ""


def installed(package: str) -> str | None:
    """A package's installed version; None if it is not there."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def versions() -> list[Version]:
    """Every dependency in the kit's metadata with what is installed and loaded here."""
    found = []
    for line in importlib.metadata.requires("qlora-nb") or []:
        needed = Requirement(line)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        module = sys.modules.get(needed.name.replace("-", "_"))
        version = Version(
            package=needed.name,
            installed=installed(needed.name),
            allowed=str(needed.specifier),
            loaded=getattr(module, "__version__", None),
        )
        found.append(version)
    return found
