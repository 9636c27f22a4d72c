"""Controls around a plot: one function, one static figure, one widget that varies it.

Only the widget API common to ipywidgets 7.7.1 (Colab) and 8.1 is used. A widget does no arithmetic of its own and
nothing in a notebook reads a value from it.
"""

import io
from collections.abc import Callable

import ipywidgets as W
from IPython.display import Image, display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LABEL = {"description_width": "initial"}
WIDE = W.Layout(width="min(460px, 95%)")
CONTROL = {"style": LABEL, "layout": WIDE}
"""How every control looks: the whole description, and no wider than a phone."""


def explore(plot: Callable[..., Figure], **controls: W.Widget) -> W.interactive:
    """`plot(**values)` redrawn whenever a control moves; the last cell line shows it.

    Args:
        plot: returns a closed Figure (see `style.new_figure`); its arguments are the controls' names.
        **controls: one widget an argument. Their start values are the static twin's arguments.

    Returns:
        The `interactive` box; `.result` is the last Figure, which is what the tests look at.
    """

    def draw(**values):
        figure, png = plot(**values), io.BytesIO()
        FigureCanvasAgg(figure).print_png(png)  # one drawing pass; displaying the Figure itself costs three
        display(Image(png.getvalue()))  # `interactive` does not display what its function returns
        return figure

    panel = W.interactive(draw, **controls)
    panel.update()
    return panel


def float_slider(description: str, value: float, low: float, high: float, step: float) -> W.FloatSlider:
    """A slider over real numbers that redraws when let go."""
    return W.FloatSlider(value, min=low, max=high, step=step, description=description, continuous_update=False, **CONTROL)


def choice_slider(description: str, options: list, value) -> W.SelectionSlider:
    """A slider over a list of values, for example block sizes."""
    return W.SelectionSlider(options=options, value=value, description=description, continuous_update=False, **CONTROL)


def choice(description: str, options: list, value) -> W.Dropdown:
    """A drop-down list."""
    return W.Dropdown(options=options, value=value, description=description, **CONTROL)
