"""What `make te` and `make mcore` install is what the simulations look for; otherwise they would all be skipped."""

from __future__ import annotations

import re

from cases import NEWEST
from needs import ROOT

from megatron_opd.simulate.needs import TABLE_VERSION, TE_PACKAGES


def test_the_makefile_installs_the_versions_that_are_looked_for() -> None:
    text = (ROOT / "Makefile").read_text()
    versions = dict(re.findall(r"^(TE|MCORE) \?= (\S+)$", text, re.MULTILINE))
    assert versions == {"TE": TABLE_VERSION, "MCORE": NEWEST}
    packages = re.search(r"^TE_PACKAGES = ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert packages is not None
    assert packages[1].replace("\\\n", " ").replace("$(TE)", TABLE_VERSION).split() == list(TE_PACKAGES)
