"""One HTTP exchange with an SGLang server, and what its failure means for what comes next.

Whatever listens at the address, an exchange ends at its deadline and takes no more memory than an answer to the request may have.
"""

from __future__ import annotations

import asyncio
import gc
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson

from megatron_opd.errors import EngineError
from megatron_opd.safety.untrusted import printable

CONNECT_SECONDS = 10.0
# The servers close idle connections after 5 s; let go of them first, or the next request meets a closed one.
KEEPALIVE_SECONDS = 2.0
MAX_WAIT_SECONDS = 60.0  # that a server may ask for (Retry-After)
INFO_BYTES = 8 << 20
ERROR_BYTES = 1 << 16
# Compressed bodies are not asked for and not read: what they come to is not known before.
_HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
_REFUSALS = (400, 413, 422)  # the request itself was refused: the same again would be
_LOCKED = (401, 403, 407)
_PASSING = (408, 425, 429)


class NotSent(Exception):
    """No connection: nothing of the request reached a server."""


class NoAnswer(Exception):
    """The request was sent and no whole answer came, or a 5xx: the server, the network or the request may be at fault.

    `wait`: seconds that the server asks to wait before the next request.
    """

    def __init__(self, message: str, wait: float = 0.0):
        super().__init__(message)
        self.wait = wait


class StrangeAnswer(NoAnswer):
    """Something answered that does not talk as SGLang does: no JSON, a status that SGLang has no use for, far too much."""


class Refused(Exception):
    """The server refused this request (400, 413, 422): a repeat won't help."""


class HttpClient:
    """JSON in, JSON out. Make and use it inside one event loop."""

    def __init__(self) -> None:
        # trust_env=False (the default): a cluster's HTTP_PROXY is for the internet, not for servers next door.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
        )

    async def close(self) -> None:
        await self._session.close()

    async def ask(
        self, method: str, url: str, body: dict[str, Any] | None = None, *, seconds: float, largest: int = INFO_BYTES
    ) -> dict[str, Any]:
        """The answer's JSON object, of at most `largest` bytes. Raises NotSent, NoAnswer, Refused; EngineError for what no repeat mends."""
        path = "/" + url.partition("://")[2].partition("/")[2]
        content = None if body is None else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        try:
            async with (
                asyncio.timeout(seconds),
                self._session.request(method, url, data=content, headers=_HEADERS, allow_redirects=False) as response,
            ):
                text, whole = await _read(response, largest if response.status == 200 else ERROR_BYTES)
        except aiohttp.ClientConnectorCertificateError as error:
            raise EngineError(f"{path} is not asked: the server's certificate is not valid ({said(error.certificate_error)})") from None
        except aiohttp.ClientConnectorError as error:
            raise NotSent(f"no answer to {path} ({error.os_error.strerror or said(error)}); is the server running?") from None
        except aiohttp.ConnectionTimeoutError:
            raise NotSent(f"no answer to {path}: no connection within {CONNECT_SECONDS:g} s") from None
        except TimeoutError:
            raise NoAnswer(f"no answer to {path} within {seconds:g} s") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise NoAnswer(f"no answer to {path} ({said(error) or type(error).__name__})") from None
        if response.status != 200:
            raise _failure(path, response, text)
        if not whole:
            raise StrangeAnswer(f"{path} answered with more than {largest:,} bytes, the most that an answer to this request can have")
        if (coding := response.headers.get("Content-Encoding", "identity").lower()) != "identity":
            raise StrangeAnswer(
                f"{path} answered in a compressed form ({said(coding, 40)}), which was not asked for; turn compression off at the proxy, or give the server's own address"
            )
        # Thousands of small lists and no cycles: without this the collector walks through the heap several times an answer.
        gc.disable()
        try:
            answer = orjson.loads(text)
        except ValueError:
            answer = None
        finally:
            gc.enable()
        if not isinstance(answer, dict):
            raise StrangeAnswer(f"{path} did not answer with a JSON object; is this an SGLang server?")
        return answer


async def _read(response: aiohttp.ClientResponse, largest: int) -> tuple[bytearray, bool]:
    """The body, and whether that is all of it: no more than `largest` bytes are read, and the connection is closed then."""
    text = bytearray()
    if (response.content_length or 0) > largest:
        response.close()
        return text, False
    while chunk := await response.content.readany():
        text += chunk
        if len(text) > largest:
            response.close()
            del text[largest:]
            return text, False
    return text, True


def _failure(path: str, response: aiohttp.ClientResponse, text: bytearray) -> Exception:
    """What a status other than 200 means."""
    status = response.status
    message = f"{path} answered {status}"
    if 300 <= status < 400:
        target = f" to {host}" if (host := _host(response.headers.get("Location", ""))) else ""
        return EngineError(
            f"{message}, a redirect{target}, which is never followed: another server would answer; give the server's own address"
        )
    message += f": {_error_message(text) or said(response.reason)}"
    if status in _LOCKED:
        return EngineError(f"{message}; this client sends no keys: start the server without --api-key, where only you can reach it")
    if status in _REFUSALS:
        return Refused(message)
    if status >= 500 or status in _PASSING:
        return NoAnswer(message, _seconds(response.headers.get("Retry-After", "")))
    return StrangeAnswer(message)


def _host(location: str) -> str:
    """Host and port of an address, without user, path and query."""
    try:
        return said(urlsplit(location).netloc.rpartition("@")[2], 100)
    except ValueError:
        return ""


def _seconds(retry_after: str) -> float:
    """What a Retry-After in seconds asks for, within bounds; a date asks for nothing."""
    return min(float(retry_after), MAX_WAIT_SECONDS) if retry_after.isascii() and retry_after.isdecimal() else 0.0


def said(text: object, most: int = 500) -> str:
    """Words of a server on one line for a console or a file: control characters escaped, and not too many."""
    try:
        words = " ".join(printable(str(text)[: 2 * most]).split())
    except RecursionError:
        return f"(a deeply nested {type(text).__name__})"
    return words if len(words) <= most else f"{words[: most - 3]}..."


def _error_message(text: bytearray) -> str:
    """SGLang's own words: {"error": {"message": ...}}, or {"message": ...} from its request validation."""
    try:
        content = orjson.loads(text)
        error = content.get("error", content)
        message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        message = None
    return said(message if isinstance(message, str) and message else text[:4000].decode(errors="replace"))
