"""The picture of the QLoRA layer beside bitsandbytes, PEFT, torch's AdamW and plain arithmetic."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import artists
import bitsandbytes
import peft
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation

from qlora_nb.ui import layer_picture, style

SHAPE = (192, 128)
R = 8
STORED = ["scales of scales", "scales", "codes of W"]
LOOKS = {
    "scales of scales": "scales of scales",
    "scales": "scales",
    "codes of W": "4-bit weights",
    "dequant(W)": "working memory",
    "product": "other",
    "X": "kept for the backward pass",
    "Y": "other",
    "A": "LoRA weights",
    "B": "LoRA weights",
    "for A": "optimizer states",
    "for B": "optimizer states",
}
LIT = {
    "all": set(LOOKS),
    "LoRA": {"A", "B"},
    "codes": {"codes of W"},
    "scales": {"scales of scales", "scales"},
    "optimizer": {"A", "B", "for A", "for B"},
}
each = pytest.mark.parametrize("lit", LIT)


class Box(NamedTuple):
    """Left, bottom, width, height, what is written in it, and how its strip is drawn."""

    place: tuple[float, float, float, float]
    lines: list[str]
    strip: tuple[str, str]
    texts: list


def boxes_of(ax) -> dict[str, Box]:
    """Name → box; what training takes is named after the matrix above it."""
    frames = artists.bars(ax)[::2]
    strips = ax.containers[1::2]
    written = [text for text in ax.texts if not isinstance(text, Annotation)]
    found = {}
    above = ""
    for i, (frame, strip) in enumerate(zip(frames, strips, strict=True)):
        name, about = written[2 * i : 2 * i + 2]
        called = name.get_text()
        if called == "gradient, states":
            called = f"for {above}"
        above = called
        look = (to_hex(strip[0].get_facecolor()), strip[0].get_hatch())
        found[called] = Box(tuple(frame[0]), about.get_text().split("\n"), look, [name, about])
    return found


def arrows_of(ax, boxes: dict[str, Box]) -> dict[str, set[tuple[str, str]]]:
    """ "forward" and "backward" (dashed) → the names of the boxes that each arrow joins."""

    def at(x, y):
        names = []
        for name, box in boxes.items():
            left, bottom, width, height = box.place
            if left <= x <= left + width and bottom <= y <= bottom + height:
                names.append(name)
        [name] = names
        return name

    found = {"forward": set(), "backward": set()}
    for arrow in ax.texts:
        if isinstance(arrow, Annotation):
            dashed = arrow.arrow_patch.get_linestyle() == "--"
            way = "backward" if dashed else "forward"
            found[way].add((at(*arrow.xyann), at(*arrow.xy)))
    return found


def n_bytes(box: Box) -> int:
    """The number in a box's last line."""
    number, unit = box.lines[-1].split(" ")
    assert unit == "bytes"
    return int(number.replace(",", ""))


@pytest.mark.parametrize("nested", [True, False])
def test_bytes_of_w_are_those_of_bitsandbytes(nested):
    weight = torch.randn(SHAPE)
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=nested
    )
    want = {"codes of W": packed.nbytes, "scales": state.absmax.nbytes, "scales of scales": 0}
    given = None
    if nested:
        want["scales of scales"] = state.state2.absmax.nbytes + state.offset.nbytes
    else:
        sizes = (packed.nbytes, state.absmax.nbytes, 0, 0)
        given = dict(zip(("codes", "scales", "scales of scales", "mean"), sizes))
    ax = layer_picture.qlora_layer(SHAPE, stored=given, dtype=torch.float32).axes[0]
    boxes = boxes_of(ax)
    dtype = str(state.absmax.dtype).removeprefix("torch.")
    assert boxes["scales"].lines[0] == f"{dtype}, one for {state.blocksize}"
    for name, size in want.items():
        if size:
            assert n_bytes(boxes[name]) == size
        else:
            assert len(boxes[name].lines) == 1
    unpacked = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert n_bytes(boxes["dequant(W)"]) == unpacked.nbytes
    assert boxes["dequant(W)"].lines[0] == "float32, for one use"
    assert boxes["codes of W"].lines[0] == "uint8, two in each"
    assert packed.dtype == torch.uint8
    assert 2 * packed.numel() == weight.numel()
    if nested:
        second = state.state2
        assert boxes["scales of scales"].lines[0] == f"float32, one for {second.blocksize}"
        assert second.absmax.dtype == torch.float32


def test_a_and_b_are_those_of_peft_and_their_states_those_of_torch():
    n_out, n_in = SHAPE
    model = torch.nn.Sequential(torch.nn.Linear(n_in, n_out, bias=False))
    config = peft.LoraConfig(target_modules=["0"], r=R, lora_alpha=4)
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model(torch.randn(3, n_in)).square().sum().backward()
    optimizer.step()
    ax = layer_picture.qlora_layer(SHAPE, R, 4, optim="adamw_torch").axes[0]
    boxes = boxes_of(ax)
    layer = model.base_model.model[0]
    for name, part in (("A", layer.lora_A), ("B", layer.lora_B)):
        weight = part["default"].weight
        rows, columns = weight.shape
        states = sum(state.nbytes for state in optimizer.state[weight].values())
        assert boxes[name].lines[0] == f"float32, {rows} × {columns}"
        assert n_bytes(boxes[name]) == weight.nbytes
        assert n_bytes(boxes[f"for {name}"]) == weight.grad.nbytes + states
        assert boxes[f"for {name}"].lines[0] == "adamw_torch"
    assert layer.get_base_layer().weight.grad is None
    assert artists.texts(ax)[-1] == "× α/r\n= 4/8"
    assert layer.scaling["default"] == 4 / 8


def test_unless_told_otherwise_it_is_the_largest_matrix_of_pythia_12b():
    boxes = boxes_of(layer_picture.qlora_layer().axes[0])
    n = 20480 * 5120
    want = [n // 64 // 256 * 4 + 4, n // 64, n // 2]
    assert [n_bytes(boxes[name]) for name in STORED] == want
    assert n_bytes(boxes["dequant(W)"]) == 2 * n
    assert n_bytes(boxes["A"]) == 4 * 64 * 5120
    assert n_bytes(boxes["B"]) == 4 * 64 * 20480
    assert n_bytes(boxes["for A"]) == 12 * 64 * 5120
    assert n_bytes(boxes["for B"]) == 12 * 64 * 20480
    assert boxes["X"].lines == ["bfloat16", "tokens × 5,120"]
    assert boxes["Y"].lines == ["bfloat16", "tokens × 20,480"]


@each
def test_forward_arrows_lead_to_y_and_none_leads_back_into_w(lit):
    ax = layer_picture.qlora_layer(lit=lit).axes[0]
    found = arrows_of(ax, boxes_of(ax))
    assert found["forward"] == {
        ("scales of scales", "scales"),
        ("scales", "codes of W"),
        ("codes of W", "dequant(W)"),
        ("dequant(W)", "product"),
        *(("X", "product"), ("product", "Y"), ("X", "A"), ("A", "B"), ("B", "Y")),
    }
    back = {("Y", "product"), ("product", "X"), ("Y", "B"), ("B", "A"), ("A", "X")}
    assert found["backward"] == back | {("A", "for A"), ("B", "for B")}
    ends = {head for _, head in found["backward"]}
    assert not ends & {*STORED, "dequant(W)"}, "W is frozen"


@each
def test_what_is_lit_has_its_colour_and_the_rest_is_grey(lit):
    ax = layer_picture.qlora_layer(lit=lit).axes[0]
    boxes = boxes_of(ax)
    assert list(boxes.keys() - LOOKS.keys()) == []
    for name, box in boxes.items():
        colour, hatch = box.strip
        inks = {text.get_color() for text in box.texts}
        if name in LIT[lit]:
            look = style.LOOKS[LOOKS[name]]
            assert (colour, hatch or "") == (look.colour.lower(), look.hatch)
            assert inks == {style.BLACK}
        else:
            assert len(set(to_rgb(colour))) == 1, name
            assert not hatch
            assert inks == {style.GREY}
    for arrow in ax.texts:
        if isinstance(arrow, Annotation):
            want = style.GREY
            if arrow.arrow_patch.get_linestyle() == "--":
                if lit in ("all", "optimizer"):
                    want = style.COLOURS["gradients"]
            elif lit == "all":
                want = style.BLACK
            assert to_hex(arrow.arrow_patch.get_edgecolor()) == want.lower()


@each
def test_without_numbers_there_are_no_bytes(lit):
    figure = layer_picture.qlora_layer(lit=lit, numbers=False)
    assert not [text for text in artists.texts(figure.axes[0]) if "bytes" in text]
    assert "bytes" not in figure.alt
    assert artists.title(figure.axes[0])
    for name in ("X", "Y", "W", "A and B", "α/r", "gradients", "frozen"):
        assert name in figure.alt


@each
@pytest.mark.parametrize("shape", [SHAPE, (20480, 5120), (53248, 16384)])
def test_texts_keep_to_their_boxes_and_off_each_other(lit, shape):
    figure = layer_picture.qlora_layer(shape, 64, lit=lit, dtype=torch.bfloat16)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    ax = figure.axes[0]
    written = [text for text in ax.texts if text.get_text()]
    extents = [text.get_window_extent() for text in [ax._left_title, *written]]
    for one, other in itertools.combinations(extents, 2):
        assert not one.overlaps(other)
    for box in boxes_of(ax).values():
        left, bottom, width, height = box.place
        (x0, y0), (x1, y1) = ax.transData.transform(
            [(left, bottom), (left + width, bottom + height)]
        )
        for text in box.texts:
            inside = text.get_window_extent()
            assert x0 < inside.x0 < inside.x1 < x1, text
            assert y0 < inside.y0 < inside.y1 < y1, text
    arrows = [arrow for arrow in ax.texts if isinstance(arrow, Annotation)]
    for arrow in arrows:
        extent = arrow.arrow_patch.get_window_extent()
        assert not [other for other in extents if other.overlaps(extent)]
    width, height = figure.get_size_inches() * figure.dpi
    for extent in extents:
        assert 0 <= extent.x0 < extent.x1 <= width
        assert 0 <= extent.y0 < extent.y1 <= height


def test_each_way_is_named_at_its_arrow_and_each_box_has_a_stripe():
    [ax] = layer_picture.qlora_layer().axes
    places = {text.get_text(): text.get_position() for text in ax.texts}
    (forward_x, forward_y), (backward_x, backward_y) = (
        places["forward"],
        places["backward: through the product, none into W"],
    )
    for x in (forward_x, backward_x):
        assert 19 < x < 81, "between the boxes of X and of the product"
    assert 30 < backward_y < forward_y < 40, "at the height of the product"
    rectangles = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    frames, stripes = rectangles[0::2], rectangles[1::2]
    assert len(frames) == len(stripes) == len(boxes_of(ax))
    for frame, stripe in zip(frames, stripes, strict=True):
        assert stripe.get_xy() == frame.get_xy()
        assert stripe.get_height() == frame.get_height()
        assert 0 < stripe.get_width() < frame.get_width() / 5
