"""Train ResNet18 to classify pictures, test it, and use it: the whole pipeline in one file.

    python classify.py --epochs 10                  CIFAR-10; without a network, drawn digits
    python classify.py --data PICTURES              your own: PICTURES/CLASS/*.jpg
    python classify.py --predict photo.jpg          with the best model so far

The lesson comes first, from here to the end of `main`: 1 data, 2 model, 3 loss, 4 optimizer,
5 training, 6 evaluation. Below `main` is what keeps a real run safe; skip it, or read any section
of it alone.
"""

import argparse
import atexit
import contextlib
import csv
import datetime
import io
import math
import multiprocessing.queues
import os
import pickle
import shutil
import signal
import socket
import struct
import sys
import time
import unicodedata
import warnings
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFile, ImageFont, ImageOps
from torch import distributed as dist, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset
from torchvision import datasets, models, utils
from torchvision.transforms import v2

# ---- 1. data -------------------------------------------------------------------------------------


class PicturesInFiles(Dataset):
    """Picture files, decoded when they are asked for, and their labels (N whole numbers)."""

    def __init__(self, paths, labels, size):
        # one array of bytes: of a list of names each loader worker would come to have a copy
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels)
        self.size = size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        """Return a picture, uint8 3×S×S, and its label.

        A file that cannot be decoded is named in a warning. It becomes an empty picture with the
        label -100, which cross entropy ignores.
        """
        path = os.fsdecode(self.paths[index])
        try:
            image = open_picture(path, self.size)
        except OSError as error:
            warnings.warn(f"{path} is left out: {error}", stacklevel=1)
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), -100
        image = ImageOps.fit(image, (self.size, self.size))
        return v2.functional.pil_to_tensor(image), int(self.labels[index])


def make_transforms(size, mirror):
    """Return what varies the pictures in training, and what makes any pictures the input."""
    resize = v2.Resize([size, size])  # pictures of this size already are left as they are
    augment = [v2.RandomCrop(size, padding=max(1, size // 32), padding_mode="edge")]
    if mirror:
        augment.append(v2.RandomHorizontalFlip())
    # mean and deviation of the pictures that the ImageNet weights were trained with
    normalize = v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    to_input = [v2.ToDtype(torch.float32, scale=True), normalize]
    return v2.Compose([resize, *augment]), v2.Compose([resize, *to_input])


class Batches:
    """The batches of a DataLoader, ready for the network: on its device and transformed."""

    def __init__(self, loader, device, to_input, augment=None):
        self.loader = loader
        self.device = device
        self.to_input = to_input
        self.augment = augment  # in training

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        """Yield images, float B×3×S×S, and labels, int64 B."""
        for images, labels in show_progress(self.loader):
            if self.augment:
                images, labels = leave_out_undecodable(images, labels)
                if len(labels) == 0:
                    continue
            images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            if self.augment:  # it draws its random numbers once a call: the same for 16 pictures
                images = torch.cat([self.augment(group) for group in images.split(16)])
            yield self.to_input(images), labels.to(self.device, non_blocking=True)


# ---- 2. model ------------------------------------------------------------------------------------


def build_model(num_classes, weights, freeze=False):
    """Return a ResNet18 that gives B×num_classes logits for normalised pictures, float B×3×S×S.

    weights: "imagenet" for torchvision's, from its cache or fetched, or "none" for random ones.
    Its `state_dict` is torchvision's, key for key. Raises ValueError for other weights.
    """
    if weights not in ("imagenet", "none"):
        raise ValueError(f'weights are "imagenet" or "none", not {weights!r}')
    model = models.resnet18()
    if weights == "imagenet":
        model.load_state_dict(fetch_weights(models.ResNet18_Weights.IMAGENET1K_V1))
    if freeze:
        model.requires_grad_(False)
    model.fc = nn.Linear(model.fc.in_features, num_classes)  # the head; new, so never frozen
    skip_taps_on_padding(model)  # the same results, faster
    return model.to(memory_format=torch.channels_last)


# ---- 5. training (3. loss and 4. optimizer are in `main`) ----------------------------------------


def train_one_epoch(model, batches, criterion, optimizer, scheduler, bfloat16=False):
    """Train a model on batches of (images, labels) that lie on its device; return the mean loss.

    The scheduler steps once a batch. With `bfloat16` the forward pass is computed in that type,
    which is faster where the processor has it natively; the weights stay float32.
    """
    model.train()
    for layer in model.modules():  # a frozen batch-norm keeps its mean and variance, too
        if isinstance(layer, nn.BatchNorm2d) and layer.affine and not layer.weight.requires_grad:
            layer.eval()
    total_loss = 0.0
    count = 0
    for images, labels in batches:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        total_loss += loss.detach() * len(labels)
        count += len(labels)
    return float(total_loss / max(count, 1))


# ---- 6. evaluation -------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(model, batches):
    """Return mean cross entropy, labels, predictions and confidences (each N) over batches.

    A picture that could not be decoded keeps its label of -100, and is not part of the loss.
    """
    model.eval()
    logits = []
    labels = []
    for images, targets in batches:
        logits.append(model(images))
        labels.append(targets)
    logits = torch.cat(logits)
    labels = torch.cat(labels)
    loss = nn.functional.cross_entropy(logits, labels).item()
    confidences, predictions = logits.softmax(dim=1).max(dim=1)
    return loss, labels, predictions, confidences


# ---- main ----------------------------------------------------------------------------------------


def main(argv=None):
    """Run the program with these flags, or those typed; return 0 or raise SystemExit."""
    with endings_in_one_line():
        # alone, this is process 0 of 1: what `on_process_0` calls is simply called
        rank, world = join_processes()
        args, saved = on_process_0(parse_args, argv)  # saved: the run to go on with, or None
        device = choose_device(args.device)
        if args.predict:
            return on_process_0(predict, args, device)
        # 1. data
        data = on_process_0(read_data, args.data, args.image_size, args.output)
        args = on_process_0(choose_defaults, args, data, device, world)
        batch_size = args.batch_size // world
        sampler = DistributedSampler(data.train, world, rank, shuffle=True, seed=args.seed)
        drop_single = len(sampler) % batch_size == 1  # batch-norm cannot train on one picture
        options = {"batch_size": batch_size, **loader_options(args.workers, device)}
        val_share = np.array_split(np.arange(len(data.val)), world)[rank]
        test_share = np.array_split(np.arange(len(data.test)), world)[rank]
        train_loader = DataLoader(data.train, sampler=sampler, drop_last=drop_single, **options)
        val_loader = DataLoader(data.val, sampler=val_share, **options)
        test_loader = DataLoader(data.test, sampler=test_share, **options)
        augment, to_input = make_transforms(data.image_size, data.mirror)
        train_batches = Batches(train_loader, device, to_input, augment)
        val_batches = Batches(val_loader, device, to_input)
        test_batches = Batches(test_loader, device, to_input)
        # 2. model
        torch.manual_seed(args.seed)
        weights = "none" if saved else args.weights  # a resumed run has weights of its own
        model = on_process_0(build_model, len(data.classes), weights, args.freeze).to(device)
        replica = DistributedDataParallel(model) if world > 1 else model
        # 3. loss
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        # 4. optimizer, and the schedule of its learning rate, which ends near 0 after the last step
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        decay = {"weight_decay": 0.2, "decoupled_weight_decay": True}
        optimizer = torch.optim.Adam(trainable, lr=args.lr, fused=True, **decay)
        steps = args.epochs * len(train_loader) + 1
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
        # 5. training; the run knows the best epoch, saves it, and says when to stop
        print(describe(args, data, model, device, world), flush=True)
        run = Run(args, data, model, optimizer, scheduler)
        run.begin(saved, len(train_loader))
        for epoch in run.epochs():
            sampler.set_epoch(epoch)  # another order
            torch.manual_seed(hash((args.seed, epoch, rank)))  # so a resumed epoch is the same
            start = time.perf_counter()
            train_loss = train_one_epoch(
                replica, train_batches, criterion, optimizer, scheduler, args.bfloat16
            )
            seconds = time.perf_counter() - start
            validation = None
            if epoch % args.validate_every == 0 or epoch == args.epochs:
                validation = evaluate_together(model, val_batches)  # `evaluate` of all processes
            run.record(train_loss, seconds, validation)
        # 6. evaluation
        run.load_best()
        _, labels, predictions, confidences = evaluate_together(model, test_batches)
        print(*report(labels, predictions, data.classes), sep="\n", flush=True)
        on_process_0(draw_mistakes, data, labels, predictions, confidences, args.output)
        return 0


# ==== below: what keeps a real run safe ===========================================================
# ---- data sets by name ---------------------------------------------------------------------------


class Data(NamedTuple):
    """What is learnt from: three data sets that share no picture, and what is known of them."""

    name: str
    train: Dataset
    val: Dataset
    test: Dataset
    classes: list[str]
    image_size: int  # the side to which pictures are brought, in pixels
    mirror: bool  # whether a mirrored picture is still one of its class (a digit is not)


def read_data(name, size, output):
    """Return the `Data` of a named set, of a folder, or for "auto" of the first to be had."""
    if name == "auto":
        try:
            return read_data("cifar10", size, output)
        except SystemExit as problem:
            show_banner(problem, "training on drawn DIGITS, which say nothing about photos")
            return read_data("digits", size, output)
    print(f"reading  {printable(name)}", flush=True)
    in_memory = name in ("cifar10", "cifar100", "digits")
    if in_memory and os.path.isdir(name):
        warnings.warn(f"{name} is the set of that name; for the folder say ./{name}", stacklevel=1)
    if name == "digits":
        pictures, labels, parts, classes = draw_digits()
    elif in_memory:
        pictures, labels, parts, classes = read_cifar(name)
    else:
        pictures, labels, parts, classes = read_folder(name, output)
    size = size or (32 if in_memory else 224)
    labels = np.array(labels)
    parts = split_off_missing(labels, np.array(parts), classes, name)
    if in_memory:
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        labels = torch.from_numpy(labels)
        train, val, test = (TensorDataset(images[part], labels[part]) for part in parts)
    else:
        train, val, test = (PicturesInFiles(pictures[part], labels[part], size) for part in parts)
    return Data(name, train, val, test, classes, size, mirror=name != "digits")


def read_cifar(name):
    """Return pixels, labels, parts and classes of CIFAR-10 or CIFAR-100, fetched if need be."""
    dataset = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder = Path("data").absolute()
    try:
        train = dataset(folder, train=True, download=True)
        test = dataset(folder, train=False, download=True)
    except LIBRARY_ERRORS as error:
        stop(f"{name} is not in {folder} and cannot be fetched ({reason(error)}); try later")
    pixels = np.concatenate([train.data, test.data])
    parts = ["train"] * len(train) + ["test"] * len(test)
    return pixels, train.targets + test.targets, parts, train.classes


def draw_digits():
    """Return pixels, labels, parts and classes of 6,000 drawn pictures of the ten digits."""
    rng = np.random.default_rng(0)
    fonts = [ImageFont.load_default(size) for size in range(18, 29)]
    labels = [index % 10 for index in range(6000)]
    pixels = []
    for label in labels:
        font = fonts[rng.integers(len(fonts))]
        glyph = Image.new("L", (32, 32))
        ImageDraw.Draw(glyph).text(rng.uniform(13, 19, 2), str(label), 255, font, anchor="mm")
        glyph = glyph.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR)
        ink = np.asarray(glyph)[:, :, None] / 255
        colours = [rng.integers(0, 100, 3), rng.integers(156, 256, 3)]
        front, back = rng.permutation(colours)
        picture = front * ink + back * (1 - ink) + rng.normal(0, 12, (32, 32, 3))
        pixels.append(picture.clip(0, 255).astype(np.uint8))
    return np.stack(pixels), labels, ["train"] * 5000 + ["test"] * 1000, list("0123456789")


def split_off_missing(labels, parts, classes, source):
    """Return the indices of train, val and test; one without pictures gets a tenth of each class.

    The split does not depend on --seed: it is always the same.
    """
    rng = np.random.default_rng(0)
    missing = [part for part in ("val", "test") if part not in parts]
    for label, name in enumerate(classes):
        own = rng.permutation(np.flatnonzero((parts == "train") & (labels == label)))
        tenth = max(1, round(len(own) / 10))
        if len(own) <= tenth * len(missing):
            need = len(missing) + 1
            stop(f"{source}: class {name} has {len(own)} pictures to split; give it {need} or more")
        for number, part in enumerate(missing):
            parts[own[number * tenth : (number + 1) * tenth]] = part
    return [np.flatnonzero(parts == part) for part in ("train", "val", "test")]


# ---- folders of pictures -------------------------------------------------------------------------

PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
PARTS |= {"val": "val", "valid": "val", "validation": "val"}
LAYOUTS = "a data set is DIR/CLASS/*.jpg, or DIR/train/CLASS/*.jpg with val and test beside train"


def read_folder(root, output):
    """Return paths, labels, parts and classes of DIR/CLASS/** or DIR/train|val|test/CLASS/**."""
    groups, left_out = group_files(root, output)
    classes = sorted({name for _, name in groups})
    if len(classes) < 2:
        stop(f"{root} needs two or more classes and has {classes}; {LAYOUTS}")
    paths = []
    labels = []
    parts = []
    for part in {part: None for part, _ in groups}:
        for label, name in enumerate(classes):
            if (part, name) not in groups:
                stop(f"{root}: {part} has no folder {name}, as another part has; {LAYOUTS}")
            files = groups[part, name]
            pictures = [path for path in files if is_picture(path)]
            left_out += sorted(set(files).difference(pictures))
            check_some(pictures, files, f"class {name} of {root} ({part})")
            paths += pictures
            labels += [label] * len(pictures)
            parts += [part] * len(pictures)
    if left_out:
        names = ", ".join(left_out[:20]) + ", ..." * (len(left_out) > 20)
        why = "in no folder of a class (see --predict), or of no kind that Pillow knows"
        warnings.warn(f"{len(left_out)} files are left out, {why}: {names}", stacklevel=1)
    return np.array([os.fsencode(path) for path in paths]), labels, parts, classes


def group_files(root, output):
    """Return the files in each (part, class) of a folder, and the files that are in none."""
    entries = list(walk(root, output))
    divided = is_divided(root, entries)
    groups = {}
    left_out = []
    for *folders, name in entries:
        path = os.path.join(root, *folders, name)
        if not divided:
            folders = ["train", *folders]
        part = PARTS.get(folders[0].lower()) if folders else None
        if part and len(folders) > 1:
            # compared as one sees it: macOS writes an accent as a letter of its own
            key = (part, unicodedata.normalize("NFC", folders[1]))
            files = groups.setdefault(key, [])
            if name:
                files.append(path)
        elif name:
            left_out.append(path)
    return groups, left_out


def is_divided(root, entries):
    """Return whether a folder has train, and perhaps val and test, rather than classes itself."""
    inside = {}  # the folders in the root, and the folders in each of them
    with_pictures = set()
    for *folders, name in entries:
        if folders:
            inside.setdefault(folders[0], set()).update(folders[1:2])
            if is_picture(name):
                with_pictures.add(folders[0])
    named = [name for name in inside if name.lower() in PARTS]
    parts = [PARTS[name.lower()] for name in named]
    others = [name for name in inside if name.lower() not in PARTS and name in with_pictures]
    # a test folder without classes is left out, for it cannot tell the accuracy
    flat = [name for name in named if not inside[name] and PARTS[name.lower()] != "test"]
    if not parts or (others and parts == ["train"] and flat):
        return False  # a class may be called train
    if others or flat or "train" not in parts or len(parts) > len(set(parts)):
        odd = ", ".join(others + flat if "train" in parts and others + flat else named)
        stop(f"{root}: it is not clear what {odd} means beside {', '.join(inside)}; {LAYOUTS}")
    return True


def is_picture(path):
    """Return whether a file has an ending that Pillow knows."""
    return os.path.splitext(path)[1].lower() in Image.registered_extensions()


def walk(root, output):
    """Yield the names that lead to each visible file below a folder; a folder's end in ""."""
    ours = {os.path.realpath(output), os.path.realpath(os.path.join(output, "previous"))}
    ours.discard(os.path.realpath(root))
    seen = set()
    for path, folders, files in os.walk(root, onerror=refuse_folder, followlinks=True):
        real = os.path.realpath(path)
        names = Path(path).relative_to(root).parts
        if real in ours:
            folders.clear()
            continue
        yield [*names, ""]
        if real in seen:  # a link that leads round in a circle, or to another part
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(files):
            if not name.startswith("."):
                yield [*names, name]


def refuse_folder(error):
    """End the program for a folder that cannot be listed."""
    stop(f"cannot read the folder {error.filename} ({reason(error)})")


def check_some(pictures, files, what):
    """End the program if none of ten of these pictures can be decoded."""
    problem = f"{files[0]} has no ending that Pillow knows" if files else "it is empty, or a link"
    for path in reversed(pictures[:: len(pictures) // 10 + 1]):
        try:
            open_picture(path, size=1)
            return
        except OSError as error:
            problem = f"{path}: {error}"
    stop(f"{what} has no pictures among {len(files)} files ({problem}); add some, or remove it")


# ---- picture files -------------------------------------------------------------------------------

UNDECODABLE = -100  # a label that cross entropy ignores unless it is told otherwise
# what the libraries raise for files and servers that are not what they seem
LIBRARY_ERRORS = (ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError)
LIBRARY_ERRORS += (SyntaxError, TypeError, ValueError, struct.error, zlib.error)
LIBRARY_ERRORS += (Image.DecompressionBombError, HTTPException, pickle.UnpicklingError)
UPRIGHT = [None, None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180]
UPRIGHT += [Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE]
UPRIGHT += [Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90]


def open_picture(path, size):
    """Return a file as an upright RGB picture (PIL), of any size from size×size on.

    Of its metadata only the orientation counts. Raises OSError for what is no picture, is damaged,
    or has values without a known range (float, 32 bits).
    """
    if not os.path.isfile(path):  # a pipe would never answer
        raise OSError("it is not a file")
    with open(path, "rb") as file:
        try:
            ImageFile.LOAD_TRUNCATED_IMAGES = True  # damaged metadata is passed over,
            image = Image.open(file)
            ImageFile.LOAD_TRUNCATED_IMAGES = False  # damaged pixels are not
            image.draft("RGB", (size, size))  # lets the JPEG reader skip detail that is not needed
            image.load()
        except LIBRARY_ERRORS as error:
            raise OSError(reason(error)) from error
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        except LIBRARY_ERRORS:
            orientation = None
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise OSError(f"the range of its values (mode {image.mode}) is not known")
    image = image.convert("RGB")
    if orientation in range(2, 9):  # as EXIF numbers them; some write a rational number
        image = image.transpose(UPRIGHT[int(orientation)])
    return image


# ---- speed ---------------------------------------------------------------------------------------


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution that leaves out the taps of its kernel which see nothing but padding.

    At 32 px ResNet18 ends on maps of 2×2 and 1×1 pixels. Where the output is one pixel only, up
    to eight of its nine taps multiply zeros, and the others are a plain matrix product: the same
    outputs and gradients with less arithmetic.
    """

    def forward(self, x):
        """Return B×C×H×W for B×C×H×W."""
        if max(x.shape[2:]) > self.stride[0] or self.groups > 1:
            return super().forward(x)
        # channels last, as they lie in memory: so the gradient needs no rearranging
        seen = self.weight.permute(0, 2, 3, 1)[:, 1 : 1 + x.shape[2], 1 : 1 + x.shape[3]].flatten(1)
        pixels = x.permute(0, 2, 3, 1).flatten(1)
        return nn.functional.linear(pixels, seen, self.bias)[:, :, None, None]


def skip_taps_on_padding(model):
    """Make every 3×3 convolution of a model a `Conv3x3`, with the parameters that it has."""
    for layer in model.modules():
        if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
            shape = layer.kernel_size, layer.padding, layer.dilation
            if shape == ((3, 3), (1, 1), (1, 1)) and layer.stride in ((1, 1), (2, 2)):
                layer.__class__ = Conv3x3


def has_native_bfloat16(device):
    """Return whether a device computes in bfloat16 by itself; emulated, it would be slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def choose_workers(device, files):
    """Return how many processes decode pictures; training on a CPU needs half of the processors."""
    if files < 100:
        return 0
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    processors = len(affinity(0)) if affinity else os.cpu_count() or 1
    if dist.is_initialized():
        processors //= int(os.environ["LOCAL_WORLD_SIZE"])
    return min(8, processors if device.type == "cuda" else processors // 2)


def loader_options(workers, device):
    """Return what all DataLoaders are given beside their pictures."""
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    options |= {"timeout": 300 if workers else 0, "worker_init_fn": prepare_worker}
    options |= {"pin_memory": device.type == "cuda"}
    return options | {"generator": torch.Generator()}  # the global one is for training alone


def prepare_worker(worker):
    """Make a loader worker warn as the program does, and leave Ctrl-C to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")
    # a worker whose batch cannot be sent would go on, and the main process wait for the batch
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda error, batch: os._exit(1)
    warnings.showwarning = show_warning


def leave_out_undecodable(images, labels):
    """Return the images and labels of a batch without those that could not be decoded."""
    good = torch.nonzero(labels != UNDECODABLE).flatten()
    if dist.is_initialized() and len(good) == 0:  # the other processes would wait for ever
        stop("no picture of a batch can be decoded; give a larger --batch-size")
    if len(good) == 1:
        good = good.repeat(2)  # batch-norm cannot train on one picture
    return images[good], labels[good]


# ---- what is left unsaid -------------------------------------------------------------------------


def fetch_weights(weights):
    """Return the state_dict of some torchvision weights, from torch's cache or fetched."""
    try:
        bar = sys.stderr is not None and sys.stderr.isatty()
        return weights.get_state_dict(progress=bar, check_hash=True, weights_only=True)
    except LIBRARY_ERRORS as error:
        hint = "try later, or give --weights none"
        stop(f"the ImageNet weights cannot be had ({reason(error)}); {hint}")


def choose_weights(weights, freeze):
    """Return "imagenet" or "none": for "auto" what can be had, with a warning if it is none."""
    if weights != "auto":
        return weights
    try:
        build_model(1, "imagenet")
        return "imagenet"
    except SystemExit as problem:
        if freeze:
            raise
        show_banner(problem, "Starting from RANDOM weights instead, which need more pictures.")
        return "none"


def choose_defaults(args, data, device, world):
    """Return the flags with those left unsaid chosen: the place to change a default."""
    args = argparse.Namespace(**vars(args))
    args.weights = choose_weights(args.weights, args.freeze)
    name = os.path.abspath(data.name) if isinstance(data.train, PicturesInFiles) else data.name
    args.flags += [f"--data={name}", f"--weights={args.weights}"]
    args.image_size = data.image_size
    args.bfloat16 = has_native_bfloat16(device)
    count = len(data.train)
    if args.batch_size is None:  # some twenty steps an epoch or more, of no fewer than 8 pictures
        args.batch_size = max(2, min(128, max(8, count // 20)) // world) * world
    if args.lr is None:
        args.lr = 0.001 if args.weights == "imagenet" else 0.003
        if args.freeze:
            args.lr = 0.01
    if args.patience is None:  # so late the rate has fallen to a tenth of its peak
        args.patience = math.ceil(0.875 * args.epochs / args.validate_every)
    if args.workers is None:
        files = 0 if isinstance(data.train, TensorDataset) else count
        args.workers = choose_workers(device, files)
    if args.batch_size % world or args.batch_size < 2 * world:
        hint = f"give a multiple of {world} from {2 * world} on"
        stop(f"{world} processes cannot share --batch-size {args.batch_size} evenly; {hint}")
    if count < 2 * world or min(len(data.val), len(data.test)) < world:
        stop(f"{data.name} has too few pictures for {world} processes; start fewer")
    return args


def describe(args, data, model, device, world):
    """Return the lines that say what was chosen."""
    names = ", ".join(data.classes[:10]) + ", ..." * (len(data.classes) > 10)
    sizes = f"{len(data.train)} train, {len(data.val)} val, {len(data.test)} test"
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    precision = "bfloat16 in training" if args.bfloat16 else "float32"
    return f"""\
data     {printable(data.name)}: {sizes}, {args.image_size} x {args.image_size} pixels
classes  {len(data.classes)}: {printable(names)}
weights  {args.weights}, {trained:,} parameters to train
device   {device}, {precision}, processes: {world}, loader workers: {args.workers}
training {args.epochs} epochs, batch size {args.batch_size}, learning rate {args.lr}, \
patience {args.patience}, seed {args.seed}"""


# ---- report and picture of mistakes --------------------------------------------------------------


def report(labels, predictions, classes):
    """Return the lines that tell accuracy, each class's scores, and what is confused most."""
    names = [printable(name) for name in classes]
    count = len(names)
    decoded = labels != UNDECODABLE
    pairs = labels[decoded] * count + predictions[decoded]
    confusion = torch.bincount(pairs, minlength=count * count).view(count, count)  # true×predicted
    right = confusion.diag()
    true = confusion.sum(1)
    predicted = confusion.sum(0)
    precision = right / predicted.clamp(min=1)
    recall = right / true.clamp(min=1)
    f1 = 2 * right / (true + predicted).clamp(min=1)
    lines = [f"test accuracy {right.sum() / true.sum():.2%} ({right.sum()} of {true.sum()})", ""]
    width = max(len(name) for name in [*names, "class"])
    lines.append(f"{'class':{width}}  precision  recall      F1   count")
    rows = list(zip(names, precision, recall, f1, true))
    rows.append(("mean", precision.mean(), recall.mean(), f1.mean(), true.sum()))
    for name, p, r, f, number in rows:
        lines.append(f"{name:{width}}  {p:9.4f}  {r:6.4f}  {f:6.4f}  {number:6}")
    counts, places = (confusion - right.diag()).flatten().topk(min(5, count))
    if counts[0] > 0:
        lines += ["", "most often confused (true -> predicted):"]
    for number, place in zip(counts[counts > 0].tolist(), places.tolist()):
        lines.append(f"{names[place // count]} -> {names[place % count]} {number}")
    return lines


def draw_mistakes(data, labels, predictions, confidences, output):
    """Write mistakes.png: the test pictures that were most surely mistaken, and for what."""
    path = Path(output, "mistakes.png")
    wrong = torch.nonzero((labels != predictions) & (labels != UNDECODABLE)).flatten()
    surest = wrong[confidences[wrong].argsort(descending=True)][:32].tolist()
    if not surest:
        path.unlink(missing_ok=True)  # an earlier picture
        print("no mistakes, so no picture of them", flush=True)
        return
    font = ImageFont.load_default(13)
    tiles = []
    for index in surest:
        true = printable(data.classes[labels[index]])
        predicted = printable(data.classes[predictions[index]])
        tile = v2.functional.to_pil_image(data.test[index][0])
        tile = ImageOps.scale(tile, max(1, 192 // tile.width), Image.Resampling.NEAREST)
        tile = tile.crop((0, 0, max(tile.width, 192), tile.height + 40))  # the rest is black
        text = f"{true:.24}\n-> {predicted:.18} {confidences[index]:.0%}"
        ImageDraw.Draw(tile).text((2, tile.height - 38), text, "white", font)
        tiles.append(v2.functional.pil_to_tensor(tile))
    sheet = io.BytesIO()
    v2.functional.to_pil_image(utils.make_grid(tiles, padding=4)).save(sheet, "png")
    write(path, sheet.getvalue())
    print(f"the surest mistakes are drawn in {printable(path)}", flush=True)


# ---- prediction ----------------------------------------------------------------------------------


@torch.inference_mode()
def predict(args, device):
    """Print a line for each picture that --predict names, or that is in a folder it names.

    Returns 0; ends the program with 1 if there are files that cannot be decoded.
    """
    best = load_checkpoint(Path(args.output, "best_model.pth"), BEST)
    model = build_model(len(best["classes"]), "none")
    load_state(model, best["model"])
    model.to(device).eval()
    paths = []
    for path in args.predict:
        if os.path.isdir(path):
            paths += [os.path.join(path, *names) for names in walk(path, args.output) if names[-1]]
        else:
            paths.append(path)
    workers = choose_workers(device, len(paths)) if args.workers is None else args.workers
    pictures = PicturesInFiles(paths, [0] * len(paths), best["image_size"])
    _, transform = make_transforms(best["image_size"], mirror=False)
    remaining = iter(paths)
    unreadable = 0
    for images, labels in DataLoader(pictures, 64, **loader_options(workers, device)):
        shares = model(transform(images.to(device))).softmax(dim=1)
        shares, guesses = shares.topk(min(3, len(best["classes"])))
        for label, path, *likely in zip(labels, remaining, shares.tolist(), guesses.tolist()):
            if label == UNDECODABLE:
                unreadable += 1
                continue
            likely = [f"{best['classes'][guess]} {share:.1%}" for share, guess in zip(*likely)]
            print(printable("  ".join([path, *likely])), flush=True)
    if unreadable or not paths:
        stop(f"{unreadable} of {len(paths)} files are no pictures; name others")
    return 0


# ---- saving and resuming -------------------------------------------------------------------------

RUN_FILES = ["last.pth", "best_model.pth", "log.csv", "mistakes.png"]
OPTIONAL = (float, type(None))
# what a row of the history is, and what the checkpoints are; "model" is a state_dict
LOG = {"epoch": int, "train_loss": float, "val_loss": OPTIONAL, "val_accuracy": OPTIONAL}
LOG |= {"learning_rate": float, "images_per_second": float, "seconds": float}
BEST = {"model": dict, "classes": list, "image_size": int, "epoch": int, "val_accuracy": float}
LAST = {"model": dict, "optimizer": dict, "history": list, "flags": list, "classes": list}
LAST |= {"sizes": list, "patient_since": int, "steps": list}


class Run:
    """A training: how far it is, when it ends, and what is kept of it in the folder --output.

    history:       a row for each epoch, as log.csv has them
    patient_since: the epoch from which --patience counts, where a finished run was prolonged
    """

    def __init__(self, args, data, model, optimizer, scheduler):
        self.args = args
        self.data = data
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.output = Path(args.output)
        self.sizes = [len(data.train), len(data.val), len(data.test)]
        self.history = []
        self.patient_since = 0

    def begin(self, saved, steps):
        """Begin, or go on where a saved run was, with the rate and schedule of today's flags."""
        self.steps = steps  # in an epoch
        done = 0
        if saved is None:
            on_process_0(move_earlier_run_aside, self.output)
        else:
            if saved["classes"] != self.data.classes or saved["sizes"] != self.sizes:
                stop(f"{self.data.name} has other classes or pictures than the run; start anew")
            self.history = saved["history"]
            self.patient_since = saved["patient_since"]
            load_state(self.model, saved["model"])
            groups = self.optimizer.state_dict()["param_groups"]
            load_state(self.optimizer, {**saved["optimizer"], "param_groups": groups})
            done = len(self.history) * steps
            if saved["steps"][0] == steps:  # the plan is the same: a few may have been left out
                done = saved["steps"][1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a scheduler that steps without its optimizer
            for _ in range(done):
                self.scheduler.step()
        on_process_0(self.save)

    def best(self):
        """Return the row of the best validation, the earliest of equals, or None."""
        validated = [row for row in self.history if row["val_accuracy"] is not None]
        return max(validated, key=lambda row: row["val_accuracy"], default=None)

    def epochs(self):
        """Yield the numbers of the epochs that are still to be trained."""
        while len(self.history) < self.args.epochs:
            best = self.best()
            since = max(self.patient_since, best["epoch"] if best else 0)
            in_vain = sum(row["val_accuracy"] is not None for row in self.history[since:])
            if 0 < self.args.patience <= in_vain:
                break
            self.epoch_start = time.perf_counter()
            self.rate = self.optimizer.param_groups[0]["lr"]
            yield len(self.history) + 1

    def record(self, train_loss, seconds, validation):
        """Note what an epoch came to, save the run and print a line.

        train_loss, seconds: of the training alone, on this process
        validation: what `evaluate` returned, or None
        """
        if dist.is_initialized():
            losses = [None] * dist.get_world_size()
            dist.all_gather_object(losses, train_loss)
            train_loss = sum(losses) / len(losses)
        row = dict.fromkeys(LOG)
        row["epoch"] = len(self.history) + 1
        row["train_loss"] = train_loss
        row["learning_rate"] = self.rate
        row["images_per_second"] = len(self.data.train) / seconds
        line = f"epoch {row['epoch']:{len(str(self.args.epochs))}}/{self.args.epochs}"
        line += f"  train loss {train_loss:.4f}"
        if validation:
            row["val_loss"], labels, predictions, _ = validation
            right = (labels == predictions)[labels != UNDECODABLE]
            if len(right) == 0:
                stop("no validation picture can be decoded; give others")
            row["val_accuracy"] = right.double().mean().item()
            line += f"  val loss {row['val_loss']:.4f}  val accuracy {row['val_accuracy']:.2%}"
        row["seconds"] = time.perf_counter() - self.epoch_start
        self.history.append(row)
        on_process_0(self.save)
        line += f"  {row['images_per_second']:.0f} images/s  {row['seconds']:.1f} s"
        print(line + "  (best)" * (row is self.best()), flush=True)

    def save(self):
        """Write log.csv, last.pth and, if the last epoch is the best, best_model.pth.

        In this order: a run that is killed in between writes its best model when it is resumed.
        """
        row = self.history[-1] if self.history else None
        if row:
            if not math.isfinite(row["train_loss"] + (row["val_loss"] or 0)):
                hint = f"go on from the epoch before with --resume and a --lr below {self.args.lr}"
                stop(f"the loss is no longer a number; {hint}")
            table = io.StringIO()
            writer = csv.DictWriter(table, LOG, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.history)
            write(self.output / "log.csv", table.getvalue().encode())
        kept = {"model": self.model.state_dict(), "classes": self.data.classes}
        last = {**kept, "optimizer": self.optimizer.state_dict(), "history": self.history}
        last |= {"flags": self.args.flags, "sizes": self.sizes, "patient_since": self.patient_since}
        last |= {"steps": [self.steps, self.scheduler.last_epoch]}
        write(self.output / "last.pth", to_bytes(last))
        if row and row is self.best():
            best = {**kept, "image_size": self.data.image_size}
            best |= {"epoch": row["epoch"], "val_accuracy": row["val_accuracy"]}
            write(self.output / "best_model.pth", to_bytes(best))

    def load_best(self):
        """Give the model the best weights; end the program if they are not of this run."""
        path = self.output / "best_model.pth"
        best = on_process_0(load_checkpoint, path, BEST)
        row = self.best()
        if row is None:
            stop("no epoch was validated; go on with --resume and more --epochs")
        if (best["epoch"], best["val_accuracy"]) != (row["epoch"], row["val_accuracy"]):
            stop(f"{path} is of another run; start a new one")
        load_state(self.model, best["model"])


def move_earlier_run_aside(output):
    """Move what an earlier run wrote into `previous`, in the place of what was there.

    last.pth goes first: where it is gone already, a move was interrupted, and goes on. A run that
    has not finished an epoch is not kept.
    """
    previous = output / "previous"
    try:
        output.mkdir(parents=True, exist_ok=True)
        earlier = [name for name in RUN_FILES if (output / name).exists()]
        if earlier in ([], ["last.pth"]):
            return
        previous.mkdir(exist_ok=True)
        if "last.pth" in earlier:
            for name in RUN_FILES:
                (previous / name).unlink(missing_ok=True)
        for name in earlier:
            os.replace(output / name, previous / name)
    except OSError as error:
        stop(f"cannot write into {output} or {previous} ({reason(error)}); name another --output")
    print(f"the earlier run in {printable(output)} is now in {printable(previous)}", flush=True)


def write(path, content):
    """Write a file that takes the place of an older one when it is whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two runs may write at once
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        stop(f"cannot write {path} ({reason(error)}); make room, then go on with --resume")


def to_bytes(checkpoint):
    """Return a checkpoint as a file has it: made in memory, so that only the disk can fail."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getbuffer()


def load_checkpoint(path, kinds):
    """Return a checkpoint with values of these kinds; nothing in it is executed."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        damaged = [key for key, kind in kinds.items() if not isinstance(checkpoint[key], kind)]
        damaged += [name for name in checkpoint["classes"] if not isinstance(name, str)]
    except LIBRARY_ERRORS as error:
        stop(f"cannot use {path} ({reason(error)}); train first, or name another --output")
    if damaged:
        stop(f"cannot use {path}, damaged in {damaged[0]}; train again, or name another --output")
    return checkpoint


def load_run(output):
    """Return what is saved of a run, to go on with it."""
    path = Path(output, "last.pth")
    saved = load_checkpoint(path, LAST)
    rows = saved["history"]
    whole = all(isinstance(row, dict) and list(row) == list(LOG) for row in rows)
    whole = whole and all(isinstance(row[key], LOG[key]) for row in rows for key in LOG)
    whole = whole and [type(number) for number in saved["steps"]] == [int, int]
    if not whole or not all(isinstance(flag, str) for flag in saved["flags"]):
        stop(f"cannot use {path}, damaged in its history or flags; start a new run")
    return saved


def load_state(target, state):
    """Give a model or an optimizer the state in a checkpoint."""
    try:
        target.load_state_dict(state)
        if isinstance(target, torch.optim.Optimizer):  # which does not look at shapes itself
            for parameter, moments in target.state.items():
                for moment in moments.values():
                    moment.expand_as(parameter)
    except LIBRARY_ERRORS as error:
        stop(f"the checkpoint is damaged, or of another model ({reason(error)}); start a new run")


# ---- several processes, under torchrun; a single one passes through unchanged --------------------


def join_processes():
    """Return this process's number and how many there are: 0 and 1, unless torchrun started it."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=datetime.timedelta(hours=2))  # a download may be slow
    except LIBRARY_ERRORS as error:
        stop(f"the processes cannot start, a card for each if any, or not meet ({reason(error)})")
    atexit.register(dist.destroy_process_group)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # process 0 alone prints
    return dist.get_rank(), dist.get_world_size()


def choose_device(name):
    """Return the device that computes."""
    use_cuda = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu")


def on_process_0(function, *args):
    """Call a function on process 0 alone; return its result, or exit as it does, on all."""
    outcome = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome = [function(*args)]
        except SystemExit as problem:
            outcome = [problem]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], SystemExit) and dist.get_rank() > 0:
            sys.exit(1)  # process 0 says why
    if isinstance(outcome[0], SystemExit):
        raise outcome[0]
    return outcome[0]


def evaluate_together(model, batches):
    """Return what `evaluate` does, of the shares of all processes, in the order of the data set."""
    if not dist.is_initialized():
        return evaluate(model, batches)
    for buffer in model.buffers():  # batch-norm's statistics
        dist.broadcast(buffer, 0)
    loss, labels, predictions, confidences = evaluate(model, batches)
    losses = torch.where(labels == UNDECODABLE, 0.0, loss)  # a picture's share of the mean
    columns = [column.cpu() for column in (losses, labels, predictions, confidences)]
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, columns)
    losses, labels, predictions, confidences = map(torch.cat, zip(*shares))
    return losses[labels != UNDECODABLE].mean().item(), labels, predictions, confidences


# ---- what is said --------------------------------------------------------------------------------


def stop(problem):
    """End the program with an error in one line."""
    sys.exit(printable(f"error: {problem}"))


def printable(text):
    """Return a text with whatever would break its line escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def reason(error):
    """Return what an error of a library says, in one line."""
    text = getattr(error, "strerror", None) or str(error) or repr(error)
    return text.splitlines()[0][:200]


def show_warning(message, *_):
    """Write a warning in one line; Python itself says each text once a process."""
    print(f"warning: {printable(message)}", file=sys.stderr, flush=True)


def show_banner(problem, consequence):
    """Write a warning on stderr that cannot be overlooked."""
    lines = [str(problem).replace("error:", "warning:"), f"warning: {consequence}"]
    print("=" * 80, *lines, "=" * 80, sep="\n", file=sys.stderr, flush=True)


def show_progress(loader):
    """Yield the batches of a loader; in a terminal a line tells how far they are."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    watched = first and sys.stderr is not None and sys.stderr.isatty()
    width = shutil.get_terminal_size().columns - 1
    start = time.monotonic()
    shown = start
    for number, batch in enumerate(loader, 1):
        yield batch
        if watched and time.monotonic() - shown > 1:
            shown = time.monotonic()
            speed = number / (shown - start)
            left = datetime.timedelta(seconds=round((len(loader) - number) / speed))
            text = f"batch {number}/{len(loader)}  {loader.batch_size * speed:.0f} images/s"
            text = f"{text}  {left} left"[:width]
            print(f"{text:{width}}\r", end="", file=sys.stderr, flush=True)
    if watched:
        print(" " * width, end="\r", file=sys.stderr, flush=True)


@contextlib.contextmanager
def endings_in_one_line():
    """Say in one line what may end a run and is nobody's mistake in the code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names may have letters that it cannot encode
            stream.reconfigure(errors="backslashreplace")
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    warnings.showwarning = show_warning
    warnings.filterwarnings("ignore", module="PIL")  # of oddities in files that it reads well
    try:
        yield
    except KeyboardInterrupt:
        hint = "go on with --resume if training had begun"
        print(f"error: interrupted; {hint}", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # whoever read what is printed has gone, as `head` does
        sys.stdout = open(os.devnull, "w")
        stop("nobody reads what is printed any more")
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or NO_MEMORY in text:
            stop("memory ran out; go on with --resume and a smaller --batch-size or --image-size")
        if text.startswith(WORKER_DIED) or "shared memory" in text:
            hint = "give --workers 0, or more shared memory (/dev/shm)"
            stop(f"a loader worker died, or could not send its pictures; {hint}")
        raise


NETWORK_TIMEOUT = 15  # seconds that an address of a server may stay silent
NO_MEMORY = "DefaultCPUAllocator"  # what torch says of the host's; for a card's it has a class
WORKER_DIED = ("DataLoader worker (pid", "DataLoader timed out")


# ---- flags ---------------------------------------------------------------------------------------

LEAST = {"image_size": 1, "epochs": 1, "batch_size": 2, "lr": 1e-12, "validate_every": 1}
LEAST |= {"patience": 0, "seed": 0, "workers": 0}


def make_parser():
    """Return the parser of the flags; in brackets what is taken if one is left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    data = "cifar10, cifar100, digits, or a folder of pictures (cifar10, else digits)"
    predict = "classify these pictures, or those in these folders, by the model in --output"
    weights = ["auto", "imagenet", "none"]
    devices = ["auto", "cuda", "cpu"]
    add = parser.add_argument
    add("--data", default="auto", metavar="NAME|DIR", help=data)
    add("--image-size", type=int, metavar="PX", help="side of the pictures (32; of a folder: 224)")
    add("--epochs", type=int, default=10, metavar="N", help="times through the pictures (10)")
    add("--batch-size", type=int, metavar="N", help="pictures in a step, of all processes (chosen)")
    add("--lr", type=float, help="learning rate at its peak (chosen)")
    add("--weights", default="auto", choices=weights, help="to start from (imagenet, else none)")
    add("--freeze", action="store_true", help="train the new head alone (train all)")
    add("--validate-every", type=int, default=1, metavar="N", help="validate every N epochs (1)")
    add("--patience", type=int, metavar="N", help="stop after N validations in vain (chosen)")
    add("--seed", type=int, default=0, metavar="N", help="same seed, same result (0)")
    add("--device", default="auto", choices=devices, help="where to compute (cuda, else cpu)")
    add("--workers", type=int, metavar="N", help="processes that decode pictures (chosen)")
    add("--output", default="checkpoint", metavar="DIR", help="where all is written (checkpoint)")
    add("--resume", action="store_true", help="go on with the run in --output; other flags win")
    add("--predict", nargs="+", metavar="PATH", help=predict)
    return parser


def parse_args(argv):
    """Return the flags, and what is saved of the run that is resumed, or None.

    A resumed run has the flags that it was started with, but what is typed now wins.
    """
    argv = sys.argv[1:] if argv is None else [str(flag) for flag in argv]
    parser = make_parser()
    args = parser.parse_args(argv)
    args.flags = argv
    saved = None
    if args.resume and not args.predict:
        saved = load_run(args.output)
        own = parser.parse_args(saved["flags"])
        flags = [*saved["flags"], *argv, f"--output={args.output}"]
        args = parser.parse_args(flags)
        args.flags = flags
        done = len(saved["history"])
        if args.weights == "auto":
            args.weights = own.weights
        if (args.weights, args.freeze) != (own.weights, own.freeze):
            parser.error("--weights and --freeze are the run's own; leave them out with --resume")
        if args.epochs < done:
            parser.error(f"--epochs {args.epochs}: {done} are done; give {done} or more")
        if args.epochs > own.epochs:
            saved["patient_since"] = done
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not least <= value < (2**32 if name == "seed" else math.inf):
            parser.error(f"--{name.replace('_', '-')} {value}: give {least} or more")
    if args.freeze and args.weights == "none":
        parser.error("--freeze would keep random weights; leave out --weights none")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA here; leave it out, or say --device cpu")
    return args, saved


if __name__ == "__main__":
    sys.exit(main())
