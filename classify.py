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
import functools
import hashlib
import io
import os
import shutil
import socket
import sys
import time
import warnings
import zipfile
from collections import Counter
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import distributed as dist, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset
from torchvision import datasets, models
from torchvision.transforms import v2

# ---- 1. data -------------------------------------------------------------------------------------

UNDECODABLE = -100  # the label of a picture that cannot be decoded: cross entropy skips it
PRIME = 2**31 - 1  # so far away is the picture that replaces it; jumps of a prime reach them all


class PictureFiles(Dataset):
    """Picture files, decoded when they are asked for, and their labels (N whole numbers).

    A file that cannot be decoded is named in a warning. With `replace`, as in training, another one
    takes its place. Without, it becomes an empty picture with the label UNDECODABLE. In all shapes
    below, B is the number of pictures in a batch, and S the side of a picture in pixels.
    """

    def __init__(self, paths, labels, size, replace=False):
        # one array, whose memory loader processes share; a list they would slowly copy
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels)
        self.size = size
        self.replace = replace

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        """Return a picture, uint8 3×S×S, and its label. Raises OSError if the file is gone."""
        # nearly always a single attempt; with `replace`, others until a picture can be decoded
        for attempt in range(len(self) if self.replace else 1):
            place = (index + attempt * PRIME) % len(self)  # far away: neighbours are damaged, too
            path = os.fsdecode(self.paths[place])
            try:
                picture = open_picture(path, self.size)
            except ValueError as problem:
                warn(f"{path} is left out: {problem}")
                continue
            picture = ImageOps.fit(picture, (self.size, self.size))  # resized, then cropped
            return v2.functional.pil_to_tensor(picture), int(self.labels[place])
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8), UNDECODABLE


def make_augmentation(size, mirror):
    """Return a transform that changes training images, uint8 B×3×S×S, at random."""
    # padded by a pixel or more, then cropped at random: a small shift
    shift = v2.RandomCrop(size, padding=max(1, size // 32), padding_mode="edge")
    return v2.Compose([shift, v2.RandomHorizontalFlip(p=0.5 if mirror else 0.0)])


def prepare_batches(loader, device, size, augment=None):
    """Yield pairs (images, labels) for the network: images, float B×3×S×S, and labels, int64 B.

    With `augment`, as in training, the images are changed at random first.
    """
    to_float = v2.ToDtype(torch.float32, scale=True)
    # mean and deviation of the pictures that the ImageNet weights were trained with
    normalize = v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    for images, labels in show_progress(loader):
        # channels_last (another order in memory) and non_blocking are there for speed alone
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        # for sets in memory, like CIFAR-10; does nothing to picture files, which have this size
        images = v2.functional.resize(images, [size, size], v2.InterpolationMode.BICUBIC)
        if augment:  # a call changes all its images alike; one call for each would be slow
            images = torch.cat([augment(group) for group in images.split(16)])
        yield normalize(to_float(images)), labels.to(device, non_blocking=True)


# ---- 2. model ------------------------------------------------------------------------------------


def build_model(num_classes, weights, freeze=False):
    """Return a ResNet18 that gives B×num_classes logits for normalised images, float B×3×S×S.

    weights: "imagenet" for torchvision's, from its cache or downloaded, or "none" for random ones.
    Its `state_dict` fits a plain torchvision ResNet18. Raises ValueError for other weights.
    """
    if weights not in ("imagenet", "none"):
        raise ValueError(f'weights are "imagenet" or "none", not {weights!r}')
    model = models.resnet18()
    if weights == "imagenet":
        imagenet = models.ResNet18_Weights.IMAGENET1K_V1
        model.load_state_dict(imagenet.get_state_dict(check_hash=True, weights_only=True))
    if freeze:
        model.requires_grad_(False)  # no gradients: these weights stay as they are
    model.fc = nn.Linear(model.fc.in_features, num_classes)  # the head; new, so never frozen
    skip_taps_on_padding(model)  # faster, same results: skips multiplying zeros; pass over it
    return model.to(memory_format=torch.channels_last)  # faster: another order in memory


# ---- 5. training (3. loss and 4. optimizer are in `main`) ----------------------------------------


def train_one_epoch(model, batches, criterion, optimizer, scheduler, bfloat16=False):
    """Train a model on batches of (images, labels) that are on its device; return the mean loss.

    With `bfloat16` the forward pass uses mixed precision, which is faster on some processors; the
    weights stay float32.
    """
    model.train()
    for layer in model.modules():
        # in training, batch-norm updates its mean and variance, even where its weights are frozen;
        # eval() stops that (affine: it has weights)
        if isinstance(layer, nn.BatchNorm2d) and layer.affine and not layer.weight.requires_grad:
            layer.eval()
    total_loss = 0.0
    count = 0
    for images, labels in batches:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(images)
            loss = criterion(logits, labels)
        optimizer.zero_grad()  # forget the gradients of the last batch: backward adds to them
        loss.backward()  # compute the gradient of the loss for each weight
        optimizer.step()  # change each weight a little, so that the loss falls
        scheduler.step()  # set the learning rate of the next batch
        total_loss += loss.detach() * len(labels)  # (.item() would wait for the GPU)
        count += len(labels)
    return float(total_loss / count)


# ---- 6. evaluation -------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(model, batches):
    """Return mean cross entropy, labels, predictions and confidences (each N) over batches.

    A label below 0 stands for a picture that could not be decoded, and is not in the mean.
    """
    model.eval()
    total_loss = 0.0
    results = []
    for images, labels in batches:
        logits = model(images)
        # the plain loss, without smoothing, however one trains
        total_loss += nn.functional.cross_entropy(logits, labels, reduction="sum")
        probabilities = logits.softmax(dim=1)
        confidences, predictions = probabilities.max(dim=1)  # the largest value, and its place
        # a row of plain numbers for each picture (lists of small tensors waste memory)
        results += zip(labels.tolist(), predictions.tolist(), confidences.tolist())
    # from rows to columns
    labels, predictions, confidences = (torch.tensor(column) for column in zip(*results))
    return float(total_loss / (labels >= 0).sum()), labels, predictions, confidences


# ---- main ----------------------------------------------------------------------------------------


def main(argv=None):
    """Run the program with the flags in `argv`, or those typed; raise SystemExit for an error."""
    # Normally there is one process, and rank is 0. torchrun starts several that share the work:
    # on_process_0(f, x) means that process 0 calls f(x), and all get the result.
    rank, processes = join_processes()
    flags, saved = on_process_0(parse_args, argv)  # saved: last.pth with --resume, else None
    device = torch.device("cuda" if torch.cuda.is_available() and flags.device != "cpu" else "cpu")
    if flags.predict:
        return predict(flags, device) if rank == 0 else None

    # 1. data: three sets that share no picture, and a DataLoader for each; only training shuffles
    data = on_process_0(read_data, flags, saved)
    args = on_process_0(choose_defaults, flags, data, device, processes)  # flags, none left out
    train_loader, val_loader, test_loader = make_loaders(data, args, device, rank, processes)
    augment = make_augmentation(args.image_size, args.mirror)
    # 2. model
    torch.manual_seed(args.seed)
    weights = "none" if saved or rank > 0 else args.weights  # "none": overwritten below
    model = build_model(len(data.classes), weights, args.freeze).to(device)
    # DistributedDataParallel copies the weights of process 0 to all, and backward then averages the
    # gradients of all. Train through it; evaluate and save `model`, which has the same weights
    parallel_model = DistributedDataParallel(model) if processes > 1 else model
    if args.compile:  # faster; not dynamic, so that the same run gives the same numbers
        parallel_model = torch.compile(parallel_model, dynamic=False)
    # 3. loss: cross entropy; 0.1 of a label is spread over all classes, against being too sure
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    # 4. optimizer: AdamW is Adam that in each step also shrinks each weight by 0.2 × the learning
    # rate. The rate is scheduled: it rises to --lr for three tenths of the run, then falls to 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.2, fused=True)
    steps = args.epochs * len(train_loader) + 1  # + 1: the last step() asks for one more
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)

    # --resume: take weights, optimizer and history from the last saved epoch, plan the rates for
    # today's --epochs, and go on from there. In a new run the history is empty, and the id new
    history, run_id = resume(saved, model, optimizer, scheduler, len(train_loader))
    output = Path(args.output)
    if rank == 0:
        prepare_output(output, saved)
        print(describe(data, args, device, processes), flush=True)

    # 5. training
    bf16 = has_native_bfloat16(device)  # mixed precision: faster, where the processor has it
    done = history[-1]["epoch"] if history else 0
    for epoch in range(done + 1, args.epochs + 1):
        # early stop: the last --patience validations brought no new best one (0: never)
        if 0 < args.patience <= validations_since_best(history):
            if rank == 0:
                print(f"no new best in {args.patience} validations; --resume --patience 0 goes on")
            break
        train_loader.sampler.set_epoch(hash((args.seed, epoch)))  # shuffle anew
        torch.manual_seed(hash((args.seed, epoch, rank)))  # a resumed epoch draws the same
        start = time.perf_counter()
        batches = prepare_batches(train_loader, device, args.image_size, augment)
        train_loss = train_one_epoch(parallel_model, batches, criterion, optimizer, scheduler, bf16)
        images_per_second = len(data.train) / (time.perf_counter() - start)
        if epoch % args.validate_every > 0 and epoch < args.epochs:
            continue  # no validation, no row, nothing saved
        batches = prepare_batches(val_loader, device, args.image_size)
        val_loss, labels, predictions, _ = on_process_0(evaluate, model, batches)
        right = (predictions == labels)[labels != UNDECODABLE]
        row = {
            "epoch": epoch,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "val_accuracy": right.double().mean().item(),
            "learning_rate": scheduler.get_last_lr()[0],
            "images_per_second": images_per_second,
            "seconds": time.perf_counter() - start,
        }
        history.append(row)
        is_best = validations_since_best(history) == 0  # highest accuracy; if equal, lowest loss
        about = {"classes": data.classes, "image_size": args.image_size, "run_id": run_id}
        checkpoint = {"model": model.state_dict(), **about, **row}
        to_resume = {
            "optimizer": optimizer.state_dict(),
            "history": history,
            # flags as typed, not args: a resumed run chooses anew, but for its data and weights
            "flags": {**vars(flags), "data": data.name, "weights": args.weights},
            "fingerprint": data.fingerprint,  # shows whether the pictures are still the same
        }
        if rank == 0:
            if not np.isfinite(train_loss + val_loss):
                stop("the loss is not finite: lower --lr, or give pictures that can be decoded")
            save(output / "last.pth", {**checkpoint, **to_resume})
            if is_best:
                save(output / "best_model.pth", checkpoint)
            write_log(output / "log.csv", history)
            print(describe_epoch(row, args.epochs, is_best), flush=True)

    # 6. evaluation, by the best model (of this run: run_id): test pictures are used here alone
    best_checkpoint = on_process_0(load_best, output, history, run_id)
    model.load_state_dict(best_checkpoint["model"])
    batches = prepare_batches(test_loader, device, args.image_size)
    _, labels, predictions, confidences = on_process_0(evaluate, model, batches)
    if rank == 0:
        print(*report(labels, predictions, data.classes), sep="\n", flush=True)
        draw_mistakes(output, data, labels, predictions, confidences)
        print(f"next: classify.py --output {output} --predict PICTURE, or --resume --epochs N")
    if processes > 1:
        dist.destroy_process_group()


# ==== below: what keeps a real run safe, in the order in which `main` calls it ====================
# ---- flags ---------------------------------------------------------------------------------------

NAMED_SETS = ["auto", "cifar10", "cifar100", "digits"]


def make_parser():
    """Return the parser of the flags; in brackets what is taken if one is left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    devices = ["auto", "cuda", "cpu"] if torch.cuda.is_available() else ["auto", "cpu"]
    add = parser.add_argument
    add("--data", default="auto", metavar="NAME|DIR", help="cifar10, cifar100, digits, or a folder")
    add("--image-size", type=int, metavar="PX", help="side of the pictures (32; a folder's: 224)")
    add("--mirror", action=argparse.BooleanOptionalAction, help="mirror half of them (chosen)")
    add("--epochs", type=int, default=10, metavar="N", help="passes over the pictures (10)")
    add("--batch-size", type=int, metavar="N", help="pictures in a step (chosen)")
    add("--lr", type=float, help="learning rate at its peak (chosen)")
    add("--weights", default="auto", choices=["auto", "imagenet", "none"], help="to start from")
    add("--freeze", action="store_true", help="train the new head alone (train all)")
    add("--compile", action="store_true", help="train through torch.compile: slow start, then fast")
    add("--validate-every", type=int, default=1, metavar="N", help="validate every N epochs (1)")
    add("--patience", type=int, metavar="N", help="stop after N validations in vain (chosen)")
    add("--seed", type=int, default=0, metavar="N", help="same seed, same result (0)")
    add("--device", default="auto", choices=devices, help="where to compute (cuda, else cpu)")
    add("--workers", type=int, metavar="N", help="processes that decode pictures (chosen)")
    add("--output", default="checkpoint", metavar="DIR", help="where all is written (checkpoint)")
    add("--resume", action="store_true", help="go on with the run in --output; other flags win")
    add("--predict", nargs="+", metavar="PATH", help="classify these pictures, or folders of them")
    return parser


def parse_args(argv):
    """Return the flags, and what is saved of the run that is resumed, or None.

    A resumed run has the flags that it was started with, but what is typed now wins.
    """
    socket.setdefaulttimeout(15)  # seconds that a server may stay silent
    warn.cache_clear()  # in a notebook, each run says its own
    parser = make_parser()
    flags = parser.parse_args(argv)
    least = {"image_size": 1, "epochs": 1, "batch_size": 2, "lr": 1e-12, "validate_every": 1}
    for name, value in vars(flags).items():
        if type(value) in (int, float) and not least.get(name, 0) <= value < 2**63:
            parser.error(f"--{name.replace('_', '-')} {value} is out of range")
    path = Path(flags.output, "last.pth")
    # torchrun starts all processes again when one was lost; the run goes on, if it is this launch's
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and path.exists()
    saved = load_checkpoint(path, "fingerprint") if flags.resume or restarted else None
    if restarted and not flags.resume and saved["run_id"] != make_run_id():
        saved = None
    if saved:
        own = {**saved["flags"], "output": flags.output, "resume": True}
        parser.set_defaults(**own)
        flags = parser.parse_args(argv)
        for name in ("weights", "freeze", "image_size"):
            if getattr(flags, name) not in ("auto", own[name]):
                parser.error(f"--{name.replace('_', '-')} is the run's own: {own[name]}")
        flags.weights = own["weights"]
        if flags.epochs < saved["epoch"]:
            parser.error(f"--epochs: {saved['epoch']} are done; give as many or more")
    if flags.image_size is None:
        flags.image_size = 32 if flags.data in NAMED_SETS else 224
    return flags, saved


# ---- data sets -----------------------------------------------------------------------------------


class Data(NamedTuple):
    """What is learnt from: three data sets that share no picture, and what is known of them."""

    name: str  # of the set, or the path of its folder
    train: Dataset
    val: Dataset
    test: Dataset
    classes: list[str]
    fingerprint: str = ""  # changes with the names of the pictures, and so with the split


def read_data(flags, saved):
    """Return the `Data` of --data; end the program if a saved run was trained on other pictures."""
    print(f"reading  {flags.data}", flush=True)
    if flags.data in NAMED_SETS:
        data = read_named(flags.data)
    else:
        data = read_folder(flags.data, flags.image_size, flags.output)
    if saved and saved["fingerprint"] != data.fingerprint:
        stop(f"{data.name}: files were added, renamed, moved or lost since the run began")
    return data


def read_named(name):
    """Return the `Data` of a set by name, all in memory: images, uint8 N×3×32×32, and labels.

    "auto" is CIFAR-10, or digits where that is neither on disk nor can be downloaded.
    """
    if name != "digits":
        dataset = datasets.CIFAR100 if name == "cifar100" else datasets.CIFAR10
        try:
            train, test = (dataset("data", train=x, download=True) for x in (True, False))
            name = dataset.__name__.lower()
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: a wrong checksum
            problem = f"{dataset.__name__} is not in ./data and cannot be downloaded ({error})"
            if name != "auto":
                stop(f"{problem}; try again later")
            warn(f"{problem}\n\n    TRAINING ON DRAWN DIGITS, which say little of photos\n")
            name = "digits"
    if name == "digits":
        train, test = (draw_digits(count, seed) for count, seed in ((5000, 0), (1000, 1)))
    images = torch.from_numpy(np.concatenate([train.data, test.data])).permute(0, 3, 1, 2)
    labels = np.array([*train.targets, *test.targets], dtype=np.int64)
    parts = np.where(np.arange(len(labels)) < len(train.targets), "train", "test")
    split = split_off_missing(labels, parts, train.classes, name)
    sets = [TensorDataset(images[part], torch.from_numpy(labels[part])) for part in split]
    return Data(name, *sets, train.classes, fingerprint=name)


def draw_digits(count, seed):
    """Return drawn digits as torchvision has its sets: data, uint8 N×32×32×3, targets, classes."""
    rng = np.random.default_rng(seed)
    targets = np.arange(count) % 10
    data = np.zeros((count, 32, 32, 3), dtype=np.uint8)
    for index, label in enumerate(targets):
        picture = Image.fromarray(rng.integers(156, 256, (32, 32, 3), dtype=np.uint8))
        font = ImageFont.load_default(rng.integers(18, 29))
        ImageDraw.Draw(picture).text(rng.uniform(13, 19, 2), str(label), "black", font, anchor="mm")
        data[index] = picture.rotate(rng.uniform(-20, 20), fillcolor="white")
    return argparse.Namespace(data=data, targets=targets, classes=list("0123456789"))


def split_off_missing(labels, parts, classes, source):
    """Return the places of train, val and test; a missing part gets a tenth of each class.

    labels, parts: arrays of N whole numbers, and N times "train", "val" or "test"
    The split does not depend on --seed: it is always the same.
    """
    rng = np.random.default_rng(0)
    missing = [part for part in ("val", "test") if part not in parts]
    train = np.flatnonzero(parts == "train")
    train = train[np.argsort(labels[train], kind="stable")]  # class by class
    counts = np.bincount(labels[train], minlength=len(classes))
    tenths = np.maximum(1, np.rint(counts / 10)).astype(int)
    too_few = [classes[label] for label in np.flatnonzero(counts <= tenths * len(missing))]
    if too_few:
        stop(f"{source}: {len(missing) + 1} pictures a class are needed; add to {some(too_few)}")
    for own, tenth in zip(np.split(train, np.cumsum(counts)[:-1]), tenths):
        own = rng.permutation(own)
        for number, part in enumerate(missing):
            parts[own[number * tenth : (number + 1) * tenth]] = part
    return [np.flatnonzero(parts == part) for part in ("train", "val", "test")]


# ---- folders of pictures -------------------------------------------------------------------------

PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
PARTS |= {"val": "val", "valid": "val", "validation": "val"}
NO_DATA = "__MACOSX|@eaDir|Thumbs.db|desktop.ini|$RECYCLE.BIN|System Volume Information".split("|")
LAYOUTS = "use 2+ classes, none named train, val or test: DIR/CLASS/*.jpg, DIR/train/CLASS/*.jpg"


def read_folder(root, size, output):
    """Return the `Data` of DIR/CLASS/** or DIR/train|val|test/CLASS/**."""
    files = list_files(root, output)
    tops = sorted({path.split("/")[0] for path in files if "/" in path})
    named = [name for name in tops if name.lower() in PARTS]
    pictures = {}  # the paths in each (part, class)
    inner = {}  # the names of the folders in each (part, class)
    for path in files:
        folders = (path if named else f"train/{path}").split("/")[:-1]
        if len(folders) > 1:
            place = PARTS.get(folders[0].lower()), folders[1]
            inner.setdefault(place, set()).update(folders[2:3])
            pictures.setdefault(place, [])
            if path.lower().endswith(ENDINGS):
                pictures[place].append(path)
    check_layout(root, tops, named, inner)
    for (part, name), paths in pictures.items():
        check_decodes(root, paths, f"{part} pictures of class {name}")
    found = [(path, name, part) for (part, name), paths in pictures.items() for path in paths]
    paths, names, parts = zip(*found)
    left_out = [path for path in set(files) - set(paths) if not path.endswith("/")]
    if left_out:
        warn(f"left out, no picture or in no class ({len(left_out)} in all): {some(left_out)}")
    classes, labels = np.unique(names, return_inverse=True)
    split = split_off_missing(labels, np.array(parts), classes.tolist(), root)
    full_paths = np.array([os.fsencode(os.path.join(root, path)) for path in paths])
    train, val, test = (PictureFiles(full_paths[part], labels[part], size) for part in split)
    train.replace = True
    fingerprint = hashlib.sha256(os.fsencode("\n".join(paths))).hexdigest()
    return Data(os.path.abspath(root), train, val, test, classes.tolist(), fingerprint)


def list_files(root, output):
    """Return the paths of all files below a folder, relative to it, "/" between names, sorted.

    An empty folder stands there as "name/". Left out is what is hidden, what systems make, and what
    this program writes. Ends the program if a folder cannot be read.
    """
    root = os.path.join(root, "")  # ends in a separator
    ours = os.path.realpath(output)
    found = []
    for folder, folders, files in os.walk(root, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "." and name not in NO_DATA]
        files = [name for name in files if name[0] != "." and name not in NO_DATA]
        names = files if files or folders else [""]  # so an empty folder ends in a separator
        found += [os.path.join(folder, name) for name in names]
        folders[:] = [n for n in folders if os.path.realpath(os.path.join(folder, n)) != ours]
    return sorted(path[len(root) :].replace(os.sep, "/") for path in found)


def check_layout(root, tops, named, inner):
    """End the program if it is not clear what the folders mean; warn if it is not quite clear.

    tops: the folders in the root; named: those that are called train, val, test or the like
    inner: the names of the folders in each (part, class)
    """
    parts = {PARTS[name.lower()] for name in named}
    filled = {part for part, _ in inner}
    classes = {name for _, name in inner}
    real = {os.path.realpath(os.path.join(root, name)) for name in named}
    common = set.intersection(*inner.values()) if inner else set()
    # each line is looked at only if those above it found nothing
    odd = [name for name in tops if named and name not in named]
    odd = odd or ({"train"} | parts) - filled
    odd = odd or [f"{a}/{b}" for a in filled for b in classes if (a, b) not in inner]
    odd = odd or [name for name in common if name.lower() in PARTS]
    if len(parts) < len(named) or len(real) < len(named):
        odd = named
    if odd or len(classes) < 2:
        stop(f"{root}: {some(odd or classes)} is missing, alone, double or misplaced; {LAYOUTS}")
    if common:
        warn(f"each of {some(classes)} holds {some(common)}: which of them are the classes?")


def check_decodes(root, paths, what):
    """End the program if none of the first ten of these pictures can be decoded."""
    problem = "no file ends in .jpg, .png or the like"
    for path in paths[:10]:
        try:
            open_picture(os.path.join(root, path), size=1)
            return
        except ValueError as error:
            problem = f"{path}: {error}"
    stop(f"{root}: the {what} cannot be decoded ({problem}); convert them, or remove the folder")


# ---- picture files -------------------------------------------------------------------------------

# only these are opened: others may start programs, or fill the memory
FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "TGA", "AVIF"]
ENDINGS = tuple(end for end, name in Image.registered_extensions().items() if name in FORMATS)
warnings.filterwarnings("ignore", module="PIL")  # of oddities in files that it reads well


def open_picture(path, size):
    """Return a file as an upright RGB picture (PIL), white where it is transparent.

    It has its own size; a JPEG file may be decoded to a smaller one, but at least size×size.
    Raises ValueError for what cannot be decoded, or has values without a known range (float,
    32 bits), and OSError for a file that is gone or cannot be read.
    """
    try:
        file = io.BytesIO(Path(path).read_bytes())
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror} (then: --resume)") from error
    try:
        picture = Image.open(file, formats=FORMATS)
        picture.draft("RGB", (size, size))  # faster: a large JPEG is decoded at a half or less
        picture.load()
    except Exception as error:  # of a damaged file Pillow raises nearly anything
        raise ValueError(f"{type(error).__name__}: {error}".split(" <_io")[0]) from error
    with contextlib.suppress(Exception):  # what it says of its orientation may be damaged, too
        ImageOps.exif_transpose(picture, in_place=True)
    mode = picture.mode
    tags = getattr(picture, "tag_v2", {})  # of a TIFF: 258 is the bits, 262 whether 0 is black
    deep = mode.startswith("I;16") or (mode == "I" and picture.format in ("PNG", "PPM"))
    if deep and tags.get(258, (16,)) == (16,) and tags.get(262, 1) == 1:
        picture = Image.fromarray((np.asarray(picture) // 256).astype(np.uint8))
    elif deep or mode in ("I", "F", "LAB") or max(tags.get(258, (8,))) > 8:
        raise ValueError(f"the range of its values (mode {mode}) is not known")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


# ---- defaults and loaders ------------------------------------------------------------------------


def choose_defaults(flags, data, device, processes):
    """Return the flags with those left unsaid chosen: the place to change a default."""
    args = argparse.Namespace(**vars(flags))
    count = len(data.train)
    if args.weights != "none" and not args.resume:
        try:
            build_model(1, "imagenet")
            args.weights = "imagenet"
        except (OSError, HTTPException, RuntimeError, EOFError) as error:
            problem = f"the ImageNet weights cannot be had ({error})"
            if args.weights == "imagenet":
                stop(f"{problem}; try again later, or give --weights none")
            warn(f"{problem}\n\n    STARTING FROM RANDOM WEIGHTS, which need more pictures\n")
            args.weights = "none"
    if args.freeze and args.weights == "none":
        stop("--freeze needs the ImageNet weights, for it would keep random ones; leave it out")
    if args.mirror is None:
        args.mirror = data.name != "digits"
    if args.batch_size is None:  # of few pictures so many that an epoch has some fifty steps
        args.batch_size = 128 if count > 4000 else max(8, 2 * processes, count // 50)
        args.batch_size -= args.batch_size % processes
    if args.batch_size % processes or min(args.batch_size, count) < 2 * processes:
        stop(f"each of {processes} processes needs as many pictures in a batch, 2 or more")
    if args.lr is None:
        args.lr = 0.01 if args.freeze else {"imagenet": 0.001, "none": 0.003}[args.weights]
    if args.patience is None:  # so late the rate has fallen to a tenth of its peak
        args.patience = int(np.ceil(0.875 * args.epochs / args.validate_every))
    files = 0 if isinstance(data.train, TensorDataset) else count
    args.workers = choose_workers(args.workers, files, args.batch_size, args.image_size, device)
    return args


def choose_workers(said, files, batch_size, size, device):
    """Return how many processes decode pictures: few on a CPU, which has to train, too.

    On two processors, one process that decodes and trains by turns was the fastest.
    """
    # on Linux each hands over its pictures through /dev/shm, up to three batches at a time
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 2**63
    room = free // (3 * batch_size * 3 * size**2)
    if said is not None and said > room:
        stop(f"--workers {said}: /dev/shm has room for {room}; give no more, or enlarge it")
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    processors = len(affinity(0)) if affinity else os.cpu_count() or 1
    processors //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chosen = processors if device.type == "cuda" else max(0, processors - 1) // 2
    return said if said is not None else min(8, room, chosen, files // 100)


def make_loaders(data, args, device, rank, processes):
    """Return the DataLoaders of the training, validation and test pictures.

    They give batches of images, uint8 B×3×S×S, and labels, int64 B. Only training is shuffled, and
    shared among the processes; `sampler.set_epoch` sets an order by seed and epoch alone.
    """
    batch_size = args.batch_size // processes
    # fork: as copies of this process, which start at once, also in a notebook and in Python 3.14
    options = {
        "batch_size": batch_size,
        "num_workers": args.workers,
        "persistent_workers": args.workers > 0,
        "multiprocessing_context": "fork" if args.workers and sys.platform == "linux" else None,
        "pin_memory": device.type == "cuda",  # faster
        "generator": torch.Generator(),  # the global one is for training alone
    }
    sampler = DistributedSampler(data.train, processes, rank, shuffle=True)
    single = len(sampler) % batch_size == 1  # batch-norm cannot train on a batch of one picture
    train_loader = DataLoader(data.train, sampler=sampler, drop_last=single, **options)
    return train_loader, DataLoader(data.val, **options), DataLoader(data.test, **options)


# ---- speed ---------------------------------------------------------------------------------------


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution that leaves out the taps of its kernel which see nothing but padding.

    At 32 px ResNet18 ends on maps of 2×2 and 1×1 pixels. Where the output is one pixel only, up
    to eight of its nine taps (weights of the kernel) multiply zeros, and the others are a plain
    matrix product: the same outputs and gradients with less arithmetic. On a GPU it is an ordinary
    convolution: there more operations take longer than more arithmetic.
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
    native = any(able.get(name) is True for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return native and torch.backends.mkldnn.is_available()  # macOS lacks the library


# ---- saving and resuming -------------------------------------------------------------------------

RUN_FILES = ["last.pth", "best_model.pth", "log.csv", "mistakes.png"]


def make_run_id():
    """Return the name of a new run; under torchrun, one that a restart of the launch has again."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{launch} {os.getppid()}" if launch else os.urandom(8).hex()


def resume(saved, model, optimizer, scheduler, steps_per_epoch):
    """Bring model, optimizer and scheduler to where a saved run was; return its history and id.

    The rate, its schedule and the decay are those of today's flags and code. Without a saved run
    nothing is changed: the history is empty, and the id new.
    """
    if saved is None:
        return [], make_run_id()
    model.load_state_dict(saved["model"])
    today = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({**saved["optimizer"], "param_groups": today})
    optimizer.step()  # changes nothing, without gradients; PyTorch warns if a scheduler is first
    for _ in range(saved["epoch"] * steps_per_epoch):
        scheduler.step()
    return saved["history"], saved["run_id"]


def prepare_output(output, saved):
    """Move an earlier run in the folder aside, or complete the files of one that was killed."""
    output.mkdir(parents=True, exist_ok=True)
    if saved:
        if validations_since_best(saved["history"]) == 0:  # it may have been killed before this
            extra = ("optimizer", "history", "flags", "fingerprint")
            save(output / "best_model.pth", {key: saved[key] for key in saved if key not in extra})
        write_log(output / "log.csv", saved["history"])
    elif any((output / name).exists() for name in RUN_FILES):
        previous = output / "previous"
        previous.mkdir(exist_ok=True)
        for name in RUN_FILES:
            if (output / name).exists():
                os.replace(output / name, previous / name)
        print(f"the earlier run in {output} is now in {previous}", flush=True)


def validations_since_best(history):
    """Return how many rows come after the best one: of equal accuracies that of the lower loss."""
    scores = [(row["val_accuracy"], -row["val_loss"]) for row in history]
    return len(scores) - 1 - scores.index(max(scores)) if scores else 0


def save(path, checkpoint):
    """Write a checkpoint, as torch.save does; an older one stays whole until the new one is.

    Raises OSError.
    """
    with open(path.with_name("unfinished.tmp"), "wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # its context: the OSError, for example of a full disk
            raise (error.__context__ or error) from None
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def write_log(path, history):
    """Write log.csv, a row for each validated epoch; warn if another program holds it open."""
    try:
        with open(path.with_name("unfinished.tmp"), "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([history[0].keys(), *(row.values() for row in history)])
        os.replace(file.name, path)
    except OSError as error:
        warn(f"cannot write {path} ({error.strerror}); nothing is lost: --resume writes it, too")


def load_checkpoint(path, key):
    """Return a checkpoint that this program wrote, with this key; nothing in it is executed."""
    if not path.exists():
        stop(f"there is no {path}: no epoch is saved there; train first, or name another --output")
    content = path.read_bytes()
    checkpoint = None
    with contextlib.suppress(Exception):  # of what is no checkpoint, both raise nearly anything
        # torch.load does not look at the checksums in the file
        if zipfile.ZipFile(io.BytesIO(content)).testzip() is None:
            checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or key not in checkpoint:
        stop(f"{path} is damaged, or not of this program; train again, or name another --output")
    return checkpoint


def load_best(output, history, run_id):
    """Return the best checkpoint of a run; end the program if another run has replaced it."""
    best = load_checkpoint(output / "best_model.pth", "image_size")
    best_epoch = history[-1 - validations_since_best(history)]["epoch"]
    if (best["run_id"], best["epoch"]) != (run_id, best_epoch):
        stop(f"another run wrote into {output}, too, and replaced best_model.pth; train again")
    return best


# ---- report and picture of mistakes --------------------------------------------------------------


def report(labels, predictions, classes):
    """Return the lines that tell accuracy, each class's scores, and what is confused most."""
    decoded = labels != UNDECODABLE
    labels = labels[decoded]
    predictions = predictions[decoded]
    if len(labels) == 0:
        stop("no test picture can be decoded; give others")
    wrong = labels != predictions
    right = torch.bincount(labels[~wrong], minlength=len(classes))
    true = torch.bincount(labels, minlength=len(classes))
    predicted = torch.bincount(predictions, minlength=len(classes))
    precision = right / predicted.clamp(min=1)
    recall = right / true.clamp(min=1)
    f1 = 2 * right / (true + predicted).clamp(min=1)
    width = max(len(name) for name in [*classes, "class"])
    lines = [f"test accuracy {right.sum() / len(labels):.2%} ({right.sum()} of {len(labels)})", ""]
    lines.append(f"{'class':{width}}  precision  recall      F1   count")
    rows = list(zip(classes, precision, recall, f1, true))
    rows.append(("mean", precision.mean(), recall.mean(), f1.mean(), len(labels)))
    for name, p, r, f, count in rows:
        lines.append(f"{name:{width}}  {p:9.4f}  {r:6.4f}  {f:6.4f}  {count:6}")
    lines += ["", "most often confused (true -> predicted):"]
    pairs = Counter(zip(labels[wrong].tolist(), predictions[wrong].tolist()))
    for (one, other), count in pairs.most_common(5):
        lines.append(f"{classes[one]} -> {classes[other]} {count}")
    return lines


def draw_mistakes(output, data, labels, predictions, confidences):
    """Write mistakes.png: the test pictures that were most surely mistaken, and for what."""
    wrong = torch.nonzero((labels != predictions) & (labels != UNDECODABLE)).flatten()
    surest = wrong[confidences[wrong].argsort(descending=True)][:32].tolist()
    sheet = Image.new("RGB", (8 * 200, max(1, (len(surest) + 7) // 8) * 240))
    for number, index in enumerate(surest):
        tile = Image.new("RGB", (200, 240))
        tile.paste(v2.functional.to_pil_image(data.test[index][0]).resize((192, 192)))
        true, predicted = (data.classes[label[index]] for label in (labels, predictions))
        text = f"{true:.24}\n-> {predicted:.18} {confidences[index]:.0%}"
        ImageDraw.Draw(tile).text((0, 194), text, "white", ImageFont.load_default(13))
        sheet.paste(tile, (number % 8 * 200, number // 8 * 240))
    sheet.save(output / "mistakes.png")


# ---- prediction ----------------------------------------------------------------------------------


@torch.inference_mode()
def predict(flags, device):
    """Print a line for each picture that --predict names, or that is in a folder it names.

    Ends the program with an error if there are files that cannot be decoded.
    """
    checkpoint = load_checkpoint(Path(flags.output, "best_model.pth"), "image_size")
    classes = checkpoint["classes"]
    model = build_model(len(classes), "none")
    model.load_state_dict(checkpoint["model"])
    model.to(device).eval()
    paths = []
    for path in flags.predict:
        if not os.path.exists(path):
            stop(f"there is no {path}")
        if os.path.isdir(path):
            files = list_files(path, flags.output)
            paths += [os.path.join(path, name) for name in files if name.lower().endswith(ENDINGS)]
        else:
            paths.append(path)
    # in place of a label: which path
    pictures = PictureFiles(paths, range(len(paths)), checkpoint["image_size"])
    loader = DataLoader(pictures, batch_size=64, num_workers=flags.workers or 0)
    shown = 0
    for images, numbers in prepare_batches(loader, device, checkpoint["image_size"]):
        top = model(images).softmax(dim=1).topk(min(3, len(classes)))
        for number, shares, labels in zip(numbers, top.values, top.indices):
            if number != UNDECODABLE:
                shown += 1
                told = [f"{classes[label]} {share:.1%}" for label, share in zip(labels, shares)]
                print("  ".join([paths[number], *told]), flush=True)
    if shown < len(paths) or not paths:
        stop(f"only {shown} of {len(paths)} pictures could be classified")


# ---- several processes, under torchrun; a single one passes through unchanged --------------------


def join_processes():
    """Return this process's number and how many there are: 0 and 1, unless torchrun started it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    nccl = torch.cuda.is_available() and dist.is_nccl_available()  # not on Windows
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=timedelta(hours=2))
    return dist.get_rank(), dist.get_world_size()


def on_process_0(function, *args):
    """Call a function in process 0 alone, and return its result in all; its end ends them all."""
    if not dist.is_available() or not dist.is_initialized():
        return function(*args)
    result = [function(*args) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(result)
    return result[0]


# ---- what is said --------------------------------------------------------------------------------


def stop(problem):
    """End the program with an error in one line."""
    sys.exit(f"error: {problem}")


@functools.cache
def warn(text):
    """Write a warning on stderr, each text once."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def some(names):
    """Return the first twenty of some names, as a text."""
    return ", ".join(sorted(names)[:20]) + ", ..." * (len(names) > 20)


def describe(data, args, device, processes):
    """Return the lines that say what was chosen, in flags that can be typed again."""
    sizes = f"{len(data.train)} train, {len(data.val)} val, {len(data.test)} test"
    return f"""\
data     {data.name}: {sizes}; {len(data.classes)} classes: {some(data.classes)}
flags    --data {data.name} --image-size {args.image_size} --batch-size {args.batch_size} --epochs \
{args.epochs} --lr {args.lr} --weights {args.weights} --patience {args.patience} --validate-every \
{args.validate_every} --seed {args.seed} --{"" if args.mirror else "no-"}mirror --workers \
{args.workers} --device {device.type} --output {args.output}; processes: {processes}"""


def describe_epoch(row, epochs, is_best):
    """Return the line that tells what an epoch came to."""
    number = f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}"
    loss = f"train loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}"
    speed = f"{row['images_per_second']:.0f} images/s  {row['seconds']:.1f} s"
    best = "  (best)" if is_best else ""
    return f"{number}  {loss}  val accuracy {row['val_accuracy']:.2%}  {speed}{best}"


def show_progress(loader):
    """Yield the batches of a loader; in a terminal a line tells how far they are."""
    shows = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    start = shown = time.monotonic()
    for number, batch in enumerate(loader, 1):
        yield batch
        if shows and time.monotonic() - shown > 1:
            shown = time.monotonic()
            seconds = round((shown - start) / number * (len(loader) - number))
            text = f"batch {number} of {len(loader)}, {timedelta(seconds=seconds)} left"
            print(text.ljust(60), end="\r", file=sys.stderr, flush=True)


def run():
    """Run the program; say in one line what may end it and is no mistake in the code."""
    if hasattr(sys.stdout, "reconfigure"):  # names may have letters that it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main()
    except KeyboardInterrupt:
        print("error: interrupted; --resume goes on after the last epoch saved", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError:
        stop("the memory of the GPU is full; give a smaller --batch-size (with --resume, to go on)")
    except (OSError, MemoryError) as error:
        stop((str(error) or repr(error)).splitlines()[-1])  # a loader worker's is a traceback


if __name__ == "__main__" and "__file__" in globals():  # in a notebook's cell: main([...])
    sys.exit(run())
