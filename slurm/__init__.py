"""Recipes on a SLURM cluster: submit, sweep, status. They are submitted by name; none is imported."""
