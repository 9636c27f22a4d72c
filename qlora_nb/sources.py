"""Where things lie: a name such as pocket, smollm2, a hub name, a folder or `latest` becomes a path
here, and nowhere else.
"""

import functools
import os
import re
import socket
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from qlora_nb.errors import KitError
from qlora_nb.pocket import MODEL_DIR
from qlora_nb.pythia import PYTHIA, pythia_size

CACHE = Path(os.environ.get("QLORA_NB_CACHE") or "~/.cache/qlora-nb").expanduser().absolute()
"""The kit's own cache; what comes from the hub lies in the hub's."""

SMOLLM2_DIR = CACHE / "SmolLM2-135M-Instruct"
"""Where `qlora-nb fetch smollm2` puts the converted model."""


def local_path(name: str) -> Path:
    """The path that somebody wrote, with `~` for a home folder; whether anything lies there is not
    asked.
    """
    return Path(name).expanduser()


def download_bytes(model_id: str) -> int | None:
    """Bytes of a model's weights: of a Pythia two for each parameter, of a folder what lies there;
    None if only the hub knows.
    """
    if size := pythia_size(model_id):
        return 2 * PYTHIA[size].n_parameters
    folder = local_path(model_id)
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) if folder.is_dir() else None


def hub_endpoint() -> str:
    """The hub's address, or the mirror that HF_ENDPOINT names, without a name and password in
    it.
    """
    return re.sub("//[^/]*@", "//", os.environ.get("HF_ENDPOINT", "https://huggingface.co"))


@functools.lru_cache(maxsize=8)
def _reachable(endpoint: str) -> bool:
    with suppress(OSError, ValueError):  # nobody there, or no address
        parts = urlsplit(endpoint)
        proxy = getproxies().get(parts.scheme)
        if proxy and not proxy_bypass(parts.hostname or ""):
            parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname or "", port), timeout=1.0):
            return True
    return False


def hub_is_reachable() -> bool:
    """One connection attempt of at most a second (asking the hub library itself takes 23 s to
    fail).
    """
    return os.environ.get("HF_HUB_OFFLINE", "").lower() not in {
        "1",
        "true",
        "yes",
        "on",
    } and _reachable(hub_endpoint())


def in_hub_cache(repo_id: str, repo_type: str = "model") -> bool:
    """True if a snapshot of this repository lies in the local cache."""
    return any(hub_cache(repo_id, repo_type).glob("snapshots/*/*"))


def hub_cache(repo_id: str, repo_type: str) -> Path:
    """The folder of this repository in the local cache, whether it is there or not."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"{repo_type}s--{repo_id.replace('/', '--')}"


def project_root() -> Path:
    """The folder of the repository a notebook runs in, else the current folder."""
    here = Path.cwd()
    return next(
        (
            p
            for p in (here, *here.parents)
            if (p / "notebooks").is_dir() and (p / "pyproject.toml").is_file()
        ),
        here,
    )


def runs_root(settings) -> Path:
    """The folder that this profile's runs go into; a relative `output_dir` lies in the
    repository.
    """
    return project_root() / local_path(settings.output_dir) / settings.profile


def model_path(model_id: str) -> str:
    """The folder or hub name that transformers is given for a `model_id`.

    Raises:
        KitError: smollm2 before `qlora-nb fetch smollm2`.
    """
    if model_id == "pocket":
        return str(MODEL_DIR)
    if model_id == "smollm2":
        if not (SMOLLM2_DIR / "config.json").is_file():
            raise KitError(
                "SmolLM2 is not on this machine yet", remedy="run: qlora-nb fetch smollm2"
            )
        return str(SMOLLM2_DIR)
    folder = local_path(model_id)
    return str(folder) if folder.is_dir() else model_id
