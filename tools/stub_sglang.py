"""A stand-in for an SGLang server: the same addresses and answers, numbers made of a hash; for benchmarks and tests of the client.

    python tools/stub_sglang.py --model-path DIR --port P [--delay S] [--poison ID:KIND[:TIMES]] [--cache]

It takes the options of `python -m sglang.launch_server` that it knows and leaves the others alone, so that `engine.launch` can start
it. logp[t] depends on the weights' bytes, on tokens[:t] and on tokens[t] alone, and its exponentials are a distribution over the
vocabulary; responses also on sampling_seed. `--poison` answers wrongly wherever token ID is among the input, the first TIMES times (by
default always): none, floor, positive, short, echo, id, late, abort, hang, exit, redirect, html, cut, gzip, or a status (404, 429, 500).
`--cache` keeps answers by request, so that a repeated request costs nothing.

Legend: T tokens of a request, R response tokens, K candidates.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gzip
import json
import math
import os
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import orjson

STOP_SHARE = 24  # one response token in so many is the end-of-turn token
_SOME_ID = b"the-id-of-the-request"


class Model:
    """Numbers as a model would give them."""

    def __init__(self, directory: Path):
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self.vocab = int(config["vocab_size"])
        self.eos = int(config.get("eos_token_id") or 0)
        self.context = int(config.get("max_position_embeddings", 1 << 20))
        strides = [stride for stride in range(1, min(self.vocab, 1000)) if math.gcd(stride, self.vocab) == 1]
        self.strides = np.array(strides)
        self.inverses = np.array([pow(stride, -1, self.vocab) for stride in strides])
        self.seed = np.uint64(0)
        for path in sorted(directory.glob("*.safetensors")):
            self.seed = np.uint64(zlib.crc32(path.read_bytes(), int(self.seed)))

    def prefix_hashes(self, tokens_T: np.ndarray) -> np.ndarray:
        """uint64 [T]: row t is of tokens[:t]."""
        each_T = mix(tokens_T.astype(np.uint64) + np.uint64(1) + (np.arange(len(tokens_T), dtype=np.uint64) << np.uint64(32)))
        return np.cumsum(each_T, dtype=np.uint64) - each_T + self.seed

    def logp(self, tokens_T: np.ndarray) -> np.ndarray:
        """float32 [T]: row t is of tokens[t] after tokens[:t]."""
        hashes_T = self.prefix_hashes(tokens_T)
        first_T, stride_T = self._order(hashes_T)
        ranks_T = (tokens_T - first_T) * self.inverses[stride_T] % self.vocab
        return self._value(hashes_T, ranks_T)

    def _order(self, hashes_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [T] each: the likeliest token, and the number of the stride by which the others follow."""
        return (hashes_T % np.uint64(self.vocab)).astype(np.int64), ((hashes_T >> np.uint64(40)) % np.uint64(len(self.strides))).astype(
            np.int64
        )

    def _value(self, hashes: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Log-probs that fall with the rank; even those of infinitely many ranks would sum up to less than one."""
        draws = (mix(hashes + ranks.astype(np.uint64)) >> np.uint64(40)).astype(np.float64) / 2**24
        return (np.log(6 / np.pi**2) - 2 * np.log(ranks + 1.0) - draws / (ranks + 2.0)).astype(np.float32)

    def respond(self, prompt: list[int], max_new: int, seed: int, stop_ids: list[int]) -> list[int]:
        """Ends at the first of `stop_ids`, which are not there if the server is to go on behind them."""
        draws = mix(self.prefix_hashes(np.array([*prompt, seed], np.int64))[-1] + np.arange(max_new, dtype=np.uint64) + np.uint64(seed))
        tokens = (draws % np.uint64(self.vocab)).astype(np.int64)
        tokens[tokens == self.eos] = (self.eos + 1) % self.vocab
        stops = np.flatnonzero((draws >> np.uint64(33)) % np.uint64(STOP_SHARE) == 0)
        if stops.size and stop_ids:
            tokens = tokens[: stops[0] + 1]
            tokens[-1] = self.eos
        ends = np.flatnonzero(np.isin(tokens, stop_ids))
        return (tokens[: ends[0] + 1] if ends.size else tokens).tolist()

    def topk(self, tokens_T: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """int32 and float32 [T,K], ids of a row all different, values falling."""
        hashes_T = self.prefix_hashes(tokens_T)
        first_T, stride_T = self._order(hashes_T)
        ranks_K = np.arange(top_k)
        ids_TK = (first_T[:, None] + ranks_K * self.strides[stride_T][:, None]) % self.vocab
        return ids_TK.astype(np.int32), self._value(hashes_T[:, None], np.broadcast_to(ranks_K, ids_TK.shape))


def mix(values: Any) -> Any:
    """A 64-bit hash of each value (splitmix64)."""
    with np.errstate(over="ignore"):
        values = np.asarray(values, np.uint64)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


class Stub:
    """Answers to requests."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.model = Model(Path(args.model_path))
        self.startup_time = time.time()
        self.cache: dict[bytes, bytes] | None = {} if args.cache else None
        self.tokens_under_way = self.peak_tokens = self.num_posts = 0
        self.earlier = ""
        self.poison: dict[int, list[Any]] = {}
        for entry in args.poison:
            token, kind, *times = entry.split(":")
            self.poison[int(token)] = [kind, int(times[0]) if times else -1]

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        if path in ("/health", "/health_generate"):
            return 200, {}
        if path == "/stub":
            return 200, {"peak_tokens": self.peak_tokens, "num_posts": self.num_posts}
        if path == "/model_info":
            return 200, {
                "model_path": self.args.model_path,
                "weight_version": self.args.weight_version,
                "is_generation": True,
                "load_format": "auto",
            }
        if path == "/server_info":
            facts = {"version": "stub", "dtype": self.args.dtype, "max_req_input_len": self.model.context - 6}
            return 200, facts | {"startup_time": self.startup_time, "tp_size": self.args.tp_size}
        return 404, {"error": {"message": f"no {path} here"}}

    def load(self, body: bytes) -> tuple[int, bytes]:
        """Other weights, in place."""
        directory = orjson.loads(body)["model_path"]
        try:
            self.model, self.args.model_path = Model(Path(directory)), directory
        except OSError as error:
            return 400, orjson.dumps({"success": False, "message": str(error)})
        return 200, orjson.dumps({"success": True, "message": "Succeeded to update model weights."})

    async def post(self, body: bytes) -> tuple[int, bytes]:
        asked, _, rid = body.rpartition(b',"rid":"')  # our client sends the id last
        if self.cache is not None and asked in self.cache:
            return 200, self.cache[asked].replace(_SOME_ID, rid[:-2], 1)
        request = orjson.loads(body)
        tokens = len(request["input_ids"]) + request["sampling_params"]["max_new_tokens"]
        self.num_posts += 1
        self.tokens_under_way += tokens
        self.peak_tokens = max(self.peak_tokens, self.tokens_under_way)
        try:
            await asyncio.sleep(self.args.delay)
            return await self._post(request, asked)
        finally:
            self.tokens_under_way -= tokens

    async def _post(self, request: dict[str, Any], asked: bytes) -> tuple[int, bytes]:
        kind = self._poisoned(request["input_ids"])
        if kind == "exit":
            os._exit(134)
        if kind == "hang":
            await asyncio.sleep(3600)
        if kind is not None and kind.isdecimal():
            return int(kind), orjson.dumps({"error": {"message": "made to fail"}})
        if kind == "redirect":
            return 307, b""
        if kind == "html":
            return 200, b"<html>a login page</html>"
        rid = request.get("rid", "")
        if kind == "late":  # the answer of the request before
            rid, self.earlier = self.earlier, rid
        content = orjson.dumps(self._answer(request, kind), option=orjson.OPT_SERIALIZE_NUMPY)
        if kind in ("cut", "gzip"):
            return 200, content[: len(content) // 2] if kind == "cut" else gzip.compress(content)
        if self.cache is not None:
            self.cache[asked] = content
        return 200, content.replace(_SOME_ID, b"another" if kind == "id" else rid.encode(), 1)

    def _poisoned(self, ids: list[int]) -> str | None:
        for token, poison in self.poison.items():
            if token in ids and poison[1]:
                poison[1] -= 1
                return poison[0]
        return None

    def _answer(self, request: dict[str, Any], kind: str | None) -> dict[str, Any]:
        ids, sampling = request["input_ids"], request["sampling_params"]
        max_new = sampling["max_new_tokens"]
        stop_ids = [] if sampling.get("ignore_eos") else [self.model.eos, *(sampling.get("stop_token_ids") or [])]
        output = self.model.respond(ids, max_new, sampling.get("sampling_seed") or 0, stop_ids) if max_new else []
        meta: dict[str, Any] = {"id": _SOME_ID.decode(), "prompt_tokens": len(ids), "weight_version": self.args.weight_version}
        meta["finish_reason"] = {"type": "stop", "matched": output[-1]} if output and output[-1] in stop_ids else {"type": "length"}
        if kind == "abort":
            meta["finish_reason"] = {"type": "abort", "message": "made to abort"}
        if request.get("return_logprob"):
            tokens_T = np.array([*ids, *output], np.int64)
            logp = self.model.logp(tokens_T)
            scale = (
                1.0 if os.environ.get("SGLANG_RETURN_ORIGINAL_LOGPROB") == "1" else max(sampling["temperature"], 1e-9) if max_new else 1.0
            )
            meta["output_token_logprobs"] = entries(logp[len(ids) :] / np.float32(scale), tokens_T[len(ids) :], kind)
            start = request.get("logprob_start_len", -1)
            if start >= 0:
                scored = entries(logp[start : len(ids)], tokens_T[start : len(ids)], kind)
                scored[0][0] = None
                meta["input_token_logprobs"] = scored
                if top_k := request.get("top_logprobs_num", 0):
                    ids_TK, logp_TK = self.model.topk(tokens_T, top_k)
                    rows = slice(start + 1, len(ids))
                    for name, array in (("val", logp_TK[rows]), ("idx", ids_TK[rows])):
                        array = np.ascontiguousarray(array)
                        meta[f"input_top_logprobs_{name}_flat_b64"] = base64.b64encode(array.tobytes()).decode()
                        meta[f"input_top_logprobs_{name}_flat_b64_dtype"] = str(array.dtype)
                    meta["input_top_logprobs_shape"] = [len(ids) - start - 1, top_k]
        return {"text": "", "output_ids": output, "meta_info": meta}


def entries(logp: np.ndarray, tokens: np.ndarray, kind: str | None) -> list[list[Any]]:
    """[[logp, id, null], ...], spoiled as `kind` says."""
    rows: list[list[Any]] = [[value, token, None] for value, token in zip(logp.tolist(), tokens.tolist(), strict=True)]
    if rows and kind in ("none", "floor", "positive"):
        rows[-1][0] = {"none": None, "floor": -3.4e38, "positive": 0.5}[kind]
    if rows and kind == "echo":
        rows[-1][1] += 1
    return rows[:-1] if kind == "short" else rows


class Connection(asyncio.Protocol):
    """Just enough of HTTP/1.1: keep-alive, Content-Length, one request after the other."""

    def __init__(self, stub: Stub):
        self.stub = stub
        self.buffer = bytearray()
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self.task is not None:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head_end = self.buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = bytes(self.buffer[:head_end]).decode("latin1").split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in head[1:])
        length = int(fields.get("content-length", 0))
        if len(self.buffer) < head_end + 4 + length:
            return
        body = bytes(self.buffer[head_end + 4 : head_end + 4 + length])
        del self.buffer[: head_end + 4 + length]
        method, path, _ = head[0].split(" ", 2)
        if method == "GET":
            status, content = self.stub.get(path)
            self.answer(status, orjson.dumps(content))
        elif path == "/update_weights_from_disk":
            self.answer(*self.stub.load(body))
        elif path == "/generate":
            self.task = asyncio.ensure_future(self.generate(body))
        else:
            self.answer(404, b'{"error": {"message": "not here"}}')

    async def generate(self, body: bytes) -> None:
        self.answer(*await self.stub.post(body))

    def answer(self, status: int, content: bytes) -> None:
        head = f"HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        head += "Location: http://someone:secret@elsewhere.example/generate?key=secret\r\n" if 300 <= status < 400 else ""
        head += "Content-Encoding: gzip\r\n" if content.startswith(b"\x1f\x8b") else ""
        head += "\r\n"
        self.transport.write(head.encode() + content)


async def serve(args: argparse.Namespace) -> None:
    stub = Stub(args)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(stub), args.host, args.port)
    print(f"stub of SGLang: {args.model_path} at http://{args.host}:{server.sockets[0].getsockname()[1]}", flush=True)
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for an SGLang server, for benchmarks and tests.", allow_abbrev=False)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--weight-version", default="default")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--poison", action="append", default=[], metavar="ID:KIND[:TIMES]")
    parser.add_argument("--cache", action="store_true")
    args, _ = parser.parse_known_args()
    asyncio.run(serve(args))


if __name__ == "__main__":
    main()
