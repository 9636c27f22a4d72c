"""`torchrun --nproc_per_node N -m qlora_nb.train [--shard fsdp] -p NAME VALUE …`: one run in N
processes. On one machine `qlora-nb train --processes N` starts it so.
"""

import argparse
import sys

from qlora_nb.errors import KitError
from qlora_nb.settings import resolve
from qlora_nb.spellings import parameters


def main() -> int:
    parser = argparse.ArgumentParser(prog="qlora_nb.train", description=__doc__)
    parser.add_argument("--shard", choices=["none", "fsdp"], default="none")
    options, given = parser.parse_known_args()
    from qlora_nb.train import run

    try:
        return run.in_this_process(resolve(parameters(given)), options.shard)
    except KitError as error:
        print(f"qlora-nb: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
