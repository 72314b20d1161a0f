"""The Python API: stores read and written from programs and notebooks. `megatron_opd` has its names; docs/python.md is the tutorial."""
