"""The parts of a form: one control for each input and each option of a model."""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio
from gradio import component_meta

from bundle.errors import BundleError
from page import views
from page.canvas import canvas
from page.schema import Field, Option

HEIGHT = 280  # pixels of a picture
component_meta.create_or_modify_pyi = lambda *_: None  # it would write a .pyi file beside this one


class Picture(gradio.Image):
    """An image whose file is sent as it is. Gradio would open it first, and hide what the server says of it."""

    is_template = True  # drawn by the browser as what it derives from

    def preprocess(self, payload):
        """Return the file's path."""
        return payload.path if payload else None


class Sound(gradio.Audio):
    """A sound whose file is sent as it is."""

    is_template = True

    def preprocess(self, payload):
        """Return the file's path."""
        return payload.path if payload else None


@dataclass(frozen=True)
class Control:
    """What a person fills in for one input or option.

    Attributes:
        name: of the input or option.
        components: whose values `read` gets.
        read: the values -> what is sent: a Path, a text, JSON; None if nothing is sent.
    """

    name: str
    components: tuple[gradio.components.Component, ...]
    read: Callable[..., Any]


def for_field(field: Field, name: str, examples: Path) -> Control:
    """Make the control of an input, with the example of the schema in it.

    Args:
        name: of the control in the page.
        examples: the folder for example files.
    """
    shown = {"label": field.name, "interactive": True, "elem_id": name}
    if field.kind == "text":
        box = gradio.Textbox(field.example or "", max_lines=8, **shown)
        return Control(field.name, (box,), lambda text: text or None)
    if field.kind == "json":
        written = "" if field.example is None else json.dumps(field.example)
        code = gradio.Code(written, language="json", lines=5, max_lines=20, wrap_lines=True, **shown)
        return Control(field.name, (code,), lambda text: parsed(field.name, text))
    example = views.written_file(field.example, examples, field.name)
    if field.kind == "image":
        return for_image(field, name, example, examples)
    if field.kind == "sound":
        sound = Sound(example, type="filepath", buttons=[], **shown)
        return Control(field.name, (sound,), as_path)
    file = gradio.File(example, type="filepath", **shown)
    return Control(field.name, (file,), as_path)


def for_image(field: Field, name: str, example: str | None, examples: Path) -> Control:
    """Make the control of an image: a file, the camera or the clipboard, or a drawing."""
    drawn = gradio.State(False)
    with gradio.Tabs():
        with gradio.Tab("Picture or camera") as first:
            picture = Picture(
                example,
                type="filepath",
                image_mode=None,
                label=field.name,
                height=HEIGHT,
                buttons=[],
                interactive=True,
                elem_id=name,
            )
        with gradio.Tab("Draw") as second:
            drawing = canvas(field.name, f"{name}-drawn")
    first.select(lambda: False, None, drawn)
    second.select(lambda: True, None, drawn)

    def read(file: str | None, url: str, is_drawn: bool) -> Path | None:
        if not is_drawn:
            return as_path(file)
        drawing_file = views.written_file(url, examples, f"drawn-{field.name}-{zlib.crc32(url.encode()):08x}")
        if drawing_file:
            picture.temp_files.add(drawing_file)  # Gradio removes it with the files that people send
        return as_path(drawing_file)

    return Control(field.name, (picture, drawing, drawn), read)


def as_path(file: str | None) -> Path | None:
    return Path(file) if file else None


def parsed(name: str, text: str) -> Any:
    """Parse the JSON of an input.

    Raises:
        BundleError: it is not JSON.
    """
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except ValueError as exc:
        raise BundleError(f"{name} is not valid JSON: {exc}.") from exc


def for_option(option: Option, name: str) -> Control:
    """Make the control of an option. Left as it is, the option is not sent."""
    shown = {
        "label": option.name,
        "info": option.about or None,
        "interactive": True,
        "elem_id": name,
    }
    if option.kind == "choice":
        choices = gradio.Dropdown(["", *map(str, option.choices)], value="", **shown)
        return Control(option.name, (choices,), lambda chosen: chosen or None)
    if option.kind == "boolean":
        box = gradio.Checkbox(bool(option.default), **shown)
        return Control(option.name, (box,), lambda on: None if on == bool(option.default) else str(on).lower())
    # as text, so that the server says what is wrong with a number
    field = gradio.Textbox("", placeholder="" if option.default is None else str(option.default), **shown)
    return Control(option.name, (field,), lambda text: text.strip() or None)
