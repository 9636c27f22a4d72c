"""Wrong answers to the exercises of notebook 02, and what is said of them."""

WRONG = {}
