"""Loss functions: they return unreduced values and take a mask."""
