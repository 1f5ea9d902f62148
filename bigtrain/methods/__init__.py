"""One room a paper: equations, network, detector, page. No room imports another; what two share lies a floor below. A
detector is found by its name (bigtrain.detectors.KINDS, bigtrain.detectors.catalogue) and imported when it is used.
"""
