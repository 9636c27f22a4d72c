"""Wrong answers to the exercises of notebook 03, and what is said of them."""

WRONG = {}
