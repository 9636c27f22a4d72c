"""What `qlora-nb plan` says of every causal family that transformers knows: bytes, or one sentence.

    python tools/every_family.py [model_type …]

Each family is its default configuration, with two layers where it can be made so, in a process of
its own that is given a minute. No weights are made.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import sys
import tempfile
import time

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from qlora_nb.errors import KitError
from qlora_nb.memory import budget
from qlora_nb.memory.plan import plan_of
from qlora_nb.model import configs, linear_layers
from qlora_nb.settings import validate

LIMIT_S = 60


def small_config(kind):
    """The default configuration of a class, with two layers where that is allowed."""
    for values in ({"num_hidden_layers": 2}, {}):
        with contextlib.suppress(Exception):
            config = kind(**values)
            config.to_json_string()
            return config
    return None


def outcome_of(kind) -> str:
    """'planned', or the kit's sentence, or the library's error, with its class."""
    config = small_config(kind)
    if config is None:
        return "left out: transformers itself makes no default configuration"
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        settings = validate({"model_id": folder, "max_length": 64, "r": 4})
        try:
            shapes = configs.meta_model(configs.config_of(folder))
            linear_layers.require_four_bit(shapes)
            for train in (True, False):
                assert budget.peak(plan_of(settings, train)).total_bytes > 0
        except KitError as error:
            return str(error)
        except Exception as error:
            return f"TRACEBACK {type(error).__name__}: {error}"[:300]
    return "planned"


def _child(kind, pipe) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        said = outcome_of(kind)
    pipe.send(said)


def outcomes(names: list[str]) -> dict[str, str]:
    """model_type → what is said of it."""
    fork = multiprocessing.get_context("fork")  # after torch is loaded, before it has threads
    found = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        if names and kind.model_type not in names:
            continue
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=_child, args=(kind, sender))
        started = time.time()
        process.start()
        sender.close()
        said = f"TRACEBACK no answer within {LIMIT_S} s"
        if receiver.poll(LIMIT_S):
            try:
                said = receiver.recv()
            except EOFError:
                said = "TRACEBACK the process ended"
        process.kill()
        process.join()
        found[kind.model_type] = said
        print(f"{kind.model_type} {time.time() - started:.1f} s: {said}", flush=True)
    return found


if __name__ == "__main__":
    found = outcomes(sys.argv[1:])
    bad = [name for name, said in found.items() if said.startswith("TRACEBACK")]
    print(json.dumps({"families": len(found), "tracebacks": bad}))
    sys.exit(1 if bad else 0)
