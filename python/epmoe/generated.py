"""Generated from the library's descriptors by `npm run generate`; a test proves it fresh."""

from epmoe._call import invoke

__all__ = ["ep_gather", "moe_sum_reduce", "post_reorder", "shuffle_mul_sum"]


def ep_gather(
    input_tensor,
    recv_topk_ids,
    recv_topk_weight,
    input_index,
    output_tensor,
    stream=None,
):
    """Sums, for every token, the rows ep_scatter placed: output_tensor[t] = sum over slots k with
    recv_topk_ids[t,k] >= 0 of recv_topk_weight[t,k] * input_tensor[input_index[t,k]], accumulated in float32 in
    order and rounded once.

    Args:
        input_tensor: The experts' rows; rows of no slot may be uninitialised. Shape [M, H]; dtype float32,
            float16, bfloat16.
        recv_topk_ids: Expert of each slot, local to the rank; negative: not here. Shape [T, K]; dtype int32,
            int64.
        recv_topk_weight: Router weight of each slot. Shape [T, K]; dtype float32, that of input_tensor.
        input_index: Row of each slot, as ep_scatter's output_index. Shape [T, K]; dtype int32, int64.
        output_tensor: Receives one row a token; every element is written. Shape [T, H]; dtype that of
            input_tensor.
        stream: a torch.cuda.Stream or a cudaStream_t; torch's current stream when None. CUDA only.

    Returns:
        output_tensor

    Raises:
        EpmoeError: an argument does not fit. An index out of range inside a tensor is skipped and reported: on the
            CPU by this call, on CUDA by the next epmoe.synchronize() or epmoe.check().
    """
    invoke(
        "ep_gather",
        (
            input_tensor,
            recv_topk_ids,
            recv_topk_weight,
            input_index,
            output_tensor,
        ),
        stream,
    )
    return output_tensor


def moe_sum_reduce(
    input,
    output,
    routed_scaling_factor=1.0,
    stream=None,
):
    """Sums every token's rows: output[t] = routed_scaling_factor * sum over k of input[t,k], accumulated in
    float32 in order and rounded once.

    Args:
        input: The experts' rows, already weighted. Shape [T, K, H]; dtype float32, float16, bfloat16.
        output: Receives one row a token. Shape [T, H]; dtype that of input.
        routed_scaling_factor: Multiplies the sum.
        stream: a torch.cuda.Stream or a cudaStream_t; torch's current stream when None. CUDA only.

    Returns:
        output

    Raises:
        EpmoeError: an argument does not fit. An index out of range inside a tensor is skipped and reported: on the
            CPU by this call, on CUDA by the next epmoe.synchronize() or epmoe.check().
    """
    invoke(
        "moe_sum_reduce",
        (
            input,
            output,
            routed_scaling_factor,
        ),
        stream,
    )
    return output


def post_reorder(
    down_output,
    output,
    src2dst,
    topk_weights,
    topk_ids=None,
    shared_output=None,
    residual=None,
    start_expert_id=0,
    end_expert_id=2147483647,
    dst_start=0,
    routed_scaling_factor=1.0,
    numerics="fp32",
    stream=None,
):
    """Sums, for every token, the rows its local experts produced, each times the router's weight: output[t] =
    routed_scaling_factor * sum over slots k of topk_weights[t,k] * down_output[src2dst[t,k] - dst_start] +
    shared_output[t] + residual[t]. Slots of experts outside [start_expert_id, end_expert_id] are skipped, their
    rows never read; a token without local slots gets zeros and what is added.

    Args:
        down_output: Rows of the experts' outputs; rows of skipped slots may be uninitialised. Shape [...R, H];
            dtype float32, float16, bfloat16.
        output: Receives one row a token; every element is written. Shape [T, H]; dtype that of down_output.
        src2dst: Row of each slot, counted from dst_start; negative entries are skipped when topk_ids is absent.
            Shape [T*K] or [T, K]; dtype int32, int64.
        topk_ids: Expert of each slot; without it a slot is local when src2dst is not negative (DeepEP). Shape
            [T, K]; dtype int32, int64.
        topk_weights: Router weight of each slot. Shape [T, K]; dtype float32, that of down_output.
        shared_output: Added to the sum, e.g. the shared experts' output. Shape [T, H]; dtype that of
            down_output.
        residual: Added last. Shape [T, H]; dtype that of down_output.
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
            shared_output,
            residual,
            start_expert_id,
            end_expert_id,
            dst_start,
            routed_scaling_factor,
            numerics,
        ),
        stream,
    )
    return output


def shuffle_mul_sum(
    input,
    output,
    permutation,
    factors=None,
    stream=None,
):
    """Gathers and sums: output[t] = sum over k of input[permutation[t,k]] * factors[t,k], accumulated in
    float32 in order and rounded once.

    Args:
        input: Rows in the experts' order. Shape [R, H]; dtype float32, float16, bfloat16.
        output: Receives one row a token; every element is written. Shape [T, H]; dtype that of input.
        permutation: Row of each slot; negative entries are skipped. Shape [T*K] or [T, K]; dtype int32, int64.
        factors: Weight of each slot; 1 when absent. Shape [T, K] or [T*K]; dtype float32, that of input.
        stream: a torch.cuda.Stream or a cudaStream_t; torch's current stream when None. CUDA only.

    Returns:
        output

    Raises:
        EpmoeError: an argument does not fit. An index out of range inside a tensor is skipped and reported: on the
            CPU by this call, on CUDA by the next epmoe.synchronize() or epmoe.check().
    """
    invoke(
        "shuffle_mul_sum",
        (
            input,
            output,
            permutation,
            factors,
        ),
        stream,
    )
    return output
