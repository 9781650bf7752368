"""Coordinates only, no parameters: boxes, overlap, suppression, sampling, neighbours, pyramids."""
