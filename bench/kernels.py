"""Times post_reorder on the GPU, bf16, all experts local, src2dst a permutation."""

import os

import torch
import triton
from triton.testing import do_bench, do_bench_cudagraph

import epmoe
from epmoe.ops import post_reorder as references

SHAPES = [
    (7168, 1),
    (7168, 8),
    (7168, 64),
    (7168, 128),
    (7168, 512),
    (7168, 1024),
    (7168, 4096),
    (7168, 8192),
    (4096, 512),
    (2048, 512),
    (2048, 4096),
    (2880, 1024),
]
TOPK, EXPERTS = 8, 256


def arguments(hidden, tokens, ep=1):
    slots = tokens * TOPK
    ids = torch.randint(0, EXPERTS, (tokens, TOPK), device="cuda", dtype=torch.int32)
    order = torch.sort(ids.view(-1), stable=True).indices
    src2dst = torch.empty(slots, device="cuda", dtype=torch.int32)
    src2dst[order] = torch.arange(slots, device="cuda", dtype=torch.int32)
    return {
        "down_output": torch.randn(slots, hidden, device="cuda").to(torch.bfloat16),
        "output": torch.empty(tokens, hidden, device="cuda", dtype=torch.bfloat16),
        "src2dst": src2dst,
        "topk_ids": ids,
        "topk_weights": torch.rand(tokens, TOPK, device="cuda"),
        "start_expert_id": 0,
        "end_expert_id": EXPERTS // ep - 1,
    }


def copy_rate():
    """Bytes read plus written a second by a copy of 1 GiB."""
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (do_bench(lambda: target.copy_(source), return_mode="median") * 1e-3)


def time_graph(call):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        return do_bench_cudagraph(call, rep=20, return_mode="median") * 1e3


def time_cold(call):
    return do_bench(call, warmup=5, rep=30, return_mode="median") * 1e3


def main():
    rate = copy_rate()
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}; copy {rate / 1e12:.3f} TB/s")
    print("post_reorder bf16 K=8, all local: µs as a graph node (L2 warm) / with L2 flushed")
    print(
        f"{'H':>5} {'T':>5}  {'epmoe':>15}  {'triton numerics':>15}  {'Triton':>15}  {'torch cold':>10}  {'of copy':>7}"
    )
    for hidden, tokens in SHAPES:
        args = arguments(hidden, tokens)
        ours = lambda a=args: epmoe.post_reorder(**a)
        exact = lambda a=args: epmoe.post_reorder(**a, numerics="triton")
        theirs = lambda a=args: references.run_triton(**a)
        eager = lambda a=args: references.run_torch(**a)
        graph, cold = time_graph(ours), time_cold(ours)
        moved = (TOPK + 1) * tokens * hidden * 2
        share = moved / (graph * 1e-6) / rate
        row = [f"{graph:7.1f}/{cold:7.1f}"]
        row += [f"{time_graph(call):7.1f}/{time_cold(call):7.1f}" for call in (exact, theirs)]
        torch_cold = f"{time_cold(eager):10.1f}" if os.environ.get("EPMOE_BENCH_TORCH", "1") == "1" else " " * 10
        print(
            f"{hidden:5d} {tokens:5d}  {row[0]:>15}  {row[1]:>15}  {row[2]:>15}  {torch_cold}  {share:7.1%}", flush=True
        )
        del args
        torch.cuda.empty_cache()
