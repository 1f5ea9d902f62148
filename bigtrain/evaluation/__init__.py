"""From scores to figures. judge: what every detector goes through; collect: scores over all ranks; metrics: FIGURES,
the one list, with intervals; tables: over runs and seeds; report/: pages.
"""
