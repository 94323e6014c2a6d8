"""The error of this package."""


class DataError(ValueError):
    """Something on disk or in the data options is not as it must be; the message says what, where and what to do."""
