"""The HTML viewer, PLY files and figures."""
