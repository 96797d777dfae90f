"""Measure the figures in the README, on this machine.

    python .ci/bench.py                 speed beside the tutorial's way and the usual script's
    python .ci/bench.py --growth        speed by the size of the pictures and by workers
    python .ci/bench.py --article DIR   accuracy of the tutorial's recipe on a folder of pictures

Ratios count; absolute figures are this machine's, today. Nothing else should run beside it.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import classify  # noqa: E402

BATCH, STEPS, ROUNDS = 128, 16, 3


class PilPictures(Dataset):
    """Pictures that are turned into tensors one by one, as torchvision's data sets do it."""

    def __init__(self, pixels, labels, steps):
        self.pixels, self.labels, self.transform = pixels, labels, transforms.Compose(steps)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])


PLAIN = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
AUGMENTED = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *PLAIN]


def common_way(steps, workers):
    """Return a function that trains one short epoch the common way; it returns images/s."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (BATCH * STEPS, 32, 32, 3), dtype=np.uint8)
    pictures = PilPictures(pixels, rng.integers(0, 10, len(pixels)), steps)
    loader = DataLoader(pictures, BATCH, shuffle=True, num_workers=workers)
    model = torchvision.models.resnet18(num_classes=10)
    optimizer, criterion = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()

    def epoch():
        start = time.perf_counter()
        for inputs, labels in loader:
            optimizer.zero_grad()
            criterion(model(inputs), labels).backward()
            optimizer.step()
        return len(pixels) / (time.perf_counter() - start)

    return epoch


def bare_step():
    """Return a function that repeats our model's training step on one batch; images/s."""
    model = classify.build_model(10, "none").train()
    criterion, optimizer, scheduler = classify.make_optimizer(model, 0.001, 10**6)
    pixels = torch.randint(0, 256, (BATCH, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    mean, deviation = classify.IMAGENET
    inputs, labels = (pixels - mean) / deviation, torch.randint(0, 10, (BATCH,))

    def epoch():
        start = time.perf_counter()
        for _ in range(STEPS):
            optimizer.zero_grad()
            criterion(model(inputs), labels).backward()
            optimizer.step()
        return BATCH * STEPS / (time.perf_counter() - start)

    return epoch


def program(*flags):
    """Run the program; return the median of images/s over its epochs, as log.csv has them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "classify.py", *flags, "--weights", "none"]
        subprocess.run([*command, "--output", folder], check=True, stdout=subprocess.DEVNULL)
        rows = csv.DictReader(open(Path(folder, "log.csv")))
        return statistics.median(float(row["images_per_second"]) for row in rows)


def speed():
    """Print the table of speeds, the rounds interleaved."""
    ways = {
        "tutorial": common_way(PLAIN, workers=0),
        "usual script": common_way(AUGMENTED, workers=2),
        "bare step": bare_step(),
        "classify.py": lambda: program("--data", "digits", "--epochs", "3"),
    }
    figures = {name: [] for name in ways}
    for name in ("tutorial", "usual script", "bare step"):
        ways[name]()  # warm up
    for _ in range(ROUNDS):
        for name, way in ways.items():
            figures[name].append(way())
    ours = statistics.median(figures["classify.py"])
    for name, values in figures.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.0f} | {ours / median:.2f} |")


def growth():
    """Print images/s for a folder of JPEG pictures of 256 px, by image size and workers."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for index in range(640):
            path = Path(folder, "ab"[index % 2], f"{index}.jpg")
            path.parent.mkdir(exist_ok=True)
            small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            small.resize((256, 256)).save(path)
        for size in (32, 64, 128, 224):
            flags = ["--data", folder, "--epochs", "2", "--batch-size", "64", "--image-size", size]
            row = [program(*map(str, flags), "--workers", str(workers)) for workers in (1, 2)]
            print(f"| {size} | {row[0]:.0f} | {row[1]:.0f} |", flush=True)


def article(folder, size=32, epochs=10):
    """Train the tutorial's recipe, its errors mended, on the very pictures that we train on.

    Adam at a constant 0.001, no augmentation, the model of the last epoch. The step is ours, which
    is the same arithmetic; so the time is better than the tutorial's own.
    """
    pictures = classify.read_data(folder, size)
    loader = classify.make_loader(pictures, None, torch.device("cpu"))
    torch.manual_seed(0)
    model = classify.build_model(len(pictures.classes), "none").train()
    optimizer, criterion = torch.optim.Adam(model.parameters(), fused=True), nn.CrossEntropyLoss()
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        indices = pictures.parts["train"]
        batches = [b.tolist() for b in indices[torch.randperm(len(indices))].split(BATCH)]
        model.train()
        for pixels, labels in classify.load(loader, batches, torch.device("cpu")):
            optimizer.zero_grad()
            criterion(model(pixels / 127.5 - 1), labels).backward()
            optimizer.step()
        right = {}
        model.eval()
        for part in ("val", "test") if epoch == epochs else ("val",):
            batches, right[part] = [b.tolist() for b in pictures.parts[part].split(500)], 0
            with torch.inference_mode():
                for pixels, labels in classify.load(loader, batches, torch.device("cpu")):
                    right[part] += (model(pixels / 127.5 - 1).argmax(1) == labels).sum().item()
        shares = {part: f"{n / len(pictures.parts[part]):.2%}" for part, n in right.items()}
        print(f"epoch {epoch}/{epochs}", shares, f"{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="measure the figures in the README")
    parser.add_argument("--growth", action="store_true", help="by size of pictures and workers")
    parser.add_argument("--article", metavar="DIR", help="the tutorial's recipe on a folder")
    flags = parser.parse_args()
    if flags.article:
        article(flags.article)
    elif flags.growth:
        growth()
    else:
        speed()
