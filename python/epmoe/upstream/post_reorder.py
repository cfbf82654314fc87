"""sgl-kernel's ep_moe_post_reorder, as it was before it was removed."""

from epmoe.errors import EpmoeError

__all__ = ["ep_moe_post_reorder"]


def ep_moe_post_reorder(down_output, output, src2dst, topk_ids, topk_weights, start_expert_id, end_expert_id, topk):
    """Writes each token's weighted sum of its local experts' rows to ``output`` [T, H].

    ``down_output`` [T*K, H], ``src2dst`` [T*K] or [T, K], ``topk_ids`` and ``topk_weights`` [T, K]; experts from
    ``start_expert_id`` to ``end_expert_id`` inclusive are local. Accumulates in float32.
    """
    from epmoe.generated import post_reorder

    if topk_ids.shape[-1] != topk:
        raise EpmoeError(
            "ERR_VALUE",
            op="ep_moe_post_reorder",
            argument="topk",
            expected=f"{topk_ids.shape[-1]}, the last size of topk_ids",
            received=str(topk),
        )
    post_reorder(
        down_output,
        output,
        src2dst,
        topk_weights,
        topk_ids=topk_ids,
        start_expert_id=start_expert_id,
        end_expert_id=end_expert_id,
    )
