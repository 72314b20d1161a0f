"""What a stage costs: time, tokens, GPU hours, energy, and on which GPUs."""
