"""Items that a thread prepares."""

import threading
import time

import pytest

from bigtrain.data.ahead import ahead


def test_same_items():
    """All items come, in their order, made by another thread."""
    makers = set()

    def items():
        for number in range(50):
            makers.add(threading.current_thread().name)
            yield number

    assert list(ahead(items(), 2)) == list(range(50)) and makers == {"ahead"}


def test_error_is_raised():
    """An error comes where the items are used, after those that were made before it."""

    def items():
        yield 1
        raise OSError("a shard is gone")

    made = ahead(items(), 2)
    assert next(made) == 1
    with pytest.raises(OSError, match="a shard is gone"):
        next(made)


def test_end_before_the_last():
    """No more items are made than are wanted, and closing ends the thread."""
    made = []

    def items():
        for number in range(1000):
            made.append(number)
            yield number

    some = ahead(items(), 2)
    assert next(some) == 0
    time.sleep(0.3)
    assert len(made) <= 4
    some.close()
    assert not any(thread.name == "ahead" for thread in threading.enumerate())
