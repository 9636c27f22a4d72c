"""Fuzzing of what users bring: parameters, data files, adapters and checkpoints, prompts.

Whatever comes in, one of two things happens: it works, or it is refused with the kit's own error.
QLORA_NB_FUZZ says how many inputs there are together (300 in a plain test run, 10,000 and more in
`make verify`); the seeds are fixed, so a failure repeats.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from qlora_nb.answer import adapters, generate, prompt_files
from qlora_nb.errors import KitError
from qlora_nb.memory import preflight
from qlora_nb.model import data, load
from qlora_nb.pocket import ADAPTER_DIR
from qlora_nb.record import runs, seal
from qlora_nb.settings import PROFILES, Settings, validate
from qlora_nb.train import checkpoints

N = int(os.environ.get("QLORA_NB_FUZZ", "300"))
SHARES = {"parameters": 0.4, "data": 0.2, "adapters": 0.12, "checkpoints": 0.18, "prompts": 0.1}
COUNTS: Counter[str] = Counter()
"""(kind, what became of it) → how many; written to QLORA_NB_FUZZ_OUT at the end."""


def share(kind: str) -> int:
    return max(1, round(N * SHARES[kind]))


def tried(kind: str, work: Callable[[], object]) -> object:
    """Run one input; anything but a result or a short refusal with a remedy fails the test."""
    try:
        result = work()
    except KitError as error:
        refusal = error
    else:
        COUNTS[f"{kind}: used"] += 1
        return result
    COUNTS[f"{kind}: refused"] += 1
    assert len(str(refusal)) < 1500, "a refusal is short"
    assert refusal.remedy or refusal.allowed
    return None


@pytest.fixture(scope="module", autouse=True)
def counted():
    yield
    print(dict(COUNTS))
    if target := os.environ.get("QLORA_NB_FUZZ_OUT"):
        Path(target).write_text(json.dumps(COUNTS))


def damaged(whole: bytes, random: Random) -> bytes:
    """One to eight wounds: a bit flipped, bytes overwritten, cut out, inserted or doubled, the end
    lost.
    """
    content = bytearray(whole)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        at, n = random.randrange(len(content) + 1), random.choice((1, 1, 2, 7, 300))
        match random.randrange(6):
            case 0 if at < len(content):
                content[at] ^= 1 << random.randrange(8)
            case 1:
                content[at : at + n] = random.randbytes(n)
            case 2:
                del content[at : at + n]
            case 3:
                content[at:at] = random.choice(
                    (
                        random.randbytes(n),
                        b"\x00" * n,
                        b'"',
                        b"{",
                        b"]",
                        b"\n",
                        b",",
                        b"\xff\xfe",
                        b"null",
                    )
                )
            case 4:
                content[at:at] = content[at : at + n]
            case 5:
                del content[at:]
    return bytes(content)


# ---- parameters ------------------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(max_size=30),
    st.text(st.characters(), max_size=8),  # surrogates too
    st.sampled_from(
        [
            "",
            " ",
            "nan",
            "-inf",
            "1e999",
            "0x10",
            "[",
            '["a"',
            "[[1]]",
            "{}",
            "None",
            "true",
            "~x/y",
            "/",
            "a\0b",
            "../..",
            "x" * 5000,
            "-1",
            "1_000",
            "٣",
            "1" * 5000,
            "=",
            "a=b=c",
            "$(ls)",
            "<b>",
            "a/b",
            "https://x/y",
            "\ud800",
            "null",
            "pocket",
        ]
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.binary(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=2)),
    max_leaves=5,
)


def own_values(name: str) -> st.SearchStrategy:
    """Values that some profile has for this parameter, as they are and as text."""
    found = [table[name].value for table in PROFILES.values() if name in table] or list(PROFILES)
    return st.sampled_from([*found, *(str(value) for value in found)])


NAMES = st.sampled_from(list(Settings.model_fields))
PAIRS = st.one_of(
    st.tuples(st.one_of(NAMES, TEXTS), VALUES),
    *[NAMES.flatmap(lambda name: st.tuples(st.just(name), own_values(name)))] * 3,
)


@seed(0)
@given(st.lists(PAIRS, min_size=1, max_size=3).map(dict))
@settings(
    max_examples=share("parameters"),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_parameters(values):
    def work():
        found = validate(values)
        preflight.refuse_what_cannot_run(found)  # what it says about a path or a hub name
        assert found._repr_html_()
        assert found.papermill_line()
        return found

    os.environ["HF_HUB_OFFLINE"] = "1"
    found = tried("parameters", work)
    if found:
        assert validate(json.loads(found.model_dump_json())) == found, (
            "what is written down can be read again"
        )


# ---- data files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One good file of each kind, as bytes."""
    rows = [
        {"instruction": f"Say “{i}”.", "input": "é" * (i % 2), "output": f"It is {i}, 😀."}
        for i in range(12)
    ]
    turns = [
        {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]}
    ] * 6
    folder, table = tmp_path_factory.mktemp("whole"), data.datasets.Dataset.from_list(rows)
    table.to_csv(str(folder / "a.csv"))
    table.to_parquet(str(folder / "a.parquet"))
    (folder / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (folder / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (folder / "turns.json").write_text(json.dumps(turns), encoding="utf-8")
    return [(path.suffix, path.read_bytes()) for path in sorted(folder.iterdir())]


def test_data_files(files, tmp_path, monkeypatch, capsys):
    random = Random(1)
    monkeypatch.setattr(data.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data.datasets.disable_progress_bars()
    for n in range(share("data")):
        suffix, whole = random.choice(files)
        path = tmp_path / f"n{n}{suffix}"
        path.write_bytes(damaged(whole, random))
        chosen = validate({"dataset": str(path), "eval_rows": 1, "train_rows": 5})
        rows = tried("data", lambda chosen=chosen: data.load(chosen))
        if rows:
            assert all(
                isinstance(row["instruction"], str) and row["output"].strip() for row in rows[0]
            )
        path.unlink()
        if n % 50 == 49:
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
            capsys.readouterr()
    data.datasets.enable_progress_bars()


# ---- adapters and checkpoints
# ----------------------------------------------------------------------------------------


def wounded(folder: Path, spare: Path, random: Random) -> Iterator[Path]:
    """Hurt one file of a folder after another, each time one, and heal it."""
    names = sorted(p.name for p in folder.iterdir())
    while True:
        path = folder / random.choice(names)
        whole = path.read_bytes()
        path.write_bytes(hurt := damaged(whole, random))
        if hurt != whole:
            yield path
        shutil.copy(spare / path.name, path)


@pytest.fixture(scope="module")
def bases():
    chosen = validate({})
    return (
        chosen,
        load.load_tokenizer(chosen),
        adapters.load_adapter(load.load_base(chosen), ADAPTER_DIR),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sealed", [True, False])
def test_adapters(bases, tmp_path, sealed):
    """A sealed adapter that was hurt is never used; one without a seal is used only if every tensor
    fits.
    """
    folder, random = shutil.copytree(ADAPTER_DIR, tmp_path / "adapter"), Random(2)
    if sealed:
        seal.write_seal(folder)
    spare = shutil.copytree(folder, tmp_path / "spare")
    base, wounds = load.load_base(bases[0]), wounded(folder, spare, random)
    files = json.loads((folder / seal.SEAL).read_text())["files"] if sealed else None
    for _ in range(share("adapters") // 2):
        hurt = next(wounds)
        model = tried("adapters", lambda base=base: adapters.load_adapter(base, folder))
        if model is not None:
            # a seal may be hurt where it says the same as before
            assert not sealed or (
                hurt.name == seal.SEAL and json.loads(hurt.read_text())["files"] == files
            ), hurt.name
            model.unload()
        elif any("lora" in name for name, _ in base.named_modules()):
            base = load.load_base(bases[0])  # PEFT had begun before it met the wound


def test_checkpoints(tmp_path, capsys):
    """A newest checkpoint that was hurt is left out and the one before taken; the run's own files
    may say anything.
    """
    chosen, random = validate({"output_dir": str(tmp_path), "resume": "latest"}), Random(3)
    run = runs.Run(chosen, "06_finetune_pythia_12b")
    for step in (4, 8):
        folder = shutil.copytree(ADAPTER_DIR, run.folder / "checkpoints" / f"checkpoint-{step}")
        torch.save({"state": torch.arange(50)}, folder / "optimizer.pt")
        (folder / "trainer_state.json").write_text(
            json.dumps({"global_step": step, "log_history": []})
        )
        seal.write_seal(folder, settings=chosen.model_dump(), rows="0" * 16)
        run.log({"step": step, "loss": 1.0})
    run.finish("interrupted")
    spare = shutil.copytree(folder, tmp_path / "spare")
    wounds = wounded(folder, spare, random)
    sealed = json.loads((folder / seal.SEAL).read_text())
    for n in range(share("checkpoints")):
        if n % 3 == 2:  # the run's own files
            path = run.folder / random.choice(("manifest.json", "metrics.jsonl"))
            whole = path.read_bytes()
            path.write_bytes(damaged(whole, random))
            tried(
                "checkpoints",
                lambda: (
                    runs.status_of(run.folder),
                    run.truncate_log(8),
                    checkpoints.start(chosen, run.manifest["notebook"]),
                ),
            )
            path.write_bytes(whole)
            for extra in set(run.folder.parent.iterdir()) - {run.folder}:
                shutil.rmtree(extra)
            continue
        hurt = next(wounds)
        found = seal.newest_checkpoint(run.folder)
        if hurt.name != seal.SEAL:
            assert found.name == "checkpoint-4", hurt.name
        elif found == folder:  # a wound of the seal that leaves the list of files whole
            assert json.loads(hurt.read_text())["files"] == sealed["files"]
        tried(
            "checkpoints",
            lambda found=found: found and checkpoints.require_same(found, chosen, "0" * 16),
        )
        capsys.readouterr()


# ---- prompts ---------------------------------------------------------------------------------------------------------

ALPHABETS = [
    "abc \n",
    "".join(map(chr, range(160))),
    "ÄéßÅñ漢字かな한글🙂👩‍👩‍👧‍👦𝒳\u202e\u200b\u2028\ufeff\u00a0",
    "<script>&\"'{}$%\\`*_#|[]()",
    "\ud800\udfff\udc00a",
    "### Instruction:\n### Response:",
    "<|endoftext|><|padding|>",
]


@pytest.mark.fault(29)
def test_prompts(bases, tmp_path):
    chosen, tokenizer, model = bases
    chosen, random = chosen.replace(max_new_tokens=1), Random(4)
    for n in range(share("prompts")):
        length = 100_000 if n % 25 == 24 else random.choice((0, 1, 5, 60, 400))
        prompt = "".join(random.choices(random.choice(ALPHABETS), k=length))
        if n % 3 == 0:  # a file of prompts
            path = tmp_path / "prompts.txt"
            path.write_bytes(damaged(prompt.encode("utf-8", "surrogatepass"), random))
            tried("prompts", lambda path=path: prompt_files.read_rows(str(path), {}))
            continue

        def asked(prompt=prompt):
            return generate.answer_all(model, tokenizer, [generate.row_of(prompt)], chosen)[0]

        said = tried("prompts", asked)
        assert said is None or isinstance(said, str)


def test_the_inputs_were_as_many_as_asked_for():
    """Runs last: only when all of this file ran."""
    if len({key.split(":")[0] for key in COUNTS}) == len(SHARES):
        assert sum(COUNTS.values()) >= 0.95 * N, COUNTS
