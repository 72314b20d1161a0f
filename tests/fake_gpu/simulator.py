"""Fork servers of simulated GPUs, one for each Megatron-Core and set of layers, and what a case's step came to."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from cases import Case
from needs import mcore_paths, missing, te_paths

from megatron_opd.estimate.traffic import sent_bytes

ROOT = Path(__file__).parents[2]
START_SECONDS, TASK_SECONDS = 600.0, 600.0  # seconds as a rule; a busy machine takes minutes


class TaskFailed(AssertionError):
    """A task raised; `error` is the name of the exception's class."""

    def __init__(self, answer: dict[str, str], log: Path):
        super().__init__(f"{answer['error']}: {answer['message']}\n{answer['traceback']}\nlog: {log}")
        self.error, self.text = answer["error"], answer["message"]


class Simulator:
    """A server's process, which ends with `close`; `paths` come first in PYTHONPATH."""

    def __init__(self, log: Path, paths: list[Path], *, with_te: bool):
        self.log = log
        found = [str(path) for path in (*paths, ROOT, ROOT / "kernels", Path(__file__).parent)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*found, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        command = [sys.executable, str(Path(__file__).with_name("fork_server.py")), *([] if with_te else ["--no-te"])]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.steps: dict[str, Step | TaskFailed] = {}

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    @cached_property
    def versions(self) -> dict[str, str]:
        """Of Megatron-Core and Transformer Engine, when everything is imported."""
        return self._answer(START_SECONDS)["ready"]

    def ask(self, task: str, **arguments: Any) -> Any:
        """The result of a function of fake_tasks.py in a process of its own. Raises TaskFailed."""
        assert self.versions
        assert self.process.stdin is not None
        print(json.dumps({"task": task, "arguments": arguments}), file=self.process.stdin, flush=True)
        answer = self._answer(TASK_SECONDS)
        if "error" in answer:
            raise TaskFailed(answer, self.log)
        return answer["result"]

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise AssertionError(f"no answer in {seconds:.0f} s; log: {self.log}") from None
        assert line, f"the server ended with {self.process.wait(10)}:\n{self.log.read_text()[-3000:]}"
        return json.loads(line)

    def step(self, case: Case) -> Step:
        """The second step of a case, simulated once. Raises TaskFailed."""
        if case.id not in self.steps:
            try:
                self.steps[case.id] = Step(self.ask("step", case=case.to_json()))
            except TaskFailed as error:
                self.steps[case.id] = error
        found = self.steps[case.id]
        if isinstance(found, TaskFailed):
            raise found
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)


class Step:
    """What fake_tasks.step says of a step: `Simulation.to_json` of megatron_opd/simulate/stage.py."""

    def __init__(self, result: dict[str, Any]):
        self.result = result
        self.peak: int = result["peaks"]["step"]
        self.flops: float = result["flops"]

    @property
    def waits_and_slow_copies(self) -> list[tuple[str, int]]:
        """Of copies between host and GPU those that are not both pinned and asynchronous."""
        copies = {text: number for text, number in self.result["copies"].items() if "pinned async" not in text}
        return [*self.result["waits"].items(), *copies.items()]

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """'operation group' -> bytes."""
        found: Counter[str] = Counter()
        for message in self.result["messages"]:
            found[f"{message['operation']} {message['group']}"] += message["bytes"]
        return dict(found)

    @property
    def sent_by_kind(self) -> dict[str, float]:
        """Bytes that leave the rank, by the kinds of groups of `traffic.StepWork.sent`."""
        found: Counter[str] = Counter()
        for message in self.result["messages"]:
            if message["operation"] != "receive":
                kind = "dp" if message["group"] == "dp-cp" else message["group"]
                found[kind] += sent_bytes(message["operation"], message["bytes"], message["ranks"])
        return dict(found)


class Simulators:
    """Started when a test wants them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.running: dict[tuple[str, bool], Simulator] = {}

    def __call__(self, version: str, *, with_te: bool = True) -> Simulator:
        """Of this version of Megatron-Core; skips the test, with the reason, where something for it is missing."""
        if reason := missing(version, with_te=with_te):
            pytest.skip(reason)
        if (version, with_te) not in self.running:
            paths = [*mcore_paths(version), *(te_paths() if with_te else [])]
            log = self.folder / f"{version}{'' if with_te else '-no-te'}.log"
            self.running[version, with_te] = Simulator(log, paths, with_te=with_te)
            assert self.running[version, with_te].versions["megatron_core"] == version
        return self.running[version, with_te]

    def close(self) -> None:
        for simulator in self.running.values():
            simulator.close()
