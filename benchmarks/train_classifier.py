"""Train the classifier whose features measure the digits, and write it to the assets of the package.

    python benchmarks/train_classifier.py [--out FOLDER]

Takes a minute on one core. With one thread and seeded weights and batches, the same machine and torch give the same file, bit
for bit. It trains on the training part; the accuracy is that on the held-out part.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tinyfusion.config.recipe import TrainingSection
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.core.rundir import atomic_write, write_json
from tinyfusion.data.batches import ArrayBatch, ShuffledBatches
from tinyfusion.data.digits import ImageSet
from tinyfusion.evaluate.features import ClassifierArch, ClassifierFeatures, SmallClassifier
from tinyfusion.jobs.assemble import image_set
from tinyfusion.processes.base import Objective, Prediction
from tinyfusion.sample.drive import to_uint8
from tinyfusion.training.loop import train_steps
from tinyfusion.training.optim import ParameterGroup
from tinyfusion.training.state import TrainState

NAME = "digits-classifier"
SEED = 0
AUGMENT = 0.5
WIDTHS = {"digits": (32, 64, 96)}  # by data set; colour pictures need more
SETTINGS = TrainingSection(
    steps=2500,
    batch_size=128,
    learning_rate=2e-3,
    learning_rate_end_share=0.01,
    warmup_steps=100,
    weight_decay=0.02,
    ema_decay=0.99,
)
SHIPPED = Path(__file__).resolve().parents[1] / "src" / "tinyfusion" / "assets" / NAME


class Classification(Objective):
    """The training objective: cross entropy, nothing random."""

    def draw(self, batch: ArrayBatch, draws: Draws) -> ArrayBatch:
        """The batch unchanged."""
        return batch

    def predict(self, model: nn.Module, noisy: ArrayBatch) -> Prediction:
        """Logits (B, K)."""
        return Prediction(model(noisy.x))

    def losses(self, model: nn.Module, noisy: ArrayBatch, prediction: Prediction) -> dict[str, Tensor]:
        """Cross entropy per image, in nats."""
        return {"loss": F.cross_entropy(prediction.output, noisy.condition["labels"], reduction="none")}


def as_measured(images: ImageSet) -> ImageSet:
    """The digits as the metrics see them: converted to uint8 and back."""
    pixels = to_uint8(torch.from_numpy(images.x))
    x = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    return ImageSet(images.name, x, images.y, images.num_classes)


def initialise(classifier: SmallClassifier, seed: int) -> None:
    """Set Kaiming-normal weights and zero biases from a separate generator."""
    generator = torch.Generator().manual_seed(Randomness(seed).generator_seed("initial-weights"))
    for parameter in classifier.parameters():
        if parameter.ndim > 1:
            std = math.sqrt(2 / parameter[0].numel())
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
        else:
            nn.init.zeros_(parameter)


def trained(
    images: ImageSet, arch: ClassifierArch, settings: TrainingSection, seed: int, flip: float = 0.0
) -> SmallClassifier:
    """A classifier with the moving average of its weights."""
    with torch.random.fork_rng(devices=[]):  # torch fills new layers from its global generator
        classifier = SmallClassifier(arch)
    initialise(classifier, seed)
    state = TrainState(
        classifier, [ParameterGroup(dict(classifier.named_parameters()), settings.learning_rate)], settings
    )
    source = ShuffledBatches(as_measured(images), Randomness(seed), torch.device("cpu"), AUGMENT, flip)
    for record in train_steps(state, Classification(), source, settings, Randomness(seed)):
        if record.step % settings.log_every_steps == 0:
            print(f"step {record.step:5d}  loss {float(record.terms['loss']):.4f}", flush=True)
    classifier.load_state_dict(state.ema.average)
    return classifier


def accuracy(extractor: ClassifierFeatures, images: ImageSet) -> float:
    """Share of images whose class is the largest logit."""
    logits = extractor(to_uint8(torch.from_numpy(images.x))).logits
    return float((logits.argmax(1) == images.y).mean())


def main() -> None:
    """Train, evaluate and write the classifier."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--heldout", default="digits:heldout")
    parser.add_argument("--size", type=int, help="side to which parquet images are reduced")
    parser.add_argument("--name", default=NAME)
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument(
        "--out", type=Path, default=SHIPPED, help="folder to write (default: where the package ships it)"
    )
    options = parser.parse_args()
    if options.data != "digits" and options.out == SHIPPED:
        parser.error("--out: give a folder; the default is the digits classifier's place")
    torch.set_num_threads(1)
    flush_denormals()
    images, heldout = image_set(options.data, options.size), image_set(options.heldout, options.size)
    channels, side = images.x.shape[1:3]
    arch = ClassifierArch(side, channels, WIDTHS.get(options.data, (48, 96, 128)), images.num_classes)
    settings = dataclasses.replace(SETTINGS, steps=options.steps)
    classifier = trained(images, arch, settings, SEED, flip=0.5 if channels == 3 else 0.0)
    extractor = ClassifierFeatures(options.name, classifier, arch)
    record = {
        "format_version": 1,
        "name": options.name,
        "arch": dataclasses.asdict(arch),
        "hash": extractor.hash,
        "heldout_accuracy": accuracy(extractor, heldout),
        "training_accuracy": accuracy(extractor, images),
        "training": {**dataclasses.asdict(settings), "seed": SEED, "augment": AUGMENT, "data": Path(options.data).name},
        "torch": torch.__version__.partition("+")[0],
        "license": "Apache-2.0",
    }
    with atomic_write(options.out) as temporary:
        temporary.mkdir(parents=True)
        save_file(
            {name: t.contiguous() for name, t in classifier.state_dict().items()}, temporary / "classifier.safetensors"
        )
        write_json(temporary / "classifier.json", record)
    print({key: record[key] for key in ("hash", "heldout_accuracy", "training_accuracy")})


if __name__ == "__main__":
    main()
