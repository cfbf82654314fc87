"""What the tensors of a recorded call are made of: which axis is which, which rows a call reads or writes.

Axes are letters: T tokens (rows of an activation), K slots of a token, S = T * K, H columns, W = 2 * H (gate and up),
G groups of columns that share a scale, X experts, P = X + 1, R rows grouped by expert.
"""

import torch

_ACTIVATION = {"gateup_output": "TW", "reorder_topk_ids": "T", "scales": "X", "down_input": "TH", "output_scales": "TG"}
_MASKED = {"gateup_output": "XTW", "masked_m": "X", "down_input": "XTH", "output_scales": "XTG"}
_SUM = {"topk_weights": "TK", "topk_ids": "TK", "src2dst": "S", "down_output": "RH", "shared_output": "TH"}
_SPREAD = {"input": "TH", "topk_ids": "TK", "src2dst": "S", "a1_scales": "X", "input_scales": "TG"}
_ORDER = {"topk_ids": "TK", "src2dst": "S", "reorder_topk_ids": "S", "seg_indptr": "P", "masked_m": "X"}
_PLACED = {"recv_x": "TH", "recv_x_scale": "TG", "recv_topk": "TK", "output_tensor": "RH", "output_tensor_scale": "RG"}
_GATHERED = {"input_tensor": "RH", "recv_topk_ids": "TK", "recv_topk_weight": "TK", "input_index": "TK"}
AXES = {
    "post_reorder": {**_SUM, "residual": "TH", "output": "TH"},
    "pre_reorder": {**_SPREAD, "gateup_input": "RH", "output_scales": "RG"},
    "silu_and_mul": _ACTIVATION,
    "gelu_and_mul": _ACTIVATION,
    "preprocess": _ORDER,
    "ep_scatter": {
        **_PLACED,
        "num_recv_tokens_per_expert": "X",
        "expert_start_loc": "X",
        "m_indices": "R",
        "output_index": "TK",
    },
    "ep_gather": {**_GATHERED, "output_tensor": "TH"},
}
OUTPUTS = {
    "post_reorder": ("output",),
    "pre_reorder": ("gateup_input", "output_scales"),
    "silu_and_mul": ("down_input", "output_scales"),
    "gelu_and_mul": ("down_input", "output_scales"),
    "preprocess": ("src2dst", "seg_indptr", "reorder_topk_ids", "masked_m"),
    "ep_scatter": ("expert_start_loc", "output_tensor", "output_tensor_scale", "m_indices", "output_index"),
    "ep_gather": ("output_tensor",),
}
IDS = {
    "post_reorder": "topk_ids",
    "pre_reorder": "topk_ids",
    "silu_and_mul": "reorder_topk_ids",
    "gelu_and_mul": "reorder_topk_ids",
    "preprocess": "topk_ids",
    "ep_scatter": "recv_topk",
    "ep_gather": "recv_topk_ids",
}


def axes_of(op, tensors, scalars):
    """The letters of an op's tensors in one call."""
    if "masked_m" in tensors and op.endswith("_and_mul"):
        return _MASKED
    axes = AXES[op]
    return {**axes, "a1_scales": "T"} if scalars.get("scale_axis") == "token" else axes


def label(op, tensors, scalars):
    """A call's sizes in a few words: ``T=64, K=8, H=7168, bfloat16``."""
    axes, found, dtype = axes_of(op, tensors, scalars), {}, ""
    for name, tensor in tensors.items():
        letters = axes.get(name, "")
        for letter, size in zip(letters[::-1], tuple(tensor.shape)[::-1], strict=False):
            if letter in "TKHX":
                found.setdefault(letter, size)
        if tensor.is_floating_point() and not dtype:
            dtype = str(tensor.dtype).removeprefix("torch.")
    return ", ".join([*(f"{letter}={found[letter]}" for letter in "TKHX" if letter in found), *filter(None, [dtype])])


def expert_range(op, tensors, scalars, segments):
    """The first local expert and the number of them; None where a call has no experts by number. ``segments`` is the
    length of seg_indptr, where the op writes one."""
    ids = tensors.get(IDS[op])
    if op == "ep_scatter":
        return 0, tensors["num_recv_tokens_per_expert"].numel()
    if "masked_m" in tensors and op.endswith("_and_mul"):
        return 0, tensors["masked_m"].numel()
    if op == "preprocess":
        return 0, segments - 1
    if ids is None or op == "ep_gather":
        return None
    first = scalars.get("start_expert_id", 0)
    largest = int(ids.max()) if ids.numel() else -1
    last = min(scalars.get("end_expert_id", largest), max(largest, first))
    if scales := tensors.get("scales", tensors.get("a1_scales") if scalars.get("scale_axis") != "token" else None):
        last = max(last, first + scales.numel() - 1)
    return first, max(0, last - first + 1)


def local_slots(op, tensors, scalars):
    """Which slots [T, K] have a row, and the rows of all slots, both by slot."""
    if op == "ep_gather":
        return tensors["recv_topk_ids"] >= 0, tensors["input_index"].long()
    like = tensors["topk_weights"] if op == "post_reorder" else tensors.get("topk_ids")
    tokens = tensors["input" if op == "pre_reorder" else "topk_weights"].shape[0]
    src2dst = tensors["src2dst"].reshape(like.shape if like is not None else (tokens, -1)).long()
    ids = tensors.get("topk_ids")
    if ids is None:
        local = src2dst >= 0
    else:
        local = (ids >= scalars.get("start_expert_id", 0)) & (ids <= scalars.get("end_expert_id", 2**31 - 1))
    return local, src2dst - scalars.get("dst_start", 0)


def written_rows(op, tensors, scalars, name, shape):
    """Which rows of an output a call writes, as a mask over all but the output's last axis; None: all of it."""
    if op == "pre_reorder":
        local, rows = local_slots(op, tensors, scalars)
        mask = torch.zeros(shape[:-1].numel(), dtype=torch.bool)
        mask[rows[local]] = True
        return mask.view(shape[:-1])
    if op.endswith("_and_mul"):
        if (masked := tensors.get("masked_m")) is not None:
            return torch.arange(shape[1])[None, :] < masked[:, None]
        if (ids := tensors.get("reorder_topk_ids")) is not None:
            return (ids >= scalars.get("start_expert_id", 0)) & (ids <= scalars.get("end_expert_id", 2**31 - 1))
    if op == "ep_scatter" and name.startswith("output_tensor"):
        index = tensors["output_index"].reshape(-1)
        mask = torch.zeros(shape[0], dtype=torch.bool)
        mask[index[index >= 0].long()] = True
        return mask
    return None


def poison(shape, dtype):
    made = torch.empty(shape, dtype=dtype)
    if made.numel():
        made.view(-1).view(torch.uint8).fill_(0xFF)  # NaN in every float, -1 in every int
    return made
