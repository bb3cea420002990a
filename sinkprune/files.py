"""Files and folders that are there whole or not at all, whatever interrupts the writing of them.

What is written lies beside its goal as ``.NAME.XXXXXXXX.part`` until it is complete and on the disk; then one
rename puts it in place. Leftovers of killed processes have no lock on them, and the next writer of the same
name removes them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Read = TypeVar("Read")
TRIES = 100  # of reading a folder that others replace
_NOREPLACE, _EXCHANGE = 1, 2  # flags of renameat2(2)
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # what kernels and file systems without them say


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Write ``content`` (text as UTF-8) to the file ``path``, replacing what a regular file there held.

    Its mode follows the umask.

    Raises:
        FileExistsError: something at ``path`` that is not a regular file: a folder, a symbolic link, a
            device, a FIFO.
        OSError: the folder can't be written, the disk is full; what was there before is still there.
    """
    with whole_file(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """``write_whole`` for writers that want a path: what they write to the yielded one becomes ``path``."""
    path = Path(path)
    check_file(path)
    with _part_of(path, folder=False) as (part, mode):
        yield part
        _settle(part, mode)
        check_file(path)
        os.replace(part, path)
    _sync(path.parent)


@contextmanager
def whole_folder(folder: str | Path, replaceable: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A new folder to fill, which becomes ``folder`` when the block ends without an error.

    Modes of what was written follow the umask.

    Args:
        replaceable: raises where the folder that is there must stay; called before it is replaced. None: no
            folder may be there.

    Raises:
        FileExistsError: ``folder`` is there and ``replaceable`` is None, or it is no folder.
        OSError: as in ``write_whole``.
    """
    folder = Path(folder)
    check_folder(folder, replaceable)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _part_of(folder, folder=True) as (part, mode):
        yield part
        _settle(part, mode)
        check_folder(folder, replaceable)
        _publish(part, folder, replaceable is not None)
        _sync(folder.parent)


def require_regular(path: str | Path) -> Path:
    """The path of a file that can be read to its end.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder, a device, a FIFO, or a symbolic link to one.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"No such file: {path}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is a {_kind(mode)}; expected a regular file")
    return path


def read_json(path: str | Path) -> dict[str, Any]:
    """Parse the JSON object in a regular file, each key once and every number finite.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: anything else, naming the file.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice[:80]!r} is there twice")
        return found

    def refused(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    path = require_regular(path)
    try:
        values = json.loads(path.read_text("utf-8"), object_pairs_hook=once, parse_constant=refused)
    except RecursionError:
        raise ValueError(f"{path} is not JSON that can be read: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(values).__name__}")
    return values


def read_whole(folder: Path, read: Callable[[], Read]) -> Read:
    """What ``read`` makes of the files of ``folder``, all of one state of it: where ``whole_folder`` replaced
    it meanwhile, ``read`` is called again.

    Raises:
        OSError: the folder was replaced during each of many tries, or what ``read`` raises.
    """
    for _ in range(TRIES):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # held, so that its number is no other's
        try:
            found = read()
            if os.path.samestat(os.fstat(handle), folder.stat()):
                return found
        except Exception:  # of files that went, or changed their length, under whoever maps them
            if folder.exists() and os.path.samestat(os.fstat(handle), folder.stat()):
                raise
        finally:
            os.close(handle)
    raise OSError(errno.EBUSY, f"{folder} was replaced while it was read, {TRIES} times")


def check_file(path: Path) -> None:
    """Raise ``FileExistsError`` where ``write_whole`` would refuse to write."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise FileExistsError(f"{path} is a {_kind(mode)}; expected a regular file or nothing there")


def check_folder(folder: Path, replaceable: Callable[[Path], None] | None = None) -> None:
    """Raise ``FileExistsError`` where ``whole_folder`` would refuse to write."""
    try:
        mode = folder.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        raise FileExistsError(f"{folder} is a {_kind(mode)}; choose another path")
    if replaceable is None:
        raise FileExistsError(f"{folder} exists; choose another path")
    replaceable(folder)


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFREG: "file",
        stat.S_IFDIR: "folder",
        stat.S_IFLNK: "symbolic link",
        stat.S_IFCHR: "device",
        stat.S_IFBLK: "device",
        stat.S_IFIFO: "FIFO",
        stat.S_IFSOCK: "socket",
    }
    return kinds.get(stat.S_IFMT(mode), "special file")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


@contextmanager
def _part_of(path: Path, *, folder: bool) -> Iterator[tuple[Path, int]]:
    """A new part of ``path`` under this process's lock, and the mode that the umask gave it; what is left
    there at the end is removed, and first what killed writers left."""
    _remove_leftovers(path)
    part, handle = _claimed(path, folder=folder)
    try:
        yield part, stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        if folder:
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
        os.close(handle)


def _claimed(path: Path, *, folder: bool) -> tuple[Path, int]:
    """A new part of ``path`` and a handle that holds its lock."""
    while True:
        part = _beside(path)
        part.mkdir() if folder else part.touch(exist_ok=False)
        try:
            handle = os.open(part, os.O_RDONLY)
        except FileNotFoundError:  # taken for a leftover before it had its lock
            continue
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if part.exists():
            return part, handle
        os.close(handle)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed writers of ``path`` left: such names whose lock nobody holds."""
    if not path.parent.is_dir():
        return
    start, end = f".{path.name}.", ".part"
    for entry in path.parent.iterdir():
        name = entry.name
        random = name[len(start) : -len(end)]
        if not (name.startswith(start) and name.endswith(end)) or len(random) != 8 or entry.is_symlink():
            continue
        with contextlib.suppress(OSError):  # another's, or gone already
            handle = os.open(entry, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            finally:
                os.close(handle)


def _settle(part: Path, mode: int) -> None:
    """Onto the disk with everything in it; ``mode`` for what its writer made readable for its owner alone."""
    if part.is_dir() and not part.is_symlink():
        for entry in part.iterdir():
            _settle(entry, mode if entry.is_dir() else mode & 0o666)
    if not part.is_symlink():
        part.chmod(mode)
    _sync(part)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(part: Path, folder: Path, replace: bool) -> None:
    """Put ``part`` in the place of ``folder``, whose old content is in ``part`` afterwards."""
    try:
        _rename(part, folder, _EXCHANGE if replace and folder.exists() else _NOREPLACE)
        return
    except FileExistsError as error:
        raise FileExistsError(f"{folder} exists: it was written meanwhile") from error
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
    old = _beside(folder)  # without the exchange the folder is away for an instant
    if not (replace and folder.exists()):
        os.rename(part, folder)
        return
    os.rename(folder, old)
    try:
        os.rename(part, folder)
    except BaseException:
        os.rename(old, folder)
        raise
    os.rename(old, part)


def _rename(source: Path, goal: Path, flags: int) -> None:
    """renameat2(2). Raises ``OSError``, of ``ENOSYS`` where the C library has none."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here = -100  # AT_FDCWD
    if call(here, os.fsencode(source), here, os.fsencode(goal), ctypes.c_uint(flags)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(source), None, str(goal))
