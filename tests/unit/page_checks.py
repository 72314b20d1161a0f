"""What tests of all pages share: a tab of headless Chromium, and that a page runs nothing but its own and fetches nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, Page

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")

# What text of others would do if it became part of the page.
_INJECTED = """new Promise(done => {
  const script = document.createElement('script'), part = document.createElement('div');
  script.textContent = 'window.hacked = "script"';
  part.innerHTML = `<img src=x onerror='window.hacked = "handler"'><button onclick='window.hacked = "click"'></button><style>body { display: none }</style>`;
  document.body.append(script, part);
  part.querySelector('button').click();
  setTimeout(() => done([typeof window.hacked, getComputedStyle(document.body).display !== 'none']), 100);
})"""


def opened(page: Path, profile: Path) -> Iterator[Page]:
    """For a fixture: a tab with the page, as on a desk."""
    with Browser(profile) as tab:
        tab.show(1280, 800)
        tab.open(page)
        yield tab
    shutil.rmtree(profile, ignore_errors=True)


def check_nothing_ran(tab: Page, page: Path) -> None:
    """Nothing was said, fetched or run since the page was opened."""
    assert not tab.said, tab.said
    assert tab.requests == [page.as_uri()]
    assert tab.run("typeof window.hacked") == "undefined"


def check_nothing_else_runs(tab: Page, page: Path) -> None:
    """The page's policy refuses a script, a handler and a style that are not its own; opens the page anew."""
    assert tab.run(_INJECTED) == ["undefined", True]
    refused = [text for text in tab.said if "Content Security Policy" in text]
    assert len(refused) >= 3
    assert refused == tab.said, tab.said
    tab.open(page)
    del tab.said[:], tab.requests[:-1]
