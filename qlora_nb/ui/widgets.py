"""Controls around a plot: one function, one static figure, one widget that varies it.

Only the widget API common to ipywidgets 7.7.1 (Colab) and 8.1 is used. A widget does no arithmetic
of its own and nothing in a notebook reads a value from it.
"""

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path

import ipywidgets as W
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LABEL = {"description_width": "initial"}
CONTROL = {"style": LABEL, "layout": W.Layout(width="min(460px, 95%)")}
"""How every control looks: the whole description, and no wider than a phone."""
NAMES_SLIDERS = (
    f'onload="{Path(__file__).with_name("name_sliders.js").read_text(encoding="utf-8")}"'
)
"""For screen readers, in an `<img>`: ipywidgets names no slider, and tells the place of a choice
instead of the choice.
"""
NO_PICTURE = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


def explore(plot: Callable[..., Figure], **controls: W.Widget) -> W.VBox:
    """Controls over `plot(**values)`, which is redrawn whenever one of them moves; the last cell
    line shows the box.

    Not ipywidgets' own `interactive`, which shows figures in an `Output`: nbclient sends the kernel
    messages about that while it waits for others, and papermill then waits for ever, once in some
    fifty cells. About an `HTML` nothing is sent.

    Args:
        plot: returns a closed Figure (see `style.draws`); its arguments are the controls' names.
        **controls: one widget an argument. Their start values are the static twin's arguments.

    Returns:
        The box; `.result` is the last Figure, which is what the tests look at, `.redraw()` draws it
        anew.
    """
    shown = W.HTML()
    panel = W.VBox([*controls.values(), shown])
    panel.add_class("explore")

    def redraw(_change=None) -> None:
        try:
            panel.result = plot(**{name: control.value for name, control in controls.items()})
            shown.value = picture(panel.result)
        except (
            Exception
        ) as error:  # what is raised while a control moves, only the kernel's log would tell
            shown.value = f"<pre>{html.escape(str(error))}</pre>"
            raise

    for control in controls.values():
        control.observe(redraw, "value")
    panel.redraw = redraw
    redraw()
    return panel


def naming() -> W.HTML:
    """Names the sliders of a box without a figure; nothing is seen of it."""
    return W.HTML(
        f'<img alt="" src="{NO_PICTURE}" {NAMES_SLIDERS}>', layout=W.Layout(display="none")
    )


def picture(figure: Figure) -> str:
    """A figure as HTML, drawn in one pass (displaying it costs three), that a screen reader tells
    by its titles.
    """
    png, titles = (
        io.BytesIO(),
        " · ".join(filter(None, (ax.get_title(loc="left") for ax in figure.axes))),
    )
    FigureCanvasAgg(figure).print_png(png)
    source = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return (
        f'<img alt="{html.escape(titles)}" src="{source}" style="max-width:100%" {NAMES_SLIDERS}>'
    )


def slider(kind: type, description: str, value, **limits) -> W.Widget:
    """A slider of this kind that redraws when let go."""
    made = kind(value=value, description=description, continuous_update=False, **limits, **CONTROL)
    made.tooltip = description  # without one ipywidgets 8 shows "null" under the mouse
    return made


def float_slider(
    description: str, value: float, low: float, high: float, step: float
) -> W.FloatSlider:
    """A slider over real numbers."""
    return slider(W.FloatSlider, description, value, min=low, max=high, step=step)


def choice_slider(description: str, options: list, value) -> W.SelectionSlider:
    """A slider over a list of values, for example block sizes."""
    return slider(W.SelectionSlider, description, value, options=options)


def choice(description: str, options: list, value) -> W.Dropdown:
    """A drop-down list."""
    return W.Dropdown(options=options, value=value, description=description, **CONTROL)
