"""What runs within the isolation, by the standard library alone: `serve` is the first program there, `isolation` starts it from outside."""
