"""Methods by area: reading a model: evaluations and diagnostics."""
