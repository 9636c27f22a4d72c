"""Which cards torch and bitsandbytes were compiled for: torch says it, bitsandbytes' libraries are read."""

import functools
import importlib.util
import os
import re
import struct
from pathlib import Path


def why_unusable(torch, index: int = 0) -> str:
    """What a card that torch sees is refused for: neither torch nor bitsandbytes runs on what it was not compiled for."""
    try:
        about = torch.cuda.get_device_properties(index)
    except (RuntimeError, AssertionError):  # it does not answer: torch will say so itself
        return ""
    capability = about.major, about.minor
    card = f"{about.name} (compute capability {about.major}.{about.minor})"
    built_for = " ".join(torch.cuda.get_arch_list())
    binary = {int(number) for number in re.findall(r"sm_(\d+)", built_for)}
    ptx = {int(number) for number in re.findall(r"compute_(\d+)", built_for)}
    if not _covers(binary, ptx, capability):
        return f"torch {torch.__version__} has no code for {card}, but for {_in_words(binary | ptx)}"
    if torch.version.cuda is None:
        return ""
    library = _library(torch.version.cuda)
    if library is None and not _libraries():
        return ""
    if library is None:
        return f"bitsandbytes has no library for CUDA {torch.version.cuda}, which {card} is used through"
    binary, ptx = code_in(library)
    if not _covers(binary, ptx, capability):
        return f"bitsandbytes has no code for {card} in {library.name}, but for {_in_words(binary | ptx)}"
    return ""


def _covers(binary: set[int], ptx: set[int], capability: tuple[int, int]) -> bool:
    """True if a card runs code of these architectures (75 is 7.5), or if none is known.

    Machine code runs on its own major capability from its minor one on, PTX on every later card.
    """
    major, minor = capability
    fitting = [code for code in binary if code // 10 == major and code % 10 <= minor]
    fitting += [code for code in ptx if code <= 10 * major + minor]
    return bool(fitting) or not binary | ptx


def _in_words(architectures: set[int]) -> str:
    return ", ".join(f"{code // 10}.{code % 10}" for code in sorted(architectures))


@functools.lru_cache(maxsize=32)
def code_in(library: Path) -> tuple[set[int], set[int]]:
    """The architectures of machine code and of PTX in a CUDA library, read from the headers of its fat binaries.

    A fat binary begins with its magic number, version 1, the length of this header (16) and of all that follows: entries
    of kind (1 PTX, 2 machine code), length of header and body, and at byte 28 the architecture. No such header
    (ROCm's libraries have none) gives two empty sets.
    """
    data, found = library.read_bytes(), {1: set(), 2: set()}
    for start in re.finditer(re.escape(struct.pack("<IHH", 0xBA55ED50, 1, 16)), data):
        at = start.end() + 8
        end = min(at + int.from_bytes(data[start.end() : at], "little"), len(data))
        while at + 32 <= end:
            kind, _, header, body = struct.unpack_from("<HHIQ", data, at)
            if kind in found:
                found[kind].add(*struct.unpack_from("<I", data, at + 28))
            at += max(header + body, 32)
    return found[2], found[1]


def _libraries() -> dict[tuple[int, int], Path]:
    """bitsandbytes' own CUDA libraries: version of CUDA → file."""
    spec, found = importlib.util.find_spec("bitsandbytes"), {}
    if spec is None or spec.origin is None:
        return found
    for path in Path(spec.origin).parent.glob("libbitsandbytes_cuda*"):
        version = re.search(r"cuda(\d\d)(\d+)\.", path.name)
        if version:
            found[int(version[1]), int(version[2])] = path
    return found


def _library(cuda: str) -> Path | None:
    """The one that bitsandbytes takes beside a torch for this CUDA: the same version, else the next lower, else a higher one."""
    major, minor = (int(part) for part in cuda.split(".")[:2])
    wanted = os.environ.get("BNB_CUDA_VERSION", "")
    found = _libraries()
    if wanted.isdigit():
        return found.get((int(wanted[:2]), int(wanted[2:] or 0)))
    same = sorted(version for version in found if version[0] == major)
    lower = [version for version in same if version[1] <= minor]
    if lower:
        return found[lower[-1]]
    return found[same[0]] if same else None


def remedy_for(capability: tuple[int, int]) -> str:
    """What would reach a card of this capability, and how to do without it."""
    without = "set CUDA_VISIBLE_DEVICES to nothing to compute on the CPU"
    fitting = [version for version, path in sorted(_libraries().items()) if _covers(*code_in(path), capability)]
    if not fitting:
        return without
    versions = ", ".join(f"{major}.{minor}" for major, minor in fitting)
    return f"install a torch for a CUDA in whose library bitsandbytes has code for it ({versions}), or {without}"
