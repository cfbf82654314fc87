"""Where models come from: a folder, or a configuration with seeded random weights."""

import os

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from epmoe.serve import slots

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def _qwen3_moe(**changes):
    return transformers.Qwen3MoeConfig(
        **{
            "hidden_size": 128,
            "intermediate_size": 256,
            "moe_intermediate_size": 64,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            **changes,
        }
    )


def _mixtral(**changes):
    return transformers.MixtralConfig(
        **{
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            **changes,
        }
    )


EMBEDDED = {"qwen3-moe": _qwen3_moe, "mixtral": _mixtral}


def byte_tokenizer():
    """A token for each byte, and three that mark; any text, and any bytes, can be told."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )


@torch.no_grad()
def _randomise(model, seed):
    """Weights whose products have the size of their inputs, so that what is said depends on what was said."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() < 2:
            parameter.fill_(1)
        else:
            fan_in = 1 if "embed" in name else parameter.shape[-1]
            for part in parameter if parameter.dim() == 3 else [parameter]:
                part.normal_(0, fan_in**-0.5, generator=generator)


def load(model, device, dtype, seed, changes):
    """A causal language model and its tokenizer; ``model`` is a name of :data:`EMBEDDED` or a folder."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "attn_implementation": slots.IMPLEMENTATION,
    }
    if model in EMBEDDED:
        tokenizer = byte_tokenizer()
        special = {"vocab_size": len(tokenizer), "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
        config = EMBEDDED[model](**{**special, **changes})
        if dtype == "auto":
            options["dtype"] = torch.float32
        with torch.device(device):
            loaded = transformers.AutoModelForCausalLM.from_config(config, **options)
        _randomise(loaded, seed)
    elif os.path.isdir(model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, local_files_only=True, **options)
    else:
        raise ValueError(
            f"model: expected {', '.join(EMBEDDED)} or a folder of a Hugging Face model, received {model!r}. "
            "Models are not downloaded: fetch it first, e.g. with huggingface-cli download"
        )
    loaded = loaded.to(device).eval().requires_grad_(False)
    for module in loaded.modules():
        if getattr(module, "sinks", None) is not None:
            raise ValueError(f"model: {type(loaded).__name__} has attention sinks, which are not served")
    return loaded, tokenizer


def experts_of(model):
    """The modules of stacked experts in the order of the layers: ``forward(hidden, topk_ids, topk_weights)``."""
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter) and module.gate_up_proj.dim() == 3
    ]
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no mixture-of-experts blocks with stacked experts (transformers 5)"
        )
    return found


def layer_of(experts):
    """A module of stacked experts as epmoe's layer takes it: w13 [E, 2I, H], w2 [E, H, I], what else there is."""
    transposed = getattr(experts, "is_transposed", False)
    w13, w2 = (
        each.data.transpose(1, 2) if transposed else each.data for each in (experts.gate_up_proj, experts.down_proj)
    )
    silu = getattr(experts, "is_concatenated", True) and isinstance(
        getattr(experts, "act_fn", None), (nn.SiLU, transformers.activations.SiLUActivation)
    )
    layer = {"w13": w13, "w2": w2}
    for ours, theirs in (("w13_bias", "gate_up_proj_bias"), ("w2_bias", "down_proj_bias")):
        if getattr(experts, theirs, None) is not None:
            layer[ours] = getattr(experts, theirs).data
    if not silu:
        layer["activation"] = experts._apply_gate
    return layer
