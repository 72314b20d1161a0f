"""Where the rows of a training go besides metrics.jsonl: TensorBoard, W&B, MLflow and Trackio, behind one small interface.

A logger is opened with what a run is called and what it was asked for, gets numbers by step and tables of texts, and is closed. Each is one run
for an output folder: a resumed training goes on in it, by the name that is kept in OUTPUT/NAME_run_id.

Training hands its rows to a `Sender` for each logger and goes on: whatever a service does, steps neither wait for it nor end with it.
"""

from __future__ import annotations

import os
import queue
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_opd.errors import UserError
from megatron_opd.recipe.training_stages import TrainerConfig
from megatron_opd.safety.durable import write_file
from megatron_opd.safety.redact import public_address, redact_override
from megatron_opd.safety.untrusted import one_line, read_bytes

Table = list[list[str]]  # head and rows
_FAREWELL_SECONDS = 60.0  # for what is still to be sent when a training ends: it holds its GPUs meanwhile
_MOST_WAITING = 10_000  # rows
_LONGEST_ERROR = 500  # characters
_REMEDIES = {
    "tensorboard": "make OUTPUT/tensorboard a folder that can be written, with room",
    "wandb": "log in with `wandb login` (or WANDB_API_KEY), set WANDB_MODE=offline to write to files alone",
    "mlflow": "set MLFLOW_TRACKING_URI to a server that answers, or to sqlite:///FILE",
    "trackio": "set TRACKIO_DIR to a folder that can be written, or TRACKIO_SERVER_URL to a server that answers",
}


@dataclass(frozen=True)
class About:
    """What a logger says of a training. settings: the recipe, nested, without secrets."""

    output: Path
    project: str
    name: str
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


class Logger(Protocol):
    """What a training needs of one."""

    def log(self, step: int, scalars: dict[str, float]) -> None: ...

    def table(self, step: int, name: str, rows: Table) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Row:
    """What a step reports: numbers, and tables by name."""

    step: int
    scalars: dict[str, float]
    tables: dict[str, Table] = field(default_factory=dict)


class Sender:
    """Sends rows to a logger, in their order, from a thread of its own.

    A row that the service does not take is left out: its client has tried again as often as it does. The first failure is said on the console.
    """

    def __init__(self, name: str, known: About, *, strict: bool):
        """strict: open the logger now, and raise UserError if that fails; otherwise with the first row, as part of sending it."""
        self.name = name
        self._known = known
        self._logger = LOGGERS[name](known) if strict else None
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._given = self._sent = self.tried = 0
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)  # one that hangs keeps no process alive
        self._thread.start()

    def put(self, row: Row) -> None:
        self._given += 1
        if self._rows.qsize() < _MOST_WAITING:
            self._rows.put(row)

    def end(self) -> None:
        """No row follows."""
        self._rows.put(None)

    def unsent(self, seconds: float) -> int:
        """Rows that were not sent, once all were tried or `seconds` are over."""
        self._thread.join(max(seconds, 0.0))
        if unsent := self._given - self._sent:
            print(f"WARNING: loggers: {unsent} of {self._given} rows did not reach {self.name}; metrics.jsonl has them all", flush=True)
        elif self._thread.is_alive():
            print(f"WARNING: loggers: {self.name} has all rows, but did not come to its end", flush=True)
        return unsent

    def _work(self) -> None:
        while (row := self._rows.get()) is not None:
            try:
                self._send(row)
                self._sent += 1
            except Exception as error:  # of a client, see `_starting`
                self._say(f"did not take step {row.step}", error)
            self.tried += 1
        try:
            if self._logger is not None:
                self._logger.close()
        except Exception as error:
            self._say("did not come to its end", error)

    def _send(self, row: Row) -> None:
        if self._logger is None:
            self._logger = LOGGERS[self.name](self._known)
        self._logger.log(row.step, row.scalars)
        for name, table in row.tables.items():
            self._logger.table(row.step, name, table)

    def _say(self, what: str, error: Exception) -> None:
        if not self._has_failed:
            self._has_failed = True
            print(
                f"WARNING: loggers: {self.name} {what}: {_shown(error)}; metrics.jsonl has every row, and training does not wait for a logger; "
                f"before the next start: {_REMEDIES[self.name]}",
                flush=True,
            )


def about(output: Path, config: TrainerConfig, *, run: str, settings: dict[str, Any]) -> About:
    """`run`: what it is called unless the recipe says otherwise."""
    name, group, tags = config.log_name or run, config.log_group, config.log_tags or []
    return About(output, config.wandb_project, name, group, tags, settings)


def open_loggers(names: Sequence[str], known: About, *, begun: bool) -> list[Sender]:
    """`begun`: the training has steps already, so that it goes on without a service that is away.

    Raises UserError for a package that is missing and, unless `begun`, for a service that does not start.
    """
    return [Sender(name, known, strict=not begun) for name in names]


def close_loggers(senders: Sequence[Sender]) -> dict[str, int]:
    """End all of them. Returns how many rows were not sent, by the names of the loggers that have some."""
    for sender in senders:
        sender.end()
    end = time.monotonic() + _FAREWELL_SECONDS
    unsent = {sender.name: sender.unsent(end - time.monotonic()) for sender in senders}
    return {name: rows for name, rows in unsent.items() if rows}


class _TensorBoard:
    """Events in OUTPUT/tensorboard; name, group and tags as a text, tables as Markdown."""

    def __init__(self, known: About):
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise not_installed("tensorboard") from None
        self._open = lambda step: SummaryWriter(str(known.output / "tensorboard"), purge_step=step)
        self._about = [["", ""], ["run", known.name], ["group", known.group or ""], ["tags", ", ".join(known.tags)]]
        self._writer: Any = None

    def _opened(self, step: int) -> Any:
        """The writer of a file in which rows from `step` on stand for those of earlier ones: a resumed training makes them again."""
        if self._writer is None:
            self._writer = self._open(step)
            self._writer.add_text("run", _markdown(self._about))
        return self._writer

    def log(self, step: int, scalars: dict[str, float]) -> None:
        writer = self._opened(step)
        try:
            for key, value in scalars.items():
                writer.add_scalar(key, value, step)
            writer.flush()
        except Exception:
            self._writer = None  # a writer that failed once takes nothing any more
            raise

    def table(self, step: int, name: str, rows: Table) -> None:
        self._opened(step).add_text(name, _markdown(rows), step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _WandB:
    """WANDB_MODE=offline works as ever. A row counts as sent once W&B's client has it, which uploads by itself and keeps what it can't."""

    def __init__(self, known: About):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise not_installed("wandb") from None
        self._wandb: Any = wandb
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", f"{_FAREWELL_SECONDS * 0.8:.0f}")  # otherwise it uploads until there is a network
        os.environ.setdefault("WANDB_FINISH_TIMEOUT_RAISES", "true")
        name = _kept_name(known.output / "wandb_run_id", "W&B")
        arguments, sys.argv = sys.argv, [sys.argv[0], *map(redact_override, sys.argv[1:])]  # W&B sends the command line too
        try:
            self.run = _starting(
                "wandb",
                lambda: wandb.init(
                    project=known.project,
                    id=name,
                    resume="allow",
                    dir=str(known.output),
                    config=known.settings,
                    name=known.name,
                    group=known.group,
                    tags=known.tags,
                ),
            )
        finally:
            sys.argv = arguments

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self.run.log(scalars, step=step)

    def table(self, step: int, name: str, rows: Table) -> None:
        self.run.log({name: self._wandb.Table(columns=rows[0], data=rows[1:])}, step=step)

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    """MLFLOW_TRACKING_URI says where; without it MLflow's own default. The project is the experiment."""

    def __init__(self, known: About):
        try:
            import mlflow  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise not_installed("mlflow") from None
        self._client: Any = _starting("mlflow", mlflow.MlflowClient)
        self._id = _starting("mlflow", lambda: self._begin(known))

    def _begin(self, known: About) -> str:
        kept = known.output / "mlflow_run_id"
        if kept.exists():
            run_id = _kept_name(kept, "MLflow")
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        experiment = self._client.get_experiment_by_name(known.project)
        number = experiment.experiment_id if experiment is not None else self._client.create_experiment(known.project)
        tags = {"group": known.group or "", **dict.fromkeys(known.tags, "true")}
        run_id = self._client.create_run(number, tags=tags, run_name=known.name).info.run_id
        write_file(kept, run_id)
        self._client.log_dict(run_id, known.settings, "settings.json")
        return run_id

    def log(self, step: int, scalars: dict[str, float]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]
        from mlflow.utils.time import get_current_time_millis  # pyright: ignore[reportMissingImports]

        now = get_current_time_millis()
        self._client.log_batch(self._id, metrics=[Metric(key, value, now, step) for key, value in scalars.items()])

    def table(self, step: int, name: str, rows: Table) -> None:
        self._client.log_text(self._id, _markdown(rows), f"{name}/step-{step:06d}.md")

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _Trackio:
    """In TRACKIO_DIR on this machine, or where TRACKIO_SERVER_URL or TRACKIO_SPACE_ID says. Trackio has no tags: settings hold them."""

    def __init__(self, known: About):
        try:
            import trackio
        except ImportError:
            raise not_installed("trackio") from None
        self._trackio: Any = trackio
        name = f"{known.name} {_kept_name(known.output / 'trackio_run_id', 'Trackio')}"  # by which Trackio finds it again
        settings = {**known.settings, "tags": known.tags}
        quiet: dict[str, Any] = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self._run = _starting("trackio", lambda: trackio.init(known.project, name, known.group, config=settings, resume="allow", **quiet))

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def table(self, step: int, name: str, rows: Table) -> None:
        cells = [[_cell(cell) for cell in row] for row in rows[1:]]  # it shows them as Markdown
        self._run.log({name: self._trackio.Table(columns=rows[0], data=cells)}, step=step)

    def close(self) -> None:
        self._run.finish()


def _starting(name: str, start: Callable[[], Any]) -> Any:
    try:
        return start()
    except UserError:
        raise
    except Exception as error:  # no key, no network, a project that is not there: the clients' errors have no common ground
        raise UserError(f"loggers has {name!r}, which could not start: {_shown(error)}; {_REMEDIES[name]}, or take it out") from error


def _shown(error: Exception) -> str:
    """A client's error for the console: addresses in it may hold a password."""
    text = re.sub(r"[A-Za-z][\w+.-]*://\S+", lambda match: public_address(match[0]), f"{type(error).__name__}: {error}")
    return one_line(text)[:_LONGEST_ERROR]


def _kept_name(path: Path, whose: str) -> str:
    """What a run of the service is called, made by the first start. Raises UserError."""
    write_file(path, uuid.uuid4().hex[:8], exclusive=True)
    name = read_bytes(path).decode(errors="replace").strip()
    if not re.fullmatch(r"[\w.-]{1,128}", name, re.ASCII):
        raise UserError(f"{path}: {name[:80]!r} is no name of a {whose} run; remove the file, and the rows go on in a new one")
    return name


def _markdown(rows: Table) -> str:
    """Cells are quoted as code, in which no tag, link or formula is one; a backtick in them is shown as an apostrophe."""
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _cell(text: str) -> str:
    shown = " ".join(text.split()).replace("`", "'").replace("|", "¦").replace("<", "‹").replace(">", "›")
    return f"`{shown}`" if shown else ""


LOGGERS: dict[str, Callable[[About], Logger]] = {"tensorboard": _TensorBoard, "wandb": _WandB, "mlflow": _MLflow, "trackio": _Trackio}


def not_installed(logger: str) -> UserError:
    return UserError(f"loggers has {logger!r}, which is not installed; pip install {logger}, or take it out")
