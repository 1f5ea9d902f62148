"""How a process of a run ends: one sentence and exit code 2 for a user's mistake, the other ranks informed, the
process group destroyed."""

from __future__ import annotations

import gc
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import TextIOWrapper

from bigtrain.runtime import heartbeat
from bigtrain.runtime.exit_codes import INTERRUPTED, LOST, USER_ERROR
from bigtrain.runtime.heartbeat import Heartbeat
from bigtrain.runtime.launch import stop_with_launcher
from bigtrain.text import clean, told

at_end = ExitStack()  # what `user_errors` releases, such as the run folder's lock


@contextmanager
def user_errors(program: str) -> Iterator[None]:
    """End with exit code 2 and one sentence on a user's mistake; `BIGTRAIN_TRACEBACK=1` shows where it was raised."""
    stop_with_launcher()
    for stream in (sys.stdout, sys.stderr):  # names of classes may not fit the terminal's character set
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt as interrupt:
        print(f"{program}: interrupted; the same command continues.", file=sys.stderr, flush=True)
        heartbeat.failed(interrupt)
        raise SystemExit(INTERRUPTED) from None
    except SystemExit as stop:  # asked to, on all ranks
        traceback.clear_frames(stop.__traceback__)
        leave_group()
        raise
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        said = told(error)
        if os.environ.get("BIGTRAIN_TRACEBACK"):
            traceback.print_exc()
        # before a process group forms, all ranks of a machine find the same mistake: one reports it
        if has_group() or os.environ.get("LOCAL_RANK", "0") == "0":
            rank = os.environ.get("RANK", "0")
            where = f" (rank {rank} on {socket.gethostname()})" if rank != "0" else ""
            print(f"{program}: error{where}: {clean(said)}", file=sys.stderr, flush=True)
        heartbeat.failed(error)  # after the message: other ranks may exit, and the launcher then kills this one
        raise SystemExit(USER_ERROR) from None
    except BaseException as error:
        if why := heartbeat.failed(error):
            print(f"{program}: error: {why}", file=sys.stderr, flush=True)
            os._exit(LOST)  # the process group can no longer be shut down cleanly
        raise
    finally:
        at_end.close()
    leave_group()


def leave_group() -> None:
    """End the heartbeat and, once no network trained in it is left, the process group, if there is one.

    A DistributedDataParallel that outlives its group is the last to hold it, and destroys it while holding the GIL: if
    a gloo thread is still releasing a tensor, which needs the GIL, both wait forever (seen under load). Destroyed here
    it does not hold the GIL. Left to interpreter exit, gloo's threads sometimes abort.
    """
    if Heartbeat.current:
        Heartbeat.current.close()
        Heartbeat.current = None
    if has_group():
        gc.collect()
        sys.modules["torch.distributed"].destroy_process_group()


def has_group() -> bool:
    """Whether this process is in a process group; one that has not imported torch is not."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_initialized()
