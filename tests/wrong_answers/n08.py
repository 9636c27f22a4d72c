"""Wrong answers to the exercises of notebook 08, and what is said of them."""

HEAD = "def sophia_update(weight, momentum, curvature, lr, rho, weight_decay):\n"
RATIO = HEAD + "    ratio = momentum / (rho * curvature + 1e-15)\n"
KEPT = "(1 - lr * weight_decay) * weight"

WRONG = {
    1: {
        RATIO + f"    return {KEPT} - lr * ratio": "0.5. Hint: clip each number to −1 … 1",
        RATIO + f"    return {KEPT} - lr * ratio.clamp(max=1)": "Hint: clip at −1 as well",
        HEAD
        + "    ratio = momentum / (rho * curvature.sqrt() + 1e-15)\n"
        + f"    return {KEPT} - lr * ratio.clamp(-1, 1)": "the root is Adam's",
        # the decay is forgotten
        RATIO
        + "    return weight - lr * ratio.clamp(-1, 1)": "Hint: momentum / (rho · curvature), each",
        # the step alone
        RATIO + "    return lr * ratio.clamp(-1, 1)": "values wrong: 1 of 2, the first at [1]",
        # in place
        RATIO + "    return weight.mul_(1 - lr * weight_decay).sub_(lr * ratio.clamp(-1, 1))": (
            "it changes what it is given"
        ),
        # clipped by its length
        RATIO + f"    return {KEPT} - lr * ratio.norm()": "values wrong",
        RATIO + f"    return {KEPT}.sum()": "shape wrong: yours is (), needed is (2,)",
        RATIO: "it returns nothing",
    },
    2: {
        "answer = 754_974_720": "7.54975e+08 is too small",
        "answer = 377_487_360": "is too small",
        "answer = 3_019_898_880": "is too large",
    },
}
