"""tools/gpu_check: time limits, resumption, bars and report, with small real processes in place of the GPU's parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
try:
    from gpu_check import __main__ as command_line
    from gpu_check import bars, machine, parts, processes, record, report, run, simulated, step_shape, waits
finally:
    sys.path.remove(str(ROOT / "tools"))


def part(name: str, program: str, **options: Any) -> parts.Part:
    return parts.Part(name, name, ("{python}", "-c", program, "{out}"), **{"limit": 20.0, "least": 0.0} | options)


WRITES = "import json, sys; json.dump({'n': 1}, open(sys.argv[1], 'w')); print('hello')"


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def run_all(folder: Path, *some: parts.Part, seconds: float = 60.0, **options: Any) -> tuple[record.Record, list[str]]:
    found, said = record.Record.open(folder), []
    run.run_parts(some, found, seconds=seconds, say=said.append, **options)
    return record.Record.open(folder), said  # what is on disk


# --- processes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_program_that_hangs_ends_with_its_children_also_those_of_a_session_of_their_own(tmp_path: Path) -> None:
    program = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "wait = [sys.executable, '-c', 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)']\n"
        "children = [subprocess.Popen(wait), subprocess.Popen(wait, start_new_session=True)]\n"
        "print(*[child.pid for child in children], flush=True)\n"
        "time.sleep(600)\n"
    )
    begin = time.monotonic()
    ended = processes.run_limited([sys.executable, "-c", program], seconds=3, log=tmp_path / "log", environment=os.environ, folder=tmp_path)
    assert ended.code is None
    assert 3 <= ended.seconds <= time.monotonic() - begin < 30
    pids = [int(word) for word in ended.tail.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    ended = processes.run_limited(["no-such-program"], seconds=3, log=tmp_path / "log", environment=os.environ, folder=tmp_path)
    assert ended.code == 127
    assert "no-such-program" in ended.tail


def test_a_child_left_behind_by_a_program_that_ended_is_ended(tmp_path: Path) -> None:
    program = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)"
    ended = processes.run_limited(
        [sys.executable, "-c", program], seconds=20, log=tmp_path / "log", environment=os.environ, folder=tmp_path
    )
    assert ended.code == 0
    deadline = time.monotonic() + 10
    while is_running(int(ended.tail)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(ended.tail))


# --- state and resumption --------------------------------------------------------------------------------------------------------


def test_done_parts_are_skipped_and_failed_ones_run_again(tmp_path: Path) -> None:
    first = part("first", WRITES)
    fails = part("second", "import sys; print('x' * 9000); print('the cause'); sys.exit(3)")
    found, said = run_all(tmp_path, first, fails)
    assert (found.parts["first"].status, found.parts["first"].result) == ("done", {"n": 1})
    bad = found.parts["second"]
    assert (bad.status, bad.reason) == ("failed", "exit code 3")
    assert bad.tail.endswith("the cause\n")
    assert len(bad.tail) <= processes.TAIL_BYTES
    assert (tmp_path / "logs" / "second.log").stat().st_size > 9000
    began = found.parts["first"].seconds

    found, said = run_all(tmp_path, first, part("second", WRITES))
    assert "first: done before" in said
    assert found.parts["first"].seconds == began
    assert found.parts["second"].status == "done"
    assert found.parts["second"].tail == ""

    _, said = run_all(tmp_path, first, again=True)
    assert "first: done before" not in said
    _, said = run_all(tmp_path, part("first", WRITES, always=True))
    assert "first: done before" not in said


def test_numbers_of_other_code_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "git_commit", lambda root: "one")
    run_all(tmp_path, part("first", WRITES))
    monkeypatch.setattr(run, "git_commit", lambda root: "two")
    found, said = run_all(tmp_path, part("first", WRITES))
    assert "first: done before" not in said
    assert found.parts["first"].commit == "two"


def test_a_record_is_written_after_each_part(tmp_path: Path) -> None:
    """So that a cut leaves what was done: the second part sees the first one's."""
    second = part("second", f"import json, sys; print(json.load(open({str(tmp_path / record.FILE)!r}))['parts']); " + WRITES)
    run_all(tmp_path, part("first", WRITES), second)
    assert "'status': 'done'" in (tmp_path / "logs" / "second.log").read_text()


def test_no_json_is_a_failure(tmp_path: Path) -> None:
    found, _ = run_all(tmp_path, part("first", "print('I was here')"))
    assert found.parts["first"].status == "failed"
    assert "wrote no JSON" in found.parts["first"].reason
    assert "I was here" in found.parts["first"].tail


def test_limits_of_a_part_and_of_the_call(tmp_path: Path) -> None:
    hangs = "import time; print('waiting', flush=True); time.sleep(600)"
    found, _ = run_all(tmp_path, part("own", hangs, limit=1.5), part("after", WRITES))
    assert found.parts["own"].status == "timed out"
    assert "waiting" in found.parts["own"].tail
    assert found.parts["after"].status == "done"
    found, _ = run_all(tmp_path, part("call", hangs, limit=30.0), part("late", WRITES, least=5.0), seconds=1.5)
    assert found.parts["call"].status == "cut"
    assert found.parts["late"].status == "to do"
    assert report.exit_code(found, []) == 1


def test_earlier_numbers_outlive_a_call_without_time(tmp_path: Path) -> None:
    run_all(tmp_path, part("first", WRITES))
    found, said = run_all(tmp_path, part("first", WRITES, least=5.0), seconds=1.0, again=True)
    assert found.parts["first"].status == "done"
    assert any("earlier numbers stay" in line for line in said)


def test_what_the_machine_lacks_is_named_and_nothing_is_run(tmp_path: Path) -> None:
    looks = part("machine", "import json, sys; json.dump({'lacking': {'sglang': 'not installed'}}, open(sys.argv[1], 'w'))")
    found, _ = run_all(tmp_path, looks, part("serves", "raise SystemExit('ran')", needs=("torch", "sglang")))
    assert (found.parts["serves"].status, found.parts["serves"].reason) == ("not run", "sglang: not installed")
    assert not (tmp_path / "logs" / "serves.log").exists()


def test_a_program_that_lacks_something_is_not_run(tmp_path: Path) -> None:
    found, _ = run_all(tmp_path, part("first", f"import sys; print('no file X'); sys.exit({parts.NOT_RUN})"))
    assert (found.parts["first"].status, found.parts["first"].reason) == ("not run", "no file X")


def test_a_broken_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / record.FILE).write_text('{"parts": 3}')
    with pytest.raises(ValueError, match="not a record of gpu-check"):
        record.Record.open(tmp_path)


# --- bars and report -------------------------------------------------------------------------------------------------------------


def test_each_bar_quotes_its_document() -> None:
    for bar in bars.BARS:
        assert bar.line(ROOT) is not None, f"{bar.name}: {bar.doc} no longer says {bar.quote!r}"
    assert bars.line_of("a\nb two\n  words c", "two words") == 2
    assert bars.line_of("a", "two words") is None


def loss_row(contestant: str, level: str, *, entropy: bool, milliseconds: float, peak: float = 1e9, each: float = 6.5) -> dict[str, Any]:
    return {
        "contestant": contestant, "level": level, "tokens": 16384, "vocab": 151936, "k": 1, "entropy": entropy, "milliseconds": milliseconds,
        "peak_bytes": peak, "bytes_a_logit": each if level == "logits" else None, "logp_error": 1e-6, "gradient_error": 1e-3,
    }  # fmt: skip


def measured(gpu: str, **changed: Any) -> record.Record:
    """A record in which every bar is met, on a H200."""
    rows = [
        loss_row("opd_kernels", "logits", entropy=True, milliseconds=4.0),
        loss_row("opd_kernels", "logits", entropy=False, milliseconds=3.5),
        loss_row("Liger vocab-parallel", "logits", entropy=False, milliseconds=14.0),
        loss_row("opd_kernels whole", "head", entropy=True, milliseconds=85.0, peak=6e9),
        loss_row("opd_kernels chunks of 4096", "head", entropy=True, milliseconds=86.0, peak=1.4e9),
        loss_row("three matrix products", "head", entropy=True, milliseconds=81.0),
        {
            "contestant": "verl linear",
            "level": "head",
            "tokens": 16384,
            "vocab": 151936,
            "k": 1,
            "entropy": True,
            "absent": "verl does not import",
        },
    ]
    kernel = {"dtype": "bfloat16", "rows": 512, "vocab": 151936, "k": 1, "padding": 0, "masked": False, "scale": 3.0, "ratio": 0.4}
    side = {"tokens_per_second": 20000.0, "tflops": 400.0, "mfu": 0.4, "memory_gib": 40.0, "split": {"data": 0.1, "forward": 0.9}}
    layers = "Transformer Engine"
    results: dict[str, Any] = {
        "kernels": {"device": "cuda", "rows": [kernel]},
        "loss": {"rows": rows, "copy_bytes_a_second": 4.2e12, "hidden": 4096},
        "train": {"ours": side, "reference": side | {"tokens_per_second": 9000.0}},
        "train-fp8": {"ours": side | {"tokens_per_second": 26000.0}},
        "step": {"peak_bytes": 100.0, "reserved_bytes": 103.0, "other_bytes": 1e9, "waits_total": 3, "layers_by": layers},
        "simulated": {"peak_bytes": 98.0, "waits_total": 3, "layers_by": layers},
    }
    known = {"gpu": gpu, "versions": {"torch": "2.11.0"}, "driver": {"driver_version": "580.1"}, "lacking": {"sglang": "not installed"}}
    found = record.Record(Path("."), known)
    for name, result in (results | changed).items():
        found.parts[name] = record.PartRecord("done" if result else "not run", "" if result else "no such package", result=result)
    return found


def test_every_bar_is_met_or_short_by_its_own_numbers() -> None:
    found = report.verdicts(measured("NVIDIA H200"))
    assert {verdict.state for verdict in found} == {"met"}, [v for v in found if v.state != "met"]
    assert report.exit_code(measured("NVIDIA H200"), found) == 0
    slow = measured("NVIDIA H200")
    for row in slow.parts["loss"].result["rows"]:
        if "milliseconds" in row and row["contestant"].startswith("opd"):
            row["milliseconds"] *= 1.5 if "chunks" not in row["contestant"] else 2
            row["bytes_a_logit"] = row["bytes_a_logit"] and 9.0
            row["peak_bytes"] = 6e9
    slow.parts["kernels"].result["rows"][0]["ratio"] = float("nan")
    slow.parts["train"].result["ours"] |= {"mfu": 0.2, "tokens_per_second": 8000.0}
    slow.parts["train-fp8"].result["ours"]["tokens_per_second"] = 7000.0
    slow.parts["step"].result |= {"peak_bytes": 90.0, "other_bytes": 4e9, "waits_total": 5}
    verdicts = report.verdicts(slow)
    assert {verdict.state for verdict in verdicts} == {"short"}, [v for v in verdicts if v.state != "short"]
    assert report.exit_code(slow, verdicts) == 1


def test_bars_without_numbers_stay_open_with_the_reason() -> None:
    found = {v.bar.name: v for v in report.verdicts(measured("NVIDIA H100 80GB HBM3", simulated=None))}
    states = {name: verdict.state for name, verdict in found.items()}
    assert states["logits to gradient: time"] == "open"
    assert "H200" in found["logits to gradient: time"].reason
    assert states["logits to gradient: bytes a logit (6 x 1.3)"] == "met"
    assert found["simulated peak off the measured one"].reason == "simulated: not run, no such package"
    assert report.exit_code(record.Record(Path(".")), [v for v in found.values() if v.state == "open"]) == 1  # nothing was measured


def test_a_simulation_of_other_layers_is_compared_with_nothing() -> None:
    other = measured("NVIDIA H200")
    other.parts["simulated"].result["layers_by"] = "local layers"
    open_bars = {verdict.bar.name: verdict.reason for verdict in report.verdicts(other) if verdict.state == "open"}
    names = ("simulated peak off the measured one", "simulated host waits off the measured ones")
    assert open_bars == dict.fromkeys(names, "simulated: other layers than the measured step's")


def test_the_markdown_states_what_fell_short(tmp_path: Path) -> None:
    found = measured("NVIDIA H200")
    found.folder = tmp_path
    found.parts["loss"].result["rows"][4]["peak_bytes"] = 2.5e9
    found.parts["sglang"] = record.PartRecord("failed", "exit code 1", 3.0, ["python", "-m", "x"], tail="Traceback\nno such kernel")
    text = report.write(found, ROOT).read_text()
    begin, _, rest = text.partition("## Bars")
    assert "head in chunks: memory above the inputs: 2.5 GB, at most 2 GB (docs/kernels.md:" in begin
    assert "no such kernel" in rest
    assert "verl does not import" in rest
    assert "- sglang: not installed" in rest
    assert begin.count("\n- ") == 1


# --- the command -----------------------------------------------------------------------------------------------------------------


def gpu_check(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tools"), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-m", "gpu_check", *words], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(machine.has_gpu(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_at_once(tmp_path: Path) -> None:
    begin = time.monotonic()
    done = gpu_check("--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no NVIDIA GPU" in done.stderr
    assert time.monotonic() - begin < 30
    assert not (tmp_path / "out").exists()


def test_the_plan_needs_no_gpu(tmp_path: Path) -> None:
    done = gpu_check("--dry-run", "--output", str(tmp_path), "--from", "train")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[1::2]][:2] == ["machine", "train"]
    assert gpu_check("--only", "nonsense").returncode == 2


def test_programs_and_files_of_the_parts_are_there() -> None:
    for one in parts.PARTS:
        words = one.words(Path("/work"))
        if words[1] == "-m":
            assert (ROOT / "tools" / words[2].replace(".", "/")).with_suffix(".py").exists(), one.name
        for word in words:
            if word.startswith(("tools/", "tests/")):
                assert (ROOT / word).exists(), (one.name, word)
        assert set(one.needs) <= {*machine.IMPORTED, *machine.ASKED, "gpu"}, one.name
        assert one.least <= one.limit
    assert command_line.folder_of("NVIDIA H100 80GB HBM3").name.startswith("NVIDIA-H100-80GB-HBM3-20")


def test_the_machine_is_described_here_too(tmp_path: Path) -> None:
    """In a process of its own, as it imports everything."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tools")}
    subprocess.run([sys.executable, "-m", "gpu_check.machine", str(tmp_path / "out")], env=environment, check=True, timeout=300)
    found = json.loads((tmp_path / "out").read_text())
    versions, lacking = found["versions"], found["lacking"]
    assert "torch" in versions
    assert ("gpu" in lacking) == (found["gpus"] == 0)
    lacking.pop("gpu", None)
    assert not set(versions) & set(lacking)
    assert set(versions) | set(lacking) == {*machine.IMPORTED, *machine.ASKED}


def test_a_kept_simulation_of_another_step_is_refused(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    with pytest.raises(simulated.NotKept, match="gpu-check-simulated"):
        simulated.take(kept, "local layers")
    values = {"settings": step_shape.SETTINGS, "commit": "abc", "layers_by": {"local layers": {"peak_bytes": 5}}}
    kept.write_text(json.dumps(values))
    assert simulated.take(kept, "local layers")["peak_bytes"] == 5
    with pytest.raises(simulated.NotKept, match="no simulation of Transformer Engine"):
        simulated.take(kept, "Transformer Engine")
    kept.write_text(json.dumps(values | {"settings": step_shape.SETTINGS | {"layers": 1}}))
    with pytest.raises(simulated.NotKept, match="another step"):
        simulated.take(kept, "local layers")


def test_the_simulation_finds_make_te_s_folder_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    (installed / "transformer_engine").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(installed), "/ours"]))
    monkeypatch.setattr(simulated, "find_transformer_engine", lambda: "/te")
    assert simulated.environment("Transformer Engine")["PYTHONPATH"].split(os.pathsep) == ["/te", str(installed), "/ours"]
    assert simulated.environment("local layers")["PYTHONPATH"] == "/ours"


def test_a_transformer_engine_that_does_not_load_makes_no_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    package = tmp_path / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "pytorch" / "__init__.py").write_text("raise FileNotFoundError('its compiled half')")
    monkeypatch.syspath_prepend(tmp_path)
    assert simulated.layers_here() == "local layers"
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    (package / "pytorch" / "__init__.py").write_text("")
    assert simulated.layers_here() == "Transformer Engine"
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        sys.modules.pop(name, None)


def test_waits_are_counted_by_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(waits.torch.cuda, "set_sync_debug_mode", modes.append)

    def program() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    found = waits.count_waits(program, True)
    assert sum(found.values()) == 3
    assert modes == ["warn", "default"]
    assert next(iter(found)).startswith("test_gpu_check.py:")
    assert waits._WAITING.search("cudaStreamSynchronize")
    assert not waits._WAITING.search("cudaMemcpyAsync")
