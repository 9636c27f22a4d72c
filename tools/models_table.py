"""Write `docs/models.md`: which families of models the kit trains, as `tests/families.py` finds it.

    python tools/models_table.py

A minute on one core. `tests/test_families.py` compares every line of the committed table with what
it measures itself.
"""

from __future__ import annotations

import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "models.md"
COLUMNS = ("family", "class", "trains and answers", "packing", "blocks in 4 bit", "max_length")
LIBRARIES = ("transformers", "peft", "bitsandbytes", "torch")

TEXT = """# Families of models

Tiny random models (two layers, width 64, the pocket model's tokenizer), each trained two steps and
asked by the kit and by plain transformers, PEFT and bitsandbytes. *Equal*: the bytes of the 4-bit
base are those predicted, the losses of both steps agree to five digits, every greedy answer of a
batch is the one that its row gets alone. A family that is not here is tried on the model itself
when it is loaded; `qlora-nb plan -p model_id …` says within seconds what becomes of it.

- *packing*: whether rows in one sequence are kept apart; where they are not, `packing=True` is
  refused before training.
- *blocks in 4 bit*: share of the tiny model's weights outside embeddings and head; norms and biases
  are never in 4 bit, experts that are kept in one tensor neither, which is said when a model is
  loaded. In a mixture of experts of real size they are nearly all weights.
- *max_length*: what happens if it is more than the positions that a model was made for (*said
  beyond*: it trains, after a warning).

Written by `tools/models_table.py` on {date}: {versions}.

"""


def line(row: dict[str, object]) -> str:
    """One family's line of the table."""
    if row["refusal"]:
        cells = [row["family"], row["class"], f"refused: {row['refusal']}", "", "", ""]
    else:
        longer = "no limit"
        if row["too long refused"]:
            longer = "refused beyond"
        elif row["too long said"]:
            longer = "said beyond"
        packing = "refused" if row["packing refused"] else "kept apart"
        equal = "equal" if row["equal"] else "NOT EQUAL"
        cells = [row["family"], row["class"], equal, packing, f"{row['share']:.0%}", longer]
    return "| " + " | ".join(map(str, cells)) + " |"


def render(rows: list[dict[str, object]]) -> str:
    """The whole file."""
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    text = TEXT.format(date=time.strftime("%Y-%m-%d"), versions=versions)
    head = "| " + " | ".join(COLUMNS) + " |"
    lines = [head, "|" + "---|" * len(COLUMNS), *map(line, rows)]
    return text + "\n".join(lines) + "\n"


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    import families

    rows = []
    for family in families.FAMILIES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "model"
            families.save(family, folder)
            rows.append(families.measured(family, folder))
        print(line(rows[-1]), flush=True)
    TABLE.write_text(render(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
