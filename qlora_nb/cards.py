"""Which GPU is computed on: the one that torch calls cuda:0.

Only torch knows which cards it can use, in which order, and what CUDA_VISIBLE_DEVICES hides. So it
is asked itself; it takes seconds to load, and is loaded only where there seems to be a card. NVML
(the driver's library; package nvidia-ml-py, module `pynvml`) names a card that torch cannot use.

Memory is always asked of NVML first: CUDA answers only after it has made a context, which takes
about 0.45 GiB of the card itself. Source: CUDA C++ Programming Guide, "CUDA Environment Variables";
NVML API reference; bitsandbytes' build matrix.
"""

import importlib
import os
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import psutil
import pynvml
from packaging.version import Version

GIB = 2**30

CONTEXT_BYTES = 718_077_952
"""What CUDA's context (552 MB) and kernels take besides tensors: an H100 after its first products
(`recorded/gpu.json`, "NVML beside CUDA"). Smaller cards have smaller contexts.
"""

OLDEST = {(13, 0): (7, 5), (12, 8): (7, 0), (11, 8): (6, 0)}
"""From this CUDA version of torch on → the oldest compute capability in the library that
bitsandbytes 0.50.2 takes for it.
"""


@dataclass(frozen=True)
class Gpu:
    """One card; sizes in bytes.

    `reserved_bytes` is the driver's own part, `own_bytes` what this process holds already, its CUDA
    context included. `problem` says why the kit cannot compute on it; empty if it can.
    """

    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]
    reserved_bytes: int = 0
    own_bytes: int = 0
    is_mig: bool = False
    is_integrated: bool = False
    problem: str = ""

    @property
    def has_bf16(self) -> bool:
        """bfloat16 arithmetic exists from compute capability 8.0 (Ampere) on; a T4 has 7.5."""
        return self.compute_capability >= (8, 0)

    @property
    def usable_bytes(self) -> int:
        """What a run of this process can take: neither the driver's part nor what other programs
        hold.
        """
        return min(self.total_bytes - self.reserved_bytes, self.free_bytes + self.own_bytes)

    @property
    def others_bytes(self) -> int:
        """What other programs hold."""
        return self.total_bytes - self.reserved_bytes - self.usable_bytes


def visible() -> list[Gpu]:
    """The cards that torch sees, cuda:0 first; empty if it sees none."""
    torch = _torch_beside_a_card()
    if torch is None or not torch.cuda.is_available():
        return []
    seen = []
    # up to the first card that does not answer
    with suppress(RuntimeError, AssertionError):
        for index in range(torch.cuda.device_count()):
            seen.append(_as_torch_sees(torch, index))
    return seen


def why_none() -> tuple[str, str]:
    """What keeps torch from a card that is there, and the remedy; two empty texts if no card is
    there. Asked when `visible` gives no card to compute on.
    """
    seen = visible()
    if seen:
        return seen[0].problem, _remedy_for(seen[0].compute_capability)
    name = _driver_shows()
    if not name:
        return "", ""
    torch = _torch_beside_a_card()
    problem = f"the driver shows {name}, but torch"
    if torch is None:
        return f"{problem} cannot be loaded", "see what python -c 'import torch' says"
    problem = f"{problem} {torch.__version__}"
    cuda = torch.version.cuda
    if cuda is None:
        remedy = "install a CUDA build of torch (PyTorch's install page gives the command)"
        return f"{problem} is not built for CUDA", remedy
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        problem = f"{problem} sees none with CUDA_VISIBLE_DEVICES={chosen!r:.80}"
        return problem, "unset it, or name a card that is there; if it does, update the driver"
    remedy = f"update the driver, or install a build of torch for an older CUDA than {cuda}"
    return f"{problem} cannot use it", remedy


def why_unusable(torch: ModuleType, index: int = 0) -> str:
    """Why a card that torch sees is refused: torch or bitsandbytes was compiled for later ones
    only. Empty if it is not.
    """
    try:
        about = torch.cuda.get_device_properties(index)
    except (RuntimeError, AssertionError):  # it does not answer: torch will say so itself
        return ""
    from_on = {}
    codes = re.findall(r"(?:sm|compute)_(\d+)", " ".join(torch.cuda.get_arch_list()))
    if codes:
        from_on[f"torch {torch.__version__}"] = divmod(min(map(int, codes)), 10)
    cuda = torch.version.cuda or "0.0"
    known = [since for since in OLDEST if since <= Version(cuda).release]
    if known:
        from_on[f"bitsandbytes for CUDA {cuda}"] = OLDEST[max(known)]
    for library, oldest in from_on.items():
        if (about.major, about.minor) < oldest:
            card = f"{about.name} (compute capability {about.major}.{about.minor})"
            return f"{library} has no code for {card}, but from {oldest[0]}.{oldest[1]} on"
    return ""


def _remedy_for(capability: tuple[int, int]) -> str:
    """What would reach a card of this capability, and how to do without it."""
    without = "set CUDA_VISIBLE_DEVICES to nothing to compute on the CPU"
    before = ""
    for since, oldest in OLDEST.items():
        if capability >= oldest:
            build = f"a build of torch for CUDA {since[0]}.{since[1]} or later{before}"
            return f"install {build}; or {without}"
        before = f", before {since[0]}.{since[1]}"
    return without


def remarks(seen: Sequence[Gpu], system: str) -> list[str]:
    """One sentence for each thing about this machine's cards that a table of sizes does not say.

    Args:
        seen: the cards, the one that is used first.
        system: operating system and processor, as "Darwin arm64".
    """
    version = getattr(sys.modules.get("torch"), "version", None)
    lines = []
    if seen and seen[0].is_mig:
        lines.append(
            "MIG: the card is shared out; what counts is the memory of this instance, "
            "not of the whole card"
        )
    if seen and seen[0].is_integrated:
        lines.append(
            "the GPU has no memory of its own (as in a Jetson): what the system has left counts"
        )
    hip = getattr(version, "hip", None)
    if hip:
        lines.append(
            f"ROCm {hip}: torch calls an AMD GPU cuda, and the kit computes on it; "
            "the kit was never run there"
        )
    if getattr(version, "xpu", None):
        lines.append(
            "XPU: this torch knows Intel's GPUs, but the kit does not use them: "
            "it computes on the CPU"
        )
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        lines.append(
            "Kaggle: take GPU T4 x2 as the accelerator, not the P100, for which Kaggle's torch has "
            "no code. A notebook uses one of the two T4s, torchrun both (docs/scale.md). pip and "
            "the hub need Internet, which is off until you switch it on in the settings"
        )
    if system == "Darwin arm64":
        lines.append(
            "MPS: the kit does not use Apple's GPU, it computes on the CPU; in code of your own on "
            "MPS take optim=adamw_torch: bitsandbytes' paged and 8-bit optimizers fail there"
        )
    return lines


def driver_memory(uuid: object) -> object | None:
    """`total`, `free` and `used` bytes, as NVML counts them, of the card or instance that torch
    gives this UUID (torch leaves the "GPU-" or "MIG-" away); None if NVML does not say.
    """
    for prefix in ("GPU-", "MIG-"):
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"{prefix}{uuid}")
            return pynvml.nvmlDeviceGetMemoryInfo(handle)
    return None


def _driver_shows() -> str:
    """The name of the driver's first card, whether torch can use it or not; empty without one."""
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
    return ""


def _card_files() -> bool:
    """True if something in this system speaks of a GPU, though NVML may be silent (containers,
    Jetson, WSL): a device file of NVIDIA, Jetson, WSL or AMD, or nvidia-smi.
    """
    for pattern in ("nvidia[0-9]*", "nvhost-*", "nvgpu*", "dxg", "kfd"):
        if any(Path("/dev").glob(pattern)):
            return True
    return shutil.which("nvidia-smi") is not None


def _torch_beside_a_card() -> ModuleType | None:
    """torch, loaded now if there seems to be a card; None where it is not loaded."""
    if "torch" not in sys.modules and (_driver_shows() or _card_files()):
        with suppress(ImportError, OSError):
            importlib.import_module("torch")
    return sys.modules.get("torch")


def _as_torch_sees(torch: ModuleType, index: int) -> Gpu:
    """One card: its memory as NVML counts it.

    Where NVML does not know the card, or means another size by it (the whole of which this is an
    instance), CUDA is asked for cuda:0; of other cards the size alone is told. Integrated ones take
    from the system's memory.
    """
    about = torch.cuda.get_device_properties(index)
    total = about.total_memory
    free = total
    told = driver_memory(about.uuid)
    if about.is_integrated:
        free = min(total, psutil.virtual_memory().available)
    elif told and abs(told.total - total) < 0.1 * total:
        total = told.total
        free = told.free
    elif index == 0:
        with suppress(RuntimeError):
            free, _ = torch.cuda.mem_get_info(index)
    own = torch.cuda.memory_reserved(index)
    if own:
        own += CONTEXT_BYTES
    return Gpu(
        name=about.name,
        total_bytes=total,
        free_bytes=free,
        compute_capability=(about.major, about.minor),
        reserved_bytes=max(0, total - about.total_memory),
        own_bytes=own,
        is_mig=" MIG " in about.name,  # CUDA's name of an instance, as "A100 MIG 1g.5gb"
        is_integrated=bool(about.is_integrated),
        problem=why_unusable(torch, index),
    )
