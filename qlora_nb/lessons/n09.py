"""Notebook 09, claims checked: what the 2023 article and the papers behind it say, beside what is
measured. A verdict is never written down: it follows from the numbers.

- `CLAIMS`: the claims in our words, each with the place of the original, from `claims.toml`;
- `check`: a claim with the numbers that were measured, and its verdict;
- `table`: claims as a table;
- `plot_claim`: the numbers of one claim beside the one that is said.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas

from qlora_nb.ui import style


@dataclass(frozen=True)
class Checked:
    """A claim and what was measured. The head of `claims.toml` explains the other fields.

    Attributes:
        ours: condition → the number measured under it, in `unit`; empty while there is none.
    """

    part: int
    claim: str
    place: str
    theirs: float
    unit: str
    relation: str
    why: str
    truth: str
    shown: str
    tolerance: float = 0
    meant: float | None = None
    ours: Mapping[str, float] = field(default_factory=dict)

    def holding(self, said: float) -> list[str]:
        """The conditions under which ours stands to this number as the claim says."""
        low = said * (1 - self.tolerance)
        high = said * (1 + self.tolerance)
        if self.relation == "at most":
            low = -math.inf
        if self.relation == "at least":
            high = math.inf
        return [condition for condition, number in self.ours.items() if low <= number <= high]

    @property
    def verdict(self) -> str:
        """Holds, holds if (and the conditions), misprint, not so, or not measured yet."""
        holding = self.holding(self.theirs)
        if not self.ours:
            return "not measured yet"
        if len(holding) == len(self.ours):
            return "holds"
        if holding:
            return "holds if: " + " or ".join(holding)
        if self.meant and self.holding(self.meant):
            return "misprint"
        return "not so"

    @property
    def said(self) -> str:
        """What is said, as a number."""
        return f"{self.relation} {self.theirs:,.4g} {self.unit}"

    @property
    def found(self) -> str:
        """Our numbers, each with its condition."""
        return "; ".join(f"{number:,.4g} ({name})" for name, number in self.ours.items())


FILE = Path(__file__).with_name("claims.toml")
CLAIMS = {
    name: Checked(**fields)
    for name, fields in tomllib.loads(FILE.read_text(encoding="utf-8")).items()
}
"""Name → claim, in the order in which the notebook marks them; nothing is measured yet."""


def check(name: str, ours: Mapping[str, float], my_verdicts: Mapping[str, str | None]) -> Checked:
    """Put our numbers beside a claim and print what follows.

    Args:
        name: of the claim.
        ours: condition → number, in the claim's unit; empty where there is no measurement yet.
        my_verdicts: name → the reader's mark, None where there is none.
    """
    checked = replace(CLAIMS[name], ours=ours)
    print(f"{name}: said {checked.said}, found {checked.found or 'nothing yet'}")
    print(f"    your mark: {my_verdicts.get(name) or 'none'} · verdict: {checked.verdict}")
    return checked


def table(claims: Mapping[str, Checked], *columns: str):
    """Claims as a table, one column for each of these attributes; text is escaped."""
    rows = [[getattr(claim, column) for column in columns] for claim in claims.values()]
    frame = pandas.DataFrame(rows, list(claims), columns)
    look = {"text-align": "left", "vertical-align": "top"}
    styled = frame.style.format(escape="html", precision=2).format_index(escape="html")
    return styled.set_properties(**look)


@style.draws
def plot_claim(ax, found: Mapping[str, Checked], name: str) -> str:
    """One claim: the number that is said (dashed) and ours, without hatch where the claim holds."""
    checked = found[name]
    holding = checked.holding(checked.theirs)
    for condition, number in checked.ours.items():
        hatch = "" if condition in holding else "//"
        bar = ax.barh(condition, number, **style.look("other", hatch=hatch))
        ax.bar_label(bar, [f"{number:,.4g}"], padding=3)
    ax.axvline(checked.theirs, color=style.BLACK, linestyle="--")
    ax.margins(x=0.15)
    ax.invert_yaxis()
    ax.set_xlabel(f"{checked.unit} (said: {checked.relation} the dashed line)")
    return f"{name}: {checked.verdict}"
