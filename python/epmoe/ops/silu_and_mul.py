"""References of silu_and_mul: the gated activation with silu(x) = x / (1 + exp(-x))."""

from epmoe.ops._activation import references_of

REFERENCES = references_of("silu_and_mul_triton_kernel")
