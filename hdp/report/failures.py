"""One clear error for a job of many ranks.

Most mistakes (a wrong path, a capacity of 0) raise the same error on every rank at the same moment. Rank 0 then says it in one
line; the others end without a word, but only once rank 0 has had time to speak: an error that rank 3 alone has met is
told by rank 3.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
GRACE = 1.0  # seconds that rank 0 leaves the others to meet the same error, before the launcher ends them
PATIENCE = 15.0  # seconds that a rank waits to be ended by the launcher before it tells its own error


def launch(main: Callable[[], object]) -> None:
    """Runs ``main`` as the job of this rank and ends the process: exit code 0, or 1 after an error.

    Errors that a user can mend (ValueError, OSError and ImportError raised by ``hdp`` or the script itself) are told in
    one line, by rank 0 where all ranks met them; ``HDP_TRACEBACK=1`` shows where they come from. Everything else keeps
    its traceback and names its rank. Under torchrun the error is also the one that its closing table shows.
    Warnings of ``hdp`` are one line each, too.
    """
    warnings.formatwarning = _format_warning
    try:
        main()
    except Exception as error:
        _tell(error)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(1)  # not sys.exit: threads and process groups of a failed job may never end


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if category.__module__.startswith("hdp."):
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _tell(error: Exception) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if _is_about_a_rank(error):
        record(f"error: {error}")
        _say(f"error: {error}", error)
        return
    if _is_about_a_disk(error):
        record(f"error: {error}")
        _say(f"[rank {rank}] error: {error}" if "RANK" in os.environ else f"error: {error}", error)
        return
    if not _is_users(error):
        record(f"{type(error).__name__}: {error}")
        lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
        prefix = f"[rank {rank}] " if "RANK" in os.environ else ""
        print("\n".join(prefix + line for line in lines), file=sys.stderr)
        return
    if rank != 0:
        wait_for_the_end(1)
    record(f"error: {error}")
    _say(f"[rank {rank}] error: {error}" if rank else f"error: {error}", error)
    if rank == 0 and os.environ.get("WORLD_SIZE", "1") != "1":
        time.sleep(GRACE)


def _say(line: str, error: Exception) -> None:
    if os.environ.get("HDP_TRACEBACK"):
        print("".join(traceback.format_exception(error)), file=sys.stderr)
    print(line, file=sys.stderr)


def _is_about_a_disk(error: Exception) -> bool:
    """A scratch disk that is full or fails: no defect, and what was being done there says nothing."""
    errors = sys.modules.get("hdp.offload.errors")
    return errors is not None and isinstance(error, errors.OffloadError)


def _is_about_a_rank(error: Exception) -> bool:
    """A peer that was lost, a plan that differs: such messages name their rank, and every rank tells its own."""
    errors = sys.modules.get("hdp.parallel.errors")
    return errors is not None and isinstance(error, errors.HdpError)


def _is_users(error: Exception) -> bool:
    """Whether the message is enough: raised on purpose, by this package or by the script that was started."""
    if not isinstance(error, ValueError | OSError | ImportError):
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = Path(frames[-1].filename).resolve()
    script = getattr(sys.modules["__main__"], "__file__", None)
    return (
        raised_in.is_relative_to(PACKAGE)
        or _is_ours(raised_in)
        or (script is not None and raised_in == Path(script).resolve())
    )


def _is_ours(file: Path) -> bool:
    """In an editable install the parts of ``hdp`` lie beside it (``parallel/``, ``balance/``, ...)."""
    folders = set()
    for name, module in list(sys.modules.items()):
        place = getattr(module, "__file__", None)
        if name.startswith("hdp.") and place:
            folders.add(Path(place).resolve().parent)
    return file.parent in folders


def wait_for_the_end(code: int) -> None:
    """Until the launcher ends this rank because rank 0 has failed, at most :data:`PATIENCE` seconds; ends it with ``code``."""
    record("ended because rank 0 failed", later=1)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    time.sleep(PATIENCE)


def record(message: str, *, later: int = 0) -> None:
    """Hands the message to torchrun, whose closing table shows the earliest one as the root cause.

    ``later``: seconds added to the time, for what only follows from another failure.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        when = str(int(time.time()) + later)
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": {"timestamp": when}}}))
