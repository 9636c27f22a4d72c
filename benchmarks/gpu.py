"""What only a CUDA card can tell, measured in the order in which it is wanted: the card itself,
fine-tuning in 16 bit, resuming, running out of memory, and pythia-12b's true shape with random
weights (loading, peaks, answers, speed against two recipes).

    python benchmarks/gpu.py                        everything, into qlora_nb/recorded/gpu.json
    python benchmarks/gpu.py --only peaks answers   these parts, or entries that begin so
    python benchmarks/gpu.py --shape 14m --out FILE anywhere, also without a GPU: the same, small

Run again, it goes on: what is in the file already, made by the same code on the same card, stays;
what failed is tried once more. docs/gpu.md says what each entry answers.

This file is the table of entries and the process that starts one child for each of them. It loads
no torch and so holds nothing of the card; what they measure is in gpu_card.py, gpu_training.py and
gpu_answers.py. Real weights cannot be told from random ones by their bytes; what a random model
says means nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this working copy, whether the kit is installed or not

from qlora_nb.record import files  # noqa: E402

TARGET = ROOT / "qlora_nb" / "recorded" / "gpu.json"
AVOIDED = "avoided by pages"
NO_CARD = "needs a CUDA device"
LIMIT_S = 120
WEIGHTS_LIMIT_S = 300
"""Seconds that an entry may take, and that pythia-12b's weights may take to be made and written."""

LOW = {"head_4bit": True, "embedding_on_cpu": True, "optim": "paged_adamw_8bit"}
PEAKS = {  # what is trained, three steps of full-length rows
    "r 64, 512 tokens, as profile full": {},
    "r 64, 512 tokens, all logits at once": {"loss_chunk": 0},
    "r 64, 512 tokens, no double quantization": {"double_quant": False, "prequantized": False},
    "r 64, 512 tokens, 8-bit states": {"optim": "paged_adamw_8bit"},
    "r 64, 512 tokens, embedding on the CPU": {"embedding_on_cpu": True},
    "r 64, 512 tokens, 4-bit head": {"head_4bit": True},
    "r 64, 1280 tokens": {"max_length": 1280},
    "r 64, 1280 tokens, every option": {"max_length": 1280, **LOW},
    "r 16, 512 tokens, every option": {"r": 16, **LOW},
}
ANSWERS = {
    "1,024 tokens": {},
    "1,024 tokens, every option": {"head_4bit": True, "embedding_on_cpu": True},
}
LOADING = {
    "plain": {"way": "plain"},
    "first, and kept": {"way": "keep"},
    "from the copy": {"way": "copy"},
}
SPEED = {
    "kit": {"who": "kit"},
    "kit with TF32": {"who": "kit", "tf32": True},
    "common": {"who": "common"},
    "pasted": {"who": "pasted"},
}
RATIOS = (("kit", "common"), ("kit", "pasted"), ("kit with TF32", "kit"))
T4 = {"profile": "t4", "compute_dtype": "float16"}


@dataclass(frozen=True)
class Entry:
    """One measurement: `results[part][name] = function(watch, **values)`, in a process of its own.

    Attributes:
        function: its module and name.
        size: the Pythia whose random weights it is given; None: none.
        needs_card: without a CUDA device it is not tried.
        alone: nothing runs beside it; without that, its part's entries run at once and their peaks
            hold each other's bytes.
    """

    part: str
    name: str
    function: str
    values: dict[str, object] = field(default_factory=dict)
    size: str | None = None
    needs_card: bool = False
    alone: bool = True

    @property
    def title(self) -> str:
        return f"{self.part}/{self.name}"


def entries(shape: str = "12b", rounds: int = 1) -> list[Entry]:
    """All measurements in their order.

    Args:
        shape: the Pythia of loading, peaks, answers and speed. If it is a small one, it also stands
            for the 410m and the 2.8b of the other parts.
        rounds: how often the speeds are measured.
    """
    resumed, for_t4 = ("410m", "2.8b") if shape == "12b" else (shape, shape)
    found = [
        Entry("machine", "doctor", "gpu_card.doctor"),
        Entry("machine", "NVML beside CUDA", "gpu_card.two_counts", needs_card=True),
        Entry("machine", "CUDA_VISIBLE_DEVICES", "gpu_card.chosen_cards", needs_card=True),
        Entry("pocket", "bfloat16", "gpu_training.pocket", {"dtype": "bfloat16"}, alone=False),
        Entry("pocket", "float16", "gpu_training.pocket", {"dtype": "float16"}, alone=False),
        Entry("resume", resumed, "gpu_training.resume", size=resumed),
        Entry(
            "out of memory",
            "batch 4 and 1",
            "gpu_training.out_of_memory",
            size=resumed,
            needs_card=True,
        ),
        Entry("out of memory", AVOIDED, "gpu_card.avoided", needs_card=True),
        Entry("t4", for_t4, "gpu_training.peak", {"values": T4}, for_t4),
    ]
    for name, values in LOADING.items():
        found.append(Entry("loading", name, "gpu_answers.load_seconds", values, shape))
    for name, values in PEAKS.items():
        found.append(Entry("peaks", name, "gpu_training.peak", {"values": values}, shape))
    for name, values in ANSWERS.items():
        found.append(Entry("answers", name, "gpu_answers.answer", {"values": values}, shape))
    for number in range(1, rounds + 1):
        for who, values in SPEED.items():
            found.append(
                Entry("speed", f"{who}, round {number}", "gpu_training.speed", values, shape)
            )
    return found


def chosen(table: list[Entry], words: list[str]) -> list[Entry]:
    """The entries that begin with one of these words, in the words' order; all if there is none."""
    found = []
    for word in words or [""]:
        begin_so = [entry for entry in table if entry.title.startswith(word)]
        if not begin_so:
            raise SystemExit(f"no entry begins with {word!r}; --help names them")
        found += [entry for entry in begin_so if entry not in found]
    return found


def at_once(table: list[Entry]) -> list[list[Entry]]:
    """The entries in their order, grouped by what may run at the same time."""
    groups = []
    for entry in table:
        before = groups[-1][-1] if groups else None
        if before and not (entry.alone or before.alone) and entry.part == before.part:
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return groups


def apart(call: list, environment: dict[str, str], limit_s: float) -> dict:
    """What a measurement returns in a process of its own.

    Args:
        call: the card's UUID, the function's name and its arguments by name.

    Returns:
        That, or {"error": why there is nothing}: it raised, was killed, took longer than `limit_s`
        seconds.
    """
    program = str(Path(__file__).with_name("gpu_child.py"))
    command = [sys.executable, program, str(os.getpid()), json.dumps(call)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
            env=os.environ | environment,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {limit_s:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        found = json.loads(lines[-1])
    else:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        found = {"error": f"exit {done.returncode}: {last}"[:300]}
    if "error" in found:
        print(done.stderr[-3000:], file=sys.stderr)
    return found


def code_hash() -> str:
    """SHA-256 of what measures and what is measured, for where git does not tell a change."""
    found = hashlib.sha256()
    for folder in ("qlora_nb", "benchmarks", "tools", "notebooks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".toml", ".j2", ".ipynb"):
                found.update(path.read_bytes())
    return found.hexdigest()


def began_before(out: Path, header: dict) -> dict | None:
    """What an earlier call has measured, if it was the same code, shape, card and packages; the
    file of any other is set aside beside it.
    """
    if not out.is_file():
        return None
    found = json.loads(out.read_text(encoding="utf-8"))
    same = ("commit", "code", "shape", "versions")
    different = [name for name in same if found.get(name) != header[name]]
    names = [[gpu["name"] for gpu in one["hardware"]["gpus"]] for one in (found, header)]
    if names[0] != names[1]:
        different.append("card")
    if not different:
        return found
    aside = out.with_suffix(".before")
    out.replace(aside)
    print(f"{out.name} has another {', '.join(different)}: set aside as {aside.name}")
    return None


def ratios(speeds: dict[str, dict]) -> dict[str, dict]:
    """How many times as fast one is as another, round by round, and the median of that."""
    found = {}
    for faster, slower in RATIOS:
        values = []
        for name, one in speeds.items():
            who, _, number = name.partition(", ")
            other = speeds.get(f"{slower}, {number}", {})
            if who == faster and "tokens_per_s" in one and "tokens_per_s" in other:
                values.append(round(one["tokens_per_s"] / other["tokens_per_s"], 3))
        if values:
            found[f"{faster} over {slower}"] = {"median": statistics.median(values), "all": values}
    return found


class Benchmark:
    """The record, and the children that fill it.

    Args:
        out: the JSON file.
        folder: where random weights and the 4-bit copy go.
        patience: what the limits are multiplied with, for slower machines.
        ends: when the last child must have ended, on time.monotonic()'s clock.
    """

    def __init__(self, out: Path, folder: Path, patience: float, ends: float):
        self.out = out
        self.folder = folder
        self.patience = patience
        self.ends = ends
        self.uuid = None
        self.weights: dict[str, str] = {}  # size → folder
        self.results: dict[str, dict] = {}

    def measure(self, function: str, values: dict, limit_s: float = LIMIT_S) -> dict:
        """See `apart`. Raises TimeoutError where the whole time is up, not the child's own."""
        environment = {"QLORA_NB_CACHE": str(self.folder / "qlora-nb-cache")}
        limit_s = limit_s * self.patience
        left = self.ends - time.monotonic()
        call = [self.uuid, function, values]
        found = apart(call, environment, max(0.1, min(limit_s, left)))
        if left < limit_s and time.monotonic() >= self.ends:
            raise TimeoutError
        return found

    def begin(self, shape: str, commit: str | None) -> None:
        """Find the card, and what was measured before.

        Raises:
            SystemExit: there is no card and the shape is too large without one.
        """
        header = self.measure("gpu_card.header", {})
        if "error" in header:
            raise SystemExit(header["error"])
        self.uuid = header.pop("uuid")
        if not header["hardware"]["gpus"] and shape == "12b":
            raise SystemExit("no CUDA device here: try --shape 14m --out FILE")
        if commit:
            header |= {"commit": commit, "clean": None}
        header |= {"code": code_hash(), "shape": shape, "weights": "random, of the true shape"}
        self.results = began_before(self.out, header) or header

    def write(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.results, indent=1, ensure_ascii=False) + "\n"
        files.write_atomically(self.out, text)

    def note(self, part: str, name: str, found: dict) -> None:
        self.results[part][name] = found
        if part == "speed":
            self.results["ratios"] = ratios(self.results["speed"])
        print(f"{part}/{name}: {json.dumps(found)}", flush=True)
        self.write()

    def weights_of(self, size: str) -> str | None:
        """The folder of a Pythia's random weights, made in a child; None if that failed."""
        if size not in self.weights:
            found = self.measure(
                "gpu_card.weights", {"size": size, "folder": str(self.folder)}, WEIGHTS_LIMIT_S
            )
            made = found.pop("folder", None)
            if made is None or size not in self.results["made"]:
                self.note("made", size, found)
            if made is None:
                return None
            self.weights[size] = made
        return self.weights[size]

    def run(self, table: list[Entry]) -> None:
        """Measure what is not there yet."""
        for part in dict.fromkeys(entry.part for entry in entries()):
            self.results.setdefault(part, {})
        self.results.setdefault("made", {})
        missing = [entry for entry in table if self.is_missing(entry)]
        for group in at_once(missing):
            with ThreadPoolExecutor(len(group)) as pool:
                for entry, found in zip(group, pool.map(self.one, group)):
                    self.note(entry.part, entry.name, found)
        self.write()

    def is_missing(self, entry: Entry) -> bool:
        before = self.results[entry.part].get(entry.name, {"error": "not measured"})
        return "error" in before or "skipped" in before

    def one(self, entry: Entry) -> dict:
        """Measure one entry, or say why not."""
        if entry.needs_card and not self.results["hardware"]["gpus"]:
            return {"skipped": NO_CARD}
        values = entry.values
        if entry.size:
            folder = self.weights_of(entry.size)
            if folder is None:
                return {"error": f"no weights of a {entry.size}"}
            values = {"folder": folder, **values}
        found = self.measure(entry.function, values)
        if entry.name == AVOIDED and "error" not in found:  # notebook 05 reads it by that name
            header = {k: v for k, v in self.results.items() if k not in self.parts()}
            text = json.dumps(header | found, indent=1, ensure_ascii=False) + "\n"
            files.write_atomically(self.out.with_name("avoided_oom.json"), text)
        return found

    def parts(self) -> set[str]:
        return {entry.part for entry in entries()} | {"made", "ratios"}


def main() -> None:
    table = entries()
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="entries:\n  " + "\n  ".join(entry.title for entry in table),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", default="12b", help="Pythia size")
    parser.add_argument("--only", nargs="+", default=[], metavar="ENTRY", help="parts or entries")
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="for weights: 32 GB"
    )
    parser.add_argument("--rounds", type=int, default=1, help="of the speeds")
    parser.add_argument("--minutes", type=float, default=1e6, help="end after so many")
    parser.add_argument("--patience", type=float, default=1.0, help="times the time limits")
    parser.add_argument("--commit", help="of the files, where git does not know it")
    given = parser.parse_args()
    selected = chosen(entries(given.shape, given.rounds), given.only)
    ends = time.monotonic() + 60 * given.minutes
    benchmark = Benchmark(given.out, given.folder, given.patience, ends)
    try:
        benchmark.begin(given.shape, given.commit)
        benchmark.run(selected)
    except TimeoutError:
        raise SystemExit("the time is up: the same command goes on") from None


if __name__ == "__main__":
    main()
