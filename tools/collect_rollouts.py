"""Sample the student's responses into a store; the same as `megatron-opd rollout`, for those who look for a script.

python tools/collect_rollouts.py RECIPE [--url URL ... | --launch N] [--shard I/N] [--sft-teacher DIR] [rollout.store=PATH ...]
"""

import sys

from megatron_opd.cli import main

if __name__ == "__main__":
    sys.exit(main(["rollout", *sys.argv[1:]]))
