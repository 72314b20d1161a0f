"""A report that compares: seeds make groups, differences have intervals, figures of twelve runs with long names stay legible."""

from __future__ import annotations

import csv
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_prompts
from unit.study_runs import PROMPTS, STEPS, make_study_run, write_evaluation

from megatron_opd.cli import main
from megatron_opd.data.prompts import read_prompts
from megatron_opd.evaluate.intervals import Interval, difference_interval
from megatron_opd.report import interactive
from megatron_opd.report.disagreements import disagreements
from megatron_opd.report.estimates import mean_interval, paired_difference, seed_interval, student_t
from megatron_opd.report.exports import PROMPT_COLUMNS, TRAINING_COLUMNS
from megatron_opd.report.figures import plots
from megatron_opd.report.grouping import group_runs
from megatron_opd.report.lineage_rows import mixed_groups
from megatron_opd.report.runs import read_runs
from megatron_opd.report.style import Panel, plain_ticks, sheet, short_labels, single
from megatron_opd.report.verdict import Difference, verdicts

LOSSES = {"opd": 0.5, "forward_kl": 0.95}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two losses, two seeds each, of which one loss is much better."""
    folder = tmp_path_factory.mktemp("study")
    return [str(make_study_run(folder / f"{loss}-s{seed}", loss, seed, solved)) for loss, solved in LOSSES.items() for seed in (0, 1)]


@pytest.fixture(scope="module")
def report(study: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("report")
    assert main(["report", *study, "--group", "train.loss.name", "--output", str(target)]) == 0
    return target


def test_quantiles_of_students_t() -> None:
    """Those of the tables."""
    found = [student_t(freedom) for freedom in (1, 2, 3, 10, 100)]
    assert found == pytest.approx([12.706, 4.303, 3.182, 2.228, 1.984], abs=1e-3)


def test_estimates_against_plain_sums() -> None:
    rng = np.random.default_rng(0)
    later, earlier = ([{("", prompt): value for prompt, value in enumerate(rng.random(50))} for _ in range(2)] for _ in range(2))
    paired, prompts = paired_difference(later, earlier)
    of_prompts = [np.mean([run["", p] for run in later]) - np.mean([run["", p] for run in earlier]) for p in range(50)]
    assert prompts == 50
    assert paired.mean == pytest.approx(np.mean(of_prompts))
    assert paired.high - paired.mean == pytest.approx(1.96 * np.std(of_prompts, ddof=1) / np.sqrt(50))
    assert mean_interval(later).mean == pytest.approx(np.mean([list(run.values()) for run in later]))


def test_intervals_over_seeds() -> None:
    """Against values of the textbook's formulas; the degrees of freedom of Welch's are 1.47 here."""
    of_pairs = seed_interval({0: 0.9, 1: 0.8, 2: 0.7}, {2: 0.5, 1: 0.5, 0: 0.5})
    assert of_pairs is not None
    assert of_pairs[1] == "paired by seed"
    assert of_pairs[0].high - 0.3 == pytest.approx(4.303 * 0.1 / np.sqrt(3), rel=1e-3)
    unpaired = seed_interval({0: 0.9, 1: 0.7}, {5: 0.55, 6: 0.45})
    assert unpaired is not None
    assert unpaired[1] == "Welch"
    freedom = (0.02 / 2 + 0.005 / 2) ** 2 / ((0.02 / 2) ** 2 + (0.005 / 2) ** 2)
    assert freedom == pytest.approx(1.4706, abs=1e-4)
    assert unpaired[0].high - 0.3 == pytest.approx(student_t(freedom) * np.sqrt(0.0125))
    assert student_t(1) > student_t(freedom) > student_t(2)
    assert seed_interval({0: 0.5}, {0: 0.8, 1: 0.7}) is None
    assert seed_interval({0: 0.5, 1: 0.5}, {2: 0.4, 3: 0.4}) == ((pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1)), "Welch")


@pytest.mark.parametrize("deviations", [(0.01, 0.01), (0.08, 0.005)], ids=["the same spread", "another spread"])
@pytest.mark.parametrize("same_seeds", [True, False], ids=["the same seeds", "other seeds"])
def test_chance_is_called_a_difference_one_time_in_twenty(same_seeds: bool, deviations: tuple[float, float]) -> None:
    """Equal groups of two and three seeds, with noise of prompts: the verdict is of prompts and seeds together."""
    rng, false, misses, times = np.random.default_rng(0), 0, 0, 2000
    for trial in range(times):
        seeds = 2 + trial % 2
        later, earlier = (
            dict(enumerate(rng.normal(0.5, deviation, seeds), first))
            for deviation, first in zip(deviations, (0, 0 if same_seeds else 9), strict=True)
        )
        found = seed_interval(later, earlier)
        assert found is not None
        misses += abs(found[0].mean) > (found[0].high - found[0].low) / 2
        mean = found[0].mean + rng.normal(0, 0.01)
        prompts = Interval(mean, mean - 1.96 * 0.01, mean + 1.96 * 0.01)
        both = Difference(prompts, 60, *found).both
        assert both is not None
        false += not both.low <= 0 <= both.high
    assert misses / times < 0.08
    assert false / times < 0.06


def test_one_seed_is_the_difference_that_compare_prints() -> None:
    first, second = {0: 1.0, 1: 0.0, 2: 0.5}, {0: 0.0, 1: 0.0, 2: 1.0, 3: 1.0}
    later, earlier = ({prompt: (run[prompt], 1.0) for prompt in range(3)} for run in (first, second))
    assert paired_difference(*([{("", prompt): value for prompt, value in run.items()}] for run in (first, second))) == (
        difference_interval(later, earlier),
        3,
    )


def test_the_verdict_names_the_best(report: Path, study: list[str]) -> None:
    record = json.loads((report / "report.json").read_text())
    assert record["version"] == 1
    assert record["groups"] == {"opd": ["opd-s0", "opd-s1"], "forward_kl": ["forward_kl-s0", "forward_kl-s1"]}
    assert record["best"] == {"sums": "forward_kl"}
    sft, opd, forward = record["verdicts"]["sums"]
    assert (sft["name"], sft["is_group"], opd["baseline"], forward["baseline"], forward["num_prompts"]) == (
        "sft",
        False,
        None,
        "opd",
        PROMPTS,
    )
    runs = {run.label: run for run in read_runs(study)}
    accuracies = {label: run.record("sums", "opd")["accuracy"]["mean"] for label, run in runs.items()}  # pyright: ignore[reportOptionalSubscript]
    assert forward["seeds"] == {label: accuracies[label] for label in ("forward_kl-s0", "forward_kl-s1")}
    means = [np.mean([accuracies[f"{loss}-s{seed}"] for seed in (0, 1)]) for loss in ("forward_kl", "opd")]
    assert forward["difference"]["mean"] == pytest.approx(means[0] - means[1])
    assert 0 < forward["difference"]["low"] < forward["difference"]["high"]
    assert forward["difference_seeds"]["low"] < forward["difference"]["mean"] < forward["difference_seeds"]["high"]
    assert forward["cost"] == {"seconds": 59.5, "gpu_hours": 0.0, "energy_kwh": None}
    text = (report / "report.md").read_text()
    assert "sums: forward\\_kl is the best of 2 groups" in text or "sums: forward_kl is the best of 2 groups" in text
    assert re.search(r"Against opd: \+\d+\.\d points \\\[\+", text)


def test_what_differs_is_said_and_the_same_is_not(report: Path, study: list[str]) -> None:
    record = json.loads((report / "report.json").read_text())
    assert set(record["settings_that_differ"]) == {"train.seed", "train.loss.name"}, "neither paths in the run's folder nor the cluster"
    groups = group_runs(read_runs(study), None)
    assert {name: len(runs) for name, runs in groups.items()} == {"opd": 2, "forward_kl": 2}, "without --group: all but seeds"
    page = (report / "report.html").read_text()
    assert "Settings that differ" in page
    assert page.index("Verdict") < page.index("Settings that differ") < page.index("Training: opd") < page.index("Training: sft")
    for text in ("c" * 40, "2023-11-14T22:13:20Z", "train.lr = 0.001"):
        assert text in page


def test_runs_of_a_group_that_differ_in_more_than_seeds_are_said(study: list[str]) -> None:
    groups = group_runs(read_runs([study[0], study[2]]), "train.seed")
    assert mixed_groups(groups) == ["The runs of group 0 differ in more than seeds: train.loss.name."]
    assert [result.baseline for result in verdicts(groups, "sft")["sums"]] == [None, "sft"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--group", "train.los.name"], "no recipe of these runs has a field 'train.los.name'; did you mean train.loss.name"),
        (["--baseline", "nobody"], "'nobody' is neither a group nor a run nor a model that was evaluated; there are opd, forward_kl"),
    ],
)
def test_what_is_not_there_is_refused(
    option: list[str], message: str, study: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *study, *option, "--output", str(tmp_path / "report")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_figures_that_can_not_be_compared_are_not(tmp_path: Path) -> None:
    """Other prompts: the accuracy stands, no difference does."""
    runs = [make_study_run(tmp_path / name, "opd", seed, 0.5) for seed, name in enumerate("abc")]
    write_evaluation(runs[2], "sums", "opd", [True] * PROMPTS, weights="other", prompts_sha256="q" * 64)
    groups = group_runs(read_runs([str(run) for run in runs]), "train.seed")
    found = {result.name: result for result in verdicts(groups, None)["sums"]}
    assert found["1"].difference is not None
    assert found["2"].difference is None
    assert found["2"].notes == ["c opd: other prompts than a; not compared"]
    assert found["2"].accuracy is not None


def test_numbers_that_leave(report: Path) -> None:
    with (report / "training.csv").open(newline="") as file:
        training = list(csv.DictReader(file))
    assert tuple(training[0]) == TRAINING_COLUMNS
    assert len(training) == 4 * 2 * STEPS
    assert {(row["run"], row["group"], row["stage"]) for row in training} >= {
        ("opd-s0", "opd", "sft"),
        ("forward_kl-s1", "forward_kl", "opd"),
    }
    assert training[0]["topk_overlap"] == ""
    with (report / "prompts.csv").open(newline="") as file:
        prompts = list(csv.DictReader(file))
    assert tuple(prompts[0]) == PROMPT_COLUMNS
    assert len(prompts) == 4 * 2 * PROMPTS
    assert {row["outcome"] for row in prompts} == {"right", "wrong"}
    run = json.loads((report / "report.json").read_text())["runs"]["opd-s0"]
    assert run["training"]["opd"]["tokens_by_position"] == [64 * 4, 128 * 4, 12]
    assert [point["step"] for point in run["training"]["opd"]["evaluations"]["sums"]] == [20, 40]


def test_disagreements_stand_side_by_side(report: Path) -> None:
    record = json.loads((report / "report.json").read_text())["disagreements"]
    first = record[0]
    assert (first["solver"], first["other"]) == ("forward_kl", "opd")
    assert first["total"] >= len(first["cases"]) == 4
    assert [sample["outcome"] for sample in first["cases"][0]["samples"]] == ["right", "wrong"]
    assert first["commands"][0].startswith("megatron-opd compare ")
    assert "prompts that forward_kl solves and opd does not" in (report / "report.html").read_text()


def test_prompts_that_a_seed_drew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Are found again; where the file holds others by now, that is said."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", 90)
    file, drawn = read_prompts(prompts, limit=PROMPTS, subset_seed=7, split="test")
    runs = [make_study_run(tmp_path / loss, loss, 0, solved) for loss, solved in LOSSES.items()]
    for run, (loss, solved) in zip(runs, LOSSES.items(), strict=True):
        with (run / "recipe.toml").open("a") as recipe:
            recipe.write(f'[eval.sums]\nprompts = "{prompts}"\nnum_prompts = {PROMPTS}\nsubset_seed = 7\n')
        right = [prompt >= PROMPTS * (1 - solved) for prompt in range(PROMPTS)]
        write_evaluation(run, "sums", "opd", right, weights=loss, prompts_sha256=file.sha256, num_prompts=PROMPTS)
    results = verdicts(group_runs(read_runs(list(map(str, runs))), None), None)["sums"]
    (found,) = disagreements(results)
    assert [case.asked for case in found.cases] == [drawn[case.prompt].content for case in found.cases]
    assert capsys.readouterr().out == ""
    write_prompts(tmp_path / "prompts.jsonl", 91)
    (found,) = disagreements(results)
    assert {case.asked for case in found.cases} == {None}
    assert f"report: sums: what was asked is not shown: forward_kl: {prompts} holds other prompts by now" in capsys.readouterr().out


def test_classes_of_positions_with_few_tokens_are_left_out_and_said(report: Path) -> None:
    page = (report / "report.html").read_text()
    assert "Classes of positions with fewer than 200 tokens in those steps are left out: 4 to 7 (of 4 of 4 runs)." in page


def test_the_page_needs_no_network(report: Path) -> None:
    page = (report / "report.html").read_text()
    assert not re.search(r"(src|href)=.?https?:|url\(.?http|@import", page.replace('xmlns:xlink="http://www.w3.org/1999/xlink"', ""))
    assert len(page) < 1_500_000
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {path.suffix for path in report.iterdir()} >= {".png", ".svg", ".html", ".md", ".json", ".csv"}


def test_interactive_curves_are_one_page(study: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    groups = group_runs(read_runs(study), None)
    page = interactive.curves_page(groups)
    assert page is not None
    assert "<script src" not in page
    panels = json.loads(re.search(r"const panels = (.*);\n", page)[1])  # pyright: ignore[reportOptionalSubscript]
    assert {panel["title"] for panel in panels} >= {"opd: reverse KL to the teacher, nat/token", "sft: loss"}
    assert len(panels[0]["traces"]) == 2 * len(study)
    assert sum(trace["showlegend"] for trace in panels[0]["traces"]) == 2


def test_without_plotly_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "opd").mkdir()
    (tmp_path / "opd" / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setattr(interactive, "find_spec", lambda name: None)
    assert main(["report", str(tmp_path)]) == 0
    assert "pip install plotly" in (tmp_path / "report" / "report.html").read_text()
    assert not (tmp_path / "report" / "curves.html").exists()


def boxes(figure: Any) -> list[tuple[str, Any]]:
    """Text that is drawn, with its place in pixels: titles, labels, ticks, legends."""
    from matplotlib.text import Text

    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    shown = []
    for text in figure.findobj(Text):
        if text.get_text().strip() and text.get_visible() and _is_drawn(text, figure):
            shown.append((text.get_text(), text.get_window_extent(renderer)))
    return shown


def _is_drawn(text: Any, figure: Any) -> bool:
    """Ticks beyond the view are texts that nobody draws."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            ticks = {label for tick in axis.get_major_ticks() + axis.get_minor_ticks() for label in (tick.label1, tick.label2)}
            if text in ticks:
                return text in {tick.label1 for tick in axis_ticks(axis)}
    return True


def test_figures_of_twelve_runs_with_long_names_are_legible(tmp_path: Path) -> None:
    """No text lies on another or is cut off, no panel is empty; alone, as on the page, and on a sheet."""
    name = "a run whose name says far more than any axis has room for, number"
    runs = [
        str(make_study_run(tmp_path / f"{name} {n}", f"loss{n}", n, 0.5, evaluations=("sums", "a much longer name of an evaluation")))
        for n in range(12)
    ]
    groups = group_runs(read_runs(runs), None)
    drawn = plots(groups, verdicts(groups, None))
    assert [plot.name for plot in drawn] == [
        "results",
        "tradeoff",
        "training-opd",
        "during-opd",
        "positions",
        "training-sft",
        "during-sft",
        "cost",
    ]
    alone = [(plot.panels[0].title, single(plot.panels[0])) for plot in drawn if plot.name != "training-sft"]
    for title, figure in [(plot.name, sheet(plot)) for plot in drawn if plot.name not in ("training-sft", "during-sft")] + alone:
        assert all(axes.has_data() for axes in figure.axes), title
        found = boxes(figure)
        assert len(found) > 4, title
        for (text, here), (other, there) in combinations(found, 2):
            assert not here.shrunk(0.97, 0.9).overlaps(there.shrunk(0.97, 0.9)), f"{title}: {text!r} lies on {other!r}"
        width, height = figure.canvas.get_width_height()
        for text, box in found:
            assert box.x0 > -1 and box.x1 < width + 1 and box.y0 > -1 and box.y1 < height + 1, f"{title}: {text!r} is cut off"  # noqa: PT018


@pytest.mark.parametrize("values", [(0.2, 0.7), (0.02, 0.9), (0.1, 5.0), (1e-3, 50.0)])
def test_a_logarithmic_axis_has_numbers(values: tuple[float, float]) -> None:
    """Also where no power of ten lies in it."""

    def draw(axes: Any) -> None:
        axes.plot(values)
        axes.set_yscale("log")
        plain_ticks(axes.yaxis, 10)

    figure = single(Panel("", draw))
    figure.canvas.draw()
    (axes,) = figure.axes
    assert 2 <= len([tick for tick in axis_ticks(axes.yaxis) if tick.label1.get_text()]) <= 6


def axis_ticks(axis: Any) -> list[Any]:
    """Those that are drawn."""
    return axis._update_ticks()


def test_shortened_names_stay_different() -> None:
    names = ["a" * 60 + "1", "a" * 60 + "2", "b" * 30 + "1" + "c" * 30, "b" * 30 + "2" + "c" * 30]
    short = short_labels(names)
    assert len(set(short)) == 4
    assert all(len(name) <= 36 for name in short)
    assert short_labels([" \n"]) == ["(no name)"]
