"""What the documentation says of itself: its navigation holds every page, and messages that it explains are messages of the code."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def test_the_navigation_names_every_page() -> None:
    named = re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md"))


def test_messages_that_are_explained_are_in_the_code() -> None:
    source = "\n".join(path.read_text() for path in sorted((ROOT / "megatron_opd").rglob("*.py")))
    messages = [
        message for line in (DOCS / "troubleshooting.md").read_text().splitlines() for message in re.findall(r"^\| `([^`]+)` \|", line)
    ]
    assert len(messages) > 20
    assert [message for message in messages if message not in source] == []
