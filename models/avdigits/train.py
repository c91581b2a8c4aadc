"""Train the digit classifier of pictures, sounds and texts on MNIST and the Free Spoken Digit Dataset (FSDD).

This reads `MNIST/raw` and `fsdd.zip` (fsdd/<digit>_<speaker>_<n>.flac) in the data directory. Digits that are spoken in
`speech-commands-12.zip`, if it is there, add to the voices. The encoders start from the weights of `mnist` and `audio`.

    make train MODEL=avdigits
    python -m models.avdigits.train --data-dir data --epochs 1
"""

import io
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import soundfile
import soxr
import torch
from torch import Tensor, nn

from models import command_line, data_sets, training
from models.audio import model as audio
from models.audio import train as audio_training
from models.avdigits import phrases
from models.avdigits.model import FOLDER, INPUTS, AnyDigitNet
from models.mnist import model as mnist
from models.mnist import train as mnist_training
from models.weights import round_weights

RECIPE = training.Recipe(epochs=1, batch_size=128, learning_rate=1e-3, weight_decay=0.05, warmup=0.1, optimizer="adamw")
LABELS = mnist_training.LABELS
TEST_SPEAKER, VALIDATION_SPEAKER = "yweweler", "theo"  # the last two by name; no clip of theirs is trained on
SPOILT = 0.35  # share of the pictures and of the sounds that are spoilt in training
HISS, GRAIN = (0.5, 2.5), (30, 160)  # noise of spoilt sounds, relative to their loudness; of spoilt pictures, of 255
WORST_HISS, WORST_GRAIN = 2.0, 160.0  # in the test; half of the pictures are covered, too


@dataclass
class Clips:
    """Spoken digits: float32 [N, 16000], and int64 [N]."""

    waveforms: Tensor
    targets: Tensor

    def by_digit(self) -> list[Tensor]:
        return [self.waveforms[self.targets == digit] for digit in range(len(LABELS))]


def window(samples: numpy.ndarray, sample_rate: int) -> Tensor:
    """Cut the loudest second, or pad with silence on both sides, as the handler does: [T] -> float32 [16000]."""
    waveform = soxr.resample(samples, sample_rate, audio.SAMPLE_RATE)
    waveform = waveform - waveform.mean()
    if (missing := audio.SAMPLES - len(waveform)) >= 0:
        return torch.from_numpy(numpy.pad(waveform, (missing // 2, missing - missing // 2)))
    hop = audio.SAMPLES // 100
    blocks = waveform[: len(waveform) // hop * hop].reshape(-1, hop)
    loudness = numpy.convolve(numpy.square(blocks).sum(axis=1), numpy.hanning(100), mode="valid")
    start = min(int(loudness.argmax()) * hop, -missing)
    return torch.from_numpy(waveform[start : start + audio.SAMPLES])


def read_clips(archive: Path, label_of) -> Clips:
    """Read the sounds of an archive for which `label_of(file name)` is a digit, not None.

    Raises:
        SystemExit: the file is missing.
    """
    waveforms, targets = [], []
    source = "download https://github.com/Jakobovski/free-spoken-digit-dataset, and pack its recordings as FLAC files."
    with data_sets.open_archive(archive, "the Free Spoken Digit Dataset", source) as files:
        for name in sorted(name for name in files.namelist() if name.endswith(".flac")):
            if (digit := label_of(name)) is not None:
                waveforms.append(window(*soundfile.read(io.BytesIO(files.read(name)), dtype="float32")))
                targets.append(digit)
    return Clips(torch.stack(waveforms), torch.tensor(targets))


def load_clips(data_dir: Path) -> dict[str, Clips]:
    """Load the spoken digits of the splits "train", "validation" and "test", which have no speaker in common."""
    held_out = {"validation": VALIDATION_SPEAKER, "test": TEST_SPEAKER}

    def of_split(split: str):
        def label_of(name: str) -> int | None:
            digit, speaker, _ = Path(name).stem.split("_")
            chosen = speaker == held_out[split] if split in held_out else speaker not in held_out.values()
            return int(digit) if chosen else None

        return label_of

    clips = {split: read_clips(data_dir / "fsdd.zip", of_split(split)) for split in ("train", *held_out)}
    if (more := data_dir / "speech-commands-12.zip").exists():
        commands = read_clips(more, command_digit)
        clips["train"] = Clips(*(torch.cat(pair) for pair in (
            (clips["train"].waveforms, commands.waveforms), (clips["train"].targets, commands.targets)
        )))  # fmt: skip
    return clips


def command_digit(name: str) -> int | None:
    """Return the digit of a clip of Speech Commands: _unknown_/<word>_<speaker>_nohash_<n>.flac."""
    label, clip = name.split("/")
    word = clip.split("_")[0]
    return phrases.NAMES.index(word) if label == "_unknown_" and word in phrases.NAMES else None


def letters(texts: Iterable[str]) -> Tensor:
    """Encode texts as the handler does: int64 [N, T], the bytes each plus one, padded with 0."""
    rows = [torch.tensor(list(text.encode())) + 1 for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


class Triples:
    """Batches of pictures, each with a sound and a text at random of the same digit."""

    def __init__(self, images: Tensor, targets: Tensor, clips: Clips, batch_size: int, seed: int):
        self.images, self.targets, self.clips = images, targets, clips.by_digit()
        self.batch_size, self.generator = batch_size, random.Random(seed)

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = torch.randperm(len(self.images)).split(self.batch_size)[: len(self)]
        for rows in training.shared(order):
            targets = self.targets[rows]
            yield self.images[rows], letters(map(self.write, targets.tolist())), speak(self.clips, targets), targets

    def write(self, digit: int) -> str:
        if self.generator.random() < 0.5:
            return phrases.chatter(digit, self.generator)
        return phrases.phrase(digit, phrases.TRAINING, self.generator)


def speak(clips: list[Tensor], targets: Tensor) -> Tensor:
    """Choose a clip of each digit at random: int64 [N] -> float32 [N, 16000]."""
    return torch.stack([clips[digit][int(torch.randint(len(clips[digit]), ()))] for digit in targets.tolist()])


def spoil_images(images: Tensor, grain: Tensor | float, covered: Tensor) -> Tensor:
    """Add noise to uint8 [N, 1, 28, 28], and cover a band across the middle of those that are `covered`, bool [N]."""
    noisy = images.float() + torch.randn(images.shape) * grain
    noisy[covered, :, 10:18] = 0
    return noisy.round().clamp(0, 255).byte()


def spoil_sounds(waveforms: Tensor, hiss: Tensor | float) -> Tensor:
    """Add white noise, relative to the loudness of each of float32 [N, 16000]."""
    return (waveforms + torch.randn(waveforms.shape) * hiss * audio_training.rms(waveforms)).clamp(-1, 1)


def subsets(rows: int) -> Tensor:
    """Draw which inputs are present, bool [rows, 3]: each of the seven subsets with equal probability."""
    codes = torch.randint(1, 2 ** len(INPUTS), (rows, 1))
    return (codes >> torch.arange(len(INPUTS)) & 1).bool()


class FusionTraining(training.Classifier):
    """Train on random subsets of the inputs, and each encoder by itself."""

    model: AnyDigitNet

    def __init__(self, model: AnyDigitNet, recipe: training.Recipe):
        super().__init__(model, recipe)
        self.hand, self.recording = mnist_training.Augment(), audio_training.Augment(torch.randn(20, audio.SAMPLES))

    def training_step(self, batch: tuple[Tensor, ...], _: int) -> Tensor:
        images, texts, waveforms, targets = batch
        n = len(targets)
        grain = torch.where(torch.rand(n, 1, 1, 1) < SPOILT, torch.empty(n, 1, 1, 1).uniform_(*GRAIN), 0.0)
        images = spoil_images(self.hand(images), grain, torch.rand(n) < SPOILT / 3)
        hiss = torch.where(torch.rand(n, 1) < SPOILT, torch.empty(n, 1).uniform_(*HISS), 0.0)
        waveforms = spoil_sounds(self.recording(waveforms), hiss)

        evidence = self.model.evidence(images, texts, waveforms)
        loss = nn.functional.cross_entropy
        fused = loss((evidence * subsets(n).unsqueeze(2)).sum(dim=1), targets)
        alone = torch.stack([loss(logits, targets) for logits in evidence.unbind(dim=1)])
        self.log_dict({"fused": fused, **dict(zip(INPUTS, alone, strict=True))}, prog_bar=True)
        total = fused + alone.mean()
        self.log_loss(total, n)
        return total


def untrained() -> AnyDigitNet:
    """Return the network with the encoders of `mnist` and `audio`, but for the classes of the latter."""
    model = AnyDigitNet()
    model.image.load_state_dict(mnist.build().state_dict())
    spoken = {name: value for name, value in audio.build().state_dict().items() if not name.startswith("classify")}
    model.audio.load_state_dict(spoken, strict=False)
    return model.train()


@torch.inference_mode()
def logits_of(model: AnyDigitNet, images: Tensor, texts: Tensor, waveforms: Tensor) -> Tensor:
    """Return the evidence of the three encoders, float32 [N, 3, 10], from which every subset's answer follows."""
    parts = zip(images.split(200), texts.split(200), waveforms.split(200), strict=True)
    return torch.cat([model.evidence(*part) for part in parts])


def accuracies(evidence: Tensor, targets: Tensor) -> dict[str, float]:
    """Return {"image": ..., "image+text": ..., ...} for every subset of the inputs."""
    figures = {}
    for code in range(1, 2 ** len(INPUTS)):
        chosen = [column for column in range(len(INPUTS)) if code >> column & 1]
        correct = evidence[:, chosen].sum(dim=1).argmax(dim=1) == targets
        figures["+".join(INPUTS[column] for column in chosen)] = round(correct.float().mean().item(), 5)
    return figures


def validation_batches(images: Tensor, targets: Tensor, clips: Clips) -> training.Batches:
    """Return batches of pictures, each with a phrase and a clip of its digit; all inputs are present."""
    generator = random.Random(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        texts = letters(phrases.phrase(digit, phrases.TEST, generator) for digit in targets.tolist())
        waveforms = speak(clips.by_digit(), targets)
    present = torch.ones(len(images), len(INPUTS), dtype=torch.bool)
    return training.Batches(images, texts, waveforms, present, targets, batch_size=200, shuffle=False)


def measure(model: AnyDigitNet, images: Tensor, targets: Tensor, clips: Clips) -> dict:
    """Measure every subset of the inputs on the test digits, whole and with spoilt pictures and sounds."""
    generator = random.Random(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        texts = letters(phrases.phrase(digit, phrases.TEST, generator) for digit in targets.tolist())
        waveforms = speak(clips.by_digit(), targets)
        evidence = logits_of(model, images, texts, waveforms)
        spoilt = logits_of(
            model,
            spoil_images(images, WORST_GRAIN, torch.rand(len(images)) < 0.5),
            texts,
            spoil_sounds(waveforms, WORST_HISS),
        )
        clips_alone = model.audio(clips.waveforms).argmax(dim=1) == clips.targets
    whole = accuracies(evidence, targets)
    predicted = evidence.sum(dim=1).argmax(dim=1)
    matrix = torch.bincount(targets * len(LABELS) + predicted, minlength=len(LABELS) ** 2).view(-1, len(LABELS))
    return {
        "accuracy": whole["+".join(INPUTS)],
        "accuracy_of_inputs": whole,
        "accuracy_of_each_clip_once": round(clips_alone.float().mean().item(), 5),
        "accuracy_of_spoilt_inputs": accuracies(spoilt, targets),
        "confusion_matrix": matrix.tolist(),
    }


def main() -> None:
    options = command_line.arguments(__doc__, RECIPE, FOLDER)
    recipe = replace(RECIPE, epochs=options.epochs)
    images, targets = mnist_training.load(options.data_dir, "train")
    clips = load_clips(options.data_dir)

    classifier = FusionTraining(untrained(), recipe)
    seconds = training.fit(
        options,
        training.Stage(
            classifier,
            Triples(images, targets, clips["train"], recipe.batch_size, options.seed),
            validation_batches(images[-2000:], targets[-2000:], clips["validation"]),
        ),
    )

    model = round_weights(classifier.model.cpu()).eval()
    test = mnist_training.load(options.data_dir, "test")
    with torch.inference_mode():
        report = {
            "model": "avdigits",
            "data": {
                "name": "MNIST, FSDD, phrases",
                "train": {"images": len(images), "clips": len(clips["train"].targets)},
                "test": {"images": len(test[0]), "clips": len(clips["test"].targets), "speaker": TEST_SPEAKER},
            },
            **measure(model, *test, clips["test"]),
            "validation": {
                "speaker": VALIDATION_SPEAKER, **measure(model, images[-2000:], targets[-2000:], clips["validation"])
            },
        }  # fmt: skip
        report["validation"].pop("confusion_matrix")
    training.save(options, model, LABELS, recipe, seconds, report)


if __name__ == "__main__":
    main()
