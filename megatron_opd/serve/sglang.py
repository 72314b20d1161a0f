"""Client of SGLang servers: token ids in, token ids and log-probabilities out, over POST /generate.

A background thread keeps the servers busy across the borders of parts, while the caller writes the parts that are finished.

Legend: P prompt tokens, R response tokens, T = P + R. Behaviour of the server is stated as found with SGLang 0.5.23.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from megatron_opd.errors import EngineError, UserError
from megatron_opd.hf.lineage import fingerprint_model
from megatron_opd.hf.model_config import check_version_reads, read_config
from megatron_opd.hf.turns import own_stop_ids
from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.records import SamplingParams, TeacherScores
from megatron_opd.serve.engine import Engine, Failed, Generated, GenerateRequest, Progress, ScoreRequest, all_stop_ids, check_requests
from megatron_opd.serve.http import HttpClient, NoAnswer, NotSent, Refused
from megatron_opd.serve.identity import weights_changed
from megatron_opd.serve.launch import ServerProcess
from megatron_opd.serve.pool import Balancer, Pool, Server
from megatron_opd.serve.sglang_answers import WrongAnswer, read_generated, read_scores, score_body

Request = TypeVar("Request")
Result = TypeVar("Result")

BACKOFF_SECONDS = 1.0  # doubled on every repeat
MAX_BACKOFF_SECONDS = 30.0
MOST_NOT_SENT = 100  # connections refused to one request by servers that had just been inspected
# So many requests given up with none done in between are no single request's fault.
FAILURES_IN_A_ROW = 16
PARTS_UNREAD = 2  # finished parts that wait for the caller before more is sent


class SglangEngine(Engine):
    """See `serve.engine.Engine`. The servers hold the weights; `model` must be the directory that they serve."""

    def __init__(
        self,
        config: EngineConfig,
        model: str | Path,
        *,
        log_dir: str | Path = "logs",
        first_gpu: int = 0,
        reclaim: Path | None = None,
    ):
        """reclaim: a running server with weights from below this folder, which an evaluation left there that was killed, takes the model's again."""
        self.config = config
        self.model = Path(model)
        servers = [Server(url.rstrip("/")) for url in config.urls]
        if config.launch is not None:
            if not config.launch.command:  # servers of this Python; of others the version is not known
                check_version_reads(read_config(self.model), f"{self.model}/config.json", version("transformers"))
            children = (
                ServerProcess(config, config.launch, self.model, number=number, log_dir=Path(log_dir), first_gpu=first_gpu)
                for number in range(config.launch.servers)
            )
            servers = [Server("", child) for child in children]
        self.fingerprint = fingerprint_model(model)
        self.stop_ids = list(own_stop_ids(model))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang client", daemon=True)
        self._thread.start()
        self._http: HttpClient | None = None
        self._pool: Pool | None = None
        try:
            self._run(self._open(servers, reclaim))
            self.vocab_size = self.pool.vocab_size
            self.context_length = self._agreed_context_length()
        except BaseException:
            self.close()
            raise
        self.num_gpus = sum(server.identity.facts.num_gpus for server in servers if server.identity is not None)

    def load(self, model: str | Path) -> None:
        """Every server reads the weights of `model` from disk, and is then inspected as at its start. Raises EngineError, LineageError."""
        fingerprint, stop_ids = fingerprint_model(model), list(own_stop_ids(model))
        self._run(self.pool.load(Path(model)))
        self.model, self.fingerprint, self.stop_ids = Path(model), fingerprint, stop_ids
        self.context_length = self._agreed_context_length()

    async def _open(self, servers: list[Server], reclaim: Path | None) -> None:
        self._http = HttpClient()
        self._pool = Pool(self.config, self.model, self._http, servers)
        if reclaim is not None:
            await self._pool.reclaim(reclaim)
        await self._pool.open()

    @property
    def pool(self) -> Pool:
        assert self._pool is not None
        return self._pool

    def describe(self) -> dict[str, Any]:
        facts = next(server.identity.facts for server in self.pool.servers if server.identity is not None)
        return {"kind": "sglang", "version": facts.version, **facts.settings, "num_servers": len(self.pool.servers)}

    @contextlib.contextmanager
    def only(self, number: int) -> Iterator[None]:
        """Inside, all requests go to one server."""
        balancer = self.pool.balancer
        self.pool.balancer = Balancer([self.pool.servers[number]])
        try:
            yield
        finally:
            self.pool.balancer = balancer

    def close(self) -> None:
        if self._loop.is_closed():
            return
        if self._pool is not None:
            self._run(self._pool.close())
        if self._http is not None:
            self._run(self._http.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def generate(self, requests: Sequence[GenerateRequest], sampling: SamplingParams, progress: Progress | None = None) -> list[Generated]:
        """A response that reaches `context_length` ends there (finish LENGTH), so that the same server can score it."""
        return _first_part(self._generate_stream([requests], sampling, progress, strict=True))

    def score(self, requests: Sequence[ScoreRequest], top_k: int = 0, progress: Progress | None = None) -> list[TeacherScores]:
        return _first_part(self._score_stream([requests], top_k, progress, strict=True))

    def generate_parts(
        self, parts: Iterable[Sequence[GenerateRequest]], sampling: SamplingParams, progress: Progress | None = None
    ) -> Iterator[tuple[int, Sequence[Generated | Failed]]]:
        return self._generate_stream(parts, sampling, progress, strict=False).run()

    def score_parts(
        self, parts: Iterable[Sequence[ScoreRequest]], top_k: int = 0, progress: Progress | None = None
    ) -> Iterator[tuple[int, Sequence[TeacherScores | Failed]]]:
        return self._score_stream(parts, top_k, progress, strict=False).run()

    def _generate_stream(
        self, parts: Iterable[Sequence[GenerateRequest]], sampling: SamplingParams, progress: Progress | None, *, strict: bool
    ) -> _Stream[GenerateRequest, Generated]:
        def check(requests: Sequence[GenerateRequest]) -> None:
            check_requests(requests, vocab_size=self.vocab_size, context_length=self.context_length)
            for number, request in enumerate(requests):
                P = len(request.prompt)
                if self.context_length <= P:
                    raise EngineError(
                        f"request {number}: a prompt of {P} tokens leaves no room for a response in a context of {self.context_length}"
                    )

        return _Stream(
            self,
            parts,
            check=check,
            cost=lambda request: len(request.prompt) + self._max_new(request, sampling),
            one=lambda request: self._generate_one(request, sampling),
            done=lambda request, generated: len(generated.tokens),
            progress=progress,
            strict=strict,
        )

    def _score_stream(
        self, parts: Iterable[Sequence[ScoreRequest]], top_k: int, progress: Progress | None, *, strict: bool
    ) -> _Stream[ScoreRequest, TeacherScores]:
        if not 0 <= top_k <= self.vocab_size:
            raise EngineError(f"top_k {top_k} of a vocabulary of {self.vocab_size}")  # would end the server process
        return _Stream(
            self,
            parts,
            check=lambda requests: check_requests(requests, vocab_size=self.vocab_size, context_length=self.context_length),
            cost=lambda request: len(request.tokens),
            one=lambda request: self._score_one(request, top_k),
            done=lambda request, scores: len(request.tokens) - request.start,
            progress=progress,
            strict=strict,
        )

    def _max_new(self, request: GenerateRequest, sampling: SamplingParams) -> int:
        return min(sampling.max_new_tokens, self.context_length - len(request.prompt))

    async def _generate_one(self, request: GenerateRequest, sampling: SamplingParams) -> tuple[Generated | Failed, Server | None]:
        max_new = self._max_new(request, sampling)
        # Servers divide logits by the temperature before they take log-probs of sampled tokens (greedy counts as 1), unless told not to;
        # top-p and top-k don't touch them. Where a server does, a scoring pass gives them.
        stop_ids = all_stop_ids(sampling, self.stop_ids)
        with_logp = sampling.temperature in (0.0, 1.0) or all(s.identity is None or s.identity.unscaled_logp for s in self.pool.servers)
        body = {
            "input_ids": np.ascontiguousarray(request.prompt),
            "return_logprob": with_logp,
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or -1,
                "max_new_tokens": max_new,
                "stop_token_ids": stop_ids,
                # Counts only with --enable-deterministic-inference.
                "sampling_seed": sampling_seed(sampling.seed, request),
            },
        }
        outcome, server = await self._ask(
            body,
            prompt=request.prompt.tobytes(),
            tokens=len(request.prompt),
            new_tokens=max_new,
            read=lambda answer: read_generated(
                answer, vocab_size=self.vocab_size, max_new_tokens=max_new, stop_ids=stop_ids, with_logp=with_logp
            ),
        )
        if isinstance(outcome, Failed):
            return outcome, server
        tokens, logp, finish = outcome
        if logp is None:
            whole = ScoreRequest(np.concatenate([request.prompt, tokens]).astype(np.int32), start=len(request.prompt))
            scores, server = await self._score_one(whole, 0)
            if isinstance(scores, Failed):
                return scores, server
            logp = scores.logp[whole.start :]
        return Generated(tokens, logp, finish), server

    async def _score_one(self, request: ScoreRequest, top_k: int) -> tuple[TeacherScores | Failed, Server | None]:
        return await self._ask(
            score_body(request, top_k),
            prompt=request.tokens[: request.start].tobytes(),
            tokens=len(request.tokens),
            new_tokens=0,
            read=lambda answer: read_scores(answer, request, vocab_size=self.vocab_size, top_k=top_k),
        )

    async def _ask(
        self, body: dict[str, Any], *, prompt: bytes, tokens: int, new_tokens: int, read: Callable[[dict[str, Any]], Result]
    ) -> tuple[Result | Failed, Server | None]:
        """POST /generate until a server answers as it should, or the request is given up. Raises what ends the stage."""
        config, pool = self.config, self.pool
        seconds = config.timeout + tokens / config.slowest_prefill + new_tokens / config.slowest_decode
        cost, tries, not_sent = tokens + new_tokens, 0, 0
        while True:
            server = await pool.acquire(prompt, cost)
            inspected, wait = server.inspections, 0.0
            try:
                answer = await pool.generate(server, body, seconds=seconds)
                _check_weight_version(server, answer)
                return read(answer), server
            except NotSent as failure:  # costs no try: the pool bounds how long servers may be away
                pool.report_failure(server, str(failure), inspected)
                why, not_sent = f"{server.url}: {failure}", not_sent + 1
                if not_sent < MOST_NOT_SENT:
                    continue
            except NoAnswer as failure:
                pool.report_failure(server, str(failure), inspected)
                why, wait = f"{server.url}: {failure}", failure.wait
            except WrongAnswer as failure:
                why = f"{server.url}: {failure}"
            except Refused as refusal:
                return Failed(f"{server.url}: {refusal}"), server
            except UserError as error:
                raise type(error)(f"{server.url}: {error}") from None
            finally:
                server.outstanding -= cost
            tries += 1
            if tries > config.retries or not_sent >= MOST_NOT_SENT:
                return Failed(f"{why} (given up after {tries} tries; engine.retries={config.retries})"), server
            await asyncio.sleep(max(wait, min(BACKOFF_SECONDS * 2 ** (tries - 1), MAX_BACKOFF_SECONDS)))

    def _agreed_context_length(self) -> int:
        longest, url = min((server.identity.facts.longest_input, server.url) for server in self.pool.servers if server.identity is not None)
        wanted = self.config.context_length
        if wanted is not None and wanted > longest:
            raise EngineError(
                f"engine.context_length is {wanted}, but {url} takes at most {longest} tokens; "
                "start it with a larger --context-length (7 more than the longest sequence) and KV cache, or lower engine.context_length"
            )
        return wanted or longest

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run in the loop's thread and wait; an interrupt cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseExceptionGroup as group:
            raise first_error(group) from None
        finally:
            future.cancel()


class _Stream(Generic[Request, Result]):
    """Requests of many parts on their way: at most `tokens_under_way` a server (a copy of a launched one) at once, in order, parts given back when complete."""

    def __init__(
        self,
        engine: SglangEngine,
        parts: Iterable[Sequence[Request]],
        *,
        check: Callable[[Sequence[Request]], None],
        cost: Callable[[Request], int],
        one: Callable[[Request], Coroutine[Any, Any, tuple[Result | Failed, Server | None]]],
        done: Callable[[Request, Result], int],
        progress: Progress | None,
        strict: bool,
    ):
        self.engine, self.parts, self.check, self.cost, self.one, self.done = engine, parts, check, cost, one, done
        self.progress, self.strict = progress, strict
        self.finished: queue.SimpleQueue[tuple[int, list[Result | Failed]] | None] = queue.SimpleQueue()
        self.failures_in_a_row = 0
        self.under_way = 0
        self.unread = 0

    def run(self) -> Iterator[tuple[int, list[Result | Failed]]]:
        """Parts as they are finished. Raises what ended the work; ends it if the caller stops early."""
        engine = self.engine
        engine._run(self._start())
        try:
            while (part := self.finished.get()) is not None:
                yield part
                engine._loop.call_soon_threadsafe(self._was_read)
        finally:
            engine._run(self._stop())
        if (error := self.task.exception()) is not None:
            raise first_error(error) if isinstance(error, BaseExceptionGroup) else error

    async def _start(self) -> None:
        self.room = asyncio.Event()
        self.task = asyncio.create_task(self._work())
        self.task.add_done_callback(lambda _: self.finished.put(None))

    async def _stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    def _was_read(self) -> None:
        self.unread -= 1
        self.room.set()

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number, requests in enumerate(self.parts):
                self.check(requests)
                outcomes: list[Any] = [None] * len(requests)
                if not requests:
                    self.unread += 1
                    self.finished.put((number, outcomes))
                left = [len(requests)]
                for position, request in enumerate(requests):
                    await self._wait_for_room(self.cost(request))
                    group.create_task(self._one(number, requests, position, outcomes, left, group))

    async def _wait_for_room(self, cost: int) -> None:
        pool, config = self.engine.pool, self.engine.config
        limit = config.tokens_under_way * (config.launch.dp if config.launch else 1)
        while (self.under_way and self.under_way + cost > limit * max(1, pool.num_up())) or self.unread > PARTS_UNREAD:
            self.room.clear()
            await self.room.wait()
        self.under_way += cost

    async def _one(
        self, number: int, requests: Sequence[Request], position: int, outcomes: list[Any], left: list[int], group: asyncio.TaskGroup
    ) -> None:
        request = requests[position]
        try:
            outcomes[position] = await self.one(request)
        except UserError as error:
            raise type(error)(f"request {position}: {error}") from None
        finally:
            self.under_way -= self.cost(request)
            self.room.set()
        outcome = outcomes[position][0]
        self._count(outcome, position)
        if self.progress is not None:
            self.progress(0 if isinstance(outcome, Failed) else self.done(request, outcome))
        left[0] -= 1
        if left[0] == 0:
            await self._finish_part(number, requests, outcomes, left, group)

    def _count(self, outcome: Result | Failed, position: int) -> None:
        if not isinstance(outcome, Failed):
            self.failures_in_a_row = 0
            return
        self.failures_in_a_row += 1
        if self.strict:
            raise EngineError(f"request {position}: {outcome.reason}")
        if self.failures_in_a_row >= FAILURES_IN_A_ROW:
            raise EngineError(f"{self.failures_in_a_row} requests in a row failed, the last for this reason: {outcome.reason}")

    async def _finish_part(
        self, number: int, requests: Sequence[Request], outcomes: list[Any], left: list[int], group: asyncio.TaskGroup
    ) -> None:
        """Hand the part over, if the servers that answered are still the ones that were inspected; else ask again what they answered."""
        servers = {server for _, server in outcomes if server is not None}
        replaced = await self.engine.pool.replaced(servers)
        again = [position for position, (_, server) in enumerate(outcomes) if server in replaced]
        if again:
            left[0] = len(again)
            for position in again:
                self.under_way += self.cost(requests[position])
                group.create_task(self._one(number, requests, position, outcomes, left, group))
            return
        self.unread += 1
        self.finished.put((number, [outcome for outcome, _ in outcomes]))


def sampling_seed(seed: int, request: GenerateRequest) -> int:
    """A number below 2^31 that is each response's own."""
    return int(np.random.SeedSequence([seed, request.prompt_index, request.sample_index]).generate_state(1)[0] >> 1)


def _first_part(stream: _Stream[Any, Any]) -> list[Any]:
    """Outcomes of a stream of one part."""
    ((_, outcomes),) = list(stream.run())
    return outcomes


def _check_weight_version(server: Server, answer: dict[str, Any]) -> None:
    before = server.identity.facts.weight_version if server.identity is not None else None
    version = answer["meta_info"].get("weight_version", before)
    if version != before:
        raise weights_changed(server.url, server.identity, version)


def first_error(group: BaseExceptionGroup) -> BaseException:
    """The first error of a group, however deep."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
