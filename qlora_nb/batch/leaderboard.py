"""Many runs beside each other: a line for each setting, its seeds taken together.

What is read are the runs' own manifests, so it does not matter what started them: a sweep, a shell
loop, a notebook. Two runs belong to one setting if their parameters differ in nothing but the seed
(and in where they were written). A loss is a mean over seeds with its 95 % interval; where two
intervals overlap widely, the order of the two lines is chance.
"""

import math
from glob import iglob
from pathlib import Path

from qlora_nb.errors import KitError
from qlora_nb.record import runs
from qlora_nb.theory import intervals

MEASURES = {
    "loss_after": "loss (nats)",
    "exact_match_after": "exact match",
    "peak_bytes": "memory (MiB)",
    "train_seconds": "training (s)",
}
"""What runs measured, as their manifests call it, and its column."""

NO_SETTING = ("seed", "output_dir", "resume", "finished", "started", "unfinished")
"""Columns by which runs of one setting may differ; and all that was measured."""


def finished(folder: Path) -> dict:
    """The manifest of a finished run of notebook 06 below a folder; empty if there is none."""
    for path in folder.rglob(runs.MANIFEST):
        record = runs.read_record(path)
        if _is_finished(record):
            return record
    return {}


def _is_finished(record: dict) -> bool:
    """Whether a run was trained to its end and measured afterwards."""
    return record.get("status") == "done" and "loss_after" in record.get("metrics", {})


def table(folder: Path):
    """The leaderboard of all runs of notebook 06 below a folder, the lowest loss first.

    Returns:
        A pandas table: the parameters that vary, the number of seeds, means over them of the
        held-out loss (nats an answer token; ± is half its 95 % interval), exact match (share), the
        most memory that the process held after a step (MiB; on a card what it reserved there) and
        training time (s), and the seeds that are not finished with their status. What came out of a
        manifest is text in one line; pandas escapes HTML in it.

    Raises:
        KitError: there are no such runs.
    """
    import pandas

    lines = []
    # unlike pathlib's, this search bears folders that a run removes meanwhile
    for name in iglob(f"**/06_*/{runs.MANIFEST}", root_dir=folder, recursive=True):
        record = runs.read_record(folder / name)
        if "parameters" in record:
            lines.append(_line(record, runs.status_of((folder / name).parent)))
    if not lines:
        raise KitError("no runs of notebook 06 lie here", value=str(folder.absolute()))
    frame = pandas.DataFrame(lines)
    frame = frame.sort_values(["finished", "started"])  # of two that are the same the last counts
    own = [name for name in frame if name not in (*NO_SETTING, *MEASURES.values())]
    frame = frame.drop_duplicates([*own, "seed"], keep="last")
    varying = [name for name in own if frame[name].nunique(dropna=False) > 1]
    groups = frame.groupby(varying or own, dropna=False, sort=False)
    found = groups[list(MEASURES.values())].mean()
    found.insert(0, "seeds", groups["loss (nats)"].count())
    found.insert(2, "±", groups["loss (nats)"].agg(_half_width))
    found["unfinished"] = groups["unfinished"].agg(_listed)
    return found.reset_index()[[*varying, *found]].sort_values("loss (nats)", ignore_index=True)


def as_text(folder: Path) -> str:
    """`table` for a terminal."""
    return table(folder).to_string(index=False, na_rep="-", float_format="{:.4g}".format)


def _line(record: dict, status: str) -> dict:
    """What the table takes from one manifest."""
    line = {name: _plain(value) for name, value in record["parameters"].items()}
    line["finished"] = _is_finished(record)
    line["started"] = str(record.get("started"))
    if status == "done":
        status = "done, not measured"
    line["unfinished"] = "" if line["finished"] else f"seed {line.get('seed')} {_plain(status)}"
    for name, column in MEASURES.items():
        measured = record["metrics"].get(name)
        if isinstance(measured, dict):
            measured = measured.get("all")  # of all kinds of questions
        line[column] = math.nan if measured is None or not line["finished"] else float(measured)
    line["memory (MiB)"] /= 2**20
    return line


def _plain(value: object) -> object:
    """A number as it is, anything else as text in one line that a terminal does not obey."""
    if isinstance(value, int | float):
        return value
    text = str(value)
    return text if text.isprintable() else ascii(text)


def _half_width(losses) -> float:
    return intervals.half_width(list(losses.dropna()))


def _listed(texts) -> str:
    return ", ".join(sorted(text for text in texts if text))
