"""What a load test says when it cannot do what was asked."""


class LoadTestError(Exception):
    """A fault that the user can mend: what is wrong and what to do, printed as one line."""
