"""Evaluation of a model and grading of answers."""
