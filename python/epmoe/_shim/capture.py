"""Shadow under CUDA graph capture: the comparison is captured too, and its verdict counted on the device.

What a graph replays no Python sees. So with Triton's launch, epmoe's and the comparison go into the graph; each replay
adds to counters that live outside the graph's memory, and ``poll`` reads them later. With a ring to record to, the
arguments and results of the last replay that differed are kept on the device.

The counters are made before any capture, and what is kept lies outside the graph's memory too: there, what the graph
computes earlier may share its place, and each replay would write over what an earlier one kept.
"""

import threading

import torch

from epmoe import _call
from epmoe._shim.control import events, recorder
from epmoe._shim.forms import Call, Refused
from epmoe._shim.helpers import Made
from epmoe._shim.shadow import _overlaps, capsule_of, differing, failed, poisoned

MAX_STAGES = 1024
MAX_KEPT_BYTES = 1 << 30
REPLAYS, MISMATCHES, ELEMENTS = range(3)

_lock = threading.Lock()
_counters = {}  # by device: int64 [MAX_STAGES, 3], and how many rows are taken
_stages = []
_kept_bytes = 0


def prepare(device):
    """Makes a device's counters, outside of any capture."""
    with _lock:
        if device not in _counters:
            _counters[device] = [torch.zeros(MAX_STAGES, 3, dtype=torch.int64, device=device), 0]


def prepare_all():
    """The counters of every device that is in use, when the shim is put in."""
    if torch.cuda.is_available() and torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        for index in range(torch.cuda.device_count()):
            prepare(torch.device("cuda", index))


class Stage:
    """One launch of one graph: ``launch`` puts it, epmoe's and the comparison into the graph."""

    def __init__(self, control, call, generation, launch):
        if type(call) is not Call and not (isinstance(call, Made) and call.arguments.get("negatives") == "counted"):
            raise Refused("its comparison cannot be captured")
        if _overlaps(call):
            raise Refused("an output shares memory with another argument")
        self.control, self.call, self.generation, self.told = control, call, generation, launch
        self.device = next(iter(call.tensors().values())).device
        self.counter = self.kept = None
        self.seen = [0, 0, 0]

    def before(self):
        """To be captured ahead of Triton's launch. Nothing here may wait for the device or make it fail."""
        call = self.call
        with _lock:
            held = _counters.get(self.device)
            if held is None or held[1] >= MAX_STAGES:
                raise Refused(
                    "no counters were made before the capture: launch once outside of one"
                    if held is None
                    else f"more than {MAX_STAGES} launches were captured"
                )
            self.counter = held[0][held[1]]
            held[1] += 1
        written = call.written()
        self.own = {name: poisoned(tensor) for name, tensor in written.items() if name in call.whole}
        self.first = {name: tensor.clone() for name, tensor in written.items() if name not in call.whole}
        # Triton's launch must not find what epmoe is to start from changed.
        self.own.update({name: tensor.clone() for name, tensor in self.first.items()})
        self.inputs = {name: tensor for name, tensor in call.tensors().items() if name not in call.outputs}

    def after(self, result):
        """To be captured behind it."""
        call, counter = self.call, self.counter
        returned = call.run(self.own)
        expected, actual = (
            (call.written(), self.own) if call.written() else (call.results(result), call.results(returned))
        )
        wrong = [differing(tensor, actual[name], self.control.max_ulp).sum() for name, tensor in expected.items()]
        total = torch.stack(wrong).sum()
        counter[REPLAYS].add_(1)
        counter[MISMATCHES].add_(total > 0)
        counter[ELEMENTS].add_(total)
        if recorder.ring is not None:
            self._keep(total > 0, {"argument": self.inputs, "before": self.first, "triton": expected, "epmoe": actual})
        self.op, self.scalars = call.op, call.scalars()
        self.size = sum(tensor.numel() for tensor in expected.values())
        # The graph keeps what it needs of the serving's memory.
        self.call = self.own = self.first = self.inputs = None
        with _lock:
            _stages.append(self)

    def _keep(self, differs, parts):
        global _kept_bytes
        size = sum(tensor.nbytes for named in parts.values() for tensor in named.values())
        with _lock:
            if _kept_bytes + size > MAX_KEPT_BYTES:
                return
            _kept_bytes += size
        self.kept = {part: {name: _room(tensor) for name, tensor in named.items()} for part, named in parts.items()}
        for part, named in parts.items():
            for name, tensor in named.items():
                kept = self.kept[part][name]
                bits = torch.uint8 if kept.element_size() == 1 else kept.dtype
                torch.where(differs, tensor.view(bits), kept.view(bits), out=kept.view(bits))

    def conclude(self, counts):
        """What replays have come to since it was last asked."""
        control = self.control
        replays, mismatches, elements = (now - then for now, then in zip(counts, self.seen, strict=True))
        self.seen = counts
        control.count("compared", replays)
        control.count("matched", replays - mismatches)
        if not mismatches:
            return
        control.count("mismatches", mismatches)
        told = f"{elements} elements of {self.size} a replay differ"
        what = f"in {mismatches} of {replays} replays of a captured launch, {told}"
        findings = [{"output": "", "replays": replays, "mismatched": elements, "elements": self.size, "what": what}]
        path = None if self.kept is None else recorder.write(control, self.capsule(findings))
        told = {"generation": self.generation, "findings": findings, "launch": self.told.told(), "capsule": path}
        control.failed(events.add(control.name, "mismatch", what, **told), mismatches)

    def capsule(self, findings):
        return capsule_of(self, self.told, findings, self.kept)


def _room(tensor):
    """Memory for a copy, for good: nobody tells when a graph that writes there is gone. Torch's allocator would take it
    from the graph's own on the stream that is captured, and end the capture on another."""
    if tensor.device.type != "cuda" or tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return _call.allocate(tensor.device, tensor.nbytes).view(tensor.dtype).view(tensor.shape)


def poll(wait=False):
    """Reads the counters of what was captured; with ``wait``, after everything on the devices is done."""
    with _lock:
        stages = list(_stages)
    for device in {stage.device for stage in stages}:
        own = [stage for stage in stages if stage.device == device]
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                continue
            if wait:
                torch.cuda.synchronize(device)
        counts = _counters[device][0].tolist()
        try:
            _call.check(device)  # an index out of range that epmoe's kernel met in a replay
        except Exception as error:
            failed(own[0].control, error, own[0].told)
        rows = {stage: counts[_row(stage)] for stage in own}
        for stage, row in rows.items():
            if row != stage.seen:
                stage.conclude(row)


def _row(stage):
    return stage.counter.storage_offset() // 3


def forget():
    """Lets go of what was captured; replays count on where nobody looks."""
    with _lock:
        _stages.clear()
