"""Datasets, augmentation and the loader; imports no JAX."""
