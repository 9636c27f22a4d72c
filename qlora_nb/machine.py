"""What this machine is and what it can run, found out without importing torch.

A notebook that asks for pythia-12b on a laptop must be told so in two seconds, before any download:
the driver's own library (NVML) tells the GPUs, psutil the memory, the package metadata the
versions, one short connection attempt whether the hub can be reached.
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

from qlora_nb import cards


@dataclass(frozen=True)
class Machine:
    """CPU, memory, disk and GPUs of this machine; sizes in bytes.

    `gpus` are those that torch can use, the one that is used first. If there is none of them
    although the driver shows a card, `gpu_problem` says why and `gpu_remedy` what to do.
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
    memory, found = psutil.virtual_memory(), gpus()
    problem, remedy = ("", "") if found else cards.why_none()
    return Machine(
        cpu=_cpu_name(),
        n_cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else (os.cpu_count() or 1),
        ram_bytes=memory.total,
        ram_free_bytes=memory.available,
        disk_free_bytes=shutil.disk_usage(folder).free,
        gpus=found,
        gpu_problem=problem,
        gpu_remedy=remedy,
    )


def describe(here: Machine) -> dict[str, str]:
    """The machine as a table: what it is → how much of it (sizes in GiB). The first GPU is the one
    that is used.
    """
    used, others = card(here), ", ".join(gpu.name for gpu in here.gpus[1:])
    gpu = f"none that can be used: {here.gpu_problem}" if here.gpu_problem else "none found"
    gpu = f"{gpu}: profiles tiny and smollm2 run on the CPU"
    if used:
        sizes = (
            f"{used.total_bytes / cards.GIB:.1f} GiB, {used.free_bytes / cards.GIB:.1f} GiB free"
        )
        gpu = f"{used.name}, {sizes}, {'with' if used.has_bf16 else 'without'} bfloat16"
    table = {
        "processor": f"{here.cpu}, {here.n_cores} cores",
        "memory": f"{here.ram_bytes / cards.GIB:.1f} GiB, {here.ram_free_bytes / cards.GIB:.1f} GiB free",
        "disk": f"{here.disk_free_bytes / cards.GIB:.0f} GiB free",
        "GPU": gpu,
    }
    if others:
        table["other GPUs"] = f"{others}: not used; CUDA_VISIBLE_DEVICES chooses the card"
    return table | {"Python": f"{here.python} on {here.system}"}


def gpus() -> tuple[cards.Gpu, ...]:
    """The cards that can be computed on, cuda:0 first; empty where torch sees none, or where cuda:0
    is one that cannot be.
    """
    seen = cards.visible()
    if seen and seen[0].problem:
        return ()
    return tuple(gpu for gpu in seen if not gpu.problem)


def card(here: Machine | None = None) -> cards.Gpu | None:
    """The one card that everything is computed on, torch's cuda:0; None without one.
    CUDA_VISIBLE_DEVICES chooses another.
    """
    found = here.gpus if here else gpus()
    return found[0] if found else None


def _cpu_name() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
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
        if self.installed is None:
            return f"not installed: pip install '{self.package}{self.allowed}'"
        if self.loaded and self.loaded.split("+")[0] != self.installed.split("+")[0]:
            return f"{self.loaded} is loaded but {self.installed} is installed: restart the kernel (Colab: restart the runtime)"
        if self.allowed and not Requirement(f"x{self.allowed}").specifier.contains(
            self.installed, prereleases=True
        ):
            return f"outside {self.allowed}: pip install '{self.package}{self.allowed}'"
        return ""


def installed(package: str) -> str | None:
    """A package's installed version; None if it is not there."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def versions() -> list[Version]:
    """Every dependency in the kit's metadata with what is installed and loaded here."""
    found = []
    for needed in map(Requirement, importlib.metadata.requires("qlora-nb") or []):
        if not needed.marker or needed.marker.evaluate({"extra": ""}):
            loaded = getattr(sys.modules.get(needed.name.replace("-", "_")), "__version__", None)
            found.append(
                Version(needed.name, installed(needed.name), str(needed.specifier), loaded)
            )
    return found
