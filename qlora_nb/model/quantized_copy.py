"""A 4-bit copy of a model, kept once, so that no later run reads and rounds 16-bit weights again.

pythia-12b is 24 GB on the hub and about 7 GB once its linear layers are packed. The copy lies in
the kit's cache, in one folder for each model and datatypes, with a seal: the hashes of its own
files, and what it was made from, the source's files or commits. It is used only if both still hold.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from qlora_nb import sources
from qlora_nb.errors import KitError
from qlora_nb.model import fetch
from qlora_nb.record import files, seal


def find(path: str, settings, dtype: torch.dtype) -> Path | None:
    """The whole copy of the model at `path` (folder or hub name) in these datatypes; None if there
    is none.
    """
    folder = _folder(path, settings, dtype)
    if not folder.is_dir():
        return None
    reason = seal.damage(folder)
    if not reason:
        made_from = json.loads((folder / seal.SEAL).read_text()).get("source")
        if made_from == _source(path):
            print(f"loading the 4-bit copy kept in {folder.name}")
            return folder
        reason = "it is of another version"
    print(f"the 4-bit copy kept of this model is made anew: {reason}")
    return None


def save(model, settings, dtype: torch.dtype) -> None:
    """Keep a model that was just packed; a disk that is full or closed costs the copy, not the
    run.
    """
    path = model.name_or_path
    folder = _folder(path, settings, dtype)
    try:
        files.clear_leftovers(folder.parent, ".")
        fetch.require_room(folder.parent, model.get_memory_footprint(), "the 4-bit copy")
        with files.temporary_folder(folder.parent, ".") as temporary:
            made = temporary / "copy"
            model.save_pretrained(made, max_shard_size="1GB")  # a step of the progress bar each
            seal.write_seal(made, source=_source(path))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(made, folder)
    except (KitError, OSError, SafetensorError) as error:
        print(f"no 4-bit copy was kept: {error}")


def _folder(path: str, settings, dtype: torch.dtype) -> Path:
    how = json.dumps([path, settings.quant_type, settings.double_quant, str(dtype)])
    name = f"{Path(path).name}-{hashlib.sha256(how.encode()).hexdigest()[:12]}"
    return sources.CACHE / "quantized" / name


def _source(path: str) -> list:
    """Name, size and time of a folder's weights; of a hub name the commits in the local cache."""
    if not os.path.isdir(path):
        return sorted(f.read_text() for f in sources.hub_cache(path, "model").glob("refs/*"))
    found = []
    for file in sorted(Path(path).glob("*.safetensors")):
        found.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
    return found
