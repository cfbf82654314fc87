"""Generated from the library's descriptors by `npm run generate`; a test proves it fresh."""

from epmoe._call import invoke

__all__ = ["post_reorder"]


def post_reorder(
    down_output,
    output,
    src2dst,
    topk_weights,
    topk_ids=None,
    start_expert_id=0,
    end_expert_id=2147483647,
    dst_start=0,
    routed_scaling_factor=1.0,
    numerics="fp32",
    stream=None,
):
    """Sums, for every token, the rows its local experts produced, each times the router's weight: output[t] =
    routed_scaling_factor * sum over slots k of topk_weights[t,k] * down_output[src2dst[t,k] - dst_start]. Slots of
    experts outside [start_expert_id, end_expert_id] are skipped, their rows never read; a token without local slots
    gets zeros.

    Args:
        down_output: Rows of the experts' outputs; rows of skipped slots may be uninitialised. Shape [...R, H];
            dtype float32, float16, bfloat16.
        output: Receives one row a token; every element is written. Shape [T, H]; dtype that of down_output.
        src2dst: Row of each slot, counted from dst_start; negative entries are skipped when topk_ids is absent.
            Shape [T*K] or [T, K]; dtype int32, int64.
        topk_ids: Expert of each slot; without it a slot is local when src2dst is not negative (DeepEP). Shape
            [T, K]; dtype int32, int64.
        topk_weights: Router weight of each slot. Shape [T, K]; dtype float32, that of down_output.
        start_expert_id: First local expert.
        end_expert_id: Last local expert, inclusive.
        dst_start: Subtracted from src2dst to give the row.
        routed_scaling_factor: Multiplies the sum.
        numerics: fp32: float32 accumulation in slot order, one final rounding. triton: the original kernel's
            arithmetic, every partial sum and every weight rounded to the activation dtype.
        stream: a torch.cuda.Stream or a cudaStream_t; torch's current stream when None. CUDA only.

    Returns:
        output

    Raises:
        EpmoeError: an argument does not fit. An index out of range inside a tensor is skipped and reported: on the
            CPU by this call, on CUDA by the next epmoe.synchronize() or epmoe.check().
    """
    invoke(
        "post_reorder",
        (
            down_output,
            output,
            src2dst,
            topk_ids,
            topk_weights,
            start_expert_id,
            end_expert_id,
            dst_start,
            routed_scaling_factor,
            numerics,
        ),
        stream,
    )
    return output
