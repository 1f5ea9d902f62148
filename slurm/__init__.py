"""Submitting recipes to SLURM by name. Nothing is here yet: `accelerate launch` starts a recipe."""
