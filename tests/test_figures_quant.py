"""What the figures of notebooks 03 and 04 show, beside bitsandbytes, the paper and plain loops."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import artists
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb

from qlora_nb.lessons import n03, n04
from qlora_nb.theory import codebooks

EXACT = 1e-12
"""Double precision in another order of the same few operations."""
SINGLE = 1e-6
"""The kit computes in float32, the test in float64."""


def table(name: str) -> list[float]:
    """The values of a code: bitsandbytes' tables, and INT4 by hand."""
    if name == "INT4":
        return [k / 7 for k in range(-7, 8)]
    return bnb.get_4bit_type(name.lower(), device="cpu").double().tolist()


def restored(numbers: list[float], values: list[float], blocksize: int) -> list[float]:
    """What a code leaves of the numbers: the nearest value times the largest of the block."""
    left = []
    for start in range(0, len(numbers), blocksize):
        block = numbers[start : start + blocksize]
        absmax = max(abs(number) for number in block)
        for number in block:
            nearest = values[0]
            for value in values:
                if abs(value - number / absmax) < abs(nearest - number / absmax):
                    nearest = value
            left.append(nearest * absmax)
    return left


def rmse(x: list[float], y: list[float]) -> float:
    """Root of the mean squared difference."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(x))


def shares_of_the_bell(points: torch.Tensor) -> torch.Tensor:
    """Share of a Gaussian that is nearest to each of the points, whole tails included."""
    borders = (points[:-1] + points[1:]) / 2
    below = torch.special.ndtr(borders)
    return torch.cat([torch.zeros(1), below, torch.ones(1)]).diff()


# 03: weights, the bell and the number line


@pytest.mark.parametrize(("n", "scale"), [(5000, 1.0), (2000, 0.6)])
def test_histogram_of_weights_stands_under_the_curve(n, scale):
    weights = scale * torch.randn(n, generator=torch.Generator().manual_seed(8))
    ax = n03.plot_weights(weights, "somebody").axes[0]
    (bars,) = artists.bars(ax)
    counts = [0] * 80
    for weight in weights.double().tolist():
        if -4 <= weight < 4:
            counts[int((weight + 4) * 10)] += 1
    assert bars[:, 3] == pytest.approx([count / sum(counts) / 0.1 for count in counts], rel=1e-3)
    assert bars[:, 0] == pytest.approx(np.arange(80) / 10 - 4, abs=SINGLE)
    assert bars[:, 2] == pytest.approx(0.1, rel=1e-4)
    assert (bars[:, 2] * bars[:, 3]).sum() == pytest.approx(1), "a density"
    (curve,) = artists.lines(ax)
    bell = statistics.NormalDist()
    assert curve[:, 0] == pytest.approx(np.linspace(-4, 4, 81))
    assert curve[:, 1] == pytest.approx([bell.pdf(x) for x in curve[:, 0]])
    inside = sum(abs(weight) < 1 for weight in weights.tolist()) / n
    words = f"{100 * inside:.0f} % of the weights of somebody lie within one standard deviation"
    assert artists.title(ax) == words
    assert artists.legend(ax) == ["somebody", "bell curve"]
    axis = ("weight (standard deviations of its layer)", "density (1 / standard deviation)")
    assert artists.labels(ax) == axis
    artists.check_in_view(ax)


@pytest.mark.parametrize("tail_quantile", [codebooks.TAIL_QUANTILE, 0.99])
def test_the_bell_is_cut_where_the_code_says(tail_quantile):
    code = bnb.get_4bit_type("nf4", device="cpu")
    points = code.double() * torch.special.ndtri(torch.tensor(tail_quantile, dtype=torch.float64))
    density = torch.exp(-(points**2) / 2) / math.sqrt(2 * math.pi)
    ax = n03.plot_bell(code, tail_quantile).axes[0]
    *slices, sticks = ax.collections
    borders = [-3.2, *((points[:-1] + points[1:]) / 2).tolist(), 3.2]
    assert len(slices) == 16
    for area, (low, high) in zip(slices, pairwise(borders), strict=True):
        corners = area.get_paths()[0].vertices
        assert corners[:, 0].min() == pytest.approx(low, rel=SINGLE)
        assert corners[:, 0].max() == pytest.approx(high, rel=SINGLE)
        x = low + 0.37 * (high - low)
        bottom, top = artists.span(area, x)
        assert bottom == 0
        # between two of 60 points the curve is drawn straight: off by (Δx)²/8 · 0.4 = 1e-4 at most
        assert top == pytest.approx(math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi), abs=1e-4)
    colours = [tuple(area.get_facecolor()[0]) for area in slices]
    assert all(left != right for left, right in pairwise(colours))
    expected = np.zeros((16, 2, 2))
    expected[:, :, 0] = points[:, None]
    expected[:, 1, 1] = density
    assert artists.segments(sticks) == pytest.approx(expected, rel=SINGLE)
    (marks,) = artists.lines(ax)
    assert marks == pytest.approx(np.column_stack([points, np.zeros(16)]), rel=SINGLE)
    below = []  # a code value is a weight divided by the quantile of the tail
    for place in range(-3, 4):
        value = place / statistics.NormalDist().inv_cdf(tail_quantile)
        below.append((place, f"{place}\n({value:.2f})"))
    assert artists.ticks(ax.xaxis) == below
    what = "weight (standard deviations), and below it the same in the unit of the code"
    assert artists.labels(ax) == (what, "density (1 / standard deviation)")
    artists.check_in_view(ax)
    assert ax.get_ylim()[0] == 0
    assert ax.get_ylim()[1] > 0.4


@pytest.mark.parametrize("tail_quantile", [codebooks.TAIL_QUANTILE, 0.99])
def test_the_bells_title_tells_seven_slices_from_eight(tail_quantile):
    code = bnb.get_4bit_type("nf4", device="cpu")
    points = code.double() * torch.special.ndtri(torch.tensor(tail_quantile, dtype=torch.float64))
    shares = 100 * shares_of_the_bell(points)
    left = statistics.median(shares[:7].tolist())
    right = statistics.median(shares[8:].tolist())
    title = artists.title(n03.plot_bell(code, tail_quantile).axes[0])
    near = f"most near {left:.1f} % and {right:.1f} % of the weights"
    assert title == f"7 slices below 0, 8 above, 1 at 0: {near}"


def test_the_slices_below_zero_are_the_larger_ones():
    code = bnb.get_4bit_type("nf4", device="cpu").double()
    quantile = torch.tensor(codebooks.TAIL_QUANTILE, dtype=torch.float64)
    shares = 100 * shares_of_the_bell(code * torch.special.ndtri(quantile))
    left = shares[code < 0]
    right = shares[code > 0]
    assert left[1:].min() > right[:-1].max()
    assert left[1:].max() - left[1:].min() < 0.5, "nearly alike"
    assert right[:-1].max() - right[:-1].min() < 0.5
    assert left.argmin() == 0, "the end is the least of its half"
    assert right.argmin() == len(right) - 1


def nearest_in(name: str, weight: float) -> float:
    """The code value that bitsandbytes itself takes for a scaled weight; INT4 by rounding."""
    if name == "INT4":
        return round(7 * weight) / 7
    block = torch.zeros(64)
    block[0] = 1.0  # absmax
    block[1] = weight
    packed, state = bnb.quantize_4bit(block, blocksize=64, quant_type=name.lower())
    return bnb.dequantize_4bit(packed, state).flatten()[1].item()


@pytest.mark.parametrize("weight", [0.31, -0.62, 0.05, 1.0, -0.97])
def test_number_line_shows_the_nearest_value_of_every_code(weight):
    ax = n03.plot_number_line(weight).axes[0]
    names = ["INT4", "FP4", "NF4"]
    *drawn, mark = artists.lines(ax)
    assert len(drawn) == 6
    errors = []
    for row, each in enumerate(names):
        values = sorted(set(table(each)))
        nearest = nearest_in(each, weight)
        points, link = drawn[2 * row : 2 * row + 2]
        assert points == pytest.approx(np.array([(v, row) for v in values]), abs=SINGLE)
        assert link == pytest.approx(np.array([(weight, row + 0.28), (nearest, row)]), abs=SINGLE)
        assert artists.texts(ax)[row] == f"{nearest:+.3f}"
        assert artists.places(ax)[row, 1] == row
        assert 1.0 < artists.places(ax)[row, 0] < ax.get_xlim()[1]
        errors.insert(0, f"{each} {abs(nearest - weight):.3f}")
    assert mark[:, 0].tolist() == [weight, weight]
    assert mark[:, 1].tolist() == [0, 1], "from the bottom of the axes to the top"
    assert artists.ticks(ax.yaxis) == list(enumerate(names))
    assert ax.get_xlabel() == "weight / absmax"
    assert ax.get_xlim()[0] < -1
    assert ax.get_ylim() == (-0.4, 2.5)
    artists.check_in_view(ax)
    words = f"{weight:+.2f} is stored with an error of: {', '.join(errors)}"
    assert artists.title(ax) == words


# 03: errors


ERRORS = {
    "NF4": {32: 0.08, 64: 0.0912, 4096: 0.17},
    "FP4": {32: 0.1, 64: 0.125, 4096: 0.2},
    "INT4": {32: 0.082, 64: 0.0931},
    "NF4+DQ": {64: 0.09},
}


@pytest.mark.parametrize(("blocksize", "name"), [(64, "INT4"), (4096, "FP4"), (32, "NF4")])
def test_errors_are_drawn_over_the_bits_they_cost(blocksize, name):
    ax = n03.plot_errors(ERRORS, blocksize, name).axes[0]
    *drawn, ring = artists.lines(ax)
    assert len(drawn) == len(ERRORS)
    for line, by_size in zip(drawn, ERRORS.values()):
        assert line.tolist() == [[size, error] for size, error in by_size.items()]
    assert ring.tolist() == [[blocksize, ERRORS[name][blocksize]]]
    assert ax.lines[-1].get_markerfacecolor() == "none"
    bits = 4 + 32 / blocksize
    title = f"{name}, blocks of {blocksize}: {bits:.3f} bits a weight"
    assert artists.title(ax) == f"{title}, RMSE {ERRORS[name][blocksize]:.4f} on a Gaussian"
    assert artists.legend(ax) == list(ERRORS)
    axis = ("bits a weight, 32-bit scales included (bit)", "RMSE (standard deviations)")
    assert artists.labels(ax) == axis
    artists.check_in_view(ax)
    assert artists.ticks(ax.xaxis) == [(32, "5\n(32)"), (64, "4.5\n(64)"), (4096, "4.01\n(4096)")]
    assert ax.xaxis_inverted(), "the bits grow to the right"
    styles = {line.get_marker() for line in ax.lines[:4]}
    assert len(styles) == 4, "told apart without colour"


@pytest.mark.parametrize(
    ("shape", "blocksize", "name"),
    [
        ((20, 96), 64, "NF4"),
        ((24, 160), 32, "FP4"),
        ((18, 140), 8, "INT4"),
        ((8, 30), 64, "FP4"),
        ((4, 130), 4096, "NF4"),
    ],
)
def test_error_map_shows_the_error_and_the_blocks(shape, blocksize, name):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    numbers = weight.double().flatten().tolist()
    left = np.array(restored(numbers, table(name), blocksize)).reshape(shape)
    if name in ("NF4", "FP4"):
        # as one row of whole blocks: bitsandbytes 0.50 on CPUs with AVX512 takes a block for a part
        # of one row when it unpacks
        flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % blocksize))[None]
        packed, state = bnb.quantize_4bit(flat, blocksize=blocksize, quant_type=name.lower())
        library = bnb.dequantize_4bit(packed, state)[0, : weight.numel()].reshape(shape).numpy()
        assert library == pytest.approx(left, abs=10 * SINGLE), "the loops are right"
    figure = n03.plot_error_map(weight, blocksize, name)
    *axes, scale = figure.axes
    error = 10 * (left - weight.double().numpy())
    near = 100 * SINGLE
    for ax, part in zip(axes, (weight.numpy(), left, error), strict=True):
        (image,) = artists.images(ax)
        assert image == pytest.approx(part[:16, :128], abs=near)
        assert ax.images[0].get_clim() == (-3, 3)
        (borders,) = ax.collections
        expected = []
        for i in range(0, weight.numel(), blocksize):
            y, x = divmod(i, shape[1])
            if y < 16 and x < 128:
                expected.append([[x - 0.5, y - 0.5], [x - 0.5, y + 0.5]])
        assert artists.segments(borders).tolist() == expected
        assert [place for place, _ in artists.ticks(ax.xaxis)] == [0, 32, 64, 96]
        assert [place for place, _ in artists.ticks(ax.yaxis)] == [0, 8]
        artists.check_in_view(ax)
    assert [ax.get_ylabel() for ax in axes] == ["weights", name, "10 × error"]
    assert axes[-1].get_xlabel() == "input (index); a row is an output"
    bits = 4 + 32 / blocksize
    lost = rmse(numbers, left.flatten().tolist())
    words = f"{name}, blocks of {blocksize}: {bits:.3f} bits a weight, RMSE {lost:.4f}"
    assert artists.title(axes[0]) == words
    assert scale.get_ylabel() == "std of the layer"
    assert [place for place, _ in artists.ticks(scale.yaxis)] == [-3, 0, 3]
    assert scale.get_ylim() == (-3, 3)


def test_error_map_shows_16_rows_and_128_columns():
    weight = torch.randn(40, 192, generator=torch.Generator().manual_seed(2))
    figure = n03.plot_error_map(weight, 128, "FP4")
    (image,) = artists.images(figure.axes[0])
    assert np.array_equal(image, weight[:16, :128].numpy())


@pytest.mark.parametrize("values", [16, 8])
def test_usage_is_counted_beside_an_even_share(values):
    shares = {}
    for whose, step in (("mine", 5), ("yours", 3)):
        counts = torch.tensor([k % step for k in range(values)], dtype=torch.float64)
        shares[whose] = counts / counts.sum()
    code = torch.linspace(-1, 1, values)
    ax = n03.plot_usage(shares, code).axes[0]
    groups = artists.bars(ax)
    assert len(groups) == 2
    for k, (group, share) in enumerate(zip(groups, shares.values())):
        assert group[:, 3] == pytest.approx([100 * part for part in share.tolist()], rel=EXACT)
        assert group[:, 1].tolist() == [0] * values
        middles = group[:, 0] + group[:, 2] / 2
        assert middles == pytest.approx(np.arange(values) + 0.4 * k - 0.2)
    (even,) = artists.lines(ax)
    assert even[:, 1] == pytest.approx(100 / values)
    assert even[:, 0].tolist() == [0, 1], "from the left end of the axes to the right"
    assert sorted(artists.legend(ax)) == sorted([f"an even share, {100 / values:.2f} %", *shares])
    assert artists.ticks(ax.xaxis) == [(i, f"{v:.2f}") for i, v in enumerate(code.tolist())]
    assert artists.labels(ax) == ("NF4 value", "share of the weights (%)")
    artists.check_in_view(ax)
    told = []
    for whose, share in shares.items():
        parts = share.tolist()
        bits = -sum(part * math.log2(part) for part in parts if part)
        ends = f"{100 * min(parts):.1f} to {100 * max(parts):.1f} %"
        told.append(f"{whose}: {ends}, {bits:.2f} bits")
    assert artists.title(ax) == " · ".join(told)


@pytest.mark.parametrize(("outlier", "name", "n"), [(12.0, "NF4", 64), (-5.5, "FP4", 32)])
def test_outlier_makes_the_others_errors_larger(outlier, name, n):
    block = torch.randn(n, generator=torch.Generator().manual_seed(4))
    code = bnb.get_4bit_type(name.lower(), device="cpu")
    ax = n03.plot_outlier(block, outlier, code).axes[0]
    numbers = block.double().tolist()
    spoilt = [outlier, *numbers[1:]]
    errors = []
    for given in (spoilt, numbers):
        left = restored(given, table(name), n)
        errors.append([after - before for after, before in zip(left[1:], given[1:])])
    assert len(ax.collections) == 2
    for line, sticks, error in zip(artists.lines(ax), ax.collections, errors, strict=True):
        points = np.column_stack([range(1, n), error])
        assert line == pytest.approx(points, abs=10 * SINGLE)
        ends = artists.segments(sticks)
        assert ends[:, 1] == pytest.approx(points, abs=10 * SINGLE)
        assert ends[:, 0].tolist() == [[x, 0] for x in range(1, n)]
    beside, alone = (math.sqrt(sum(e**2 for e in error)) for error in errors)
    words = f"The other {n - 1} weights' error is {beside / alone:.1f} times as large"
    assert artists.title(ax) == words
    named = f"an outlier of {outlier:g}"
    assert artists.legend(ax) == [f"with {named}", f"without {named}"]
    assert artists.labels(ax) == ("position in the block", "error (standard deviations)")
    artists.check_in_view(ax)
    most = max(abs(e) for error in errors for e in error)
    assert ax.get_ylim()[1] > 1.1 * most, "room for the legend"
    assert block.double().tolist() == numbers, "the reader's block is left alone"


# 03: bits and formats


def test_loss_is_drawn_over_the_bytes_of_each_number_of_bits():
    panels = {
        "mine": (8_000_000, {16: 0.5, 8: 0.51, 4: 0.6, 2: 4.0}),
        "yours (recorded)": (1_000_000, {16: 2.0, 4: 2.25, 3: 2.5}),
    }
    figure = n03.plot_sizes(panels)
    for ax, (whose, (n_weights, losses)) in zip(figure.axes, panels.items(), strict=True):
        points, unquantized = artists.lines(ax)
        expected = []
        for bits, loss in list(losses.items())[1:]:
            # an index of so many bits, and a 32-bit scale for every 64 weights
            n_bytes = n_weights * bits / 8 + 4 * n_weights / 64
            expected.append([n_bytes / 1e6, loss])
        assert points == pytest.approx(np.array(expected))
        assert unquantized[:, 1].tolist() == [losses[16]] * 2
        assert unquantized[:, 0].tolist() == [0, 1], "from one end of the axes to the other"
        assert ax.lines[1].get_linestyle() == "--"
        told = [f" {bits} bit: {loss:.3g}" for bits, loss in list(losses.items())[1:]]
        assert artists.texts(ax) == told
        assert artists.places(ax) == pytest.approx(np.array(expected))
        low, high = ax.get_ylim()
        round_losses = [n * 10.0**k for k in range(-3, 3) for n in (1, 2, 5)]
        in_view = [(loss, f"{loss:g}") for loss in round_losses if low <= loss <= high]
        drawn = [tick for tick in artists.ticks(ax.yaxis) if low <= tick[0] <= high]
        assert len(drawn) > 1
        assert drawn == in_view or len(in_view) == 1, "1, 2, 5 unless there is but one of them"
        assert ax.get_yscale() == "log"
        assert ax.get_xlim() == pytest.approx((0, 1.5 * expected[0][0]))
        axis = ("size of the quantized layers (MB)", "loss a token (nat), logarithmic")
        assert artists.labels(ax) == axis
        assert artists.title(ax) == f"{whose}: unquantized {losses[16]:.3g}"
        artists.check_in_view(ax)


def test_formats_stand_over_their_bits():
    errors = {
        "a bell": {"NF4": {4.25: 0.096, 5.0: 0.087}, "Q4_0": {4.5: 0.086}, "MXFP4": {4.25: 0.11}},
        "mine": {"NF4": {4.25: 0.1, 5.0: 0.08}, "Q4_0": {4.5: 0.09}, "MXFP4": {4.25: 0.12}},
    }
    figure = n03.plot_formats(errors)
    best = ["Q4_0", "NF4"]
    for ax, (whose, by_name), least in zip(figure.axes, errors.items(), best, strict=True):
        drawn = artists.lines(ax)
        assert len(drawn) == 3
        for line, points in zip(drawn, by_name.values()):
            assert line.tolist() == [list(point) for point in points.items()]
        assert artists.texts(ax) == [f" {name}" for name in by_name]
        ends = [list(points.items())[-1] for points in by_name.values()]
        assert artists.places(ax) == pytest.approx(np.array(ends)), "named at the last point"
        assert artists.title(ax) == f"{whose}: least {least}"
        assert ax.get_xlabel() == "bits a weight, scales included (bit)"
        artists.check_in_view(ax)
        markers = [line.get_marker() for line in ax.lines]
        assert markers[0] != markers[1] == markers[2]
    assert figure.axes[0].get_ylabel() == "RMSE (standard deviations)"
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


# 04: double quantization


def test_ledger_shows_the_papers_bits():
    """Section 3: 32/64 = 0.5 bit a weight become 8/64 + 32/(64 · 256) = 0.127."""
    ledgers = {
        "64, 32-bit": {"codes": 4.0, "scales": 32 / 64, "scales of scales": 0.0},
        "64, 8-bit": {"codes": 4.0, "scales": 8 / 64, "scales of scales": 32 / (64 * 256)},
    }
    ax = n04.plot_ledger(ledgers).axes[0]
    scales, second = artists.bars(ax)
    assert scales[:, 2].tolist() == [0.5, 0.125]
    assert scales[:, 0].tolist() == [0, 0]
    assert second[:, 2].tolist() == [0, 0.001953125]
    assert second[:, 0].tolist() == [0.5, 0.125], "stacked on the scales"
    for group in (scales, second):
        assert group[:, 1] + group[:, 3] / 2 == pytest.approx([0, 1])
    assert artists.texts(ax) == ["  4 + 0.5 = 4.5 bits", "  4 + 0.127 = 4.127 bits"]
    assert artists.places(ax).tolist() == [[0.5, 0], [0.126953125, 1]]
    assert artists.ticks(ax.yaxis) == [(0, "64, 32-bit"), (1, "64, 8-bit")]
    assert artists.legend(ax) == ["scales", "scales of scales"]
    assert ax.get_xlabel() == "bits a weight beyond the four (bit)"
    assert artists.title(ax) == "The scales cost 0.5 bits a weight; quantized too, 0.127"
    assert ax.get_xlim() == (0, 0.75)
    assert ax.get_ylim() == (1.6, -0.6), "the first on top"
    artists.check_in_view(ax)


@pytest.mark.parametrize(("blocksize", "second"), [(64, 256), (8, 16), (1024, 64)])
def test_bits_follow_the_papers_formula(blocksize, second):
    ax = n04.plot_bits(blocksize, second).axes[0]
    sizes = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    plain = [4 + 32 / size for size in sizes]
    double = [4 + 8 / size + 32 / (size * second) for size in sizes]
    upper, lower, between = artists.lines(ax)
    assert upper == pytest.approx(np.column_stack([sizes, plain]), rel=EXACT)
    assert lower == pytest.approx(np.column_stack([sizes, double]), rel=EXACT)
    before = 4 + 32 / blocksize
    after = 4 + 8 / blocksize + 32 / (blocksize * second)
    read_off = np.array([[blocksize, before], [blocksize, after]])
    assert between == pytest.approx(read_off, rel=EXACT)
    assert artists.texts(ax) == [f"{before:.3f}", f"{after:.3f}"]
    assert artists.places(ax) == pytest.approx(read_off, rel=EXACT)
    words = f"Blocks of {blocksize}: {before:.3f} bits a weight become {after:.3f}"
    assert artists.title(ax) == f"{words}, {before - after:.3f} less"
    assert artists.legend(ax) == ["32-bit scales", f"8-bit scales, {second} to a block"]
    assert artists.labels(ax) == ("block size (weights)", "bits a weight (bit)")
    artists.check_in_view(ax)
    assert artists.ticks(ax.xaxis) == [(size, str(size)) for size in sizes]
    assert ax.get_ylim() == (3.6, 8.4)


def test_scales_are_counted_above_the_values_they_become():
    generator = torch.Generator().manual_seed(5)
    scaled = (0.2 * torch.randn(500, generator=generator)).clamp(-1, 1)
    code = bnb.create_dynamic_map()
    figure = n04.plot_scales(scaled, code)
    top, low = figure.axes
    (group,) = artists.bars(top)
    counts = [0] * 80
    for number in scaled.tolist():
        counts[min(int((number + 1) * 40), 79)] += 1
    assert group[:, 3].tolist() == counts
    assert group[:, 1].tolist() == [0] * 80
    assert group[:, 0] == pytest.approx(np.arange(80) / 40 - 1, abs=SINGLE)
    assert group[:, 2] == pytest.approx(1 / 40, rel=1e-4)
    (sticks,) = low.collections
    expected = [[[v, 0], [v, 1]] for v in code.tolist()]
    assert artists.segments(sticks) == pytest.approx(np.array(expected))
    inside = sum(abs(number) < 0.1 for number in scaled.tolist()) / 500
    near = sum(abs(v) < 0.1 for v in code.tolist())
    assert 100 < near < 256
    words = f"{100 * inside:.0f} % of the scales lie within ±0.1"
    assert artists.title(top) == f"{words}, where {near} of the 256 values lie"
    assert top.get_ylabel() == "scales"
    assert artists.labels(low) == ("centred scale / second-level absmax", "values")
    assert low.get_xlim() == top.get_xlim() == (-1.02, 1.02)
    assert artists.ticks(low.yaxis) == []
    artists.check_in_view(top)
    artists.check_in_view(low)


STORED = {
    "16-bit": {"codes": 2**24, "scales": 0, "scales of scales": 0, "mean": 0, "rest": 2**21},
    "NF4": {"codes": 2**22, "scales": 2**19, "scales of scales": 0, "mean": 0, "rest": 2**21},
    "NF4+DQ": {
        "codes": 2**22,
        "scales": 2**17,
        "scales of scales": 2**11,
        "mean": 2**10,
        "rest": 2**21,
    },
}


@pytest.mark.parametrize(("factor", "unit", "name"), [(1, 2**20, "MiB"), (2**7, 2**30, "GiB")])
def test_model_bytes_are_stacked_and_told(factor, unit, name):
    rows = {}
    for variant, parts in STORED.items():
        rows[variant] = {part: factor * size for part, size in parts.items()}
    n_weights = factor * 2**23
    left, right = n04.plot_model_bytes(rows, n_weights).axes
    drawn = ["codes", "scales", "scales of scales", "mean"]
    for ax, shown in ((left, drawn), (right, [*drawn, "rest"])):
        groups = artists.bars(ax)
        assert len(groups) == len(shown)
        ends = [0.0, 0.0, 0.0]
        for part, group in zip(shown, groups):
            widths = [parts[part] / unit for parts in rows.values()]
            assert group[:, 0] == pytest.approx(ends), "stacked on the part before"
            assert group[:, 2] == pytest.approx(widths)
            assert group[:, 1] + group[:, 3] / 2 == pytest.approx([0, 1, 2])
            ends = [end + width for end, width in zip(ends, widths)]
        texts = [f" {end:.3g} {name}" for end in ends]
        if ax is left:
            bits = [8 * end * unit / n_weights for end in ends]
            texts = [f"{text}, {bit:.4g} bits a weight" for text, bit in zip(texts, bits)]
        assert artists.texts(ax) == texts
        assert artists.places(ax) == pytest.approx(np.column_stack([ends, range(3)]))
        times = f"{ends[0] / ends[-1]:.1f} times"
        if ax is left:
            assert artists.title(ax) == f"Layers: {times} smaller than 16-bit"
        else:
            assert artists.title(ax) == f"Whole model: {times} (rest dotted)"
        assert ax.get_xlabel() == f"size ({name})"
        assert ax.get_xlim()[1] > 1.3 * max(ends), "room for what is written"
        assert ax.get_xlim()[0] == 0
        assert ax.get_ylim() == (2.6, -0.6), "the first on top"
        artists.check_in_view(ax)
    assert artists.ticks(left.yaxis) == list(enumerate(rows))


def test_times_smaller_names_what_it_is_compared_with():
    rows = {
        "32-bit": {"codes": 32_000, "rest": 800},
        "4-bit": {"codes": 4_000, "scales": 500, "rest": 800},
    }
    left, _ = n04.plot_model_bytes(rows, 8000).axes
    assert artists.title(left) == "Layers: 7.1 times smaller than 32-bit"
    rows = {"16-bit": {"codes": 16_000, "rest": 800}, "4-bit": rows["4-bit"]}
    left, _ = n04.plot_model_bytes(rows, 8000).axes
    assert artists.title(left) == "Layers: 3.6 times smaller than 16-bit"


# all of them


def test_every_figure_can_be_drawn_and_is_closed():
    nf4 = codebooks.nf4_code()
    block = torch.randn(64, generator=torch.Generator().manual_seed(6))
    bits = {"a": {"scales": 0.5}, "b": {"scales": 0.125, "scales of scales": 0.002}}
    sizes = {"a": (10, {16: 1.0, 4: 2.0}), "b": (10, {16: 1.0, 4: 1.0})}
    artists.check_drawn(n03.plot_weights(block, "a"))
    artists.check_drawn(n03.plot_bell(nf4))
    artists.check_drawn(n03.plot_number_line(0.31))
    artists.check_drawn(n03.plot_errors(ERRORS, 64, "NF4"))
    artists.check_drawn(n03.plot_error_map(block.reshape(8, 8), 64, "NF4"))
    artists.check_drawn(n03.plot_usage({"x": torch.full((16,), 1 / 16)}, nf4))
    artists.check_drawn(n03.plot_outlier(block, 12.0, nf4))
    artists.check_drawn(n03.plot_sizes(sizes))
    artists.check_drawn(n03.plot_formats({"a": {"NF4": {4.5: 0.1}}, "b": {"Q4_0": {4.5: 0.1}}}))
    artists.check_drawn(n04.plot_ledger(bits))
    artists.check_drawn(n04.plot_bits(64, 256))
    artists.check_drawn(n04.plot_scales(block.clamp(-1, 1), codebooks.dynamic_code()))
    artists.check_drawn(n04.plot_model_bytes(STORED, 2**23))
