"""The signatures of SGLang's kernels and helpers that epmoe takes the place of, told without torch or Triton."""

from dataclasses import dataclass, field

from epmoe import sglang_original

# What a launch may say of how Triton should compile it; none of it changes a result.
OPTIONS = {
    "num_warps",
    "num_stages",
    "num_ctas",
    "num_buffers_warp_spec",
    "num_consumer_groups",
    "reg_dec_producer",
    "reg_inc_consumer",
    "maxnreg",
    "cluster_dims",
    "launch_cooperative_grid",
    "launch_pdl",
    "debug",
    "sanitize_overflow",
    "waves_per_eu",
    "matrix_instr_nonkdim",
    "kpack",
}


@dataclass(frozen=True)
class Form:
    """A kernel's signature, known by the names at the positions ``numbers``; tensors are named differently by version.

    ``arguments`` are epmoe's names for the parameters; those that it reads off the tensors' shapes have none.
    """

    op: str
    names: tuple
    numbers: range
    arguments: dict
    generation: str = ""
    refused: str = ""

    def fits(self, names):
        return len(names) == len(self.names) and all(names[at] == self.names[at] for at in self.numbers)

    def fits_call(self, positional, keywords):
        """Whether a call by these names is complete."""
        return positional <= len(self.names) and set(self.names[positional:]) == keywords


@dataclass(frozen=True)
class HelperForm:
    """``may`` are parameters of some versions, and the values that epmoe takes of them."""

    op: str
    names: tuple
    arguments: dict
    may: dict = field(default_factory=dict)

    def fits(self, names):
        return tuple(names[: len(self.names)]) == self.names


def _own(*names):
    return {name: name for name in names}


_GATHERED = ("down_output_ptr", "output_ptr", "src2dst_ptr", "topk_ids_ptr", "topk_weights_ptr")
_SCATTERED = ("input_ptr", "gateup_input_ptr", "src2dst_ptr", "topk_ids_ptr", "a1_scales_ptr")
_RANGE = ("start_expert_id", "end_expert_id")
_SIZES = ("topk", "hidden_size")
_BLOCK = ("BLOCK_SIZE",)
_ACTIVATED = ("gateup_output", "down_input", "hidden_size", "reorder_topk_ids", "scales", *_RANGE, *_BLOCK)


def _form(op, names, generation="", **more):
    """Pointers go by their tensors' names, the numbers that say more than a shape by their own."""
    kept = {*_RANGE, "dst_start", "routed_scaling_factor", *_ACTIVATED[:5]} - {"hidden_size"}
    arguments = {name: name.removesuffix("_ptr") for name in names if name.endswith("_ptr") or name in kept}
    return Form(op, names, range(5, len(names)), arguments | more.pop("arguments", {}), generation, **more)


def _without_ids(op, names, **arguments):
    """DeepEP's kernels are given topk_ids, and never read them."""
    form = _form(op, names)
    unread = {"topk_ids_ptr", "a1_scales_ptr"}
    return Form(op, names, form.numbers, {name: own for name, own in form.arguments.items() if name not in unread})


KERNELS = {
    sglang_original.POST_REORDER: (
        _form("post_reorder", (*_GATHERED, *_RANGE, *_SIZES, *_BLOCK), "A"),
        _form("post_reorder", (*_GATHERED, *_RANGE, *_SIZES, "dst_start", *_BLOCK), "B"),
        _form("post_reorder", (*_GATHERED, *_SIZES, *_BLOCK), "D"),
        _form("post_reorder", (*_GATHERED, *_SIZES, *_BLOCK), "C", refused=sglang_original.KNOWN_WRONG),
    ),
    "deepep_post_reorder_triton_kernel": (
        _without_ids("post_reorder", (*_GATHERED, *_SIZES, *_BLOCK)),
        _without_ids("post_reorder", (*_GATHERED, *_SIZES, "routed_scaling_factor", *_BLOCK)),
    ),
    "pre_reorder_triton_kernel": (
        _form("pre_reorder", (*_SCATTERED, *_RANGE, *_SIZES, *_BLOCK)),
        _form(
            "pre_reorder",
            (*_SCATTERED, *_RANGE, *_SIZES, *_BLOCK, "use_per_token_if_dynamic"),
            arguments={"use_per_token_if_dynamic": "scale_axis"},
        ),
    ),
    "deepep_permute_triton_kernel": (_without_ids("pre_reorder", (*_SCATTERED, *_SIZES, *_BLOCK)),),
    "silu_and_mul_triton_kernel": (_form("silu_and_mul", _ACTIVATED),),
    "gelu_and_mul_triton_kernel": (_form("gelu_and_mul", _ACTIVATED),),
}

_SCATTER = (
    "recv_x",
    "recv_x_scale",
    "recv_topk",
    "num_recv_tokens_per_expert",
    "expert_start_loc",
    "output_tensor",
    "output_tensor_scale",
    "m_indices",
    "output_index",
)
_GATHER = ("input_tensor", "recv_topk_ids", "recv_topk_weight", "input_index", "output_tensor")
_DEEPGEMM = ("down_output", "output", "src2dst", "topk_ids", "topk_weights")

HELPERS = {
    "run_moe_ep_preproess": HelperForm("preprocess", ("topk_ids", "num_experts"), _own("topk_ids")),
    "deepep_run_moe_deep_preprocess": HelperForm("preprocess", ("topk_ids", "num_experts"), _own("topk_ids")),
    "silu_and_mul_masked_post_quant_fwd": HelperForm(
        "silu_and_mul",
        ("input", "output", "output_scale", "quant_group_size", "masked_m"),
        {
            "input": "gateup_output",
            "output": "down_input",
            "output_scale": "output_scales",
            "masked_m": "masked_m",
            "scale_ue8m0": "scale_format",
        },
        {"scale_ue8m0": (False, True)},
    ),
    "ep_scatter": HelperForm("ep_scatter", _SCATTER, _own(*_SCATTER), {"scale_ue8m0": (False,)}),
    "ep_gather": HelperForm("ep_gather", _GATHER, _own(*_GATHER)),
    "post_reorder_deepgemm": HelperForm(
        "post_reorder",
        (*_DEEPGEMM, "topk", "num_tokens", "hidden_size", "routed_scaling_factor"),
        _own(*_DEEPGEMM, "routed_scaling_factor"),
    ),
}

NAMES = (*KERNELS, *HELPERS)


def form_of_names(name, names, source):
    """The form of a kernel with these parameters, or None; ``source()`` is its text."""
    found = [form for form in KERNELS[name] if form.fits(names)]
    if name == sglang_original.POST_REORDER:
        generation = sglang_original.generation_by(names, source)
        found = [form for form in found if form.generation == generation]
    return found[0] if found else None


def forms_by_call(name, positional, keywords):
    """The forms that a call without a Triton kernel behind it may be of."""
    return [form for form in KERNELS[name] if form.fits_call(positional, keywords)]
