"""`python -m megatron_opd` is the same as `megatron-opd`; torchrun starts ranks this way."""

import signal
import sys


def run() -> int:
    """The command line, with an answer to Ctrl-C from its first import on."""
    try:
        from megatron_opd.cli import main

        return main()
    except KeyboardInterrupt:
        print("interrupted before anything had started", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    raise SystemExit(run())
