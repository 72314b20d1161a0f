"""Checks across stages: what a run starts from, and serving engine against training engine."""
