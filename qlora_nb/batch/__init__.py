"""All notebooks at once: one in its own process (`one_notebook`), in order and resumable
(`sequence`), told on a page (`report`).
"""
