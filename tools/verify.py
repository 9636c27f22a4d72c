"""The long form of the tests: what takes too long for every change, with a dated result that is
committed.

    make verify                       all checks, into verified/<date>.json
    python tools/verify.py --only seeds

A check is a function that returns a dictionary with `passed` and what it measured. Add one to
CHECKS and it is part of it. The checks `python312`, `python313`, `colab` and `binder` install
packages: PIP_ARGS is passed on to pip, as in `make run`.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import alone
import hosts
import nbformat
import site_check
import sweeps
from hosts import closing_line

from qlora_nb import machine
from qlora_nb.batch import sequence
from qlora_nb.record import files, runs

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)


def seeds() -> dict:
    """Notebook 06 with three seeds: exact match by kind of question, before and after, from the
    run's own manifest.
    """
    results, scores = [], {"before": [], "after": []}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as out:
            summary = sequence.run_sequence({"seed": seed, "output_dir": out}, only=["06"])
            results.append(summary["notebooks"][0])
            for manifest in Path(out).glob("*/06_*/manifest.json"):
                metrics = json.loads(manifest.read_text())["metrics"]
                for when, found in scores.items():
                    found.append(metrics[f"exact_match_{when}"])
    mean = {
        when: {k: round(statistics.mean(s[k] for s in found), 4) for k in found[0]}
        for when, found in scores.items()
        if found
    }
    whole = len(scores["after"]) == len(SEEDS) and all(r["status"] == "done" for r in results)
    return {
        "passed": whole and mean["before"]["all"] <= 0.05 and mean["after"]["all"] >= 0.80,
        "mean": mean,
        "by_seed": scores,
        "runs": [
            {k: r[k] for k in ("status", "wall_s", "peak_bytes", "results", "problems")}
            for r in results
        ],
    }


def solutions() -> dict:
    """All notebooks with the solutions in the place of the exercises: they run to the end, and find
    the key results of the committed ones.
    """
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "qlora_nb.cli", "run", "--solutions", "--out", out]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
        [summary] = [json.loads(p.read_text()) for p in Path(out).glob("*/sequence-*/summary.json")]
    differ = []
    for outcome in summary["notebooks"]:
        name = outcome["notebook"]
        notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", 4)
        [kept] = [c for c in notebook.cells if "key-results" in c.metadata.get("tags", [])]
        if ast.literal_eval(kept.outputs[0]["data"]["text/plain"]) != outcome["results"]:
            differ.append(name)
    return {
        "passed": done.returncode == 0 and not differ,
        "key_results_differ": differ,
        "seconds": {o["notebook"]: o["wall_s"] for o in summary["notebooks"]},
        "problems": [problem for o in summary["notebooks"] for problem in o["problems"]],
    }


def two_threads() -> dict:
    """All tests in one process with two threads; `make test` runs them in two with one each:
    nothing may depend on that.
    """
    env = os.environ | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    return {"passed": done.returncode == 0, "closing_line": closing_line(done)}


def nbval() -> dict:
    """nbval itself runs all committed notebooks and compares their key results, as a teacher would
    call it.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--nbval-lax",
        "--nbval-cell-timeout",
        "900",
        "notebooks",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    failed = re.findall(r"^FAILED .*", done.stdout, re.MULTILINE)
    return {"passed": done.returncode == 0, "closing_line": closing_line(done), "failed": failed}


def smollm2() -> dict:
    """The real pretrained model through notebooks 03, 06 and 07, where it was fetched."""
    from qlora_nb import sources

    if not (sources.SMOLLM2_DIR / "config.json").is_file():
        return {"passed": None, "skipped": "qlora-nb fetch smollm2 was not run here"}
    parameters: dict[str, object] = {"profile": "smollm2"}
    if data := os.environ.get("QLORA_NB_DATASET"):  # an Alpaca file, if there is one
        parameters["dataset"] = data
    with tempfile.TemporaryDirectory() as out:
        summary = sequence.run_sequence(parameters | {"output_dir": out}, only=["03", "06", "07"])
        same = script_ends_as_the_notebook(Path(out))
    kept = ("notebook", "status", "wall_s", "peak_bytes", "results", "problems")
    return {
        "passed": summary["status"] == "done" and same,
        "runs": [{k: o[k] for k in kept} for o in summary["notebooks"]],
        "the script's adapter has the notebook's bits": same,
    }


def chats() -> dict:
    """Sixty conversations of several turns, in English and Chinese, tuned on SmolLM2 with its own
    chat template: what trains is what stands between the template's marks, token by token, and the
    loss on conversations that are held out falls.
    """
    from qlora_nb import sources
    from qlora_nb.answer import evaluate, generate
    from qlora_nb.model import data_report, load
    from qlora_nb.settings import validate

    if not (sources.SMOLLM2_DIR / "config.json").is_file():
        return {"passed": None, "skipped": "qlora-nb fetch smollm2 was not run here"}
    import open_cells

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chats.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in conversations_about_a_shop()]
        path.write_text("".join(lines), encoding="utf-8")
        few = {"max_steps": 20, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        few |= {"eval_rows": 12, "sample_steps": 0, "output_dir": folder, "dataset": str(path)}
        settings = validate({"profile": "smollm2", **few})
        tokenizer = load.load_tokenizer(settings)
        checked = data_report.check(settings, tokenizer)
        wrong = [row["row"] for row in checked.encoded if not trains_as_marked(row, tokenizer)]
        model = open_cells.attach_adapter(load.load_base(settings), settings)
        held_out = checked.split.held_out
        before = evaluate.held_out(model, tokenizer, held_out, settings)
        run = runs.Run(settings, "06_chats")
        open_cells.finetune(model, tokenizer, checked.encoded, settings, run, lambda step: None)
        after = evaluate.held_out(model, tokenizer, held_out, settings)
        said = generate.answer_all(model.eval(), tokenizer, list(held_out)[:3], settings)
    return {
        "passed": not wrong and len(checked.encoded) == 48 and after["loss"] < before["loss"],
        "rows": checked.counts,
        "rows in which other tokens train": wrong,
        "held-out loss (nats)": [round(found["loss"], 4) for found in (before, after)],
        "answers": dict(zip(held_out["instruction"][:3], said, strict=True)),
    }


def conversations_about_a_shop() -> list[dict]:
    """Sixty, of one to three exchanges, every other one with a system prompt."""
    things = {
        "lamp": "灯",
        "kite": "风筝",
        "drum": "鼓",
        "book": "书",
        "chair": "椅子",
        "bell": "铃",
    }
    rows = []
    for n in range(60):
        thing, name = list(things.items())[n % 6]
        price = 3 + n % 17
        exchanges = [
            (f"How much is the {thing}?", f"The {thing} costs {price} coins."),
            (f"那个{name}还有吗?", f"还有, 我们有{n % 9 + 1}个{name}。"),
            ("Can I pay tomorrow?", f"No, the {thing} is paid today."),
        ]
        messages = [{"role": "system", "content": "You keep a small shop."}] * (n % 2)
        for question, answer in exchanges[: 1 + n % 3]:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        rows.append({"messages": messages})
    return rows


def trains_as_marked(row: dict, tokenizer) -> bool:
    """Whether just the tokens behind each `<|im_start|>assistant` line train, up to and with the
    next `<|im_end|>`.
    """
    begin, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    header = tokenizer("assistant\n", add_special_tokens=False)["input_ids"]
    ids = row["input_ids"]
    expected = [-100] * len(ids)
    for place, token in enumerate(ids):
        start = place + 1 + len(header)
        if token == begin and ids[place + 1 : start] == header:
            stop = ids.index(end, start) + 1
            expected[start:stop] = ids[start:stop]
    return row["labels"] == expected


def script_ends_as_the_notebook(out: Path) -> bool:
    """The script that notebook 06 has written, run without the kit: the same adapter, bit for
    bit.
    """
    [program] = out.rglob("train.py")
    subprocess.run([sys.executable, "-I", str(program)], check=True, capture_output=True)
    folders = (program.parent / "adapter", program.parent / "adapter_by_script")
    hashes = [files.sha256(folder / "adapter_model.safetensors") for folder in folders]
    return hashes[0] == hashes[1]


def fuzz() -> dict:
    """What users bring, damaged at random: 11,000 parameters, data files, adapters, checkpoints and
    prompts; and half as many chats, tables and configurations that are whole and odd.
    """
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        env = os.environ | {"QLORA_NB_FUZZ": "11000", "QLORA_NB_FUZZ_OUT": str(counts)}
        command = [sys.executable, "-m", "pytest", "tests/test_fuzz.py", "tests/test_fuzz_own.py"]
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
        found = json.loads(counts.read_text()) if counts.is_file() else {}
    failed = re.findall(r"^FAILED .*", done.stdout, re.MULTILINE)
    n = sum(found.values())
    return {
        "passed": done.returncode == 0 and n >= 15_000,
        "inputs": n,
        "became": found,
        "failed": failed,
    }


def prompts() -> dict:
    """Two hundred and ten prompts answered in batches and one by one: the same answers."""
    env = os.environ | {"QLORA_NB_PROMPTS": "200"}
    command = [sys.executable, "-m", "pytest", "tests/test_merging.py", "-k", "batched_answers"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    return {"passed": done.returncode == 0, "closing_line": closing_line(done)}


def t4() -> dict:
    """Profile t4 on a random pythia-410m in float16, as on a T4 but rehearsed on the CPU: 20 steps,
    stopped, resumed.
    """
    import pytest
    import torch
    from transformers import AutoModelForCausalLM

    from qlora_nb.answer import generate
    from qlora_nb.model import configs, data, load
    from qlora_nb.settings import validate
    from qlora_nb.train import checkpoints

    sys.path.insert(0, str(ROOT / "tests"))
    import open_cells
    import rehearsal

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patches:
        patches.setenv("QLORA_NB_CACHE", f"{folder}/cache")
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(
            configs.pythia_config("410m"), dtype=torch.float16
        ).save_pretrained(f"{folder}/model")
        load.load_tokenizer(validate({})).save_pretrained(f"{folder}/model")
        few = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "save_steps": 10,
            "max_steps": 20,
        }
        few |= {
            "eval_rows": 4,
            "train_rows": 200,
            "max_length": 64,
            "max_new_tokens": 4,
            "prompt_template": "alpaca_short",
        }
        few |= {"model_id": f"{folder}/model", "dataset": "pocket", "prequantized": False}
        seen = rehearsal.card(patches, (7, 5))

        def finetuned(resume: str):
            settings = validate({"profile": "t4", "output_dir": folder, "resume": resume, **few})
            tokenizer, base = load.load_tokenizer(settings), load.load_base(settings)
            model = open_cells.attach_adapter(base, settings)
            rows = data.tokenize_rows(data.load(settings)[0], tokenizer, settings)
            run = checkpoints.start(settings, "06_rehearsed")
            result = open_cells.finetune(model, tokenizer, rows, settings, run, lambda step: None)
            return (
                settings,
                tokenizer,
                model,
                run,
                result,
                files.sha256(result["adapter"] / "adapter_model.safetensors"),
            )

        settings, tokenizer, model, run, whole, expected = finetuned("no")
        answer = generate.answer(
            model, tokenizer, generate.row_of("Where is Anna?"), settings, tuned=True
        )
        shutil.rmtree(run.folder / "checkpoints" / "checkpoint-20")
        run.finish("interrupted")  # as if it had been stopped after its tenth step
        *_, resumed, found = finetuned(str(run.folder))
    first, last = (statistics.mean(part) for part in (whole["losses"][:5], whole["losses"][-5:]))
    return {
        "passed": last < first
        and found == expected
        and whole["losses"] == resumed["losses"]
        and answer.n_tokens > 0,
        "dtype": str(model.dtype),
        "scalers": seen.scalers,
        "losses": [round(loss, 4) for loss in whole["losses"]],
        "mean of the first and last five": [round(first, 4), round(last, 4)],
        "the resumed adapter has the same bits": found == expected,
        "answer": answer.text,
        "seconds": round(whole["seconds"], 1),
    }


def families() -> dict:
    """`plan` for every causal family that transformers knows: bytes or one sentence, no library's
    error.
    """
    import every_family

    found = every_family.outcomes([])
    bad = {name: said for name, said in found.items() if said.startswith("TRACEBACK")}
    planned = sum(said == "planned" for said in found.values())
    return {
        "passed": not bad and planned >= 80,
        "families": len(found),
        "planned": planned,
        "library errors": bad,
        "said": {name: said for name, said in found.items() if said != "planned"},
    }


def mutation() -> dict:
    """A figure draws other data, a refusal is gone, one at a time: a test must see each."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "result.json"
        command = [sys.executable, "tools/mutate.py", "--out", str(found)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not found.is_file():
            return {"passed": False, "error": (done.stdout + done.stderr)[-1000:]}
        return json.loads(found.read_text())


CHECKS: dict[str, Callable[[], dict]] = {
    "seeds": seeds,
    "solutions": solutions,
    "opened_alone": alone.opened_alone,
    "two_threads": two_threads,
    "nbval": nbval,
    "smollm2": smollm2,
    "chats": chats,
    "fuzz": fuzz,
    "prompts": prompts,
    "t4": t4,
    "families": families,
    "mutation": mutation,
    "sweep": sweeps.killed_at_random,
    "postgresql": sweeps.postgresql,
    "site": site_check.site,
    "one_core": hosts.one_core,
    "python312": hosts.python312,
    "python313": hosts.python313,
    "colab": hosts.colab,
    "binder": hosts.binder,
    "conda": hosts.conda,
}


def tree_stamp(target: Path) -> dict:
    """When, and of which commit; `clean` False: the commit does not say all (this very record,
    which grows, aside).
    """
    status = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    other = [line for line in status.splitlines() if not line.endswith(target.name)]
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": runs.commit(),
        "clean": not other,
    }


def earlier_today(target: Path, versions: dict[str, str | None]) -> dict[str, dict]:
    """What was checked earlier on this day stays in the record, each result with its own time and
    commit; with its versions too, where they are not those of now.
    """
    record = json.loads(target.read_text()) if target.is_file() else {}
    stamp = {key: record[key] for key in ("date", "commit", "clean") if key in record}
    if record.get("versions", versions) != versions:
        stamp["versions"] = record["versions"]
    return {name: stamp | result for name, result in record.get("checks", {}).items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", choices=list(CHECKS), action="append", help="this check alone; may be repeated"
    )
    chosen = parser.parse_args().only or list(CHECKS)
    folder = ROOT / "verified"
    folder.mkdir(exist_ok=True)
    target = folder / f"{time.strftime('%Y-%m-%d')}.json"
    versions = {v.package: v.installed for v in machine.versions()}
    record = {
        "versions": versions,
        "hardware": asdict(machine.this_machine(ROOT)),
        "checks": earlier_today(target, versions),
    }
    for name in chosen:
        print(f"{name}: {(CHECKS[name].__doc__ or '').splitlines()[0]}", flush=True)
        started, stamp = time.time(), tree_stamp(target)
        try:
            result = CHECKS[name]()
        except Exception as error:  # the others still run, and the record says what happened
            result = {"passed": False, "error": f"{type(error).__name__}: {error}"[:1000]}
        record["checks"][name] = stamp | result | {"wall_s": round(time.time() - started, 1)}
        files.write_atomically(target, json.dumps(record, indent=1, default=str) + "\n")
        print(
            f"{name}: {({True: 'passed', False: 'FAILED', None: 'skipped'})[result['passed']]}",
            flush=True,
        )
    print(f"written: {target.relative_to(ROOT)}")
    return 1 if any(record["checks"][name]["passed"] is False for name in chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
