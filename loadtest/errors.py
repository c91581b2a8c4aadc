"""The error that a load test reports to its user."""


class LoadTestError(Exception):
    """An error that the user can fix. The message says what is wrong and what to do, in one line."""
