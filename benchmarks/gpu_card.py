"""The card itself: which one it is, what CUDA takes of it, and the most that a measurement held.

Each function but `Watch` is an entry of gpu.py's table and is called with this process's `Watch`.
Only torch is loaded here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import provenance
import psutil
import pynvml
import torch

from qlora_nb import cards, machine
from qlora_nb.model import device

MIB = 2**20


class Watch:
    """Peaks of memory between `start` and `stop`, in bytes; None is what is not known.

    `allocated` and `reserved` are torch's, `process` is what this process held according to NVML
    (sampled every 20 ms), CUDA's context included, and `context` is that context alone, before the
    first tensor. In a container NVML does not know our process number, so `process` is what the
    card holds beyond what it held when this process began.

    Args:
        uuid: of the card, as torch gives it; None: there is none. Made before CUDA is used.
    """

    def __init__(self, uuid: str | None = None):
        self.uuid = uuid
        self.before = self.used()
        self.context = None
        self.peaks: dict[str, int | None] = {}
        if uuid and device.on_gpu():
            torch.cuda.synchronize()  # makes the context
            self.context = self.held()

    def used(self) -> int | None:
        """Bytes of the card that are in use, by whomever."""
        told = cards.driver_memory(self.uuid) if self.uuid else None
        return told.used if told else None

    def held(self) -> int | None:
        """Bytes of the card that this process holds."""
        return None if self.before is None else self.used() - self.before

    def start(self) -> None:
        self.process = 0
        self.ended = threading.Event()
        synchronize()
        if device.on_gpu():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def stop(self) -> dict[str, int | None]:
        synchronize()
        self.ended.set()
        self.thread.join()
        known = self.before is not None
        self.peaks = {
            "allocated": torch.cuda.max_memory_allocated() if device.on_gpu() else None,
            "reserved": torch.cuda.max_memory_reserved() if device.on_gpu() else None,
            "process": self.process if known else None,
            "context": self.context,
        }
        return self.peaks

    def _sample(self) -> None:
        last = self.before is None
        while not last:
            last = self.ended.wait(0.02)
            self.process = max(self.process, self.held())


def synchronize() -> None:
    """Wait until the card has done what it was told; nothing without one."""
    if device.on_gpu():
        torch.cuda.synchronize()


def header(watch: Watch) -> dict:
    """What every measurement carries (`provenance`), and the UUID of the card."""
    uuid = None
    if device.on_gpu():
        uuid = str(torch.cuda.get_device_properties(0).uuid)
    return {**provenance.provenance((0,)), "uuid": uuid}


def doctor(watch: Watch) -> dict:
    """What `qlora-nb doctor` says of this machine, and the versions of driver and CUDA."""
    here = machine.this_machine()
    driver = None
    try:
        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        pass
    return {
        "described": machine.describe(here),
        "remarks": cards.remarks(here.gpus, here.system),
        "problem": here.gpu_problem,
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "architectures": torch.cuda.get_arch_list(),
    }


def two_counts(watch: Watch) -> dict:
    """Bytes in use by NVML's count and by CUDA's (`mem_get_info`), and what torch reserved: after
    the context, a tensor of 1 GiB, a product (cuBLAS), a 4-bit layer (bitsandbytes).
    """
    import bitsandbytes

    card = device.compute_device()
    kept = []
    found = {"context": watch.context}

    def count(when: str) -> None:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        found[when] = {
            "NVML, this process": watch.held(),
            "NVML, all": watch.used(),
            "CUDA, all": total - free,
            "reserved by torch": torch.cuda.memory_reserved(),
        }

    count("the context")
    kept.append(torch.zeros(1024 * MIB, dtype=torch.uint8, device=card))
    count("a tensor of 1 GiB")
    square = torch.ones(1024, 1024, dtype=device.compute_dtype(), device=card)
    kept.append(square @ square)
    count("a product")
    layer = bitsandbytes.nn.Linear4bit(1024, 1024, compute_dtype=square.dtype).to(card)
    kept.append(layer(square))
    count("a 4-bit layer")
    told = cards.driver_memory(watch.uuid)
    found["total"] = {
        "NVML": told.total if told else None,
        "CUDA": torch.cuda.mem_get_info()[1],
        "torch": torch.cuda.get_device_properties(0).total_memory,
    }
    return found


def seen() -> dict:
    """The card that torch sees first in this process and whether NVML finds it by its UUID."""
    card = machine.card()
    if card is None:
        return {"card": None, "problem": cards.why_none()[0]}
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    told = cards.driver_memory(uuid)
    return {
        "card": card.name,
        "uuid": uuid,
        "total_bytes": card.total_bytes,
        "NVML_bytes": told.total if told else None,
        "is_mig": card.is_mig,
    }


def chosen_cards(watch: Watch) -> dict:
    """What is seen with CUDA_VISIBLE_DEVICES as an index, as a UUID of a card or of a MIG instance
    (one of the two hides every card), and empty.
    """
    values = ("0", f"GPU-{watch.uuid}", f"MIG-{watch.uuid}", "")
    with ThreadPoolExecutor(len(values)) as pool:
        all_seen = list(pool.map(seen_with, values))
    found = {}
    for value, told in zip(values, all_seen):
        if "uuid" in told:
            told["is the same card"] = told.pop("uuid") == watch.uuid
        found[value.replace(str(watch.uuid), "UUID")] = told
    return found


def seen_with(value: str) -> dict:
    """`seen` in a process of its own with this CUDA_VISIBLE_DEVICES, or its {"error": …}."""
    command = [sys.executable, "-c", "import gpu_card, json; print(json.dumps(gpu_card.seen()))"]
    paths = os.pathsep.join([str(Path(__file__).parent), str(provenance.ROOT)])
    if "PYTHONPATH" in os.environ:
        paths = os.pathsep.join([paths, os.environ["PYTHONPATH"]])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": value, "PYTHONPATH": paths}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env=environment
    )
    if done.returncode:
        return {"error": done.stderr.strip()[-300:]}
    return json.loads(done.stdout.splitlines()[-1])


def avoided(watch: Watch) -> dict:
    """Notebook 05's step that plain states cannot do under a cap and paged ones can."""
    import avoided_oom

    return avoided_oom.measured()


def weights(watch: Watch, size: str, folder: str) -> dict:
    """Seconds to make a Pythia of this size with random weights, its bytes, its folder."""
    import random_weights

    started = time.perf_counter()
    at_once = max(1, min(os.cpu_count(), psutil.virtual_memory().available // (4 * 1024 * MIB)))
    made = Path(random_weights.random_pythia(size, Path(folder), at_once))
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "bytes": sum(path.stat().st_size for path in made.glob("*.safetensors")),
        "file system": file_system(made),
        "folder": str(made),
    }


def file_system(folder: Path) -> str:
    """Its kind: "tmpfs" is memory, read faster than any disk."""
    mounted = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    for path in (folder, *folder.parents):
        if str(path) in mounted:
            return mounted[str(path)]
    return "unknown"
