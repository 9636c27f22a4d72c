"""Wrong answers to the exercises of notebook 03, and what is said of them."""

VALUES = "def nf4_values(tail: float) -> torch.Tensor:\n    quantile = NormalDist().inv_cdf\n"
QUANTIZE = "def quantize_block(block, code):\n    absmax = block.abs().max()\n"
DEQUANTIZE = "def dequantize_block(index, absmax, code):\n"

WRONG = {
    1: {
        # not divided by the largest
        VALUES
        + """\
    above = [quantile(tail - (tail - 0.5) * i / 8) for i in range(8)]
    below = [-quantile(tail - (tail - 0.5) * i / 7) for i in range(7)]
    return torch.tensor(sorted([*below, 0.0, *above]))
""": "values wrong: 15 of 16, the first at [0]: yours is -1.28155, needed is -1. Hint: eight",
        # no zero
        VALUES
        + """\
    above = [quantile(tail - (tail - 0.5) * i / 8) for i in range(8)]
    below = [-quantile(tail - (tail - 0.5) * i / 7) for i in range(7)]
    return torch.tensor(sorted([*below, *above])) / above[0]
""": "shape wrong: yours is (15,), needed is (16,)",
        # eight below and seven above
        VALUES
        + """\
    above = [quantile(tail - (tail - 0.5) * i / 7) for i in range(7)]
    below = [-quantile(tail - (tail - 0.5) * i / 8) for i in range(8)]
    return torch.tensor(sorted([*below, 0.0, *above])) / above[0]
""": "values wrong: 14 of 16, the first at [1]",
        # a list
        VALUES
        + """\
    above = [quantile(tail - (tail - 0.5) * i / 8) / quantile(tail) for i in range(8)]
    below = [-quantile(tail - (tail - 0.5) * i / 7) / quantile(tail) for i in range(7)]
    return sorted([*below, 0.0, *above])
""": "a tensor is needed, yours is of type list",
        # double precision
        VALUES
        + """\
    above = [quantile(tail - (tail - 0.5) * i / 8) for i in range(8)]
    below = [-quantile(tail - (tail - 0.5) * i / 7) for i in range(7)]
    return torch.tensor(sorted([*below, 0.0, *above]), dtype=torch.float64) / above[0]
""": "datatype wrong: yours is torch.float64, needed is torch.float32",
    },
    2: {
        # the largest weight, not the largest magnitude
        """\
def quantize_block(block, code):
    absmax = block.max()
    return ((block / absmax)[:, None] - code).abs().argmin(dim=1), absmax
""": "result 1 of 2: values wrong: 2 of 4, the first at [0]: yours is 15, needed is 10. Hint: absmax",
        # the values in the place of their indices
        QUANTIZE
        + "    return code[((block / absmax)[:, None] - code).abs().argmin(dim=1)], absmax": (
            "result 1 of 2: datatype wrong: yours is torch.float32, needed is torch.int64"
        ),
        # the next larger value in the place of the nearest
        QUANTIZE + "    return torch.searchsorted(code, block / absmax), absmax": (
            "result 1 of 2: values wrong: 2 of 4, the first at [0]: yours is 11, needed is 10"
        ),
        # a number in the place of a tensor
        QUANTIZE
        + "    return ((block / absmax)[:, None] - code).abs().argmin(dim=1), absmax.item()": (
            "result 2 of 2: a tensor is needed, yours is of type float"
        ),
        # the scale is forgotten
        QUANTIZE + "    return ((block / absmax)[:, None] - code).abs().argmin(dim=1)": (
            "2 results are needed, as in `return first, second`"
        ),
        # distances along the wrong axis
        QUANTIZE + "    return ((block / absmax)[:, None] - code).abs().argmin(dim=0), absmax": (
            "result 1 of 2: shape wrong: yours is (16,), needed is (4,)"
        ),
    },
    3: {
        # not scaled back
        DEQUANTIZE
        + "    return code[index]": "values wrong: 3 of 4, the first at [0]: yours is 0.24",
        # the index taken for the value
        DEQUANTIZE + "    return index * absmax": (
            "values wrong: 4 of 4, the first at [0]: yours is 20, needed is 0.4922"
        ),
        # a column
        DEQUANTIZE + "    return (code[index] * absmax)[:, None]": (
            "shape wrong: yours is (4, 1), needed is (4,)"
        ),
        DEQUANTIZE + "    return (code[index] * absmax).tolist()": (
            "a tensor is needed, yours is of type list"
        ),
    },
    4: {
        "largest_possible = (1 - 0.6962) / 2": "0.1519 is too small",
        "largest_possible = 2 * (1 - 0.6962)": "0.6076 is too large",
        "largest_possible = 1 - 0.723": "0.277 is too small",
        "largest_possible = [0.304]": "shape wrong",
    },
    5: {
        "tail_of_8 = 0.9677083": "too large",
        "tail_of_8 = 1 - 1 / 16": "0.9375 is too large",
        "tail_of_8 = 1 - 1 / 14": "too small",
        "tail_of_8 = [0.9330]": "shape wrong",
    },
}
