"""Controls above a figure: one plotting function, and one widget that varies its arguments.

`explore` is what a notebook calls. A widget computes nothing and no cell reads a value from it; the
same figure with the start values stands in a cell before it, for readers without a kernel. Only the
API common to ipywidgets 7.7.1 (Colab) and 8.1 is used.
"""

import html
from collections.abc import Callable
from pathlib import Path

import ipywidgets as W

from qlora_nb.ui.style import ShownFigure

LABEL = {"description_width": "initial"}
CONTROL = {"style": LABEL, "layout": W.Layout(width="min(460px, 95%)")}
"""How every control looks: the whole description, and no wider than a phone."""
NAMES_SLIDERS = Path(__file__).with_name("name_sliders.js").read_text(encoding="utf-8")
"""For screen readers, run when an `<img>` has loaded: ipywidgets names no slider, and tells the
place of a choice instead of the choice.
"""
NO_PICTURE = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


def explore(plot: Callable[..., ShownFigure], **controls: W.Widget) -> W.VBox:
    """Controls above `plot(**values)`, drawn anew whenever one of them changes.

    The figure is shown in an `HTML` and not in an `Output` (ipywidgets' own `interactive`): about
    an `Output` nbclient sends messages to the kernel while it waits for others, and papermill then
    hung in one of some fifty cells.

    Args:
        plot: returns a closed Figure (see `style.draws`); its arguments are the controls' names.
        **controls: one widget for each argument, with the start values of the static figure.

    Returns:
        The box, to be shown. `.result` is the last Figure. The line above the figure says "drawing
        …" for as long as `plot` works.
    """
    shown = W.HTML()
    state = W.Label("drawn")
    panel = W.VBox([*controls.values(), state, shown])
    panel.add_class("explore")

    def redraw(_change=None) -> None:
        values = {name: control.value for name, control in controls.items()}
        state.value = "drawing …"
        try:
            panel.result = plot(**values)
            shown.value = picture(panel.result)
        except Exception as error:
            # what a callback raises is otherwise seen in the kernel's log alone
            shown.value = f"<pre>{html.escape(str(error))}</pre>"
            state.value = "not drawn"
            raise
        state.value = "drawn"

    for control in controls.values():
        control.observe(redraw, "value")
    redraw()
    return panel


def picture(figure: ShownFigure) -> str:
    """A figure as HTML under controls, whose sliders it names."""
    _, image = figure.image(f'onload="{NAMES_SLIDERS}"')
    return image


def naming() -> W.HTML:
    """Names the sliders of a box that has no figure; invisible."""
    image = f'<img alt="" src="{NO_PICTURE}" onload="{NAMES_SLIDERS}">'
    return W.HTML(image, layout=W.Layout(display="none"))


def slider(kind: type, description: str, value, **limits) -> W.Widget:
    """A slider of this kind (`W.FloatSlider`, …) that redraws when let go."""
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


def text_box(description: str, height: str = "7em", width: str = "95%", **options) -> W.Textarea:
    """A box of plain text, which is never interpreted as HTML; to be read, unless `disabled=False`
    is given. Sizes are as in CSS ("7em", "95%").
    """
    layout = W.Layout(width=width, height=height)
    options = {"disabled": True, **options}
    return W.Textarea(description=description, layout=layout, style=LABEL, **options)
