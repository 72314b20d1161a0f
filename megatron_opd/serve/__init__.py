"""Inference: one engine interface, its implementations, and the stages that use it."""
