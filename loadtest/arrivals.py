"""The times at which one user sends its requests at a constant arrival rate."""

import random


class Schedule:
    """Due times at constant intervals. The first one is random, so that users do not all send at the same moment.

    A user that waited for a late answer sends its overdue requests at once. Their delay counts as response time, as it
    does for independent clients. Otherwise a slow server would get fewer requests and better figures.

    Args:
        period: seconds between two requests.
        now: seconds, by the same clock as in the methods.
    """

    def __init__(self, period: float, now: float):
        self.period = period
        self.due = now + random.uniform(0, period)

    def wait(self, now: float) -> float:
        """Return the seconds until the next request is due."""
        return max(0.0, self.due - now)

    def arrive(self, now: float) -> float:
        """Move on to the next due time.

        Returns:
            the seconds by which the request that was due is late.
        """
        overdue = max(0.0, now - self.due)
        self.due += self.period
        return overdue
