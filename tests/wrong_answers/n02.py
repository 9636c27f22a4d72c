"""Wrong answers to the exercises of notebook 02, and what is said of them."""

FORWARD = "def lora_forward(x, weight, A, B, alpha):\n    return "
MERGE = "def lora_merge(weight, A, B, alpha):\n    "

WRONG = {
    1: {
        # not transposed
        f"{FORWARD}x @ weight.T + alpha / len(A) * (x @ A) @ B": (
            "it raises RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x2 and 1x2)"
        ),
        f"{FORWARD}x @ weight + alpha / len(A) * (x @ A.T) @ B.T": (
            "result 1 of 3: values wrong: 2 of 2, the first at [0]: yours is 20.5, needed is 16.5"
        ),
        # without 1 / r: as good at rank 1
        f"{FORWARD}x @ weight.T + alpha * (x @ A.T) @ B.T": (
            "Hint: the factor is alpha / r, not alpha: divide by the number of A's rows"
        ),
        # the update alone, the thin vector alone
        f"{FORWARD}alpha / len(A) * (x @ A.T) @ B.T": (
            "yours is 18, needed is 16.5. Hint: y = x Wᵀ + (alpha / r) (x Aᵀ) Bᵀ, with r the number"
        ),
        f"{FORWARD}x @ A.T": "The differentiated Tensor at index 1 appears to not have been used in the graph",
        # no gradient for A
        f"{FORWARD}x @ weight.T + alpha / len(A) * (x @ A.detach().T) @ B.T": (
            "The differentiated Tensor at index 0 appears to not have been used in the graph"
        ),
    },
    2: {
        "answer = 16": "too large. Hint: the scale is alpha / r",
        "answer = 64": "too large. Hint: the scale is alpha / r",
        "answer = 0.25": "too small. Hint: the scale is alpha / r: 16 / 64 must stay what it is",
        "answer = [4]": "shape wrong: yours is (1,), needed is ()",
    },
    3: {
        # in place
        f"{MERGE}weight += alpha / len(A) * (B @ A)\n    return weight": (
            "it changes what it is given: work on a copy"
        ),
        # the other product: as good where both are square
        f"{MERGE}return weight + alpha / len(A) * (A @ B)": (
            "values wrong: 4 of 4, the first at [0, 0]: yours is 2.5, needed is 6.5"
        ),
        # ΔW alone
        f"{MERGE}return alpha / len(A) * (B @ A)": (
            "yours is 6, needed is 6.5. Hint: W + (alpha / r) B A, a new matrix with the shape of W"
        ),
        # without 1 / r
        f"{MERGE}return weight + alpha * (B @ A)": (
            "of 12288, the first at [0, 0]: yours is -10.5"
        ),
        f"{MERGE}weight += alpha / len(A) * (B @ A)": "it returns nothing",
    },
}
