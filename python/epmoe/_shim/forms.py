"""What a launch of one of SGLang's kernels, or a call of one of its helpers, asks of epmoe.

``TRANSLATE`` has a function for each kernel: it turns the values of a launch, by the names of its form
(signatures.py), and the number of programs into a :class:`Call`, or raises :class:`Refused`. Kernels see memory and
numbers, not shapes: tables are cut to what the grid and the numbers say.
"""

import functools
import inspect
import operator
from dataclasses import dataclass

from torch import Tensor

from epmoe import generated, sglang_original
from epmoe._shim.signatures import form_of_names, forms_by_call


class Refused(Exception):  # noqa: N818
    """Why epmoe does not take a call: ``key`` in few words, the same for all calls of the kind."""

    def __init__(self, key, detail=""):
        self.key = key
        super().__init__(f"{key}: {detail}" if detail else key)


@dataclass
class Call:
    """An op's arguments. ``outputs`` are those it writes to, ``whole`` those of them it writes every element of."""

    op: str
    arguments: dict
    outputs: tuple
    whole: tuple = ()
    returns: str = ""  # the output that the helper gives back

    def tensors(self):
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    def scalars(self):
        return {name: value for name, value in self.arguments.items() if not isinstance(value, Tensor)}

    def written(self):
        return {name: self.arguments[name] for name in self.outputs}

    def run(self, instead=None):
        """Runs epmoe, on other outputs where given, and returns what the helper would."""
        getattr(generated, self.op)(**{**self.arguments, **(instead or {})})
        return self.arguments.get(self.returns)

    def results(self, result):
        """What came out, by name; ``result`` is what a helper returned."""
        return self.written()

    def comparable(self, outputs):
        """What of the outputs has to be the same."""
        return outputs


# ---------------------------------------------------------------- tables


def table(values, name, rows, columns, flat=False):
    """The first ``rows`` rows of a tensor in memory order."""
    tensor = dense(values, name)
    shape = tensor.shape
    if len(shape) == 2 and shape[0] == rows and shape[1] == columns:
        return tensor
    count = rows * columns
    if tensor.numel() < count:
        raise Refused(f"{name} is smaller than the launch says", f"{tuple(shape)} for [{rows}, {columns}]")
    if flat and len(shape) == 1 and shape[0] == count:
        return tensor
    return tensor.view(-1)[:count].view(rows, columns)


def rows_of(values, name, columns):
    """All rows of a tensor, of whatever leading axes."""
    tensor = dense(values, name)
    if tensor.dim() > 1 and tensor.shape[-1] == columns:
        return tensor
    if columns <= 0:
        raise Refused("hidden_size is not positive")
    count = tensor.numel() // columns
    return tensor.view(-1)[: count * columns].view(count, columns)


def flat(values, name, count=None):
    tensor = dense(values, name)
    if count is None:
        return tensor if tensor.dim() == 1 else tensor.view(-1)
    if tensor.numel() < count:
        raise Refused(f"{name} is smaller than the launch says", f"{tuple(tensor.shape)} for {count}")
    return tensor if tensor.shape == (count,) else tensor.view(-1)[:count]


def dense(values, name):
    tensor = values[name]
    if not isinstance(tensor, Tensor):
        raise Refused(f"{name} is no tensor", type(tensor).__name__)
    if not tensor.is_contiguous():
        raise Refused(f"{name} is not contiguous", f"strides {tensor.stride()} of {tuple(tensor.shape)}")
    return tensor


def number(values, name):
    try:
        return operator.index(values[name])
    except TypeError:
        raise Refused(f"{name} is no whole number", type(values[name]).__name__) from None


def numerics_or(asked, exact):
    """``triton`` asks for the arithmetic of the kernel at hand, which for some is float32."""
    return exact if asked == "triton" else asked


# ---------------------------------------------------------------- kernels


def _post_reorder(values, programs, numerics, exact="triton", gate="range"):
    hidden, topk = number(values, "hidden_size"), number(values, "topk")
    arguments = {
        "down_output": rows_of(values, "down_output_ptr", hidden),
        "output": table(values, "output_ptr", programs, hidden),
        "src2dst": table(values, "src2dst_ptr", programs, topk, flat=True),
        "topk_weights": table(values, "topk_weights_ptr", programs, topk),
        "numerics": numerics_or(numerics, exact),
    }
    if gate != "src2dst":
        arguments["topk_ids"] = table(values, "topk_ids_ptr", programs, topk)
    if gate == "range":
        arguments["start_expert_id"] = number(values, "start_expert_id")
        arguments["end_expert_id"] = number(values, "end_expert_id")
    if "dst_start" in values:
        arguments["dst_start"] = number(values, "dst_start")
    if "routed_scaling_factor" in values:
        arguments["routed_scaling_factor"] = factor(values)
    return Call("post_reorder", arguments, ("output",), ("output",))


def factor(values):
    value = values["routed_scaling_factor"]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Refused("routed_scaling_factor is no number", type(value).__name__)
    return float(value)


def _pre_reorder(values, programs, numerics):
    hidden, topk = number(values, "hidden_size"), number(values, "topk")
    gated = "start_expert_id" in values
    arguments = {
        "input": table(values, "input_ptr", programs, hidden),
        "gateup_input": rows_of(values, "gateup_input_ptr", hidden),
        "src2dst": table(values, "src2dst_ptr", programs, topk, flat=True),
        "numerics": numerics,
    }
    if gated:
        arguments["topk_ids"] = table(values, "topk_ids_ptr", programs, topk)
        arguments["start_expert_id"] = number(values, "start_expert_id")
        arguments["end_expert_id"] = number(values, "end_expert_id")
        if values["a1_scales_ptr"] is not None:
            arguments["a1_scales"] = flat(values, "a1_scales_ptr")
            arguments["scale_axis"] = "token" if values.get("use_per_token_if_dynamic") else "expert"
    return Call("pre_reorder", arguments, ("gateup_input",))


def _activation(values, programs, numerics, op):
    hidden = number(values, "hidden_size")
    if hidden % 2:
        raise Refused("hidden_size is odd")
    arguments = {
        "gateup_output": table(values, "gateup_output", programs, hidden),
        "down_input": table(values, "down_input", programs, hidden // 2),
        "reorder_topk_ids": flat(values, "reorder_topk_ids", programs),
        "start_expert_id": number(values, "start_expert_id"),
        "end_expert_id": number(values, "end_expert_id"),
        "numerics": numerics,
    }
    if values["scales"] is not None:
        arguments["scales"] = flat(values, "scales")
    return Call(op, arguments, ("down_input",))


def _post_reorder_generations(values, programs, numerics):
    """A and B are told which experts are local and sum in their own dtype; C and D take local ids, D in float32."""
    if "start_expert_id" in values:
        return _post_reorder(values, programs, numerics)
    return _post_reorder(values, programs, numerics, exact="fp32", gate="sign")


TRANSLATE = {
    sglang_original.POST_REORDER: _post_reorder_generations,
    "deepep_post_reorder_triton_kernel": functools.partial(_post_reorder, gate="src2dst"),
    "pre_reorder_triton_kernel": _pre_reorder,
    "deepep_permute_triton_kernel": _pre_reorder,
    "silu_and_mul_triton_kernel": functools.partial(_activation, op="silu_and_mul"),
    "gelu_and_mul_triton_kernel": functools.partial(_activation, op="gelu_and_mul"),
}


def form_of(kernel, name):
    """The form of a Triton kernel, or None where its signature is not known."""
    function = getattr(kernel, "fn", kernel)
    return form_of_names(name, tuple(inspect.signature(function).parameters), lambda: inspect.getsource(function))


def form_by_call(name, positional, keywords):
    """The form that a call without a Triton kernel behind it fits; of C and D, D."""
    for form in forms_by_call(name, positional, keywords):
        if not form.refused:
            return form
    raise Refused("no known signature", f"{positional} positional arguments and {sorted(keywords)}")
