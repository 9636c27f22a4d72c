"""One look for every figure of the notebooks: what a colour means, and how a figure is made.

`LOOKS`, read from `looks.toml`, is the only table of colours. A datatype, a method and each part of
memory has one colour, one hatch and (what is drawn as a line) one marker, in all notebooks. The
colours are those of Okabe and Ito (2008), chosen so that they stay apart for colour-blind eyes, and
one dark brown; colour is never the only difference, so that a figure can also be read in grey.

A plotting function draws on axes and returns its finding, a sentence that becomes the title.
`draws` makes the figure around it, as `figures.toml` says (size, labels, legend), in the kit's
matplotlib style (`kit.mplstyle`); `fonts.mplstyle` names the fonts that have Chinese, Japanese and
Korean.
"""

import base64
import html
import inspect
import io
import logging
import re
import tomllib
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findSystemFonts, fontManager
from matplotlib.text import Text


class Look(NamedTuple):
    """How one thing is drawn. Parts of memory are bars and areas only: they have no marker."""

    colour: str
    hatch: str
    marker: str = ""


def table(name: str) -> dict[str, dict]:
    """What a file beside this module says."""
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


TABLES = table("looks.toml")
_COLOURS = TABLES["colours"]
BLACK = _COLOURS["black"]
BLUE = _COLOURS["blue"]
GREEN = _COLOURS["green"]
GREY = _COLOURS["grey"]

LOOKS = {}
"""What is drawn → how, in all notebooks."""

for _meaning, (_colour, *_rest) in TABLES["looks"].items():
    LOOKS[_meaning] = Look(_COLOURS[_colour], *_rest)

COLOURS = {meaning: drawn.colour for meaning, drawn in LOOKS.items()}


def look(meaning: str, **instead) -> dict:
    """Keyword arguments of a bar: its colour, its hatch and a white edge, or what is given
    instead.
    """
    drawn = LOOKS[meaning]
    return {"color": drawn.colour, "hatch": drawn.hatch, "edgecolor": "white", **instead}


def mark(meaning: str) -> dict[str, str]:
    """Keyword arguments of a line: its colour and its marker."""
    drawn = LOOKS[meaning]
    return {"color": drawn.colour, "marker": drawn.marker}


def unit_of(n_bytes: float) -> tuple[int, str]:
    """The unit in which a figure shows at most so many bytes: MiB up to half a GiB."""
    if n_bytes > 2**29:
        return 2**30, "GiB"
    return 2**20, "MiB"


def stacked_bars(
    ax,
    rows: Mapping[str, Mapping],
    looks: Mapping[str, dict],
    text: Callable[[float], str],
    unit: float = 1,
    room: float = 1.12,
    **font,
) -> np.ndarray:
    """Horizontal stacked bars, the first row on top, its parts in the order of `looks`.

    Args:
        rows: label of the bar → {part: size}; a part that is missing has size 0.
        looks: part → keyword arguments of `ax.barh`. A part that no row has is left out.
        text: the length of a bar (in `unit`s) → what is written at its end.
        unit: sizes are divided by it.
        room: how long the axis is, the longest bar being 1.
        **font: how it is written (`fontsize`).

    Returns:
        (rows,) length of each bar, in `unit`s.
    """
    ends = np.zeros(len(rows))
    for part, drawn in looks.items():
        widths = np.array([parts.get(part, 0) / unit for parts in rows.values()])
        if widths.any():
            bars = ax.barh(list(rows), widths, left=ends, label=part, **drawn)
            ends += widths
    ax.bar_label(bars, [text(end) for end in ends], **font)
    ax.set(xlim=(0, room * max(ends)), ylim=(len(rows) - 0.4, -0.6))
    return ends


def grouped_bars(
    ax, ticks: Sequence[str], groups: Mapping[str, Mapping[str, float]], looks: Sequence[dict]
) -> None:
    """Bars side by side around each tick, one of each group that has a height there.

    Args:
        ticks: what stands under the bars.
        groups: label of the group → {tick: height}.
        looks: keyword arguments of `ax.bar`, one for each group.
    """
    width = 0.8 / len(groups)
    left = -0.4
    for (label, heights), drawn in zip(groups.items(), looks):
        places = [ticks.index(tick) + left for tick in heights]
        ax.bar(places, heights.values(), width, align="edge", label=label, **drawn)
        left += width
    ax.set_xticks(range(len(ticks)), ticks)


def log2_axis(ax, ticks: Sequence[int], labels: Sequence | None = None) -> None:
    """A logarithmic x axis with a label (its number unless given) at each of these powers of 2."""
    ax.set_xscale("log", base=2)
    if labels is None:
        labels = ticks
    ax.set_xticks(ticks, labels)
    ax.minorticks_off()


def maps(axes, parts: Sequence, limit: float, label: str, **settings) -> None:
    """Matrices (torch tensors) as colour maps, one on each of the axes, on one scale from -limit to
    limit with one colour bar.
    """
    for ax, part in zip(axes, parts):
        image = ax.imshow(part.numpy(), vmin=-limit, vmax=limit, **settings)
        ax.grid(visible=False)
    place = {"ax": axes, "fraction": 0.08, "pad": 0.03, "aspect": 30}
    ax.figure.colorbar(image, label=label, ticks=[-limit, 0, limit], **place)


KIT_STYLE = Path(__file__).with_name("kit.mplstyle")
"""Used inside `plt.style.context` alone, which leaves the reader's own settings as they are."""

FONTS = Path(__file__).with_name("fonts.mplstyle")
"""matplotlib's family "fantasy" as the fonts for Chinese, Japanese and Korean, while it draws."""

NO_FONT = "cannot be drawn here; for Chinese, Japanese or Korean install the font fonts-noto-cjk"
"""What is said beneath a figure of characters that no font of this machine has."""


@cache
def _find_more_fonts() -> None:
    """Tell matplotlib of fonts that were installed after it had made its list, which it keeps; and
    not to log that one has no bold face.
    """
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    known = {font.fname for font in fontManager.ttflist}
    for path in set(findSystemFonts()) - known:
        with suppress(RuntimeError):  # a font of coloured pictures cannot be drawn
            fontManager.addfont(path)


class ShownFigure(Figure):
    """A figure that Jupyter shows as large as it was made, with a text for who cannot see it."""

    about = ""
    """What it draws: how its plotting function is described."""

    @property
    def alt(self) -> str:
        """What it draws, and what it found: the titles of its axes."""
        titles = [ax.get_title(loc="left") for ax in self.axes]
        sentences = " · ".join(filter(None, [self.about, *titles]))
        return " ".join(sentences.split())

    def _drawn(self) -> tuple[bytes, str]:
        """The PNG, and the characters that no font has: matplotlib warns of each."""
        png = io.BytesIO()
        with plt.style.context(FONTS), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            FigureCanvasAgg(self).print_png(png)
        codes = re.findall(r"Glyph (\d+)", "".join(map(str, caught)))
        missing = dict.fromkeys(chr(int(code)) for code in codes)
        return png.getvalue(), "".join(missing)

    def image(self, attributes: str = "") -> tuple[str, str]:
        """The PNG in base64, and an HTML image of it with these further attributes; beneath it the
        characters that could not be drawn.
        """
        png, missing = self._drawn()
        if missing:
            _find_more_fonts()
            for text in self.findobj(Text):
                text.set_family([*text.get_family(), "fantasy"])
            png, missing = self._drawn()
        source = base64.b64encode(png).decode()
        described = f'alt="{html.escape(self.alt)}" style="max-width:100%" {attributes}'
        shown = f'<img {described} src="data:image/png;base64,{source}">'
        if missing:
            shown += f"<p>{html.escape(missing)} {NO_FONT}</p>"
        return source, shown

    def _ipython_display_(self) -> None:
        """JupyterLab and nbconvert show the HTML; GitHub and a report the PNG with its metadata."""
        png, image = self.image()
        shown = {"image/png": png, "text/html": image, "text/plain": self.alt}
        display(shown, raw=True, metadata={"image/png": {"alt": self.alt}})


FIGURES = table("figures.toml")
"""Function that draws → how its figure is made; the file says what stands there."""


def draws(plot: Callable) -> Callable[..., ShownFigure]:
    """Turn `plot(ax, data)`, which draws on axes, into `plot(data)`, which returns a figure.

    What `plot` returns becomes the title of the first axes: its finding, or None. The first
    paragraph of its docstring and the titles are the figure's alt text. Size, grid of axes (several
    come as an array), their labels and the legend are in `FIGURES`.

    Returns:
        The function. Its figures are closed in pyplot, so that a notebook shows each exactly once.
    """
    about, _, _ = inspect.getdoc(plot).partition("\n\n")
    grid = dict(FIGURES.get(plot.__name__, {}))
    axes = grid.pop("axes", {})
    legend = grid.pop("legend", None)

    @wraps(plot)
    def drawn(*data, **options) -> ShownFigure:
        with plt.style.context(KIT_STYLE):
            figure, ax = plt.subplots(FigureClass=ShownFigure, subplot_kw=axes, **grid)
            plt.close(figure)
            figure.about = about
            finding = plot(ax, *data, **options)
            if finding:
                figure.axes[0].set_title(finding)
            if legend:
                ax.legend(**legend)
        return figure

    del drawn.__wrapped__  # help() would show the signature of `plot`, with its axes
    return drawn
