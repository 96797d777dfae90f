"""What the program promises, tried on real runs of it on small real files.

    pytest test_classify.py         needs no network

A test's name is the promise. First come two runs that are followed by hand, with torch and
torchvision alone; then the flags, the data that people have, what can go wrong, and copying.
"""

import contextlib
import copy
import csv
import hashlib
import http.server
import inspect
import io
import json
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.modules import module
from torch.utils.data import TensorDataset
from torchvision import datasets, models
from torchvision.transforms import v2

import classify

with contextlib.suppress(ImportError):  # not on Windows
    import resource

README = Path(__file__).with_name("README.md").read_text("utf-8")
SMALL = "--image-size 32 --batch-size 8 --epochs 1 --weights none --device cpu --workers 0".split()
EVIL = b"cos\nmkdir\n(S'executed'\ntR."  # a pickle that makes a folder when it is read
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs signals, limits and /dev/shm")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# ---- helpers -------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def offline():
    """Nothing comes from a network or from this machine's cache of weights."""
    with contextlib.suppress(OSError):  # memory is faster than a disk, if there is enough
        if shutil.disk_usage("/dev/shm").free > 4 << 30:
            tempfile.tempdir = "/dev/shm"
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as cache:
        patch.setenv("TORCH_HOME", cache)
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # so `start` finds this file
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setenv("http_proxy", "http://127.0.0.1:9")
        patch.setenv("https_proxy", "http://127.0.0.1:9")
        yield
    tempfile.tempdir = None


@pytest.fixture(autouse=True)
def put_back():
    """Global state of torch and of sockets is as before after each test."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
    socket.setdefaulttimeout(None)


@pytest.fixture
def folder(monkeypatch):
    """An empty folder to work in, gone afterwards, as are processes left over."""
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.chdir(name)
        yield Path(name)
        for process in multiprocessing.active_children():
            process.kill()


def run(*argv, program=classify):
    """Run the program here as its users start it; return exit code, stdout and stderr."""
    out = io.StringIO()
    err = io.StringIO()
    program.warn.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["classify.py", *map(str, argv)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = program.run() or 0
            except SystemExit as stop:
                code = stop.code or 0
                if isinstance(code, str):  # the interpreter would say it
                    print(code, file=err)
                    code = 1
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def train(*argv, output="out"):
    """Run a small training here; return also what its networks saw: (training, images)."""
    seen = []
    first = []

    def note(layer, inputs):
        if isinstance(layer, models.ResNet):
            if not first:
                first.append(copy.deepcopy(layer.state_dict()))
            seen.append((layer.training, inputs[0].detach().clone()))

    handle = module.register_module_forward_pre_hook(note)
    result = run(*SMALL, "--output", output, *argv)
    handle.remove()
    return SimpleNamespace(**vars(result), output=Path(output), seen=seen, first=first[:1])


def error(result, code=1):
    """Check that a run failed as promised; return its one line of error."""
    lines = [line for line in result.err.splitlines() if "error:" in line]
    assert (result.code, len(lines)) == (code, 1), result
    assert "Traceback" not in result.err + result.out
    return lines[0]


def child(argv, cwd, out, err, variables, prepare):
    """Run the program in a session of its own, its output in files or on a terminal."""
    os.chdir(cwd)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = open(1, "w", encoding="utf-8")
    sys.stderr = open(2, "w", encoding="utf-8")
    os.environ.update(variables)
    torch.set_num_threads(1)
    prepare()
    sys.argv = ["classify.py", *argv]
    sys.exit(classify.run())


def start(*argv, cwd=".", out="out.txt", err="err.txt", variables=(), prepare=bool):
    """Start the program in a process of its own, forked from one that has torch imported.

    prepare: what to call there first
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    variables = {**os.environ, **dict(variables)}
    args = [str(arg) for arg in argv], os.path.abspath(cwd), out, err, variables, prepare
    process = context.Process(target=child, args=args)
    process.files = [Path(cwd, out), Path(cwd, err)]
    process.start()
    return process


def until(happened, process):
    """Wait until something happened, or the process has ended; return whether it happened."""
    deadline = time.monotonic() + 240
    while process.is_alive() and not happened():
        assert time.monotonic() < deadline, "it never happened"
        process.join(0.002)
    return happened()


def end(process):
    """Wait for a process; return what `run` returns."""
    until(lambda: False, process)
    out, err = (path.read_text("utf-8") for path in process.files)
    return SimpleNamespace(code=process.exitcode, out=out, err=err)


def torchrun(count, *argv, folders=None, run_id="test", restarts=0):
    """Start the program as torchrun does, in these folders; return the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": run_id}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    common |= {"TORCHELASTIC_RESTART_COUNT": str(restarts)}
    processes = []
    for rank, cwd in enumerate(folders or ["."] * count):
        variables = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        files = {"out": f"out{rank}.txt", "err": f"err{rank}.txt"}
        processes.append(start(*argv, cwd=cwd, **files, variables=variables))
    return processes


def noise(*seed, side=32):
    """Return a picture of noise as an array, side×side×3."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def paint(counts, root="pictures"):
    """Write so many pictures of noise into each of some folders: {"train/a": 5}, or link it."""
    for name, count in counts.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(count, str):
            os.symlink(count, path)
            continue
        path.mkdir(exist_ok=True)
        for number in range(count):
            Image.fromarray(noise(*path.name.encode(), number)).save(path / f"{number}.png")


def encoded(kind, **options):
    """Return what a file of a picture of noise has in it."""
    file = io.BytesIO()
    Image.fromarray(noise(0)).save(file, kind, **options)
    return file.getvalue()


def rows(output="out"):
    """Return the rows of log.csv, numbers by column."""
    path = Path(output, "log.csv")
    table = list(csv.DictReader(path.open())) if path.exists() else []
    return [{key: float(value) for key, value in row.items()} for row in table]


def load(path):
    """Return a checkpoint and the state_dict in it."""
    checkpoint = torch.load(path, weights_only=True)
    parts = [value for value in checkpoint.values() if isinstance(value, dict)]
    return checkpoint, next(part for part in parts if "fc.weight" in part)


def assert_same(one, other, but=()):
    """Check that two state_dicts are the same, bit for bit."""
    assert one.keys() == other.keys()
    for key in one.keys() - set(but):
        assert torch.equal(one[key], other[key]), key


def assert_same_run(output, other):
    """Check that two runs ended in the same weights and figures, but for the speeds."""
    for row, other_row in zip(rows(output), rows(other), strict=True):
        for key in row.keys() - {"images_per_second", "seconds"}:
            assert row[key] == other_row[key], key
    for name in ("last.pth", "best_model.pth"):
        assert_same(load(Path(output, name))[1], load(Path(other, name))[1])


def read_data(*argv):
    """Return what the program makes of the data that these flags name."""
    classify.warn.cache_clear()
    return classify.read_data(*classify.parse_args(["--output", "out", *map(str, argv)]))


# ---- one run on a folder, followed by hand -------------------------------------------------------

CLASSES = ["ant", "bee 猫", "cat"]
FLAGS = "--image-size 64 --batch-size 16 --epochs 3 --lr 0.002 --seed 3 --patience 0".split()


def normalized(arrays):
    """Return pictures, arrays H×W×3, as the network should get them: float N×3×H×W."""
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).double() / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    return ((images - mean) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)).float()


def split(classes):
    """Return the names in train, val and test by the promised rule, from those of each class."""
    rng = np.random.default_rng(0)
    parts = {"train": [], "val": [], "test": []}
    for name in sorted(classes):
        own = sorted(classes[name])
        rng.shuffle(own)
        tenth = max(1, round(len(own) / 10))
        parts["val"] += own[:tenth]
        parts["test"] += own[tenth : 2 * tenth]
        parts["train"] += own[2 * tenth :]
    return parts


def plain_epochs(first, batches, epochs, lr):
    """Train torchvision's ResNet18 with plain loops from given weights on given batches.

    Yields after each epoch the mean loss and the model.
    """
    model = models.resnet18(num_classes=len(first["fc.bias"])).to(memory_format=torch.channels_last)
    model.load_state_dict(first)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.2, fused=True)
    steps = len(batches) + 1
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    bfloat16 = classify.has_native_bfloat16(torch.device("cpu"))
    for epoch in np.array_split(np.arange(len(batches)), epochs):
        losses = []
        for images, labels in [batches[number] for number in epoch]:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = nn.functional.cross_entropy(
                    model.train()(images), labels, label_smoothing=0.1
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses += [loss.item()] * len(labels)
        yield np.mean(losses), model, scheduler.get_last_lr()[0]


def plain_logits(state, arrays):
    """Return what torchvision's ResNet18 with these weights makes of pictures: N×classes."""
    model = models.resnet18(num_classes=len(state["fc.bias"]))
    model.load_state_dict(state)
    with torch.inference_mode():
        return model.eval()(normalized(arrays))


@pytest.fixture(scope="module")
def followed():
    """A run of three epochs on DIR/CLASS/**, and what it ought to have done.

    pictures: arrays by "CLASS/NAME"; the red value of each is its own. One is a JPEG in capitals,
    one lies on its side, one is deep in folders. parts: the names in train, val and test.
    """
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "pictures")
        pictures = {}
        for label, class_name in enumerate(CLASSES):
            for number in range(20):
                file = f"{class_name}/{number:02}.png"
                pixels = noise(label, number, side=64)
                pixels[..., 0] = 4 * (20 * label + number)
                if (label, number) == (0, 7):
                    file = f"{class_name}/deep/er/07.png"
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                exif = Image.Exif()
                exif[274] = 6 if number == 8 else 1
                stored = np.rot90(pixels) if number == 8 else pixels
                Image.fromarray(stored).save(root / file, exif=exif)
                if number == 9:
                    (root / file).unlink()
                    file = f"{class_name}/09.JPG"
                    Image.fromarray(pixels).save(root / file, quality=100, subsampling=0)
                    pixels = np.asarray(Image.open(root / file))
                pictures[file] = pixels
        (root / CLASSES[0] / ".hidden.png").write_bytes(b"")
        result = train("--data", root, *FLAGS, output=Path(name, "out"))
        by_class = {c: [file for file in pictures if file.startswith(c)] for c in CLASSES}
        yield SimpleNamespace(
            **vars(result), root=root, pictures=pictures, parts=split(by_class)
        )


def label_of(file):
    """Return the label of a picture of `followed`."""
    return CLASSES.index(file.split("/")[0])


def scores_by_hand(logits, labels):
    """Return accuracy and mean cross entropy, by NumPy."""
    logits = logits.double().numpy()
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    right = logits.argmax(1) == labels
    return right.mean(), -np.log(shares[np.arange(len(labels)), labels]).mean()


def test_the_parts_are_split_by_the_rule_and_only_training_is_changed_and_shuffled(followed):
    parts = followed.parts
    assert [len(parts[name]) for name in ("train", "val", "test")] == [48, 6, 6]
    expected = [(True, 16)] * 3 + [(False, 6)]
    told = [(training, len(images)) for training, images in followed.seen]
    assert told == [*expected * 3, (False, 6)]
    by_red = {pixels[32, 32, 0]: file for file, pixels in followed.pictures.items()}
    orders = []
    changes = set()
    for training, images in followed.seen:
        reds = images[:, 0, 32, 32] * 0.229 * 255 + 0.485 * 255
        files = [by_red[min(by_red, key=lambda red: abs(red - value))] for value in reds.tolist()]
        if not training:
            part = "test" if images is followed.seen[-1][1] else "val"
            assert sorted(files) == sorted(parts[part])
            expected = normalized([followed.pictures[file] for file in files])
            torch.testing.assert_close(images.contiguous(), expected, rtol=0, atol=1e-5)
            continue
        orders.append(files)
        for file, image in zip(files, images):
            padded = np.pad(followed.pictures[file], ((2, 2), (2, 2), (0, 0)), "edge")
            crops = [padded[y : y + 64, x : x + 64] for y in range(5) for x in range(5)]
            variants = normalized(crops + [crop[:, ::-1].copy() for crop in crops])
            [number] = torch.nonzero((variants - image).abs().amax((1, 2, 3)) < 1e-4)
            changes.add(number.item())
    epochs = [sum(orders[start : start + 3], []) for start in (0, 3, 6)]
    assert all(sorted(epoch) == sorted(parts["train"]) != epoch for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(changes) > 5 and min(changes) < 25 <= max(changes)  # some are mirrored
    followed.orders = orders


def test_weights_and_losses_are_those_of_plain_torchvision_and_plain_loops(followed):
    torch.manual_seed(3)
    model = models.resnet18()
    model.fc = nn.Linear(512, 3)
    assert_same(followed.first[0], model.state_dict())  # the first weights, by the seed
    by_red = {pixels[32, 32, 0]: label_of(file) for file, pixels in followed.pictures.items()}
    batches = []
    for images in [images for training, images in followed.seen if training]:
        reds = images[:, 0, 32, 32] * 0.229 * 255 + 0.485 * 255
        labels = [by_red[min(by_red, key=lambda red: abs(red - value))] for value in reds.tolist()]
        batches.append((images, torch.tensor(labels)))
    val = [followed.pictures[file] for file in followed.parts["val"]]
    labels = np.array([label_of(file) for file in followed.parts["val"]])
    table = rows(followed.output)
    states = []
    plain = plain_epochs(model.state_dict(), batches, epochs=3, lr=0.002)
    for row, (train_loss, model, rate) in zip(table, plain, strict=True):
        states.append(copy.deepcopy(model.state_dict()))
        accuracy, val_loss = scores_by_hand(plain_logits(states[-1], val), labels)
        assert row["train_loss"] == pytest.approx(train_loss, rel=1e-4)
        assert row["val_loss"] == pytest.approx(val_loss, rel=1e-3)
        assert row["val_accuracy"] == pytest.approx(accuracy)
        assert row["learning_rate"] == pytest.approx(rate)
    moved = torch.cat([(states[-1][key] - followed.first[0][key]).flatten() for key in states[0]])
    last = load(followed.output / "last.pth")[1]
    apart = torch.cat([(states[-1][key] - last[key]).flatten() for key in states[0]])
    assert apart.norm() < 1e-3 * moved.norm()
    best = max(table, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    checkpoint, state = load(followed.output / "best_model.pth")
    assert checkpoint["epoch"] == best["epoch"] and checkpoint["classes"] == CLASSES
    assert (checkpoint["val_accuracy"], checkpoint["image_size"]) == (best["val_accuracy"], 64)
    kept = states[int(best["epoch"]) - 1]
    torch.testing.assert_close(state, kept, rtol=1e-2, atol=1e-4)
    assert best["epoch"] < 3, "of equal use only if the best is not the last"


def test_each_epoch_is_a_line_that_tells_its_row_and_log_csv_has_the_promised_columns(followed):
    lines = [line for line in followed.out.splitlines() if line.startswith("epoch")]
    header = "epoch,train_loss,val_loss,val_accuracy,learning_rate,images_per_second,seconds"
    assert (followed.output / "log.csv").read_text().splitlines()[0] == header
    best = (-1, 0)
    for line, row in zip(lines, rows(followed.output), strict=True):
        told = "epoch {epoch:.0f}/3  train loss {train_loss:.4f}  val loss {val_loss:.4f}  "
        told += "val accuracy {val_accuracy:.2%}  {images_per_second:.0f} images/s  {seconds:.1f} s"
        score = (row["val_accuracy"], -row["val_loss"])
        assert line == told.format(**row) + "  (best)" * (score > best)
        assert row["images_per_second"] * row["seconds"] > 48
        best = max(best, score)


def test_the_report_and_the_mistakes_are_those_of_the_best_weights_on_the_test_pictures(followed):
    state = load(followed.output / "best_model.pth")[1]
    files = followed.parts["test"]
    labels = np.array([label_of(file) for file in files])
    shares = plain_logits(state, [followed.pictures[file] for file in files]).softmax(1).numpy()
    guesses = shares.argmax(1)
    right = guesses == labels
    assert f"test accuracy {right.mean():.2%} ({right.sum()} of 6)" in followed.out.splitlines()
    for label, name in enumerate(CLASSES):
        hits = (right & (labels == label)).sum()
        precision = hits / max(1, (guesses == label).sum())
        recall = hits / (labels == label).sum()
        f1 = 2 * precision * recall / max(1e-9, precision + recall)
        row = rf"^{name} +{precision:.4f} +{recall:.4f} +{f1:.4f} +{(labels == label).sum()}$"
        assert re.search(row, followed.out, re.M), row
    wrong = sorted(np.flatnonzero(~right), key=lambda place: -shares[place].max())
    pairs = Counter((CLASSES[labels[place]], CLASSES[guesses[place]]) for place in wrong)
    told = re.findall(r"^(.+) -> (.+) (\d+)$", followed.out, re.M)
    assert Counter({(one, other): int(count) for one, other, count in told}) == pairs
    assert len(wrong) > 1
    sheet = np.asarray(Image.open(followed.output / "mistakes.png"))
    for number, place in enumerate(wrong):
        tile = Image.new("RGB", (200, 240))
        tile.paste(Image.fromarray(followed.pictures[files[place]]).resize((192, 192)))
        words = f"{CLASSES[labels[place]]}\n-> {CLASSES[guesses[place]]} {shares[place].max():.0%}"
        ImageDraw.Draw(tile).text((0, 194), words, "white", ImageFont.load_default(13))
        assert np.array_equal(sheet[:240, 200 * number : 200 * (number + 1)], np.asarray(tile))


def test_predict_says_for_each_picture_what_plain_torchvision_says(followed, folder):
    files = [*followed.parts["test"][:2], followed.parts["train"][0]]
    paths = [followed.root / file for file in files]
    result = run("--predict", *paths, "--output", followed.output)
    assert result.code == 0 and result.err == ""
    state = load(followed.output / "best_model.pth")[1]
    shares = plain_logits(state, [followed.pictures[file] for file in files]).softmax(1)
    for line, file, row in zip(result.out.splitlines(), files, shares, strict=True):
        path, *told = line.split("  ")
        order = row.argsort(descending=True).tolist()
        assert path == str(followed.root / file)
        assert [text.rsplit(" ", 1)[0] for text in told] == [CLASSES[label] for label in order]
        shown = [float(text.rsplit(" ", 1)[1].rstrip("%")) for text in told]
        assert shown == pytest.approx((row[order] * 100).tolist(), abs=0.1)


def test_the_start_names_the_data_and_every_flag_as_it_was_chosen(followed):
    head = followed.out[: followed.out.index("epoch 1/3")]
    told = ["reading", str(followed.root), "48 train, 6 val, 6 test", "3 classes: ant, bee 猫, cat"]
    told += [*" ".join(FLAGS).replace(" --", "|--").split("|"), "--mirror", "--weights none"]
    told += ["cpu", "workers: 0", "processes: 1", f"--output {followed.output}"]
    assert followed.code == 0 and followed.err == ""
    assert [text for text in told if text not in head] == []
    tail = followed.out.splitlines()[-1]
    assert str(followed.output) in tail and "--predict" in tail and "--resume --epochs" in tail
