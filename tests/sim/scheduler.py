"""Threads of many processes on one real thread: greenlets in the order of a simulated time, which jumps to whoever is next.

Nothing runs at the same time as anything else, and a thread gives its turn away only where it sleeps, waits, or takes a lock
that is taken. So what happens is decided by how long each of them sleeps, and that by whoever calls `sleep`: the world with
its one source of randomness. `simulated_threads` puts `Thread`, `Lock` and `Event` in the place of the module `threading` in
the processor's modules; they do what the real ones do, as far as the processor uses it.
"""

from __future__ import annotations

import contextlib
import heapq
import sys
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace, TracebackType
from typing import Any, cast

from greenlet import GreenletExit, getcurrent, greenlet


class Process:
    """What dies and pauses as a whole."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.paused_until = 0.0
        self.tasks: list[Task] = []


class Task:
    """A thread. `ticket` tells which of its places in the queue is the valid one."""

    __slots__ = ("greenlet", "name", "process", "resume", "ticket")

    def __init__(self, process: Process, name: str, run: Callable[[], object], parent: greenlet) -> None:
        self.process = process
        self.name = name
        self.ticket = 0
        self.greenlet = greenlet(run, parent)
        self.resume: Callable[[], object] = self.greenlet.switch


class _Act:
    """A call of the world at a time."""

    __slots__ = ("process", "resume", "ticket")

    def __init__(self, process: Process, resume: Callable[[], object]) -> None:
        self.process = process
        self.resume = resume
        self.ticket = 0


class Scheduler:
    """Runs what is due. All of it must be called from the thread that made it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.current: Task | None = None
        self._hub = getcurrent()
        self._switch = self._hub.switch
        self._queue: list[tuple[float, int, Task | _Act, int]] = []
        self._order = 0
        self._until = 0.0
        self._world = Process("world")

    def spawn(self, process: Process, name: str, run: Callable[[], object]) -> Task:
        """A new thread of a process; its turn comes when the present one is given away."""

        def main() -> None:
            try:
                run()
            finally:
                process.tasks.remove(task)

        task = Task(process, name, main, self._hub)
        process.tasks.append(task)
        self.wake(task)
        return task

    def call_at(self, at: float, act: Callable[[], object]) -> None:
        """Have the world do something, in between the threads."""
        self._push(at, _Act(self._world, act))

    def sleep(self, seconds: float) -> None:
        """Let the running thread go on so much later; whoever is due before that has its turn."""
        task = self.current
        assert task is not None, "only a thread can wait"
        if task.process.dead:
            raise GreenletExit
        at = self.now + seconds
        if at < self._until and at >= task.process.paused_until and (not self._queue or at < self._queue[0][0]):
            self.now = at  # nobody else is due before, so the way through the queue would end here too
            return
        task.ticket += 1
        self._order += 1
        heapq.heappush(self._queue, (at, self._order, task, task.ticket))
        self._switch()

    def park(self) -> None:
        """Let the running thread stand still until somebody wakes it."""
        task = self.current
        assert task is not None, "only a thread can wait"
        if task.process.dead:
            raise GreenletExit
        task.ticket += 1
        self._switch()

    def wake(self, task: Task) -> None:
        """Make a thread that sleeps or is parked go on now."""
        task.ticket += 1
        self._push(self.now, task)

    def run(self, until: float) -> None:
        """Everything that is due before `until`, seconds. What a thread raises ends this."""
        self._until = until
        queue = self._queue
        while queue and queue[0][0] < until:
            at, _, due, ticket = heapq.heappop(queue)
            if due.ticket != ticket or due.process.dead:
                continue
            if due.process.paused_until > at:
                self._push(due.process.paused_until, due)
                continue
            self.now = at
            self.current = due if isinstance(due, Task) else None
            due.resume()
        self.current = None
        self.now = until

    def kill(self, process: Process) -> None:
        """The process is gone at once. To be called by the world, not by a thread."""
        process.dead = True
        for task in process.tasks.copy():
            # Its `finally` blocks run, as they would not in a real death; but whatever they try to do fails as dead.
            self.current = task
            task.greenlet.throw(GreenletExit)
        self.current = None

    def _push(self, at: float, due: Task | _Act) -> None:
        self._order += 1
        heapq.heappush(self._queue, (at, self._order, due, due.ticket))


class Thread:
    def __init__(
        self,
        scheduler: Scheduler,
        *,
        target: Callable[..., object],
        args: tuple[Any, ...] = (),
        name: str = "thread",
        daemon: bool = False,
    ) -> None:
        self._scheduler = scheduler
        self._run = lambda: target(*args)
        self._name = name

    def start(self) -> None:
        assert self._scheduler.current is not None, "a thread is started by a thread of its process"
        process = self._scheduler.current.process
        self._scheduler.spawn(process, f"{process.name} {self._name}", self._run)


class Event:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._set = False
        self._waiting: list[Task] = []

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        for task in self._waiting:
            self._scheduler.wake(task)
        self._waiting.clear()

    def wait(self, timeout: float | None = None) -> bool:
        if self._set:
            return True
        task = self._scheduler.current
        assert task is not None, "only a thread can wait"
        self._waiting.append(task)
        if timeout is None:
            self._scheduler.park()
        else:
            self._scheduler.sleep(timeout)
        if task in self._waiting:
            self._waiting.remove(task)
        return self._set


class Lock:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._taken = False
        self._waiting: list[Task] = []

    def __enter__(self) -> None:
        while self._taken:
            assert self._scheduler.current is not None, "only a thread can wait"
            self._waiting.append(self._scheduler.current)
            self._scheduler.park()
        self._taken = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._taken = False
        for task in self._waiting:
            self._scheduler.wake(task)
        self._waiting.clear()


class SimClock:
    """The clocks of one process: the wall clock is what somebody set it to, the monotonic one runs at its own rate."""

    def __init__(
        self, scheduler: Scheduler, *, start_ms: int, rate: float = 1.0, step: Callable[[], object] = bool
    ) -> None:
        self._scheduler = scheduler
        self._wall_ms = start_ms
        self._rate = rate
        self._step = step

    def now_ms(self) -> int:
        return self._wall_ms + round(self._scheduler.now * 1000)

    def monotonic(self) -> float:
        self._step()
        return self._scheduler.now * self._rate

    def wait(self, event: Any, timeout_s: float) -> bool:
        return cast(Event, event).wait(timeout_s / self._rate)

    def jump(self, seconds: float) -> None:
        """Set the wall clock, forward or back."""
        self._wall_ms += round(seconds * 1000)


class InPlace:
    """In the place of a pool of threads, of which the checks make one for each archive: nothing here waits."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> InPlace:
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, act: Callable[[Any], Any], over: Iterable[Any]) -> Iterator[Any]:
        return (act(one) for one in over)


@contextlib.contextmanager
def simulated_threads(scheduler: Scheduler, **constants: float) -> Iterator[None]:
    """The processor's threads are the scheduler's. `constants`: other values for constants of its modules, by name."""
    threads = SimpleNamespace(
        Thread=lambda **given: Thread(scheduler, **given),
        Event=lambda: Event(scheduler),
        Lock=lambda: Lock(scheduler),
    )
    modules = [module for name, module in sys.modules.items() if name.startswith("penstock.processor.")]
    with contextlib.ExitStack() as undo:
        for name, value in {"threading": threads, **constants}.items():
            for module in modules:
                if hasattr(module, name):
                    undo.callback(setattr, module, name, getattr(module, name))
                    setattr(module, name, value)
        yield
