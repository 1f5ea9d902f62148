"""Things that many tests look at and none changes, made once for all test workers."""

import fcntl
import shutil


def made_once(tmp_path_factory, name, make):
    """The folder `name` of this test session, filled by `make(folder)` in whichever worker is the first to ask."""
    top = tmp_path_factory.getbasetemp()
    if top.name.startswith("popen-"):  # each of pytest-xdist's workers has a folder in the session's
        top = top.parent
    folder, is_whole = top / "made_once" / name, top / "made_once" / f"{name}.whole"
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_whole.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed in it
            folder.mkdir()
            make(folder)
            is_whole.touch()
    return folder
