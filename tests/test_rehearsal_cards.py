"""Which card is used: machines with cards, rehearsed on a CPU by stand-ins for NVML, for torch's
build and for torch.cuda.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import struct
import subprocess
import sys
import textwrap
import types
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes
import open_cells
import pynvml
import pytest
import torch
from typer.testing import CliRunner

from qlora_nb import cards, cli, machine, processes, sources
from qlora_nb.errors import KitError
from qlora_nb.memory import budget, preflight
from qlora_nb.model import device
from qlora_nb.settings import validate
from qlora_nb.train import run as training

NEW = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
OLD = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
"""What torch says it has code for, of two builds."""

# ---- the stand-ins ---------------------------------------------------------------------------------------------------


@dataclass
class Card:
    """One card of the rehearsed machine, or an instance of one; sizes in GiB. `asked` counts what
    NVML was asked about it.
    """

    name: str
    uuid: str = ""
    total: float = 24.0
    free: float | None = None
    reserved: float = 0.0
    capability: tuple[int, int] = (8, 6)
    silent: bool = False  # NVML does not tell its memory: it is the processor's
    asked: int = 0


def refuse(*_, **__):
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


class Nvml:
    """NVML's functions over a list of cards."""

    def __init__(self, monkeypatch, *there: Card):
        self.machine = there
        for name in dir(pynvml):
            if name.startswith("nvmlDeviceGet"):
                monkeypatch.setattr(pynvml, name, refuse)
        for name in (
            "Init",
            "Shutdown",
            *(name for name in dir(self) if name.startswith("Device")),
        ):
            monkeypatch.setattr(pynvml, f"nvml{name}", getattr(self, name, lambda: None))

    def DeviceGetHandleByIndex(self, index):
        return self.machine[index] if index < len(self.machine) else refuse()

    def DeviceGetHandleByUUID(self, uuid):
        for card in self.machine:
            if card.uuid == uuid:
                return card
        return refuse()

    def DeviceGetName(self, card):
        return card.name

    def DeviceGetMemoryInfo(self, card):
        if card.silent:
            refuse()
        card.asked += 1
        total, reserved = int(card.total * cards.GIB), int(card.reserved * cards.GIB)
        free = total - reserved if card.free is None else int(card.free * cards.GIB)
        return types.SimpleNamespace(total=total, free=free, used=total - free)


def not_loaded(monkeypatch) -> list[str]:
    """torch is installed and not loaded; nothing but NVML speaks of a card. Returns what is
    imported from now on.
    """
    asked = []

    def load(name):
        asked.append(name)
        monkeypatch.setitem(sys.modules, name, torch)

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(importlib, "import_module", load)
    monkeypatch.setattr(cards, "_card_files", lambda: False)
    return asked


def cuda_of(monkeypatch, *there: Card, held=0.0, cuda="13.0", codes=NEW) -> None:
    """A torch that is loaded and sees these cards in this order; `held` GiB are reserved by its
    allocator on the first.
    """

    def properties(index):
        if index >= len(there):
            raise AssertionError("Invalid device id")
        card, (major, minor) = there[index], there[index].capability
        total = int((card.total - card.reserved) * cards.GIB)
        uuid = card.uuid.removeprefix("GPU-").removeprefix("MIG-")
        names = {
            "name": card.name,
            "total_memory": total,
            "major": major,
            "minor": minor,
            "uuid": uuid,
            "is_integrated": card.silent,
        }
        return types.SimpleNamespace(**names)

    def free_and_total(index=0):
        card = there[index]
        return int((card.total if card.free is None else card.free) * cards.GIB), int(
            card.total * cards.GIB
        )

    own = {
        "is_available": lambda: bool(there),
        "device_count": lambda: len(there),
        "get_device_properties": properties,
    }
    own |= {
        "mem_get_info": free_and_total,
        "memory_reserved": lambda index=0: 0 if index else int(held * cards.GIB),
    }
    own |= {"get_arch_list": lambda: list(codes)}
    for name, function in own.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "BNB_CUDA_VERSION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sources, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(
        budget, "make_fit", lambda *how: None
    )  # it weighs every lever: half a minute for a 12b


def names() -> str:
    return "".join(card.name for card in machine.gpus())


# ---- what torch is built for
# -----------------------------------------------------------------------------------------


@pytest.mark.fault(11)
@pytest.mark.parametrize("build", ["", "hip", "xpu"])
def test_rehearsal_a_card_that_this_torch_cannot_use_is_refused(monkeypatch, build):
    """PyPI's wheel for Windows is a CPU build whose metadata says 2.13.0; so would the version of a
    ROCm or XPU build.
    """
    Nvml(monkeypatch, Card("NVIDIA GeForce RTX 3090"))
    cuda_of(monkeypatch, cuda=None)
    if build:
        monkeypatch.setattr(torch.version, build, "6.4")
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    assert machine.gpus() == ()
    with pytest.raises(KitError, match=r"RTX 3090, but torch 2\.13\.0 is not built") as refused:
        preflight.refuse_what_cannot_run(validate({"profile": "full"}))
    assert "install a CUDA build of torch" in refused.value.remedy
    preflight.refuse_what_cannot_run(validate({}))  # profile tiny runs on the CPU


def test_rehearsal_an_old_driver_is_found_out_by_torch(monkeypatch):
    """NVML shows the card, torch is loaded and cannot use it."""
    Nvml(monkeypatch, Card("Tesla T4"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert machine.gpus() == ()
    with pytest.raises(KitError, match=r"Tesla T4, but torch .* cannot use it") as refused:
        preflight.refuse_what_cannot_run(validate({"profile": "t4"}))
    assert "update the driver" in refused.value.remedy


@pytest.mark.parametrize("shown", ["by NVML", "by a file"])
def test_rehearsal_torch_is_loaded_where_there_seems_to_be_a_card(monkeypatch, shown):
    asked = not_loaded(monkeypatch)
    cuda_of(monkeypatch, Card("a", "GPU-a"))
    assert machine.gpus() == ()
    assert asked == []
    if shown == "by NVML":
        Nvml(monkeypatch, Card("a", "GPU-a"))
    else:
        monkeypatch.setattr(cards, "_card_files", lambda: True)
    assert names() == "a"
    assert asked == ["torch"]


def test_rehearsal_a_card_without_any_torch(monkeypatch):
    """The card is named, and not called what torch's build keeps from use."""

    def missing(name):
        raise ImportError(name)

    Nvml(monkeypatch, Card("Tesla T4"))
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(importlib, "import_module", missing)
    here = machine.this_machine()
    assert here.gpus == ()
    assert here.gpu_problem == "the driver shows Tesla T4, but torch cannot be loaded"


def test_rehearsal_a_machine_without_cards_does_not_load_torch():
    program = """
        import sys
        from qlora_nb.memory import preflight
        from qlora_nb.settings import resolve
        preflight.refuse_what_cannot_run(resolve({}))
        print('torch' in sys.modules)
    """
    env = os.environ | {"PATH": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
        env=env,
    )
    assert done.stdout.strip() == "False"


# ---- which card ------------------------------------------------------------------------------------------------------


@pytest.mark.fault(11)
@pytest.mark.parametrize("chosen", ["", "-1", "7", "GPU-3f"])
def test_rehearsal_cuda_visible_devices_that_hides_every_card_is_named(monkeypatch, chosen):
    """CUDA reads the variable, torch says what is left of the cards: here none."""
    Nvml(monkeypatch, Card("a", "GPU-a1"))
    cuda_of(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    here = machine.this_machine()
    assert here.gpus == ()
    assert here.gpu_problem.endswith(f"sees none with CUDA_VISIBLE_DEVICES={chosen!r}")
    assert here.gpu_problem.startswith("the driver shows a, but torch ")
    assert "unset it" in here.gpu_remedy


def test_rehearsal_cuda_visible_devices_that_leaves_a_card_is_no_problem(monkeypatch):
    """NVML counts all cards; what torch sees is what counts, in torch's order."""
    there = Card("a", "GPU-a"), Card("b", "GPU-b"), Card("c", "GPU-c")
    Nvml(monkeypatch, *there)
    cuda_of(monkeypatch, there[2], there[0])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    here = machine.this_machine()
    assert "".join(card.name for card in here.gpus) == "ca"
    assert here.gpu_problem == ""


def test_rehearsal_one_card_for_dtype_device_and_refusal(monkeypatch, capsys):
    """torch sees the smaller, older card first: nothing may be decided by the larger one."""
    old, big = (
        Card("old", "GPU-1", 8, capability=(7, 5)),
        Card("big", "GPU-2", 80, capability=(9, 0)),
    )
    Nvml(monkeypatch, big, old)
    cuda_of(monkeypatch, old, big)
    here = machine.this_machine()
    assert machine.card(here).name == "old"
    assert device.compute_dtype() is torch.float16
    assert device.compute_device() == torch.device("cuda", 0)
    with pytest.raises(KitError, match=r"the old has 8\.0 GiB"):
        preflight.require_fit(validate({"profile": "full"}), here)
    assert machine.describe(here)["GPU"].startswith("old, 8.0 GiB")
    assert machine.describe(here)["other GPUs"].startswith("big: not used")


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), "float16"), ((8, 6), "bfloat16"), ((9, 0), "bfloat16"), ((12, 0), "bfloat16")],
)
def test_rehearsal_dtype_by_capability(monkeypatch, capability, dtype):
    Nvml(monkeypatch)
    cuda_of(monkeypatch, Card("card", capability=capability))
    assert device.compute_dtype() is getattr(torch, dtype)
    profile = "t4" if dtype == "float16" else "full"
    preflight.refuse_what_cannot_run(validate({"profile": profile, "dataset": "pocket"}))


def test_rehearsal_mig_instances(monkeypatch):
    """Its own memory counts, not the whole card's."""
    one = Card("H100 MIG 2g.20gb", "MIG-2", 19.5, capability=(9, 0))
    Nvml(monkeypatch, Card("H100", "GPU-1", 80, capability=(9, 0)), one)
    cuda_of(monkeypatch, one)
    size = int(19.5 * cards.GIB)
    assert machine.card() == cards.Gpu(one.name, size, size, (9, 0), is_mig=True)
    assert "MIG" in cards.remarks(machine.gpus(), "Linux x86_64")[0]


def test_rehearsal_an_instance_whose_uuid_is_the_whole_cards(monkeypatch):
    """Then NVML's figures are another thing's, and CUDA's count."""
    Nvml(monkeypatch, Card("H100", "GPU-1", 80, free=70))
    cuda_of(monkeypatch, Card("H100 MIG 1g.10gb", "GPU-1", 9.5, free=9.0))
    assert machine.card().usable_bytes == 9 * cards.GIB


# ---- NVML is silent, or lies
# -----------------------------------------------------------------------------------------


def test_rehearsal_without_nvml_torch_is_asked(monkeypatch):
    """Containers, Jetson, WSL: torch is imported only if something speaks of a card."""
    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    cuda_of(monkeypatch, Card("Orin", total=32, free=20))
    with monkeypatch.context() as unloaded:
        asked = not_loaded(unloaded)
        assert machine.gpus() == ()
        assert asked == []
        unloaded.setattr(cards, "_card_files", lambda: True)
        assert machine.card().usable_bytes == 20 * cards.GIB
        assert asked == ["torch"]
    assert names() == "Orin"


@pytest.mark.parametrize(
    "silent",
    [
        "nvmlInit",
        "nvmlDeviceGetHandleByUUID",
        "nvmlDeviceGetMemoryInfo",
    ],
)
def test_rehearsal_nvml_fails_where_cuda_works(monkeypatch, silent):
    card = Card("Orin", "GPU-1", total=32, free=20)
    Nvml(monkeypatch, card)
    cuda_of(monkeypatch, card)
    monkeypatch.setattr(pynvml, silent, refuse)
    assert machine.card().usable_bytes == 20 * cards.GIB
    assert device.compute_dtype() is torch.bfloat16


def test_rehearsal_a_card_that_torch_itself_cannot_ask(monkeypatch):
    """Its memory: a full card has no room for the context that the question takes. Its properties:
    it is no card.
    """

    def broken(*_):
        raise RuntimeError("CUDA error")

    cuda_of(monkeypatch, Card("a"))
    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert names() == "a"
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    assert machine.gpus() == ()


def test_rehearsal_more_cards_than_torch_sees(monkeypatch):
    Nvml(monkeypatch, Card("a", "GPU-a"), Card("b", "GPU-b"))
    cuda_of(monkeypatch, Card("a", "GPU-a"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert names() == "a"


def test_rehearsal_memory_shared_with_the_processor(monkeypatch):
    """Jetson, GB10: NVML tells no memory, and CUDA's "free" leaves out what the system's cache
    would give back.
    """
    shared = Card("GB10", "GPU-1", 128, free=3, capability=(12, 1), silent=True)
    Nvml(monkeypatch, shared)
    cuda_of(monkeypatch, shared)
    monkeypatch.setattr(
        cards.psutil,
        "virtual_memory",
        lambda: types.SimpleNamespace(available=100 * cards.GIB, total=128 * cards.GIB),
    )
    assert machine.card().usable_bytes == 100 * cards.GIB
    assert "no memory of its own" in cards.remarks(machine.gpus(), "Linux aarch64")[0]


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_rehearsal_what_the_driver_keeps_is_not_to_be_had(monkeypatch):
    """An 8 GB card gives 7.7 GiB: a prediction between the two must not pass."""
    card = Card("RTX 3070", "GPU-1", 8.0, reserved=0.3)
    Nvml(monkeypatch, card)
    cuda_of(monkeypatch, card)
    assert machine.card().usable_bytes == pytest.approx(7.7 * cards.GIB, rel=1e-6)
    here = machine.this_machine()
    monkeypatch.undo()
    peaks = types.SimpleNamespace(total_bytes=int(7.74 * cards.GIB), total_gib=7.74)
    monkeypatch.setattr(budget, "peak", lambda plan: peaks)
    monkeypatch.setattr(budget, "make_fit", lambda *how: None)
    with pytest.raises(
        KitError,
        match=r"need 7\.74 GiB at its peak, the RTX 3070 has 8\.0 GiB, 7\.70 GiB of them to be had\.",
    ):
        preflight.require_fit(validate({"profile": "full"}), here)
    peaks.total_bytes = int(7.69 * cards.GIB)
    preflight.require_fit(validate({"profile": "full"}), here)


@pytest.mark.parametrize("train", [True, False])
def test_rehearsal_memory_held_by_others_is_told(monkeypatch, train):
    card = Card("RTX 3090", "GPU-1", 24, free=5)
    Nvml(monkeypatch, card)
    cuda_of(monkeypatch, card)
    with pytest.raises(
        KitError,
        match=r"24\.0 GiB, 5\.00 GiB of them to be had, 19\.0 GiB of them are held by other programs",
    ) as refused:
        preflight.require_fit(validate({"profile": "full"}), machine.this_machine(), train)
    assert refused.value.remedy.startswith("close the other programs")


def test_rehearsal_what_this_process_holds_counts_as_free(monkeypatch):
    """Notebook 06's cell is run again after the model was loaded: 18 GiB are this kernel's own, 1
    GiB another's.
    """
    context = cards.CONTEXT_BYTES / cards.GIB
    card = Card("RTX 3090", "GPU-1", 24, free=24 - 1 - 18 - context)
    Nvml(monkeypatch, card)
    cuda_of(monkeypatch, card, held=18)
    here = machine.this_machine()
    assert machine.card(here).others_bytes == pytest.approx(cards.GIB, abs=8)
    preflight.require_fit(validate({"profile": "full"}), here)


@pytest.mark.parametrize(
    ("gib", "n", "shard", "fits"),
    [
        (8.0, 2, "fsdp", True),
        (8.0, 1, "none", False),
        (8.0, 2, "none", False),
        (11.5, 2, "none", True),
        (11.0, 2, "none", False),
        (6.5, 8, "fsdp", False),
    ],
)
def test_rehearsal_several_cards_are_judged_by_what_each_holds(monkeypatch, gib, n, shard, fits):
    """pythia-12b: 7.34 GiB in each of two shards, 11.28 in each of two whole ones, by the table of
    docs/scale.md with AdamW of torch; and 6.4 GiB and the context while it is loaded.
    """
    card = Card("card", "GPU-1", gib)
    Nvml(monkeypatch, card, Card("card", "GPU-2", gib))
    cuda_of(monkeypatch, card, Card("card", "GPU-2", gib))
    here = machine.this_machine()
    settings = validate({"profile": "full", "optim": "adamw_torch"})
    if fits:
        preflight.require_fit(settings, here, n=n, shard=shard)
    else:
        with pytest.raises(KitError, match="does not fit this GPU") as refused:
            preflight.require_fit(settings, here, n=n, shard=shard)
        assert ("more processes" in refused.value.remedy) == (n > 1)


def test_rehearsal_each_process_is_judged_by_its_own_card(monkeypatch):
    """The first card is nearly full, the second is not."""
    full, empty = Card("full", "GPU-1", 24, free=2), Card("empty", "GPU-2", 24)
    Nvml(monkeypatch, full, empty)
    cuda_of(monkeypatch, full, empty)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert machine.card().name == "full", "started alone"
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert machine.card().name == "empty"
    assert device.compute_device() == torch.device("cuda", 1)
    preflight.require_fit(validate({"profile": "full"}), machine.this_machine())


def test_rehearsal_more_processes_than_cards_are_refused(monkeypatch):
    Nvml(monkeypatch, Card("one", "GPU-1"))
    cuda_of(monkeypatch, Card("one", "GPU-1"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(KitError, match="every process needs a card of its own") as refused:
        training.in_this_process(validate({}))
    assert "--processes 1 at most" in str(refused.value)


# ---- what the libraries have code for
# --------------------------------------------------------------------------------


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    ("name", "capability", "cuda", "codes", "who"),
    [("Tesla V100", (7, 0), "13.0", NEW, "torch"), ("Tesla P100", (6, 0), "13.0", OLD, "bitsandbytes"),
     ("GTX 1080", (6, 1), "12.8", OLD, "bitsandbytes"), ("GTX 980", (5, 2), "12.6", OLD, "bitsandbytes"),
     ("Tesla V100", (7, 0), "12.8", OLD, ""), ("GTX 1080", (6, 1), "12.6", OLD, ""), ("Tesla T4", (7, 5), "13.0", NEW, ""),
     ("RTX 4090", (8, 9), "13.0", NEW, ""), ("later", (13, 0), "13.0", NEW, "")],
)  # fmt: skip
def test_rehearsal_a_card_without_code_for_it(monkeypatch, name, capability, cuda, codes, who):
    """Judged by torch's own list and by what bitsandbytes' libraries are compiled for."""
    card = Card(name, "GPU-1", 32, capability=capability)
    Nvml(monkeypatch, card)
    cuda_of(monkeypatch, card, cuda=cuda, codes=codes)
    here = machine.this_machine()
    assert bool(here.gpus) == (who == "")
    assert device.compute_device().type == ("cpu" if who else "cuda")
    if who:
        assert device.compute_dtype() is torch.float32
        with pytest.raises(KitError, match=rf"needs a GPU.*{name}") as refused:
            preflight.refuse_what_cannot_run(validate({"profile": "full"}))
        assert who in str(refused.value)
        assert "CUDA_VISIBLE_DEVICES" in refused.value.remedy
        preflight.refuse_what_cannot_run(validate({}))
        output = CliRunner().invoke(cli.app, ["doctor"]).output
        assert sum(name in line for line in output.splitlines()) == 1
        assert "take this profile: tiny" in output


def test_rehearsal_what_bitsandbytes_is_compiled_for():
    """`OLDEST` beside the libraries of this wheel: the architectures of machine code in the headers
    of their fat binaries.

    A fat binary begins with its magic number, version 1, the length of this header (16) and of all
    that follows: entries of kind (1 PTX, 2 machine code), length of header and body, and at byte 28
        the architecture.
    """
    libraries = sorted(Path(bitsandbytes.__file__).parent.glob("libbitsandbytes_cuda*.so"))
    if not libraries:
        pytest.skip("this wheel of bitsandbytes has no CUDA libraries")
    for path in libraries:
        data, found = path.read_bytes(), set()
        for start in re.finditer(re.escape(struct.pack("<IHH", 0xBA55ED50, 1, 16)), data):
            at = start.end() + 8
            end = min(at + int.from_bytes(data[start.end() : at], "little"), len(data))
            while at + 32 <= end:
                kind, _, header, body = struct.unpack_from("<HHIQ", data, at)
                if kind == 2:
                    found.add(*struct.unpack_from("<I", data, at + 28))
                at += max(header + body, 32)
        major, minor = map(int, re.search(r"cuda(\d\d)(\d+)", path.name).groups())
        since = max(version for version in cards.OLDEST if version <= (major, minor))
        assert divmod(min(found), 10) == cards.OLDEST[since], path.name


# ---- doctor ----------------------------------------------------------------------------------------------------------


def doctor() -> list[str]:
    return CliRunner().invoke(cli.app, ["doctor"]).output.splitlines()


@pytest.mark.parametrize(
    ("what", "build", "version"), [("XPU", "xpu", "20250201"), ("ROCm 6.4", "hip", "6.4")]
)
def test_rehearsal_doctor_says_what_is_not_used(monkeypatch, what, build, version):
    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert not any(line.startswith(("XPU", "ROCm", "MPS", "MIG")) for line in doctor())
    monkeypatch.setattr(torch.version, build, version)
    assert [
        line.split(":")[0].startswith(what)
        for line in doctor()
        if line.startswith(("XPU", "ROCm", "MPS"))
    ] == [True]


@pytest.mark.parametrize("there", [("T4", "T4"), ("P100",), ()])
def test_rehearsal_doctor_on_kaggle(monkeypatch, there):
    """Two T4s, of which one is used; a P100, for which the torch of Kaggle's image (CUDA 12.8) has
    no code; no accelerator chosen yet.
    """
    of = {
        "T4": ("Tesla T4", 15.0, (7, 5)),
        "P100": ("Tesla P100-PCIE-16GB", 16.0, (6, 0)),
    }
    cards_there = []
    for number, short in enumerate(there):
        name, total, capability = of[short]
        cards_there.append(Card(name, f"GPU-{number}", total, capability=capability))
    Nvml(monkeypatch, *cards_there)
    codes = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
    cuda_of(monkeypatch, *cards_there, cuda="12.8", codes=codes)
    assert not any(line.startswith("Kaggle") for line in doctor())
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    said = doctor()
    [line] = [line for line in said if line.startswith("Kaggle")]
    assert "T4 x2" in line
    assert "Internet" in line
    text = "\n".join(said)
    profile = re.search("take this profile: (\\w+)", text)[1]
    if there == ("P100",):
        assert "has no code for Tesla P100-PCIE-16GB (compute capability 6.0)" in text
        assert "a build of torch for CUDA 11.8 or later, before 12.8" in text
        assert profile == "tiny"
    elif there:
        assert "GPU        Tesla T4, 15.0 GiB" in text
        assert "other GPUs Tesla T4: not used" in text
        assert profile in ("t4", "full")
    else:
        assert profile == "tiny"


def test_rehearsal_apples_gpu_is_said_not_to_be_used():
    assert cards.remarks((), "Darwin x86_64") == []
    assert cards.remarks((), "Darwin arm64")[0].startswith("MPS")


def test_rehearsal_doctor_names_the_card_and_the_others(monkeypatch):
    there = Card("A100", "GPU-1", 40, capability=(8, 0)), Card("T4", "GPU-2", 15, capability=(7, 5))
    Nvml(monkeypatch, *there)
    cuda_of(monkeypatch, *there)
    lines = doctor()
    assert "GPU        A100, 40.0 GiB, 40.0 GiB free, with bfloat16" in lines
    assert "other GPUs T4: not used; CUDA_VISIBLE_DEVICES chooses the card" in lines
    assert any(line.startswith("take this profile: full") for line in lines)


def test_rehearsal_training_stays_on_the_cpu_beside_apples_gpu(monkeypatch):
    """transformers would take MPS by itself; the kit's own model lies on the CPU."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (
        open_cells.arguments(validate({})).device == device.compute_device() == torch.device("cpu")
    )
