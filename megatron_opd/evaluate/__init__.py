"""Evaluation of a model, grading of answers, and reports of runs."""
