"""Average precision and reports."""
