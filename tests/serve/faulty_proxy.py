"""A network that fails on purpose: forwards HTTP to a real server, except that the next POSTs meet the given faults."""

from __future__ import annotations

import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import httpx

Fault = Literal["reset", "503", "400", "hang", "html"]


class FaultyProxy:
    """`with FaultyProxy(upstream) as proxy:` listens at `proxy.url`; `proxy.faults` are used up by POSTs, first to last.

    `down=True` resets every POST. `num_posts` counts them.
    """

    def __init__(self, upstream: str):
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.down = False
        self.num_posts = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._client = httpx.Client(timeout=60.0, trust_env=False)

    def __enter__(self) -> FaultyProxy:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._forward("GET", None)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fault = proxy._next_fault()
                if fault is None:
                    self._forward("POST", body)
                elif fault == "reset":
                    # Linger 0: close sends a reset instead of an orderly end.
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                elif fault == "hang":
                    proxy._closing.wait(60.0)
                elif fault == "html":
                    self._answer(200, b"<html>a login page</html>", "text/html")
                else:
                    self._answer(int(fault), b'{"error": {"message": "made to fail"}}', "application/json")

            def _forward(self, method: str, body: bytes | None) -> None:
                try:
                    response = proxy._client.request(
                        method, proxy.upstream + self.path, content=body, headers={"Content-Type": "application/json"}
                    )
                except httpx.TransportError:
                    self._answer(502, b"upstream does not answer", "text/plain")
                    return
                self._answer(response.status_code, response.content, "application/json")

            def _answer(self, status: int, content: bytes, content_type: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a connection that was reset on purpose, or left by a client that gave up

        self._listener = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._listener.server_port}"
        self._thread = threading.Thread(target=self._listener.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()
        self._client.close()

    def _next_fault(self) -> Fault | None:
        with self._lock:
            self.num_posts += 1
            if self.down:
                return "reset"
            return self.faults.pop(0) if self.faults else None
