"""Calls that rest in the middle until somebody else has done a part of the work."""

import queue
import threading


class Handoff:
    """Runs functions on a thread of its own; inside one, :meth:`ask` hands work to whoever drives it and waits.

    The driver never waits: it starts a function, is rung when there is an event, takes it, and answers. So a forward
    pass, which knows nothing of this, can be computed in parts by another language's event loop.
    """

    def __init__(self, context, ring):
        """``context()`` makes the context manager in which everything runs: grad mode is kept by thread. ``ring()`` is
        called on that thread whenever an event is there."""
        self._answers = queue.SimpleQueue()
        self._events = queue.SimpleQueue()
        self._context, self._ring = context, ring
        self._thread = threading.Thread(target=self._serve, name="epmoe-serve", daemon=True)
        self._thread.start()

    # ---- the driver's side

    def run(self, function, *arguments):
        """Starts ``function``."""
        self._go_on((function, arguments))

    def answer(self, value):
        """Gives :meth:`ask` its result."""
        self._go_on((True, value))

    def fail(self, error):
        """Has :meth:`ask` raise."""
        self._go_on((False, error))

    def take(self, wait=False):
        """``("asked", request)``, ``("done", result)``, or None for neither; raises what the function did."""
        try:
            kind, value = self._events.get(block=wait)
        except queue.Empty:
            return None
        if kind == "raised":
            raise value
        return kind, value

    def close(self):
        """Ends the thread. A call that rests is never finished."""
        self._answers.put(None)
        self._thread.join()

    def _go_on(self, message):
        if not self._thread.is_alive():
            raise RuntimeError("the model has been closed")
        self._answers.put(message)

    # ---- the function's side

    def ask(self, request):
        self._tell("asked", request)
        message = self._answers.get()
        if message is None:
            raise SystemExit
        done, answer = message
        if not done:
            raise answer
        return answer

    def _tell(self, kind, value):
        self._events.put((kind, value))
        self._ring()

    def _serve(self):
        with self._context():
            while (message := self._answers.get()) is not None:
                function, arguments = message
                try:
                    event = ("done", function(*arguments))
                except SystemExit:
                    return
                except BaseException as error:
                    event = ("raised", error)
                self._tell(*event)
                del message, function, arguments, event  # an idle thread keeps nothing alive
