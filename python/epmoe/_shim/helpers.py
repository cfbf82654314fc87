"""What a call of one of SGLang's helpers, Python functions around its kernels, asks of epmoe."""

from dataclasses import dataclass

import torch
from torch import Tensor

from epmoe import generated
from epmoe._shim.forms import Call, Refused, dense, factor, number, numerics_or, rows_of, table
from epmoe._shim.signatures import HELPERS
from epmoe.ops.preprocess import COUNTING, DROPPING, counts_as_known


@dataclass
class Made(Call):
    """A call whose outputs are made for it."""

    result: object = None
    makes: object = None
    names: tuple = ()

    def run(self, instead=None):
        made = self.makes()
        getattr(generated, self.op)(**{**self.arguments, **made})
        return self.result(made)

    def written(self):
        return {}

    def results(self, result):
        return dict(zip(self.names, result, strict=True))


def _preprocess(values, original, negatives):
    ids, experts = values["topk_ids"], number(values, "num_experts")
    if not isinstance(ids, Tensor) or ids.dim() not in (1, 2):
        raise Refused("topk_ids is no table", type(ids).__name__)
    if negatives == "counted" and original is not None and not _counts_as_known(original, ids.device):
        raise Refused("this version counts the slots of -1 apart from expert 0's")
    topk_ids = ids if ids.dim() == 2 else ids.view(-1, 1)
    index = torch.int32 if negatives == "counted" else torch.int64

    def makes():
        count, device = topk_ids.numel(), topk_ids.device
        return {
            "src2dst": torch.empty(count, dtype=index, device=device),
            "seg_indptr": torch.empty(experts + 1, dtype=torch.int64, device=device),
            "reorder_topk_ids": torch.empty(count, dtype=topk_ids.dtype, device=device),
        }

    def result(made):
        order = made["reorder_topk_ids"]
        if negatives == "dropped":
            order = order[: int(made["seg_indptr"][-1])]  # waits for the device, as the original does
        return order, made["src2dst"], made["seg_indptr"]

    names = ("reorder_topk_ids", "src2dst", "seg_indptr")
    arguments = {"topk_ids": topk_ids, "negatives": negatives}
    return Made("preprocess", arguments, (), result=result, makes=makes, names=names)


class _Found:
    """For ``counts_as_known``: an original found in a module, not in an installed SGLang."""

    def __init__(self, helper):
        self.helper = helper

    def kernel(self, name):
        return self.helper


_found = {}  # by original and device: whether it counts as is known


def _counts_as_known(helper, device):
    from epmoe._shim.shadow import capturing

    if (helper, device) not in _found:
        if capturing():
            raise Refused("how this version counts is not known yet: call it once before the capture")
        _found[helper, device] = counts_as_known.__wrapped__(_Found(helper), device)
    return _found[helper, device]


def _masked(values, original, numerics):
    if values["quant_group_size"] != 128:
        raise Refused("quant_group_size is not 128", str(values["quant_group_size"]))
    arguments = {
        "gateup_output": dense(values, "input"),
        "down_input": dense(values, "output"),
        "output_scales": dense(values, "output_scale"),
        "masked_m": dense(values, "masked_m"),
        "quantization": "group",
        "scale_format": "power_of_two" if values.get("scale_ue8m0") else "float32",
        "numerics": numerics,
    }
    if arguments["down_input"].shape[-1] % 128:
        raise Refused("the width is no multiple of 128")
    return Call("silu_and_mul", arguments, ("down_input", "output_scales"))


_SCATTER_OUTPUTS = ("expert_start_loc", "output_tensor", "output_tensor_scale", "m_indices", "output_index")


class Scatter(Call):
    """ep_scatter: the original leaves each expert's start moved on by its rows, and the index of remote slots alone.
    The order of an expert's rows is left to chance there."""

    def run(self, instead=None):
        arguments = {**self.arguments, **(instead or {})}
        ids, starts, index = arguments["recv_topk"], arguments["expert_start_loc"], arguments["output_index"]
        before = index.clone()
        generated.ep_scatter(**arguments)
        torch.where(ids >= 0, index, before, out=index)
        spread = torch.zeros(starts.numel() + 1, dtype=starts.dtype, device=starts.device)
        at = (ids.reshape(-1).long() + 1).clamp_(min=0)
        spread.scatter_add_(0, at, torch.ones_like(at, dtype=starts.dtype))
        starts += spread[1:]

    def comparable(self, outputs):
        ids = self.arguments["recv_topk"].reshape(-1).long()
        index = outputs["output_index"].reshape(-1).long()
        rows = outputs["output_tensor"].shape[0]
        placed = (ids >= 0) & (index >= 0) & (index < rows)
        taken = index[placed]
        order = (ids * (rows + 1) + index)[placed].sort().values
        found = {
            "expert_start_loc": outputs["expert_start_loc"],
            "m_indices": outputs["m_indices"],
            "output_index": order,
            "remote_index": torch.where(ids >= 0, -1, index),
        }
        for name in ("output_tensor", "output_tensor_scale"):
            table = outputs[name].view(torch.uint8) if outputs[name].dtype == torch.float8_e4m3fn else outputs[name]
            rest = table.clone()
            rest[taken] = 0
            found[name], found[f"{name}_untouched"] = table[taken], rest
        return found


def _scatter(values, original, numerics):
    if values.get("scale_ue8m0"):
        raise Refused("scale_ue8m0 packs four scales in a word")
    arguments = {name: dense(values, name) for name in HELPERS["ep_scatter"].names}
    if arguments["m_indices"].shape[0] % 128:
        raise Refused("m_indices is no multiple of 128")
    return Scatter("ep_scatter", arguments, _SCATTER_OUTPUTS)


def _gather(values, original, numerics):
    arguments = {name: dense(values, name) for name in HELPERS["ep_gather"].names}
    return Call("ep_gather", arguments, ("output_tensor",), ("output_tensor",))


def _deepgemm(values, original, numerics):
    tokens, hidden, topk = (number(values, name) for name in ("num_tokens", "hidden_size", "topk"))
    arguments = {
        "down_output": rows_of(values, "down_output", hidden),
        "output": table(values, "output", tokens, hidden),
        "src2dst": table(values, "src2dst", tokens, topk, flat=True),
        "topk_ids": table(values, "topk_ids", tokens, topk),
        "topk_weights": table(values, "topk_weights", tokens, topk),
        "routed_scaling_factor": factor(values),
        "numerics": numerics_or(numerics, "fp32"),
    }
    return Call("post_reorder", arguments, ("output",), ("output",), "output")


def _counting(negatives):
    return lambda values, original, numerics: _preprocess(values, original, negatives)


TRANSLATE = {
    COUNTING: _counting("counted"),
    DROPPING: _counting("dropped"),
    "silu_and_mul_masked_post_quant_fwd": _masked,
    "ep_scatter": _scatter,
    "ep_gather": _gather,
    "post_reorder_deepgemm": _deepgemm,
}


def check_options(helper, values):
    """Refuses what a version's further parameters ask for beyond their plain values."""
    for name, value in values.items():
        if name in helper.names or value is None:
            continue
        if not isinstance(value, bool) or value not in helper.may.get(name, (False,)):
            raise Refused(f"{name} is not known", repr(value)[:40])
