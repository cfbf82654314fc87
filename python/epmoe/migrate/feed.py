"""The shim's events on their way to Node: kept until they are taken, the oldest dropped where they are too many."""

import collections
import threading

from epmoe import _executor, shim


class Feed:
    """Events are added on the threads that launch, which never wait for JavaScript: it is rung, and takes them."""

    def __init__(self, limit):
        self._events = collections.deque(maxlen=limit)
        self._dropped = 0
        self._lock = threading.Lock()
        self._end = shim.on_event(self._add)

    def _add(self, event):
        with self._lock:
            self._dropped += len(self._events) == self._events.maxlen
            self._events.append(event)
        _executor.ring()

    def take(self):
        """What has come since."""
        with self._lock:
            events = list(self._events)
            self._events.clear()
        return events

    def dropped(self):
        """How many events nobody took in time."""
        return self._dropped

    def close(self):
        self._end()
