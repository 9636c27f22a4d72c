"""The QLoRA layer in one picture, which comes back in every notebook with another part lit.

Y = X dequant(W) + α/r · X A B. On top stands what is stored of the frozen W, and how it is unpacked
for the product below it; then A and B, the second way from X to Y; at the bottom what training them
takes. The bytes are those of `theory.double_quant` and `memory.ledger`, for one matrix.
"""

import torch

from qlora_nb.memory import ledger
from qlora_nb.theory import double_quant
from qlora_nb.ui import style

DRAWN = style.table("layer_picture.toml")
"""Boxes, arrows, and what can be lit; the file says how they are written down."""


@style.draws
def qlora_layer(
    ax,
    shape=(20480, 5120),
    r=64,
    lora_alpha=16,
    lit="all",
    numbers=True,
    dtype=torch.bfloat16,
    optim="paged_adamw_32bit",
    stored=None,
):
    """A linear layer in QLoRA. Forward: X is multiplied by the frozen W, unpacked from its codes,
    scales and scales of scales, and beside it by the trained A and B, with the factor α/r; Y is the
    sum. Backward: gradients lead from Y to X and into A and B, which have optimizer states; none
    leads into W.

    Args:
        shape: (out, in) of W; unless given, the largest of pythia-12b.
        r, lora_alpha: rank and α.
        lit: a key of `lit` in the file, drawn in its colours, the rest in grey.
        numbers: say how many bytes each part takes.
        dtype: of the product.
        optim: Trainer's name of the optimizer.
        stored: bytes of W as in `ledger.layer_bytes`; unless given, with double quantization.
    """
    n_out, n_in = shape
    if stored is None:
        stored = double_quant.storage_bytes(n_out * n_in)
    sizes = {
        "second": stored["scales of scales"] + stored["mean"],
        "scales": stored["scales"],
        "codes": stored["codes"],
        "unpacked": n_out * n_in * dtype.itemsize,
    }
    for name, side in (("A", n_in), ("B", n_out)):
        sizes[name] = 4 * r * side
        sizes[f"trained {name}"] = 4 * r * side + ledger.optimizer_bytes([r * side], optim)
    told = {
        "dtype": str(dtype).removeprefix("torch."),
        "of_scales": "uint8" if stored["scales of scales"] else "float32",
        "n_out": n_out,
        "n_in": n_in,
        "r": r,
        "optim": optim,
    }
    looks = DRAWN["lit"][lit]["looks"]
    for box in DRAWN["boxes"]:
        about = box["about"].format(**told)
        size = sizes.get(box.get("bytes"))
        if numbers and size:
            about += f"\n{size:,} bytes"
        draw_box(ax, box, about, box["look"] in looks)
    for look, arrows in DRAWN["arrows"].items():
        for arrow in arrows:
            draw_arrow(ax, look, *arrow, look in looks)
    ax.text(46, 37.5, "forward")
    ax.text(32, 31.5, "backward: through the product, none into W")
    ax.text(73.5, 22.5, f"× α/r\n= {lora_alpha:g}/{r}")
    ax.axis("off")
    ax.axis((-1, 101, -1, 57))
    return DRAWN["lit"][lit]["finding"]


def draw_box(ax, box, about, is_lit):
    """A frame with a strip of the part's look, its name and what is told about it."""
    drawn = {"color": "lightgrey"}
    ink = {"color": style.GREY, "va": "top"}
    if is_lit:
        drawn = style.look(box["look"])
        ink["color"] = style.BLACK
    left, bottom = box["at"]
    height = box.get("height", 10)
    frame = {"color": "white", "edgecolor": drawn["color"], "linewidth": 2}
    ax.bar(left, height, 19, bottom, align="edge", **frame)
    ax.bar(left, height, 2.5, bottom, align="edge", **drawn)
    top = bottom + height
    ax.text(left + 3.3, top - 1, box["name"], fontweight="bold", **ink)
    ax.text(left + 3.3, top - 4.3, about, fontsize=9.5, **ink)


def draw_arrow(ax, look, x, y, right, up, is_lit):
    """Forward a line, backward dashed."""
    drawn = {"arrowstyle": "-|>", "linewidth": 1.5, "color": style.GREY}
    if is_lit:
        drawn["color"] = style.COLOURS[look]
    if look == "gradients":
        drawn["linestyle"] = "--"
    ax.annotate("", (x + right, y + up), (x, y), arrowprops=drawn)
