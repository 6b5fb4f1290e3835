"""Baselines of papers that claims compare against; no user options."""
