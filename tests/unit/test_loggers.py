"""Where rows go besides metrics.jsonl: what each logger is sent, and services that fail, hang or come back while a training goes on."""

from __future__ import annotations

import importlib
import json
import sqlite3
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fork_server import Job, shared_server
from unit.graded_rows import graded, write_rows

import megatron_opd.model  # noqa: F401  before megatron.core
from megatron_opd.errors import UserError
from megatron_opd.recipe.training_stages import TrainStage
from megatron_opd.train import loggers
from megatron_opd.train.metrics import MetricsLog
from megatron_opd.train.readiness import check_loggers


def open_log(folder: Path, *names: str, first_step: int = 0) -> MetricsLog:
    folder.mkdir(exist_ok=True)
    filed: dict[str, Any] = {"loggers": list(names), "log_group": "seeds of mine", "log_tags": ["small", "first"]}
    config = TrainStage(init="", store="", output=str(folder), **filed)
    return MetricsLog(folder, config, first_step=first_step, settings={"name": "mine", "a": {"b": 1}})


def write(folder: Path, *names: str, first_step: int, steps: range) -> None:
    """Rows with an evaluation after every second step, whose samples lie where training leaves them."""
    log = open_log(folder, *names, first_step=first_step)
    for step in steps:
        row: dict[str, Any] = {
            "step": step,
            "loss": 1.0 / step,
            "none": None,
            "skipped": False,
            "reverse_kl_by_position": [0.5, None, 0.25],
        }
        if step % 2 == 0:
            row |= {"eval/sums/accuracy": 0.5, "eval/sums/seconds": 1.0, "eval/other/error": "it broke"}
            write_rows(folder / "eval" / "sums" / f"step-{step:06d}.prompts.jsonl", [graded(n, 0, "a|<b>`", "7") for n in range(20)])
        log.write(row)
    assert log.close() == {}


@pytest.mark.parametrize("content", [b"", b"\0\0\0\0\0\0\0\0", b"\xff", b"a/b", b"x" * 5000])
def test_a_damaged_name_of_the_wandb_run(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace())
    (tmp_path / "wandb_run_id").write_bytes(content)
    with pytest.raises(UserError, match=r"wandb_run_id: .* is no name of a W&B run; remove the file") as caught:
        write(tmp_path, "wandb", first_step=0, steps=range(1, 2))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", list(loggers.LOGGERS))
def test_a_logger_that_is_not_installed_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard.writer", raising=False)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match=f"'{name}', which is not installed; pip install {name}"):
        write(tmp_path, name, first_step=0, steps=range(1, 2))


@pytest.mark.parametrize("error", [ValueError("No API key configured"), ConnectionError("no route to host")])
def test_wandb_that_does_not_start(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: Any) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(
        UserError, match=rf"could not start: {type(error).__name__}: {error}; log in with `wandb login` .*WANDB_MODE=offline"
    ):
        write(tmp_path, "wandb", first_step=0, steps=range(1, 2))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_loggers_are_looked_for_before_ranks_are_started(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where W&B's own folder of runs lies, which Python would import."""
    (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(UserError, match=f"'{name}', which is not installed"):
        check_loggers([name])
    (tmp_path / name / "__init__.py").touch()
    importlib.invalidate_caches()
    check_loggers([name])


SCALARS = {
    "loss", "skipped", "reverse_kl_by_position/00001", "reverse_kl_by_position/00004", "eval/sums/accuracy", "eval/sums/seconds",
}  # fmt: skip


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, "tensorboard", first_step=0, steps=range(1, 6))
    write(tmp_path, "tensorboard", first_step=3, steps=range(4, 7))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == SCALARS
    assert set(events.Tags()["tensors"]) == {"run/text_summary", "eval/sums/samples/text_summary"}
    run, samples = (events.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode() for name in ("run", "eval/sums/samples"))
    assert all(f"`{text}`" in run for text in (f"mine {tmp_path.name}", "seeds of mine", "small, first"))
    assert samples.count("\n") == 17, "head, line and 16 samples"
    assert "| `0` | `wrong` | `a¦‹b›'` | `7` | `7` |" in samples
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(n, pytest.approx(1 / n)) for n in range(1, 7)]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: the real client, its files, one run for two starts."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(sys, "argv", ["megatron-opd", "engine.launch.environment.HF_TOKEN=hf_Zq8vXw2Lk9"])  # W&B keeps the command line
    write(tmp_path, "wandb", first_step=0, steps=range(1, 4))
    identity = (tmp_path / "wandb_run_id").read_text()
    write(tmp_path, "wandb", first_step=3, steps=range(4, 6))
    assert (tmp_path / "wandb_run_id").read_text() == identity
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert all(identity in path.name and path.stat().st_size > 0 for path in files)
    written = b"".join(path.read_bytes() for path in files)
    for text in (f"mine {tmp_path.name}", "seeds of mine", "small", "eval/sums/samples", *SCALARS):
        assert text.encode() in written
    tables = [json.loads(path.read_text()) for path in (tmp_path / "wandb").rglob("*.table.json")]
    assert {(tuple(table["columns"]), len(table["data"])) for table in tables} == {
        (("prompt", "outcome", "answer", "right answer", "response"), 16)
    }
    assert not any(b"hf_Zq8vXw2Lk9" in path.read_bytes() for path in (tmp_path / "wandb").rglob("*") if path.is_file())
    assert sys.argv[1].endswith("hf_Zq8vXw2Lk9")


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client on a file of its own; a resumed training goes on in the same run."""
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    pytest.importorskip("sqlalchemy", reason="mlflow-skinny has no databases")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)  # artifacts
    import mlflow

    write(tmp_path, "mlflow", first_step=0, steps=range(1, 4))
    write(tmp_path, "mlflow", first_step=3, steps=range(4, 6))
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("megatron-opd")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags["group"]) == (f"mine {tmp_path.name}", "FINISHED", "seeds of mine")
    assert {"small", "first"} <= run.data.tags.keys()
    assert run.data.metrics.keys() == SCALARS
    assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")] == [(n, 1 / n) for n in range(1, 6)]
    assert {file.path for file in client.list_artifacts(run.info.run_id, "eval/sums/samples")} == {
        "eval/sums/samples/step-000002.md", "eval/sums/samples/step-000004.md",
    }  # fmt: skip


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client on this machine; a resumed training goes on in the same run."""
    assert "trackio" not in sys.modules, "it reads TRACKIO_DIR when it is imported"
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    write(tmp_path, "trackio", first_step=0, steps=range(1, 4))
    write(tmp_path, "trackio", first_step=3, steps=range(4, 6))
    with sqlite3.connect(tmp_path / "trackio" / "megatron-opd.db") as database:
        rows = [(name, step, json.loads(values)) for name, step, values in database.execute("select run_name, step, metrics from metrics")]
        ((config,),) = database.execute("select config from configs").fetchall()
    assert {name for name, _, _ in rows} == {f"mine {tmp_path.name} {(tmp_path / 'trackio_run_id').read_text()}"}
    assert [(step, values["loss"]) for _, step, values in rows if "loss" in values] == [(n, 1 / n) for n in range(1, 6)]
    assert {key for _, _, values in rows for key in values} == {*SCALARS, "eval/sums/samples"}
    table = next(values["eval/sums/samples"]["_value"] for _, _, values in rows if "eval/sums/samples" in values)
    assert (len(table), table[0]["answer"]) == (16, "`a¦‹b›'`")
    assert {"name": "mine", "tags": ["small", "first"], "_Group": "seeds of mine"}.items() <= json.loads(config).items()


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def put(log: MetricsLog, step: int) -> None:
    """A row, and the logger has been tried with it."""
    log.write({"step": step, "loss": 1.0 / step})
    (sender,) = log._loggers
    until(lambda: sender.tried == step)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_a_folder_that_can_not_be_written_for_a_while(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events, log = tmp_path / "tensorboard", open_log(tmp_path, "tensorboard")
    put(log, 1)
    events.rename(tmp_path / "kept")
    events.touch()
    put(log, 2)
    put(log, 3)
    said = capsys.readouterr().out
    assert said.startswith("WARNING: loggers: tensorboard did not take step 2: NotADirectoryError: ")
    assert said.endswith("before the next start: make OUTPUT/tensorboard a folder that can be written, with room\n")
    assert said.count("\n") == 1, "once"
    events.unlink()
    (tmp_path / "kept").rename(events)
    put(log, 4)
    assert log.close() == {"rows_not_sent": {"tensorboard": 2}}
    assert capsys.readouterr().out == "WARNING: loggers: 2 of 4 rows did not reach tensorboard; metrics.jsonl has them all\n"
    found = EventAccumulator(str(events))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 4]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_a_logger_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No step waits for it, and the end only for a while."""
    answers = threading.Event()
    hanging = types.SimpleNamespace(log=lambda step, scalars: answers.wait(), close=lambda: None)
    monkeypatch.setitem(loggers.LOGGERS, "mlflow", lambda known: hanging)
    monkeypatch.setattr(loggers, "_FAREWELL_SECONDS", 0.2)
    monkeypatch.setattr(loggers, "_MOST_WAITING", 3)
    log = open_log(tmp_path, "mlflow")
    for step in range(1, 10):
        log.write({"step": step})
    assert log.close() == {"rows_not_sent": {"mlflow": 9}}
    assert "9 of 9 rows did not reach mlflow" in capsys.readouterr().out
    (sender,) = log._loggers
    answers.set()
    until(lambda: not sender._thread.is_alive())
    assert sender.tried in (3, 4), "what waits is bounded"


def test_a_service_that_is_away_when_a_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first start is refused, a training that has steps is not."""

    def away(**options: Any) -> None:
        raise ConnectionError("no route\x1b[2J to https://me:hf_Zq8vXw2Lk9@host/api?key=1")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=away))
    with pytest.raises(UserError, match=r"no route.* to https://host/api; log in") as refused:
        open_log(tmp_path, "wandb")
    log = open_log(tmp_path, "wandb", first_step=3)
    log.write({"step": 4})
    assert log.close() == {"rows_not_sent": {"wandb": 1}}
    said = capsys.readouterr().out
    assert "wandb did not take step 4: " in said
    for text in (said.replace("\n", ""), str(refused.value)):
        assert "hf_Zq8vXw2Lk9" not in text
        assert text.isprintable()


_KILLED = """
import os
import sys
import time
from pathlib import Path

import psutil

from unit.test_loggers import open_log

os.environ.pop("WANDB_SERVICE", None)  # one of another test
log = open_log(Path(sys.argv[1]), "wandb")
(sender,) = log._loggers
for step in range(1, 21):
    log.write({"step": step, "loss": 1.0})
    if step == 2:
        while sender.tried < step:
            time.sleep(0.01)
        for child in psutil.Process().children(recursive=True):
            child.kill()
    time.sleep(0.05)
print(log.close())
"""


def test_wandb_whose_service_is_killed(tmp_path: Path) -> None:
    """The real client, offline, in a process of its own: what it is made of ends in the middle."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    script, said = tmp_path / "script.py", tmp_path / "log"
    script.write_text(_KILLED)
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    (ending,) = shared_server().run(Job([str(tmp_path / "run")], str(said), script=str(script), environment=environment))
    text = said.read_text()
    assert ending.code == 0, text
    assert text.count("WARNING: loggers: wandb did not take step ") == 1
    assert "{'rows_not_sent': {'wandb': " in text
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 20


class _Server(BaseHTTPRequestHandler):
    """The part of MLflow's REST API that a training uses."""

    broken: ClassVar[threading.Event]
    steps: ClassVar[list[int]]
    artifacts: ClassVar[Path]

    def do_GET(self) -> None:
        run = {"info": {"run_id": "r", "artifact_uri": self.artifacts.as_uri()}, "data": {}}
        self._answer({"experiment": {"experiment_id": "0", "name": "megatron-opd"}, "run": run})

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.broken.is_set():
            self.steps.extend(metric["step"] for metric in sent.get("metrics", []))
        self._answer({"run": {"info": {"run_id": "r", "artifact_uri": self.artifacts.as_uri()}, "data": {}}})

    def _answer(self, body: dict[str, Any]) -> None:
        content = b"quota exceeded" if self.broken.is_set() else json.dumps(body).encode()
        self.send_response(500 if self.broken.is_set() else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Server]]:
    handler = type("Handler", (_Server,), {"broken": threading.Event(), "steps": [], "artifacts": tmp_path / "artifacts"})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield handler
        server.shutdown()


def test_an_mlflow_server_that_breaks(server: type[_Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    log = open_log(tmp_path, "mlflow")
    put(log, 1)
    server.broken.set()
    put(log, 2)
    put(log, 3)
    server.broken.clear()
    put(log, 4)
    server.broken.set()
    assert log.close() == {"rows_not_sent": {"mlflow": 2}}
    assert server.steps == [1, 4]
    said = capsys.readouterr().out
    assert said.count("WARNING") == 2, "the first failure and the sum"
    assert "mlflow did not take step 2: " in said
    with pytest.raises(UserError, match=r"'mlflow', which could not start: .*500.*; set MLFLOW_TRACKING_URI"):
        open_log(tmp_path / "another", "mlflow")
