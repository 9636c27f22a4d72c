"""What a figure shows, read from its artists: bars, lines and texts as plain numbers and
strings.
"""

from __future__ import annotations

import numpy as np
from matplotlib.colors import to_hex


def bars(ax) -> dict[str, list[tuple[float, float, float, float]]]:
    """Label of each series of bars → (left, bottom, width, height) of every bar, in the order of
    drawing.
    """
    found = {}
    for number, series in enumerate(ax.containers):
        label = series.get_label()
        if label.startswith("_"):  # matplotlib's own name for a series without one
            label = f"series {number}"
        found[label] = [(*bar.get_xy(), bar.get_width(), bar.get_height()) for bar in series]
    return found


def fills(ax) -> list[tuple[str, str]]:
    """(colour, hatch) of every series of bars."""
    return [(to_hex(series[0].get_facecolor()), series[0].get_hatch()) for series in ax.containers]


def lines(ax) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Label of each line → its x and its y."""
    return {
        line.get_label(): (np.array(line.get_xdata()), np.array(line.get_ydata()))
        for line in ax.lines
    }


def texts(ax) -> list[tuple[float, float, str]]:
    """(x, y, text) of everything written into the axes; of a label of a bar, the bar's end."""
    found = []
    for text in ax.texts:
        place = text.xy if hasattr(text, "xy") else text.get_position()
        found.append((*place, text.get_text()))
    return found


def x_ticks(ax) -> list[tuple[float, str]]:
    """(place, label) of every tick of the x axis."""
    labels = [label.get_text() for label in ax.get_xticklabels()]
    return list(zip(map(float, ax.get_xticks()), labels, strict=True))


def y_ticks(ax) -> list[tuple[float, str]]:
    """(place, label) of every tick of the y axis."""
    labels = [label.get_text() for label in ax.get_yticklabels()]
    return list(zip(map(float, ax.get_yticks()), labels, strict=True))


def title(ax) -> str:
    """The finding above the axes."""
    return ax.get_title(loc="left")


def legend(owner) -> list[str]:
    """The labels in the legend of axes, or in that of a figure."""
    legends = getattr(owner, "legends", None)  # a figure's list of them
    if legends is None:
        legends = [owner.get_legend()]
    [found] = legends
    return [text.get_text() for text in found.get_texts()]
