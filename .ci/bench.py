"""Measure the speeds in the README: images per second, the rounds interleaved; ratios count.

python .ci/bench.py         nothing else should run beside it
"""

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

BATCH, STEPS, ROUNDS = 128, 16, 5
PROGRAM = "`python classify.py --data digits`"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NATIVE = classify.has_native_bfloat16(DEVICE)


class Pictures(Dataset):
    """Random pictures that are turned into tensors one by one, as torchvision's data sets do it."""

    def __init__(self, *augmentation):
        normalize = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
        self.transform = transforms.Compose([*augmentation, *normalize])
        self.pixels = np.random.randint(0, 256, (BATCH * STEPS, 32, 32, 3), dtype=np.uint8)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index])), index % 10


def trained(model, batches, bfloat16=False, **options):
    """Return images per second of an epoch of the program's own loop."""
    optimizer = torch.optim.Adam(model.parameters(), **options)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    criterion = nn.CrossEntropyLoss()
    batches = ((images.to(DEVICE), labels.to(DEVICE)) for images, labels in batches)
    start = time.perf_counter()
    classify.train_one_epoch(model, batches, criterion, optimizer, scheduler, bfloat16)
    return BATCH * STEPS / (time.perf_counter() - start)


def program():
    """Return images per second of a run of the program on digits, as log.csv has them."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--data", "digits", "--epochs", "3", "--weights", "none", "--output", folder]
        subprocess.run([sys.executable, ROOT / "classify.py", *flags], check=True, stdout=-3)
        rows = csv.DictReader(open(Path(folder, "log.csv")))
        return statistics.median(float(row["images_per_second"]) for row in rows)


def main():
    """Print a row for each way of training, for the README."""
    tutorial = DataLoader(Pictures(), BATCH, shuffle=True)
    augmentation = transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()
    script = DataLoader(Pictures(*augmentation), BATCH, shuffle=True, num_workers=2)
    images = torch.randn(BATCH, 3, 32, 32, device=DEVICE)
    ready = [(images, torch.randint(0, 10, (BATCH,), device=DEVICE))] * STEPS
    plain = torchvision.models.resnet18(num_classes=10).to(DEVICE)
    ours = classify.build_model(10, "none").to(DEVICE)
    all_taps = classify.build_model(10, "none").to(DEVICE)
    for layer in all_taps.modules():
        if isinstance(layer, classify.Conv3x3):
            layer.__class__ = nn.Conv2d
    ways = {
        "the tutorial's way": lambda: trained(plain, tutorial),
        "the usual CIFAR-10 script": lambda: trained(plain, script),
        "our step on one batch, no data": lambda: trained(ours, ready, NATIVE, fused=True),
        "that step in float32": lambda: trained(ours, ready, fused=True),
        "that step with all taps": lambda: trained(all_taps, ready, NATIVE, fused=True),
        PROGRAM: program,
    }
    able = [name for name, has in torch.cpu.get_capabilities().items() if has is True]
    able = sorted(set(able) & {"avx2", "avx512_f", "avx512_bf16", "amx_bf16", "bf16"})
    if DEVICE.type == "cuda":
        able = [torch.cuda.get_device_name()]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {' '.join(able)}")
    figures = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, way in ways.items():
            figures[name].append(way())
    medians = {}
    for name, values in figures.items():
        medians[name] = statistics.median(values[1:])  # the first is a warm-up
    for name, median in medians.items():
        print(f"| {name} | {median:.0f} | {medians[PROGRAM] / median:.2f} |")


if __name__ == "__main__":
    main()
