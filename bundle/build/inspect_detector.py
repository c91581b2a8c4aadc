"""Find out what a detector takes and returns: torchvision's list of dicts, or the raw outputs of the YOLO family."""

import torch
from torch import Tensor, nn

from bundle.build.export import PreprocessedImages, random_images
from bundle.build.inspect_model import (
    Found,
    Normalisation,
    Report,
    check_finite,
    describe_images,
    examine,
    find_images,
    normalisations,
    random_batch,
    run,
    words,
)
from bundle.build.new_model import NewModel
from bundle.build.user_modules import adapt, count_arguments, takes_list
from bundle.errors import BundleError, UsageError

SIDES = (
    640,
    320,
    416,
    512,
    1280,
    1024,
    960,
    768,
    384,
    256,
    224,
    192,
    160,
    128,
    96,
    64,
    32,
)  # pixels, in the order tried
UNCHANGED: dict[int, Normalisation] = {3: ([0.0] * 3, [1.0] * 3, "unchanged")}  # the YOLO family takes pixels in [0, 1]
LAYOUTS = {"yolo": "[N, 4 + classes, boxes]", "yolov5": "[N, boxes, 5 + classes]"}
BEFORE_CLASSES = {"yolo": 4, "yolov5": 5}  # values of a box before the probabilities of its classes
CLEARLY_MORE = 4  # times as many boxes as values: without labels, the longer dimension is that of the boxes
PATIENCE: dict[str, tuple[object, str]] = {
    "max_explain_seconds": (20, "s; an explanation runs the model on an image many times")
}
BATCH = 4  # most requests in one batch: an image is large
ROUNDING = 1e-3  # of a probability
PAIR = torch.tensor([[240, 320], [200, 160]])  # heights and widths of two trial images


def inspect_detector(model: torch.jit.ScriptModule, new: NewModel, names: list[str] | None, report: Report) -> Found:
    """Find the format of a detector's outputs, its input's size, and its classes.

    Raises:
        BundleError: the outputs are not those of a detector, or it is ambiguous what they are.
    """
    if not takes_list(model) and count_arguments(model) == 1:
        if new.format == "torchvision":
            raise BundleError(
                "With FORMAT=torchvision, a model must take a list of images, float32 [3, H, W] in [0, 1], or a padded "
                "batch and its sizes (handlers/README.md). This one takes one tensor."
            )
        return inspect_yolo(model, new, names, report)
    if new.format not in (None, "torchvision"):
        raise BundleError(f"With FORMAT={new.format}, a model must take one tensor. This one takes a list of images.")
    return inspect_torchvision(model, new, names, report)


# --- torchvision -----------------------------------------------------------------------------------------------------


def inspect_torchvision(model: torch.jit.ScriptModule, new: NewModel, names: list[str] | None, report: Report) -> Found:
    """Find the classes of a detector that returns a dict for each image, as torchvision's do.

    Raises:
        BundleError: an option does not apply, the outputs have another form, or their classes have no labels.
    """
    if new.mean or new.std or new.size:
        raise UsageError("torchvision's detectors resize and normalise by themselves. Leave out SIZE, MEAN and STD.")
    height, width = PAIR.amax(dim=0).tolist()
    found = run(adapt(model, "detection"), (random_images(2, 3, height, width), PAIR))
    highest = check_detections(found, len(PAIR))
    classes = known_classes(model) or (len(names) if names else None)
    if classes is None:
        raise BundleError(
            "The model does not show how many classes it has. Set LABELS, with the background as class 0."
        )
    if highest >= classes:
        raise BundleError(
            f"The model finds class {highest}, but LABELS has {classes} labels. Class 0 is the background."
        )
    if names and not known_classes(model):
        report(f"the number of classes is not visible in the model; LABELS has {classes}, of which 0 is the background")
    report("returns boxes, scores and labels (format torchvision). It resizes and normalises images by itself")
    longest = new.resize or 1333
    settings: dict[str, tuple[object, str]] = {
        "format": ("torchvision", ""),
        "longest_side": (longest, "pixels; a larger image is reduced before the model resizes it"),
        **PATIENCE,
    }
    return Found(classes, settings, batch_size=BATCH)


def check_detections(found: object, size: int) -> int:
    """Return the highest class that was found; -1 if nothing was found.

    Raises:
        BundleError: the outputs are not a list with a dict of boxes, scores and labels for each image.
    """
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise BundleError(
            f"The model returns {words(found)}. A detector must return a list with a dict for each image."
        )
    if len(found) != size:
        raise BundleError(f"The model returns {len(found)} dicts for {size} images.")
    for each in found:
        if missing := {"boxes", "scores", "labels"} - set(each):
            raise BundleError(f"The model's dicts have no {', '.join(sorted(missing))}: they have {', '.join(each)}.")
    return max((int(each["labels"].max()) for each in found if len(each["labels"])), default=-1)


def known_classes(model: nn.Module) -> int | None:
    """Return the number of classes of an R-CNN, from its last layer; None for other and for frozen detectors."""
    found = (len(p) for name, p in model.named_parameters() if name.endswith("box_predictor.cls_score.bias"))
    return next(found, None)


# --- YOLO ------------------------------------------------------------------------------------------------------------


def inspect_yolo(model: torch.jit.ScriptModule, new: NewModel, names: list[str] | None, report: Report) -> Found:
    """Find the format and the classes of a detector of the YOLO family.

    Raises:
        BundleError: the outputs have another form.
    """
    sides = (new.size,) if new.size else SIDES
    images, output = find_images(model, sides, normalisations(UNCHANGED, new.mean, new.std))
    raw = check_raw(output, 1)
    if is_suppressed(raw):
        raise BundleError(
            f"The model returns {words(raw)}: boxes from which the overlapping ones are removed already. Export raw "
            "outputs instead, as Ultralytics does with nms=False (and end2end=False for models without suppression)."
        )
    chosen, classes = choose_format(raw, new.format, len(names) if names else None)
    report(f"returns {words(raw)}: {LAYOUTS[chosen]} with {classes} classes (FORMAT={chosen})")
    for line in describe_images(images, "images are fitted into this square, on grey"):
        report(line)
    module = PreprocessedImages(model, images.mean, images.std)
    examine(module, random_batch(images), lambda out, size: probabilities(out, chosen, images.side, size), report)
    settings: dict[str, tuple[object, str]] = {
        "format": (chosen, LAYOUTS[chosen]),
        "size": ([images.side] * 2, "height and width of the input"),
        **PATIENCE,
    }
    return Found(classes, settings, images, batch_size=BATCH)


def check_raw(output: object, size: int) -> Tensor:
    """Return the raw outputs of the YOLO family, [size, ., .].

    Raises:
        BundleError: they have another type or shape.
    """
    main = output[0] if isinstance(output, tuple) else output
    if isinstance(main, Tensor) and main.is_floating_point() and main.ndim == 3 and len(main) == size:
        return main
    raise BundleError(
        f"The model returns {words(main)}. A detector of the YOLO family must return one tensor, {LAYOUTS['yolo']} or "
        f"{LAYOUTS['yolov5']}, for a batch; one that returns a list of dicts must take a list of images. Export it "
        "again, or wrap it in a module that does, and script the module."
    )


def is_suppressed(raw: Tensor) -> bool:
    """Return whether rows are x1, y1, x2, y2, score, class, best first, as models with built-in suppression return."""
    if raw.shape[2] != 6:
        return False
    scores, classes = raw[0, :, 4], raw[0, :, 5]
    return bool((scores.diff() <= 0).all() and (classes == classes.round()).all() and raw.shape[1] > 1)


def choose_format(raw: Tensor, stated: str | None, labels: int | None) -> tuple[str, int]:
    """Return the format that the shape of the outputs for one image has, and the number of classes.

    Args:
        raw: [1, ., .].
        stated: the option FORMAT.
        labels: their number, if they are given.

    Raises:
        BundleError: none fits, or both do. The message says what decides.
    """
    _, rows, columns = raw.shape
    shapes = {"yolo": (rows, columns), "yolov5": (columns, rows)}  # values of a box, and boxes
    classes = {name: values - BEFORE_CLASSES[name] for name, (values, _) in shapes.items()}
    fitting = [name for name in LAYOUTS if stated in (None, name) and classes[name] > 0]
    if labels is not None:
        fitting = [name for name in fitting if classes[name] == labels]
    elif not stated:
        fitting = [name for name in fitting if shapes[name][1] >= CLEARLY_MORE * shapes[name][0]]
    if len(fitting) == 1:
        return fitting[0], classes[fitting[0]]
    seen = f"The model returns {words(raw)} for one image"
    if labels is not None and not fitting:
        turned = " It looks turned: return output.transpose(1, 2)." if columns == 4 + labels else ""
        raise BundleError(
            f"{seen}. With {labels} labels, yolo is [N, {4 + labels}, boxes], and yolov5 is [N, boxes, {5 + labels}]."
            f"{turned} Correct LABELS or FORMAT. Models that also return masks, points or angles are not supported."
        )
    decides = "Set FORMAT" if labels is not None else "Set LABELS or FORMAT"
    raise BundleError(
        f"{seen}, and that can be either format: yolo is {LAYOUTS['yolo']}, yolov5 is {LAYOUTS['yolov5']}. {decides}."
    )


def probabilities(output: object, chosen: str, side: int, size: int) -> Tensor:
    """Return the probabilities of a detector's boxes, float32 [size, boxes, classes or more].

    Raises:
        BundleError: they are not in [0, 1], or the boxes are not in pixels.
    """
    raw = check_finite(check_raw(output, size))
    rows = raw.transpose(1, 2) if chosen == "yolo" else raw
    boxes, scores = rows[..., :4], rows[..., 4:]
    low, high = scores.min().item(), scores.max().item()
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise BundleError(
            f"The model's class scores go from {low:.3g} to {high:.3g}; they must be probabilities. Apply a sigmoid "
            "inside the module. Models that also return masks, points or angles are not supported."
        )
    if boxes.abs().max().item() <= 2:
        raise BundleError(
            f"The model's boxes have no number above 2, so they are shares of the image; they must be in pixels of its "
            f"input. Multiply them by {side} inside the module."
        )
    return scores
