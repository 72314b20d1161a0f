"""The page of `megatron-opd show --html`: hostile text stays text, and a real browser shows what it should, by keyboard too."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page
from tiny_models import make_chat_tokenizer
from unit.graded_rows import make_row, write_rows
from unit.page_checks import check_nothing_else_runs, check_nothing_ran, needs_browser, opened
from unit.store_parts import fake_fingerprint, make_manifest

from megatron_opd.cli import main
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import create_store, write_part, write_scores
from megatron_opd.evaluate.accuracy import response_text
from megatron_opd.hf.tokenizer import fingerprint_tokenizer, load_tokenizer
from megatron_opd.records import Finish, Rollout, TeacherScores
from megatron_opd.show.page import STEP
from megatron_opd.store_records import ScoreManifest

HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>\" onfocus=\"window.hacked = 3",
    "a\0b\u2028c\u2029d\u202eevil\u2066",
    "<!--<script>]]>&lt;&amp;${window.hacked = 4}",
)
WORST = 7  # the token of each response that the teacher finds unlikely
PROMPTS = 40


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of rollouts whose texts, answers and reasons are hostile; the even ones are wrong, every third was cut, gaps have all levels."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "student").mkdir()
    make_chat_tokenizer(folder / "student", eos="<|im_end|>")
    tokenizer = load_tokenizer(folder / "student")
    sampler = fake_fingerprint("student", vocab_size=272).model_copy(update={"tokenizer": fingerprint_tokenizer(folder / "student")})
    location = create_store(
        str(folder / "sft.opd.zarr"),
        make_manifest(num_prompts=PROMPTS, samples=1, per_part=PROMPTS, sampler=sampler, stop_ids=[tokenizer.eos_token_id]),
    )
    rollouts, scores, rows = [], [], []
    for prompt in range(PROMPTS):
        text, cut = HOSTILE[prompt % len(HOSTILE)], prompt % 3 == 0
        head = tokenizer.encode(f"Question {prompt} {text}", add_special_tokens=False)
        tail = tokenizer.encode(f"{text} 1+1=3\n\t\u4f60", add_special_tokens=False) + [0xED, 0xA0] + [tokenizer.eos_token_id] * (not cut)
        tokens = np.array(head + tail, np.int32)
        ref = np.full(len(tokens), np.nan, np.float32)
        ref[len(head) :] = -5.0
        teacher = ref.copy()
        teacher[len(head) : len(head) + 11] += np.array([-4, -2, -1, -0.5, -0.25, 0, 0.25, 0, 1, 2, 4.5], np.float32)
        teacher[len(head) + WORST] -= 6.0 + prompt / 100
        ids, logp = np.full((len(tokens), 3), -1, np.int32), np.full((len(tokens), 3), np.nan, np.float32)
        ids[len(head) :], logp[len(head) :] = [5, 6, tokenizer.eos_token_id], [-0.5, -1.5, -3.0]
        rollouts.append(Rollout(tokens, len(head), prompt, 0, Finish.LENGTH if cut else Finish.STOP, ref))
        scores.append(TeacherScores(teacher, ids, logp))
        outcome = "wrong" if prompt % 2 == 0 else "right"
        rows.append(
            make_row(
                prompt, 0, outcome=outcome, score=float(outcome == "right"), answer=f"{text}\ud800", gold="2", reason=f"{text} is not it",
                finish="length" if cut else "stop", tokens=len(tail),
                response=response_text(tokenizer, tokens, len(head)),
            )
        )  # fmt: skip
    write_part(location, 0, rollouts, [], {})
    record = StoreReader(location.address).parts[0]
    manifest = ScoreManifest(part=0, teacher=fake_fingerprint("teacher", vocab_size=272), top_k=3, part_crc32c=record.crc32c, crc32c={})
    write_scores(location, "teacher", manifest, rollouts, scores)
    write_rows(folder / "sft.prompts.jsonl", rows)
    assert main(["show", location.address, "--html", str(folder / "page.html")]) == 0
    return folder / "page.html"


class _Parser(HTMLParser):
    """Every tag with its attributes, and what stands in scripts and styles by their kind."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.within: dict[str, str] = {}
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = f"{tag} {dict(attrs).get('type') or ''}".strip()

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.within[self._inside] = self.within.get(self._inside, "") + data


def parsed(page: Path) -> _Parser:
    parser = _Parser()
    parser.feed(page.read_bytes().decode())
    return parser


def test_text_of_others_is_data_alone(page: Path) -> None:
    found = parsed(page)
    assert [attributes.get("type") for tag, attributes in found.tags if tag == "script"] == ["application/json", None]
    assert not [tag for tag, _ in found.tags if tag in ("img", "link", "iframe", "object", "a")]
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on") or name in ("src", "href", "style")]
    data = found.within["script application/json"]
    assert data.isascii()
    assert not set(data) & set("<>&\0")
    assert "http" not in page.read_text().replace("http-equiv", "")


def test_the_policy_lets_nothing_but_its_own_script_and_style_run(page: Path) -> None:
    found = parsed(page)
    (policy,) = [attributes["content"] for tag, attributes in found.tags if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    hashes = {kind: base64.b64encode(hashlib.sha256(found.within[kind].encode()).digest()).decode() for kind in ("script", "style")}
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; base-uri 'none'; form-action 'none'"
    )


def test_the_data_are_those_of_the_store(page: Path) -> None:
    data: dict[str, Any] = json.loads(parsed(page).within["script application/json"])
    reader = StoreReader(str(page.parent / "sft.opd.zarr"))
    assert len(data["rollouts"]) == PROMPTS
    for at, rollout in enumerate(data["rollouts"]):
        stored, scores = reader.rollout(at), reader.scores(at, "teacher", topk=True)
        numbers = np.frombuffer(base64.b64decode(rollout["tokens"]), "<u2")
        assert [data["pieces"][number][2] for number in numbers] == stored.tokens.tolist()
        for name, logp in (("ref", stored.student_logp), ("teacher", scores.logp)):
            values = np.frombuffer(base64.b64decode(rollout[name]), "<i2") * STEP
            np.testing.assert_allclose(values, logp[stored.prompt_len :], atol=STEP / 2 + 1e-6)
    kinds = {row[1] for row in data["pieces"]}
    assert kinds == {"text", "special", "bytes"}
    texts = {row[0] for row in data["pieces"]}
    assert {r"\x00", "<e4>", "<|im_end|>"} <= texts
    assert not [text for text in texts if re.search(r"[\x00\u2028\u202e\ud800-\udfff]", text)]


# In a real browser.


@pytest.fixture(scope="module")
def tab(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    yield from opened(page, tmp_path_factory.mktemp("profile"))


@needs_browser
def test_nothing_runs_and_nothing_is_fetched(tab: Page, page: Path) -> None:
    for _ in HOSTILE:
        tab.press("j")
    for _ in HOSTILE:
        tab.press("k")
    check_nothing_ran(tab, page)
    assert HOSTILE[0] in tab.run("document.getElementById('response').textContent")
    assert tab.run("document.querySelectorAll('script, img').length") == 2
    check_nothing_else_runs(tab, page)


@needs_browser
def test_by_keyboard_and_without_hovering(tab: Page) -> None:
    tab.run("document.getElementById('list').focus()")
    tab.press("Home", "j", "ArrowDown", "k")
    assert tab.run("document.querySelector('[aria-selected=true]').textContent").startswith("prompt 1, sample 0")
    tab.press("w")
    assert tab.run("document.activeElement.dataset.t") == str(WORST)
    shown = tab.run("document.getElementById('token').innerText")
    assert "\u221211.01" in shown
    assert "\u22126.01" in shown
    assert "the teacher's candidates" in shown
    tab.press("ArrowRight")
    assert tab.run("document.activeElement.dataset.t") == str(WORST + 1)
    tab.press("Escape")
    assert tab.run("document.activeElement.id") == "list"


@needs_browser
def test_filter_sort_and_search(tab: Page) -> None:
    def listed(control: str, value: str, event: str = "change") -> list[int]:
        tab.run(
            f"(() => {{ const c = document.getElementById('{control}'); c.value = {value!r}; c.dispatchEvent(new Event('{event}')); }})()"
        )
        tab.run("new Promise((done) => setTimeout(done, 250))")
        return tab.run("Array.from(document.querySelectorAll('#list li'), (row) => Number(row.textContent.match(/prompt (\\d+)/)[1]))")

    assert listed("only", "wrong") == list(range(0, PROMPTS, 2))
    assert listed("only", "unfinished") == list(range(0, PROMPTS, 3))
    assert listed("only", "all") == list(range(PROMPTS))
    assert listed("sort", "disagreement") == list(range(PROMPTS))[::-1]
    assert listed("sort", "verdict") == [*range(0, PROMPTS, 2), *range(1, PROMPTS, 2)]
    assert listed("sort", "order") == list(range(PROMPTS))
    assert listed("search", "Question 7 ", "input") == [7]
    assert listed("search", "nowhere", "input") == []
    assert tab.run("document.getElementById('title').textContent") == "No rollout is what was asked for"
    assert len(listed("search", "", "input")) == PROMPTS
    tab.press("j")


_CONTRAST = """(() => {
  const light = (colour) => { const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (node) => { for (; node; node = node.parentElement) { const c = getComputedStyle(node).backgroundColor;
    if (c !== "rgba(0, 0, 0, 0)") return c; } return "rgb(255, 255, 255)"; };
  return Array.from(document.querySelectorAll("#response .t, #prompt .t, #about, #title, #token td, #list span, label, #count, #legend span"))
    .filter((node) => node.textContent.trim() && node.offsetParent).map((node) => {
      const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), node.className + ": " + node.textContent.slice(0, 20)]; });
})()"""
_BOXES = """Array.from(document.querySelectorAll("#legend span, #controls label, #controls select, #controls input, h1, #facts summary"))
  .map((node) => { const b = node.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom, node.tagName + node.textContent.slice(0, 12)]; })"""


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_can_be_read(tab: Page, width: int, dark: bool) -> None:
    tab.show(width, 800, dark=dark)
    assert tab.run("document.documentElement.scrollWidth") <= width
    faint = [(round(ratio, 2), what) for ratio, what in tab.run(_CONTRAST) if ratio < 4.5]
    assert not faint  # WCAG 2.1, 1.4.3
    boxes = tab.run(_BOXES)
    for at, (left, top, right, bottom, name) in enumerate(boxes):
        assert left >= 0 and right <= width, name  # noqa: PT018
        for left_2, top_2, right_2, bottom_2, other in boxes[at + 1 :]:
            inside = other.startswith(("SELECT", "INPUT")) and name.startswith("LABEL")
            apart = right <= left_2 + 1 or right_2 <= left + 1 or bottom <= top_2 + 1 or bottom_2 <= top + 1
            assert inside or apart, f"{name} and {other} overlap"
    classes = set(tab.run("Array.from(document.querySelectorAll('#response .t'), (node) => node.className.split(' ').pop())"))
    assert {f"l{step}" for step in range(1, 6)} <= classes
    assert {"m1", "m3", "m4", "m5"} <= classes
    assert len(tab.picture()) > 20_000  # something is drawn
