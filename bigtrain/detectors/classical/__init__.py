"""The detectors that Perera & Patel (2019, 5.1) compare with, and plain ones: each fits and scores features or logits.
Named in bigtrain.detectors.catalogue.
"""
