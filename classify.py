"""Train ResNet18 to classify pictures, test it, and use it: the whole pipeline in one file.

    python classify.py --epochs 10                  CIFAR-10; without a network, digits
    python classify.py --data PICTURES --epochs 10  your own pictures: PICTURES/CLASS/*.jpg
    python classify.py --predict photo.jpg          with the best model so far

It reads from top to bottom as the work goes: 1 data, 2 model, 3 loss and 4 optimizer, 5 training,
6 evaluation, 7 prediction; then what is saved, several processes, what is said, flags, and `main`.
"""

import argparse
import atexit
import contextlib
import math
import os
import shutil
import signal
import socket
import sys
import time
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFile, ImageFont, ImageOps
from torch import distributed as dist, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, models, utils
from torchvision.transforms.v2 import functional as transforms

NETWORK_TIMEOUT = 15  # seconds that a server may stay silent
# which process this is and of how many, under torchrun
RANK, WORLD = (int(os.getenv(name, least)) for name, least in (("RANK", 0), ("WORLD_SIZE", 1)))
# mean and deviation of the pixels, from 0 to 255, that the ImageNet weights were trained with
IMAGENET = 255 * torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
ImageFile.LOAD_TRUNCATED_IMAGES = True  # a photo that breaks off is used as far as it goes
warnings.filterwarnings("ignore", module="PIL")  # it warns of oddities in files that it reads well


class Problem(Exception):
    """What stops the program, in one line that says what to do; `code` is the exit code."""

    def __init__(self, message, code=2):
        super().__init__(message.split("Problem: ")[-1].strip())  # loader workers add a traceback
        self.code = code


@contextlib.contextmanager
def explain(message, code=2):
    """Turn whatever fails in a block (networks, disks, strange files) into a `Problem`."""
    try:
        yield
    except Exception as error:
        # torch.save wraps what the disk says, and Ctrl-C: it is the context
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        reason = getattr(error.__context__ or error, "strerror", None) or str(error) or repr(error)
        raise Problem(f"{message} ({reason.splitlines()[0][:200]})", code) from error


def require(condition, message):
    """Raise a `Problem` unless a condition holds."""
    if not condition:
        raise Problem(message)


def attempt(function, *args):
    """Return a function's result and None, or None and the `Problem` that it raised."""
    try:
        return function(*args), None
    except Problem as problem:
        return None, problem


# ---- 1. data: read, split, convert ---------------------------------------------------------------


class Pictures(SimpleNamespace, Dataset):
    """A data set. It holds pixels only, and an item is a whole batch, asked for by its indices.

    name:   what --data says
    pixels: uint8 N×H×W×3 in memory, or the names of N files, decoded when they are asked for
    labels: int64 N, positions in `classes`
    parts:  the indices of "train", "val" and "test", which share no picture
    crc:    a checksum of the pixels or the files' names, by which a resumed run knows its data
    mirror: whether a mirrored picture is still one of its class (a photo is, a digit is not)
    size:   the side to which pictures are brought, in pixels
    """

    def __getitem__(self, indices):
        """Return uint8 B×3×H×W and labels B; raises `Problem` if a file cannot be decoded."""
        pixels = np.stack([decode(self.pixels[index], self.size) for index in indices])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(self.labels[indices])


def read_data(name, size):
    """Return the `Pictures` of a named set, of a folder, or for "auto" of the first to be had."""
    if name == "auto":
        pictures, problem = attempt(read_data, "cifar10", size)
        if problem:
            warn(problem, "Training on drawn DIGITS instead, which say nothing about photos.")
        return pictures or read_data("digits", size)
    readers = {"cifar10": read_cifar, "cifar100": read_cifar, "digits": draw_digits}
    pixels, labels, parts, classes = readers.get(name, read_folder)(name)
    labels, size = np.array(labels), size or (32 if name in readers else 224)
    parts, mirror = split_off_missing(labels, parts, classes, name), name != "digits"
    data = {"name": name, "pixels": pixels, "labels": labels, "parts": parts, "classes": classes}
    return Pictures(**data, crc=zlib.crc32(np.array(pixels).tobytes()), mirror=mirror, size=size)


def read_cifar(name):
    """Return pixels, labels, parts and classes of CIFAR-10 or CIFAR-100, fetched if need be."""
    dataset = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder = Path("data").absolute()
    progress = sys.stderr if sys.stderr.isatty() else open(os.devnull, "w")  # no bar in a log
    hint = f"{name} is not in {folder} and cannot be fetched; try later or use --data"
    with explain(hint), contextlib.redirect_stderr(progress):
        train, test = (dataset(folder, train, download=True) for train in (True, False))
    pixels = np.concatenate([train.data, test.data])
    parts = ["train"] * len(train) + ["test"] * len(test)
    return pixels, train.targets + test.targets, parts, train.classes


def draw_digits(name):
    """Return pixels, labels, parts and classes of 6,000 drawn pictures of the ten digits."""
    pixels, labels = [], [index % 10 for index in range(6000)]
    streams = [np.random.default_rng(0)] * 5000 + [np.random.default_rng(1)] * 1000
    for label, rng in zip(labels, streams):
        glyph, font = Image.new("L", (32, 32)), ImageFont.load_default(rng.integers(18, 29))
        ImageDraw.Draw(glyph).text(rng.uniform(13, 19, 2), str(label), 255, font, anchor="mm")
        ink = np.asarray(glyph.rotate(rng.uniform(-20, 20), Image.BILINEAR))[:, :, None] / 255
        front, back = rng.permutation([rng.integers(0, 100, 3), rng.integers(156, 256, 3)])
        picture = front * ink + back * (1 - ink) + rng.normal(0, 12, (32, 32, 3))
        pixels.append(picture.clip(0, 255).astype(np.uint8))
    return np.stack(pixels), labels, ["train"] * 5000 + ["test"] * 1000, list("0123456789")


def read_folder(root):
    """Return paths, labels, parts and classes of ROOT/train|val|test/CLASS/* or ROOT/CLASS/*."""
    root, found, broken = Path(root), [], []
    folders = {part: root / part for part in ("train", "val", "test") if (root / part).is_dir()}
    if "train" not in folders or not subfolders(root / "train"):
        folders = {"train": root}
    classes = sorted(set().union(*map(subfolders, folders.values())))  # of all parts alike
    require(len(classes) > 1, f"{root} needs two or more folders of pictures, one for each class")
    for part, folder in folders.items():
        for label, name in enumerate(classes):
            files = {path: attempt(check_header, path)[1] for path in visible(folder / name)}
            broken += filter(None, files.values())
            readable = [str(path) for path, problem in files.items() if not problem]
            require(readable, f"there are no pictures in {folder / name}; add some or remove it")
            found += [(path, label, part) for path in readable]
    if broken:
        warn(f"files left out: {len(broken)}", *broken)
    return *zip(*found), classes


def visible(folder):
    """Return the sorted entries of a folder that are not hidden."""
    with explain(f"cannot read the folder {folder}; add it, or name another"):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def subfolders(folder):
    """Return the names of the visible folders in a folder."""
    return [path.name for path in visible(folder) if path.is_dir()]


def check_header(path):
    """Raise `Problem` if a file is no picture, as far as its header tells."""
    with explain(f"{path}: no picture"):
        require(path.is_file(), "not a file")  # a pipe would never answer
        Image.open(path).close()


def decode(path, size):
    """Return a picture file as uint8 size×size×3: upright, its shorter side `size`, its middle.

    What is in memory as pixels already is returned as it is.
    """
    if isinstance(path, np.ndarray):
        return path
    with explain(f"{path} cannot be read as a picture; give another"), Image.open(path) as image:
        image.draft("RGB", (size, size))  # lets the JPEG reader skip detail that is not needed
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
            image = Image.fromarray(np.uint8(np.asarray(image).clip(0, 65535) // 256))
        return np.array(ImageOps.fit(image.convert("RGB"), (size, size)))


def split_off_missing(labels, parts, classes, source):
    """Return the indices of each part; one without pictures gets a tenth of each class."""
    missing = [part for part in ("val", "test") if part not in parts]
    parts, rng = np.array(parts), np.random.default_rng(0)  # not --seed: the split is the same
    for label, name in enumerate(classes):
        own = rng.permutation(np.flatnonzero((parts == "train") & (labels == label)))
        tenth = max(1, round(len(own) / 10))
        require(len(own) > tenth * len(missing), f"{source}: class {name!r} is too small to split")
        for number, part in enumerate(missing):
            parts[own[number * tenth :][:tenth]] = part
    return {p: torch.from_numpy(np.flatnonzero(parts == p)) for p in ("train", "val", "test")}


def make_loader(pictures, workers, device):
    """Return the one loader of a run; an item of it is a batch, and `load` says which it reads."""
    if workers is None:
        workers = 0 if isinstance(pictures.pixels, np.ndarray) else min(8, os.cpu_count() or 1)
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    options |= {"worker_init_fn": leave_interrupts, "pin_memory": device.type == "cuda"}
    # a generator of its own, for the global one is for training
    return DataLoader(pictures, batch_size=None, sampler=[], generator=torch.Generator(), **options)


def leave_interrupts(worker):
    """Let the main process alone answer Ctrl-C, and a worker go without a traceback after it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *error: None


def load(loader, batches, device):
    """Yield pixels (uint8 B×3×S×S) and labels (int64 B) on `device` for each list of indices."""
    loader.sampler[:] = batches
    for pixels, labels in loader:
        # what was a file has that size already
        pixels = transforms.resize(pixels.to(device, non_blocking=True), [loader.dataset.size] * 2)
        yield pixels, labels.to(device, non_blocking=True)


def augment(pixels, mirror):
    """Shift each picture by up to a thirty-second of its side, repeating its edge; mirror half."""
    count, side, device = len(pixels), pixels.shape[-1], pixels.device
    shift = torch.randint(-(side // 32), side // 32 + 1, (2, count, 1), device=device)
    rows, columns = (torch.arange(side, device=device) + shift).clamp(0, side - 1)  # count×side
    if mirror:
        columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns.flip(1), columns)
    picture = torch.arange(count, device=device)[:, None, None]
    return pixels[picture, :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


# ---- 2. model: ResNet18 with its head replaced ---------------------------------------------------


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution that leaves out the taps of its kernel which see nothing but padding.

    At 32 px ResNet18 ends on maps of 2×2 and 1×1 pixels. Where the output is one pixel only, up
    to eight of its nine taps multiply zeros, and the others are a plain matrix product: the same
    outputs and gradients in half the time a step takes.
    """

    def forward(self, x):
        """Return B×C×H×W for B×C×H×W."""
        if max(x.shape[2:]) > self.stride[0] or self.groups > 1:
            return super().forward(x)
        # channels last, as they lie in memory: so the gradient needs no rearranging
        seen = self.weight.permute(0, 2, 3, 1)[:, 1 : 1 + x.shape[2], 1 : 1 + x.shape[3]].flatten(1)
        pixels = x.permute(0, 2, 3, 1).flatten(1)
        return nn.functional.linear(pixels, seen, self.bias)[:, :, None, None]


def build_model(num_classes, weights):
    """Return a ResNet18 that gives B×num_classes logits for normalised B×3×H×W pictures.

    weights: "none" for random ones, "imagenet" for torchvision's, from its cache or fetched;
    raises `Problem` if these cannot be had. The `state_dict` is torchvision's, key for key.
    """
    model = models.resnet18()
    if weights == "imagenet":
        with explain("the ImageNet weights cannot be had; try later or use --weights none"):
            pretrained = models.ResNet18_Weights.IMAGENET1K_V1
            options = {"progress": sys.stderr.isatty(), "check_hash": True, "weights_only": True}
            model.load_state_dict(pretrained.get_state_dict(**options))
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.padding == (1, 1):
            conv.__class__ = Conv3x3  # the same parameters, another forward
    return model.to(memory_format=torch.channels_last)


def start_model(num_classes, weights, freeze, seed):
    """Return the model to train and what its weights are, "imagenet" or "none"."""
    if weights == "auto":
        started, problem = attempt(start_model, num_classes, "imagenet", freeze, seed)
        if problem:
            require(not freeze, str(problem))
            warn(problem, "Starting from RANDOM weights instead, which need more pictures.")
        return started or start_model(num_classes, "none", freeze, seed)
    torch.manual_seed(hash((seed,)))
    model = build_model(num_classes, weights)
    model.requires_grad_(not freeze).fc.requires_grad_(True)
    return model, weights


def classify(model, pixels):
    """Return the logits (float B×C) of uint8 pictures, by bfloat16 on CUDA cards that have it."""
    mean, deviation = IMAGENET.to(pixels.device, non_blocking=True)
    able = pixels.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=able):
        return model((pixels - mean) / deviation).float()


# ---- 3. loss and 4. optimizer --------------------------------------------------------------------


def make_optimizer(model, lr, steps):
    """Return cross entropy, Adam over what is not frozen, and a schedule for `steps` batches.

    One cycle: the rate rises to `lr` for three tenths of the steps, then falls to almost nothing
    (Smith and Topin, "Super-Convergence", 2018). Labels are smoothed (Szegedy and others, 2016),
    and weights decay apart from the gradient (Loshchilov and Hutter, 2019).
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.Adam(trained, lr, fused=True, weight_decay=0.2, decoupled_weight_decay=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(adam, lr, total_steps=steps)
    return nn.CrossEntropyLoss(label_smoothing=0.1), adam, scheduler


# ---- 5. training ---------------------------------------------------------------------------------


def train(model, loader, batches, criterion, optimizer, scheduler, show):
    """Train for one epoch; return its mean loss and images a second, as log.csv calls them.

    `show` is called with the number of the batch and its loss; beside it nothing waits for the
    device.
    """
    device, total, start = next(model.parameters()).device, 0, time.perf_counter()
    model.train(all(weight.requires_grad for weight in model.parameters()))  # frozen: no statistics
    for number, (pixels, labels) in enumerate(load(loader, batches, device), 1):
        loss = criterion(classify(model, augment(pixels, loader.dataset.mirror)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler.last_epoch + 1 < scheduler.total_steps:  # resumed, there may be more batches
            scheduler.step()
        total += loss.detach() * len(labels)
        show(number, loss)
    total, count = map(sum, zip(*gather((float(total), sum(map(len, batches))))))
    return {"train_loss": total / count, "images_per_second": count / (time.perf_counter() - start)}


def fit(model, loader, run, flags, output):
    """Train from where `run` stands, saving it into `output` before the start and each epoch.

    Nothing random passes from one epoch to the next: each seeds itself from --seed and its
    number. So a run that was interrupted ends in the same bits as one that was not.
    """
    history, parts = run["history"], loader.dataset.parts
    steps = flags.epochs * len(deal(parts["train"], flags, epoch=0))
    criterion, optimizer, scheduler = make_optimizer(model, flags.lr, steps)
    stateful = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    with explain(f"{output / 'last.pth'} is of another model or program; start a new run"):
        for name in stateful.keys() & run.keys():
            stateful[name].load_state_dict(run[name])
    replica = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    once(save_run, run, stateful, output)
    while len(history) < flags.epochs and standing(history)[1] < (flags.patience or math.inf):
        start, epoch = time.perf_counter(), len(history) + 1
        row = dict.fromkeys(LOG) | {"epoch": epoch, "learning_rate": scheduler.get_last_lr()[0]}
        batches = deal(parts["train"], flags, epoch)
        show = progress(f"epoch {epoch}/{flags.epochs}", len(batches), flags.batch_size)
        row |= train(replica, loader, batches, criterion, optimizer, scheduler, show)
        for buffer in model.buffers():  # the same batch-norm statistics on all processes
            buffer.copy_(sum(gather(buffer.cpu())) / WORLD)
        if epoch % flags.validate_every == 0 or epoch == flags.epochs:
            row["val_loss"], confusion, _ = evaluate(model, loader, "val", flags.batch_size)
            row["val_accuracy"] = confusion.trace().item() / confusion.sum().item()
        history.append(row | {"seconds": time.perf_counter() - start})
        once(save_run, run, stateful, output)
        show_line("")
        print(epoch_line(history, flags.epochs), flush=True)


def deal(indices, flags, epoch):
    """Return this process's share of each batch of an epoch, and seed what is random in it.

    A last batch is left out if a process would get fewer than the two pictures batch-norm needs.
    """
    torch.manual_seed(hash((flags.seed, epoch)))  # the same order on all processes
    batches = indices[torch.randperm(len(indices))].split(flags.batch_size)
    torch.manual_seed(hash((flags.seed, epoch, RANK)))  # augmentation of their own
    return [batch[RANK::WORLD].tolist() for batch in batches if len(batch) // WORLD > 1]


def standing(history):
    """Return the row of the best validation, the earliest of equals, and how many came since."""
    validated = [row for row in history if row["val_accuracy"] is not None]
    best = max(validated, key=lambda row: row["val_accuracy"], default=None)
    return best, len(validated) - 1 - validated.index(best) if best else 0


# ---- 6. evaluation -------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(model, loader, part, batch_size):
    """Return mean loss, confusion (int64 C×C, true × predicted) and surest mistakes on a part.

    A mistake is its confidence, true label, predicted label and pixels (uint8 3×S×S). Each process
    counts its own share of the pictures; the results are those of all.
    """
    device, classes = next(model.parameters()).device, len(loader.dataset.classes)
    share = loader.dataset.parts[part][RANK::WORLD]
    batches = [batch.tolist() for batch in share.split(batch_size) if len(batch)]
    loss, confusion, mistakes = 0, torch.zeros(classes**2, dtype=torch.int64), []
    model.eval()
    for pixels, labels in load(loader, batches, device):
        logits = classify(model, pixels)
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        confidence, predicted = logits.softmax(1).max(1)
        confusion += torch.bincount(labels * classes + predicted, minlength=classes**2).cpu()
        columns = (c[predicted != labels].cpu() for c in (confidence, labels, predicted, pixels))
        mistakes = surest([*mistakes, *zip(*columns)])
    losses, confusions, mistakes = zip(*gather((loss, confusion, mistakes)))
    confusion = sum(confusions).view(classes, classes)
    return sum(losses) / confusion.sum().item(), confusion, surest(sum(mistakes, []))


def surest(mistakes):
    """Return the 32 mistakes of the greatest confidence, cut loose from their batches."""
    return [(*row, pixels.clone()) for *row, pixels in sorted(mistakes, key=lambda m: -m[0])[:32]]


def report(confusion, names):
    """Return the lines that tell accuracy, each class's scores, and what is confused most."""
    right, true, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    precision, recall = right / predicted.clamp(min=1), right / true.clamp(min=1)
    scores = torch.stack([precision, recall, 2 * right / (true + predicted).clamp(min=1)], dim=1)
    width = max(len(name) for name in [*names, "class"])
    lines = [f"test accuracy {right.sum() / true.sum():.2%} ({right.sum()} of {true.sum()})", ""]
    lines += [f"{'class':{width}}  precision  recall      F1   count"]
    scores, counts = [*scores, scores.mean(0)], [*true, true.sum()]
    for name, (p, r, f1), count in zip([*names, "mean"], scores, counts):
        lines += [f"{name:{width}}  {p:9.4f}  {r:6.4f}  {f1:6.4f}  {count:6}"]
    wrong = (confusion - right.diag()).flatten()
    counts, places = wrong.topk(min(5, len(wrong)))
    lines += ["", "most often confused (true -> predicted):"] * bool(wrong.any())
    for count, place in zip(counts[counts > 0].tolist(), places.tolist()):
        lines += [f"{names[place // len(names)]} -> {names[place % len(names)]} {count}"]
    return lines


def draw_mistakes(mistakes, names, path):
    """Write a picture of the mistakes, each with its true and its predicted class below.

    Without mistakes an older picture is removed. Returns a line that tells what was done.
    """
    if not mistakes:
        path.unlink(missing_ok=True)
        return "no mistakes, so no picture of them"
    font, tiles = ImageFont.load_default(13), []
    for confidence, true, predicted, pixels in mistakes:
        times, picture = max(1, 192 // pixels.shape[-1]), transforms.to_pil_image(pixels)
        tile = ImageOps.scale(picture, times, Image.NEAREST)
        tile = tile.crop((0, 0, max(tile.width, 192), tile.height + 22))  # the rest is black
        for cut in range(40, 0, -1):  # letters of each name, until the line fits
            text = f"{names[true][:cut]} -> {names[predicted][:cut]} {confidence:.0%}"
            if font.getlength(text) < tile.width - 4:
                break
        ImageDraw.Draw(tile).text((2, tile.height - 19), text, "white", font)
        tiles.append(transforms.pil_to_tensor(tile))
    sheet = transforms.to_pil_image(utils.make_grid(tiles, padding=4))
    write(path, lambda file: sheet.save(file, "png"))
    return f"the surest mistakes are drawn in {path}"


# ---- 7. prediction -------------------------------------------------------------------------------


@torch.inference_mode()
def predict(files, path, device):
    """Print the likeliest classes of each picture file; return the exit code."""
    (model, best), code = load_best(path), 0
    for file in files:
        pixels, problem = attempt(decode, file, best["image_size"])
        if problem:
            code = min(1, complain(problem))
            continue
        pixels = torch.from_numpy(pixels).to(device).permute(2, 0, 1)
        shares = classify(model.to(device), pixels[None])[0].softmax(0)
        likeliest = zip(*shares.topk(min(3, len(shares))))
        guesses = [f"{printable(best['classes'][label])} {share:.1%}" for share, label in likeliest]
        print(printable(file), *guesses, sep="  ", flush=True)
    return code


# ---- what is saved -------------------------------------------------------------------------------

LOG = "epoch train_loss val_loss val_accuracy learning_rate images_per_second seconds".split()
BEST = {"model": dict, "classes": list, "image_size": int, "epoch": int, "val_accuracy": float}
LAST = {"model": dict, "optimizer": dict, "scheduler": dict, "history": list, "flags": dict}
LAST |= {"classes": list, "crc": int}


def write(path, put):
    """Let `put(file)` write a file that takes the place of an older one when it is whole."""
    temporary = path.with_name(path.name + ".tmp")
    with explain(f"cannot write {path}; make room, then go on with --resume", code=1):
        with open(temporary, "wb") as file:
            put(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def save_run(run, stateful, output):
    """Write log.csv, last.pth and, if the last epoch is the best, best_model.pth.

    In this order: a run that was killed in between writes its best model when it is resumed. As
    long as a run has none, a best_model.pth is an earlier run's, and is set aside.
    """
    history, best_path = run["history"], output / "best_model.pth"
    if history and not math.isfinite(history[-1]["train_loss"] + (history[-1]["val_loss"] or 0)):
        raise Problem("the loss is no longer a number; start again with a lower --lr", code=1)
    rows = [LOG, *([("" if row[key] is None else row[key]) for key in LOG] for row in history)]
    table = "".join(",".join(map(str, row)) + "\n" for row in rows)
    write(output / "log.csv", lambda file: file.write(table.encode()))
    run |= {name: part.state_dict() for name, part in stateful.items()}
    write(output / "last.pth", lambda file: torch.save(run, file))
    best = standing(history)[0]
    if best is None and best_path.exists():
        os.replace(best_path, output / "best_model.previous.pth")
        print(f"the best model of an earlier run is now {output / 'best_model.previous.pth'}")
    elif best and best is history[-1]:
        model = {key: (run | run["flags"] | best)[key] for key in BEST}
        write(best_path, lambda file: torch.save(model, file))


def load_checkpoint(path, kinds):
    """Return a checkpoint that has these keys and kinds of values; nothing in it is executed."""
    with explain(f"cannot use {path}; train first, or name its folder with --output"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        require(all(isinstance(checkpoint[k], t) for k, t in kinds.items()), "not of this program")
        return {key: checkpoint[key] for key in kinds}


def load_best(path):
    """Return the model in a best_model.pth, on the CPU, to evaluate, and what else is in it."""
    best = load_checkpoint(path, BEST)
    with explain(f"{path} is damaged, or of another model or program; train again"):
        model = build_model(len(best["classes"]), "none").eval()
        model.load_state_dict(best["model"])
    return model, best


# ---- several processes, under torchrun; a single one passes through unchanged --------------------


def gather(value):
    """Return the values of all processes, in the order of their numbers."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def once(function, *args):
    """Call a function on process 0 alone; return its result, or end with its `Problem`, on all."""
    outcome = [attempt(function, *args) if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(outcome)
    result, problem = outcome[0]
    if problem:
        raise problem if RANK == 0 else SystemExit(problem.code)
    return result


# ---- what is said --------------------------------------------------------------------------------


def printable(text):
    """Return a text with whatever would break its line escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def warn(*lines):
    """Write a warning on stderr that cannot be overlooked."""
    lines = ["warning: " + printable(line) for line in lines]
    print("=" * 80, *lines, "=" * 80, sep="\n", file=sys.stderr, flush=True)


def complain(problem):
    """Write an error on stderr; return its exit code."""
    show_line("")
    print(f"error: {printable(problem)}", file=sys.stderr, flush=True)
    return problem.code


def show_line(text):
    """Rewrite one line of a terminal on stderr ("" clears it); without a terminal do nothing."""
    if sys.stderr.isatty() and RANK == 0:
        width = shutil.get_terminal_size().columns - 1
        print(f"{text[:width]:{width}}\r", end="", file=sys.stderr, flush=True)


def progress(title, batches, batch_size):
    """Return a function for `train` that shows at most once a second how far the epoch is."""
    start = shown = time.monotonic()

    def show(number, loss):
        nonlocal shown
        if sys.stderr.isatty() and time.monotonic() - shown > 1:
            shown = time.monotonic()
            speed = number / (shown - start)
            left = time.strftime("%H:%M:%S", time.gmtime((batches - number) / speed))
            done = f"{title}  batch {number}/{batches}  loss {loss.item():.4f}"
            show_line(f"{done}  {batch_size * speed:.0f} images/s  {left} left")

    return show


def epoch_line(history, epochs):
    """Return the line that tells of the last epoch."""
    row = history[-1]
    line = f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}  train loss {row['train_loss']:.4f}"
    if row["val_accuracy"] is not None:
        line += f"  val loss {row['val_loss']:.4f}  val accuracy {row['val_accuracy']:.2%}"
    line += f"  {row['images_per_second']:.0f} images/s  {row['seconds']:.1f} s"
    return line + "  (best)" * (row is standing(history)[0])


def describe(pictures, workers, model, device, run):
    """Return what was chosen, to be read before the work starts."""
    sizes = ", ".join(f"{len(indices)} {part}" for part, indices in pictures.parts.items())
    names = ", ".join(pictures.classes[:10]) + ", …" * (len(pictures.classes) > 10)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return f"""\
data     {printable(pictures.name)}: {sizes}, {pictures.size} x {pictures.size} pixels
classes  {len(pictures.classes)}: {printable(names)}
device   {device}, loader workers: {workers}, processes: {WORLD}
weights  {run["flags"]["weights"]}, {trained:,} parameters to train"""


# ---- flags ---------------------------------------------------------------------------------------


DATA = "cifar10, cifar100, digits, or a folder: DIR/CLASS/* or DIR/train|val|test/CLASS/*"
WEIGHTS, DEVICES = ["auto", "imagenet", "none"], ["auto", "cuda", "cpu"]
LEAST = {"image_size": 1, "epochs": 1, "batch_size": 2, "lr": 1e-12, "validate_every": 1}


def make_parser():
    """Return the parser of the flags; in brackets what is taken if one is left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument_group("what to learn from").add_argument
    add("--data", default="auto", metavar="NAME|DIR", help=f"{DATA} (auto: cifar10, else digits)")
    add("--image-size", type=int, metavar="PX", help="side of the pictures (32; of a folder: 224)")
    add = parser.add_argument_group("how to learn").add_argument
    add("--epochs", type=int, default=10, metavar="N", help="times through the pictures (10)")
    add("--batch-size", type=int, default=128, metavar="N", help="pictures in a step (128)")
    add("--lr", type=float, default=0.001, help="learning rate at its peak (0.001)")
    add("--weights", default="auto", choices=WEIGHTS, help="to start from (imagenet, else none)")
    add("--freeze", action="store_true", help="train the new head alone (train all)")
    add("--validate-every", type=int, default=1, metavar="N", help="validate every N epochs (1)")
    add("--patience", type=int, default=5, metavar="N", help="stop after N validations in vain (5)")
    add("--seed", type=int, default=0, metavar="N", help="same seed, same result (0)")
    add = parser.add_argument_group("where and how to run").add_argument
    add("--device", default="auto", choices=DEVICES, help="where to compute (cuda, else cpu)")
    add("--workers", type=int, metavar="N", help="processes that decode pictures (chosen)")
    add("--output", default="checkpoint", metavar="DIR", help="where all is written (checkpoint)")
    add = parser.add_argument_group("afterwards").add_argument
    add("--resume", action="store_true", help="go on with the run in --output as it was started")
    add("--predict", nargs="+", metavar="IMAGE", help="classify these by the model in --output")
    return parser


def parse_flags(argv):
    """Return all flags, and as a dictionary those given; exits with 2 if one cannot be."""
    parser = make_parser()
    flags = parser.parse_args(argv)
    for name, value in vars(flags).items():
        if isinstance(value, (int, float)) and not LEAST.get(name, 0) <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: give {LEAST.get(name, 0)} or more")
    require(not flags.freeze or flags.weights != "none", "--freeze needs --weights imagenet")
    # once more, without defaults: what is not None was given
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(flags)))))
    return flags, {name: value for name, value in given.items() if value is not None}


def resumed_flags(flags, given, run):
    """Return the flags of the run that is resumed; raise `Problem` where one given now differs."""
    free = {name: getattr(flags, name) for name in ("device", "workers", "output", "resume")}
    for name, value in given.items() - free.items():
        flag, own = "--" + name.replace("_", "-"), run["flags"].get(name)
        # what auto came to is the run's own
        require(value in ("auto", own), f"{flag} {value} is not the run's own {own}; leave it out")
    return argparse.Namespace(**run["flags"] | {"weights": "none"} | free)


# ---- main ----------------------------------------------------------------------------------------


def start_device(name):
    """Return the device that computes; under torchrun join the other processes."""
    cuda = name != "cpu" and torch.cuda.is_available()
    require(cuda or name != "cuda", "--device cuda: there is no CUDA here; leave it out")
    with explain("cannot start; each process needs torchrun, and a CUDA card of its own if any"):
        if cuda:
            torch.cuda.set_device(int(os.getenv("LOCAL_RANK", 0)))
            torch.backends.cudnn.benchmark = True
        if WORLD > 1:
            dist.init_process_group("nccl" if cuda else "gloo")
            atexit.register(dist.destroy_process_group)
            sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")  # 0 alone prints
    return torch.device("cuda" if cuda else "cpu")


def check(run, pictures, flags):
    """Raise `Problem` if run, pictures and flags do not go together, or nothing can be written."""
    if flags.batch_size % WORLD or min(flags.batch_size, len(pictures.parts["train"])) < 2 * WORLD:
        raise Problem(f"{WORLD} processes cannot share --batch-size {flags.batch_size} evenly")
    require(run.get("crc", pictures.crc) == pictures.crc, "the data have changed; start a new run")
    with explain(f"cannot make the folder {flags.output}; name another --output"):
        Path(flags.output).mkdir(parents=True, exist_ok=True)


def pipeline(flags, given):
    """Do what the flags say, step by step; return the exit code."""
    device, output = start_device(flags.device), Path(flags.output)
    if flags.predict:
        return predict(flags.predict, output / "best_model.pth", device)
    run = {"history": []}
    if flags.resume:
        run = once(load_checkpoint, output / "last.pth", LAST)
        flags = resumed_flags(flags, given, run)

    pictures = once(read_data, flags.data, flags.image_size)
    once(check, run, pictures, flags)
    classes = pictures.classes
    model, weights = once(start_model, len(classes), flags.weights, flags.freeze, flags.seed)
    if not flags.resume:
        flags.data, flags.image_size, flags.weights = pictures.name, pictures.size, weights
        run |= {"flags": vars(flags), "classes": classes, "crc": pictures.crc}

    loader = make_loader(pictures, flags.workers, device)
    print(describe(pictures, loader.num_workers, model, device, run), flush=True)
    fit(model.to(device), loader, run, flags, output)

    model, best = once(load_best, output / "best_model.pth")
    require(best["classes"] == classes, "best_model.pth has other classes than the data")
    _, confusion, mistakes = evaluate(model.to(device), loader, "test", flags.batch_size)
    names = [printable(name) for name in classes]
    print(*report(confusion, names), sep="\n")
    print(once(draw_mistakes, mistakes, names, output / "mistakes.png"), flush=True)
    return 0


def main(argv=None):
    """Run the program with the flags in `argv`, or on the command line; return the exit code."""
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        return pipeline(*parse_flags(argv))
    except Problem as problem:
        return complain(problem)
    except KeyboardInterrupt:
        return complain(Problem("interrupted; go on with --resume if training had begun", code=130))
    except (RuntimeError, MemoryError) as error:  # when a worker or another process has died, too
        if WORLD == 1 and not any(word in str(error) for word in ("worker", "memory", "allocate")):
            raise
        return complain(Problem(f"no memory, or a process died; use --resume ({error})", code=1))
    except BrokenPipeError:  # whoever read what is printed has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # names may have letters that it cannot encode
        stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
