"""The errors of this package."""


class OffloadError(RuntimeError):
    """A copy that failed, or memory that does not suffice. Names the tier, the bytes and what would help."""


class FolderError(OffloadError, ValueError):
    """A folder that cannot take activations: the user's to mend, and told like any other wrong argument."""
