"""What the program promises, tried on real runs of it on small real files; it needs no network.

A test's name is the promise. First come runs that are followed by hand, without the program.
"""

import contextlib
import copy
import csv
import hashlib
import inspect
import io
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchvision import datasets, models
from torchvision.transforms import v2

import classify

HERE = str(Path(__file__).parent)
README = Path(HERE, "README.md").read_text("utf-8")
linux = pytest.mark.skipif(sys.platform != "linux", reason="a fork server, signals, /dev/shm")
SMALL = "--image-size 32 --batch-size 8 --epochs 1 --weights none --device cpu --workers 0".split()
TURNED = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\5\0\0\0\0\0\0\0"  # orientation 5


@pytest.fixture(scope="session", autouse=True)
def offline():
    """Nothing is taken from a network or this machine's cache of weights, all is in /dev/shm."""
    with contextlib.suppress(OSError):  # memory is faster than a disk, if there is enough
        tempfile.tempdir = "/dev/shm" if shutil.disk_usage("/dev/shm").free > 4 << 30 else None
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as cache:
        dead = {"http_proxy": "127.0.0.1:9", "https_proxy": "127.0.0.1:9", "no_proxy": "127.0.0.1"}
        for name, value in {**dead, "TORCH_HOME": cache, "PYTHONPATH": HERE}.items():
            patch.setenv(name, value)
        yield
    tempfile.tempdir = None


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    """Each test works in an empty folder; processes and settings that it leaves are undone."""
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.chdir(name)
        torch.manual_seed(0)
        yield Path(name)
        monkeypatch.undo()
        for process in multiprocessing.active_children():
            process.kill()
    socket.setdefaulttimeout(None)


def run(*argv, program=classify):
    """Run the program here as its users start it; return exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["classify.py", *map(str, argv)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = program.run() or 0
            except SystemExit as stop:
                code = stop.code
                if isinstance(code, str):  # the interpreter would say it
                    print(code, file=err)
                    code = 1
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def train(*argv, output="out"):
    """Run a small training here; return also its folder and what its network saw."""
    seen = {"trained": [], "evaluated": []}

    def note(layer, inputs):
        if isinstance(layer, models.ResNet):
            seen.setdefault("first", copy.deepcopy(layer.state_dict()))
            seen["bias"] = layer.fc.bias.detach().clone()
            seen["trained" if layer.training else "evaluated"].append(inputs[0].detach().clone())

    with nn.modules.module.register_module_forward_pre_hook(note):
        result = run(*SMALL, "--output", output, *argv)
    return SimpleNamespace(**vars(result), **seen, output=Path(output), argv=argv)


def error(result, code=1):
    lines = [line for line in result.err.splitlines() if "error:" in line]
    assert (result.code, len(lines)) == (code, 1), result
    assert "Traceback" not in result.err + result.out
    return lines[0]


def child(argv, cwd, files, variables):
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    sys.stdout, sys.stderr = (open(file, "w", encoding="utf-8") for file in files)
    os.environ.update(variables)
    torch.set_num_threads(1)
    sys.argv = ["classify.py", *argv]
    sys.exit(classify.run())


def start(*argv, cwd=".", name="", variables=None):
    files = [Path(cwd, f"{kind}{name}.txt").absolute() for kind in ("out", "err")]
    variables = {**os.environ, **(variables or {})}
    args = [str(arg) for arg in argv], os.path.abspath(cwd), files, variables
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=child, args=args)
    process.files = files
    process.start()
    return process


def as_torchrun(count, *argv, cwd=(".", ".", "."), run_id="test", restarts=0):
    """Start the processes that torchrun would start."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    common |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "TORCHELASTIC_RUN_ID": run_id}
    processes = []
    for rank in range(count):
        own = {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RESTART_COUNT": restarts}
        variables = {key: str(value) for key, value in {**common, **own}.items()}
        processes.append(start(*argv, cwd=cwd[rank], name=rank, variables=variables))
    return processes


def until(happened, process):
    while not (seen := happened()) and process.is_alive():
        process.join(0.002)
    return seen


def end(process):
    process.join(240)
    out, err = (path.read_text("utf-8") for path in process.files)
    return SimpleNamespace(code=process.exitcode, out=out, err=err)


def noise(*seed, side=32):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def paint(counts, root="pictures"):
    for name, count in counts.items():
        path = Path(root, name)
        path.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(noise(*name.encode(), number)).save(path / f"{number}.png")


def rows(output="out"):
    path = Path(output, "log.csv")
    table = list(csv.DictReader(path.open())) if path.exists() else []
    return [{key: float(value) for key, value in row.items()} for row in table]


def load(path):
    checkpoint = torch.load(path, weights_only=True)
    return checkpoint, checkpoint["model"]


def assert_same(one, other, but=()):
    assert one.keys() == other.keys()
    assert [key for key in one if key not in but and not torch.equal(one[key], other[key])] == []


def assert_same_run(output, other):
    """Check that two runs ended in the same weights and figures, but for the speeds."""
    for row, same in zip(rows(output), rows(other), strict=True):
        assert list(row.values())[:5] == list(same.values())[:5]
    for name in ("last.pth", "best_model.pth"):
        assert_same(load(Path(output, name))[1], load(Path(other, name))[1])


def read_data(*argv):
    return classify.read_data(*classify.parse_args(["--output", "out", *map(str, argv)]))


def normalized(arrays):
    pixels = (np.stack(arrays) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)


def split(classes, missing=("val", "test")):
    """Return what is in train, val and test by the promised rule, of what each class has."""
    rng = np.random.default_rng(0)
    parts = {"train": [], "val": [], "test": []}
    for name in sorted(classes):
        own = sorted(classes[name])
        rng.shuffle(own)
        tenth = max(1, round(len(own) / 10))
        for part in missing:
            parts[part] += own[:tenth]
            own = own[tenth:]
        parts["train"] += own
    return parts


def plain_logits(state, arrays):
    model = models.resnet18(num_classes=len(state["fc.bias"]))
    model.load_state_dict(state)
    with torch.inference_mode():
        return model.eval()(normalized(arrays))


def assert_row(row, state, arrays, labels):
    logits, labels = plain_logits(state, arrays), torch.as_tensor(labels)
    assert row["val_accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean())
    loss = nn.functional.cross_entropy(logits, labels)
    assert row["val_loss"] == pytest.approx(loss.item(), rel=1e-3)


CLASSES = ["ant", "bee 猫", "cat"]
FLAGS = "--image-size 64 --batch-size 24 --epochs 3 --lr 0.002 --seed 3 --patience 0".split()


@pytest.fixture(scope="module")
def followed():
    """A run of three epochs on DIR/CLASS/**, its pictures, each of a red of its own, and parts."""
    with tempfile.TemporaryDirectory() as name:
        root, pictures = Path(name, "pictures"), {}
        for label, number in np.ndindex(3, 20):
            pixels = noise(label, number, side=64)
            pixels[..., 0] = 4 * (20 * label + number)
            ending = "JPEG" if number % 10 == 9 else "png"
            file = f"{CLASSES[label]}/{'deep/' * (label + number == 1)}{number:02}.{ending}"
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            exif = Image.Exif()
            exif[274] = 6 if number % 10 == 8 else 1  # turn it right to see it upright
            stored = Image.fromarray(np.rot90(pixels) if number % 10 == 8 else pixels)
            stored.save(root / file, exif=exif, quality=100, subsampling=0)
            pictures[file] = pixels if ending == "png" else np.asarray(Image.open(root / file))
        (root / "ant" / ".hidden.png").write_bytes(b"")
        result = train("--data", root, *FLAGS, output=Path(name, "out"))
        by_class = {c: [file for file in pictures if file.startswith(c)] for c in CLASSES}
        result.root, result.pictures, result.parts = root, pictures, split(by_class)
        yield result


def files_of(images, pictures):
    reds = (images[:, 0, 32, 32] * 0.229 + 0.485) * 255
    by_red = {int(pixels[32, 32, 0]): file for file, pixels in pictures.items()}
    return [by_red[min(by_red, key=lambda red: abs(red - value))] for value in reds.tolist()]


def labels_of(files):
    return np.array([CLASSES.index(file.split("/")[0]) for file in files])


def test_the_parts_are_split_by_the_rule_and_training_alone_is_changed_and_shuffled(followed):
    pictures, parts = followed.pictures, followed.parts
    assert [len(images) for images in followed.trained] == [24] * 6
    for part, images in zip(["val"] * 3 + ["test"], followed.evaluated, strict=True):
        files = files_of(images, pictures)
        assert sorted(files) == sorted(parts[part])
        expected = normalized([pictures[file] for file in files])
        torch.testing.assert_close(images.contiguous(), expected, rtol=0, atol=1e-5)
    orders = [files_of(torch.cat(followed.trained[n : n + 2]), pictures) for n in (0, 2, 4)]
    sampler = DistributedSampler(sorted(parts["train"]), 1, 0)
    for epoch, order in enumerate(orders, 1):
        sampler.set_epoch(hash((3, epoch)))  # shuffled by seed and epoch alone
        assert order == [sampler.dataset[place] for place in sampler]
    changes = []
    for file, image in zip(sum(orders, []), torch.cat(followed.trained)):
        padded = np.pad(pictures[file], ((2, 2), (2, 2), (0, 0)), "edge")
        crops = [padded[y : y + 64, x : x + 64] for y, x in np.ndindex(5, 5)]
        variants = normalized(crops + [crop[:, ::-1] for crop in crops])
        [number] = torch.nonzero((variants - image).abs().amax((1, 2, 3)) < 1e-4)
        changes.append(number.item())
    assert len(set(changes)) > 5 and min(changes) < 25 <= max(changes)  # some are mirrored
    groups = [changes[n : n + 16] for n in range(0, 144, 24)]
    groups += [changes[n : n + 8] for n in range(16, 144, 24)]
    assert all(len(set(group)) == 1 for group in groups) and groups[0][0] != groups[6][0]


def test_weights_and_figures_are_those_of_plain_torchvision_and_plain_loops(followed):
    torch.manual_seed(3)
    model = models.resnet18()
    model.fc = nn.Linear(512, 3)
    assert_same(followed.first, model.state_dict())  # the first weights, by the seed
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002, weight_decay=0.2, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.002, total_steps=7)
    losses, states, table = [], [followed.first], rows(followed.output)
    native = classify.has_native_bfloat16(torch.device("cpu"))
    val = [followed.pictures[file] for file in followed.parts["val"]]
    for images in followed.trained:
        labels = torch.tensor(labels_of(files_of(images, followed.pictures)))
        with torch.autocast("cpu", torch.bfloat16, enabled=native):
            loss = nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if len(losses) % 2 == 0:
            row = table[len(states) - 1]
            assert row["train_loss"] == pytest.approx(np.mean(losses[-2:]), rel=1e-4)
            assert row["learning_rate"] == pytest.approx(scheduler.get_last_lr()[0])
            states.append(copy.deepcopy(model.state_dict()))
            assert_row(row, states[-1], val, labels_of(followed.parts["val"]))
    best = max(table, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    checkpoint, kept = load(followed.output / "best_model.pth")
    told = [checkpoint[key] for key in ("epoch", "val_accuracy", "image_size", "classes")]
    assert told == [best["epoch"], best["val_accuracy"], 64, CLASSES]
    last = load(followed.output / "last.pth")[1]
    for saved, plain in ((last, states[3]), (kept, states[int(best["epoch"])])):
        apart = sum((plain[key] - saved[key]).double().square().sum() for key in plain)
        moved = sum((plain[key] - states[0][key]).double().square().sum() for key in plain)
        assert apart < 1e-6 * moved


def test_the_start_each_epoch_and_the_end_are_told_and_logged_as_promised(followed):
    head, *lines, tail = re.split(r"^(epoch.*)\n", followed.out, flags=re.M)
    told = ["reading", str(followed.root), "48 train, 6 val, 6 test", "3 classes: ant, bee 猫, cat"]
    told += [*" ".join(FLAGS).replace(" --", "|--").split("|"), "--mirror", "--weights none"]
    told += ["--device cpu", "--workers 0", "processes: 1", f"--output {followed.output}"]
    assert (followed.code, followed.err) == (0, "") and [x for x in told if x not in head] == []
    header = "epoch,train_loss,val_loss,val_accuracy,learning_rate,images_per_second,seconds"
    assert (followed.output / "log.csv").read_text().splitlines()[0] == header
    best = (-1, 0)
    for line, row in zip(lines[::2], rows(followed.output), strict=True):
        told = "epoch {epoch:.0f}/3  train loss {train_loss:.4f}  val loss {val_loss:.4f}  "
        told += "val accuracy {val_accuracy:.2%}  {images_per_second:.0f} images/s  {seconds:.1f} s"
        score = (row["val_accuracy"], -row["val_loss"])
        assert line == told.format(**row) + "  (best)" * (score > best)
        assert row["images_per_second"] * row["seconds"] > 48
        best = max(best, score)
    assert all(text in tail for text in (str(followed.output), "--predict", "--resume --epochs"))


def test_mistakes_and_predictions_are_those_of_the_best_weights(followed):
    files = followed.parts["test"]
    labels = labels_of(files)
    state = load(followed.output / "best_model.pth")[1]
    shares = plain_logits(state, [followed.pictures[file] for file in files]).softmax(1).numpy()
    right = shares.argmax(1) == labels
    assert f"test accuracy {right.mean():.2%} ({right.sum()} of 6)" in followed.out.splitlines()
    wrong = sorted(np.flatnonzero(~right), key=lambda place: -shares[place].max())
    assert len(wrong) > 1
    sheet = np.asarray(Image.open(followed.output / "mistakes.png"))
    for number, place in enumerate(wrong):
        tile = Image.new("RGB", (200, 240))
        tile.paste(Image.fromarray(followed.pictures[files[place]]).resize((192, 192)))
        true, guess = CLASSES[labels[place]], CLASSES[shares[place].argmax()]
        words = f"{true}\n-> {guess} {shares[place].max():.0%}"
        ImageDraw.Draw(tile).text((0, 194), words, "white", ImageFont.load_default(13))
        assert np.array_equal(sheet[:240, 200 * number : 200 * (number + 1)], np.asarray(tile))
    paths = [str(followed.root / file) for file in files]
    result = run("--predict", *paths, "--output", followed.output, "--device", "cpu")
    assert (result.code, result.err) == (0, "")
    for line, path, row in zip(result.out.splitlines(), paths, shares, strict=True):
        assert line.startswith(path + "  ")
        told = re.findall(r"  (.+?) (\d+\.\d)%(?=  |$)", line)
        assert [name for name, _ in told] == [CLASSES[label] for label in row.argsort()[::-1]]
        assert [float(x) for _, x in told] == pytest.approx(sorted(row * 100)[::-1], abs=0.1)


def test_of_many_mistakes_the_surest_32_are_drawn_in_rows_of_eight():
    pictures = torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1).expand(40, 3, 9, 9)
    data = classify.Data("", None, None, TensorDataset(pictures, torch.ones(40)), ["a", "b"])
    labels, confidences = torch.zeros(40, dtype=torch.int64), torch.linspace(0.5, 0.9, 40)
    classify.draw_mistakes(Path(), data, labels, labels + 1, confidences)
    sheet = np.asarray(Image.open("mistakes.png"))
    assert sheet.shape == (960, 1600, 3)
    assert sheet[96::240, 96::200, 0].flatten().tolist() == [*range(39, 7, -1)]


def test_the_report_has_each_classs_scores_their_means_and_the_five_pairs_confused_most():
    confusion = torch.tensor([10, 6, 1, 5, 20, 4, 3, 2, 30])  # true a, b, c × predicted a, b, c
    places = torch.repeat_interleave(torch.arange(9), confusion)
    labels = torch.cat([places // 3, torch.tensor([-100])])  # the last could not be decoded
    predictions = torch.cat([places % 3, torch.tensor([0])])
    text = "\n".join(classify.report(labels, predictions, ["a", "b", "c"]))
    told = ["test accuracy 74.07% (60 of 81)", "", "class precision recall F1 count"]
    told += ["a 0.5556 0.5882 0.5714 17", "b 0.7143 0.6897 0.7018 29", "c 0.8571 0.8571 0.8571 35"]
    told += ["mean 0.7090 0.7117 0.7101 81", "", "most often confused (true -> predicted):"]
    told += ["a -> b 6", "b -> a 5", "b -> c 4", "c -> a 3", "c -> b 2"]
    assert re.sub(" +", " ", text).splitlines() == told


def cifar_picture(name, place):
    y, x = np.mgrid[:32, :32]
    blue = 3 * y + (128 if name == "cifar100" else 0)
    return np.stack([np.full((32, 32), 3 * place), 7 * x + 1, blue], axis=2).astype(np.uint8)


def pack_cifar(name, official, labels_key):
    contents = {"meta": {official.meta["key"]: [f"{name} {label}" for label in "abc"]}}
    for member, places in {"train": range(60), "test": range(60, 69)}.items():
        data = [cifar_picture(name, place).transpose(2, 0, 1).ravel() for place in places]
        contents[member] = {"data": np.stack(data), labels_key: [place % 3 for place in places]}
    packed, sums = io.BytesIO(), {}
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for member, content in contents.items():
            raw = pickle.dumps(content)
            info = tarfile.TarInfo(f"{official.base_folder}/{member}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
            sums[member] = hashlib.md5(raw).hexdigest()
    expected = {"train_list": [["train", sums["train"]]], "test_list": [["test", sums["test"]]]}
    expected["meta"] = {"filename": "meta", "key": official.meta["key"], "md5": sums["meta"]}
    expected["tgz_md5"] = hashlib.md5(packed.getvalue()).hexdigest()
    return official, packed.getvalue(), expected


@pytest.fixture
def cifar(folder, monkeypatch):
    """A function that sets how the server of both CIFAR sets answers: 60 pictures and 9 to test."""
    packed = [pack_cifar("cifar10", datasets.CIFAR10, "labels")]
    packed.append(pack_cifar("cifar100", datasets.CIFAR100, "fine_labels"))
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:  # of the folder
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()

        def answers(how):
            for official, archive, expected in packed:
                port = 9 if how == "nothing" else server.server_port
                url = f"http://127.0.0.1:{port}/{official.filename}"
                for attribute, value in {**expected, "url": url}.items():
                    monkeypatch.setattr(official, attribute, value)
                content = {"half": archive[:999], "rubbish": bytes(len(archive))}.get(how, archive)
                Path(official.filename).write_bytes(content)

        answers("well")
        yield answers
        server.shutdown()


@pytest.mark.parametrize("name, size", [("cifar10", 32), ("cifar100", 20)])
def test_a_set_by_name_is_downloaded_once_and_its_pictures_get_to_the_network(cifar, name, size):
    result = train("--data", name, "--no-mirror", "--batch-size", 99, "--image-size", size)
    assert result.code == 0 and "54 train, 6 val, 9 test" in result.out
    parts = split({label: range(label, 60, 3) for label in range(3)}, missing=["val"])
    val = sorted(parts["val"])
    for images, places in zip(result.evaluated, (val, range(60, 69)), strict=True):
        pixels = torch.from_numpy(np.stack([cifar_picture(name, place) for place in places]))
        pixels = v2.functional.resize(pixels.permute(0, 3, 1, 2), [size] * 2, Image.BICUBIC)
        expected = normalized(pixels.permute(0, 2, 3, 1).numpy())
        torch.testing.assert_close(images.contiguous(), expected, rtol=0, atol=1e-5)
    trained = torch.cat(result.trained)
    places = ((trained[:, 0, 9, 9] * 0.229 + 0.485) * 255 / 3).round().int().tolist()
    assert sorted(places) == sorted(parts["train"]) != places
    assert (trained[:, 1, 9, 4] < trained[:, 1, 9, 15]).all()  # none is mirrored
    if size == 32:
        arrays = [cifar_picture(name, place) for place in val]
        assert_row(rows()[0], load("out/last.pth")[1], arrays, np.array(val) % 3)
    cifar("nothing")
    assert read_data("--data", name).classes == [f"{name} {label}" for label in "abc"]


@pytest.mark.parametrize("how", ["nothing", "half", "rubbish"])
def test_a_failed_download_is_an_error_and_the_next_run_starts_it_again(cifar, how, monkeypatch):
    waits, timeout = [], socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda s: [waits.append(s), timeout(s)])
    cifar(how)
    for name in ("CIFAR100", "CIFAR10", "CIFAR10"):  # again: nothing left is taken for whole
        assert name in error(run("--data", name.lower())) and 0 < waits[-1] <= 30
    cifar("well")
    read_data("--data", "cifar10")
    Path("data", "cifar-10-batches-py", "train").write_bytes(b"half-unpacked")
    cifar("nothing")
    assert len(read_data("--data", "cifar10").train) == 54


def test_auto_is_cifar10_or_digits_with_a_warning_that_cannot_be_overlooked(cifar, capsys):
    assert read_data().name == "cifar10"
    shutil.rmtree("data")
    cifar("half")
    data, told = read_data(), capsys.readouterr().err
    assert data.name == "digits" and "warning" in told and "\n    TRAINING ON DRAWN DIGITS" in told
    drawn = classify.draw_digits(10, 1).data.transpose(0, 3, 1, 2)  # always the same
    assert np.array_equal(data.test.tensors[0][:10], drawn)
    assert [len(part) for part in data[1:4]] == [4500, 500, 1000]
    assert set(data.val.tensors[1].bincount().tolist()) == {50} and data.classes == [*"0123456789"]
    everything = torch.cat([part.tensors[0] for part in data[1:4]]).flatten(1)
    assert everything[:, ::32].min() > 99  # no digit reaches the left
    assert len(everything.unique(dim=0)) == 6000 and data.fingerprint == "digits"
    args = classify.choose_defaults(classify.parse_args([])[0], data, torch.device("cpu"), 1)
    assert (args.weights, args.mirror) == ("none", False)
    assert "\n    STARTING FROM RANDOM WEIGHTS" in capsys.readouterr().err


UNUSABLE = """--epochs 0|--epochs x|--batch-size 1|--lr 0|--lr nan|--lr inf|--lr -1|--image-size 0
--patience -1|--workers -1|--seed -1|--seed 99999999999999999999|--validate-every 0
--weights some|--device tpu|--mist|--predict""".replace("\n", "|").split("|")
UNUSABLE += [] if shutil.which("nvidia-smi") else ["--device cuda"]


@pytest.fixture(scope="module")
def finished():
    """A run of three epochs on DIR/train|val|test/CLASS: 25, 9 and 12 pictures of noise."""
    with tempfile.TemporaryDirectory() as name:
        counts = {"train/a": 12, "train/b": 13, "val/a": 4, "val/b": 5, "test/a": 6, "test/b": 6}
        paint(counts, Path(name, "pictures"))
        argv = "--data", Path(name, "pictures"), "--epochs", 3, "--patience", 0
        yield train(*argv, output=Path(name, "out"))


@pytest.fixture(scope="module")
def early(finished):
    """A run in which accuracy is always a half, and the loss gets worse, until patience ends it."""
    pictures = finished.output.with_name("halves")
    for name in ("a", "b猫"):
        paint({f"train/{name}": 8, f"val/{name}": 0}, pictures)
        Image.fromarray(noise(5)).save(pictures / "val" / name / "same.png")
    argv = "--data", pictures, "--epochs", 30, "--patience", 2, "--validate-every", 2, "--lr", 0.02
    return train(*argv, output=finished.output.with_name("early"))


@pytest.mark.parametrize("flags", UNUSABLE)
def test_unusable_flags_are_an_error_that_names_them_and_exit_with_2(folder, flags):
    assert flags.split()[0] in error(train("--data", "digits", *flags.split()), code=2)
    assert not list(folder.iterdir())


def chosen(count, *argv, weights="none", processes=1, device="cpu", files=False):
    flags, _ = classify.parse_args(["--weights", weights, *map(str, argv)])
    flags.resume = True  # so no weights are fetched
    pictures = TensorDataset(torch.zeros(count, 1), torch.zeros(count))
    if files:
        pictures = classify.PictureFiles(["a.png"] * count, [0] * count, 32)
    data = classify.Data("photos", pictures, pictures, pictures, ["a", "b"])
    return classify.choose_defaults(flags, data, torch.device(device), processes)


def test_what_is_left_unsaid_is_chosen_as_the_readme_says():
    sizes = [chosen(count).batch_size for count in (20, 160, 700, 4000, 4001, 50000)]
    assert sizes == [8, 8, 14, 80, 128, 128]
    assert [chosen(count, processes=3).batch_size for count in (20, 50000)] == [6, 126]
    assert chosen(20, processes=8).batch_size == 16
    with pytest.raises(SystemExit, match="error: each of 3 processes"):
        chosen(50, "--batch-size", 10, processes=3)
    rates = [chosen(9), chosen(9, weights="imagenet"), chosen(9, "--freeze", weights="imagenet")]
    assert [args.lr for args in rates] == [0.003, 0.001, 0.01]
    for epochs, every, patience in ((10, 1, 9), (20, 1, 18), (60, 1, 53), (9, 2, 4)):
        assert chosen(9, "--epochs", epochs, "--validate-every", every).patience == patience
    mirrors = [chosen(9, *x).mirror for x in ([], ["--mirror"], ["--no-mirror"])]
    assert mirrors == [True, True, False]
    flags = [classify.parse_args(["--data", x])[0] for x in ("digits", "auto", "photos")]
    assert [x.image_size for x in flags] == [32, 32, 224]


@linux
def test_workers_are_no_more_than_processors_and_shared_memory_have_room_for(monkeypatch):
    assert chosen(10**4).workers == 0 == chosen(10, files=True).workers
    for number in (1, 2, 7, 20):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=number: range(n))
        assert chosen(10**4, files=True).workers == min(8, (number - 1) // 2)
        assert chosen(10**4, files=True, device="cuda").workers == min(8, number)
    size = int((shutil.disk_usage("/dev/shm").free / 3 / 128 / 3 / 2.5) ** 0.5)  # room for two
    assert chosen(10**4, "--image-size", size, files=True, device="cuda").workers == 2
    with pytest.raises(SystemExit, match="error: --workers 9: /dev/shm has room for 2;"):
        chosen(10**4, "--image-size", size, "--workers", 9)


def cache_weights(home):
    """Put weights where torch looks for ImageNet's; return them and their file."""
    file = Path(home, "hub", "checkpoints", "resnet18-f37072fd.pth")
    file.parent.mkdir(parents=True)
    model = models.resnet18()
    model(torch.randn(4, 3, 32, 32))  # moves the running statistics
    torch.save(model.state_dict(), file)
    return model.state_dict(), file


def test_imagenet_weights_are_fetched_checked_and_kept_by_freeze(cifar, finished, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", "cache")
    original, file = cache_weights("served")
    official, head = models.ResNet18_Weights.IMAGENET1K_V1.value, ["fc.weight", "fc.bias"]
    url = datasets.CIFAR10.url.replace(datasets.CIFAR10.filename, "served/hub/checkpoints/")
    monkeypatch.setattr(official, "url", url + file.name)
    assert "hash" in error(run(*SMALL, *finished.argv, "--weights", "imagenet"))
    right = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    served = file.rename(file.with_stem(f"resnet18-{right}"))
    monkeypatch.setattr(official, "url", url + served.name)
    full = train(*finished.argv, "--weights", "auto", "--epochs", 1, output="full")
    assert "--weights imagenet --" in full.out and "warning" not in full.err
    assert_same(full.first, original, but=head)
    assert not torch.equal(load("full/last.pth")[1]["conv1.weight"], original["conv1.weight"])
    frozen = train(*finished.argv, "--weights", "imagenet", "--freeze", "--epochs", 1)
    for name in ("last.pth", "best_model.pth"):
        assert_same(load(Path("out", name))[1], original, but=head)
    assert not torch.equal(load("out/last.pth")[1]["fc.weight"], frozen.first["fc.weight"])
    shutil.rmtree("cache")
    served.unlink()
    assert run("--resume", "--epochs", 2, "--output", "out").code == 0  # has weights of its own
    assert_same(load("out/last.pth")[1], original, but=head)
    for flags in ("--weights imagenet", "--freeze --weights auto", "--freeze --weights none"):
        assert flags.split()[0] in error(run(*SMALL, *finished.argv, *flags.split()))


def test_patience_ends_a_run_the_best_weights_are_tested_and_epochs_alone_do_not_prolong_it(early):
    losses = [row["val_loss"] for row in rows(early.output)]
    assert early.code == 0 and {row["val_accuracy"] for row in rows(early.output)} == {0.5}
    assert [row["epoch"] for row in rows(early.output)] == [2, 4, 6]  # no row without a validation
    assert len(losses) == losses.index(min(losses)) + 3 and "--patience 0" in early.out
    best, last = (load(early.output / x)[1]["fc.bias"] for x in ("best_model.pth", "last.pth"))
    assert torch.equal(early.bias, best) and not torch.equal(best, last)
    shutil.copytree(early.output, "out")
    again = run("--resume", "--epochs", 31, "--output", "out")
    assert again.code == 0 and len(rows()) == len(losses) and "--patience 0" in again.out
    flags = "--resume", "--patience", 0, "--epochs", 7, "--output", "out"
    assert run(*flags).code == 0 and [row["epoch"] for row in rows()] == [2, 4, 6, 7]
    for change in ({"run_id": classify.make_run_id()}, {"epoch": 4}):  # as of another run
        torch.save({**load("out/best_model.pth")[0], **change}, "out/best_model.pth")
        result = run("--resume", "--output", "out")
        assert "another run" in error(result) and "accuracy" not in result.out
        shutil.copy(early.output / "best_model.pth", "out")
    scores = [(0.5, 1), (0.9, 3), (0.9, 2), (0.9, 2), (0.7, 1)]  # the lower loss, then the first
    history = [{"val_accuracy": accuracy, "val_loss": loss} for accuracy, loss in scores]
    assert classify.validations_since_best(history) == 2


def test_a_run_is_in_checkpoint_an_earlier_one_moved_aside_and_compile_saves_alike(finished):
    assert [len(images) for images in finished.trained] == [8] * 9  # 25: a last single one is left
    assert " of 12)" in finished.out  # out in training alone
    shutil.copytree(finished.output, "checkpoint", ignore=shutil.ignore_patterns("last.pth"))
    flags = [*SMALL, *finished.argv, "--epochs", 1]
    assert os.path.join("checkpoint", "previous") in run(*flags).out
    for path in set(finished.output.iterdir()) - {finished.output / "last.pth"}:
        assert Path("checkpoint", "previous", path.name).read_bytes() == path.read_bytes()
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="comp"):
        run(*flags, "--compile")
    with torch.compiler.set_stance("force_eager"):  # so that nothing is compiled
        assert not Path("checkpoint/last.pth").exists() and run(*flags, "--compile").code == 0
    assert_same(load("checkpoint/last.pth")[1], load("checkpoint/previous/last.pth")[1])
    assert len(rows("checkpoint/previous")) == 1  # one run back is kept


T = {"train/a": 5, "train/b": 5}
GOOD = {
    "classes": ({"a": 25, "b": 16}, [33, 4, 4]),
    "parts": ({**T, "test/a": 1, "test/b": 2, "validation/a": 1, "validation/b": 1}, [10, 2, 3]),
    "other names": ({"Training/a": 3, "Training/b": 2, "VALID/a": 1, "VALID/b": 1}, [3, 2, 2]),
    "any depth": ({"a/x/y": 5, "a/z": 5, "b": 10}, [16, 2, 2]),
    "hidden": ({"a": 5, "b": 5, ".git": 3, "$RECYCLE.BIN/x": 3, "a/@eaDir/x": 3}, [6, 2, 2]),
    "output": ({"a": 5, "b": 5, "runs/out/c": 3}, [6, 2, 2]),
}
REFUSED = {
    "missing": ({}, "(No such|cannot find)"),
    "one class": ({"a": 12}, "a is"),
    "an empty class": ({"a": 12, "b": 0}, "b"),
    "too few to split": ({"a": 12, "b": 2, "c": 1}, "3 pictures.* b, c"),
    "no classes": ({"train": 5, "val": 5}, "train, val is"),
    "flat parts, one of another name": ({"train": 5, "test1": 5}, "test1 is"),
    "a test without classes": ({**T, "test": 5}, "test is"),
    "a class called test": ({"a": 5, "b": 5, "test": 5}, "a, b is"),
    "val twice": ({**T, "val/a": 1, "val/b": 1, "valid/a": 1, "valid/b": 1}, "valid is"),
    "one folder twice": (T, "train, val is"),
    "a class in train only": ({**T, "test/a": 5}, "test/b is"),
    "parts in each class": ({"nut/Train": 5, "nut/x": 5, "c/Train": 5, "c/y": 5}, "Train is"),
}


@pytest.mark.parametrize("counts, sizes", GOOD.values(), ids=GOOD)
def test_layouts_that_people_have_are_understood(counts, sizes, capsys):
    paint(counts, "my/digits")
    data = read_data("--data", "my/digits", "--output", os.path.abspath("my/digits/runs/out"))
    assert [len(part) for part in data[1:4]] == sizes and data.classes == ["a", "b"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("counts, named", REFUSED.values(), ids=REFUSED)
def test_unclear_layouts_are_refused_in_words_that_name_the_odd_folder(counts, named):
    paint(counts, "photos")
    if counts is T:
        os.symlink("train", "photos/val")
    line = error(run("--data", "photos"))
    assert re.search(rf"\b{named}\b", line) and "photos" in line
    assert re.search("3 pictures|decoded|Err|DIR/CLASS/.*DIR/train/CLASS/", line)


def test_what_is_left_out_or_may_not_be_the_classes_is_said_in_a_warning(capsys):
    paint({"training_set/cat": 5, "training_set/dog": 5, "test_set/cat": 5, "test_set/dog": 5})
    for name in ("readme.md", "test_set/x.csv", "test_set/cat/x.heic", "loose.png", "Thumbs.db"):
        Path("pictures", name).write_text("")
    assert read_data("--data", "pictures").classes == ["test_set", "training_set"]
    told = capsys.readouterr().err
    assert re.search("warning: .*test_set, training_set holds cat, dog: .*classes?", told)
    assert ": loose.png, readme.md, test_set/cat/x.heic, test_set/x.csv" in told


def test_pictures_of_any_kind_enter_upright_as_rgb_white_where_they_are_transparent():
    photo = Image.fromarray(noise(7))
    grey, few = photo.convert("L"), photo.quantize(16)
    deep = Image.fromarray(np.asarray(grey, dtype=np.uint16) * 256 + 99)
    ink = np.indices((32, 32)).sum(0) % 3 > 0  # elsewhere the pictures below are transparent
    clear = Image.fromarray(np.dstack([noise(7), ink * np.uint8(255)]))
    drawn = Image.fromarray(np.dstack([np.zeros((32, 32, 3), np.uint8), ink * np.uint8(255)]))
    black = np.where(ink[..., None], np.zeros(3), 255)
    index = Image.fromarray(ink.astype(np.uint8)).convert("P")
    index.putpalette([9, 9, 9, 0, 0, 0])
    large = Image.fromarray(noise(8, side=96))
    wide = Image.fromarray(np.pad(noise(7), ((0, 0), (32, 32), (0, 0))))
    files = [
        ("wide.PNG", wide, {}, photo),
        ("tall.bmp", wide.transpose(Image.Transpose.TRANSPOSE), {}, noise(7).transpose(1, 0, 2)),
        ("large.tga", large, {}, large.resize((32, 32), Image.Resampling.BICUBIC)),
        ("turned.png", photo, {"exif": TURNED}, noise(7).transpose(1, 0, 2)),
        ("broken.png", photo, {"exif": b"Exif\0\0II*\0\xff\xff"}, photo),
        ("grey.png", grey, {}, grey),
        ("16 bits.png", deep, {}, grey),
        ("palette.gif", few, {}, few),
        ("alpha.png", clear, {}, np.where(ink[..., None], noise(7), 255)),
        ("alpha.webp", drawn, {"lossless": True}, black),
        ("grey alpha.png", drawn.convert("LA"), {}, black),
        ("index.gif", index, {"transparency": 0}, black),
        ("index.png", index, {"transparency": b"\0"}, black),
        ("key.png", index.convert("RGB"), {"transparency": (9, 9, 9)}, black),
    ]
    for name, image, options, seen in files:
        image.save(name, **options)
        pixels, label = classify.PictureFiles([name], [7], 32)[0]
        seen = seen.convert("RGB") if isinstance(seen, Image.Image) else seen
        np.testing.assert_array_equal(pixels.permute(1, 2, 0), np.asarray(seen), name)


def test_undecodable_files_are_named_and_left_out_of_training_and_of_every_figure(monkeypatch):
    Path("gs").write_text("#!/bin/sh\ntouch started")  # Ghostscript, which PostScript would start
    Path("gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path.cwd()}{os.pathsep}{os.environ['PATH']}")
    paint({"train/a": 4, "train/b": 4, "val/a": 3, "val/b": 3, "test/a": 3, "test/b": 3})
    for kind in ("jpeg", "png", "I.tiff", "F.tiff"):
        image = Image.fromarray(noise(0)) if "." not in kind else Image.new(kind[0], (9, 9), 70000)
        image.save(kind, kind.split(".")[-1])
    jpeg, png = Path("jpeg").read_bytes(), Path("png").read_bytes()
    bad = {"!empty.png": b"", "text.jpg": b"version https://git-lfs", "cut.png": png[:-200]}
    bad |= {"cut.jpg": jpeg[: len(jpeg) // 2], "ff.jpg": jpeg[: jpeg.index(b"\xff\xc0") + 1]}
    bad |= {"program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"}
    bad |= {"bomb.ppm": b"P6 60000 60000 255\n", "猫 's.JPG": b"no picture"}
    bad |= {name: Path(name).read_bytes() for name in ("I.tiff", "F.tiff")}  # of no known range
    paths = [Path("pictures", part, "b", name) for part in ("train", "val", "test") for name in bad]
    for path in paths:
        path.write_bytes(bad[path.name])
    result = train("--data", "pictures/", "--epochs", 2)
    assert result.code == 0 and " of 6)" in result.out and not Path("started").exists(), result
    for path in paths:
        told = re.findall(rf"^warning: {re.escape(path.as_posix())} .*: .", result.err, re.M)
        assert len(told) == 1
    val = sorted(Path("pictures", "val").rglob("?.png"))
    labels = np.array(["ab".index(path.parent.name) for path in val])
    arrays = [np.asarray(Image.open(path)) for path in val]
    assert_row(rows()[-1], load("out/last.pth")[1], arrays, labels)
    trained = torch.cat(result.trained)
    assert len(trained) == 2 * 18 and (trained.std((1, 2, 3)) > 0.5).all()  # others in their place
    few = [val[0] if place in (1, classify.PRIME % 300) else paths[0] for place in range(300)]
    files = classify.PictureFiles(few, range(300), 32, replace=True)
    assert files[0][1] == classify.PRIME % 300 and files[2][1] > 0
    predicted = run("--predict", "pictures/val/", "--output", "out")
    named = [line.split("  ")[0] for line in predicted.out.splitlines()]
    assert named == [path.as_posix() for path in val] and "6 of 16" in error(predicted)
    missing = run("--predict", val[0], "nowhere.png", "--output", "out")
    assert missing.out == "" and "nowhere.png" in error(missing)
    for path in Path("pictures", "val", "b").iterdir():  # now nothing in it decodes
        path.write_bytes(b"\0\0\0\x18ftypheic")
    assert re.search("class b cannot be decoded .*ff.jpg", error(run("--data", "pictures")))


def test_a_resumed_run_refuses_other_pictures_but_finds_the_same_ones_elsewhere(finished):
    shutil.copytree(finished.output, "checkpoint")
    saved = load("checkpoint/last.pth")[0]["flags"]
    assert saved["lr"] is None and saved["data"] == str(finished.argv[1])  # as typed
    changes = {"renamed": ("val/a/0.png", "val/a/new.png"), "same": ("notes.txt", "other.txt")}
    changes |= {"gone": ("train/b/3.png", "train/b/3.txt"), "added": ("notes.txt", "val/a/9.png")}
    changes["moved"] = "val/b/4.png", "val/a/4.png"
    changes["class"] = "train/a/9.png", "train/b/!/9.png"
    for name, (old, new) in sorted(changes.items()):
        shutil.copytree(finished.argv[1], name)
        Path(name, "notes.txt").write_text("no picture")
        os.renames(Path(name, old), Path(name, new))
        result = run("--resume", "--data", f"{name}/", "--weights", "auto", "--epochs", 4)
        assert result.code == 0 if name == "same" else f"{name}: files" in error(result)
    for flags in (["--weights", "imagenet"], ["--freeze"], ["--image-size", 64], ["--epochs", "2"]):
        assert flags[0] in error(run("--resume", *flags), code=2)
    assert len(rows("checkpoint")) == 4
    assert "nowhere" in error(run("--resume", "--output", "nowhere"))


def test_twenty_thousand_classes_need_no_table_of_pictures_by_classes():
    resource = pytest.importorskip("resource")  # not on Windows
    labels = torch.arange(20000)
    model = nn.Sequential(nn.Embedding(20000, 1), nn.Linear(1, 20000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    batches = ((torch.arange(n, n + 100), labels[n : n + 100]) for n in range(0, 20000, 100))
    results = classify.evaluate(model, batches)
    lines = classify.report(*results[1:3], [str(label) for label in range(20000)])
    assert len(lines) > 20000 and "of 20000)" in lines[0] and "nan" not in "".join(lines)
    limit = 400 << (20 if sys.platform == "darwin" else 10)  # macOS counts bytes, others kB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < limit


@linux
def test_killed_interrupted_or_without_its_files_a_resumed_run_ends_in_the_same_bits(early):
    shutil.copytree(early.argv[1], "drive")
    flags = [*SMALL, *early.argv, *"--patience 0 --epochs 6 --seed 5 --no-mirror".split()]
    # the whole run as a script, in a terminal that knows ASCII alone
    command = [sys.executable, classify.__file__, *map(str, flags), "--output", "whole"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    whole = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
    process = start(*flags, "--data", "drive", "--workers", 1, "--output", "out")
    assert until(rows, process)
    os.rename("drive", "unplugged")
    assert re.search(r"drive/.*/(a|b猫)/.*png cannot be read.*--resume", error(end(process)))
    os.rename("unplugged", "drive")
    for number in (signal.SIGINT, signal.SIGKILL):  # just when last.pth is new, not yet the others
        saved = os.path.getmtime("out/last.pth")
        process = start("--resume", "--output", "out")
        assert until(lambda saved=saved: os.path.getmtime("out/last.pth") > saved, process)
        os.kill(process.pid, number)
        result = end(process)
        assert result.code == -signal.SIGKILL or "--resume" in error(result, code=130)
        assert all(load(path) for path in Path("out").glob("*.pth"))
        assert len(list(Path("out").glob("*.tmp"))) <= 1
    assert end(start("--resume", "--output", os.path.abspath("out"), cwd="whole")).code == 0
    assert "classes: a, b\\u732b" in whole.communicate()[0] and whole.returncode == 0
    assert_same_run("out", "whole")
    saved, weights = load("out/last.pth")
    saved["history"] = saved["history"][-1:]  # as if it was the best, and killed in saving it
    classify.prepare_output(Path("killed"), saved)
    assert_same(load("killed/best_model.pth")[1], weights)
    assert rows("killed") == rows()[-1:]


@linux
def test_two_machines_train_restart_and_resume_and_one_or_three_processes_go_on(monkeypatch):
    monkeypatch.setenv("TORCH_HOME", "cache")
    machines = ["first", "second"]
    paint({"first": 0, "second": 0, "pictures/a": 0, "pictures/b": 0}, ".")
    cache_weights("first/cache")  # the second machine has none
    for label, number in np.ndindex(2, 15):  # of one colour: augmentation does not change them
        image = Image.new("RGB", (32, 32), (99 * label, 17 * number, 100))
        image.save(f"pictures/{'ab'[label]}/{number}.png")
    flags = [*SMALL, "--data", os.path.abspath("pictures"), "--batch-size", 6, "--epochs", 2]
    flags += ["--weights", "imagenet", "--freeze"]  # batch-norm does not change them either
    single = start(*flags, "--output", "alone", cwd="first")
    whole = [end(x) for x in as_torchrun(2, *flags, "--output", "whole", cwd=machines)]
    assert [x.code for x in [*whole, end(single)]] == [0] * 3 and "processes: 2" in whole[0].out
    assert whole[1].out == "" and whole[0].out.count("epoch 1/2") == 1
    alone, shared = (load(f"first/{name}/last.pth")[1]["fc.weight"] for name in ("alone", "whole"))
    assert (alone - shared).norm() < 0.01  # the gradients are averaged; of one process: 0.2
    processes = as_torchrun(2, *flags, "--output", "out", cwd=machines)
    assert until(lambda: rows("first/out"), processes[0])
    for process in processes:  # torchrun ends the others when one is lost
        process.kill()
        process.join()
    again = as_torchrun(2, *flags, "--output", "out", cwd=machines, restarts=1)
    assert [end(process).code for process in again] == [0, 0]
    assert_same_run("first/out", "first/whole")
    assert sorted(path.name for path in Path("second").iterdir()) == ["err1.txt", "out1.txt"]
    resume = "--resume", "--output", "first/out"
    pairs = [(whole[0], run("--resume", "--output", "first/whole"))]
    other = as_torchrun(1, *flags, "--output", "whole", restarts=1, run_id="another", cwd=["first"])
    pairs += [(end(as_torchrun(3, *resume, "--epochs", 3)[0]), run(*resume))]
    for several, one in pairs:
        assert re.search("test accuracy.*", several.out)[0] in one.out
    assert run(*resume, "--epochs", 4).code == 0 and len(rows("first/out")) == 4
    assert "is now in" in end(other[0]).out and len(rows("first/whole")) == 2  # begins anew


def test_a_damaged_foreign_or_malicious_checkpoint_is_an_error(finished):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    shutil.copytree(finished.output, "out")
    for name, use in (("best_model.pth", ["--predict", "photo.png"]), ("last.pth", ["--resume"])):
        content, plain, evil = Path("out", name).read_bytes(), io.BytesIO(), io.BytesIO()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        torch.save({"model": Evil(), "fingerprint": "", "image_size": 32}, evil)
        torch.save(load(Path("out", name))[1], plain)
        for bad in (b"", b"text", content[:middle], flipped, plain.getvalue(), evil.getvalue()):
            Path("out", name).write_bytes(bad)
            assert name in error(run(*use, "--output", "out"))
    assert not Path("executed").exists()


def test_a_loss_that_is_no_number_or_a_full_disk_is_an_error_that_keeps_what_is_saved(finished):
    resource = pytest.importorskip("resource")  # not on Windows
    shutil.copytree(finished.output, "out")
    before = Path("out", "last.pth").read_bytes()
    flags = "--resume", "--epochs", 4, "--output", "out"
    assert "--lr" in error(run(*flags, "--lr", "1e18"))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 20, limit[1]))  # last.pth has 134 MB
    full = run(*flags)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "File too large" in error(full) and Path("out", "last.pth").read_bytes() == before
    os.remove("out/log.csv")
    Path("out", "log.csv").mkdir()  # as if a spreadsheet held it open
    result = run(*flags, "--lr", "1e-3")
    assert re.search("warning: cannot write .*log.csv", result.err) and "test acc" in result.out


@pytest.mark.parametrize("side", [16, 32, 33])
def test_outputs_and_gradients_are_those_of_torchvision(side):
    ours = classify.build_model(3, "none").double()
    plain = models.resnet18(num_classes=3).double()
    assert list(ours.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    pixels = torch.randn(4, 3, side, side, dtype=torch.float64)
    results = []
    for model in (ours, plain):
        output = model(pixels)
        nn.functional.cross_entropy(output, torch.tensor([0, 1, 2, 0])).backward()
        results.append([output, *(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def test_the_loops_can_be_lifted_out_alone_and_do_what_plain_ones_do():
    space = {"torch": torch, "nn": nn}
    for function in (classify.train_one_epoch, classify.evaluate):
        exec(inspect.getsource(function), space)
    images, labels = torch.randn(60, 5), torch.arange(60) % 2
    batches = DataLoader(TensorDataset(images, labels), batch_size=8)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    mean = space["train_one_epoch"](model.eval(), batches, criterion, optimizer, scheduler)
    losses = []
    for step, (some, targets) in enumerate(batches):
        loss = criterion(plain(some), targets)
        losses += [loss.item()] * len(targets)
        for weight, slope in zip(plain.parameters(), torch.autograd.grad(loss, plain.parameters())):
            weight.data -= 0.1 * 0.9**step * slope
    assert mean == pytest.approx(np.mean(losses), rel=1e-5)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    labels[3] = -100
    loss, true, predictions, confidences = space["evaluate"](model, batches)
    logits = plain.eval()(images).detach()
    assert torch.equal(true, labels) and torch.equal(predictions, logits.argmax(1))
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    torch.testing.assert_close(confidences, logits.softmax(1).amax(1))


def edits():
    """Return the README's edits, (old, new): all but those of the data in one list, these alone."""
    pairs = []
    for diff in re.findall(r"```diff\n(.*?)```", README, re.S):
        pairs.append(["".join(re.findall(rf"^\{sign}(.*\n)", diff, re.M)) for sign in "-+"])
    alone = [[pair] for pair in pairs if "read_data" in pair[0]]
    return [[pair for pair in pairs if "read_data" not in pair[0]], *alone]


@pytest.mark.parametrize("changes", edits())
def test_each_edit_of_the_readme_is_one_place_and_runs(changes):
    source = Path(classify.__file__).read_text("utf-8")
    assert changes
    for old, new in changes:
        assert source.count(old) == 1, f"not in one place: {old}"
        source = source.replace(old, new)
    Path("edited.py").write_text(source, "utf-8")
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    mine = [(image + 9 * index, index % 2) for index in range(24)]
    program = SimpleNamespace(**runpy.run_path("edited.py", {"MyDataset": lambda: mine}))
    paint({"a": 10, "b": 10}, "PICTURES")
    result = run(*SMALL, "--data", "PICTURES", "--output", "out", program=program)
    assert result.code == 0 and "test accuracy" in result.out, result
    assert run("--predict", "PICTURES", "--output", "out", program=program).code == 0


def test_the_readmes_way_to_use_the_weights_elsewhere_says_what_predict_says(finished):
    [code] = [c for c in re.findall(r"```python\n(.*?)```", README, re.S) if "load_state_dict" in c]
    checkpoint, state = load(finished.output / "best_model.pth")
    state.update({"fc.weight": torch.randn(5, 512) / 20, "fc.bias": torch.randn(5)})
    Path("checkpoint").mkdir()
    torch.save({**checkpoint, "classes": list("abcde")}, "checkpoint/best_model.pth")
    clear = Image.fromarray(np.dstack([noise(3, side=90), noise(4, side=90)[..., :1]])[:70])
    turned = Image.fromarray(noise(2, side=200)[:150])
    for name, image, exif in (("photo.jpg", turned, TURNED), ("photo.png", clear, b"")):
        image.save(name, exif=exif)
        space = {}
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code.replace("photo.jpg", name), space)
        shares = space["logits"][0].detach().softmax(0)
        told = run("--predict", name, "--device", "cpu").out.split("  ")[1:]
        for text, share, label in zip(told, *shares.topk(3), strict=True):
            assert text[0] == "abcde"[label]
            assert float(text[1:].rstrip("%\n")) == pytest.approx(100 * share, abs=0.5)
