"""Ranks that watch each other: every rank tells the store that it lives and where it is, and reads it of the others.

Neither gloo nor NCCL says which rank a collective waits for in vain, and a rank that is frozen closes no connection.
Here a thread writes a beat a few times within the timeout, with the number of the call the rank has come to; a rank
that is silent for half the timeout counts as dead.
"""

import contextlib
import datetime
import json
import os
import sys
import threading
import time

from epmoe.errors import EpmoeError


class Watch:
    """``ranks`` are the group's ranks as the job counts them, ``rank`` one of them, ``timeout`` seconds.

    ``connect`` opens a connection to the store for the thread alone. ``host`` says who keeps the store: the rank, or
    -1, and words for it.
    """

    def __init__(self, connect, host, rank, ranks, timeout):
        self.timeout, self.rank, self.host = timeout, rank, host
        self.interval = min(1.0, timeout / 12)
        self.patience = timeout / 2
        self.calls = 0
        self.broken = None
        self._peers = {peer: _Peer() for peer in ranks if peer != rank}
        self._store = connect(datetime.timedelta(seconds=self.patience))
        self._state = {"state": "alive"}
        self._beats = 0
        self._in_call = False
        self._device_work = None
        self._lost_store = None
        # Silence is counted up to here: a rank that was frozen itself must not take the others for dead.
        self._last_read = time.monotonic()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="epmoe-watch", daemon=True)

    def start(self):
        """Once every rank has beaten for the first time."""
        self._thread.start()

    def enter(self):
        """A call begins."""
        self.must_be_whole()
        self.calls += 1
        self._in_call = True

    def must_be_whole(self):
        """Raises the error of an earlier call that has failed."""
        if self.broken is not None:
            raise self.broken.with_traceback(None)  # or each time adds to what it has

    def leave(self, device_work=None):
        """The host is done with the call; ``device_work`` is a CUDA event behind what the GPU still does for it."""
        self._in_call = False
        self._device_work = None if device_work is None else (device_work, time.monotonic(), self.calls)

    def check(self, deadline):
        """To be called while waiting: raises when a rank is lost, or when the deadline has passed."""
        lost = self.lost()
        if lost:
            raise self.fail(self._lost(lost, self.calls))
        if time.monotonic() > deadline:
            raise self.fail(self._late(self.calls))

    def diagnose(self, error):
        """The error for a collective that failed: waits until it is known which rank is to blame."""
        until = time.monotonic() + self.patience + 2 * self.interval
        while not (lost := self.lost()) and time.monotonic() < until:
            time.sleep(self.interval / 4)
        return self.fail(self._lost(lost or {-1: f"nobody is silent, but: {error}"}, self.calls))

    def fail(self, error, blame=None):
        """Marks this rank as one that takes part in nothing more, tells the others, and returns the error."""
        if self.broken is None:
            self.broken = error
            blame = blame or getattr(error, "blame", None) or {self.rank: f"failed: {error}"}
            told = {str(rank): why for rank, why in blame.items()}
            self._state = {"state": "failed", "blame": told, "late": error.code == "ERR_RANK_LATE"}
            self._beat()
        return error

    def lost(self):
        """Ranks that will not come to the call this rank is in, each with the reason."""
        now = time.monotonic()
        blamed, silent = {}, {}
        for rank, peer in self._peers.items():
            if peer.state == "failed":
                blamed.update({int(each): why for each, why in peer.blame.items()})
            elif peer.state == "left":
                if peer.calls < self.calls:
                    silent[rank] = f"left the job after {_calls(peer.calls)}"
            elif self._last_read - peer.seen > self.patience:
                silent[rank] = f"has given no sign of life for {now - peer.seen:.1f} s"
        if self._lost_store is not None and now - self._lost_store > self.patience:
            host, what = self.host
            silent[host] = f"{what} cannot be reached any more"
        return blamed or silent

    def stop(self):
        """This rank leaves. After a failure the thread goes on, so that the process ends without tearing down
        process groups that wait for dead ranks."""
        if self.broken is not None or self._stopped.is_set():
            return
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(self.timeout)
        self._state = {"state": "left"}
        self._beat()

    def _run(self):
        while not self._stopped.wait(self.interval):
            self._beat()
            self._read()
            self._end_if_stuck()

    def _beat(self):
        with self._lock:
            self._beats += 1
            record = {**self._state, "beats": self._beats, "calls": self.calls}
            self._reach(lambda: self._store.set(f"beat/{self.rank}", json.dumps(record)))

    def _read(self):
        with self._lock:
            peers = list(self._peers)
            records = self._reach(lambda: self._store.multi_get([f"beat/{rank}" for rank in peers]) if peers else [])
        if records is None:
            return
        self._last_read = time.monotonic()
        for rank, record in zip(peers, records, strict=True):
            self._peers[rank].read(json.loads(record))

    def _reach(self, action):
        """Uses the store; once it could not be reached, never again."""
        if self._lost_store is not None:
            return None
        try:
            return action()
        except Exception:
            self._lost_store = time.monotonic()
            return None

    def _end_if_stuck(self):
        """Work that the GPU does for a call nobody waits for any more on the host: it would never end, nor say so."""
        work = self._device_work
        if work is None:
            return
        event, since, calls = work
        if _is_done(event):
            if self._device_work is work:
                self._device_work = None
            return
        waited = time.monotonic() - since
        lost = self.lost()
        if (lost and waited > self.patience) or (waited > self.timeout and self._behind()):
            error = self.fail(self._lost(lost, calls) if lost else self._late(calls))
            print(f"epmoe: rank {self.rank} ends: {error}", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(1)

    def _behind(self):
        return [rank for rank, peer in self._peers.items() if peer.calls < self.calls]

    def _lost(self, lost, call):
        """The error for :meth:`lost`. A rank that another one has waited for in vain is late here too."""
        told = [peer for peer in self._peers.values() if peer.state == "failed"]
        late = bool(told) and all(peer.late for peer in told)
        return self._error("ERR_RANK_LATE" if late else "ERR_RANK_LOST", lost, call)

    def _late(self, call):
        why = {rank: f"has come to {_calls(self._peers[rank].calls)} only" for rank in self._behind()}
        return self._error("ERR_RANK_LATE", why or {-1: "a collective that does not end"}, call)

    def _error(self, code, blame, call):
        expected, hint = _EXPECTED[code]
        error = EpmoeError(
            code,
            op="expert_parallel",
            expected=expected.format(call=call, timeout=self.timeout),
            received=", ".join(why if rank < 0 else f"rank {rank} {why}" for rank, why in sorted(blame.items())),
            hint=hint,
        )
        error.blame = blame
        return error


_EXPECTED = {
    "ERR_RANK_LOST": (
        "every rank in call {call}",
        "The job cannot go on: end every rank and start it again; torchrun does so with --max-restarts",
    ),
    "ERR_RANK_LATE": (
        "every rank in call {call} within {timeout:g} s",
        "Every rank calls its layers equally often, in one order; a longer timeout gives them more time",
    ),
}


class _Peer:
    """What is known of another rank."""

    def __init__(self):
        self.seen, self.beats, self.calls = time.monotonic(), 0, 0
        self.state, self.blame, self.late = "alive", {}, False

    def read(self, record):
        if record["beats"] != self.beats:
            self.seen = time.monotonic()
        self.beats, self.calls, self.state = record["beats"], record["calls"], record["state"]
        self.blame, self.late = record.get("blame", {}), record.get("late", False)


def _is_done(event):
    try:
        return event.query()
    except Exception:  # the work has failed, which whoever waits for it is told
        return True


def _calls(count):
    return "no call" if count == 0 else f"call {count}"
