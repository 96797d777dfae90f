"""Train ResNet18 to classify pictures, test it, and use it: the whole pipeline in one file.

    python classify.py --epochs 10                  CIFAR-10; without a network, drawn digits
    python classify.py --data PICTURES              your own: PICTURES/CLASS/*.jpg
    python classify.py --predict photo.jpg          with the best model so far

The lesson comes first, from here to the end of `main`: 1 data, 2 model, 3 loss, 4 optimizer,
5 training, 6 evaluation. Below `main` is what keeps a real run safe; skip it, or read any section
of it alone.
"""

import argparse
import contextlib
import csv
import datetime
import hashlib
import io
import math
import multiprocessing.queues
import os
import pickle
import signal
import socket
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
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import distributed as dist, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset
from torchvision import datasets, models
from torchvision.transforms import v2

# ---- 1. data -------------------------------------------------------------------------------------


UNDECODABLE = -100  # the label that cross entropy ignores (its ignore_index)
PRIME = 2**31 - 1  # steps of a prime reach every picture


class PicturesInFiles(Dataset):
    """Picture files, decoded when they are asked for, and their labels (N whole numbers).

    A file that cannot be decoded is named in a warning. With `replace`, as in training, another one
    takes its place. Without, it becomes an empty picture with the label UNDECODABLE.
    """

    def __init__(self, paths, labels, size, replace=False):
        # one array, whose memory the DataLoader's processes share; a list they would copy
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels)
        self.size = size
        self.replace = replace

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        """Return a picture, uint8 3×S×S, and its label."""
        tries = len(self) if self.replace else 1
        for number in range(tries):
            # the next one is far away, for neighbours are often damaged together
            place = (index + number * PRIME) % len(self)
            path = os.fsdecode(self.paths[place])
            try:
                image = open_picture(path, self.size)
            except OSError as error:
                warnings.warn(f"{path} is left out: {error}", stacklevel=1)
                continue
            image = ImageOps.fit(image, (self.size, self.size))
            return v2.functional.pil_to_tensor(image), int(self.labels[place])
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8), UNDECODABLE


def make_transforms(size, mirror):
    """Return two transforms: random changes for training, and the way to the network's input."""
    resize = v2.Resize([size, size])  # of pictures in memory; files have this size already
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

    def __iter__(self):
        """Yield images, float B×3×S×S, and labels, int64 B."""
        for images, labels in show_progress(self.loader):
            images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            if self.augment:  # one random choice for 16 pictures: one for each would take long
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
    skip_taps_on_padding(model)  # only for speed: the same results, without multiplying zeros
    return model.to(memory_format=torch.channels_last)  # the same shapes, a faster layout


# ---- 5. training (3. loss and 4. optimizer are in `main`) ----------------------------------------


def train_one_epoch(model, batches, criterion, optimizer, scheduler, bfloat16=False):
    """Train a model on batches of (images, labels) that lie on its device; return the mean loss.

    The scheduler steps once a batch. With `bfloat16` the forward pass is computed in that type,
    which is faster where the processor has it natively; the weights stay float32.
    """
    model.train()
    for layer in model.modules():  # a frozen batch-norm would still change its mean and variance
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
        total_loss += loss.detach() * len(labels)  # .item() would wait for the card
        count += len(labels)
    return float(total_loss / count)


# ---- 6. evaluation -------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(model, batches):
    """Return mean cross entropy, labels, predictions and confidences (each N) over batches.

    A label of -100 stays as it is: such a picture could not be decoded, and is not in the loss.
    """
    model.eval()
    logits = []
    labels = []
    for images, targets in batches:
        logits.append(model(images))
        labels.append(targets)
    logits = torch.cat(logits).cpu()
    labels = torch.cat(labels).cpu()
    loss = nn.functional.cross_entropy(logits, labels).item()  # plain, however one trains
    confidences, predictions = logits.softmax(dim=1).max(dim=1)
    return loss, labels, predictions, confidences


# ---- main ----------------------------------------------------------------------------------------


def main(argv=None):
    """Run the program with the flags in `argv`, or those typed; return 0 or raise SystemExit."""
    with endings_in_one_line():
        # normally rank is 0, world is 1, and on_process_0(f, x) is f(x); torchrun starts several
        rank, world = join_processes()
        args, saved = on_process_0(parse_args, argv)  # saved: the run to go on with, or None
        use_cuda = torch.cuda.is_available() and args.device != "cpu"
        device = torch.device("cuda" if use_cuda else "cpu")
        if args.predict:
            return on_process_0(predict, args, device)
        # 1. data (a `Data`)
        data = on_process_0(read_data, args.data, args.image_size, args.output)
        args = on_process_0(choose_defaults, args, data, device, world)
        batch_size = args.batch_size // world
        sampler = DistributedSampler(data.train, world, rank, shuffle=True, seed=args.seed)
        drop_single = len(sampler) % batch_size == 1  # batch-norm cannot train on one picture
        options = {"batch_size": batch_size, **loader_options(args.workers, device)}
        train_loader = DataLoader(data.train, sampler=sampler, drop_last=drop_single, **options)
        val_loader = DataLoader(data.val, **options)
        test_loader = DataLoader(data.test, **options)
        augment, to_input = make_transforms(data.image_size, data.mirror)
        train_batches = Batches(train_loader, device, to_input, augment)
        val_batches = Batches(val_loader, device, to_input)
        test_batches = Batches(test_loader, device, to_input)
        # 2. model
        torch.manual_seed(args.seed)
        weights = "none" if saved else args.weights  # a resumed run has weights of its own
        model = on_process_0(build_model, len(data.classes), weights, args.freeze).to(device)
        replica = DistributedDataParallel(model) if world > 1 else model  # on the same weights
        # 3. loss
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)  # smoothed, it never falls to 0
        # 4. optimizer (Adam; what decays is multiplied by the rate), and the schedule of its rate
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(
            trainable, lr=args.lr, weight_decay=0.2, decoupled_weight_decay=True, fused=True
        )
        steps = args.epochs * len(train_loader) + 1  # one more than are taken: its rate is nearly 0
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
        # 5. training; a Run begins or goes on, ends early if need be, and saves the best model
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
                validation = on_process_0(evaluate, model, val_batches)
            run.record(train_loss, seconds, validation)
        # 6. evaluation
        on_process_0(run.load_best)
        _, labels, predictions, confidences = on_process_0(evaluate, model, test_batches)
        print(*report(labels, predictions, data.classes), sep="\n", flush=True)
        on_process_0(draw_mistakes, data, labels, predictions, confidences, args.output)
        return 0


# ==== below: what keeps a real run safe ===========================================================
# ---- data sets by name ---------------------------------------------------------------------------


class Data(NamedTuple):
    """What is learnt from: three data sets that share no picture, and what is known of them."""

    name: str  # of the set, or of its folder
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
    labels = np.array(labels)
    parts = split_off_missing(labels, np.array(parts), classes, name)
    size = size or (32 if in_memory else 224)
    if in_memory:
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        labels = torch.from_numpy(labels).long()
        train, val, test = (TensorDataset(images[part], labels[part]) for part in parts)
    else:
        name = os.path.abspath(name)  # so a resumed run finds it
        train, val, test = (PicturesInFiles(pictures[part], labels[part], size) for part in parts)
        train.replace = True
    return Data(name, train, val, test, classes, size, mirror=name != "digits")


def read_cifar(name):
    """Return pixels, labels, parts and classes of CIFAR-10 or CIFAR-100, fetched if need be."""
    dataset = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder = Path("data").absolute()
    try:
        train = dataset(folder, train=True, download=True)
        test = dataset(folder, train=False, download=True)
    except Exception as error:
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
    train = np.flatnonzero(parts == "train")
    train = train[np.argsort(labels[train], kind="stable")]  # class by class: there may be many
    ends = np.cumsum(np.bincount(labels[train], minlength=len(classes)))
    for name, own in zip(classes, np.split(train, ends[:-1])):
        tenth = max(1, round(len(own) / 10))
        if len(own) <= tenth * len(missing):
            need = len(missing) + 1
            stop(f"{source}: class {name} has {len(own)} pictures to split; give it {need} or more")
        own = rng.permutation(own)
        for number, part in enumerate(missing):
            parts[own[number * tenth : (number + 1) * tenth]] = part
    return [np.flatnonzero(parts == part) for part in ("train", "val", "test")]


# ---- folders of pictures -------------------------------------------------------------------------

PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
PARTS |= {"val": "val", "valid": "val", "validation": "val"}
HIDDEN = (".", "__MACOSX", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information")
LAYOUTS = "a data set is DIR/CLASS/*.jpg, or DIR/train/CLASS/*.jpg with val and test beside train"


def read_folder(root, output):
    """Return paths, labels, parts and classes of DIR/CLASS/** or DIR/train|val|test/CLASS/**."""
    ours = [os.path.realpath(output), os.path.realpath(os.path.join(output, "previous"))]
    tops = find_parts(root, ours)
    folders = {part: list_folders(top, ours) for part, top in tops.items()}
    classes = sorted(set().union(*folders.values()))
    if len(classes) < 2:
        stop(f"{root} needs two or more classes and has {classes}; {LAYOUTS}")
    seen = {os.path.realpath(path): path for path in [*ours, root, *tops.values()]}
    for part in tops:
        for name in classes:
            if name not in folders[part]:
                stop(f"{root}: {part} has no folder {name}, as another part has; {LAYOUTS}")
            path = folders[part][name]
            same = seen.setdefault(os.path.realpath(path), path)
            if same != path:
                stop(f"{path} and {same} are one and the same folder; remove one")
    found = []
    left_out = []
    for part in tops:
        for label, name in enumerate(classes):
            files = list_files(folders[part][name], seen)
            pictures = [path for path in files if is_picture(path)]
            check_some(pictures, files, f"class {name} of {root} ({part})")
            found += [(path, label, part) for path in pictures]
            left_out += [path for path in files if not is_picture(path)]
    for top in sorted({root, *tops.values()}):
        left_out += list_files(top, seen)
    if left_out:
        names = ", ".join(left_out[:20])
        if len(left_out) > 20:
            names += ", ..."
        why = "in no folder of a class (see --predict), or of no kind that Pillow knows"
        warnings.warn(f"{len(left_out)} files are left out, {why}: {names}", stacklevel=1)
    paths, labels, parts = zip(*found)
    return np.array([os.fsencode(path) for path in paths]), labels, parts, classes


def find_parts(root, ours):
    """Return the folder of each part; if there is no division, all is there to train on."""
    folders = list_folders(root, ours)
    named = [name for name in folders if name.lower() in PARTS]
    parts = [PARTS[name.lower()] for name in named]
    flat = [name for name in named if not list_folders(folders[name], ours)]
    others = [name for name in folders if name not in named]
    if not named or (others and parts == ["train"] and flat):
        return {"train": root}  # a class may be called train
    files = {name: list_files(folders[name], ours) for name in others}
    odd = [name for name in others if any(map(is_picture, files[name]))]
    # a test folder without classes is left out, for it cannot tell the accuracy
    odd += [name for name in flat if PARTS[name.lower()] != "test"]
    if odd or "train" not in parts or len(parts) > len(set(parts)):
        names = ", ".join(odd or named)
        stop(f"{root}: it is not clear what {names} means beside {', '.join(folders)}; {LAYOUTS}")
    return {PARTS[name.lower()]: folders[name] for name in named if name not in flat}


def list_folders(folder, ours):
    """Return the visible folders in a folder, path by name, but those that are the program's."""
    names = next(os.walk(folder, onerror=stop))[1]
    paths = [os.path.join(folder, name) for name in names if not name.startswith(HIDDEN)]
    paths = [path for path in paths if os.path.realpath(path) not in ours]
    # names as one sees them: macOS writes an accent as a letter of its own
    return {unicodedata.normalize("NFC", os.path.basename(path)): path for path in sorted(paths)}


def list_files(folder, skip):
    """Return the visible files below a folder, but not below folders with a real path in `skip`.

    A link to a folder stands there as a file: it may lead round in a circle, or to another class.
    """
    found = []
    for path, folders, files in os.walk(folder, onerror=stop):
        paths = {name: os.path.join(path, name) for name in [*folders, *files]}
        folders[:] = [name for name in folders if os.path.realpath(paths[name]) not in skip]
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        files += [name for name in folders if os.path.islink(paths[name])]
        found += [paths[name] for name in files if not name.startswith(HIDDEN)]
    return sorted(found)


def is_picture(path):
    """Return whether a file has an ending that Pillow knows."""
    return os.path.splitext(path)[1].lower() in Image.registered_extensions()


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

# oddities in files that Pillow reads well; said here, so that loader workers keep to it, too
warnings.filterwarnings("ignore", module="PIL")
Image.preinit()  # so Pillow tries the most usual formats first


def open_picture(path, size):
    """Return a file as an upright RGB picture (PIL), of any size from size×size on.

    Of its metadata only the orientation counts. Raises OSError for what is no picture, is damaged,
    or has values without a known range (float, 32 bits).
    """
    if not os.path.isfile(path):  # a pipe would never answer
        raise OSError("it is not a file")
    file = io.BytesIO(without_metadata(Path(path).read_bytes()))
    try:
        image = Image.open(file)
        image.draft("RGB", (size, size))  # lets the JPEG reader skip detail that is not needed
        image.load()
    except UnidentifiedImageError as error:
        raise OSError("Pillow cannot identify it") from error
    except Exception as error:  # of a damaged file Pillow raises nearly anything
        raise OSError(reason(error)) from error
    with contextlib.suppress(Exception):  # of damaged metadata, too
        ImageOps.exif_transpose(image, in_place=True)
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    tags = getattr(image, "tag_v2", {})  # of a TIFF: 258 is bits, 262 whether 0 is white or black
    if deep and tags.get(258, (16,)) == (16,) and tags.get(262, 1) == 1:
        return Image.fromarray((np.asarray(image) // 256).astype(np.uint8)).convert("RGB")
    # Pillow mixes up the bytes of three planes of 16 bits, if they are not compressed
    planes = (tags.get(258), tags.get(259), tags.get(284)) == ((16, 16, 16), 1, 2)
    if deep or planes or image.mode in ("I", "F", "LAB", "HSV"):
        raise OSError(f"the range of its values (mode {image.mode}) is not known")
    if image.mode == "La":  # grey, multiplied by its transparency
        image = image.convert("LA")
    return image.convert("RGB")


def without_metadata(content):
    """Return a JPEG or PNG file without its metadata, which may be damaged, except for EXIF.

    What a JPEG file says of its colours, JFIF (E0) and Adobe (EE), stays, too. Other files are
    returned as they are.
    """
    if content.startswith(b"\xff\xd8"):  # JPEG: segments, up to the pixels (DA)
        content = bytearray(content)
        place = 2
        while content[place : place + 1] == b"\xff" and content[place + 1] not in (0xDA, 0xFF):
            kind = content[place + 1]
            end = place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")
            whole = kind in (0xE0, 0xE1, 0xEE) and end - place >= 16
            if 0xE0 <= kind <= 0xEF and not whole:
                content[place + 1] = 0xFE  # a comment
            place = end
    if content.startswith(b"\x89PNG"):  # chunks; those of the pixels begin with a capital letter
        kept = [content[:8]]
        place = 8
        while place < len(content):
            end = place + 12 + int.from_bytes(content[place : place + 4], "big")
            chunk = content[place:end]
            whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
            if chunk[4:5].isupper() or (chunk[4:8] == b"eXIf" and whole):
                kept.append(chunk)
            place = end
        content = b"".join(kept)
    return content


# ---- speed ---------------------------------------------------------------------------------------


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution that leaves out the taps of its kernel which see nothing but padding.

    At 32 px ResNet18 ends on maps of 2×2 and 1×1 pixels. Where the output is one pixel only, up
    to eight of its nine taps (weights of the kernel) multiply zeros, and the others are a plain
    matrix product: the same outputs and gradients with less arithmetic. It trained 1.36 times as
    many pictures a second (.ci/bench.py, two cores of an AMD EPYC with native bfloat16). On a card
    it is an ordinary convolution: there more operations take longer than more arithmetic.
    """

    def forward(self, x):
        """Return B×C×H×W for B×C×H×W."""
        if x.is_cuda or max(x.shape[2:]) > self.stride[0] or self.groups > 1:
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
    native = any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return native and torch.backends.mkldnn.is_available()  # macOS lacks the library


def choose_workers(device, files):
    """Return how many processes decode pictures: few on a CPU, which has to train, too.

    On two processors, one process that decodes and trains by turns was the fastest.
    """
    if files < 100:
        return 0
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    processors = len(affinity(0)) if affinity else os.cpu_count() or 1
    if dist.is_initialized():
        processors //= int(os.environ["LOCAL_WORLD_SIZE"])
    return min(8, processors if device.type == "cuda" else max(0, processors - 1) // 2)


# how loader workers start: on Linux as copies, at once, as they did before Python 3.14
WORKER_START = "fork" if sys.platform == "linux" else None


def loader_options(workers, device):
    """Return what all DataLoaders are given beside their pictures."""
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "multiprocessing_context": WORKER_START if workers else None,
        "worker_init_fn": prepare_worker,
        "pin_memory": device.type == "cuda",
        "generator": torch.Generator(),  # the global one is for training alone
    }


def prepare_worker(worker):
    """Make a loader worker warn as the program does, and leave Ctrl-C to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.showwarning = show_warning
    sys.excepthook = lambda *_: None  # of a thread that sends when the main process has gone
    # a worker whose batch cannot be sent would go on, and the main process wait for the batch
    leave = staticmethod(lambda error, batch: os._exit(1))
    multiprocessing.queues.Queue._on_queue_feeder_error = leave


# ---- defaults ------------------------------------------------------------------------------------


def fetch_weights(weights):
    """Return the state_dict of some torchvision weights, from torch's cache or fetched."""
    try:
        bar = sys.stderr is not None and sys.stderr.isatty()
        return weights.get_state_dict(progress=bar, check_hash=True, weights_only=True)
    except (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        hint = "try later, or give --weights none"
        stop(f"the ImageNet weights cannot be had ({reason(error)}); {hint}")


def choose_defaults(args, data, device, world):
    """Return the flags with those left unsaid chosen: the place to change a default."""
    if args.weights == "auto":
        args.weights = "imagenet"
        try:
            build_model(1, "imagenet")
        except SystemExit as problem:
            if args.freeze:
                raise
            show_banner(problem, "Starting from RANDOM weights instead, which need more pictures.")
            args.weights = "none"
    args.flags |= {"data": data.name, "weights": args.weights}
    args.image_size = data.image_size
    args.bfloat16 = has_native_bfloat16(device)
    count = len(data.train)
    if count < 2 * world:
        stop(f"{count} pictures to train on are too few for {world} processes; start fewer")
    cards = torch.cuda.device_count()
    if device.type == "cuda" and world > 1 and int(os.environ["LOCAL_WORLD_SIZE"]) > cards:
        stop(f"the processes need a card each (here: {cards}); start fewer, or say --device cpu")
    if args.batch_size is None:  # of few pictures so many that an epoch has some fifty steps
        batch_size = 128 if count > 4000 else max(8, count // 50)
        args.batch_size = max(2, batch_size // world) * world
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
    return args


def describe(args, data, model, device, world):
    """Return the lines that say what was chosen."""
    names = ", ".join(data.classes[:10])
    if len(data.classes) > 10:
        names += ", ..."
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
    if not decoded.any():
        stop("no test picture can be decoded; give others")
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
    mistakes = confusion.fill_diagonal_(0)
    if mistakes.any():
        lines += ["", "most often confused (true -> predicted):"]
    for place in mistakes.flatten().argsort(descending=True)[:5].tolist():
        one, other = divmod(place, count)
        if mistakes[one, other] > 0:
            lines.append(f"{names[one]} -> {names[other]} {mistakes[one, other]}")
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
    sheet = Image.new("RGB", (8 * 200, math.ceil(len(surest) / 8) * 240))
    for number, index in enumerate(surest):
        x = number % 8 * 200
        y = number // 8 * 240
        picture = v2.functional.to_pil_image(data.test[index][0])
        sheet.paste(picture.resize((192, 192)), (x, y))
        true = printable(data.classes[labels[index]])
        predicted = printable(data.classes[predictions[index]])
        text = f"{true:.24}\n-> {predicted:.18} {confidences[index]:.0%}"
        ImageDraw.Draw(sheet).text((x, y + 194), text, "white", font)
    file = io.BytesIO()
    sheet.save(file, "png")
    write(path, file.getvalue())
    print(f"the surest mistakes are drawn in {printable(path)}", flush=True)


# ---- prediction ----------------------------------------------------------------------------------


@torch.inference_mode()
def predict(args, device):
    """Print a line for each picture that --predict names, or that is in a folder it names.

    Returns 0; ends the program with 1 if there are files that cannot be decoded.
    """
    best = load_checkpoint(Path(args.output, "best_model.pth"), "image_size")
    classes = best["classes"]
    model = build_model(len(classes), "none")
    model.load_state_dict(best["model"])
    model.to(device).eval()
    paths = []
    for path in args.predict:
        paths += list_files(path, []) if os.path.isdir(path) else [path]
    workers = choose_workers(device, len(paths)) if args.workers is None else args.workers
    pictures = PicturesInFiles(paths, range(len(paths)), best["image_size"])  # label: which path
    _, to_input = make_transforms(best["image_size"], mirror=False)
    shown = 0
    for images, numbers in DataLoader(pictures, 64, **loader_options(workers, device)):
        shares = model(to_input(images.to(device))).softmax(dim=1)
        shares, guesses = shares.topk(min(3, len(classes)))
        for number, three, best in zip(numbers.tolist(), shares.tolist(), guesses.tolist()):
            if number != UNDECODABLE:
                texts = [f"{classes[i]} {share:.1%}" for i, share in zip(best, three)]
                print(printable("  ".join([paths[number], *texts])), flush=True)
                shown += 1
    if shown < len(paths) or not paths:
        stop(f"{len(paths) - shown} of {len(paths)} files are no pictures; name others")
    return 0


# ---- saving and resuming -------------------------------------------------------------------------

RUN_FILES = ["last.pth", "best_model.pth", "log.csv", "mistakes.png"]


class Run:
    """A training: how far it is, when it ends, and what is kept of it in the folder --output.

    history: a row for each epoch, as log.csv has them
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

    def begin(self, saved, steps):
        """Begin, or go on where a saved run was, with the rate and schedule of today's flags.

        steps: in an epoch
        """
        if saved is None:
            on_process_0(move_earlier_run_aside, self.output)
        else:
            if saved["classes"] != self.data.classes or saved["sizes"] != self.sizes:
                stop(f"{self.data.name} has other classes or pictures than the run; start anew")
            self.history = saved["history"]
            self.model.load_state_dict(saved["model"])
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({**saved["optimizer"], "param_groups": groups})
        self.optimizer.step()  # without gradients it changes nothing; schedulers want it first
        for _ in range(len(self.history) * steps):
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
            since = max(self.args.patient_since, best["epoch"] if best else 0)
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
        row = {"epoch": len(self.history) + 1, "train_loss": train_loss}
        row |= {"val_loss": None, "val_accuracy": None, "learning_rate": self.rate}
        row["images_per_second"] = len(self.data.train) / seconds
        scores = ""
        best = ""
        if validation:
            row["val_loss"], labels, predictions, _ = validation
            right = (labels == predictions)[labels != UNDECODABLE]
            if len(right) == 0:
                stop("no validation picture can be decoded; give others")
            row["val_accuracy"] = right.double().mean().item()
            scores = f"  val loss {row['val_loss']:.4f}  val accuracy {row['val_accuracy']:.2%}"
        row["seconds"] = time.perf_counter() - self.epoch_start
        self.history.append(row)
        on_process_0(self.save)
        if row is self.best():
            best = "  (best)"
        epoch = f"epoch {row['epoch']:{len(str(self.args.epochs))}}/{self.args.epochs}"
        speed = f"{row['images_per_second']:.0f} images/s  {row['seconds']:.1f} s"
        print(f"{epoch}  train loss {train_loss:.4f}{scores}  {speed}{best}", flush=True)

    def save(self):
        """Write log.csv, last.pth and, if the last epoch is the best, best_model.pth.

        In this order: a run that is killed in between writes its best model when it is resumed.
        """
        if self.history:
            row = self.history[-1]
            if not math.isfinite(row["train_loss"] + (row["val_loss"] or 0)):
                hint = f"go on from the epoch before with --resume and a --lr below {self.args.lr}"
                stop(f"the loss is no longer a number; {hint}")
            table = io.StringIO()
            writer = csv.DictWriter(table, list(row), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.history)
            write(self.output / "log.csv", table.getvalue().encode())
        kept = {"model": self.model.state_dict(), "classes": self.data.classes}
        last = {**kept, "optimizer": self.optimizer.state_dict(), "history": self.history}
        last |= {"flags": self.args.flags, "sizes": self.sizes}
        write_checkpoint(self.output / "last.pth", last)
        best = self.best()
        if best and best is self.history[-1]:
            kept |= {"image_size": self.data.image_size, "epoch": best["epoch"]}
            kept |= {"val_accuracy": best["val_accuracy"]}
            write_checkpoint(self.output / "best_model.pth", kept)

    def load_best(self):
        """Give the model the best weights; end the program if they are not of this run."""
        row = self.best()
        if row is None:
            stop("no epoch was validated; go on with --resume and more --epochs")
        path = self.output / "best_model.pth"
        best = load_checkpoint(path, "image_size")
        if (best["epoch"], best["val_accuracy"]) != (row["epoch"], row["val_accuracy"]):
            stop(f"{path} is of another run; start a new one")
        self.model.load_state_dict(best["model"])


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
        hint = "make room, or close it in other programs, then go on with --resume"
        stop(f"cannot write {path} ({reason(error)}); {hint}")


def write_checkpoint(path, checkpoint):
    """Write a checkpoint, as torch.save does, and behind it the checksum of its bytes.

    It is made in memory first, so that only the disk can fail; torch.load passes the checksum over.
    """
    file = io.BytesIO()
    torch.save(checkpoint, file)
    content = file.getvalue()
    write(path, content + hashlib.sha256(content).digest())


def load_checkpoint(path, key):
    """Return a checkpoint that `write_checkpoint` wrote, with this key; nothing is executed."""
    try:
        content = path.read_bytes()
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of what is none, torch.load raises nearly anything
        stop(f"cannot use {path} ({reason(error)}); train first, or name another --output")
    if content[-32:] != hashlib.sha256(content[:-32]).digest() or key not in checkpoint:
        stop(f"{path} is damaged, or not of this program; train again, or name another --output")
    return checkpoint


# ---- several processes, under torchrun; a single one passes through unchanged --------------------


def join_processes():
    """Return this process's number and how many there are: 0 and 1, unless torchrun started it."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    backend = "gloo"
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
            if dist.is_nccl_available():  # not on Windows
                backend = "cpu:gloo,cuda:nccl"
        timeout = datetime.timedelta(hours=2)  # a download may be slow
        dist.init_process_group(backend, timeout=timeout)
    except Exception as error:
        stop(f"the processes cannot meet ({reason(error)}); start them anew")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # process 0 alone prints
    return dist.get_rank(), dist.get_world_size()


def on_process_0(function, *args):
    """Call a function on process 0 alone; return its result, or exit as it does, on all."""
    if not dist.is_initialized():
        return function(*args)
    outcome = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function(*args)
        except SystemExit as problem:
            outcome[1] = problem
    dist.broadcast_object_list(outcome)
    result, problem = outcome
    if problem:
        if dist.get_rank() > 0:
            sys.exit(problem.code if problem.code in (0, 2) else 1)  # process 0 says why
        raise problem
    return result


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
    shows = first and sys.stderr is not None and sys.stderr.isatty()
    start = time.monotonic()
    shown = start
    for number, batch in enumerate(loader, 1):
        yield batch
        if shows and time.monotonic() - shown > 1:
            shown = time.monotonic()
            speed = number / (shown - start)
            left = datetime.timedelta(seconds=round((len(loader) - number) / speed))
            text = f"batch {number}/{len(loader)}  {loader.batch_size * speed:.0f} images/s"
            print(f"{text}  {left} left".ljust(60), end="\r", file=sys.stderr, flush=True)
    if shows:
        print(" " * 60, end="\r", file=sys.stderr, flush=True)


@contextlib.contextmanager
def endings_in_one_line():
    """Say in one line what may end a run and is nobody's mistake in the code."""
    if hasattr(sys.stdout, "reconfigure"):  # names may have letters that it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    warnings.showwarning = show_warning
    try:
        yield
        if dist.is_initialized():  # after an error it would wait for the others
            dist.destroy_process_group()
    except KeyboardInterrupt:
        hint = "go on with --resume if training had begun"
        print(f"error: interrupted; {hint}", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # whoever read what is printed has gone, as `head` does
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        stop("nobody reads what is printed any more")
    except (MemoryError, RuntimeError, OSError) as error:
        for sign, advice in ADVICE.items():
            if sign in repr(error):
                stop(advice)
        raise


NETWORK_TIMEOUT = 15  # seconds that an address of a server may stay silent
# what torch and the system say where memory runs out, and where another process is lost
NO_MEMORY = "memory ran out; go on with --resume and a smaller --batch-size or --image-size"
NO_WORKER = "a loader worker died, or could not send its pictures; give --workers 0, or more "
NO_WORKER += "shared memory (/dev/shm)"
MEMORY_SIGNS = ["MemoryError", "DefaultCPUAllocator", "out of memory", "ALLOC_FAILED"]
MEMORY_SIGNS += ["Cannot allocate memory"]
WORKER_SIGNS = ["DataLoader worker (pid", "</torch_", "<torch_"]
NO_PROCESS = "another process of the run has ended; go on with --resume"
PROCESS_SIGNS = ["gloo/transport", "remote process exited"]
ADVICE = dict.fromkeys(MEMORY_SIGNS, NO_MEMORY) | dict.fromkeys(WORKER_SIGNS, NO_WORKER)
ADVICE |= dict.fromkeys(PROCESS_SIGNS, NO_PROCESS)


# ---- flags ---------------------------------------------------------------------------------------

# the smallest values that are allowed
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
    parser.set_defaults(patient_since=0)  # patience counts from here, where a run was prolonged
    return parser


def parse_args(argv):
    """Return the flags, and what is saved of the run that is resumed, or None.

    A resumed run has the flags that it was started with, but what is typed now wins.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    saved = None
    if args.resume and not args.predict:
        saved = load_checkpoint(Path(args.output, "last.pth"), "flags")
        own = saved["flags"]
        parser.set_defaults(**own)
        parser.set_defaults(output=args.output)  # it may have moved
        args = parser.parse_args(argv)
        done = len(saved["history"])
        if args.weights == "auto":
            args.weights = own["weights"]
        if (args.weights, args.freeze) != (own["weights"], own["freeze"]):
            parser.error("--weights and --freeze are the run's own; leave them out with --resume")
        if args.epochs < done:
            parser.error(f"--epochs {args.epochs}: {done} are done; give {done} or more")
        if args.epochs > own["epochs"]:
            args.patient_since = done
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not least <= value < 2**63:
            parser.error(f"--{name.replace('_', '-')} {value}: give {least} or more, below 2**63")
    if args.freeze and args.weights == "none" and not args.predict:
        parser.error("--freeze would keep random weights; leave out --weights none")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA here; leave it out, or say --device cpu")
    args.flags = dict(vars(args))
    return args, saved


if __name__ == "__main__":
    sys.exit(main())
