"""Wrong answers to the exercises of notebook 07, and what is said of them."""

WRONG = {}
