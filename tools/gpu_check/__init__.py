"""What a first hour with a GPU should show: every claim of docs/kernels.md and docs/training.md that no CPU can test (docs/gpu.md)."""
