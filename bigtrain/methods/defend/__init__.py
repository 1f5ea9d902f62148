"""DEFEND (Salehi et al.). equations: losses and score; masks: what the student sees; network: dense tuning and the
masked student; detector: their disagreement; compared: what stands beside it; checks: of settings and networks.
"""
