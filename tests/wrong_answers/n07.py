"""Wrong answers to the exercises of notebook 07, and what is said of them."""

SORTED = """
    probabilities = (logits / temperature).softmax(-1)
    ordered, places = probabilities.sort(descending=True)
    together = ordered.cumsum(-1)
"""

UNPACKED = """
    import bitsandbytes.functional as bnb

    weight = layer.base_layer.weight
    unpacked = bnb.dequantize_4bit(weight.data, weight.quant_state)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scaling = layer.scaling["default"]
"""


def distribution(lines: str) -> str:
    return f"def next_distribution(logits, temperature, top_p):{SORTED}{lines}"


def merging(lines: str) -> str:
    return f"def merge_dequantized(layer):{UNPACKED}{lines}"


WRONG = {
    1: {
        # the kept ones alone
        distribution(
            "    kept = probabilities[(together - ordered < top_p)[places.argsort()]]\n"
            "    return kept / kept.sum()"
        ): "shape wrong: yours is (2,), needed is (4,)",
        # not scaled to sum to 1
        distribution(
            "    kept = torch.zeros_like(ordered)\n"
            "    kept[places] = torch.where(together - ordered < top_p, ordered, 0.0)\n"
            "    return kept"
        ): "the first at [1]: yours is 0.5, needed is 0.588235",
        # the one that reaches top_p is dropped
        distribution(
            "    kept = torch.zeros_like(ordered)\n"
            "    kept[places] = torch.where(together <= top_p, ordered, 0.0)\n"
            "    return kept / kept.sum()"
        ): "yours is 1, needed is 0.588235. Hint: the token with which the sum reaches top_p stays",
        # not brought back to their places
        distribution(
            "    kept = torch.where(together - ordered < top_p, ordered, 0.0)\n"
            "    return kept / kept.sum()"
        ): "the first at [0]: yours is 0.5, needed is 0.1",
        # a list
        distribution("    return ordered.tolist()"): "a tensor is needed, yours is of type list",
    },
    2: {
        merging("    return unpacked + scaling * a @ b"): (
            "called with a layer Linear4bit it raises RuntimeError: mat1 and mat2"
        ),
        merging("    return (unpacked + scaling * b @ a).T"): (
            "shape wrong: yours is (64, 2), needed is (2, 64)"
        ),
        merging("    return unpacked + b @ a"): (
            "values wrong: 126 of 128, the first at [0, 0]: yours is 1.03085, needed is 1.09254"
        ),
        merging("    return scaling * b @ a"): (
            "values wrong: 128 of 128, the first at [0, 0]: yours is 0.0925368, needed is 1.09254"
        ),
        merging("    return (unpacked + scaling * b @ a).double()"): (
            "datatype wrong: yours is torch.float64, needed is torch.float32"
        ),
    },
}
