"""How each kernel is served, and what has happened to it."""

import collections
import contextlib
import itertools
import math
import os
import random
import threading
import time
import warnings

from epmoe._shim.signatures import HELPERS, KERNELS, NAMES
from epmoe.errors import EpmoeError

MODES = ("triton", "epmoe", "shadow", "off")
ENVIRONMENT = "EPMOE_SHIM"
MAX_EVENTS, MAX_REASONS, MAX_SHAPES, MAX_TIMED, MAX_TIMES = 1000, 64, 4096, 256, 8
SETTINGS = {
    "numerics": "triton",  # "fp32": float32 with one rounding
    "strict": False,
    "rate": 0.01,
    "first_per_shape": 1,
    "max_ulp": 0,
    "trip_after": 3,
    "max_overhead": 0.01,  # of the time, on the host; 0: no bound
}
lock = threading.RLock()


class Count:
    """Counts in one call of C, so that threads lose nothing of it: a lock would cost more than all the rest."""

    def __init__(self):
        self._numbers = itertools.count()
        self.up = self._numbers.__next__

    def __int__(self):
        return int(repr(self._numbers)[len("count(") : -1])


class Comparing:
    """Seconds that comparing has taken of the host, for all kernels together."""

    def __init__(self):
        self.lock = threading.Lock()
        self.seconds = 0.0

    def spent(self, seconds):
        with self.lock:
            self.seconds += seconds


comparing = Comparing()


class Control:
    """A kernel's mode, settings and counts. What is asked on every launch are plain attributes."""

    def __init__(self, name):
        self.name = name
        self.op = (KERNELS[name][0] if name in KERNELS else HELPERS[name]).op
        self.lock = threading.Lock()
        self.mode = "epmoe"
        self.chosen = "default"
        for setting, value in SETTINGS.items():
            setattr(self, setting, value)
        self.recording = Sampler(0, 0)
        self.reset()

    def reset(self):
        self.by_triton, self.by_epmoe, self.refused = Count(), Count(), Count()  # of every launch, one
        self.since = time.perf_counter()
        self.counts = collections.Counter()
        self.reasons = collections.Counter()
        self.seconds = collections.Counter()
        self.timings = {}
        self.tripped = ""
        self.failures = 0
        self.sampler = Sampler(self.rate, self.first_per_shape)
        self.start_clock()

    def start_clock(self):
        """What comparing takes is set against the time from here on: what passed before it began buys nothing."""
        self.began, self.already = time.perf_counter(), comparing.seconds

    def puts_off(self):
        """Whether comparing has had its share of the time, so that a launch that chance picked is passed over, which
        is counted."""
        if not self.max_overhead:
            return False
        if comparing.seconds - self.already <= self.max_overhead * (time.perf_counter() - self.began):
            return False
        self.count("put_off")
        return True

    def count(self, name, by=1):
        with self.lock:
            self.counts[name] += by

    def spent(self, name, seconds):
        with self.lock:
            self.seconds[name] += seconds
        if name == "shadow":
            comparing.spent(seconds)

    def fell_back(self, key, reason, what="fallbacks"):
        """Counts a call that epmoe did not take, and warns of each kind of reason once: whether this was the first."""
        with self.lock:
            self.counts[what] += 1
            known = key in self.reasons
            if not known and len(self.reasons) >= MAX_REASONS:
                key, known = "other reasons", True
            self.reasons[key] += 1
        if not known:
            warnings.warn(f"epmoe.shim: {self.name} stays with Triton: {reason}", RuntimeWarning, stacklevel=2)
        return not known

    def wants_times(self, shape):
        held = self.timings.get(shape)
        return len(self.timings) < MAX_TIMED if held is None else held[0] < MAX_TIMES

    def timed(self, shape, triton, epmoe):
        """Keeps the shortest times of a shape, in seconds: the first launches compile."""
        with self.lock:
            held = self.timings.get(shape)
            if held is None and len(self.timings) >= MAX_TIMED:
                return
            count, *least = held or (0, triton, epmoe)
            self.timings[shape] = count + 1, min(least[0], triton), min(least[1], epmoe)

    def failed(self, event, times=1):
        """A mismatch or an error while in shadow; after ``trip_after`` of them the kernel goes back to Triton."""
        with self.lock:
            self.failures += times
            trips = self.mode == "shadow" and 0 < self.trip_after <= self.failures
            if trips:
                self.mode, self.chosen = "triton", "tripped"
                self.tripped = f"{self.failures} failures in shadow, the last: {event['what']}"
        if trips:
            events.add(self.name, "tripped", self.tripped)

    def stats(self):
        with self.lock:
            counts = {name: self.counts[name] for name in COUNTS}
            triton, epmoe, refused = int(self.by_triton), int(self.by_epmoe), int(self.refused)
            counts.update(launches=triton + epmoe + refused, triton=triton, epmoe=epmoe)
            elapsed, shadow = time.perf_counter() - self.since, self.seconds["shadow"]
            return {
                "op": self.op,
                "mode": self.mode,
                "chosen_by": self.chosen,
                **counts,
                "reasons": dict(self.reasons),
                "tripped": self.tripped,
                "elapsed_seconds": elapsed,
                "shadow_seconds": shadow,
                "record_seconds": self.seconds["record"],
                "shadow_overhead": shadow / elapsed if elapsed else 0.0,
                "shapes": self.sampler.known(),
                "timings": {
                    shape: {"samples": count, "triton_seconds": triton, "epmoe_seconds": epmoe}
                    for shape, (count, triton, epmoe) in self.timings.items()
                },
            }


COUNTS = (
    "launches",
    "triton",
    "epmoe",
    "fallbacks",  # asked of epmoe, served by Triton
    "sampled",
    "put_off",  # passed over, though the rate would have had them sampled, by max_overhead
    "compared",
    "matched",
    "mismatches",
    "errors",  # in epmoe, while in shadow
    "uncovered",  # in shadow, of a kind that epmoe refuses
    "captured",  # launches under CUDA graph capture
    "staged",  # those of them whose replays are compared, each counted as compared
    "uncompared",  # those of them that should have been, and are not, for the reason told
    "pending",
    "recorded",
    "record_failures",
)


class Sampler:
    """The first launches of each shape, then a share of the others by chance: how many are passed over until the next
    is drawn at once, for that costs less than a chance for each."""

    def __init__(self, rate, first_per_shape, seed=None):
        self.rate, self.first = rate, first_per_shape
        self.random = random.Random(seed).random
        self.seen = {}
        self.left = self._gap()

    def _gap(self):
        """Of independent chances, how many fail before one does not; its fraction says nothing."""
        if self.rate <= 0:
            return math.inf
        return 0 if self.rate >= 1 else math.log(1 - self.random()) / math.log1p(-self.rate)

    def is_first(self, shape):
        """Whether this is one of the first of its shape, to be asked while ``first`` is above 0."""
        times = self.seen.get(shape, 0)
        if times >= self.first or (times == 0 and len(self.seen) >= MAX_SHAPES):
            return False
        self.seen[shape] = times + 1
        return True

    def by_chance(self):
        if self.left >= 1:
            self.left -= 1
            return False
        self.left = self._gap()
        return True

    def wants(self, shape_of, call):
        """Whether to take this one; ``shape_of(*call)`` is asked for while shapes count."""
        return (self.first > 0 and self.is_first(shape_of(*call))) or self.by_chance()

    def known(self):
        return len(self.seen)


class Events:
    """The last things that happened, in a bounded queue; listeners hear each once, as it comes."""

    def __init__(self):
        self.queue = collections.deque(maxlen=MAX_EVENTS)
        self.listeners = []
        self.number = itertools.count(1)

    def add(self, kernel, kind, what, **more):
        event = {"number": next(self.number), "time": time.time(), "kernel": kernel, "kind": kind, "what": what, **more}
        self.queue.append(event)
        for listener in list(self.listeners):
            try:
                listener(event)
            except Exception as error:  # a listener is no part of serving
                warnings.warn(f"epmoe.shim: a listener failed: {type(error).__name__}: {error}", RuntimeWarning, 2)
        return event


events = Events()
controls = {name: Control(name) for name in NAMES}


def names_of(kernel):
    """The kernels that a name stands for: its own, with or without ``_triton_kernel``, or ``*``."""
    if kernel == "*":
        return NAMES
    for name in (kernel, f"{kernel}_triton_kernel"):
        if name in controls:
            return (name,)
    raise _bad("kernel", "'*', " + ", ".join(name.removesuffix("_triton_kernel") for name in NAMES), repr(kernel))


def checked_mode(mode):
    if mode not in MODES:
        raise _bad("mode", ", ".join(MODES), repr(mode))
    return mode


def _bad(argument, expected, received):
    return EpmoeError("ERR_VALUE", op="shim", argument=argument, expected=expected, received=received)


def choose(modes, by):
    """Sets modes; those given by a kernel's name win over ``*``."""
    found = {}
    for kernel in sorted(modes, key=lambda each: each != "*"):
        found.update(dict.fromkeys(names_of(kernel), checked_mode(modes[kernel])))
    with lock:
        for name, mode in found.items():
            control = controls[name]
            with control.lock:
                if mode == "shadow" and control.mode != "shadow":
                    control.start_clock()
                control.mode, control.chosen, control.tripped, control.failures = mode, by, "", 0


def from_environment():
    """``post_reorder=shadow,*=triton``; one mode alone is meant for all."""
    text = os.environ.get(ENVIRONMENT, "").strip()
    if not text:
        return {}
    found = {}
    for part in filter(None, map(str.strip, text.split(","))):
        kernel, equals, mode = map(str.strip, part.rpartition("="))
        try:
            names_of(kernel if equals else "*")
            found[kernel if equals else "*"] = checked_mode(mode)
        except EpmoeError as error:
            raise _bad(ENVIRONMENT, error.expected, repr(part)) from None
    return found


def check_settings(settings):
    """Raises for the first setting that is unknown or has a value it cannot have."""
    for name, value in settings.items():
        if name not in SETTINGS:
            raise _bad("setting", ", ".join(SETTINGS), repr(name))
        if name == "numerics":
            good, expected = value in ("triton", "fp32"), "'triton' or 'fp32'"
        elif name == "strict":
            good, expected = isinstance(value, bool), "True or False"
        else:
            numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
            good, expected = numeric and value >= 0, "a number from 0 on"
            if name == "rate":
                good, expected = good and value <= 1, "a number from 0 to 1"
        if not good:
            raise _bad(name, expected, repr(value))


def configure(kernel, settings):
    """Checks every setting before it sets one."""
    check_settings(settings)
    for name in names_of(kernel):
        control = controls[name]
        with control.lock:
            for setting, value in settings.items():
                setattr(control, setting, value)
            control.sampler = Sampler(control.rate, control.first_per_shape)
            control.start_clock()


class Recorder:
    """Where capsules go: to a ring on disk, or nowhere. Failures are counted and never reach a launch."""

    def __init__(self):
        self.ring = None

    def write(self, control, capsule):
        """The path written to, or None."""
        ring = self.ring
        if ring is None:
            return None
        try:
            path = str(ring.add(capsule))
        except Exception as error:
            control.count("record_failures")
            events.add(control.name, "record_failed", f"{type(error).__name__}: {error}")
            return None
        control.count("recorded")
        return path


recorder = Recorder()


@contextlib.contextmanager
def timed(control, what):
    begin = time.perf_counter()
    try:
        yield
    finally:
        control.spent(what, time.perf_counter() - begin)
