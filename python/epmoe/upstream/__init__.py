"""Functions under the names and with the signatures they had upstream, one module an op."""
