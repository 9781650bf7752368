"""Experiments: the papers' tables as grids of training runs that resume, and what is measured on trained models."""
