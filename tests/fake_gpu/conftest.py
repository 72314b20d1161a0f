"""The simulators of this run: one a version of Megatron-Core and kind of layers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from simulator import Simulators


@pytest.fixture(scope="session")
def simulators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulators]:
    started = Simulators(tmp_path_factory.mktemp("fake_gpu"))
    yield started
    started.close()
