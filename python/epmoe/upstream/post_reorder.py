"""sgl-kernel's ep_moe_post_reorder, as it was before it was removed."""

from epmoe.upstream import require_topk

__all__ = ["ep_moe_post_reorder"]


def ep_moe_post_reorder(down_output, output, src2dst, topk_ids, topk_weights, start_expert_id, end_expert_id, topk):
    """Writes each token's weighted sum of its local experts' rows to ``output`` [T, H].

    ``down_output`` [T*K, H], ``src2dst`` [T*K] or [T, K], ``topk_ids`` and ``topk_weights`` [T, K]; experts from
    ``start_expert_id`` to ``end_expert_id`` inclusive are local. Accumulates in float32.
    """
    from epmoe.generated import post_reorder

    require_topk("ep_moe_post_reorder", topk_ids, topk)
    post_reorder(
        down_output,
        output,
        src2dst,
        topk_weights,
        topk_ids=topk_ids,
        start_expert_id=start_expert_id,
        end_expert_id=end_expert_id,
    )
