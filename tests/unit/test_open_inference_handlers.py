"""What handlers declare for the Open Inference Protocol, and their answers as tensors."""

import base64
import json
from types import SimpleNamespace

import pytest

from handlers.audio_mfcc import AudioMFCCHandler
from handlers.core.declared import TensorInput, columns, metadata, tensor_inputs
from handlers.core.errors import EmptyInput, InvalidBase64, UnsupportedInput
from handlers.core.open_inference import PROTOCOL, Input, OpenInferenceReader, prepared
from handlers.core.slots import Picture, Response, Slot
from handlers.core.tensor_answers import Respond
from handlers.detection import DetectionHandler
from handlers.image_topk import ImageTopKHandler
from handlers.mnist import MNISTHandler
from handlers.multimodal import MultimodalHandler

V2 = {PROTOCOL: "v2"}


def outputs_of(answer: object) -> dict[str, dict]:
    assert isinstance(answer, dict), answer
    return {each["name"]: each for each in answer["outputs"]}


def test_classes_of_images_without_objects_are_filled_up():
    one = {"label": "cat", "class": 3, "score": 0.5, "box": [1.0, 2.0, 3.0, 4.0]}
    wanted = tuple((name, False) for name in ("class", "score", "box", "label", "json"))
    respond = Respond("coco", "1.0", None, wanted, DetectionHandler.columns)
    found = outputs_of(json.loads(respond([{"detections": [one]}, {"detections": []}]).body))
    assert (found["class"]["shape"], found["class"]["data"]) == ([2, 1], [3, -1])
    assert (found["box"]["shape"], found["box"]["data"]) == ([2, 1, 4], [1.0, 2.0, 3.0, 4.0, 0, 0, 0, 0])
    assert found["label"]["data"] == ["cat", ""]
    nothing = outputs_of(json.loads(respond([{"detections": []}]).body))
    assert (nothing["box"]["shape"], nothing["box"]["data"]) == ([1, 0, 4], [])


def test_pictures_are_bytes_or_base64():
    picture = Picture(b"\x89PNG")
    encoded = Respond("coco", "1.0", None, (("picture", False),), ())([picture, picture])
    [output] = json.loads(encoded.body)["outputs"]
    assert (output["shape"], output["parameters"]) == ([2], {"content_type": "base64"})
    assert [base64.b64decode(each) for each in output["data"]] == [b"\x89PNG"] * 2
    binary = Respond("coco", "1.0", None, (("picture", True),), ())([picture])
    assert isinstance(binary.body, bytes)
    assert binary.body[binary.json_size :] == b"\x04\0\0\0\x89PNG"


@pytest.mark.parametrize(
    ("handler", "tensor", "outputs"),
    [
        (MNISTHandler, ("pixels", "UINT8", [-1, 1, 28, 28]), {"top_3_classes", "top_3_probabilities"}),
        (ImageTopKHandler, ("pixels", "UINT8", [-1, 3, 224, 224]), {"label", "class", "probability"}),
        (AudioMFCCHandler, ("waveform", "FP32", [-1, 16000]), {"label", "class", "probability"}),
    ],
)
def test_metadata_is_that_of_the_module(handler: type, tensor: tuple, outputs: set[str]):
    made = handler()
    made.settings = handler.Settings()
    described = metadata(made)
    assert described["inputs"][0] == {"name": "data", "datatype": "BYTES", "shape": [-1]}
    assert tuple(described["inputs"][1].values()) == tensor
    assert {each["name"] for each in described["outputs"]} == outputs | {"json"}
    example = made.example().tensors
    assert list(example.shape) == tensor[2][1:]


def test_several_inputs_are_read_by_name_and_may_be_missing():
    handler = MultimodalHandler()
    handler.settings = handler.Settings()
    handler.context = SimpleNamespace(model_name="avdigits", manifest={"model": {"modelVersion": "1.0"}})
    reader = OpenInferenceReader(handler, handler.Options, explains=False)

    def read(**fields: list[str]) -> list:
        inputs = [{"name": n, "shape": [len(v)], "datatype": "BYTES", "data": v} for n, v in fields.items()]
        return reader.read({"body": json.dumps({"inputs": inputs}).encode()}, V2).inputs

    encoded = base64.b64encode(bytes(range(200))).decode()
    [first, second] = read(text=["one", "two"], image=[encoded, encoded])
    assert (first.text, second.text) == ("one", "two")
    assert (first.image, first.audio) == (bytes(range(200)), None)
    with pytest.raises(UnsupportedInput, match="differ"):
        read(text=["one", "two"], image=[encoded])
    with pytest.raises(EmptyInput, match='"text" is empty'):
        read(text=[""], image=[encoded])
    with pytest.raises(InvalidBase64, match='"image"'):
        read(text=["one"], image=["no base64!"])


def test_subclass_with_an_answer_of_its_own_inherits_no_columns():
    class Own(MNISTHandler):
        def encode(self, row, info, options):
            return {"digit": 1}

        def decode(self, inputs):
            return super().decode(inputs)

    assert columns(MNISTHandler())
    assert columns(Own()) == ()
    assert tensor_inputs(MNISTHandler())
    assert tensor_inputs(Own()) == ()


def test_tensor_without_samples_and_a_dimension_of_any_size_is_empty():
    declared = TensorInput("ids", "INT64", (-1,))
    sent = Input(name="ids", shape=[0, 2**62], datatype="INT64", data=[])
    with pytest.raises(EmptyInput):
        prepared(declared, sent, [])


def test_tensor_with_the_name_of_a_field_is_a_bug_of_the_handler():
    class Twice(MNISTHandler):
        def tensor_inputs(self):
            return (TensorInput("data", "UINT8", (1,)),)

    handler = Twice()
    handler.settings = handler.Settings()
    with pytest.raises(TypeError, match="data is the name of a field and of a tensor"):
        OpenInferenceReader(handler, handler.Options, explains=False)


def test_answer_that_torchserve_does_not_accept_is_an_error_of_its_request():
    slot = Slot(response=Response(b"x" * 11))
    assert slot.sent(limit=11).body == b"x" * 11
    assert json.loads(slot.sent(limit=10).body)["type"] == "AnswerTooLarge"
    assert slot.error is not None
    assert slot.error.code == 413
