"""A server that knows the truth (tools/stub_sglang.py) and says something else, in this process: bytes as they go over the wire."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import orjson
from serve.stub_server import SCRIPT

# What is done instead of the honest answer to (request, answer): return another answer, or write to the connection and return None.
Lie = Callable[[dict[str, Any], dict[str, Any]], Any]
Trick = Callable[[asyncio.StreamWriter, bytes], Awaitable[None]]


PROBES_HAVE_MORE = 40


def _stub_module() -> ModuleType:
    specification = importlib.util.spec_from_file_location("stub_sglang", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def response(content: bytes, status: str = "200 OK", *fields: str) -> bytes:
    """The bytes of an HTTP response."""
    head = "\r\n".join([f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(content)}", *fields])
    return f"{head}\r\n\r\n".encode("latin1") + content


class LyingServer:
    """`with LyingServer(model) as server:` is honest until `server.lie` (an answer's content) or `server.trick` (its bytes) is set.

    Both are for requests of few tokens, which inspections don't send; `times` says for how many (None: all). `infos` are merged into what /model_info and /server_info say, by path.
    """

    def __init__(self, model: Path):
        arguments = argparse.Namespace(
            model_path=str(model), cache=False, poison=[], weight_version="default", dtype="float32", tp_size=1, delay=0.0
        )
        self.stub = _stub_module().Stub(arguments)
        self.lie: Lie | None = None
        self.trick: Trick | None = None
        self.times: int | None = None
        self.infos: dict[str, Any] = {}
        self.num_posts = 0

    def tell(self, lie: Lie | None = None, trick: Trick | None = None, times: int | None = None) -> None:
        self.lie, self.trick, self.times = lie, trick, times

    def __enter__(self) -> LyingServer:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *exception: object) -> None:
        async def end() -> None:
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1").lower()
                length = next((int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("content-length:")), 0)
                await self._answer(head.split()[0], head.split()[1], await reader.readexactly(length), writer)
                await writer.drain()
                if writer.is_closing():
                    break
        writer.close()

    async def _answer(self, method: str, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if method == "get":
            said = self.infos.get(path, {})
            honest = self.stub.get(path)[1]
            writer.write(said if isinstance(said, bytes) else response(orjson.dumps(honest | said)))
            return
        self.num_posts += 1
        _, content = await self.stub.post(body)
        short = len(orjson.loads(body)["input_ids"]) < PROBES_HAVE_MORE
        lies = short and (self.times is None or self.times > 0)
        if self.times is not None and short:
            self.times -= 1
        if lies and self.trick is not None:
            await self.trick(writer, content)
            return
        if lies and self.lie is not None:
            changed = self.lie(orjson.loads(body), orjson.loads(content))
            content = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        writer.write(response(content))
