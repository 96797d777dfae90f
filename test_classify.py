"""What the program promises, tried on real runs of it on small real files.

    pytest test_classify.py         needs no network

A test's name is the promise; the sections are those of the promises. Most runs happen inside this
process (`run`, `train`); those that are killed or typed at have a process of their own (`start`).
"""

import contextlib
import csv
import hashlib
import http.server
import importlib
import inspect
import io
import math
import multiprocessing
import os
import pickle
import re
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
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.modules import module
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import datasets, models

import classify

SMALL = "--image-size 32 --batch-size 8 --epochs 1 --weights none --device cpu --workers 0".split()
CLASSES = ["new\nline", "x" * 80, 'your "best" 猫 größe']
SHOWN = ["new\\nline", *CLASSES[1:]]
SOURCE = Path(classify.__file__).read_text("utf-8")
README = Path(__file__).with_name("README.md").read_text("utf-8")
CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs signals and terminals of Linux")


# ---- helpers -------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def offline():
    """Nothing comes from a network or from this machine's cache of weights."""
    torch.set_num_threads(1)
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


@pytest.fixture
def folder(monkeypatch):
    """A folder to work in, gone afterwards (a run leaves 200 MB), as are processes left over."""
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.chdir(name)
        yield Path(name)
        for process in multiprocessing.active_children():
            process.kill()


def run(*argv, program=classify):
    """Run the program here; return its exit code, what it printed and what it complained."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = program.main([str(arg) for arg in argv])
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):  # the interpreter would say it
                print(code, file=err)
                code = 1
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def train(*argv, output="out"):
    """Run a small training here; return also its flags, its folder and what its network saw."""
    with watched() as seen:
        result = run(*SMALL, "--output", output, *argv)
    return SimpleNamespace(**vars(result), argv=argv, output=Path(output), seen=seen)


def error(result, code=1):
    """Check that a run failed as promised; return its one line of error."""
    lines = [line for line in result.err.splitlines() if "error:" in line]
    assert (result.code, len(lines)) == (code, 1), result
    assert "Traceback" not in result.err + result.out
    return lines[0]


def child(argv, cwd, out, err, official, variables, method, memory):
    """Run the program in a session of its own, its output in files or on a terminal."""
    os.chdir(cwd)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = open(1, "w", encoding="utf-8")
    sys.stderr = open(2, "w", encoding="utf-8")
    for name, value in official.items():
        setattr(datasets.CIFAR10, name, value)
    os.environ.update(variables)
    multiprocessing.set_start_method(method, force=True)
    torch.set_num_threads(1)
    if memory:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    try:
        classify.main(argv)
    except SystemExit as stop:
        if isinstance(stop.code, str):  # the interpreter would say it
            print(stop.code, file=sys.stderr, flush=True)
        sys.exit(1 if isinstance(stop.code, str) else stop.code)


def start(*argv, out="out.txt", err="err.txt", official=(), variables=(), method=None, memory=0):
    """Start the program in a process of its own, forked from one that has torch imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    files = os.getcwd(), out, err
    args = [str(arg) for arg in argv], *files, dict(official), dict(variables), method, memory
    process = context.Process(target=child, args=args)
    process.start()
    return process


def until(happened, process):
    """Wait until something happened, or the process has ended; return whether it happened."""
    deadline = time.monotonic() + 120
    while process.is_alive() and not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)
    return happened()


def end(process, out="out.txt", err="err.txt"):
    """Wait for a process; return what `run` returns."""
    process.join()
    out, err = (Path(name).read_text("utf-8") for name in (out, err))
    return SimpleNamespace(code=process.exitcode, out=out, err=err)


def picture(seed=0, width=32):
    """Return a picture of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (32, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def paint(path, count, colour=None):
    """Write pictures of noise, or nearly of one colour, into a folder."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = picture([*path.name.encode(), number])
        if colour:
            image = Image.blend(image, Image.new("RGB", image.size, colour), 0.8)
        image.save(path / f"{number}.png")


def encoded(kind, **options):
    """Return what a picture's file has in it."""
    file = io.BytesIO()
    picture().save(file, kind, **options)
    return file.getvalue()


def rows(output="out"):
    """Return the rows of log.csv."""
    path = Path(output, "log.csv")
    return list(csv.DictReader(path.open())) if path.exists() else []


def numbers(output="out"):
    """Return what must be the same in the logs of equal runs: all but speeds."""
    timed = ("images_per_second", "seconds")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows(output)]


def load(path):
    """Return a checkpoint and the state_dict in it."""
    checkpoint = torch.load(path, weights_only=True)
    parts = [value for value in checkpoint.values() if isinstance(value, dict)]
    return checkpoint, next(part for part in parts if "fc.weight" in part)


def same(one, other):
    """Return whether two state_dicts are bit for bit the same."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def same_weights(one, other):
    """Return whether both checkpoints in two folders have the same weights."""
    names = "last.pth", "best_model.pth"
    return all(same(load(Path(one, name))[1], load(Path(other, name))[1]) for name in names)


def report(out):
    """Return the lines of the test report, but for the last, which names a file."""
    return out[out.index("test accuracy") :].splitlines()[:-1]


def torchvision_model(state):
    """Return plain torchvision's ResNet18 with these weights."""
    model = models.resnet18(num_classes=len(state["fc.bias"]))
    model.load_state_dict(state)
    return model.eval()


def as_input(images):
    """Return PIL pictures as the network gets them, by NumPy: float N×3×H×W."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images]) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)


@contextlib.contextmanager
def watched():
    """Note what each forward pass of the network is given: (whether it trains, pictures)."""
    seen = []

    def note(layer, inputs):
        if isinstance(layer, models.ResNet):
            seen.append((layer.training, inputs[0].detach().clone()))

    handle = module.register_module_forward_pre_hook(note)
    yield seen
    handle.remove()


# ---- runs that tests share -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished():
    """A run of three epochs on DIR/train|val|test/CLASS, in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        pictures = Path(name, "pictures")
        for label, title in enumerate(CLASSES):
            for part, count in (("train", 12), ("val", 3 + label), ("test", 5 - (label > 0))):
                paint(pictures / part / title, count)
        (pictures / "train" / ".hidden").mkdir()
        (pictures / "train" / CLASSES[0] / ".DS_Store").write_text("hidden")
        argv = "--data", pictures, "--epochs", 3, "--patience", 0
        yield train(*argv, output=Path(name, "out"))


@pytest.fixture
def copy(finished, folder):
    """A copy of the finished run's output, as "out" in the current folder."""
    return Path(shutil.copytree(finished.output, folder / "out"))


@pytest.fixture(scope="module")
def early(finished):
    """A run whose validation accuracy is always a half: both classes have the same picture.

    It is validated after epochs 2 and 4, and ends with the fourth. Four training pictures of
    twelve cannot be decoded.
    """
    pictures = finished.output.with_name("halves")
    for name in "ab":
        paint(pictures / "train" / name, 4)
        paint(pictures / "val" / name, 0)
        picture().save(pictures / "val" / name / "same.png")
        for number in "01":
            (pictures / "train" / name / f"bad{number}.png").write_bytes(b"no picture")
    argv = "--data", pictures, "--epochs", 9, "--patience", 1, "--validate-every", 2
    return train(*argv, output=finished.output.with_name("early"))


def colours(path, count):
    """Write pictures of one colour each, which augmentation leaves as they are, of two classes."""
    for number in range(count):
        Path(path, "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (32, 32), (number, number, number))
        image.save(Path(path, "ab"[number % 2], f"{number:03}.png"))


@pytest.fixture(scope="module")
def orders(finished):
    """A run on pictures of one colour each; its batches as lists of these colours."""
    pictures = finished.output.with_name("colours")
    colours(pictures / "train", 60)
    for name in "ab":
        paint(pictures / "val" / name, 1)
        paint(pictures / "test" / name, 1)
    argv = "--data", pictures, "--epochs", 3, "--batch-size", 16, "--lr", 0.01
    result = train(*argv, output=finished.output.with_name("orders"))
    batches = [images[:, 0, 0, 0] for training, images in result.seen if training]
    result.batches = [((b * 0.229 + 0.485) * 255).round().int().tolist() for b in batches]
    return result


@pytest.fixture
def cached(folder, monkeypatch):
    """Where torchvision keeps the ImageNet weights; random ones lie there."""
    monkeypatch.setenv("TORCH_HOME", str(folder / "cache"))
    path = folder / "cache" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    model = models.resnet18()
    model(torch.randn(4, 3, 32, 32))  # moves the running statistics
    torch.save(model.state_dict(), path)
    return path


def body(state):
    """Return a state_dict without the head."""
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


# ---- flags ---------------------------------------------------------------------------------------

UNUSABLE_FLAGS = """--epochs 0|--epochs x|--batch-size 1|--lr 0|--lr nan|--lr inf|--lr -1
--image-size 0|--patience -1|--workers -1|--seed -1|--validate-every 0|--weights some|--device tpu
--nonsense|--freeze|--predict""".replace("\n", "|").split("|")


@pytest.mark.parametrize("flags", UNUSABLE_FLAGS)
def test_unusable_flags_are_an_error_that_names_them(folder, flags):
    assert flags.split()[0] in error(train("--data", "digits", *flags.split()), code=2)
    assert not list(folder.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_cuda_without_cuda_is_an_error(folder):
    assert "cuda" in error(train("--data", "digits", "--device", "cuda"), code=2)


def chosen(count, *argv, weights="none"):
    """Return the flags as they are for so many pictures, with what was left unsaid chosen."""
    args, _ = classify.parse_args(["--weights", weights, *argv])
    images = TensorDataset(torch.zeros(count, 1), torch.zeros(count))
    data = classify.Data("digits", images, images, images, ["a", "b"], 32, False)
    return classify.choose_defaults(args, data, CPU, 1)


def test_batch_size_is_128_or_less_where_an_epoch_would_have_few_steps():
    sizes = [chosen(count).batch_size for count in (20, 160, 400, 2560, 50000)]
    assert sizes == [8, 8, 20, 128, 128]
    assert chosen(400, "--batch-size", "32").batch_size == 32


def test_the_rate_depends_on_the_weights_and_is_obeyed_if_said(cached):
    assert chosen(100).lr == 0.003
    assert chosen(100, weights="imagenet").lr == 0.001
    assert chosen(100, "--freeze", weights="imagenet").lr == 0.01
    assert chosen(100, "--lr", "0.5").lr == 0.5


@pytest.mark.parametrize("epochs", [1, 10, 20, 60, 200])
@pytest.mark.parametrize("every", [1, 2, 7])
def test_patience_left_unsaid_never_cuts_a_schedule_that_has_not_cooled_down(epochs, every):
    patience = chosen(100, f"--epochs={epochs}", f"--validate-every={every}").patience
    first_end = min(epochs, every * (patience + 1))  # if the first validation is the best
    assert rate_after(10 * first_end, 10 * epochs, top=1) < 0.1
    if epochs >= 60 and every == 1:
        assert first_end < epochs  # a run that stands still ends before its time


def rate_after(step, steps, top):
    """Return the rate after so many steps: it rises for three tenths of them, then falls to 0."""
    peak = 0.3 * (steps + 1) - 1
    start, stop, share = top / 25, top, step / peak
    if step > peak:
        start, stop, share = top, top / 25e4, (step - peak) / (steps - peak)
    return stop + (start - stop) / 2 * (1 + math.cos(math.pi * share))


@linux
def test_workers_are_no_more_than_the_processors_that_may_be_used():
    before = os.sched_getaffinity(0)
    assert classify.choose_workers(CPU, files=10) == 0
    for number in range(1, len(before) + 1):
        os.sched_setaffinity(0, list(before)[:number])
        try:
            assert 0 <= classify.choose_workers(CPU, files=10**6) <= number / 2
            assert 1 <= classify.choose_workers(torch.device("cuda"), 10**6) <= number
        finally:
            os.sched_setaffinity(0, before)


def test_same_seed_same_numbers_and_weights_and_the_earlier_run_is_moved_aside(finished, copy):
    result = train(*finished.argv)
    assert "out/previous" in result.out
    assert numbers() == numbers(finished.output) and same_weights(copy, finished.output)
    for path in finished.output.iterdir():
        assert (copy / "previous" / path.name).read_bytes() == path.read_bytes()
    picture().save("photo.png")
    assert run("--predict", "photo.png", "--output", "out/previous").code == 0


def test_another_seed_other_weights(finished, folder):
    assert train(*finished.argv, "--seed", 1, "--epochs", 1).code == 0
    assert numbers()[0]["train_loss"] != numbers(finished.output)[0]["train_loss"]


def test_validate_every_leaves_cells_empty_and_always_validates_the_last_epoch(folder):
    for name in "ab":
        paint(f"pictures/{name}", 4)
    result = train("--data", "pictures", "--epochs", 3, "--validate-every", 2)
    cells = [bool(row[key]) for row in rows() for key in ("val_loss", "val_accuracy")]
    assert cells == [False, False, True, True, True, True]
    assert re.search(r"epoch 1/3  train loss [\d.]+  \d+ images/s  [\d.]+ s\n", result.out)


def test_patience_stops_after_so_many_validations_and_of_equal_epochs_the_first_is_best(early):
    cells = [row["val_accuracy"] for row in rows(early.output)]
    assert early.code == 0 and cells == ["", "0.5", "", "0.5"]
    assert re.findall(r"epoch (\d)/9 .*\(best\)", early.out) == ["2"]
    best, last = (load(early.output / name)[1] for name in ("best_model.pth", "last.pth"))
    assert best["bn1.num_batches_tracked"] * 2 == last["bn1.num_batches_tracked"]


def test_frozen_weights_and_statistics_stay_and_no_mistakes_leave_no_picture_of_them(cached):
    for name, colour in (("a", "red"), ("b", "green"), ("c", "blue")):
        paint(f"pictures/train/{name}", 10, colour)
        paint(f"pictures/test/{name}", 2, colour)
    Path("out").mkdir()
    Path("out", "mistakes.png").write_text("an older run's")
    result = train(*"--data pictures --weights auto --freeze --epochs 4 --lr 0.1".split())
    assert result.code == 0 and "27 train, 3 val, 6 test" in result.out
    assert "weights  imagenet, 1,539 parameters" in result.out  # 3 x 512 + 3
    assert "test accuracy 100.00% (6 of 6)" in result.out
    assert not Path("out", "mistakes.png").exists()
    for name in ("last.pth", "best_model.pth"):
        assert same(body(load(Path("out", name))[1]), body(torch.load(cached)))


def test_imagenet_weights_that_cannot_be_had_or_are_malicious_are_an_error(finished, cached):
    torch.save({"fc.weight": Evil()}, cached)
    for flags in (["--weights", "imagenet"], ["--weights", "auto", "--freeze"]):
        assert "weights" in error(train(*finished.argv, *flags))
        cached.unlink(missing_ok=True)
    assert not Path("executed").exists()


# ---- data sets by name ---------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with an archive, well or badly."""

    def do_GET(self):
        archive, answer = self.server.archive, self.server.answer
        if answer == "silence":
            time.sleep(10)  # whoever waits so long is answered well
        self.send_response(200)
        self.send_header("Content-Length", str(len(archive)))
        self.end_headers()
        bad = {"half": archive[: len(archive) // 2], "rubbish": bytes(len(archive))}
        with contextlib.suppress(OSError):  # it may have gone
            self.wfile.write(bad.get(answer, archive))

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture(scope="module")
def archive():
    """Thirty pictures to train on and six to test on, packed as the official CIFAR-10."""
    packed = io.BytesIO()
    sums = {}
    rng = np.random.default_rng(0)
    contents = {"batches.meta": {"label_names": ["plane", "car", "bird"]}}
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        pixels = rng.integers(0, 256, (6, 3072), dtype=np.uint8)
        contents[name] = {"data": pixels, "labels": [0, 1, 2] * 2}
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in contents.items():
            raw = pickle.dumps(content)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(raw)
            sums[name] = hashlib.md5(raw).hexdigest()
            tar.addfile(info, io.BytesIO(raw))
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums.pop("batches.meta")}
    *first, last = map(list, sums.items())
    official = {"meta": meta, "train_list": first, "test_list": [last]}
    packed = packed.getvalue()
    return packed, {"tgz_md5": hashlib.md5(packed).hexdigest(), **official}


@pytest.fixture
def served(archive, folder, monkeypatch):
    """A function that trains while CIFAR-10's server answers in some way."""
    for name, value in archive[1].items():
        monkeypatch.setattr(datasets.CIFAR10, name, value)

    def serve(answer, *argv, output="out"):
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
            server.archive, server.answer, server.daemon_threads = archive[0], answer, True
            url = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
            monkeypatch.setattr(datasets.CIFAR10, "url", url)
            if answer == "nothing":
                server.server_close()
                return train(*argv, output=output)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            result = train(*argv, output=output)
            server.shutdown()
            return result

    return serve


def test_cifar10_is_downloaded_once_and_used_from_disk_after_that(served):
    first = served("well", "--data", "cifar10")
    assert first.code == 0 and "27 train, 3 val, 6 test, 32 x 32" in first.out
    before = numbers()
    assert served("nothing", "--data", "auto").code == 0 and numbers() == before


@pytest.mark.parametrize("answer", ["nothing", "silence", "half", "rubbish"])
def test_a_failed_download_is_an_error_and_the_next_run_starts_it_again(
    served, answer, monkeypatch
):
    monkeypatch.setattr(classify, "NETWORK_TIMEOUT", 1)
    for _ in range(2):  # the second time what the first one left is not taken for whole
        assert "cifar10" in error(served(answer, "--data", "cifar10"))
    if answer == "half":
        assert served("well", "--data", "cifar10").code == 0
        Path("data", "cifar-10-batches-py", "data_batch_3").write_bytes(b"half-unpacked")
        assert served("nothing", "--data", "cifar10").code == 0


def test_cifar100_without_a_network_is_an_error(folder):
    assert "cifar100" in error(train("--data", "cifar100"))


def test_auto_without_a_network_warns_and_trains_on_digits_which_are_always_the_same(served):
    flags = "--image-size 1 --batch-size 1500 --weights auto".split()
    auto = served("half", "--data", "auto", *flags)
    assert auto.code == 0 and "digits: 4500 train, 500 val, 1000 test" in auto.out
    assert all(word in auto.err.lower() for word in ("warning", "cifar10", "digits", "random"))
    files = {path.name for path in Path().rglob("*.*")}
    assert files == {*classify.RUN_FILES, "cifar-10-python.tar.gz"}  # none of them is on disk
    again = classify.read_data("digits", 1, "out")
    assert Counter(again.val.tensors[1].tolist()) == dict.fromkeys(range(10), 50)
    _, to_input = classify.make_transforms(1, mirror=False)
    assert torch.equal(to_input(again.test.tensors[0]), auto.seen[-1][1]) and not again.mirror


def test_a_folder_with_the_name_of_a_set_is_not_silently_overlooked(folder):
    for name in "ab":
        paint(f"cifar10/{name}", 4)
    assert "./cifar10" in train("--data", "cifar10").err
    result = train("--data", "./cifar10")
    assert "4 train, 2 val, 2 test" in result.out and not result.err


# ---- folders -------------------------------------------------------------------------------------

T = {"train/a": 5, "train/b": 5}
GOOD = {
    "classes": ({"a": 10, "b": 20}, [24, 3, 3]),
    "parts": ({**T, "val/a": 1, "val/b": 1, "test/a": 1, "test/b": 2}, [10, 2, 3]),
    "other names": ({"Training/a": 3, "Training/b": 2, "VALID/a": 1, "VALID/b": 1}, [3, 2, 2]),
    "any depth": ({"a/x/y": 5, "a/z": 5, "b": 10}, [16, 2, 2]),
    "a class called train": ({"a": 5, "b": 5, "train": 5}, [9, 3, 3]),
    "nobody's folders": ({"a": 5, "b": 5, ".git": 3, "__MACOSX/a": 3, "out/c": 3}, [6, 2, 2]),
    "an empty folder beside train": ({**T, "notes": 0}, [6, 2, 2]),
}
REFUSED = {
    "missing": ({}, "pictures"),
    "no folders": ({".": 3}, "classes"),
    "one class": ({"a": 12}, "a"),
    "an empty class": ({"a": 12, "b": 0}, "b"),
    "too few to split": ({"a": 12, "b": 2}, "b"),
    "no classes, train and test": ({"train": 5, "test": 5}, "train"),
    "no classes, train and val": ({"train": 5, "val": 5}, "val"),
    "no classes in val": ({**T, "val": 5}, "val"),
    "test beside classes": ({"a": 5, "b": 5, "test": 5}, "test"),
    "val twice": ({**T, "val/a": 1, "val/b": 1, "valid/a": 1, "valid/b": 1}, "valid"),
    "pictures beside train": ({**T, "more": 5}, "more"),
    "a class in train only": ({**T, "test/a": 5}, "b"),
    "an empty class in test": ({**T, "test/a": 1, "test/b": 0}, "b"),
    "a class in test only": ({**T, "test/a": 1, "test/b": 1, "test/z": 1}, "z"),
}


def layout(counts):
    """Write pictures into folders below "pictures"; return what the program makes of them."""
    for name, count in counts.items():
        paint(Path("pictures", name), count)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return classify.read_data("pictures", 32, "pictures/out")


@pytest.mark.parametrize("counts, sizes", GOOD.values(), ids=GOOD)
def test_layouts_that_people_have_are_understood(folder, counts, sizes):
    data = layout(counts)
    assert [len(data.train), len(data.val), len(data.test)] == sizes
    assert data.classes == ["a", "b", "train"][: 2 + ("train" in counts)] and data.mirror


@pytest.mark.parametrize("counts, named", REFUSED.values(), ids=REFUSED)
def test_unclear_layouts_are_refused_in_words_that_name_the_odd_folder(folder, counts, named):
    with pytest.raises(SystemExit, match=rf"^error: .*\b{named}\b") as stopped:
        layout(counts)
    told = str(stopped.value)
    if "empty" not in told and "split" not in told and counts:
        assert "DIR/CLASS/" in told and "DIR/train/CLASS/" in told


@linux
@pytest.mark.parametrize("link", ["val", "test/a", "train/c"])
def test_parts_and_classes_that_are_the_same_folder_are_refused(folder, link):
    target = {"val": "train", "test/a": "../train/a", "train/c": "a"}[link]
    paint("pictures/train/a", 5)
    Path("pictures", link).parent.mkdir(exist_ok=True)
    os.symlink(target, Path("pictures", link))
    with pytest.raises(SystemExit, match=rf"pictures/{link}\b.* are one and the same"):
        layout({"train/b": 5, "test/b": 2} if link == "test/a" else {"train/b": 5})


@linux
def test_links_within_a_class_are_not_followed_and_a_class_or_part_may_be_a_link(folder):
    paint("elsewhere/b/deep", 10)
    paint("elsewhere/val/a", 1)
    paint("elsewhere/val/b", 1)
    paint("pictures/train/a", 10)
    os.symlink("../../elsewhere/b", "pictures/train/b")
    os.symlink("../elsewhere/val", "pictures/val")
    os.symlink("..", "pictures/train/a/up")
    os.symlink("../b", "pictures/train/a/other")
    os.symlink("../../../elsewhere/b/deep", "pictures/train/a/deep")
    with pytest.warns(UserWarning, match=r"^1 files are left out.*: pictures/train/a/deep$"):
        data = classify.read_data("pictures", 32, "out")
    assert [len(part) for part in data[1:4]] == [18, 2, 2]


def test_a_name_means_the_same_however_its_accents_are_written(folder):
    data = layout({"train/caf\u00e9": 3, "train/b": 3, "val/cafe\u0301": 1, "val/b": 1})
    assert data.classes == ["b", "caf\u00e9"] and len(data.val) == 2


def test_what_is_left_out_is_named_before_the_start(folder):
    for name in "ab":
        paint(f"pictures/train/{name}", 5)
    paint("pictures/test", 2)
    Path("pictures", "train", "a", "labels.xyz").write_text("")
    Path("pictures", "readme.md").write_text("")
    result = train("--data", "pictures")
    assert result.code == 0 and "6 train, 2 val, 2 test" in result.out
    for name in ("labels.xyz", "readme.md", os.path.join("test", "1.png"), "--predict"):
        assert name in result.err


HOPELESS = {
    "photo.heic": b"\0\0\0\x18ftypheic",
    "photo.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
    "photo.h5": b"\x89HDF\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("name, content", HOPELESS.items(), ids=HOPELESS)
def test_a_class_without_any_picture_is_an_error_that_says_why(folder, name, content):
    paint("pictures/a", 12)
    Path("pictures", "b").mkdir()
    for number in range(12):
        Path("pictures", "b", f"{number}{name}").write_bytes(content)
    line = error(train("--data", "pictures"))
    assert "class b" in line and "12" in line and f"0{name}" in line


def test_parts_are_stratified_disjoint_and_always_the_same(folder):
    splits = [layout({"a": 10, "b": 20}), layout({})]
    names = [[os.fsdecode(path) for path in part.paths] for data in splits for part in data[1:4]]
    assert names[:3] == names[3:]
    parts = [{tuple(Path(name).parts[-2:]) for name in part} for part in names[:3]]
    assert len(set.union(*parts)) == 30 == sum(map(len, parts))
    for part in parts[1:]:
        assert Counter(name for name, _ in part) == {"a": 1, "b": 2}


def test_names_of_files_lie_in_one_array_that_workers_share(folder):
    paths = layout({"a": 10, "b": 10}).train.paths
    assert isinstance(paths, np.ndarray) and paths.dtype.kind == "S"


def test_unless_told_folders_are_seen_at_224_pixels_and_runs_written_to_checkpoint(folder):
    layout({"a": 4, "b": 4})
    assert classify.read_data("pictures", None, "out").image_size == 224
    assert run(*SMALL, "--data", "pictures").code == 0
    assert load("checkpoint/best_model.pth") and load("checkpoint/last.pth")


# ---- picture files -------------------------------------------------------------------------------


def pixels_of(path):
    """Return what the program makes of a file, at 32 px, as an array H×W×3."""
    image, label = classify.PicturesInFiles([path], [7], 32)[0]
    assert label == 7
    return image.permute(1, 2, 0).numpy()


def deep_tiff(path, pixels, bits=16, white=1, extra=()):
    """Write a TIFF as cameras and microscopes do: bits a value, whether 0 is white, more tags."""
    tags = {256: 32, 257: 32, 258: bits, 259: 1, 262: white, 273: 8, 278: 32, 279: len(pixels)}
    tags |= dict(extra)
    entries = b"".join(struct.pack("<HHIHH", t, 3, 1, tags[t], 0) for t in sorted(tags))
    head = b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels
    Path(path).write_bytes(head + struct.pack("<H", len(tags)) + entries + bytes(4))


def variants(photo):
    """Yield what is shown, and a file that shows it: its name, picture and options of saving."""
    grey = photo.convert("L")
    palette = photo.quantize(16)
    wide = picture(8, width=96)
    wide.paste(photo, (32, 0))
    turned = Image.Exif()
    turned[274] = 6
    deep = np.asarray(grey, dtype=np.uint16) * 257
    yield photo, "photo.png", photo, {}
    yield photo, "alpha.png", photo.convert("RGBA"), {}
    yield photo, "print.tif", photo.convert("CMYK"), {}
    yield photo, "wide.png", wide, {}
    yield photo, "turned.png", photo.transpose(Image.Transpose.ROTATE_90), {"exif": turned}
    yield grey, "grey.png", grey, {}
    yield grey, "grey alpha.png", grey.convert("LA"), {}
    yield grey, "16 bits.png", Image.fromarray(deep), {}
    yield grey, "16 bits.tif", Image.fromarray(deep.astype(">u2")), {}
    yield palette, "palette.png", palette, {}
    yield palette, "animated 'ä' 🐜.gif", palette, {"save_all": True, "append_images": [grey]}
    yield photo.convert("1"), "bits.png", photo.convert("1"), {}


def test_any_mode_and_size_enters_upright_scaled_and_cropped_in_the_middle(folder):
    for shown, name, image, options in variants(picture(7)):
        image.save(name, **options)
        np.testing.assert_array_equal(pixels_of(name), np.asarray(shown.convert("RGB")), name)
    grey = np.asarray(picture(7).convert("L"))
    deep = grey.astype(">u2") * 257
    Path("16 bits.pgm").write_bytes(b"P5 32 32 65535\n" + deep.astype(">u2").tobytes())
    np.testing.assert_array_equal(pixels_of("16 bits.pgm")[:, :, 0], grey)
    opaque = np.stack([grey, np.full_like(grey, 255)], 2).tobytes()
    deep_tiff("La.tif", opaque, 8, extra={277: 2, 338: 1})
    np.testing.assert_array_equal(pixels_of("La.tif")[:, :, 0], grey)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(folder, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    picture().save("turned.png", exif=exif)
    steps = {2: (1, 0), 3: (0, 2), 4: (1, 2), 5: (1, 1), 6: (0, 3), 7: (1, 3), 8: (0, 1)}
    mirrored, turns = steps.get(orientation, (0, 0))
    expected = np.asarray(picture())
    expected = np.rot90(expected[:, ::-1] if mirrored else expected, turns)
    np.testing.assert_array_equal(pixels_of("turned.png"), expected)


def chunk(kind, content, checksum=None):
    """Return a chunk of a PNG file."""
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return len(content).to_bytes(4, "big") + kind + content + checksum.to_bytes(4, "big")


def broken_metadata():
    """Yield files whose pixels are good, and whose other contents are not."""
    png = encoded("png")
    head, tail = png[:33], png[33:]
    # beside a valid orientation a resolution of -1/0, and a text where a number belongs
    tags = struct.pack("<HHHII", 3, 274, 3, 1, 3) + struct.pack("<HHII", 282, 10, 1, 50)
    tags += struct.pack("<HHI4sI", 34855, 2, 4, b"fast", 0) + struct.pack("<ii", -1, 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + tags
    yield "rational.jpg", encoded("jpeg", exif=exif)
    yield "exif.jpg", encoded("jpeg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(20))
    yield "icc.jpg", encoded("jpeg", icc_profile=b"no profile")
    yield "xmp.jpg", encoded("jpeg", xmp=b"<x:xmpmeta \xff\xfe no xml")
    yield "text.png", head + chunk(b"zTXt", b"key\0\0" + b"no zlib") + tail
    bomb = zlib.compress(bytes(10_000_000))
    yield "bomb.png", head + chunk(b"zTXt", b"key\0\0" + bomb) + tail
    yield "icc.png", head + chunk(b"iCCP", b"key\0\0" + b"no zlib") + tail
    yield "checksum.png", head + chunk(b"tEXt", b"key\0value", checksum=0) + tail
    yield "after.png", png[:-12] + chunk(b"tEXt", b"key\0value", checksum=0) + png[-12:]
    yield "raw.png", head + chunk(b"tEXt", b"Raw profile type exif\0\nexif\n4\nzzzz\n") + tail
    yield "exif.png", head + chunk(b"eXIf", b"II*\0\xff\xff\xff\xff") + tail


@pytest.mark.parametrize("name, content", list(broken_metadata()), ids=lambda x: str(x)[:12])
def test_broken_metadata_never_stops_a_picture_whose_pixels_decode(folder, name, content):
    Path(name).write_bytes(content)
    Path("good").write_bytes(encoded("jpeg" if name.endswith("jpg") else "png"))
    expected = np.asarray(Image.open("good"))
    if name == "rational.jpg":  # which lies on its head
        expected = np.rot90(expected, 2)
    np.testing.assert_array_equal(pixels_of(name), expected)


def write_undecodable(path):
    """Write files that cannot be decoded, or whose values have no known range; return names."""
    png, photo = encoded("png"), encoded("jpeg")
    flipped = bytearray(png)
    flipped[60] ^= 255
    files = {"empty.png": b"", "text.jpg": b"some text", "header.png": png[:20]}
    files |= {"truncated.png": png[:-200], "truncated.jpg": photo[: len(photo) // 2]}
    files |= {"flipped.png": bytes(flipped), "bomb.ppm": b"P6 60000 60000 255\n"}
    files |= {"stub.h5": HOPELESS["photo.h5"], "stub.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%EOF\n"}
    files |= {"two\nlines' 猫.jpg": b"no picture"}
    for name, content in files.items():
        Path(path, name).write_bytes(content)
    for mode in "IF":
        Image.new(mode, (32, 32), 70000).save(Path(path, f"mode {mode}.tif"))
    deep_tiff(Path(path, "12 bits.tif"), bytes(32 * 48), bits=12)
    deep_tiff(Path(path, "negative.tif"), bytes(32 * 64), white=0)
    os.symlink("nowhere", Path(path, "dangling.png"))
    os.mkfifo(Path(path, "pipe.png"))  # whoever reads it waits for ever
    return [name for name in os.listdir(path) if not name[0].isdigit() or "bits" in name]


@linux
def test_undecodable_files_are_named_once_a_process_and_left_out_of_every_figure(folder):
    for part, count in (("train", 4), ("val", 3), ("test", 3)):
        for name in "ab":
            paint(f"pictures/{part}/{name}", count)
        names = write_undecodable(Path("pictures", part, "a"))
    flags = ["--data", "pictures", "--epochs", 2, "--workers", 2]
    result = end(start(*SMALL, "--output", "out", *flags))
    assert result.code == 0 and " of 6)" in result.out, result
    for name in names:
        lines = [line for line in result.err.splitlines() if name.replace("\n", "\\n") in line]
        told = Counter(re.search("train|val|test", line)[0] for line in lines)
        assert set(told) == {"train", "val", "test"} and max(told.values()) <= 2, name
        assert all("left out" in line for line in lines)
    state = load("out/best_model.pth")[1]
    files = [path for name in "ab" for path in sorted(Path(f"pictures/val/{name}").glob("?.png"))]
    logits = torchvision_model(state)(as_input(map(Image.open, files)))
    right = (logits.argmax(1) == torch.tensor([0] * 3 + [1] * 3)).float().mean().item()
    assert max(float(row["val_accuracy"]) for row in rows()) == pytest.approx(right)


def test_in_training_another_picture_takes_the_place_of_one_that_cannot_be_decoded(early):
    trained = [images for training, images in early.seen if training]
    assert {len(images) for images in trained} == {8, 2}
    assert all(image.std() > 0.5 for images in trained for image in images)


@pytest.mark.parametrize("count", [2, 3, 7919, 10000])
def test_another_picture_is_found_however_many_in_a_row_are_undecodable(folder, count):
    paint(".", 1)
    bad = count * 2 // 3
    paths = ["missing.png"] * bad + ["0.png"] * (count - bad)
    data = classify.PicturesInFiles(paths, range(count), 32, replace=True)
    with pytest.warns(UserWarning, match="left out"):
        assert all(data[index][1] >= bad for index in range(0, bad, count // 100 + 1))


# ---- what the network is given -------------------------------------------------------------------


def test_training_sees_shifted_and_mirrored_pictures_and_evaluation_sees_them_as_they_are(finished):
    originals = {}
    for part in ("train", "val", "test"):
        files = (finished.argv[1] / part).glob("*/?*.png")
        originals[part] = as_input(map(Image.open, files))
    evaluated = torch.cat([images for training, images in finished.seen if not training])
    for images, part, times in ((evaluated[:36], "val", 3), (evaluated[36:], "test", 1)):
        distance = (images[:, None] - originals[part]).abs().amax((2, 3, 4))
        assert ((distance < 1e-5).sum(0) == times).all()  # each picture so often

    kinds = Counter()
    padded = nn.functional.pad(originals["train"], (1, 1, 1, 1), "replicate")
    places = [(y, x, mirrored) for y in range(3) for x in range(3) for mirrored in (0, 1)]
    for image in [image for training, images in finished.seen if training for image in images]:
        for y, x, mirrored in places:
            shifted = padded[:, :, y : y + 32, x : x + 32]
            shifted = shifted.flip(3) if mirrored else shifted
            if (shifted - image).abs().amax((1, 2, 3)).min() < 1e-5:
                kinds[y, x, mirrored] += 1
    assert kinds.total() == 3 * 36 and len(kinds) >= 8


def test_digits_are_not_mirrored_and_photos_are():
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    for mirror, kinds in ((False, 9), (True, 18)):
        augment, _ = classify.make_transforms(32, mirror)
        assert len({augment(image).numpy().tobytes() for _ in range(400)}) == kinds


def test_an_augmentation_is_drawn_anew_for_groups_of_pictures():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8).repeat(128, 1, 1, 1)
    loader = DataLoader(TensorDataset(images, torch.zeros(128, dtype=torch.int64)), 128)
    augment, to_input = classify.make_transforms(32, mirror=True)
    [(made, _)] = classify.Batches(loader, CPU, to_input, augment)
    assert 3 <= len({image.numpy().tobytes() for image in made}) <= 8


def test_an_epochs_order_is_a_permutation_that_differs_from_epoch_to_epoch(orders):
    assert [len(batch) for batch in orders.batches] == ([16] * 3 + [12]) * 3
    epochs = [sum(orders.batches[start : start + 4], []) for start in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(60)) != epoch for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_the_rate_rises_for_three_tenths_of_the_steps_and_then_falls_to_nothing(orders):
    for epoch, row in enumerate(rows(orders.output)):
        expected = rate_after(4 * epoch, 3 * 4, top=0.01)
        assert float(row["learning_rate"]) == pytest.approx(expected, rel=1e-6)


# ---- what is printed and written -----------------------------------------------------------------


def test_the_start_tells_data_and_all_that_was_chosen_and_hidden_files_are_ignored(finished):
    head = finished.out[: finished.out.index("epoch 1/3")].replace(",", "")
    told = ["pictures", "36 train 12 val 13 test", "32 x 32", SHOWN[0], "cpu", "none", "11178051"]
    told += ["batch size 8", "learning rate 0.003", "patience 0", "loader workers: 0"]
    told += ["bfloat16" if classify.has_native_bfloat16(CPU) else "float32"]
    assert finished.code == 0 and all(text in head for text in told)
    assert finished.out.startswith("reading") and finished.err == ""


def test_each_epoch_is_a_line_and_a_row_and_the_best_is_kept(finished):
    lines = [line for line in finished.out.splitlines() if line.startswith("epoch")]
    header = "epoch,train_loss,val_loss,val_accuracy,learning_rate,images_per_second,seconds"
    assert (finished.output / "log.csv").read_text().splitlines()[0] == header
    best = -1
    for number, (line, row) in enumerate(zip(lines, rows(finished.output), strict=True), 1):
        row = {key: float(value) for key, value in row.items()}
        told = "epoch {epoch:.0f}/3  train loss {train_loss:.4f}  val loss {val_loss:.4f}  "
        told += "val accuracy {val_accuracy:.2%}  {images_per_second:.0f} images/s  {seconds:.1f} s"
        assert line == told.format(**row) + "  (best)" * (row["val_accuracy"] > best)
        assert row["epoch"] == number and row["images_per_second"] * row["seconds"] > 36
        best = max(best, row["val_accuracy"])
    kept = list(load(finished.output / "best_model.pth")[0].values())
    accuracies = [float(row["val_accuracy"]) for row in rows(finished.output)]
    assert best in kept and accuracies.index(best) + 1 in kept and CLASSES in kept and 32 in kept


def test_report_and_validation_are_those_of_plain_torchvision(finished):
    model = torchvision_model(load(finished.output / "best_model.pth")[1])
    confusion = np.zeros((3, 3))
    losses = []
    right = 0
    for label, title in enumerate(CLASSES):
        with torch.no_grad():
            val, test = (
                model(as_input(map(Image.open, (finished.argv[1] / part / title).glob("*"))))
                for part in ("val", "test")
            )
        confusion[label] = test.argmax(1).bincount(minlength=3)
        losses += (val.logsumexp(1) - val[:, label]).tolist()
        right += (val.argmax(1) == label).sum().item()
    best = max(rows(finished.output), key=lambda row: float(row["val_accuracy"]))
    assert float(best["val_accuracy"]) == right / 12
    assert float(best["val_loss"]) == pytest.approx(np.mean(losses), rel=1e-3)

    text, right = "\n".join(report(finished.out)), confusion.diagonal()
    assert text.startswith(f"test accuracy {right.sum() / 13:.2%} ({right.sum():.0f} of 13)\n")
    true, predicted = confusion.sum(1), confusion.sum(0)
    scores = np.stack([right / predicted.clip(1), right / true, 2 * right / (true + predicted)], 1)
    expected = [*np.column_stack([scores, true]), [*scores.mean(0), 13]]
    table = re.findall(r"^(.+?) +(\d\.\d{4}) +(\d\.\d{4}) +(\d\.\d{4}) +(\d+)$", text, re.M)
    assert [name for name, *_ in table] == [*SHOWN, "mean"]
    np.testing.assert_allclose(np.float64([row[1:] for row in table]), expected, atol=1e-4)
    pairs = re.findall(r"^(.+) -> (.+) (\d+)$", text, re.M)
    wrong = (confusion - np.diag(right)).ravel()
    assert [int(count) for *_, count in pairs] == sorted(wrong[wrong > 0], reverse=True)[:5]
    for one, other, count in pairs:
        assert confusion[SHOWN.index(one), SHOWN.index(other)] == int(count)


def test_the_surest_mistakes_are_drawn_whatever_the_classes_are_called(folder):
    images = torch.randint(0, 256, (50, 1, 1, 1), dtype=torch.uint8).repeat(1, 3, 32, 32)
    labels = torch.zeros(50, dtype=torch.int64)
    predictions = torch.arange(50) % 2  # 25 mistakes, and one that could not be decoded
    labels[49] = -100
    confidences = torch.rand(50)
    test = TensorDataset(images, labels)
    data = classify.Data("test", test, test, test, [CLASSES[1], "猫" * 50], 32, True)
    classify.draw_mistakes(data, labels, predictions, confidences, ".")
    wrong = [index for index in range(49) if index % 2]
    wrong.sort(key=lambda index: -confidences[index])
    with Image.open("mistakes.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape == (3 * 240, 8 * 200, 3)
    for number, index in enumerate(wrong):
        tile = sheet[number // 8 * 240 :, number % 8 * 200 :][:240, :200]
        assert (tile[:192, :192] == images[index, 0, 0, 0].item()).all() and tile[192:].any()


@linux
def test_a_terminal_shows_how_far_the_epoch_is_and_ctrl_c_ends_with_130(folder):
    ours, its = os.openpty()
    os.set_blocking(ours, False)
    for name in "ab":
        paint(f"pictures/{name}", 250)
    process = start(*SMALL, "--data", "pictures", "--workers", 1, err=os.ttyname(its))
    shown = b""

    def waiting_line():
        nonlocal shown
        with contextlib.suppress(BlockingIOError):
            shown += os.read(ours, 9999)
        return re.search(rb"batch \d+/\d+ .*\d images/s .* left", shown)

    assert until(waiting_line, process) and b"\n" not in shown
    os.write(ours, b"\x03")
    process.join()
    waiting_line()
    assert process.exitcode == 130 and shown.count(b"error:") == 1 and b"Traceback" not in shown
    assert b"interrupted; go on with --resume" in shown


def test_time_left_is_shown_right_beyond_a_day(folder, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    batches = DataLoader(TensorDataset(torch.zeros(10**6, 1)))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = classify.show_progress(batches)
    next(progress)
    time.sleep(1.1)
    next(progress)
    days = re.search(r"(\d+) days, \d+:\d\d:\d\d left", terminal.getvalue())
    assert int(days[1]) in range(12, 14)  # a million batches of 1.1 seconds


# ---- prediction ----------------------------------------------------------------------------------


def test_predict_gives_the_shares_of_plain_torchvision_in_any_folder(finished, folder):
    picture(7).save("photo.png")
    result = run("--predict", "photo.png", "--output", finished.output)
    assert result.code == 0 and result.err == ""
    model = torchvision_model(load(finished.output / "best_model.pth")[1])
    with torch.no_grad():
        shares, labels = model(as_input([picture(7)]))[0].softmax(0).sort(descending=True)
    told = "  ".join(rf"{re.escape(SHOWN[label])} (\d+\.\d)%" for label in labels)
    found = re.fullmatch(rf"photo\.png  {told}\n", result.out).groups()
    assert list(map(float, found)) == pytest.approx((shares * 100).tolist(), abs=0.06)


@linux
def test_predict_takes_folders_names_what_it_cannot_read_and_classifies_the_rest(finished, folder):
    paint("some/deep/er", 70)
    picture().save("good.png")
    Path("some", "notes.txt").write_text("no picture")
    argv = ["good.png", "some", "missing.png", "good.png"]
    flags = ["--output", finished.output, "--workers", 1, "--predict", *argv]
    result = end(start(*flags, method="spawn"))
    assert result.code == 1 and "Traceback" not in result.err
    lines = result.out.splitlines()
    names = [line.split("  ")[0] for line in lines]
    deep = sorted(os.path.join("some", "deep", "er", f"{number}.png") for number in range(70))
    assert names == ["good.png", *deep, "good.png"] and lines[0] == lines[-1]
    assert "notes.txt" in result.err and "missing.png" in result.err
    assert "2 of 74" in error(result)


# ---- what cannot hurt it -------------------------------------------------------------------------


@linux
def test_ctrl_c_while_a_checkpoint_is_written_ends_with_130(finished, folder):
    process = start(*SMALL, *finished.argv, "--output", "out")

    def half_written():
        with contextlib.suppress(OSError, StopIteration):
            return next(Path("out").glob("last.pth.*.tmp")).stat().st_size > 1 << 20

    assert until(half_written, process)
    os.kill(process.pid, signal.SIGINT)
    assert "interrupted; go on with --resume" in error(end(process), code=130)


@linux
@pytest.mark.parametrize("how", ["killed", "cannot send"])
def test_a_loader_worker_that_is_lost_is_an_error_that_names_a_remedy(folder, how):
    import resource

    for name in "ab":
        paint(f"pictures/{name}", 30)
    flags = ["--data", "pictures", "--epochs", 99, "--patience", 0]
    process = start(*SMALL, *flags, "--output", "out", "--workers", 1)
    assert until(rows, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    worker = int(children.read_text().split()[0])
    if how == "killed":
        os.kill(worker, signal.SIGKILL)
    else:  # as where /dev/shm is full
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (1, 1))
    start_of_wait = time.monotonic()
    line = error(end(process))
    assert time.monotonic() - start_of_wait < 60  # the loader itself would wait for 300 seconds
    assert "--workers 0" in line and "shared memory" in line
    assert run("--resume", "--workers", 0, "--epochs", len(rows()), "--output", "out").code == 0


@linux
def test_memory_that_runs_out_is_an_error_whose_advice_works(folder):
    for name in "ab":
        paint(f"pictures/{name}", 40)
    flags = [*SMALL, "--data", "pictures", "--output", "out"]
    large = ["--image-size", 512, "--batch-size", 60]
    assert "--batch-size" in error(end(start(*flags, *large, memory=1 << 30)))
    smaller = ["--resume", "--image-size", 32, "--batch-size", 8]
    assert run(*smaller, "--output", "out").code == 0


def test_an_output_that_is_a_file_is_an_error(finished, folder):
    Path("out").write_text("a file")
    assert "out" in error(train(*finished.argv))
    assert Path("out").read_text() == "a file"


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", ["best_model.pth", "last.pth"])
def test_a_damaged_foreign_or_malicious_checkpoint_is_an_error(copy, name):
    flags = {"best_model.pth": ["--predict", "photo.png"], "last.pth": ["--resume"]}
    picture().save("photo.png")
    content = (copy / name).read_bytes()
    checkpoint, state = load(copy / name)
    flipped = bytearray(content)
    flipped[len(content) // 3] ^= 1
    damaged = [b"", b"some text", content[: len(content) // 2], content[:-1], bytes(flipped)]
    evil = pickle.dumps(Evil())
    damaged += [evil, evil + hashlib.sha256(evil).digest()]
    for other in (state, {**checkpoint, "classes": [1, 2, 3]}, {**checkpoint, "more": Evil()}):
        file = io.BytesIO()
        torch.save(other, file)
        damaged.append(file.getvalue())
    damaged += [(copy / other).read_bytes() for other in flags if other != name]
    for bad in damaged:
        (copy / name).write_bytes(bad)
        assert name in error(run("--output", "out", *flags[name]))
    assert not Path("executed").exists()


def test_a_best_model_of_another_run_is_an_error(orders, copy):
    shutil.copy(orders.output / "best_model.pth", copy)
    assert "another run" in error(run("--resume", "--output", copy))


@pytest.mark.parametrize("batch", [8, 128])
def test_a_last_batch_of_one_picture_and_fewer_pictures_than_a_batch_train(folder, batch):
    for name, count in {"train/a": 6, "train/b": 5, "val/a": 1, "val/b": 1}.items():
        paint(Path("pictures", name), count)
    result = train("--data", "pictures", "--batch-size", batch)
    assert result.code == 0 and "9 train, 2 val, 2 test" in result.out and len(rows()) == 1
    if batch == 128:  # a single step, at about the rate that was asked for
        assert 0.0015 < float(rows()[0]["learning_rate"]) <= 0.003


def test_a_loss_that_is_no_number_is_an_error_whose_advice_works_and_the_best_model_stays(copy):
    best = (copy / "best_model.pth").read_bytes()
    line = error(run("--resume", "--epochs", 5, "--lr", "1e18", "--output", copy))
    assert "--lr" in line and (copy / "best_model.pth").read_bytes() == best
    assert run("--resume", "--epochs", 4, "--lr", 0.001, "--output", copy).code == 0


@linux
@pytest.mark.parametrize("megabytes", [1, 60])  # too few before the first epoch, and after it
def test_a_full_disk_is_an_error_and_the_older_checkpoints_are_whole(finished, copy, megabytes):
    import resource

    kept = {path.name: path.read_bytes() for path in copy.iterdir()}
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes << 20, hard))
    try:
        result = train(*finished.argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert "last.pth" in error(result)
    assert all((copy / "previous" / name).read_bytes() == kept[name] for name in kept)
    assert not list(copy.glob("*.tmp"))
    if megabytes == 60:
        assert load(copy / "last.pth")


@linux
def test_closed_stdout_a_c_locale_and_stray_variables_do_not_matter(finished, folder):
    picture().save("photo.png")
    main = "import sys, torch, classify; torch.set_num_threads(1); sys.exit(classify.main())"
    command = f"{sys.executable} -c '{main}' --output '{finished.output}' --predict"
    command = f"{command} {'photo.png ' * 99} | head -1"
    stray = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "RANK": ""}
    stray |= {"WORLD_SIZE": "x", "LOCAL_RANK": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
    stray |= {"LOCAL_WORLD_SIZE": "0"}
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, **stray}
    )
    assert result.returncode == 0 and result.stdout.startswith("photo.png  "), result
    assert "\\u732b" in result.stdout and "Traceback" not in result.stderr
    with pytest.MonkeyPatch.context() as patch:  # as with >&- or pythonw
        patch.setattr(sys, "stdout", None)
        assert classify.main(["--predict", "photo.png", "--output", str(finished.output)]) == 0


# ---- going on ------------------------------------------------------------------------------------


def test_a_finished_run_that_is_resumed_is_tested_again(finished, copy):
    os.rename(copy, "checkpoint")  # where it is looked for, wherever it was before
    result = run("--resume", "--workers", 1)
    assert result.code == 0 and report(result.out) == report(finished.out)
    assert os.path.join("checkpoint", "mistakes.png") in result.out
    assert rows("checkpoint") == rows(finished.output)
    assert same_weights("checkpoint", finished.output)


def test_more_epochs_go_on_with_the_schedule_that_is_now_planned(finished, copy):
    assert train(*finished.argv, "--resume", "--epochs", 4, "--lr", 0.02).code == 0
    old, new = rows(finished.output), rows()
    assert new[:3] == old and len(new) == 4
    expected = rate_after(3 * 5, 4 * 5, top=0.02)
    assert float(new[3]["learning_rate"]) == pytest.approx(expected, rel=1e-6)
    assert "--epochs 3" in error(run("--resume", "--epochs", 3, "--output", copy), code=2)
    assert run("--resume", "--output", copy).code == 0 and len(rows()) == 4


def test_after_an_early_stop_more_epochs_go_on_and_are_counted_anew(early, folder):
    shutil.copytree(early.output, "out")
    assert run("--resume", "--output", "out").code == 0 and len(rows()) == 4
    assert run("--resume", "--epochs", 12, "--output", "out").code == 0 and len(rows()) == 6


def test_the_data_may_lie_elsewhere_and_the_batch_be_smaller(finished, copy, monkeypatch):
    shutil.copytree(finished.argv[1], "moved")
    flags = ["--data", "moved/", "--batch-size", 5, "--epochs", 4]
    result = run("--resume", *flags, "--output", copy)
    assert result.code == 0 and "batch size 5" in result.out and len(rows()) == 4
    monkeypatch.chdir(copy)  # from where "moved" is another folder
    assert run("--resume", "--output", ".").code == 0


def test_what_identifies_a_run_cannot_be_changed(finished, copy):
    for flags in (["--weights", "imagenet"], ["--freeze"]):
        assert flags[0] in error(run("--resume", *flags, "--output", copy), code=2)
    shutil.copytree(finished.argv[1], "other")
    paint(Path("other", "val", CLASSES[0]), 9)
    shutil.copytree(finished.argv[1], "renamed")
    for part in ("train", "val", "test"):
        os.rename(f"renamed/{part}/{CLASSES[0]}", f"renamed/{part}/another")
    for other in ("other", "renamed"):
        assert other in error(run("--resume", "--data", other, "--output", copy))


def kill_and_resume(*argv, moments, official=()):
    """Start a run, kill it at each of some moments and resume it; return how it ended."""
    for happened in [*moments, lambda: False]:
        process = start(*argv, "--output", "out", official=official)
        if until(happened, process):
            process.kill()
        process.join()
        for path in Path("out").glob("*.pth"):
            load(path)
        argv = ["--resume"]
    return end(process)


def written(name):
    """Return when a file of a run was written, 0 if it is not there."""
    path = Path("out", name)
    return path.stat().st_mtime_ns if path.exists() else 0


BEFORE_THE_FIRST_BATCH = lambda: written("last.pth")  # noqa: E731
WHILE_AN_EPOCH_IS_SAVED = lambda: len(rows()) >= 1  # noqa: E731
WHEN_IT_HAS_JUST_BEEN = lambda: rows() and written("log.csv") < written("last.pth")  # noqa: E731


@linux
def test_killed_at_any_moment_a_run_in_memory_ends_in_the_same_bits(served, archive):
    argv = "--data", "cifar10", "--epochs", 3
    moments = BEFORE_THE_FIRST_BATCH, WHILE_AN_EPOCH_IS_SAVED
    assert served("well", *argv, output="whole").code == 0
    assert kill_and_resume(*SMALL, *argv, moments=moments, official=archive[1]).code == 0
    assert numbers() == numbers("whole") and same_weights("out", "whole")


@linux
def test_killed_at_any_moment_a_run_with_workers_ends_in_the_same_bits(early, folder):
    flags = [*SMALL, *early.argv, "--workers", 1]
    result = kill_and_resume(*flags, moments=[WHEN_IT_HAS_JUST_BEEN])
    assert numbers() == numbers(early.output) and same_weights("out", early.output)
    assert result.code == 0 and report(result.out) == report(early.out)


def test_a_move_of_an_earlier_run_that_was_killed_goes_on_and_loses_nothing(copy, monkeypatch):
    kept = {path.name: path.read_bytes() for path in copy.iterdir()}
    shutil.copytree(copy, "out/previous")
    Path("out", "previous", "log.csv").write_text("of the run before")
    replace = os.replace
    for allowed in range(len(kept)):
        moves = []

        def killed(one, other, allowed=allowed, moves=moves):
            moves.append(one)
            if len(moves) > allowed:
                raise KeyboardInterrupt
            replace(one, other)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", killed)
            classify.move_earlier_run_aside(copy)
        everywhere = {path.name: path.read_bytes() for path in copy.glob("previous/*")}
        everywhere |= {path.name: path.read_bytes() for path in copy.glob("*.*")}
        assert everywhere == kept
    classify.move_earlier_run_aside(copy)
    assert {path.name: path.read_bytes() for path in copy.glob("previous/*")} == kept


def test_a_run_that_finished_no_epoch_does_not_push_an_earlier_one_out(copy):
    Path(copy, "previous").mkdir()
    os.replace(copy / "best_model.pth", copy / "previous" / "best_model.pth")
    for name in ("log.csv", "mistakes.png"):
        Path(copy, name).unlink(missing_ok=True)
    classify.move_earlier_run_aside(copy)
    assert Path(copy, "previous", "best_model.pth").exists()


# ---- several processes ---------------------------------------------------------------------------


def torchrun(count, *argv):
    """Run the program as torchrun does, in processes forked from one that has torch imported."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    common |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": str(count)}
    common |= {"TORCH_HOME": os.environ["TORCH_HOME"]}
    processes = []
    for rank in map(str, range(count)):
        variables = {**common, "RANK": rank, "LOCAL_RANK": rank}
        files = {"out": f"out{rank}.txt", "err": f"err{rank}.txt"}
        processes.append(start(*argv, **files, variables=variables))
    results = [end(p, f"out{rank}.txt", f"err{rank}.txt") for rank, p in enumerate(processes)]
    assert [result.out for result in results[1:]] == [""] * (count - 1)
    code = max(result.code for result in results)
    err = "".join(result.err for result in results)
    return SimpleNamespace(code=code, out=results[0].out, err=err)


@linux
def test_two_processes_train_as_one_does_and_count_each_test_picture_once(cached):
    colours("pictures/train", 32)
    for part, count in (("val", 3), ("test", 4)):
        for name in "ab":
            paint(f"pictures/{part}/{name}", count)
    # frozen: so batch-norm, which each process does for itself, is out of the way
    flags = [*SMALL, "--data=pictures", "--weights=imagenet", "--freeze", "--epochs=2"]
    assert run(*flags, "--output=alone").code == 0
    result = torchrun(2, *flags, "--output=out")
    assert result.code == 0 and "processes: 2" in result.out, result
    assert result.out.count("epoch 1/2") == result.out.count("test accuracy") == 1
    for one, other in zip(numbers("alone"), numbers("out"), strict=True):
        assert list(map(float, one.values())) == pytest.approx(list(map(float, other.values())))
    one, other = load("alone/last.pth")[1], load("out/last.pth")[1]
    torch.testing.assert_close(one, other)
    alone = run("--resume", "--output", "out")
    assert " of 8)" in alone.out and report(alone.out) == report(result.out)


@linux
def test_an_error_of_several_processes_is_said_once_and_ends_them_all(finished, folder):
    result = torchrun(2, *SMALL, *finished.argv, "--batch-size", 9)
    assert "--batch-size 9" in error(result)


# ---- for those who copy from it ------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    """The program's model and torchvision's with the same weights, in double precision."""
    torch.manual_seed(0)
    model = classify.build_model(3, "none").double()
    return model, torchvision_model(model.state_dict()).double()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("side", [24, 32, 33, 64])
def test_outputs_and_gradients_are_those_of_torchvision(pair, side, mode):
    torch.manual_seed(0)
    pixels = torch.randn(4, 3, side, side, dtype=torch.float64)
    results = []
    for model in pair:
        model.train(mode == "train").zero_grad()
        output = model(pixels)
        nn.functional.cross_entropy(output, torch.tensor([0, 1, 2, 0])).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([output, *gradients, *model.buffers()])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def test_weights_are_torchvisions_key_for_key_and_bit_for_bit_but_for_the_head(cached):
    state = classify.build_model(3, "imagenet").state_dict()
    assert list(state) == list(models.resnet18().state_dict()) and len(state["fc.bias"]) == 3
    assert same(body(state), body(torch.load(cached)))
    with pytest.raises(ValueError):
        classify.build_model(3, "some")


@pytest.mark.parametrize("bfloat16", [False, True])
def test_an_epoch_of_the_loop_is_that_of_plain_torchvision_and_plain_adam(bfloat16):
    torch.manual_seed(0)
    ours = classify.build_model(3, "none")
    plain = torchvision_model(ours.state_dict()).train()
    before = {name: value.detach().clone() for name, value in ours.named_parameters()}
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(0, 3, (8,))) for _ in range(3)]
    batches[2] = (batches[2][0][:3], batches[2][1][:3])
    optimizer = torch.optim.Adam(ours.parameters(), 0.001, eps=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    criterion = nn.CrossEntropyLoss()
    mean = classify.train_one_epoch(ours, batches, criterion, optimizer, scheduler, bfloat16)
    adam = torch.optim.Adam(plain.parameters(), eps=0.1)
    losses = []
    for step, (images, labels) in enumerate(batches):
        adam.param_groups[0]["lr"] = 0.001 / 2**step
        loss = nn.functional.cross_entropy(plain(images), labels)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses += [loss.item()] * len(labels)
    assert mean == pytest.approx(np.mean(losses), rel=0.1 if bfloat16 else 0.01)
    moves = [
        torch.cat([(after - before[name]).flatten() for name, after in model.named_parameters()])
        for model in (ours, plain)
    ]
    assert (moves[0] - moves[1]).norm() < (0.8 if bfloat16 else 0.03) * moves[1].norm()
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())


def test_the_loops_can_be_lifted_out_alone():
    space = {"torch": torch, "nn": nn}
    for function in (classify.train_one_epoch, classify.evaluate):
        exec(inspect.getsource(function), space)
    torch.manual_seed(0)
    images = torch.randn(60, 5)
    labels = (images[:, 0] > 0).long()
    batches = DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 2))
    modes = []
    model[2].register_forward_hook(lambda layer, *_: modes.append(layer.training))
    model[0].requires_grad_(False)  # which takes no dropout from what follows
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    step = batches, criterion, optimizer, scheduler
    losses = [space["train_one_epoch"](model, *step) for _ in range(9)]
    assert losses[-1] < losses[0] and all(modes)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.99**72)
    in_order = DataLoader(TensorDataset(images, labels), batch_size=7)
    loss, true, predictions, confidences = space["evaluate"](model, in_order)
    with torch.no_grad():
        logits = model.eval()(images)
    assert torch.equal(true, labels) and torch.equal(predictions, logits.argmax(1))
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    torch.testing.assert_close(confidences, logits.softmax(1).amax(1))
    assert (predictions == labels).float().mean() > 0.9


def edits():
    """Return the README's edits: (title, lines that go, lines that come)."""
    sides = []
    for title, diff in re.findall(r"\*\*(.+?)\*\*[^\n]*\n\n```diff\n(.*?)```", README, re.S):
        old, new = (
            "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] == sign)
            for sign in "-+"
        )
        sides.append((title, old, new))
    return sides


def edited(old, new, monkeypatch):
    """Return the program with some lines replaced, as a module in the current folder."""
    assert SOURCE.count(old) == 1, f"not in one place: {old}"
    Path("edited.py").write_text(SOURCE.replace(old, new), "utf-8")
    monkeypatch.syspath_prepend(os.getcwd())
    sys.modules.pop("edited", None)
    return importlib.import_module("edited")


class Stripes(Dataset):
    """A data set of the reader's own."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        image = torch.zeros(3, 40, 40, dtype=torch.uint8)
        image[:, :: 2 + index % 2] = 200
        return image, index % 2


@pytest.mark.parametrize("title, old, new", edits(), ids=lambda value: str(value)[:24])
def test_each_edit_of_the_readme_is_one_place_and_runs(folder, title, old, new, monkeypatch):
    program = edited(old, new, monkeypatch)
    for name in "ab":
        paint(f"PICTURES/{name}", 10)
    monkeypatch.setattr(program, "MyDataset", Stripes, raising=False)
    flags = ["--data", "PICTURES", "--epochs", 1, "--batch-size", 4]
    result = run(*SMALL, *flags, "--output", "out", program=program)
    assert result.code == 0 and "test accuracy" in result.out, result
    picture().save("photo.png")
    assert run("--predict", "photo.png", "--output", "out", program=program).code == 0


def test_the_readme_and_help_name_the_same_flags():
    helped = set(re.findall(r"--[a-z-]+", classify.make_parser().format_help())) - {"--help"}
    assert helped == set(re.findall(r"^\| `(--[a-z-]+)", README, re.M))


def test_the_readmes_way_to_use_the_weights_elsewhere_works(copy):
    [code] = [c for c in re.findall(r"```python\n(.*?)```", README, re.S) if "load_state_dict" in c]
    os.rename("out", "checkpoint")
    picture().save("photo.jpg")
    space = {}
    exec(code, space)
    logits = space["logits"][0]
    share = f"{CLASSES[logits.argmax()]} {logits.softmax(0).max():.1%}"
    assert classify.printable(share) in run("--predict", "photo.jpg").out


@pytest.mark.parametrize(
    "right, wrong, kind",
    [
        ("image = ImageOps.fit(image,", "image = ImageOps.fitt(image,", AttributeError),
        ("nn.Linear(model.fc.in_features, num", "nn.Linear(7, num", RuntimeError),
    ],
)
def test_an_error_in_edited_code_shows_its_traceback(folder, right, wrong, kind, monkeypatch):
    for name in "ab":
        paint(f"pictures/{name}", 4)
    program = edited(right, wrong, monkeypatch)
    with pytest.raises(kind):
        program.main([*SMALL, "--data", "pictures", "--output", "out"])
