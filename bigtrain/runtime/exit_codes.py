"""Exit codes of recipes and commands, for launchers and schedulers."""

USER_ERROR = 2  # a user's mistake, explained in a sentence; retrying does not help
UNREADABLE = 3  # of `bigtrain score`: done, but some pictures could not be read
DISAGREES = 4  # of `bigtrain export`: the export does not score as the detector does
STOPPED = 85  # stopped on request, and saved: neither done nor failed
LOST = 86  # another process died or hangs: the same command continues
INTERRUPTED = 130  # exited at once
