"""One HTTP exchange with an SGLang server, and what its failure means for what comes next."""

from __future__ import annotations

import asyncio
import gc
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson

from megatron_opd.errors import ConfigError, EngineError

CONNECT_SECONDS = 10.0
# The servers close idle connections after 5 s; let go of them first, or the next request meets a closed one.
KEEPALIVE_SECONDS = 2.0
# The request itself was refused: the same again would be.
_REFUSALS = (400, 413, 422)


class NotSent(Exception):
    """No connection: nothing of the request reached a server."""


class NoAnswer(Exception):
    """The request was sent and no whole answer came, or a 5xx: the server, the network or the request may be at fault."""


class Refused(Exception):
    """The server refused this request (400, 413, 422): a repeat won't help."""


class HttpClient:
    """JSON in, JSON out. Make and use it inside one event loop."""

    def __init__(self) -> None:
        # trust_env=False (the default): a cluster's HTTP_PROXY is for the internet, not for servers next door.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)

    async def close(self) -> None:
        await self._session.close()

    async def ask(self, method: str, url: str, body: dict[str, Any] | None = None, *, seconds: float) -> dict[str, Any]:
        """The answer's JSON object. Raises NotSent, NoAnswer, Refused, or EngineError for what is no answer of an SGLang server."""
        path = "/" + url.partition("://")[2].partition("/")[2]
        content = None if body is None else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        try:
            async with (
                asyncio.timeout(seconds),
                self._session.request(method, url, data=content, headers={"Content-Type": "application/json"}) as response,
            ):
                text = await response.read()
        except aiohttp.ClientConnectorError as error:
            raise NotSent(f"no answer to {path} ({error.os_error.strerror or error}); is the server running?") from None
        except aiohttp.ConnectionTimeoutError:
            raise NotSent(f"no answer to {path}: no connection within {CONNECT_SECONDS:g} s") from None
        except TimeoutError:
            raise NoAnswer(f"no answer to {path} within {seconds:g} s") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise NoAnswer(f"no answer to {path} ({str(error) or type(error).__name__})") from None
        if response.status != 200:
            message = f"{path} answered {response.status}: {_error_message(text) or response.reason}"
            raise (NoAnswer if response.status >= 500 else Refused if response.status in _REFUSALS else EngineError)(message)
        # Thousands of small lists and no cycles: without this the collector walks through the heap several times an answer.
        gc.disable()
        try:
            answer = orjson.loads(text)
        except ValueError:
            answer = None
        finally:
            gc.enable()
        if not isinstance(answer, dict):
            raise EngineError(f"{path} did not answer with a JSON object; is this an SGLang server?")
        return answer


def checked_url(url: str) -> str:
    """`url` without a trailing slash. Raises ConfigError for what is not the address of a server."""
    try:
        parsed = urlsplit(url)
        _ = parsed.port
    except ValueError as error:
        raise ConfigError(f"engine.urls: {url!r}: {error}") from None
    if parsed.username or parsed.password:
        raise ConfigError("engine.urls: an address holds a user name or password, which would end up in logs; give it without")
    if parsed.scheme not in ("http", "https") or not parsed.hostname:
        raise ConfigError(f"engine.urls: {url!r} is not an address such as http://127.0.0.1:30000")
    return url.rstrip("/")


def _error_message(text: bytes) -> str:
    """SGLang's own words: {"error": {"message": ...}}, or {"message": ...} from its request validation."""
    try:
        content = orjson.loads(text)
        error = content.get("error", content)
        message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        message = None
    return str(message or text.decode(errors="replace"))[:1000]
