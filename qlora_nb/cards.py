"""Which GPU is computed on: the one that torch calls cuda:0, found without importing torch.

Three can be asked. `torch/version.py`, read as text, says what torch is built for. The driver's
library NVML (package nvidia-ml-py, module `pynvml`) lists the cards in the order of the PCI bus; it
knows neither what torch can use nor what CUDA_VISIBLE_DEVICES hides. `torch.cuda` knows all of it:
it is asked as soon as torch is loaded, and where NVML is silent though a card seems to be there
(containers, Jetson, WSL).

Memory is always asked of NVML first: CUDA answers only after it has made a context, which takes
about 0.45 GiB of the card itself. Source: CUDA C++ Programming Guide, "CUDA Environment Variables";
NVML API reference; bitsandbytes' build matrix.
"""

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.version import Version

GIB = 2**30

CONTEXT_BYTES = int(0.45 * GIB)
"""What CUDA's driver and libraries take before the first tensor: assumed until it is measured."""

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


def torch_build() -> dict[str, str]:
    """The texts in torch/version.py (`__version__`, `cuda`, `hip`, `xpu`, …), without importing
    torch; empty where they cannot be read.
    """
    loaded = sys.modules.get("torch")
    if hasattr(loaded, "version"):
        texts = vars(loaded.version).items()
        return {name: value for name, value in texts if isinstance(value, str)}
    with suppress(ImportError, ValueError, OSError):
        spec = importlib.util.find_spec("torch")
        if spec and spec.origin:
            source = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
            # lines such as  cuda: Optional[str] = '13.0'
            return dict(re.findall(r"""^(\w+)[^=\n]*= *['"](.*)['"]""", source, re.MULTILINE))
    return {}


def visible() -> list[Gpu]:
    """The cards that torch sees, cuda:0 first; empty if it sees none."""
    torch = sys.modules.get("torch")
    if torch is None:
        build = torch_build()
        if build and "cuda" not in build and "hip" not in build:
            return []
        cards = driver_cards()
        if cards and "cuda" in build:
            return _chosen(cards)
        seems_there = _card_files() or (cards and not build)
        if not seems_there or not _leaves_any():
            return []
        with suppress(ImportError, OSError):
            torch = importlib.import_module("torch")
    if not hasattr(torch, "cuda") or not torch.cuda.is_available():
        return []
    seen = []
    # up to the first card that does not answer
    with suppress(RuntimeError, AssertionError), driver() as nvml:
        for index in range(torch.cuda.device_count()):
            seen.append(_as_torch_sees(torch, index, nvml))
    return seen


def why_none() -> tuple[str, str]:
    """What keeps torch from a card that is there, and the remedy; two empty texts if no card is
    there. Asked when `visible` gives no card to compute on.
    """
    seen = visible()
    if seen:
        return seen[0].problem, _remedy_for(seen[0].compute_capability)
    cards = driver_cards()
    if not cards:
        return "", ""
    shows = f"the driver shows {cards[0][1].name}, but torch"
    build = torch_build()
    if not build:
        return f"{shows} cannot be loaded", "see what python -c 'import torch' says"
    version = build.get("__version__", "")
    if "cuda" not in build:
        kind = "a CPU build"
        if "xpu" in build:
            kind = "a build for Intel GPUs"
        if "hip" in build:
            kind = "a build for AMD GPUs"
        remedy = "install a CUDA build of torch (PyTorch's install page gives the command)"
        return f"{shows} {version} is {kind}", remedy
    if not _chosen(cards):
        value = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        problem = f"CUDA_VISIBLE_DEVICES={value!r:.80} hides {cards[0][1].name}"
        return problem, "unset it, or name a card that is there"
    cuda = build["cuda"]
    remedy = f"update the driver, or install a build of torch for an older CUDA than {cuda}"
    return f"{shows} {version} cannot use it", remedy


def why_unusable(torch, index: int = 0) -> str:
    """Why a card that torch sees is refused: torch or bitsandbytes was compiled for later ones
    only. Empty if it is not.
    """
    try:
        about = torch.cuda.get_device_properties(index)
    except (RuntimeError, AssertionError):  # it does not answer: torch will say so itself
        return ""
    capability = (about.major, about.minor)
    card = f"{about.name} (compute capability {about.major}.{about.minor})"
    codes = re.findall(r"(?:sm|compute)_(\d+)", " ".join(torch.cuda.get_arch_list()))
    if codes:
        oldest = divmod(min(map(int, codes)), 10)
        if capability < oldest:
            from_on = f"from {oldest[0]}.{oldest[1]} on"
            return f"torch {torch.__version__} has no code for {card}, but {from_on}"
    cuda = torch.version.cuda or "0.0"
    known = [since for since in OLDEST if since <= Version(cuda).release]
    if known:
        oldest = OLDEST[max(known)]
        if capability < oldest:
            from_on = f"from {oldest[0]}.{oldest[1]} on"
            return f"bitsandbytes for CUDA {cuda} has no code for {card}, but {from_on}"
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
    build = torch_build()
    torch = sys.modules.get("torch")
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
    if "hip" in build:
        lines.append(
            f"ROCm {build['hip']}: torch calls an AMD GPU cuda, and the kit computes on it; "
            "the kit was never run there"
        )
    if "xpu" in build or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        lines.append(
            "XPU: this torch knows Intel's GPUs, but the kit does not use them: "
            "it computes on the CPU"
        )
    has_mps = hasattr(torch, "backends") and torch.backends.mps.is_available()
    if has_mps or system == "Darwin arm64":
        lines.append(
            "MPS: the kit does not use Apple's GPU, it computes on the CPU; in code of your own on "
            "MPS take optim=adamw_torch: bitsandbytes' paged and 8-bit optimizers fail there"
        )
    return lines


@contextmanager
def driver() -> Iterator[object | None]:
    """NVML, started; None where there is no driver, or one that does not answer."""
    nvml = None
    with suppress(ImportError, OSError):
        import pynvml

        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            nvml = pynvml
    try:
        yield nvml
    finally:
        if nvml:
            with suppress(nvml.NVMLError):
                nvml.nvmlShutdown()


def driver_cards() -> list[tuple[str, Gpu]]:
    """(UUID, card) for every card of the driver in the order of the PCI bus, whether torch can use
    it or not.

    CUDA gives a card that is shared out (MIG) as its first instance; the others have entries of
    their own, to be asked for by a UUID that begins with "MIG-". A card that does not answer, or
    tells no memory, is left out.
    """
    cards = []
    with driver() as nvml:
        if nvml is None:
            return cards
        count = 0
        with suppress(nvml.NVMLError):
            count = nvml.nvmlDeviceGetCount()
        for index in range(count):
            with suppress(nvml.NVMLError):
                whole = nvml.nvmlDeviceGetHandleByIndex(index)
                instances = _instances(nvml, whole)
                first = instances[0] if instances else whole
                cards.append((_uuid(nvml, whole), _described(nvml, first, whole)))
                for instance in instances:
                    cards.append((_uuid(nvml, instance), _described(nvml, instance, whole)))
    return cards


def handle_of(nvml, uuid: object) -> object | None:
    """NVML's handle of the card or instance that torch gives this UUID (torch leaves the "GPU-"
    away); None if it has none.
    """
    for prefix in ("MIG-", "GPU-"):
        with suppress(nvml.NVMLError):
            return nvml.nvmlDeviceGetHandleByUUID(f"{prefix}{uuid}")
    return None


def _uuid(nvml, handle) -> str:
    with suppress(nvml.NVMLError):
        return nvml.nvmlDeviceGetUUID(handle)
    return ""


def _instances(nvml, whole) -> list[object]:
    """The instances of a card in MIG mode; empty for any other."""
    found = []
    with suppress(nvml.NVMLError):
        if nvml.nvmlDeviceGetMigMode(whole)[0]:
            for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(whole)):
                with suppress(nvml.NVMLError):
                    found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(whole, index))
    return found


def _described(nvml, handle, whole) -> Gpu:
    """A card or an instance of the card `whole`."""
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    reserved = 0
    with suppress(nvml.NVMLError, TypeError):  # an older driver
        detailed = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        reserved = getattr(detailed, "reserved", 0)
    return Gpu(
        name=nvml.nvmlDeviceGetName(handle),
        total_bytes=memory.total,
        free_bytes=memory.free,
        compute_capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(whole)),
        reserved_bytes=reserved,
        is_mig=handle is not whole,
    )


def _chosen(cards: list[tuple[str, Gpu]]) -> list[Gpu]:
    """The cards that CUDA_VISIBLE_DEVICES leaves, in its order: what follows the first entry that
    names no card is ignored, and a card named twice leaves none.

    Numbers count in CUDA's order, which begins with the fastest card unless CUDA_DEVICE_ORDER is
    PCI_BUS_ID. Which one CUDA takes for the fastest is guessed here, by compute capability and
    memory.
    """

    def speed(entry: tuple[str, Gpu]) -> tuple:
        return entry[1].compute_capability, entry[1].total_bytes

    numbered = [entry for entry in cards if not entry[0].startswith("MIG-")]
    if numbered and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        fastest = max(numbered, key=speed)
        numbered.sort(key=lambda entry: entry is not fastest)
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return [card for _, card in numbered]
    kind = value.strip()[:4]
    chosen = []
    for wanted in map(str.strip, value.split(",")):
        number = re.match(r"[+-]?\d+", wanted)
        found = []
        if kind in ("GPU-", "MIG-"):  # the beginning of a UUID is enough if it is one card's alone
            if wanted.startswith(kind):
                found = [entry for entry in cards if entry[0].startswith(wanted)]
        elif number and int(number[0]) >= 0:
            found = numbered[int(number[0]) :][:1]
        if len(found) != 1:
            break
        if any(found[0] is entry for entry in chosen):
            return []
        chosen.append(found[0])
    return [card for _, card in chosen]


def _leaves_any() -> bool:
    """False if CUDA_VISIBLE_DEVICES hides every card, whatever there is: its first entry is no
    number and no UUID.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return bool(re.match(r"\+?\d|-0|GPU-|MIG-", first))


def _card_files() -> bool:
    """True if something in this system speaks of a GPU: a device file of NVIDIA, Jetson, WSL or
    AMD, or nvidia-smi.
    """
    for pattern in ("nvidia[0-9]*", "nvhost-*", "nvgpu*", "dxg", "kfd"):
        if any(Path("/dev").glob(pattern)):
            return True
    return shutil.which("nvidia-smi") is not None


def _as_torch_sees(torch, index: int, nvml) -> Gpu:
    """One card: its memory as NVML counts it.

    Where NVML does not know the card, or means another size by it (the whole of which this is an
    instance), CUDA is asked for cuda:0; of other cards the size alone is told. Integrated ones take
    from the system's memory.
    """
    about = torch.cuda.get_device_properties(index)
    total = about.total_memory
    free = total
    is_integrated = bool(getattr(about, "is_integrated", False))
    is_mig = False
    told = None
    handle = handle_of(nvml, getattr(about, "uuid", None)) if nvml else None
    if handle is not None:
        with suppress(nvml.NVMLError):
            is_mig = bool(nvml.nvmlDeviceIsMigDeviceHandle(handle))
        with suppress(nvml.NVMLError):
            told = nvml.nvmlDeviceGetMemoryInfo(handle)
    if is_integrated:
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
        is_mig=is_mig,
        is_integrated=is_integrated,
        problem=why_unusable(torch, index),
    )
