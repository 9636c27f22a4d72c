"""Wrong answers to the exercises of notebook 01, and what is said of them."""

LAYER = "def qlora_layer(x, codes, table, scales, A, B, alpha):\n"
LEARNT = "alpha / len(A) * (x @ A.T) @ B.T"

WRONG = {
    1: {
        # a scale for each column
        f"{LAYER}    weight = table[codes] * scales\n    return x @ weight.T + {LEARNT}": (
            "the first at [0]: yours is 12.5, needed is 17.5. Hint: a weight is its value in the table"
        ),
        # the codes themselves
        f"{LAYER}    W = (codes * scales[:, None]).view(len(B), -1)\n    return x @ W.T + {LEARNT}": (
            "the first at [0]: yours is 19, needed is 17.5"
        ),
        # blocks taken for rows
        f"{LAYER}    W = table[codes] * scales[:, None]\n    return x @ W.T + {LEARNT}": (
            "it raises RuntimeError: mat1 and mat2 shapes cannot be multiplied (10x128 and 64x192)"
        ),
        # the weights only
        f"{LAYER}    return (table[codes] * scales[:, None]).view(len(B), -1)": (
            "shape wrong: yours is (2, 2), needed is (2,)"
        ),
        # without the path through A and B
        f"{LAYER}    W = (table[codes] * scales[:, None]).view(len(B), -1)\n    return x @ W.T": (
            "the first at [0]: yours is -0.5, needed is 17.5. Hint: a weight is its value in the "
            "table times the scale of its block; then it is a LoRA layer"
        ),
    },
    2: {
        "gib = 5.9": "too large. Hint: 4 bits are half a byte, and a GiB has 2^30 bytes, not 10^9",
        "gib = 4 * 11.8e9 / 2**30": "too large. Hint: 4 bits are half a byte",
        "gib = 11.8e9 / 2**30": "too large. Hint: 4 bits are half a byte",
        "gib = 0": "too small. Hint: 4 bits are half a byte",
        "gib = float('nan')": "a number is needed, nan is not one. Hint: 4 bits",
        "gib = '5.5'": "shape wrong: a number is needed, '5.5' is not one. Hint: ",
        "gib = [5.49]": "shape wrong: yours is (1,), needed is (). Hint: ",
    },
}
