"""What a reader sees: the look of all figures, figures that notebooks share, widgets, panels and
checkers of exercises. Only `lessons` and the notebooks import this room.
"""
