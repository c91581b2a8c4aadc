"""What the commands say when they cannot do what was asked."""


class BundleError(Exception):
    """A fault that the user can mend: printed as one line, without a traceback.

    Args:
        message: what is wrong and what to do.
        details: lines that show the cause (out of a log, say), printed below the message.
    """

    def __init__(self, message: str, details: str = ""):
        super().__init__(message)
        self.details = details
