"""What the SGLang engine does without a server: refuses addresses, gives up on dead ones, balances, and checks answers."""

from __future__ import annotations

import base64
import copy
import math
import re
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve.engine_conformance import write_model
from serve.faulty_proxy import FaultyProxy

from megatron_opd.errors import ConfigError, EngineError
from megatron_opd.recipe.files import load_recipe
from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.records import Finish
from megatron_opd.serve.engine import ScoreRequest
from megatron_opd.serve.identity import served_dtype
from megatron_opd.serve.pool import Balancer, Server
from megatron_opd.serve.sglang import SglangEngine
from megatron_opd.serve.sglang_answers import WrongAnswer, check_answers, read_generated, read_scores


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def test_a_dead_address_is_given_up_within_the_patience(model: Path) -> None:
    with socket.socket() as listener:  # bound but not listening: connections are refused
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(EngineError, match=rf"{url}.*waited 1 s"):
            SglangEngine(EngineConfig(urls=[url], patience=1.0), model)
        assert 0.9 < time.monotonic() - started < 60.0


def test_a_server_that_accepts_and_never_answers_is_given_up(model: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        started = time.monotonic()
        with pytest.raises(EngineError, match="no answer to /model_info within 1 s"):
            SglangEngine(EngineConfig(urls=[f"http://127.0.0.1:{listener.getsockname()[1]}"], patience=0, timeout=1.0), model)
        assert time.monotonic() - started < 60.0


def test_something_else_at_the_address(model: Path) -> None:
    with FaultyProxy("http://127.0.0.1:9") as proxy, pytest.raises(EngineError, match=f"{proxy.url}: .*50[0-9]"):  # nothing listens there
        SglangEngine(EngineConfig(urls=[proxy.url], patience=0, timeout=5.0), model)


@pytest.mark.parametrize(
    "url",
    [
        *("127.0.0.1:30000", "ftp://host", "http://", "http://host:port", "http://host:99999", "http://[", "http://ho st"),
        *("http://user:secret@host:1", "http://secret@host", "http://user:secret@host:port", "user:secret@host:1", "//user:secret@host"),
        *("http://host/?key=secret", "http://host#secret", "http://user:secret@[", "ftp://user:secret@host?secret"),
    ],
)
def test_what_is_not_an_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", [f"engine.urls={[url]!r}"])
    assert "engine: " in str(caught.value)
    assert "urls: " in str(caught.value)
    assert "secret" not in str(caught.value)


def test_dtype_of_a_server() -> None:
    assert served_dtype("auto", {"dtype": "bfloat16"}) == "bfloat16"
    assert served_dtype("auto", {"torch_dtype": "float16"}) == "float16"
    assert served_dtype("bfloat16", {"dtype": "float32"}) == "bfloat16"
    assert served_dtype("half", {}) == "float16"
    for hf_config in ({}, {"dtype": "float32"}, {"dtype": None, "torch_dtype": "float32"}):
        with pytest.raises(EngineError, match="float16"):
            served_dtype("auto", hf_config)


def test_balancer_prefers_the_least_busy_and_keeps_a_prompt_together() -> None:
    first, second = Server("http://a"), Server("http://b")
    balancer = Balancer([first, second])
    first.outstanding = 100
    assert balancer.choose(b"prompt") is second
    second.outstanding = 140
    assert balancer.choose(b"prompt") is second  # at home, though a little busier
    assert balancer.choose(b"other") is first
    second.outstanding = 160
    assert balancer.choose(b"prompt") is first  # too busy: the prompt moves
    assert balancer.choose(b"prompt") is first


def test_balancer_leaves_a_failed_server_alone_while_others_work() -> None:
    first, second = Server("http://a"), Server("http://b", outstanding=1000)
    balancer = Balancer([first, second])
    assert balancer.choose(b"prompt") is first
    first.resting_until = math.inf
    assert balancer.choose(b"prompt") is second
    second.resting_until = math.inf
    assert balancer.choose(b"prompt") is first  # none works: the least busy


# Answers as SGLang 0.5.23 gives them: to tokens [7, 511, 3, 9] scored from 2 with two candidates, and a response [5, 1].
REQUEST = ScoreRequest(np.array([7, 511, 3, 9], np.int32), 2)
SCORED: dict[str, Any] = {
    "output_ids": [],
    "meta_info": {
        "finish_reason": {"type": "length", "length": 0},
        "input_token_logprobs": [[None, 0, None], [-1.5, 3, None], [-0.25, 9, None]],
        "input_top_logprobs_val_flat_b64": base64.b64encode(np.array([-0.5, -1.5, -0.25, -3.0], np.float32).tobytes()).decode(),
        "input_top_logprobs_idx_flat_b64": base64.b64encode(np.array([8, 3, 9, 511], np.int32).tobytes()).decode(),
        "input_top_logprobs_val_flat_b64_dtype": "float32",
        "input_top_logprobs_idx_flat_b64_dtype": "int32",
        "input_top_logprobs_shape": [2, 2],
    },
}
GENERATED: dict[str, Any] = {
    "output_ids": [5, 1],
    "meta_info": {"finish_reason": {"type": "stop", "matched": 1}, "output_token_logprobs": [[-2.0, 5, None], [-0.5, 1, None]]},
}


def _changed(answer: dict[str, Any], **meta: Any) -> dict[str, Any]:
    changed = copy.deepcopy(answer)
    changed["meta_info"] |= meta
    return changed


def test_scores_are_read_aligned() -> None:
    lists = _changed(SCORED, input_top_logprobs=[None, [[-0.5, 8, None], [-1.5, 3, None]], [[-0.25, 9, None], [-3.0, 511, None]]])
    del lists["meta_info"]["input_top_logprobs_val_flat_b64"]
    for answer in (SCORED, lists):
        scores = read_scores(answer, REQUEST, vocab_size=512, top_k=2)
        np.testing.assert_array_equal(scores.logp, np.array([np.nan, np.nan, -1.5, -0.25], np.float32))
        assert scores.topk_ids is not None
        assert scores.topk_logp is not None
        assert scores.topk_ids.tolist() == [[-1, -1], [-1, -1], [8, 3], [9, 511]]
        np.testing.assert_array_equal(scores.topk_logp[2:], np.array([[-0.5, -1.5], [-0.25, -3.0]], np.float32))
        assert scores.topk_ids.dtype == np.int32
        assert scores.topk_logp.dtype == np.float32


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"input_token_logprobs": [[None, 0, None], [-1.5, 3, None]]}, "2 entries for positions 1 to 3"),
        ({"input_token_logprobs": [[None, 0, None], [-1.5, 3, None], [-0.25, 8, None]]}, "position 3 holds token 9, .* scored token 8"),
        ({"input_token_logprobs": [[None, 6, None], [-1.5, 3, None], [-0.25, 9, None]]}, "position 1 holds token 511, .* scored token 6"),
        ({"input_token_logprobs": [[None, 0, None], [None, 3, None], [-0.25, 9, None]]}, r"logp\[2\] is nan"),
        ({"input_token_logprobs": [[None, 0, None], [-math.inf, 3, None], [-0.25, 9, None]]}, r"logp\[2\] is -inf"),
        ({"input_token_logprobs": [[None, 0, None], [-1.5, 3, None], [0.5, 9, None]]}, r"logp\[3\] is 0.5"),
        ({"input_top_logprobs_shape": [1, 4]}, r"\(1, 4\).* top_k 2"),
        (
            {"input_top_logprobs_idx_flat_b64": base64.b64encode(np.array([8, 3, 9, 512], np.int32).tobytes()).decode()},
            "outside the vocabulary",
        ),
        (
            {"input_top_logprobs_val_flat_b64": base64.b64encode(np.array([8, np.nan, 9, 1], np.float32).tobytes()).decode()},
            "no log-probabilities",
        ),
        ({"input_top_logprobs_val_flat_b64_dtype": "float16"}, "float16"),
    ],
)
def test_wrong_scores_are_refused(meta: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongAnswer) as caught:
        read_scores(_changed(SCORED, **meta), REQUEST, vocab_size=512, top_k=2)
    assert re.search(message, str(caught.value))


def test_responses_are_read() -> None:
    tokens, logp, finish = read_generated(GENERATED, vocab_size=512, max_new_tokens=8, stop_ids=[1], with_logp=True)
    assert tokens.tolist() == [5, 1]
    assert tokens.dtype == np.int32
    assert finish is Finish.STOP
    assert logp is not None
    assert logp.tolist() == [-2.0, -0.5]
    assert logp.dtype == np.float32
    at_limit = _changed(GENERATED, finish_reason={"type": "length", "length": 2})
    tokens, logp, finish = read_generated(at_limit, vocab_size=512, max_new_tokens=2, stop_ids=[9], with_logp=False)
    assert finish is Finish.LENGTH
    assert logp is None


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"finish_reason": {"type": "stop", "matched": "NaN happened"}}, "NaN happened"),
        ({"finish_reason": {"type": "length", "length": 2}}, "after 2 of 8 tokens"),
        ({"output_token_logprobs": [[-2.0, 5, None]]}, "of 1 tokens"),
        ({"output_token_logprobs": [[-2.0, 5, None], [-0.5, 2, None]]}, "not the 2 sampled"),
        ({"output_token_logprobs": [[-2.0, 5, None], [None, 1, None]]}, r"logp\[1\] is nan"),
    ],
)
def test_wrong_responses_are_refused(meta: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongAnswer) as caught:
        read_generated(_changed(GENERATED, **meta), vocab_size=512, max_new_tokens=8, stop_ids=[1], with_logp=True)
    assert re.search(message, str(caught.value))
    with pytest.raises(WrongAnswer, match="vocabulary of 5"):
        read_generated(GENERATED, vocab_size=5, max_new_tokens=8, stop_ids=[1], with_logp=True)


@pytest.mark.parametrize(
    ("stop_ids", "finish", "message"),
    [
        ([9], "stop", r"ended the response by stop, but of the stop ids \[9\] it holds none"),
        ([5, 1], "stop", r"by stop, but of the stop ids \[5, 1\] token 1 of 2 is one"),
        ([5], "length", r"by length, but of the stop ids \[5\] token 1 of 2 is one"),
    ],
)
def test_a_response_ends_at_its_first_stop_id(stop_ids: list[int], finish: str, message: str) -> None:
    answer = _changed(GENERATED, finish_reason={"type": finish, "matched": 1})
    with pytest.raises(WrongAnswer, match=message):
        read_generated(answer, vocab_size=512, max_new_tokens=2, stop_ids=stop_ids, with_logp=True)


def test_aborted_empty_and_other_answers_are_refused() -> None:
    bound = _changed(SCORED, id="mine", prompt_tokens=4)
    check_answers(bound, "mine", 4)
    for meta, message in (
        ({"finish_reason": {"type": "abort", "message": "out of memory"}}, "out of memory"),
        ({"finish_reason": {"type": "new"}}, "unknown finish reason 'new'"),
        ({"id": "another"}, "to the request another, but this was mine"),
        ({"prompt_tokens": 5}, "a prompt of 5 tokens, but 4 were sent"),
    ):
        with pytest.raises(WrongAnswer, match=message):
            check_answers(_changed(bound, **meta), "mine", 4)
    with pytest.raises(WrongAnswer, match="empty"):
        read_generated(GENERATED | {"output_ids": []}, vocab_size=512, max_new_tokens=8, stop_ids=[1], with_logp=True)
