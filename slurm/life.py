"""For jobs that earlier versions submitted: what SLURM starts again was pickled as `slurm.life.Life`."""

from slurm.attempt import Attempt as Life

__all__ = ["Life"]
