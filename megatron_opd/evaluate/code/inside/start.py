"""Runs `serve` by the standard library alone: the packages around it are empty here. Few lines, as Python compiles them at every start."""

import os
import sys
import types


def main() -> None:
    """Stand in for the packages, then serve."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for name, path in (("megatron_opd", []), ("megatron_opd.evaluate", []), ("megatron_opd.evaluate.code", [folder])):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = path

    from megatron_opd.evaluate.code.inside import serve

    serve.main()


if __name__ == "__main__":
    main()
