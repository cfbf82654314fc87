"""sgl-kernel's apply_shuffle_mul_sum."""

__all__ = ["apply_shuffle_mul_sum"]


def apply_shuffle_mul_sum(input, output, permutation, factors=None):
    """Writes the sum of the rows of ``input`` that each token's slots name, times their factors, to ``output`` [T, H].

    ``permutation`` [T*K] or [T, K] names the rows, negative for none; ``factors`` has as many elements (None: 1).
    """
    from epmoe.generated import shuffle_mul_sum

    shuffle_mul_sum(input, output, permutation, factors=factors)
