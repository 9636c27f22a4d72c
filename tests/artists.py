"""Reads out of a figure's artists the numbers that it shows, for a test to compare with its own."""

from __future__ import annotations

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg


def title(ax) -> str:
    """The sentence above the axes."""
    return ax.get_title(loc="left")


def labels(ax) -> tuple[str, str]:
    """What stands beside the x axis and beside the y axis."""
    return ax.get_xlabel(), ax.get_ylabel()


def legend(ax) -> list[str]:
    """The texts of the legend, in its order."""
    return [text.get_text() for text in ax.get_legend().get_texts()]


def ticks(axis) -> list[tuple[float, str]]:
    """(place, text) of every tick of `ax.xaxis` or `ax.yaxis`."""
    where = axis.get_majorticklocs()
    found = []
    for place, text in zip(where, axis.get_major_formatter().format_ticks(where), strict=True):
        found.append((float(place), str(text)))
    return found


def lines(ax) -> list[np.ndarray]:
    """(n, 2) points of every line, in the order in which they were drawn."""
    return [np.column_stack(line.get_data()).astype(float) for line in ax.lines]


def bars(ax) -> list[np.ndarray]:
    """(n, 4) left, bottom, width and height of the bars of every `bar`, `barh` or `hist`."""
    found = []
    for container in ax.containers:
        if hasattr(container, "patches"):
            boxes = []
            for box in container.patches:
                boxes.append((box.get_x(), box.get_y(), box.get_width(), box.get_height()))
            found.append(np.array(boxes, dtype=float))
    return found


def images(ax) -> list[np.ndarray]:
    """The numbers of every image (rows, columns)."""
    return [np.asarray(image.get_array()) for image in ax.images]


def texts(ax) -> list[str]:
    """Every text inside the axes, labels of bars among them."""
    return [text.get_text() for text in ax.texts]


def places(ax) -> np.ndarray:
    """(n, 2) where the texts stand, in the axes' units; of a label of a bar, the bar's end."""
    found = []
    for text in ax.texts:
        found.append(text.xy if hasattr(text, "xy") else text.get_position())
    return np.array(found, dtype=float)


def segments(collection) -> np.ndarray:
    """(n, 2, 2) both ends of every line that `vlines` drew."""
    return np.array(collection.get_segments(), dtype=float)


def span(polygon, x: float) -> tuple[float, float]:
    """Lower and upper border, at this x, of what `fill_between` or `stackplot` drew.

    Both are NaN where nothing was drawn.
    """
    points = polygon.get_paths()[0].vertices
    crossed = []
    for (x0, y0), (x1, y1) in pairwise(points):
        if min(x0, x1) < x < max(x0, x1):
            crossed.append(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
    if not crossed:
        return float("nan"), float("nan")
    return min(crossed), max(crossed)


def check_drawn(figure) -> None:
    """A figure can be drawn, and pyplot does not hold it: it would be shown a second time."""
    FigureCanvasAgg(figure).draw()
    assert not plt.get_fignums()
    for ax in figure.axes:
        title = ax._left_title.get_window_extent()
        assert title.x1 <= figure.bbox.x1, f"cut off at the right: {ax.get_title(loc='left')}"


def check_in_view(ax) -> None:
    """Every line, every end of a bar or a stick and every image lies within the limits of the
    axes.
    """
    points = []
    for line, drawn in zip(ax.lines, lines(ax)):
        if line.get_transform() == ax.transData:  # not from one end of the axes to the other
            points.append(drawn)
    for group in bars(ax):
        points.append(group[:, :2] + group[:, 2:])
    for collection in ax.collections:
        if hasattr(collection, "get_segments"):
            points.append(segments(collection)[:, 1])
    for image in ax.images:
        left, right, bottom, top = image.get_extent()
        points.append(np.array([(left, bottom), (right, top)]))
    points = np.concatenate(points)
    for values, limits in ((points[:, 0], ax.get_xlim()), (points[:, 1], ax.get_ylim())):
        assert min(limits) <= values.min()
        assert values.max() <= max(limits)
