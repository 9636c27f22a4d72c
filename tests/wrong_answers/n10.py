"""Wrong answers to the exercises of notebook 10, and what is said of them."""

HEAD = "def ring_all_reduce(gradients):\n    n, size = gradients.shape\n"
WHOLE = HEAD + "    whole = gradients.sum(0).repeat(n, 1)\n"

WRONG = {
    1: {
        WHOLE + "    return whole / n, 2 * (n - 1) * size // n": "DDP divides by n afterwards",
        WHOLE + "    return whole, (n - 1) * size": "result 2 of 2: values wrong",
        WHOLE
        + "    return whole[0], 2 * (n - 1) * size // n": "shape wrong: yours is (2,), needed",
        WHOLE + "    return whole": "2 results are needed",
        HEAD
        + "    found = gradients.clone()\n"
        + "    for rank in range(n):\n"
        + "        which = (rank + 1) % n\n"
        + "        piece = slice(which * size // n, (which + 1) * size // n)\n"
        + "        found[rank, piece] = gradients[:, piece].sum(0)\n"
        + "    return found, (n - 1) * size // n": "must go round a second time",
    },
    2: {
        "answer = 754_974_720": "7.54975e+08 is too small",
        "answer = 1_509_949_440": "is too large",
    },
}
