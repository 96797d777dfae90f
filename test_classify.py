"""What the program promises, tried on real runs of it on small real files.

    pytest test_classify.py         needs no network

A test's name is the promise; the sections are those of the promises. Most runs happen inside this
process (`run`, `train`); those that are killed or typed at have a process of their own (`start`).
"""

import contextlib
import csv
import hashlib
import http.server
import inspect
import io
import math
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
import zlib
from collections import Counter
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.modules import module
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets, models

import classify

with contextlib.suppress(ImportError):  # not on Windows
    import resource

# asking whether there is a card must not start CUDA, which does not work in forked processes
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

SMALL = "--image-size 32 --batch-size 8 --epochs 1 --weights none --device cpu --workers 0".split()
CLASSES = ["new\nline", "x" * 80, 'your "best" 猫 größe']
SHOWN = ["new\\nline", *CLASSES[1:]]
README = Path(__file__).with_name("README.md").read_text("utf-8")
CPU = torch.device("cpu")
EVIL = b"cos\nmkdir\n(S'executed'\ntR."  # a pickle that makes a folder when it is read
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs signals and terminals of Linux")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


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
    seen = []  # at each forward pass: whether it trains, and the pictures

    def note(layer, inputs):
        if isinstance(layer, models.ResNet):
            seen.append((layer.training, inputs[0].detach().clone()))

    handle = module.register_module_forward_pre_hook(note)
    result = run(*SMALL, "--output", output, *argv)
    handle.remove()
    return SimpleNamespace(**vars(result), argv=argv, output=Path(output), seen=seen)


def error(result, code=1):
    """Check that a run failed as promised; return its one line of error."""
    lines = [line for line in result.err.splitlines() if "error:" in line]
    assert (result.code, len(lines)) == (code, 1), result
    assert "Traceback" not in result.err + result.out
    return lines[0]


def child(argv, cwd, out, err, variables, method):
    """Run the program in a session of its own, its output in files or on a terminal."""
    os.chdir(cwd)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = open(1, "w", encoding="utf-8")
    sys.stderr = open(2, "w", encoding="utf-8")
    os.environ.update(variables)
    if method:
        classify.WORKER_START = method
    torch.set_num_threads(1)
    sys.exit(classify.main(argv))


def start(*argv, out="out.txt", err="err.txt", variables=(), method=None):
    """Start the program in a process of its own, forked from one that has torch imported.

    method: how its loader workers start, if not as usual
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    variables = {**os.environ, **dict(variables)}
    args = [str(arg) for arg in argv], os.getcwd(), out, err, variables, method
    process = context.Process(target=child, args=args)
    process.files = out, err
    process.start()
    return process


def until(happened, process):
    """Wait until something happened, or the process has ended; return whether it happened."""
    deadline = time.monotonic() + 240
    while process.is_alive() and not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)
    return happened()


def end(process):
    """Wait for a process; return what `run` returns."""
    until(lambda: False, process)
    out, err = (Path(name).read_text("utf-8") for name in process.files)
    return SimpleNamespace(code=process.exitcode, out=out, err=err)


@contextlib.contextmanager
def limited(what, amount):
    """Lower what this process may use: `resource.RLIMIT_...`, in bytes."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (amount, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def picture(seed=0):
    """Return a picture of noise, 32 × 32."""
    noise = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise)


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
            picture([*path.name.encode(), number]).save(path / f"{number}.png")


def encoded(kind, **options):
    """Return what a picture's file has in it."""
    file = io.BytesIO()
    picture().save(file, kind, **options)
    return file.getvalue()


def rows(output="out"):
    """Return the rows of log.csv."""
    path = Path(output, "log.csv")
    return list(csv.DictReader(path.open())) if path.exists() else []


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


def as_input(images):
    """Return PIL pictures as the network gets them, by NumPy: float N×3×H×W."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images]) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)


def answer(output, files):
    """Return the labels of files in CLASS/ and what plain torchvision makes of them: logits."""
    files = list(files)
    names = sorted({path.parent.name for path in files})
    labels = torch.tensor([names.index(path.parent.name) for path in files])
    state = load(Path(output, "best_model.pth"))[1]
    model = models.resnet18(num_classes=len(state["fc.bias"]))
    model.load_state_dict(state)
    with torch.no_grad():
        return labels, model.eval()(as_input(map(Image.open, files)))


# ---- runs that tests share -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished():
    """A run of three epochs on DIR/train|val|test/CLASS, in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        pictures = Path(name, "pictures")
        for label, title in enumerate(CLASSES):
            counts = {"train": 12, "val": 3 + label, "test": 5 - (label > 0)}
            paint({f"{part}/{title}": count for part, count in counts.items()}, pictures)
        (pictures / "train" / ".hidden").mkdir()
        for hidden in (".DS_Store", "Thumbs.db"):
            (pictures / "train" / CLASSES[0] / hidden).write_text("hidden")
        argv = "--data", pictures, "--epochs", 3, "--patience", 0
        yield train(*argv, output=Path(name, "out"))


@pytest.fixture
def copy(finished, folder):
    """A copy of the finished run's output, as "out" in the current folder."""
    return Path(shutil.copytree(finished.output, folder / "out"))


@pytest.fixture(scope="module")
def prolonged(finished):
    """The finished run, gone on with at a hopeless rate, then well with other data and flags."""
    output = Path(shutil.copytree(finished.output, finished.output.with_name("prolonged")))
    shutil.copytree(finished.argv[1], finished.output.with_name("moved"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(output.parent)
        failed = run("--resume", "--epochs", 5, "--lr", "1e18", "--output", output)
        kept = (output / "best_model.pth").read_bytes()
        flags = "--data moved/ --epochs 4 --lr 0.02 --batch-size 6".split()
        result = run("--resume", *flags, "--output", output)
    return SimpleNamespace(**vars(result), output=output, failed=failed, kept=kept)


@pytest.fixture(scope="module")
def early(finished):
    """A run whose validation accuracy is always a half: both classes have the same picture.

    It is validated after epochs 2 and 4, and ends with the fourth. Four training pictures of
    twelve cannot be decoded.
    """
    pictures = finished.output.with_name("halves")
    paint({"train/a": 4, "train/b": 4, "val/a": 0, "val/b": 0}, pictures)
    for name in "ab":
        picture().save(pictures / "val" / name / "same.png")
        for number in "01":
            (pictures / "train" / name / f"bad{number}.png").write_bytes(b"no picture")
    argv = "--data", pictures, "--epochs", 9, "--patience", 1, "--validate-every", 2
    return train(*argv, output=finished.output.with_name("early"))


@pytest.fixture(scope="module")
def orders(finished):
    """A run on pictures of one colour each, which augmentation leaves as they are.

    Its batches are lists of these colours. It is validated after epochs 2 and 3.
    """
    pictures = finished.output.with_name("colours")
    paint({"train/a": 0, "train/b": 0, "val/a": 3, "val/b": 3, "test/a": 4, "test/b": 4}, pictures)
    for number in range(60):
        image = Image.new("RGB", (32, 32), (number, number, number))
        image.save(pictures / "train" / "ab"[number % 2] / f"{number:03}.png")
    flags = "--epochs 3 --batch-size 16 --lr 0.01 --validate-every 2".split()
    result = train("--data", pictures, *flags, output=finished.output.with_name("orders"))
    batches = [images[:, 0, 0, 0] for training, images in result.seen if training]
    result.batches = [((b * 0.229 + 0.485) * 255).round().int().tolist() for b in batches]
    return result


@pytest.fixture
def cached(folder, monkeypatch):
    """Where torchvision keeps the ImageNet weights; random ones lie there."""
    monkeypatch.setenv("TORCH_HOME", str(folder / "cache"))
    path = folder / "cache" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    model = models.resnet18()
    model(torch.randn(4, 3, 32, 32))  # moves the running statistics
    torch.save(model.state_dict(), path)
    return path


# ---- flags ---------------------------------------------------------------------------------------

UNUSABLE_FLAGS = """--epochs 0|--epochs x|--batch-size 1|--lr 0|--lr nan|--lr inf|--lr -1
--image-size 0|--patience -1|--workers -1|--seed -1|--validate-every 0|--weights some|--device tpu
--nonsense|--freeze|--predict""".replace("\n", "|").split("|")
UNUSABLE_FLAGS += [] if torch.cuda.is_available() else ["--device cuda"]


@pytest.mark.parametrize("flags", UNUSABLE_FLAGS)
def test_unusable_flags_are_an_error_that_names_them(folder, flags):
    assert flags.split()[0] in error(train("--data", "digits", *flags.split()), code=2)
    assert not list(folder.iterdir())


def chosen(count, *argv, weights="none", world=1):
    """Return the flags as they are for so many pictures, with what was left unsaid chosen."""
    args, _ = classify.parse_args(["--weights", weights, *argv])
    images = TensorDataset(torch.zeros(count, 1), torch.zeros(count))
    data = classify.Data("digits", images, images, images, ["a", "b"], 32, False)
    return classify.choose_defaults(args, data, CPU, world)


def test_batch_size_is_128_or_less_where_an_epoch_would_have_few_steps():
    sizes = [chosen(count).batch_size for count in (20, 160, 700, 4000, 4001, 50000)]
    assert sizes == [8, 8, 14, 80, 128, 128]
    assert chosen(400, "--batch-size", "32").batch_size == 32
    assert [chosen(count, world=3).batch_size for count in (20, 50000)] == [6, 126]  # shared evenly
    with pytest.raises(SystemExit, match="error: .*start fewer"):
        chosen(5, world=3)


def test_the_rate_depends_on_the_weights_and_is_obeyed_if_said():
    assert chosen(100).lr == 0.003
    assert chosen(100, weights="imagenet").lr == 0.001
    assert chosen(100, "--freeze", weights="imagenet").lr == 0.01
    assert chosen(100, "--lr", "0.5").lr == 0.5


def rate_after(step, steps, top):
    """Return the rate after so many steps: it rises for three tenths of them, then falls to 0."""
    peak = 0.3 * (steps + 1) - 1
    start, stop, share = top / 25, top, step / peak
    if step > peak:
        start, stop, share = top, top / 25e4, (step - peak) / (steps - peak)
    return stop + (start - stop) / 2 * (1 + math.cos(math.pi * share))


@pytest.mark.parametrize("epochs", [1, 10, 20, 60, 200])
@pytest.mark.parametrize("every", [1, 2, 7])
def test_patience_left_unsaid_never_cuts_a_schedule_that_has_not_cooled_down(epochs, every):
    patience = chosen(100, f"--epochs={epochs}", f"--validate-every={every}").patience
    first_end = min(epochs, every * (patience + 1))  # if the first validation is the best
    assert rate_after(10 * first_end, 10 * epochs, top=1) < 0.1
    if epochs >= 60 and every == 1:
        assert first_end < epochs  # a run that stands still ends before its time


def test_the_rate_rises_for_three_tenths_of_the_steps_and_then_falls_to_nothing(orders):
    for epoch, row in enumerate(rows(orders.output)):
        expected = rate_after(4 * epoch, 3 * 4, top=0.01)
        assert float(row["learning_rate"]) == pytest.approx(expected, rel=1e-6)


def test_workers_are_no_more_than_the_processors_that_may_be_used(monkeypatch):
    assert classify.choose_workers(CPU, files=10) == 0
    for number in (0, 1, 2, 7):  # 0: more processes than processors
        processors = set(range(number))
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, p=processors: p, raising=False)
        assert classify.choose_workers(CPU, files=10**6) == max(0, number - 1) // 2
        assert classify.choose_workers(torch.device("cuda"), files=10**6) == number


def test_unless_told_a_run_is_in_checkpoint_and_an_earlier_one_is_moved_aside(finished, folder):
    shutil.copytree(finished.output, "checkpoint")
    result = run(*SMALL, *finished.argv, "--epochs", 1, "--seed", 1)
    assert result.code == 0 and "checkpoint/previous" in result.out
    for path in finished.output.iterdir():
        assert Path("checkpoint", "previous", path.name).read_bytes() == path.read_bytes()
    picture().save("photo.png")
    assert run("--predict", "photo.png", "--output", "checkpoint/previous").code == 0
    # and another seed gives other numbers
    assert rows("checkpoint")[0]["train_loss"] != rows(finished.output)[0]["train_loss"]


def test_validate_every_leaves_cells_empty_and_always_validates_the_last_epoch(orders):
    cells = [bool(row[key]) for row in rows(orders.output) for key in ("val_loss", "val_accuracy")]
    assert cells == [False, False, True, True, True, True]
    assert re.search(r"epoch 1/3  train loss [\d.]+  \d+ images/s  [\d.]+ s\n", orders.out)


def test_patience_stops_after_so_many_validations_and_of_equal_epochs_the_first_is_best(early):
    cells = [row["val_accuracy"] for row in rows(early.output)]
    assert early.code == 0 and cells == ["", "0.5", "", "0.5"]
    assert re.findall(r"epoch (\d)/9 .*\(best\)", early.out) == ["2"]
    best, last = (load(early.output / name)[1] for name in ("best_model.pth", "last.pth"))
    assert best["bn1.num_batches_tracked"] * 2 == last["bn1.num_batches_tracked"]


def test_frozen_weights_and_statistics_stay(orders, cached):
    result = train(*orders.argv, "--weights", "imagenet", "--freeze", "--epochs", 1)
    assert "weights  imagenet, 1,026 parameters" in result.out  # 2 x 512 + 2
    for name in ("last.pth", "best_model.pth"):
        assert_same(load(Path("out", name))[1], torch.load(cached), but=["fc.weight", "fc.bias"])


def test_imagenet_weights_that_cannot_be_had_or_are_malicious_are_an_error(finished, cached):
    cached.write_bytes(EVIL)
    for flags in (["--weights", "imagenet"], ["--weights", "auto", "--freeze"]):
        assert "weights" in error(train(*finished.argv, *flags))
        cached.unlink(missing_ok=True)
    assert not Path("executed").exists()


def torchrun(count, *argv, lost=None):
    """Run the program as torchrun does; return what process 0 printed, and all complaints.

    lost: kill process 0 when this happens
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    processes = []
    for rank in map(str, range(count)):
        files = {"out": f"out{rank}.txt", "err": f"err{rank}.txt"}
        variables = {**common, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(start(*argv, **files, variables=variables))
    if lost:
        assert until(lost, processes[0])
        processes[0].kill()
    results = [end(process) for process in processes]
    assert [result.out for result in results[1:]] == [""] * (count - 1)
    code = max(result.code for result in results)
    err = "".join(result.err for result in results)
    return SimpleNamespace(code=code, out=results[0].out, err=err)


@linux
def test_two_processes_train_as_one_does_and_one_goes_on(orders, cached, monkeypatch):
    # frozen: so batch-norm, which each process does for itself, is out of the way
    flags = [*SMALL, *orders.argv, "--weights=auto", "--freeze", "--epochs=2"]
    assert run(*flags, "--output=alone").code == 0
    result = torchrun(2, *flags, "--output=out")
    assert result.code == 0 and "processes: 2" in result.out, result
    assert result.out.count("epoch 1/2") == result.out.count("test accuracy") == 1
    for row, other in zip(rows("alone"), rows(), strict=True):
        for key in ("train_loss", "learning_rate"):
            assert float(row[key]) == pytest.approx(float(other[key]), rel=1e-3)
    one, other = load("alone/last.pth")[1], load("out/last.pth")[1]
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    monkeypatch.setenv("TORCH_HOME", "nowhere")  # a resumed run has weights of its own
    resumed = run("--resume", "--output", "out")
    assert " of 8)" in resumed.out and report(resumed.out) == report(result.out)


@linux
def test_an_error_of_several_processes_is_said_once_and_ends_them_all(finished, folder):
    result = torchrun(2, *SMALL, *finished.argv, "--batch-size", 9)
    assert "--batch-size 9" in error(result)


@linux
def test_a_process_that_is_lost_ends_the_others_with_an_error(finished, folder):
    flags = [*SMALL, *finished.argv, "--epochs", 99, "--output", "out"]
    assert "another process" in error(torchrun(2, *flags, lost=Path("out", "last.pth").exists))


def report(out):
    """Return the lines of the test report, but for the last, which names a file."""
    return out[out.index("test accuracy") :].splitlines()[:-1]


def test_a_finished_run_that_is_resumed_is_tested_again_wherever_it_lies(prolonged, folder):
    shutil.copytree(prolonged.output, "checkpoint")
    result = run("--resume", "--workers", 1)
    assert result.code == 0 and report(result.out) == report(prolonged.out)
    assert os.path.join("checkpoint", "mistakes.png") in result.out
    assert rows("checkpoint") == rows(prolonged.output)
    assert_same_run("checkpoint", prolonged.output)


def test_flags_beside_resume_are_obeyed_and_the_schedule_is_planned_anew(finished, prolonged):
    assert prolonged.code == 0 and "batch size 6" in prolonged.out and "moved:" in prolonged.out
    old, new = rows(finished.output), rows(prolonged.output)
    assert new[:3] == old and len(new) == 4
    expected = rate_after(3 * 6, 4 * 6, top=0.02)
    assert float(new[3]["learning_rate"]) == pytest.approx(expected, rel=1e-6)


def test_after_an_early_stop_more_epochs_go_on_and_are_counted_anew(early, folder):
    shutil.copytree(early.output, "out")
    assert run("--resume", "--output", "out").code == 0 and len(rows()) == 4
    assert run("--resume", "--epochs", 12, "--output", "out").code == 0 and len(rows()) == 6


def test_fewer_epochs_and_what_identifies_a_run_cannot_be_changed(finished, folder):
    resume = "--resume", "--output", finished.output
    for flags in (["--weights", "imagenet"], ["--freeze"], ["--epochs", "2"]):
        assert flags[0] in error(run(*resume, *flags), code=2)
    shutil.copytree(finished.argv[1], "other")
    paint({f"val/{CLASSES[0]}": 9}, "other")
    shutil.copytree(finished.argv[1], "renamed")
    for part in ("train", "val", "test"):
        os.rename(f"renamed/{part}/{CLASSES[0]}", f"renamed/{part}/another")
    for other in ("other", "renamed"):
        assert other in error(run(*resume, "--data", other))


def test_predict_gives_the_shares_of_plain_torchvision_in_any_folder(finished, folder):
    picture(7).save("photo.png")
    result = run("--predict", "photo.png", "--output", finished.output)
    assert result.code == 0 and result.err == ""
    _, logits = answer(finished.output, [Path("photo.png")])
    shares, labels = logits[0].softmax(0).sort(descending=True)
    told = "  ".join(rf"{re.escape(SHOWN[label])} (\d+\.\d)%" for label in labels)
    found = re.fullmatch(rf"photo\.png  {told}\n", result.out).groups()
    assert list(map(float, found)) == pytest.approx((shares * 100).tolist(), abs=0.06)


@linux
def test_predict_takes_folders_names_what_it_cannot_read_and_classifies_the_rest(finished, folder):
    paint({"deep/er": 70}, "some")
    picture().save("good.png")
    Path("some", "notes.txt").write_text("no picture")
    argv = ["good.png", "some", "missing.png", "good.png"]
    flags = ["--output", finished.output, "--workers", 1, "--predict", *argv]
    result = end(start(*flags, method="spawn"))
    lines = result.out.splitlines()
    names = [line.split("  ")[0] for line in lines]
    deep = sorted(os.path.join("some", "deep", "er", f"{number}.png") for number in range(70))
    assert names == ["good.png", *deep, "good.png"] and lines[0] == lines[-1]
    assert "notes.txt" in result.err and "missing.png" in result.err
    assert "2 of 74" in error(result)


# ---- data sets -----------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with an archive, well or badly."""

    def do_GET(self):
        archive = self.server.archive
        answers = {"half": archive[: len(archive) // 2], "rubbish": bytes(len(archive))}
        if self.server.answer == "silence":
            time.sleep(10)  # whoever waits so long is answered well
        self.send_response(200)
        self.send_header("Content-Length", str(len(archive)))
        self.end_headers()
        with contextlib.suppress(OSError):  # it may have gone
            self.wfile.write(answers.get(self.server.answer, archive))


@pytest.fixture
def cifar10(folder, monkeypatch):
    """A function that sets how CIFAR-10's server answers: with thirty pictures and six to test."""
    packed = io.BytesIO()
    sums = {}
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, count in {"train": 30, "test": 6, "meta": 3}.items():
            pixels = np.random.default_rng(count).integers(0, 256, (count, 3072), dtype=np.uint8)
            content = {"data": pixels, "labels": [0, 1, 2] * (count // 3)}
            raw = pickle.dumps({**content, "names": ["plane", "car", "bird"]})
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
            sums[name] = hashlib.md5(raw).hexdigest()
    archive = packed.getvalue()
    official = {"meta": {"filename": "meta", "key": "names", "md5": sums["meta"]}}
    official |= {"train_list": [["train", sums["train"]]], "test_list": [["test", sums["test"]]]}
    official |= {"tgz_md5": hashlib.md5(archive).hexdigest()}
    for name, value in official.items():
        monkeypatch.setattr(datasets.CIFAR10, name, value)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.archive = archive
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()

        def answers(how):
            server.answer = how
            port = 9 if how == "nothing" else server.server_port
            url = f"http://127.0.0.1:{port}/cifar-10-python.tar.gz"
            monkeypatch.setattr(datasets.CIFAR10, "url", url)

        yield answers
        server.shutdown()


def test_cifar10_is_downloaded_once_and_used_from_disk_after_that(cifar10):
    cifar10("well")
    result = train("--data", "cifar10")
    assert result.code == 0 and "27 train, 3 val, 6 test, 32 x 32" in result.out
    cifar10("nothing")
    assert classify.read_data("auto", None, "out").classes == ["plane", "car", "bird"]


@pytest.mark.parametrize("how", ["nothing", "silence", "half", "rubbish"])
def test_a_failed_download_is_an_error_and_the_next_run_starts_it_again(cifar10, how, monkeypatch):
    monkeypatch.setattr(classify, "NETWORK_TIMEOUT", 1)
    cifar10(how)
    for name in ("cifar100", "cifar10", "cifar10"):  # again: nothing left is taken for whole
        assert name in error(train("--data", name))
    cifar10("well")
    classify.read_data("cifar10", None, "out")
    Path("data", "cifar-10-batches-py", "train").write_bytes(b"half-unpacked")
    cifar10("nothing")
    assert len(classify.read_data("cifar10", None, "out").train) == 27


def test_auto_without_a_network_warns_and_trains_on_digits_which_are_always_the_same(cifar10):
    cifar10("half")
    auto = train(*"--data auto --image-size 1 --batch-size 1500 --weights auto".split())
    assert auto.code == 0 and "digits: 4500 train, 500 val, 1000 test" in auto.out
    assert all(word in auto.err.lower() for word in ("warning", "cifar10", "digits", "random"))
    files = {path.name for path in Path().rglob("*.*")}
    assert files == {*classify.RUN_FILES, "cifar-10-python.tar.gz"}  # none of them is on disk
    again = classify.read_data("digits", None, "out")
    assert Counter(again.val.tensors[1].tolist()) == dict.fromkeys(range(10), 50)
    _, to_input = classify.make_transforms(1, mirror=False)
    assert torch.equal(to_input(again.test.tensors[0]), auto.seen[-1][1])
    assert again.image_size == 32 and not again.mirror


def test_a_folder_with_the_name_of_a_set_is_not_silently_overlooked(folder):
    paint({"a": 4, "b": 4}, "cifar10")
    assert "./cifar10" in train("--data", "cifar10").err
    assert len(classify.read_data("./cifar10", 32, "out").train) == 4


T = {"train/a": 5, "train/b": 5}
GOOD = {
    "classes": ({"a": 10, "b": 20}, [24, 3, 3]),
    "parts": ({**T, "val/a": 1, "val/b": 1, "test/a": 1, "test/b": 2}, [10, 2, 3]),
    "other names": ({"Training/a": 3, "Training/b": 2, "VALID/a": 1, "VALID/b": 1}, [3, 2, 2]),
    "any depth": ({"a/x/y": 5, "a/z": 5, "b": 10}, [16, 2, 2]),
    "a class called train": ({"a": 5, "b": 5, "train": 5}, [9, 3, 3]),
    "nobody's folders": ({"a": 5, "b": 5, ".git": 3, "__MACOSX/a": 3, "out/c": 3}, [6, 2, 2]),
    "an empty folder beside train": ({**T, "notes": 0}, [6, 2, 2]),
    "accents": ({"train/caf\u00e9": 3, "train/b": 3, "val/cafe\u0301": 1, "val/b": 1}, [4, 2, 2]),
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
if sys.platform == "linux":
    REFUSED["val is train"] = ({**T, "val": "train"}, "val.* are one and the same")
    REFUSED["a twice"] = ({**T, "test/b": 2, "test/a": "../train/a"}, "test/a.* the same")
    REFUSED["a is c"] = ({**T, "train/c": "a"}, "train/c.* are one and the same")


def layout(counts, size=32):
    """Write pictures into folders below "pictures"; return what the program makes of them."""
    paint(counts)
    return classify.read_data("pictures", size, "pictures/out")


@pytest.mark.parametrize("counts, sizes", GOOD.values(), ids=GOOD)
def test_layouts_that_people_have_are_understood(folder, counts, sizes):
    data = layout(counts)
    assert [len(data.train), len(data.val), len(data.test)] == sizes
    assert len(data.classes) == 2 + ("train" in counts) and data.mirror


@pytest.mark.parametrize("counts, named", REFUSED.values(), ids=REFUSED)
def test_unclear_layouts_are_refused_in_words_that_name_the_odd_folder(folder, counts, named):
    with pytest.raises(SystemExit, match=rf"^error: .*\b{named}\b") as stopped:
        layout(counts)
    told = str(stopped.value)
    if not re.search("empty|split|same", told) and counts:
        assert "DIR/CLASS/" in told and "DIR/train/CLASS/" in told


@linux
def test_links_within_a_class_are_not_followed_and_a_class_or_part_may_be_a_link(folder):
    paint({"b/deep": 10, "val/a": 1, "val/b": 1}, "elsewhere")
    paint({"train/a": 10, "train/b": "../../elsewhere/b", "val": "../elsewhere/val"})
    paint({"up": "..", "other": "../b", "deep": "../b/deep"}, "pictures/train/a")
    with pytest.warns(UserWarning, match=r"^1 files are left out.*: pictures/train/a/deep$"):
        data = layout({})
    assert [len(part) for part in data[1:4]] == [18, 2, 2]


def test_what_is_left_out_is_named_before_the_start(folder):
    paint({**T, "test": 2})
    Path("pictures", "train", "a", "labels.xyz").write_text("")
    Path("pictures", "readme.md").write_text("")
    with pytest.warns(UserWarning) as warned:
        data = layout({})
    assert [len(part) for part in data[1:4]] == [6, 2, 2]
    for name in ("labels.xyz", "readme.md", os.path.join("test", "1.png"), "--predict"):
        assert name in str(warned[0].message)


HOPELESS = {
    "photo.heic": b"\0\0\0\x18ftypheic",
    "photo.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
    "photo.h5": b"\x89HDF\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("name, content", HOPELESS.items(), ids=HOPELESS)
def test_a_class_without_any_picture_is_an_error_that_says_why(folder, name, content):
    paint({"a": 12, "b": 0})
    for number in range(12):
        Path("pictures", "b", f"{number}{name}").write_bytes(content)
    with pytest.raises(SystemExit, match=rf"^error: class b .*\b12 files .*\b0{name}"):
        layout({})


def test_parts_are_stratified_disjoint_and_always_the_same(folder):
    splits = [layout({"a": 10, "b": 20}), layout({})]
    names = [[os.fsdecode(path) for path in part.paths] for data in splits for part in data[1:4]]
    assert names[:3] == names[3:]
    parts = [{tuple(Path(name).parts[-2:]) for name in part} for part in names[:3]]
    assert len(set.union(*parts)) == 30 == sum(map(len, parts))
    for part in parts[1:]:
        assert Counter(name for name, _ in part) == {"a": 1, "b": 2}
        assert part != {("a", "0.png"), ("b", "0.png"), ("b", "1.png")}  # drawn, not the first


def test_folders_are_seen_at_224_pixels_and_workers_share_one_array_of_names(folder):
    data = layout({"a": 4, "b": 4}, size=None)
    assert data.image_size == 224
    assert isinstance(data.train.paths, np.ndarray) and data.train.paths.dtype.kind == "S"


def pixels_of(path):
    """Return what the program makes of a file, at 32 px, as an array H×W×3."""
    image, label = classify.PicturesInFiles([path], [7], 32)[0]
    assert label == 7
    return image.permute(1, 2, 0).numpy()


def deep_tiff(path, pixels, bits=(16,), white=1, extra=()):
    """Write a TIFF as cameras and microscopes do: bits a value, whether 0 is white, more tags."""
    tags = {256: [32], 257: [32], 258: bits, 259: [1], 262: [white], 273: [8], 278: [32]}
    tags |= {279: [len(pixels)], **dict(extra)}
    entries = b""
    for tag, values in sorted(tags.items()):
        raw = struct.pack(f"<{len(values)}H", *values)
        if len(raw) > 4:  # it stands elsewhere: behind the pixels
            place = 8 + len(pixels)
            pixels += raw
            raw = struct.pack("<I", place)
        entries += struct.pack("<HHI4s", tag, 3, len(values), raw)
    head = b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels
    Path(path).write_bytes(head + struct.pack("<H", len(tags)) + entries + bytes(4))


def test_any_mode_and_size_enters_as_rgb_scaled_and_cropped_in_the_middle(folder):
    photo = picture(7)
    grey = photo.convert("L")
    palette = photo.quantize(16)
    deep = np.asarray(grey, dtype=np.uint16) * 256 + 99
    wide = Image.new("RGB", (96, 32))
    wide.paste(photo, (32, 0))
    files = {
        "photo.png": (photo, photo),
        "alpha.png": (photo.convert("RGBA"), photo),
        "print.tif": (photo.convert("CMYK"), photo),
        "wide.png": (wide, photo),
        "grey.png": (grey, grey),
        "grey alpha.png": (grey.convert("LA"), grey),
        "16 bits.png": (Image.fromarray(deep), grey),
        "16 bits.tif": (Image.fromarray(deep.astype(">u2")), grey),
        "palette.png": (palette, palette),
        "bits.png": (photo.convert("1"), photo.convert("1")),
        "animated 'ä' 🐜.gif": (palette, palette),
    }
    for name, (image, _) in files.items():
        image.save(name, **({"save_all": True, "append_images": [grey]} if "gif" in name else {}))
    Path("16 bits.pgm").write_bytes(b"P5 32 32 65535\n" + deep.astype(">u2").tobytes())
    opaque = np.stack([np.asarray(grey), np.full((32, 32), 255, np.uint8)], 2)
    deep_tiff("La.tif", opaque.tobytes(), [8], extra={277: [2], 338: [1]})
    files["16 bits.pgm"] = (None, grey)
    with contextlib.suppress(OSError):  # of an older Pillow, which does not know it
        Image.open("La.tif").close()
        files["La.tif"] = (None, grey)
    for name, (_, shown) in files.items():
        np.testing.assert_array_equal(pixels_of(name), np.asarray(shown.convert("RGB")), name)


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


def segment(kind, content):
    """Return a segment of a JPEG file."""
    return bytes([255, kind]) + (len(content) + 2).to_bytes(2, "big") + content


JPEG = encoded("jpeg")
PNG = encoded("png")
# beside a valid orientation a resolution of -1/0, and a text where a number belongs
TAGS = struct.pack("<HHHII", 3, 274, 3, 1, 3) + struct.pack("<HHII", 282, 10, 1, 50)
TAGS += struct.pack("<HHI4sI", 34855, 2, 4, b"fast", 0) + struct.pack("<ii", -1, 0)
BAD_EXIF = b"II*\0\xff\xff\xff\xff" + bytes(20)
MEGABYTE = chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(1 << 20)))
BROKEN_METADATA = {
    "rational.jpg": encoded("jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0" + TAGS),
    "exif.jpg": encoded("jpeg", exif=b"Exif\0\0" + BAD_EXIF),
    "icc.jpg": encoded("jpeg", icc_profile=b"no profile"),
    "xmp.jpg": encoded("jpeg", xmp=b"<x:xmpmeta \xff\xfe no xml"),
    "jfif.jpg": JPEG[:2] + segment(0xE0, b"JFIF\0") + JPEG[2:],
    "pictures.jpg": JPEG[:2] + segment(0xE2, b"MPF\0") + JPEG[2:],
    "photoshop.jpg": JPEG[:2] + segment(0xED, b"Photoshop 3.0\0008BIM\x03\xed\0") + JPEG[2:],
    "adobe.jpg": JPEG[:2] + segment(0xEE, b"Adobe") + JPEG[2:],
    "text.png": chunk(b"zTXt", b"key\0\0no zlib"),
    "bomb.png": chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(10_000_000))),
    "icc.png": chunk(b"iCCP", b"key\0\0no zlib"),
    "checksum.png": chunk(b"tEXt", b"key\0value", checksum=0),
    "raw.png": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n4\nzzzz\n"),
    "exif.png": chunk(b"eXIf", BAD_EXIF),
    "much.png": MEGABYTE * 70,
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name, content", BROKEN_METADATA.items(), ids=BROKEN_METADATA)
def test_broken_metadata_never_stops_a_picture_whose_pixels_decode(folder, name, content):
    Path("good").write_bytes(JPEG if name.endswith("jpg") else PNG)
    Path(name).write_bytes(content)
    if name.endswith("png"):  # before the pixels, and behind them
        Path(name).write_bytes(PNG[:33] + content + PNG[33:-12] + content + PNG[-12:])
    expected = np.asarray(Image.open("good"))
    if name == "rational.jpg":  # which lies on its head
        expected = np.rot90(expected, 2)
    np.testing.assert_array_equal(pixels_of(name), expected)


def test_what_a_jpeg_file_says_of_its_colours_counts(folder):
    named = encoded("jpeg", keep_rgb=True)  # its channels are called R, G, B; below 1, 2, 3
    numbered = named.replace(b"R\x11\0G\x11\0B\x11\0", b"\1\x11\0\2\x11\0\3\x11\0")
    numbered = numbered.replace(b"R\0G\0B\0", b"\1\0\2\0\3\0")
    assert numbered != named
    for content in (named, numbered):
        Path("photo.jpg").write_bytes(content)
        with Image.open("photo.jpg") as image:
            np.testing.assert_array_equal(pixels_of("photo.jpg"), np.asarray(image))


def write_undecodable(path):
    """Write files that cannot be decoded, or whose values have no known range; return names."""
    flipped = bytearray(PNG)
    flipped[60] ^= 255
    files = {"empty.png": b"", "text.jpg": b"some text", "header.png": PNG[:20]}
    files |= {"truncated.png": PNG[:-200], "truncated.jpg": JPEG[: len(JPEG) // 2]}
    files |= {"flipped.png": bytes(flipped), "bomb.ppm": b"P6 60000 60000 255\n"}
    files |= {"stub.h5": HOPELESS["photo.h5"], "stub.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%EOF\n"}
    files |= {"two\nlines' 猫.jpg": b"no picture"}
    for name, content in files.items():
        Path(path, name).write_bytes(content)
    for mode in "IF":
        Image.new(mode, (32, 32), 70000).save(Path(path, f"mode {mode}.tif"))
    deep_tiff(Path(path, "12 bits.tif"), bytes(32 * 48), bits=[12])
    deep_tiff(Path(path, "negative.tif"), bytes(32 * 64), white=0)
    planes = {273: [8, 2056, 4104], 277: [3], 279: [2048] * 3, 284: [2]}
    deep_tiff(Path(path, "planes.tif"), bytes(3 * 2048), [16] * 3, white=2, extra=planes)
    os.symlink("nowhere", Path(path, "dangling.png"))
    os.mkfifo(Path(path, "pipe.png"))  # whoever reads it waits for ever
    return [name for name in os.listdir(path) if not name[0].isdigit() or "bits" in name]


@linux
def test_undecodable_files_are_named_once_a_process_and_left_out_of_every_figure(folder):
    paint({"train/a": 4, "train/b": 4, "val/a": 3, "val/b": 3, "test/a": 3, "test/b": 3})
    for part in ("train", "val", "test"):
        names = write_undecodable(Path("pictures", part, "a"))
    flags = ["--data", "pictures", "--epochs", 2, "--workers", 2]
    result = end(start(*SMALL, "--output", "out", *flags))
    assert result.code == 0 and " of 6)" in result.out, result
    for name in names:
        lines = [line for line in result.err.splitlines() if name.replace("\n", "\\n") in line]
        told = Counter(re.search("train|val|test", line)[0] for line in lines)
        assert set(told) == {"train", "val", "test"} and max(told.values()) <= 2, name
    assert all(line.startswith("warning: ") for line in result.err.splitlines())
    labels, logits = answer("out", Path("pictures/val").glob("*/?.png"))
    right = (logits.argmax(1) == labels).float().mean().item()
    assert max(float(row["val_accuracy"]) for row in rows()) == pytest.approx(right)


def test_in_training_another_picture_takes_the_place_of_one_that_cannot_be_decoded(early):
    trained = [images for training, images in early.seen if training]
    assert {len(images) for images in trained} == {8, 2}
    assert all(image.std() > 0.5 for images in trained for image in images)


@pytest.mark.parametrize("count", [2, 3, 7919, 10000])
def test_another_picture_is_found_however_many_in_a_row_are_undecodable(folder, count):
    picture().save("good.png")
    bad = count * 2 // 3
    paths = ["missing.png"] * bad + ["good.png"] * (count - bad)
    data = classify.PicturesInFiles(paths, range(count), 32, replace=True)
    with pytest.warns(UserWarning, match="left out"):
        assert all(data[index][1] >= bad for index in range(0, bad, count // 100 + 1))


def test_training_sees_changed_pictures_and_evaluation_sees_them_as_they_are(finished):
    seen = {True: [], False: []}
    for training, images in finished.seen:
        seen[training].append(images)
    originals = {}
    for part in ("train", "val", "test"):
        files = (finished.argv[1] / part).glob("*/?*.png")
        originals[part] = as_input(map(Image.open, files))
    evaluated = torch.cat(seen[False])
    for images, part, times in ((evaluated[:36], "val", 3), (evaluated[36:], "test", 1)):
        distance = (images[:, None] - originals[part]).abs().amax((2, 3, 4))
        assert ((distance < 1e-5).sum(0) == times).all()  # each picture so often
    padded = nn.functional.pad(originals["train"], (1, 1, 1, 1), "replicate")
    shifted = [padded[:, :, y : y + 32, x : x + 32] for y in range(3) for x in range(3)]
    changed = torch.cat([*shifted, *(images.flip(3) for images in shifted)])
    changes = set()
    for image in torch.cat(seen[True]):
        [number] = torch.nonzero((changed - image).abs().amax((1, 2, 3)) < 1e-5)
        changes.add(number.item() // 36)
    assert len(changes) >= 8


def test_photos_are_mirrored_and_digits_are_not_anew_for_every_sixteen_pictures():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(6400, 3, 32, 32)
    for mirror, kinds in ((False, 9), (True, 18)):
        augment, to_input = classify.make_transforms(32, mirror)
        [(made, _)] = classify.Batches([(images, torch.zeros(6400))], CPU, to_input, augment)
        assert len({image.numpy().tobytes() for image in made[::16]}) == kinds


def test_an_epochs_order_is_a_permutation_that_differs_from_epoch_to_epoch(orders):
    assert [len(batch) for batch in orders.batches] == ([16] * 3 + [12]) * 3
    epochs = [sum(orders.batches[start : start + 4], []) for start in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(60)) != epoch for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


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
        assert row["epoch"] == number and row["images_per_second"] * row["seconds"] > 36.1
        best = max(best, row["val_accuracy"])
    kept = list(load(finished.output / "best_model.pth")[0].values())
    accuracies = [float(row["val_accuracy"]) for row in rows(finished.output)]
    assert best in kept and accuracies.index(best) + 1 in kept and CLASSES in kept and 32 in kept


def test_validation_and_test_report_are_those_of_plain_torchvision(finished):
    labels, logits = answer(finished.output, (finished.argv[1] / "val").glob("*/?*.png"))
    best = max(rows(finished.output), key=lambda row: float(row["val_accuracy"]))
    assert float(best["val_accuracy"]) == (logits.argmax(1) == labels).sum() / 12
    loss = logits.logsumexp(1) - logits[range(12), labels]
    assert float(best["val_loss"]) == pytest.approx(loss.mean().item(), rel=1e-3)
    labels, logits = answer(finished.output, (finished.argv[1] / "test").glob("*/?*.png"))
    assert report(finished.out) == classify.report(labels, logits.argmax(1), CLASSES)


def test_the_report_has_each_classs_scores_and_the_five_pairs_confused_most():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 500)
    predictions = rng.integers(0, 4, 500)  # "e" is never predicted
    confusion = np.zeros((5, 5))
    np.add.at(confusion, (labels, predictions), 1)
    right = confusion.diagonal()
    labels = torch.tensor([*labels, -100])  # a picture that could not be decoded
    text = "\n".join(classify.report(labels, torch.tensor([*predictions, 0]), list("abcde")))
    assert text.startswith(f"test accuracy {right.sum() / 500:.2%} ({right.sum():.0f} of 500)\n")
    true = confusion.sum(1)
    predicted = confusion.sum(0)
    scores = np.stack([right / predicted.clip(1), right / true, 2 * right / (true + predicted)], 1)
    expected = [*np.column_stack([scores, true]), [*scores.mean(0), 500]]
    table = re.findall(r"^(\w+) +(\d\.\d{4}) +(\d\.\d{4}) +(\d\.\d{4}) +(\d+)$", text, re.M)
    assert [name for name, *_ in table] == [*"abcde", "mean"]
    np.testing.assert_allclose(np.float64([row[1:] for row in table]), expected, atol=1e-4)
    pairs = re.findall(r"^(.) -> (.) (\d+)$", text, re.M)
    wrong = confusion - np.diag(right)
    assert [int(count) for *_, count in pairs] == sorted(wrong.ravel(), reverse=True)[:5]
    for one, other, count in pairs:
        assert confusion["abcde".index(one), "abcde".index(other)] == int(count)


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
    classify.draw_mistakes(data, labels, labels, confidences, ".")
    assert not Path("mistakes.png").exists()  # there are none


def test_the_time_left_is_shown_right_beyond_a_day(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = classify.show_progress(DataLoader(TensorDataset(torch.zeros(10**6, 1))))
    next(progress)
    time.sleep(1.1)
    next(progress)
    days = re.search(r"(\d+) days, \d+:\d\d:\d\d left", terminal.getvalue())
    assert int(days[1]) in range(12, 14)  # a million batches of 1.1 seconds


def test_a_move_of_an_earlier_run_that_was_killed_goes_on_and_loses_nothing(folder, monkeypatch):
    kept = {name: name.encode() for name in classify.RUN_FILES}
    previous = folder / "previous"
    previous.mkdir()
    (previous / "log.csv").write_text("of the run before")
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    replace = os.replace

    def killed_after_one(old, new):
        replace(old, new)
        raise RuntimeError("killed")

    monkeypatch.setattr(os, "replace", killed_after_one)
    for _ in kept:
        with pytest.raises(RuntimeError, match="killed"):
            classify.move_earlier_run_aside(folder)
        files = [*folder.glob("previous/*"), *folder.glob("*.*")]
        assert {path.name: path.read_bytes() for path in files} == kept
    (folder / "last.pth").write_text("of a run that finished no epoch")
    classify.move_earlier_run_aside(folder)  # which does not push the earlier one out
    assert {path.name: path.read_bytes() for path in previous.iterdir()} == kept


# ---- what cannot hurt it -------------------------------------------------------------------------


@linux
def test_same_seed_same_numbers_and_weights_even_if_killed_at_any_moment(early, folder):
    log = Path("out", "log.csv")
    last = Path("out", "last.pth")
    moments = [
        lambda: last.exists() and not log.exists(),  # before the first epoch is done
        log.exists,  # while an epoch is saved, and below when one has just been
        lambda: len(rows()) >= 2 and log.stat().st_mtime_ns < last.stat().st_mtime_ns,
    ]
    flags = [*SMALL, *early.argv, "--workers", 1]
    for happened in moments:
        process = start(*flags, "--output", "out")
        assert until(happened, process)
        process.kill()
        process.join()
        for path in Path("out").glob("*.pth"):
            load(path)
        flags = ["--resume"]
    result = end(start("--resume", "--output", "out"))
    assert_same_run("out", early.output)
    assert result.code == 0 and report(result.out) == report(early.out)


@linux
def test_a_terminal_shows_how_far_the_epoch_is_and_ctrl_c_in_any_place_ends_with_130(folder):
    ours, its = os.openpty()
    os.set_blocking(ours, False)
    paint({"a": 200, "b": 200})
    flags = ["--data", "pictures", "--workers", 1, "--batch-size", 4, "--output", "out"]
    process = start(*SMALL, *flags, err=os.ttyname(its))
    shown = b""

    def waiting_line():
        nonlocal shown
        with contextlib.suppress(BlockingIOError):
            shown += os.read(ours, 9999)
        return re.search(rb"batch \d+/\d+ .*\d images/s .* left", shown)

    def half_written():
        with contextlib.suppress(OSError, StopIteration):
            return next(Path("out").glob("last.pth.*.tmp")).stat().st_size > 1 << 20

    assert until(waiting_line, process) and b"\n" not in shown
    assert until(half_written, process)
    os.write(ours, b"\x03")
    process.join()
    waiting_line()
    assert process.exitcode == 130 and shown.count(b"error:") == 1 and b"Traceback" not in shown
    assert b"interrupted; go on with --resume" in shown


@linux
def test_a_full_disk_is_an_error_and_the_older_checkpoint_is_whole(finished, folder):
    with limited(resource.RLIMIT_FSIZE, 60 << 20):  # too few after the first epoch
        result = train(*finished.argv)
    assert "last.pth" in error(result) and len(rows()) == 1
    assert load("out/last.pth") and not list(Path("out").glob("*.tmp"))


def children_of(process):
    """Return the numbers of the processes that a process has started."""
    return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


@linux
@pytest.mark.parametrize(
    "limit, method",
    [(0, "fork"), (0, "forkserver"), (1, "fork"), (40, "fork")],
    ids=["killed", "killed far away", "cannot share", "cannot send"],
)
def test_a_loader_worker_that_is_lost_is_an_error_whose_advice_works(folder, limit, method):
    paint({"a": 30, "b": 30})
    flags = ["--data", "pictures", "--epochs", 99, "--patience", 0, "--output", "out"]
    process = start(*SMALL, *flags, "--workers", 1, "--image-size", 1, method=method)

    def workers():
        children = children_of(process.pid)
        return sum(map(children_of, children), []) if method == "forkserver" else children

    assert until(workers, process)
    worker = workers()[0]
    if limit:  # as where /dev/shm is full: no room for a batch of pictures, or for its labels
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (limit, limit))
    else:
        os.kill(worker, signal.SIGKILL)
    line = error(end(process))
    assert "--workers 0" in line and "shared memory" in line
    epochs = max(1, len(rows()))
    assert run("--resume", "--workers", 0, "--epochs", epochs, "--output", "out").code == 0


@linux
def test_memory_that_runs_out_is_an_error_whose_advice_works(folder):
    paint({"a": 40, "b": 40})
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    with limited(resource.RLIMIT_AS, used + (1 << 28)):
        result = train("--data", "pictures", "--image-size", 320, "--batch-size", 60)
    assert "--batch-size" in error(result)
    smaller = ["--resume", "--image-size", 32, "--batch-size", 8]
    assert run(*smaller, "--output", "out").code == 0


def test_an_output_that_is_a_file_is_an_error(finished, folder):
    Path("out").write_text("a file")
    assert "out" in error(train(*finished.argv))
    assert Path("out").read_text() == "a file"


def test_a_damaged_foreign_or_malicious_checkpoint_is_an_error(orders, copy):
    picture().save("photo.png")
    best = copy / "best_model.pth"
    content = best.read_bytes()
    classify.write_checkpoint(best, load(best)[1])  # weights alone
    flipped = bytearray(content)
    flipped[len(content) // 3] ^= 1
    damaged = [b"", b"some text", content[: len(content) // 2], content[:-1], bytes(flipped)]
    damaged += [best.read_bytes(), EVIL, EVIL + hashlib.sha256(EVIL).digest()]
    for bad in [*damaged, (copy / "last.pth").read_bytes()]:
        best.write_bytes(bad)
        assert "best_model.pth" in error(run("--output", "out", "--predict", "photo.png"))
    shutil.copy(orders.output / "best_model.pth", best)
    assert "another run" in error(run("--output", "out", "--resume"))
    for bad in [*damaged, content]:
        (copy / "last.pth").write_bytes(bad)
        assert "last.pth" in error(run("--output", "out", "--resume"))
    assert not Path("executed").exists()


@pytest.mark.parametrize("batch", [8, 128])
def test_a_last_batch_of_one_picture_and_fewer_pictures_than_a_batch_train(folder, batch):
    paint({"train/a": 6, "train/b": 5, "val/a": 1, "val/b": 1})
    result = train("--data", "pictures", "--batch-size", batch)
    assert result.code == 0 and "9 train, 2 val, 2 test" in result.out and len(rows()) == 1
    if batch == 128:  # a single step, at about the rate that was asked for
        assert 0.0015 < float(rows()[0]["learning_rate"]) <= 0.003


def test_a_loss_that_is_no_number_is_an_error_and_the_best_model_stays(finished, prolonged):
    assert "--lr" in error(prolonged.failed)  # which works: `prolonged` is what followed
    assert len(prolonged.failed.err.splitlines()) == 1
    assert prolonged.kept == (finished.output / "best_model.pth").read_bytes()


@linux
def test_closed_stdout_a_c_locale_and_stray_variables_do_not_matter(finished, folder, monkeypatch):
    picture().save("photo.png")
    command = f"{sys.executable} '{classify.__file__}' --output '{finished.output}' --predict"
    command = f"{command} {'photo.png ' * 99} | head -1"
    stray = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "RANK": ""}
    stray |= {"WORLD_SIZE": "x", "LOCAL_RANK": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
    stray |= {"LOCAL_WORLD_SIZE": "0", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, **stray}
    )
    assert result.returncode == 0 and result.stdout.startswith("photo.png  "), result
    assert "\\u732b" in result.stdout and "Traceback" not in result.stderr
    monkeypatch.setattr(sys, "stdout", None)  # as with >&- or pythonw
    assert classify.main(["--predict", "photo.png", "--output", str(finished.output)]) == 0


@cuda
def test_a_card_is_used_if_there_is_one_and_its_checkpoints_serve_everywhere(finished, folder):
    flags = [flag for flag in SMALL if flag not in ("--device", "cpu")]
    first = run(*flags, "--data", finished.argv[1], "--workers", 2, "--output", "out")
    assert first.code == 0 and "device   cuda" in first.out
    files = sorted(Path(finished.argv[1], "test").rglob("*.png"))
    _, logits = answer("out", files)
    for device in ("cpu", "cuda"):
        result = run("--predict", *files, "--device", device, "--output", "out")
        told = [float(line.split("  ")[1].split()[-1][:-1]) for line in result.out.splitlines()]
        shares = logits.softmax(1).amax(1) * 100
        assert told == pytest.approx(shares.tolist(), abs=0.5)
    for epochs, device in ((2, "cuda"), (3, "cpu"), (4, "auto")):
        resumed = run("--resume", "--epochs", epochs, "--device", device, "--output", "out")
        assert resumed.code == 0 and len(rows()) == epochs


# ---- for those who copy from it ------------------------------------------------------------------


@pytest.mark.parametrize("side", [16, 32, 33])
def test_outputs_and_gradients_are_those_of_torchvision(side):
    torch.manual_seed(0)
    ours = classify.build_model(3, "none").double()
    plain = models.resnet18(num_classes=3).double()
    plain.load_state_dict(ours.state_dict())
    pixels = torch.randn(4, 3, side, side, dtype=torch.float64)
    results = []
    for model in (ours, plain):
        output = model(pixels)
        nn.functional.cross_entropy(output, torch.tensor([0, 1, 2, 0])).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([output, *gradients, *model.buffers()])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def test_weights_are_torchvisions_key_for_key_and_bit_for_bit_but_for_the_head(cached):
    state = classify.build_model(3, "imagenet").state_dict()
    assert list(state) == list(models.resnet18().state_dict()) and len(state["fc.bias"]) == 3
    assert_same(state, torch.load(cached), but=["fc.weight", "fc.bias"])
    with pytest.raises(ValueError):
        classify.build_model(3, "some")


def test_the_loops_can_be_lifted_out_alone_and_do_what_plain_ones_do():
    space = {"torch": torch, "nn": nn}
    for function in (classify.train_one_epoch, classify.evaluate):
        exec(inspect.getsource(function), space)
    torch.manual_seed(0)
    images = torch.randn(60, 5)
    labels = (images[:, 0] > 0).long()
    batches = DataLoader(TensorDataset(images, labels), batch_size=8)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 2))
    model[0].requires_grad_(False)  # which takes no dropout from what follows
    plain = deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    torch.manual_seed(1)
    mean = space["train_one_epoch"](model, batches, criterion, optimizer, scheduler)
    torch.manual_seed(1)
    losses = []
    for step, (some, targets) in enumerate(batches):
        loss = criterion(plain.train()(some), targets)
        losses += [loss.item()] * len(targets)
        weights = [*plain[1].parameters(), *plain[3].parameters()]
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights)):
            weight.data -= 0.1 * 0.9**step * gradient
    assert mean == pytest.approx(np.mean(losses))
    torch.testing.assert_close(model.state_dict(), plain.state_dict())

    dtypes = set()
    model.register_forward_hook(lambda *call: dtypes.add(call[2].dtype))
    space["train_one_epoch"](model, batches, criterion, optimizer, scheduler, bfloat16=True)
    assert dtypes == {torch.bfloat16} and model[3].weight.dtype == torch.float32
    loss, true, predictions, confidences = space["evaluate"](model, batches)
    with torch.no_grad():
        logits = model.eval()(images)
    assert torch.equal(true, labels) and torch.equal(predictions, logits.argmax(1))
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    torch.testing.assert_close(confidences, logits.softmax(1).amax(1))


def flat(model):
    """Return a copy of all weights of a model in one row."""
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.bfloat16, 0.5)])
def test_an_epoch_of_the_loop_is_that_of_plain_torchvision_and_plain_adam(dtype, bound):
    torch.manual_seed(0)
    ours = classify.build_model(3, "none")
    plain = models.resnet18(num_classes=3).double()
    plain.load_state_dict(ours.state_dict())
    before = flat(plain)
    batches = [(torch.randn(n, 3, 32, 32), torch.randint(0, 3, (n,))) for n in (32, 32, 16)]
    doubles = [(images.double(), labels) for images, labels in batches]
    bfloat16 = dtype == torch.bfloat16
    if not bfloat16:
        ours.double()
        batches = doubles
    # a large eps: otherwise the first steps are hardly more than signs
    optimizer = torch.optim.Adam(ours.parameters(), 0.001, eps=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    criterion = nn.CrossEntropyLoss()
    mean = classify.train_one_epoch(ours, batches, criterion, optimizer, scheduler, bfloat16)
    adam = torch.optim.Adam(plain.parameters(), eps=0.1)
    losses = []
    for step, (images, labels) in enumerate(doubles):
        adam.param_groups[0]["lr"] = 0.001 / 2**step
        loss = nn.functional.cross_entropy(plain(images), labels)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses += [loss.item()] * len(labels)
    assert mean == pytest.approx(np.mean(losses), rel=bound / 10)
    assert (flat(ours) - flat(plain)).norm() < bound * (flat(plain) - before).norm()


def edits():
    """Return the README's edits, (old, new): all but those of the data in one list, these alone."""
    pairs = []
    for diff in re.findall(r"```diff\n(.*?)```", README, re.S):
        old = "".join(re.findall(r"^-(.*\n)", diff, re.M))
        new = "".join(re.findall(r"^\+(.*\n)", diff, re.M))
        pairs.append((old, new))
    alone = [[pair] for pair in pairs if "read_data" in pair[0]]
    return [[pair for pair in pairs if "read_data" not in pair[0]], *alone]


def edited(changes):
    """Return the program with some lines replaced."""
    source = Path(classify.__file__).read_text("utf-8")
    for old, new in changes:
        assert source.count(old) == 1, f"not in one place: {old}"
        source = source.replace(old, new)
    Path("edited.py").write_text(source, "utf-8")
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    names = {"MyDataset": lambda: [(image + 9 * index, index % 2) for index in range(24)]}
    return SimpleNamespace(**runpy.run_path("edited.py", names))


@pytest.mark.parametrize("changes", edits())
def test_each_edit_of_the_readme_is_one_place_and_runs(folder, changes):
    program = edited(changes)
    paint({"a": 10, "b": 10}, "PICTURES")
    result = run(*SMALL, "--data", "PICTURES", "--output", "out", program=program)
    assert result.code == 0 and "test accuracy" in result.out, result
    assert run("--predict", "PICTURES", "--output", "out", program=program).code == 0


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
        ("return image.convert(", "return image.convertt(", AttributeError),
        ("open_picture(path, self.size)", "open_picture(path, self.sise)", AttributeError),
        ("nn.Linear(model.fc.in_features, num", "nn.Linear(7, num", RuntimeError),
    ],
)
def test_an_error_in_edited_code_shows_its_traceback(folder, right, wrong, kind):
    paint({"a": 4, "b": 4})
    program = edited([(right, wrong)])
    with pytest.raises(kind):
        program.main([*SMALL, "--data", "pictures", "--output", "out"])
