"""From raw or prepared research data to the stored form that `vrdistill_jax.data` reads; imports no JAX."""
