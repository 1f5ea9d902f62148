"""From scores to what a person can believe: collected scores, metrics with intervals, tables, a report."""
