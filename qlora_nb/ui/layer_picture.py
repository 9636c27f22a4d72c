"""The QLoRA layer in one picture, which comes back in every notebook with another part lit.

Y = X dequant(W) + α/r · X A B. On top stands what is stored of the frozen W, and how it is unpacked
for the product below it; then A and B, the second way from X to Y; at the bottom what training them
takes. The bytes are those of `theory.double_quant` and `memory.ledger`, for one matrix.
"""

import torch

from qlora_nb.memory import ledger
from qlora_nb.theory import double_quant
from qlora_nb.ui import style

LIT = {
    "all": ([*style.LOOKS], "W is frozen and packed; A and B beside it are trained"),
    "LoRA": (["LoRA weights"], "A and B are a second way from X to Y, beside the frozen W"),
    "codes": (["4-bit weights"], "What is kept of every weight is a code, unpacked when needed"),
    "scales": (["scales", "scales of scales"], "Codes need scales, and scales have scales too"),
    "optimizer": (
        ["LoRA weights", "gradients", "optimizer states"],
        "A gradient is kept for A and B alone, and so are optimizer states",
    ),
}
"""What can be lit → how it looks (`style.LOOKS`), and the finding."""


@style.draws((9.6, 5.6))
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
        lit: a key of `LIT`, drawn in its colours, the rest in grey.
        numbers: say how many bytes each part takes.
        dtype: of the product.
        optim: Trainer's name of the optimizer.
        stored: bytes of W as in `ledger.layer_bytes`; unless given, with double quantization.
    """
    n_out, n_in = shape
    if stored is None:
        stored = double_quant.storage_bytes(n_out * n_in)
    looks, finding = LIT[lit]

    def box(left, bottom, look, name, about, size=0, height=10):
        drawn = {"color": "lightgrey"}
        ink = {"color": style.GREY, "va": "top"}
        if look in looks:
            drawn = style.look(look)
            ink["color"] = style.BLACK
        frame = {"color": "white", "edgecolor": drawn["color"], "linewidth": 2}
        ax.bar(left, height, 19, bottom, align="edge", **frame)
        ax.bar(left, height, 2.5, bottom, align="edge", **drawn)
        if numbers and size:
            about += f"\n{size:,} bytes"
        top = bottom + height
        ax.text(left + 3.3, top - 1, name, fontweight="bold", **ink)
        ax.text(left + 3.3, top - 4.3, about, fontsize=9.5, **ink)

    kind = str(dtype).removeprefix("torch.")
    of_scales = "uint8" if stored["scales of scales"] else "float32"
    second = stored["scales of scales"] + stored["mean"]
    box(0, 45, "scales of scales", "scales of scales", "float32, one for 256", second)
    box(27, 45, "scales", "scales", f"{of_scales}, one for 64", stored["scales"])
    box(54, 45, "4-bit weights", "codes of W", "uint8, two in each", stored["codes"])
    unpacked = n_out * n_in * dtype.itemsize
    box(81, 45, "working memory", "dequant(W)", f"{kind}, for one use", unpacked)
    box(81, 30, "other", "product", "X dequant(W)")
    box(81, 15, "other", "Y", f"{kind}\ntokens × {n_out:,}")
    kept = "kept for the backward pass"
    box(0, 15, kept, "X", f"{kind}\ntokens × {n_in:,}", height=25)
    sides = [(27, "A", n_in, f"{r} × {n_in:,}"), (54, "B", n_out, f"{n_out:,} × {r}")]
    for left, name, side, about in sides:
        box(left, 15, "LoRA weights", name, f"float32, {about}", 4 * r * side)
        trained = 4 * r * side + ledger.optimizer_bytes([r * side], optim)
        box(left, 0, "optimizer states", "gradient, states", optim, trained)

    draw_arrows(ax, looks)
    ax.text(46, 37.5, "forward")
    ax.text(32, 31.5, "backward: through the product, none into W")
    ax.text(73.5, 22.5, f"× α/r\n= {lora_alpha:g}/{r}")
    ax.axis("off")
    ax.axis((-1, 101, -1, 57))
    return finding


def draw_arrows(ax, looks):
    """Forward in black; backward dashed, in the colour of gradients; in grey what is not lit."""

    def arrow(look, x, y, right, up):
        drawn = {"arrowstyle": "-|>", "linewidth": 1.5, "color": style.GREY}
        if look in looks:
            drawn["color"] = style.COLOURS[look]
        if look == "gradients":
            drawn["linestyle"] = "--"
        ax.annotate("", (x + right, y + up), (x, y), arrowprops=drawn)

    for x in (19, 46, 73):
        arrow("16-bit", x, 50, 8, 0)
        arrow("16-bit", x, 21, 8, 0)
        arrow("gradients", x + 8, 19, -8, 0)
    arrow("gradients", 36.5, 15, 0, -5)
    arrow("gradients", 63.5, 15, 0, -5)
    arrow("16-bit", 90.5, 45, 0, -5)
    arrow("16-bit", 89, 30, 0, -5)
    arrow("gradients", 92, 25, 0, 5)
    arrow("16-bit", 19, 36, 62, 0)
    arrow("gradients", 81, 34, -62, 0)
