"""A Pythia of its true shape with random weights, for what does not depend on what they are: bytes
and seconds.

    python benchmarks/random_weights.py 12b FOLDER

The model is never whole in memory: its parameters are known by name and shape from torch's *meta*
device, are drawn one block at a time and written as one file of safetensors each, so that
pythia-12b (24 GB) takes less than 3 GiB of memory; several at a time where a machine has the cores
and the memory. Each block has a seed of its own, so how many are made at once changes nothing.
Matrices are drawn as GPT-NeoX draws them (a normal distribution of standard deviation 0.02), norms
are one, biases zero.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from qlora_nb.model import configs
from qlora_nb.pythia import PYTHIA

INDEX = "model.safetensors.index.json"


def random_pythia(size: str, folder: Path, at_once: int = 1) -> str:
    """The folder of a Pythia of this size ("14m" … "12b") with random float16 weights, made under
    `folder` if it is not there yet. Its tokenizer is not in it.

    Args:
        at_once: blocks in memory at a time, each drawn by a thread.

    Raises:
        SystemExit: the disk has no room for it.
    """
    target = folder / f"random-pythia-{size}"
    if (target / INDEX).is_file():  # written last
        return str(target)
    target.mkdir(parents=True, exist_ok=True)
    needed = 2 * PYTHIA[size].n_parameters
    free = shutil.disk_usage(target).free
    if free < needed:
        raise SystemExit(f"{needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} are free")
    config = configs.pythia_config(size)
    config.save_pretrained(target)
    parts = defaultdict(dict)
    for name, parameter in configs.meta_model(config).named_parameters():
        parts[_part_of(name)][name] = parameter.shape
    names = [f"model-{n:05}-of-{len(parts):05}.safetensors" for n in range(1, len(parts) + 1)]

    def write(number: int, shapes: dict[str, torch.Size]) -> None:
        generator = torch.Generator().manual_seed(number)
        tensors = {name: _drawn(name, shape, generator) for name, shape in shapes.items()}
        save_file(tensors, target / names[number], metadata={"format": "pt"})

    with ThreadPoolExecutor(at_once) as pool:  # torch draws and writes without Python's lock
        written = pool.map(write, range(len(parts)), parts.values())
        list(tqdm(written, total=len(parts), desc=size, unit="file"))
    files = {name: file for file, shapes in zip(names, parts.values()) for name in shapes}
    index = {"metadata": {"total_size": needed}, "weight_map": files}
    (target / INDEX).write_text(json.dumps(index, indent=1))
    return str(target)


def _part_of(name: str) -> str:
    """The block that a parameter belongs to; outside the blocks its module."""
    parts = name.split(".")
    if "layers" in parts:
        return parts[parts.index("layers") + 1]
    return parts[-2]


def _drawn(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 2:
        return torch.empty(shape).normal_(0, 0.02, generator=generator).half()
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.float16)
    return torch.ones(shape, dtype=torch.float16)


if __name__ == "__main__":
    print(random_pythia(sys.argv[1], Path(sys.argv[2])))
