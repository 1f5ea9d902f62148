"""Exit codes of a recipe, for launchers and schedulers."""

USER_ERROR = 2  # a user's mistake, explained in a sentence; retrying does not help
STOPPED = 85  # stopped on request, and saved: neither done nor failed
LOST = 86  # another process died or hangs: the same command continues
INTERRUPTED = 130  # exited at once
