"""The small tours, with students trained from random weights: additions with worked steps, short programs; and SmolLM2."""
