"""The SGLang servers of a stage: who they are, which are there, and which gets the next request.

A server that fails is away until it has been inspected again: a restart of the same model goes on, another model ends the stage.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opd.errors import EngineError, LineageError, ServersLost, UserError
from megatron_opd.hf.model_config import read_config
from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.serve.engine import ScoreRequest
from megatron_opd.serve.http import HttpClient, NoAnswer, NotSent, Refused, StrangeAnswer, said
from megatron_opd.serve.identity import (
    PROBE_TOKENS,
    Facts,
    Identity,
    check_alike,
    check_probe,
    check_serves_model,
    probe_tokens,
    read_facts,
    served_dtype,
    weights_changed,
)
from megatron_opd.serve.launch import ServerProcess
from megatron_opd.serve.sglang_answers import WrongAnswer, check_answers, largest_answer, read_generated, read_scores, score_body

INFO_SECONDS = 60.0
WATCH_SECONDS = 0.5  # between looks at a child or a server that is away
HUNG_SECONDS = 120.0  # a child that has worked and does not answer for so long is started again
REST_SECONDS = 20.0  # after a failure other servers are preferred for so long
FAILURES = (NotSent, NoAnswer, Refused, WrongAnswer)  # of one exchange
HOMES = 1 << 14  # prompts whose server is remembered


@dataclass(eq=False)
class Server:
    """A server, the tokens under way there, and until when others are preferred."""

    url: str
    process: ServerProcess | None = None
    identity: Identity | None = None
    up: bool = True
    gone: str | None = None  # why it will not come back
    inspections: int = 0
    outstanding: int = 0
    resting_until: float = 0.0


class Balancer:
    """Chooses servers: the one with the fewest outstanding tokens, but samples of one prompt together (their prefix is cached there)."""

    def __init__(self, servers: list[Server]):
        self.servers = servers
        self._homes: OrderedDict[bytes, Server] = OrderedDict()

    def choose(self, prompt: bytes) -> Server | None:
        """The prompt's home while it has at most 1.5 times the least outstanding tokens, else the least busy; resting ones last.

        None if all are away.
        """
        up = [server for server in self.servers if server.up]
        if not up:
            return None
        now = time.monotonic()
        awake = [server for server in up if server.resting_until <= now] or up
        least = min(awake, key=lambda server: server.outstanding)
        home = self._homes.get(prompt)
        if home is None or home not in awake or home.outstanding > 1.5 * least.outstanding:
            home = least
            self._homes[prompt] = home
            if len(self._homes) > HOMES:
                self._homes.popitem(last=False)
        return home


@dataclass
class Pool:
    """Servers at `urls`, or children. Every method is for the event loop that `http` belongs to."""

    config: EngineConfig
    model: Path
    http: HttpClient
    servers: list[Server]
    fatal: UserError | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.hf_config = read_config(self.model)
        self.vocab_size = int(self.hf_config["vocab_size"])
        self.balancer = Balancer(self.servers)

    async def open(self) -> None:
        """Start what is to be started, wait for all, inspect them. Raises EngineError (ServersLost), LineageError."""
        for server in self.servers:
            if server.process is not None:
                server.process.start()
        async with asyncio.TaskGroup() as group:
            for server in self.servers:
                group.create_task(self._come_up(server))
        self._check_alike()
        for server in self.servers:
            if server.process is not None:
                self._spawn(self._watch(server))

    async def load(self, model: Path) -> None:
        """Other weights of the same architecture into every server. One that can't is started again with them, if it is a child.

        Raises EngineError, LineageError.
        """
        other = read_config(model)
        if int(other["vocab_size"]) != self.vocab_size:
            raise LineageError(f"{model} has another vocabulary than {self.model}, which the servers were started with")
        self.model, self.hf_config = model, other
        async with asyncio.TaskGroup() as group:
            for server in self.servers:
                if server.gone is None:
                    group.create_task(self._load(server, model))
        self._check_alike()

    async def reclaim(self, folder: Path) -> None:
        """Servers with weights from below `folder` take the model's; others are left as they are, for `open` to judge. Raises as `load`."""
        for server in self.servers:
            with contextlib.suppress(*FAILURES):
                facts = await self._facts(server)
                if Path(os.path.realpath(facts.model_path)).is_relative_to(os.path.realpath(folder)):
                    await self._load(server, self.model)

    async def _load(self, server: Server, model: Path) -> None:
        before, server.identity, server.up = server.identity, None, False
        if server.process is not None:
            server.process.model = model
        seconds = self.config.launch.start_seconds if self.config.launch else self.config.timeout
        try:
            body = {"model_path": str(model.resolve())}
            answer = await self.http.ask("POST", f"{server.url}/update_weights_from_disk", body, seconds=seconds)
            if answer.get("success") is not True:
                raise Refused(f"it did not load {model}: {said(answer.get('message'))}")
        except FAILURES as failure:
            if server.process is None:
                raise EngineError(f"{server.url}: {failure}") from None
            print(f"\n{server.url}: {failure}; starting it again with {model}", flush=True)
            await asyncio.to_thread(server.process.stop)
            server.process.starts = 0
        await self._come_up(server)
        if before is not None and server.identity is not None and np.array_equal(before.probe, server.identity.probe):
            print(f"WARNING: {server.url} gives the very same log-probabilities with {model} as before", flush=True)
        server.up = True

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(asyncio.to_thread(server.process.stop) for server in self.servers if server.process is not None))

    async def acquire(self, prompt: bytes, cost: int) -> Server:
        """A server for a request of `cost` tokens; waits while all are away. Raises what ends the stage."""
        while True:
            if self.fatal is not None:
                raise self.fatal
            self._changed.clear()
            server = self.balancer.choose(prompt)
            if server is not None:
                server.outstanding += cost
                return server
            await self._changed.wait()

    def num_up(self) -> int:
        return sum(server.up for server in self.servers)

    def report_failure(self, server: Server, why: str, inspected: int) -> None:
        """A request to `server` (as it was at its inspection number `inspected`) got no answer: inspect it before it gets another."""
        server.resting_until = time.monotonic() + REST_SECONDS
        if server.up and server.inspections == inspected:
            server.up = False
            self._spawn(self._revive(server, why))

    async def replaced(self, used: set[Server]) -> set[Server]:
        """Those of `used` that another process now stands for, unnoticed so far. Raises LineageError if it serves another model."""
        found = set()
        for server in used:
            if not server.up or server.identity is None:
                continue  # its failure is known: it is being inspected
            inspected = server.inspections
            try:
                facts = await self._facts(server)
                if inspected != server.inspections:
                    continue
                check_serves_model(server.url, facts, self.model)
                if facts.startup_time != server.identity.facts.startup_time:
                    found.add(server)
                    await self._inspect(server)
                elif facts.weight_version != server.identity.facts.weight_version:
                    raise weights_changed(server.url, server.identity, facts.weight_version)
            except FAILURES as failure:
                self.report_failure(server, str(failure), inspected)
        return found

    async def generate(self, server: Server, body: dict[str, Any], *, seconds: float) -> dict[str, Any]:
        """The answer to this very request, which gets an id that nobody can guess. Raises as `HttpClient.ask`, and WrongAnswer."""
        rid = uuid.uuid4().hex
        answer = await self.http.ask("POST", f"{server.url}/generate", {**body, "rid": rid}, seconds=seconds, largest=largest_answer(body))
        check_answers(answer, rid, len(body["input_ids"]))
        return answer

    def _check_alike(self) -> None:
        check_alike([(server.url, server.identity) for server in self.servers if server.identity is not None])

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            try:
                await work
            except UserError as error:
                self.fatal = self.fatal or error
            self._changed.set()

        task = asyncio.ensure_future(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self, server: Server) -> None:
        """See a child's death when it happens, also between requests."""
        while server.gone is None:
            await asyncio.sleep(WATCH_SECONDS)
            if server.up and server.process is not None and (death := server.process.death()) is not None:
                self.report_failure(server, death, server.inspections)

    async def _revive(self, server: Server, why: str) -> None:
        """Bring a server back, or give it up; when all are given up, the stage ends."""
        print(f"\n{server.url}: {why}; waiting for it to come back", flush=True)
        try:
            await self._come_up(server)
        except LineageError:
            raise
        except EngineError as error:
            server.gone = str(error)
            if all(other.gone is not None for other in self.servers):
                raise ServersLost(str(error)) from None
            print(f"\nWARNING: going on without {error}", flush=True)
            return
        self._check_alike()
        server.up = True

    async def _come_up(self, server: Server) -> None:
        """Wait until the server answers and has been inspected; start a dead child again. Raises EngineError with the last reason: ServersLost if its node may be at fault."""
        process, launch = server.process, self.config.launch
        assert (process is None) == (launch is None)
        fresh = server.identity is None
        waiting = self.config.patience if launch is None else launch.start_seconds if fresh else HUNG_SECONDS
        deadline = time.monotonic() + waiting
        said, strange = False, 0
        while True:
            if process is not None and launch is not None and (death := process.death()) is not None:
                if (why := process.hopeless()) is not None:
                    raise EngineError(f"{server.url}: {why}; {death}")
                if process.starts > launch.restarts:
                    kind = ServersLost if process.node_failed() else EngineError
                    raise kind(f"{server.url}: {death}\n(started {process.starts} times; engine.launch.restarts={launch.restarts})")
                print(f"\n{server.url}: {death}\nstarting it again", flush=True)
                process.start()
                waiting, fresh = launch.start_seconds, True
                deadline = time.monotonic() + waiting
            if process is not None:
                server.url = process.url
            try:
                await self._inspect(server)
                return
            except FAILURES as failure:
                strange += isinstance(failure, (StrangeAnswer, Refused, WrongAnswer))
                # Something is there, and it is no SGLang server. Where one was before, a proxy may answer until it is back.
                if strange > self.config.retries and server.identity is None:
                    end = f"; the end of {process.log}:\n{process.tail()}" if process else ""
                    raise EngineError(
                        f"{server.url}: {failure} (asked {strange} times; engine.retries); is this the address of an SGLang server?{end}"
                    ) from None
                if time.monotonic() >= deadline:
                    if process is None or launch is None:
                        raise EngineError(f"{server.url}: {failure} (waited {waiting:g} s; engine.patience)") from None
                    if fresh:
                        end = f"the end of {process.log}:\n{process.tail()}"
                        raise EngineError(f"{server.url}: {failure} (waited {waiting:g} s; engine.launch.start_seconds); {end}") from None
                    await asyncio.to_thread(process.stop)
                elif not said:
                    print(f"waiting for {server.url}" + (f" (log: {process.log})" if process else f": {failure}"), flush=True)
                    said = True
            await asyncio.sleep(min(WATCH_SECONDS, max(0.0, deadline - time.monotonic())))

    async def _facts(self, server: Server) -> Facts:
        """What the server says of itself now. Raises as `HttpClient.ask`, and EngineError."""
        seconds = min(INFO_SECONDS, self.config.timeout)
        try:
            model_info = await self.http.ask("GET", f"{server.url}/model_info", seconds=seconds)
            return read_facts(model_info, await self.http.ask("GET", f"{server.url}/server_info", seconds=seconds))
        except EngineError as error:
            raise EngineError(f"{server.url}: {error}") from None

    async def _inspect(self, server: Server) -> None:
        """Fill in `server.identity`. Raises as `generate`, EngineError, and LineageError if it serves another model than before or than it should."""
        facts = await self._facts(server)
        check_serves_model(server.url, facts, self.model)
        try:
            dtype = served_dtype(facts.settings["dtype"], self.hf_config)
        except EngineError as error:
            raise EngineError(f"{server.url} {error}") from None
        wanted = self.config.dtype
        if wanted not in ("auto", dtype):
            raise EngineError(
                f"{server.url} runs with dtype {dtype}, engine.dtype is {wanted}; start it with --dtype {wanted}, or set engine.dtype='auto'"
            )
        try:
            probe, unscaled = await self._probe(server, facts.longest_input)
        except EngineError as error:
            raise EngineError(f"{server.url}: {error}") from None
        identity = Identity(replace(facts, settings={**facts.settings, "dtype": dtype}), probe, unscaled)
        if server.identity is not None:
            if facts.weight_version != server.identity.facts.weight_version:
                raise weights_changed(server.url, server.identity, facts.weight_version)
            check_probe(server.url, identity.probe, server.url + " before it was away", server.identity.probe)
        server.identity = identity
        server.inspections += 1

    async def _probe(self, server: Server, longest_input: int) -> tuple[np.ndarray, bool]:
        """Log-probs of fixed tokens, by which weights are known again; and whether log-probs of sampled tokens are unscaled.

        The second: at temperature 100 the scaled log-prob of any token is -log V, nearly; unscaled it is what a scoring pass gives.
        Where the two are too near to tell, the answer is no, which costs a scoring pass and is never wrong.
        """
        seconds = self.config.timeout
        tokens = probe_tokens(self.vocab_size, min(PROBE_TOKENS, longest_input - 8))
        request = ScoreRequest(tokens, 1)
        answer = await self.generate(server, score_body(request, 0), seconds=seconds)
        probe = read_scores(answer, request, vocab_size=self.vocab_size, top_k=0).logp[1:]
        sampling = {"temperature": 100.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 8, "ignore_eos": True}
        body = {"input_ids": tokens, "return_logprob": True, "sampling_params": sampling}
        answer = await self.generate(server, body, seconds=seconds)
        sampled, logp, _ = read_generated(answer, vocab_size=self.vocab_size, max_new_tokens=8, stop_ids=None, with_logp=True)
        assert logp is not None
        whole = ScoreRequest(np.concatenate([tokens, sampled]).astype(np.int32), len(tokens))
        answer = await self.generate(server, score_body(whole, 0), seconds=seconds)
        want = read_scores(answer, whole, vocab_size=self.vocab_size, top_k=0).logp[whole.start :]
        return probe, bool(np.abs(logp - want).mean() < 0.25 * np.abs(want + np.log(self.vocab_size)).mean())
