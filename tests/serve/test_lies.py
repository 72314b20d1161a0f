"""A server that lies: of another request, with other values, with other bytes. Nothing of it is kept, nothing ends in a traceback or hangs."""

from __future__ import annotations

import asyncio
import base64
import gzip
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from serve.lying_server import LyingServer, response
from tiny_models import make_model

from megatron_opd.errors import EngineError, LineageError, UserError
from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.records import Finish, SamplingParams
from megatron_opd.serve import sglang
from megatron_opd.serve.engine import GenerateRequest, ScoreRequest
from megatron_opd.serve.sglang import SglangEngine

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=8)
TOP_K = 3
PROMPT = np.array([5, 6, 7, 9], np.int32)
SCORED = ScoreRequest(np.array([5, 6, 7, 9, 11], np.int32), 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny", layers=1, max_position_embeddings=512)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[LyingServer]:
    with LyingServer(model) as server:
        yield server


@pytest.fixture(scope="module")
def engine(server: LyingServer, model: Path) -> Iterator[SglangEngine]:
    engine = SglangEngine(config(server.url), model)
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "BACKOFF_SECONDS", 0.01)


def config(url: str, **changes: Any) -> EngineConfig:
    return EngineConfig.model_validate({"urls": [url], "dtype": "float32", "timeout": 30.0, "patience": 5.0, "retries": 1} | changes)


def is_refused(server: LyingServer, engine: SglangEngine, *, score: bool, **told: Any) -> str:
    """Told once the lie is asked again and the truth is kept; told always it ends in one short line, which is returned."""

    def ask() -> list[Any]:
        if score:
            (scores,) = engine.score([SCORED], TOP_K)
            return [scores.logp.tobytes(), scores.topk_ids.tobytes(), scores.topk_logp.tobytes()]  # pyright: ignore[reportOptionalMemberAccess]
        (generated,) = engine.generate([GenerateRequest(PROMPT, 0, 0)], SAMPLING)
        return [generated.tokens.tobytes(), generated.logp.tobytes(), generated.finish]

    server.tell()
    truth = ask()
    server.tell(**told, times=1)
    assert ask() == truth
    assert server.times is not None
    assert server.times < 0, "the lie was believed"
    server.tell(**told)
    with pytest.raises(UserError) as caught:
        ask()
    server.tell()
    assert ask() == truth
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 2000
    return message


def meta(**changes: Any) -> Any:
    """A lie: fields of meta_info."""
    return lambda request, answer: answer | {"meta_info": answer["meta_info"] | changes}


def entry(field: str, place: int, value: Any) -> Any:
    """A lie: number `place` of the last entry of a list of log-probs."""

    def change(request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        answer["meta_info"][field][-1][place] = value
        return answer

    return change


def candidates(change: Any) -> Any:
    """A lie: `change` of the candidates' (ids, log-probs) of the first position."""

    def told(request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        found = answer["meta_info"]
        names = {"idx": "<i4", "val": "<f4"}
        arrays = [
            np.frombuffer(base64.b64decode(found[f"input_top_logprobs_{name}_flat_b64"]), dtype).reshape(-1, TOP_K).copy()
            for name, dtype in names.items()
        ]
        change(arrays[0][0], arrays[1][0], found["input_token_logprobs"][1])
        for name, array in zip(names, arrays, strict=True):
            found[f"input_top_logprobs_{name}_flat_b64"] = base64.b64encode(array.tobytes()).decode()
        return answer

    return told


def repeat_first(ids: np.ndarray, logp: np.ndarray, own: list[Any]) -> None:
    ids[1] = ids[0]


def swap(ids: np.ndarray, logp: np.ndarray, own: list[Any]) -> None:
    logp[:] = logp[::-1].copy()


def too_likely(ids: np.ndarray, logp: np.ndarray, own: list[Any]) -> None:
    logp[:] = -0.5


def contradict(ids: np.ndarray, logp: np.ndarray, own: list[Any]) -> None:
    ids[0], logp[0] = own[1], -0.45


def leave_out(ids: np.ndarray, logp: np.ndarray, own: list[Any]) -> None:
    ids[:] = [id for id in range(20, 24) if id != own[1]][:TOP_K]
    logp[:] = [-1.0, -1.5, own[0] - 4.0]


VALUES = ["-1.5", False, True, 1e-7, 0.25, -1000.5, -9999, -3.4e38, 1e300, None, [-1.0], {}, 10**25]


@pytest.mark.parametrize("field", ["input_token_logprobs", "output_token_logprobs"])
def test_what_is_no_log_probability_is_refused(field: str, server: LyingServer, engine: SglangEngine) -> None:
    score = field.startswith("input")
    for value in VALUES:
        is_refused(server, engine, score=score, lie=entry(field, 0, value))
    for token in ("5", 5.0, True, None, -1, 512, 10**25):
        is_refused(server, engine, score=score, lie=entry(field, 1, token))
    for odd in (b"NaN", b"Infinity", b"-Infinity", b"1e999"):
        is_refused(
            server,
            engine,
            score=score,
            lie=lambda request, answer, odd=odd: orjson.dumps(entry(field, 0, 77)(request, answer)).replace(b"77", odd),
        )
    lists = {
        "short": lambda rows: rows[:-1],
        "long": lambda rows: [*rows, rows[-1]],
        "null": lambda rows: None,
        "text": lambda rows: "x" * len(rows),
    }
    for change in lists.values():
        is_refused(
            server,
            engine,
            score=score,
            lie=lambda request, answer, change=change: meta(**{field: change(answer["meta_info"][field])})(request, answer),
        )


@pytest.mark.parametrize("score", [False, True])
def test_an_answer_belongs_to_its_request(score: bool, server: LyingServer, engine: SglangEngine) -> None:
    """Two answers that were swapped, one that comes twice or late, and one to another prompt are all of another id, or length."""
    earlier: list[Any] = []

    def late(request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        earlier.append(answer)
        return earlier[-2] if len(earlier) > 1 else earlier[0] | {"meta_info": earlier[0]["meta_info"] | {"id": "0" * 32}}

    assert "is to the request" in is_refused(server, engine, score=score, lie=late)
    for other in (None, "", 7, ["x"], "\x1b[31m" * 1000):
        assert "\x1b" not in is_refused(server, engine, score=score, lie=meta(id=other))
    for count in (3, 6, None, "4", 4.0, True, -1):
        assert "prompt of" in is_refused(server, engine, score=score, lie=meta(prompt_tokens=count))
    for reason in (None, "stop", {}, {"type": "new"}, {"type": ["stop"]}, {"type": "abort"}, {"type": "abort", "message": ["a"] * 10**5}):
        is_refused(server, engine, score=score, lie=meta(finish_reason=reason))
    for whole in ({}, {"meta_info": None}, {"meta_info": []}, {"error": {"message": "no"}}):
        is_refused(server, engine, score=score, lie=lambda request, answer, whole=whole: whole)


def test_a_response_is_as_long_as_it_says(server: LyingServer, engine: SglangEngine) -> None:
    def with_tokens(tokens: Any, reason: dict[str, Any]) -> Any:
        def change(request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
            rows = [[-1.0, token, None] for token in tokens] if isinstance(tokens, list) else []
            return meta(finish_reason=reason, output_token_logprobs=rows)(request, answer | {"output_ids": tokens})

        return change

    stop, length = {"type": "stop", "matched": 1}, {"type": "length", "length": 8}
    for tokens in ([5] * 50 + [1], [5, 6], [], None, "abc", [5.0, 1], ["5", 1], [True, 1], [-1, 1], [10**6, 1], [5, 1, 6, 1], {"0": 5}):
        is_refused(server, engine, score=False, lie=with_tokens(tokens, stop))
    for tokens in ([5] * 7, [5] * 9, [5] * 6 + [1, 5]):
        is_refused(server, engine, score=False, lie=with_tokens(tokens, length))
    server.tell(lie=with_tokens([5] * 7 + [1], length))  # both hold, and versions of SGLang differ in which they say
    (generated,) = engine.generate([GenerateRequest(PROMPT, 0, 0)], SAMPLING)
    assert generated.finish is Finish.STOP
    server.tell()
    is_refused(server, engine, score=False, lie=with_tokens([5, 1], {"type": "stop", "matched": "NaN happened"}))


def test_candidates_are_of_one_distribution(server: LyingServer, engine: SglangEngine) -> None:
    for change in (repeat_first, swap, too_likely, contradict, leave_out):
        assert "top-k candidate" in is_refused(server, engine, score=True, lie=candidates(change))
    name = "input_top_logprobs_val_flat_b64"
    for field, value in (
        (name, "!!"),
        (name, 7),
        (name, ""),
        ("input_top_logprobs_shape", [-1]),
        ("input_top_logprobs_shape", [3, 3, "x"]),
        ("input_top_logprobs_shape", [10**18, 3]),
    ):
        is_refused(server, engine, score=True, lie=meta(**{field: value}))
    row = [[-0.5, 20, None], [-1.5, 21, None], [-2.5, 22, None]]

    def nested(rows: Any) -> Any:
        def change(request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
            answer["meta_info"].pop(name)
            return meta(input_top_logprobs=rows)(request, answer)

        return change

    for rows in ([None, row, row], [None, row, None, row], [None, row, row[:2], row], [None, row, row, ["x"] * 3], [], None, "abc"):
        is_refused(server, engine, score=True, lie=nested(rows))


async def one_byte_a_second(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(response(content)[: -len(content)])
    for byte in content:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(1.0)


async def endless(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"100000\r\n" + b"[" * (1 << 20) + b"\r\n")
        await writer.drain()


async def endless_head(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X-Field: " + b"x" * 1000 + b"\r\n")
        await writer.drain()


async def half(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(response(content)[: -len(content) // 2])
    writer.close()


async def silence(writer: asyncio.StreamWriter, content: bytes) -> None:
    await asyncio.sleep(3600)


def write(data: bytes) -> Any:
    async def trick(writer: asyncio.StreamWriter, content: bytes) -> None:
        writer.write(data)
        if not data.startswith(b"HTTP/1.1") or b"Content-Length" not in data:
            writer.close()

    return trick


BOMB = gzip.compress(b" " * (1 << 26))
BYTES = {
    "html": response(b"<html>a login page</html>"),
    "empty": response(b""),
    "cut": response(b'{"meta_info": {"id":'),
    "array": response(b"[1, 2]"),
    "deep": response(b"[" * 100_000),
    "deep object": response(b'{"meta_info":' * 100_000),
    "latin": response(b'{"a": "\xff"}'),
    "bomb": response(BOMB, "200 OK", "Content-Encoding: gzip"),
    "deflate": response(b"{}", "200 OK", "Content-Encoding: deflate"),
    "long": response(b" " * (1 << 20)),
    "claims to be long": b"HTTP/1.1 200 OK\r\nContent-Length: 3000000000\r\n\r\n{",
    "bad length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 5\r\n\r\n{}",
    "bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "long line": response(b"{}", "200 OK", "X-Field: " + "x" * 100_000),
    "many fields": response(b"{}", "200 OK", *(f"X-{number}: y" for number in range(5000))),
    "cookie": response(b"{}", "200 OK", "Set-Cookie: =;;\x01 x"),
    "404": response(b'{"detail": "Not Found"}', "404 Not Found"),
    "405": response(b"", "405 " + "x" * 2000),
    "408": response(b"", "408 Request Timeout"),
    "429": response(b"slow down", "429 Too Many Requests", "Retry-After: 0"),
    "429 date": response(b"slow down", "429 Too Many Requests", "Retry-After: Wed, 21 Oct 2099 07:28:00 GMT"),
    "502": response(b"\x1b[2J<html>bad gateway</html>", "502 Bad Gateway"),
    "503": response(b'{"error": {"message": {"a": [1]}}}', "503 Service Unavailable", "Retry-After: -1"),
    "204": response(b"", "204 No Content"),
    "206": response(b"{}", "206 Partial Content"),
    "999": response(b"{}", "999 What"),
}


@pytest.mark.parametrize("name", BYTES)
def test_what_is_no_answer_is_asked_again(name: str, server: LyingServer, engine: SglangEngine) -> None:
    message = is_refused(server, engine, score=name < "c", trick=write(BYTES[name]))
    assert "\x1b" not in message


@pytest.mark.parametrize("trick", [one_byte_a_second, endless, endless_head, half, silence])
def test_a_deadline_holds_and_memory_is_bounded(trick: Any, server: LyingServer, model: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine = SglangEngine(config(server.url, timeout=1.0), model)
    started = time.monotonic()
    is_refused(server, engine, score=True, trick=trick)
    assert time.monotonic() - started < 30.0
    engine.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


def test_a_redirect_is_never_followed(server: LyingServer, engine: SglangEngine) -> None:
    for status in (301, 302, 303, 307, 308):
        location = f"Location: http://user:secret@elsewhere.example:8000/generate?key=secret{server.url}"
        server.tell(trick=write(response(b"", f"{status} Moved", location)))
        with pytest.raises(EngineError, match=r"a redirect to elsewhere\.example:8000, which is never followed") as caught:
            engine.score([SCORED])
        assert "secret" not in str(caught.value)
    server.tell(trick=write(response(b"", "307 Moved", "Location: http://[")))
    with pytest.raises(EngineError, match="a redirect, which is never followed"):
        engine.score([SCORED])
    server.tell()


def test_a_server_that_wants_a_key_ends_the_stage_at_once(server: LyingServer, engine: SglangEngine) -> None:
    for status in (401, 403):
        before = server.num_posts
        server.tell(trick=write(response(b'{"error": "Unauthorized"}', f"{status} No")))
        with pytest.raises(EngineError, match=rf"answered {status}: Unauthorized; this client sends no keys"):
            engine.score([SCORED])
        assert server.num_posts == before + 1
    server.tell()


def test_a_server_that_asks_to_wait_is_given_the_time(server: LyingServer, engine: SglangEngine) -> None:
    server.tell(trick=write(response(b"", "429 Too Many Requests", "Retry-After: 1")), times=1)
    started = time.monotonic()
    engine.score([SCORED])
    assert time.monotonic() - started >= 1.0
    server.tell()


ODD = [-7, 0, "2", None, 2.5, True, [], {}, "x" * 10**6, 10**30, "\x1b[31m", ["a"] * 1000, {"a": {"b": 1}}]
WORTH = {  # values that a server may give
    "model_path": [],
    "is_generation": [True],
    "load_format": ["2", None],
    "weight_version": [-7, 0, "2", None],
    "preferred_sampling_params": [0, None, [], {}],
    "version": ["2"],
    "max_req_input_len": [],
    "tp_size": [None],
    "dp_size": [None],
    "dtype": [],
    "device": ["2", None],
    "startup_time": ODD,
    "quantization": [-7, 0, "2", None, True],
}


@pytest.mark.parametrize("field", WORTH)
def test_a_server_describes_itself_in_the_right_types(field: str, server: LyingServer, model: Path) -> None:
    for value in ODD:
        told = orjson.dumps(value) if value != 10**30 else b"1" + b"0" * 30
        for path in ("/model_info", "/server_info"):
            honest = orjson.dumps(server.stub.get(path)[1] | {field: "HERE"})
            server.infos[path] = response(honest.replace(b'"HERE"', told))
        if any(value is worth or (type(value) is type(worth) and value == worth) for worth in WORTH[field]):
            SglangEngine(config(server.url, patience=0.0), model).close()
            continue
        with pytest.raises((EngineError, LineageError)) as caught:
            SglangEngine(config(server.url, patience=0.0), model)
        message = str(caught.value)
        assert "\n" not in message
        assert "\x1b" not in message
        assert len(message) < 2000
    server.infos.clear()


def test_what_is_no_description_is_asked_again_and_then_refused(server: LyingServer, model: Path) -> None:
    for name, data in BYTES.items():
        if "Content-Length" in data[:200].decode("latin1") and name not in ("claims to be long", "429", "429 date", "408", "502", "503"):
            for path in ("/model_info", "/server_info"):
                server.infos[path] = data
                with pytest.raises(EngineError):
                    SglangEngine(config(server.url, timeout=1.0, patience=0.0), model)
                server.infos.clear()
    SglangEngine(config(server.url), model).close()
