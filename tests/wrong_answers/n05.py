"""Wrong answers to the exercises of notebook 05, and what is said of them."""

WRONG = {}
