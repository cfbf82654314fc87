"""The Python half of the host bench."""

import ctypes
import statistics
import time

import torch

import epmoe
from epmoe.ops import post_reorder as references

TOKENS, TOPK, HIDDEN = 1, 8, 512


def arguments(device):
    slots = TOKENS * TOPK
    return {
        "down_output": torch.randn(slots, HIDDEN, device=device).to(torch.bfloat16),
        "output": torch.empty(TOKENS, HIDDEN, device=device, dtype=torch.bfloat16),
        "src2dst": torch.randperm(slots, device=device).to(torch.int32),
        "topk_ids": torch.zeros(TOKENS, TOPK, device=device, dtype=torch.int32),
        "topk_weights": torch.rand(TOKENS, TOPK, device=device),
    }


def drain():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bare_launch(path, calls, rounds, early):
    library = ctypes.CDLL(path)
    library.bare_launch.restype = ctypes.c_double
    library.bare_launch.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    stream = torch.cuda.current_stream().cuda_stream
    return statistics.median([library.bare_launch(stream, calls, early) for _ in range(rounds + 3)][3:])


def python_calls(made, calls, rounds):
    timed = {"epmoe.post_reorder, Python": lambda: epmoe.post_reorder(**made)}
    if torch.cuda.is_available():
        timed["Triton kernel, Python"] = lambda: references.run_triton(**made)
    results = {}
    for label, call in timed.items():
        times = []
        for _ in range(rounds + 3):
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            times.append((time.perf_counter() - begin) / calls * 1e6)
            drain()
        results[label] = statistics.median(times[3:])
    return results
