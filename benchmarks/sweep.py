"""A sweep of twelve runs, whose leaderboard notebook 10 shows.

    python benchmarks/sweep.py            into qlora_nb/recorded/sweep.json

Two workers, notebook 06 at every point: rank × learning rate × seed, on the pocket model.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import provenance

from qlora_nb.batch import leaderboard

TARGET = provenance.ROOT / "qlora_nb" / "recorded" / "sweep.json"
WORKERS = 2
GRID = """\
[fixed]
profile = "tiny"
max_steps = 60
eval_rows = 60
sample_steps = 0

[grid]
r = [2, 8]
learning_rate = [2e-3, 6e-3]
seed = [0, 1, 2]
"""


def main() -> None:
    record = provenance.provenance((0, 1, 2))
    with tempfile.TemporaryDirectory() as folder:
        grid = Path(folder) / "grid.toml"
        grid.write_text(GRID, encoding="utf-8")
        command = [
            "sweep",
            str(grid),
            "--workers",
            str(WORKERS),
            "--out",
            folder,
            "--name",
            "shown",
        ]
        subprocess.run([sys.executable, "-m", "qlora_nb.cli", *command], check=True)
        board = leaderboard.table(Path(folder) / "sweep-shown")
    found = {"grid": GRID, "workers": WORKERS, "leaderboard": board.to_dict("records")}
    provenance.write(TARGET, {**record, **found})


if __name__ == "__main__":
    main()
