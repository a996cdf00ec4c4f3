"""What every command of the package may end in."""


class UsageError(Exception):
    """One clear sentence: what was wrong, what was expected, what to do."""
