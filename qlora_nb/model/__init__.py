"""The model: its data, its loading in 4 bit, its loss without whole logits, and what it is asked
before training.
"""
