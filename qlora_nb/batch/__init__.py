"""Batch execution of all notebooks, and its report."""
