"""Every fault that a handler answers for one request of a batch, drawn once.

    ServingError
    ├── RequestError            4xx: the request's own fault
    │   ├── MalformedRequest        how the input is wrapped: JSON, fields, base64, options
    │   │   ├── EmptyInput
    │   │   ├── InvalidJSON
    │   │   ├── InvalidBase64
    │   │   ├── InvalidOption
    │   │   ├── MissingField
    │   │   ├── UnknownField
    │   │   ├── UnsupportedInput
    │   │   └── UnsupportedOperation
    │   ├── UndecodableInput        what is in it
    │   │   ├── UndecodableImage
    │   │   ├── UndecodableAudio
    │   │   ├── UndecodableText
    │   │   └── BlankImage
    │   └── InputTooLarge           413
    │       ├── ImageTooLarge
    │       ├── AudioTooLong
    │       ├── TextTooLong
    │       └── TooManyInstances
    ├── Overloaded              429: it waited too long, or others of its batch took the time; to be sent again
    ├── InsufficientMemory      507: by itself, too large for the device
    ├── NonFiniteOutput         500: the model answered NaN or infinity
    └── InternalError           500: anything else that was raised is a bug

A request error's message is for its client; InternalError's own text stays in the log.
"""


class ServingError(Exception):
    """Base of the errors that are answered to the one request that caused them.

    Args:
        message: what was wrong, and what is accepted. It is sent to the client: no paths, no input content.
    """

    code = 500

    def body(self) -> dict:
        """The JSON body of the answer."""
        return {"code": self.code, "type": type(self).__name__, "message": str(self)}


class RequestError(ServingError):
    code = 400


class MalformedRequest(RequestError):
    pass


class EmptyInput(MalformedRequest):
    pass


class InvalidJSON(MalformedRequest):
    pass


class InvalidBase64(MalformedRequest):
    pass


class InvalidOption(MalformedRequest):
    pass


class MissingField(MalformedRequest):
    pass


class UnknownField(MalformedRequest):
    pass


class UnsupportedInput(MalformedRequest):
    pass


class UnsupportedOperation(MalformedRequest):
    pass


class UndecodableInput(RequestError):
    pass


class UndecodableImage(UndecodableInput):
    pass


class UndecodableAudio(UndecodableInput):
    pass


class UndecodableText(UndecodableInput):
    pass


class BlankImage(UndecodableInput):
    pass


class InputTooLarge(RequestError):
    code = 413


class ImageTooLarge(InputTooLarge):
    pass


class AudioTooLong(InputTooLarge):
    pass


class TextTooLong(InputTooLarge):
    pass


class TooManyInstances(InputTooLarge):
    pass


class Overloaded(ServingError):
    code = 429


class InsufficientMemory(ServingError):
    code = 507


class NonFiniteOutput(ServingError):
    code = 500


class InternalError(ServingError):
    """A bug. Its own text, which may quote the input, is not the message."""

    code = 500
