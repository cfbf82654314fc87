"""Times implementations of one call side by side: interleaved, until the medians are known well enough.

On CUDA a sample is a replay of a graph that holds many calls, so that no launch is in it; on the CPU, a run of calls.
"Cold" calls rotate over copies of the arguments that together exceed the caches.
"""

import inspect
import math
import statistics
import time

import torch

from epmoe import references

__all__ = ["Clock", "Copy", "call_of", "measure"]

_LEAST_REPLAY = 0.002  # seconds; starting and ending a replay takes some ten microseconds
_MOST_CALLS = 2000
_REST = 0.02  # seconds between samples on the CPU


def call_of(op, name, arguments):
    """A callable of no arguments, or why there is none. ``name`` is epmoe, epmoe:triton-numerics, or a reference's."""
    if name.startswith("epmoe"):
        import epmoe

        function = getattr(epmoe, op)
        more = {"numerics": "triton"} if name.endswith("triton-numerics") else {}
        if more and "numerics" not in inspect.signature(function).parameters:
            return "has no rounding to choose"
        return lambda: function(**arguments, **more)
    if name == "torch.compile":
        function = torch.compile(references.references_of(op)["torch"].run)
        return lambda: function(**arguments)
    reference = references.references_of(op)[name]
    problem = reference.problem() or reference.objection(**arguments)
    return problem or (lambda: reference.run(**arguments))


def _clone(arguments):
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}


def _nbytes(arguments):
    return sum(value.nbytes for value in arguments.values() if isinstance(value, torch.Tensor))


class Copy:
    """A copy of so many bytes: what memory gives a kernel that only moves.

    On CUDA the copy is launched on a stream, which a kernel does; as a node of a graph, a slower engine may do it.
    """

    def __init__(self, device, nbytes):
        source = torch.arange(nbytes // 4, dtype=torch.int32, device=device).mul_(-1640531527)  # not compressible
        target = torch.empty_like(source)
        self._bytes = 2 * source.nbytes
        self._clock = Clock(device, [lambda: target.copy_(source)], capture=False)

    def rate(self):
        """Bytes read plus written a second, now."""
        return self._bytes / statistics.median(self._clock.samples(9))


class Clock:
    """Seconds a call, of calls that are made in turn."""

    def __init__(self, device, calls, capture=True):
        self.cuda = torch.device(device).type == "cuda"
        self.calls = calls
        self.graph = None
        self.note = ""
        for call in calls:
            call()
        if self.cuda and capture:
            self._capture()
        self.repeats = max(1, math.ceil(0.002 / max(1e-7, self._once())) if self.graph is None else 1)

    def _capture(self):
        """Captures enough calls that what starts and ends a replay is lost among them."""
        self.count = len(self.calls)
        try:
            while True:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for i in range(self.count):
                        self.calls[i % len(self.calls)]()
                self.graph = graph
                spent = min(self._replay() for _ in range(3)) * self.count
                if spent > _LEAST_REPLAY or self.count >= _MOST_CALLS:
                    return
                enough = math.ceil(1.2 * _LEAST_REPLAY / spent * self.count)
                self.count = min(_MOST_CALLS, max(2 * self.count, enough))
        except Exception as error:  # waits for the GPU, allocates outside the pool, ...
            torch.cuda.synchronize()
            self.graph = None
            self.note = f"not captured: {type(error).__name__}"

    def _once(self):
        begin = time.perf_counter()
        for call in self.calls:
            call()
        if self.cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / len(self.calls)

    def _stream(self):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(self.repeats):
            for call in self.calls:
                call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3 / self.repeats / len(self.calls)

    def _replay(self):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        self.graph.replay()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3 / self.count

    def sample(self):
        if self.graph is not None:
            return self._replay()
        if self.cuda:
            return self._stream()
        # Threads of the implementation before may still wait busily for more work, on the cores that this one needs.
        time.sleep(_REST)
        self._once()
        return sum(self._once() for _ in range(self.repeats)) / self.repeats

    def samples(self, count):
        self.sample()
        return [self.sample() for _ in range(count)]

    def launch(self):
        """Seconds of the host's time a call, on CUDA; the CPU has no launch apart from the work."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(100):
            self.calls[0]()
        spent = (time.perf_counter() - begin) / 100
        torch.cuda.synchronize()
        return spent


def _outputs_agree(ours, theirs, outputs):
    """None, or what differs: a timing of a wrong answer is worth nothing. Parity says how close."""
    for name in outputs:
        a, b = ours[name], theirs[name]
        if not a.dtype.is_floating_point:
            if not torch.equal(a, b):
                return f"{name} differs"
            continue
        a, b = a.float(), b.float()
        both = torch.isfinite(a) & torch.isfinite(b)
        if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
            return f"{name} is not finite in the same places"
        a, b = a[both], b[both]
        if (a - b).norm() > 0.03 * b.norm() + 1e-6:
            return f"{name} differs"
    return None


def measure(op, names, arguments, outputs, seconds, cold_bytes):
    """Times each named implementation on the same arguments.

    Returns ``{name: {"samples": [s], "cold": bool, "launch": s or None, "problem": str or None, "note": str}}``. Spread
    is for the caller to judge: sampling stops when every median is known to half a percent, or after ``seconds``.
    """
    device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))
    copies = max(1, min(64, math.ceil(cold_bytes / max(1, _nbytes(arguments))))) if cold_bytes else 1
    results, clocks, reference = {}, {}, None
    for name in names:
        sets = [arguments if i == 0 and copies == 1 else _clone(arguments) for i in range(copies)]
        calls = [call_of(op, name, each) for each in sets]
        problem = calls[0] if isinstance(calls[0], str) else None
        results[name] = {"samples": [], "launch": None, "problem": problem, "note": "", "cold": copies > 1}
        if problem:
            continue
        try:
            for call in calls:
                call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            made = {key: sets[0][key].clone() for key in outputs}
            reference = reference or made
            results[name]["problem"] = _outputs_agree(made, reference, outputs)
            clock = Clock(device, calls)
        except Exception as error:
            results[name]["problem"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        if results[name]["problem"] is None:
            clocks[name] = clock
            results[name].update(launch=clock.launch(), note=clock.note)
    until = time.perf_counter() + seconds
    while clocks:
        for name, clock in clocks.items():
            results[name]["samples"].append(clock.sample())
        known = all(_uncertainty(results[name]["samples"]) < 0.005 for name in clocks)
        if known or time.perf_counter() > until:
            break
    return results


def _uncertainty(samples):
    """Of the median, relative: the quartiles' distance over the root of the count. Infinite for a few samples."""
    if len(samples) < 9:
        return math.inf
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / middle / math.sqrt(len(samples))
