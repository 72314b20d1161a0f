"""The data plane: prompt files, the Zarr store, the seeded order of training, packing."""
