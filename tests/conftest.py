"""How the tests are divided among the processes of pytest-xdist (`make test`), and what all of them need."""

from __future__ import annotations

import re
import signal
from typing import Any

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background jobs have it so, and what the tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process runs all tests of a group, in their order. Own groups, as pytest-xdist 3.8 does not see its marks under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return Groups(config, log)


def _group(nodeid: str) -> str:
    """Of 'tests/FOLDER/FILE::TEST': its file, so that a module's fixtures are made once."""
    path, _, test = nodeid.partition("::")
    folder = path.split("/")[1]
    if folder == "slurm":  # one cluster
        return folder
    if folder == "fake_gpu":  # a fork server for each version of Megatron-Core
        from cases import OLDEST

        version = re.search(r"\d+\.\d+\.\d+", test)
        return f"{folder} {version[0] if version else OLDEST}"
    return path
