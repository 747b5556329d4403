"""Arguments of a script that many ranks run: what argparse has to say is said once."""

from __future__ import annotations

import argparse
import os
from typing import Any, NoReturn

from hdp.report.failures import record, wait_for_the_end


class ArgumentParser(argparse.ArgumentParser):
    """``argparse.ArgumentParser`` for a job: rank 0 alone prints help, usage and errors; all ranks end with the same code.

    The rank is torchrun's ``RANK``; a process on its own is rank 0. Under torchrun the error is also the one that its
    closing table shows.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._speaks = os.environ.get("RANK", "0") == "0"

    def print_usage(self, file: Any = None) -> None:
        if self._speaks:
            super().print_usage(file)

    def print_help(self, file: Any = None) -> None:
        if self._speaks:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        if self._speaks:
            record(f"error: {message}")
        super().error(message)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if status and not self._speaks:
            wait_for_the_end(status)  # the launcher would end rank 0 before it has spoken
        super().exit(status, message if self._speaks else None)


def tokens_or_auto(text: str) -> int | str:
    """A whole number, or ``auto``: the type of an argument such as ``--capacity``."""
    try:
        return text if text == "auto" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto") from error
