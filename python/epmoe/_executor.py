"""One thread for Node's asynchronous work in Python.

Jobs run in the order they came. The thread lives as long as the interpreter, so what is kept by thread (a CUDA stream,
a device, grad mode) is the same for each job unless the job asks otherwise, and nothing a job asks for outlives it.
"""

import asyncio
import collections
import contextlib
import ctypes
import json
import threading
import time

__all__ = ["report_progress"]


class Cancelled(BaseException):
    """Raised inside a job that its caller gave up."""


class _Job:
    def __init__(self, number, function, arguments, options):
        self.number, self.function, self.arguments, self.options = number, function, arguments, options


class Executor:
    def __init__(self, ring, outcome, failure):
        """``ring()`` makes JavaScript look; ``outcome(value)`` and ``failure(error)`` are what a job came to."""
        self._ring, self._outcome, self._failure = ring, outcome, failure
        self._changed = threading.Condition()
        self._jobs = collections.deque()
        self._current = None
        self._cancelled = False
        self._stopping = False
        self._events = collections.deque()
        self._results = {}
        self._loop = None
        self._task = None
        self._thread = threading.Thread(target=self._serve, name="epmoe-executor", daemon=True)
        self._thread.start()

    # ---- called on JavaScript's thread

    def submit(self, number, function, arguments, options):
        with self._changed:
            self._jobs.append(_Job(number, function, arguments, options))
            self._changed.notify()

    def cancel(self, number):
        """Drops a job that waits, interrupts one that runs Python code; native code runs to its end."""
        with self._changed:
            for job in self._jobs:
                if job.number == number:
                    self._jobs.remove(job)
                    self._tell(number, "dropped", "")
                    return
            if self._current is not None and self._current.number == number:
                self._give_up()

    def events(self):
        """What has happened since the last call: ``[number, kind, text]`` each."""
        news = []
        while self._events:
            news.append(self._events.popleft())
        return news

    def collect(self, number):
        return self._results.pop(number)

    def ring(self):
        self._ring()

    def stop(self, seconds):
        """Ends the thread; whether it did within the time."""
        with self._changed:
            self._stopping = True
            self._jobs.clear()
            if self._current is not None:
                self._give_up()
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # ---- the thread

    def _serve(self):
        while not self._stopping:
            # A cancellation that comes too late for its job is met here.
            with contextlib.suppress(Cancelled):
                self._serve_one()
        if self._loop is not None:
            self._loop.close()

    def _serve_one(self):
        with self._changed:
            while not self._jobs and not self._stopping:
                self._changed.wait()
            if self._stopping:
                return
            job = self._current = self._jobs.popleft()
        result = None
        try:
            try:
                result = self._outcome(self._run(job))
            except BaseException as error:
                result = self._failure(error)
        finally:
            with self._changed:
                self._current = None
                if self._cancelled:
                    self._cancelled = False
                    self._interrupt(None)
            self._results[job.number] = result or self._failure(Cancelled())
            self._tell(job.number, "done", "")

    def _run(self, job):
        with contextlib.ExitStack() as stack:
            _enter(stack, job.options)
            return job.function(*job.arguments)

    def _tell(self, number, kind, text):
        self._events.append([number, kind, text])
        self._ring()

    def _give_up(self):
        """Has the current job end: a task is cancelled by its loop, which may be asleep; other code is interrupted."""
        if self._cancelled:
            return
        self._cancelled = True
        task = self._task
        if task is not None:
            self._loop.call_soon_threadsafe(task.cancel)
        else:
            self._interrupt(Cancelled)

    def _interrupt(self, exception):
        argument = None if exception is None else ctypes.py_object(exception)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident), argument)

    def report(self, value):
        if threading.current_thread() is not self._thread or self._current is None:
            return
        self._tell(self._current.number, "progress", json.dumps(value))

    # ---- what jobs can be beside calls

    @property
    def loop(self):
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop

    def run_awaitable(self, awaitable):
        async def wait():
            return await awaitable

        with self._changed:
            if self._cancelled:
                raise Cancelled
            self._task = self.loop.create_task(wait())
        try:
            return self.loop.run_until_complete(self._task)
        finally:
            self._task = None

    def next_of(self, iterator):
        """``[item]`` of an iterator, asynchronous or not; ``[]`` at its end."""
        if hasattr(iterator, "__anext__"):
            try:
                return [self.run_awaitable(iterator.__anext__())]
            except StopAsyncIteration:
                return []
        try:
            return [next(iterator)]
        except StopIteration:
            return []


def _enter(stack, options):
    """Grad mode, device and stream of one job."""
    if not options:
        return
    import torch

    if options.get("grad") is not None:
        stack.enter_context(torch.set_grad_enabled(options["grad"]))
    if options.get("device") is not None:
        stack.enter_context(torch.cuda.device(options["device"]))
    if options.get("stream") is not None:
        stream = torch.cuda.ExternalStream(options["stream"], device=options["stream_device"])
        stack.enter_context(torch.cuda.stream(stream))


_executor = None


def start(address, outcome, failure):
    """Starts the executor of this process; ``address`` is that of a C function without arguments, which wakes Node."""
    global _executor
    # With the GIL: without it, Node's thread would take it at once, and this one would have to wait for it to go on.
    _executor = Executor(ctypes.PYFUNCTYPE(None)(address), outcome, failure)
    return _executor


def ring():
    """Has JavaScript look for news; from any thread, and without waiting for it."""
    if _executor is not None:
        _executor.ring()


def report_progress(value):
    """Hands a value to the ``onProgress`` of the job that runs; elsewhere it does nothing. ``value`` must be JSON."""
    if _executor is not None:
        _executor.report(value)


def shutdown(seconds):
    """What Python does at exit: ends the executor, waits for threads, runs atexit functions, flushes output.

    Returns whether the interpreter may be finalised: False while a thread is still at work, under which that would
    crash or hang.
    """
    import atexit
    import sys

    deadline = time.monotonic() + seconds
    quiet = _executor is None or _executor.stop(seconds)
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
    atexit._run_exitfuncs()
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    return quiet and not others
