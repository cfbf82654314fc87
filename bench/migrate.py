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
    """Medians of blocks of steps, each over the block without a shim before it."""
    gpu = torch.cuda.is_available()
    serve.serving_stack.write(Path(folder) / "serving")
    sys.path.insert(0, str(folder))
    from serving import kernels_a, layer

    tokens, hidden = ([1, 16, 64, 256], 2048) if gpu else ([1, 2], 16)
    loop = serve.Loop(layer, kernels_a, tokens, hidden, torch.bfloat16, True, 4096 if gpu else 64)
    steps = 200 if gpu else 40

    def block():
        begin = time.perf_counter()
        for step in range(steps):
            loop.one(step)
        if gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / steps

    block()
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
