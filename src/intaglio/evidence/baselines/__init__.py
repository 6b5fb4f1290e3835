"""Baselines that the claims compare methods with; no user options."""
