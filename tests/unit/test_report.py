"""The report of runs whose files are damaged: what can be read is shown, what can't is named."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.cli import main

EVALUATION: dict[str, Any] = {
    "evaluation": "maths",
    "name": "opd",
    "response_length": 10.0,
    "stopped_share": 1.0,
    "accuracy": {"mean": 0.5, "low": 0.4, "high": 0.6},
    "reverse_kl": {"mean": 0.1, "low": 0.05, "high": 0.15},
    "against": {"name": "sft", "num_prompts": 3, "accuracy": {"mean": 0.1, "low": 0.0, "high": 0.2}},
    "provenance": {"created": "2026-01-01T00:00:00Z"},
}
STEP = {"step": 1, "loss": 1.0, "abs_advantage": 0.5, "reverse_kl": 0.5, "reverse_kl_by_position": [0.5, None], "memory_gib": 1.0}
STAGE = {"stage": "train", "seconds": 3600.0, "tokens": 7, "num_gpus": 2, "gpu_hours": 2.0}


def make_run(folder: Path) -> Path:
    (folder / "eval" / "maths").mkdir(parents=True)
    (folder / "opd").mkdir()
    (folder / "eval" / "maths" / "opd.json").write_text(json.dumps(EVALUATION))
    (folder / "opd" / "metrics.jsonl").write_text(json.dumps(STEP) + "\n" + json.dumps(STEP | {"step": 2, "loss": None}) + "\n")
    (folder / "stages.jsonl").write_text(json.dumps(STAGE) + "\n")
    return folder


def rows_of(report: Path) -> dict[str, list[list[str]]]:
    """Cells of each table by its title, without the head."""
    tables = {}
    for section in report.read_text().split("## ")[1:]:
        title, *lines = section.splitlines()
        tables[title] = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    return tables


DAMAGES = [
    ("eval/maths/opd.json", json.dumps(EVALUATION)[:40], "Results"),
    ("eval/maths/opd.json", "[1]", "Results"),
    ("eval/maths/opd.json", json.dumps({"evaluation": "maths", "name": "opd"}), "Results"),
    ("eval/maths/opd.json", json.dumps(EVALUATION | {"accuracy": {"mean": 0.5}}), "Results"),
    ("eval/maths/opd.json", json.dumps(EVALUATION | {"accuracy": None}), "Results"),
    ("eval/maths/opd.json", json.dumps(EVALUATION | {"against": {"name": "sft"}}), "Results"),
    ("eval/maths/opd.json", json.dumps(EVALUATION | {"sampling": {"temperature": "hot"}}), "Results"),
    ("eval/maths/opd.json", json.dumps(EVALUATION | {"grading": [1]}), "Results"),
    ("opd/metrics.jsonl", '{"loss": 1.0}\n', "Training"),
    ("opd/metrics.jsonl", '{"step": 1, "loss": "high"}\n', "Training"),
    ("opd/metrics.jsonl", '{"step": 1, "reverse_kl_by_position": {"a": 1}}\n', "Training"),
    ("opd/metrics.jsonl", '{"step": 1, "tokens_by_position": ["many"]}\n', "Training"),
    ("stages.jsonl", '{"stage": "train"}\n', "Stages"),
    ("stages.jsonl", json.dumps(STAGE | {"gpu_hours": None}) + "\n", "Stages"),
    ("stages.jsonl", json.dumps(STAGE | {"error": 5}) + "\n", "Stages"),
]


def test_what_is_damaged_is_named_and_costs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a report of all of them; more than six groups have further dashes and markers."""
    runs = [make_run(tmp_path / "whole")]
    for number, (file, content, _) in enumerate(DAMAGES):
        runs.append(make_run(tmp_path / f"broken{number}"))
        (runs[-1] / file).write_text(content)
    assert main(["report", *map(str, runs), "--output", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    tables = rows_of(tmp_path / "report" / "report.md")
    assert {"Verdict", "Results", "Differences, paired by prompt", "Training", "Stages"} == set(tables)
    for run, (file, _, lost) in zip(runs[1:], DAMAGES, strict=True):
        assert str(run / file) in printed
        for title, rows in tables.items():
            gone = title == lost or (lost == "Results" and title in ("Differences, paired by prompt", "Verdict"))
            assert (run.name in {row[0] for row in rows}) is not gone, (run.name, title)
    assert all("whole" in {row[0] for row in rows} for rows in tables.values())


def test_fields_that_a_report_can_do_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    (run / "eval" / "maths" / "old.json").write_text(
        json.dumps({k: v for k, v in EVALUATION.items() if k != "provenance"} | {"name": "old"})
    )
    (run / "opd" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert main(["report", str(run)]) == 0
    assert "left out" not in capsys.readouterr().out
    tables = rows_of(run / "report" / "report.md")
    assert [row[1:3] for row in tables["Results"]] == [["maths", "old"], ["maths", "opd"]]
    assert tables["Training"][0][:3] == ["run", "opd", "1 (0)"]


def test_a_folder_without_anything_to_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "eval" / "maths").mkdir(parents=True)
    (tmp_path / "eval" / "maths" / "opd.json").write_text("{")
    assert main(["report", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert f"{tmp_path / 'eval' / 'maths' / 'opd.json'} is left out: not JSON: Expecting" in captured.out
    assert "run 'megatron-opd eval RECIPE maths --of opd' again, or delete the file" in captured.out
    assert f"{tmp_path}: no run here" in captured.err


def test_an_unfinished_run_is_marked_and_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "stages.jsonl").open("a") as file:
        for hours in (1.0, 2.5):
            file.write(json.dumps(STAGE | {"run": "a", "gpu_hours": hours, "unfinished": True}) + "\n")
    assert main(["report", str(run)]) == 0
    stages = rows_of(run / "report" / "report.md")["Stages"]
    assert [(row[1], row[5]) for row in stages] == [("train", "2.00"), ("train (unfinished)", "2.50"), ("all", "4.50")]


def test_every_run_has_a_label_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a/run", "b/run"):
        make_run(Path(folder))
    assert main(["report", "a/run", "b/run", "--output", "both"]) == 0
    assert {row[0] for row in rows_of(Path("both/report.md"))["Stages"]} == {"a/run", "b/run"}
    assert "each is shown once" not in capsys.readouterr().out
    assert main(["report", "a/run", "b/run", "a/../a/run", "--output", "twice"]) == 0
    assert [row[0] for row in rows_of(Path("twice/report.md"))["Stages"]] == ["a/run", "b/run"]
    assert "report: 3 folders were given, but only 2 different ones; each is shown once" in capsys.readouterr().out


PAGES = ("report.html", "report.md", "curves.html")
NAMES = [
    "$\\frac$",
    "<script>alert(1)</script>",
    "<img src=x>",
    "a|b",
    "_under",
    "50% of `x` [y](http://z)",
    "two\nlines",
    "&amp;",
    "für 学生",
]


def test_names_stand_for_themselves(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Names of runs, evaluations, models, stages and trainings reach figures, Markdown and HTML: no formula, no tag, no further cell."""
    runs = []
    for number, name in enumerate(NAMES):
        run = make_run(tmp_path / (name if "/" not in name else f"run{number}"))
        evaluation = EVALUATION | {"evaluation": name, "name": name, "against": EVALUATION["against"] | {"name": name}}
        (run / "eval" / "maths" / "opd.json").write_text(json.dumps(evaluation))
        with (run / "stages.jsonl").open("a") as file:
            file.write(json.dumps(STAGE | {"stage": name, "error": f"{name}: it broke"}) + "\n")
        (run / "opd").rename(run / name.replace("/", "").replace("\n", " "))
        runs.append(str(run))
    assert main(["report", *runs, "--output", str(tmp_path / "report")]) == 0
    page, text, curves = (path.read_text("utf-8") if path.exists() else "" for path in map((tmp_path / "report").joinpath, PAGES))
    for found in (page, text, curves):
        assert "<script>alert" not in found
        assert "<img" not in found
        assert "&amp;amp;amp;" not in found
    assert "<script" not in page + text
    for section in text.split("## ")[1:]:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in section.splitlines() if line.startswith("|")}
        assert len(widths) == 1, section
    assert not [warning for warning in recwarn if "arse" in str(warning.message)]


def test_zero_is_never_negative_and_says_where_it_has_no_interval(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    nothing = {"mean": -1e-9, "low": -2e-9, "high": 1e-9}
    against = {"name": "sft", "num_prompts": 20, "accuracy": {"mean": -0.0, "low": -0.0, "high": 0.0}, "reverse_kl": nothing}
    rows = {
        "zero": {"reverse_kl": nothing, "against": against},
        "same": {"reverse_kl": {"mean": 0.25, "low": 0.25, "high": 0.25}},
        "one": {"reverse_kl": {"mean": 0.25, "low": None, "high": None}},
        "old": {"reverse_kl": {"mean": 0.25, "low": -math.inf, "high": math.inf}},
        "warm": {"sampling": {"temperature": 0.6, "top_p": 0.95, "top_k": 0}, "grading": {"timeouts": 2, "errors": 0}},
    }
    for name, changes in rows.items():
        (run / "eval" / "maths" / f"{name}.json").write_text(json.dumps(EVALUATION | {"name": name} | changes))
    assert main(["report", str(run)]) == 0
    tables = rows_of(run / "report" / "report.md")
    results = {row[2]: row[3:5] for row in tables["Results"]}
    assert results["zero"][1] == "0.0000 (0.0000 to 0.0000)"
    assert results["same"][1] == "0.2500 (no interval: the same for every prompt)"
    assert results["one"][1] == results["old"][1] == "0.2500 (no interval: one prompt alone)"
    assert results["warm"] == ["50.0% (40.0% to 60.0%), 2 timed out", "0.1000 (0.0500 to 0.1500), sampled at temperature 0.6, top-p 0.95"]
    differences = {row[2]: row[4:6] for row in tables["Differences, paired by prompt"]}
    assert differences["zero"] == ["+0.0 (no interval: the same for every prompt)", "+0.0000 (+0.0000 to +0.0000)"]
    assert "-0.0000" not in (run / "report" / "report.html").read_text("utf-8")


def test_models_stand_side_by_side_by_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one evaluation alone the table would say nothing new; files of versions without names are left out."""
    run = make_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert "Models by evaluation" not in rows_of(run / "report" / "report.md")
    (run / "eval" / "code").mkdir()
    sampled = {"sampling": {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "samples_per_prompt": 4}}
    for model in ("teacher", "opd"):
        (run / "eval" / "code" / f"{model}.json").write_text(json.dumps(EVALUATION | sampled | {"evaluation": "code", "name": model}))
    (run / "eval" / "opd.json").write_text(json.dumps(EVALUATION))
    capsys.readouterr()
    (run / "eval" / "sft.opd.zarr").mkdir()  # such a version's samples, which are no evaluation and are not to be deleted
    (run / "eval" / "sft.opd.zarr" / "zarr.json").write_text('{"zarr_format": 3}')
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr().out
    assert f"{run / 'eval' / 'opd.json'} is left out: it is of a version without named evaluations" in printed
    assert "zarr.json" not in printed
    text = (run / "report" / "report.md").read_text()
    assert "| model | code (average@4) | maths |" in text
    accuracy = "50.0% (40.0% to 60.0%)"
    assert rows_of(run / "report" / "report.md")["Models by evaluation"] == [["teacher", accuracy, "-"], ["opd", accuracy, accuracy]]
    assert main(["report", str(run), str(make_run(tmp_path / "other")), "--output", str(tmp_path / "both")]) == 0
    both = rows_of(tmp_path / "both" / "report.md")["Models by evaluation"]
    assert [row[0] for row in both] == ["run: teacher", "run: opd", "other: opd"]
