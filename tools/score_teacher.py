"""Score a store of rollouts with a teacher; the same as `megatron-opd score`, for those who look for a script.

python tools/score_teacher.py RECIPE [--url URL ... | --launch N] [--shard I/N] [score.teacher=NAME ...]
"""

import sys

from megatron_opd.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
