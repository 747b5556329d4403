"""The scratch file: gone with its process, whatever ends it; and folders that cannot hold one."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hdp.offload import FileTier, OffloadError, scratch
from hdp.offload.scratch import PREFIX, ScratchFile


def crash(folder, named):
    """A process in the middle of a step, some of its activations on disk, to be killed; and its file's path, if it has one."""
    code = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from offload_helpers import make_zoo, token_ids
from hdp.offload import FileTier, OffloadEngine
tier = FileTier({str(folder)!r}, named={named})
engine, model = OffloadEngine([tier], min_bytes=512), make_zoo()
with engine.micro_batch(model, tokens=48):
    loss = model(token_ids(48))
    engine._copies.host_out.run(lambda: None).wait()  # the last copies
    assert tier.used > 0 and tier.file.allocated > 0
    print(tier.file.path, flush=True)
    sys.stdin.read()  # until this test ends, at the latest
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    path = process.stdout.readline().strip()
    return process, path


@pytest.mark.parametrize("named", [True, False])
def test_nothing_is_left_after_a_crash(tmp_path, named):
    process, path = crash(tmp_path, named)
    try:
        assert [str(p) for p in tmp_path.iterdir()] == ([path] if named else [])
        assert path != ""
        with_owner = ScratchFile(tmp_path, named=True)
        assert with_owner.swept == [] and len(list(tmp_path.iterdir())) == 1 + named  # its owner lives
        with_owner.close()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    after = ScratchFile(tmp_path)
    assert [str(p) for p in after.swept] == ([path] if named else [])
    assert list(tmp_path.iterdir()) == []
    after.close()


def test_a_file_that_never_got_its_name_is_swept_once_it_is_old(tmp_path):
    """A crash between making a file and locking it; a young one may be another process's, about to be locked."""
    orphan = tmp_path / f".{PREFIX}1-abc"
    orphan.write_bytes(b"x")
    young = ScratchFile(tmp_path)
    assert young.swept == [] and orphan.exists()
    os.utime(orphan, (0, 0))
    old = ScratchFile(tmp_path)
    assert old.swept == [orphan] and list(tmp_path.iterdir()) == []
    young.close()
    old.close()


def test_a_folder_in_memory_is_refused(tmp_path, monkeypatch):
    """tmpfs takes O_DIRECT and would keep all that leaves in memory."""
    monkeypatch.setattr(scratch, "file_system", lambda _: "tmpfs")
    with pytest.raises(OffloadError, match=r"is on tmpfs, which is memory: .*name a folder on a local disk"):
        FileTier(tmp_path)
    FileTier(tmp_path, direct=False).close()


def test_the_kernels_name_of_a_file_system(tmp_path):
    assert scratch.file_system(Path("/proc")) == "proc"
    assert scratch.file_system(tmp_path) not in ("", "proc")


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(OffloadError, match="does not exist: create it on a local disk"):
        FileTier(tmp_path / "absent")


def test_a_file_system_without_direct_io_is_refused(tmp_path, monkeypatch):
    real = os.open

    def refusing(path, flags, *rest, **more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(OffloadError, match=r"refuses O_DIRECT: .*pass direct=False"):
        FileTier(tmp_path)
    FileTier(tmp_path, direct=False).close()
