"""A model's experts in three ways: as they are, by somebody else, or both and compared."""

import math
import time
from functools import partial

import torch

from epmoe import moe

# Times the original's error.
WORSE = 2.0


class Experts:
    """Takes the place of the forward function of a model's expert modules.

    In mode ``epmoe``, and in ``shadow`` for passes that are compared, ``ask((layer, hidden, ids, weights))`` gives the
    result, unless the layer's ``graphs`` have it captured: then nobody is asked. Matrix products that make their caller
    wait are done here, by the threads that torch has for the model: then what ``ask`` gives is a product's arguments, a
    list, for as long as there are any. In ``shadow`` the original's is what is served.
    """

    def __init__(self, modules, ask):
        self._ask, self._product = ask, moe.grouped_gemm
        self.mode = "original"
        self.compared = False
        self.graphs = [None] * len(modules)
        self._reset()
        for layer, module in enumerate(modules):
            original = module.forward
            # The attribute of the instance goes before that of the class.
            module.forward = partial(self._forward, layer, module, original)

    def _reset(self):
        self._spans = []
        self.shadow = {"identical": 0, "close": 0, "worse": 0, "elements": 0, "own": 0.0, "other": 0.0}

    def begin(self, mode, compared):
        """Sets what the next pass does."""
        self.mode, self.compared = mode, compared
        self._reset()

    def seconds(self):
        """Time spent in the experts during the pass; on CUDA, after the pass has been waited for."""
        if self._spans and isinstance(self._spans[0][0], torch.cuda.Event):
            return sum(begin.elapsed_time(end) for begin, end in self._spans) / 1000
        return sum(end - begin for begin, end in self._spans)

    def _forward(self, layer, module, original, hidden, ids, weights):
        begin = mark(hidden.device)
        if self.mode == "epmoe":
            out = self._asked(layer, hidden, ids, weights)
        else:
            out = original(hidden, ids, weights)
            if self.mode == "shadow" and self.compared:
                other = self._asked(layer, hidden, ids, weights)
                self._compare(module, hidden, ids, weights, out, other)
        self._spans.append((begin, mark(hidden.device)))
        return out

    def _asked(self, layer, hidden, ids, weights):
        given = hidden.contiguous(), ids.contiguous(), weights.contiguous()
        graphs = self.graphs[layer]
        answer = None if graphs is None else graphs.replay(None, *given, None, None)
        if answer is None:
            answer = self._ask((layer, *given))
        while isinstance(answer, list):
            answer = self._ask(self._product(*answer))
        return answer

    def _compare(self, module, hidden, ids, weights, original, other):
        """Both against the experts in float64, by the L2 norm relative to the exact result's.

        The golden tier, an error no worse than the original's own, is a statement on many elements: the squares are
        summed up for it. Of a single block, which may be one token, the ratio of two errors varies by chance; beyond
        ``WORSE`` it does not. Elements in which the original overflows have nothing to compare with.
        """
        if torch.equal(original, other):
            self.shadow["identical"] += 1
            return
        exact = exact_experts(module, hidden, ids, weights)
        told = exact.isfinite() & original.isfinite()
        if not told.any():
            return
        exact = exact[told]
        own, others = ((each[told].double() - exact).norm().item() for each in (original, other))
        self.shadow["close" if others <= WORSE * own else "worse"] += 1  # a NaN is worse
        size = exact.norm().item()
        if math.isfinite(others) and size > 0:
            self.shadow["elements"] += exact.numel()
            self.shadow["own"] += (own / size) ** 2
            self.shadow["other"] += (others / size) ** 2


def exact_experts(module, hidden, ids, weights):
    """The same experts on the same inputs and routing in float64, one after the other."""
    doubles = {name: parameter.double() for name, parameter in module.named_parameters()}
    implementation = module.config._experts_implementation
    patched = module.__dict__.pop("forward", None)
    module.config._experts_implementation = "eager"
    try:
        return torch.func.functional_call(module, doubles, (hidden.double(), ids, weights.double()))
    finally:
        module.config._experts_implementation = implementation
        if patched is not None:
            module.forward = patched


def mark(device):
    """Now: an event on CUDA's current stream, or a time in seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(begin, end):
    """Seconds between two marks; on CUDA both must have been waited for."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
