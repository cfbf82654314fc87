"""Generated from the library's descriptors by `npm run generate`; a test proves it fresh."""

from epmoe._call import invoke

__all__ = [
    "ep_gather",
    "ep_scatter",
    "gelu_and_mul",
    "moe_sum_reduce",
    "post_reorder",
    "pre_reorder",
    "preprocess",
    "shuffle_mul_sum",
    "silu_and_mul",
]


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


def ep_scatter(
    recv_x,
    recv_topk,
    num_recv_tokens_per_expert,
    expert_start_loc,
    output_tensor,
    m_indices,
    output_index,
    recv_x_scale=None,
    output_tensor_scale=None,
    stream=None,
):
    """Places received rows in their experts' segments: segments are as long as num_recv_tokens_per_expert says
    and follow each other; within one, rows are in order of token and slot.

    Args:
        recv_x: Received rows. Shape [T, H]; dtype float32, float16, bfloat16, float8_e4m3fn.
        recv_x_scale: Their scales, copied beside them. Shape [T, G]; dtype float32.
        recv_topk: Expert of each slot, local to the rank; -1: not here. Shape [T, K]; dtype int32, int64.
        num_recv_tokens_per_expert: Rows reserved for each expert, usually padded to 128. Shape [E]; dtype
            int32.
        expert_start_loc: Receives each segment's first row. Shape [E]; dtype int32.
        output_tensor: Receives the rows; rows of no slot stay as they are. Shape [M, H]; dtype that of recv_x.
        output_tensor_scale: Receives the scales. Shape [M, G]; dtype float32.
        m_indices: Receives the expert of each reserved row; rows beyond the last segment stay as they are.
            Shape [M]; dtype int32.
        output_index: Receives the row of each slot, -1 where it has none. Shape [T, K]; dtype int32.
        stream: a torch.cuda.Stream or a cudaStream_t; torch's current stream when None. CUDA only.

    Returns:
        expert_start_loc

    Raises:
        EpmoeError: an argument does not fit. An index out of range inside a tensor is skipped and reported: on the
            CPU by this call, on CUDA by the next epmoe.synchronize() or epmoe.check().
    """
    invoke(
        "ep_scatter",
        (
            recv_x,
            recv_x_scale,
            recv_topk,
            num_recv_tokens_per_expert,
            expert_start_loc,
            output_tensor,
            output_tensor_scale,
            m_indices,
            output_index,
        ),
        stream,
    )
    return expert_start_loc


def gelu_and_mul(
    gateup_output,
    down_input,
    reorder_topk_ids=None,
    scales=None,
    masked_m=None,
    output_scales=None,
    start_expert_id=0,
    end_expert_id=2147483647,
    quantization="static",
    scale_format="float32",
    numerics="fp32",
    stream=None,
):
    """Activates each row: down_input[r] = gelu(gate) * up / scale, gate and up the halves of gateup_output[r],
    and gelu in its tanh form. Rows that are not active stay as they are.

    Args:
        gateup_output: Rows of the first grouped GEMM: the gate's half, then the up half. Shape [...R, 2*I];
            dtype float32, float16, bfloat16.
        down_input: Receives the active rows; float8 saturates at 448. Shape [...R, I]; dtype float8_e4m3fn,
            that of gateup_output.
        reorder_topk_ids: Expert of each row: active when within [start_expert_id, end_expert_id]; all are when
            absent. Shape [R]; dtype int32, int64.
        scales: Divisor of each local expert. Shape [S]; dtype float32.
        masked_m: Active rows of each expert, which has R/E of them (DeepGEMM). Shape [E]; dtype int32.
        output_scales: Receives the scales found, one for each 128 columns. Shape [...R, G]; dtype float32.
        start_expert_id: First local expert.
        end_expert_id: Last local expert, inclusive.
        quantization: static: by scales, if any. group: float8 by the largest magnitude of each 128 columns, NaN
            aside; 448 times the scale is that magnitude, or 1e-10 where it is smaller.
        scale_format: Of the scales found: float32, or power_of_two, the next one up.
        numerics: fp32: float32 throughout, one final rounding. triton: the original kernel's arithmetic, the
            activation and each product rounded to the input dtype.
        stream: a torch.cuda.Stream or a cudaStream_t; torch's current stream when None. CUDA only.

    Returns:
        down_input

    Raises:
        EpmoeError: an argument does not fit. An index out of range inside a tensor is skipped and reported: on the
            CPU by this call, on CUDA by the next epmoe.synchronize() or epmoe.check().
    """
    invoke(
        "gelu_and_mul",
        (
            gateup_output,
            down_input,
            reorder_topk_ids,
            scales,
            masked_m,
            output_scales,
            start_expert_id,
            end_expert_id,
            quantization,
            scale_format,
            numerics,
        ),
        stream,
    )
    return down_input


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


def pre_reorder(
    input,
    gateup_input,
    src2dst,
    topk_ids=None,
    a1_scales=None,
    input_scales=None,
    output_scales=None,
    start_expert_id=0,
    end_expert_id=2147483647,
    dst_start=0,
    scale_axis="expert",
    quantization="static",
    scale_format="float32",
    numerics="fp32",
    stream=None,
):
    """Copies each token's row to the rows of its local slots: gateup_input[src2dst[t,k] - dst_start] =
    input[t], divided by a scale and converted on the way. Slots of experts outside [start_expert_id, end_expert_id]
    are skipped; rows of no slot stay as they are.

    Args:
        input: The tokens' rows; float8 rows are copied bit by bit, with their input_scales. Shape [T, H]; dtype
            float32, float16, bfloat16, float8_e4m3fn.
        gateup_input: Receives the rows; float8 saturates at 448. Shape [...R, H]; dtype float8_e4m3fn, that of
            input.
        src2dst: Row of each slot, counted from dst_start; negative entries are skipped when topk_ids is absent.
            Shape [T*K] or [T, K]; dtype int32, int64.
        topk_ids: Expert of each slot; without it a slot is local when src2dst is not negative (DeepEP). Shape
            [T, K]; dtype int32, int64.
        a1_scales: Divisors, indexed as scale_axis says. Shape [S]; dtype float32.
        input_scales: Scale rows of an already quantised input, copied to output_scales beside the rows. Shape
            [T, G]; dtype float32.
        output_scales: Receives the scales found, G = 1 a token or one for each 128 columns, or input_scales.
            Shape [...R, G]; dtype float32.
        start_expert_id: First local expert.
        end_expert_id: Last local expert, inclusive.
        dst_start: Subtracted from src2dst to give the row.
        scale_axis: What indexes a1_scales: expert, counted from start_expert_id, or token.
        quantization: static: by a1_scales, if any. token, group: float8 by the largest magnitude of the row or
            of each 128 columns, NaN aside; 448 times the scale is that magnitude, or 1e-10 where it is smaller.
        scale_format: Of the scales found: float32, or power_of_two, the next one up.
        numerics: fp32: one division in float32, then one rounding. triton: the original's product with an
            approximate reciprocal.
        stream: a torch.cuda.Stream or a cudaStream_t; torch's current stream when None. CUDA only.

    Returns:
        gateup_input

    Raises:
        EpmoeError: an argument does not fit. An index out of range inside a tensor is skipped and reported: on the
            CPU by this call, on CUDA by the next epmoe.synchronize() or epmoe.check().
    """
    invoke(
        "pre_reorder",
        (
            input,
            gateup_input,
            src2dst,
            topk_ids,
            a1_scales,
            input_scales,
            output_scales,
            start_expert_id,
            end_expert_id,
            dst_start,
            scale_axis,
            quantization,
            scale_format,
            numerics,
        ),
        stream,
    )
    return gateup_input


def preprocess(
    topk_ids,
    src2dst,
    seg_indptr,
    reorder_topk_ids=None,
    masked_m=None,
    m_max=0,
    negatives="counted",
    stream=None,
):
    """Orders slots by expert, stably and without a sort: src2dst[i] is the row of slot i when rows are grouped
    by expert, then by slot, and seg_indptr[e] to seg_indptr[e+1] are the rows of expert e. Runs without waiting for
    the device.

    Args:
        topk_ids: Expert of each slot: 0 to E-1, or -1 for none. Shape [T, K]; dtype int32, int64.
        src2dst: Receives the row of each slot. Shape [T*K] or [T, K]; dtype int32, int64.
        seg_indptr: Receives where each expert's rows begin, and the end. Shape [E+1]; dtype int64.
        reorder_topk_ids: Receives the expert of each row. Shape [T*K]; dtype that of topk_ids.
        masked_m: Receives how many slots each expert has. Shape [E]; dtype int32.
        m_max: 0: rows are packed. Otherwise each expert has m_max rows (DeepGEMM): src2dst is expert * m_max +
            its place in the expert, and -1 for slots without an expert.
        negatives: counted: slots of -1 come first and count as rows before expert 0's, within its segment
            (run_moe_ep_preproess). dropped: rows begin with expert 0; slots of -1 get negative rows, and
            reorder_topk_ids ends with their -1 (DeepEP).
        stream: a torch.cuda.Stream or a cudaStream_t; torch's current stream when None. CUDA only.

    Returns:
        src2dst

    Raises:
        EpmoeError: an argument does not fit. An index out of range inside a tensor is skipped and reported: on the
            CPU by this call, on CUDA by the next epmoe.synchronize() or epmoe.check().
    """
    invoke(
        "preprocess",
        (
            topk_ids,
            src2dst,
            seg_indptr,
            reorder_topk_ids,
            masked_m,
            m_max,
            negatives,
        ),
        stream,
    )
    return src2dst


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


def silu_and_mul(
    gateup_output,
    down_input,
    reorder_topk_ids=None,
    scales=None,
    masked_m=None,
    output_scales=None,
    start_expert_id=0,
    end_expert_id=2147483647,
    quantization="static",
    scale_format="float32",
    numerics="fp32",
    stream=None,
):
    """Activates each row: down_input[r] = silu(gate) * up / scale, gate and up the halves of gateup_output[r],
    and silu(x) = x / (1 + exp(-x)). Rows that are not active stay as they are.

    Args:
        gateup_output: Rows of the first grouped GEMM: the gate's half, then the up half. Shape [...R, 2*I];
            dtype float32, float16, bfloat16.
        down_input: Receives the active rows; float8 saturates at 448. Shape [...R, I]; dtype float8_e4m3fn,
            that of gateup_output.
        reorder_topk_ids: Expert of each row: active when within [start_expert_id, end_expert_id]; all are when
            absent. Shape [R]; dtype int32, int64.
        scales: Divisor of each local expert. Shape [S]; dtype float32.
        masked_m: Active rows of each expert, which has R/E of them (DeepGEMM). Shape [E]; dtype int32.
        output_scales: Receives the scales found, one for each 128 columns. Shape [...R, G]; dtype float32.
        start_expert_id: First local expert.
        end_expert_id: Last local expert, inclusive.
        quantization: static: by scales, if any. group: float8 by the largest magnitude of each 128 columns, NaN
            aside; 448 times the scale is that magnitude, or 1e-10 where it is smaller.
        scale_format: Of the scales found: float32, or power_of_two, the next one up.
        numerics: fp32: float32 throughout, one final rounding. triton: the original kernel's arithmetic, the
            activation and each product rounded to the input dtype.
        stream: a torch.cuda.Stream or a cudaStream_t; torch's current stream when None. CUDA only.

    Returns:
        down_input

    Raises:
        EpmoeError: an argument does not fit. An index out of range inside a tensor is skipped and reported: on the
            CPU by this call, on CUDA by the next epmoe.synchronize() or epmoe.check().
    """
    invoke(
        "silu_and_mul",
        (
            gateup_output,
            down_input,
            reorder_topk_ids,
            scales,
            masked_m,
            output_scales,
            start_expert_id,
            end_expert_id,
            quantization,
            scale_format,
            numerics,
        ),
        stream,
    )
    return down_input
