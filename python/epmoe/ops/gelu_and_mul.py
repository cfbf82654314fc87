"""References of gelu_and_mul: the gated activation with gelu in its tanh form."""

from epmoe.ops._activation import references_of

REFERENCES = references_of("gelu_and_mul_triton_kernel")
