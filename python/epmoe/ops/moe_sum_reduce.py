"""References of moe_sum_reduce.

Semantics: output [T, H] is the sum of input [T, K, H] over K, in order, times routed_scaling_factor.
"""

import torch

from epmoe.ops._report import torch_facts
from epmoe.ops._sum import ones_like_slots, sum_references
from epmoe.references import Reference


def arguments_of(*, input, output, routed_scaling_factor=1.0):
    """Slot i has row i."""
    tokens, topk, hidden_size = input.shape
    src2dst = torch.arange(tokens * topk, device=input.device).view(tokens, topk)
    return {
        "down_output": input.view(-1, hidden_size),
        "output": output,
        "src2dst": src2dst,
        "topk_weights": ones_like_slots(src2dst),
        "routed_scaling_factor": routed_scaling_factor,
    }


def run_torch(*, input, output, routed_scaling_factor=1.0):
    """The plain computation in the activation dtype: each partial sum rounded."""
    output.zero_()
    for slot in range(input.shape[1]):
        output += input[:, slot]
    output *= routed_scaling_factor


REFERENCES = {**sum_references(arguments_of), "torch": Reference(run_torch, facts=torch_facts)}
