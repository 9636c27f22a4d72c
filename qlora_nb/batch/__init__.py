"""All notebooks at once: one in its own process (`one_notebook`), in order and resumable
(`sequence`), told on a page (`report`). And one notebook many times: at every point of a grid
(`sweep`), compared by what its runs recorded (`leaderboard`).
"""
