"""Locks of files between processes."""

from typing import IO

from alphaspin.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def take(file: IO[str], *, shared: bool) -> bool:
    """Lock an open file until it is closed; whether that could be had at once.

    Raises:
        InputError: this system has no such locks.
    """
    if fcntl is None:
        raise InputError("runs need file locks that Windows lacks: start alphaspin in its WSL")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
