"""Smaller calls out of a recorded one: some of its tokens, slots, columns or experts."""

import torch

from epmoe.migrate import calls
from epmoe.migrate.capsule import Capsule, save
from epmoe.migrate.replay import Call
from epmoe.ops._float8 import GROUP_SIZE, raw


def sizes(call):
    """How many tokens, slots, columns and experts may be chosen from; an axis that cannot be cut is left out."""
    op, tensors, scalars = call.capsule.op, call.arguments, call.capsule.scalars
    axes = calls.axes_of(op, tensors, scalars)
    found = {}
    for name, (shape, _) in {**{n: (t.shape, None) for n, t in tensors.items()}, **call.outputs}.items():
        letters = axes[name]
        for letter, size in zip(letters[::-1], tuple(shape)[::-1], strict=False):
            if letter in "TKH":
                found[letter] = size
    if found.get("H") and any("G" in axes[name] for name in (*tensors, *call.outputs)):
        found["H"] = -(-found["H"] // GROUP_SIZE)  # whole groups, which have a scale of their own
    segments = call.outputs["seg_indptr"][0][0] if "seg_indptr" in call.outputs else 0
    experts = calls.expert_range(op, tensors, scalars, segments)
    if experts is not None:
        found["X"] = experts[1]
    if op.endswith("_and_mul") and "masked_m" not in tensors:
        found.pop("K", None)
    names = {"T": "tokens", "K": "topk", "H": "hidden", "X": "experts"}
    return {names[letter]: found[letter] for letter in "TXKH" if found.get(letter, 0) > 1}


def reduced(call, axis, keep):
    """What ``read`` answers, of a call with the entries ``keep`` of an axis alone, in their order."""
    held = call.capsule
    letter = {"tokens": "T", "topk": "K", "hidden": "H", "experts": "X"}[axis]
    made = Capsule(
        kernel=held.kernel,
        generation=held.generation,
        op=held.op,
        reason=held.reason,
        scalars=dict(held.scalars),
        launch=held.launch,
        environment=held.environment,
        findings=held.findings,
        time=held.time,
    )
    results = {name: calls.poison(*spec) for name, spec in call.outputs.items()}
    made.tensors = {"argument": dict(call.arguments), "before": {**results, **held.part("before")}}
    made.tensors.update({part: dict(held.part(part)) for part in ("triton", "epmoe") if held.part(part)})
    keep = torch.tensor(keep)
    if letter == "X":
        _take_experts(made, keep)
    else:
        _take(made, letter, keep)
    _compact(made)
    if not _still_valid(held, letter):
        made.tensors.pop("triton", None)
        made.tensors.pop("epmoe", None)
    return {"call": Call(made, call.path)}


def write(call, path):
    """The call as a capsule of its own."""
    return str(save(path, call.capsule))


def _still_valid(held, letter):
    """Whether what was recorded is, cut likewise, the result of the smaller call."""
    if held.op in ("preprocess", "ep_scatter") or letter in "KX":
        return False
    return letter == "T" or held.scalars.get("quantization", "static") != "token"


def _take(made, letter, keep):
    arguments = made.tensors["argument"]
    axes = calls.axes_of(made.op, arguments, made.scalars)
    tokens, topk = _slots_of(made.op, arguments)
    groups = any("G" in axes[name] for part in made.tensors.values() for name in part)
    for part in made.tensors.values():
        for name, tensor in part.items():
            part[name] = _cut(tensor, axes[name], letter, keep, tokens, topk, groups)
    if letter == "T" and "masked_m" in arguments and made.op.endswith("_and_mul"):
        arguments["masked_m"] = (keep[None, :] < arguments["masked_m"][:, None]).sum(1).to(torch.int32)


def _slots_of(op, arguments):
    for name in ("topk_ids", "topk_weights", "recv_topk", "recv_topk_ids"):
        if name in arguments:
            return arguments[name].shape[0], arguments[name].shape[1]
    tokens = arguments["input"].shape[0] if op == "pre_reorder" else 1
    return tokens, arguments["src2dst"].numel() // max(1, tokens) if "src2dst" in arguments else 1


def _cut(tensor, letters, letter, keep, tokens, topk, groups):
    if "S" in letters:
        if letter not in "TK":
            return tensor
        table = tensor.reshape(tokens, topk).index_select("TK".index(letter), keep)
        return table.reshape(-1) if tensor.dim() == 1 else table
    if tensor.dim() > len(letters):  # leading axes that count as one
        tensor = tensor.reshape(-1, *tensor.shape[tensor.dim() - len(letters) + 1 :])
    for at, each in enumerate(letters):
        if each == letter == "H" and groups:
            tensor = _columns(tensor, at, _widen(keep, tensor.shape[at]))
        elif each == letter:
            tensor = _columns(tensor, at, keep)
        elif letter == "H" and each == "W":
            half = tensor.shape[at] // 2
            columns = _widen(keep, half) if groups else keep
            tensor = _columns(tensor, at, torch.cat([columns, columns + half]))
        elif letter == "H" and each == "G" and tensor.shape[at] > 1:
            tensor = _columns(tensor, at, keep)
    return tensor


def _widen(keep, columns):
    wide = (keep[:, None] * GROUP_SIZE + torch.arange(GROUP_SIZE)).reshape(-1)
    return wide[wide < columns]


def _columns(tensor, axis, keep):
    return raw(tensor).index_select(axis, keep).view(tensor.dtype)


def _take_experts(made, keep):
    """Slots of the other experts go nowhere; those kept are numbered anew, from the first."""
    op, arguments = made.op, made.tensors["argument"]
    axes = calls.axes_of(op, arguments, made.scalars)
    before = made.tensors["before"]
    segments = before["seg_indptr"].numel() if "seg_indptr" in before else 0
    first, count = calls.expert_range(op, arguments, made.scalars, segments)
    for part in made.tensors.values():
        for name, tensor in part.items():
            if axes[name][0] == "X" and (name != "a1_scales" or made.scalars.get("scale_axis") != "token"):
                part[name] = _columns(tensor, 0, keep)
            elif axes[name] == "P":
                part[name] = tensor[: keep.numel() + 1]
    ids = arguments.get(calls.IDS[op])
    if ids is None:
        return
    numbers = torch.full((count + 2,), -1, dtype=ids.dtype)
    numbers[keep] = first + torch.arange(keep.numel(), dtype=ids.dtype)
    local = (ids >= first) & (ids < first + count)
    arguments[calls.IDS[op]] = torch.where(local, numbers[torch.where(local, ids - first, 0).long()], -1)
    if "end_expert_id" in made.scalars:
        made.scalars["end_expert_id"] = first + keep.numel() - 1


def _compact(made):
    """Leaves rows out that no slot has."""
    op, arguments = made.op, made.tensors["argument"]
    if op == "ep_scatter":
        return _compact_scatter(made)
    if op not in ("post_reorder", "pre_reorder", "ep_gather"):
        return None
    local, rows = calls.local_slots(op, arguments, made.scalars)
    used = rows[local].unique()
    if used.numel() == 0:
        used = torch.zeros(1, dtype=torch.long)
    start = made.scalars.get("dst_start", 0) if op != "ep_gather" else 0
    name = "input_index" if op == "ep_gather" else "src2dst"
    index = arguments[name]
    gone = torch.full_like(rows, -1) if arguments.get(calls.IDS[op]) is None or op == "ep_gather" else start
    fresh = torch.where(local, torch.searchsorted(used, rows.clamp(min=0)) + start, gone)
    arguments[name] = fresh.to(index.dtype).reshape(index.shape)
    axes = calls.axes_of(op, arguments, made.scalars)
    for part in made.tensors.values():
        for each, tensor in part.items():
            if axes[each][0] == "R":
                flat = tensor.reshape(-1, tensor.shape[-1])
                part[each] = _columns(flat, 0, used.clamp(max=max(0, flat.shape[0] - 1)))
    return None


def _compact_scatter(made):
    arguments, before = made.tensors["argument"], made.tensors["before"]
    reserved, ids = arguments["num_recv_tokens_per_expert"], arguments["recv_topk"].reshape(-1).long()
    pad = 128 if bool((reserved % 128 == 0).all()) else 1
    counts = torch.bincount(ids[ids >= 0], minlength=reserved.numel())
    arguments["num_recv_tokens_per_expert"] = ((counts + pad - 1) // pad * pad).clamp(max=reserved).to(torch.int32)
    rows = int(arguments["num_recv_tokens_per_expert"].sum())
    for name in ("output_tensor", "output_tensor_scale", "m_indices"):
        if name in before:
            tensor = before[name]
            before[name] = calls.poison((rows, *tensor.shape[1:]), tensor.dtype)
