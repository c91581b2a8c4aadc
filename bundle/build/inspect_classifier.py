"""Find out what a classifier of images, sounds or texts takes and returns."""

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from bundle.build.export import PreprocessedImages
from bundle.build.inspect_model import (
    BATCH,
    SIDES,
    USUAL,
    Found,
    Images,
    Report,
    check_finite,
    describe_images,
    examine,
    failure_on,
    find_images,
    normalisations,
    random_batch,
    run,
    words,
)
from bundle.build.new_model import NewModel
from bundle.build.user_modules import adapt, count_arguments
from bundle.errors import BundleError
from bundle.paths import relative

MNIST_SIDE = 28  # pixels of the images that the handler `mnist` makes
MNIST = {1: ([0.1307], [0.3081], "MNIST's")}
LENGTHS = (512, 256, 128, 64, 32, 16)  # tokens of a text, in the order they are tried
SHORTEST = LENGTHS[-1]
PADDINGS = ("[PAD]", "<pad>")  # what tokenizers call the token that fills a text up


def inspect_images(model: torch.jit.ScriptModule, new: NewModel, names: list[str] | None, report: Report) -> Found:
    """Find the size of a classifier's images, and its classes."""
    sides = (new.size,) if new.size else SIDES
    images, _ = find_images(model, sides, normalisations(USUAL, new.mean, new.std))
    resize = new.resize or usual_resize(images.side)
    place = f"images are resized to {resize} pixels on the shorter side (RESIZE), then cropped in the middle"
    for line in describe_images(images, place):
        report(line)
    classes, outputs = examine_images(model, images, report)
    settings = {
        "top_k": (5, ""),
        "resize": (resize, "pixels of the shorter side"),
        "crop": (images.side, "pixels of the square that is cut out of the middle"),
        "interpolation": ("bilinear", ""),
        "channels": (images.channels, "3: RGB, 1: grey"),
        "outputs": (outputs, ""),
    }
    return Found(classes, settings, images)


def inspect_digits(model: torch.jit.ScriptModule, new: NewModel, names: list[str] | None, report: Report) -> Found:
    """Find the classes of a classifier of handwritten digits."""
    if new.size not in (None, MNIST_SIDE):
        raise BundleError("The handler mnist makes images of 28 x 28 pixels. For other sizes, set HANDLER=image_topk.")
    images, _ = find_images(model, (MNIST_SIDE,), normalisations(MNIST, new.mean, new.std))
    for line in describe_images(images, ""):
        report(line)
    classes, outputs = examine_images(model, images, report)
    return Found(classes, {"top_k": (3, ""), "outputs": (outputs, "")}, images)


def inspect_sounds(model: torch.jit.ScriptModule, new: NewModel, names: list[str] | None, report: Report) -> Found:
    """Find the classes of a classifier of one second of sound, as the handler `audio_mfcc` makes it."""
    outputs = examine(model, (torch.rand(BATCH, 16_000) * 2 - 1,), check_scores, report)
    return Found(outputs.shape[1], {"top_k": (3, ""), "outputs": (describe_scores(outputs, report), "")})


def inspect_texts(model: torch.jit.ScriptModule, new: NewModel, names: list[str] | None, report: Report) -> Found:
    """Find the longest text that a classifier takes, whether its tokenizer fits, and its classes.

    Raises:
        BundleError: the tokenizer is invalid, or has more tokens than the model.
    """
    file = new.tokenizer
    assert file is not None, "the options were checked"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as exc:  # the library raises no class of its own
        raise BundleError(f"{relative(file)} is not a tokenizer of the package tokenizers: {exc}") from exc
    arguments = count_arguments(model)
    report(f"takes {', '.join(('token ids', 'their mask', 'their types')[:arguments])}; {relative(file)} makes them")
    wrapped = adapt(model, "text")
    tokens = tokenizer.get_vocab_size()
    length = longest_text(wrapped)
    highest = torch.full((1, SHORTEST), tokens - 1)
    if failure := failure_on(wrapped, (highest, torch.ones_like(highest))):
        raise BundleError(
            f"The model fails on token {tokens - 1}, although {relative(file)} has {tokens} tokens: it is the "
            "tokenizer of another model.",
            failure,
        )
    ids = torch.randint(0, tokens, (BATCH, SHORTEST), generator=torch.Generator().manual_seed(0))
    outputs = examine(wrapped, (ids, torch.ones_like(ids)), check_scores, report)
    given = (tokenizer.truncation or {}).get("max_length")
    limit = min(filter(None, (given, length)))
    padding = padding_of(tokenizer)
    report(f"{tokens} tokens; texts are cut after {limit} tokens, and filled up with token {padding}")
    settings = {
        "top_k": (3, ""),
        "max_tokens": (limit, "longer texts are truncated"),
        "pad_id": (padding, "the token that fills up the shorter texts of a batch"),
        "outputs": (describe_scores(outputs, report), ""),
    }
    if depends_on_padding(wrapped, ids[:1], padding):
        report(
            "its outputs for a text change if the text is filled up, so texts run one after the other "
            "(batchSize: 1): a batch of N takes N times as long as one text. Let it use the mask"
        )
        return Found(outputs.shape[1], settings, batch_size=1)
    return Found(outputs.shape[1], settings)


# --- images ----------------------------------------------------------------------------------------------------------


def examine_images(model: nn.Module, images: Images, report: Report) -> tuple[int, str]:
    """Return the number of classes, and what the outputs are: "logits" or "probabilities"."""
    module = PreprocessedImages(model, images.mean, images.std)
    outputs = examine(module, random_batch(images), check_scores, report)
    return outputs.shape[1], describe_scores(outputs, report)


def usual_resize(side: int) -> int:
    """Return 256 pixels for a side of 224, the same proportion for similar sides, and small sides unchanged."""
    return round(side * 256 / 224) if side >= 160 else side


# --- texts -----------------------------------------------------------------------------------------------------------


def longest_text(model: nn.Module) -> int:
    """Return the longest of the usual lengths that the model runs on, in tokens.

    Raises:
        BundleError: it does not run on a short text. The message says which length it was traced with, if it is one.
    """
    texts = {length: torch.ones(1, length, dtype=torch.int64) for length in LENGTHS}
    runs = [length for length, ids in texts.items() if failure_on(model, (ids, torch.ones_like(ids))) is None]
    if not runs:
        run(model, (texts[SHORTEST], torch.ones_like(texts[SHORTEST])))  # its error is the message
    if SHORTEST not in runs:
        raise BundleError(
            f"The model runs on texts of {runs[0]} tokens, and not on shorter ones: it was traced with this length. "
            "Script it, or trace it so that the length can change."
        )
    return runs[0]


def padding_of(tokenizer: Tokenizer) -> int:
    """Return the token that fills up a text: the tokenizer's own setting, its token of the usual name, or 0."""
    if tokenizer.padding:
        return tokenizer.padding["pad_id"]
    found = (tokenizer.token_to_id(name) for name in PADDINGS)
    return next((token for token in found if token is not None), 0)


def depends_on_padding(model: nn.Module, ids: Tensor, padding: int) -> bool:
    """Return whether the scores of a text change by more than rounding does, when it is filled up."""
    mask = torch.ones_like(ids)
    scores = check_scores(run(model, (ids, mask)), 1)
    filled = nn.functional.pad(ids, (0, ids.shape[1]), value=padding), nn.functional.pad(mask, (0, ids.shape[1]))
    return not torch.allclose(check_scores(run(model, filled), 1), scores, rtol=1e-3, atol=1e-3)


# --- scores ----------------------------------------------------------------------------------------------------------


def check_scores(output: object, size: int) -> Tensor:
    """Return a classifier's output as float32 [size, classes].

    Raises:
        BundleError: the output has another type or shape, or numbers that are not finite.
    """
    main = output if isinstance(output, Tensor) and output.is_floating_point() else None
    if main is not None and main.ndim == 2 and len(main) == size and main.shape[1] > 1:
        return check_finite(main)
    raise BundleError(
        f"The model returns {words(output)}. A classifier must return floating-point numbers [{size}, classes] for a "
        f"batch of {size}, or a tuple that starts with them. Wrap the model in a module that does, and script the "
        "module."
    )


def describe_scores(outputs: Tensor, report: Report) -> str:
    """Return "probabilities" if each row of [N, classes] is a distribution, else "logits"."""
    within = bool(((outputs >= 0) & (outputs <= 1)).all())
    distributions = within and torch.allclose(outputs.sum(dim=1), torch.ones(len(outputs)), atol=1e-3)
    kind = "probabilities" if distributions else "logits"
    report(f"returns {outputs.shape[1]} classes, as {kind}")
    if within and not distributions:
        report("all of them are in [0, 1]: if they are sigmoids, set `outputs: probabilities` in model-config.yaml")
    return kind
