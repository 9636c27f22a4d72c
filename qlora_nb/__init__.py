"""A Jupyter kit that teaches QLoRA by taking it apart, then runs it for real.

Rooms: `theory` (what is taught) ← `engine` (what is run) ← `ui` (what is seen); `pocket` is the
small model that ships with the kit and `cli` the command line. Importing this package loads no
torch.
"""

import logging
import os

# Two OpenMP threads that spin on a busy two-core machine are five to eight times slower than one
# (measured); idle threads must sleep. The variable is read when torch loads, so it is set here,
# before anything imports torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# torch's profiler weighs a training step (engine.activations) and would write its own bookkeeping
# into the notebook.
for name, level in {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "99"}.items():
    os.environ.setdefault(name, level)

__version__ = "0.1.0"

# bitsandbytes offers an optional kernel from the hub and warns, on CPUs with bfloat16 units, that
# it is not installed. The kit does not use it: tiny must make no hub call.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
