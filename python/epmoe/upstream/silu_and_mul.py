"""sgl-kernel's ep_moe_silu_and_mul, as it was before it was removed."""

__all__ = ["ep_moe_silu_and_mul"]


def ep_moe_silu_and_mul(gateup_output, down_input, reorder_topk_ids, scales, start_expert_id, end_expert_id):
    """Writes silu(gate) * up / scale of each local expert's row to ``down_input`` [R, I].

    ``gateup_output`` [R, 2*I] holds gate and up, ``reorder_topk_ids`` [R] says the expert of each row, ``scales`` the
    divisor of each local expert (None: 1); experts from ``start_expert_id`` to ``end_expert_id`` inclusive are local.
    """
    from epmoe.generated import silu_and_mul

    silu_and_mul(
        gateup_output,
        down_input,
        reorder_topk_ids=reorder_topk_ids,
        scales=scales,
        start_expert_id=start_expert_id,
        end_expert_id=end_expert_id,
    )
