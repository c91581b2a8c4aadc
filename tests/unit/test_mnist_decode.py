"""Decoding of digits: drawings of many kinds become images like those of MNIST. The tests draw the digits."""

import base64
import io

import numpy
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from handlers.core.digits import BOX, SIDE, to_mnist
from handlers.core.errors import BlankImage, RequestError, UndecodableImage
from handlers.mnist import MNISTHandler
from tests.unit.inputs import DIGITS, blurred, decoded, draw_digit, encode_image


def handler() -> MNISTHandler:
    handler = MNISTHandler()
    handler.settings = handler.Settings()
    return handler


def decode(image: Image.Image) -> numpy.ndarray:
    """Decode an image as a request is decoded; return uint8 [28, 28]."""
    sample, example = decoded(handler(), encode_image(image, "PNG")), handler().example().tensors
    assert (sample.shape, sample.dtype) == (example.shape, example.dtype)
    return sample[0].numpy()


def similarity(one: numpy.ndarray, other: numpy.ndarray) -> float:
    """Return the correlation of two digits, the largest of the nine shifts by up to one pixel.

    A centre of mass between two pixels may be rounded to either.
    """
    shifted = [numpy.roll(other, (y, x), axis=(0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return max(numpy.corrcoef(one.ravel(), other.ravel())[0, 1] for other in shifted)


CLEAN = {digit: decode(draw_digit(digit)) for digit in DIGITS}


def test_similarity_of_different_digits_is_low():
    """The tests below require more of two drawings of one digit."""
    alike = [similarity(CLEAN[one], CLEAN[other]) for one in DIGITS for other in DIGITS if one < other]
    assert max(alike) < 0.75


# --- the form of an MNIST image --------------------------------------------------------------------------------------

DRAWINGS = st.builds(
    draw_digit,
    digit=st.sampled_from(sorted(DIGITS)),
    size=st.integers(40, 300),
    height=st.floats(0.3, 0.8),
    stroke=st.floats(0.05, 0.2),
    x=st.floats(0.4, 0.6),
    y=st.floats(0.4, 0.6),
)


@given(DRAWINGS)
def test_digit_fits_the_box_and_is_centred_by_mass(drawing: Image.Image):
    made = decode(drawing)
    rows, columns = (numpy.flatnonzero(made.any(axis=axis)) for axis in (1, 0))
    extent = (rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)
    assert max(extent) <= BOX
    assert max(extent) >= BOX - 1  # faint edges may round to 0
    mass = made.astype(float)
    centre = [(mass.sum(axis=axis) * numpy.arange(SIDE)).sum() / mass.sum() for axis in (1, 0)]
    assert abs(numpy.array(centre) - SIDE / 2).max() <= 1
    assert made.max() == 255


@given(DRAWINGS)
def test_decoded_digit_decodes_to_almost_the_same_image(drawing: Image.Image):
    once = decode(drawing)
    assert similarity(decode(Image.fromarray(once)), once) > 0.99


@pytest.mark.parametrize("digit", DIGITS)
def test_clean_decoded_digit_decodes_to_the_same_pixels(digit: int):
    assert (decode(Image.fromarray(CLEAN[digit])) == CLEAN[digit]).all()


# --- other drawings --------------------------------------------------------------------------------------------


def invert(image: Image.Image) -> Image.Image:
    return ImageChops.invert(image.convert("L"))


def on_transparency(colour: tuple[int, int, int]):
    def draw(image: Image.Image) -> Image.Image:
        drawn = Image.new("RGBA", image.size, (*colour, 0))
        drawn.putalpha(image)
        return drawn

    return draw


def under_a_lamp(image: Image.Image) -> Image.Image:
    """Draw on paper that gets darker from left to right, to half as bright."""
    light = numpy.linspace(255, 128, image.width) * (1 - 0.7 * numpy.asarray(image) / 255)
    return Image.fromarray(light.round().astype(numpy.uint8))


def noisy(image: Image.Image) -> Image.Image:
    noise = numpy.random.default_rng(0).normal(0, 8, (image.height, image.width))
    return Image.fromarray((numpy.asarray(invert(image)) * 0.7 + 40 + noise).clip(0, 255).astype(numpy.uint8))


def with_margin(image: Image.Image) -> Image.Image:
    wide = Image.new("L", (image.width * 3, image.height * 2), 0)
    wide.paste(image, (image.width // 3, image.height // 2))
    return wide


def jpeg_artefacts(image: Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(encode_image(invert(image), "JPEG", quality=30)))


@pytest.mark.parametrize("digit", DIGITS)
@pytest.mark.parametrize(
    ("change", "least"),
    [
        (invert, 0.99),
        (on_transparency((0, 0, 0)), 0.99),
        (on_transparency((255, 255, 255)), 0.99),
        (on_transparency((200, 30, 30)), 0.99),
        (lambda image: invert(image).convert("RGB"), 0.99),
        (lambda image: invert(image).quantize(16), 0.98),
        (lambda image: image.point(lambda v: 255 * (v > 127)).convert("1"), 0.96),
        (lambda image: image.point(lambda v: 100 + v // 4), 0.98),
        (lambda image: blurred(image, 1), 0.97),
        (with_margin, 0.98),
        (under_a_lamp, 0.95),
        (noisy, 0.95),
        (jpeg_artefacts, 0.95),
    ],
    ids=[
        "inverted",
        "black-on-transparent",
        "white-on-transparent",
        "red-on-transparent",
        "rgb",
        "palette",
        "1-bit",
        "low-contrast",
        "blurred",
        "wide-margin",
        "uneven-light",
        "noisy",
        "jpeg",
    ],
)
def test_digit_drawn_in_another_way_decodes_similarly(change, least: float, digit: int):
    assert similarity(decode(change(draw_digit(digit))), CLEAN[digit]) >= least


@pytest.mark.parametrize("digit", DIGITS)
@pytest.mark.parametrize("height", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("size", [50, 100, 300, 800, 1500])
def test_digit_of_any_size_decodes_similarly(size: int, height: float, digit: int):
    least = 0.88 if size * height >= 2 * BOX else 0.8  # 15 pixels show fewer details
    assert similarity(decode(invert(draw_digit(digit, size, height))), CLEAN[digit]) >= least


@given(x=st.floats(0.25, 0.75), y=st.floats(0.25, 0.75), digit=st.sampled_from(sorted(DIGITS)))
def test_digit_anywhere_on_the_sheet_decodes_similarly(x: float, y: float, digit: int):
    assert similarity(decode(draw_digit(digit, size=160, height=0.45, x=x, y=y)), CLEAN[digit]) > 0.88


@pytest.mark.parametrize("digit", DIGITS)
def test_thin_line_is_thickened(digit: int):
    """Without thickening, a line of 3 pixels on a sheet of 600 would be a seventh of a pixel wide."""
    made = decode(invert(draw_digit(digit, size=600, height=0.7, stroke=0.007)))
    assert made.max() == 255
    assert (made > 127).sum() > 0.5 * (CLEAN[digit] > 127).sum()


# --- images without a digit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(Image.new("L", (28, 28), 0), id="black"),
        pytest.param(Image.new("RGB", (200, 100), "white"), id="white"),
        pytest.param(Image.new("RGBA", (64, 64), (0, 0, 0, 0)), id="transparent"),
        pytest.param(Image.linear_gradient("L"), id="gradient"),
        pytest.param(
            Image.fromarray(numpy.random.default_rng(0).normal(128, 4, (64, 64)).astype(numpy.uint8)), id="grain"
        ),
    ],
)
def test_image_without_a_digit_is_rejected(image: Image.Image):
    with pytest.raises(BlankImage, match="no digit stands out"):
        decode(image)


@given(
    st.tuples(st.integers(8, 40), st.integers(8, 40)).flatmap(
        lambda size: st.binary(min_size=size[0] * size[1], max_size=size[0] * size[1]).map(
            lambda pixels: Image.frombytes("L", size, pixels)
        )
    )
)
@example(Image.effect_noise((512, 8), 255))
def test_any_image_decodes_to_28_by_28_or_is_rejected_as_blank(image: Image.Image):
    try:
        made, _ = to_mnist(numpy.asarray(image, dtype=numpy.float32))
    except BlankImage:
        return
    assert (made.shape, made.dtype) == ((SIDE, SIDE), numpy.uint8)
    assert made.any()


# --- base64, options ----------------------------------------------------------------------------------------------


def test_base64_image_decodes_like_its_bytes():
    content = encode_image(draw_digit(), "PNG")
    assert (decoded(handler(), base64.b64encode(content).decode()) == decoded(handler(), content)).all()


@pytest.mark.parametrize("content", [b"\0" * 784, b"3"])
def test_pixels_without_an_image_format_are_rejected(content: bytes):
    with pytest.raises(UndecodableImage):
        decoded(handler(), content)


def test_top_k_other_than_three_is_rejected():
    handler().check_top_k(3)
    with pytest.raises(RequestError, match="top_k must be 3"):
        handler().check_top_k(5)
