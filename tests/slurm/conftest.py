"""One cluster, and one site on it, for all tests of this folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from site_folder import Site
from slurm_cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no Slurm for tests: {reason}")
    with Cluster(nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    assert Path(sys.prefix, "bin/megatron-opd").exists(), "install the package into this environment (make test does)"
    return Site(cluster, tmp_path_factory.mktemp("site"), pythonpath=os.environ.get("PYTHONPATH", ""))
