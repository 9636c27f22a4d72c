"""Where things lie: a name that somebody wrote becomes a path here, and nowhere else.

A parameter such as `model_id` or `dataset` takes four kinds of names: what ships with the kit
(`pocket`), what the kit fetched itself (`smollm2`), a folder or file of the user's (with `~` for
the home folder), and `owner/name` on the Hugging Face hub. A hub name stays a name, because
transformers and datasets resolve it in the hub's cache (`<type>s--<owner>--<name>/snapshots`).
`latest`, a run's newest adapter or checkpoint, needs the records of runs and is resolved there.

Also here: whether the hub can be reached, asked for a second, so that a machine without a network
is told so at once (the hub's library tries for 23 s), and where run folders go.
"""

import os
import re
import sys
import tomllib
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, build_opener

from qlora_nb.errors import KitError
from qlora_nb.pocket import MODEL_DIR
from qlora_nb.pythia import PYTHIA, pythia_size

CACHE = Path(os.environ.get("QLORA_NB_CACHE") or "~/.cache/qlora-nb").expanduser().absolute()
"""The kit's own cache; what comes from the hub lies in the hub's."""

SMOLLM2_DIR = CACHE / "SmolLM2-135M-Instruct"
"""Where `qlora-nb fetch smollm2` puts the converted model."""

DATASETS = "pocket, a hub name (owner/name), a file or a folder"
"""What `dataset` can name."""

_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))

DATA_FORMATS = _TABLES["data_formats"]
"""Endings of files that can be a data set → their format; JSON and CSV can be packed too."""

KITS_OWN = ("pocket", "smollm2")
"""Names of models and data that never mean a folder, also where one of that name exists."""


def local_path(name: str) -> Path:
    """The path that somebody wrote, with `~` for a home folder; whether anything lies there is not
    asked.
    """
    return Path(name).expanduser()


def is_here(name: str) -> bool:
    """Whether a model or a data set needs no hub: one of the kit's own, or a path that exists."""
    return name in KITS_OWN or local_path(name).exists()


def seen_from_anywhere(name: str) -> str:
    """A path of the current folder made absolute; any other name as it is."""
    path = local_path(name)
    if name in (*KITS_OWN, "latest") or not path.exists():
        return name
    return str(path.absolute())


def model_path(model_id: str) -> str:
    """The folder or hub name that transformers is given for a `model_id`.

    Raises:
        KitError: smollm2 before `qlora-nb fetch smollm2`.
    """
    if model_id == "pocket":
        return str(MODEL_DIR)
    if model_id == "smollm2":
        if not (SMOLLM2_DIR / "config.json").is_file():
            what = "SmolLM2 is not on this machine yet"
            raise KitError(what, remedy="run: qlora-nb fetch smollm2")
        return str(SMOLLM2_DIR)
    folder = local_path(model_id)
    return str(folder) if folder.is_dir() else model_id


NO_SAFETENSORS = _TABLES["no_safetensors"]
"""What a folder may hold in place of a model: file names → what it is, what to do."""


def require_safetensors(model_id: str) -> None:
    """Refuse a file, and a folder in which something else lies than a model in safetensors; one
    with config.json alone passes, as it is enough to plan with.

    Raises:
        KitError: names what is there and what to do.
    """
    folder = local_path(model_id)
    if model_id in KITS_OWN or not folder.exists():
        return
    if folder.is_file():
        raise KitError("model_id is a file", value=model_id, remedy="give its folder")
    has_weights = _weight_files(folder) != []
    for patterns, (what, remedy) in NO_SAFETENSORS.items():
        found = any(any(folder.glob(pattern)) for pattern in patterns.split())
        if found and not (has_weights and patterns.startswith("*")):
            raise KitError(f"the model folder {what}", value=model_id, remedy=remedy)
    if not (folder / "config.json").is_file():
        remedy = "give a folder made by save_pretrained"
        raise KitError("the model folder has no config.json", value=model_id, remedy=remedy)


def download_bytes(model_id: str) -> int | None:
    """Bytes of a model's weights: of a Pythia two for each parameter, of a folder what lies there;
    None if only the hub knows.
    """
    size = pythia_size(model_id)
    if size:
        return 2 * PYTHIA[size].n_parameters
    folder = local_path(model_id)
    if folder.is_dir():
        return sum(file.stat().st_size for file in _weight_files(folder))
    return None


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors that transformers reads; a `consolidated` file beside them holds the same in
    its makers' format.
    """
    found = folder.glob("*.safetensors")
    return [file for file in found if not file.name.startswith("consolidated")]


def require_reachable(what: str, name: str, allowed: str) -> None:
    """Refuse a model or a data set that is neither here nor to be had.

    Args:
        what: "model" or "dataset".
        name: what `model_id` or `dataset` says.
        allowed: the kinds of names, for the refusal.

    Raises:
        KitError: a path where nothing lies, a folder that holds no model, or a hub name that is not
            in the local cache while the hub cannot be reached.
    """
    if what == "model":
        require_safetensors(name)
    path = local_path(name).absolute()
    is_hub_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)
    if is_here(name):
        if is_hub_name:
            print(f"{what} {name}: taken from the folder {path}, not from the hub")
        return
    names_a_file = not DATA_FORMATS.keys().isdisjoint(path.suffixes)
    if names_a_file or not is_hub_name:
        raise KitError(
            f"{what} not found: nothing lies at {path}",
            value=name,
            allowed=allowed,
            remedy="check the path",
        )
    if not in_hub_cache(name, what) and not hub_is_reachable():
        raise KitError(
            f"the {what} {name} is not in the local cache and {hub_endpoint()} cannot be reached; "
            f"no folder lies at {path} either",
            remedy=(
                "fetch it ahead where there is a network (qlora-nb fetch NAME; data: --dataset), "
                'or give a local path for it, or use profile="tiny"; '
                "another address of the hub, such as a mirror's, is set by HF_ENDPOINT"
            ),
        )


def hub_endpoint() -> str:
    """The hub's address, or the mirror that HF_ENDPOINT names, without a name and password in
    it.
    """
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return re.sub("//[^/]*@", "//", address).rstrip("/")


def hub_is_reachable() -> bool:
    """Whether somebody answers at the hub's address, directly or through the proxy that the
    environment names; False if HF_HUB_OFFLINE is set.

    Raises:
        KitError: HF_ENDPOINT is no address, or was set when the hub's library had read it already.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    endpoint = hub_endpoint()
    scheme, _, host = endpoint.partition("://")
    if not host:
        raise KitError("HF_ENDPOINT is no address", value=scheme, allowed=f"https://{scheme}")
    library = sys.modules.get("huggingface_hub.constants")
    if library and not library.ENDPOINT.endswith(host):
        raise KitError(
            "HF_ENDPOINT was set after the hub's library had read it",
            value=endpoint,
            remedy="set it before Python starts, or in the first cell, and restart the kernel",
        )
    return _reachable(endpoint)


_REACHED: set[str] = set()
"""Addresses where somebody has answered; who did not is asked again, as a network may come back."""


def _reachable(endpoint: str) -> bool:
    if endpoint in _REACHED:
        return True
    opener = build_opener()  # with the proxies that the environment names
    try:
        opener.open(Request(endpoint, method="HEAD"), timeout=1.0).close()
    except (HTTPError, TimeoutError, ConnectionError):
        pass  # somebody is there, who says no, or answers late or not at all
    except Exception:  # URLError: no connection; or this is no address
        return False
    _REACHED.add(endpoint)
    return True


def hub_cache(repo_id: str, repo_type: str) -> Path:
    """The folder of this repository in the local cache, whether it is there or not."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"{repo_type}s--{repo_id.replace('/', '--')}"


def in_hub_cache(repo_id: str, repo_type: str = "model") -> bool:
    """True if a snapshot of this repository lies in the local cache."""
    return any(hub_cache(repo_id, repo_type).glob("snapshots/*/*"))


def project_root() -> Path:
    """The folder of the repository a notebook runs in, else the current folder."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    return here


def runs_root(settings) -> Path:
    """The folder that this profile's runs go into; a relative `output_dir` lies in the
    repository.
    """
    return project_root() / local_path(settings.output_dir) / settings.profile
