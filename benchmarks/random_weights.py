"""A Pythia of its true shape with random weights."""

from __future__ import annotations

from pathlib import Path

import peers


def random_pythia(size: str, folder: Path) -> str:
    """The folder under `folder` of a Pythia with random float16 weights; made once."""
    return peers.random_pythia(size, folder)
