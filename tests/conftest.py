"""For all tests: no test fails for being slow; servers on loopback."""

from hypothesis import settings

from tests.servers import faulty, nginx, s3, s3_server  # noqa: F401 (fixtures)

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
