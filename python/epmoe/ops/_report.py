"""What references tell of themselves: facts, problems and objections that they share."""

import torch

from epmoe import _triton, sglang_original


def torch_facts(arithmetic="input-dtype"):
    return {"version": torch.__version__, "compiled": True, "arithmetic": arithmetic}


def triton_facts(arithmetic="input-dtype"):
    return {"version": _triton.triton.__version__, "compiled": not _triton.INTERPRETED, "arithmetic": arithmetic}


def original_facts(arithmetic="input-dtype"):
    found = sglang_original.find()
    return {**triton_facts(arithmetic), "sglang": found.version, "generation": found.generation}


def triton_objection(**arguments):
    dtypes = {value.dtype for value in arguments.values() if isinstance(value, torch.Tensor)}
    if torch.bfloat16 in dtypes and (problem := _triton.bfloat16_problem()):
        return problem
    return _triton.float8_problem() if torch.float8_e4m3fn in dtypes else None


def original_problem(*names):
    """None, or why none of these kernels of SGLang can be run: the reason that the first of them has."""
    if problem := _triton.problem():
        return problem
    problems = [sglang_original.find().problem_of(name) for name in names]
    return None if None in problems else problems[0]


def narrow_index_objection(*tensors):
    """For kernels that multiply rows by columns in 32 bits."""
    if max(tensor.numel() for tensor in tensors) >= 2**31:
        return "SGLang's kernel indexes with 32 bits: it would read out of bounds beyond 2^31 elements"
    return None
