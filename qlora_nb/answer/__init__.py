"""Answers: generated, evaluated, merged."""
