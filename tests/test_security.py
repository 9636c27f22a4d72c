"""What must never happen: untrusted text that runs, a pickle or a model's code that is loaded, a
token that is written down.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import nbformat
import open_cells
import pytest
import spelled

import qlora_nb
from qlora_nb import sources
from qlora_nb.batch import report, sequence
from qlora_nb.errors import KitError
from qlora_nb.lessons import n06, n07
from qlora_nb.model import load
from qlora_nb.pocket import MODEL_DIR
from qlora_nb.record import runs
from qlora_nb.settings import validate
from qlora_nb.train.trainer import QLoRATrainer
from qlora_nb.ui import panels

PAYLOADS = [
    "<script>alert(1)</script>",
    "</script><script src=//evil.example/x.js></script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "<svg/onload=alert(1)>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "</td></table><a href='javascript:alert(1)'>x</a>",
    "![x](javascript:alert(1)) [y](data:text/html,<script>alert(1)</script>)",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "{{ 7 * 7 }}{% for x in ().__class__.__base__.__subclasses__() %}{% endfor %}",
    "$x^{\\frac{1}{0}$ $\\includegraphics{/etc/passwd}$ \\unknown",
    "$" * 7,
    "\x1b[31m\x1b]0;title\x07\x00\x08",
    "\u202egnp.exe\u2028\u2029",
    "<style>@import url(//evil.example)</style><link rel=stylesheet href=//evil.example>",
]
HARMLESS = {
    "b",
    "br",
    "div",
    "details",
    "summary",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "span",
    "mark",
    "p",
}


class Seen(HTMLParser):
    """The tags of a page, the attributes that can run or load something, and its text."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.risky, self.text = set(), [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        loads = ("src", "href", "srcdoc", "data", "action", "formaction")
        self.risky += [(k, v) for k, v in attributes if k.startswith("on") or k in loads]

    def handle_data(self, data):
        self.text += data


@pytest.mark.fault(30)
@pytest.mark.parametrize("evil", PAYLOADS)
def test_hostile_text_is_inert_in_the_report(tmp_path, evil):
    outcome = {
        "notebook": "n",
        "status": evil,
        "wall_s": 1.0,
        "peak_bytes": 1,
        "problems": [evil],
        "results": {evil: evil},
    }
    machine = {"cpu": evil, "n_cores": 1, "ram_bytes": 1, "gpus": [{"name": evil}], "python": evil}
    summary = {
        "status": evil,
        "started": evil,
        "wall_s": evil,
        "parameters": {evil: [evil]},
        "versions": {evil: evil},
    }
    summary |= {"hardware": machine, "notebooks": [outcome]}
    figure = nbformat.v4.new_output(
        "display_data", data={"image/png": evil}, metadata={"image/png": {"alt": evil}}
    )
    cells = [
        nbformat.v4.new_markdown_cell(f"# {evil}"),
        nbformat.v4.new_code_cell(evil, outputs=[figure]),
    ]
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells),
        tmp_path / "n.ipynb",
    )
    page = report.page(summary, tmp_path)
    plain = report.page(summary | {"notebooks": []}, tmp_path)
    seen = Seen(page)
    assert seen.tags <= Seen(plain).tags | HARMLESS | {
        "img",
        "figure",
        "figcaption",
        "dl",
        "dt",
        "dd",
        "h2",
        "section",
        "a",
    }
    assert not seen.tags & {"script", "iframe", "svg", "link", "object", "form"}
    links = [("href", "#n1"), ("href", "./n.ipynb")]
    assert [found for found in seen.risky if found[0] != "src"] == links
    assert all(
        value.startswith("data:image/png;base64,") for name, value in seen.risky if name == "src"
    ), seen.risky
    assert evil.replace("\x00", "") in seen.text.replace("\x00", "").replace("\ufffd", ""), (
        "it is shown as it is"
    )


@pytest.mark.fault(30)
@pytest.mark.parametrize("evil", PAYLOADS)
def test_hostile_text_is_inert_in_tables_and_masks(evil, tmp_path):
    names = {"model_id": evil[:60], "dataset": evil[:60], "prompts": [evil]}
    names = {k: v for k, v in names.items() if "\x00" not in str(v) or k == "prompts"}
    shown = validate(names)
    program = tmp_path / "train.py"
    program.write_text(evil, encoding="utf-8", errors="replace")
    pages = [
        shown._repr_html_(),
        n06.label_mask([0], [True], spelled.Spelled(evil)),
        n06.label_mask([0], [False], spelled.Spelled(evil)),
        n06.answers([evil], before=[evil], after=[evil]).to_html().partition("</style>")[2],
        n06.folded(program).data,
    ]
    for page in pages:
        seen = Seen(page)
        folds = {"details", "summary", "pre"}
        assert seen.tags <= HARMLESS | folds, seen.tags - HARMLESS
        assert seen.risky == []
    assert "\n" not in shown.papermill_line().replace(evil, "")


@pytest.mark.fault(30)
@pytest.mark.parametrize("evil", PAYLOADS)
def test_hostile_text_cannot_break_a_figure(evil):
    import io

    for figure in (
        n07.next_tokens([(evil, 0.5), ("a", 0.1)], [(evil, 0.4), ("b", 0.2)], 1.0),
        n06.scores({evil: {"all": 0.1, evil: 0.2}, "QLoRA": {"all": 0.9, evil: 0.8}}),
        n07.sampled({evil: {"probability": {evil: 50.0}, "drawn": {evil: 40.0}}}),
    ):
        figure.savefig(io.BytesIO(), format="png", dpi=40)


def test_a_models_name_cannot_break_the_plan(tmp_path):
    import io

    folder = shutil.copytree(MODEL_DIR, tmp_path / r"m$\frac$ $x^{1")
    panels.plan_figure(validate({"model_id": str(folder)})).savefig(
        io.BytesIO(), format="png", dpi=40
    )


# ---- no pickle, no code
# ----------------------------------------------------------------------------------------------


def test_the_package_loads_no_pickle_and_runs_no_code_of_others():
    forbidden = {"pickle", "marshal", "shelve", "joblib", "dill", "cloudpickle"}
    for path in Path(qlora_nb.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names} | {
                    (getattr(node, "module", "") or "").split(".")[0]
                }
                assert not names & forbidden, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in (
                    "torch.load",
                    "eval",
                    "exec",
                    "compile",
                    "os.system",
                    "__import__",
                    "pd.read_pickle",
                ), path
                options = {word.arg: word.value for word in node.keywords}
                assert "allow_pickle" not in options, path
                assert getattr(options.get("shell"), "value", False) is False, path
                assert getattr(options.get("trust_remote_code"), "value", False) is False, path
                if (
                    called == "AutoModelForCausalLM.from_pretrained" and path.name != "fetch.py"
                ):  # that one reads a GGUF file
                    assert ast.unparse(options["use_safetensors"]) == "True", path
                    assert ast.unparse(options["trust_remote_code"]) == "False", path


def evil_model(folder: Path, model_type: str) -> Path:
    """A model folder whose own code writes a file when it is executed."""
    shutil.copytree(MODEL_DIR, folder)
    config = json.loads((folder / "config.json").read_text())
    names = {
        "AutoConfig": "evil.Evil",
        "AutoModelForCausalLM": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", None],
    }
    (folder / "config.json").write_text(
        json.dumps(config | {"auto_map": names, "model_type": model_type})
    )
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(tokenizer | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    code = f"from pathlib import Path\nPath({str(folder / 'RAN')!r}).touch()\nclass Evil: pass\n"
    for name in ("evil.py", "__init__.py", "modeling_evil.py", "setup.py"):
        (folder / name).write_text(code)
    return folder


@pytest.mark.parametrize("model_type", ["gpt_neox", "evil"])
def test_code_of_a_model_is_never_run(tmp_path, model_type):
    folder = evil_model(tmp_path / "model", model_type)
    settings = validate({"model_id": str(folder)})
    for function in (load.load_tokenizer, load.load_base):
        try:
            function(settings)
        except KitError as error:
            assert "Do this" in str(error)  # noqa: PT017
    assert not (folder / "RAN").exists()


def test_a_pickled_model_is_never_opened(tmp_path):
    """A pickle that writes a file when it is opened, in every place where a library would look for
    one.
    """
    import pickle

    folder = shutil.copytree(MODEL_DIR, tmp_path / "model")

    class Trap:
        def __reduce__(self):
            return (Path.touch, (folder / "OPENED",))

    (folder / "model.safetensors").unlink()
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "model.pt",
        "pytorch_model-00001-of-00001.bin",
    ):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(KitError, match="pickles, which can run code"):
        load.load_base(validate({"model_id": str(folder)}))
    assert not (folder / "OPENED").exists()
    pickle.loads((folder / "model.pt").read_bytes())
    assert (folder / "OPENED").exists(), "the trap works"


# ---- no token --------------------------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf_" + "Zq9" * 11,
    "WANDB_API_KEY": "w" * 12 + "Secret77",
    "AWS_SECRET_ACCESS_KEY": "aws/Secret+Key=123",
}


@pytest.mark.fault(33)
@pytest.mark.slow
def test_no_token_is_ever_written(toy, tmp_path, monkeypatch, capsys):
    """A run that trains and one whose notebook prints and raises secrets: every file they leave is
    searched.
    """
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    train = (
        f"import sys\nsys.path.append({str(Path(open_cells.__file__).parent)!r})\nimport open_cells\n"
        "from qlora_nb.model import data, load\nfrom qlora_nb.record import runs\n"
        "from qlora_nb.settings import resolve\n"
        "s = resolve({'output_dir': output_dir, 'max_steps': 1, 'train_rows': 4, 'eval_rows': 1, 'save_steps': 1,\n"
        "  'per_device_train_batch_size': 1, 'gradient_accumulation_steps': 1})\n"
        "tokenizer, model = load.load_tokenizer(s), open_cells.attach_adapter(load.load_base(s), s)\n"
        "rows = data.tokenize_rows(data.load(s)[0], tokenizer, s)\n"
        "run = runs.Run(s, '06_x')\n"
        "_ = open_cells.finetune(model, tokenizer, rows, s, run, print)"
    )
    toy("01_train", train)
    prints = "import os, sys\nfor v in (os.environ[n] for n in {}):\n    print(v)\n    print('url?token=' + v, file=sys.stderr)"
    folder = toy(
        "02_leaks", prints.format(list(SECRETS)), "raise OSError(' '.join(os.environ.values()))"
    )
    summary = sequence.run_sequence({"output_dir": str(tmp_path / "out")}, notebooks=folder)
    said = capsys.readouterr().out
    assert [o["status"] for o in summary["notebooks"]] == ["done", "failed"], summary["notebooks"]
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {
        "summary.json",
        "report.html",
        "manifest.json",
        "adapter_model.safetensors",
        "seal.json",
    } <= {p.name for p in written}
    for path in written:
        content = path.read_bytes()
        assert not [n for n, value in SECRETS.items() if value.encode() in content], path
    assert not [n for n, value in SECRETS.items() if value in said]
    assert "[hidden]" in (Path(summary["folder"]) / "02_leaks.ipynb").read_text(encoding="utf-8")


@pytest.mark.fault(33)
def test_a_failing_run_hides_them_too(tmp_path, monkeypatch):
    odd = {
        "DB_PASSWORD": 'quote " back \\ slash',
        "CREDENTIALS_JSON": '{\n "key": "one line\nand another"\n}',
        "GITHUB_PAT": "g" * 9,
    }
    for name, value in (SECRETS | odd).items():
        monkeypatch.setenv(name, value)
    run = runs.Run(validate({"output_dir": str(tmp_path)}), "06_x")
    run.log({"step": 1, "said": " ".join(odd.values())})
    training = SimpleNamespace(run=run, watch=SimpleNamespace(begun=True))
    with pytest.raises(OSError, match="token="), QLoRATrainer.guarded(training):
        raise OSError("token=" + " ".join((SECRETS | odd).values()) + " sk-" + 20 * "a")
    for name in ("manifest.json", "metrics.jsonl"):
        text = (run.folder / name).read_text()
        assert not [
            n
            for n, value in (SECRETS | odd).items()
            if json.dumps(value)[1:-1] in text or value in text
        ], name
        assert "sk-a" not in text
    assert json.loads((run.folder / "manifest.json").read_text())["metrics"]["error"].startswith(
        "OSError: token=[hidden]"
    )


def test_a_secret_that_is_a_word_of_the_format_breaks_nothing(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("POSTGRES_PASSWORD", "metadata")
    monkeypatch.setenv("SERVICE_KEY", "first line\nsecond line")
    folder = toy("01_x", "import os\nprint('metadata and')\nprint(os.environ['SERVICE_KEY'])")
    summary = sequence.run_sequence({"output_dir": str(tmp_path / "out")}, notebooks=folder)
    assert summary["status"] == "done", summary["notebooks"]
    executed = (Path(summary["folder"]) / "01_x.ipynb").read_text()
    assert "second line" not in executed
    assert "[hidden] and" in executed


@pytest.mark.fault(33)
def test_an_endpoint_is_shown_without_its_password(monkeypatch):
    address = "http://teacher:S3cretPassw0rd@127.0.0.1:9"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    assert sources.hub_endpoint() == "http://127.0.0.1:9"
    assert not sources.hub_is_reachable()


def test_no_parameter_takes_a_token_and_no_command_shows_one():
    assert not [
        n for n in validate({}).model_dump() if n.endswith(("token", "key", "secret", "password"))
    ]
    for command in (["doctor"], ["doctor", "--json"], ["run", "-p", "hf_token", "x"]):
        own = os.environ | SECRETS
        done = subprocess.run(
            [sys.executable, "-m", "qlora_nb.cli", *command],
            env=own,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not [n for n, value in SECRETS.items() if value in done.stdout + done.stderr]


def test_every_dependency_has_a_pin(root):
    """What is audited is what is installed: constraints.txt names an exact version of each (dates:
    docs/).
    """
    lines = [
        line
        for line in (root / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert len(lines) > 50
    assert not [line for line in lines if "==" not in line or "://" in line]
