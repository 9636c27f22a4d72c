"""What is claimed, with the numbers that were measured: write `docs/claims.md`.

    python tools/claims_page.py

The words are in `claims.md.j2`; every number is read from the records (`qlora_nb/recorded`,
`benchmarks/results`, `verified`), from the key results of the committed notebooks, or from the
tests that state a bound. A sentence that says "equal" asks the record whether it is: where it is
not, nothing is written. `tests/test_claims_page.py` compares the committed page with what is
written now. A few seconds.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import tomllib
from pathlib import Path

import jinja2
import nbformat

from qlora_nb import pocket
from qlora_nb.answer import evaluate
from qlora_nb.model import data
from qlora_nb.settings import validate

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "claims.md"
TEMPLATE = Path(__file__).with_name("claims.md.j2")
SEEDS = (0, 1, 2)
"""Those of `make verify`, whose mean is claimed."""


ODD = ("chats", "tables", "configurations")
"""What the check `fuzz` makes whole and odd; the rest it damages."""


class NotSo(ValueError):
    """A sentence of the template that the records do not bear out."""


def recorded(name: str) -> dict:
    """A record of `qlora_nb/recorded`."""
    path = ROOT / "qlora_nb" / "recorded" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def results(name: str) -> dict:
    """A record of `benchmarks/results`."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def verified() -> dict[str, dict]:
    """Check of `make verify` → its newest result that there is; each has its `date`."""
    newest = {}
    for path in sorted((ROOT / "verified").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for name, found in record["checks"].items():
            newest[name] = {"date": record.get("date", ""), **found}
    return newest


def key_results(name: str) -> dict[str, object]:
    """What the last cell of a committed notebook says it found."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if "key-results" in cell.metadata.get("tags", []):
            [output] = cell.outputs
            return ast.literal_eval(output.data["text/plain"])
    raise NotSo(f"{name} has no key results")


def printed(name: str, pattern: str) -> str:
    """What a cell of a committed notebook printed where `pattern` matches first: its one group."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            found = re.search(pattern, output.get("text", ""))
            if found:
                return found[1]
    raise NotSo(f"{name} prints no {pattern}")


def constant(test: str, name: str) -> object:
    """A literal that a test file sets, as the number of values it compares."""
    tree = ast.parse((ROOT / "tests" / test).read_text(encoding="utf-8"))
    for statement in tree.body:
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        if getattr(targets[0], "id", "") == name:
            return ast.literal_eval(statement.value)
    raise NotSo(f"{test} sets no {name}")


def parametrized(test: str, argument: str) -> list:
    """The values that a test of a file is run with, by the argument's name."""
    text = (ROOT / "tests" / test).read_text(encoding="utf-8")
    return ast.literal_eval(re.search(rf'\(\s*"{argument}", (\[.*?\])', text, re.DOTALL)[1])


def bound(test: str, pattern: str) -> str:
    """What a test file states where `pattern` matches: its one group."""
    text = (ROOT / "tests" / test).read_text(encoding="utf-8")
    return re.search(pattern, text)[1]


def facts_known_by_heart() -> int:
    """How many facts the pocket model is asked for."""
    return len(pocket.read("almanac"))


def baselines() -> dict[str, float]:
    """Share of held-out answers (%) that two rules without a model get right, mean of `SEEDS`."""
    found = {"majority": [], "copy": []}
    for seed in SEEDS:
        train, held_out = data.load(validate({"seed": seed}))
        known = list(train)
        held = list(held_out)
        for name, rule in (
            ("majority", evaluate.majority_baseline),
            ("copy", evaluate.copy_baseline),
        ):
            found[name].append(100 * evaluate.exact_match(rule(known, held), held)["all"])
    return {name: statistics.mean(shares) for name, shares in found.items()}


def peak_misses(memory: dict) -> list[float]:
    """How far each predicted peak is from the measured one, in %, without its sign."""
    return [
        abs(peak["off_percent"]) for model in memory["models"].values() for peak in model["peaks"]
    ]


def card_misses(table: dict) -> list[float]:
    """How far the ledger is from what a card showed, in %, without its sign, the largest last."""
    return sorted(abs(row["off (%)"]) for row in table.values())


def rise(qualities: list[dict], name: str) -> float:
    """By how many % a datatype raises the mean loss."""
    losses = {one["name"]: statistics.mean(one["losses"]) for one in qualities}
    return 100 * (losses[name] / losses["unquantized"] - 1)


def added(qualities: list[dict], name: str) -> float:
    """By how many nats a datatype raises the mean loss."""
    losses = {one["name"]: statistics.mean(one["losses"]) for one in qualities}
    return losses[name] - losses["unquantized"]


def published(figures: list[dict], beginning: str) -> dict:
    """The one published figure whose name begins so."""
    [found] = [figure for figure in figures if figure["figure"].startswith(beginning)]
    return found


def counted_of_litgpt() -> dict[str, float]:
    """litgpt's published figures: how many, by how many % this kit's libraries need less, and how
    far a count of litgpt's own code is from them (%); both the largest.
    """
    figures = tomllib.loads((ROOT / "tools" / "published.toml").read_text(encoding="utf-8"))
    less = []
    off = []
    for figure in recorded("published"):
        entry = figures["figures"][figure["figure"]]
        if "litgpt" in entry["source"]:
            less.append(100 * (1 - figure["predicted"] / figure["published"]))
            off.append(100 * abs(entry["counted_gb"] / figure["published"] - 1))
    return {"n": len(less), "less": max(less), "off": max(off)}


def fuzzed(became: dict[str, int]) -> dict[str, int]:
    """Inputs that were damaged, and inputs that are whole and odd."""
    odd = sum(n for what, n in became.items() if what.split(":")[0] in ODD)
    return {"damaged": sum(became.values()) - odd, "odd": odd}


def checks() -> list[str]:
    """The names of what `make verify` checks, those without a record too."""
    text = (ROOT / "tools" / "verify.py").read_text(encoding="utf-8")
    [table] = re.findall(r"^CHECKS.*?= \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    return sorted(re.findall(r'^    "(\w+)":', table, re.MULTILINE))


def so(fact: object) -> str:
    """Nothing, where a fact holds; an error where it does not.

    Raises:
        NotSo: the records do not bear the sentence out.
    """
    if fact is not True:
        raise NotSo(f"a claim does not hold: {fact}")
    return ""


def number(value: float, form: str) -> str:
    """A number in Python's format; a minus is a minus, not a hyphen."""
    return f"{value:{form}}".replace("-", "−")


def render() -> str:
    """The whole page.

    Raises:
        NotSo: a record does not bear a sentence out.
        jinja2.UndefinedError: a number that the template asks for is not there.
    """
    loader = jinja2.FileSystemLoader(TEMPLATE.parent)
    world = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, of numbers
    )
    world.filters["number"] = number
    world.filters["mean"] = statistics.mean
    world.filters["median"] = statistics.median
    helpers = (
        recorded,
        results,
        key_results,
        constant,
        parametrized,
        bound,
        published,
        rise,
        added,
    )
    helpers += (printed, so, peak_misses, card_misses, baselines, counted_of_litgpt, fuzzed)
    helpers += (facts_known_by_heart, checks)
    for helper in helpers:
        world.globals[helper.__name__] = helper
    return world.get_template(TEMPLATE.name).render(
        verified=verified(), notebooks=len(list((ROOT / "notebooks").glob("*.ipynb")))
    )


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
