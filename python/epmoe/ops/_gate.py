"""Which slots are local: within a range of experts, or, without topk_ids, those whose src2dst is not negative."""

from epmoe._triton import jit, tl


def local_slots(src2dst, shape, topk_ids, start_expert_id, end_expert_id):
    """Which slots are local, as a bool tensor of ``shape`` [T, K], and src2dst in that shape."""
    destinations = src2dst.view(shape)
    if topk_ids is None:
        return destinations >= 0, destinations
    return (topk_ids >= start_expert_id) & (topk_ids <= end_expert_id), destinations


@jit
def local_row(src2dst, topk_ids, slot, start_expert_id, end_expert_id, dst_start):
    """The row of a slot, or -1 where the slot is not local. topk_ids may be None."""
    destination = tl.load(src2dst + slot).to(tl.int64)
    if topk_ids is not None:
        expert = tl.load(topk_ids + slot)
        local = (expert >= start_expert_id) & (expert <= end_expert_id)
    else:
        local = destination >= 0
    return tl.where(local, destination - dst_start, -1)
