"""Extreme value signatures (Schultheiss et al. 2017). equations: signatures and their overlap; detector: fit and score;
page: which classes share which dimensions.
"""
