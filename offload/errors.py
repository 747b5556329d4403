"""The one error of this package."""


class OffloadError(RuntimeError):
    """A copy that failed, or memory that does not suffice. Names the tier, the bytes and what would help."""
