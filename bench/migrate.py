"""What shadow costs: the serving loop without the shim, with it, and with some launches compared, in turns."""

import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test" / "python"))

import torch

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

import serve
from epmoe import shim


def overhead(folder, seconds=60.0, rate=0.01):
    """Medians of blocks of steps, each over the block without a shim before it, for each loop there is."""
    serve.serving_stack.write(Path(folder) / "serving")
    sys.path.insert(0, str(folder))
    from serving import kernels_a, layer

    if not torch.cuda.is_available():
        loop = serve.Loop(layer, kernels_a, [1, 2], 16, torch.bfloat16, True, 64)
        return [measured("Triton interpreted", loop, 40, seconds, rate)]
    few = serve.Loop(layer, kernels_a, [1, 16, 64, 256], 2048, torch.bfloat16, True, 4096)
    many = WithProducts(layer, kernels_a, [2048, 4096, 8192], 4096, torch.bfloat16, True, 4096)
    return [
        measured("decode, nothing but launches", few, 200, 2 * seconds / 3, rate),
        measured("prefill, with the experts' products", many, 60, seconds / 3, rate),
    ]


class WithProducts(serve.Loop):
    """The two products that a layer's experts make of their rows, of as many as there are, all by one matrix."""

    def __init__(self, layer, kernels, tokens, hidden, *more):
        super().__init__(layer, kernels, tokens, hidden, *more)
        self.w13 = torch.randn(hidden, 2 * hidden, dtype=torch.bfloat16, device=serve.DEVICE)
        self.w2 = torch.randn(hidden, hidden, dtype=torch.bfloat16, device=serve.DEVICE)

    def one(self, at):
        found = super().one(at)
        rows = found[1]  # [T * K, H]
        torch.mm(rows, self.w13)
        torch.mm(rows, self.w2)
        return found


def measured(what, loop, steps, seconds, rate):
    gpu = torch.cuda.is_available()

    def block():
        begin = time.perf_counter()
        for step in range(steps):
            loop.one(step)
        if gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / steps

    block()
    shim.reset()
    shim.configure(rate=rate, first_per_shape=1, trip_after=0, max_ulp=4)
    times = {"none": [], "triton": [], "shadow": []}
    ratios = {"triton": [], "shadow": []}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(ratios["shadow"]) < 5:
        times["none"].append(block())
        for mode in ("triton", "shadow"):
            shim.install(mode=mode)
            times[mode].append(block())
            ratios[mode].append(times[mode][-1] / times["none"][-1])
            if mode == "shadow":
                counts = {name: each for name, each in shim.stats().items() if each["launches"]}
            shim.uninstall()
    shim.flush()
    counts = {name: each for name, each in shim.stats().items() if each["launches"]}
    return {
        "loop": what,
        "device": torch.cuda.get_device_name() if gpu else "CPU, Triton interpreted",
        "blocks": len(ratios["shadow"]),
        "steps": steps,
        "microseconds": {mode: 1e6 * statistics.median(each) for mode, each in times.items()},
        "ratio": {mode: statistics.median(each) for mode, each in ratios.items()},
        "spread": {mode: spread(each) for mode, each in ratios.items()},
        "compared": sum(each["compared"] for each in counts.values()),
        "mismatches": sum(each["mismatches"] for each in counts.values()),
    }


def spread(values):
    """Half the distance of the quartiles."""
    quartiles = statistics.quantiles(values, n=4)
    return (quartiles[2] - quartiles[0]) / 2
