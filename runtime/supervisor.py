"""Processes of this machine: started, known to serve, restarted when they die or no longer serve, never left behind."""

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from runtime.lifecycle import Backoff

_LEASH = Path(__file__).with_name("leash.py")
# A log that is larger is turned over: what it has goes to NAME.log.1, in place of what was there.
_LOG_LIMIT_BYTES = 20 << 20
_LOG_LOOK_SECONDS = 5.0
_LAST_LINES = 10
_PROBE_SECONDS = 2.0
_SLOW_START_SECONDS = 10.0
# A process that served this long gets its next restart after the shortest pause.
_STABLE_SECONDS = 10.0
_LEFTOVER_SECONDS = 5.0
# How often a process is checked that says how, and how long an answer may take.
_CHECK_SECONDS = 3.0
_ANSWER_SECONDS = 5.0
# After a restart that did not help the next one comes later, twice as late each time, up to this.
_LONGEST_PATIENCE_SECONDS = 600.0
_STOP_SECONDS = 10.0


def _silent(_: str) -> None: ...


async def _nothing() -> None: ...


async def _no_mending(_: str) -> str:
    return ""


class NotServing(Exception):  # noqa: N818 - says what a process does
    """A process answers, but does not do its work; the message says why. `restart`: whether a restart may help."""

    def __init__(self, reason: str, *, restart: bool = True) -> None:
        super().__init__(reason)
        self.restart = restart


@dataclass(frozen=True, kw_only=True)
class Program:
    """What to run, and how to know that it serves.

    `ready` is a file that the program writes, or a probe that says whether it serves; a probe may raise OSError,
    TimeoutError or EOFError for "not yet". `prepare` is awaited before each start. `user` is uid and gid. The
    `stop_signals` are sent in turn, each with an equal part of the time that the program has to end; `orphan_signal`
    is what it gets when this process dies.

    `check`, if there is one, is awaited every few seconds while the program runs: it has the program do its work, for a
    store a write, and raises NotServing, or anything else for "no answer". The program is restarted once that has gone
    on for `patience` seconds. `mend` is awaited when the program has ended before it served, with what it said: it
    removes the cause and returns what it did, or nothing; it may raise Died with better words.
    """

    name: str
    command: Sequence[str]
    ready: Path | Callable[[], Awaitable[bool]]
    environment: Mapping[str, str] | None = None
    directory: Path | None = None
    user: tuple[int, int] | None = None
    prepare: Callable[[], Awaitable[None]] = _nothing
    stop_signals: Sequence[signal.Signals] = (signal.SIGTERM,)
    orphan_signal: signal.Signals = signal.SIGKILL
    check: Callable[[], Awaitable[None]] | None = None
    patience: float = 30.0
    mend: Callable[[str], Awaitable[str]] = _no_mending


class Died(Exception):  # noqa: N818 - an event in the life of a process
    """A process ended before it served, or could not be started; the message says how, with the end of its log."""


class Process:
    """A program that can be started, stopped and killed any number of times. Its output is appended to `log`."""

    def __init__(
        self,
        program: Program,
        log: Path,
        *,
        say: Callable[[str], None] = _silent,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.program = program
        self.name = program.name
        self.log = log
        self._say = say
        self._changed = changed
        self._child: asyncio.subprocess.Process | None = None
        self._status: int | None = None
        # From the moment that it serves until it ends or is stopped.
        self.serves = False
        self._log_start = 0
        self._log_seen = log.stat().st_size if log.exists() else 0

    @property
    def pid(self) -> int | None:
        """The running process; None if there is none."""
        return self._child.pid if self._child and self._child.returncode is None else None

    async def start(self) -> None:
        """Starts it and returns once it serves. Raises Died if it ends before that and cannot be mended."""
        try:
            await self._start()
        except Died as death:
            mended = await self.program.mend(str(death))
            if not mended:
                raise
            self._say(f"{death}\n{mended}")
            await self._start()

    async def _start(self) -> None:
        if self.pid:
            raise RuntimeError(f"{self.name} runs already")
        await self.program.prepare()
        if isinstance(self.program.ready, Path):
            self.program.ready.unlink(missing_ok=True)
        await self._spawn()
        self._changed()
        began = spoken = time.monotonic()
        while not await self._is_ready():
            if self.pid is None:
                await self.ended()
                raise Died(f"{self.name} {self.how_it_ended()}{self.last_lines()}")
            if time.monotonic() - spoken > _SLOW_START_SECONDS:
                spoken = time.monotonic()
                self._say(f"{self.name} does not serve yet, {spoken - began:.0f} s after its start{self.last_lines()}")
            await asyncio.sleep(0.02)
        self.serves = True

    async def ended(self) -> None:
        """Returns once it runs no more, nor anything of its process group."""
        child = self._child
        if child is None:
            return
        self._status = await child.wait()
        if self._child is child:
            self._child = None
            self.serves = False
            _kill_group(child.pid)
            self._changed()

    async def stop(self, seconds: float = 5.0) -> bool:
        """Asks it to end, and kills it after `seconds`, or when cancelled; says whether it ended in time."""
        signals = self.program.stop_signals
        self.serves = False
        try:
            for number in signals:
                self.signal(number)
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds / len(signals)):
                        await self.ended()
                        return True
        finally:
            self.kill()
        await self.ended()
        return False

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process itself."""
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it with its process group."""
        if self.pid:
            _kill_group(self.pid)

    def how_it_ended(self) -> str:
        if self._status is None:
            return "never ran"
        if self._status < 0:
            return f"was killed by {signal.Signals(-self._status).name}"
        return f"ended with status {self._status}"

    def last_lines(self) -> str:
        """The last lines that it wrote since its start, each indented and after a line break; none without a log."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - 8192))
                lines = log.read().decode(errors="replace").splitlines()[-_LAST_LINES:]
        except OSError:
            return ""
        return "".join(f"\n    {line}" for line in lines)

    def new_lines(self) -> list[str]:
        """The whole lines that it wrote since the last call."""
        try:
            with self.log.open("rb") as log:
                log.seek(self._log_seen)
                whole, line_break, _ = log.read().rpartition(b"\n")
        except OSError:
            return []
        self._log_seen += len(whole + line_break)
        return whole.decode(errors="replace").splitlines()

    async def bound_log(self) -> None:
        """Turns the log over if it has become too large, while the process goes on writing to it."""
        if await asyncio.to_thread(_turn_over, self.log):
            self._log_start = self._log_seen = 0

    async def _spawn(self) -> None:
        with self._open_log() as log:
            self._log_start = log.tell() if log.seekable() else 0
            try:
                self._child = await asyncio.create_subprocess_exec(
                    *leashed(self.program.command, self.program.orphan_signal, self.program.user),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self.program.directory,
                    env=self.program.environment,
                    # A Ctrl-C in the terminal is for this process, which stops the others in their order.
                    start_new_session=True,
                )
            except OSError as error:
                raise Died(f"{self.name} cannot be started: {error}") from error

    async def problem(self) -> NotServing | None:
        """Why it does not do its work, as its check says."""
        if self.program.check is None:
            return None
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self.program.check()
        except NotServing as problem:
            return problem
        except TimeoutError:
            return NotServing(f"no answer within {_ANSWER_SECONDS:g} s")
        except Exception as error:  # noqa: BLE001 - whatever its driver makes of it
            return NotServing(str(error) or type(error).__name__)
        return None

    async def _is_ready(self) -> bool:
        if isinstance(self.program.ready, Path):
            return self.program.ready.exists()
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                return await self.program.ready()
        except (OSError, TimeoutError, EOFError):
            return False

    def _open_log(self) -> IO[bytes]:
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            if self.log.exists() and self.log.stat().st_size > _LOG_LIMIT_BYTES:
                self.log.replace(self.log.with_name(self.log.name + ".1"))
                self._log_seen = 0
            return self.log.open("ab")
        except OSError as error:
            # A full disk, say: no reason not to run.
            self._say(f"{self.name} runs without a log: {error}")
            return open(os.devnull, "ab")


class Supervisor:
    """Keeps processes running; made by `supervise`."""

    def __init__(
        self,
        directory: Path,
        tasks: asyncio.TaskGroup,
        say: Callable[[str], None],
        changed: Callable[[Sequence[Process]], None],
    ) -> None:
        self.processes: list[Process] = []
        self._directory = directory
        self._tasks = tasks
        self._say = say
        self._on_change = changed
        self._groups: list[tuple[list[Process], float]] = []
        self._watches: list[asyncio.Task[None]] = [tasks.create_task(self._bound_logs())]

    async def start(self, programs: Iterable[Program], stop_seconds: float) -> None:
        """Starts programs at once and returns when all serve; from then on each is restarted when it dies, or when its
        check says for too long that it does not serve.

        Raises Died if one ends before it serves. Groups are stopped in reverse order; this one has `stop_seconds`.
        """
        group = [
            Process(program, self._directory / "logs" / f"{program.name}.log", say=self._say, changed=self._changed)
            for program in programs
        ]
        self.processes += group
        self._groups.append((group, stop_seconds))
        await start_together(group)
        self._watches += [self._tasks.create_task(self._keep(process)) for process in group]
        self._watches += [self._tasks.create_task(self._check(process)) for process in group if process.program.check]

    async def stop(self) -> None:
        """Stops the groups, the last started first, and kills what does not end in its time."""
        for watch in self._watches:
            watch.cancel()
        try:
            for group, seconds in reversed(self._groups):
                async with asyncio.TaskGroup() as stopping:
                    for process in group:
                        stopping.create_task(self._stop(process, seconds))
        finally:
            for process in self.processes:
                process.kill()

    async def _stop(self, process: Process, seconds: float) -> None:
        if not await process.stop(seconds):
            self._say(f"{process.name} did not end within {seconds:g} s and was killed")

    async def _bound_logs(self) -> None:
        while True:
            await asyncio.sleep(_LOG_LOOK_SECONDS)
            for process in self.processes:
                await process.bound_log()

    async def _keep(self, process: Process) -> None:
        backoff = Backoff(first=0.1, longest=10.0)
        while True:
            began = time.monotonic()
            await process.ended()
            if time.monotonic() - began > _STABLE_SECONDS:
                backoff.reset()
            self._say(f"{process.name} {process.how_it_ended()} and is started again{process.last_lines()}")
            await self._restart(process, backoff)
            self._say(f"{process.name} serves again, as process {process.pid}")

    async def _check(self, process: Process) -> None:
        patience, since, told = process.program.patience, 0.0, ""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            if not process.serves:
                # It is being started, which `_keep` does and tells.
                since = 0.0
                continue
            problem = await process.problem()
            if problem is None:
                if told:
                    self._say(f"{process.name} does its work again")
                patience, since, told = process.program.patience, 0.0, ""
                continue
            now = time.monotonic()
            # Told from the second time on, and again when the reason changes.
            if since and told != str(problem):
                told = str(problem)
                self._say(f"{process.name} runs, but does not do its work: {problem}")
            since = since or now
            if problem.restart and now - since > patience:
                self._say(f"{process.name} has not done its work for {now - since:.0f} s: it is restarted")
                patience = min(2 * patience, _LONGEST_PATIENCE_SECONDS)
                await process.stop(_STOP_SECONDS)

    async def _restart(self, process: Process, backoff: Backoff) -> None:
        while True:
            await backoff.wait()
            try:
                await process.start()
            except Exception as error:  # noqa: BLE001 - a full disk, for example: no reason to stop what still runs
                problem = str(error) or type(error).__name__
                self._say(f"{problem}\n{process.name} is started again, attempt {backoff.failures + 1}")
                # It may run although its probe failed, and then it could not be started.
                await process.stop()
            else:
                return

    def _changed(self) -> None:
        running = [
            {"name": process.name, "pid": pid, "created": _created(pid), "signal": process.program.orphan_signal.value}
            for process in self.processes
            if (pid := process.pid)
        ]
        try:
            write_atomically(self._directory / "processes.json", json.dumps(running))
            self._on_change(self.processes)
        except OSError as error:
            # What is written is out of date, and what runs goes on.
            self._say(f"the record of the processes cannot be written: {error}")


async def start_together(processes: Iterable[Process]) -> None:
    """Starts processes at once and returns when all serve. Raises Died as soon as one ends before that."""
    try:
        async with asyncio.TaskGroup() as starting:
            for process in processes:
                starting.create_task(process.start())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


@asynccontextmanager
async def supervise(
    directory: Path,
    *,
    say: Callable[[str], None],
    changed: Callable[[Sequence[Process]], None] = lambda _: None,
    echo: Callable[[str, str], None] | None = None,
) -> AsyncIterator[Supervisor]:
    """A supervisor that keeps its logs and its list of processes in `directory`, and at the end stops what it started.

    Processes that an earlier one left there, because it was killed, are stopped first. The caller makes sure that
    there is one at a time. `say` gets what an operator should know, `changed` all processes each time that one has
    started or ended, `echo` the name of a process and a line of its output.
    """
    (directory / "logs").mkdir(exist_ok=True)
    await _stop_leftovers(directory / "processes.json", say)
    async with asyncio.TaskGroup() as tasks:
        supervisor = Supervisor(directory, tasks, say, changed)
        echoing = tasks.create_task(_echo(supervisor, echo)) if echo else None
        # Raised after the group, which would wrap it.
        failure: Exception | None = None
        try:
            yield supervisor
        except Exception as error:  # noqa: BLE001
            failure = error
        finally:
            await supervisor.stop()
            # Where it cannot be removed, the next start finds that what it lists does not run.
            with suppress(OSError):
                (directory / "processes.json").unlink()
            if echoing:
                echoing.cancel()
    if failure:
        raise failure


def leashed(command: Sequence[str], orphan_signal: signal.Signals, user: tuple[int, int] | None = None) -> list[str]:
    """The command line that runs `command` as `user` (uid, gid), with `orphan_signal` sent to it when we end.

    On Linux "we" is the thread that starts it, so that had better be the main one.
    """
    uid, gid = user or (os.geteuid(), os.getegid())
    arguments = (os.getpid(), orphan_signal.value, uid, gid)
    # Isolated and without site-packages it costs 10 ms.
    return [sys.executable, "-I", "-S", str(_LEASH), *map(str, arguments), *command]


def write_atomically(path: Path, text: str, *, durable: bool = False) -> None:
    """Replaces a file that only its owner may read; a reader sees the old content or the new.

    If `durable`, it is on the disk when this returns.
    """
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    fresh.replace(path)
    if durable:
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Brings the names of the files in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _turn_over(log: Path) -> bool:
    """Moves the content of a log that is too large to NAME.log.1; says whether it did.

    The writer keeps the file open, so what it has is copied, and then the file is emptied: the writer appends, and so
    it goes on at the beginning. What is written between the two is lost.
    """
    try:
        size = log.stat().st_size
        if size <= _LOG_LIMIT_BYTES:
            return False
        older = log.with_name(log.name + ".1")
        try:
            copy = log.with_name(log.name + ".2")
            shutil.copyfile(log, copy)
            copy.replace(older)
        except OSError:
            copy.unlink(missing_ok=True)
            if size <= 2 * _LOG_LIMIT_BYTES:
                return False
        os.truncate(log, 0)
    except OSError:
        return False
    return True


async def _echo(supervisor: Supervisor, echo: Callable[[str, str], None]) -> None:
    try:
        while True:
            _echo_new_lines(supervisor, echo)
            await asyncio.sleep(0.2)
    finally:
        _echo_new_lines(supervisor, echo)


def _echo_new_lines(supervisor: Supervisor, echo: Callable[[str, str], None]) -> None:
    for process in supervisor.processes:
        for line in process.new_lines():
            echo(process.name, line)


async def _stop_leftovers(record: Path, say: Callable[[str], None]) -> None:
    leftovers = [entry for entry in _recorded(record) if _is_running(entry)]
    for entry in leftovers:
        say(f"{entry['name']}, process {entry['pid']}, is left over from before and is stopped")
        try:
            os.kill(entry["pid"], entry["signal"])
        except ProcessLookupError:
            pass
        except PermissionError:
            say(f"process {entry['pid']} belongs to another user: stop it by hand")
    for _ in range(int(_LEFTOVER_SECONDS / 0.02)):
        if not any(map(_is_running, leftovers)):
            return
        await asyncio.sleep(0.02)
    for entry in leftovers:
        if _is_running(entry):
            _kill_group(entry["pid"])


def _recorded(record: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(record.read_text())
    except (OSError, ValueError, RecursionError):
        return []
    # Whatever else it may hold is not ours.
    return [entry for entry in entries if _is_record(entry)] if isinstance(entries, list) else []


def _is_record(entry: Any) -> bool:
    try:
        name, pid, created, number = (entry[key] for key in ("name", "pid", "created", "signal"))
        signal.Signals(number)
    except (LookupError, TypeError, ValueError):
        return False
    return isinstance(name, str) and type(pid) is int and 1 < pid < 1 << 31 and isinstance(created, int | float)


def _is_running(entry: Mapping[str, Any]) -> bool:
    # The start time tells the process from a later one with the same number.
    created = _created(entry["pid"])
    return None not in (created, entry["created"]) and abs(created - entry["created"]) < 1


def _created(pid: int) -> float | None:
    """When a process was started, in Unix seconds; None if it does not run."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
