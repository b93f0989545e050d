"""Folders for what this program compiles and loads again: code that nobody else can have put there.

Every package may use it; it imports none of them.
"""

import os
import stat
from pathlib import Path


class ExposedError(Exception):
    """Someone else could have written there: one line that names the place and what to do."""


def private_folder(*names: str) -> Path:
    """``moeplan/NAMES`` in the user's cache ($XDG_CACHE_HOME, or ~/.cache), made where it is missing, links resolved.

    What is made is the user's alone, whatever the umask. Raises ExposedError, and OSError where it cannot be made.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(given) if given else Path.home() / ".cache"
    except RuntimeError:  # neither HOME nor an entry of this user among the accounts
        raise FileNotFoundError("no home folder: set HOME or XDG_CACHE_HOME") from None
    folder = Path(os.path.realpath(root / "moeplan" / Path(*names)))
    missing = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    for place in reversed(missing):
        try:
            place.mkdir(mode=0o700)
        except FileExistsError:
            continue  # of several processes that start at once another was first
        place.chmod(0o700)
    check_private(folder)
    return folder


def check_private(path: Path) -> None:
    """Raise ExposedError if anyone but this user and root could have written this file or folder, or replaced it.

    All folders above it are looked at up to the root: who can write to one can put another in the place of those below.
    Where only owners may rename (the sticky bit, as in /tmp) that does not hold. Raises OSError for what is not there.
    """
    path = Path(os.path.realpath(path))
    for place in (path, *path.parents):
        found = place.stat()
        advice = "load nothing from there: delete it, or set XDG_CACHE_HOME to a folder of your own"
        if found.st_uid not in (os.geteuid(), 0):
            raise ExposedError(f"{place} belongs to user {found.st_uid}: {advice}")
        sticky = place != path and found.st_mode & stat.S_ISVTX
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
            raise ExposedError(f"{place} can be written by others ({stat.filemode(found.st_mode)}): {advice}")
