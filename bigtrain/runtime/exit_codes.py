"""Exit codes of a recipe, for launchers and schedulers to tell apart."""

USER_ERROR = 2  # a mistake that trying again does not mend; a sentence says which
STOPPED = 85  # stopped when asked, and saved: neither done nor failed
LOST = 86  # another process has died or hangs: the same command continues
INTERRUPTED = 130  # left at once
