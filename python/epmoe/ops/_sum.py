"""The weighted sum of rows in float32, rounded once: post_reorder's kernel, told apart by its arguments alone."""

import torch

from epmoe import _triton
from epmoe.ops import post_reorder
from epmoe.ops._report import torch_facts, triton_facts, triton_objection
from epmoe.references import Reference


def sum_references(arguments_of):
    """References of an op whose arguments ``arguments_of(**arguments)`` turns into post_reorder's."""
    return {
        "torch": Reference(lambda **arguments: post_reorder.run_torch(**arguments_of(**arguments)), facts=torch_facts),
        "triton": Reference(
            lambda **arguments: post_reorder.run_triton(**arguments_of(**arguments), float32=True),
            _triton.problem,
            triton_objection,
            lambda: triton_facts("float32"),
        ),
    }


def ones_like_slots(slots):
    """Weights [T, K] that change nothing."""
    return torch.ones(slots.shape, dtype=torch.float32, device=slots.device)
