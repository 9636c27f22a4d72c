"""The pocket model: a small GPT-NeoX, really trained, that ships with the kit so that everything runs offline."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
ADAPTER_DIR = Path(__file__).parent / "adapter"
