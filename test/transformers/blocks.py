"""Mixture-of-experts blocks of Hugging Face transformers, with random weights: their parts and what they give.

Routing happens once, by the block's own router in the block's dtype. The block's experts, their float64 copies and
epmoe all get these ids and weights, so that ties cannot make them differ. Needs transformers 5, whose experts are
stacked.
"""

import copy

import torch
import transformers
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

TOKENS, HIDDEN = 96, 192
# How transformers runs experts: a loop over them, or sorted rows and a grouped GEMM (a model's default).
IMPLEMENTATIONS = ("eager", "grouped_mm")
ROUTED_SCALING_FACTOR = 2.5

transformers.logging.set_verbosity_error()


def _mixtral():
    config = transformers.MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=256, num_local_experts=8, num_experts_per_tok=2
    )
    return config, mixtral.MixtralSparseMoeBlock(config)


def _qwen3():
    config = transformers.Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=80, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True
    )
    return config, qwen3.Qwen3MoeSparseMoeBlock(config)


def _deepseek():
    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN,
        moe_intermediate_size=128,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        routed_scaling_factor=ROUTED_SCALING_FACTOR,
    )
    return config, deepseek.DeepseekV3MoE(config)


def _gpt_oss():
    config = transformers.GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=160, num_local_experts=8, num_experts_per_tok=4
    )
    return config, gpt_oss.GptOssMLP(config)


BLOCKS = {"Mixtral": _mixtral, "Qwen3-MoE": _qwen3, "DeepSeek-V3": _deepseek, "gpt-oss": _gpt_oss}


def _randomise(block, generator):
    """Weights whose products have the size of their inputs; biases and router corrections are there and count."""
    with torch.no_grad():
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            fan_in = HIDDEN if tensor.dim() > 1 else 16
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * fan_in**-0.5)
            if name.endswith("down_proj"):
                tensor.mul_(2)


def _route(block, hidden):
    """Ids and weights of the block's router, the latter without the routed scaling factor, and that factor."""
    router = getattr(block, "gate", None) or block.router
    factor = getattr(router, "routed_scaling_factor", 1.0)
    if factor != 1.0:
        router.routed_scaling_factor = 1.0
    _, weights, ids = router(hidden)
    if factor != 1.0:
        router.routed_scaling_factor = factor
    return ids, weights, factor


def _plain(output):
    """gpt-oss returns its router's scores as well."""
    return (output[0] if isinstance(output, tuple) else output)[0]


def _shared(block, hidden):
    return block.shared_experts(hidden) if hasattr(block, "shared_experts") else None


def _exact(block, hidden, ids, weights, factor):
    """The same experts in float64, on the same inputs and routing."""
    double = copy.deepcopy(block).double()
    out = double.experts(hidden.double(), ids, weights.double()) * factor
    shared = _shared(double, hidden.double())
    return out if shared is None else out + shared


@torch.no_grad()
def make(name, dtype, device, with_residual):
    """A block's weights in epmoe's layout, a call's inputs, what the block makes of them, and the float64 result."""
    generator = torch.Generator().manual_seed(20)
    config, block = BLOCKS[name]()
    _randomise(block, generator)
    block = block.to(device, getattr(torch, dtype)).eval()
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(device, getattr(torch, dtype))
    residual = torch.randn(TOKENS, HIDDEN, generator=generator).to(hidden) if with_residual else None

    own = {}
    for implementation in IMPLEMENTATIONS:
        config._experts_implementation = implementation
        out = _plain(block(hidden[None]))
        own[implementation] = out if residual is None else residual + out
    config._experts_implementation = "eager"
    ids, weights, factor = _route(block, hidden)
    exact = _exact(block, hidden, ids, weights, factor)

    experts = block.experts
    # gpt-oss stores [E, in, out], the others [E, out, in]. No block here is square.
    transposed = experts.gate_up_proj.shape[-1] != HIDDEN
    w13, w2 = (each.transpose(1, 2) if transposed else each for each in (experts.gate_up_proj, experts.down_proj))
    return {
        "w13": w13,
        "w2": w2,
        "w13_bias": getattr(experts, "gate_up_proj_bias", None),
        "w2_bias": getattr(experts, "down_proj_bias", None),
        "activation": "swigluoai" if hasattr(experts, "limit") else "silu",
        "factor": factor,
        "hidden": hidden,
        "ids": ids,
        "weights": weights,
        "shared": _shared(block, hidden),
        "residual": residual,
        "own": own,
        "exact": exact if residual is None else exact + residual.double(),
    }
