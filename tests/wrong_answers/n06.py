"""Wrong answers to the exercises of notebook 06, and what is said of them."""

WRONG = {}
