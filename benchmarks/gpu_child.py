"""One child of gpu.py: one measurement, alone with the card.

    python benchmarks/gpu_child.py PARENT '[UUID or null, "gpu_training.peak", {its arguments}]'

Prints what the function returns, or {"error": what it raised}, as one line of JSON. PARENT is the
number of the process that reads it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this copy, installed or not


def end_with(parent: int) -> None:
    """End when the process that asks is gone: a measurement that nobody reads would hold the card
    beside the next one.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    parent = int(sys.argv[1])
    uuid, function, values = json.loads(sys.argv[2])
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    module, _, name = function.partition(".")
    try:
        # before anything makes CUDA's context
        watch = importlib.import_module("gpu_card").Watch(uuid)
        found = getattr(importlib.import_module(module), name)(watch, **values)
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
