"""The one error that the user can act on."""


class SweepError(Exception):
    """Something the user can correct; the message says what was found, where, and what to do."""
