"""What a stage cost is written down, also when it fails, and a cut line costs no other line."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_opd.cost import StageCost, append_jsonl, git_commit, provenance, read_jsonl


def test_a_row_a_run(tmp_path: Path) -> None:
    with StageCost(tmp_path / "run", "rollout", num_gpus=2) as cost:
        cost.tokens += 7
        cost.facts["note"] = "x"
    with pytest.raises(ValueError, match="broken"), StageCost(tmp_path / "run", "score", tokens=3):
        raise ValueError("broken")
    with StageCost(tmp_path / "run", "score"):
        pass  # nothing was left to do: no row
    first, second = read_jsonl(tmp_path / "run" / "stages.jsonl")
    assert (first["stage"], first["tokens"], first["note"]) == ("rollout", 7, "x")
    assert first["gpu_hours"] == pytest.approx(2 * first["seconds"] / 3600)
    assert "error" not in first
    assert (second["tokens"], second["error"]) == (3, "ValueError: broken")


def test_the_stage_s_own_error_is_the_one_that_is_shown(tmp_path: Path) -> None:
    """The row can't be written either: its folder is a file."""
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="broken"), StageCost(tmp_path / "run", "score"):
        raise ValueError("broken")
    with pytest.raises(OSError, match="run"), StageCost(tmp_path / "run", "score", tokens=1):
        pass


def test_a_cut_line_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_jsonl(path) == []
    for number in range(3):
        append_jsonl(path, {"row": number, "text": "é\u2028\n"})
    whole = path.read_bytes()
    assert len(read_jsonl(path)) == 3
    for kept in range(len(whole) - 8, len(whole)):
        path.write_bytes(whole[:kept])
        append_jsonl(path, {"row": 3})
        assert [row["row"] for row in read_jsonl(path)] in ([0, 1, 3], [0, 1, 2, 3])


def test_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.delenv("OPD_GIT_COMMIT", raising=False)
    assert git_commit(tmp_path) is None
    monkeypatch.setenv("OPD_GIT_COMMIT", "of the image")
    assert git_commit(tmp_path) == "of the image"
    git("init", "-q", "-b", "main")
    assert git_commit(tmp_path) == "of the image"  # no commit yet
    git("commit", "-q", "--allow-empty", "-m", "one")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    git("pack-refs", "--all")
    assert not (tmp_path / ".git/refs/heads/main").exists()
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    git("checkout", "-q", "--detach")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")


def test_provenance_names_versions() -> None:
    record = provenance()
    assert record["versions"]["zarr"]
    assert record["created"].endswith("Z")
