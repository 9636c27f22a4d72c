"""One look for every figure: Okabe–Ito colours with a fixed meaning, markers beside them, titles
that state the finding.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import rc_params_from_file
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

COLOURS = {
    "16-bit": "#000000",
    "INT4": "#E69F00",
    "FP4": "#D55E00",
    "NF4": "#0072B2",
    "NF4+DQ": "#56B4E9",
    "LoRA": "#009E73",
    "optimizer": "#CC79A7",
    "other": "#606060",
}
"""Colour by meaning; never the only difference (see MARKERS and HATCHES)."""
MARKERS = {
    "16-bit": "o",
    "INT4": "s",
    "FP4": "^",
    "NF4": "D",
    "NF4+DQ": "v",
    "LoRA": "P",
    "optimizer": "X",
    "other": ".",
}
HATCHES = {
    "16-bit": "",
    "INT4": "//",
    "FP4": "\\\\",
    "NF4": "",
    "NF4+DQ": "xx",
    "LoRA": "..",
    "optimizer": "++",
    "other": "--",
}


def look(meaning: str, hatch: str | None = None) -> dict[str, str]:
    """Keyword arguments of a bar with this meaning: colour, hatch (the meaning's own unless given)
    and a white edge.
    """
    return {
        "color": COLOURS[meaning],
        "hatch": HATCHES[meaning] if hatch is None else hatch,
        "edgecolor": "white",
    }


def stacked_bars(
    ax, rows: Mapping[str, Mapping], looks: Mapping[str, dict], unit: float = 1, text=None, **font
) -> np.ndarray:
    """Horizontal bars, one a row of parts (name → part → size), stacked in the order of `looks`
    (part → how it is drawn).

    Args:
        unit: sizes are divided by it.
        text: where a bar ends (in `unit`s) → what is written there.
        **font: how it is written (`fontsize`).

    Returns:
        Where each bar ends, in `unit`s.
    """
    ends = np.zeros(len(rows))
    for part, drawn in looks.items():
        widths = np.array([parts.get(part, 0) / unit for parts in rows.values()])
        ax.barh(list(rows), widths, left=ends, **drawn, label=part)
        ends += widths
    for row, end in enumerate(ends if text else ()):
        ax.text(end, row, text(end), va="center", **font)
    return ends


def log2_axis(ax, ticks: Sequence[int], labels: Sequence[str] = ()) -> None:
    """A logarithmic x axis with labels (plain numbers if left out) at these powers of two."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, labels or [str(tick) for tick in ticks])
    ax.minorticks_off()


def maps(axes, parts: Sequence, limit: float, label: str, **settings) -> None:
    """Matrices as colour maps, one on each of the axes, on one scale from -limit to limit with one
    colour bar (`label`).
    """
    for ax, part in zip(axes, parts):
        image = ax.imshow(
            part.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest", **settings
        )
        ax.grid(visible=False)
    bottom, top = axes[-1].get_position().y0, axes[0].get_position().y1
    bar = image.figure.add_axes((0.91, bottom, 0.015, top - bottom))
    image.figure.colorbar(image, cax=bar, label=label, ticks=[-limit, 0, limit])


KIT_STYLE = rc_params_from_file(
    Path(__file__).with_name("kit.mplstyle"), use_default_template=False
)
"""The kit's look; figures are drawn inside `plt.rc_context(KIT_STYLE)`, which leaves the reader's
own settings alone.
"""


class WholeFigure(Figure):
    """Shown as large as it was made: a notebook would cut off white edges, and a static figure
    would not be its widget's twin.
    """

    def get_tightbbox(self, *_args, **_kwargs) -> Bbox:
        """The whole figure (inches), less the edge that is added again when it is saved."""
        return self.bbox_inches.padded(-plt.rcParams["savefig.pad_inches"])


def draws(
    figsize: tuple[float, float] | None = None,
    legend: str = "",
    columns: int = 1,
    grid: Mapping = {},
    **axes,
) -> Callable:
    """`@draws(figsize, …)` above `plot(ax, data)` gives `plot(data)`, which draws on new axes in
    the kit's look.

    `plot` returns its finding, a sentence or a number, which becomes the title of the (first) axes;
    None if there is none.

    Args:
        figsize: width and height (inches).
        legend: where the legend lies ("best", "lower right", …); left out, there is none.
        columns: columns of the legend.
        grid: what else `plt.subplots` takes (`nrows`, `ncols`, `sharey`, …); if there are several
            axes they come as an array. The layout is "constrained" if left out, which takes as long
            to compute as the drawing: a figure under a widget has `margins`.
        **axes: what `ax.set` takes and does not depend on the data: `xlabel` and `ylabel` (the
            quantity and, in brackets, its unit), `xlim`, `ylim`, …

    Returns:
        A decorator; what it makes returns a figure that is already closed in pyplot and so shows
        exactly once.
    """

    settings = {
        "FigureClass": WholeFigure,
        "layout": "constrained",
        "figsize": figsize,
        "subplot_kw": axes,
        **grid,
    }

    def decorate(plot: Callable) -> Callable[..., Figure]:
        @wraps(plot)
        def drawn(*data, **options) -> Figure:
            with plt.rc_context(KIT_STYLE):
                fig, ax = plt.subplots(**settings)
                plt.close(fig)
                if finding := plot(ax, *data, **options):
                    fig.axes[0].set_title(finding)
                if legend:
                    ax.legend(loc=legend, ncols=columns)
            return fig

        del drawn.__wrapped__  # its signature has the axes, which nobody passes
        return drawn

    return decorate


def margins(left: float, right: float, bottom: float, top: float, **between: float) -> dict:
    """A `grid` for `draws` that fixes where the axes lie (shares of the figure; `between`: wspace,
    hspace).
    """
    return {
        "layout": None,
        "gridspec_kw": {"left": left, "right": right, "bottom": bottom, "top": top, **between},
    }
