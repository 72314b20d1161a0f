"""The page of a report in a real browser, on a desk and on a telephone: nothing is fetched, no label lies on another, no panel is empty."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page
from unit.page_checks import check_nothing_else_runs, check_nothing_ran, needs_browser, opened
from unit.study_runs import make_study_run

from megatron_opd.cli import main

pytestmark = needs_browser

# Texts of figures that lie on each other, by what is drawn in them; each figure is one <svg>.
OVERLAPS = """
[...document.querySelectorAll('figure svg')].flatMap((svg, number) => {
  const boxes = [...svg.querySelectorAll('[id*="-text_"]')].map(text => text.getBoundingClientRect()).filter(box => box.width > 0);
  const apart = (a, b) => a.right - 1 < b.left || b.right - 1 < a.left || a.bottom - 1 < b.top || b.bottom - 1 < a.top;
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => !apart(a, b)).map(() => number));
})
"""
EMPTY = """
[...document.querySelectorAll('figure svg')].filter(svg => {
  const box = svg.getBoundingClientRect();
  const drawn = [...svg.querySelectorAll('[id*="-axes_"] > [id*="-line2d_"] path[clip-path], [id*="-axes_"] > [id*="-patch_"] path[clip-path]')];
  return box.width < 200 || box.height < 60 || !drawn.some(path => path.getBoundingClientRect().width + path.getBoundingClientRect().height > 4);
}).length
"""
SMALLEST_TEXT = """
Math.min(...[...document.querySelectorAll('figure svg [id*="-text_"]')].map(text => text.getBoundingClientRect().height).filter(height => height > 0))
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, one of which has a hostile name."""
    folder = tmp_path_factory.mktemp("runs")
    names = {"first": "opd", "second": "opd", "<img src=x onerror='window.hacked=1'>": "forward_kl"}
    runs = [str(make_study_run(folder / name, loss, seed, 0.6)) for seed, (name, loss) in enumerate(names.items())]
    assert main(["report", *runs, "--output", str(folder / "report")]) == 0
    return folder / "report" / "report.html"


@pytest.fixture(scope="module")
def tab(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    yield from opened(page, tmp_path_factory.mktemp("profile"))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_is_legible(width: int, dark: bool, tab: Page) -> None:
    tab.show(width, 800, dark=dark)
    assert tab.run("document.documentElement.scrollWidth") <= width, "tables scroll in their own boxes"
    assert tab.run("document.querySelectorAll('figure svg').length") > 10
    assert tab.run(OVERLAPS) == []
    assert tab.run(EMPTY) == 0
    assert tab.run(SMALLEST_TEXT) >= 5, "pixels of the lowest small letters"
    ink, paper = (tab.run(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    assert (ink, paper) == (("rgb(230, 231, 232)", "rgb(23, 25, 27)") if dark else ("rgb(26, 27, 28)", "rgb(255, 255, 255)"))
    assert (
        tab.run('getComputedStyle(document.querySelector(\'figure svg [id*="-text_"] use, figure svg [id*="-text_"] path\')).color') == ink
    )


def test_the_checks_see_what_is_wrong(tab: Page, page: Path) -> None:
    tab.run(
        "document.querySelectorAll('figure svg')[1].querySelectorAll('[id*=\"-axes_\"] > [id*=\"-line2d_\"]').forEach(line => line.remove())"
    )
    texts = "document.querySelectorAll('figure svg')[2].querySelectorAll('[id*=\"-text_\"]')"
    tab.run(f"{texts}[1].innerHTML = {texts}[0].innerHTML")
    assert (tab.run(EMPTY), set(tab.run(OVERLAPS))) == (1, {2})
    tab.open(page)
    del tab.requests[:-1]


def test_nothing_runs_and_nothing_is_fetched(tab: Page, page: Path) -> None:
    check_nothing_ran(tab, page)
    assert tab.run("document.querySelectorAll('script, img').length") == 0
    assert "<img src=x" in tab.run("document.querySelector('h1').textContent")
    check_nothing_else_runs(tab, page)


def test_folded_parts_open(tab: Page) -> None:
    assert tab.run("[...document.querySelectorAll('details')].every(part => !part.open)")
    tab.run("document.querySelector('details summary').click()")
    assert tab.run("document.querySelector('details').open")
    assert tab.run("document.querySelectorAll('.sides pre').length") > 0


def test_interactive_curves_are_drawn(tab: Page, page: Path) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    del tab.requests[:]
    curves = page.with_name("curves.html")
    tab.open(curves)
    assert tab.run("document.querySelectorAll('#plot .scatterlayer .trace').length") == 6
    tab.run("document.getElementById('raw').click()")
    assert tab.run("document.querySelectorAll('#plot .scatterlayer .trace').length") == 3
    assert ["inline style" in text for text in tab.said] == [True], "Plotly's style for maps, which nothing here needs"
    del tab.said[:]
    check_nothing_ran(tab, curves)
    picture = tab.run("Plotly.toImage('plot', {format: 'png', width: 300, height: 200}).then(url => url.slice(0, 14))")
    assert picture == "data:image/png", "what the camera button saves"
    check_nothing_else_runs(tab, curves)
