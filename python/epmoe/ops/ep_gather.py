"""References of ep_gather.

Semantics: output_tensor [T, H] is the sum over the slots with recv_topk_ids >= 0 of the rows input_index of
input_tensor [M, H], each times its weight.
"""

import torch

from epmoe import sglang_original
from epmoe.ops._report import (
    narrow_index_objection,
    original_facts,
    original_problem,
    triton_objection,
)
from epmoe.ops._sum import sum_references
from epmoe.references import Reference

WRAPPER = "ep_gather"


def arguments_of(*, input_tensor, recv_topk_ids, recv_topk_weight, input_index, output_tensor):
    return {
        "down_output": input_tensor,
        "output": output_tensor,
        "src2dst": input_index,
        "topk_weights": recv_topk_weight,
        "topk_ids": recv_topk_ids,
    }


def run_original(*, input_tensor, recv_topk_ids, recv_topk_weight, input_index, output_tensor):
    if output_tensor.numel() == 0:
        return
    with torch.cuda.device_of(output_tensor):
        sglang_original.find().kernel(WRAPPER)(
            input_tensor, recv_topk_ids, recv_topk_weight, input_index, output_tensor
        )


def original_objection(*, input_tensor, output_tensor, **_):
    found = sglang_original.find()
    if problem := found.problem_of(WRAPPER):
        return problem
    columns = columns_at_a_time(found)
    if output_tensor.shape[1] % columns != 0:
        return f"ep_gather of SGLang {found.version} needs a hidden size divisible by {columns}"
    if problem := narrow_index_objection(input_tensor, output_tensor):
        return problem
    return triton_objection(input_tensor=input_tensor)


def columns_at_a_time(found):
    """It masks nothing; to v0.5.2 it takes 1024 columns at a time, later 128 where 1024 do not divide."""
    return 128 if "128" in found.source(WRAPPER) else 1024


REFERENCES = {
    **sum_references(arguments_of),
    "triton-original": Reference(
        run_original,
        lambda: original_problem(WRAPPER),
        original_objection,
        lambda: original_facts("float32"),
    ),
}
