"""What this machine is and what it can run, found out without importing torch.

A notebook that asks for pythia-12b on a laptop must be told so in two seconds, before any download: the driver's own
library (NVML) tells the GPUs, psutil the memory, the package metadata the versions, one short connection attempt
whether the hub can be reached.
"""

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import psutil
from packaging.requirements import Requirement

from qlora_nb.engine import cards, shapes
from qlora_nb.engine.cards import GIB, Gpu
from qlora_nb.errors import KitError

CPU_LIMIT_PARAMETERS = 1_500_000_000
"""Above this a step on a CPU takes minutes (about 6 flop × parameters × tokens at some 100 Gflop/s)."""
MIN_FREE_BYTES = GIB // 2
"""Less free memory than this is not enough for Python, torch and the smallest model."""


@dataclass(frozen=True)
class Machine:
    """CPU, memory, disk and GPUs of this machine; sizes in bytes.

    `gpus` are those that torch can use, the one that is used first. If there is none of them although the driver shows a
    card, `gpu_problem` says why and `gpu_remedy` what to do.
    """

    cpu: str
    n_cores: int
    ram_bytes: int
    ram_free_bytes: int
    disk_free_bytes: int
    gpus: tuple[Gpu, ...]
    python: str = platform.python_version()
    system: str = f"{platform.system()} {platform.machine()}"
    gpu_problem: str = ""
    gpu_remedy: str = ""


def machine(folder: str | Path = ".") -> Machine:
    """Look at this machine; `folder` is where the disk is measured."""
    memory, found = psutil.virtual_memory(), gpus()
    problem, remedy = ("", "") if found else cards.why_none()
    return Machine(
        cpu=_cpu_name(),
        n_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
        ram_bytes=memory.total,
        ram_free_bytes=memory.available,
        disk_free_bytes=shutil.disk_usage(folder).free,
        gpus=found,
        gpu_problem=problem,
        gpu_remedy=remedy,
    )


def describe(here: Machine) -> dict[str, str]:
    """The machine as a table: what it is → how much of it (sizes in GiB). The first GPU is the one that is used."""
    used, others = card(here), ", ".join(gpu.name for gpu in here.gpus[1:])
    gpu = f"none that can be used: {here.gpu_problem}" if here.gpu_problem else "none found"
    gpu = f"{gpu}: profiles tiny and smollm2 run on the CPU"
    if used:
        sizes = f"{used.total_bytes / GIB:.1f} GiB, {used.free_bytes / GIB:.1f} GiB free"
        gpu = f"{used.name}, {sizes}, {'with' if used.has_bf16 else 'without'} bfloat16"
    table = {
        "processor": f"{here.cpu}, {here.n_cores} cores",
        "memory": f"{here.ram_bytes / GIB:.1f} GiB, {here.ram_free_bytes / GIB:.1f} GiB free",
        "disk": f"{here.disk_free_bytes / GIB:.0f} GiB free",
        "GPU": gpu,
    }
    if others:
        table["other GPUs"] = f"{others}: not used; CUDA_VISIBLE_DEVICES chooses the card"
    return table | {"Python": f"{here.python} on {here.system}"}


def gpus() -> tuple[Gpu, ...]:
    """The cards that can be computed on, cuda:0 first; empty where torch sees none, or where cuda:0 is one that cannot be."""
    seen = cards.visible()
    if seen and seen[0].problem:
        return ()
    return tuple(gpu for gpu in seen if not gpu.problem)


def card(here: Machine | None = None) -> Gpu | None:
    """The one card that everything is computed on, torch's cuda:0; None without one. CUDA_VISIBLE_DEVICES chooses another."""
    found = here.gpus if here else gpus()
    return found[0] if found else None


def _cpu_name() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Version:
    """One dependency: what is installed, what the kit's metadata allows, what is loaded in this process."""

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
        if self.allowed and not Requirement(f"x{self.allowed}").specifier.contains(self.installed, prereleases=True):
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
            found.append(Version(needed.name, installed(needed.name), str(needed.specifier), loaded))
    return found


def hub_endpoint() -> str:
    """The hub's address, or the mirror that HF_ENDPOINT names, without a name and password in it."""
    return re.sub("//[^/]*@", "//", os.environ.get("HF_ENDPOINT", "https://huggingface.co"))


@functools.lru_cache(maxsize=8)
def _reachable(endpoint: str) -> bool:
    with suppress(OSError, ValueError):  # nobody there, or no address
        parts = urlsplit(endpoint)
        proxy = getproxies().get(parts.scheme)
        if proxy and not proxy_bypass(parts.hostname or ""):
            parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname or "", port), timeout=1.0):
            return True
    return False


def hub_is_reachable() -> bool:
    """One connection attempt of at most a second (asking the hub library itself takes 23 s to fail)."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() not in {"1", "true", "yes", "on"} and _reachable(hub_endpoint())


def in_hub_cache(repo_id: str, repo_type: str = "model") -> bool:
    """True if a snapshot of this repository lies in the local cache."""
    return any(hub_cache(repo_id, repo_type).glob("snapshots/*/*"))


def hub_cache(repo_id: str, repo_type: str) -> Path:
    """The folder of this repository in the local cache, whether it is there or not."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"{repo_type}s--{repo_id.replace('/', '--')}"


def refuse_what_cannot_run(settings) -> None:
    """Raise `KitError` if the resolved model or data cannot be run or reached here; says what would fit.

    The judgement is about the *resolved* model and hardware: profile "full" with a small local model is fine anywhere.
    """
    refuse_many_processes()
    here, size = machine(), shapes.download_bytes(settings.model_id)
    if not here.gpus:
        refuse_on_cpu(settings.model_id, size or 0, here)
    _refuse_unreachable("model", settings.model_id, "pocket, smollm2, a hub name like EleutherAI/pythia-410m, or a folder")
    _refuse_unreachable("dataset", settings.dataset, "pocket, a hub name, or a file")
    if here.gpus and size:
        from qlora_nb.engine import budget

        here = machine()  # torch is loaded now and says itself what it can use
        if not here.gpus:
            refuse_on_cpu(settings.model_id, size, here)
        budget.require_fit(settings, here, train=False)


SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Where torchrun and accelerate, Open MPI, MPICH, MVAPICH, srun say how many processes they started."""
RANKS = ("RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
"""Where they say which of them this one is, from 0."""


def refuse_many_processes() -> None:
    """Raise `KitError` if a launcher started this program several times at once: each would train a run of its own.

    A job of Slurm may hold many tasks (SLURM_NTASKS) and run one process in its shell or batch script: what counts is the step
    that `srun` starts.
    """
    sizes = [*SIZES]
    if "SLURM_STEP_ID" in os.environ and "SLURM_STEP_NUM_TASKS" not in os.environ:
        sizes.append("SLURM_NTASKS")
    alone = dict.fromkeys(sizes, 1) | dict.fromkeys(RANKS, 0)
    for name, value in alone.items():
        given = os.environ.get(name, "").strip()
        if given.isdecimal() and int(given) > value:
            _refuse_process(f"{name}={given}")
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        _refuse_process(f"a process group of {distributed.get_world_size()}")


def _refuse_process(sign: str) -> None:
    what = "this is one of several processes started together, and the kit runs in one alone"
    remedy = "start it once, without torchrun, accelerate launch, mpirun or srun -n"
    raise KitError(what, value=sign, remedy=remedy)


def refuse_on_cpu(model_id: str, bytes_16_bit: int, here: Machine) -> None:
    """Raise `KitError` if a model is too large for a machine without a GPU (4-bit weights: a quarter of 16-bit ones)."""
    need = bytes_16_bit // 4
    size = f"{bytes_16_bit / 2e9:.1f} billion parameters, {need / GIB:.1f} GiB in 4 bit for the weights alone"
    if bytes_16_bit > 2 * CPU_LIMIT_PARAMETERS:
        gpu = f"no GPU that can be used ({here.gpu_problem})" if here.gpu_problem else "no NVIDIA GPU"
        has = f"{gpu}, {here.n_cores} CPU cores and {here.ram_bytes / GIB:.1f} GiB of memory"
        remedy = 'profile="tiny" (in the kit) or profile="smollm2" runs here; every cell is the same'
        remedy = f"{here.gpu_remedy}; {remedy}" if here.gpu_remedy else remedy
        raise KitError(f"{model_id} needs a GPU: {size}; this machine has {has}", remedy=remedy)
    if max(need, MIN_FREE_BYTES) > here.ram_free_bytes:
        what = f"{model_id} does not fit this machine's memory: {here.ram_free_bytes / GIB:.1f} GiB are free"
        raise KitError(what, remedy='close other kernels, or use profile="tiny"')


def _refuse_unreachable(what: str, name: str, allowed: str) -> None:
    """A local path must exist; a hub name must be cached or the hub reachable."""
    path = Path(name).expanduser()
    if path.is_dir() and what == "model" and not (path / "config.json").is_file():
        raise KitError("the model folder has no config.json", value=name, remedy="give a folder made by save_pretrained")
    if name in ("pocket", "smollm2") or path.exists():
        return
    if name.startswith((".", "/", "~", "\\")) or path.suffix in {".json", ".jsonl", ".csv", ".parquet"} or name.count("/") != 1:
        raise KitError(f"{what} not found", value=name, allowed=allowed, remedy="check the path")
    if not in_hub_cache(name, what) and not hub_is_reachable():
        elsewhere = "fetch it ahead on a machine with network (notebook 01, fetch_ahead=True)"
        remedy = f'{elsewhere}, or give a local path for it, or use profile="tiny"'
        raise KitError(f"the {what} {name} is not in the local cache and {hub_endpoint()} cannot be reached", remedy=remedy)
