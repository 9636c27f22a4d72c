"""Wrong answers to the exercises of notebook 01, and what is said of them."""

WRONG = {}
