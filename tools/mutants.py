"""Where `mutate.py` changes the package: every figure and every refusal, found in the syntax tree.

A figure is a function under `@draws`, or a helper that draws on its first parameter, ax or axes:

- a call that draws: all its data become other data of the same shape (`zero`);
- a title, returned or written by a call: it becomes empty.

A refusal is `raise KitError(…)`, `raise` of what a function annotated `-> KitError` returns,
`return KitError(…)`, and `raise ValueError(…)`, of which `errors.refusing` or pydantic makes one:

- under an `if` or `elif`: the innermost one never holds (its condition is still computed);
- else in an `except`: the original error is raised again;
- anywhere else (`else`, `match`, the end of a function): `pass` stands in its place.
"""

from __future__ import annotations

import ast
import numbers
import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

REFUSALS = {"KitError", "ValueError"}
TITLES = {"set_title", "suptitle"}
NO_DATA = {"legend", "inset_axes", "indicate_inset", "secondary_xaxis", "secondary_yaxis"}
PUBLIC = {name for name in vars(Axes) if not name.startswith(("_", "get_", "set_"))}
ARTISTS = PUBLIC - NO_DATA
"""Every method of matplotlib's Axes that draws data."""
DATA_KEYWORDS = {"left", "bottom", "height", "width", "y2", "xerr", "yerr", "label", "labels"}


def zero(value, scalar: bool = True):  # noqa: PLR0911 (a line for each kind of value)
    """Other data of the same shape: numbers become 0 (and 0 becomes 1), text loses its digits.

    What is no data stays: colours (`#…`), formats (`{…}`), truth values, functions, artists.

    Args:
        value: a number, text, array, tensor, or a container of these (of a dictionary the values).
        scalar: False leaves a number that stands alone: a helper's unit or limit.
    """
    if isinstance(value, str):
        return value if value.startswith("#") or "{" in value else re.sub(r"\d", "", value)
    if isinstance(value, bool) or (isinstance(value, numbers.Number) and not scalar):
        return value
    if isinstance(value, numbers.Integral):
        return int(value == 0)
    if isinstance(value, numbers.Real):
        return float(value == 0)
    if isinstance(value, np.ndarray | pd.Series) and value.dtype.kind in "biuf":
        return (value == 0).astype(value.dtype)
    if hasattr(value, "new_zeros"):  # a torch tensor
        return (value == 0).to(value.dtype)
    if isinstance(value, dict):
        return {key: zero(part) for key, part in value.items()}
    if type(value) is tuple:
        return tuple(zero(part) for part in value)
    if isinstance(value, (list, range, KeysView, ValuesView, ItemsView, Iterator)):
        return [zero(part) for part in value]
    return value


@dataclass(eq=False)
class Mutant:
    """One change of one module.

    Args:
        kind: "figure" or "refusal".
        file: path below the repository.
        module: its name for `import`.
        line: where the change is made.
        lines: a test must run one of these to see it.
        function: qualified name of the function it lies in.
        text: the source that is changed.
        tree: the module.
        change: makes the change in `tree`, once; for use in a fork.
    """

    kind: str
    file: str
    module: str
    line: int
    lines: range
    function: str
    text: str
    tree: ast.Module
    change: Callable[[], None]

    def described(self) -> dict[str, object]:
        """What is written of it in a result."""
        names = ("kind", "file", "line", "function", "text")
        return {name: getattr(self, name) for name in names}


class Source:
    """A module of the package: its tree, and what stands above each node of it."""

    def __init__(self, path: Path, root: Path):
        self.text = path.read_text(encoding="utf-8")
        self.file = path.relative_to(root).as_posix()
        parts = path.relative_to(root).with_suffix("").parts
        self.module = ".".join(parts).removesuffix(".__init__")
        self.tree = ast.parse(self.text)
        self.nodes = list(ast.walk(self.tree))
        self.functions = [node for node in self.nodes if isinstance(node, ast.FunctionDef)]
        self.parents: dict[ast.AST, ast.AST] = {}
        for node in self.nodes:
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node

    def above(self, node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
        """(child, parent) from this node up to the module."""
        while node in self.parents:
            yield node, self.parents[node]
            node = self.parents[node]

    def mutant(self, kind: str, shown: ast.AST, lines: range, change: Callable) -> Mutant:
        """A mutant whose text is the source of the node `shown`."""
        names = []
        for _, parent in self.above(shown):
            if isinstance(parent, (ast.FunctionDef, ast.ClassDef)):
                names.append(parent.name)
        function = ".".join(reversed(names))
        text = " ".join(ast.get_source_segment(self.text, shown).split())
        where = (self.file, self.module, shown.lineno, lines)
        return Mutant(kind, *where, function, text, self.tree, change)


def lines_of(first: ast.AST, last: ast.AST) -> range:
    return range(first.lineno, last.end_lineno + 1)


def last_name(node: ast.AST | None) -> str:
    """`c` of `a.b.c`, `f` of `f(…)`; empty for anything else."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


# Figures


def is_figure(function: ast.FunctionDef) -> bool:
    return "draws" in [last_name(d) for d in function.decorator_list]


def is_helper(function: ast.FunctionDef) -> bool:
    """Whether it is no figure and draws on axes that are its first argument."""
    called = {last_name(node) for node in ast.walk(function) if isinstance(node, ast.Call)}
    first = [argument.arg for argument in function.args.args[:1]]
    draws = bool(called & (ARTISTS | TITLES))
    return draws and first in (["ax"], ["axes"]) and not is_figure(function)


def figures(source: Source, helpers: set[str]) -> Iterator[Mutant]:
    """A mutant for each call that draws, and for each title."""
    for function in source.functions:
        if not is_figure(function) and not is_helper(function):
            continue
        for node in ast.walk(function):
            change = None
            if isinstance(node, ast.Call):
                change = other_data(node, helpers)
            elif isinstance(node, ast.Return) and is_title(node, function, source):
                change = emptied(node)
            if change:
                yield source.mutant("figure", node, lines_of(node, node), change)


def is_title(node: ast.Return, function: ast.FunctionDef, source: Source) -> bool:
    """Whether it returns the figure's title; a function inside returns something else."""
    inside = (parent for _, parent in source.above(node) if isinstance(parent, ast.FunctionDef))
    return is_figure(function) and node.value is not None and next(inside) is function


def emptied(node: ast.Return | ast.keyword) -> Callable[[], None]:
    def change() -> None:
        node.value = ast.Constant("")

    return change


def unlabelled(call: ast.Call) -> Callable[[], None]:
    """`ax.bar_label(bars)` takes its data from the bars: the change is that nothing is written."""

    def change() -> None:
        call.keywords = [keyword for keyword in call.keywords if keyword.arg != "fmt"]
        call.keywords.append(ast.keyword("fmt", ast.Constant("")))

    return change


def other_data(call: ast.Call, helpers: set[str]) -> Callable[[], None] | None:  # noqa: PLR0911
    """What changes the data of a call that draws; None for any other call."""
    name = last_name(call)
    method = isinstance(call.func, ast.Attribute)
    titles = [keyword for keyword in call.keywords if keyword.arg == "title"]
    if method and name in TITLES and call.args:

        def change() -> None:
            call.args[0] = ast.Constant("")

        return change
    if method and name == "set" and titles:
        return emptied(titles[0])
    if method and name.startswith("add_") and call.args and isinstance(call.args[0], ast.Call):
        return wrapping(call.args[0], 0, DATA_KEYWORDS, scalar=True)  # ax.add_patch(Rectangle(…))
    if method and name == "bar_label" and len(call.args) == 1:
        return unlabelled(call)
    if method and name in ARTISTS and call.args:
        return wrapping(call, 0, DATA_KEYWORDS, scalar=True)
    if name in helpers and call.args:
        return wrapping(call, 1, {keyword.arg for keyword in call.keywords} - {None}, scalar=False)
    return None


def wrapping(call: ast.Call, first: int, keywords: set[str], scalar: bool) -> Callable[[], None]:
    """The change that lets every argument from the `first` on, and these keywords, pass `zero`."""

    def wrapped(node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Starred):
            return ast.Starred(wrapped(node.value), node.ctx)
        chosen = ast.keyword("scalar", ast.Constant(scalar))
        return ast.Call(ast.Name("__zero__", ast.Load()), [node], [chosen])

    def change() -> None:
        call.args[first:] = [wrapped(node) for node in call.args[first:]]
        for keyword in call.keywords:
            if keyword.arg in keywords:
                keyword.value = wrapped(keyword.value)

    return change


# Refusals


def refusals(source: Source, makers: set[str]) -> Iterator[Mutant]:
    """A mutant for each refusal; several that one `if` guards are one."""
    kept = set()  # names of refusals that are made first and raised later
    for node in source.nodes:
        if isinstance(node, ast.Assign) and last_name(node.value) in makers - {"ValueError"}:
            kept |= {last_name(target) for target in node.targets}
    done = set()
    for node in source.nodes:
        if not is_refusal(node, makers, kept):
            continue
        guard = guard_of(node, source)
        if isinstance(guard, ast.If):
            if guard not in done:
                lines = lines_of(guard.body[0], guard.body[-1])
                yield source.mutant("refusal", guard.test, lines, never(guard))
            done.add(guard)
        else:
            instead = ast.Raise() if isinstance(guard, ast.ExceptHandler) else ast.Pass()
            change = replacing(node, instead, source.parents[node])
            yield source.mutant("refusal", node, lines_of(node, node), change)


def is_refusal(node: ast.AST, makers: set[str], kept: set[str]) -> bool:
    if isinstance(node, ast.Return):
        return isinstance(node.value, ast.Call) and last_name(node.value) == "KitError"
    if not isinstance(node, ast.Raise) or node.exc is None:
        return False
    made = {last_name(part) for part in ast.walk(node.exc) if isinstance(part, ast.Call)}
    return bool(made & makers) or last_name(node.exc) in kept


def guard_of(node: ast.AST, source: Source) -> ast.AST | None:
    """The `if` or `elif` in whose body a refusal stands, or its `except`; None if there is none."""
    for child, parent in source.above(node):
        if isinstance(parent, ast.ExceptHandler):
            return parent
        if isinstance(parent, ast.If):
            return parent if child in parent.body else None
        if isinstance(parent, (ast.match_case, ast.FunctionDef)):
            return None
    return None


def never(guard: ast.If) -> Callable[[], None]:
    def change() -> None:
        guard.test = ast.BoolOp(ast.And(), [guard.test, ast.Constant(False)])

    return change


def replacing(old: ast.stmt, new: ast.stmt, parent: ast.AST) -> Callable[[], None]:
    def change() -> None:
        for _, statements in ast.iter_fields(parent):
            if isinstance(statements, list) and old in statements:
                statements[statements.index(old)] = new

    return change


def find(package: Path) -> list[Mutant]:
    """All mutants of a package."""
    sources = [Source(path, package.parent) for path in sorted(package.rglob("*.py"))]
    makers, helpers, found = set(REFUSALS), set(), []
    for source in sources:
        for function in source.functions:
            if last_name(function.returns) == "KitError":
                makers.add(function.name)
            if is_helper(function):
                helpers.add(function.name)
    for source in sources:
        found += [*figures(source, helpers), *refusals(source, makers)]
    return found
