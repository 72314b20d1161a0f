"""Convert checkpoints between Megatron-Core and Hugging Face: `megatron-opd convert` for people who keep scripts.

python tools/convert_checkpoint.py to-hf runs/opd_8b/opd models/student     a run's latest checkpoint, or one step folder
python tools/convert_checkpoint.py to-mcore models/Qwen3-8B-Base mcore/Qwen3-8B-Base
"""

import sys

from megatron_opd.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
