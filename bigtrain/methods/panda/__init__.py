"""PANDA (Reiss et al. 2021). equations: the compactness loss, and which of a network's layers learn by it."""
