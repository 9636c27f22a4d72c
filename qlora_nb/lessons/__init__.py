"""One module a notebook: its figures and the checkers of its exercises."""
