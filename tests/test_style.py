"""The kit's colours as other eyes see them, and what stands beside colour: markers, hatches, line
styles; figures in full.
"""

from __future__ import annotations

import ast
import base64
import io
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import ROOT
from IPython.core.formatters import DisplayFormatter
from IPython.core.pylabtools import print_figure
from matplotlib import colors
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qlora_nb.memory import budget, ledger, shares
from qlora_nb.ui import charts, style, widgets

# Machado, Oliveira, Fernandes 2009, severity 1.0: what is left of linear sRGB when one kind of cone
# is missing
SEEN_WITHOUT = {
    "nothing missing": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
NOTICEABLE = 2.3
"""A difference in CIELAB that half of all people just notice (Mahy et al. 1994)."""
LEAST = 5 * NOTICEABLE
"""What is asked for: seen at a glance, also in a thin line and on a poor projector."""


def lab(rgb: str, matrix) -> np.ndarray:
    """CIELAB (D65) of a colour seen through a matrix on linear sRGB."""
    value = np.array(colors.to_rgb(rgb))
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(matrix) @ linear, 0, 1)
    xyz = (
        np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        @ seen
    )
    ratio = xyz / [0.9505, 1.0, 1.089]
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def nearest(palette: dict[str, str], matrix) -> tuple[float, tuple[str, str]]:
    """The smallest distance of two colours, and which they are."""

    def distance(a, b):
        return float(np.linalg.norm(lab(palette[a], matrix) - lab(palette[b], matrix)))

    return min((distance(a, b), (a, b)) for a, b in itertools.combinations(palette, 2))


@pytest.mark.parametrize("eyes", SEEN_WITHOUT)
def test_colours_stay_apart(eyes):
    palette = {colour: colour for colour in style.COLOURS.values()}
    assert len(palette) == 9
    distance, pair = nearest(palette | {"paper": "white"}, SEEN_WITHOUT[eyes])
    print(f"{eyes}: {distance:.1f} between {' and '.join(pair)}")
    assert distance >= LEAST, pair


def test_the_measure_would_find_a_bad_palette():
    usual = {"green": "tab:green", "red": "tab:red", "brown": "tab:brown"}
    assert nearest(usual, SEEN_WITHOUT["nothing missing"])[0] > LEAST
    assert nearest(usual, SEEN_WITHOUT["deuteranopia"])[0] < LEAST


def test_a_colour_is_never_the_only_difference():
    assert {meaning: drawn.colour for meaning, drawn in style.LOOKS.items()} == style.COLOURS
    lines = [drawn for drawn in style.LOOKS.values() if drawn.marker]
    parts = [drawn for drawn in style.LOOKS.values() if not drawn.marker]
    assert len({drawn.marker for drawn in lines}) == len(lines) == 13
    assert len(parts) == 12
    for group in (lines, parts):
        hatches = [drawn.hatch for drawn in group if drawn.hatch]
        assert len(set(hatches)) == len(hatches), "also in grey every bar can be told"
        full = {drawn.colour for drawn in group if not drawn.hatch}
        assert full == {style.BLACK, style.BLUE}, "without a hatch: told apart by lightness alone"
    lightness = [lab(colour, np.eye(3))[0] for colour in (style.BLACK, style.BLUE)]
    assert lightness[1] - lightness[0] > 4 * LEAST / 2


def test_parts_of_memory_are_told_apart_where_a_figure_stacks_them():
    """Every part of the shared figure of memory has a look of its own in the table."""
    looks = [style.LOOKS[part] for part in charts.PARTS]
    assert len(set(looks)) == len(looks) == 11


def test_every_line_of_a_ledger_is_in_one_part():
    drawn = [line for lines in charts.PARTS.values() for line in lines]
    moved = (budget.KEPT, budget.WORK, budget.CACHE, budget.CUDA)
    known = [*ledger.ORDER, *moved, shares.BUCKETS, shares.GATHERED, charts.PAGED]
    assert sorted(drawn) == sorted(known)


def test_every_figure_has_its_entry_and_no_entry_is_left_over():
    """One that is not found would be drawn without labels."""
    drawn = set()
    for path in (ROOT / "qlora_nb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
                if decorators & {"draws", "style.draws"}:
                    drawn.add(node.name)
    assert len(drawn) > 30
    assert drawn == set(style.FIGURES)


def test_a_figure_is_shown_in_full_and_leaves_no_trace(monkeypatch):
    before = dict(plt.rcParams)
    places = {"left": 0.3, "right": 0.7, "bottom": 0.3, "top": 0.7}
    how = {"figsize": [3, 2], "layout": "none", "gridspec_kw": places}
    monkeypatch.setitem(style.FIGURES, "plot", how | {"axes": {"xlabel": "x", "ylabel": "y"}})

    @style.draws
    def plot(ax, height):
        """A bar
        of this height.

        More of it.
        """
        ax.bar([0], [height], **style.look("LoRA"))
        return "<b>&"

    figure = plot(2)
    displayed = []
    monkeypatch.setattr(style, "display", lambda data, **how: displayed.append((data, how)))
    figure._ipython_display_()
    [(data, how)] = displayed
    shown = base64.b64decode(data["image/png"])
    drawn = io.BytesIO()
    FigureCanvasAgg(figure).print_png(drawn)
    assert shown == drawn.getvalue()
    source = f'src="data:image/png;base64,{data["image/png"]}"'
    assert source in data["text/html"]
    assert source in widgets.picture(figure), "a static figure must be its widget's twin"
    described = {"image/png": {"alt": "A bar of this height. · <b>&"}}
    assert how == {"raw": True, "metadata": described}
    assert data["text/plain"] == "A bar of this height. · <b>&"
    assert plt.imread(io.BytesIO(shown)).shape[:2] == (200, 300)
    assert plt.imread(io.BytesIO(shown))[0, 0].tolist() == [1, 1, 1, 1], (
        "on a dark page figures need their own white ground"
    )
    for page in (data["text/html"], widgets.picture(figure)):
        assert 'alt="A bar of this height. · &lt;b&gt;&amp;"' in page
    assert (dict(plt.rcParams), plt.get_fignums()) == (before, [])


def test_a_figure_is_drawn_once_to_be_shown(monkeypatch):
    drawn = []
    draw = FigureCanvasAgg.print_png
    monkeypatch.setattr(
        FigureCanvasAgg,
        "print_png",
        lambda canvas, to: drawn.append(canvas.figure) or draw(canvas, to),
    )
    figure = charts.loss_curve([3.0, 2.0])
    jupyter = DisplayFormatter()
    jupyter.formatters["image/png"].for_type(Figure, print_figure)  # as the inline backend does
    assert jupyter.format(figure) == ({}, {}), "it has shown itself"
    assert drawn == [figure]


def test_no_label_has_the_unit_one():
    for path in (ROOT / "qlora_nb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.endswith("(1)"), (path.name, node.value)
