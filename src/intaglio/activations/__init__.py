"""Masks over units: which units of a layer fire, for which token.

What lives here:
"""
