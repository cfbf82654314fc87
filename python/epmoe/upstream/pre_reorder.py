"""sgl-kernel's ep_moe_pre_reorder, as it was before it was removed."""

from epmoe.upstream import require_topk

__all__ = ["ep_moe_pre_reorder"]


def ep_moe_pre_reorder(
    input,
    gateup_input,
    src2dst,
    topk_ids,
    a1_scales,
    start_expert_id,
    end_expert_id,
    topk,
    use_per_token_if_dynamic,
):
    """Copies each token's row of ``input`` [T, H] to the rows of its local slots in ``gateup_input`` [T*K, H].

    ``src2dst`` [T*K] or [T, K], ``topk_ids`` [T, K]; experts from ``start_expert_id`` to ``end_expert_id`` inclusive
    are local. Rows are divided by ``a1_scales``: of the token with ``use_per_token_if_dynamic``, else of the local
    expert; None leaves them as they are.
    """
    from epmoe.generated import pre_reorder

    require_topk("ep_moe_pre_reorder", topk_ids, topk)
    pre_reorder(
        input,
        gateup_input,
        src2dst,
        topk_ids=topk_ids,
        a1_scales=a1_scales,
        start_expert_id=start_expert_id,
        end_expert_id=end_expert_id,
        scale_axis="token" if use_per_token_if_dynamic else "expert",
    )
