"""Calls that rest in the middle until somebody else has done a part of the work."""

import queue
import threading


class Handoff:
    """Runs functions on a thread of its own; inside one, :meth:`ask` hands work to whoever drives it and waits.

    The driver's thread and this one never run at the same time: :meth:`run` and :meth:`resume` return when the function
    asks or ends. So a forward pass, which knows nothing of this, can be computed in parts by another language's event
    loop.
    """

    def __init__(self, context):
        """``context()`` makes the context manager in which everything runs: grad mode is kept by thread."""
        self._answers = queue.SimpleQueue()
        self._events = queue.SimpleQueue()
        self._context = context
        self._thread = threading.Thread(target=self._serve, name="epmoe-serve", daemon=True)
        self._thread.start()

    # ---- the driver's side

    def run(self, function, *arguments):
        """Starts ``function``: ``("asked", request)``, or ``("done", result)``; raises what it raises."""
        return self._advance((function, arguments))

    def resume(self, answer):
        """Gives :meth:`ask` its result, and goes on."""
        return self._advance((True, answer))

    def fail(self, error):
        """Has :meth:`ask` raise."""
        return self._advance((False, error))

    def close(self):
        """Ends the thread. A call that rests is never finished."""
        self._answers.put(None)
        self._thread.join()

    def _advance(self, message):
        if not self._thread.is_alive():
            raise RuntimeError("the model has been closed")
        self._answers.put(message)
        kind, value = self._events.get()
        if kind == "raised":
            raise value
        return kind, value

    # ---- the function's side

    def ask(self, request):
        self._events.put(("asked", request))
        message = self._answers.get()
        if message is None:
            raise SystemExit
        done, answer = message
        if not done:
            raise answer
        return answer

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
                self._events.put(event)
                del message, function, arguments, event  # an idle thread keeps nothing alive
