"""Shadow: Triton serves, epmoe runs beside it on outputs of its own, and the two are compared.

An output that the kernel writes every element of is made afresh for epmoe, poisoned, so that what it leaves out shows.
Any other is cloned before the launch, so that what both leave as it is compares equal. The comparison is computed on
the device. On CUDA its result is fetched when it is there, at a later launch, so that no launch waits for the device.
"""

import collections
import contextlib
import threading
import time

import torch

from epmoe import _call
from epmoe._shim.control import events, recorder, timed
from epmoe._shim.forms import Refused
from epmoe.migrate import calls
from epmoe.migrate import capsule as capsules

MAX_PENDING = 16
_EXACT_IN_FLOAT32 = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

pending = collections.deque()
_unused = collections.deque(maxlen=64)
_pending_lock = threading.Lock()


# A torch without CUDA has a function that raises, which is not worth a microsecond of every launch to find again.
_never = None if torch.backends.cuda.is_built() else getattr(torch.cuda, "is_current_stream_capturing", None)


def capturing():
    """Whether the current stream is being captured into a CUDA graph."""
    try:
        ask = torch.cuda.is_current_stream_capturing
        return ask is not _never and ask()
    except (RuntimeError, AssertionError, AttributeError):
        return False


def captured(control, why):
    """Tells, once for each reason, of a launch under capture of which no replay will be compared."""
    if control.fell_back(f"captured: {why}", why, "uncompared"):
        events.add(control.name, "captured", f"a launch under CUDA graph capture is not compared: {why}")


# ---------------------------------------------------------------- comparison


def _bits(tensor):
    return tensor.contiguous().view(_BITS[tensor.element_size()])


def measure(expected, actual, max_ulp=0):
    """Where ``actual`` differs, as a float64 tensor on their device: how many elements, the first one's flat index, and
    the largest error, as it is and in units in the last place. Shapes and dtypes must be equal.

    Two NaN are the same. With ``max_ulp``, so is what is no further apart than that many units in the last place, taken
    at the largest magnitude of the row (the last axis) of ``expected``: sums that cancel have no other.
    """
    wrong = _bits(expected) != _bits(actual)
    if not expected.is_floating_point():
        error = (expected.double() - actual.double()).abs()
        return _summary(wrong, error, error)
    a, b = _wide(expected), _wide(actual)
    wrong &= ~(a.isnan() & b.isnan())
    error, ulps = _distance(a, b, expected.dtype)
    if max_ulp:
        wrong &= ~(ulps <= max_ulp)
    return _summary(wrong, error, ulps)


def differing(expected, actual, max_ulp=0):
    """Which elements differ in the sense of :func:`measure`, by nothing that waits for the device."""
    wrong = _bits(expected) != _bits(actual)
    if not expected.is_floating_point():
        return wrong
    a, b = _wide(expected), _wide(actual)
    wrong &= ~(a.isnan() & b.isnan())
    return wrong & ~(_distance(a, b, expected.dtype)[1] <= max_ulp) if max_ulp else wrong


def _wide(tensor):
    return tensor.to(torch.float32 if tensor.dtype in _EXACT_IN_FLOAT32 else torch.float64)


def _distance(a, b, dtype):
    """How far apart, as it is and in units in the last place of the row's largest magnitude."""
    error = (a - b).abs()
    finite = torch.where(a.isfinite(), a.abs(), 0)
    largest = finite.amax(-1, keepdim=True) if a.dim() else finite
    info = torch.finfo(dtype)
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1) * info.eps
    return error, error / unit.clamp(min=info.smallest_normal * info.eps)


def _summary(wrong, error, ulps):
    flat = wrong.reshape(-1)
    if flat.numel() == 0:
        return torch.zeros(4, dtype=torch.float64, device=flat.device)
    infinite = float("inf")
    worst = [
        torch.where(flat, each.reshape(-1).double().nan_to_num(infinite, infinite), 0).amax() for each in (error, ulps)
    ]
    return torch.stack([flat.sum().double(), flat.to(torch.uint8).argmax().double(), *worst])


def _index(flat, shape):
    found = []
    for size in reversed(shape):
        flat, at = divmod(flat, size)
        found.append(at)
    return tuple(reversed(found))


class _Fetched:
    """Flags on their way to the host. The pinned memory and the event are used again: making them takes longer."""

    MOST_FLAGS = 8

    def __init__(self):
        self.host = torch.empty(self.MOST_FLAGS, dtype=torch.bool, pin_memory=True)
        self.events = {}

    @classmethod
    def of(cls, flags):
        try:
            own = _unused.pop()
        except IndexError:
            own = cls()
        own.device, own.count = flags[0].device, len(flags)
        with torch.cuda.device(own.device):
            own.event = own.events.get(own.device) or own.events.setdefault(own.device, torch.cuda.Event())
            own.host[: own.count].copy_(torch.stack(flags), non_blocking=True)
            own.event.record()
        return own

    def flags(self):
        """Waits for them, and gives the memory back."""
        self.event.synchronize()
        found = self.host[: self.count].tolist()
        _unused.append(self)
        return found


class Comparison:
    """Of named outputs, in two steps: whether a bit differs, which is on its way to the host at once; and, where one
    does, where and by how much. On CUDA ``expected`` has to be memory that serving does not write to."""

    def __init__(self, control, expected, actual):
        self.control, self.findings, self.pairs = control, [], {}
        flags = []
        for name, tensor in expected.items():
            other = actual.get(name)
            told = [None if each is None else (tuple(each.shape), str(each.dtype)) for each in (tensor, other)]
            if told[0] != told[1]:
                self.findings.append({"output": name, "what": f"{name} is {told[1]}, not {told[0]}"})
            elif tensor.numel():
                self.pairs[name] = tensor, other
                flags.append((_bits(tensor) != _bits(other)).any())
        self.flags, self.fetched = flags, None
        if flags and flags[0].is_cuda:
            self.fetched = _Fetched.of(flags)

    def is_there(self):
        return self.fetched is None or self.fetched.event.query()

    def result(self):
        """What differs: an empty list when nothing does."""
        if self.fetched is not None:
            fetched, self.fetched = self.fetched, None
            self.flags = fetched.flags()
            _call.check(fetched.device)  # an index out of range that epmoe's kernel met is an error of this comparison
        for (name, (expected, actual)), differs in zip(self.pairs.items(), self.flags, strict=True):
            if not differs:
                continue
            wrong, first, error, ulps = measure(expected, actual, self.control.max_ulp).tolist()
            if not wrong:
                continue
            wrong, total, first = int(wrong), expected.numel(), _index(int(first), expected.shape)
            finding = {"output": name, "mismatched": wrong, "elements": total, "first_index": first}
            what = f"{name}: {wrong} of {total} differ, the first at {list(first)}, by up to {error:g}"
            self.findings.append({**finding, "max_abs": error, "max_ulp": ulps, "what": what})
        self.pairs = {}
        return self.findings


# ---------------------------------------------------------------- a launch


# torch's own tests use it; a torch without it times launches too.
_idle = getattr(torch.cuda, "_sleep", lambda cycles: None)


class Stopwatch:
    """Seconds that work took: on CUDA between events of its stream, read when they are there. The GPU idles first, so
    that a kernel is in its queue before it comes to it: of a short one, the launch would be timed otherwise."""

    IDLE_CYCLES = 200_000  # 0.1 ms: several launches from Python

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self):
        if self.cuda:
            _idle(self.IDLE_CYCLES)
        self.begin = self._now()
        return self

    def __exit__(self, *_):
        self.end = self._now()

    def seconds(self):
        if not self.cuda:
            return self.end - self.begin
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) / 1000


def poisoned(tensor):
    made = torch.empty_like(tensor)
    if made.numel():
        made.view(-1).view(torch.uint8).fill_(0xFF)  # NaN in every float, -1 in every int
    return made


def _overlaps(call):
    """Whether an output shares memory with an input: then the launch has changed what epmoe would read."""
    written = call.written()
    spans = {name: (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for name, t in call.tensors().items()}
    return any(
        begin < spans[output][1] and spans[output][0] < end
        for output in written
        for name, (begin, end) in spans.items()
        if name != output
    )


class Sample:
    """One sampled launch: made before it, finished after it."""

    def __init__(self, control, call, generation, launch):
        self.control, self.call = control, call
        self.op, self.scalars = call.op, call.scalars()
        self.shape = calls.label(call.op, call.tensors(), self.scalars)
        self.times = control.wants_times(self.shape)
        self.triton = self.epmoe = None
        self.generation, self.launch = generation, launch
        if _overlaps(call):
            raise Refused("an output shares memory with another argument")
        written = call.written()
        self.before = {name: tensor.clone() for name, tensor in written.items() if name not in call.whole}
        self.keeps = recorder.ring is not None
        device = next((tensor.device for tensor in call.tensors().values()), torch.device("cpu"))
        self.device = device
        # By the time that a mismatch is known on CUDA, what serving does next may have overwritten the inputs.
        later = self.keeps and device.type == "cuda"
        self.inputs = {
            name: tensor.clone() if later else tensor
            for name, tensor in call.tensors().items()
            if name not in call.outputs
        }

    def timed(self):
        """Around a launch: a Stopwatch, or None where the shape's times are known."""
        return Stopwatch(self.device) if self.times else contextlib.nullcontext()

    def finish(self, result):
        """After Triton's launch, whose ``result`` is what a helper returned: runs epmoe and compares."""
        call = self.call
        own = {name: poisoned(tensor) for name, tensor in call.written().items() if name in call.whole}
        own.update({name: tensor.clone() if self.keeps else tensor for name, tensor in self.before.items()})
        with self.timed() as self.epmoe:
            returned = call.run(own)
        if call.written():
            expected, actual = call.written(), own
        else:
            expected, actual = call.results(result), call.results(returned)
        if self.device.type == "cuda":
            expected = {name: tensor.clone() for name, tensor in expected.items()}
        self.expected, self.actual = expected, actual
        compared = (call.comparable(expected), call.comparable(actual))
        self.comparison = Comparison(self.control, *compared)
        self.call = None  # what waits for a verdict must not keep serving's tensors alive
        if not self.keeps:
            self.expected = self.actual = self.inputs = self.before = {}
        if self.comparison.fetched is None:
            self.conclude()
        else:
            self.control.count("pending")
            with _pending_lock:
                pending.append(self)

    def conclude(self):
        """Counts the verdict, tells of a mismatch and keeps it as a capsule."""
        control = self.control
        try:
            findings = self.comparison.result()
        except Exception as error:
            return failed(control, error, self.launch)
        control.count("compared")
        if self.triton is not None and self.epmoe is not None:
            control.timed(self.shape, self.triton.seconds(), self.epmoe.seconds())
        if not findings:
            return control.count("matched")
        control.count("mismatches")
        path = recorder.write(control, self.capsule(findings)) if self.keeps else None
        what = findings[0]["what"]
        event = events.add(
            control.name,
            "mismatch",
            what,
            generation=self.generation,
            findings=findings,
            launch=self.launch.told(),
            capsule=path,
        )
        control.failed(event)

    def capsule(self, findings):
        tensors = {"argument": self.inputs, "before": self.before, "triton": self.expected, "epmoe": self.actual}
        return capsule_of(self, self.launch, findings, tensors)


def capsule_of(compared, launch, findings, tensors):
    """The record of a launch that was compared, in a stream or in a graph, and differed."""
    return capsules.Capsule(
        kernel=compared.control.name,
        generation=compared.generation,
        op=compared.op,
        reason="mismatch",
        scalars=compared.scalars,
        launch=launch.told(),
        environment=capsules.environment(compared.device),
        findings=findings,
        tensors=tensors,
    )


def failed(control, error, launch=None):
    """Counts what epmoe raised while in shadow."""
    control.count("errors")
    event = events.add(control.name, "error", f"{type(error).__name__}: {error}", launch=launch and launch.told())
    control.failed(event)


def poll(wait=False):
    """Concludes the comparisons whose results are there; all of them with ``wait``. Under graph capture nothing: to ask
    for an event would end the capture."""
    while pending and not capturing():
        with _pending_lock:
            if not pending or not (wait or len(pending) > MAX_PENDING or pending[0].comparison.is_there()):
                return
            sample = pending.popleft()
        sample.control.count("pending", -1)
        with timed(sample.control, "shadow"):
            sample.conclude()
