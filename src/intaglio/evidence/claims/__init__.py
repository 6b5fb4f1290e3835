"""Registered claims, one a method: `SLUG.py` defines `CLAIM`."""
