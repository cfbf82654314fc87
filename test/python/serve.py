"""The serving loop that is migrated: `python serve.py '{"folder": …, "steps": …}'` prints what it came to, as JSON.

It knows Triton's results beforehand and compares every step with them. Without a GPU Triton is interpreted, and shapes
are small. `install` is left to EPMOE_MIGRATE and the shim; sources that were rewritten need neither.
"""

import hashlib
import json
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from unittest import mock

import torch

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

import serving_stack

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
EXPERTS, TOPK = 4, 2


def given(tokens, seed, hidden, dtype, exact):
    """``exact``: every sum and product is, whatever the order and the number of roundings."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, EXPERTS, (tokens, TOPK), dtype=torch.int32, generator=generator)
    if exact:
        x = torch.randint(-4, 5, (tokens, hidden), generator=generator).to(dtype)
        weights = torch.randint(1, 4, (tokens, TOPK), generator=generator) / 4
    else:
        x = torch.randn(tokens, hidden, generator=generator).to(dtype)
        weights = torch.rand(tokens, TOPK, generator=generator)
    return x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE)


class Loop:
    def __init__(self, layer, kernels, tokens, hidden, dtype, exact, large):
        self.layer, self.kernels = layer, kernels
        self.given = [given(count, count, hidden, dtype, exact) for count in tokens]
        self.many = torch.arange(large * 8, dtype=torch.int32).view(large, 8).to(DEVICE) * 7 % 64
        self.served, self.wrong, self.lock = 0, 0, threading.Lock()
        self.expected = None

    def one(self, at):
        output, down, src2dst = self.layer.forward(*self.given[at % len(self.given)], EXPERTS, 1, 2)
        return output, down, src2dst, *self.kernels.run_moe_ep_preproess(self.many, 64)

    def learn(self):
        self.expected = [self.one(at) for at in range(len(self.given))]

    def serve(self, steps):
        wrong = 0
        for step in range(steps):
            at = step if steps > 1 else self.served
            # silu's last bit is not Triton's: it is compared in the shadow only.
            pairs = list(zip(self.one(at), self.expected[at % len(self.given)], strict=True))
            wrong += not all(torch.equal(a, b) for which, (a, b) in enumerate(pairs) if which != 1)
        with self.lock:
            self.wrong += wrong
            self.served += steps

    def replay(self, steps):
        """The first shape's step by way of a CUDA graph, which Python sees nothing of."""
        self.kernels.run_moe_ep_preproess(self.many, 64)  # as servers do: how a version counts shows outside a capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = self.one(0)
        for _ in range(steps):
            graph.replay()
            pairs = zip(found, self.expected[0], strict=True)
            self.wrong += not all(torch.equal(a, b) for which, (a, b) in enumerate(pairs) if which != 1)
        self.served += steps

    def digest(self):
        found = hashlib.sha256()
        for at in range(len(self.given)):
            for tensor in self.one(at):
                found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return found.hexdigest()


def faults(name, folder):
    """Context managers that put a fault in; each belongs to epmoe or to the machine, never to Triton."""
    from epmoe import generated

    if name == "slot":  # one slot of a million goes where another should
        real, seen = generated.preprocess, [0]

        def preprocess(**arguments):
            result = real(**arguments)
            before, seen[0] = seen[0], seen[0] + arguments["topk_ids"].numel()
            if before // 10**6 != seen[0] // 10**6:
                src2dst = arguments["src2dst"]
                src2dst[10**6 - before % 10**6 - 1] += 1
            return result

        return mock.patch.object(generated, "preprocess", preprocess)
    if name in ("nan", "graph"):
        real_sum = generated.post_reorder

        def post_reorder(**arguments):
            real_sum(**arguments)
            arguments["output"][-1].fill_(float("nan"))

        return mock.patch.object(generated, "post_reorder", post_reorder)
    if name == "crash":  # the process is gone while a capsule is written
        real_replace, count = os.replace, [0]

        def replace(source, target):
            count[0] += str(target).endswith(".safetensors")
            if count[0] == 5:
                os.kill(os.getpid(), 9)
            real_replace(source, target)

        return mock.patch.object(os, "replace", replace)
    if name == "disk":  # no file may grow beyond this, as none may on a disk that is full
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))
    return mock.patch.dict({}, {})


def run(options):
    from epmoe import shim

    folder = Path(options["folder"])
    if not (folder / "serving").exists():
        serving_stack.write(folder / "serving")
    sys.path.insert(0, str(folder))
    from serving import kernels_a, layer

    dtype = getattr(torch, options.get("dtype", "float32"))
    tokens, hidden = options.get("tokens", [1, 2]), options.get("hidden", 16)
    loop = Loop(layer, kernels_a, tokens, hidden, dtype, options.get("exact", True), options.get("large", 64))
    loop.learn()
    if options.get("write_only"):
        return {}
    before = [value for module in (kernels_a, layer) for value in vars(module).values()]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        shim.install(**options.get("install", {}))
        shim.configure(numerics=options.get("numerics", "triton"))
        shim.configure("silu_and_mul", max_ulp=4)
        end = shim.watch(seconds=0.01) if options.get("watch") else lambda: None
        fault = options.get("fault")
        begin = time.perf_counter()
        with faults(fault, folder):
            threads = [
                threading.Thread(target=loop.serve, args=(options["steps"],)) for _ in range(options.get("also", 0))
            ]
            for thread in threads:
                thread.start()
            serve = loop.replay if fault == "graph" else loop.serve
            serve(options["steps"])
            for thread in threads:
                thread.join()
            if fault == "coverage":  # a dtype that epmoe does not take
                doubles = Loop(layer, kernels_a, [2], hidden, torch.float64, True, 1)
                outputs = doubles.one(0)[0]
            else:
                outputs = None
        seconds = time.perf_counter() - begin
        if options.get("ready"):
            Path(options["ready"]).touch()
        if options.get("until"):  # serves on until the file says so
            limit = time.monotonic() + 120
            while shim.get_mode("post_reorder") != options["until"] and time.monotonic() < limit:
                loop.serve(1)
        end()
        shim.flush()
        digest = loop.digest() if options.get("digest") else None
    stats = shim.stats()
    if options.get("stats"):
        shim.save(options["stats"])
    events = shim.events()
    mode = shim.get_mode("post_reorder")
    shim.uninstall()
    after = [value for module in (kernels_a, layer) for value in vars(module).values()]
    if outputs is not None:
        expected = Loop(layer, kernels_a, [2], hidden, torch.float64, True, 1).one(0)[0]
        loop.wrong += not torch.equal(outputs, expected)
    return {
        "device": str(DEVICE),
        "served": loop.served,
        "wrong": loop.wrong,
        "seconds": seconds,
        "digest": digest,
        "mode": mode,
        "identical": len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True)),
        "warnings": sorted({str(each.message) for each in told}),
        "events": [{name: event.get(name) for name in ("kernel", "kind", "what", "capsule")} for event in events],
        "stats": {name: each for name, each in stats.items() if each["launches"]},
    }


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1])), default=str))
