"""Servers that die, hang, come back, are replaced, or are started by the client: nothing wrong gets through, nothing is lost."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serve.stub_server import LAUNCH_COMMAND, StubServer
from tiny_models import make_model

from megatron_opd.errors import EngineError, LineageError, ServersLost
from megatron_opd.recipe.inference import EngineConfig, LaunchConfig
from megatron_opd.records import SamplingParams
from megatron_opd.serve import sglang
from megatron_opd.serve.engine import Failed, GenerateRequest, ScoreRequest
from megatron_opd.serve.sglang import SglangEngine

SAMPLING = SamplingParams(temperature=0.7, max_new_tokens=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny", layers=1, max_position_embeddings=512)


def config(*urls: str, **changes) -> EngineConfig:
    return EngineConfig.model_validate({"urls": list(urls), "dtype": "float32", "timeout": 30.0, "patience": 30.0, "retries": 2} | changes)


def launch(model: Path, log_dir: Path, *options: str, **changes) -> SglangEngine:
    """An engine that starts its servers itself."""
    fields = {"command": [*LAUNCH_COMMAND, *options], "start_seconds": 120.0} | changes
    return SglangEngine(EngineConfig(launch=LaunchConfig.model_validate(fields), dtype="float32", retries=3), model, log_dir=log_dir)


def requests(count: int, *, low: int = 3, high: int = 250, seed: int = 0) -> list[ScoreRequest]:
    rng = np.random.default_rng(seed)
    return [ScoreRequest(rng.integers(low, high, rng.integers(5, 40)).astype(np.int32), 3) for _ in range(count)]


def poisoned(token: int) -> ScoreRequest:
    return ScoreRequest(np.array([5, 6, token, 7], np.int32), 2)


@pytest.fixture
def wanted(model: Path) -> Iterator[list[np.ndarray]]:
    with StubServer(model) as server:
        engine = SglangEngine(config(server.url), model)
        yield [scores.logp for scores in engine.score(requests(60))]
        engine.close()


def same(scores, wanted: list[np.ndarray]) -> None:
    for have, want in zip(scores, wanted, strict=True):
        np.testing.assert_array_equal(have.logp, want)


@pytest.mark.parametrize(
    "kind", ["none", "floor", "positive", "short", "echo", "id", "late", "abort", "html", "cut", "gzip", "404", "429", "500"]
)
def test_a_wrong_answer_is_asked_again_and_then_given_up(kind: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "BACKOFF_SECONDS", 0.01)
    with StubServer(model, "--poison", f"299:{kind}", "--poison", f"298:{kind}:2") as server:
        engine = SglangEngine(config(server.url), model)
        batch = [*requests(3), poisoned(299), poisoned(298)]
        ((number, outcomes),) = engine.score_parts([batch])
        engine.close()
    assert number == 0
    assert isinstance(outcomes[3], Failed)
    assert "3 tries" in outcomes[3].reason
    assert not any(isinstance(outcome, Failed) for position, outcome in enumerate(outcomes) if position != 3)


def test_a_refusal_is_not_repeated_and_a_hanging_request_ends(model: Path) -> None:
    with StubServer(model, "--poison", "299:400", "--poison", "298:hang") as server:
        engine = SglangEngine(config(server.url, timeout=1.0, retries=1), model)
        before = server.facts()["num_posts"]
        ((_, refused),) = engine.score_parts([[poisoned(299)]])
        assert server.facts()["num_posts"] - before == 1
        ((_, hanging),) = engine.score_parts([[poisoned(298)]])
        engine.close()
    assert isinstance(refused[0], Failed)
    assert "400" in refused[0].reason
    assert isinstance(hanging[0], Failed)
    assert "within 1.0" in hanging[0].reason  # one second, and a little for its length


def test_a_redirect_ends_the_stage_and_is_not_followed(model: Path) -> None:
    with StubServer(model, "--poison", "299:redirect") as server:
        engine = SglangEngine(config(server.url), model)
        with pytest.raises(EngineError, match=r"/generate answered 307, a redirect to elsewhere\.example, which is never followed"):
            list(engine.score_parts([[poisoned(299)]]))
        engine.close()


def test_a_server_that_is_stopped_in_the_middle_is_given_up(model: Path) -> None:
    """SIGSTOP: connections are accepted by the kernel and nothing answers."""
    with StubServer(model, "--delay", "0.05") as server:
        engine = SglangEngine(config(server.url, timeout=0.5, patience=1.0, retries=0, tokens_under_way=200), model)
        done = 0

        def stop_once(tokens: int) -> None:
            nonlocal done
            done += 1
            if done == 5:
                server.process.send_signal(signal.SIGSTOP)

        with pytest.raises(EngineError, match=r"no answer to .* within|no connection within"):
            engine.score(requests(60), 0, stop_once)
        engine.close()


def test_when_every_request_fails_the_stage_ends(model: Path) -> None:
    with StubServer(model, "--poison", "299:none") as server:
        engine = SglangEngine(config(server.url, retries=0), model)
        with pytest.raises(EngineError, match="16 requests in a row failed"):
            list(engine.score_parts([[poisoned(299)] * 40]))
        assert len(engine.score(requests(3))) == 3  # and works on
        engine.close()


def test_tokens_under_way_are_bounded_and_parts_do_not_wait_for_each_other(model: Path) -> None:
    with StubServer(model, "--delay", "0.02", "--poison", "299:hang:1") as server:
        engine = SglangEngine(config(server.url, tokens_under_way=200, timeout=3.0, retries=2), model)
        parts = [[poisoned(299), *requests(5)], *(requests(20, seed=seed) for seed in range(4)), []]
        finished = [number for number, outcomes in engine.score_parts(parts) if not any(isinstance(o, Failed) for o in outcomes)]
        engine.close()
        assert server.facts()["peak_tokens"] <= 200
    assert sorted(finished) == list(range(6))
    assert finished[-1] == 0  # the part with the request that hung


def test_a_caller_that_stops_early_leaves_nothing_behind(model: Path) -> None:
    with StubServer(model, "--delay", "0.05") as server:
        engine = SglangEngine(config(server.url, tokens_under_way=500), model)
        stream = engine.score_parts(requests(10, seed=seed) for seed in range(1000))
        next(stream)
        stream.close()
        assert all(one.outstanding == 0 for one in engine.pool.servers)
        assert len(engine.score(requests(3))) == 3
        engine.close()


def test_a_server_that_is_killed_and_comes_back(model: Path, wanted: list[np.ndarray]) -> None:
    with StubServer(model, "--delay", "0.05") as server:
        engine = SglangEngine(config(server.url, tokens_under_way=200), model)

        def restart() -> None:
            time.sleep(0.3)
            server.kill()
            time.sleep(1.0)
            server.start()

        thread = threading.Thread(target=restart)
        thread.start()
        same(engine.score(requests(60)), wanted)
        thread.join()
        assert engine.pool.servers[0].inspections == 2
        engine.close()


def test_a_server_that_stays_away_ends_the_stage(model: Path) -> None:
    with StubServer(model) as server:
        engine = SglangEngine(config(server.url, patience=1.0), model)
        server.kill()
        with pytest.raises(EngineError, match="waited 1 s"):
            engine.score(requests(5))
        engine.close()


@pytest.mark.parametrize("how", ["path", "weights", "version"])
def test_a_server_replaced_by_another_model_is_never_believed(how: str, model: Path, tmp_path: Path) -> None:
    served = make_model(tmp_path / "served", layers=1, max_position_embeddings=512)
    with StubServer(served) as server:
        engine = SglangEngine(config(server.url), served)
        engine.score(requests(3))
        server.kill()
        if how == "weights":  # other weights in the same folder, loaded by the new server
            make_model(served, seed=9, layers=1, max_position_embeddings=512)
        other = StubServer(model if how == "path" else served, *(["--weight-version", "2"] if how == "version" else []), port=server.port)
        with other, pytest.raises(LineageError):
            engine.score(requests(3))
        engine.close()


def test_an_unnoticed_restart_between_two_answers_is_found_before_the_part_is_kept(model: Path, wanted: list[np.ndarray]) -> None:
    """No request fails: the server is replaced while none is under way. What it answered is asked again."""
    server = StubServer(model)
    server.start()
    engine = SglangEngine(config(server.url, tokens_under_way=1), model)  # one request at a time
    seen = 0

    def restart_once(tokens: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 30:  # in the client's thread: nothing else is sent meanwhile
            server.kill()
            server.start()

    same(engine.score(requests(60), 0, restart_once), wanted)
    assert seen > 60 or engine.pool.servers[0].inspections == 2  # asked again, or the restart was noticed by a failed request
    engine.close()
    server.kill()


def test_servers_that_differ_are_refused(model: Path, tmp_path: Path) -> None:
    with StubServer(model) as first, StubServer(model, "--tp-size", "2") as second, pytest.raises(EngineError, match="differ in tp_size"):
        SglangEngine(config(first.url, second.url), model)


def test_log_probs_of_samples_are_at_temperature_1(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variable that a launched server gets no scoring pass is needed; without it the client finds out and makes one."""
    prompts = [GenerateRequest(request.tokens, number, 0) for number, request in enumerate(requests(4))]
    monkeypatch.delenv("SGLANG_RETURN_ORIGINAL_LOGPROB", raising=False)
    with StubServer(model) as server:
        scaled = SglangEngine(config(server.url), model)
        before = server.facts()["num_posts"]
        want = scaled.generate(prompts, SAMPLING)
        assert server.facts()["num_posts"] - before == 8
        scaled.close()
    engine = launch(model, tmp_path)
    assert engine.pool.servers[0].identity is not None
    assert engine.pool.servers[0].identity.unscaled_logp
    for left, right in zip(want, engine.generate(prompts, SAMPLING), strict=True):
        np.testing.assert_array_equal(left.tokens, right.tokens)
        np.testing.assert_array_equal(left.logp, right.logp)
    engine.close()


def test_launched_servers_are_started_again_and_end_with_the_engine(model: Path, tmp_path: Path, wanted: list[np.ndarray]) -> None:
    engine = launch(model, tmp_path, "--delay", "0.05", servers=2)
    processes = [server.process for server in engine.pool.servers]
    pids = [process.pid for process in processes if process is not None and process.pid is not None]
    assert len(list(tmp_path.glob("sglang-*.log"))) == 2
    os.kill(pids[0], signal.SIGKILL)
    same(engine.score(requests(60)), wanted)
    end = time.monotonic() + 60
    while not all(server.up for server in engine.pool.servers):
        assert time.monotonic() < end
        time.sleep(0.1)
    pids += [process.pid for process in processes if process is not None and process.pid is not None]
    engine.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_other_weights_are_loaded_in_place_and_stay_when_a_server_is_started_again(
    model: Path, tmp_path: Path, wanted: list[np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(tmp_path / "other", layers=1, max_position_embeddings=512, seed=3)
    with StubServer(other) as server:
        fresh = SglangEngine(config(server.url), other)
        want = [scores.logp for scores in fresh.score(requests(60))]
        fresh.close()
    assert not any(np.array_equal(left, right) for left, right in zip(want, wanted, strict=True))
    engine = launch(model, tmp_path, servers=2)
    processes = [server.process for server in engine.pool.servers if server.process is not None]
    pids = [process.pid for process in processes]
    same(engine.score(requests(60)), wanted)
    engine.load(other)
    assert [process.pid for process in processes] == pids
    assert engine.fingerprint.weights_sha256 == fresh.fingerprint.weights_sha256
    same(engine.score(requests(60)), want)
    os.kill(pids[0] or 0, signal.SIGKILL)  # it comes back with what it had last
    same(engine.score(requests(60)), want)
    os.kill(processes[1].pid or 0, signal.SIGKILL)
    engine.load(model)  # one that can't be asked is started with them
    same(engine.score(requests(60)), wanted)
    capsys.readouterr()
    engine.load(model)
    assert capsys.readouterr().out.count("gives the very same log-probabilities") == 2
    with pytest.raises(LineageError, match="another vocabulary"):
        engine.load(make_model(tmp_path / "vocabulary", layers=1, vocab=400))
    engine.close()


@pytest.mark.parametrize(
    ("script", "lost"),
    [
        ("kill -9 $$", True),
        (
            "echo 'RuntimeError: CUDA error: uncorrectable ECC error encountered'; echo 'Received sigquit from a child process.'; kill -9 $$",
            True,
        ),
        ("echo 'NCCL error: unhandled system error'; exit 1", True),
        ("echo 'ValueError: x'; echo 'Received sigquit from a child process.'; kill -9 $$", False),
        ("echo 'torch.OutOfMemoryError: CUDA out of memory'; kill -9 $$", False),
        ("echo 'CUDA error: invalid device ordinal'; exit 1", False),
    ],
)
def test_a_server_that_dies_by_its_node_may_be_tried_on_another(model: Path, tmp_path: Path, script: str, lost: bool) -> None:
    with pytest.raises(EngineError) as raised:
        launch(model, tmp_path, command=["bash", "-c", script], restarts=0)
    assert (type(raised.value) is ServersLost) is lost


def test_a_launched_server_that_dies_at_once_says_why(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('no GPU to be found'); sys.exit(7)"]
    with pytest.raises(EngineError, match=r"exited with code 7(.|\n)*no GPU to be found(.|\n)*started 2 times"):
        launch(model, tmp_path, command=command, restarts=1)
    with pytest.raises(EngineError, match="no such program"):
        launch(model, tmp_path, command=["/no/such/program"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([sys.executable, "-m", "sglang.launch_server"], r"has no SGLang; install it there, or say with engine\.launch\.command"),
        (["bash", "-c", "no-such-program-at-all"], r"engine\.launch\.command names a program that is not there"),
        (["bash", "-c", "/dev/null"], r"engine\.launch\.command names a program that can't be run"),
    ],
)
def test_a_server_that_can_t_ever_start_is_started_once(model: Path, tmp_path: Path, command: list[str], message: str) -> None:
    assert importlib.util.find_spec("sglang") is None, "the environment of these tests has no SGLang"
    with pytest.raises(EngineError, match=message):
        launch(model, tmp_path, command=command, restarts=3)
    (log,) = tmp_path.glob("sglang-*.log")
    assert len(log.read_text().splitlines()) == 1, "one line a start"


def test_a_request_that_ends_servers_ends_the_stage(model: Path, tmp_path: Path) -> None:
    engine = launch(model, tmp_path, "--poison", "299:exit", restarts=1)
    with pytest.raises(EngineError, match="exited with code 134"):
        engine.score([*requests(3), poisoned(299)])
    engine.close()


def test_launched_servers_end_when_the_client_is_killed(model: Path, tmp_path: Path) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from serve.test_servers import launch
engine = launch(Path({str(model)!r}), Path({str(tmp_path)!r}))
print(engine.pool.servers[0].process.pid, flush=True)
time.sleep(600)
"""
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    lines = iter(client.stdout.readline, "")
    pid = next(int(line) for line in lines if line.strip().isdigit())
    assert Path(f"/proc/{pid}").exists()
    client.kill()
    client.wait()
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < end, "the server outlived its client"
        time.sleep(0.1)
