"""The errors that a handler returns for one request of a batch.

    ServingError
    ├── RequestError            4xx: the request is at fault
    │   ├── MalformedRequest        the form of the request: JSON, fields, base64, options
    │   │   ├── EmptyInput
    │   │   ├── InvalidJSON
    │   │   ├── InvalidBase64
    │   │   ├── InvalidOption
    │   │   ├── MissingField
    │   │   ├── RepeatedField
    │   │   ├── UnknownField
    │   │   ├── UnsupportedEncoding     415: Content-Encoding, or the charset of Content-Type
    │   │   ├── UnsupportedInput
    │   │   └── UnsupportedOperation
    │   ├── UndecodableInput        the content of an input
    │   │   ├── UndecodableImage
    │   │   ├── UndecodableAudio
    │   │   ├── UndecodableText
    │   │   ├── BlankImage
    │   │   └── InvalidGraph
    │   └── InputTooLarge           413
    │       ├── ImageTooLarge
    │       ├── AudioTooLong
    │       ├── TextTooLong
    │       ├── GraphTooLarge
    │       ├── TooManyInstances
    │       └── AnswerTooLarge
    ├── Overloaded              429: the request waited too long, or its batch took too long; retry
    ├── InsufficientMemory      507: this input alone is too large for the device
    ├── NonFiniteOutput         500: the model returned NaN or infinity
    └── InternalError           500: a bug: any other exception

All messages are sent to the client. The text of a bug's exception, which may quote the input, stays in the log.
"""

MISSING_METHOD = """{handler} must define `{method}`. A minimal handler:

    class {handler}(BatchHandler):
        class Inputs(inputs.Inputs):
            data: Text

        def decode(self, inputs):
            return Sample(torch.tensor([float(len(inputs.data))]))

        def example(self):
            return Sample(torch.zeros(1))

        def encode(self, row, info, options):
            return {{"score": row.item()}}
"""


class ServingError(Exception):
    """Base class: an error that is returned for one request, without affecting the others of its batch.

    Args:
        message: what was wrong, and what is accepted. It is sent to the client, so it contains no path and no content
            of the input.
    """

    code = 500

    def body(self) -> dict:
        """Return the JSON body of the response."""
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


class RepeatedField(MalformedRequest):
    pass


class UnknownField(MalformedRequest):
    pass


class UnsupportedEncoding(MalformedRequest):
    code = 415


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


class InvalidGraph(UndecodableInput):
    pass


class InputTooLarge(RequestError):
    code = 413


class ImageTooLarge(InputTooLarge):
    pass


class AudioTooLong(InputTooLarge):
    pass


class TextTooLong(InputTooLarge):
    pass


class GraphTooLarge(InputTooLarge):
    pass


class TooManyInstances(InputTooLarge):
    pass


class AnswerTooLarge(InputTooLarge):
    pass


class Overloaded(ServingError):
    code = 429


class InsufficientMemory(ServingError):
    code = 507


class NonFiniteOutput(ServingError):
    code = 500


class InternalError(ServingError):
    """A bug. The message does not contain the text of the exception, which may quote the input."""

    code = 500


def internal_error(failed: str) -> InternalError:
    return InternalError(f"The handler failed on {failed}. The server's log has the traceback.")


def input_too_large() -> InsufficientMemory:
    return InsufficientMemory("The device does not have enough memory for this input. Send a smaller input.")


def explanation_unsupported() -> UnsupportedOperation:
    return UnsupportedOperation("This model does not support explanations. Use /predictions.")


def missing_method(handler: object, method: str) -> NotImplementedError:
    return NotImplementedError(MISSING_METHOD.format(handler=type(handler).__name__, method=method))
