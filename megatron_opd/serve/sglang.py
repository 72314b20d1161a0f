"""Client of running SGLang servers: token ids in, token ids and log-probabilities out, over POST /generate.

Legend: P prompt tokens, R response tokens, T = P + R, K candidates. Behaviour of the server is stated as found with SGLang 0.5.23.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np

from megatron_opd.config import EngineConfig
from megatron_opd.errors import ConfigError, EngineError, LineageError, UserError
from megatron_opd.lineage import fingerprint_model, read_config
from megatron_opd.records import SamplingParams, TeacherScores
from megatron_opd.serve.engine import Generated, GenerateRequest, ScoreRequest, check_requests
from megatron_opd.serve.sglang_answers import PassingFailure, read_generated, read_scores

Result = TypeVar("Result")

INFO_SECONDS = 60.0
CONNECT_SECONDS = 10.0
BACKOFF_SECONDS = 1.0  # doubled on every repeat
MAX_BACKOFF_SECONDS = 30.0
REST_SECONDS = 20.0  # after a failure other servers are preferred for so long
# The servers close idle connections after 5 s; let go of them first, or the next request meets a closed one.
KEEPALIVE_SECONDS = 2.0
# Settings of a server that change its numbers: recorded, and the same on every server.
NUMERIC_SETTINGS = (
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "enable_fp32_lm_head",
    "enable_deterministic_inference",
    "attention_backend",
    "tp_size",
)


@dataclass(eq=False)
class Server:
    """A running server: where it is, what it said of itself, the tokens under way there, and until when others are preferred."""

    url: str
    version: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    weight_version: str | None = None
    longest_input: int = 0
    outstanding: int = 0
    resting_until: float = 0.0


class Balancer:
    """Chooses servers: the one with the fewest outstanding tokens, but samples of one prompt together (their prefix is cached there)."""

    def __init__(self, servers: Sequence[Server]):
        self.servers = list(servers)
        self.homes: dict[bytes, Server] = {}

    def choose(self, prompt: bytes) -> Server:
        """The prompt's home while it has at most 1.5 times the least outstanding tokens, else the least busy; resting ones last."""
        now = time.monotonic()
        awake = [server for server in self.servers if server.resting_until <= now] or self.servers
        least = min(awake, key=lambda server: server.outstanding)
        home = self.homes.get(prompt)
        if home is None or home not in awake or home.outstanding > 1.5 * least.outstanding:
            self.homes[prompt] = home = least
        return home


class SglangEngine:
    """See `serve.engine.Engine`. The servers hold the weights; `model` must be the directory that they serve."""

    def __init__(self, config: EngineConfig, model: str | Path):
        self.config = config
        self.model = Path(model)
        self.hf_config = read_config(model)
        self.vocab_size = int(self.hf_config["vocab_size"])
        urls = [_checked_url(url) for url in config.urls]
        limits = httpx.Limits(max_connections=config.concurrency, keepalive_expiry=KEEPALIVE_SECONDS)
        timeout = httpx.Timeout(config.timeout, connect=min(CONNECT_SECONDS, config.timeout))
        # trust_env=False: a cluster's HTTP_PROXY is for the internet, not for servers next door.
        self._client = httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False)
        self._runner = asyncio.Runner()
        try:
            self.servers = self._each(len(urls), lambda number: self._inspect(urls[number]))
            _check_alike(self.servers)
            self.context_length = self._agreed_context_length()
            self.fingerprint = fingerprint_model(model)
        except BaseException:
            self.close()
            raise

    def describe(self) -> dict[str, Any]:
        return {"kind": "sglang", "version": self.servers[0].version, **self.servers[0].settings, "num_servers": len(self.servers)}

    def close(self) -> None:
        if not self._client.is_closed:
            self._runner.run(self._client.aclose())
        self._runner.close()

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: SamplingParams, progress: Callable[[int], Any] | None = None
    ) -> list[Generated]:
        """A response that reaches `context_length` ends there (finish LENGTH), so that the same server can score it."""
        check_requests(requests, vocab_size=self.vocab_size, context_length=self.context_length)
        for number, request in enumerate(requests):
            P = len(request.prompt)
            if self.context_length <= P:
                raise EngineError(
                    f"request {number}: a prompt of {P} tokens leaves no room for a response in a context of {self.context_length}"
                )
        balancer = Balancer(self.servers)

        async def one(number: int) -> Generated:
            request = requests[number]
            what = f"request {number} (prompt {request.prompt_index}, sample {request.sample_index})"
            generated = await self._generate_one(balancer, request, sampling, what)
            if progress is not None:
                progress(len(generated.tokens))
            return generated

        return self._each(len(requests), one)

    def score(self, requests: Sequence[ScoreRequest], top_k: int = 0, progress: Callable[[int], Any] | None = None) -> list[TeacherScores]:
        check_requests(requests, vocab_size=self.vocab_size, context_length=self.context_length)
        if not 0 <= top_k <= self.vocab_size:
            raise EngineError(f"top_k {top_k} of a vocabulary of {self.vocab_size}")  # would end the server process
        balancer = Balancer(self.servers)

        async def one(number: int) -> TeacherScores:
            scores = await self._score_one(balancer, requests[number], top_k, f"request {number}")
            if progress is not None:
                progress(len(requests[number].tokens) - requests[number].start)
            return scores

        return self._each(len(requests), one)

    async def _generate_one(self, balancer: Balancer, request: GenerateRequest, sampling: SamplingParams, what: str) -> Generated:
        max_new = min(sampling.max_new_tokens, self.context_length - len(request.prompt))
        # The server divides logits by the temperature before it takes log-probs of sampled tokens (greedy counts as 1 there);
        # top-p and top-k don't touch them. At other temperatures a scoring pass gives them.
        with_logp = sampling.temperature in (0.0, 1.0)
        body = {
            "input_ids": request.prompt.tolist(),
            "return_logprob": with_logp,
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or -1,
                "max_new_tokens": max_new,
            },
        }
        tokens, logp, finish = await self._ask(
            balancer,
            body,
            prompt=request.prompt.tobytes(),
            cost=len(request.prompt) + max_new,
            read=lambda answer: read_generated(answer, vocab_size=self.vocab_size, max_new_tokens=max_new, with_logp=with_logp),
            what=what,
        )
        if logp is None:
            whole = ScoreRequest(np.concatenate([request.prompt, tokens]).astype(np.int32), start=len(request.prompt))
            logp = (await self._score_one(balancer, whole, 0, what)).logp[whole.start :]
        return Generated(tokens, logp, finish)

    async def _score_one(self, balancer: Balancer, request: ScoreRequest, top_k: int, what: str) -> TeacherScores:
        body: dict[str, Any] = {
            "input_ids": request.tokens.tolist(),
            "return_logprob": True,
            # Entry 0 of the answer belongs to this position and has no value.
            "logprob_start_len": request.start - 1,
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        }
        if top_k:
            body |= {"top_logprobs_num": top_k, "return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}
        return await self._ask(
            balancer,
            body,
            prompt=request.tokens[: request.start].tobytes(),
            cost=len(request.tokens),
            read=lambda answer: read_scores(answer, request, vocab_size=self.vocab_size, top_k=top_k),
            what=what,
        )

    async def _ask(
        self, balancer: Balancer, body: dict[str, Any], *, prompt: bytes, cost: int, read: Callable[[dict[str, Any]], Result], what: str
    ) -> Result:
        """POST /generate to a server of the balancer's choice. Raises EngineError."""

        async def attempt() -> Result:
            server = balancer.choose(prompt)
            server.outstanding += cost
            try:
                answer = await self._request("POST", server.url, "/generate", body, seconds=self.config.timeout)
                _check_weights_unchanged(server, answer)
                return read(answer)
            except PassingFailure as failure:
                server.resting_until = time.monotonic() + REST_SECONDS
                raise PassingFailure(f"{server.url}: {failure}") from None
            except UserError as error:
                raise type(error)(f"{what}: {server.url}: {error}") from None
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise EngineError(f"{what}: {server.url}: answer of SGLang {server.version} is not understood: {error!r}") from error
            finally:
                server.outstanding -= cost

        return await self._with_retries(attempt, what)

    async def _with_retries(self, attempt: Callable[[], Awaitable[Result]], what: str = "engine.urls") -> Result:
        for repeat in range(self.config.retries + 1):
            try:
                return await attempt()
            except PassingFailure as failure:
                if repeat == self.config.retries:
                    raise EngineError(
                        f"{what}: {failure} (given up after {repeat + 1} tries; engine.retries={self.config.retries})"
                    ) from None
                await asyncio.sleep(min(BACKOFF_SECONDS * 2**repeat, MAX_BACKOFF_SECONDS))
        raise AssertionError("unreachable: retries >= 0")

    async def _request(self, method: str, url: str, path: str, body: dict[str, Any] | None = None, *, seconds: float) -> dict[str, Any]:
        """The answer's JSON object. Raises PassingFailure, or EngineError for what a repeat won't mend."""
        try:
            async with asyncio.timeout(seconds):
                response = await self._client.request(method, url + path, json=body)
        except (TimeoutError, httpx.TimeoutException):
            raise PassingFailure(f"no answer to {path} within {seconds:g} s") from None
        except httpx.TransportError as error:
            raise PassingFailure(f"no answer to {path} ({str(error) or type(error).__name__}); is the server running?") from None
        if response.status_code >= 500:
            raise PassingFailure(f"{path} answered {response.status_code}: {_error_message(response)}")
        if response.status_code != 200:
            raise EngineError(f"{path} answered {response.status_code}: {_error_message(response)}")
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise EngineError(f"{path} did not answer with a JSON object; is this an SGLang server?")
        return answer

    async def _inspect(self, url: str) -> Server:
        """What the server at `url` says of itself. Raises EngineError, or LineageError if it serves another model."""
        seconds = min(INFO_SECONDS, self.config.timeout)
        try:
            model_info = await self._with_retries(lambda: self._request("GET", url, "/model_info", seconds=seconds))
            server_info = await self._with_retries(lambda: self._request("GET", url, "/server_info", seconds=seconds))
        except EngineError as error:
            raise EngineError(f"{url}: {error}") from None
        try:
            served, version, longest_input = (
                Path(model_info["model_path"]),
                str(server_info["version"]),
                int(server_info["max_req_input_len"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"{url} does not describe itself as an SGLang server does ({error!r}); SGLang 0.5.23 is known to work"
            ) from None
        if served.resolve() != self.model.resolve():
            remedy = f"start the server with --model-path {self.model.resolve()}, or give the directory that it serves"
            raise LineageError(f"{url} serves {served}, but the model is {self.model}; {remedy}")
        if model_info.get("load_format") == "dummy":
            raise LineageError(
                f"{url} serves random weights (--load-format dummy), not those of {self.model}; start it without this option"
            )
        if not model_info.get("is_generation", True):
            raise EngineError(f"{url} runs as an embedding model; start it without --is-embedding")
        defaults = model_info.get("preferred_sampling_params")
        if defaults:
            raise EngineError(f"{url} changes sampling parameters by itself ({defaults}); start it without --preferred-sampling-params")
        settings = {name: server_info.get(name) for name in NUMERIC_SETTINGS}
        try:
            settings["dtype"] = served_dtype(str(settings["dtype"]), self.hf_config)
        except EngineError as error:
            raise EngineError(f"{url} {error}") from None
        dtype = self.config.dtype
        if dtype not in ("auto", settings["dtype"]):
            raise EngineError(
                f"{url} runs with dtype {settings['dtype']}, engine.dtype is {dtype}; start it with --dtype {dtype}, or set engine.dtype='auto'"
            )
        # The server refuses inputs of max_req_input_len tokens; one less is the longest.
        return Server(url, version, settings, model_info.get("weight_version"), longest_input - 1)

    def _agreed_context_length(self) -> int:
        shortest = min(self.servers, key=lambda server: server.longest_input)
        wanted = self.config.context_length
        if wanted is not None and wanted > shortest.longest_input:
            raise EngineError(
                f"engine.context_length is {wanted}, but {shortest.url} takes at most {shortest.longest_input} tokens; "
                "start it with a larger --context-length (7 more than the longest sequence) and KV cache, or lower engine.context_length"
            )
        return wanted or shortest.longest_input

    def _each(self, count: int, one: Callable[[int], Coroutine[Any, Any, Result]]) -> list[Result]:
        """[one(0), ..., one(count - 1)], at most `concurrency` at once; the first error ends the others."""

        async def run() -> list[Result]:
            results: dict[int, Result] = {}
            numbers = iter(range(count))

            async def worker() -> None:
                for number in numbers:
                    results[number] = await one(number)

            async with asyncio.TaskGroup() as workers:
                for _ in range(min(self.config.concurrency, count)):
                    workers.create_task(worker())
            return [results[number] for number in range(count)]

        try:
            return self._runner.run(run())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None


def served_dtype(stated: str, hf_config: dict[str, Any]) -> str:
    """The dtype behind a server's --dtype option. Raises EngineError for 'auto' on float32 weights: SGLang makes them float16."""
    if stated == "auto":
        stated = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32").removeprefix("torch.")
        if stated == "float32":
            raise EngineError(
                "runs float32 weights with --dtype auto, which SGLang takes for float16; start it with --dtype bfloat16 or --dtype float32"
            )
    return {"half": "float16", "float": "float32"}.get(stated, stated)


def _check_weights_unchanged(server: Server, answer: dict[str, Any]) -> None:
    version = answer.get("meta_info", {}).get("weight_version", server.weight_version)
    if version != server.weight_version:
        raise LineageError(
            f"{server.url} changed its weights from version {server.weight_version!r} to {version!r} during the run; start the stage again"
        )


def _check_alike(servers: Sequence[Server]) -> None:
    """Raise EngineError unless all servers would give the same numbers."""
    first = servers[0]
    for server in servers[1:]:
        for name, have in [("version", server.version), *server.settings.items()]:
            want = first.version if name == "version" else first.settings[name]
            if have != want:
                raise EngineError(f"servers differ in {name}: {first.url} has {want}, {server.url} has {have}; start them alike")


def _checked_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"engine.urls: {url!r}: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"engine.urls: {url!r} is not an address such as http://127.0.0.1:30000")
    if parsed.userinfo:
        raise ConfigError("engine.urls: an address holds a user name or password, which would end up in logs; give it without")
    return str(parsed).rstrip("/")


def _error_message(response: httpx.Response) -> str:
    """SGLang's own words: {"error": {"message": ...}}, or {"message": ...} from its request validation."""
    try:
        content = response.json()
        error = content.get("error", content)
        message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        message = None
    return str(message or response.text or response.reason_phrase)[:1000]
