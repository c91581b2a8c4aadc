"""When one user of a constant arrival rate sends its requests."""

import random


class Schedule:
    """Due times at a constant distance, from a random phase on, so that users do not arrive in volleys.

    A user whose answer is late is behind its schedule and sends what is overdue at once; the wait of such a request
    counts into its response time, as it does for clients who do not know of each other. So a slow server does not make
    its own load lighter, nor its own figures better.

    Args:
        period: seconds between two arrivals.
        now: of the same clock as the later ones.
    """

    def __init__(self, period: float, now: float):
        self.period = period
        self.due = now + random.uniform(0, period)

    def wait(self, now: float) -> float:
        """Seconds until the next arrival is due."""
        return max(0.0, self.due - now)

    def arrive(self, now: float) -> float:
        """Takes the arrival that is due.

        Returns:
            how many seconds it is overdue.
        """
        overdue = max(0.0, now - self.due)
        self.due += self.period
        return overdue
