"""References of each op, one module an op: what its kernels are proved against."""
