"""Equations that two papers share, pure functions, float32 inside: sinkhorn, token_distances. A paper's own equations
lie in its room, bigtrain/methods/PAPER/equations.py.
"""
