"""A 4-bit copy of a model, kept once, so that no later run reads and rounds 16-bit weights again.

pythia-12b is 24 GB on the hub and about 7 GB once its linear layers are packed. The copy lies in
the kit's cache, in one folder for each model and datatypes, beside a note of what it was made from:
the source's files or commits, and the sizes of its own files. It is used only if both still hold.
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
from qlora_nb.record import files

NOTE = "made_from.json"


def find(path: str, settings, dtype: torch.dtype) -> Path | None:
    """The whole copy of the model at `path` (folder or hub name) in these datatypes; None if there
    is none.
    """
    folder = _folder(path, settings, dtype)
    try:
        note = json.loads((folder / NOTE).read_text())
    except (OSError, ValueError):
        return None
    if note == _note(path, folder):
        print(f"loading the 4-bit copy kept in {folder.name}")
        return folder
    print("the 4-bit copy kept of this model is of another version or not whole: it is made anew")
    return None


def save(model, path: str, settings, dtype: torch.dtype) -> None:
    """Keep a model that was just packed; a disk that is full or closed costs the copy, not the
    run.
    """
    folder = _folder(path, settings, dtype)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        fetch.require_room(folder.parent, model.get_memory_footprint(), "the 4-bit copy")
        model.save_pretrained(temporary, max_shard_size="1GB")  # a step of the progress bar each
        note = json.dumps(_note(path, temporary), indent=1)
        files.write_atomically(temporary / NOTE, note)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except (KitError, OSError, SafetensorError) as error:
        print(f"no 4-bit copy was kept: {error}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _folder(path: str, settings, dtype: torch.dtype) -> Path:
    how = json.dumps([path, settings.quant_type, settings.double_quant, str(dtype)])
    name = f"{Path(path).name}-{hashlib.sha256(how.encode()).hexdigest()[:12]}"
    return sources.CACHE / "quantized" / name


def _note(path: str, copy: Path) -> dict[str, object]:
    """`source`: name, size and time of a folder's weights, of a hub name the commits in the local
    cache; `files`: the sizes of the copy's own files.
    """
    source = []
    if os.path.isdir(path):
        for file in sorted(Path(path).glob("*.safetensors")):
            source.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
    else:
        source = sorted(f.read_text() for f in sources.hub_cache(path, "model").glob("refs/*"))
    sizes = {f.name: f.stat().st_size for f in copy.iterdir() if f.name != NOTE}
    return {"source": source, "files": sizes}
