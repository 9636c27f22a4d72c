"""No function is written and no number asked for in notebook 09: claims are judged there."""

WRONG = {}
