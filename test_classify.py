"""What the program promises, tried on real runs of it on small real files.

    pytest test_classify.py         needs no network; under two minutes on two cores

A test's name is the promise. Most runs happen inside this process (`train`, `run`) and are shared
where they can be (`finished`); those that are killed or typed at have their own (`start`).
"""

import contextlib
import csv
import hashlib
import http.server
import importlib
import io
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
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
from PIL import Image
from torch import nn
from torchvision import datasets, models

import classify

SMALL = "--image-size 32 --batch-size 8 --epochs 1 --weights none --device cpu --workers 0".split()
CLASSES = ["new\nline", "x" * 80, 'your "best" 猫 größe']
SHOWN = ["new\\nline", *CLASSES[1:]]
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs signals and terminals of Linux")
OPENED = []  # every file that is opened, by whatever library
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


# ---- helpers -------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def offline():
    """Nothing comes from a network or from this machine's cache of weights."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as cache:
        nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
        for name, value in {"TORCH_HOME": cache, "no_proxy": "127.0.0.1", **nowhere}.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def folder(monkeypatch):
    """A folder to work in, gone afterwards (a run leaves 200 MB)."""
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.chdir(name)
        yield Path(name)


def run(*argv):
    """Run the program here; return its exit code, what it printed and what it complained."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = classify.main([str(arg) for arg in argv])
        except SystemExit as stop:  # argparse's own
            code = stop.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def train(*argv, output="out"):
    """Run a small training here; return also its flags and its folder."""
    result = run(*SMALL, "--output", output, *argv)
    return SimpleNamespace(argv=argv, output=Path(output), **vars(result))


def error(result, code=2):
    """Check that a run failed as promised; return its one line of error."""
    lines = [line for line in result.err.splitlines() if "error:" in line]
    assert (result.code, len(lines)) == (code, 1), result
    assert "Traceback" not in result.err + result.out
    return lines[0]


def child(argv, cwd, out, err, official, variables):
    """Run the program in a session of its own, its output in files or on a terminal."""
    os.chdir(cwd)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    files = [os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for name in (out, err)]
    sys.stdout, sys.stderr = (open(file, "w", encoding="utf-8") for file in files)
    for name, value in official.items():
        setattr(datasets.CIFAR10, name, value)
    os.environ.update(variables)
    importlib.reload(classify)  # it looks at them when it is imported
    multiprocessing.set_start_method(None, force=True)  # its own workers start as ever
    torch.set_num_threads(1)
    sys.exit(classify.main(argv))


def start(*argv, err="err.txt", official=(), variables=()):
    """Start the program in a process of its own, forked from one that has torch imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision.transforms.v2"])
    args = [str(arg) for arg in argv], os.getcwd(), "out.txt", err, dict(official), dict(variables)
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


def end(process):
    """Wait for a process; return what `run` returns."""
    process.join()
    out, err = (Path(name).read_text("utf-8") for name in ("out.txt", "err.txt"))
    return SimpleNamespace(code=process.exitcode, out=out, err=err)


def picture(seed=0, width=32, height=32):
    """Return a picture of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def paint(path, count, colour=None):
    """Write pictures of noise, or nearly of one colour, into a folder."""
    path.mkdir(parents=True)
    for number in range(count):
        image = picture([*path.name.encode(), number])
        if colour:
            image = Image.blend(image, Image.new("RGB", image.size, colour), 0.8)
        image.save(path / f"{number}.png")


def encoded(kind):
    """Return what a picture's file has in it."""
    file = io.BytesIO()
    picture().save(file, kind)
    return file.getvalue()


def rows(output="out"):
    """Return the rows of log.csv."""
    path = Path(output, "log.csv")
    return list(csv.DictReader(path.open())) if path.exists() else []


def numbers(output="out"):
    """Return what must be the same in the logs of equal runs: all but speeds."""
    timed = ("images_per_second", "seconds")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows(output)]


def accuracies(output):
    """Return the validation accuracies in log.csv."""
    return [float(row["val_accuracy"]) for row in rows(output)]


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


@torch.no_grad()
def logits(model, images):
    """Return a model's logits for PIL pictures, prepared as for the ImageNet weights."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images]) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return model(torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2))


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
def reseeded(finished):
    """A run as the finished one, but for its seed."""
    return train(*finished.argv, "--seed", 1, output=finished.output.with_name("reseeded"))


@pytest.fixture(scope="module")
def sparse(finished):
    """A run as the finished one, but for its validation."""
    return train(*finished.argv, "--validate-every", 2, output=finished.output.with_name("sparse"))


@pytest.fixture(scope="module")
def early(finished):
    """A run whose validation accuracy is always a half: both classes have the same picture.

    It is validated after epochs 2 and 4, and ends with the fourth.
    """
    pictures = finished.output.with_name("halves")
    for name in "ab":
        paint(pictures / "train" / name, 8)
        paint(pictures / "val" / name, 0)
        picture().save(pictures / "val" / name / "same.png")
    argv = "--data", pictures, "--epochs", 9, "--patience", 1, "--validate-every", 2
    return train(*argv, output=finished.output.with_name("early"))


# ---- the model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    """The program's model and torchvision's with the same weights, in double precision."""
    model = classify.build_model(3, "none").double()
    return model, torchvision_model(model.state_dict()).double()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("side", [24, 32, 33, 48, 64, 96, 224])
def test_outputs_and_gradients_are_those_of_torchvision(pair, side, mode):
    pixels = torch.randn(4 if side < 96 else 2, 3, side, side, dtype=torch.float64)
    labels, results = torch.arange(len(pixels)) % 3, []
    for model in pair:
        model.train(mode == "train").zero_grad()
        output = model(pixels)
        nn.functional.cross_entropy(output, labels).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([output, *gradients, *model.buffers()])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def test_steps_of_fused_adam_are_those_of_plain_adam_on_torchvision(pair):
    batches, labels = torch.randn(3, 4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    for model, fused in zip(pair, (True, False)):
        optimizer = torch.optim.Adam(model.train().parameters(), fused=fused)
        for pixels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
    torch.testing.assert_close(*(dict(model.state_dict()) for model in pair))


def test_state_dict_has_the_keys_of_torchvision():
    keys = classify.build_model(3, "none").state_dict().keys()
    assert list(keys) == list(models.resnet18().state_dict())


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


def test_imagenet_weights_are_used_bit_for_bit_but_for_the_head(cached):
    state = classify.build_model(3, "imagenet").state_dict()
    assert same(body(state), body(torch.load(cached))) and len(state["fc.bias"]) == 3


def test_frozen_weights_and_statistics_stay_and_no_mistakes_leave_no_picture_of_them(cached):
    for name, colour in (("a", "red"), ("b", "green"), ("c", "blue")):
        paint(Path("pictures", "train", name), 10, colour)
        paint(Path("pictures", "test", name), 2, colour)
    Path("out").mkdir()
    Path("out", "mistakes.png").write_text("an older run's")
    flags = "--data pictures --weights imagenet --freeze --epochs 4 --lr 0.1"
    result = train(*flags.split())
    assert result.code == 0 and "27 train, 3 val, 6 test" in result.out
    assert "1,539" in result.out  # numbers to train: 3 x 512 + 3
    assert "test accuracy 100.00% (6 of 6)" in result.out
    assert not Path("out", "mistakes.png").exists()
    for name in ("last.pth", "best_model.pth"):
        assert same(body(load(Path("out", name))[1]), body(torch.load(cached)))


def test_imagenet_weights_that_cannot_be_had_are_an_error(finished, folder):
    assert "weights" in error(train(*finished.argv, "--weights", "imagenet"))
    assert "weights" in error(train(*finished.argv, "--weights", "auto", "--freeze"))


# ---- pictures in folders -------------------------------------------------------------------------


def test_parts_are_stratified_disjoint_and_do_not_depend_on_the_seed(folder):
    for name, count in (("a", 10), ("b", 20)):
        paint(Path("pictures", name), count)
    splits = []
    for seed in (0, 1):
        OPENED.clear()
        result = train("--data", "pictures", "--epochs", 2, "--seed", seed)
        assert result.code == 0 and "24 train, 3 val, 3 test" in result.out
        read = [Path(path).parts[-2:] for path in OPENED if re.search(r"pictures.*\.png$", path)]
        first, trained, val, test = read[-57:-30], read[-30:-6], read[-6:-3], read[-3:]
        assert len({*trained, *val, *test}) == 30  # all pictures, each once
        assert {*first} == {*trained, *val}  # the first epoch read no test picture
        for part in (val, test):
            assert Counter(name for name, _ in part) == {"a": 1, "b": 2}
        splits.append([sorted(trained), sorted(val), sorted(test)])
    assert splits[0] == splits[1]


def test_unless_told_folders_are_seen_at_224_pixels_and_runs_written_to_checkpoint(folder):
    for name in "ab":
        paint(Path("pictures", name), 4)
    result = run("--data", "pictures", "--epochs", 1, "--device", "cpu", "--weights", "none")
    assert result.code == 0 and "4 train, 2 val, 2 test, 224 x 224" in result.out
    assert load("checkpoint/best_model.pth") and load("checkpoint/last.pth")


TRAIN = {"train/a": 5, "train/b": 5}
UNUSABLE = {
    "missing": ({}, "pictures"),
    "without folders": ({".": 3}, "pictures"),
    "one class": ({"a": 12}, "pictures"),
    "an empty class": ({"a": 12, "b": 0}, "b"),
    "too few to split": ({"a": 12, "b": 2}, "b"),
    "a class in train only": ({**TRAIN, "test/a": 5}, "b"),
    "an empty class in test": ({**TRAIN, "test/a": 1, "test/b": 0}, "b"),
    "a class in test only": ({**TRAIN, "test/a": 1, "test/b": 1, "test/z": 1}, "z"),
}


@pytest.mark.parametrize("counts, named", UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_folders_are_an_error_that_names_folder_and_class(folder, counts, named):
    for name, count in counts.items():
        paint(Path("pictures", name), count)
    line = error(train("--data", "pictures"))
    assert "pictures" in line and re.search(rf"\b{named}\b", line)


@linux
def test_unreadable_files_are_named_and_left_out_and_truncated_photos_used(folder):
    for name in "ab":
        paint(Path("pictures", name), 10)
    bad = {"empty.png": b"", "notes.txt": b"some text", "head.png": encoded("png")[:20]}
    bad |= {"bomb.ppm": b"P6 60000 60000 255\n", 'two\nlines\' "猫".jpg': b"no picture"}
    for name, content in bad.items():
        Path("pictures", "a", name).write_bytes(content)
    Path("pictures", "b", "dangling.png").symlink_to("nowhere")
    os.mkfifo("pictures/b/pipe.png")  # whoever reads it waits for ever
    photo = encoded("jpeg")
    Path("pictures", "b", "truncated.jpg").write_bytes(photo[: len(photo) // 2])
    result = train("--data", "pictures")
    assert result.code == 0 and "17 train, 2 val, 2 test" in result.out  # 10 a, 11 b
    assert re.search(r"\b7\b", result.err) and not re.search(r"truncated|\d\.png", result.err)
    for name in [*bad, "dangling.png", "pipe.png"]:
        assert name.replace("\n", "\\n") in result.err


@linux
@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_undecodable_in_training_is_an_error_that_names_it(folder, workers):
    photo = encoded("jpeg")
    for name in "ab":
        paint(Path("pictures", name), 5)
        damaged = photo[:200] + bytes(len(photo) - 200)  # the header is good, the rest is lost
        for number in range(5):
            Path("pictures", name, f"bad{number}.jpg").write_bytes(damaged)
    result = end(start(*SMALL, "--data", "pictures", "--workers", workers))
    assert re.search(r"bad\d\.jpg", error(result)) and "warning" not in result.err


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
    packed, sums, rng = io.BytesIO(), {}, np.random.default_rng(0)
    contents = {"batches.meta": {"label_names": ["plane", "car", "bird"]}}
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        pixels = rng.integers(0, 256, (6, 3072), dtype=np.uint8)
        contents[name] = {"data": pixels, "labels": [0, 1, 2] * 2}
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in contents.items():
            info, raw = tarfile.TarInfo(f"cifar-10-batches-py/{name}"), pickle.dumps(content)
            info.size, sums[name] = len(raw), hashlib.md5(raw).hexdigest()
            tar.addfile(info, io.BytesIO(raw))
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums.pop("batches.meta")}
    *first, last = map(list, sums.items())
    official = {"meta": meta, "train_list": first, "test_list": [last]}
    packed = packed.getvalue()
    return packed, {"tgz_md5": hashlib.md5(packed).hexdigest(), **official}


@pytest.fixture
def served(archive, folder, monkeypatch):
    """A function that trains while CIFAR-10's server answers in some way."""
    monkeypatch.setattr(classify, "NETWORK_TIMEOUT", 1)
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
def test_a_failed_download_is_an_error_and_the_next_run_starts_it_again(served, answer):
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
    assert "images/s" not in auto.err  # that line is for terminals
    files = sorted(Path().rglob("*"))
    again = train("--data", "digits", *flags, "--resume")  # checks and tests the pictures anew
    assert again.code == 0 and report(again.out) == report(auto.out)
    assert sorted(Path().rglob("*")) == files  # none of them is on disk


@pytest.mark.parametrize("mirror", [False, True])
def test_training_pictures_are_shifted_by_a_pixel_and_mirrored_where_that_is_right(mirror):
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)), "edge")
    shifted = [padded[y : y + 32, x : x + 32] for y in range(3) for x in range(3)]
    mirrored = [one[:, ::-1] for one in shifted if mirror]
    batch = torch.from_numpy(np.stack([picture] * 512)).permute(0, 3, 1, 2)
    made = classify.augment(batch, mirror).permute(0, 2, 3, 1).numpy()
    assert {one.tobytes() for one in made} == {one.tobytes() for one in shifted + mirrored}


def test_photos_are_mirrored_in_training_and_digits_are_not(finished):
    assert classify.read_data(str(finished.argv[1]), 32).mirror
    assert not classify.read_data("digits", 32).mirror


# ---- what is printed and written -----------------------------------------------------------------


def test_the_start_tells_data_classes_device_weights_and_parameters(finished):
    head = finished.out[: finished.out.index("epoch 1/3")].replace(",", "")
    told = ["pictures", "36 train 12 val 13 test", "32 x 32", SHOWN[0], "cpu", "none", "11178051"]
    assert finished.code == 0 and all(text in head for text in told)


def test_hidden_files_and_folders_are_ignored_without_a_word(finished):
    assert finished.code == 0 and finished.err == ""


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
        assert row["epoch"] == number
        best = max(best, row["val_accuracy"])
    kept = list(load(finished.output / "best_model.pth")[0].values())
    epoch = accuracies(finished.output).index(best) + 1
    assert best in kept and epoch in kept and CLASSES in kept and 32 in kept


def test_report_and_validation_are_those_of_plain_torchvision(finished):
    model = torchvision_model(load(finished.output / "best_model.pth")[1])
    confusion, losses, right = np.zeros((3, 3)), [], 0
    for label, title in enumerate(CLASSES):
        files = {part: (finished.argv[1] / part / title).glob("*") for part in ("val", "test")}
        val, test = (logits(model, map(Image.open, files[part])) for part in files)
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


def test_mistakes_are_drawn_whatever_the_classes_are_called(finished):
    right, count = map(int, re.search(r"\((\d+) of (\d+)\)", finished.out).groups())
    with Image.open(finished.output / "mistakes.png") as image:
        assert image.width * image.height >= (count - right) * 32 * 32 > 0


def test_same_seed_same_numbers_and_weights_and_the_earlier_best_is_kept(finished, copy):
    assert train(*finished.argv).code == 0
    assert numbers() == numbers(finished.output) and same_weights(copy, finished.output)
    earlier = (finished.output / "best_model.pth").read_bytes()
    assert (copy / "best_model.previous.pth").read_bytes() == earlier


def test_another_seed_other_weights(finished, reseeded):
    assert reseeded.code == 0 and not same_weights(reseeded.output, finished.output)


def test_validate_every_leaves_cells_empty_and_always_validates_the_last_epoch(sparse):
    cells = [bool(row[key]) for row in rows(sparse.output) for key in ("val_loss", "val_accuracy")]
    assert cells == [False, False, True, True, True, True]
    assert re.search(r"epoch 1/3  train loss [\d.]+  \d+ images/s  [\d.]+ s\n", sparse.out)


def test_patience_stops_after_so_many_validations_and_of_equal_epochs_the_first_is_best(early):
    cells = [row["val_accuracy"] for row in rows(early.output)]
    assert early.code == 0 and cells == ["", "0.5", "", "0.5"]
    assert re.findall(r"epoch (\d)/9 .*\(best\)", early.out) == ["2"]
    best, last = (load(early.output / name)[1] for name in ("best_model.pth", "last.pth"))
    assert best["bn1.num_batches_tracked"] * 2 == last["bn1.num_batches_tracked"]


@linux
def test_a_terminal_shows_how_far_the_epoch_is_and_ctrl_c_ends_with_130(folder):
    ours, its = os.openpty()
    os.set_blocking(ours, False)
    for name in "ab":
        paint(Path("pictures", name), 250)
    process = start(*SMALL, "--data", "pictures", "--workers", 2, err=os.ttyname(its))
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


@linux
def test_ctrl_c_while_a_checkpoint_is_written_ends_with_130(finished, folder):
    process, temporary = start(*SMALL, *finished.argv, "--output", "out"), Path("out/last.pth.tmp")

    def half_written():
        with contextlib.suppress(FileNotFoundError):
            return temporary.stat().st_size > 1 << 20

    assert until(half_written, process)
    os.kill(process.pid, signal.SIGINT)
    assert "interrupted; go on with --resume" in error(end(process), code=130)


# ---- prediction ----------------------------------------------------------------------------------


def test_predict_gives_the_shares_of_plain_torchvision_in_any_folder(finished, folder):
    picture(7).save("photo.png")
    result = run("--predict", "photo.png", "--output", finished.output)
    assert result.code == 0 and result.err == ""
    model = torchvision_model(load(finished.output / "best_model.pth")[1])
    shares, labels = logits(model, [picture(7)])[0].softmax(0).sort(descending=True)
    told = "  ".join(rf"{re.escape(SHOWN[label])} (\d+\.\d)%" for label in labels)
    found = re.fullmatch(rf"photo\.png  {told}\n", result.out).groups()
    assert list(map(float, found)) == pytest.approx((shares * 100).tolist(), abs=0.06)


def test_any_mode_and_size_enters_upright_scaled_and_cropped_in_the_middle(finished, folder):
    photo, grey, turned = picture(7), picture(7).convert("L"), Image.Exif()
    palette, bits, wide, turned[274] = photo.quantize(16), photo.convert("1"), picture(8, 96), 6
    wide.paste(photo, (32, 0))
    deep, other = np.asarray(grey, dtype=np.uint16) * 257, picture(9, width=1000, height=2)
    alike = {
        "photo": [photo, photo.convert("RGBA"), photo.convert("CMYK"), wide],
        "grey": [grey, grey.convert("RGB"), grey.convert("LA"), Image.fromarray(deep)],
        "palette": [palette, palette.convert("RGB"), palette.convert("RGBA")],
        "bits": [bits, bits.convert("L"), bits.convert("RGB")],
    }
    for name, images in alike.items():
        for number, image in enumerate(images):
            image.save(f"{name}-{number}.{'tif' if image.mode == 'CMYK' else 'png'}")
    Image.fromarray(deep.astype(">u2")).save("grey-big-endian.tif")
    photo.transpose(Image.Transpose.ROTATE_90).save("photo-turned.png", exif=turned)
    wide.transpose(Image.Transpose.ROTATE_90).save("photo-wide-turned.png", exif=turned)
    other.convert("CMYK").save("other.jpg")
    names = sorted(path.name for path in Path().iterdir())
    result = run("--output", finished.output, "--predict", *names)
    lines = [line.split("  ", 1) for line in result.out.splitlines()]
    assert result.code == 0 and [name for name, _ in lines] == names
    for group in alike:
        assert len({shares for name, shares in lines if name.startswith(group)}) == 1


@linux
def test_predict_names_what_it_cannot_read_and_classifies_the_others(finished, folder):
    picture().save("good.png")
    Path("notes.txt").write_text("no picture")
    Path("folder").mkdir()
    files = ["good.png", "notes.txt", "folder", "missing.png", "good.png"]
    result = end(start("--output", finished.output, "--predict", *files))
    assert result.code == 1 and "Traceback" not in result.err
    assert [line[:10] for line in result.out.splitlines()] == ["good.png  "] * 2
    errors = [line for line in result.err.splitlines() if "error:" in line]
    assert all(name in line for name, line in zip(files[1:4], errors, strict=True))


# ---- what cannot be done -------------------------------------------------------------------------


UNUSABLE_FLAGS = """--epochs 0|--epochs x|--batch-size 1|--lr 0|--lr nan|--lr inf|--lr -1
--image-size 0|--patience -1|--workers -1|--seed -1|--validate-every 0|--weights some|--device tpu
--nonsense|--freeze|--predict""".replace("\n", "|").split("|")


@pytest.mark.parametrize("flags", UNUSABLE_FLAGS)
def test_unusable_flags_are_an_error_that_names_them(folder, flags):
    assert flags.split()[0] in error(train("--data", "digits", *flags.split()))
    assert not list(folder.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_cuda_without_cuda_is_an_error(folder):
    assert "cuda" in error(train("--data", "digits", "--device", "cuda"))


def test_without_a_run_predict_and_resume_are_an_error(folder):
    assert "best_model.pth" in error(train("--predict", "photo.jpg"))
    assert "last.pth" in error(train("--resume"))


def test_an_output_that_is_a_file_is_an_error(finished, folder):
    Path("out").write_text("a file")
    assert "out" in error(train(*finished.argv))
    assert Path("out").read_text() == "a file"


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def spoilt(path):
    """Return what may lie in a checkpoint's place: names and contents."""
    checkpoint, state = load(path)
    state.popitem()
    yield from {"empty": b"", "text": b"some text", "pickle": pickle.dumps(Evil())}.items()
    yield "half", path.read_bytes()[: path.stat().st_size // 2]
    contents = {"malicious": {**checkpoint, "more": Evil()}, "without a weight": checkpoint}
    contents |= {"foreign": state, "a list": [1, 2], "numbers": dict.fromkeys(checkpoint, 0)}
    for name, content in contents.items():
        file = io.BytesIO()
        torch.save(content, file)
        yield name, file.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["best_model.pth", "last.pth"])
def test_a_damaged_foreign_or_malicious_checkpoint_is_an_error(finished, folder, name):
    flags = {"best_model.pth": ["--predict", "photo.png"], "last.pth": ["--resume"]}
    picture().save("photo.png")
    Path("out").mkdir()
    for kind, content in spoilt(finished.output / name):
        Path("out", name).write_bytes(content)
        assert name in error(run("--output", "out", *flags[name])), kind
        assert not Path("executed").exists(), kind


def test_malicious_imagenet_weights_are_an_error(finished, cached):
    torch.save({"fc.weight": Evil()}, cached)
    assert "weights" in error(train(*finished.argv, "--weights", "imagenet"))
    assert not Path("executed").exists()


def test_a_best_model_of_other_classes_is_an_error(copy):
    best = load(copy / "best_model.pth")[0]
    other = {key: ["a", "b", "c"] if value == CLASSES else value for key, value in best.items()}
    torch.save(other, copy / "best_model.pth")
    assert "classes" in error(run("--resume", "--output", copy))


@pytest.mark.parametrize("batch", [8, 128])
def test_a_last_batch_of_one_picture_and_fewer_pictures_than_a_batch_train(folder, batch):
    for name, count in {"train/a": 6, "train/b": 5, "val/a": 1, "val/b": 1}.items():
        paint(Path("pictures", name), count)
    result = train("--data", "pictures", "--batch-size", batch)
    assert result.code == 0 and "9 train, 2 val, 2 test" in result.out and len(rows()) == 1


def test_a_loss_that_is_no_number_is_an_error_and_the_best_model_stays(finished, copy):
    assert "--lr" in error(train(*finished.argv, "--lr", "1e30"), code=1)
    best = (finished.output / "best_model.pth").read_bytes()
    assert best in [path.read_bytes() for path in copy.glob("best_model*.pth")]


@linux
@pytest.mark.parametrize("megabytes", [1, 60])  # too few before the first epoch, and after it
def test_a_full_disk_is_an_error_and_the_older_checkpoints_are_whole(finished, copy, megabytes):
    import resource

    best, last = ((copy / name).read_bytes() for name in ("best_model.pth", "last.pth"))
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes << 20, hard))
    try:
        result = train(*finished.argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert "last.pth" in error(result, code=1)
    assert best in [path.read_bytes() for path in copy.glob("best_model*.pth")]
    assert load(copy / "last.pth")
    assert ((copy / "last.pth").read_bytes() == last) == (megabytes == 1)


# ---- going on ------------------------------------------------------------------------------------


def test_a_finished_run_that_is_resumed_is_tested_again(finished, copy):
    result = train(*finished.argv, "--resume", "--workers", 1)
    assert result.code == 0 and report(result.out) == report(finished.out)
    assert rows() == rows(finished.output) and same_weights(copy, finished.output)


DIFFERING = """--lr 0.5 0.001|--epochs 4 3|--batch-size 16 8|--seed 5 0|--image-size 64 32
--validate-every 2 1|--patience 3 0|--weights imagenet none|--data digits pictures"""


@pytest.mark.parametrize("flag", DIFFERING.replace("\n", "|").split("|"))
def test_a_resumed_flag_that_differs_is_an_error_that_names_both_values(finished, flag):
    flag, value, own = flag.split()
    line = error(run("--output", finished.output, "--resume", flag, value))
    assert flag in line and value in line and own in line


def test_a_resumed_run_may_have_more_batches_than_were_planned(copy):
    run_so_far = load(copy / "last.pth")[0]  # of more processes, that shared fewer
    next(value for value in run_so_far.values() if "epochs" in value)["epochs"] = 4
    torch.save(run_so_far, copy / "last.pth")
    assert run("--resume", "--output", copy).code == 0 and len(rows()) == 4


@pytest.mark.parametrize("change", [shutil.copy, os.rename])
def test_a_resumed_run_of_other_data_is_an_error(finished, copy, change):
    old = finished.argv[1] / "train" / CLASSES[1] / "0.png"
    new = old.with_name("new.png")
    change(old, new)
    try:
        assert "data" in error(run("--output", copy, "--resume"))
    finally:
        os.replace(new, old)


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


MOMENTS = [  # before the first batch; while an epoch is saved; when it has just been
    lambda: written("last.pth"),
    lambda: len(rows()) >= 1,
    lambda: len(rows()) >= 2 and written("log.csv") < written("last.pth"),
]


@linux
def test_killed_at_any_moment_a_run_in_memory_ends_in_the_same_bits(served, archive):
    argv = "--data", "cifar10", "--epochs", 3
    assert served("well", *argv, output="whole").code == 0
    assert kill_and_resume(*SMALL, *argv, moments=MOMENTS, official=archive[1]).code == 0
    assert numbers() == numbers("whole") and same_weights("out", "whole")


@linux
def test_killed_at_any_moment_a_run_with_workers_ends_in_the_same_bits(early, folder):
    result = kill_and_resume(*SMALL, *early.argv, "--workers", 2, moments=MOMENTS)
    assert numbers() == numbers(early.output) and same_weights("out", early.output)
    assert result.code == 0 and report(result.out) == report(early.out)


@linux
def test_killed_in_its_first_epoch_a_run_does_not_go_on_with_an_older_one(finished, reseeded, copy):
    before = written("last.pth")
    moments = [lambda: written("last.pth") != before]
    assert kill_and_resume(*SMALL, *reseeded.argv, moments=moments).code == 0
    assert numbers() == numbers(reseeded.output) and same_weights("out", reseeded.output)
    earlier = (finished.output / "best_model.pth").read_bytes()
    assert (copy / "best_model.previous.pth").read_bytes() == earlier


# ---- several processes ---------------------------------------------------------------------------


@linux
def test_under_torchrun_each_test_picture_counts_once_and_each_line_is_said_once(finished, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += map(str, [classify.__file__, *SMALL, *finished.argv, "--epochs=1", "--output=out"])
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 1/1") == result.stdout.count("test accuracy") == 1
    alone = run("--resume", "--output", "out")
    assert " of 13)" in alone.out and report(alone.out) == report(result.stdout)


@linux
def test_a_batch_that_processes_cannot_share_evenly_is_an_error_said_once(finished, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    torchrun |= {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    processes = []
    for rank in "01":
        argv = *SMALL, *finished.argv, "--batch-size", 9
        variables = {**torchrun, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(start(*argv, err=f"err{rank}.txt", variables=variables))
    for process in processes:
        process.join()
    said = Path("err0.txt").read_text() + Path("err1.txt").read_text()
    assert [process.exitcode for process in processes] == [2, 2]
    assert said.count("error:") == 1 and "--batch-size 9" in said
