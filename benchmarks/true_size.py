"""pythia-12b at its true size on a CPU: the whole path of the notebooks, from 24 GB of 16-bit
weights to two answers, with seconds and memory beside every step, predicted beside measured.

    python benchmarks/true_size.py --data FOLDER      into qlora_nb/recorded/true_size.json
    python benchmarks/true_size.py --data FOLDER --only "70m, r 16" --out f
    python tools/recorded_tables.py                   the notebooks' table, from what was measured

FOLDER holds the real tokenizer of Pythia, `gpt_neox_20b_tokenizer.json`, and Alpaca's 52,002 rows,
`alpaca/alpaca_data.json.xz`. The weights are random (`random_weights`): bytes and seconds do not
depend on what they are; what such a model answers means nothing.

Needed are 24 GB of disk for the 16-bit weights, 8 for the 4-bit copy and some for checkpoints (all
are removed in the end), 12 GiB of memory and one to two hours on two cores. Every stage is a
process of its own, so that the next one begins with nothing; its memory is read every 5 ms.
Anonymous memory is counted apart from mapped files, which the system takes back when it needs room.
A stage that is in the file already is not made again.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import provenance
import random_weights
from host_memory import Memory
from provenance import open_cells
from transformers import PreTrainedTokenizerFast

from qlora_nb import sources
from qlora_nb.answer import adapters, generate
from qlora_nb.memory import budget, estimates, ledger
from qlora_nb.memory.plan import plan_of
from qlora_nb.model import configs, data, load, quantized_copy
from qlora_nb.pythia import PYTHIA
from qlora_nb.record import files, seal
from qlora_nb.settings import Settings, validate
from qlora_nb.train import checkpoints

TARGET = provenance.ROOT / "qlora_nb" / "recorded" / "true_size.json"

LITTLE = "one step in 6 GiB"

STAGES = ("load", "from the copy", "train", "killed", "resumed", "answer", LITTLE)
"""What is done with the first case, in this order."""

LIMIT_BYTES = 6 * 2**30
"""Memory of the stage `LITTLE`, less than the 4-bit model has: mapped files count, so that pages of
the weights have to be read from the disk again and again.
"""

CASES = {
    "12b, r 16": STAGES,
    "12b, r 64": ("train",),
    "6.9b, r 16": ("load", "train"),
    "2.8b, r 16": ("load", "train"),
}
"""Size of the Pythia and rank of the adapter → what is done."""

TRAIN = {
    "profile": "full",
    "prequantized": True,
    "max_length": 192,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_steps": 3,
    "warmup_steps": 0,
    "save_steps": 1,
    "train_rows": 3,
    "eval_rows": 1,
    "max_new_tokens": 8,
}

KILLED_AFTER = 2
"""The step whose checkpoint the killed run leaves: it is killed in the next one."""


# ---- the stages, each called in a process of its own
# ---------------------------------------------------------------------------------------


def load_first(settings: Settings) -> dict:
    """From 16-bit safetensors to 4 bit, and the copy written; the ledger against live tensors."""
    saving = Memory()
    save = quantized_copy.save

    def timed(*arguments):
        with saving:
            save(*arguments)

    quantized_copy.save = timed
    with Memory() as memory:
        model = load.load_base(settings)
    return {
        **memory.found(),
        "of them writing the copy": saving.found(),
        **_static(model, settings),
    }


def load_copy(settings: Settings) -> dict:
    """From the 4-bit copy, whose hashes are verified first."""
    path = sources.model_path(settings.model_id)
    with Memory() as verifying:
        copy = quantized_copy.find(path, settings, configs.torch.float32)
    with Memory() as memory:
        model = load.load_base(settings)
    n_bytes = sum(file.stat().st_size for file in copy.glob("*.safetensors"))
    return {
        **memory.found(),
        "of them verifying its hashes": verifying.found(),
        "copy_bytes": n_bytes,
        **_static(model, settings),
    }


def _static(model, settings: Settings) -> dict:
    predicted = ledger.predict(plan_of(settings.replace(r=0)))
    measured = ledger.measure(model)
    names = [name for name in ledger.ORDER if name not in (ledger.GRADIENTS, ledger.STATES)]
    return {
        "static_predicted": sum(predicted[name] for name in names),
        "static_measured": measured.total_bytes,
        "static_bytes_apart": sum(abs(predicted[name] - measured[name]) for name in names),
    }


def train(settings: Settings) -> dict:
    """Optimizer steps of notebook 06 on real rows, each with its checkpoint; where `resume` is
    "latest", the run that was killed goes on.
    """
    tokenizer = load.load_tokenizer(settings)
    rows = data.tokenize_rows(data.load(settings)[0], tokenizer, settings)
    lengths = [len(ids) for ids in rows["input_ids"]]
    mean_tokens = round(sum(lengths) / len(lengths))
    estimated = estimates.step_seconds(plan_of(settings.replace(max_length=mean_tokens)))
    with Memory() as memory:
        model = open_cells.attach_adapter(load.load_base(settings), settings)
        run = checkpoints.start(settings, "06_true_size")
        seconds = []

        def report(step: dict) -> None:
            seconds.append(step["seconds"])
            print(step, file=sys.stderr, flush=True)

        result = open_cells.finetune(model, tokenizer, rows, settings, run, report)
    found = {
        **memory.found(),
        "seconds_at_each_step": [round(s, 1) for s in seconds],
        "estimated_seconds_a_step": round(estimated, 1),
        "tokens_of_the_rows": lengths,
        "losses": result["losses"],
        "adapter_sha256": files.sha256(result["adapter"] / adapters.WEIGHTS),
    }
    if result["held"] is not None:
        n_rows, n_tokens, _ = result["shape"]
        measured_at = settings.replace(per_device_train_batch_size=n_rows, max_length=n_tokens)
        predicted = budget.peak(plan_of(measured_at))
        table = budget.reconcile(predicted, result["held"], result["moved"])
        found["measured_at"] = {"rows": n_rows, "tokens": n_tokens}
        found["lines"] = {name: {"predicted": p, "measured": m} for name, p, m in table}
        _, all_predicted, all_measured = table[-1]
        found["peak_off_percent"] = round(100 * (all_predicted / all_measured - 1), 3)
    return found


def answer(settings: Settings) -> dict:
    """The base and the tuned model answer one prompt, eight tokens each."""
    tokenizer = load.load_tokenizer(settings)
    rows = [generate.row_of("Name three colours.", settings.prompt_template)]
    with Memory() as memory:
        model = adapters.load_adapter(load.load_base(settings), Path(settings.adapter))
        said = {}
        for name, tuned in (("base", False), ("tuned", True)):
            started = time.perf_counter()
            with adapters.base_or_tuned(model, tuned):
                generate.answer_all(model, tokenizer, rows, settings)
            said[name] = round(time.perf_counter() - started, 1)
    return {**memory.found(), "seconds_of_an_answer": said, "new_tokens": settings.max_new_tokens}


def stage(name: str, settings: Settings) -> dict:
    """Carry one stage out, in this process."""
    if name == "load":
        return load_first(settings)
    if name == "from the copy":
        return load_copy(settings)
    if name == "answer":
        return answer(settings)
    if name == "resumed":
        settings = settings.replace(resume="latest")
    if name == LITTLE:
        settings = settings.replace(max_steps=1)
    return train(settings)


# ---- the parent
# ---------------------------------------------------------------------------------------


def prepare(size: str, folder: Path, source: Path) -> str:
    """The random model with Pythia's own tokenizer, and the rows as JSON beside it."""
    model = random_weights.random_pythia(size, folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(source / "gpt_neox_20b_tokenizer.json"),
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(model)
    rows = folder / "alpaca.json"
    if not rows.exists():
        rows.write_bytes(lzma.decompress((source / "alpaca" / "alpaca_data.json.xz").read_bytes()))
    return model


def apart(name: str, values: dict) -> dict:
    """One stage in a process of its own."""
    command = [sys.executable, __file__, "--stage", json.dumps([name, values])]
    if name == LITTLE:
        return limited(command)
    if name == "killed":
        return killed(command, Path(values["output_dir"]))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"stage {name!r} ended with {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def killed(command: list[str], runs: Path) -> dict:
    """A stage that is ended by SIGKILL in the step after a checkpoint."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    whole = f"*/*/checkpoints/checkpoint-{KILLED_AFTER}/{seal.SEAL}"
    while process.poll() is None and not any(runs.glob(whole)):
        time.sleep(1)
    time.sleep(1)
    process.kill()
    return {"exit_code": process.wait()}


def limited(command: list[str]) -> dict:
    """A stage under a limit of memory, by a control group of Linux (version 1, as root)."""
    group = Path("/sys/fs/cgroup/memory/true-size")
    try:
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
        Path("/proc/sys/vm/drop_caches").write_text("1")  # what others have read would not count
    except OSError as error:
        return {"skipped": f"no limit can be set here: {error}"}

    def join() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        preexec_fn=join,
    )
    most = int((group / "memory.max_usage_in_bytes").read_text())
    group.rmdir()
    found = {"limit_bytes": LIMIT_BYTES, "most_bytes": most, "exit_code": done.returncode}
    if done.returncode == 0:
        found |= json.loads(done.stdout.strip().splitlines()[-1])
    return found


def run_case(case: str, folder: Path, source: Path, record: dict, note) -> None:
    """All stages of one case that are not in the record yet."""
    size, r = case.split(", r ")
    found = record["cases"].setdefault(case, {})
    left = [name for name in CASES.get(case, STAGES) if name not in found]
    if not left:
        return
    model = prepare(size, folder, source)
    values = {**TRAIN, "model_id": model, "dataset": str(folder / "alpaca.json"), "r": int(r)}
    if "killed" not in CASES.get(case, STAGES):
        values["max_steps"] = 2  # the second is measured
    runs = folder / f"runs {case}"
    for name in left:
        kind = {"killed": "killed", "resumed": "killed", LITTLE: "little"}.get(name, "whole")
        values["output_dir"] = str(runs / kind)
        if name == "answer":
            [weights] = (runs / "whole").rglob(f"adapter/{adapters.WEIGHTS}")
            values["adapter"] = str(weights.parent)
        found[name] = apart(name, values)
        print(case, name, found[name], flush=True)
        note()
    if "resumed" in found:
        found["same_adapter_after_resume"] = (
            found["resumed"]["adapter_sha256"] == found["train"]["adapter_sha256"]
        )
    found["parameters"] = PYTHIA[size].n_parameters
    made = provenance.provenance()
    found["measured"] = {key: made[key] for key in ("date", "commit", "clean")}
    shutil.rmtree(runs, ignore_errors=True)
    note()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="where the real tokenizer and rows lie")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "true-size")
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument("--only", action="append", help=f"one of {'; '.join(CASES)}")
    parser.add_argument("--keep", action="store_true", help="leave the models where they are")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        name, values = json.loads(given.stage)
        said = os.dup(1)
        os.dup2(2, 1)  # what the kit prints is no result
        found = stage(name, validate(values))
        os.write(said, (json.dumps(found) + "\n").encode())
        return
    record = {**provenance.provenance((0,)), "weights": "random, of the true shape", "cases": {}}
    if given.out.is_file():
        record["cases"] = json.loads(given.out.read_text())["cases"]
    given.folder.mkdir(parents=True, exist_ok=True)
    os.environ["QLORA_NB_CACHE"] = str(given.folder / "cache")

    def note() -> None:
        provenance.write(given.out, record)

    cases = list(given.only or CASES)
    for i, case in enumerate(cases):
        run_case(case, given.folder, given.data, record, note)
        size = case.split(",")[0]
        is_needed = any(other.startswith(f"{size},") for other in cases[i + 1 :])
        if not (given.keep or is_needed):
            shutil.rmtree(given.folder / f"random-pythia-{size}", ignore_errors=True)
            shutil.rmtree(given.folder / "cache" / "quantized", ignore_errors=True)
    if not given.keep:
        shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
