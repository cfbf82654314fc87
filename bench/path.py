"""Times the data path of an MoE layer without its matrix products: preprocess, preReorder, siluAndMul, postReorder."""

import statistics

import torch

from epmoe._bench import Clock, call_of


def problem(device, tokens, hidden, intermediate, topk, experts):
    """Arguments of the four ops, each the next one's input but for the products between them."""
    slots = tokens * topk
    ids = torch.rand(tokens, experts, device=device).topk(topk).indices.int()
    made = {"device": device, "dtype": torch.bfloat16}
    src2dst = torch.empty(slots, dtype=torch.int32, device=device)
    reorder_topk_ids = torch.empty(slots, dtype=torch.int32, device=device)
    last = {"start_expert_id": 0, "end_expert_id": experts - 1}
    return {
        "preprocess": {
            "topk_ids": ids,
            "src2dst": src2dst,
            "seg_indptr": torch.empty(experts + 1, dtype=torch.int64, device=device),
            "reorder_topk_ids": reorder_topk_ids,
        },
        "pre_reorder": {
            "input": torch.randn(tokens, hidden, **made),
            "gateup_input": torch.empty(slots, hidden, **made),
            "src2dst": src2dst,
            "topk_ids": ids,
            **last,
        },
        "silu_and_mul": {
            "gateup_output": torch.randn(slots, 2 * intermediate, **made),
            "down_input": torch.empty(slots, intermediate, **made),
            "reorder_topk_ids": reorder_topk_ids,
            **last,
        },
        "post_reorder": {
            "down_output": torch.randn(slots, hidden, **made),
            "output": torch.empty(tokens, hidden, **made),
            "src2dst": src2dst,
            "topk_ids": ids,
            "topk_weights": torch.rand(tokens, topk, device=device),
            **last,
        },
    }


def measure(device, tokens, names, hidden=7168, intermediate=2048, topk=8, experts=256):
    """``{name: microseconds of the whole path, or why there is none}``, measured in turn."""
    ops = problem(device, tokens, hidden, intermediate, topk, experts)
    results, clocks = {}, {}
    for name in names:
        only = {"preprocess": name.split(":")[0]}  # moves integers: there is no rounding to choose
        calls = [call_of(op, only.get(op, name), arguments) for op, arguments in ops.items()]
        problems = [call for call in calls if isinstance(call, str)]
        if problems:
            results[name] = problems[0]
            continue
        clocks[name] = Clock(device, [lambda calls=calls: [call() for call in calls]])
        clocks[name].sample()
    samples = {name: [] for name in clocks}
    for _ in range(15):
        for name, clock in clocks.items():
            samples[name].append(clock.sample())
    for name, clock in clocks.items():
        results[name] = f"{statistics.median(samples[name]) * 1e6:.2f}" + (f" ({clock.note})" if clock.note else "")
    return results
