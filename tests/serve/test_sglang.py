"""The SGLang engine against the real server on a CPU: conformance, servers that are not the right ones, and a network that fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from serve.engine_conformance import (
    CHECKS,
    CONTEXT_LENGTH,
    TOLERANCE,
    VOCAB_SIZE,
    Reference,
    random_prompts,
    random_score_requests,
    scores_agree_with_reference,
    write_model,
)
from serve.faulty_proxy import FaultyProxy
from serve.sglang_server import HOW_TO_INSTALL, SglangServer, sglang_python

from megatron_opd.errors import EngineError, LineageError
from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.records import SamplingParams
from megatron_opd.serve.engine import GenerateRequest, ScoreRequest
from megatron_opd.serve.opening import open_engine
from megatron_opd.serve.sglang import SglangEngine

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    if sglang_python() is None:
        pytest.skip(HOW_TO_INSTALL)
    folder = tmp_path_factory.mktemp("sglang")
    with SglangServer(write_model(folder / "tiny"), folder) as server:
        yield server


@pytest.fixture(scope="module")
def reference(server: SglangServer) -> Reference:
    return Reference(server.model)


@pytest.fixture(scope="module")
def engine(server: SglangServer) -> Iterator[SglangEngine]:
    engine = SglangEngine(_config(server.url), server.model)
    yield engine
    engine.close()


@pytest.fixture
def proxy(server: SglangServer) -> Iterator[FaultyProxy]:
    with FaultyProxy(server.url) as proxy:
        yield proxy


def _config(*urls: str, **changes) -> EngineConfig:
    return EngineConfig.model_validate(
        {"urls": list(urls), "tokens_under_way": 2048, "timeout": 120.0, "retries": 1, "patience": 20.0} | changes
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, engine: SglangEngine, reference: Reference, server: SglangServer) -> None:
    check(engine, reference)
    assert server.alive()


def test_an_answer_has_the_id_of_its_request(server: SglangServer) -> None:
    """What the client relies on: `rid` comes back as meta_info.id, and no log-prob is above 0."""
    body = {"input_ids": [3, 4, 5], "return_logprob": True, "logprob_start_len": 0, "sampling_params": {"max_new_tokens": 4}}
    for rid in ("0123456789abcdef" * 2, "another"):
        meta = httpx.post(f"{server.url}/generate", json={**body, "rid": rid}, timeout=60.0, trust_env=False).json()["meta_info"]
        assert (meta["id"], meta["prompt_tokens"]) == (rid, 3)
        assert all(logp <= 0 for logp, *_ in meta["input_token_logprobs"][1:] + meta["output_token_logprobs"])


def test_open_engine_chooses_sglang_when_urls_are_given(server: SglangServer) -> None:
    engine = open_engine(_config(server.url + "/"), server.model)
    assert isinstance(engine, SglangEngine)
    assert engine.context_length == CONTEXT_LENGTH - 7
    engine.close()


def test_another_model_is_refused_and_a_link_to_the_same_is_not(server: SglangServer, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1)
    with pytest.raises(LineageError) as caught:
        SglangEngine(_config(server.url), other)
    assert str(other) in str(caught.value)
    assert str(server.model) in str(caught.value)
    link = tmp_path / "link"
    link.symlink_to(server.model)
    SglangEngine(_config(server.url), link).close()


def test_settings_that_the_server_does_not_meet_are_refused(server: SglangServer) -> None:
    with pytest.raises(EngineError, match=r"float32.*bfloat16"):
        SglangEngine(_config(server.url, dtype="bfloat16"), server.model)
    with pytest.raises(EngineError, match=f"{CONTEXT_LENGTH}.*{CONTEXT_LENGTH - 7}"):
        SglangEngine(_config(server.url, context_length=CONTEXT_LENGTH), server.model)
    engine = SglangEngine(_config(server.url, dtype="float32", context_length=50), server.model)
    assert engine.context_length == 50
    engine.close()


def test_a_refusal_by_the_server_is_passed_on_at_once(proxy: FaultyProxy, server: SglangServer) -> None:
    engine = SglangEngine(_config(proxy.url, retries=5), server.model)
    engine.context_length = 10 * CONTEXT_LENGTH  # past our own check, to hear the server's
    before = proxy.num_posts
    with pytest.raises(EngineError, match=f"request 1: .*400: .*{CONTEXT_LENGTH + 1} tokens.*context length"):
        engine.score([ScoreRequest(np.ones(length, np.int32), 1) for length in (5, CONTEXT_LENGTH + 1)])
    assert proxy.num_posts - before == 2  # no retries
    engine.close()
    assert server.alive()


def test_bad_ids_never_reach_the_server(proxy: FaultyProxy, server: SglangServer, reference: Reference) -> None:
    engine = SglangEngine(_config(proxy.url), server.model)
    before = proxy.num_posts
    for tokens in ([3, VOCAB_SIZE], [3, -1]):
        with pytest.raises(EngineError, match="vocabulary"):
            engine.score([ScoreRequest(np.array([3, 4], np.int32), 1), ScoreRequest(np.array(tokens, np.int32), 1)])
    assert proxy.num_posts == before
    scores_agree_with_reference(engine, reference)
    engine.close()


@pytest.mark.parametrize("fault", ["reset", "503", "hang", "html"])
def test_a_passing_failure_is_retried(fault, proxy: FaultyProxy, server: SglangServer, reference: Reference) -> None:
    engine = SglangEngine(_config(proxy.url, timeout=5.0), server.model)
    proxy.faults = [fault]
    scores_agree_with_reference(engine, reference)
    assert not proxy.faults
    assert proxy.num_posts > len(random_score_requests())
    engine.close()


def test_a_refusal_is_not_retried(proxy: FaultyProxy, server: SglangServer) -> None:
    engine = SglangEngine(_config(proxy.url, tokens_under_way=1), server.model)
    proxy.faults = ["400"]
    before = proxy.num_posts
    with pytest.raises(EngineError, match="made to fail"):
        engine.score(random_score_requests())
    assert proxy.num_posts - before == 1
    engine.close()


def test_a_server_that_goes_away_is_given_up_and_the_others_are_cancelled(proxy: FaultyProxy, server: SglangServer) -> None:
    engine = SglangEngine(_config(proxy.url, patience=2.0), server.model)
    proxy.down = True
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"request \d+.*waited 2 s"):
        engine.generate(
            [GenerateRequest(prompt, number, 0) for number, prompt in enumerate(random_prompts(200))], SamplingParams(max_new_tokens=4)
        )
    assert time.monotonic() - started < 60.0
    engine.close()


def test_another_server_takes_over(proxy: FaultyProxy, server: SglangServer, reference: Reference) -> None:
    with FaultyProxy(server.url) as second:
        engine = SglangEngine(_config(proxy.url, second.url, tokens_under_way=256), server.model)
        scores_agree_with_reference(engine, reference)
        assert proxy.num_posts > 3
        assert second.num_posts > 3
        assert engine.describe()["num_servers"] == 2
        proxy.down = True
        scores_agree_with_reference(engine, reference)
        assert [one.up for one in engine.pool.servers] == [False, True]
        assert all(one.outstanding == 0 for one in engine.pool.servers)
        engine.close()


def test_an_error_leaves_the_engine_usable(engine: SglangEngine, reference: Reference) -> None:
    def fail(num_tokens: int) -> None:
        raise RuntimeError("from the caller's progress function")

    with pytest.raises(RuntimeError, match="progress function"):
        engine.score(random_score_requests(), 0, fail)
    scores_agree_with_reference(engine, reference)


def test_weights_that_change_during_a_run_are_noticed(server: SglangServer, reference: Reference) -> None:
    """The last test of this module: it changes the server's state (the same weights under another version)."""
    engine = SglangEngine(_config(server.url), server.model)
    answer = httpx.post(
        f"{server.url}/update_weights_from_disk",
        json={"model_path": str(server.model), "weight_version": "second"},
        timeout=60.0,
        trust_env=False,
    )
    assert answer.status_code == 200, answer.text
    with pytest.raises(LineageError, match="second"):
        engine.score([ScoreRequest(np.array([3, 4, 5], np.int32), 1)])
    engine.close()
    again = SglangEngine(_config(server.url), server.model)
    (scores,) = again.score([ScoreRequest(np.array([3, 4, 5], np.int32), 1)])
    np.testing.assert_allclose(scores.logp[1:], reference.logp(np.array([3, 4, 5]))[1:], atol=TOLERANCE)
    again.close()


def test_the_real_server_loads_other_weights_in_place(server: SglangServer, reference: Reference, tmp_path: Path) -> None:
    """And is then the other model to our own checks, until it has loaded the first again."""
    other = Reference(write_model(tmp_path / "other", seed=1))
    engine = SglangEngine(_config(server.url), server.model)
    engine.load(other.directory)
    scores_agree_with_reference(engine, other)
    with pytest.raises(LineageError, match="serves"):
        SglangEngine(_config(server.url), server.model)
    engine.load(server.model)
    scores_agree_with_reference(engine, reference)
    engine.close()
