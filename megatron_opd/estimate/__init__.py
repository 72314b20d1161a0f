"""`check --gpus`: what a recipe would cost and whether it fits, before anything has run. docs/training.md has the arithmetic."""
