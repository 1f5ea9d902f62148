"""Pages, self-contained and escaped. report: a run's; page: sections, tables and strips of pictures for a method's own
page; charts: ROC and histogram as SVG; overlays: the most telling pictures, with patch scores laid over them.
"""
