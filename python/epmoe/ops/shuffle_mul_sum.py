"""References of shuffle_mul_sum.

Semantics: output [T, H] is the sum over k of the rows of input [R, H] that permutation [T, K] names, each times its
factor; negative entries name none.
"""

from epmoe.ops._sum import ones_like_slots, sum_references


def arguments_of(*, input, output, permutation, factors=None):
    # T*K slots may be flat in either table, so T comes from the output.
    slots = permutation.view(output.shape[0], -1) if output.shape[0] else permutation.reshape(0, 1)
    return {
        "down_output": input,
        "output": output,
        "src2dst": slots,
        "topk_weights": ones_like_slots(slots) if factors is None else factors.view(slots.shape),
    }


REFERENCES = sum_references(arguments_of)
