"""The script to take home does what notebook 06 does, and no name, path or text becomes code."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate
import open_cells
import pytest
import rehearsal
import torch
import transformers
from datasets import Dataset
from test_real_data import DATA
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from qlora_nb import cli, sources
from qlora_nb.answer import adapters, generate
from qlora_nb.errors import KitError
from qlora_nb.model import configs, data, load
from qlora_nb.pocket import ADAPTER_DIR, MODEL_DIR
from qlora_nb.record import runs
from qlora_nb.settings import validate
from qlora_nb.train import attach, script

WEIGHTS = "adapter_model.safetensors"
SMALL = {"max_steps": 3, "per_device_train_batch_size": 4, "warmup_steps": 1, "save_steps": 0}


def train_by_cells(settings):
    """What notebook 06 leaves: losses, the run's folder with its adapter, the files to take
    home.
    """
    model = open_cells.attach_adapter(load.load_base(settings), settings)
    tokenizer = load.load_tokenizer(settings)
    texts, _ = data.load(settings)
    rows = data.tokenize_rows(texts, tokenizer, settings)
    run = runs.Run(settings, "06_test")
    done = open_cells.finetune(model, tokenizer, rows, settings, run, lambda step: None)
    script.write_untrained(settings, str(run.folder))
    return done["losses"], run.folder


def run_here(folder: Path, *changes: tuple[str, str]) -> list[float]:
    """Execute train.py in this process, some of its text replaced; returns the logged losses."""
    source = (folder / "train.py").read_text(encoding="utf-8")
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    names = {"__file__": str(folder / "train.py"), "__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(source, "train.py", "exec"), names)
    return [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]


def run_apart(folder: Path, program: str, *arguments: str) -> str:
    """Execute a program in a process that says at its end which of the kit's modules it loaded."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{program!r}, *{arguments!r}]\n"
        f"runpy.run_path({str(folder / program)!r}, run_name='__main__')\n"
        "print([name for name in sys.modules if name.startswith('qlora_nb')])\n"
    )
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=elsewhere,
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *said, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    return "\n".join(said)


def same_bytes(folder: Path) -> bool:
    mine = (folder / "adapter" / WEIGHTS).read_bytes()
    return mine == (folder / "adapter_by_script" / WEIGHTS).read_bytes()


def random_model(folder: Path, family: str, **changes) -> str:
    """A tiny model of a family with random weights and the pocket tokenizer; returns its folder."""
    if family == "Pythia":
        config = configs.pythia_config("14m")
        config.num_hidden_layers = 2
        config.vocab_size = 1088
    else:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"vocab_size": 1088, "intermediate_size": 128, "max_position_embeddings": 256}
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
        config = getattr(transformers, f"{family}Config")(**{**sizes, **ids, **changes})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
    return str(folder)


def full(folder: str, tmp_path: Path, **changes):
    """Profile full on a small model and little of the pocket's data."""
    values = {"model_id": folder, "dataset": "pocket", "r": 4, "prequantized": False}
    values |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    values |= {
        "max_length": 200,
        "train_rows": 60,
        "eval_rows": 4,
        "output_dir": str(tmp_path / "runs"),
    }
    return validate({"profile": "full", **SMALL, **values, **changes})


# --- the same adapter ---


def test_the_script_ends_with_the_notebooks_adapter_and_needs_nothing_of_the_kit(tmp_path):
    settings = validate({**SMALL, "output_dir": str(tmp_path)})
    _, folder = train_by_cells(settings)
    run_apart(folder, "train.py")
    assert same_bytes(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.1},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "save_steps": 2},
        {"optim": "adamw_8bit", "double_quant": False, "quant_type": "fp4"},
        {"loss_chunk": 0, "lr_scheduler_type": "cosine", "max_grad_norm": 0.3, "seed": 7},
        {"loss_chunk": 5, "target_modules": "dense,query_key_value", "max_length": 50},
        {"packing": True, "per_device_train_batch_size": 1, "train_rows": 40, "loss_chunk": 32},
    ],
    ids=str,
)
def test_the_same_bits_with_every_option(tmp_path, changes):
    settings = validate({**SMALL, "output_dir": str(tmp_path), **changes})
    losses, folder = train_by_cells(settings)
    assert run_here(folder) == pytest.approx(losses, rel=1e-6)
    assert same_bytes(folder)
    kept = [path.name for path in folder.glob("adapter_by_script_checkpoints/checkpoint-*")]
    assert sorted(kept) == (["checkpoint-2", "checkpoint-3"] if settings.save_steps else [])


FAMILIES = [
    ("Pythia", {}, {}),
    # rows side by side or one after another: dropout would draw other masks
    ("Pythia", {}, {"packing": True, "loss_chunk": 0, "lora_dropout": 0}),
    ("Llama", {}, {"packing": True, "per_device_train_batch_size": 3, "lora_dropout": 0}),
    ("Llama", {}, {"loss_chunk": 16}),
    ("Llama", {"tie_word_embeddings": True}, {"compute_dtype": "bfloat16"}),
    ("Gemma2", {"num_key_value_heads": 2, "head_dim": 16}, {"loss_chunk": 16}),
    ("Cohere", {"num_key_value_heads": 2}, {"loss_chunk": 16}),
]


@pytest.mark.parametrize(("family", "shape", "changes"), FAMILIES, ids=str)
def test_the_same_losses_on_other_models(tmp_path, family, shape, changes):
    settings = full(random_model(tmp_path / family, family, **shape), tmp_path, **changes)
    losses, folder = train_by_cells(settings)
    assert run_here(folder) == pytest.approx(losses, rel=1e-4)


def test_a_model_saved_in_4_bit_computes_in_the_dtype_asked_for(tmp_path):
    """Its makers computed in bfloat16, which would move every loss."""
    source = random_model(tmp_path / "source", "Llama")
    how = {"bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_type": "nf4"}
    packed = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, **how)
    )
    packed.save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path / "packed")
    losses, folder = train_by_cells(full(str(tmp_path / "packed"), tmp_path))
    assert run_here(folder) == pytest.approx(losses, rel=1e-5)
    assert same_bytes(folder)


def test_float16_on_a_rehearsed_card(tmp_path, monkeypatch):
    """The scaler and the autocast of a T4, computed on the CPU."""
    seen = rehearsal.card(monkeypatch)
    settings = full(random_model(tmp_path / "model", "Pythia"), tmp_path, compute_dtype="float16")
    losses, folder = train_by_cells(settings)
    made = seen.scalers
    assert made > 0
    card = ('fp16=device == "cuda" and', "fp16=")
    assert run_here(folder, card) == pytest.approx(losses, rel=1e-4)
    assert seen.scalers > made


def test_a_gpu_of_another_kind_is_not_used(tmp_path, monkeypatch):
    """A Mac has MPS, where accelerate would train, while the model lies on the CPU."""
    settings = full("pocket", tmp_path)
    losses, folder = train_by_cells(settings)
    monkeypatch.setattr(accelerate.state, "is_mps_available", lambda *_, **__: True)
    assert run_here(folder) == losses
    assert same_bytes(folder)


@pytest.mark.skipif(
    not ((sources.SMOLLM2_DIR / "config.json").is_file() and DATA.is_dir()),
    reason="no SmolLM2 (qlora-nb fetch smollm2) or no real data (QLORA_NB_DATA) here",
)
def test_smollm2_on_alpaca(tmp_path):
    changes = {
        "dataset": str(DATA / "alpaca" / "alpaca_data.json.xz"),
        "max_steps": 2,
        "eval_rows": 4,
        "prompt_template": "alpaca",
    }
    settings = validate({"profile": "smollm2", "output_dir": str(tmp_path), **SMALL, **changes})
    losses, folder = train_by_cells(settings)
    assert run_here(folder) == pytest.approx(losses, rel=1e-4)


# --- answers ---


def test_ask_says_what_the_kit_says(tmp_path):
    """Of a model whose makers want other than greedy answers."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL_DIR, folder)
    defaults = json.loads((folder / "generation_config.json").read_text())
    defaults |= {"repetition_penalty": 8.0, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    settings = validate({"model_id": str(folder), **SMALL})
    script.write_untrained(settings, str(tmp_path / "out"))
    shutil.copytree(ADAPTER_DIR, tmp_path / "out" / "adapter")
    model = adapters.load_adapter(load.load_base(settings), ADAPTER_DIR)
    row = {"instruction": "Where is Anna?", "input": "Anna walked to the river. Ben found a kite."}
    [wanted] = generate.answer_all(model, load.load_tokenizer(settings), [row], settings)
    assert run_apart(tmp_path / "out", "ask.py", row["instruction"], row["input"]) == wanted
    assert "river" in wanted


# --- nothing becomes code ---

HOSTILE = (
    "'''); import os; os.system('touch hurt'); ('''",
    '"""\nimport os\nos.system("touch hurt")\n"""',
    "{{ 7 * 7 }} {% for x in y %} {# not a remark #}",
    "back\\slash \\' \\\" \\n \\",
    "line\nbreak\r\n\ttab \u2028 \u2029 \x85 \x0b \x0c",
    "é 中文 \U0001f600",
)
CONSTANTS = ("MODEL", "TARGETS", "WITH_INPUT", "WITHOUT_INPUT")


def shape_of(source: str) -> str:
    """A program's syntax tree without what its texts say."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = "text"
    return ast.dump(tree)


def assigned(source: str) -> dict[str, object]:
    """The constants of a program and its padding token."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
            if name in CONSTANTS or name == "tokenizer.pad_token":
                found[name] = ast.literal_eval(node.value)
    return found


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_code(tmp_path, monkeypatch, text, packing):
    template = "alpaca" + text
    written = {}
    given = {}
    for kind, said in (("harmless", "a"), ("hostile", text)):
        folder = tmp_path / kind / said.replace("/", "-")
        folder.parent.mkdir()
        shutil.copytree(MODEL_DIR, folder)
        tokenizer = load.load_tokenizer(validate({"model_id": str(folder)}))
        tokenizer.add_special_tokens({"pad_token": f"<{said}>"})
        escaped = said.replace("{", "{{").replace("}", "}}")
        pair = (f"{escaped}{{instruction}} {{input}}", f"{{instruction}}{escaped}")
        monkeypatch.setitem(data.TEMPLATES, template, pair)
        settings = validate({"model_id": str(folder), "packing": packing})
        settings = settings.replace(prompt_template=template)
        texts = Dataset.from_list([{"instruction": said, "input": said, "output": said}] * 2)
        rows = Dataset.from_dict({"row": [[1, 0]] if packing else [1, 0]})
        out = tmp_path / f"{kind} out"
        out.mkdir()
        script.write(out, settings, tokenizer, rows, texts, [said, "dense"])
        written[kind] = {name: (out / name).read_text() for name in ("train.py", "ask.py")}
        given[kind] = {
            "MODEL": str(folder),
            "TARGETS": sorted([said, "dense"]),
            "WITH_INPUT": pair[0],
            "WITHOUT_INPUT": pair[1],
            "tokenizer.pad_token": f"<{said}>",
        }
        lines = (out / "rows.jsonl").read_bytes().split(b"\n")[:-1]
        found = [json.loads(line) for line in lines]
        assert found == ([list(texts)] if packing else list(texts))
        assert (out / "rows.jsonl").read_text().splitlines() == [x.decode() for x in lines]
    for name in ("train.py", "ask.py"):
        assert shape_of(written["hostile"][name]) == shape_of(written["harmless"][name])
        found = assigned(written["hostile"][name])
        assert found == {key: given["hostile"][key] for key in found}
        assert {"MODEL", "WITH_INPUT", "WITHOUT_INPUT"} <= set(found)
    assert len(assigned(written["hostile"]["train.py"])) == 5


# --- what the programs are made of ---

MAY_IMPORT = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate"}
OPTIONS = [
    {},
    {"gradient_checkpointing": True, "save_steps": 0, "compute_dtype": "float16"},
    {"loss_chunk": 0, "prompt_template": "alpaca", "double_quant": False},
    {"prompt_template": "alpaca", "gradient_checkpointing": True, "lora_dropout": 0.1},
    {"packing": True},
    {"packing": True, "gradient_checkpointing": True, "loss_chunk": 64, "save_steps": 3},
    {"packing": True, "loss_chunk": 0, "compute_dtype": "bfloat16", "optim": "paged_adamw_8bit"},
    {"target_modules": "dense", "learning_rate": 1e-5, "per_device_train_batch_size": 4096},
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The two programs with many sets of options, in turn of the pocket model and of one whose
    path is long.
    """
    folder = tmp_path_factory.mktemp("written")
    long = folder / "a very long name" / ("x" * 120) / "y"
    shutil.copytree(MODEL_DIR, long)
    found = []
    for number, options in enumerate(OPTIONS):
        model_id = str(long) if number % 2 else "pocket"
        settings = validate({**SMALL, "train_rows": 30, "model_id": model_id, **options})
        out = folder / str(number)
        script.write_untrained(settings, str(out))
        found.append((options, out))
    return found


def calls(tree: ast.AST, ending: str) -> list[ast.Call]:
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in found if ast.unparse(call.func).endswith(ending)]


def test_only_plain_libraries_and_nothing_unsafe(written):
    for _, folder in written:
        for name in ("train.py", "ask.py"):
            tree = ast.parse((folder / name).read_text())
            imported = set()
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0
                    imported.add(node.module.split(".")[0])
            assert imported <= MAY_IMPORT | set(sys.stdlib_module_names)
            for call in calls(tree, ".from_pretrained"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert None not in given
                if ast.unparse(call.func).startswith("Peft"):
                    continue  # it reads one file of safetensors and no code
                assert given["trust_remote_code"] == "False"
                if "Tokenizer" not in ast.unparse(call.func):
                    assert given["use_safetensors"] == "True"


def test_programs_are_short(written):
    for options, folder in written:
        longest = 125 if options.get("packing") else 120
        assert len((folder / "train.py").read_text().splitlines()) <= longest, options
        assert len((folder / "ask.py").read_text().splitlines()) <= 40, options


def test_programs_are_in_order(written):
    ruff = shutil.which("ruff") or str(Path(sys.executable).with_name("ruff"))
    if not Path(ruff).is_file():
        pytest.skip("ruff is not installed")
    line = [ruff, "check", "--isolated", "--no-cache", "--select", "E,F,W,B,UP", "--ignore", "B905"]
    folders = [str(folder) for _, folder in written]
    done = subprocess.run(
        [*line, "--line-length", "100", *folders], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


# --- refusals and the command ---


@pytest.mark.parametrize("name", ["head_4bit", "embedding_on_cpu"])
def test_what_plain_libraries_do_not_have_is_refused_by_name(tmp_path, name):
    with pytest.raises(KitError, match=rf"got '?{name}.*set {name}=False"):
        script.write_untrained(validate({name: True}), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_every_other_option_is_taken(tmp_path):
    others = {"packing": True, "tensorboard": True, "prequantized": True, "sample_steps": 5}
    assert not script.require_plain(validate(others))


def command(*arguments: str):
    return CliRunner().invoke(cli.app, ["script", *arguments])


def test_the_command_writes_what_the_notebook_writes(tmp_path):
    settings = validate({**SMALL, "output_dir": str(tmp_path)})
    model, tokenizer = load.load_base(settings), load.load_tokenizer(settings)
    texts, _ = data.load(settings)
    rows = data.tokenize_rows(texts, tokenizer, settings)
    rows = script.batching.in_training_order(rows, settings)
    (tmp_path / "notebook").mkdir()
    targets = attach.layers_to_adapt(model, settings)
    script.write(tmp_path / "notebook", settings, tokenizer, rows, texts, set(targets))
    given = []
    for name, value in {**SMALL, "output_dir": tmp_path}.items():
        given += ["-p", name, str(value)]
    done = command(*given)
    assert done.exit_code == 0, done.output
    paths = [Path(line) for line in done.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert [path.name for path in paths] == ["rows.jsonl", "train.py", "ask.py"]
    assert {path.parent.parent for path in paths} == {tmp_path / "tiny"}
    assert paths[0].parent.name.startswith("script-")
    for path in paths:
        assert path.read_text() == (tmp_path / "notebook" / path.name).read_text()


def test_the_command_loads_no_weights(tmp_path):
    """Of a model too large for this machine there need be no more than configuration and
    tokenizer.
    """
    folder = tmp_path / "model"
    shutil.copytree(MODEL_DIR, folder)
    (folder / "model.safetensors").unlink()
    done = command(
        "-p", "model_id", str(folder), "-p", "max_steps", "2", "--out", str(tmp_path / "out")
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "train.py").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-p", "max_stepz", "3"], "did you mean max_steps"),
        (["-p", "learning_rate", "-1"], "learning_rate"),
        (["--profile", "large"], "tiny, smollm2, t4, full"),
        (["-p", "r", "1000"], "r is larger than the layers"),
        (["-p", "target_modules", "none"], "query_key_value"),
        (["-p", "model_id", "nowhere/at all"], "model not found"),
        (["-p", "dataset", "nothing.json"], "dataset not found"),
        (["-p", "head_4bit", "true"], "head_4bit"),
    ],
)
def test_the_command_refuses_in_one_sentence_and_leaves_no_folder(tmp_path, arguments, expected):
    out = tmp_path / "out"
    done = command(*arguments, "-p", "output_dir", str(tmp_path / "runs"), "--out", str(out))
    assert done.exit_code == 2
    assert expected in done.stderr
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    done = command("-p", "max_steps", "2", "--out", str(tmp_path / "taken"))
    assert done.exit_code == 2
    assert "name a folder you may write to" in done.stderr


def test_a_folder_beside_the_reader_is_found_from_anywhere(tmp_path, monkeypatch):
    shutil.copytree(MODEL_DIR, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    script.write_untrained(validate({**SMALL, "model_id": "mine"}), "out")
    assert assigned((tmp_path / "out" / "train.py").read_text())["MODEL"] == str(tmp_path / "mine")


def test_the_datatype_is_that_of_the_machine_it_runs_on(tmp_path, monkeypatch):
    """Written on a laptop, run on a card."""
    script.write_untrained(validate(SMALL), str(tmp_path))
    source = (tmp_path / "train.py").read_text()
    [line] = re.findall(r"^device = .*?(?=^model)", source, re.DOTALL | re.MULTILINE)
    cards = {(7, 5): torch.float16, (8, 0): torch.bfloat16, (12, 0): torch.bfloat16}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, dtype in cards.items():
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda capability=capability: capability
        )
        names = {"torch": torch}
        exec(line, names)
        assert names["dtype"] == dtype


# --- conversations ---


def chats(n: int) -> list[dict]:
    rows = []
    for i in range(n):
        messages = [{"role": "system", "content": "Answer in few words."}] * (i % 2)
        for turn in range(1 + i % 3):
            messages.append({"role": "user", "content": f"问题 {i}.{turn}?"})
            messages.append({"role": "assistant", "content": f"Answer {i}, 回答 {turn}."})
        rows.append({"messages": messages})
    return rows


@pytest.mark.parametrize("packing", [False, True])
def test_the_script_of_conversations_ends_with_the_notebooks_adapter(tmp_path, packing):
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(chats(16)), encoding="utf-8")
    values = {"dataset": str(path), "eval_rows": 2, "packing": packing, "max_length": 70}
    values |= {"output_dir": str(tmp_path), "lora_dropout": 0.0}
    if packing:
        values["per_device_train_batch_size"] = 1
    settings = validate({**SMALL, **values})
    losses, folder = train_by_cells(settings)
    assert run_here(folder) == losses
    assert same_bytes(folder)


def test_asking_a_tuned_conversation_uses_its_template(tmp_path):
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(chats(12)), encoding="utf-8")
    settings = validate(
        {**SMALL, "dataset": str(path), "eval_rows": 2, "output_dir": str(tmp_path)}
    )
    _, folder = train_by_cells(settings)
    said = run_apart(folder, "ask.py", "Where is Anna?\nShe left.")
    model = adapters.load_adapter(load.load_base(settings), folder / "adapter")
    tokenizer = load.load_tokenizer(settings)
    row = generate.row_of("Where is Anna?\nShe left.", "chat")
    assert said == generate.answer_all(model, tokenizer, [row], settings)[0]
