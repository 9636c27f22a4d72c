"""Wrong answers to the exercises of notebook 04, and what is said of them."""

WRONG = {}
