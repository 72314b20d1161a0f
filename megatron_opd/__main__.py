"""`python -m megatron_opd` is the same as `megatron-opd`; torchrun starts ranks this way."""

import atexit
import locale
import os
import signal
import sys

_INTERRUPTED = 128 + signal.SIGINT


def run() -> int:
    """The command line, with an answer to Ctrl-C from its first import on."""
    try:
        use_utf8()
        from megatron_opd.cli import main

        code = main()
    except KeyboardInterrupt:
        print("interrupted before anything had started", file=sys.stderr)
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        # Python would end itself by the signal, though it was caught, if it had passed through an exec(): that of a dataclass that is imported, say.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def use_utf8() -> None:
    """Under a locale of another encoding (Latin-1, say), begin anew in Python's UTF-8 mode.

    Recipes, prompts and models are UTF-8 wherever they lie; file names, the command line and what libraries read are no exception.
    """
    if sys.flags.utf8_mode or {sys.getfilesystemencoding().lower(), locale.getencoding().lower()} == {"utf-8"}:
        return
    os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


if __name__ == "__main__":
    raise SystemExit(run())
