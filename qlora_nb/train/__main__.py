"""`torchrun --nproc_per_node N -m qlora_nb.train [--shard fsdp] -p NAME VALUE …`: one run in N
processes. On one machine `qlora-nb train --processes N` starts it so.
"""

import sys

from qlora_nb.errors import KitError
from qlora_nb.settings import resolve
from qlora_nb.spellings import parameters


def main() -> int:
    from qlora_nb.train import run

    arguments = sys.argv[1:]
    shard = "none"
    if arguments[:1] == ["--shard"]:
        shard = arguments[1]
        arguments = arguments[2:]
    try:
        return run.in_this_process(resolve(parameters(arguments)), shard)
    except KitError as error:
        print(f"qlora-nb: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
