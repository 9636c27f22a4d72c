"""Starting several processes of one run: what `torchrun` does, by torch's own function.

torch's agent gives each process its rank, watches them, and ends all when one of them fails
(`torch/distributed/launcher/api.py`). What it says of a failure is a page of its own insides; here
it becomes a sentence.
"""

import logging
import os
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qlora_nb import machine


def together(n: int, arguments: list[str]) -> int:
    """Run `qlora-nb train` in `n` processes of this machine; returns the exit code: that
    of the process that failed first, 130 after Ctrl-C, 143 after SIGTERM.
    """
    n_threads = max(1, machine.this_machine().n_cores // n)
    os.environ.setdefault("OMP_NUM_THREADS", str(n_threads))  # each would take all cores
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        max_restarts=0,  # the default, 3, would begin three more runs
        run_id="qlora-nb",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
    )
    start = elastic_launch(config, entrypoint=sys.executable)
    try:
        start("-m", "qlora_nb.cli", "train", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        ended = f"process {rank} was ended by {failure.signal_name()}, and with it the others"
        print(f"qlora-nb: {ended}; -p resume latest resumes it", file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0
