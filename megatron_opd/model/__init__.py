"""The student: a Megatron-Core GPTModel made from a Hugging Face config.

Importing this package prepares a machine without CUDA for Megatron-Core (see `cpu`), which must come before `megatron.core` is
first imported; `convert` and `train` therefore import it first.
"""

from megatron_opd.model import cpu

cpu.install()
