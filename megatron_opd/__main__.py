"""`python -m megatron_opd` is the same as `megatron-opd`; torchrun starts ranks this way."""

from megatron_opd.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
