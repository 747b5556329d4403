"""The scratch file of one process: gone when the process is, whatever ends it.

Where the file system can make a file without a name (O_TMPFILE: ext4, XFS, btrfs, tmpfs), the kernel frees its blocks
when the process dies, so nothing is ever left. Elsewhere the file has a name and its owner holds a lock on it; whoever
starts next in the same folder removes the files whose lock nobody holds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
import uuid
from pathlib import Path

from hdp.offload.errors import FolderError

PREFIX = "hdp-offload-"
GRACE = 60.0
"""Seconds that a file may exist before it is locked and gets its final name."""
IN_MEMORY = ("tmpfs", "ramfs")
"""File systems that take O_DIRECT (Linux 6.6) and keep their files in memory all the same."""
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)


def sweep(folder: Path) -> list[Path]:
    """Removes scratch files that crashed processes left in ``folder``; returns their paths."""
    removed = []
    nameless = [p for p in folder.glob(f".{PREFIX}*") if _age(p) > GRACE]
    for path in sorted([*folder.glob(f"{PREFIX}*"), *nameless]):
        try:
            fd = os.open(path, os.O_RDWR)
        except (FileNotFoundError, PermissionError):
            continue  # another process was faster, or it is another user's
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            removed.append(path)
        except BlockingIOError:
            continue  # its owner lives
        finally:
            os.close(fd)
    return removed


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def file_system(folder: Path) -> str:
    """Type of the file system that holds a folder, as the kernel names it; empty where it does not tell."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:  # "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue"
        before, _, after = line.partition(" - ")
        if before.split()[2] == number:
            return after.split()[0]
    return ""


class ScratchFile:
    """An open file for positioned reads and writes; deleted by :meth:`close` or by the end of the process."""

    def __init__(self, folder: str | os.PathLike[str], *, direct: bool = True, named: bool = False) -> None:
        """``direct``: bypass the page cache. ``named``: do not use O_TMPFILE even where the file system has it."""
        self.folder = Path(folder)
        self.path: Path | None = None
        self.fd = -1
        if not self.folder.is_dir():
            raise FolderError(f"offload folder {str(self.folder)!r} does not exist: create it on a local disk")
        if direct and (kind := file_system(self.folder)) in IN_MEMORY:
            raise FolderError(
                f"offload folder {str(self.folder)!r} is on {kind}, which is memory: what leaves would free nothing; name a "
                "folder on a local disk, or pass direct=False, which counts as memory in use"
            )
        self.swept = sweep(self.folder)
        flags = os.O_RDWR | (os.O_DIRECT if direct else 0)
        try:
            if not named:
                self.fd = self._open_unnamed(flags)
            if self.fd < 0:
                self._open_named(flags)
        except OSError as error:
            if error.errno == errno.EINVAL and direct:
                raise FolderError(
                    f"the file system of {str(self.folder)!r} refuses O_DIRECT: choose a folder on a local disk, or "
                    "pass direct=False, whose page cache then counts as memory in use"
                ) from error
            raise FolderError(f"cannot create a scratch file in {str(self.folder)!r}: {error}") from error

    def _open_unnamed(self, flags: int) -> int:
        try:
            return os.open(self.folder, flags | os.O_TMPFILE, 0o600)
        except OSError as error:
            if error.errno in _NO_TMPFILE:
                return -1
            raise

    def _open_named(self, flags: int) -> None:
        path = self.folder / f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex}"
        # The file gets its name only once it is locked, so that no sweep can take it for an orphan.
        hidden = path.with_name(f".{path.name}")
        fd = os.open(hidden, flags | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(hidden, path)
        except OSError:
            os.close(fd)
            hidden.unlink(missing_ok=True)
            raise
        self.fd, self.path = fd, path

    @property
    def size(self) -> int:
        """Bytes up to which the file reaches."""
        return os.fstat(self.fd).st_size if self.fd >= 0 else 0

    @property
    def allocated(self) -> int:
        """Bytes that the file takes on the disk."""
        return os.fstat(self.fd).st_blocks * 512 if self.fd >= 0 else 0

    @property
    def free(self) -> int:
        """Bytes that the file system has left for this user."""
        if self.fd < 0:
            return 0
        found = os.fstatvfs(self.fd)
        return found.f_bavail * found.f_frsize

    def describe(self) -> str:
        return str(self.path) if self.path else f"scratch file in {self.folder}"

    def truncate(self, size: int) -> None:
        os.ftruncate(self.fd, size)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self.path is not None:
            self.path.unlink(missing_ok=True)
