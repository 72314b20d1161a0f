"""What `make te` and `make mcore` install is what the simulations look for; otherwise they would all be skipped."""

from __future__ import annotations

import re

from cases import NEWEST
from needs import ROOT

from megatron_opd.simulate.needs import TABLE_VERSION


def test_the_makefile_installs_the_versions_that_are_looked_for() -> None:
    versions = dict(re.findall(r"^(TE|MCORE) \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert versions == {"TE": TABLE_VERSION, "MCORE": NEWEST}
