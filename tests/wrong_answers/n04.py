"""Wrong answers to the exercises of notebook 04, and what is said of them."""

LOW_FIRST = """
def pack_nibbles(indices):
    return (indices[1::2] << 4) | indices[0::2]
"""

NOT_PAIRED = """
def pack_nibbles(indices):
    return (indices << 4) | indices
"""

WIDE = """
def pack_nibbles(indices):
    pairs = indices.reshape(-1, 2).long()
    return 16 * pairs[:, 0] + pairs[:, 1]
"""

IN_DECIMALS = """
def pack_nibbles(indices):
    return 10 * indices[0::2] + indices[1::2]
"""

SWAPPED = """
def unpack_nibbles(packed):
    return torch.stack([packed & 15, packed >> 4], dim=1).flatten()
"""

HALVES_APART = """
def unpack_nibbles(packed):
    return torch.cat([packed >> 4, packed & 15])
"""

NOT_FLAT = """
def unpack_nibbles(packed):
    return torch.stack([packed >> 4, packed & 15], dim=1)
"""

BY_DIVISION = """
def unpack_nibbles(packed):
    return torch.stack([packed / 16, packed % 16], dim=1).flatten()
"""

SCALES = """
def quantize_scales(absmax, code):
    mean = absmax.mean()
    indices = []
    seconds = []
    for block in (absmax - mean).split(256):
        second = block.abs().max()
        distances = (block[:, None] / second - code).abs()
        indices.append(distances.argmin(dim=1).to(torch.uint8))
        seconds.append(second)
    return torch.cat(indices), torch.stack(seconds), mean
"""

WRONG = {
    1: {
        LOW_FIRST: "yours is 58, needed is 163. Hint: the first of two goes into the high half of the byte",
        NOT_PAIRED: "shape wrong: yours is (2,), needed is (1,)",
        WIDE: "datatype wrong: yours is torch.int64, needed is torch.uint8",
        IN_DECIMALS: "yours is 103, needed is 163. Hint: the first of two indices counts 16 times",
    },
    2: {
        SWAPPED: "the first at [0]: yours is 3, needed is 10. Hint: of each byte first the whole",
        HALVES_APART: " of 200, the first at [1]: yours is",
        NOT_FLAT: "shape wrong: yours is (1, 2), needed is (2,)",
        BY_DIVISION: "datatype wrong: yours is torch.float32, needed is torch.uint8",
    },
    3: {
        "answer = 782_336": "782336 is too large",
        "answer = 786_432": "786432 is too large",
        "answer = 782_332 / 2**20": "0.74609 is too small",
    },
    4: {
        SCALES.replace("(absmax - mean)", "absmax"): "result 1 of 3: values wrong: 1 of 2",
        SCALES.replace(
            ".to(torch.uint8)", ""
        ): "result 1 of 3: datatype wrong: yours is torch.int64",
        SCALES.replace(
            "split(256)", "split(len(absmax))"
        ): "first at [0]: yours is 55, needed is 52. Hint: subtract the mean",
        SCALES.replace(
            "torch.stack(seconds)", "torch.stack(seconds).max()"
        ): "result 2 of 3: shape",
        SCALES.replace(", mean\n", "\n"): "3 results are needed",
        SCALES.replace(" / second", ""): "first at [0]: yours is 48, needed is 52",
    },
}
