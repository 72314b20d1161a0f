"""What a training has left in its output folder, read without Megatron."""
