"""A Jupyter kit that teaches QLoRA by taking it apart, then runs it for real.

The rooms, each of which imports only from those before it (tests/test_rooms.py):

- `errors`, `pythia`, `cards`, `processes`, `machine`, `pocket`, `progress`, `sources`, `recorded`:
  the ground. Refusals, model sizes, this machine, the others of one run, the small model that
  ships, what a name stands for.
- `spellings`, `settings`: how people write values; every parameter, its check and its default in
  each profile.
- `theory`: QLoRA's arithmetic, written out in NumPy and plain torch.
- `record`: what a run writes, whole and without secrets.
- `model`, `memory`, `answer`, `train`: load a base, predict peak memory, generate, fine-tune.
- `batch`, `ui`, `lessons`, `cli`: all notebooks at once, panels, figures, the command line.

Importing the package loads no torch. It sets three environment variables, each only if it is not
set yet (`OMP_WAIT_POLICY`, `TORCH_CPP_LOG_LEVEL`, `KINETO_LOG_LEVEL`), and the level of one logger
(`bitsandbytes.backends.cpu.ops`); nothing else changes.
"""

import importlib.metadata
import logging
import os
from contextlib import suppress

# Two OpenMP threads that spin on a busy two-core machine are five to eight times slower than one
# (measured), so idle threads must sleep. OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# torch's profiler measures the memory of a training step (memory.profiler); its log lines would
# stand in the notebook.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

__version__ = "unknown"  # the folder alone, not installed
with suppress(importlib.metadata.PackageNotFoundError):
    __version__ = importlib.metadata.version("qlora-nb")  # as pyproject.toml has it

# On CPUs with bfloat16 units bitsandbytes warns that an optional kernel from the hub is not
# installed. The kit does without: profile tiny makes no hub call.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
