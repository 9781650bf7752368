"""NumPy and numba twins of the geometry, for loader workers; imports no JAX."""
