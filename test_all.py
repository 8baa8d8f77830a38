"""
Every test.

    python test_all.py  # all, a process a core
    python test_all.py vit cache  # those whose names contain one of the words
    pytest test_all.py  # the same under pytest

Networks are held to golden values that public reference implementations printed for small models (testdata/*.json):
their weights are rebuilt from their keys, written to files laid out as the official ones, and loaded through the public
functions.
"""
import ast
import atexit
import contextlib
import copy
import dataclasses
import functools
import gzip
import io
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import tracemalloc
import weakref
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import align
import diffusion
import fid
import sample
import tokenizer
from tokenizer import Shapes, UserError

HERE = Path(__file__).resolve().parent
SCRIPTS = (tokenizer, diffusion, sample, fid, align)


class Skip(Exception):
    """Raised by a test that cannot run here."""


def skip(reason):
    if "pytest" in sys.modules:
        sys.modules["pytest"].skip(reason)
    raise Skip(reason)


# -----------------------------------------------------------------------------
# Golden values: inputs and weights rebuilt from names, outputs compared by digest

def noise(n, key, salt=""):
    """n float64 values in [-1, 1), pseudo-random in the position and the key; no generator involved."""
    position = torch.arange(n, dtype=torch.float64)
    x = torch.sin(position * 12.9898 + zlib.crc32((salt + key).encode()) % 10007) * 43758.5453
    return 2 * (x - torch.floor(x)) - 1


def tensor(key, shape, salt=""):
    """The float32 weight of that key."""
    n = math.prod(shape)
    value = noise(n, key, salt)
    if len(shape) >= 2:
        value = value * (3.0 / (n // shape[0])) ** 0.5  # unit gain: uniform with variance 1/fan_in
    else:
        value = 0.1 * value + key.endswith(("weight", "gamma", "scale", "running_var"))
    if key.startswith("mapping.mlp"):
        value = value * 100  # layers with a learning-rate multiplier of 0.01
    if "affine" in key and key.endswith("proj.bias"):
        value = value + 1  # styles start around one
    return value.reshape(shape).float()


def image(b, c, h, w, key="image", salt=""):
    """A float32 image batch in [0, 1)."""
    return ((noise(b * c * h * w, key, salt) + 1) / 2).reshape(b, c, h, w).float()


def golden(name):
    return json.loads((HERE / "testdata" / f"{name}.json").read_text())


def fill(g):
    """The state dict that a golden file describes."""
    zeros = g.get("not_filled", ())
    state = {}
    for key, shape in g["keys"].items():
        state[key] = torch.zeros(shape) if key in zeros else tensor(key, shape, g["salt"])
    return state


def check(t, digest, rtol=1e-4, atol=1e-5):
    """Holds a tensor against shape, mean, deviation and some values of the reference's."""
    flat = t.detach().double().flatten()
    assert list(t.shape) == digest["shape"], (list(t.shape), digest["shape"])
    found = dict(mean=flat.mean(), std=flat.std(), abs_mean=flat.abs().mean(), values=flat[digest["at"]])
    for name, value in found.items():
        np.testing.assert_allclose(value.numpy(), digest[name], rtol=rtol, atol=atol, err_msg=name)


def fails(function, *words, status=None):
    """Asserts that a call ends in one line that holds all the words -> the line. It raises a UserError; with `status`
    it exits and prints the line. (A DataLoader's worker puts its traceback before the line.)"""
    with contextlib.redirect_stderr(io.StringIO()) as printed, contextlib.redirect_stdout(printed):
        try:
            function()
        except UserError as error:
            assert status is None, error
            line = str(error)
        except SystemExit as stop:
            assert status is not None and stop.code == status, (stop.code, printed.getvalue())
            line = printed.getvalue().strip()
        else:
            raise AssertionError(f"it does not fail with {words}")
    if "Original Traceback" in line:
        line = line.strip().splitlines()[-1]
    assert "\n" not in line, line
    for word in words:
        assert word in line, (word, line)
    return line


def quiet(function, *arguments, **keywords):
    """Calls it -> what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
        function(*arguments, **keywords)
    return printed.getvalue()


def command(module, *flags):
    """A script's `run()` with these flags in this process -> what it printed."""
    argv = [f"{module.__name__}.py", *map(str, flags)]
    with mock.patch.object(sys, "argv", argv):
        return quiet(module.run)


def script(*arguments, status=0, **environment):
    """Runs one of the scripts in a process of its own -> its output; with a status, no traceback may come out."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    arguments = [sys.executable, *map(str, arguments)]
    result = subprocess.run(arguments, cwd=HERE, capture_output=True, text=True, env=environment)
    output = result.stdout + result.stderr
    expected = (status,) if isinstance(status, int) else status
    assert result.returncode in expected, f"status {result.returncode}: {output[-2000:]}"
    ours = re.sub(r'Traceback [^\n]*\n  File "<frozen runpy>".*ChildFailedError', "", output, flags=re.S)  # torchrun's
    assert status == 0 or "Traceback" not in ours, output[-2000:]
    return output


def torchrun(*arguments, processes=2, **environment):
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    return script(*launcher, *arguments, **environment)


# what several tests use: the toy's classifier, drawn shapes
SHARED = os.environ.get("TEST_CACHE") or tempfile.mkdtemp()
atexit.register(shutil.rmtree, SHARED, ignore_errors=True)
WORLD = tokenizer.World(0, 1, torch.device("cpu"))


def tiny_vfm(name, cache="out", pretrained=True, **overrides):
    """In place of training the toy's VFM: its network with fixed random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vit = tokenizer.ToyViT(**{**tokenizer.TOY_VIT, **overrides})
    return vit.requires_grad_(False).eval()


def with_tiny_vfm(function):
    """Decorates a test: the VFM is tiny_vfm, the data are 64 shapes and 32 held-out ones."""
    function = mock.patch.object(tokenizer, "load_vfm", tiny_vfm)(function)
    return mock.patch.object(Shapes, "lengths", dict(train=64, val=32))(function)


def tiny_config(out, **overrides):
    """A tokenizer that trains in seconds, by the papers' rows: with discriminators, which the toy's rows leave out."""
    tiny = dict(
        preset="toy", recipe="paper", out=str(out), cache=SHARED, z_dim=4, level_dim=8, widths=(16, 16, 8, 8),
        fuse_dims=(16, 8), attention=(1,), w_dim=16, ch_mult=(1, 1, 1, 1), kimg=0.08, batch_size=8, ndf=8,
        log_interval=1, save_interval=5, grid_interval=100, compile=False)
    return tokenizer.Config(**{**tokenizer.PRESETS["toy"], **tiny, **overrides})


# -----------------------------------------------------------------------------
# The house: files, imports, command line

def test_no_line_is_too_long():
    """No .py file has a line of more than 120 columns."""
    for path in sorted(HERE.glob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 120, f"{path.name}:{number} has {len(line)} columns"


def test_imports_go_one_way():
    """tokenizer <- diffusion <- sample; tokenizer <- fid; align on top: no script imports one above it, also in no
    function."""
    below = dict(tokenizer=set(), diffusion={"tokenizer"}, fid={"tokenizer"}, sample={"tokenizer", "diffusion"},
                 align={"tokenizer", "diffusion", "sample", "fid"})
    for name, allowed in below.items():
        imported = set()
        for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        assert imported & below.keys() <= allowed, (name, imported & below.keys())


def test_threads_are_set_before_torch():
    """OpenMP reads its environment as torch is imported: every script sets it first."""
    for module in SCRIPTS:
        text = (HERE / f"{module.__name__}.py").read_text()
        first = "GOMP_SPINCOUNT" if module is tokenizer else "from tokenizer import"
        assert 0 < text.index(first) < text.index("\nimport torch\n"), module
    assert os.environ["GOMP_SPINCOUNT"]


def parse(*flags, config=tokenizer.Config, presets=tokenizer.PRESETS):
    with contextlib.redirect_stdout(io.StringIO()):
        return tokenizer.parse_config(config, presets, flags)


def test_flags_override_the_preset():
    """A Config is its defaults, then the preset's overrides, then the flags, in either spelling."""
    cfg = parse("--batch_size=7", "--kimg", "2.5", "--layers=0,-1", "--flip=0", "--method=vae")
    assert (cfg.batch_size, cfg.kimg, cfg.layers, cfg.flip, cfg.method) == (7, 2.5, (0, -1), False, "vae")
    assert cfg == tokenizer.Config(**{**tokenizer.PRESETS["toy"], "preset": "toy", "batch_size": 7, "kimg": 2.5,
                                      "layers": (0, -1), "flip": False, "method": "vae"})
    assert parse("--preset=imagenet") == tokenizer.Config(preset="imagenet")
    assert parse("--preset=imagenet", "--image_size=64").image_size == 64


def test_toy_is_picked_without_cuda():
    """The papers' recipe is taken where there are both CUDA and ImageNet, the toy everywhere else."""
    for cuda, data, preset in ((False, True, "toy"), (True, False, "toy"), (True, True, "imagenet")):
        with (mock.patch.object(torch.cuda, "is_available", return_value=cuda),
              mock.patch.object(os.path, "isdir", return_value=data)):
            for module in SCRIPTS:
                assert parse(config=module.Config, presets=module.PRESETS).preset == preset, module.__name__
    assert {"imagenet", "toy"} <= tokenizer.PRESETS.keys() and tokenizer.PRESETS["imagenet"] == {}


def test_wrong_flags_exit_with_one_line():
    """A value of the wrong type or out of range, an unknown flag or preset: status 2, one line that says what would
    do."""
    for flag, *words in (
            ("--batchsize=7", "batchsize", "--batch_size"), ("stray", "stray"), ("--preset=none", "toy", "imagenet"),
            ("--batch_size=x", "--batch_size", "integer", "x"), ("--batch_size=0", "--batch_size", "at least 1"),
            ("--seed=-1", "--seed", "at least 0"), ("--seed=1.5", "--seed", "1.5"), ("--flip=yes", "--flip", "yes"),
            ("--kimg=nan", "--kimg", "finite"), ("--kimg=inf", "--kimg", "finite"), ("--kimg=x", "--kimg", "x"),
            ("--layers=0,x", "--layers", "list_of_numbers", "0,x"), ("--method=gan", "--method", "gan", "aligntok")):
        fails(lambda: parse(flag), *words, status=2)
    for flag in ("--kimg=-1", "--cooldown=1.1", "--cooldown=-0.1", "--cooldown=nan", f"--seed={10 ** 30}"):
        fails(lambda: parse(flag), flag.split("=")[0], status=2)
    for flag in ("--seed=0", "--workers=0", "--batch_size=1", "--cooldown=1", "--layers=-1"):
        parse(flag)
    for flag in ("--beta2=1", "--ema=1", "--lr=-1", "--class_dropout=2", "--cosine_weight=-0.5"):
        config = dict(config=diffusion.Config, presets=diffusion.PRESETS)
        fails(lambda: parse(flag, **config), flag.split("=")[0], status=2)


def test_random_command_lines():
    """Whatever stands behind the flags: a Config from which a network is built, or one line and status 2 (or 1)."""
    values = (
        "", "nan", "-1", "0", "1", "2", "8", "64", "0.5", "1e9", "1e400", "9" * 400, "x", "é", "0,0", "-5,5",
        "1,1,1,2",
        "8,8", "0,-1", "true", "%s", "vae", "reg", "toy")
    rng = np.random.default_rng(0)
    wide = ("num_res_blocks", "ldm_blocks", "depth")  # as many layers
    for number in range(150):
        module = SCRIPTS[number % len(SCRIPTS)]
        names = rng.choice([field.name for field in dataclasses.fields(module.Config)], rng.integers(1, 5))
        flags = [f"--{name}={rng.choice(values)}" for name in names]

        def build():
            cfg = parse(*flags, config=module.Config, presets=module.PRESETS)
            if any(getattr(cfg, name, 0) > 64 for name in wide):
                raise UserError("too slow for a test")
            with torch.device("meta"):
                if module is tokenizer:
                    tokenizer.stage_plan(cfg)
                    tokenizer.build_tokenizer(dataclasses.replace(cfg, vfm="toy"), pretrained=False)
                elif module is diffusion:
                    text = tokenizer.ShapesText() if cfg.text else None
                    diffusion.model_arch(cfg, 8, 8, 10, 128 if cfg.align != "none" else 0, text)
                    diffusion.learning_rate(cfg, cfg.steps - 1)

        try:
            quiet(build)
        except UserError as error:
            assert "\n" not in str(error), (flags, error)
        except SystemExit:
            fails(build, status=2)
        except Exception as error:
            raise AssertionError(flags) from error


@dataclasses.dataclass
class Flags:
    preset: str = ""                     # none
    count: tokenizer.Positive = 1        # a number
    shares: tuple[float, ...] = (0.5,)   # 100% of it
    place: str = "here"                  # a folder


def test_tuples_and_positional_fields():
    """A tuple's items are separated by commas and have its type; a positional field may stand without its flag."""
    def flags(*argv):
        with contextlib.redirect_stdout(io.StringIO()):
            return tokenizer.parse_config(Flags, dict(toy=dict(count=3)), argv, positional=("place",))

    assert flags() == Flags("toy", 3) and flags("there", "--shares=1,0.25") == Flags("toy", 3, (1.0, 0.25), "there")
    assert flags("--shares=").shares == () and flags("--place=there").place == "there"
    fails(lambda: flags("--shares=1,half"), "--shares", "1,half", status=2)
    fails(lambda: flags("--shares=1,nan"), "--shares", "finite", status=2)
    fails(lambda: flags("there", "and there"), "and there", status=2)


def test_help_says_what_every_field_is():
    """Each script's --help has a line with a comment for every field of its Config, and its presets."""
    for module in SCRIPTS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            tokenizer.parse_config(module.Config, module.PRESETS, ["--help"])
        listed = printed.getvalue().split("options:")[1].replace("\n" + " " * 24, " ")
        for field in dataclasses.fields(module.Config):
            line = re.search(rf"--{field.name} .*", listed)
            comment = line[0].split("[")[0].split(maxsplit=2)[-1] if line else ""
            assert len(comment) > 3, f"{module.__name__} --{field.name} has no comment"
        presets = listed.split("presets: ")[1]
        assert all(f"{name}: " in presets for name in module.PRESETS)


def test_replacing_leaves_the_old_file():
    """A write that fails leaves the file as it was and nothing beside it; one that succeeds replaces it, folders
    made."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / "file.txt"
        tokenizer.write_text(path, "old")

        def fail(error):
            with tokenizer.replacing(path) as temporary:
                temporary.write_text("half of the new")
                assert temporary.parent == path.parent and path.read_text() == "old"
                raise error

        fails(lambda: fail(OSError(28, "No space left on device")), f"cannot write {path}", "No space left")
        fails(lambda: fail(RuntimeError("basic_ios::clear\nand a stack")), f"cannot write {path}", "basic_ios")
        for error in (KeyboardInterrupt, ValueError):
            with contextlib.suppress(error):
                fail(error())
        assert path.read_text() == "old" and os.listdir(path.parent) == ["file.txt"]
        tokenizer.write_json(path, dict(a=1))
        assert tokenizer.read_json(path) == dict(a=1) and os.listdir(path.parent) == ["file.txt"]
        path.write_text('{"half": ')
        assert tokenizer.read_json(path) == tokenizer.read_json(f"{folder}/none") == {}
        fails(lambda: tokenizer.write_text(path / "below a file", ""), "cannot write")


def test_one_process_fetches():
    """`alone`: what several do at once is done one after the other."""
    inside = []
    most = []

    def enter(_):
        with tokenizer.alone(f"{folder}/sub/file"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(8)))
    assert most == [1] * 8


def test_fingerprint_sees_every_change():
    """The hash is the same for equal tensors, modules and values, and another for any change of them."""
    layer = nn.Linear(2, 2)
    same = tokenizer.fingerprint(layer, torch.arange(3), "a", 1)
    assert same == tokenizer.fingerprint(copy.deepcopy(layer), torch.arange(3), "a", 1)
    others = (torch.arange(3), "a", 2), (torch.tensor([0, 1, 3]), "a", 1), (torch.arange(3), "b", 1)
    for other in others:
        assert tokenizer.fingerprint(layer, *other) != same
    with torch.no_grad():
        layer.bias[0] += 1
    assert tokenizer.fingerprint(layer, torch.arange(3), "a", 1) != same


# -----------------------------------------------------------------------------
# tokenizer.py: data

def test_shapes_are_a_function_of_their_index():
    """The same picture for the same index on every machine, another in the other split; the file of drawings holds
    them."""
    shapes = Shapes("train", 32)
    batch = shapes.draw(np.arange(40))
    assert batch.dtype == np.uint8 and (shapes.draw(np.array([17]))[0] == batch[17]).all()
    labels = shapes.attributes(np.arange(1000))["shape"]
    assert zlib.crc32(labels.astype(np.int64).tobytes()) == 2572087595
    assert (Shapes("val", 32).draw(np.arange(40)) != batch).mean() > 0.5
    with tempfile.TemporaryDirectory() as folder:
        cached = Shapes("train", 32, 64, folder)
        assert (cached.images[:40] == batch).all() and cached[5][1] == labels[5]


def test_shapes_vary_independently():
    """Every value of every attribute is as frequent as the others, and none tells of another."""
    a = Shapes("train", 32).attributes(np.arange(30_000))
    for key, count in (("shape", 10), ("hue", 8), ("texture", 5), ("ground", 8)):
        assert (np.bincount(a[key], minlength=count) > 30_000 / count * 0.9).all()
    keys = ("shape", "hue", "texture", "ground", "x", "y", "scale", "angle", "mirror")
    numbers = np.stack([a[key] for key in keys])
    assert np.abs(np.corrcoef(numbers) - np.eye(len(keys))).max() < 0.03


def test_shapes_at_any_size():
    """The same picture at any size, antialiased; its caption names what is on it."""
    shapes = Shapes("train", 32)
    fine = Shapes("train", 256).draw(np.arange(8))
    small = F.adaptive_avg_pool2d(torch.from_numpy(fine).float(), 32)
    assert (small - torch.from_numpy(shapes.draw(np.arange(8))).float()).abs().mean() < 4
    a = shapes.attributes(np.arange(4))
    caption = shapes.caption(3)
    assert shapes.classes[a["shape"][3]] in caption
    assert shapes.hues[a["hue"][3]] in caption and shapes.textures[a["texture"][3]] in caption


def picture(height, width):
    """A PIL image of smooth noise."""
    smooth = F.interpolate(image(1, 3, 8, 8), (height, width), mode="bicubic")[0].clamp(0, 1)
    return Image.fromarray((smooth.permute(1, 2, 0).numpy() * 255).astype(np.uint8))


def test_images_of_any_mode():
    """Palette, CMYK, grey, 16 bits, transparency (on white), EXIF rotation; a broken file is one line."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rgb = (image(1, 3, 20, 30)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        original = Image.fromarray(rgb)
        original.save(folder / "rgb.png")
        original.quantize(256).save(folder / "palette.png")
        original.convert("CMYK").save(folder / "cmyk.tif")
        for name, tolerance in (("rgb.png", 0), ("cmyk.tif", 2), ("palette.png", 60)):
            loaded = tokenizer.load_rgb(folder / name)
            assert loaded.mode == "RGB" and np.abs(np.asarray(loaded).astype(int) - rgb).mean() <= tolerance, name
        clear = np.dstack([rgb, np.zeros((20, 30), np.uint8)])
        for name, pixels, value in (("clear", clear, 255), ("deep", np.full((4, 4), 32896, np.uint16), 128),
                                    ("grey", np.full((4, 4), 77, np.uint8), 77)):
            Image.fromarray(pixels).save(folder / f"{name}.png")
            assert (np.asarray(tokenizer.load_rgb(folder / f"{name}.png")) == value).all(), name
        exif = Image.Exif()
        exif[0x112] = 6  # rotated by 90 degrees
        original.save(folder / "turned.jpg", exif=exif)
        assert tokenizer.load_rgb(folder / "turned.jpg").size == (20, 30)
        (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
        fails(lambda: tokenizer.load_rgb(folder / "broken.png"), "broken.png")


def test_center_crop():
    """The middle square, resized without aliasing."""
    tall = picture(300, 200)
    cropped = tokenizer.center_crop(tall, 64)
    assert cropped.size == (64, 64)
    middle = torch.from_numpy(np.array(tall)).permute(2, 0, 1)[None, :, 50:250] / 255
    reference = F.interpolate(middle, (64, 64), mode="bilinear", antialias=True)[0]
    assert np.abs(np.asarray(cropped) / 255 - reference.permute(1, 2, 0).numpy()).mean() < 0.02
    assert tokenizer.center_crop(tall.resize((64, 64)), 64).size == (64, 64)


def image_folder(folder, splits=("train", "val")):
    """FOLDER/SPLIT/{cat,dog}/{0,1,2}.png"""
    for split in splits:
        for name in ("cat", "dog"):
            place = Path(folder) / split / name
            place.mkdir(parents=True)
            for i in range(3):
                picture(40, 50).rotate(30 * i).save(place / f"{i}.png")


def test_image_folders():
    """Class folders give labels, a flat folder gives class 0, pictures are augmented by their key alone."""
    with tempfile.TemporaryDirectory() as folder:
        fails(lambda: tokenizer.Images(folder, "train", 32), "no images")
        fails(lambda: tokenizer.Images(f"{folder}/nowhere", "train", 32), "nowhere")
        image_folder(folder)
        data = tokenizer.Images(folder, "train", 32, crop=True, flip=True)
        assert len(data) == 6 and data.classes == ["cat", "dog"] and data.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert data[0][0].shape == (3, 32, 32) and data[0][0].dtype == torch.uint8 and data[4][1] == 1
        assert (data[0, (0, 5)][0] == data[0, (0, 5)][0]).all() and (data[0, (0, 5)][0] != data[0, (0, 6)][0]).any()
        flat = tokenizer.Images(f"{folder}/val/dog", "train", 16)
        assert len(flat) == 3 and flat.labels.tolist() == [0] * 3
        os.mkdir(f"{folder}/linked")
        os.symlink(f"{folder}/train/dog", f"{folder}/linked/wolf")
        linked = tokenizer.Images(f"{folder}/linked", "train", 32)
        assert linked.classes == ["wolf"] and len(linked) == 3 and len(fid.Folder(f"{folder}/linked")) == 3
        loader = tokenizer.make_loader(data, tokenizer.step_batches(6, 4, 0, 0, 2, WORLD), WORLD, 2)
        assert [batch.shape for batch, _ in loader] == [(4, 3, 32, 32)] * 2
    fails(lambda: tokenizer.Images("CIFAR10", "train", 32, "/nonexistent"), "CIFAR10", "--download=1")


def test_training_images_stand_in_for_val():
    """Without a folder val the training images are taken, with their classes, and it is said."""
    with tempfile.TemporaryDirectory() as folder:
        image_folder(folder, ["train"])
        stand_in = tokenizer.Images(folder, "val", 32)
        assert stand_in.classes == ["cat", "dog"] and "no folder val" in stand_in.note
        image_folder(folder, ["val"])
        assert not tokenizer.Images(folder, "val", 32).note


def test_broken_image_ends_training_with_one_line():
    """... that names the file, also where a loader's process met it."""
    with tempfile.TemporaryDirectory() as folder:
        image_folder(folder)
        (Path(folder) / "train" / "cat" / "0.png").write_bytes(b"not an image")
        flags = (f"--data={folder}", f"--out={folder}/out", f"--cache={folder}/out", "--method=vae", "--recipe=study")
        output = script("tokenizer.py", *flags, "--batch_size=6", "--kimg=0.012", "--workers=1", status=1)
        last = output.strip().splitlines()[-1]
        assert last.startswith("tokenizer.py: cannot read image") and "0.png" in last, output


def sample_files(i, captions, suffix="png"):
    """A sample's files: a drawing of 32 px and its caption."""
    pixels, _ = Shapes("train", 32)[i]
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, dict(jpg="JPEG").get(suffix, suffix), lossless=True)
    text = captions(i)
    info = json.dumps(dict(caption=text, key=f"{i:09d}", long=f"really {text}", nothing=None))
    contents = {suffix: buffer.getvalue(), "txt": f"{text}\n".encode(), "json": info.encode()}
    return {f"{i:09d}.{suffix}": content for suffix, content in contents.items()}


def write_shard(path, files):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def shards_and_folder(folder, n=40):
    """The same captioned drawings as FOLDER/shards/{000..003}.tar and FOLDER/files/NAME.{png,txt,json}."""
    caption = Shapes("train", 32).caption
    for shard in range(4):
        files = {}
        for i in range(shard * n // 4, (shard + 1) * n // 4):
            files.update(sample_files(i, caption))
        write_shard(f"{folder}/shards/{shard:03d}.tar", files)
        for name, content in files.items():
            path = Path(folder, "files", name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
    return f"{folder}/shards/{{000..003}}.tar", f"{folder}/files"


def test_shards():
    """Images and captions of samples in tars, whatever their folders, formats and order; incomplete ones are counted
    and left out; a tar is gone through once; workers read the same."""
    caption = Shapes("train", 32).caption
    with tempfile.TemporaryDirectory() as folder:
        first = {}
        for i, suffix in enumerate(("png", "webp", "PNG", "jpg")):
            files = sample_files(i, caption, suffix.lower())
            first.update({(f"a/b/{name}".replace(".png", ".PNG") if i == 2 else name): v for name, v in files.items()})
        long = "very/" * 40  # PAX and GNU headers precede the sample's
        second = {f"{long}{name}": content for name, content in sample_files(4, caption).items()}
        second.update({"._x.png": b"", "000000005.png": first["000000000.png"], "000000006.txt": b"no image"})
        write_shard(f"{folder}/08.tar", first)
        write_shard(f"{folder}/09.tar", second)
        write_shard(f"{folder}/10.tar", sample_files(7, caption))
        pattern = f"{folder}/{{08..10}}.tar"
        make = functools.partial(tokenizer.Images, pattern, "train", 32, cache=folder)
        data = make()
        assert data.note == "2 incomplete samples are left out" and data.classes == ["image"]
        assert [data.caption(i) for i in range(6)] == [caption(i) for i in (0, 1, 2, 3, 4, 7)]
        for i, name in enumerate(("000000000.png", "000000001.webp", "a/b/000000002.PNG", "000000003.jpg")):
            pixels, label = data[i]
            want = np.asarray(Image.open(io.BytesIO(first[name])).convert("RGB"))
            assert label == 0 and (pixels.permute(1, 2, 0).numpy() == want).all(), name
        assert torch.equal(data[4][0], Shapes("train", 32)[4][0]) and torch.equal(data[5][0], Shapes("train", 32)[7][0])
        assert os.fsdecode(data.source[2]) == f"{folder}/08.tar/a/b/000000002.PNG"
        with mock.patch.object(tarfile, "open", side_effect=AssertionError):
            again = make()
            assert (again.places == data.places).all() and again.note == data.note
        keyed = make(caption_key="long")
        assert keyed.caption(5) == f"really {caption(7)}"
        fails(lambda: make(caption_key="nothing").caption(5), "no caption of", "10.tar/000000007.png")
        fails(lambda: make(caption_key="other").caption(5), "no caption of", "other")
        held_out = tokenizer.Images(pattern, "val", 32, cache=folder)
        assert len(held_out) == 6 and "no folder val" in held_out.note and "2 incomplete" in held_out.note
        write_shard(f"{folder}/val/0.tar", sample_files(9, caption))
        held_out = tokenizer.Images(pattern, "val", 32, cache=folder)
        assert [held_out.caption(0)] == [caption(9)] and not held_out.note
        loader = tokenizer.make_loader(data, tokenizer.step_batches(6, 3, 0, 0, 4, WORLD), WORLD, 2)
        alone = tokenizer.make_loader(data, tokenizer.step_batches(6, 3, 0, 0, 4, WORLD), WORLD, 0)
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(loader, alone, strict=True))
        write_shard(f"{folder}/10.tar", {**sample_files(7, caption), **sample_files(8, caption)})
        assert make().caption(6) == caption(8)  # it has changed: a new index


def test_shards_that_cannot_be_read():
    """Missing, compressed, truncated, other and empty ones: a line each, with the path."""
    def refused(pattern, *words):
        fails(lambda: tokenizer.Images(f"{folder}/{pattern}", "train", 32, cache=folder), *words)

    with tempfile.TemporaryDirectory() as folder:
        files = sample_files(0, Shapes("train", 32).caption)
        write_shard(f"{folder}/00.tar", files)
        refused("{00..03}.tar", "no shard", "01.tar")
        refused("{00..99999999999999}.tar", "01.tar")
        refused("{03..00}.tar", "no images", "there are no shards")
        whole = Path(folder, "00.tar").read_bytes()
        for name in "01.tar", "x.tar.gz":
            Path(folder, name).write_bytes(gzip.compress(whole))
            refused(name, f"{name} is no whole, uncompressed tar")
        refused("{00..01}.tar", "01.tar is no whole, uncompressed tar")
        for content in b"not a tar" * 99, b"", whole[:700], whole[:200]:
            Path(folder, "02.tar").write_bytes(content)
            refused("02.tar", "02.tar is no whole, uncompressed tar")
        Path(folder, "03.tar").mkdir()
        refused("{03..03}.tar", "03.tar", "directory")
        write_shard(f"{folder}/04.tar", {"a.txt": b"", "README": b""})
        refused("04.tar", "no images with a .txt", "04.tar")


def test_bad_samples_of_shards():
    """A broken image ends the run with its name; --skip_bad=1 takes the next one's, up to 1%."""
    with tempfile.TemporaryDirectory() as folder:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
        files = {}
        for i in range(200):
            files.update({f"{i:03d}.png": b"" if i == 7 else buffer.getvalue(), f"{i:03d}.txt": b"%d" % i})
        write_shard(f"{folder}/0.tar", files)
        cfg = parse(f"--data={folder}/{{0..0}}.tar", f"--out={folder}/out", f"--cache={folder}", "--skip_bad=1")
        fails(lambda: tokenizer.open_data(changed(cfg, skip_bad=False), "train", 8)[7], "cannot read image", "007.png")
        data = tokenizer.open_data(cfg, "train", 8)
        assert data.read(7)[1] == 8 and data.read(9)[1] == 9
        assert Path(folder, "out", "bad_images.txt").read_text() == f"{folder}/0.tar/007.png\n"
        for i in 11, 12:
            files[f"{i:03d}.png"] = b"damaged"
        write_shard(f"{folder}/0.tar", files)
        data = tokenizer.open_data(cfg, "train", 8)
        fails(lambda: [data[i] for i in range(200)], "more than 1%", "bad_images.txt")


def test_random_damage_of_shards():
    """Tars with bytes changed, cut or doubled: they load, or end in one line."""
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "0.tar")
        files = {}
        for i in range(3):
            files.update(sample_files(i, Shapes("train", 32).caption))
        write_shard(path, files)
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        headers = [i for i in range(0, len(whole), 512) if whole[i:i + 4].tobytes() == b"0000"]
        assert len(headers) == 9
        refused = 0
        loaded = 0
        for k in range(200):
            damaged = whole.copy()
            start = 0
            if k % 2:  # in a header, whose checksum is made to fit
                start = int(draw.choice(headers))
            at = start + draw.integers(512 if k % 2 else len(whole), size=3)
            damaged[at] = draw.integers(256, size=3)
            if k % 10 == 1:
                damaged[start + 124:start + 136] = 255  # its size: -1
            if k % 10 == 3:
                damaged[start + 156] = draw.choice(np.frombuffer(b"012345LKgxSV", np.uint8))  # its type
            if k % 2:
                header = damaged[start:start + 512]
                total = int(header.sum()) - int(header[148:156].sum()) + 8 * 32
                header[148:156] = np.frombuffer(b"%06o\0 " % total, np.uint8)
            damaged = damaged[:int(at[0])] if k % 8 == 2 else damaged
            damaged = np.concatenate([damaged[:at[1]], damaged]) if k % 8 == 4 else damaged
            path.write_bytes(damaged.tobytes())
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    data = tokenizer.Images(str(path), "train", 32, cache=folder)
                for i in range(len(data)):
                    data.caption(i)
                    data[i]
                loaded += 1
            except UserError as error:
                assert "\n" not in str(error) and "0.tar" in str(error), error
                refused += 1
        assert refused > 50 and loaded > 20, (refused, loaded)


def test_captions_of_folders():
    """NAME.txt or a field of NAME.json beside an image, or a table in the folder, also over class folders."""
    with tempfile.TemporaryDirectory() as folder:
        image_folder(folder, ["train"])
        root = Path(folder, "train")
        names = [f"{label}/{i}.png" for label in ("cat", "dog") for i in range(3)]

        def captions(**keywords):
            data = tokenizer.Images(folder, "train", 32, **keywords)
            data.require_captions()
            return [data.caption(i) for i in range(6) if data[i]]

        fails(captions, "no caption of", "cat/0.png", "0.txt")
        for i, name in enumerate(names):
            path = root / name
            path.with_suffix(".txt").write_text(f"t{i} é\n", "utf-8")
            path.with_suffix(".json").write_text(json.dumps(dict(text=f"j{i}", number=3)))
        assert captions() == [f"t{i} é" for i in range(6)]
        assert captions(caption_key="text") == [f"j{i}" for i in range(6)]
        fails(lambda: captions(caption_key="number"), "no caption of", "0.png")
        (root / "cat" / "1.txt").write_bytes(b"\xff")
        fails(captions, "no caption of", "1.png")
        (root / "captions.tsv").write_text("".join(f"{name}\ttsv {name}\n" for name in names))
        assert captions() == [f"tsv {name}" for name in names]
        (root / "captions.json").write_text(json.dumps({name: f"json {name}" for name in names}))
        assert captions(caption_key="text") == [f"json {name}" for name in names]
        rows = [dict(file_name=name, caption=f"list {name}") for name in names]
        (root / "captions.json").write_text(json.dumps(rows))
        assert captions() == [f"list {name}" for name in names]
        (root / "captions.json").write_text(json.dumps(rows[:2]))
        (root / "captions.tsv").unlink()
        fails(captions, "no caption of", "cat/2.png")
        for damaged in "{", '[{"caption": "a"}]', "[3]", "3":
            (root / "captions.json").write_text(damaged)
            fails(captions, "captions.json is damaged")
    data = tokenizer.Images("shapes", "train", 32, cache=None)
    data.source = [data.source[0]]  # as torchvision's
    fails(data.require_captions, "these data have no captions")


def test_fashion_mnist():
    """Real images through torchvision's loader: Debian's package dataset-fashion-mnist has the original files."""
    places = [Path("/usr/share/datasets/fashion-mnist"), HERE / "data" / "FashionMNIST" / "raw"]
    source = next((path for path in places if path.is_dir()), None)
    if source is None:
        skip("no Fashion-MNIST on this machine (Debian: dataset-fashion-mnist)")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for file in source.glob("*.gz"):
            (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        data = tokenizer.Images("FashionMNIST", "train", 32, folder)
        pixels, _ = data[0]
        assert len(data) == 60_000 and len(data.classes) == 10
        assert pixels.shape == (3, 32, 32) and (pixels[0] == pixels[2]).all()
        flags = ("--data=FashionMNIST", f"--data_dir={folder}", f"--out={folder}/out", f"--cache={folder}/out")
        script("tokenizer.py", *flags, "--method=vae", "--recipe=study", "--kimg=0.064", "--batch_size=16",
               "--log_interval=1")
        lines = [json.loads(line) for line in Path(f"{folder}/out/log.jsonl").read_text().splitlines()]
        assert len(lines) == 4 and lines[-1]["images"] == 64 and lines[-1]["l1"] > 0


def test_step_batches():
    """Any number of processes and accumulation steps sees the same images; epochs are permutations; runs can start
    anywhere."""
    def seen(processes, accumulate, start=0):
        """The images of each step, over all processes and micro-batches."""
        steps = [[] for _ in range(start, 5)]
        for rank in range(processes):
            world = tokenizer.World(rank, processes, torch.device("cpu"))
            for i, items in enumerate(tokenizer.step_batches(10, 4, 3, start, 5, world, accumulate)):
                steps[i // accumulate] += items
        return [sorted(step) for step in steps]

    assert seen(1, 1) == seen(2, 1) == seen(4, 1) == seen(2, 2) == seen(1, 4)
    assert seen(1, 1)[2:] == seen(1, 1, 2)
    order = [item[0] for step in tokenizer.step_batches(10, 4, 3, 0, 5, WORLD) for item in step]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    two = tokenizer.World(0, 2, torch.device("cpu"))
    fails(lambda: list(tokenizer.step_batches(10, 5, 0, 0, 1, two)), "--batch_size=5", "multiple")


# -----------------------------------------------------------------------------
# tokenizer.py: weights, the ViT

def write_safetensors(path, tensors):
    names = {dtype: name for name, dtype in tokenizer.SAFETENSORS_TYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    data = b""
    for key, value in tensors.items():
        raw = value.contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        offsets = [len(data), len(data) + len(raw)]
        header[key] = dict(dtype=names[value.dtype], shape=list(value.shape), data_offsets=offsets)
        data += raw
    write_header(path, header, data)


def write_header(path, header, data):
    text = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_safetensors():
    """Every type, a scalar and an empty tensor come out as they went in."""
    types = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8)
    tensors = {str(dtype): torch.arange(6).to(dtype).view(2, 3) for dtype in types}
    tensors.update(scalar=torch.tensor(3.5), empty=torch.empty(0, 4))
    with tempfile.TemporaryDirectory() as folder:
        write_safetensors(f"{folder}/weights.safetensors", tensors)
        loaded = tokenizer.load_weights(f"{folder}/weights.safetensors")
    assert loaded.keys() == tensors.keys()
    for key, value in tensors.items():
        assert loaded[key].dtype == value.dtype and torch.equal(loaded[key], value), key


def test_damaged_weights_are_refused():
    """Cut, hostile and missing files end in one line; code in a pickle is never run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        write_safetensors(path, dict(x=torch.arange(6.0).view(2, 3)))
        whole = path.read_bytes()
        length = struct.unpack("<Q", whole[:8])[0]
        huge = struct.pack("<Q", 1 << 62) + whole[8:]
        text = whole[:8] + b"x" * length + whole[8 + length:]
        for content in (whole[:5], whole[:20], whole[:-1], huge, text):
            path.write_bytes(content)
            fails(lambda: tokenizer.load_weights(path), "weights.safetensors")
        for field, value in (("data_offsets", [0, 1 << 40]), ("data_offsets", [-8, 16]), ("shape", [2, 4]),
                             ("dtype", "F99"), ("data_offsets", "abc")):
            header = json.loads(whole[8:8 + length])
            header["x"][field] = value
            write_header(path, header, whole[8 + length:])
            fails(lambda: tokenizer.load_weights(path), "weights.safetensors")
        torch.save({"x": write_header}, f"{folder}/code.pt")
        fails(lambda: tokenizer.load_weights(f"{folder}/code.pt"), "code.pt")
        fails(lambda: tokenizer.load_weights(f"{folder}/none.pt"), "none.pt")
    with mock.patch.object(torch.hub, "get_dir", return_value=SHARED):
        url = "https://nowhere.invalid/weights.pth"
        fails(lambda: tokenizer.load_weights(url), url, "--vfm")


def test_vit_golden():
    """DINOv2's features at its own size, at a smaller and a larger one, where positions are resized."""
    g = golden("dinov2_tiny")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = f"{folder}/dinov2_pretrain.pth"
        torch.save(fill(g), path)
        vit = tokenizer.load_vfm(path, num_heads=4)
        assert (vit.image_size, vit.patch_size, vit.embed_dim, vit.depth) == (70, 14, 48, 4)
        for size in (70, 56, 112):
            hidden, final = vit(image(2, 3, size, size) * 2 - 1, layers=(2, -1), cls=True)
            check(final, g["expect"][f"{size}px_final"])
            check(hidden, g["expect"][f"{size}px_hidden_2"])
        patches, = vit(image(2, 3, 112, 112) * 2 - 1)
        assert torch.equal(patches, final[:, 1:])
        assert vit(torch.zeros(1, 3, 56, 98))[0].shape == (1, 4 * 7, 48)  # not square
        del g["keys"]["norm.weight"]
        torch.save({**fill(g), "stray": torch.zeros(1)}, path)
        fails(lambda: tokenizer.load_vfm(path, num_heads=4), "norm.weight", "stray")
    fails(lambda: tokenizer.load_vfm("dinov3_vitx99"), "dinov3_vitx99", "dinov2_vitl14")


VIT_IMAGES = image(1, 3, 70, 70) * 2 - 1


def vit_features(state, name="x.pth", **overrides):
    """Levels 0, 2, -1 of the ViT whose weights a file of that name holds."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = f"{folder}/{name}"
        if name.endswith("safetensors"):
            write_safetensors(path, state)
        else:
            torch.save(state, path)
        return tokenizer.load_vfm(path, num_heads=4, **overrides)(VIT_IMAGES, (0, 2, -1), cls=True)


def renamed(state, *pairs):
    for old, new in pairs:
        state = {re.sub(old, new, key): value for key, value in state.items()}
    return state


def hugging_face(state, *pairs):
    """DINOv2's names -> transformers', with q, k and v apart."""
    split = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3)):
                split[key.replace("attn.qkv", f"attention.attention.{name}")] = part
        else:
            split[key] = value
    return renamed(split, (r"^(cls_token|mask_token)", r"embeddings.\1"),
                   ("^pos_embed$", "embeddings.position_embeddings"),
                   (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"), (r"^blocks\.", "encoder.layer."),
                   (r"attn\.proj", "attention.output.dense"), (r"^norm\.", "layernorm."), *pairs)


def assert_same_levels(a, b, **tolerance):
    torch.testing.assert_close(list(a), list(b), **(tolerance or dict(rtol=0, atol=0)))


def test_vit_frees_blocks_that_are_not_asked_for():
    """Without gradients: at the last block the outputs of those before are gone, but for the levels asked for."""
    vit = tokenizer.vit_from(tokenizer.TOY_VIT).eval()
    outputs = []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output)))
    vit.blocks[2].register_forward_hook(lambda *_: outputs.append([ref() is not None for ref in outputs[:2]]))
    with torch.no_grad():
        for layers, alive in ((-1,), [False, True]), ((1, -1), [True, True]), ((0, 2, 3), [False, True]):
            outputs.clear()
            vit(torch.zeros(1, 3, 32, 32), layers)
            assert outputs[3] == alive, (layers, outputs)


def test_vit_under_hugging_face_names():
    """DINOv2 and MAE under transformers' names in .safetensors give the features of Meta's files."""
    state = fill(golden("dinov2_tiny"))
    dinov2 = hugging_face(state, (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"))
    assert_same_levels(vit_features(state), vit_features(dinov2, "model.safetensors"))
    plain = {key: value for key, value in state.items() if ".ls" not in key and key != "mask_token"}
    mae = hugging_face(plain, ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
                       (r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense"), ("^", "vit."))
    mae["decoder.decoder_norm.weight"] = torch.zeros(3)
    assert_same_levels(vit_features(plain), vit_features(mae, "model.safetensors"))


def test_vit_registers():
    """Registers act and are dropped; timm's names, where the class token has no position, give the same features."""
    state = fill(golden("dinov2_tiny"))
    without = vit_features(state)
    state["register_tokens"] = tensor("register_tokens", [1, 4, 48])
    with_registers = vit_features(state, antialias=False)
    assert [level.shape[1] for level in with_registers] == [26] * 3
    assert not torch.allclose(with_registers[1], without[1])
    timm = {key: value for key, value in state.items() if key not in ("mask_token", "register_tokens")}
    timm["reg_token"] = state["register_tokens"]
    timm["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    timm["pos_embed"] = state["pos_embed"][:, 1:]
    assert_same_levels(with_registers, vit_features(timm, antialias=False), rtol=1e-5, atol=1e-6)


def write_vit(folder, state, name="model.safetensors"):
    write_safetensors(f"{folder}/{name}", {key: value.contiguous() for key, value in state.items()})
    return f"{folder}/{name}"


@torch.no_grad()
def test_dinov3_golden():
    """All tokens of DINOv3, class token and registers too, after the first block and the last norm, at three sizes;
    published names lack "model."."""
    g = golden("dinov3")
    state = fill(g)
    published = renamed(state, (r"^model\.", ""))
    with tempfile.TemporaryDirectory() as folder:
        vit = tokenizer.load_vfm(write_vit(folder, state), num_heads=2)
        again = tokenizer.load_vfm(write_vit(folder, published, "published.safetensors"), num_heads=2)
        lacking = {key: value for key, value in state.items() if "0.attention.q_proj.bias" not in key}
        fails(lambda: tokenizer.load_vfm(write_vit(folder, lacking, "lacking.safetensors"), num_heads=2), "lacking")
    assert (vit.patch_size, vit.embed_dim, vit.depth, vit.register_tokens.shape[1]) == (16, 64, 3, 4)
    seen = {}
    vit.blocks[0].register_forward_hook(lambda block, inputs, output: seen.update(block1=output))
    vit.norm.register_forward_hook(lambda norm, inputs, output: seen.update(last=output))
    for name, expect in g["expect"].items():
        normalised = (image(2, 3, *expect["size"], name) - 0.5) / 0.25
        x = (normalised - vit.input_shift) / vit.input_scale
        levels = vit(x, layers=(1, -1), cls=True)
        check(seen["block1"], expect["block1"])
        check(seen["last"], expect["last"])
        assert torch.equal(levels[1], torch.cat([seen["last"][:, :1], seen["last"][:, 5:]], 1))
        assert_same_levels(again(x, layers=(1, -1), cls=True), levels)
        with torch.autocast("cpu", torch.bfloat16):
            low, = vit(x)
        assert (low - levels[1][:, 1:]).norm() < 0.03 * low.norm()
    assert tokenizer.vit_from(vit.config).load_state_dict(vit.state_dict())


def test_vit_swiglu():
    """DINOv2-g's MLP under both its names: silu(first half) * second."""
    state = fill(golden("dinov2_tiny"))
    shapes = {"fc1.weight": [128, 48], "fc1.bias": [128], "fc2.weight": [48, 64], "fc2.bias": [48]}
    for i in range(4):
        for name, shape in shapes.items():
            state[f"blocks.{i}.mlp.{name}"] = tensor(f"{i}{name}", shape)
    official = renamed(state, ("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3"))
    assert_same_levels(vit_features(state), vit_features(official))
    mlp = tokenizer.ViT(**{**tokenizer.vit_config(state), "num_heads": 4}).blocks[0].mlp
    x = torch.randn(2, 3, 48)
    a, b = mlp.fc1(x).chunk(2, -1)
    torch.testing.assert_close(mlp(x), mlp.fc2(a * torch.sigmoid(a) * b))


def millions(*modules):
    """Of parameters."""
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def test_vfm_table():
    """The published models' sizes; parameter counts from their papers and model cards."""
    published = dict(dinov2_vits14=22.06, dinov2_vitb14=86.58, dinov2_vitl14=304.37, dinov2_vitg14=1136.48,
                     mae_vitl16=303.3, dino_vits16=21.67, dinov3_vits16=21.6, dinov3_vitb16=85.7, dinov3_vitl16=303.1)
    published["clip-vit-large-patch14"] = 303.18  # without its projection
    with torch.device("meta"):
        for name, count in published.items():
            found = millions(tokenizer.ViT(**tokenizer.VFMS[name][1]))
            assert abs(found / count - 1) < 0.002, (name, found)


def text_folder(folder, name, tower=True, tokens=True):
    """A text encoder's files as published, from the golden ones -> load_text's overrides."""
    g = golden("text")
    if tower:
        keys = g["towers"][name]["keys"]
        state = {key: tensor(key, shape, g["salt"]) for key, shape in keys.items()}
        if name == "siglip2":  # both towers share a file
            state = {f"text_model.{key}": value for key, value in state.items()}
            state.update({"logit_scale": torch.zeros(1), "vision_model.head.probe": torch.zeros(1, 1, 8)})
        write_safetensors(f"{folder}/model.safetensors", state)
    if tokens and name == "clip":
        file = g["tokenizers"]["clip_bpe"]
        Path(f"{folder}/vocab.json").write_text(json.dumps(file["vocab"]))
        Path(f"{folder}/merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, file["merges"])]) + "\n")
    elif tokens:
        Path(f"{folder}/tokenizer.json").write_text(json.dumps(g["tokenizers"]["gemma_bpe"]["file"]))
    return dict(num_heads=4)


def test_text_towers_golden():
    """SigLIP2's and CLIP's states and pooled vectors are transformers'."""
    for name in ("siglip2", "clip"):
        g = golden("text")["towers"][name]
        ids = torch.tensor(g["ids"], dtype=torch.int32)
        with tempfile.TemporaryDirectory() as folder:
            heads = text_folder(folder, name)
            encoder = tokenizer.load_text(folder, **heads)
            tokens, pooled = encoder.encode(ids)
            assert not encoder.training and not tokens.requires_grad and encoder.dim == tokens.shape[2] == 64
            check(tokens, g["tokens"], 1e-5, 1e-5)
            check(pooled, g["pooled"], 1e-5, 1e-5)
            assert encoder.length == 16 and encoder.pooled_dim == pooled.shape[1] == (40 if name == "clip" else 64)


def test_text_tokens_golden():
    """The ids of all golden prompts are those of the tokenizers package; cut with their end, padded."""
    for name, key, first, end, pad in ("siglip2", "gemma_bpe", [], 1, 0), ("clip", "clip_bpe", [0], 1, 1):
        cases = golden("text")["tokenizers"][key]["cases"]
        with tempfile.TemporaryDirectory() as folder:
            encoder = tokenizer.load_text(folder, **text_folder(folder, name))
            for length in (5, 64):
                encoder.length = length
                ids = encoder.ids([text for text, _ in cases])
                assert ids.dtype == torch.int32 and encoder.ids([]).shape == (0, length)
                for (text, expected), row in zip(cases, ids.tolist()):
                    row_expected = first + expected[:length - len(first) - 1] + [end]
                    assert row == row_expected + [pad] * (length - len(row_expected)), (name, text, row)


def test_text_merges():
    """Pairs merge by rank, leftmost first, also where a merge makes a pair of lower rank."""
    ranks = tokenizer.merge_ranks(["ab c", ["a", "b"], "b a", "c abc"])
    assert tokenizer.merge_pairs("abab", ranks) == ["ab", "ab"]
    assert tokenizer.merge_pairs("abcbabc", ranks) == ["abc", "b", "abc"]
    assert tokenizer.merge_pairs("cabc", ranks) == ["cabc"]
    assert tokenizer.merge_pairs("aaaaa", {("a", "a"): 0, ("aa", "a"): 1}) == ["aa", "aaa"]
    assert len(tokenizer.merge_pairs("ab" * 50_000, ranks)) == 50_000


def test_text_errors():
    """What is wrong with a text encoder's files is said in one line."""
    fails(lambda: tokenizer.load_text("nowhere"), "nowhere", "clip-vit-large-patch14")
    with tempfile.TemporaryDirectory() as folder:
        fails(lambda: tokenizer.load_text(folder), folder, ".safetensors")
        heads = text_folder(folder, "siglip2", tokens=False)
        encoder = tokenizer.load_text(folder, **heads)
        fails(lambda: encoder(["a"]), "tokenizer.json")
        for damaged in ("{", "[]", '{"model": {"vocab": {}}}', '{"model": 3}'):
            Path(f"{folder}/tokenizer.json").write_text(damaged)
            fails(lambda: encoder(["a"]), folder, "tokenizer")
        Path(f"{folder}/tokenizer.json").write_bytes(b"\xff")
        fails(lambda: encoder(["a"]), "tokenizer.json")
        write_safetensors(f"{folder}/model.safetensors", {"stray": torch.zeros(2)})
        fails(lambda: tokenizer.load_text(folder), "of another kind")
        state = {key: torch.zeros(shape) for key, shape in golden("text")["towers"]["siglip2"]["keys"].items()}
        del state["encoder.layers.1.mlp.fc2.weight"]
        write_safetensors(f"{folder}/model.safetensors", state)
        fails(lambda: tokenizer.load_text(folder, **heads), "blocks.1.mlp.fc2.weight")


# -----------------------------------------------------------------------------
# tokenizer.py: the tokenizers

def golden_vfmvae(name, folder):
    """-> the golden file, its state dict, the tokenizer that load_tokenizer makes of it."""
    g = golden(name)
    state = fill(g)
    torch.save({"G_ema": state, "cfg": {}}, f"{folder}/vfmvae.pt")
    return g, state, load_vfmvae(f"{folder}/vfmvae.pt", g)


def load_vfmvae(path, g):
    scale_factor = g["upstream_config"]["scale_factor"]
    return tokenizer.load_tokenizer(path, num_heads=4, layers=(0, 2, -1), scale_factor=scale_factor, resolution=128)


VFMVAE_GOLDEN = ("vfmvae_tiny_legacy", "vfmvae_tiny")


@torch.no_grad()
def test_vfmvae_golden():
    """Both forms of published VFM-VAE weights: features, moments, style, every scale, losses are the reference's."""
    for name in VFMVAE_GOLDEN:
        with tempfile.TemporaryDirectory() as folder:
            g, _, tok = golden_vfmvae(name, folder)
        expect = g["expect"]
        assert (tok.z_dim, tok.downsample, tok.resolution) == (8, 16, 128)
        x = image(2, 3, 128, 128, salt=g["salt"]) * 2 - 1
        features = tok.features(x)
        for i, level in enumerate(features):
            check(level, expect[f"vfm_feature_{i}"])
        moments = tok.moments(features, 128, 128)
        check(moments, expect["moments"])
        mean, logvar = tok.encode(x)
        assert torch.equal(mean, moments[:, :8]) and torch.equal(logvar, moments[:, 8:].clamp(-30, 20))
        decompressed, style = tok.decoder.decompress(mean)
        check(decompressed, expect["post_quant"])
        check(style, expect["style"])
        outputs = tok.decoder(mean, scales=True)
        for output in outputs[:-1]:
            check(output, expect[f"multiscale_{output.shape[-1]}"])
        check(outputs[-1], expect["reconstruction"])
        assert torch.equal(tok.decode(mean), outputs[-1])
        np.testing.assert_allclose(tokenizer.vf_loss(tok.vf_proj(mean), features[-1]), expect["vf_loss"], rtol=1e-4)
        np.testing.assert_allclose(tokenizer.kl_loss(mean, logvar), expect["kl_loss"], rtol=1e-4)
        half = F.interpolate(x, (64, 64), mode="bilinear", antialias=True)
        check(tok.moments(tok.features(half), 64, 64), expect["half_scale_moments"])
        check(tok.decode(tok.encode(half)[0]), expect["half_scale_reconstruction"], 5e-3, 5e-4)


def test_vfmvae_files():
    """The same tokenizer from all layouts of its file; one without some weights is refused; sizes need not be
    square."""
    for name in VFMVAE_GOLDEN:
        with tempfile.TemporaryDirectory() as folder:
            g, state, tok = golden_vfmvae(name, folder)
            path = f"{folder}/vfmvae.pt"
            older = renamed(state, (r"encoder\.vision_model\.", "encoder.vision_model.vision_model."))
            for layout in (state, {"G_ema": older}):
                torch.save(layout, path)
                other = load_vfmvae(path, g).state_dict()
                assert all(torch.equal(value, other[key]) for key, value in tok.state_dict().items())
            torch.save({key: value for key, value in state.items() if "torgb" not in key}, path)
            fails(lambda: load_vfmvae(path, g), "Missing", "to_rgb")
        wide = torch.rand(1, 3, 64, 192) * 2 - 1
        with torch.no_grad():
            assert tok.decode(tok.encode(wide)[0]).shape == wide.shape
        fails(lambda: tok.encode(torch.zeros(1, 3, 72, 64)), "72 x 64")


@torch.no_grad()
def test_ldm_golden():
    """VA-VAE's moments and reconstruction are the reference's, whatever else lies in the file."""
    g = golden("vavae_tiny")
    x = image(2, 3, 64, 64) * 2 - 1
    unused = {"loss.logvar": torch.zeros(1), "foundation_model.x": torch.zeros(1), "linear_proj.weight": torch.zeros(1)}
    with tempfile.TemporaryDirectory() as folder:
        for extra in ({}, unused):
            torch.save({"state_dict": {**fill(g), **extra}}, f"{folder}/vavae.ckpt")
            tok = tokenizer.load_tokenizer(f"{folder}/vavae.ckpt", resolution=64)
            assert (tok.z_dim, tok.downsample) == (8, 16)
            check(tok.moments(x, 64, 64), g["expect"]["moments"])
            check(tok.decode(tok.encode(x)[0]), g["expect"]["reconstruction"])


def test_other_autoencoders():
    """SD's autoencoder has fewer latent than inner channels; what is no tokenizer is refused."""
    state = fill(golden("vavae_tiny"))
    state.update({"quant_conv.weight": torch.randn(8, 16, 1, 1), "quant_conv.bias": torch.zeros(8),
                  "post_quant_conv.weight": torch.randn(8, 4, 1, 1)})
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = f"{folder}/x.ckpt"
        torch.save(state, path)
        assert tokenizer.load_tokenizer(path).encode(torch.zeros(2, 3, 64, 64))[0].shape == (2, 4, 4, 4)
        torch.save({"something": torch.zeros(1)}, path)
        fails(lambda: tokenizer.load_tokenizer(path), "ldm_adapter")
        torch.save({"kind": "diffusion"}, path)
        fails(lambda: tokenizer.load_tokenizer(path), "diffusion")


def rae_files(folder):
    """A small decoder and its VFM, laid out as RAE's and DINOv3's -> (the decoder's path, the VFM's, load_tokenizer's
    overrides, the decoder's weights)."""
    shapes = {"decoder_embed.weight": [48, 64], "decoder_embed.bias": [48], "decoder_norm.weight": [48],
              "decoder_norm.bias": [48], "decoder_pred.weight": [3 * 64, 48], "decoder_pred.bias": [3 * 64],
              "trainable_cls_token": [1, 1, 48], "decoder_pos_embed": [1, 17, 48]}
    linear = {"attention.attention.query": [48, 48], "attention.attention.key": [48, 48],
              "attention.attention.value": [48, 48], "attention.output.dense": [48, 48],
              "intermediate.dense": [80, 48], "output.dense": [48, 80]}
    for i in range(2):
        for name, shape in {**linear, "layernorm_before": [48], "layernorm_after": [48]}.items():
            shapes[f"decoder_layers.{i}.{name}.weight"] = shape
            shapes[f"decoder_layers.{i}.{name}.bias"] = shape[:1]
    state = {key: tensor(key, shape) for key, shape in shapes.items()}
    torch.save(state, f"{folder}/model.pt")
    vfm = write_vit(folder, fill(golden("dinov3")))
    return f"{folder}/model.pt", vfm, dict(num_heads=2, decoder_heads=3), state


def mae_positions(grid, dim):
    """MAE's sin-cos table [1 + grid^2, dim], in numpy: a class token's zeros, then columns before rows."""
    rates = 1 / 10_000 ** (np.arange(dim // 4) / (dim / 4))
    rows, columns = (each.flatten()[:, None] * rates for each in np.mgrid[:grid, :grid])
    table = np.concatenate([np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)], 1)
    return torch.from_numpy(np.concatenate([np.zeros((1, dim)), table])).float()


def mae_decoder(state, z, heads, patch):
    """RAE's decoder written out, from its file's weights: latents [B, C, h, w] -> pixels in [0, 1]."""
    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)

    B, C, h, w = z.shape
    x = linear("decoder_embed", z.reshape(B, C, h * w).transpose(1, 2))
    x = torch.cat([state["trainable_cls_token"].repeat(B, 1, 1), x], 1)
    x = x + mae_positions(h, x.shape[-1])
    for i in range(2):
        block = f"decoder_layers.{i}."
        y = norm(f"{block}layernorm_before", x)
        q, k, v = (linear(f"{block}attention.attention.{name}", y).view(B, -1, heads, 16).transpose(1, 2)
                   for name in ("query", "key", "value"))
        y = torch.softmax(q @ k.transpose(2, 3) / 16 ** 0.5, -1) @ v
        x = x + linear(f"{block}attention.output.dense", y.transpose(1, 2).reshape(B, -1, heads * 16))
        y = F.gelu(linear(f"{block}intermediate.dense", norm(f"{block}layernorm_after", x)))
        x = x + linear(f"{block}output.dense", y)
    x = linear("decoder_pred", norm("decoder_norm", x))[:, 1:]
    x = torch.einsum("nhwpqc->nchpwq", x.view(B, h, w, patch, patch, 3)).reshape(B, 3, h * patch, w * patch)
    return x * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)


@torch.no_grad()
def test_rae_file():
    """RAE's published layout: latents are the VFM's last tokens, normalised without its affine, images those of the
    decoder written out; images of half the size are decoded, larger ones refused."""
    with tempfile.TemporaryDirectory() as folder:
        path, vfm, overrides, state = rae_files(folder)
        pair = f"{path}::{vfm}"
        tok = tokenizer.load_tokenizer(pair, **overrides)
        vit = tokenizer.load_vfm(vfm, num_heads=2)
        again = tokenizer.Tokenizer(**tok.arch)
        again.load_state_dict(tok.state_dict())
        torch.save({f"decoder.{key}": value for key, value in state.items()}, path)
        prefixed = tokenizer.load_tokenizer(pair, **overrides)
        torch.save({key: value for key, value in state.items() if key != "decoder_layers.1.output.dense.bias"}, path)
        fails(lambda: tokenizer.load_tokenizer(pair, **overrides), path, "decoder.blocks.1.mlp.fc2.bias")
        torch.save({**state, "decoder_embed.weight": torch.zeros(48, 32)}, path)
        fails(lambda: tokenizer.load_tokenizer(pair, **overrides), "32 channels", "VFM of 64")
    assert (tok.resolution, tok.downsample, tok.z_dim, tok.scale_factor) == (32, 8, 64, 2.0)
    torch.testing.assert_close(tok.decoder.pos_embed.flatten(0, 1), mae_positions(4, 48)[1:])
    x = image(2, 3, 32, 32) * 2 - 1
    mean, logvar = tok.encode(x)
    vit.norm = nn.LayerNorm(64, 1e-6, elementwise_affine=False)
    tokens, = vit(F.interpolate(x, (64, 64), mode="bilinear"))
    torch.testing.assert_close(mean.flatten(2).mT, tokens, rtol=1e-4, atol=1e-4)
    assert (logvar == -30).all()
    decoded = tok.decode(mean)
    torch.testing.assert_close(decoded / 2 + 0.5, mae_decoder(state, mean, 3, 8), rtol=1e-4, atol=1e-5)
    for other in again, prefixed:
        assert torch.equal(other.eval().decode(mean), decoded)
    small = mean[:, :, :2, :2]
    torch.testing.assert_close(tok.decode(small) / 2 + 0.5, mae_decoder(state, small, 3, 8), rtol=1e-4, atol=1e-5)
    fails(lambda: tok.decode(torch.zeros(1, 64, 5, 4)), "at most 4")


def test_rae_decoder_compiles_on_the_cpu():
    """RAE's decoder with inductor."""
    assert_compiled_alike(tokenizer.ViTDecoder(8, 4, 4, 1, 16, 2, 32), torch.randn(2, 8, 4, 4))


def test_lpips_golden():
    """torchvision's VGG16 under the published linear layers gives the reference's distances."""
    g = golden("lpips_vgg")
    state = tokenizer.LPIPS(None).state_dict()
    vgg = {key: tensor(key, list(value.shape)) for key, value in state.items() if key.startswith("features.")}
    published = HERE / "testdata" / "lpips_v0.1_vgg.pth"
    sums = [value.sum().item() for value in tokenizer.load_weights(published).values()]
    np.testing.assert_allclose(sums, g["lin_sums"], rtol=1e-5)
    names = [f"lin{k}.model.1.weight" for k in range(len(g["lin_shapes"]))]
    lin = {name: tensor(name, shape).abs() for name, shape in zip(names, g["lin_shapes"])}
    a = image(2, 3, 64, 64, key="a") * 2 - 1
    b = image(2, 3, 64, 64, key="b") * 2 - 1
    with tempfile.TemporaryDirectory() as folder:
        torch.save({**vgg, "classifier.0.weight": torch.zeros(1)}, f"{folder}/vgg16.pth")
        torch.save(lin, f"{folder}/lin.pth")
        for file, expected in ((published, "expect"), (f"{folder}/lin.pth", "expect_with_lin_from_recipe_abs")):
            net = tokenizer.LPIPS(f"{folder}/vgg16.pth,{file}")
            np.testing.assert_allclose(net(a, b), g[expected], rtol=1e-4)
        fails(lambda: tokenizer.LPIPS(f"{folder}/none.pth"), "none.pth")


def test_defaults_are_the_published_model():
    """Config() is the paper's ImageNet model (SigLIP2-L at 512, f16, 32 channels): it has its parameter counts."""
    with torch.device("meta"):
        tok, _ = tokenizer.build_tokenizer(tokenizer.Config(), pretrained=False)
    assert tokenizer.vfm_of(tokenizer.Config()) == ("siglip2-large-patch16-512", 2.0)
    assert (tok.resolution, tok.downsample, tok.z_dim, tok.layers) == (256, 16, 32, (0, 12, -1))
    # the paper counts SigLIP's pooling head, which we leave out: probe, attention, norm, MLP
    head = (1024 + 4 * 1024 * 1024 + 4 * 1024 + 2 * 1024 + 2 * 4096 * 1024 + 4096 + 1024) / 1e6
    vfm = millions(tok.vfm) + head
    adapter = millions(tok.adapter, tok.vf_proj, tok.decoder.post_quant)
    mapping = millions(tok.decoder.mapping)
    decoder = millions(tok.decoder) - mapping - millions(tok.decoder.post_quant)
    np.testing.assert_allclose([vfm, adapter, mapping, decoder], [316.7, 13.5, 0.53, 125.7], rtol=0.01)


def test_defaults_of_every_method_are_built():
    """AlignTok's, VA-VAE's and the plain VAE's defaults: DINOv2-L, f16, 32 channels; LDM's decoder has its 42 M."""
    with torch.device("meta"):
        rae, _ = tokenizer.build_tokenizer(tokenizer.Config(method="rae"), pretrained=False)
    assert (rae.downsample, rae.z_dim, rae.scale_factor) == (16, 768, 0.875)  # its decoder is "XL": ViT-MAE's sizes
    assert abs(millions(rae.vfm) - 86.6) < 0.1 and abs(millions(rae.decoder) - 414.4) < 1
    with torch.device("meta"):
        psvae, _ = tokenizer.build_tokenizer(tokenizer.Config(method="psvae"), pretrained=False)
    assert (psvae.z_dim, psvae.vfm.embed_dim, len(psvae.adapter.blocks)) == (32, 768, 3)
    assert abs(millions(psvae.decoder) - 42) < 1
    for method in ("aligntok", "vavae", "vae"):
        with torch.device("meta"):
            tok, vfm = tokenizer.build_tokenizer(tokenizer.Config(method=method), pretrained=False)
        assert (tok.downsample, tok.z_dim) == (16, 32) and abs(millions(tok.decoder) - 42) < 1
        used = tok.vfm or vfm
        assert method == "vae" or abs(millions(used) - 304.4) < 0.1


def test_published_size_runs():
    """Every shape fits in the published size: one 256 px image through it and back, on the meta device."""
    with torch.device("meta"), torch.no_grad():
        tok, _ = tokenizer.build_tokenizer(tokenizer.Config(), pretrained=False)
        mean, logvar = tok.encode(torch.zeros(1, 3, 256, 256))
        assert mean.shape == logvar.shape == (1, 32, 16, 16)
        assert [len(output[0, 0]) for output in tok.decoder(mean, scales=True)] == [8, 16, 32, 64, 128, 256]


def test_modulation():
    """The modulated layer equals the convolution with each sample's own weights (VFM-VAE: W s, demodulated)."""
    torch.manual_seed(0)
    layer = tokenizer.ConvNeXtLayer(16, 5, 12)
    for p in layer.parameters():
        nn.init.normal_(p, 0.5, 0.5)
    x = torch.randn(3, 16, 6, 6)
    w = torch.randn(3, 12)
    weights = layer.pwconv1.weight[None, :, :, 0, 0] * layer.style(w)[:, None]
    weights = weights / (weights.square().sum(2, keepdim=True) + 1e-8).sqrt()
    y = torch.einsum("boc,bchw->bohw", weights, layer.norm(layer.dwconv(x))) + layer.pwconv1.bias[:, None, None]
    torch.testing.assert_close(layer(x, w), x + layer.gamma * layer.pwconv2(F.gelu(y)), rtol=1e-4, atol=1e-4)
    rgb = tokenizer.ToRGB(16, 12)
    y = torch.einsum("oc,bc,bchw->bohw", rgb.weight[:, :, 0, 0], rgb.style(w) / 4, x) + rgb.bias[:, None, None]
    torch.testing.assert_close(rgb(x, w), y, rtol=1e-4, atol=1e-4)


def assert_compiled_alike(net, *inputs):
    """inductor's outputs and gradients on the CPU are eager's to 1e-4."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        skip("no C++ compiler")
    torch._dynamo.reset()
    results = []
    for function in net, torch.compile(net, dynamic=False):
        net.zero_grad()
        y = function(*inputs)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        results.append([y, *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1.0, b.abs().max().item()))


def test_upsampling_compiles_on_the_cpu():
    """VFM-VAE's upsampling with inductor, in channels_last, where its padding had no backward pass."""
    net = tokenizer.Upsample(16, 8, 1).to(memory_format=torch.channels_last)
    assert_compiled_alike(net, torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last))


def test_convnext_compiles_on_the_cpu():
    """VFM-VAE's modulated layer with inductor."""
    net = tokenizer.ConvNeXtLayer(16, 5, 8)
    net.gamma.data.fill_(1.0)
    assert_compiled_alike(net, torch.randn(2, 16, 4, 4), torch.randn(2, 8))


def test_fusion_and_attention_compile_on_the_cpu():
    """VFM-VAE's latent fusion and its decoder's attention with inductor."""
    assert_compiled_alike(tokenizer.LatentFusion(8, 8, 1, 2), torch.randn(2, 8, 4, 4))
    net = tokenizer.DecoderAttention(16)
    for layer in net.to_out, net.ff[3]:
        nn.init.normal_(layer.weight, std=0.1)
    assert_compiled_alike(net, torch.randn(2, 16, 4, 4))


def test_adapters_compile_on_the_cpu():
    """VFM-VAE's projections of levels and latents, AlignTok's adapter with inductor."""
    assert_compiled_alike(tokenizer.AttnProjection(16, 8, 2), torch.randn(2, 16, 16))
    net = tokenizer.PointwiseAdapter(16, 4)
    assert_compiled_alike(net.net, torch.randn(2, 16, 16))


def test_ldm_block_compiles_on_the_cpu():
    """The residual block of AlignTok, VA-VAE and the plain VAE with inductor."""
    assert_compiled_alike(tokenizer.ResBlock(8, 16, 4), torch.randn(2, 8, 4, 4))


def test_dit_block_compiles_on_the_cpu():
    """LightningDiT's block with inductor."""
    block = small_dit().blocks[0]
    positions = torch.rand(16, 1, block.attn.qkv.in_features // block.attn.num_heads // 2)
    dim = block.attn.qkv.in_features
    assert_compiled_alike(block, torch.randn(2, 16, dim), torch.randn(2, 1, dim), (positions.cos(), positions.sin()))


@with_tiny_vfm
def test_impossible_tokenizers_are_refused():
    """One line for what no network can be built of, before anything is trained."""
    for overrides, words in (
            (dict(downsample=32), "--widths"), (dict(method="aligntok", scale_factor=2.0), "2 times as fine"),
            (dict(downsample=4, widths=(16, 16, 8)), "0.5 times as fine"), (dict(level_dim=48), "heads"),
            (dict(layers=(-1, 2)), "--layers"), (dict(layers=(9, -1)), "layers"),
            (dict(method="vae", groups=5), "widths"), (dict(image_size=36), "36 x 36"),
            (dict(method="rae", vit_decoder=(1, 130, 3, 8)), "3 attention heads"),
            (dict(method="rae", vit_decoder=(1, 128)), "num_heads"), (dict(method="rae", downsample=4), "0.5 times")):
        fails(lambda: tokenizer.build_tokenizer(tiny_config("unused", **overrides)), words)
    arch = tokenizer.build_tokenizer(tiny_config("unused"))[0].arch
    fails(lambda: tokenizer.Tokenizer(**{**arch, "layers": (0, -1)}), "3 levels", "layers (0, -1)")
    with tempfile.TemporaryDirectory() as folder:
        fails(lambda: tokenizer.train(tiny_config(folder, kimg=0.001), WORLD), "--kimg=0.001")


# -----------------------------------------------------------------------------
# tokenizer.py: the recipes

def test_papers_recipes():
    """The numbers that the papers give: VFM-VAE's lengths and VF weights, VA-VAE's weights and margins, LDM's GAN."""
    paper = tokenizer.STAGES["paper"]
    assert [stage.kimg for stage in paper["vfmvae"]] == [20_000, 20_000, 1_000, 3_000]
    assert [stage.vf for stage in paper["vfmvae"]] == [5.0, 1.0, 0.0, 0.0]
    assert [stage.trains for stage in paper["vfmvae"]] == ["adapter decoder", "adapter decoder", "decoder", "high"]
    assert [stage.vf for stage in paper["vavae"]] == [0.5, 0.1, 0.1] and paper["vavae"][2].vf_margins == (0.25, 0.5)
    for stage in paper["vavae"] + paper["vae"] + paper["aligntok"]:
        assert stage.patch == 0.5 and stage.gan_adaptive and stage.summed and stage.dino == stage.multi == 0


def test_aligntok_has_no_kl():
    """AlignTok's rows: no KL and no sampling in any recipe; preservation in stage 2 alone, where the encoder trains, 1
    in the paper's."""
    for recipe, methods in tokenizer.STAGES.items():
        stages = methods["aligntok"]
        assert all(stage.kl == 0 and not stage.sample for stage in stages), recipe
        assert [bool(stage.preserve) for stage in stages] == [False, True, False]
        assert ["encoder" in stage.trains for stage in stages] == [False, True, False]
    assert tokenizer.STAGES["paper"]["aligntok"][1].preserve == 1.0


def tiny_trainer(method, **overrides):
    """A Trainer around random weights; for tests under `with_tiny_vfm`."""
    cfg = tiny_config("unused", method=method, **overrides)
    torch.manual_seed(0)
    tok, vfm = tokenizer.build_tokenizer(cfg)
    return tokenizer.Trainer(cfg, tok, WORLD, vfm)


def every_row(*recipes):
    """-> (recipe, method, stage) of all rows."""
    for recipe in recipes:
        for method, stages in tokenizer.STAGES[recipe].items():
            for stage in stages:
                yield recipe, method, stage


@with_tiny_vfm
def test_learning_rates_are_the_rows():
    """What the optimizers hold, discriminators' included, is the row's own number; a cool-down lowers it to zero at the
    end."""
    for recipe, method, stage in every_row("paper", "toy", "study"):
        trainer = tiny_trainer(method, recipe=recipe, cooldown=0.5)
        trainer.start_stage(stage)
        rates = [stage.encoder_lr if part == "encoder" else stage.lr for part in stage.trains.split()]
        optimizers = [trainer.optimizer] + ([trainer.gan_optimizer] if trainer.gan else [])
        assert [group["lr"] for group in trainer.optimizer.param_groups] == rates, (recipe, method, stage.name)
        assert all(group["betas"] == stage.betas for optimizer in optimizers for group in optimizer.param_groups)
        for progress, factor in ((0.0, 1.0), (0.5, 1.0), (0.75, 0.5), (1.0, 0.0)):
            trainer.set_lr(progress)
            assert [group["lr"] for group in trainer.optimizer.param_groups] == [rate * factor for rate in rates]
            assert optimizers[-1].param_groups[-1]["lr"] == stage.lr * factor


def test_equivariance_draws():
    """Half of the batches move the latent, an eighth the image, by scales that the decoder's grid admits."""
    draws = [tokenizer.draw_equivariance(0, step, 16, 4) for step in range(4000)]
    latent = [draw for draw in draws if draw[0] == "latent"]
    shrunk = [draw for draw in draws if draw[0] == "image"]
    assert abs(len(latent) / len(draws) - 0.5) < 0.03 and abs(len(shrunk) / len(draws) - 0.125) < 0.02
    assert {scale for _, scale, _ in latent} == {0.25, 0.5, 0.75, 1.0}
    assert {turns for _, _, turns in latent} == {0, 1, 2, 3}
    assert {scale for _, scale, _ in shrunk} == {0.25, 0.5, 0.75} and {turns for _, _, turns in shrunk} == {0}
    assert {tokenizer.draw_equivariance(0, step, 4, 2)[1] for step in range(200)} == {0.5, 1.0}


# -----------------------------------------------------------------------------
# tokenizer.py: losses

def test_psnr_ssim():
    """Both from their definitions in numpy."""
    from scipy.ndimage import gaussian_filter
    a = image(2, 1, 32, 32, key="a")
    b = image(2, 1, 32, 32, key="b") * 0.3 + 0.35
    expected = -10 * np.log10(((a - b).numpy() ** 2).mean((1, 2, 3)))
    np.testing.assert_allclose(tokenizer.psnr(a * 2 - 1, b * 2 - 1), expected, rtol=1e-5)

    def blur(x):
        return gaussian_filter(x.astype(np.float64), 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    for x, y, value in zip(a[:, 0].numpy(), b[:, 0].numpy(), tokenizer.ssim(a * 2 - 1, b * 2 - 1)):
        mean_x = blur(x)
        mean_y = blur(y)
        var_x = blur(x * x) - mean_x ** 2
        var_y = blur(y * y) - mean_y ** 2
        cov = blur(x * y) - mean_x * mean_y
        means = (2 * mean_x * mean_y + 0.01 ** 2) / (mean_x ** 2 + mean_y ** 2 + 0.01 ** 2)
        structure = (2 * cov + 0.03 ** 2) / (var_x + var_y + 0.03 ** 2)
        np.testing.assert_allclose(value, (means * structure).mean(), rtol=1e-4)


def test_vf_loss():
    """Zero for the features themselves, 1 for opposite tokens but for the matrices; margins forgive; latents need not
    be square."""
    torch.manual_seed(0)
    z = torch.randn(2, 8, 4, 4)
    f = torch.randn(2, 16, 8)
    same = f.transpose(1, 2).unflatten(2, (4, 4))
    assert tokenizer.vf_loss(same, f) < 1e-5
    torch.testing.assert_close(tokenizer.vf_loss(-same, f), torch.tensor(2.0))  # equal matrices, opposite tokens
    assert 0 < tokenizer.vf_loss(z, f, 0.25, 0.5) < tokenizer.vf_loss(z, f)
    torch.testing.assert_close(tokenizer.vf_loss(-same, f, 0.25, 0.5), torch.tensor(1.5))
    wide = torch.randn(1, 32, 8)
    pooled = F.avg_pool2d(wide.transpose(1, 2).unflatten(2, (4, 8)), 2)  # 4 x 8 tokens on a 2 x 4 latent
    assert tokenizer.vf_loss(pooled, wide) < 1e-5


def test_diff_augment():
    """Every image is changed and has holes or was shifted; gradients come back through colours, shift and cutout."""
    torch.manual_seed(0)
    x = torch.rand(64, 3, 32, 32, requires_grad=True)
    y = tokenizer.diff_augment(x)
    empty = (y == 0).all(1).flatten(1)  # [64, positions]
    assert y.shape == x.shape and empty.any(1).all() and (y - x).abs().mean() > 0.1
    y.sum().backward()
    reached = x.grad.abs().flatten(1).sum(1)
    assert (reached > 0).all() and x.grad.isfinite().all()
    x = torch.rand(4, 3, 32, 32)
    assert not torch.equal(tokenizer.diff_augment(x), tokenizer.diff_augment(x))  # drawn anew each time


def test_local_batch_norm():
    """Virtual batches of 8 do not see each other; each has mean 0 and variance 1."""
    norm = tokenizer.LocalBatchNorm(4)
    x = torch.randn(16, 4, 10) * 3 + 1
    y = norm(x)
    torch.testing.assert_close(y[:8], norm(x[:8]))
    torch.testing.assert_close(y[8:].mean((0, 2)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y[8:].var((0, 2), correction=0), torch.ones(4), atol=1e-4, rtol=0)


def wake(trainer):
    """Moves weights away from values at which parts of the networks do nothing or a loss is zero."""
    with torch.no_grad():
        for module in trainer.tokenizer.modules():
            if isinstance(module, tokenizer.ConvNeXtLayer):
                module.gamma.fill_(1.0)
        if trainer.anchor:
            for p in trainer.tokenizer.adapter.parameters():
                p.mul_(1.2)


def take_gradients(parameters):
    """-> the gradients, which are cleared."""
    grads = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return grads


@with_tiny_vfm
def test_generator_step_has_the_gradients_of_the_objective():
    """For every row of the paper, all its losses on: cutting the graph at latent and images, as generator_step does,
    gives the gradients of the plain objective to float32 accuracy, adaptive weights included."""
    x = image(8, 3, 32, 32) * 2 - 1
    labels = torch.zeros(8, dtype=torch.long)
    for _, method, stage in every_row("paper"):
        trainer = tiny_trainer(method)
        kl = 1.0 if stage.kl else 0.0  # the paper's 1e-6 would drown in rounding
        trainer.start_stage(dataclasses.replace(stage, kl=kl, equivariance=False, gan_start_kimg=0.0))
        wake(trainer)
        gan = copy.deepcopy(trainer.gan.state_dict())
        torch.manual_seed(5)
        values, _, _ = trainer.generator_step(x, labels, 0, 0)
        fast = take_gradients(trainer.parameters)
        trainer.gan.load_state_dict(gan)  # spectral normalisation iterates at each use
        torch.manual_seed(5)
        trainer.objective(x).backward()
        plain = take_gradients(trainer.parameters)
        for name, on in (("vf_weight", stage.vf), ("gan_weight", stage.gan_adaptive), ("dino", stage.dino),
                         ("preserve", stage.preserve), ("semantic", stage.semantic), ("multires", stage.multires)):
            assert not on or values[name].abs() > 1e-4, (method, stage.name, name, values)
        total = torch.nn.utils.get_total_norm([grad for grad in plain if grad is not None])
        assert total > 0
        for p, a, b in zip(trainer.parameters, fast, plain):
            assert (a is None) == (b is None), (method, stage.name, tuple(p.shape))
            if a is not None:
                assert (a - b).norm() < 2e-5 * total, (method, stage.name, tuple(p.shape), (a - b).norm() / total)


@with_tiny_vfm
def test_decoder_noise():
    """Of the latent that the decoder sees, and no other: each image's deviation is its own, uniform up to the column's;
    gradients are still the objective's. Without it no random number is drawn."""
    x = image(8, 3, 32, 32) * 2 - 1
    labels = torch.zeros(8, dtype=torch.long)
    row = dataclasses.replace(tokenizer.STAGES["toy"]["vavae"][0], kl=1.0)
    trainer = tiny_trainer("vavae", recipe="toy")
    trainer.tokenizer.decoder.forward = lambda z, scales: z
    z = torch.randn(2000, 4, 8, 8)
    trainer.start_stage(row)
    state = torch.get_rng_state()
    assert trainer.decode(z, 0)[0] is z and torch.equal(torch.get_rng_state(), state)
    trainer.start_stage(dataclasses.replace(row, noise=0.8))
    sigma = (trainer.decode(z, 0)[0] - z).std((1, 2, 3))
    assert abs(sigma.mean() - 0.4) < 0.02 and abs(sigma.std() - 0.8 / 12 ** 0.5) < 0.02 and sigma.max() < 0.9
    del trainer.tokenizer.decoder.forward
    results = []
    for step in (lambda: trainer.generator_step(x, labels, 0, 0), lambda: trainer.objective(x).backward()):
        torch.manual_seed(5)
        step()
        grads = take_gradients(trainer.parameters)
        results.append(torch.cat([grad.flatten() for grad in grads if grad is not None]))
    assert (results[0] - results[1]).norm() < 2e-5 * results[1].norm()


@with_tiny_vfm
def test_losses_add_up_as_the_recipe_says():
    """Every row's sums, written out: each loss with its weight and scale. Gradients alone would not show a loss left
    out."""
    x = image(8, 3, 32, 32) * 2 - 1
    y = image(8, 3, 32, 32, "another") * 2 - 1
    labels = torch.zeros(8, dtype=torch.long)
    pixels = 3 * 32 * 32
    for recipe, method, stage in every_row("paper", "toy"):
        trainer = tiny_trainer(method, recipe=recipe)
        tok = trainer.tokenizer
        trainer.start_stage(stage)
        before = copy.deepcopy(tok)
        wake(trainer)
        with torch.no_grad():
            mean, logvar, features = trainer.encode(x)
            values, fixed, vf = trainer.latent_losses(x, labels, mean, None, mean, logvar, features, x)
        expected = stage.kl * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean() / 2
        if stage.preserve:  # LDM's other losses are sums over C, H, W
            distance = (mean - before.encode(x)[0]).square().mean()
            assert distance > 1e-4
            expected = expected + stage.preserve * distance * pixels
        if stage.semantic:  # of the VFM before this stage
            target = before.vfm(before.vfm.resize(x, scale=before.scale_factor))[0]
            with torch.no_grad():
                head = tok.semantic_head(mean)
            unlike = 1 - (F.normalize(head, dim=2) * F.normalize(target, dim=2)).sum(2).mean()
            distance = (head - target).square().mean() + unlike
            assert distance > 0.1
            expected = expected + stage.semantic * distance * (pixels if stage.summed else 1)
        torch.testing.assert_close(fixed, torch.as_tensor(expected), rtol=1e-4, atol=1e-9)
        assert (vf is not None) == (stage.vf > 0)
        if stage.vf:
            torch.testing.assert_close(vf, tokenizer.vf_loss(tok.vf_proj(mean), features[-1], *stage.vf_margins))

        scale = pixels if stage.summed else 1
        expected = stage.l1 * scale * (x - y).abs().mean()
        expected = expected + stage.ssim * (1 - tokenizer.ssim(y, x, data_range=2).mean())
        if stage.lpips:
            expected = expected + stage.lpips * scale * trainer.perceptual_net(y, x).mean()
        outputs = [y]
        if stage.multires:
            outputs = [F.avg_pool2d(y, 2), y]
            small = F.interpolate(x, (16, 16), mode="bilinear", antialias=True, align_corners=False)
            expected = expected + stage.multires * (outputs[0] - small).abs().mean()
        found, _ = trainer.reconstruction_loss(outputs, x)
        torch.testing.assert_close(found, torch.as_tensor(expected), rtol=1e-4, atol=1e-6)

        if trainer.gan:
            trainer.gan.eval()
            torch.manual_seed(3)
            found, parts = trainer.adversarial_loss(y, x)
            assert set(parts) == {name for name in ("dino", "patch", "multi", "matching") if getattr(stage, name)}
            torch.testing.assert_close(found, sum(getattr(stage, name) * value for name, value in parts.items()))


def test_simvq():
    """The nearest of all codes W c, one by one, also under bf16 autocast; read back by index; codes are their own.
    The loss reaches W and, a quarter as much, the latents."""
    torch.manual_seed(0)
    net = tokenizer.SimVQ(6, 50)
    z = torch.randn(2, 6, 3, 4)
    codes, indices = net(z)
    assert codes.shape == z.shape and indices.shape == (2, 3, 4) and len(indices.unique()) > 5
    every = net.codebook @ net.W.weight.T
    for b, i, j in np.ndindex(2, 3, 4):
        nearest = min(range(50), key=lambda k: (every[k] - z[b, :, i, j]).norm().item())
        assert indices[b, i, j] == nearest
        torch.testing.assert_close(codes[b, :, i, j], every[nearest])
    assert torch.equal(net.lookup(indices), codes) and torch.equal(net(codes)[1], indices)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(z)[1], indices)
    assert [name for name, _ in net.named_parameters()] == ["W.weight"]
    loss = tokenizer.commit_loss(z.requires_grad_(), codes)
    torch.testing.assert_close(loss, 1.25 * (z - codes).square().mean())
    loss.backward()
    torch.testing.assert_close(z.grad, 0.25 * 2 * (z - codes).detach() / z.numel())
    offset = 2 * (codes - z).detach().movedim(1, -1).flatten(0, 2) / z.numel()  # [n, C]
    torch.testing.assert_close(net.W.weight.grad, offset.T @ net.codebook[indices.flatten()])


@with_tiny_vfm
def test_quantized_training():
    """Each method on codes, rae's too (VQRAE): the decoder sees codes, whose gradients are the latents'; losses,
    gradients are the plain objective's, the share of codes used, of those that could be, is reported; W trains with the
    decoder, the codebook never; what is encoded is codes."""
    x = image(8, 3, 32, 32) * 2 - 1
    for method, stages in tokenizer.STAGES["toy"].items():
        trainer = tiny_trainer(method, recipe="toy", quantizer="simvq", codebook=64)
        tok = trainer.tokenizer
        trainer.start_stage(dataclasses.replace(stages[0], commit=0.7, noise=0.0))
        fixed_codes = tok.quantizer.codebook.clone()
        mean, logvar, _ = trainer.encode(x)
        mean = mean.detach().requires_grad_()
        z, _ = trainer.draw_latent(mean, logvar)
        codes, indices = tok.quantizer(mean)
        torch.testing.assert_close(z, codes)
        torch.testing.assert_close(tok.encode(x)[0], codes)
        slope = torch.randn_like(z)
        assert torch.equal(torch.autograd.grad(z, mean, slope)[0], slope)
        torch.manual_seed(5)
        values, _, _ = trainer.generator_step(x, None, 0, 0)
        assert "kl" not in values
        torch.testing.assert_close(values["commit"], 1.25 * (mean - codes).square().mean().detach())
        torch.testing.assert_close(values["codes"], torch.tensor(len(indices.unique()) / min(64, indices.numel())))
        fast = take_gradients(trainer.parameters)
        torch.manual_seed(5)
        trainer.objective(x).backward()
        plain = take_gradients(trainer.parameters)
        total = torch.nn.utils.get_total_norm([grad for grad in plain if grad is not None])
        for p, a, b in zip(trainer.parameters, fast, plain):
            assert (a is None) == (b is None) and (a is None or (a - b).norm() < 2e-5 * total), (method, p.shape)
        before = tok.quantizer.W.weight.clone()
        trainer.step([((image(8, 3, 32, 32) * 255).to(torch.uint8), torch.zeros(8).long())], 0, 0)
        assert not torch.equal(tok.quantizer.W.weight, before) and torch.equal(tok.quantizer.codebook, fixed_codes)


@with_tiny_vfm
def test_tokens_are_written_and_read():
    """sample.py --reconstruct writes a discrete tokenizer's indices, which decode to the same pixels elsewhere, never
    outside --out; diffusion and alignment see codes; tokens of another tokenizer are refused."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        quiet(tokenizer.train, tiny_config(str(out), quantizer="simvq", codebook=64, kimg=0.032), WORLD)
        assert all(0 < line["codes"] <= 1 and line["commit"] >= 0 for line in read_log(out))
        tok = tokenizer.load_tokenizer(out / "tokenizer.pt")
        for i in range(5):
            path = Path(folder, "images", str(i % 2), f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(Shapes("val").draw(np.arange(i, i + 1))[0].transpose(1, 2, 0)).save(path)
        command(sample, f"--reconstruct={folder}/images", f"--out={out}", "--batch_size=2")
        with np.load(out / "tokens.npz") as archive:
            names, tokens = archive["names"], archive["tokens"]
        assert tokens.shape == (5, 4, 4) and set(names) == {f"{i % 2}/{i}.png" for i in range(5)}
        command(sample, f"--reconstruct={out}/tokens.npz", f"--out={folder}/again", "--batch_size=2",
                f"--tokenizer={out}/tokenizer.pt")
        for name in names:
            a, b = (Path(where, "reconstructions", name).read_bytes() for where in (out, f"{folder}/again"))
            assert a == b, name
        pixels = np.asarray(Image.open(out / "originals" / names[0]))
        x = tokenizer.to_float(torch.from_numpy(pixels).movedim(2, 0)[None])
        z = tok.encode(x)[0]
        torch.testing.assert_close(z, tok.quantizer.lookup(torch.from_numpy(tokens[:1]).long()))
        subject = align.Subject("it", tok, "")
        found = dict(align.pooled_features([subject], {}, x))
        torch.testing.assert_close(found["it", "latents"], z.mean((2, 3)))
        own = dict(tokenizer=tokenizer.fingerprint(tok))
        np.savez(f"{folder}/other.npz", names=["../../0.png"], tokens=tokens[:1], **own)
        command(sample, f"--reconstruct={folder}/other.npz", f"--out={folder}/far", f"--tokenizer={out}/tokenizer.pt")
        assert [path.name for path in Path(folder, "far").rglob("*.png")] == ["0.png"]
        flags = f"--out={folder}/far", f"--tokenizer={out}/tokenizer.pt"
        for wrong, word in (dict(tokens=tokens + 64, **own), "are not"), (dict(tokens=tokens), "lacks"), \
                (dict(tokens=tokens, tokenizer="0" * 32), "another tokenizer's codes"):
            np.savez(f"{folder}/other.npz", names=names, **wrong)
            fails(lambda: command(sample, f"--reconstruct={folder}/other.npz", *flags), word)
        Path(folder, "bad.npz").write_bytes(b"none")
        fails(lambda: command(sample, f"--reconstruct={folder}/bad.npz", *flags), "bad.npz")


@with_tiny_vfm
def test_detached_pixels():
    """PS-VAE's first stage: what losses on images weigh does not move the encoder's gradients by a bit; without other
    losses it has none; its second stage lets them through, to the VFM as well."""
    x = image(8, 3, 32, 32) * 2 - 1
    found = []
    trainer = tiny_trainer("psvae", recipe="toy")
    first, second = tokenizer.STAGES["toy"]["psvae"]
    tok = trainer.tokenizer
    for row, changes in (first, {}), (first, dict(l1=7.0)), (first, dict(semantic=0.0, kl=0.0)), (
            second, dict(semantic=0.0, kl=0.0)):
        trainer.start_stage(dataclasses.replace(row, **changes))
        torch.manual_seed(5)
        trainer.generator_step(x, None, 0, 0)
        assert tok.decoder.conv_out.weight.grad.abs().sum() > 0
        found.append({name: p.grad for name, p in tok.named_parameters() if p.grad is not None})
        tok.zero_grad()
    encoders = [{name: grad for name, grad in grads.items() if not name.startswith("decoder.")} for grads in found]
    assert encoders[0].keys() == encoders[1].keys() and encoders[0]
    assert all(torch.equal(grad, encoders[1][name]) for name, grad in encoders[0].items())
    assert not encoders[2] and any(name.startswith("vfm.") and grad.any() for name, grad in encoders[3].items())


@with_tiny_vfm
def test_semantic_loss_of_every_method():
    """The column serves each method that trains an encoder, its VFM's tokens pooled to the latents' grid; the head
    learns them."""
    pixels = (image(8, 3, 32, 32) * 255).to(torch.uint8), torch.zeros(8, dtype=torch.long)
    for method in ("vfmvae", "aligntok", "vavae", "vae"):
        row = dataclasses.replace(tokenizer.STAGES["toy"][method][0], semantic=1.0, lr=2e-3)
        with mock.patch.dict(tokenizer.STAGES["toy"], {method: [row]}):
            trainer = tiny_trainer(method, recipe="toy")
            trainer.start_stage(row)
            losses = [trainer.step([pixels], step, 0)["semantic"] for step in range(10)]
        assert losses[-1] < 0.95 * losses[0], (method, losses[0], losses[-1])
    tokens = torch.arange(16.0).view(1, 16, 1).expand(1, 16, 3) + torch.randn(1, 16, 3)
    pooled = F.avg_pool2d(tokens.mT.unflatten(2, (4, 4)), 2).flatten(2).mT
    guess = torch.randn(1, 4, 3)
    cosines = (guess * pooled).sum(2) / guess.norm(dim=2) / pooled.norm(dim=2)
    want = (guess - pooled).square().mean() + (1 - cosines).mean()
    torch.testing.assert_close(tokenizer.semantic_loss(guess, tokens, (2, 2)), want)


@with_tiny_vfm
def test_discriminators_learn_to_tell():
    """After twenty steps of a discriminator of each kind, the generator's loss is larger for fakes than for reals."""
    real = image(8, 3, 32, 32) * 2 - 1
    fake = torch.zeros(8, 3, 32, 32)
    for method, number, name in (("vfmvae", 0, "dino"), ("vfmvae", 3, "multi"), ("vae", 0, "patch")):
        trainer = tiny_trainer(method)
        trainer.start_stage(dataclasses.replace(tokenizer.STAGES["paper"][method][number], lr=1e-3))
        for step in range(20):
            torch.manual_seed(step)
            trainer.discriminator_step(fake, real)
            trainer.gan_optimizer.step()
            trainer.gan_optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            of_fake, of_real = (trainer.gan.generator_loss(images, real)[name] for images in (fake, real))
        assert of_fake > of_real + 0.05, (name, of_fake, of_real)


@with_tiny_vfm
def test_frozen_vfm_runs_once():
    """A step runs the VFM once, for the encoder and the VF loss together, and keeps none of its activations."""
    batch = (image(8, 3, 32, 32) * 255).to(torch.uint8), torch.zeros(8, dtype=torch.long)
    for method in ("vfmvae", "aligntok", "vavae", "psvae"):
        trainer = tiny_trainer(method, recipe="toy")
        trainer.start_stage(tokenizer.STAGES["toy"][method][0])
        levels = []
        vfm = trainer.tokenizer.vfm or trainer.target_vfm
        vfm.register_forward_hook(lambda net, arguments, output: levels.append(output))
        trainer.step([batch], 0, 0)
        assert len(levels) == 1 and not any(level.requires_grad for level in levels[0]), method


# -----------------------------------------------------------------------------
# tokenizer.py: training

def test_average_weights():
    """The averages cover half of the way to constant weights in the half-life, and in the first 5% of the images at
    most; what is frozen does not move."""
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)

    def averaged(images, steps, batch=10):
        averages = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
        for _ in range(steps):
            tokenizer.average_weights(averages, module, images, batch, 1.0, torch.zeros(()))
        return averages

    late = averaged(images=1e9, steps=100)  # 1000 images: one half-life
    torch.testing.assert_close(late["weight"], module.weight / 2)
    assert (late["bias"] == 0).all()
    early = averaged(images=2000, steps=10)  # 100 images, 5% of 2000
    torch.testing.assert_close(early["weight"], module.weight / 2)
    torch.testing.assert_close(averaged(images=10, steps=1)["weight"], module.weight)  # the first step is the weights


def test_use_weights():
    """Weights are swapped in for the block and back out, also when it fails."""
    module = nn.Linear(2, 2)
    before = copy.deepcopy(module.state_dict())
    with contextlib.suppress(KeyError):
        with tokenizer.use_weights(module, dict(weight=torch.zeros(2, 2))):
            assert (module.weight == 0).all() and torch.equal(module.bias, before["bias"])
            raise KeyError
    assert torch.equal(module.weight, before["weight"])


PARTS = dict(
    encoder=("vfm.",), adapter=("adapter.", "vf_proj.", "semantic_head."), decoder=("decoder.", "quantizer.W."),
    high=("decoder.",))


@with_tiny_vfm
def test_every_stage_trains_what_it_names():
    """Every row of the paper: each named part moves and no other; optimizers hold nothing of frozen parts."""
    batch = (image(8, 3, 32, 32) * 255).to(torch.uint8), torch.zeros(8, dtype=torch.long)
    for method, stages in tokenizer.STAGES["paper"].items():
        trainer = tiny_trainer(method)
        tok = trainer.tokenizer
        for stage in stages:
            trainer.start_stage(dataclasses.replace(stage, gan_start_kimg=0.0))
            before = {name: p.detach().clone() for name, p in tok.named_parameters()}
            for step in range(3):
                losses = trainer.step([batch], step, 0)
                assert all(torch.isfinite(value).all() for value in losses.values()), (method, stage.name, losses)
            changed = {name for name, p in tok.named_parameters() if not torch.equal(p, before[name])}
            allowed = tuple(prefix for part in stage.trains.split() for prefix in PARTS[part])
            assert all(name.startswith(allowed) for name in changed), (method, stage.name, changed)
            for part in stage.trains.split():
                assert any(name.startswith(PARTS[part]) for name in changed), (method, stage.name, part)
            if stage.trains == "high":
                assert {int(name.split(".")[2]) for name in changed} == {1, 2, 3}
            held = {name for name, p in tok.named_parameters() if p in trainer.optimizer.state}
            assert changed <= held and all(name.startswith(allowed) for name in held), (method, stage.name)
            assert all(p.grad is None for p in tok.parameters())


@with_tiny_vfm
def test_every_loss_of_a_row_is_reported():
    """A step names each loss that its row weighs, and no other; discriminators are silent before their time."""
    batch = (image(8, 3, 32, 32) * 255).to(torch.uint8), torch.zeros(8, dtype=torch.long)
    columns = (
        "l1", "lpips", "ssim", "multires", "kl", "vf", "preserve", "semantic", "dino", "patch", "multi", "matching")
    for _, method, stage in every_row("paper"):
        trainer = tiny_trainer(method)
        trainer.start_stage(stage)
        expected = {name for name in columns if getattr(stage, name)}
        found = set(trainer.step([batch], 0, trainer.gan_start)) - {"grad_norm", "vf_weight", "gan_weight", "skipped"}
        if trainer.gan_start:  # it is beyond the multi-resolution loss's end, too
            assert found == expected | {"discriminator"}
            early = set(trainer.step([batch], 0, trainer.gan_start - 8))
            assert not early & {"dino", "patch", "multi", "discriminator"}
        else:
            assert found == expected | {"discriminator"}, (method, stage.name, found)


def test_ldm_learns_at_toy_size():
    """The plain VAE of the toy learns eight images by heart: a grey image's L1 is 0.33, and 32 groups in its GroupNorms
    or the rate of VFM-VAE, with which it stayed near that on many images, leave 0.23 here."""
    cfg = tokenizer.Config(**{**tokenizer.PRESETS["toy"], "recipe": "study", "method": "vae", "compile": False})
    torch.manual_seed(0)
    trainer = tokenizer.Trainer(cfg, tokenizer.build_tokenizer(cfg)[0], WORLD)
    row = dataclasses.replace(tokenizer.STAGES["toy"]["vae"][0], lpips=0.0)
    trainer.start_stage(row)
    batch = torch.from_numpy(Shapes("train").draw(np.arange(8))), torch.zeros(8, dtype=torch.long)
    for step in range(50):
        tokenizer.seed_step(0, step)
        l1 = trainer.step([batch], step, 0)["l1"].item()
    assert l1 < 0.19, l1


@with_tiny_vfm
def test_accumulation_equals_one_batch():
    """Micro-batches give the gradient of the whole batch (without batch statistics, sampling, the weight of the VF
    loss)."""
    pixels = (image(8, 3, 32, 32) * 255).to(torch.uint8)
    results = []
    for accumulate in (1, 2):
        trainer = tiny_trainer("vfmvae", recipe="toy", accumulate=accumulate)
        trainer.start_stage(dataclasses.replace(tokenizer.STAGES["toy"]["vfmvae"][0], sample=False, vf=0.0))
        for part in pixels.chunk(accumulate):
            trainer.generator_step(tokenizer.to_float(part), None, 0, 0, 1 / accumulate)
        results.append(torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None]))
    assert (results[0] - results[1]).norm() < 1e-4 * results[0].norm()


@with_tiny_vfm
def test_high_trains_the_output_layer():
    """Of every decoder; its first layer stays."""
    for decoder, first, last in (
            ("vfmvae", "post_quant", "to_rgb"), ("ldm", "conv_in", "conv_out"), ("vit", "embed", "pred")):
        tok, _ = tokenizer.build_tokenizer(tiny_config("unused", decoder=decoder, ch_mult=(1, 1, 1, 1)))
        tokenizer.select_parameters(tok, "high")
        trained = [name for name, p in tok.named_parameters() if p.requires_grad]
        assert any(last in name for name in trained) and not any(first in name for name in trained), decoder


@with_tiny_vfm
def test_tokenizer_flops():
    """The count behind MFU against a counter that watches a forward and backward pass; what is frozen, and smaller
    images, cost less."""
    for method, number in (("vae", 0), ("aligntok", 0), ("aligntok", 1), ("aligntok", 2)):
        cfg = tiny_config("unused", method=method)
        tok, _ = tokenizer.build_tokenizer(cfg)
        stage = tokenizer.STAGES["paper"][method][number]
        tokenizer.select_parameters(tok, stage.trains)
        with FlopCounterMode(display=False) as counter:
            tok.decode(tok.encode(torch.zeros(1, 3, 32, 32))[0]).sum().backward()
        ratio = tokenizer.training_flops(cfg, tok)[stage.name] / counter.get_total_flops()
        assert 0.97 < ratio < 1.05, (method, stage.name, ratio)  # the first layer's input takes no gradient
    cfg = tiny_config("unused")
    tok, _ = tokenizer.build_tokenizer(cfg)
    with_draws = tokenizer.training_flops(cfg, tok)["strong alignment"]
    without = tokenizer.training_flops(dataclasses.replace(cfg, recipe="toy"), tok)["strong alignment"]
    assert 0.4 < with_draws / without < 0.9
    assert tokenizer.training_flops(cfg, tok, whole=True)["strong alignment"] == without  # what --bench times


def test_mfu():
    """Half of eight devices' peak is 0.5; an unknown device has none."""
    assert tokenizer.World(0, 8, torch.device("cuda"), tokenizer.PEAK_TFLOPS["H200"]).mfu(989e9, 4000.0) == 0.5
    assert tokenizer.init_world(peak_tflops=2.0).mfu(1e9, 1000.0) == 0.5
    assert WORLD.mfu(1.0, 1.0) is None
    # training on the CPU counts no FLOPs
    assert dataclasses.replace(WORLD, peak_tflops=0.5).mfu(None, 3.0) is None


def test_more_processes_than_gpus():
    with mock.patch.dict(os.environ, LOCAL_RANK="1"), mock.patch.object(torch.cuda, "is_available", lambda: True), \
            mock.patch.object(torch.cuda, "device_count", lambda: 1):
        fails(tokenizer.init_world, "1 GPUs", "--nproc_per_node")


def read_log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def read_checkpoint(folder):
    return torch.load(Path(folder) / "tokenizer.pt", weights_only=True)


def assert_same_tensors(a, b):
    """All tensors in two nested entries, bit for bit."""
    leaves = [[leaf for leaf in torch.utils._pytree.tree_leaves(entry) if torch.is_tensor(leaf)] for entry in (a, b)]
    assert leaves[0] and all(torch.equal(x, y) for x, y in zip(*leaves, strict=True))


class Killed(Exception):
    pass


def train_with_interruptions(cfg, after):
    """Trains; is killed after those of all checkpoints, and goes on."""
    save = tokenizer.save_checkpoint
    count = 0

    def save_and_die(path, **entries):
        nonlocal count
        save(path, **entries)
        count += 1
        if count in after:
            raise Killed

    with mock.patch.object(tokenizer, "save_checkpoint", save_and_die):
        for _ in after:
            try:
                quiet(tokenizer.train, cfg, WORLD)
            except Killed:
                continue
            raise AssertionError("it ended before it was killed")
        quiet(tokenizer.train, cfg, WORLD)


@with_tiny_vfm
def test_tokenizer_resumes_exactly():
    """Stopped in the middle of a stage, and in later ones, the run ends with the same bits as one that was not
    stopped."""
    for method, quantizer in ("vfmvae", ""), ("aligntok", ""), ("psvae", ""), ("vavae", "simvq"):
        with tempfile.TemporaryDirectory() as folder:
            cfg = tiny_config(f"{folder}/whole", method=method, quantizer=quantizer, save_interval=2)
            quiet(tokenizer.train, cfg, WORLD)
            whole = read_checkpoint(cfg.out)
            assert whole["images"] == 80
            parts = dataclasses.replace(cfg, out=f"{folder}/parts")
            train_with_interruptions(parts, after=(1, 4, 5))
            again = read_checkpoint(parts.out)
            for part in ("model", "ema", "optimizer", "gan", "gan_optimizer"):
                assert_same_tensors(whole[part], again[part])
            assert [line["step"] for line in read_log(parts.out)] == list(range(1, 11))  # one line a step, none twice
            assert list(Path(parts.out, "grids").glob("*.png"))
            for other, said in (dict(z_dim=8), "z_dim 4, now 8"), (dict(vfm="toy-blind"), "--vfm toy, now toy-blind"):
                other = dataclasses.replace(parts, **other)
                fails(lambda: tokenizer.train(other, WORLD), said, "--resume=0")


@with_tiny_vfm
def test_spoiled_checkpoints_are_not_resumed():
    """A training that would go on from a checkpoint without an entry, or with one of another type, says which."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = tiny_config(folder, save_interval=2)
        with mock.patch.object(tokenizer.Log, "write", side_effect=[None] * 2 + [Killed]), contextlib.suppress(Killed):
            quiet(tokenizer.train, cfg, WORLD)
        path = Path(folder, "tokenizer.pt")
        entries = torch.load(path, weights_only=True)  # not mapped: it is written again
        first = next(iter(entries["ema"]))
        ema = {k: v for k, v in entries["ema"].items() if k != first}
        keys = ("config", "arch", "model", "ema", "images", "stage", "optimizer", "gan", "gan_optimizer")
        cases = [({k: v for k, v in entries.items() if k != key}, key) for key in keys]
        cases += [(dict(entries, **{key: torch.ones(2)}), key) for key in keys[:7]]
        cases += [(dict(entries, ema=ema), first), (dict(entries, ema={**ema, first: torch.ones(7, 7)}), first),
                  (dict(entries, optimizer={}), "state"), (dict(entries, gan=[1]), "is damaged")]
        for spoilt, word in cases:
            tokenizer.save_checkpoint(path, **spoilt)
            fails(lambda: tokenizer.train(cfg, WORLD), "tokenizer.pt", word)


@with_tiny_vfm
def test_averages_are_what_is_loaded():
    """load_tokenizer, train's return value and the checkpoint's averages are the same weights, not the last step's."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            tok = tokenizer.train(tiny_config(folder, recipe="toy"), WORLD)
        saved = read_checkpoint(folder)
        loaded = dict(tokenizer.load_tokenizer(f"{folder}/tokenizer.pt").named_parameters())
    trained = [name for name, value in saved["ema"].items() if not torch.equal(value, saved["model"][name])]
    assert any(name.startswith("decoder.") for name in trained) and any(name.startswith("adapter.") for name in trained)
    for name, value in saved["ema"].items():
        assert torch.equal(loaded[name], value) and torch.equal(dict(tok.named_parameters())[name], value), name


@with_tiny_vfm
def test_stage_by_stage():
    """Stages run one at a time, each from the one before, end with the weights of one run over all."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = tiny_config(folder, method="aligntok")
        fails(lambda: tokenizer.train(dataclasses.replace(cfg, stage=2), WORLD), "stage 2")
        fails(lambda: tokenizer.train(dataclasses.replace(cfg, stage=3, kimg=0.016), WORLD), "less than one batch of 8")
        for stage in (1, 2, 3):
            quiet(tokenizer.train, dataclasses.replace(cfg, stage=stage), WORLD)
            assert read_checkpoint(folder)["stage"] == stage
        fails(lambda: tokenizer.train(dataclasses.replace(cfg, stage=9), WORLD), "--stage=9", "latent alignment")
        quiet(tokenizer.train, dataclasses.replace(cfg, out=f"{folder}/one"), WORLD)
        assert_same_tensors(read_checkpoint(folder)["ema"], read_checkpoint(f"{folder}/one")["ema"])


@with_tiny_vfm
def test_anchor_is_the_averaged_first_stage():
    """AlignTok's second stage stays close to the tokenizer that the first one saved, and what a stage freezes is the
    average."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = tiny_config(folder, method="aligntok", recipe="toy")
        saved = []
        for stage in (1, 2, 3):
            quiet(tokenizer.train, dataclasses.replace(cfg, stage=stage), WORLD)
            saved.append(read_checkpoint(folder))
        names = [name for name in saved[0]["ema"] if name.startswith(("vfm.", "adapter."))]
        assert any(not torch.equal(saved[0]["ema"][name], saved[0]["model"][name]) for name in names)
        for name in names:
            assert torch.equal(saved[1]["anchor"][name], saved[0]["ema"][name])
            assert torch.equal(saved[2]["model"][name], saved[1]["ema"][name])


@with_tiny_vfm
def test_other_sizes():
    """The shapes, the toy's VFM and every tokenizer train at twice the resolution, and encode what is not square."""
    for method in tokenizer.STAGES["toy"]:
        with tempfile.TemporaryDirectory() as folder:
            quiet(tokenizer.train, tiny_config(folder, method=method, recipe="toy", image_size=64, kimg=0.016), WORLD)
            tok = tokenizer.load_tokenizer(f"{folder}/tokenizer.pt")
            assert tok.encode(torch.zeros(1, 3, 64, 96))[0].shape == (1, 128 if method == "rae" else 4, 8, 12)


def test_tokenizer_on_two_processes():
    """torchrun with gloo: two processes see the images of one, hold the same weights, and, where no posterior is
    sampled, end with those of one process."""
    code = f"""
import dataclasses, sys, torch
sys.path.insert(0, {str(HERE)!r})
import tokenizer
tokenizer.Shapes.lengths = dict(train=64, val=32)
row = dataclasses.replace(tokenizer.STAGES["study"]["vae"][0], sample=False)
tokenizer.STAGES["study"]["vae"] = [row]
world = tokenizer.init_world()
cfg = tokenizer.parse_config(tokenizer.Config, tokenizer.PRESETS)
tok = tokenizer.train(cfg, world)
print(f"rank {{world.rank}} {{tokenizer.fingerprint(tok)}}\\n", end="", flush=True)
"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.py"
        path.write_text(code)
        flags = ("--method=vae", "--recipe=study", "--kimg=0.096", "--log_interval=1", "--ch_mult=1,1,1,1",
                 "--batch_size=16", f"--cache={folder}", "--save_interval=1000")
        output = torchrun(path, f"--out={folder}/two", *flags)
        assert output.count("preset toy") == 1 and "2 x cpu" in output
        weights = re.findall(r"rank (\d) (\w{32})", output)
        assert sorted(rank for rank, _ in weights) == ["0", "1"] and len({each for _, each in weights}) == 1, weights
        script(path, f"--out={folder}/one", *flags)
        one = read_checkpoint(f"{folder}/one")
        two = read_checkpoint(f"{folder}/two")
        assert one["images"] == two["images"] == 96
        for key in ("l1", "grad_norm"):
            logged = [[line[key] for line in read_log(f"{folder}/{name}")] for name in ("one", "two")]
            assert len(logged[0]) == 6
            np.testing.assert_allclose(*logged, rtol=1e-2, err_msg=key)
        torch.manual_seed(0)
        start = tokenizer.build_tokenizer(tokenizer.Config(**one["config"]))[0].state_dict()
        moved = sum((value - start[name]).square().sum() for name, value in one["model"].items())
        apart = sum((value - two["model"][name]).square().sum() for name, value in one["model"].items())
        assert apart.sqrt() < 0.05 * moved.sqrt()  # Adam blows up the rounding of gradients near zero


def test_bench():
    """--bench prints one line of JSON a stage, counts all micro-batches' images, and writes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        output = command(tokenizer, "--bench=2", "--method=vavae", "--recipe=paper", "--batch_size=4", "--accumulate=2",
                         "--ch_mult=1,1,1,1", f"--out={folder}/out", f"--cache={folder}/out", "--peak_tflops=0.5")
        lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        assert len(lines) == 3 and not os.listdir(folder)
        for line in lines:
            assert line["images"] == 4 and 0 < line["ms_min"] <= line["ms"] <= line["ms_max"]
            np.testing.assert_allclose(line["images_per_second"], 4000 / line["ms"], rtol=1e-2)
            assert line["tflops"] > 0 and 0.1 < line["peak_gib"] < 20 and line["gpu_waits"] is None
            np.testing.assert_allclose(line["mfu"], line["tflops"] / 0.5, rtol=1e-3)
    for module in tokenizer, diffusion:
        flags = "--bench=1", "--preset=toy", "--batch_size=8", "--accumulate=3"
        fails(lambda: command(module, *flags), "--batch_size=8", "no multiple")
    fails(lambda: command(tokenizer, "--bench=1", "--preset=toy", "--stage=9"), "--stage=9", "weak alignment")

def test_readme_flags_exist():
    """Every flag that the README's commands give is a field of that script's Config."""
    modules = {module.__name__: module for module in SCRIPTS}
    flags = 0
    for name, rest in re.findall(r"\b(\w+)\.py([^\n`&#]*)", (HERE / "README.md").read_text()):
        for flag in re.findall(r"--(\w+)=", rest):
            assert flag in modules[name].Config.__dataclass_fields__, f"{name}.py --{flag}"
            flags += 1
    assert flags > 10
# -----------------------------------------------------------------------------
# diffusion.py and sample.py

TIGHT = dict(rtol=1e-5, atol=1e-5)  # looser ones let exact GELU and another eps pass


def official_file(path, name, prefix=""):
    """The reference's weights as its files are laid out; the position tables in them must not be used."""
    weights = {prefix + key: value for key, value in fill(golden(name)).items()}
    entries = dict(ema=weights)
    if name == "lightningdit_tiny":
        entries["model"] = {key: value + 1 for key, value in weights.items()}
    torch.save(entries, path)


def golden_model(name, prefix="", **overrides):
    """-> expectations, the model through load_diffusion, latent, noise."""
    with tempfile.TemporaryDirectory() as folder:
        official_file(f"{folder}/official.pt", name, prefix)
        model = diffusion.load_diffusion(f"{folder}/official.pt", num_heads=4, **overrides)
    latent, noises = ((image(2, 8, 4, 4, key) - 0.5) * 3.4 for key in ("latent", "noise"))
    return golden(name)["expect"], model, latent, noises


@torch.no_grad()
def test_lightningdit_golden():
    """Official LightningDiT weights give the reference's tables, velocity and losses."""
    expect, model, x, noises = golden_model("lightningdit_tiny")
    check(model.pos_embed.flatten(0, 1)[None], expect["pos_embed"], **TIGHT)
    check(model.rope_angles.cos().flatten(0, 1).repeat_interleave(2, 1), expect["rope_cos"], **TIGHT)
    check(model(x, torch.tensor([0.1, 0.73]), torch.tensor([3, 10])), expect["velocity"], **TIGHT)
    losses = diffusion.flow_losses(model, x, torch.tensor([3, 1]), torch.tensor([0.3, 0.8]), noises)
    np.testing.assert_allclose(losses["velocity"], expect["mse"], **TIGHT)
    np.testing.assert_allclose(losses["cosine"], expect["cos"], **TIGHT)


@torch.no_grad()
def test_lightningdit_sampling_golden():
    """Guidance on three channels, Euler with shifted times and the guidance interval give the reference's numbers."""
    expect, model, x, noises = golden_model("lightningdit_tiny")
    y = torch.tensor([3, 1])
    v, = diffusion.guided(model, [x], 0.5, y, cfg_scale=4.0, cfg_channels=3)
    check(v, expect["cfg_velocity_t0p5_scale4"], **TIGHT)
    shared = dict(num_steps=10, timestep_shift=0.3)
    check(diffusion.ode(model, noises, y, **shared), expect["ode_euler_10_shift0p3_nocfg"], **TIGHT)
    z = diffusion.ode(model, noises, y, cfg_scale=2.0, cfg_interval=(0.125, 1.0), cfg_channels=3, **shared)
    check(z, expect["ode_euler_10_shift0p3_cfg2"], **TIGHT)


@torch.no_grad()
def test_reg_golden():
    """Official REG weights, turned round, give the reference's velocities, projection and score in its own time."""
    expect, model, x, _ = golden_model("reg_sit_tiny", prefix="module.", encoder_depth=2)
    check(F.pad(model.pos_embed.flatten(0, 1), (0, 0, 1, 0))[None], expect["pos_embed"], **TIGHT)
    cls = (image(2, 1, 1, 24, "cls").reshape(2, 24) - 0.5) * 3.4
    t = 1 - torch.tensor([0.1, 0.73])  # the reference's run from data to noise
    v, v_cls, projection = model(x, t, torch.tensor([3, 10]), cls)
    check(-v, expect["velocity"], **TIGHT)
    check(-v_cls, expect["cls_velocity"], **TIGHT)
    check(projection, expect["projection"], **TIGHT)
    check(diffusion.velocity_to_score(v, x, t.view(2, 1, 1, 1)), expect["score_t"], **TIGHT)


@torch.no_grad()
def test_reg_sampling_golden():
    """Euler-Maruyama with REG's class token, without and with guidance, gives the reference's latents; noise is asked
    for the latent and then the class token, at every step but the last, in float64."""
    expect, model, _, noises = golden_model("reg_sit_tiny", encoder_depth=2)
    cls_noise = (image(2, 1, 1, 24, "noisecls").reshape(2, 24) - 0.5) * 3.4
    guidance = dict(cfg_scale=2.0, cls_cfg_scale=2.0, cfg_interval=(0.2, 1.0))  # REG's own: 0 to 0.8, from data
    for name, keywords in ("em_8_nocfg", {}), ("em_8_cfg2", guidance):
        calls = []

        def draw(like):
            calls.append("latent" if like.dim() == 4 else "cls")
            assert like.dtype == torch.float64
            key = f"step{calls.count(calls[-1]) - 1}_{calls[-1]}"
            return (noise(like.numel(), key) * 1.7).reshape(like.shape)

        z = diffusion.sde(model, noises, torch.tensor([3, 1]), 8, cls_noise=cls_noise, generator=draw, **keywords)
        check(z, expect[name], **TIGHT)
        assert calls == ["latent", "cls"] * 7


def saved(path, entries):
    """A function that loads these entries from that file."""
    torch.save(entries, path)
    return functools.partial(diffusion.load_diffusion, path)


@torch.no_grad()
def test_load_diffusion_layouts():
    """EMA or bare weights, behind prefixes, in other precisions, are the same model."""
    weights = fill(golden("lightningdit_tiny"))
    layouts = [weights, dict(ema=weights), dict(model=weights),
               dict(ema={"module._orig_mod." + key: value for key, value in weights.items()}),
               dict(ema={key: value.double() for key, value in weights.items()})]
    inputs = torch.randn(2, 8, 4, 4), torch.rand(2), torch.tensor([1, 2])
    with tempfile.TemporaryDirectory() as folder:
        outputs = [saved(f"{folder}/x.pt", entries)()(*inputs) for entries in layouts]
    assert outputs[0].std() > 0.5
    for other in outputs[1:]:
        assert torch.equal(outputs[0], other)


def test_load_diffusion_complains():
    """Left-over and missing keys, other kinds of files and no file are one line each that names the culprit."""
    weights = fill(golden("lightningdit_tiny"))
    lacking = {key: value for key, value in weights.items() if key != "blocks.1.mlp.w12.bias"}
    reg = fill(golden("reg_sit_tiny"))
    del reg["t_embedder.mlp.0.weight"]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/x.pt"
        fails(saved(path, {**weights, "blocks.0.attn.surplus": torch.zeros(1)}), "blocks.0.attn.surplus", "Unexpected")
        fails(saved(path, lacking), "blocks.1.mlp.w12.bias", "Missing")
        fails(saved(path, reg), "t_embedder.mlp.0.weight", "lacks")
        fails(saved(path, dict(ema={"conv.weight": torch.zeros(1)})), path, "x_embedder.proj.weight")
        fails(saved(path, dict(kind="tokenizer", model={})), "tokenizer checkpoint, not a diffusion model")
        fails(saved(path, [1, 2]), path)
        fails(lambda: diffusion.load_diffusion(f"{folder}/none.pt"), "none.pt")


def survives(function):
    """Asserts that a call succeeds or ends in a UserError of one line -> that line."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            function()
        except UserError as error:
            line = str(error)
            assert "\n" not in line and "weights_only" not in line and len(line) < 1500, line
            return line


def spoiled(entries, seed, n):
    """n copies of a nested dictionary, one entry each gone, of another type, of another shape, or one too many."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        top = inner = copy.copy(entries)
        key = list(inner)[rng.integers(len(inner))]
        while isinstance(inner[key], dict) and inner[key] and rng.random() < 0.8:
            inner[key] = copy.copy(inner[key])
            inner = inner[key]
            key = list(inner)[rng.integers(len(inner))]
        values = [None, 3, -1, "x", 0.5, [], {}, torch.zeros(()), torch.zeros(2, 3), {"x": torch.zeros(1)}]
        if torch.is_tensor(inner[key]):
            values += [inner[key][None], inner[key].flatten(), inner[key].transpose(0, -1), inner[key] > 0]
        choice = rng.integers(len(values) + 2)
        if choice < len(values):
            inner[key] = values[choice]
        elif choice == len(values):
            del inner[key]
        else:
            inner["surplus"] = 1
        yield top


def test_spoiled_checkpoints():
    """An entry that lacks or has another type or shape: one line that names the file, from every loader, ours and
    official."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/x.pt"
        tiny_tokenizer(f"{folder}/tokenizer.pt")
        tok = tokenizer.load_weights(f"{folder}/tokenizer.pt")
        dit = diffusion.DiT(**TINY_DIT)
        dit = dict(
            kind="diffusion", arch=TINY_DIT, model=dit.state_dict(), ema=dit.state_dict(), config={}, step=3,
            classes=["a"], latent_mean=torch.zeros(4), latent_std=torch.ones(4), tokenizer="tokenizer.pt")
        official = functools.partial(diffusion.load_diffusion, num_heads=4)
        for entries, load in (
                (tok, tokenizer.load_tokenizer), (dit, diffusion.load_diffusion),
                (fill(golden("vfmvae_tiny")), functools.partial(load_vfmvae, g=golden("vfmvae_tiny"))),
                (fill(golden("vavae_tiny")), tokenizer.load_tokenizer), (fill(golden("lightningdit_tiny")), official),
                (fill(golden("reg_sit_tiny")), official),
                (fill(golden("dinov2_tiny")), functools.partial(tokenizer.load_vfm, num_heads=4)),
                (fill(golden("dinov3")), functools.partial(tokenizer.load_vfm, num_heads=2))):
            torch.save(dict(entries), path)
            load(path)
            failed = 0
            for each in spoiled(dict(entries), 1, 12):
                Path(path).unlink(missing_ok=True)  # a mapped file must not be cut
                torch.save(each, path)
                line = survives(lambda: load(path))
                assert line is None or path in line, line
                failed += line is not None
            assert failed > 4, (load, failed)


def test_official_arch():
    """Every size of a REG model with a projection is read off its state dict; the head count with QK norm alone."""
    sizes = dict(input_size=8, in_channels=3, patch_size=2, hidden_size=48, depth=2, num_heads=3, num_classes=5,
                 arch="sit", mlp_hidden=40, z_dim=7, projector_dim=9, cls_dim=7)
    for qk_norm, num_heads in (True, 3), (False, 48 // 64):
        model = diffusion.DiT(**sizes, qk_norm=qk_norm)
        positions = torch.zeros(1, 1 + 16, 48)  # official files have the table
        found = diffusion.official_arch({**model.state_dict(), "pos_embed": positions})
        assert found == {**sizes, "qk_norm": qk_norm, "num_heads": num_heads}


def test_published_diffusion_sizes():
    """Parameters of the published models: 675 M, with REG 685 M; B 130 M (DiT-B/1's size)."""
    def millions(name, **arch):
        depth, width, heads = diffusion.SIZES[name]
        with torch.device("meta"):
            model = diffusion.DiT(depth=depth, hidden_size=width, num_heads=heads, **arch)
        return sum(p.numel() for p in model.parameters()) / 1e6

    assert abs(millions("XL") - 675) < 2
    assert abs(millions("XL", arch="sit", cls_dim=768, z_dim=768, qk_norm=True) - 685) < 2
    assert abs(millions("B") - 130) < 3
    assert 950 < millions("1.0B") < 1100
    assert 1500 < millions("1.6B") < 1700


def small_dit(arch="lightningdit", random=True, **arguments):
    torch.manual_seed(0)
    small = dict(input_size=4, in_channels=8, hidden_size=32, depth=3, num_heads=2, num_classes=10, arch=arch,
                 projector_dim=16, encoder_depth=2)
    model = diffusion.DiT(**{**small, **arguments})
    if random:  # away from the zero output of the start
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
    return model


REG = dict(arch="sit", cls_dim=24, z_dim=24, qk_norm=True)
WIDE = dict(head_depth=2, head_size=64, head_heads=4)
DIT_INPUT = torch.randn(3, 8, 4, 4), torch.rand(3), torch.tensor([1, 10, 2]), torch.randn(3, 24)


def inputs_of(model):
    """Latents, times, classes, and the class token if the model takes one."""
    return DIT_INPUT if model.cls_dim else DIT_INPUT[:3]


def test_dit_starts_at_zero():
    """adaLN-zero: the velocities of a fresh model are 0."""
    for arguments in ({}, dict(patch_size=2), REG, WIDE):
        model = small_dit(random=False, **arguments)
        out = model(*inputs_of(model))
        for velocity in out[:2] if model.cls_dim else [out]:
            assert not velocity.any()


def test_dit_learns_everywhere():
    """Every parameter receives a gradient."""
    for arguments in ({}, dict(patch_size=2), REG, WIDE, dict(head_depth=1, arch="sit")):
        model = small_dit(**arguments)
        out = model(*inputs_of(model))
        sum(part.square().sum() for part in (out if model.cls_dim else [out])).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, name


@torch.no_grad()
def test_dit_blocks_and_smaller_latents():
    """On smaller latents a DiT is the DiT of that size with the same weights: positions count from 0. blocks=True gives
    what its blocks give."""
    for arguments in ({}, dict(patch_size=2), REG, dict(depth=2, head_depth=1)):
        model = small_dit(input_size=8, **arguments).eval()
        small = small_dit(**arguments).eval()
        small.load_state_dict(model.state_dict())
        got = model(*inputs_of(model))
        want = small(*inputs_of(small))
        torch.testing.assert_close(got, want)
        outputs = []
        for block in small.blocks:
            block.register_forward_hook(lambda block, inputs, x: outputs.append(x))
        small(*inputs_of(small))
        torch.testing.assert_close(model(*inputs_of(model), blocks=True), outputs)
        tokens = (4 // model.patch_size) ** 2 + (model.cls_dim > 0)
        assert [tuple(x.shape) for x in outputs] == [(3, tokens, 32)] * 3


def test_dit_compiles_whole():
    """No graph break with any option, alone (sampling) or block by block (several processes): one graph serves all
    blocks but a head's, with activation checkpointing, too; the same outputs and gradients."""
    from torch._dynamo.testing import CompileCounter
    words = dict(num_classes=0, text_tokens=5, text_dim=24, vocabulary=35)
    states = dict(num_classes=0, text_tokens=5, text_dim=24, text_pooled=True, qk_norm=True)
    captions = {"words": torch.arange(15).view(3, 5), "states": torch.randn(3, 6, 24)}

    def results(model):
        out = model(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        sum(part.square().sum() for part in out).backward()
        return [*out, *take_gradients(list(model.parameters()))]

    for arguments, y, blocks, checkpointing in (
            ({}, None, 1, True), (REG, None, 1, False), (WIDE, None, 2, False), (words, "words", 0, False),
            (states, "states", 0, False)):
        model = small_dit(**arguments)
        inputs = (*DIT_INPUT[:2], captions[y]) if y else inputs_of(model)
        want = results(model)
        model.checkpointing = checkpointing
        for modules, graphs in ([model], 1), (model.blocks, blocks):
            if not graphs:
                continue
            torch._dynamo.reset()
            counter = CompileCounter()
            plain = [module.forward for module in modules]
            for module in modules:
                module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False, backend=counter)
            for _ in range(2):
                got = results(model)
            assert counter.frame_count == graphs, arguments
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            for module, forward in zip(modules, plain):
                module.forward = forward


@with_tiny_vfm
def test_every_row_trains_in_bf16():
    """CUDA's autocast, on the CPU: a step of each of the papers' rows, all losses on, is near float32's."""
    x = image(2, 3, 32, 32) * 2 - 1
    low = mock.patch.object(tokenizer.World, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    batch = tokenizer.to_uint8(x), torch.zeros(2, dtype=torch.long)
    for _, method, stage in every_row("paper"):
        found = []
        for autocast in contextlib.nullcontext(), low:
            trainer = tiny_trainer(method)
            trainer.start_stage(dataclasses.replace(stage, gan_start_kimg=0.0))
            wake(trainer)
            torch.manual_seed(5)
            with autocast:
                found.append(trainer.step([batch], 0, 0))
            assert all(p.dtype == torch.float32 for p in trainer.parameters)
        for name, value in found[0].items():
            assert (found[1][name] - value).abs() < 0.1 * value.abs() + 0.02, (method, stage.name, name, found)


def plain_wide(state, x, t, y, depth, heads):
    """DDT and DiT^DH written out for patch size 1, from the weights of `DiT` without its code -> v, the trunk's tokens.
    heads: of trunk and head."""
    def linear(name, x):
        return x @ state[f"{name}.weight"].flatten(1).T + state[f"{name}.bias"]

    def norm(name, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    def turned(x, side):  # pairs of channels, by row and then by column
        d = x.shape[-1]
        rates = 10_000 ** (-torch.arange(d // 4).double() * 4 / d)
        grids = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        row, column = (each.flatten()[:, None] * rates for each in grids)
        turn = torch.polar(torch.ones(side ** 2, d // 2).double(), torch.cat([row, column], 1))
        return torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn).flatten(-2).float()

    def block(i, x, c, heads):
        name = f"blocks.{i}"
        m = linear(f"{name}.adaLN_modulation.1", F.silu(c)).chunk(6, -1)
        qkv = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x) * (1 + m[1]) + m[0]).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv)
        q = turned(q, side)
        k = turned(k, side)
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        x = x + m[2] * linear(f"{name}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        a, b = linear(f"{name}.mlp.w12", norm(f"{name}.norm2", x) * (1 + m[4]) + m[3]).chunk(2, -1)
        return x + m[5] * linear(f"{name}.mlp.w3", F.silu(a) * b)

    side = x.shape[-1]
    rates = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    angles = t[:, None] * rates
    waves = [angles.cos(), angles.sin()]
    if "t_embedder.W" in state:  # RAE's file: sines before cosines
        angles = 2 * math.pi * t[:, None] * state["t_embedder.W"]
        waves = [angles.sin(), angles.cos()]
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat(waves, 1))))
    tokens = x.flatten(2).mT
    u = linear("s_embedder.proj", tokens)
    u = u + mae_positions(side, u.shape[-1])[1:]
    c = F.silu(time + state["y_embedder.embedding_table.weight"][y])[:, None]
    for i in range(depth):
        u = block(i, u, c, heads[0])
    s = F.silu(time[:, None] + u)
    if "s_projector.weight" in state:
        s = linear("s_projector", s)
    h = linear("x_embedder.proj", tokens)
    for i in range(depth, 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))):
        h = block(i, h, s, heads[1])
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(s)).chunk(2, -1)
    v = linear("final_layer.linear", norm("final_layer.norm_final", h) * (1 + scale) + shift)
    return v.mT.unflatten(2, (side, side)), u


@torch.no_grad()
def test_wide_head():
    """A head as wide as the other blocks (DDT) or wider (RAE's DiT^DH) gives what is written out above; kept tokens are
    the trunk's and stand in for it; REPA reads the trunk; what cannot be is refused."""
    x, t, y = DIT_INPUT[:3]
    for arguments, heads in (WIDE, (2, 4)), (dict(head_depth=1), (2, 2)):
        model = small_dit(**arguments)
        want, u = plain_wide(model.state_dict(), x, t, y, 3, heads)
        kept = {}
        assert want.std() > 0.1
        torch.testing.assert_close(model(x, t, y, kept=kept), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kept[3], u, rtol=1e-4, atol=1e-4)
        states = model(x, t, y, blocks=True)
        assert [state.shape[2] for state in states] == [32] * 3 + [len(model.final_layer.norm_final.weight)] * (
            len(states) - 3)
        torch.testing.assert_close(states[2], kept[3])
        same = model(x, t, y, kept=kept)
        assert torch.equal(same, model(x, t, y))
        others = model(x, t, (y + 1) % 10, kept=kept)  # classes reach the trunk alone
        assert torch.equal(others, same) and not torch.equal(model(x, t / 2, y, kept=kept), same)
    _, _, projection = small_dit(**WIDE, z_dim=24)(x, t, y)
    assert projection.shape == (3, 16, 24)
    fails(lambda: small_dit(**REG, head_depth=1), "--head_depth")
    fails(lambda: small_dit(head_depth=1, head_size=66), "head_size=66")
    cfg = diffusion.Config(model="XL", head_depth=2, head_size=2048)
    with torch.device("meta"):
        model = diffusion.DiT(**diffusion.model_arch(cfg, 768, 16, 1000, 0))
    assert model.blocks[-1].attn.num_heads == 16 and 830 < sum(p.numel() for p in model.parameters()) / 1e6 < 850


def test_wide_head_compiles_whole():
    """No graph break, also where tokens are kept; the same velocities."""
    model = small_dit(**WIDE)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager", dynamic=False)
    torch._dynamo.reset()
    kept = {}
    for _ in range(2):
        torch.testing.assert_close(compiled(*DIT_INPUT[:3], kept=kept), model(*DIT_INPUT[:3]))
    assert list(kept) == [3]


@torch.no_grad()
def test_rae_dit_file():
    """A small DiT^DH in RAE's names, in its time (0 data, 1 noise) and with its Fourier features, gives ours turned
    round; QK norm shows the heads."""
    model = small_dit(**WIDE, fourier=16)
    state = model.state_dict()
    state["t_embedder.freqs"] = state["t_embedder.W"]
    x, t, y = DIT_INPUT[:3]
    want, _ = plain_wide(state, x, 1 - t, y, 3, (2, 4))
    del state["t_embedder.W"]
    state.update({"pos_embed": torch.zeros(1, 16, 32), "dec_feat_rope.freqs_cos": torch.zeros(3)})
    with tempfile.TemporaryDirectory() as folder:
        loaded = saved(f"{folder}/stage2_model.pt", dict(ema=state))(num_heads=2, head_heads=4)
        torch.testing.assert_close(loaded(x, t, y), -want, rtol=1e-4, atol=1e-4)
        model = small_dit(**WIDE, qk_norm=True)
        found = diffusion.official_arch({**model.state_dict(), "pos_embed": torch.zeros(1, 16, 32)})
    expected = dict(WIDE, depth=3, num_heads=2, hidden_size=32, input_size=4, in_channels=8, fourier=0)
    assert {key: found[key] for key in expected} == expected


@torch.no_grad()
def test_reuse():
    """Every K-th evaluation is whole, from the first; between them Euler's and Heun's evaluations run the head alone on
    what was kept, guided halves and the guide each on their own. K = 1 and a model without a head are as ever."""
    model = small_dit(**WIDE)
    guide = small_dit(head_depth=1)
    torch.manual_seed(1)
    x = torch.randn(2, 8, 4, 4)
    y = torch.tensor([3, 1])
    runs = []
    for net in model, guide:
        net.blocks[0].register_forward_hook(lambda block, inputs, output, net=net: runs.append((net, len(output))))
    plain = diffusion.ode(model, x, y, 8)
    assert torch.equal(plain, diffusion.ode(model, x, y, 8, reuse=1)) and len(runs) == 14
    for solver, count in ("euler", 3), ("ab2", 3), ("heun", 5):
        runs.clear()
        z = diffusion.ode(model, x, y, 8, solver=solver, reuse=3, cfg_scale=2.0)
        assert runs == [(model, 4)] * count, (solver, runs)
        runs.clear()
        z = diffusion.ode(model, x, y, 8, solver=solver, reuse=3, cfg_scale=2.0, guide=guide)
        assert runs == [(model, 2), (guide, 2)] * count
    runs.clear()
    diffusion.ode(model, x, y, 9, reuse=4, cfg_scale=2.0, cfg_interval=(0.3, 1.0))  # 0, 1/8, 1/4 unguided
    assert runs == [(model, 2), (model, 4), (model, 4)]

    z = x
    for step in range(7):
        t = torch.full((4,), step / 7)
        if step % 3 == 0:
            kept = {}
        both = torch.cat([y, torch.tensor([10, 10])])
        own, other = model(torch.cat([z, z]), t, both, kept=kept).chunk(2)
        z = z + (other + 2 * (own - other)) / 7
    torch.testing.assert_close(diffusion.ode(model, x, y, 8, reuse=3, cfg_scale=2.0), z)
    assert not torch.allclose(z, diffusion.ode(model, x, y, 8, cfg_scale=2.0), atol=1e-4)
    bare = small_dit()
    assert torch.equal(diffusion.ode(bare, x, y, 8, reuse=3), diffusion.ode(bare, x, y, 8))


def test_dit_in_bf16():
    """Autocast changes a REG model's outputs by less than 3%."""
    model = small_dit(**REG)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(*DIT_INPUT)
    for a, b in zip(low, model(*DIT_INPUT)):
        assert (a - b).norm() < 0.03 * b.norm()


@torch.no_grad()
def test_dit_flops():
    """The count of a forward pass is PyTorch's."""
    from torch.utils.flop_counter import FlopCounterMode
    for arguments in ({}, dict(patch_size=2), REG, WIDE):
        model = small_dit(**arguments)
        counter = FlopCounterMode(display=False)
        with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model(*(part[:1] for part in inputs_of(model)))
        assert abs(model.flops() / counter.get_total_flops() - 1) < 2e-3


# --- sampling ---

class Growth:
    """dx/dt = (1 + cos 3t) x, so x(1) = x(0) exp(1 + sin(3) / 3); it keeps the sizes of the batches it was given."""
    num_classes = 10

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, y):
        self.batches.append(len(x))
        return (1 + torch.cos(3 * t)).view(-1, 1, 1, 1) * x


def test_solvers_converge_with_their_order():
    """Halving the steps halves Euler's error and quarters Heun's and Adams-Bashforth's, for unequal steps, too."""
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    y = torch.zeros(1).long()
    exact = math.exp(1 + math.sin(3) / 3)
    for shift in (0.0, 0.3):
        for solver, order in ("euler", 1), ("heun", 2), ("ab2", 2):
            errors = []
            for steps in (64, 128, 256):
                z = diffusion.ode(Growth(), x, y, steps + 1, solver=solver, timestep_shift=shift)
                errors.append(abs(z.item() - exact))
            rates = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
            assert all(abs(rate - order) < 0.3 for rate in rates), (solver, shift, rates)


def test_solvers_evaluations():
    """num_steps times cost one evaluation less for Euler and Adams-Bashforth, twice that for Heun, and num_steps for
    the SDE; other solvers and too few steps are refused."""
    x = torch.ones(1, 1, 1, 1)
    y = torch.zeros(1).long()
    for solver, evaluations in ("euler", 10), ("ab2", 10), ("heun", 20):
        model = Growth()
        diffusion.ode(model, x, y, 11, solver=solver)
        assert len(model.batches) == evaluations
    model = Growth()
    diffusion.sde(model, x, y, 11)
    assert len(model.batches) == 11
    fails(lambda: diffusion.ode(model, x, y, 10, solver="rk4"), "rk4", "heun")
    fails(lambda: diffusion.ode(model, x, y, 1), "num_steps=1")


def test_solvers_reach_the_data():
    """For Gaussian data N(m, s^2) the velocity is known: samples have that mean and deviation, for the ODE and SDE."""
    m = 0.7
    s = 0.5

    def velocity(x, t, y):  # E[x_1 - x_0 | x_t]
        t = t.view(-1, 1, 1, 1).double()
        variance = t ** 2 * s ** 2 + (1 - t) ** 2
        return m + (t * s ** 2 - (1 - t)) / variance * (x - t * m)

    start = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(20_000).long()
    ode = diffusion.ode(velocity, start, y, 100)
    torch.manual_seed(1)
    sde = diffusion.sde(velocity, start, y, 250)
    for x in (ode, sde):
        assert abs(x.mean() - m) < 0.02 and abs(x.std() - s) < 0.02, (x.mean(), x.std())


def test_guidance_interval():
    """Both solvers: the unconditional half is evaluated, in the same batch, inside the interval alone, in our time (0
    noise, 1 data), with the times after the shift."""
    x = torch.randn(2, 8, 4, 4).double()
    y = torch.tensor([3, 1])

    def batches(solver, **keywords):
        model = Growth()
        solver(model, x, y, 11, cfg_scale=2.0, **keywords)
        return model.batches

    assert batches(diffusion.ode, cfg_interval=(0.55, 1.0)) == [2] * 6 + [4] * 4  # 0, 0.1, ..., 0.9
    assert batches(diffusion.ode, cfg_interval=(0.0, 0.45)) == [4] * 5 + [2] * 5
    assert batches(diffusion.ode, cfg_interval=(0.55, 1.0), timestep_shift=0.1) == [2] * 10  # 0.9 becomes 0.47
    assert batches(diffusion.sde, cfg_interval=(0.5, 1.0)) == [2] * 6 + [4] * 5  # 0, 0.096, ..., 0.96
    assert batches(diffusion.sde, cfg_interval=(0.0, 0.5)) == [4] * 6 + [2] * 5


@torch.no_grad()
def test_guidance():
    """Guidance extrapolates from the null class, autoguidance from another model; the class token has its own scale."""
    x = torch.randn(2, 8, 4, 4)
    y = torch.tensor([3, 1])
    null = torch.tensor([10, 10])
    t = torch.full((2,), 0.4)
    model = small_dit()
    guide = small_dit(depth=1)
    for keywords, other in ({}, model(x, t, null)), (dict(guide=guide), guide(x, t, y)):
        v, = diffusion.guided(model, [x], 0.4, y, cfg_scale=3.0, **keywords)
        torch.testing.assert_close(v, other + 3 * (model(x, t, y) - other))
    model = small_dit(**REG)
    cls = torch.randn(2, 24)
    a, a_cls, _ = model(x, t, y, cls)
    b, b_cls, _ = model(x, t, null, cls)
    for scale, want in (0.0, a_cls), (2.0, b_cls + 2 * (a_cls - b_cls)):
        v, v_cls = diffusion.guided(model, [x, cls], 0.4, y, cfg_scale=3.0, cls_cfg_scale=scale)
        torch.testing.assert_close(v, b + 3 * (a - b))
        torch.testing.assert_close(v_cls, want)


@torch.no_grad()
def test_class_token_moves_along():
    """The ODE integrates REG's class token with the latent; its solvers agree."""
    model = small_dit(**REG)
    x = torch.randn(2, 8, 4, 4)
    cls = torch.randn(2, 24)
    y = torch.tensor([3, 1])
    z = diffusion.ode(model, x, y, 3, cls_noise=cls)
    v, v_cls, _ = model(x, torch.zeros(2), y, cls)
    w, _, _ = model(x + v / 2, torch.full((2,), 0.5), y, cls + v_cls / 2)
    torch.testing.assert_close(z, x + v / 2 + w / 2)
    heun = diffusion.ode(model, x, y, 11, cls_noise=cls, solver="heun")
    torch.testing.assert_close(heun, diffusion.ode(model, x, y, 201, cls_noise=cls), atol=0.05, rtol=0.05)


# --- cache and training, with a tokenizer of random weights and a folder of 72 shapes ---

TINY_LDM = dict(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, attn_levels=())


def tiny_tokenizer(path, seed=0):
    torch.manual_seed(seed)
    tok = tokenizer.Tokenizer(resolution=32, downsample=8, z_dim=4, encoder=TINY_LDM, decoder=TINY_LDM,
                              decoder_kind="ldm", scale_factor=1.0)
    tokenizer.save_checkpoint(path, kind="tokenizer", arch=tok.arch, model=tok.state_dict(), ema={})
    return tokenizer.load_tokenizer(path)


def diffusion_folder(folder):
    """A place to work in: images in data/, a tokenizer in out/ -> a small diffusion.Config for it."""
    shapes = Shapes("train", 32, 72)
    for i in range(len(shapes)):
        pixels, _ = shapes[i]
        path = Path(folder) / "data" / ("train" if i < 48 else "val") / f"{i % 10}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    tiny_tokenizer(f"{folder}/out/tokenizer.pt")
    tiny = dict(out=f"{folder}/out", cache=SHARED, data=f"{folder}/data", depth=2, hidden_size=32, num_heads=2,
                batch_size=16, encode_batch=16, steps=6, warmup=2, val_interval=3, log_interval=1, sample_interval=0,
                save_interval=3, compile=False, projector_dim=16, encoder_depth=1, flip=True)
    return diffusion.Config(**{**diffusion.PRESETS["toy"], **tiny})


def with_diffusion_folder(function):
    """Decorates a test(folder, cfg): such a place, and tiny_vfm in place of the toy's VFM."""
    def wrapped():
        with mock.patch.object(diffusion, "load_vfm", tiny_vfm), tempfile.TemporaryDirectory() as folder:
            function(folder, diffusion_folder(folder))
    wrapped.__name__ = function.__name__
    wrapped.__doc__ = function.__doc__
    return wrapped


def changed(cfg, **fields):
    """The Config with other values of these fields."""
    return dataclasses.replace(cfg, **fields)


def train_diffusion(cfg, **fields):
    """Trains by that Config with other values of these fields -> what it printed."""
    return quiet(diffusion.train, changed(cfg, **fields), WORLD)


class Cache:
    """A latent cache in folder/cache of images by a tokenizer."""

    def __init__(self, folder, cfg):
        self.folder = Path(folder) / "cache"
        self.tok = tokenizer.load_tokenizer(f"{folder}/out/tokenizer.pt")
        self.images = tokenizer.Images(cfg.data, "train", 32)
        self.printed = ""

    def make(self, **keywords):
        """-> the latents, the sizes of the batches that were encoded for them."""
        keywords = dict(dict(dtype="fp32", batch=20, flip=True), **keywords)

        def call():
            nonlocal latents
            latents = diffusion.cache_latents(self.folder, self.tok, self.images, WORLD, **keywords)

        latents = None
        with mock.patch.object(self.tok, "encode", wraps=self.tok.encode) as encode:
            self.printed = quiet(call)
        return latents, [len(each.args[0]) // 2 for each in encode.call_args_list]


@with_diffusion_folder
def test_latent_cache_holds_both_images(folder, cfg):
    """Row 2i is image i's, row 2i + 1 its mirror image's: latents, the VFM's tokens. The statistics are theirs."""
    cache = Cache(folder, cfg)
    vfm = tiny_vfm("toy")
    latents, _ = cache.make(vfm=vfm, grid=4)
    x = tokenizer.to_float(torch.stack([cache.images[i][0] for i in range(48)]))
    for mirror, pictures in (0, x), (1, x.flip(-1)):
        got = latents.read(torch.arange(48), torch.full((48,), mirror))
        want = dict(latents=cache.tok.encode(pictures)[0], features=vfm(pictures, cls=True)[0],
                    labels=torch.from_numpy(cache.images.labels))
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-4)
    cache.folder = cache.folder / "upright"
    upright, _ = cache.make(flip=False)
    assert len(upright.arrays["latents"]) == 48
    for name, value in upright.read(torch.arange(48), 0).items():
        torch.testing.assert_close(value, latents.read(torch.arange(48), 0)[name], atol=1e-5, rtol=1e-4)
    everything = latents.arrays["latents"].double()
    std = everything.std((0, 2, 3), unbiased=False)
    torch.testing.assert_close(latents.mean.double(), everything.mean((0, 2, 3)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(latents.std.double(), std, atol=1e-6, rtol=1e-5)


@with_diffusion_folder
def test_latent_cache_mirrors_as_images_do(folder, cfg):
    """For the same item the cache gives the mirror image's latent exactly where Images(flip=True) mirrors."""
    cache = Cache(folder, cfg)
    latents, _ = cache.make()
    items = [(5, (0, k)) for k in range(20)]  # of step_batches
    flipped = tokenizer.Images(cfg.data, "train", 32, flip=True)
    mirrored = [not torch.equal(flipped[item][0], cache.images[5][0]) for item in items]
    assert 0 < sum(mirrored) < 20
    for row, mirror in zip(latents.__getitems__(items)["latents"], mirrored):
        assert torch.equal(row, latents.arrays["latents"][10 + mirror])


@with_diffusion_folder
def test_latent_cache_precision(folder, cfg):
    """bf16 and fp16 hold the latents to their precision; another precision is encoded anew."""
    cache = Cache(folder, cfg)
    exact = cache.make()[0].arrays["latents"].clone()
    for name, dtype, bound in ("bf16", torch.bfloat16, 4e-3), ("fp16", torch.float16, 5e-4):
        low, encoded = cache.make(dtype=name)
        low = low.arrays["latents"]
        assert low.dtype == dtype and sum(encoded) == 48
        assert ((low.float() - exact).abs() <= bound * exact.abs() + 1e-6).all()


@with_diffusion_folder
def test_latent_cache_is_used_again(folder, cfg):
    """What is there is used, a part of it, too; after another tokenizer, image or file it is made anew."""
    cache = Cache(folder, cfg)
    everything = dict(vfm=tiny_vfm("toy"), grid=4)
    assert sum(cache.make(**everything)[1]) == 48
    assert not cache.make(**everything)[1]
    assert not cache.make()[1]
    with torch.no_grad():
        cache.tok.adapter.conv_in.weight[0, 0, 0, 0] += 1e-6
    assert sum(cache.make()[1]) == 48 and "anew" in cache.printed
    next(Path(cfg.data, "train", "3").glob("*.png")).unlink()
    cache.images = tokenizer.Images(cfg.data, "train", 32)
    latents, encoded = cache.make()
    assert len(latents) == 47 and sum(encoded) == 47
    # one file of another size, which is not among the 16 whose pixels are looked at
    Image.new("RGB", (32, 32), "red").save(os.fsdecode(cache.images.source[1]))
    assert sum(cache.make()[1]) == 47 and "anew" in cache.printed


@with_diffusion_folder
def test_latent_cache_survives_a_kill(folder, cfg):
    """Killed in the middle, it is not complete, and the next call encodes the rest alone."""
    cache = Cache(folder, cfg)
    whole = cache.make()[0].arrays["latents"].clone()
    shutil.rmtree(cache.folder)
    encode = cache.tok.encode
    batches = []

    def die(x):
        batches.append(len(x) // 2)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return encode(x)

    with mock.patch.object(cache.tok, "encode", die), contextlib.suppress(KeyboardInterrupt):
        cache.make()
    assert batches == [20, 20, 8]
    assert not tokenizer.read_json(cache.folder / "meta.json")["complete"]
    latents, encoded = cache.make()
    assert encoded == [8] and torch.equal(latents.arrays["latents"], whole)


@with_diffusion_folder
def test_latent_cache_refuses(folder, cfg):
    """Constant and non-finite channels, a folder that holds something else, and a full disk."""
    cache = Cache(folder, cfg)
    cache.tok.adapter.quant_conv.weight[0] = 0
    fails(cache.make, "channels [0]", "constant")
    cache.tok.adapter.quant_conv.weight[0] = float("nan")
    fails(cache.make, "not finite")
    cache.folder = Path(cfg.data, "train")  # --latents=DATA must not cost the data
    fails(cache.make, "something else", "--latents")
    assert len(tokenizer.list_images(cache.folder)) == 48
    cache.folder = Path(folder, "other")
    with mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=10)):
        fails(cache.make, "GB", "free")


def tensors(entry):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(entry) if torch.is_tensor(leaf)]


def load(path):
    return torch.load(path, weights_only=True)


def log_lines(out):
    """The lines of the log without their rates, which differ from run to run."""
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


@with_diffusion_folder
def test_diffusion_resumes_exactly(folder, cfg):
    """With everything random in play (class token, dropout, accumulation), 6 steps equal 3 and then 3, bit for bit,
    logs included; --keep keeps each checkpoint."""
    cfg = changed(cfg, align="reg", arch="sit", accumulate=2, keep=True)
    train_diffusion(cfg)
    path = Path(cfg.out, "diffusion.pt")
    whole = load(path)
    lines = log_lines(cfg.out)
    assert (whole["kind"], whole["step"], whole["images"]) == ("diffusion", 6, 96)
    for a, b in zip(tensors(whole["model"]), tensors(whole["ema"])):
        assert not torch.equal(a, b)
    os.replace(f"{cfg.out}/diffusion-3.pt", path)  # as if it had been killed
    assert "from step 3" in train_diffusion(cfg)
    again = load(path)
    kept = load(f"{cfg.out}/diffusion-6.pt")
    for part in ("model", "ema", "optimizer"):
        for a, b, c in zip(tensors(whole[part]), tensors(again[part]), tensors(kept[part]), strict=True):
            assert torch.equal(a, b) and torch.equal(b, c), part
    assert lines == log_lines(cfg.out) and [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    names = {"loss", "velocity", "cosine", "cls", "repa", "val_velocity", "val_repa", "grad_norm", "epoch", "lr"}
    assert names <= lines[5].keys()
    train_diffusion(cfg, steps=7, beta2=0.5)
    groups = load(path)["optimizer"]["param_groups"]
    assert all(tuple(group["betas"]) == (0.9, 0.5) for group in groups)  # this run's


@with_diffusion_folder
def test_diffusion_resumes_only_its_own_run(folder, cfg):
    """A finished run says so; another model, tokenizer or kind of latents is refused; --resume=0 starts afresh. The
    grids are written."""
    train_diffusion(cfg, sample_interval=6)
    assert Path(cfg.out, "grids", "diffusion-0000006.png").exists()
    assert "has its 6 steps" in train_diffusion(cfg)
    fails(lambda: train_diffusion(cfg, hidden_size=64), "hidden_size 32, now 64", "--resume=0")
    fails(lambda: train_diffusion(cfg, seed=1), "seed 0, now 1")
    train_diffusion(cfg, head_depth=1, out=f"{folder}/head", tokenizer=f"{cfg.out}/tokenizer.pt", steps=1)
    fails(lambda: train_diffusion(cfg, out=f"{folder}/head", tokenizer=f"{cfg.out}/tokenizer.pt"),
          "head_depth 1, now 0", "--resume=0")
    rows = {path: path.stat().st_mtime_ns for path in Path(cfg.out).rglob("*.npy")}
    fails(lambda: train_diffusion(cfg, image_size=34), "34 x 34: sides must be multiples")
    assert rows and all(path.stat().st_mtime_ns == then for path, then in rows.items())  # a slip costs no cache
    tiny_tokenizer(f"{cfg.out}/tokenizer.pt", seed=1)
    fails(lambda: train_diffusion(cfg), "latents", "another run")
    train_diffusion(cfg, resume=False, steps=1)
    assert load(f"{cfg.out}/diffusion.pt")["step"] == 1


@with_diffusion_folder
def test_spoiled_diffusion_is_not_resumed(folder, cfg):
    """... in one line that names the file."""
    train_diffusion(cfg, steps=1)
    entries = torch.load(f"{cfg.out}/diffusion.pt", weights_only=True)  # not mapped: it is written again
    for key in ("config", "arch", "latents", "step", "model", "ema", "optimizer"):
        for spoilt in ({k: v for k, v in entries.items() if k != key}, dict(entries, **{key: torch.ones(2)})):
            tokenizer.save_checkpoint(f"{cfg.out}/diffusion.pt", **spoilt)
            fails(lambda: train_diffusion(cfg), "diffusion.pt")
    for key, part in dict(model={}, ema={"x": 1}, optimizer={"state": 3}).items():
        tokenizer.save_checkpoint(f"{cfg.out}/diffusion.pt", **dict(entries, **{key: part}))
        fails(lambda: train_diffusion(cfg), "diffusion.pt")


@with_diffusion_folder
def test_alignment_features_cached_or_not(folder, cfg):
    """The VFM's tokens from the cache and on the fly, of image and mirror image, give the same losses."""
    logs = []
    for cached in (True, False):
        out = f"{folder}/{cached}"
        train_diffusion(cfg, align="repa", cache_dtype="fp32", cache_features=cached, out=out, steps=3,
                        tokenizer=f"{folder}/out/tokenizer.pt")
        logs.append(log_lines(out))
        assert Path(out, "latents", "train-flip", "features.npy").exists() == cached
    for a, b in zip(*logs):
        assert a["repa"] != 0
        assert abs(a["repa"] - b["repa"]) < 1e-4 and abs(a["velocity"] - b["velocity"]) < 1e-4
    fails(lambda: train_diffusion(cfg, align="repa", encoder_depth=3), "--encoder_depth=3")
    fails(lambda: train_diffusion(cfg, num_heads=5), "num_heads=5")
    fails(lambda: train_diffusion(cfg, patch_size=3), "patch_size=3")


TINY_DIT = dict(input_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=3)


def learn_classes(**arch):
    """300 steps on latents [4, 2, 2] that are a constant a class, and a little noise -> the constants, the EMA."""
    torch.manual_seed(0)
    cfg = diffusion.Config(**{**diffusion.PRESETS["toy"], "lr": 3e-3, "warmup": 10, "compile": False, "ema": 0.98})
    means = torch.randn(3, 4, 1, 1)
    parts = diffusion.build(cfg, WORLD, dict(TINY_DIT, **arch))
    errors = []
    for step in range(300):
        labels = torch.randint(3, (32,))
        latents = means[labels] + 0.1 * torch.randn(32, 4, 2, 2)
        batch = dict(latents=latents, labels=labels, tokens=None)
        errors.append(diffusion.train_step(*parts, [batch], cfg, WORLD, step)["velocity"].item())
    assert errors[-1] < 0.35 * errors[0], errors[::50]
    return means, parts[2]


def test_diffusion_learns():
    """The velocity error falls, samples are of their class."""
    means, ema = learn_classes()
    y = torch.arange(3).repeat(20)
    with torch.no_grad():
        z = diffusion.ode(ema, torch.randn(60, 4, 2, 2), y, 30, solver="heun")
    nearest = (z.mean((2, 3))[:, None] - means[None, :, :, 0, 0]).norm(dim=2).argmin(1)
    assert (nearest == y).float().mean() > 0.95


def test_train_step_is_the_objective():
    """One step of two micro-batches: its gradient norm is that of the weighted sum of flow_losses, averaged over both,
    and the EMA moves by 1 - decay towards the new weights."""
    cfg = diffusion.Config(compile=False, accumulate=2, class_dropout=0.0, cosine_weight=0.3, ema=0.9, clip=0.0)
    model, parallel, ema, optimizer = diffusion.build(cfg, WORLD, TINY_DIT)
    plain = copy.deepcopy(model)
    before = copy.deepcopy(ema)
    batches = []
    for labels in ([0, 1], [2, 0]):
        batches.append(dict(latents=torch.randn(2, 4, 2, 2), labels=torch.tensor(labels), tokens=None))
    drawn = []

    def recorded(model, *arguments):
        drawn.append(arguments)
        return flow_losses(model, *arguments)

    flow_losses = diffusion.flow_losses
    with mock.patch.object(diffusion, "flow_losses", recorded):
        losses = diffusion.train_step(model, parallel, ema, optimizer, batches, cfg, WORLD, 0)
    total = 0
    for arguments in drawn:
        terms = flow_losses(plain, *arguments)
        total = total + (terms["velocity"] + 0.3 * terms["cosine"]).mean() / 2
    total.backward()
    norm = torch.stack([p.grad.norm() for p in plain.parameters()]).norm()
    torch.testing.assert_close(losses["loss"], total.detach())
    torch.testing.assert_close(losses["grad_norm"], norm)
    assert any(not torch.equal(old, new) for old, new in zip(plain.parameters(), model.parameters()))
    for old, average, new in zip(before.parameters(), ema.parameters(), model.parameters()):
        torch.testing.assert_close(average, 0.9 * old + 0.1 * new)


def test_learning_rate():
    """Linear warm-up, constant, then a linear fall over the last share of the steps; without either it is constant."""
    cfg = diffusion.Config(lr=1.0, warmup=10, cooldown=0.5, steps=100)
    rates = [diffusion.learning_rate(cfg, step) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:50], 1)
    np.testing.assert_allclose(rates[50:], np.arange(50, 0, -1) / 50)
    assert {diffusion.learning_rate(changed(cfg, warmup=0, cooldown=0.0), step) for step in range(100)} == {1.0}


def test_time_distributions():
    """Logit-normal(0, 1) times until `uniform_from`, uniform ones from it and with times=uniform."""
    torch.manual_seed(0)
    cfg = diffusion.Config(uniform_from=10)
    model = small_dit()
    logit = torch.logit(diffusion.draw_times(50_000, 9, cfg, model))
    assert abs(logit.mean()) < 0.02 and abs(logit.std() - 1) < 0.02
    for step, config in (10, cfg), (0, diffusion.Config(times="uniform")):
        t = diffusion.draw_times(50_000, step, config, model)
        assert abs(t.mean() - 0.5) < 0.005 and abs(t.std() - 12 ** -0.5) < 0.005


@torch.no_grad()
def test_times_shifted_by_dimension():
    """RAE's shift, in training and sampling: of 1 - t by alpha = sqrt(numbers / base), in its time; latents of no more
    numbers than the base keep their times, bit for bit, with or without the flag."""
    model = small_dit()  # 8 x 4 x 4 = 128 numbers
    drawn = []
    for base in 0, 128, 1000, 32:
        torch.manual_seed(0)
        drawn.append(diffusion.draw_times(1000, 0, diffusion.Config(train_shift=base), model))
    torch.manual_seed(0)
    plain = torch.randn(1000).sigmoid()
    for t in drawn[:3]:
        assert torch.equal(t, plain)
    noisy = 1 - plain  # alpha = 2
    torch.testing.assert_close(1 - drawn[3], 2 * noisy / (1 + (2 - 1) * noisy))
    x = torch.randn(2, 8, 4, 4)
    y = torch.tensor([3, 1])
    z = diffusion.ode(model, x, y, 6, train_shift=32)
    assert torch.equal(z, diffusion.ode(model, x, y, 6, timestep_shift=0.5))
    assert torch.equal(diffusion.ode(model, x, y, 6, train_shift=128), diffusion.ode(model, x, y, 6))
    published = mock.Mock(in_channels=768, input_size=16)  # alpha = 6.93
    for shift in np.arange(0.05, 4, 0.05):
        assert diffusion.shift_times(1.0, shift) == 1  # which guidance's interval holds
    t = diffusion.shift_times(torch.tensor(0.5), 0, 4096, published)
    torch.testing.assert_close(t, torch.tensor(1 / (1 + 6.9282)))


def test_losses_reach_what_they_should():
    """For joint training: the alignment loss reaches the latents; the terms come apart, so that the velocity loss need
    not."""
    model = small_dit(**REG)
    latents = torch.randn(3, 8, 4, 4, requires_grad=True)
    losses = diffusion.flow_losses(model, latents, torch.tensor([1, 2, 3]), torch.tensor([0.2, 0.5, 0.8]),
                                   torch.randn(3, 8, 4, 4), torch.randn(3, 17, 24), torch.randn(3, 24))
    shapes = {name: tuple(value.shape) for name, value in losses.items()}
    assert shapes == dict.fromkeys(("velocity", "cosine", "cls", "repa"), (3,))
    grad, = torch.autograd.grad(losses["repa"].sum(), latents, retain_graph=True)
    assert grad.abs().sum() > 0
    (losses["velocity"] + losses["cls"]).sum().backward(inputs=list(model.parameters()))
    assert latents.grad is None and model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


@with_diffusion_folder
def test_rae_decoders_on_the_command_line(folder, cfg):
    """FILE::VFM is a tokenizer for sample.py, diffusion.py, and for samples of the model trained on it, whose name of
    the decoder holds where both have moved together; other tokenizers have their encoders inside."""
    rae = Path(folder, "rae")
    rae.mkdir()
    path, vfm, *_ = rae_files(folder)
    pair = f"{shutil.move(path, rae)}::{vfm}"
    images = Path(folder, "images")
    images.mkdir()
    pixels = Shapes("train", 32)[0][0]
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(images / "0.png")
    command(sample, f"--reconstruct={images}", f"--tokenizer={pair}", f"--out={folder}/again")
    tok = tokenizer.load_tokenizer(pair)
    with torch.no_grad():
        want = tokenizer.to_uint8(tok.decode(tok.encode(tokenizer.to_float(pixels[None]))[0]))[0]
    found = np.asarray(Image.open(f"{folder}/again/reconstructions/0.png"))
    assert (np.abs(found.astype(int) - want.permute(1, 2, 0).numpy()) <= 1).all()

    train_diffusion(cfg, tokenizer=pair, out=str(rae), latents=f"{folder}/rae-latents", steps=1, align="none")
    sampled = []
    for place in rae, Path(folder, "moved"):
        rae = rae.rename(place)
        command(sample, f"--ckpt={rae}/diffusion.pt", f"--out={rae}", "--preset=toy", "--n=2", "--num_steps=3")
        sampled.append([path.read_bytes() for path in sorted(rae.glob("samples/*.png"))])
    assert len(sampled[0]) == 2 and sampled[0] == sampled[1]
    (subject,), _ = align.load_subjects([f"{rae}/model.pt::{vfm}"], WORLD)
    assert subject.tokenizer.vfm is not None
    fails(lambda: tokenizer.load_tokenizer(f"{folder}/out/tokenizer.pt::toy"), "no decoder of RAE", "toy")
    fails(lambda: command(sample, f"--reconstruct={images}", f"--tokenizer={rae}/model.pt::dino"), "dino")


@with_diffusion_folder
def test_rae_latents_are_normalised_by_position(folder, cfg):
    """RAE's latents, cached, trained on and sampled: mean and deviation of each position and channel of the cache are
    0 and 1; generate undoes them; the published statistics' form is read."""
    with mock.patch.object(tokenizer, "load_vfm", tiny_vfm):
        tok, _ = tokenizer.build_tokenizer(tiny_config(folder, method="rae"))
    path = f"{folder}/out/tokenizer.pt"
    tokenizer.save_checkpoint(
        path, kind="tokenizer", arch=tok.arch, model=tok.state_dict(), ema={}, stage=1, images=0, classes=[],
        config=dataclasses.asdict(tiny_config(folder, method="rae")))
    train_diffusion(cfg, steps=2, cache_dtype="fp32")
    entries = load(f"{cfg.out}/diffusion.pt")
    mean, std = entries["latent_mean"], entries["latent_std"]
    assert mean.shape == std.shape == (128, 4, 4)
    labels = Shapes("train").labels
    latents = diffusion.Latents(f"{cfg.out}/latents/train-flip", ["latents"], labels)
    z = diffusion.normalise_rows(latents.read(torch.arange(48).repeat(2), torch.arange(96) // 48), mean, std)["latents"]
    torch.testing.assert_close(z.mean(0), torch.zeros_like(mean), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones_like(mean), atol=1e-3, rtol=0)
    model = diffusion.load_diffusion(f"{cfg.out}/diffusion.pt")
    decoded = []
    with mock.patch.object(tok, "decode", lambda z: decoded.append(z) or torch.zeros(len(z), 3, 32, 32)):
        with mock.patch.object(diffusion, "ode", lambda *arguments, **keywords: z[:16]):
            diffusion.generate(model, tok, mean, std, range(16), torch.zeros(16).long(), diffusion.Sampling(), WORLD)
    raw = latents.read(torch.arange(16), torch.zeros(16).long())["latents"]
    torch.testing.assert_close(decoded[0], raw.float(), rtol=1e-4, atol=1e-4)
    plain = dict(sample.PRESETS["toy"], out=cfg.out, n=2, num_steps=3, compile=False)
    write_samples(sample.Config(**plain))
    assert len(sampled(cfg.out)) == 2
    torch.save(dict(mean=mean, var=std.square() - 1e-5), f"{folder}/stat.pt")  # RAE's published form
    with mock.patch.object(align, "load_vfm", tiny_vfm), torch.no_grad():  # aligned at other sizes, too
        subjects, vfms = align.load_subjects([f"{cfg.out}/diffusion.pt"], WORLD)
        for side in 32, 24:
            features = dict(align.pooled_features(subjects, vfms, torch.randn(2, 3, side, side)))
            assert features[f"{cfg.out}/diffusion.pt", "block 2"].isfinite().all()
    found = sample.load_pipeline(sample.Config(**plain, latent_stats=f"{folder}/stat.pt"), WORLD)[3:]
    torch.testing.assert_close(list(found), [mean, std])


def test_geodesic():
    """The sphere's path: from noise to data, norm sqrt(C) everywhere; velocity tangent, of constant length and the
    path's numerical derivative; the closed form sin((1 - t) a) z0 / sin a + sin(t a) z1 / sin a; defined where both
    ends are nearly one and nearly opposite."""
    torch.manual_seed(0)
    noise, data = torch.randn(2, 3, 6, 4, 4, dtype=torch.float64) * 3
    z0 = diffusion.to_sphere(noise)
    z1 = diffusion.to_sphere(data)
    torch.testing.assert_close(z0.norm(dim=1), torch.full((3, 4, 4), 6 ** 0.5).double())
    for t, end in (0.0, z0), (1.0, z1):
        torch.testing.assert_close(diffusion.geodesic(noise, data, torch.tensor(t).double())[0], end)
    t = torch.tensor([0.1, 0.5, 0.93]).double().view(3, 1, 1, 1)
    x, u = diffusion.geodesic(noise, data, t)
    a = torch.acos((z0 * z1).sum(1, keepdim=True) / 6)
    torch.testing.assert_close(x, (torch.sin((1 - t) * a) * z0 + torch.sin(t * a) * z1) / torch.sin(a))
    torch.testing.assert_close(x.norm(dim=1), torch.full((3, 4, 4), 6 ** 0.5).double())
    torch.testing.assert_close((x * u).sum(1), torch.zeros(3, 4, 4).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(u.norm(dim=1, keepdim=True), 6 ** 0.5 * a)
    after, before = (diffusion.geodesic(noise, data, t + h)[0] for h in (1e-5, -1e-5))
    torch.testing.assert_close(u, (after - before) / 2e-5, rtol=1e-8, atol=1e-8)
    for end in z0 + 1e-3 * z1, -z0 + 1e-3 * z1:
        x, u = diffusion.geodesic(z0.float(), end.float(), t.float())
        torch.testing.assert_close(x.norm(dim=1), torch.full((3, 4, 4), 6 ** 0.5), rtol=1e-3, atol=0)
        assert u.isfinite().all() and (u * x).sum(1).abs().max() < 1e-2


@torch.no_grad()
def test_geodesic_steps():
    """A step with the field of constant speed is exact, however long, whatever radial part is added; the ODE of any
    number of steps ends at the data, on the sphere; solvers that leave it are refused."""
    torch.manual_seed(0)
    z0, z1 = (diffusion.to_sphere(torch.randn(2, 6, 4, 4, dtype=torch.float64)) for _ in range(2))
    (x, u), (after, _) = (diffusion.geodesic(z0, z1, torch.tensor(t).double()) for t in (0.25, 1.0))
    torch.testing.assert_close(diffusion.geodesic_step(x, 0.75 * (u + 3 * x)), after)
    torch.testing.assert_close(diffusion.geodesic_step(x, 0 * u), x)

    class Field:
        sphere = True

        def __call__(self, x, t, y):
            return diffusion.geodesic(z0, z1, t.double().view(-1, 1, 1, 1))[1]

    y = torch.zeros(2).long()
    for steps in 2, 5, 30:
        z = diffusion.ode(Field(), 5 * z0, y, steps)
        torch.testing.assert_close(z, z1, rtol=1e-5, atol=1e-5)  # times are float32
    model = small_dit(sphere=True)
    y = torch.tensor([3, 1])
    noise = torch.randn(2, 8, 4, 4)
    z = diffusion.ode(model, noise, y, 20, cfg_scale=3.0, cfg_interval=(0.2, 1.0))
    torch.testing.assert_close(z.norm(dim=1), torch.full((2, 4, 4), 8 ** 0.5))
    assert not torch.allclose(z, diffusion.to_sphere(noise), atol=1e-3)
    own, other = (model(diffusion.to_sphere(noise), torch.zeros(2), each) for each in (y, torch.tensor([10, 10])))
    v = other + 3 * (own - other)
    want = diffusion.geodesic_step(diffusion.to_sphere(noise), v)
    torch.testing.assert_close(diffusion.ode(model, noise, y, 2, cfg_scale=3.0), want)
    for solver in "heun", "ab2", "sde":
        fails(lambda: diffusion.ode(model, noise, y, 5, solver=solver), solver, "--path=sphere", "euler")
    fails(lambda: diffusion.sde(model, noise, y, 5), "--path=sphere", "euler")


def test_sphere_losses():
    """The objective written out: squared error of v's tangent part and a tenth of the radial part's square; cosine of
    the tangent part; the class token's path stays straight."""
    model = small_dit(sphere=True, **REG)
    torch.manual_seed(1)
    z1, z0 = torch.randn(2, 3, 8, 4, 4)
    t = torch.tensor([0.2, 0.5, 0.8])
    y = torch.tensor([1, 2, 3])
    tokens, cls_noise = torch.randn(3, 17, 24), torch.randn(3, 24)
    found = diffusion.flow_losses(model, z1, y, t, z0, tokens, cls_noise, True)
    x, u = diffusion.geodesic(z0, z1, t.view(3, 1, 1, 1))
    v, v_cls, _ = model(x, t, y, torch.lerp(cls_noise, tokens[:, 0], t[:, None]))
    unit = x / x.norm(dim=1, keepdim=True)
    radial = (v * unit).sum(1, keepdim=True) * unit
    assert radial.abs().max() > 0.01
    error = (v - radial - u).square().sum(1) + 0.1 * radial.square().sum(1)
    torch.testing.assert_close(found["velocity"], error.mean((1, 2)) / 8)
    torch.testing.assert_close(found["cosine"], 1 - F.cosine_similarity(v - radial, u, dim=1).mean((1, 2)))
    torch.testing.assert_close(found["cls"], (v_cls - tokens[:, 0] + cls_noise).square().mean(1))


def test_sphere_learns():
    """On the sphere a class is a direction: geodesic samples are of theirs."""
    means, ema = learn_classes(sphere=True)
    y = torch.arange(3).repeat(20)
    with torch.no_grad():
        z = diffusion.ode(ema, torch.randn(60, 4, 2, 2), y, 30)
    torch.testing.assert_close(z.norm(dim=1), torch.full((60, 2, 2), 2.0))
    cosines = F.cosine_similarity(z.mean((2, 3))[:, None], means[None, :, :, 0, 0], dim=2)
    assert (cosines.argmax(1) == y).float().mean() > 0.95


@with_diffusion_folder
def test_sphere_trains_and_samples(folder, cfg):
    """diffusion.py --path=sphere, with REG: a checkpoint with the tokens' norm and no other statistics, resumed by its
    own path alone; sample.py and align.py go by the checkpoint; other solvers, guides, joint training are refused."""
    train_diffusion(cfg, path="sphere", align="reg", steps=4, save_interval=2, sample_interval=2, cache_dtype="fp32")
    path = f"{cfg.out}/diffusion.pt"
    entries = load(path)
    latents = np.load(f"{cfg.out}/latents/train-flip/latents.npy")
    norm = np.sqrt(np.square(latents.astype(np.float64)).sum(1).mean())
    assert entries["config"]["path"] == "sphere" and not entries["latent_mean"].any()
    np.testing.assert_allclose(entries["latent_std"] * 4 ** 0.5, np.full(4, norm), rtol=1e-5)
    fails(lambda: train_diffusion(cfg, align="reg", steps=6), "path sphere, now linear")
    train_diffusion(cfg, path="sphere", align="reg", steps=6)
    assert load(path)["step"] == 6

    plain = dict(sample.PRESETS["toy"], out=cfg.out, n=3, num_steps=5, compile=False, solver="euler")
    decoded = []
    decode = tokenizer.Tokenizer.decode
    with mock.patch.object(tokenizer.Tokenizer, "decode", lambda tok, z: decoded.append(z) or decode(tok, z)):
        write_samples(sample.Config(**plain))
    np.testing.assert_allclose(decoded[0].norm(dim=1), np.full((16, 4, 4), norm), rtol=1e-4)
    for solver in "ab2", "heun", "sde":
        fails(lambda: write_samples(sample.Config(**dict(plain, solver=solver))), solver, "euler")
    assert len(list(Path(cfg.out, "samples").glob("*.png"))) == 3  # the older samples stay
    entries = load(path)
    torch.save(dict(entries, latent_std=2 * entries["latent_std"]), f"{folder}/other.pt")
    fails(lambda: write_samples(sample.Config(**plain, guide=f"{folder}/other.pt")), "other latents")
    torch.save(dict(entries, arch=dict(entries["arch"], sphere=False)), f"{folder}/straight.pt")
    fails(lambda: write_samples(sample.Config(**plain, guide=f"{folder}/straight.pt")), "sphere")
    write_samples(sample.Config(**plain, guide=path))

    with mock.patch.object(align, "load_vfm", tiny_vfm), torch.no_grad():
        (subject,), vfms = align.load_subjects([path], WORLD)
        dit, = subject.networks.values()
        read = []
        dit.x_embedder["proj"].register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
        vfms["toy"] = tiny_vfm("toy")
        dict(align.pooled_features([subject], vfms, torch.randn(2, 3, 32, 32)))
    np.testing.assert_allclose(read[0].norm(dim=1), np.full((2, 4, 4), 2.0), rtol=1e-5)
    joint = align.Config(**{**align.PRESETS["toy"], "out": cfg.out, "steps": 1})
    fails(lambda: align.train_jointly(joint, [path], WORLD), "--path=sphere", "joint training")
    with mock.patch.object(Shapes, "lengths", dict(train=64, val=32)):
        train_diffusion(cfg, path="sphere", text="toy", data="shapes", steps=1)
    command(sample, f"--out={cfg.out}", "--num_steps=4", "--compile=0", "--n=2", "--solver=euler",
            f"--prompt={Shapes('val').caption(0)}")
    assert len(sampled(cfg.out)) == 2


@with_diffusion_folder
def test_wide_head_trains_and_samples(folder, cfg):
    """diffusion.py --head_depth --head_size, with REPA; sample.py --reuse, which a model without a head refuses."""
    train_diffusion(cfg, head_depth=1, head_size=64, align="repa", steps=2, train_shift=16)
    plain = dict(sample.PRESETS["toy"], out=cfg.out, n=2, num_steps=5, compile=False, reuse=2)
    write_samples(sample.Config(**plain))
    assert len(sampled(cfg.out)) == 2 and load(f"{cfg.out}/diffusion.pt")["arch"]["head_size"] == 64
    train_diffusion(cfg, out=f"{folder}/plain", tokenizer=f"{folder}/out/tokenizer.pt", steps=1)
    fails(lambda: write_samples(sample.Config(**dict(plain, out=f"{folder}/plain"))), "--reuse=2", "--head_depth")


@with_diffusion_folder
def test_validation_is_comparable(folder, cfg):
    """The same numbers for any batch size, whatever the state of the generator."""
    cache = Cache(folder, cfg)
    val, _ = cache.make(indices=np.arange(0, 24, 2))
    model = small_dit(in_channels=4).eval()
    mean = val.mean.view(-1, 1, 1)
    std = val.std.view(-1, 1, 1)
    a, b = (diffusion.validate(model, val, mean, std, WORLD, batch) for batch in (5, 12))
    assert len(val) == 12 and a.keys() == {"val_velocity", "val_cosine"}
    for name in a:
        assert abs(a[name] - b[name]) < 1e-5


def test_diffusion_bench():
    """--bench=2 takes 3 + 2 training steps of `accumulate` batches and reports 3 forward passes' FLOPs an image."""
    cfg = diffusion.Config(bench=2, depth=1, hidden_size=32, num_heads=2, batch_size=4, accumulate=2,
                           compile=False, align="reg", align_vfm="toy", projector_dim=16, encoder_depth=1)
    model = diffusion.DiT(**diffusion.model_arch(cfg, 32, 16, 1000, tokenizer.TOY_VIT["embed_dim"]))
    with mock.patch.object(diffusion, "train_step", wraps=diffusion.train_step) as steps:
        result = json.loads(quiet(diffusion.bench, cfg, WORLD))
    assert len(steps.call_args_list) == 5
    assert [len(batch["labels"]) for batch in steps.call_args.args[4]] == [2, 2]
    flops = result["tflops"] / result["images_per_second"] * 1e12
    assert result["images"] == 4 and abs(flops / (3 * model.flops()) - 1) < 1e-3


def test_image_noise():
    """An image's stream depends on the seed and its index alone, and goes on from call to call."""
    like = torch.empty(2, 3, dtype=torch.float64)
    noises = diffusion.ImageNoise(0, [5, 7])
    first = noises(like)
    second = noises(like)
    assert torch.equal(diffusion.ImageNoise(0, [7])(like[:1])[0], first[1])
    assert len({*first.flatten().tolist(), *second.flatten().tolist()}) == 12
    assert not torch.equal(diffusion.ImageNoise(1, [5, 7])(like), first)


# --- sample.py ---

def sampled(folder):
    """The PNGs in folder/samples: their bytes by name."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder, "samples").glob("*.png"))}


def write_samples(cfg, **fields):
    """Samples by that Config with other values of these fields -> what was printed."""
    return quiet(sample.write_samples, changed(cfg, **fields), WORLD)


def with_samples(function):
    """Decorates a test(folder, cfg): a small REG model in out/, away from the zero velocity of the start, and a
    sample.Config for it."""
    @with_diffusion_folder
    def wrapped(folder, cfg):
        train_diffusion(cfg, align="reg", arch="sit", steps=1)
        entries = load(f"{cfg.out}/diffusion.pt")
        for value in entries["ema"].values():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(value))) * 0.1)
        torch.save(entries, f"{cfg.out}/diffusion.pt")
        tiny = dict(out=cfg.out, n=17, num_steps=4, compile=False)
        function(folder, sample.Config(**{**sample.PRESETS["toy"], **tiny}))
    wrapped.__name__ = function.__name__
    wrapped.__doc__ = function.__doc__
    return wrapped


@with_samples
def test_samples_depend_on_their_index_alone(folder, cfg):
    """Any batch size gives the same images, for the ODE and the SDE; the images differ."""
    sets = []
    for solver in ("ab2", "sde"):
        for batch in (1, 7, 17):
            shutil.rmtree(f"{cfg.out}/samples", ignore_errors=True)
            write_samples(cfg, solver=solver, batch_size=batch)
            sets.append(sampled(cfg.out))
            assert len(set(sets[-1].values())) == 17
    assert sets[0] == sets[1] == sets[2] and sets[3] == sets[4] == sets[5] and sets[0] != sets[3]


@with_samples
def test_sample_files(folder, cfg):
    """PNGs, labels.json, an .npz of the same pixels, and a grid of whole rows."""
    write_samples(cfg)
    out = Path(cfg.out)
    with np.load(out / "samples.npz") as archive:
        pixels = archive["arr_0"]
    assert pixels.dtype == np.uint8 and pixels.shape == (17, 32, 32, 3)
    assert np.array_equal(pixels[5], np.asarray(Image.open(out / "samples" / "000005.png")))
    labels = json.loads((out / "samples" / "labels.json").read_text())
    assert labels == {f"{i:06d}.png": i % 10 for i in range(17)}
    cell = np.array([32 * 3 + 2, 32 * 3 + 2 + 12])  # of save_grid: magnified, with a gap and a label
    for classes, n, columns, rows in ((), 17, 10, 1), ((0, 1, 2, 3, 4), 13, 5, 2), ((), 3, 10, 1):
        write_samples(cfg, classes=classes, n=n)
        assert Image.open(out / "samples.png").size == tuple(cell * (columns, rows))


@with_samples
def test_sampling_goes_on(folder, cfg):
    """A second call makes what is missing and removes what is too much; other settings start over."""
    write_samples(cfg)
    before = sampled(cfg.out)
    samples = Path(cfg.out, "samples")
    times = {name: (samples / name).stat().st_mtime_ns for name in before}
    for name in ("000004.png", "000009.png"):
        (samples / name).unlink()
    assert "(2 new)" in write_samples(cfg)
    assert sampled(cfg.out) == before
    new = [name for name in before if (samples / name).stat().st_mtime_ns != times[name]]
    assert new == ["000004.png", "000009.png"]
    write_samples(cfg, n=5)
    assert list(sampled(cfg.out)) == [f"{i:06d}.png" for i in range(5)]
    assert "starting over" in write_samples(cfg, n=3, seed=1, classes=(2,))
    assert len(sampled(cfg.out)) == 3
    assert set(json.loads((samples / "labels.json").read_text()).values()) == {2}
    assert "starting over" in write_samples(cfg, n=3, seed=1, classes=(2,), cfg_interval=(0.5, 1.0))
    with mock.patch.object(sample, "write_json", side_effect=UserError("cannot write")):  # a full disk
        fails(lambda: write_samples(cfg, n=3, seed=1, classes=(2,), cfg_interval=(0.5, 1.0)), "cannot write")
    write_samples(cfg, n=3)
    (samples / "settings.json").unlink()
    fails(lambda: write_samples(cfg), "holds other images")


@with_samples
def test_sampling_guide_and_moved_folder(folder, cfg):
    """A model guided by itself gives its unguided samples; a folder that was moved as a whole finds its tokenizer."""
    write_samples(cfg, cfg_scale=1.0, n=2)
    plain = sampled(cfg.out)
    path = f"{cfg.out}/diffusion.pt"
    write_samples(cfg, out=f"{folder}/guided", ckpt=path, guide=path, n=2)
    for a, b in zip(plain, sampled(f"{folder}/guided")):
        a, b = (np.asarray(Image.open(f"{where}/samples/{a}")).astype(int) for where in (cfg.out, f"{folder}/guided"))
        assert abs(a - b).max() <= 1
    shutil.move(cfg.out, f"{folder}/moved")
    shutil.rmtree(f"{folder}/moved/samples")
    write_samples(cfg, out=f"{folder}/moved", cfg_scale=1.0, n=2)
    assert sampled(f"{folder}/moved") == plain


@with_samples
def test_sampling_complains(folder, cfg):
    """No model, another kind of checkpoint, classes that do not exist, a guide of other latents."""
    fails(lambda: write_samples(cfg, classes=(99,)), "--classes")
    fails(lambda: write_samples(cfg, classes=(-1,)), "--classes")
    fails(lambda: write_samples(cfg, cfg_interval=(0.5,)), "--cfg_interval")
    fails(lambda: write_samples(cfg, out=f"{folder}/empty"), "run diffusion.py first")
    fails(lambda: write_samples(cfg, ckpt=f"{cfg.out}/tokenizer.pt"), "tokenizer checkpoint, not a diffusion model")
    entries = load(f"{cfg.out}/diffusion.pt")
    write_samples(cfg, n=2)
    fails(lambda: write_samples(cfg, num_steps=1), "from 2 times")
    assert len(list(Path(cfg.out, "samples").glob("*.png"))) == 2  # they stay
    torch.save(dict(entries, tokenizer_is="another"), f"{folder}/old.pt")
    fails(lambda: write_samples(cfg, ckpt=f"{folder}/old.pt"), "tokenizer.pt was trained again", "--tokenizer=FILE")
    write_samples(cfg, ckpt=f"{folder}/old.pt", tokenizer=f"{cfg.out}/tokenizer.pt", n=1)
    torch.save(dict(entries, latent_mean=entries["latent_mean"] + 1), f"{folder}/other.pt")
    fails(lambda: write_samples(cfg, guide=f"{folder}/other.pt"), "--guide", "other latents")


@with_samples
def test_sampling_bench(folder, cfg):
    """--bench=2 evaluates the model 3 + 2 times on both halves of the batch; without guidance on the one."""
    for scale, rows in (3.0, 8), (1.0, 4):
        with mock.patch.object(diffusion.DiT, "forward", autospec=True, side_effect=diffusion.DiT.forward) as forward:
            ckpt = f"{cfg.out}/diffusion.pt"
            flags = dict(ckpt=ckpt, bench=2, batch_size=4, cfg_scale=scale)
            result = json.loads(quiet(sample.bench, changed(cfg, **flags), WORLD))
        assert [len(each.args[1]) for each in forward.call_args_list] == [rows] * 5
        flops = result["tflops"] / result["images_per_second"] * 1e12
        model = diffusion.load_diffusion(ckpt)
        model.projectors = nn.ModuleList()
        assert abs(flops / (rows / 4 * model.flops()) - 1) < 1e-3


def test_sampling_bench_without_checkpoint():
    """--bench takes random weights of the preset's size: the toy's grid and classes."""
    with mock.patch.object(diffusion.DiT, "forward", autospec=True, side_effect=diffusion.DiT.forward) as forward:
        output = command(sample, "--preset=toy", "--bench=1", "--batch_size=2")
    model, x, _, y = forward.call_args.args
    assert json.loads(output.splitlines()[-1])["images"] == 2
    assert x.shape == (4, 32, 4, 4) and model.num_classes == 10 and len(model.blocks) == 4


def test_official_files_sample():
    """Random weights in the public layouts: LightningDiT and REG, with a VA-VAE (LDM) tokenizer and published-style
    latent statistics, without which there are no samples."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"state_dict": fill(golden("vavae_tiny"))}, f"{folder}/vavae.pt")
        channels = tokenizer.load_tokenizer(f"{folder}/vavae.pt").z_dim
        statistics = dict(mean=torch.zeros(1, channels, 1, 1), std=torch.ones(1, channels, 1, 1))
        torch.save(statistics, f"{folder}/latents_stats.pt")
        for name, solver in ("lightningdit_tiny", "euler"), ("reg_sit_tiny", "sde"):
            weights = fill(golden(name))
            for key, shape in (("x_embedder.proj.weight", (48, channels, 1, 1)),
                               ("final_layer.linear.weight", (channels, 48)), ("final_layer.linear.bias", (channels,))):
                weights[key] = tensor(key, shape)
            torch.save({"ema": weights}, f"{folder}/{name}.pt")
            cfg = sample.Config(out=f"{folder}/{name}", ckpt=f"{folder}/{name}.pt", tokenizer=f"{folder}/vavae.pt", n=3,
                                num_steps=4, num_heads=4, compile=False, solver=solver)
            stats = f"{folder}/latents_stats.pt"
            fails(lambda: write_samples(cfg), "mean and std", "--latent_stats")
            fails(lambda: write_samples(cfg, tokenizer="", latent_stats=stats), "--tokenizer")
            fails(lambda: write_samples(cfg, latent_stats=f"{folder}/vavae.pt"), "vavae.pt lacks")
            write_samples(cfg, latent_stats=stats)
            assert len(set(sampled(cfg.out).values())) == 3


@with_diffusion_folder
def test_reconstruct(folder, cfg):
    """Originals and reconstructions under the images' names; the folder of another run's is refused."""
    root = Path(cfg.data, "val")
    config = sample.Config(out=cfg.out, reconstruct=str(root), batch_size=7)
    quiet(sample.reconstruct, config, WORLD)

    def read(path):
        return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)

    tok = tokenizer.load_tokenizer(f"{cfg.out}/tokenizer.pt")
    names = {path.relative_to(root) for path in root.rglob("*.png")}
    for kind in ("originals", "reconstructions"):
        where = Path(cfg.out, kind)
        assert {path.relative_to(where) for path in where.rglob("*.png")} == names
    for name in sorted(names)[:5]:
        original = read(root / name)
        assert torch.equal(original, read(Path(cfg.out, "originals", name)))
        want = tokenizer.to_uint8(tok.decode(tok.encode(tokenizer.to_float(original)[None])[0]))[0]
        assert (want.int() - read(Path(cfg.out, "reconstructions", name)).int()).abs().max() <= 1
    for where, words in (f"{folder}/nowhere", ["no folder"]), (str(root / "3"), ["other images"]):
        fails(lambda: sample.reconstruct(changed(config, reconstruct=where), WORLD), *words)
    Path(folder, "shapes").symlink_to(root.resolve())
    before = os.getcwd()
    os.chdir(folder)
    try:
        named = changed(config, reconstruct="shapes", tokenizer=f"{cfg.out}/tokenizer.pt", out=f"{folder}/named")
        quiet(sample.reconstruct, named, WORLD)
    finally:
        os.chdir(before)
    assert len([*Path(folder, "named/reconstructions").rglob("*.png")]) == len(names)


def flux_file(path, **arguments):
    """A VAE as in FLUX's ae.safetensors: LDM's names, no quant convolutions."""
    torch.manual_seed(0)
    parts = dict(encoder=tokenizer.LDMEncoder(**arguments), decoder=tokenizer.LDMDecoder(**arguments))
    state = {}
    for name, part in parts.items():
        state.update({f"{name}.{k}": v for k, v in part.state_dict().items() if "quant_conv" not in k})
    write_safetensors(path, state)
    return parts


@with_diffusion_folder
def test_flux_autoencoder(folder, cfg):
    """Its moments are the encoder's last convolution's; it reconstructs, and serves diffusion with patches of 2."""
    path = f"{folder}/ae.safetensors"
    parts = flux_file(path, z_dim=16, ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
    assert not any("quant" in key for key in tokenizer.load_weights(path))
    tok = tokenizer.load_tokenizer(path)
    assert (tok.z_dim, tok.downsample, tok.arch["encoder"]["attn_levels"]) == (16, 8, [])
    x = image(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        mean, logvar = parts["encoder"].body(x).chunk(2, 1)
        torch.testing.assert_close(list(tok.encode(x)), [mean, logvar])
        parts["decoder"].post_quant_conv = nn.Identity()
        torch.testing.assert_close(tok.decode(mean), parts["decoder"](mean))
    flags = (f"--reconstruct={cfg.data}/val/9", f"--tokenizer={path}", f"--out={folder}/out")
    assert "3 images" in command(sample, *flags)
    train_diffusion(cfg, tokenizer=path, image_size=32, patch_size=2, out=f"{folder}/flux", encode_batch=48)
    model = diffusion.load_diffusion(f"{folder}/flux/diffusion.pt")
    assert (model.in_channels, model.grid, model.patch_size) == (16, 2, 2)
    with torch.device("meta"):
        published = [part(16, 128, (1, 2, 4, 4), 2) for part in (tokenizer.LDMEncoder, tokenizer.LDMDecoder)]
    assert abs(millions(*published) - 83.82) < 0.01
    state = dict(tokenizer.load_weights(path))
    del state["decoder.norm_out.weight"]
    write_safetensors(path, state)
    fails(lambda: tokenizer.load_tokenizer(path), "ae.safetensors", "norm_out")


# --- text ---

def test_toy_captions_as_words():
    """34 words, 13 a caption; left in a caption is on the left of the picture; other words are named."""
    text = tokenizer.ShapesText()
    shapes = Shapes("val", 32)
    captions = [shapes.caption(i) for i in range(200)]
    ids = text.ids(captions)
    assert len(text.words) == 34 and ids.shape == (200, 13) and ids.min() > 0 and ids.max() <= 34
    assert " ".join(text.words[i - 1] for i in ids[0]) == captions[0].lower().replace(",", "")
    assert ((shapes.attributes(np.arange(200))["x"] < 0) == ["left" in caption for caption in captions]).all()
    fails(lambda: text.ids(["a red cow"]), "cow", "crescent")
    fails(lambda: text.ids([captions[0] + " red"]), "13 of these words")


@torch.no_grad()
def test_text_stands_before_the_image():
    """A DiT of captions (words, or an encoder's states with a pooled one) and a class token: shapes; every token and
    the pooled state matter; guidance asks for the null caption or a negative one."""
    words = dict(text_tokens=13, text_dim=32, vocabulary=35)
    states = dict(text_tokens=5, text_dim=24, text_pooled=True)
    for arch, y in (words, torch.randint(1, 35, (2, 13))), (states, torch.randn(2, 6, 24)):
        model = small_dit(num_classes=0, qk_norm=True, **arch, **{k: v for k, v in REG.items() if k != "qk_norm"})
        x = torch.randn(2, 8, 4, 4)
        cls = torch.randn(2, 24)
        t = torch.full((2,), 0.3)
        v, v_cls, projection = model(x, t, y, cls)
        assert v.shape == x.shape and v_cls.shape == cls.shape and projection.shape[1] == 17
        assert all(state.shape[1] == 17 for state in model(x, t, y, cls, blocks=True))
        for k in range(y.shape[1]):
            other = y.clone()
            other[:, k] = y[:, k] % 34 + 1 if y.ndim == 2 else -y[:, k]
            assert not torch.allclose(model(x, t, other, cls)[0], v, atol=1e-6), k
        if y.ndim == 3:
            model.text_embedder.null.normal_()
            assert torch.equal(model.null(2), model.text_embedder.null.expand(2, 6, 24))
        for negative, null in (None, model.null(2)), (y[1], y[1].expand_as(y)):
            guided, _ = diffusion.guided(model, [x, cls], 0.3, y, cfg_scale=3.0, negative=negative)
            far = model(x, t, null, cls)[0]
            torch.testing.assert_close(guided, far + 3 * (v - far), rtol=1e-4, atol=1e-4)


def test_text_model_sizes():
    """2B: 1.990 and 2.002 billion parameters on states 1,024 (SigLIP2-L) and 4,096 wide; FLOPs are counted by part."""
    depth, width, heads = diffusion.SIZES["2B"]
    for dim, billions in (1024, 1.990), (4096, 2.002):
        with torch.device("meta"):
            model = diffusion.DiT(16, 32, 1, width, depth, heads, 0, qk_norm=True, text_tokens=64, text_dim=dim,
                                  text_pooled=True)
        assert abs(sum(p.numel() for p in model.parameters()) / 1e9 - billions) < 0.01
    model = small_dit(num_classes=0, text_tokens=5, text_dim=24, text_pooled=True)
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, math_only:
        model(torch.randn(1, 8, 4, 4), torch.rand(1), torch.randn(1, 6, 24))
    np.testing.assert_allclose(model.flops(), counter.get_total_flops(), rtol=0.02)


@with_tiny_vfm
def test_text_training_and_sampling():
    """--text=toy: trains on unmirrored images alone, leaves combinations out, resumes exactly, writes its own
    checkpoint; samples depend on seed, index and prompt alone; class models take no prompts."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = changed(diffusion_folder(folder), text="toy", data="shapes", workers=0)
        with mock.patch.object(diffusion.Latents, "read", autospec=True, side_effect=diffusion.Latents.read) as read:
            train_diffusion(cfg)
        calls = [call.args for call in read.call_args_list if call.args[0].rows.shape != (32,)]
        assert calls and all((mirror == 0).all() for _, _, mirror in calls)
        asked = torch.cat([index for _, index, _ in calls]).numpy()
        shown = tokenizer.open_data(cfg, "train", 32).in_text_training()
        assert shown[asked].all() and not shown.all()
        whole = load(f"{cfg.out}/diffusion-text.pt")
        parts = changed(cfg, out=f"{folder}/parts", tokenizer=f"{cfg.out}/tokenizer.pt", save_interval=0)
        stop_in(lambda: diffusion.train(parts, WORLD), 2)
        train_diffusion(parts)
        again = load(f"{parts.out}/diffusion-text.pt")
        for part in ("model", "ema", "optimizer"):
            assert_same(whole[part], again[part])
        torch.manual_seed(0)
        for value in whole["ema"].values():  # away from the zeros at which captions say nothing
            value.add_(0.1 * torch.randn(value.shape))
        tokenizer.save_checkpoint(f"{cfg.out}/diffusion-text.pt", **whole)
        prompts = [Shapes("val").caption(i) for i in range(3)]
        flags = (f"--out={cfg.out}", "--num_steps=4", "--compile=0")
        command(sample, *flags, f"--prompt={'|'.join(prompts)}")
        many = sampled(cfg.out)
        asked = json.loads(Path(cfg.out, "samples", "prompts.json").read_text())
        assert len(many) == len(asked) == 12 and asked["000001.png"] == prompts[1]
        Path(folder, "prompts.txt").write_text("\n".join(prompts))
        shutil.rmtree(f"{cfg.out}/samples")
        command(sample, *flags, f"--prompts={folder}/prompts.txt", "--n=5", "--batch_size=2")
        assert sampled(cfg.out).items() <= many.items()
        command(sample, *flags, f"--prompts={folder}/prompts.txt", "--n=5", f"--negative={prompts[0]}")
        assert not sampled(cfg.out).items() <= many.items()
        held_out = *flags, f"--ckpt={cfg.out}/diffusion-text.pt"  # their captions
        assert "(2 new)" in command(sample, *held_out, "--n=2")
        assert "(1 new)" in command(sample, *held_out, "--n=3")
        fails(lambda: command(sample, *flags, "--prompt=a red cow"), "words")
        fails(lambda: command(sample, *flags, f"--prompts={folder}/none"), "no file")
        for text, said in (b"", "is empty"), ("caf\u00e9".encode("latin-1"), "UnicodeDecodeError"):
            Path(folder, "odd.txt").write_bytes(text)
            fails(lambda: command(sample, *flags, f"--prompts={folder}/odd.txt"), "odd.txt", said)
        path = f"{cfg.out}/diffusion-text.pt"
        fails(lambda: command(sample, *flags, f"--ckpt={path}", "--classes=1"), "--prompt", "--classes")
        fails(lambda: command(sample, *flags, "--prompt=a", f"--prompts={folder}/prompts.txt"), "not both")
        both = f"--negative={prompts[0]}", f"--guide={path}"
        fails(lambda: command(sample, *flags, f"--ckpt={path}", *both), "--negative", "--guide")
        model = diffusion.load_diffusion(path)
        with mock.patch.object(Shapes, "lengths", dict(train=64, val=40)):  # each once, then in turn
            assert len(sample.read_conditions(sample.Config(n=60), model, WORLD)[0]) == 40
        fails(lambda: command(sample, "--prompt=a", f"--out={folder}/none"), "diffusion.py --text=toy")
        flag = f"--out={folder}/joint"
        fails(lambda: command(align, f"{cfg.out}/diffusion-text.pt", "--steps=1", flag), "joint training", "classes")
        train_diffusion(changed(cfg, text=""))
        fails(lambda: command(sample, *flags, f"--ckpt={cfg.out}/diffusion.pt", "--prompt=a red star"), "classes")


@with_diffusion_folder
def test_text_training_on_captioned_files(folder, cfg):
    """Shards and a folder of the same captioned drawings train the same model to the bit, on a text tower's file and on
    the toy's words, stopped or not; on unmirrored latents; without captions, one line."""
    shards, files = shards_and_folder(folder)
    text_folder(folder, "siglip2")
    path = Path(folder, "model.safetensors")
    state = dict(tokenizer.load_weights(path))
    vocab = json.loads(Path(folder, "tokenizer.json").read_text())["model"]["vocab"]
    state["text_model.embeddings.token_embedding.weight"] = torch.randn(max(vocab.values()) + 1, 64)
    write_safetensors(path, state)
    shared = dict(tokenizer=f"{cfg.out}/tokenizer.pt", cache=folder, workers=1)
    for text in "toy", folder:
        found = []
        for name, data in ("shards", shards), ("files", files):
            out = f"{folder}/{len(text)}{name}"
            rows = mock.patch.object(diffusion.Latents, "read", autospec=True, side_effect=diffusion.Latents.read)
            with rows as read:
                train_diffusion(cfg, data=data, text=text, out=out, sample_interval=6, **shared)
            assert all((call.args[2] == 0).all() for call in read.call_args_list)
            found.append(load(f"{out}/diffusion-text.pt"))
        for part in "model", "ema", "optimizer", "latent_mean":
            assert_same(found[0][part], found[1][part], f"{text}.{part}")
        ids, = Path(out, "latents").glob("ids-*.npy")  # train's and val's: the same images
        encoder = tokenizer.ShapesText() if text == "toy" else tokenizer.load_text(text)
        assert np.array_equal(np.load(ids), encoder.ids([Shapes("train", 32).caption(i) for i in range(40)]))
    parts = changed(cfg, data=shards, text=folder, out=f"{folder}/parts", save_interval=0, **shared)
    stop_in(lambda: diffusion.train(parts, WORLD), 2)
    train_diffusion(parts)
    assert_same(load(f"{folder}/parts/diffusion-text.pt")["optimizer"], found[0]["optimizer"])
    Path(files, "000000003.txt").write_text("a small blue ring at the lower left on a red background, clouds")
    train_diffusion(cfg, data=files, text=text, out=out, steps=7, **shared)
    assert len(list(Path(out, "latents").glob("ids-*.npy"))) == 2  # another caption
    fails(lambda: train_diffusion(cfg, data=files, text=text, out=f"{folder}/key", caption_key="url", **shared),
          "no caption of", "url")
    fails(lambda: train_diffusion(cfg, text="toy"), "no caption of", ".png", ".txt")


@with_diffusion_folder
def test_captions_of_what_was_read(folder, cfg):
    """Where --skip_bad=1 takes the next sample, for its image or its caption, the next one's caption comes along."""
    _, files = shards_and_folder(folder, 400)
    Path(files, "000000003.png").write_bytes(b"")
    Path(files, "000000020.txt").unlink()
    for number in 19, 21, 4:  # images by which the others are told
        Path(files, f"{number:09d}.txt").write_text("a small blue ring at the lower left on a red background clouds")
    cfg = changed(cfg, data=files, text="toy", steps=1, skip_bad=True)
    train_diffusion(cfg)
    ids, = Path(cfg.out, "latents").glob("ids-*.npy")
    ids = np.load(ids)
    read = np.load(Path(cfg.out, "latents", "train", "images_read.npy"))
    assert read[3] == 4 and read[20] == 21 and (read == np.arange(400)).sum() == 398
    assert (ids[3] == ids[4]).all() and (ids[20] == ids[21]).all() and (ids[2] != ids[3]).any()
    latents = np.load(Path(cfg.out, "latents", "train", "latents.npy"))
    assert (latents[20] == latents[21]).all() and (latents[19] != latents[20]).any()
    assert Path(cfg.out, "bad_images.txt").read_text().count("\n") == 2


def test_all_scripts_read_shards():
    """tokenizer.py with workers on two processes, which index them once, and fid.py --tokenizer; the toy's prompts."""
    with tempfile.TemporaryDirectory() as folder:
        shards, _ = shards_and_folder(folder)
        flags = (f"--data={shards}", "--caption_key=long", f"--cache={folder}", f"--out={folder}/out")
        tiny = ("--method=vae", "--recipe=study", "--kimg=0.016", "--batch_size=8", "--ch_mult=1,1,1,1",
                "--log_interval=1")
        shown = torchrun(HERE / "tokenizer.py", *flags, *tiny, "--workers=1")
        assert "vae on 40 images" in shown and shown.count("no folder val") == 1
        assert len(list(Path(folder).glob("shards-*.npy"))) == 1 and len(read_log(f"{folder}/out")) == 2
        result, _ = run_fid(f"--tokenizer={folder}/out/tokenizer.pt", *flags[2:], "--workers=1", net=Means())
        assert result["images"]["pairs"] == 40 and result["psnr"] > 5 and result["rfid"] > 0


# --- several processes, command lines ---

@with_diffusion_folder
def test_diffusion_on_two_processes(folder, cfg):
    """torchrun with gloo: the same cache and the same samples as one process; FSDP learns what DDP learns, and its
    checkpoint loads anywhere."""
    toy = diffusion.Config(**diffusion.PRESETS["toy"])
    flags = ["--preset=toy"]
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value != getattr(toy, field.name) and field.name != "out":
            flags.append(f"--{field.name}={int(value) if isinstance(value, bool) else value}")
    fails(lambda: train_diffusion(cfg, fsdp=True), "--fsdp=1", "torchrun")
    fsdp = ["--fsdp=1", "--checkpointing=1", "--sample_interval=2"]
    for out, extra in ("ddp", []), ("fsdp", fsdp):
        Path(folder, out).mkdir()
        shutil.copy(f"{folder}/out/tokenizer.pt", f"{folder}/{out}/tokenizer.pt")
        shown = torchrun(HERE / "diffusion.py", f"--out={folder}/{out}", "--accumulate=2", *flags, *extra)
        assert shown.count("2.0 epochs; from step 0") == 1
    a, b = (load(f"{folder}/{out}/diffusion.pt") for out in ("ddp", "fsdp"))
    for part in ("model", "ema", "optimizer"):
        for x, y in zip(tensors(a[part]), tensors(b[part]), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
    train_diffusion(cfg, out=f"{folder}/fsdp", steps=7)  # one process goes on from the sharded run
    assert load(f"{folder}/fsdp/diffusion.pt")["step"] == 7
    train_diffusion(cfg, steps=1)
    for split in ("train-flip", "val"):
        x, y = (np.load(f"{folder}/{out}/latents/{split}/latents.npy") for out in ("ddp", "out"))
        assert np.array_equal(x, y)
    torchrun("--", HERE / "sample.py", f"--out={folder}/ddp", "--n=21", "--num_steps=5", "--batch_size=4")
    two = sampled(f"{folder}/ddp")
    shutil.rmtree(f"{folder}/ddp/samples")
    config = sample.Config(**{**sample.PRESETS["toy"], "out": f"{folder}/ddp", "n": 21, "num_steps": 5})
    write_samples(config, batch_size=21, compile=False)
    assert len(two) == 21 and two == sampled(f"{folder}/ddp")


def test_diffusion_command_lines():
    """A script's error is one line after the preset's, without a traceback; an unknown flag names the nearest."""
    with tempfile.TemporaryDirectory() as folder:
        shown = script("diffusion.py", f"--out={folder}", status=1)
    assert "run tokenizer.py first" in shown and shown.count("\n") == 2
    assert "did you mean --cfg_scale" in script("sample.py", "--cfgscale=2", status=2)
    parse = functools.partial(tokenizer.parse_config, diffusion.Config, diffusion.PRESETS)
    fails(lambda: parse(["--model=XXL"]), "XXL", "1.6B", status=2)


@with_diffusion_folder
def test_diffusion_needs_the_same_classes(folder, cfg):
    """Where val lacks a class, the next would pass for it."""
    shutil.rmtree(f"{folder}/data/val/3")
    fails(lambda: train_diffusion(cfg), "val's classes are not train's")


# -----------------------------------------------------------------------------
# fid.py

def run_fid(*arguments, net=None):
    """fid.py's run() in this process -> (what it wrote into --out, what it printed). `net`: in load_features' place."""
    out = next(a.split("=")[1] for a in arguments if a.startswith("--out="))
    name = "eval.json" if any(a.startswith("--tokenizer=") for a in arguments) else "fid.json"
    load = fid.load_features if net is None else lambda *_: net
    text = io.StringIO()
    argv = ["fid.py", *map(str, arguments)]
    with mock.patch.object(fid, "load_features", load), mock.patch.object(sys, "argv", argv):
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            fid.run()
    return json.loads(Path(out, name).read_text()), text.getvalue()


class Means(nn.Module):
    """A cheap network with all three outputs: colours of a 3 x 3 grid, of a 2 x 2 grid, and ten logits."""
    name = "means"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(tensor("means", (10, 27)), requires_grad=False)

    def forward(self, images):
        x = images.float() / 255
        features = F.adaptive_avg_pool2d(x, 3).flatten(1)
        return features, F.adaptive_avg_pool2d(x, 2).flatten(1), 20 * features @ self.weight.T


def write_images(folder, images):
    Path(folder).mkdir(parents=True)
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(f"{folder}/{i:04d}.png")


def pixels(n, size, key, spread=255):
    return (noise(n * size * size * 3, key) * 0.5 * spread + 127.5).reshape(n, size, size, 3).to(torch.uint8).numpy()


def planes(array):
    """[N, H, W, 3] -> a tensor [N, 3, H, W]."""
    return torch.from_numpy(np.array(array)).permute(0, 3, 1, 2)


def gaussian(features):
    """Mean and covariance, NumPy's."""
    features = np.asarray(features, np.float64)
    return features.mean(0), np.cov(features, rowvar=False)


# the formulas

def test_fid_math_golden():
    """FID, Inception Score, precision and recall are the public evaluators', for any block."""
    file = golden("fid_math")
    n1, n2, d, expect = file["n1"], file["n2"], file["d"], file["expect"]
    mix = noise(d * d, "mix").reshape(d, d) / d ** 0.5
    a = noise(n1 * d, "fa").reshape(n1, d) @ mix
    b = (noise(n2 * d, "fb").reshape(n2, d) * 1.2) @ mix + 0.1
    logits = noise(n1 * 10, "lg").reshape(n1, 10) * 4
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(fid.frechet_distance(*fid.moments(a), *fid.moments(b)), expect["fid"])
    close(fid.inception_score(logits, 10), expect["inception_score_10_splits"])
    close(fid.inception_score(logits, 1), [expect["inception_score_one_split"], 0])
    for block in (4096, 100, 3):
        found = fid.precision_recall(a, b, k=3, block=block)
        close(found, [expect["precision_k3_reference_a_samples_b"], expect["recall_k3"]])


def test_frechet_rank_deficient():
    """Fewer images than dimensions: tr (C1 C2)^(1/2) is the nuclear norm of X Y^T / sqrt((n-1)(m-1)), centred."""
    d = 200
    for n, m in ((30, 500), (500, 30), (20, 30), (2, 2), (300, 400)):
        x, y = noise(n * d, "x").reshape(n, d).numpy(), noise(m * d, "y").reshape(m, d).numpy() * 3 + 0.5
        xc, yc = (x - x.mean(0)) / (n - 1) ** 0.5, (y - y.mean(0)) / (m - 1) ** 0.5
        roots = np.linalg.svd(xc @ yc.T, compute_uv=False).sum()
        exact = ((x.mean(0) - y.mean(0)) ** 2).sum() + (xc ** 2).sum() + (yc ** 2).sum() - 2 * roots
        np.testing.assert_allclose(fid.frechet_distance(*gaussian(x), *gaussian(y)), exact, rtol=1e-6)


def test_frechet_by_hand():
    """(mu1 - mu2)^2 + (sigma1 - sigma2)^2 in one dimension; singular covariances of either side."""
    zero, one = np.zeros((3, 3)), np.eye(3)
    assert fid.frechet_distance([0.0], [[4.0]], [1.0], [[9.0]]) == 2        # 1 + (2 - 3)^2
    assert fid.frechet_distance(np.zeros(3), zero, np.ones(3), one) == 6
    assert fid.frechet_distance(np.zeros(3), one, np.ones(3), zero) == 6


def test_frechet_equals_sqrtm():
    """What scipy.linalg.sqrtm of the product gives, where it is right."""
    from scipy.linalg import sqrtm
    d = 128
    mix = noise(d * d, "mix").reshape(d, d).numpy() * np.exp(-np.arange(d) / 60)
    a, b = (gaussian(noise(n * d, key).reshape(n, d).numpy() @ mix)[1] for n, key in ((1500, "a"), (1200, "b")))
    found = fid.frechet_distance(np.zeros(d), a, np.zeros(d), b)
    np.testing.assert_allclose(found, np.trace(a) + np.trace(b) - 2 * np.trace(sqrtm(a @ b)).real, rtol=1e-6)


def test_frechet_refuses():
    """Statistics of another network and NaN are a clear error, not a number."""
    mean, one, two = np.zeros(2), np.eye(2), np.eye(3)
    fails(lambda: fid.frechet_distance(mean, one, np.zeros(3), two), "(2, 2) and (3, 3)")
    fails(lambda: fid.frechet_distance(mean, one, mean, one * np.nan), "NaN")


def test_moments():
    """Exact for a mean far above the spread, and for more rows than are centred at once."""
    x = noise(5000 * 20, "m").reshape(5000, 20) * 1e-3 + 1e6
    mean, covariance = fid.moments(x)
    np.testing.assert_allclose(mean, x.mean(0).numpy(), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov((x - 1e6).numpy(), rowvar=False), rtol=1e-5, atol=1e-12)


def test_precision_recall_definition():
    """Against balls from full distance matrices, for any k and block."""
    reference, samples = noise(60 * 5, "r").reshape(60, 5), noise(45 * 5, "s").reshape(45, 5) * 1.3
    distance = torch.cdist(reference, samples)
    for k in (1, 3, 5):
        radius = [torch.cdist(x, x).sort(1).values[:, k] for x in (reference, samples)]
        precision = (distance <= radius[0][:, None]).any(0).double().mean().item()
        recall = (distance <= radius[1]).any(1).double().mean().item()
        for block in (2, 16, 64):
            assert fid.precision_recall(reference, samples, k, block) == (precision, recall)


def test_precision_recall_far_from_zero():
    """A common offset moves no distance, also in float32; equal sets agree fully, distant ones not at all."""
    reference, samples = noise(300 * 8, "r").reshape(300, 8), noise(200 * 8, "s").reshape(200, 8) * 1.3
    exact = fid.precision_recall(reference, samples)
    assert 0.1 < exact[0] < 0.9
    np.testing.assert_allclose(fid.precision_recall(reference.float() + 1000, samples.float() + 1000), exact, atol=0.01)
    assert fid.precision_recall(samples, samples) == (1, 1)
    assert fid.precision_recall(samples, samples + 100) == (0, 0)


def test_inception_score_bounds():
    """Sure and diverse: the number of classes; always undecided: 1."""
    np.testing.assert_allclose(fid.inception_score(torch.eye(8).repeat(5, 1) * 100, 1), [8, 0], rtol=1e-9)
    np.testing.assert_allclose(fid.inception_score(torch.zeros(40, 8), 10), [1, 0], atol=1e-12)


# features

def test_inception_golden():
    """Pool, logits and spatial features of the public port's network, from its file; BatchNorms are folded."""
    file = golden("inception_fid")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(fill(file), f"{folder}/pt_inception.pth")
        net = fid.load_inception(f"{folder}/pt_inception.pth")
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in net.modules())
    images = (image(3, 3, file["S"], file["S"], salt=file["salt"]) * 255).round().to(torch.uint8)
    with torch.no_grad():
        pool, spatial, logits = net(images)
    expect = file["expect"]
    check(pool, expect["pool_2048"])
    check(logits, expect["logits_unbiased"])
    check(logits + net.fc.bias, expect["logits"])
    check(spatial.reshape(3, 17, 17, 7).permute(0, 3, 1, 2), expect["spatial_7x17x17"])


def test_inception_files():
    """Counters and the auxiliary head may be there; missing and left-over keys are named, and so is the wanted file."""
    state = fill(golden("inception_fid"))
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/weights.pth"
        more = {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0), "AuxLogits.fc.weight": torch.zeros(2)}
        torch.save({**state, **more}, path)
        fid.load_inception(path)
        state["extra"] = state.pop("Mixed_7c.branch3x3_2a.bn.bias")
        torch.save(state, path)
        fails(lambda: fid.load_inception(path), "Missing", "Mixed_7c.branch3x3_2a.bn.bias", "Unexpected", "extra")
    fails(lambda: fid.load_inception("/nowhere/file.pth"), "pt_inception-2015-12-05-6726825d.pth", "--inception=PATH")


def test_inception_compiles_whole():
    """torch.compile takes it as one graph, hooks and all, with the same outputs."""
    net = fid.Inception().requires_grad_(False).eval()
    images = planes(pixels(1, 20, "compile"))
    for a, b in zip(torch.compile(net, fullgraph=True, backend="eager")(images), net(images)):
        assert torch.equal(a, b)


def test_resize_tf1_exact():
    """TensorFlow 1's resize, from its definition pixel by pixel in float64; a half-pixel one is far off."""
    def reference(images, size):
        n, c, height, width = images.shape
        out = np.zeros((n, c, size, size))
        for i in range(size):
            y = i * height / size
            y0 = min(int(np.floor(y + 1e-9)), height - 1)
            y1 = min(y0 + 1, height - 1)
            for j in range(size):
                x = j * width / size
                x0 = min(int(np.floor(x + 1e-9)), width - 1)
                x1 = min(x0 + 1, width - 1)
                top = images[:, :, y0, x0] + (images[:, :, y0, x1] - images[:, :, y0, x0]) * (x - x0)
                low = images[:, :, y1, x0] + (images[:, :, y1, x1] - images[:, :, y1, x0]) * (x - x0)
                out[:, :, i, j] = top + (low - top) * (y - y0)
        return out
    for height, width, size in ((64, 47, 299), (256, 256, 100), (300, 512, 90), (12, 7, 9), (40, 40, 40)):
        images = (image(1, 3, height, width, key=f"{height}") * 255).round().to(torch.uint8)
        found = fid.resize_tf1(images, size)
        assert found.dtype == torch.float32 and found.shape == (1, 3, size, size)
        exact = reference(images.double().numpy(), size)
        np.testing.assert_allclose(found.double().numpy(), exact, rtol=0, atol=4e-5)  # 2 roundings near 255
    images = planes(pixels(1, 64, "half"))
    half = F.interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False)
    assert (fid.resize_tf1(images, 299) - half).abs().max() > 10


def test_vfm_features():
    """A VFM's file gives its class token; an unknown name is an error."""
    with tempfile.TemporaryDirectory() as folder:
        shape = dict(image_size=28, patch_size=14, embed_dim=64, depth=1, num_heads=1, mlp_hidden=64)
        vit = tokenizer.ViT(**shape, layer_scale=True)
        torch.save(vit.state_dict(), f"{folder}/small.pth")
        net = fid.load_features(f"{folder}/small.pth")
        fails(lambda: fid.load_features("nonsense", folder), "no VFM nonsense")
    images = planes(pixels(4, 40, "v"))
    features, spatial, logits = net(images)
    assert net.name == "small" and spatial is None and logits is None
    vit = net.vfm
    torch.testing.assert_close(features, vit(vit.resize(images.float() / 127.5 - 1), cls=True)[0][:, 0])


def test_toy_classifier():
    """At least 97% on held-out images, also at twice their size, and 85% with all that captions say; trained once."""
    net = fid.load_features("toy", SHARED)
    val = tokenizer.Shapes("val", 32, cache=SHARED)
    images, labels = torch.from_numpy(np.array(val.images[:1000])), torch.from_numpy(val.labels[:1000])
    with torch.no_grad():
        features, spatial, logits = net(images)
        assert features.shape == (1000, 128) and spatial is None and logits.shape == (1000, 10)
        assert (logits.argmax(1) == labels).double().mean() >= 0.97
        captions = [fid.read_caption(val.caption(i)) for i in range(1000)]
        asked = torch.tensor([[caption[name] for name in net.attributes] for caption in captions])
        assert (net.names(images) == asked).all(1).double().mean() >= 0.85
        larger = F.interpolate(images[:200].float(), scale_factor=2, mode="bicubic", antialias=True)
        larger = larger.round().clamp(0, 255).to(torch.uint8)
        assert (net(larger)[2].argmax(1) == labels[:200]).double().mean() > 0.9
    with mock.patch.object(fid, "train_on_shapes", side_effect=AssertionError("trained again")):
        assert torch.equal(fid.load_features("toy", SHARED).head.weight, net.head.weight)


def test_toy_features_see_colour():
    """Grey images of the right shapes are far from the coloured ones: the features are not of the class alone."""
    net = fid.load_features("toy", SHARED)
    images = torch.from_numpy(np.array(tokenizer.Shapes("val", 32, cache=SHARED).images[:1000]))
    grey = images[500:].float().mean(1, keepdim=True).expand(-1, 3, -1, -1).to(torch.uint8)
    with torch.no_grad():
        first, second, colourless = (gaussian(net(part)[0]) for part in (images[:500], images[500:], grey))
    assert fid.frechet_distance(*first, *colourless) > 10 * fid.frechet_distance(*first, *second)


# sets of images

def test_sources_agree():
    """A folder and both kinds of .npz give the same images, in order, in any shares and by loader processes."""
    images = pixels(23, 16, "sources")
    with tempfile.TemporaryDirectory() as folder:
        write_images(f"{folder}/a", images)
        np.savez(f"{folder}/stored.npz", images)
        np.savez_compressed(f"{folder}/packed.npz", arr_0=images, labels=np.arange(23))
        for path in ("a", "stored.npz", "packed.npz"):
            source = fid.open_images(f"{folder}/{path}")
            assert len(source) == 23
            for workers in (0, 2):
                got = torch.cat([batch for _, batch in fid.batches(source, WORLD, 5, workers)])
                assert torch.equal(got, planes(images)), (path, workers)
            worlds = [tokenizer.World(rank, 3, WORLD.device) for rank in range(3)]
            thirds = [batch for world in worlds for _, batch in fid.batches(source, world, 4)]
            assert torch.equal(torch.cat(thirds), got)
            assert torch.equal(source[range(3, 5)], got[3:5])       # back again


def test_npz_streams():
    """Of 79 MB of images a batch at a time lies in memory, from a stored and from a compressed archive."""
    with tempfile.TemporaryDirectory() as folder:
        large = np.zeros((400, 256, 256, 3), np.uint8)
        np.savez(f"{folder}/large.npz", large)
        np.savez_compressed(f"{folder}/tight.npz", large)
        del large
        for path in ("large.npz", "tight.npz"):
            tracemalloc.start()
            assert sum(len(batch) for _, batch in fid.batches(fid.Npz(f"{folder}/{path}"), WORLD, 16)) == 400
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 16e6, peak


def test_bad_folders():
    """Mixed sizes (also when a loader's process finds them), a damaged image, no images: one line with the name."""
    with tempfile.TemporaryDirectory() as folder:
        write_images(f"{folder}/mixed", [pixels(1, 8, "a")[0], pixels(1, 16, "b")[0]])
        for workers in (0, 1):
            batches = fid.batches(fid.Folder(f"{folder}/mixed"), WORLD, 2, workers)
            fails(lambda: list(batches), "0001.png (16, 16); --image_size=N crops them all")
        assert fid.Folder(f"{folder}/mixed", 8)[range(2)].shape == (2, 3, 8, 8)
        Path(f"{folder}/mixed/0001.png").write_bytes(b"\x89PNG no image")
        fails(lambda: list(fid.batches(fid.Folder(f"{folder}/mixed"), WORLD, 2)), "0001.png")
        os.mkdir(f"{folder}/empty")
        fails(lambda: fid.open_images(f"{folder}/empty"), "no images in")
        fails(lambda: fid.open_images(f"{folder}/nothing"), "no folder or .npz")


def test_bad_archives():
    """An .npz without images, of another layout, torn, or no archive at all is one line that names it."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/bad.npz"
        np.savez(path, images=pixels(3, 8, "c"))
        fails(lambda: fid.open_images(path), path, "arr_0")
        bad = [np.zeros(shape, np.uint8) for shape in ((3, 3, 8, 8), (3, 8, 8))]
        bad += [np.zeros((3, 8, 8, 3), np.float32), np.asfortranarray(np.zeros((3, 8, 8, 3), np.uint8))]
        for array in bad:
            np.savez(path, array)
            fails(lambda: fid.open_images(path), path, "arr_0 must be uint8 images [N, H, W, 3]")
        Path(path).write_text("not an archive")
        fails(lambda: fid.open_images(path), path)
        np.savez_compressed(path, np.random.default_rng(0).integers(0, 255, (50, 32, 32, 3), np.uint8))
        data = bytearray(Path(path).read_bytes())
        data[len(data) // 2:len(data) // 2 + 64] = bytes(64)
        Path(path).write_bytes(data)
        fails(lambda: list(fid.batches(fid.Npz(path), WORLD, 50)), path)


# one pass

def test_image_statistics():
    """The Inception Score in splits, the last one shorter; features and predictions in order."""
    images, net = planes(pixels(21, 8, "splits")), Means()
    features, _, logits = net(images)
    found = fid.image_statistics(images, net, WORLD, 5)
    np.testing.assert_allclose(found["inception_score"], fid.inception_score(logits, 1), rtol=1e-5)
    parts = [fid.inception_score(part, 1)[0] for part in logits.split(8)]
    np.testing.assert_allclose(fid.score_parts(logits.split(8)), [np.mean(parts), np.std(parts)], rtol=1e-5)
    torch.testing.assert_close(found["features"], features)
    assert torch.equal(found["predictions"], logits.argmax(1))


def test_one_image_has_no_distance():
    """A covariance of one image is NaN, and the distance refuses it."""
    images = planes(pixels(4, 8, "one"))
    reference = fid.judge(images, Means(), WORLD)["statistics"]
    fails(lambda: fid.judge(images[:1], Means(), WORLD, reference=reference), "of one image?")


def test_judge():
    """Frechet distance to another judgement, the share of right labels, and None for what was not asked."""
    a, b, net = planes(pixels(30, 8, "ja")), planes(pixels(30, 8, "jb", 150)), Means()
    alone = fid.judge(a, net, WORLD)
    assert alone["images"] == 30 and alone["fd"] is None and alone["agreement"] is None
    labels = net(b)[2].argmax(1)
    labels[:6] = (labels[:6] + 1) % 10
    found = fid.judge(b, net, WORLD, labels, alone["statistics"], batch_size=7)
    exact = fid.frechet_distance(*gaussian(net(b)[0]), *gaussian(net(a)[0]))
    np.testing.assert_allclose([found["fd"], found["agreement"]], [exact, 0.8], rtol=1e-5)
    with mock.patch.object(fid, "Inception", Means):  # its classes are ImageNet's
        assert fid.judge(b, net, WORLD, labels)["agreement"] is None


def test_judge_transform():
    """What is judged is what `transform` gives for each range of the source."""
    a, b, net = planes(pixels(30, 8, "ja")), planes(pixels(30, 8, "jb", 150)), Means()
    plain = fid.judge(b, net, WORLD)["statistics"]
    replaced = fid.judge(a, net, WORLD, batch_size=7, transform=lambda indices, _: b[indices.start:indices.stop])
    np.testing.assert_allclose(replaced["statistics"]["mu"], plain["mu"], rtol=1e-9)
    assert torch.equal(replaced["statistics"]["predictions"], plain["predictions"])


# samples against a reference

def two_sets():
    """Pixels of two sets, and their metrics by `Means` from the definitions."""
    a, b, net = pixels(40, 12, "left", 200), pixels(50, 12, "right", 180), Means()
    left, right = net(planes(a)), net(planes(b))
    exact = dict(fid=fid.frechet_distance(*gaussian(left[0]), *gaussian(right[0])))
    exact["sfid"] = fid.frechet_distance(*gaussian(left[1]), *gaussian(right[1]))
    exact["is"], exact["is_std"] = fid.inception_score(left[2], 1)
    exact["precision"], exact["recall"] = fid.precision_recall(right[0], left[0])
    return a, b, exact


def test_metrics_end_to_end():
    """Each number of the command is its definition's, for every kind of reference, its cache included."""
    a, b, exact = two_sets()
    with tempfile.TemporaryDirectory() as folder:
        write_images(f"{folder}/a", a)
        write_images(f"{folder}/b", b)
        np.savez(f"{folder}/a.npz", a)
        np.savez_compressed(f"{folder}/b.npz", b)
        flags = (f"--out={folder}/out", "--batch_size=7", "--workers=0")
        for samples, reference in (("a", "b"), ("a.npz", "b"), ("a", "b.npz"), ("a", "b.means.npz"), ("a", "b")):
            result, text = run_fid(f"{folder}/{samples}", f"{folder}/{reference}", *flags, net=Means())
            for key, value in exact.items():
                name = f"{samples} {reference} {key}"
                np.testing.assert_allclose(result[key], value, rtol=1e-6, atol=1e-9, err_msg=name)
            assert result["images"] == dict(samples=40, reference=50, reference_for_recall=50)
            assert result["features"] == "means" and "FD (means)" in text
            assert "not comparable with numbers on Inception's" in text and "biased" in text
        assert Path(f"{folder}/b.npz.means.npz").exists()


def test_reference_cache():
    """The reference is measured once; other weights and another image make its cache stale; no other net takes it."""
    a, b, exact = two_sets()
    with tempfile.TemporaryDirectory() as folder:
        write_images(f"{folder}/a", a)
        write_images(f"{folder}/b", b)
        arguments = (f"{folder}/a", f"{folder}/b", f"--out={folder}/out", "--workers=0", "--metrics=fid")
        run_fid(*arguments, net=Means())
        with mock.patch.object(fid, "image_statistics", wraps=fid.image_statistics) as measured:
            run_fid(*arguments, net=Means())
            assert measured.call_count == 1          # the samples alone
        other = Means()
        other.weight.mul_(0.5)
        other.forward = lambda images: [2 * part for part in Means.forward(other, images)]
        np.testing.assert_allclose(run_fid(*arguments, net=other)[0]["fid"], 4 * exact["fid"], rtol=1e-6)
        cache = f"{folder}/b.means.npz"
        fails(lambda: run_fid(f"{folder}/a", cache, f"--out={folder}/out", net=Means()), "statistics of other features")
        Image.fromarray(a[0]).save(f"{folder}/b/0050.png")
        assert run_fid(*arguments, net=Means())[0]["images"]["reference"] == 51


def test_chosen_metrics():
    """--metrics leaves out the rest; what too few images do not allow is said; an unknown name lists the known."""
    with tempfile.TemporaryDirectory() as folder:
        write_images(f"{folder}/a", pixels(9, 12, "left"))
        write_images(f"{folder}/b", pixels(9, 12, "right"))
        write_images(f"{folder}/few", pixels(3, 12, "few"))
        flags = (f"--out={folder}/out", "--workers=0")
        result, text = run_fid(f"{folder}/a", f"{folder}/b", *flags, "--metrics=recall,is", net=Means())
        assert "recall" in result and "is" in result and "fid" not in result and "sfid" not in result
        assert "precision" not in text and "FD" not in text and "biased" not in text
        result, text = run_fid(f"{folder}/few", f"{folder}/b", *flags, "--metrics=recall,fid", net=Means())
        assert "fid" in result and "recall" not in result and re.search("recall +left out", text)
        sets = (f"{folder}/a", f"{folder}/b", *flags)
        fails(lambda: run_fid(*sets, "--metrics=fad", net=Means()), "--metrics=fad: there are fid, sfid")


def test_missing_sets():
    """A path that leads nowhere is named; without samples the advice is sample.py."""
    with tempfile.TemporaryDirectory() as folder:
        write_images(f"{folder}/a", pixels(4, 12, "left"))
        out = f"--out={folder}/out"
        fails(lambda: run_fid(f"{folder}/c", f"{folder}/a", out, net=Means()), f"no folder or .npz {folder}/c")
        fails(lambda: run_fid(f"{folder}/a", f"{folder}/c", out, net=Means()), f"no folder or .npz {folder}/c")
        fails(lambda: run_fid(out, net=Means()), "python sample.py")


def test_adm_statistics():
    """The real network through the command, against ADM's statistics, with and without images."""
    a, b = pixels(6, 32, "ia"), pixels(7, 32, "ib", 150)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(fill(golden("inception_fid")), f"{folder}/weights.pth")
        np.savez(f"{folder}/a.npz", a)
        net = fid.load_inception(f"{folder}/weights.pth")
        with torch.no_grad():
            left, right = net(planes(a)), net(planes(b))
        (mu, sigma), (mu_s, sigma_s) = gaussian(right[0]), gaussian(right[1])
        np.savez(f"{folder}/adm.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, arr_0=b)
        np.savez(f"{folder}/adm_bare.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
        flags = (f"--out={folder}/out", "--workers=0", f"--inception={folder}/weights.pth")
        result, text = run_fid(f"{folder}/a.npz", f"{folder}/adm.npz", *flags)
        exact = [fid.frechet_distance(*gaussian(left[k]), *gaussian(right[k])) for k in (0, 1)]
        np.testing.assert_allclose([result["fid"], result["sfid"]], exact, rtol=1e-5)
        np.testing.assert_allclose(result["is"], fid.inception_score(left[2], 1)[0], rtol=1e-6)
        assert (result["precision"], result["recall"]) == fid.precision_recall(right[0], left[0])
        assert result["images"] == dict(samples=6, reference=None, reference_for_recall=7)
        assert "features: inception\n" in text and "FID " in text
        bare, text = run_fid(f"{folder}/a.npz", f"{folder}/adm_bare.npz", *flags, "--metrics=fid,precision")
        np.testing.assert_allclose(bare["fid"], result["fid"], rtol=1e-9)
        assert "precision" not in bare and re.search(r"precision +left out: it needs the reference's images", text)
        sets = (f"{folder}/a.npz", f"{folder}/adm.npz")
        fails(lambda: run_fid(*sets, *flags, net=Means()), "other features: inception, not means")


def toy_run(folder):
    """A folder of training images as samples, an untrained tokenizer, a diffusion checkpoint -> the samples' labels."""
    train = tokenizer.Shapes("train", 32, cache=SHARED)
    write_images(f"{folder}/samples", train.images[-200:].transpose(0, 2, 3, 1))
    coder = dict(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
    model = tokenizer.Tokenizer(resolution=32, downsample=8, z_dim=4, decoder_kind="ldm", encoder=coder, decoder=coder)
    save = tokenizer.save_checkpoint
    save(f"{folder}/tokenizer.pt", kind="tokenizer", arch=model.arch, model=model.state_dict(), ema={},
         config=dict(data="shapes"))
    save(f"{folder}/diffusion.pt", kind="diffusion", latent_mean=torch.zeros(4), latent_std=torch.ones(4))
    return train.labels[-200:].copy()


def write_labels(folder, labels):
    named = {f"{i:04d}.png": int(label) for i, label in enumerate(labels)}
    Path(folder, "samples", "labels.json").write_text(json.dumps(named))


def test_two_processes_same_numbers():
    """Two processes print what one does, shares of unequal length included."""
    a, b = pixels(21, 32, "pa", 200), pixels(19, 32, "pb", 180)
    with tempfile.TemporaryDirectory() as folder:
        write_images(f"{folder}/a", a)
        np.savez_compressed(f"{folder}/b.npz", b)
        fid.load_features("toy", SHARED)             # trained here, found by the two
        arguments = (f"{folder}/a", f"{folder}/b.npz", f"--out={folder}/out", f"--cache={SHARED}", "--features=toy",
                     "--batch_size=4", "--workers=0")
        alone, _ = run_fid(*arguments)
        os.remove(f"{folder}/b.npz.toy.npz")
        torchrun("fid.py", *arguments)
        together = json.loads(Path(f"{folder}/out/fid.json").read_text())
        assert alone["images"] == together["images"] and {"fid", "is", "precision", "recall"} <= together.keys()
        for key in ("fid", "is", "precision", "recall"):
            np.testing.assert_allclose(together[key], alone[key], rtol=1e-5)


def test_fid_command_errors():
    """One line and a status, no traceback."""
    line = script("fid.py", "/nowhere/a", "/nowhere/b", "--features=toy", f"--cache={SHARED}", status=1)
    assert line.splitlines()[-1].startswith("fid.py: no folder or .npz /nowhere")
    assert "did you mean --metrics?" in script("fid.py", "--metric=fid", status=2)


# pairs and tokenizers

def paired_folders(folder):
    """Folders a and b of five images, b brighter by more and more -> both in [-1, 1], and their PSNR."""
    a = pixels(5, 24, "pairs")
    b = np.clip(a.astype(int) + np.array([0, 5, 10, 20, 40])[:, None, None, None], 0, 255).astype(np.uint8)
    write_images(f"{folder}/a", a)
    write_images(f"{folder}/b", b)
    mse = ((a / 255.0 - b / 255.0) ** 2).mean((1, 2, 3))
    return [planes(x).float() / 127.5 - 1 for x in (a, b)], 10 * np.log10(1 / np.maximum(mse, 1e-10 / 4))


def test_pairs():
    """PSNR and SSIM of the images of equal names, whatever the suffix: mean and standard deviation."""
    with tempfile.TemporaryDirectory() as folder:
        floats, exact = paired_folders(folder)
        os.rename(f"{folder}/b/0003.png", f"{folder}/b/0003.bmp")
        result, text = run_fid(f"{folder}/a", f"{folder}/b", f"--out={folder}/out", "--pairs=1", "--workers=0",
                               "--metrics=psnr,ssim", "--batch_size=2")
        np.testing.assert_allclose([result["psnr"], result["psnr_std"]], [exact.mean(), exact.std()], rtol=1e-4)
        np.testing.assert_allclose(result["ssim"], tokenizer.ssim(*floats).mean().item(), rtol=1e-5)
        assert result["images"] == dict(pairs=5) and "pairs 5" in text and "+-" in text
        assert "LPIPS" not in text and "features" not in result


def test_pairs_lpips():
    """LPIPS from a file of both weights; without them the table says so."""
    with tempfile.TemporaryDirectory() as folder:
        floats, _ = paired_folders(folder)
        lpips = tokenizer.LPIPS(None)
        state = {}
        for key, value in lpips.state_dict().items():
            state[key if key.startswith("features") else f"lin{key[-1]}.model.1.weight"] = value
        torch.save(state, f"{folder}/vgg.pth")
        arguments = (f"{folder}/a", f"{folder}/b", f"--out={folder}/out", "--pairs=1", "--workers=0")
        result, _ = run_fid(*arguments, f"--lpips_weights={folder}/vgg.pth")
        np.testing.assert_allclose(result["lpips"], lpips(*floats).mean().item(), rtol=1e-4)
        result, text = run_fid(*arguments, "--lpips_weights=/nowhere.pth")
        assert "psnr" in result and "lpips" not in result
        assert re.search("LPIPS +left out", text) and "/nowhere.pth" in text


def test_pairs_refuse():
    """Images without a partner are named, from either side; sizes must be equal; there must be two folders."""
    with tempfile.TemporaryDirectory() as folder:
        paired_folders(folder)
        write_images(f"{folder}/c", pixels(5, 16, "small"))
        flags = (f"--out={folder}/out", "--pairs=1", "--workers=0", "--metrics=psnr")
        fails(lambda: run_fid(f"{folder}/a", f"{folder}/c", *flags), "pairs need equal sizes")
        fails(lambda: run_fid(f"{folder}/a", *flags), "--pairs=1 takes two folders")
        Image.fromarray(pixels(1, 24, "twin")[0]).save(f"{folder}/b/0000.bmp")
        fails(lambda: run_fid(f"{folder}/a", f"{folder}/b", *flags), "1 images have no partner of the same name: 0000")
        for name in ("0000.bmp", "0001.png", "0002.png"):
            os.remove(f"{folder}/b/{name}")
        for a, b in ("ab", "ba"):
            run = functools.partial(run_fid, f"{folder}/{a}", f"{folder}/{b}", *flags)
            fails(run, "2 images have no partner of the same name: 0001, 0002")


def clip_folder(folder):
    """CLIP's files: the golden towers, and letters for tokens."""
    g = golden("clip_vision")
    text = golden("text")
    keys = text["towers"]["clip"]["keys"]
    state = {key: tensor(key, shape, text["salt"]) for key, shape in keys.items()}
    state.update(fill(g), logit_scale=torch.zeros([]))
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    write_safetensors(f"{folder}/model.safetensors", state)
    letters = [chr(c) + end for end in ("", "</w>") for c in range(97, 123)]
    vocab = {letter: i for i, letter in enumerate(letters)} | {"<|startoftext|>": 118, "<|endoftext|>": 119}
    Path(f"{folder}/vocab.json").write_text(json.dumps(vocab))
    Path(f"{folder}/merges.txt").write_text("#version: 0.2\n")
    return g, (image(3, 3, 32, 32, salt=g["salt"]) * 255).round().to(torch.uint8)


@torch.no_grad()
def test_clip_golden():
    """The image tower's states and projections are transformers'."""
    with tempfile.TemporaryDirectory() as folder:
        g, images = clip_folder(folder)
        path = f"{folder}/model.safetensors"
        vit = tokenizer.load_vfm(path, num_heads=g["heads"])
        state, last = vit(tokenizer.to_float(images), layers=(2, -1), cls=True)
        check(state, g["last"], 1e-4, 1e-5)
        projection = tokenizer.load_weights(path)["visual_projection.weight"]
        torch.testing.assert_close(last[:, 0] @ projection.T, torch.tensor(g["projected"]), rtol=1e-4, atol=1e-5)
        assert vit.resize(torch.zeros(1, 3, 64, 64)).shape[2:] == (32, 32) and vit.interpolation == "bicubic"
        by_name = tokenizer.VFMS["clip-vit-large-patch14"][1]
        shared = by_name.keys() - {"embed_dim", "depth", "num_heads", "mlp_hidden", "patch_size"}
        assert shared and all(by_name[key] == vit.config[key] for key in shared)


@torch.no_grad()
def test_clip_score():
    """Mean of 100 max(cos, 0) of each sample with its own prompt, from prompts.json or of a file in turn."""
    with tempfile.TemporaryDirectory() as folder:
        clip_folder(folder)
        images = pixels(7, 32, "clip")
        write_images(f"{folder}/samples", images)
        captions = ["q", "owl", "two dogs"]
        asked = [captions[i % 3] for i in range(7)]
        path = f"{folder}/model.safetensors"
        last, = tokenizer.load_vfm(path)(tokenizer.to_float(planes(images)), cls=True)
        projection = tokenizer.load_weights(path)["visual_projection.weight"]
        cosines = F.cosine_similarity(last[:, 0] @ projection.T, tokenizer.load_text(path)(asked)[1])
        want = 100 * cosines.clamp(min=0).mean().item()
        assert (cosines < 0).any() and (cosines > 0).any()  # else the clamp is not seen
        flags = (f"{folder}/samples", f"--clip={folder}", f"--out={folder}", "--batch_size=3", "--workers=0")
        fails(lambda: run_fid(*flags), "prompts.json", "--prompts")
        Path(folder, "lines.txt").write_text("\n".join(captions))
        found, shown = run_fid(*flags, f"--prompts={folder}/lines.txt")
        np.testing.assert_allclose(found["clip"], want, rtol=1e-4)
        assert found["images"] == dict(pairs=7) and re.search(r"CLIP score +\d+\.\d+ \+- ", shown)
        named = {f"{i:04d}.png": text for i, text in enumerate(asked)}
        Path(folder, "samples", "prompts.json").write_text(json.dumps(named))
        assert run_fid(*flags)[0]["clip"] == found["clip"]
        assert run_fid(flags[0], f"--clip={path}", *flags[2:])[0]["clip"] == found["clip"]
        Path(folder, "samples", "prompts.json").write_text(json.dumps({**named, "0001.png": "zebra"}))
        assert run_fid(*flags)[0]["clip"] != found["clip"]
        fails(lambda: run_fid(*flags, f"--prompts={folder}/none"), "no file")
        fails(lambda: run_fid(*flags, "--metrics=fid"), "--metrics")
        np.savez(f"{folder}/samples.npz", arr_0=images)
        fails(lambda: run_fid(f"{folder}/samples.npz", *flags[1:]), "prompts.json")
        npz, _ = run_fid(f"{folder}/samples.npz", *flags[1:], f"--prompts={folder}/lines.txt")
        assert npz["clip"] == found["clip"]
        Path(folder, "lines.txt").write_text("")
        fails(lambda: run_fid(*flags, f"--prompts={folder}/lines.txt"), "lines.txt is empty")
        state = dict(tokenizer.load_weights(f"{folder}/model.safetensors"))
        del state["visual_projection.weight"]
        write_safetensors(f"{folder}/model.safetensors", state)
        fails(lambda: run_fid(*flags), "visual_projection.weight")


def test_evaluate():
    """fid.py --tokenizer: PSNR, rFD and equivariance errors of held-out images by their definitions, in batches."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(tokenizer.Shapes.lengths, val=32):
        toy_run(folder)
        result, text = run_fid(f"--tokenizer={folder}/tokenizer.pt", f"--out={folder}", f"--cache={folder}",
                               "--batch_size=5", "--workers=0", net=Means())
        model = tokenizer.load_tokenizer(f"{folder}/tokenizer.pt")
        images = torch.from_numpy(tokenizer.Shapes("val", 32).draw(np.arange(32)))
        floats = images.float() / 127.5 - 1
        mean = model.encode(floats)[0]
        decoded = tokenizer.to_uint8(model.decode(mean))
        psnr = tokenizer.psnr(floats, decoded.float() / 127.5 - 1).mean().item()
        np.testing.assert_allclose(result["psnr"], psnr, rtol=1e-4)
        exact = fid.frechet_distance(*gaussian(Means()(images)[0]), *gaussian(Means()(decoded)[0]))
        np.testing.assert_allclose(result["rfid"], exact, rtol=1e-3)
        turned, wanted = model.encode(floats.rot90(1, (2, 3)))[0], mean.rot90(1, (2, 3))
        error = (turned - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
        np.testing.assert_allclose(result["rotation"], error.mean().item(), rtol=1e-3)
        small = model.encode(F.interpolate(floats, (16, 16), mode="bilinear", antialias=True))[0]
        wanted = F.avg_pool2d(mean, 2)
        error = (small - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
        np.testing.assert_allclose(result["scaling"], error.mean().item(), rtol=1e-3)
        assert result["images"] == dict(pairs=32) and "rFD (means)" in text and re.search("LPIPS +left out", text)


def test_evaluates_on_what_it_was_trained_for():
    """Data and size are the checkpoint's unless flags say otherwise; what Inception can be replaced by is said."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(tokenizer.Shapes.lengths, val=8):
        toy_run(folder)
        arguments = (f"--tokenizer={folder}/tokenizer.pt", f"--out={folder}", f"--cache={folder}", "--workers=0")
        assert "held-out shapes, 32 px" in run_fid(*arguments, net=Means())[0]["reference"]
        assert "held-out shapes, 48 px" in run_fid(*arguments, "--image_size=48", net=Means())[0]["reference"]
        write_images(f"{folder}/own", pixels(6, 40, "own"))
        arguments = (*arguments, f"--data={folder}/own", "--images=4")
        result, text = run_fid(*arguments, "--lpips_weights=/nowhere.pth", net=Means())
        assert result["reference"] == f"held-out {folder}/own, 32 px" and result["images"] == dict(pairs=4)
        assert re.search("LPIPS +left out", text) and "training images" in text
        result, text = run_fid(*arguments, "--inception=/nowhere.pth")
        assert "--inception=PATH, or other --features" in text and re.search("rFID +left out", text)
        assert {"psnr", "ssim", "rotation"} <= result.keys() and "rfid" not in result
        fails(lambda: run_fid(*arguments, "--features=inception", "--inception=/nowhere.pth"), "--inception=PATH")


# the toy

def test_toy_table():
    """python fid.py on a stand-in run: the classifier's accuracy, the floor, an untrained pipeline, wrong labels."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(tokenizer.Shapes.lengths, val=1000):
        labels = toy_run(folder)
        labels[:20] = (labels[:20] + 1) % 10
        write_labels(folder, labels)
        result, text = run_fid(f"--out={folder}", f"--cache={SHARED}", "--workers=0")
        rows = result["rows"]
        assert [*rows] == ["held_out", "real", "samples", "reconstructions", "samples_to_reconstructions", "untrained"]
        assert rows["held_out"]["agreement"] > 0.97 and abs(rows["samples"]["agreement"] - 0.9) < 0.03
        assert rows["samples"]["fd"] < 3 * rows["real"]["fd"] and rows["samples"]["fd"] < rows["untrained"]["fd"] / 4
        assert rows["reconstructions"]["psnr"] < 20 and rows["samples_to_reconstructions"]["fd"] > rows["samples"]["fd"]
        assert all(row["label"] in text for row in rows.values())
        assert "not comparable with numbers on Inception's" in text


def test_toy_table_of_samples_alone():
    """Without labels and checkpoints there are three rows, and no agreement of the samples."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(tokenizer.Shapes.lengths, val=1000):
        images = tokenizer.Shapes("train", 32, cache=SHARED).images[-50:]
        write_images(f"{folder}/samples", images.transpose(0, 2, 3, 1))
        rows = run_fid(f"--out={folder}", f"--cache={SHARED}", "--workers=0")[0]["rows"]
        assert [*rows] == ["held_out", "real", "samples"] and rows["samples"]["agreement"] is None


def test_toy_table_refuses():
    """Labels that lack images, and samples of other data."""
    with tempfile.TemporaryDirectory() as folder:
        write_labels(folder, toy_run(folder)[:-2])
        fails(lambda: run_fid(f"--out={folder}", net=Means()), "run sample.py again")
        tokenizer.save_checkpoint(f"{folder}/diffusion.pt", kind="diffusion", config=dict(data="CIFAR10"))
        fails(lambda: run_fid(f"--out={folder}", net=Means()), "made from --data=CIFAR10", "REFERENCE")


def test_captions_are_read_back():
    """read_caption is Shapes.caption's inverse, also of lower case without commas; other texts are refused."""
    val = Shapes("val", 32)
    a = val.attributes(np.arange(1000))
    a.update(place=2 * (a["x"] >= 0) + (a["y"] >= 0), size=a["scale"] > 0.675)
    for i in range(1000):
        wanted = {name: int(a[name][i]) for name in fid.Classifier.attributes}
        assert fid.read_caption(val.caption(i)) == wanted, i
    assert fid.read_caption(val.caption(999).lower().replace(",", "")) == wanted
    good = "a large red star at the upper left on a blue background, stripes"
    fid.read_caption(good)
    for text in ("", "a red star", good + " plain", good.replace("star", "house"), good.replace("on", "at")):
        fails(lambda: fid.read_caption(text), "not a caption of shapes", text)


def test_geneval_counts():
    """Shares of made-up values: each, all six, bound or swapped where hue and ground differ, by pairs left out."""
    asked = np.array([[0, 1, 2, 3, 0, 1], [4, 6, 0, 2, 1, 0], [0, 0, 1, 5, 2, 1], [1, 2, 3, 2, 3, 0]])
    named = asked.copy()
    named[0, [1, 3]] = 3, 1  # exchanged
    named[1, 0] = 5  # a pair left out, 4 + 6, of the wrong shape
    named[3, [1, 4]] = 7, 0  # hue and ground are one
    scores = fid.score_captions(named, asked)
    wanted = dict(
        shape=3 / 4, hue=2 / 4, texture=1, ground=3 / 4, place=3 / 4, size=1, overall=19 / 24, all=1 / 4,
        binding=2 / 3, swapped=1 / 3, shape_seen=1, all_seen=0, shape_left_out=1 / 2, all_left_out=1 / 2)
    assert scores == wanted
    scores = fid.score_captions(named[3:], asked[3:])
    assert [key for key, share in scores.items() if share is None] == [
        "binding", "swapped", "shape_left_out", "all_left_out"]
    val = Shapes("val", 32)
    asked = np.array([[fid.read_caption(val.caption(i))[key] for key in fid.Classifier.attributes] for i in range(200)])
    named = asked.copy()
    named[val.left_out(asked[:, 0], asked[:, 1]), 0] += 1
    scores = fid.score_captions(named, asked)
    assert scores["shape_seen"] == 1 and scores["shape_left_out"] == 0


def test_geneval_command():
    """Samples with prompts.json are judged by their captions, beside as many held-out images by theirs."""
    val = Shapes("val", 32, length=40)
    images = val.draw(np.arange(40))
    captions = [val.caption(i) for i in range(40)]
    known = {}
    for image, text in zip(images, captions):
        known[image.tobytes()] = [fid.read_caption(text)[name] for name in fid.Classifier.attributes]

    class Names(Means):
        def names(self, images):
            return torch.tensor([known.get(image.numpy().tobytes(), [0] * 6) for image in images])

    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(Shapes.lengths, train=64, val=40):
        write_images(f"{folder}/samples", images[:30].transpose(0, 2, 3, 1))
        arguments = (f"--out={folder}", f"--cache={folder}", "--workers=0")

        def judged(captions, net=Names()):
            named = {f"{i:04d}.png": text for i, text in enumerate(captions)}
            Path(folder, "samples", "prompts.json").write_text(json.dumps(named))
            result, text = run_fid(*arguments, net=net)
            return result.get("geneval"), result["rows"]["samples"], text

        found, row, text = judged(captions[:30])
        assert found["images"] == 30 and found["same_captions"] and found["samples"] == found["real"]
        assert found["real"]["all"] == 1 and row["fd"] > 0
        assert re.search(r"samples +real images of the same captions\nshape +100.0% +100.0%\n", text)
        found, row, text = judged(captions[1:31])  # each image beside the next one's caption
        values = np.array([*known.values()])
        assert not found["same_captions"] and "images of other captions" in text
        assert found["samples"] == fid.score_captions(values[:30], values[1:31]) and found["real"]["all"] == 1
        assert row["agreement"] is not None
        found, row, text = judged(captions[:30], Means())  # other features name nothing
        assert found is None and "captions" not in text
        # a model of classes beside them is not theirs
        tokenizer.save_checkpoint(f"{folder}/diffusion.pt", kind="diffusion", config=dict(data="CIFAR10"))
        assert judged(captions[:30])[0]["real"]["all"] == 1
        fails(lambda: judged(captions[:20]), "prompts.json lacks some", "run sample.py again")
        fails(lambda: judged(["a red star"] * 30), "not a caption of shapes", "REFERENCE")


def test_placement_leaves_the_judge_alone():
    """The Classifier's features and other heads come out the same to the bit, trained with place and size or not."""
    states = []
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(Shapes.lengths, train=64):
        for count in (4, 6):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                net = fid.Classifier()
            before = net.placement[-1].weight.clone()
            logits = net.logits if count == 6 else lambda x: net.head(net.body(x).mean((2, 3)))
            quiet(tokenizer.train_on_shapes, "", net, lambda x: [logits(x)], net.attributes[:count], folder, "cpu",
                  images=64, batch=16, lr=1e-2)
            assert torch.equal(before, net.placement[-1].weight) == (count == 4)
            states.append({key: value for key, value in net.state_dict().items() if "placement" not in key})
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


# -----------------------------------------------------------------------------
# align.py

SMALL = dict(z_dim=4, level_dim=16, widths=(16, 16, 16, 16), fuse_dims=(16, 16), w_dim=16, post_factor=2,
             ch_mult=(1, 1, 1, 1))


@contextlib.contextmanager
def small_world(methods=("vfmvae",), reg=False):
    """A folder like out/ after tokenizer.py and diffusion.py, with random weights and a few hundred shapes; the toy's
    classifier has random weights, too."""
    torch.manual_seed(0)
    classifier = fid.Classifier().requires_grad_(False).eval()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.object(Shapes, "lengths", dict(train=320, val=200)))
        stack.enter_context(mock.patch.object(align, "load_features", lambda name, cache, device: classifier))
        for name in tokenizer.TOY_VFMS:
            vit = tokenizer.ToyViT(**tokenizer.TOY_VIT)
            tokenizer.save_checkpoint(f"{folder}/vfm-{name}.pt", kind="vfm", name=name, model=vit.state_dict())
        for method in methods:
            sub = folder if len(methods) == 1 else f"{folder}/{method}"
            cfg = tokenizer.Config(**{**tokenizer.PRESETS["toy"], **SMALL, "preset": "toy", "method": method,
                                      "out": folder, "cache": folder, "decoder": "vfmvae"})
            net, _ = tokenizer.build_tokenizer(cfg)
            averages = {name: p.detach() for name, p in net.named_parameters() if not name.startswith("vfm.")}
            tokenizer.save_checkpoint(
                f"{sub}/tokenizer.pt", kind="tokenizer", config=dataclasses.asdict(cfg), arch=net.arch, ema=averages,
                model=net.state_dict(), gan=None, anchor=None, stage=1, images=3200, classes=Shapes.classes)
            save_dit(sub, "diffusion.pt", "reg" if reg else "none")
        yield folder


def save_dit(folder, name, kind, step=3):
    """A diffusion checkpoint on folder/tokenizer.pt, its blocks away from the zeros of adaLN-zero -> its path."""
    cfg = diffusion.Config(**{**diffusion.PRESETS["toy"], "out": str(folder), "compile": False, "align": kind,
                              "hidden_size": 32, "num_heads": 2, "depth": 3, "projector_dim": 16, "warmup": 0})
    arch = diffusion.model_arch(cfg, 4, 4, 10, 128 if kind != "none" else 0)
    model, _, ema, optimizer = diffusion.build(cfg, WORLD, arch)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.02)
    ema.load_state_dict(model.state_dict())
    tokenizer.save_checkpoint(
        f"{folder}/{name}", kind="diffusion", config=dataclasses.asdict(cfg), arch=arch, step=step, images=0,
        latents="", latent_mean=torch.zeros(4), latent_std=torch.ones(4) * 0.5, tokenizer=f"{folder}/tokenizer.pt",
        classes=Shapes.classes, image_size=32, **diffusion.full_state(model, ema, optimizer))
    return f"{folder}/{name}"


def run_align(folder, *flags):
    """align.py's command line on a small world -> what it prints."""
    return command(align, f"--out={folder}", f"--cache={folder}", *flags)


def align_rows(folder):
    return json.loads((Path(folder) / "align.json").read_text())["rows"]


def test_cknna_golden():
    """CKNNA of raw features is the reference's, which was printed for features that it prepared itself; with every
    neighbour it is the unbiased CKA."""
    g = golden("cknna")
    n, (da, db) = g["n"], g["dims"]
    base = noise(n * 6, "base").reshape(n, 6)

    def mixed(key, d):
        return (base @ noise(6 * d, key).reshape(6, d) + 0.3 * noise(n * d, "e" + key).reshape(n, d)).float()

    a, b, unrelated = mixed("A", da), mixed("B", db), noise(n * db, "C").reshape(n, db).float()
    for k in (5, 10, 20):
        np.testing.assert_allclose(align.cknna(a, b, k), g["expect"][f"cknna_A_B_k{k}"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(align.cknna(a, unrelated, k), g["expect"][f"cknna_A_C_k{k}"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(align.cknna(a, b, n - 1), g["expect"]["cka_unbiased_A_B"], rtol=1e-5)
    np.testing.assert_allclose(align.cknna(a, a), 1, rtol=1e-3)


def transformed_images(images, index, rows, seed=0):
    """condition -> {index: transformed image}"""
    found = {}
    for condition, groups in align.transformed(images[rows], index[rows], [1.0, 0.5, 0.25], seed):
        found[condition] = {}
        for at, some in groups:
            found[condition].update({int(index[rows][int(i)]): each for i, each in zip(at, some)})
    return found


def test_transformations_depend_on_seed_and_index():
    """SE-CKNNA's transformations of an image are the same in whatever batch it stands, and others with another seed."""
    torch.manual_seed(0)
    images, index = torch.rand(12, 3, 32, 32) * 2 - 1, np.arange(100, 112)
    whole = transformed_images(images, index, np.arange(12))
    some = transformed_images(images, index, np.array([7, 2, 9]))
    other = transformed_images(images, index, np.arange(12), seed=1)
    assert list(whole) == list(align.CONDITIONS)
    for condition in whole:
        assert len(whole[condition]) == 12
        for i, each in some[condition].items():
            assert torch.equal(whole[condition][i], each), condition
        pairs = zip(whole[condition].values(), other[condition].values())
        same = sum(torch.equal(a, b) for a, b in pairs)
        assert same == 12 if condition == "clean" else same < 6, condition
    assert {each.shape[-1] for each in whole["equivariance"].values()} == {32, 16, 8}


def test_noise_of_se_cknna():
    """The noise conditions have the paper's standard deviations, of the pixel range, and are clipped to it."""
    torch.manual_seed(0)
    images, index = torch.rand(12, 3, 32, 32) * 2 - 1, np.arange(12)
    whole = transformed_images(images, index, index)
    inside = images.abs() < 0.2  # where clipping does nothing
    for condition, std in zip(align.CONDITIONS[2:], (0.05, 0.10, 0.15, 0.20)):
        moved = torch.stack([whole[condition][i] for i in range(12)])
        assert abs((moved - images)[inside].std() / (2 * std) - 1) < 0.05
        assert moved.abs().max() == 1


def test_linear_probe():
    """The probe tells separable classes apart, does not better than chance on noise, and survives a dead channel."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (600,), generator=g)
    centres = torch.randn(5, 16, generator=g) * 3
    assert align.linear_probe(centres[labels] + torch.randn(600, 16, generator=g), labels) > 0.97
    features = torch.randn(600, 16, generator=g)
    chance = align.linear_probe(features, labels)
    assert 0.1 < chance < 0.32
    assert align.linear_probe(torch.cat([features, torch.zeros(600, 1)], 1), labels) == chance


def test_chart():
    """Every series is drawn in its colour, and nothing but the picture is left in the folder."""
    with tempfile.TemporaryDirectory() as folder:
        a = np.arange(3), np.array([0.1, 0.4, 0.2]), np.full(3, 0.1)
        b = np.arange(2), np.array([0.3, 0.3]), np.zeros(2)
        align.chart(f"{folder}/chart.png", dict(p=dict(a=a, b=b), q=dict(b=b)))
        pixels = np.array(Image.open(f"{folder}/chart.png").convert("RGB")).reshape(-1, 3).astype(int)
        for colour in ([0x1f, 0x77, 0xb4], [0xff, 0x7f, 0x0e]):
            assert (np.abs(pixels - colour).max(1) < 30).sum() > 100
        align.chart(f"{folder}/chart.png", dict(point=dict(a=(np.zeros(1), np.full(1, 0.5), np.zeros(1)))))
        assert os.listdir(folder) == ["chart.png"]


def test_pooled_blocks():
    """A block's feature is the mean of its patch tokens (not the class token), of the normalised latent at t = 0.5 for
    the null class: the last block's is what the DiT's final layer reads."""
    with small_world(reg=True) as folder, torch.no_grad():
        (subject,), vfms = align.load_subjects([f"{folder}/diffusion.pt"], WORLD)
        dit, = subject.networks.values()
        images = torch.rand(5, 3, 32, 32) * 2 - 1
        found = dict(align.pooled_features([subject], vfms, images))
        read = []
        dit.final_layer.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
        z = subject.tokenizer.encode(images)[0] / 0.5
        cls = vfms["toy"](images, cls=True)[0][:, 0]
        dit(z, torch.full((5,), 0.5), torch.full((5,), 10), cls)
        torch.testing.assert_close(found[f"{folder}/diffusion.pt", "block 3"], read[0][:, 1:].mean(1))
        torch.testing.assert_close(found["vfm", "toy"], vfms["toy"](images)[0].mean(1))


def test_align_measures():
    """The table has a row for each tokenizer's latents and each DiT's blocks against each VFM; its numbers are those
    of `cknna` and `linear_probe` on features computed by hand, SE-CKNNA the mean over the conditions."""
    with small_world(("vfmvae", "vae"), reg=True) as folder:
        later = save_dit(f"{folder}/vfmvae", "later.pt", "repa", step=9)
        paths = f"{folder}/vfmvae/diffusion.pt", f"{folder}/vae/tokenizer.pt", later
        printed = run_align(folder, *paths[:1], "--images", "60", *paths[1:], "--reference=toy-blind")
        rows = align_rows(folder)
        parts = {(row["name"], row["part"]) for row in rows}
        assert len(parts) == 2 + 2 * 3 and len(rows) == 2 * len(parts)
        assert f"{folder}/vae/tokenizer.pt latents" in printed and Path(folder, "align.png").exists()

        net, vfm = tokenizer.load_tokenizer(f"{folder}/vfmvae/tokenizer.pt"), tokenizer.load_vfm("toy", folder)
        data = Shapes("val")
        index = np.linspace(0, 199, 60).astype(int)
        x = tokenizer.to_float(torch.stack([data[i][0] for i in index]))
        with torch.no_grad():
            latents = net.encode(x)[0].mean((2, 3))
            want = align.cknna(latents, vfm(x)[0].mean(1))
        row = next(row for row in rows if row["part"] == "latents" and row["vfm"] == "toy" and "vfmvae" in row["name"])
        np.testing.assert_allclose(row["clean"], want, rtol=1e-3, atol=1e-5)
        want = align.linear_probe(latents, torch.tensor(data.labels[index]))
        np.testing.assert_allclose(row["probe"], want, atol=0.04)
        for row in rows:
            np.testing.assert_allclose(row["SE-CKNNA"], np.mean([row[condition] for condition in align.CONDITIONS]))


def test_align_measures_alike_in_company():
    """Whoever stands beside it, and however many processes load, a tokenizer measures the same."""
    with small_world(("vfmvae", "vae")) as folder:
        found = []
        for workers, order in enumerate((("vfmvae", "vae"), ("vae", "vfmvae"))):
            paths = [f"{folder}/{method}/tokenizer.pt" for method in order]
            run_align(folder, "--images=20", f"--workers={workers}", *paths)
            found.append(sorted(align_rows(folder), key=lambda row: (row["name"], row["vfm"])))
        assert found[0] == found[1]


def test_probe_takes_the_labels_that_were_read():
    """--skip_bad=1: of the image that stands in, not of the one that cannot be read."""
    read = tokenizer.Images.__getitem__
    with small_world() as folder, mock.patch.object(align, "linear_probe", return_value=0.5) as probe, \
            mock.patch.object(tokenizer.Images, "__getitem__", lambda data, item: (read(data, item)[0], 3)):
        run_align(folder, "--images=20", "--workers=0")
    assert all((call.args[1] == 3).all() for call in probe.call_args_list) and probe.called


def test_align_leaves_out_scales():
    """Scales at which the images would leave a grid (48 / 4 px and 48 * 3/4 px, of patches of 8) are not drawn from."""
    with small_world() as folder:
        run_align(folder, f"{folder}/tokenizer.pt", "--images=20", "--image_size=48")
        assert json.loads(Path(folder, "align.json").read_text())["scales"] == [1, 0.5]


def test_align_on_two_processes():
    """Two processes that share the images measure what one does."""
    with small_world() as folder:
        flags = f"--cache={folder}", f"{folder}/tokenizer.pt", "--images=50"
        script("align.py", f"--out={folder}/one", *flags)
        torchrun("align.py", f"--out={folder}/two", *flags)
        for a, b in zip(align_rows(f"{folder}/one"), align_rows(f"{folder}/two")):
            for condition in align.CONDITIONS:
                np.testing.assert_allclose(a[condition], b[condition], rtol=1e-3, atol=1e-4)


def joint_trainer(folder, side):
    """The JointTrainer of a small world's two models just before its first step, and that step's batch."""
    class Stop(Exception):
        pass

    caught = []

    def stop(trainer, batches, step, images_seen):
        caught.extend([trainer, next(iter(batches))])
        raise Stop

    cfg = align.Config(**{**align.PRESETS["toy"], "out": folder, "cache": folder, "steps": 1, "side": side,
                          "batch_size": 8, "compile": False})
    with mock.patch.object(align.JointTrainer, "step", stop), contextlib.suppress(Stop):
        quiet(align.train_jointly, cfg, [f"{folder}/diffusion.pt"], WORLD)
    return caught


def joint_gradients(trainer, batch, repa):
    """{name: gradient} that one step leaves in both models, with an alignment weight of `repa` on both sides."""
    state = copy.deepcopy(trainer.statistics.state_dict())
    trainer.dit_cfg = dataclasses.replace(trainer.dit_cfg, repa_weight=repa)
    trainer.joint_cfg = dataclasses.replace(trainer.joint_cfg, tokenizer_weight=repa)
    tokenizer.seed_step(0, 0)
    trainer.generator_step(tokenizer.to_float(batch[0]), batch[1], 0, 0)
    trainer.statistics.load_state_dict(state)
    found = {}
    for prefix, net in (("tok", trainer.tokenizer), ("dit", trainer.dit)):
        found.update({f"{prefix}.{name}": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
        net.zero_grad()
    return found


def moved(a, b, *prefixes):
    """The names under the prefixes whose gradients differ."""
    return {name for name in b if name.startswith(prefixes)
            and (name not in a or not torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-9))}


def test_joint_gradients_reach_their_side_only():
    """REPA's loss moves the encoder, the DiT's early blocks, or both, as --side says, and the projection in any case;
    never the decoder, nor what lies behind the projection."""
    for reg in (False, True):
        with small_world(reg=reg) as folder:
            trainer, batch = joint_trainer(folder, "both")
            early = [f"dit.blocks.{i}." for i in range(trainer.dit.encoder_depth)]
            for side in ("none", "tokenizer", "diffusion", "both"):
                trainer.joint_cfg = dataclasses.replace(trainer.joint_cfg, side=side)
                a, b = joint_gradients(trainer, batch, 0.0), joint_gradients(trainer, batch, 5.0)
                assert bool(moved(a, b, "tok.adapter.")) == (side in ("tokenizer", "both")), side
                assert bool(moved(a, b, *early)) == (side in ("diffusion", "both")), side
                assert moved(a, b, "dit.projectors."), side
                assert not moved(a, b, "tok.decoder.", "dit.blocks.2.", "dit.final_layer."), side


def test_joint_velocity_never_reaches_the_tokenizer():
    """Another final layer changes the DiT's gradients and none of the tokenizer's."""
    with small_world(reg=True) as folder:
        trainer, batch = joint_trainer(folder, "both")
        a = joint_gradients(trainer, batch, 0.0)
        with torch.no_grad():
            for p in trainer.dit.final_layer.parameters():
                p.mul_(7).add_(0.3)
        b = joint_gradients(trainer, batch, 0.0)
        assert moved(a, b, "dit.final_layer.") and moved(a, b, "dit.blocks.0.")
        assert all(torch.equal(a[name], b[name]) for name in a if name.startswith("tok."))


def test_joint_alignment_gradient_is_exact():
    """What reaches the latents is the gradient of weight x REPA, through the batch's statistics, at the step's own t
    and noise."""
    with small_world() as folder:
        trainer, (images, labels) = joint_trainer(folder, "tokenizer")
        images = tokenizer.to_float(images)
        z = torch.randn(8, 4, 4, 4, requires_grad=True)
        trainer.stage = dataclasses.replace(trainer.stage, kl=0.0, vf=0.0)
        torch.manual_seed(5)
        _, fixed, _ = trainer.latent_losses(images, labels, z, None, z.detach(), 0 * z.detach(), None, images)
        got, = torch.autograd.grad(fixed, z)
        torch.manual_seed(5)
        y = torch.where(torch.rand(8) < 0.1, 10, labels)
        t, eps = torch.randn(8).sigmoid(), torch.randn(8, 4, 4, 4)
        centred = z - z.mean((0, 2, 3), keepdim=True)
        normal = centred / centred.square().mean((0, 2, 3), keepdim=True).sqrt()
        tokens = diffusion.vfm_tokens(trainer.dit_vfm, images, 4)
        repa = diffusion.flow_losses(trainer.dit, normal, y, t, eps, tokens)["repa"].mean()
        want, = torch.autograd.grad(1.5 * repa, z)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-8)


def test_joint_training_on_shrunk_images():
    """Where the equivariance regularisation shrinks the images, the DiT still learns from whole latents, and nothing of
    it reaches the encoder."""
    with small_world() as folder:
        trainer, batch = joint_trainer(folder, "both")
        trainer.stage = dataclasses.replace(trainer.stage, equivariance=True)
        with mock.patch.object(tokenizer, "draw_equivariance", lambda *a: ("image", 0.5, 0)), \
                mock.patch.object(align, "flow_losses", wraps=diffusion.flow_losses) as losses:
            a, b = joint_gradients(trainer, batch, 0.0), joint_gradients(trainer, batch, 5.0)
        assert {call.args[1].shape for call in losses.call_args_list} == {(8, 4, 4, 4)}
        assert moved(a, b, "dit.blocks.0.") and not moved(a, b, "tok.")


def assert_same(a, b, at=""):
    """Nested entries of two checkpoints are equal to the bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for x, y in zip(a, b):
            assert_same(x, y, f"{at}[]")
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, at


JOINT = ("--steps=4", "--batch_size=8", "--images=20", "--side=both", "--compile=0", "--log_interval=2")


def load_pair(folder):
    """Both checkpoints of joint training."""
    pair = torch.load(f"{folder}/joint-both/diffusion.pt", weights_only=True)
    return pair, torch.load(pair["tokenizer"], weights_only=True)


def test_joint_training():
    """Both models train, but not the frozen VFM; the latents' statistics move; both are measured before and after."""
    with small_world(reg=True) as folder:
        assert run_align(folder, *JOINT).count("latents") == 2
        dit, tok = load_pair(folder)
        assert dit["step"] == tok["step"] == 4 and tok["images"] == 3200 + 4 * 8
        assert not torch.equal(dit["latent_mean"], torch.zeros(4))
        begin = torch.load(f"{folder}/tokenizer.pt", weights_only=True)["model"]
        changed = {name.split(".")[0] for name in begin if not torch.equal(begin[name], tok["model"][name])}
        assert changed == {"adapter", "decoder", "vf_proj"}, changed
        begin = torch.load(f"{folder}/diffusion.pt", weights_only=True)["model"]
        assert all(not torch.equal(begin[name], dit["model"][name]) for name in begin)


def test_joint_training_resumes_bit_for_bit():
    """A run in two halves ends as a whole one, whatever a killed save left; another run's checkpoints are refused."""
    with small_world(reg=True) as folder:
        run_align(folder, *JOINT)
        whole = load_pair(folder)
        shutil.rmtree(f"{folder}/joint-both")
        run_align(folder, *JOINT, "--steps=2")
        Path(folder, "joint-both", "tokenizer-0000003.pt").write_bytes(b"of a save that was killed")
        run_align(folder, *JOINT)
        assert_same(whole, load_pair(folder))
        assert [path.name for path in Path(folder, "joint-both").glob("*.pt")].count("diffusion.pt") == 1
        assert len(list(Path(folder, "joint-both").glob("*.pt"))) == 2
        fails(lambda: run_align(folder, *JOINT, "--seed=1"), "another run")
        path, = Path(folder, "joint-both").glob("tokenizer-*.pt")
        tokenizer.save_checkpoint(path, **dict(torch.load(path, weights_only=True), ema={}))
        fails(lambda: run_align(folder, *JOINT, "--steps=6"), str(path), "lacks")


def test_joint_training_of_every_method():
    """Each tokenizer's own losses stand beside those of a plain diffusion model, which gets a projection where a side
    is aligned; with accumulation."""
    for method, side in (
            ("vfmvae", "tokenizer"), ("aligntok", "both"), ("vavae", "diffusion"), ("vae", "none"), ("psvae", "both")):
        with small_world((method,)) as folder:
            run_align(folder, *JOINT, f"--side={side}", "--accumulate=2", "--log_interval=1")
            logged = [json.loads(line) for line in Path(folder, f"joint-{side}", "log.jsonl").read_text().splitlines()]
            assert len(logged) == 4
            for line in logged:
                assert math.isfinite(line["velocity"]) and ("repa" in line) == (side != "none") and "l1" in line
            arch = diffusion.load_diffusion(f"{folder}/joint-{side}/diffusion.pt").about["arch"]
            assert bool(arch["z_dim"]) == (side != "none")
    with small_world() as folder:  # more blocks to align after than there are
        entries = load(f"{folder}/diffusion.pt")
        torch.save(dict(entries, config=dict(entries["config"], encoder_depth=9)), f"{folder}/diffusion.pt")
        run_align(folder, *JOINT, "--steps=1")
        assert load(f"{folder}/joint-both/diffusion.pt")["arch"]["encoder_depth"] == entries["arch"]["depth"]
    with small_world(("rae",)) as folder:
        fails(lambda: run_align(folder, *JOINT), "rae's encoder has nothing to train")


STUDY = ("--study=1", "--study_methods=vae-8,vfmvae", "--study_seeds=2", "--study_kimg=0.128", "--study_steps=3",
         "--study_points=1,3", "--study_samples=24", "--encode_batch=24", "--study_align=none,repa", "--study_text=")


@contextlib.contextmanager
def small_study():
    """A small world in which the study's networks are small, too."""
    tok, dit = {**SMALL, "z_dim": 32, "ch": 8}, dict(hidden_size=32, num_heads=2, depth=2, batch_size=16)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(small_world())
        stack.enter_context(mock.patch.dict(align.TOKENIZER_PRESETS["toy"], tok))
        stack.enter_context(mock.patch.dict(align.DIFFUSION_PRESETS["toy"], dit))
        stack.enter_context(mock.patch.object(Shapes, "lengths", dict(train=64, val=40)))
        yield folder


def study_results(folder):
    """{run: result} without the time that it took."""
    found = {}
    for path in sorted(Path(folder, "study").glob("*/result.json")):
        found[path.parent.name] = json.loads(path.read_text())
        del found[path.parent.name]["seconds"]
    return found


def test_study():
    """Every run is judged at every point and measured in every block; what is large is gone; the table is written."""
    with small_study() as folder:
        printed = run_align(folder, *STUDY)
        results = study_results(folder)
        assert list(results) == ["vae-8-0", "vae-8-1", "vfmvae-0", "vfmvae-1"]
        for result in results.values():
            assert result["points"].keys() == {"none", "repa"}
            for points in result["points"].values():
                assert [point["step"] for point in points] == [1, 3]
                assert all(math.isfinite(value) for point in points for value in point.values())
            parts = {(kind, f"block {i}") for kind in ("none", "repa") for i in (1, 2)}
            parts.add((result["method"], "latents"))
            assert {(row["name"], row["part"]) for row in result["alignment"]} == parts
            own = next(row for row in result["alignment"] if row["vfm"] == "toy" and row["part"] == "latents")
            assert result["SE-CKNNA"] == result["SE-CKNNA to toy"] == own["SE-CKNNA"]
            assert result["CKNNA"] == own["clean"] and result["probe"] == own["probe"]
        study = Path(folder, "study")
        assert "4 runs" in printed and (study / "table.md").read_text() in printed and (study / "study.png").exists()
        assert not list(study.rglob("*.pt")) and not list(study.rglob("*.npy"))


def test_study_of_captions():
    """Text models are judged at every point, too; held-out images in place of samples score as real ones do, caption
    by caption."""
    with small_study() as folder:
        flags = *STUDY, "--study_methods=vfmvae", "--study_seeds=1", "--study_samples=40", "--study_align=none"
        flags = *flags, "--study_text=vae,vfmvae"
        printed = run_align(folder, *flags)
        points = study_results(folder)["vfmvae-0"]["points"]["text"]
        assert [point["step"] for point in points] == [1, 3]
        assert points[0].keys() == {"step", *align.OUTCOMES, *align.TEXT_OUTCOMES}
        assert "| binding | text | vfmvae |" in printed and "| binding | none |" not in printed

        jury = align.Jury(24, folder, WORLD)
        dit = mock.Mock(text_tokens=13, about=dict(latent_mean=0, latent_std=1))
        shown = []

        def generate(dit, net, mean, std, part, y, *rest):
            shown.extend(y.tolist())
            return tokenizer.to_float(jury.images[part])

        with mock.patch.object(align, "generate", generate):
            judged, told = jury.judge_samples(mock.Mock(), dit, 24, None)
        assert judged["agreement"] == jury.real["agreement"] and abs(judged["fd"]) < 1e-3
        assert told["same_captions"] and told["samples"] == told["real"]
        assert shown == tokenizer.ShapesText().ids([Shapes("val").caption(i) for i in range(24)]).tolist()


def test_study_of_neighbours():
    """PS-VAE, the sphere and codes are rows of the study like others, each by its own path and tokenizer."""
    with small_study() as folder, mock.patch.object(align, "train_diffusion", wraps=diffusion.train) as trained, \
            mock.patch.object(align, "train_tokenizer", wraps=tokenizer.train) as tokenizers:
        run_align(folder, *STUDY, "--study_methods=psvae,vfmvae-simvq,rae-sphere", "--study_seeds=1",
                  "--study_align=none")
        results = study_results(folder)
    assert [call.args[0].path for call in trained.call_args_list] == ["linear", "linear", "sphere"]
    assert [call.args[0].quantizer for call in tokenizers.call_args_list] == ["", "simvq", ""]
    assert list(results) == ["psvae-0", "rae-sphere-0", "vfmvae-simvq-0"]
    assert all(math.isfinite(result[key]) for result in results.values() for key in ("SE-CKNNA", "PSNR"))


def test_study_goes_on():
    """A run that is lost, or was stopped between its two diffusion models, comes out as before; finished ones stay;
    results of other settings or networks are refused."""
    with small_study() as folder:
        flags = (*STUDY, "--study_seeds=1")
        run_align(folder, *flags)
        before = study_results(folder)
        times = {path: path.stat().st_mtime_ns for path in Path(folder, "study").glob("*/result.json")}
        lost = Path(folder, "study", "vfmvae-0")
        shutil.rmtree(lost)
        calls = []

        def stop_at_the_second(cfg, world):
            calls.append(cfg.align)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return diffusion.train(cfg, world)

        with mock.patch.object(align, "train_diffusion", stop_at_the_second), contextlib.suppress(KeyboardInterrupt):
            run_align(folder, *flags)
        assert len(calls) == 2 and not (lost / "result.json").exists()
        kept = (lost / "tokenizer.pt").stat().st_mtime_ns
        with mock.patch.object(align.shutil, "rmtree"), mock.patch.object(Path, "unlink"):  # nothing is cleared away
            printed = run_align(folder, *flags)
        # neither the tokenizer was trained again, nor its latents made
        assert (lost / "tokenizer.pt").stat().st_mtime_ns == kept and "encoding anew" not in printed
        assert study_results(folder) == before
        changed = [path.parent.name for path, time_ in times.items() if path.stat().st_mtime_ns != time_]
        assert changed == ["vfmvae-0"]
        fails(lambda: run_align(folder, *flags, "--study_steps=4"), "other settings")
        (lost / "result.json").rename(lost / "kept")  # begun, not done
        fails(lambda: run_align(folder, *flags, "--study_steps=4"), "other settings")
        (lost / "kept").rename(lost / "result.json")
        text = (lost / "result.json").read_text()
        (lost / "result.json").write_text(text.replace(before["vfmvae-0"]["networks"], "0" * 32))
        fails(lambda: run_align(folder, *flags), "other settings, VFMs or classifier")


def test_study_is_shared_out():
    """torchrun's second process takes every second run, and joins no group."""
    with small_study() as folder:
        environment = dict(os.environ, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
        with mock.patch.dict(os.environ, environment):
            run_align(folder, *STUDY)
        assert not torch.distributed.is_initialized()
        assert list(study_results(folder)) == ["vfmvae-0", "vfmvae-1"]  # numbers 1 and 3 of the list
        assert not Path(folder, "study", "table.md").exists()  # which the last one writes


def made_up_results(folder, runs):
    """result.json of made-up numbers -> their paths."""
    rng = np.random.default_rng(0)
    paths = []
    for method, seed in runs:
        result = {quality: rng.uniform() for quality in align.QUALITIES}
        points = {}
        for kind in ("none", "repa"):
            points[kind] = [{"step": step, **{key: rng.uniform() for key in align.OUTCOMES}} for step in (1, 3)]
        paths.append(Path(folder, f"{method}-{seed}", "result.json"))
        tokenizer.write_json(paths[-1], dict(result, method=method, seed=seed, judge=0.9, points=points))
    return paths


def test_study_report():
    """Means, deviations and rank correlations of the table are those of the results."""
    from scipy.stats import spearmanr
    cfg = align.Config(study_points=(1, 3))
    with tempfile.TemporaryDirectory() as folder:
        runs = [(method, seed) for seed in range(3) for method in ("vae", "vfmvae", "aligntok")]
        text = align.study_report(cfg, Path(folder), made_up_results(folder, runs))
        written = json.loads(Path(folder, "results.json").read_text())
    lines = text.splitlines()
    its = [result for result in written["runs"] if result["method"] == "vfmvae"]
    psnr = [result["PSNR"] for result in its]
    row = next(line for line in lines if line.startswith("| vfmvae |"))
    assert f"| {np.mean(psnr):.3g} ± {np.std(psnr, ddof=1):.2g} |" in row
    accuracy = [result["points"]["repa"][1]["accuracy"] for result in its]
    row = next(line for line in lines if line.startswith("| accuracy | repa | vfmvae |"))
    assert row.endswith(f"| {np.mean(accuracy):.3g} ± {np.std(accuracy, ddof=1):.2g} |")
    pairs = [(result["PSNR"], result["points"]["repa"][1]["accuracy"]) for result in written["runs"]]
    means = np.array(pairs).reshape(3, 3, 2).mean(0)  # [seed, method, pair]: over the seeds
    want = spearmanr(*means.T).statistic
    np.testing.assert_allclose(written["spearman"]["repa"]["accuracy"]["PSNR"], want)
    correlations = text[text.index("Spearman"):].splitlines()
    row = next(line for line in correlations if line.startswith("| accuracy | repa |"))
    assert row.split(" | ")[2 + align.QUALITIES.index("PSNR")] == f"{want:+.2f}"


def test_study_report_of_old_results():
    """The results of the study in assets/ are read as they are."""
    paths = sorted((HERE / "assets" / "study").glob("*/result.json"))
    settings = tokenizer.read_json(paths[0])["settings"]
    cfg = align.Config(study_points=tuple(settings["study_points"]))
    with tempfile.TemporaryDirectory() as folder:
        text = align.study_report(cfg, Path(folder), paths)
        assert Path(folder, "study.png").exists() and f"{len(paths)} runs" in text and "nan" not in text


def test_statistics_of_many_latents():
    """Rows beyond 2^24, which float32 does not count, are taken, and none beyond the last."""
    class Latents:
        def __len__(self):
            return 20_000_004

        def __getitem__(self, rows):
            assert rows.max() < len(self)
            return (rows % 7).float()[:, None, None, None].expand(-1, 1, 2, 2)

    mean, _ = diffusion.latent_statistics(Latents())
    np.testing.assert_allclose(mean, [3], atol=0.1)


def test_study_ranks_a_tokenizer_once():
    """RAE's latents with another path are a row, not another tokenizer of the correlations."""
    cfg = align.Config(study_points=(1, 3))
    found = []
    for methods in ("vae", "vfmvae", "rae"), ("vae", "vfmvae", "rae", "rae-sphere"):
        with tempfile.TemporaryDirectory() as folder:
            text = align.study_report(cfg, Path(folder), made_up_results(folder, [(method, 0) for method in methods]))
            found.append(text[text.index("Spearman"):])
    assert found[0] == found[1] and "| accuracy | repa | rae-sphere |" in text


def test_study_report_of_one_run():
    """One run alone has neither deviations nor correlations."""
    cfg = align.Config(study_points=(1, 3))
    with tempfile.TemporaryDirectory() as folder:
        paths = made_up_results(folder, [("vae", 0)])
        text = align.study_report(cfg, Path(folder), paths)
    assert text.count("±") == 1 and "Spearman" not in text and "| gFD | repa | vae |" in text


def test_sweep():
    """A row of the sweep is what fid.judge says of samples drawn with its settings; evaluations are the solver's."""
    with small_world() as folder:
        printed = run_align(folder, "--sweep=1", "--sweep_samples=30", "--sweep_steps=2,3")
        rows = json.loads(Path(folder, "sweep.json").read_text())
        assert len(rows) == 3 * 2 + 6 and Path(folder, "sweep.md").read_text() in printed
        assert {row["evaluations"] for row in rows if row["solver"] == "heun"} == {2, 4}
        assert {row["evaluations"] for row in rows if row["solver"] == "euler"} == {1, 2}

        dit = diffusion.load_diffusion(f"{folder}/diffusion.pt")
        net = tokenizer.load_tokenizer(f"{folder}/tokenizer.pt")
        y = torch.arange(30) % 10
        images = diffusion.generate(dit, net, torch.zeros(4), torch.ones(4) * 0.5, torch.arange(30), y,
                                    diffusion.Sampling(seed=0, solver="heun", num_steps=3, cfg_scale=3.0), WORLD)
        classifier = align.load_features("toy", folder, "cpu")
        real = torch.stack([image for image, _ in Shapes("val")])
        reference = fid.judge(real, classifier, WORLD)["statistics"]
        want = fid.judge(tokenizer.to_uint8(images), classifier, WORLD, y, reference)
        row = next(row for row in rows if row["solver"] == "heun" and row["num_steps"] == 3)
        np.testing.assert_allclose([row["fd"], row["accuracy"]], [want["fd"], want["agreement"]], rtol=1e-4)


def test_sweep_of_reuse():
    """Of a model with a head, how many evaluations share the other blocks' output is swept, too."""
    dit = mock.Mock(head_depth=2, about=dict(config=dict(data="shapes"), image_size=32))
    jury = mock.Mock()
    jury.return_value.judge_samples.return_value = dict(fd=1.0, agreement=0.5), None
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(align, "Jury", jury), mock.patch.object(
            align, "load_subjects", return_value=([mock.Mock(networks=dict(dit=dit))], {})):
        run_align(folder, "--sweep=1", "--sweep_steps=2")
        rows = json.loads(Path(folder, "sweep.json").read_text())
    asked = [call.args[3] for call in jury.return_value.judge_samples.call_args_list]
    assert [row["reuse"] for row in rows] == [sampling.reuse for sampling in asked]
    assert sorted({row["reuse"] for row in rows}) == [1, 2, 3, 4, 6, 8] and all(row["ms"] > 0 for row in rows)


def test_align_refuses():
    """A user's mistakes end in one line that names them."""
    with small_world() as folder:
        fails(lambda: run_align(f"{folder}/nowhere"), "tokenizer.py first")
        fails(lambda: run_align(folder, "missing.pt"), "no file missing.pt")
        fails(lambda: run_align(folder, f"{folder}/vfm-toy.pt"), "vfm checkpoint, not a tokenizer")
        fails(lambda: run_align(folder, "--reference=nothing", "--images=20"), "no VFM nothing")
        fails(lambda: run_align(folder, "--steps=1", f"{folder}/tokenizer.pt"), "no diffusion checkpoint")
        fails(lambda: run_align(folder, "--study=1", "--study_methods=vq"), "no vq", "vfmvae-blind")
        fails(lambda: run_align(folder, "--study=1", "--study_methods=none"), "no none", "vfmvae-blind")
        fails(lambda: run_align(folder, "--study=1", "--study_align=vae"), "no vae", "none, repa, reg")
        fails(lambda: run_align(folder, "--study=1", "--study_points=2000"), "study_points")
        fails(lambda: run_align(folder, *STUDY, "--study_text=vfmvae"), "study_samples", "left-out")
        fails(lambda: run_align(folder, *STUDY, "--study_samples=6000"), "study_samples", "held-out")
        for side in 36, 64:  # 64: of a model of 32 px
            fails(lambda: run_align(folder, f"--image_size={side}", "--images=20"), "do not fit")
        with mock.patch.object(align, "report") as report:
            run_align(f"{folder}/", "--images=20")
        assert report.call_args.args[0] == [f"{folder}/{name}.pt" for name in ("tokenizer", "diffusion")]
        entries = torch.load(f"{folder}/diffusion.pt", weights_only=True)
        torch.save(dict(entries, tokenizer_is="another"), f"{folder}/old.pt")
        fails(lambda: run_align(folder, f"{folder}/old.pt"), "tokenizer.pt was trained again")
        fails(lambda: run_align(folder, f"{folder}/old.pt", "--steps=1"), "tokenizer.pt was trained again")
        assert not list(Path(folder).rglob("joint*"))  # said before it trains
        entries["config"]["data"] = "CIFAR10"
        torch.save(entries, f"{folder}/diffusion.pt")
        fails(lambda: run_align(folder, "--sweep=1"), "trained on the shapes")


# -----------------------------------------------------------------------------
# What happens to long runs: signals, kills, full disks, numbers that are not finite, processes that die or hang

def stop_in(train, step, number=signal.SIGTERM):
    """Runs `train`; this process gets the signal in the step-th of its steps. -> what was printed; for a signal that
    ends runs, after the exit status 128 + signal."""
    count = tokenizer.Watch.count
    calls = []

    def interrupted(watch, losses):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return count(watch, losses)

    with mock.patch.object(tokenizer.Watch, "count", interrupted):
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
            try:
                train()
                assert number == signal.SIGUSR1
            except SystemExit as end:
                assert end.code == 128 + number != 128 + signal.SIGUSR1
    return printed.getvalue()


def assert_same_log(a, b):
    """Lines equal but for their times, and without the first rates of a run that went on."""
    rates = ("images_per_second", "mfu")
    lines = [[{k: v for k, v in line.items() if k not in rates} for line in read_log(folder)] for folder in (a, b)]
    assert lines[0] and lines[0] == lines[1]


@with_tiny_vfm
def test_tokenizers_stopped_by_signals():
    """Every method, stopped in the middle of an epoch, in a later stage, between lines of the log and checkpoints:
    weights, averages, optimizers, discriminators, log as of a run that was not stopped."""
    for method in tokenizer.STAGES["paper"]:
        with tempfile.TemporaryDirectory() as folder:
            cfg = tiny_config(f"{folder}/whole", method=method, kimg=0.096, log_interval=4, save_interval=1000)
            quiet(tokenizer.train, cfg, WORLD)
            parts = dataclasses.replace(cfg, out=f"{folder}/parts")
            last = tokenizer.stage_plan(cfg)[0][0][3] // 8
            for step, number in (3, signal.SIGTERM), (min(last - 3, 7), signal.SIGINT), (1, signal.SIGTERM):
                printed = stop_in(lambda: tokenizer.train(parts, WORLD), step, number)
                assert f"{number.name} at step" in printed and f"saved to {parts.out}" in printed
            quiet(tokenizer.train, parts, WORLD)
            a, b = read_checkpoint(cfg.out), read_checkpoint(parts.out)
            a["config"] = b["config"]
            assert_same(a, b)
            assert_same_log(cfg.out, parts.out)


def test_sigusr1_does_not_kill_outside_of_the_loop():
    """A script ignores it until its steps begin."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    found = []
    try:
        tokenizer.main(lambda: found.append(signal.getsignal(signal.SIGUSR1)))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert found == [signal.SIG_IGN]


@with_diffusion_folder
def test_diffusion_stopped_by_signals(folder, cfg):
    """Stopped twice between checkpoints, with loader processes: as if never stopped. SIGUSR1 saves and goes on."""
    cfg = changed(cfg, align="reg", arch="sit", save_interval=0, log_interval=2, workers=1)
    train_diffusion(cfg)
    whole, lines = load(f"{cfg.out}/diffusion.pt"), Path(cfg.out, "log.jsonl")
    kept = shutil.copytree(cfg.out, f"{folder}/kept")
    os.unlink(f"{cfg.out}/diffusion.pt")
    lines.unlink()
    stop_in(lambda: diffusion.train(cfg, WORLD), 1)
    assert load(f"{cfg.out}/diffusion.pt")["step"] == 1
    with mock.patch.object(diffusion, "save_checkpoint", wraps=diffusion.save_checkpoint) as saved:
        printed = stop_in(lambda: diffusion.train(changed(cfg, steps=6), WORLD), 2, signal.SIGUSR1)
    assert "SIGUSR1 at step 3: saved to" in printed and [call.kwargs["step"] for call in saved.call_args_list] == [3, 6]
    assert_same(whole, load(f"{cfg.out}/diffusion.pt"))
    assert_same_log(kept, cfg.out)


def test_joint_training_stopped_by_signals():
    """A run stopped in its first and third steps ends as a whole one."""
    with small_world(reg=True) as folder:
        run_align(folder, *JOINT)
        whole = load_pair(folder)
        shutil.move(f"{folder}/joint-both", f"{folder}/whole")
        for step in 1, 2:
            stop_in(lambda: run_align(folder, *JOINT), step)
        run_align(folder, *JOINT)
        assert_same(whole, load_pair(folder))
        assert_same_log(f"{folder}/whole", f"{folder}/joint-both")


HARNESS = f"""
import dataclasses, os, random, resource, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(HERE)!r})
import torch
import tokenizer
tokenizer.Shapes.lengths = dict(train=64, val=32)
rank = int(os.environ.get("RANK", 0))
step = tokenizer.Trainer.step

def hurt(self, batches, number, seen):
    losses = step(self, batches, number, seen)
    return harm(number, losses) or losses

tokenizer.Trainer.step = hurt

def run():
    cfg = tokenizer.parse_config(tokenizer.Config, tokenizer.PRESETS)
    tok = tokenizer.train(cfg, tokenizer.init_world(cfg.out))
    print(f"rank {{rank}} ended {{tokenizer.fingerprint(tok)}}\\n", end="", flush=True)
"""
QUICK = ("--method=vae", "--recipe=study", "--kimg=0.064", "--ch_mult=1,1,1,1", "--batch_size=16", f"--cache={SHARED}",
         "--log_interval=2")


def harness(folder, code, *flags, run=script, status=0):
    """Trains a small tokenizer in processes of their own, which call `harm(step, losses)`, defined by `code`, in every
    step -> what was printed."""
    path = Path(folder) / f"harm-{zlib.crc32(code.encode())}.py"
    path.write_text(f"{HARNESS}{code}\nif __name__ == '__main__':\n    tokenizer.main(run)\n")
    return run(path, *QUICK, f"--out={folder}/out", *flags, status=status)


def test_two_processes_stop_together():
    """A signal to one of two processes (with loader processes) stops both after the same step, with one checkpoint;
    gone on, they end as if never stopped. Losses that are not finite on one process make both skip the step."""
    stop = """
def harm(number, losses):
    if number == 2 and rank == 1 and not Path(sys.argv[0]).with_suffix(".done").exists():
        Path(sys.argv[0]).with_suffix(".done").touch()
        os.kill(os.getpid(), signal.SIGTERM)
"""
    bad = """
def harm(number, losses):
    pass

objective = tokenizer.Trainer.reconstruction_loss
def reconstruction_loss(self, outputs, target):
    loss, values = objective(self, outputs, target)
    calls.append(1)
    return (loss * float("nan"), values) if rank == 1 and len(calls) == 3 else (loss, values)
calls = []
tokenizer.Trainer.reconstruction_loss = reconstruction_loss
"""
    flags = ("--kimg=0.096", "--workers=1", "--save_interval=100")
    with tempfile.TemporaryDirectory() as folder:
        printed = harness(folder, stop, *flags, run=torchrun, status=1)  # torchrun's status
        assert printed.count("SIGTERM at step 4: saved to") == 1 and "ended" not in printed, printed
        assert read_checkpoint(f"{folder}/out")["images"] == 64
        printed = harness(folder, stop, *flags, run=torchrun)
        weights = re.findall(r"rank . ended (\w+)", printed)
        a = read_checkpoint(f"{folder}/out")
        shutil.move(f"{folder}/out", f"{folder}/parts")
        assert harness(folder, stop, *flags, run=torchrun).count(weights[0]) == len(weights) == 2
        assert_same(a["model"], read_checkpoint(f"{folder}/out")["model"])
        assert_same_log(f"{folder}/parts", f"{folder}/out")
        printed = harness(folder, bad, *flags, "--resume=0", run=torchrun)
        weights = re.findall(r"rank . ended (\w+)", printed)
        assert len(weights) == 2 and weights[0] == weights[1] != a
        assert read_log(f"{folder}/out")[-1]["skipped"] == read_checkpoint(f"{folder}/out")["skipped"] == 1


def test_lost_processes():
    """One of two processes dies: the other says so and ends within a minute (torchrun's SIGTERM saves nothing). One
    hangs: the other says so. One has other flags: said before the first step."""
    die = """
def harm(number, losses):
    if number == 2 and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    hang = """
tokenizer.PATIENCE = 3
def harm(number, losses):
    if number == 2 and rank == 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1000)
"""
    differ = """
if rank == 1:
    sys.argv.append("--seed=1")
"""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        printed = harness(folder, die, "--save_interval=1", run=torchrun, status=1)
        assert time.monotonic() - start < 60 and "another process has ended" in printed, printed
        assert read_checkpoint(f"{folder}/out")["images"] == 32
        printed = harness(folder, hang, "--resume=0", run=torchrun, status=1)
        assert "another process hangs: no answer for 3 seconds" in printed
        printed = harness(folder, differ, "--resume=0", run=torchrun, status=1)
        assert "process 1 has another configuration than process 0" in printed


def test_handlers_outlive_an_error_among_processes():
    """So that torchrun's SIGTERM, on another process's death, does not come before this one's line; alone, or at the
    steps' end, the handlers of before are back."""
    handlers = {number: signal.getsignal(number) for number in tokenizer.Watch.SIGNALS}
    for size, error in (1, True), (1, False), (2, True), (2, False):
        watch = tokenizer.Watch(tokenizer.World(0, size, torch.device("cpu")), "none")
        with contextlib.suppress(RuntimeError):
            for _ in watch.steps(range(2)):
                assert signal.getsignal(signal.SIGTERM) == watch.handle
                if error:
                    raise RuntimeError
        kept = signal.getsignal(signal.SIGTERM)
        for number in watch.SIGNALS:
            signal.signal(number, handlers[number])
        assert kept == (watch.handle if size == 2 and error else handlers[signal.SIGTERM])


def test_signal_while_the_last_checkpoint_is_saved():
    """After the last step's `count`: a run within another, the study's, ends it, too."""
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGUSR1:
        watch = tokenizer.Watch(tokenizer.World(0, 1, torch.device("cpu")), "none")
        ended = None
        try:
            for step in watch.steps(range(2)):
                watch.count(dict(skipped=torch.tensor(0.0)))
                if step == 1:
                    os.kill(os.getpid(), number)
        except SystemExit as end:
            ended = end.code
        assert ended == (None if number == signal.SIGUSR1 else 128 + number)


def test_kills_at_random_moments():
    """kill -9 twenty times in a row while every step saves: there is always a whole checkpoint, never an older one;
    nothing half-written stays; at last the run ends as one that was never killed."""
    code = """
def harm(number, losses):
    pass

def run():
    cfg = tokenizer.parse_config(tokenizer.Config, tokenizer.PRESETS)
    cfg.kimg = 3.2
    path = Path(cfg.out) / "tokenizer.pt"
    draw = random.Random(0)
    world = tokenizer.World(0, 1, torch.device("cpu"))
    seen = 0
    for kill in range(21):
        child = os.fork()
        if child == 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            tokenizer.train(cfg, tokenizer.init_world(cfg.out))
        while not path.exists() or kill == 20 and time.sleep(1):
            pass
        time.sleep(draw.uniform(0.1, 1.0))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        now = tokenizer.load_checkpoint(path, "tokenizer")["images"]
        assert now >= seen
        seen = now
    left = list(Path(cfg.out).glob("*.tmp"))
    tokenizer.init_world(cfg.out)
    print("kills:", 21, "images:", seen, "left:", len(left), len(list(Path(cfg.out).glob("*.tmp"))))
    cfg.save_interval = 1000
    torch.manual_seed(0)
    again = tokenizer.fingerprint(tokenizer.train(cfg, world))
    cfg.out += "-whole"
    print("same" if again == tokenizer.fingerprint(tokenizer.train(cfg, world)) else "other", flush=True)
"""
    with tempfile.TemporaryDirectory() as folder:
        printed = harness(folder, code, "--save_interval=1", "--ch=8")
        counts = re.search(r"kills: 21 images: (\d+) left: (\d+) (\d+)", printed)
        assert int(counts[1]) > 16 and counts[3] == "0" and "same" in printed, counts[0] + printed[-500:]


def test_bad_images():
    """Truncated, empty, hostile and other files under an image's name end the run with their path; --skip_bad=1 takes
    the next index's image and label, lists the path once, ends above 1%; of moving pictures the first frame is read."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        for i in range(200):
            path = root / f"{i // 100}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
        good = path.read_bytes()
        bad = root / "0" / "099.png"
        for content in good[:45], b"", b"not an image", b"GIF89a" + bytes(40), good.replace(b"IDAT", b"IDAx"):
            bad.write_bytes(content)
            fails(lambda: tokenizer.Images(str(root), "train", 8)[99], "cannot read image", "099.png")
        with mock.patch.object(Image, "MAX_IMAGE_PIXELS", 16):
            fails(lambda: tokenizer.Images(str(root), "train", 8)[5], "cannot read image", "bomb")
        flags = ("--data", root, "--image_size=8", f"--out={folder}/out", "--skip_bad=1")
        cfg = parse(*map(str, flags))
        data = tokenizer.open_data(cfg, "train", 8)
        for _ in range(2):
            pixels, label = data[99]
            assert (pixels[0] == 100).all() and label == 1
        assert Path(folder, "out", "bad_images.txt").read_text() == f"{bad}\n"
        for i in 3, 4:
            (root / "0" / f"{i:03d}.png").write_bytes(b"")
        fails(lambda: [data[i] for i in range(200)], "more than 1%", "bad_images.txt")
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        for suffix in "png", "webp", "gif", "tiff":
            frames[0].save(f"{folder}/moving.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
            assert tokenizer.load_rgb(f"{folder}/moving.{suffix}").getpixel((0, 0)) == (255, 0, 0)
        (root / "2").mkdir()
        (root / ".hidden").mkdir()
        fails(lambda: tokenizer.Images(str(root), "train", 8), "class folder", "2 has no images")


@contextlib.contextmanager
def nobody():
    """As a user without root's rights, where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_unreadable_permissions():
    """An image, a data folder, a checkpoint that may not be read, a folder that may not be written: one line each."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        root = Path(folder, "data")
        for i in range(2):
            (root / f"{i}").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(root / f"{i}" / "image.png")
        save = Path(folder, "tokenizer.pt")
        tokenizer.save_checkpoint(save, kind="tokenizer")
        data = tokenizer.Images(str(root), "train", 8)
        for path in root / "0" / "image.png", save, root / "1":
            path.chmod(0)
        with nobody():
            fails(lambda: data[0], "cannot read image", "0/image.png", "ermission")
            fails(lambda: tokenizer.load_checkpoint(save, "tokenizer"), "tokenizer.pt", "ermission")
            fails(lambda: tokenizer.Images(str(root), "train", 8), "data/1", "may not be read")
            fails(lambda: tokenizer.write_text(f"{folder}/out/text", ""), "cannot write", "ermission")
        (root / "1").chmod(0o755)


@with_diffusion_folder
def test_latent_cache_has_the_labels_of_what_was_read(folder, cfg):
    """Where an image was skipped, the next one's latent and label stand together."""
    paths = sorted(Path(folder, "data", "train", "0").glob("*.png"))
    paths[-1].write_bytes(b"")
    fails(lambda: train_diffusion(cfg), "cannot read image", paths[-1].name)
    images = tokenizer.open_data(changed(cfg, skip_bad=True), "train", 32)
    with mock.patch.object(tokenizer.Images, "note_bad"):
        latents = diffusion.cache_latents(
            Path(folder, "cache"), tokenizer.load_tokenizer(f"{folder}/out/tokenizer.pt"), images, WORLD)
    i = len(paths) - 1
    assert images.labels[i] == 0 and latents.labels[i] == latents.labels[i + 1] == 1
    rows = latents.read(torch.tensor([i, i + 1]), torch.tensor([0, 0]))["latents"]
    assert torch.equal(*rows)


def test_full_disk_for_mapped_files():
    """What is drawn or cached into mapped files is allocated first: one line, where writing would end in SIGBUS."""
    with tempfile.TemporaryDirectory() as folder:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
            fails(lambda: quiet(Shapes, "val", 32, 100, folder), "cannot write", "too large")
            wanted = dict(latents=dict(shape=[100, 4, 8, 8], dtype="bf16"))
            fails(lambda: diffusion.open_cache(Path(folder, "cache"), wanted, np.zeros(50)), "cannot write")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list(Path(folder).glob("shapes*"))
        assert not tokenizer.read_json(f"{folder}/cache/meta.json")["arrays"]


def test_random_damage():
    """Files with bytes changed, cut or doubled, and checkpoints with fields missing or of other types: they load, or
    end in one line."""
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        cfg = diffusion_folder(folder)
        arch = diffusion.model_arch(cfg, 4, 4, 10, 0)
        model, _, ema, optimizer = diffusion.build(cfg, WORLD, arch)
        dit = dict(kind="diffusion", arch=arch, config={}, **diffusion.full_state(model, ema, optimizer))
        tokenizer.save_checkpoint(f"{folder}/diffusion.pt", **dit)
        write_safetensors(f"{folder}/weights.safetensors", dict(a=torch.ones(3), b=torch.ones(2, 2).bfloat16()))
        np.savez(f"{folder}/images.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
        pixels = Image.fromarray(draw.integers(256, size=(16, 16, 3), dtype=np.uint8))
        readers = {
            f"{folder}/out/tokenizer.pt": tokenizer.load_tokenizer, f"{folder}/diffusion.pt": diffusion.load_diffusion,
            f"{folder}/weights.safetensors": tokenizer.load_weights,
            f"{folder}/images.npz": lambda path: fid.open_images(str(path))[range(4)]}
        for suffix in "png", "jpg", "gif", "webp", "tiff", "bmp":
            pixels.save(f"{folder}/image.{suffix}")
            readers[f"{folder}/image.{suffix}"] = tokenizer.load_rgb
        refused = 0
        for path, read in readers.items():
            whole = np.frombuffer(Path(path).read_bytes(), np.uint8)
            for k in range(16):
                damaged = whole.copy()
                at = draw.integers(len(whole) if k % 2 else min(len(whole), 400), size=4)  # everywhere, or in headers
                damaged[at] = draw.integers(256, size=4)
                damaged = damaged[:int(at[0])] if k % 4 == 2 else damaged
                damaged = np.concatenate([damaged[:at[1]], damaged]) if k % 4 == 3 else damaged
                Path(path).write_bytes(damaged.tobytes())
                try:
                    read(path)
                except UserError as error:
                    assert "\n" not in str(error) and "weights_only" not in str(error), error
                    refused += 1
            Path(path).write_bytes(whole.tobytes())
        assert refused > 40
        tok = torch.load(f"{folder}/out/tokenizer.pt", weights_only=True)
        for entries, read in (dit, diffusion.load_diffusion), (tok, tokenizer.load_tokenizer):
            wrong = [{k: v for k, v in entries.items() if k != name} for name in ("arch", "ema")]
            wrong += [dict(entries, arch=value) for value in ("no", dict(entries["arch"], unknown=1), None)]
            wrong += [dict(entries, ema=3), dict(entries, kind="other"), dict(entries, kind=None)]
            for each in wrong:
                tokenizer.save_checkpoint(f"{folder}/wrong.pt", **each)
                fails(lambda: read(f"{folder}/wrong.pt"), "wrong.pt")


def test_second_signal_ends_at_once():
    """In the middle of a step, and nothing is saved."""
    code = """
def harm(number, losses):
    if number == 1:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
"""
    with tempfile.TemporaryDirectory() as folder:
        harness(folder, code, status=-signal.SIGINT)
        assert not Path(folder, "out", "tokenizer.pt").exists()


def test_full_disk():
    """A checkpoint, a log, samples that do not fit: one line; what was there stays, and nothing half-written."""
    code = """
def harm(number, losses):
    if number == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
"""
    with tempfile.TemporaryDirectory() as folder:
        printed = harness(folder, code, "--save_interval=3", "--kimg=0.096", status=1)
        assert "cannot write" in printed and "tokenizer.pt: " in printed and "rank" not in printed, printed
        assert read_checkpoint(f"{folder}/out")["images"] == 3 * 16
        assert not list(Path(folder, "out").glob("*.tmp"))
        code = code.replace("100_000", "0")
        printed = harness(folder, code, "--log_interval=1", "--resume=0", "--kimg=0.096", status=1)
        assert "File too large" in printed, printed
        paths = [Path(folder) / name for name in ("a.png", "b.npz")]
        for path in paths:
            path.write_bytes(b"old")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            pixels = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
            fails(lambda: sample.write_png(paths[0], pixels), "cannot write")
            Image.new("RGB", (64, 64)).save(f"{folder}/c.png")
            fails(lambda: sample.write_npz(paths[1], [f"{folder}/c.png"] * 9), "cannot write")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert all(path.read_bytes() == b"old" for path in paths) and not list(Path(folder).glob("*.tmp"))


@with_tiny_vfm
def test_steps_that_are_not_finite():
    """Such a step changes neither weights, averages nor optimizers, and is counted; ten in a row end the run in a line
    that names the loss and the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = tiny_config(folder, kimg=0.8, save_interval=1000)
        trainer = tiny_trainer("vfmvae")
        trainer.start_stage(tokenizer.STAGES["paper"]["vfmvae"][0])
        batch = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.zeros(8)
        for weights in trainer.tokenizer, trainer.gan:
            trainer.step([batch], 0, 0)
            before = copy.deepcopy(trainer.state_dict())
            ema = {name: p.detach() + 1 for name, p in trainer.tokenizer.named_parameters()}
            averages = copy.deepcopy(ema)
            broken = next(p for p in weights.parameters() if p.requires_grad)
            with mock.patch.object(tokenizer, "average_gradients", lambda parameters, world: [
                    p.grad.fill_(math.inf) for p in parameters if p is broken]):
                losses = trainer.step([batch], 0, 0)
            assert losses["skipped"] == 1
            after = trainer.state_dict()
            for part in "model", "optimizer", "gan", "gan_optimizer":  # spectral norms' vectors follow from the weights
                kept = [name for name in before[part] if not name.endswith(("_u", "_v"))]
                assert_same(*({name: entries[part][name] for name in kept} for entries in (before, after)))
            tokenizer.average_weights(ema, trainer.tokenizer, 8, 8, 1.0, losses["skipped"])
            assert_same(ema, averages)
        with mock.patch.object(tokenizer, "ssim", lambda *a, **k: torch.tensor([1.0])), \
                mock.patch.object(tokenizer, "kl_loss", lambda mean, logvar: mean.sum() * math.nan):
            fails(lambda: tokenizer.train(cfg, WORLD), "10 steps in a row", "kl", "no checkpoint")


@with_diffusion_folder
def test_diffusion_skips_what_is_not_finite(folder, cfg):
    """Gradients that overflow under a finite loss: the step is skipped, counted in log and checkpoint; the rest of the
    run goes on."""
    clip = nn.utils.clip_grad_norm_
    norms = []

    def overflow(*args):
        norms.append(clip(*args))
        return norms[-1] * (math.inf if len(norms) == 2 else 1)

    train_diffusion(cfg, steps=1)
    one = load(f"{cfg.out}/diffusion.pt")
    with mock.patch.object(nn.utils, "clip_grad_norm_", overflow):
        train_diffusion(cfg, steps=2, resume=False)
        two = load(f"{cfg.out}/diffusion.pt")
        train_diffusion(cfg, steps=4)
    assert two["skipped"] == load(f"{cfg.out}/diffusion.pt")["skipped"] == log_lines(cfg.out)[-1]["skipped"] == 1
    for part in ("model", "ema"):
        assert_same(one[part], two[part])
    assert_same(one["optimizer"]["state"], two["optimizer"]["state"])
    last = "final_layer.linear.weight"
    assert not torch.equal(load(f"{cfg.out}/diffusion.pt")["model"][last], two["model"][last])
    before = Path(cfg.out, "diffusion.pt").read_bytes()
    with mock.patch.object(nn.utils, "clip_grad_norm_", return_value=torch.tensor(math.inf)):
        fails(lambda: train_diffusion(cfg, steps=20, save_interval=20), "10 steps in a row", "grad_norm", cfg.out)
    assert Path(cfg.out, "diffusion.pt").read_bytes() == before


def test_out_of_memory_names_the_flags():
    """What to lower, by the script's own flags; bugs keep their traceback."""
    for module, flags in (tokenizer, ["batch_size", "accumulate"]), (diffusion, ["encode_batch", "fsdp=1"]), \
            (sample, ["batch_size"]):
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        with mock.patch.object(module, "parse_config", side_effect=error):
            line = fails(lambda: tokenizer.main(module.run), "out of memory: ", status=1)
        assert all(f"--{flag}" in line for flag in flags)
    for error in torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory"):
        with contextlib.suppress(type(error)), tokenizer.reading("good.pt"):  # not a word of damage
            raise error
    with mock.patch.object(sample, "parse_config", side_effect=RuntimeError("size mismatch")):
        try:
            tokenizer.main(sample.run)
        except RuntimeError:
            return
    raise AssertionError("a bug passed for a user's mistake")


# -----------------------------------------------------------------------------
# Counts: what waits for the device, what is one graph, what runs once, what is read

class Waits(TorchFunctionMode):
    """Notes in `places`, as Class.method, which functions of the scripts have Python read a tensor or take sizes from
    its values: on a GPU they would wait for it."""
    READS = {
        "item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__", "equal",
        "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "repeat_interleave"}

    def __init__(self):
        super().__init__()
        self.places = set()

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        name = function.__name__
        mask = name in ("__getitem__", "__setitem__") and getattr(arguments[1], "dtype", None) == torch.bool
        if mask or name in self.READS:
            frame = sys._getframe(1)
            while Path(frame.f_code.co_filename).parent != HERE or frame.f_code.co_name.startswith("<"):
                frame = frame.f_back
            owner = frame.f_locals.get("self")
            method = frame.f_code.co_name
            self.places.add(method if owner is None else f"{type(owner).__name__}.{method}")
        return function(*arguments, **(keywords or {}))


def assert_does_not_wait(train, *arguments):
    """In a training's steps only these read tensors: what draws or keeps them on the host (Watch's is a step old), and
    at intervals the log, checkpoints and pictures."""
    host = {"Watch.count", "ProjectedDiscriminator.forward", "Images.__getitem__", "ImageNoise.__init__"}
    intervals = {"Log.write", "save", "save_grid"}
    steps = tokenizer.Watch.steps

    def watched(watch, numbers):
        with waits:
            yield from steps(watch, numbers)

    waits = Waits()
    with mock.patch.object(tokenizer.Watch, "steps", watched):
        quiet(train, *arguments)
    assert "Watch.count" in waits.places and waits.places <= host | intervals, waits.places


@with_tiny_vfm
def test_tokenizer_training_waits_for_no_device():
    """Through every row of VFM-VAE and AlignTok, discriminators and anchor included."""
    with tempfile.TemporaryDirectory() as folder:
        for method in "vfmvae", "aligntok":
            cfg = tiny_config(f"{folder}/{method}", method=method, log_interval=9, save_interval=9)
            assert_does_not_wait(tokenizer.train, cfg, WORLD)


@with_tiny_vfm
@with_diffusion_folder
def test_diffusion_training_waits_for_no_device(folder, cfg):
    """Of classes with REG's token, and of captions."""
    for fields in dict(align="reg", arch="sit"), dict(text="toy", data="shapes", workers=0):
        assert_does_not_wait(diffusion.train, changed(cfg, **fields), WORLD)


def test_joint_training_waits_for_no_device():
    """Both models' steps."""
    with small_world(reg=True) as folder:
        assert_does_not_wait(run_align, folder, *JOINT)


@with_tiny_vfm
def test_networks_run_once_a_batch():
    """In a step of each of the papers' rows: the VFM and the anchor's once, the perceptual network on an image and its
    reconstruction, a discriminator once for the generator (feature matching: twice) and twice for itself."""
    batch = (image(2, 3, 32, 32) * 255).to(torch.uint8), torch.zeros(2, dtype=torch.long)
    for _, method, stage in every_row("paper"):
        trainer = tiny_trainer(method)
        trainer.start_stage(dataclasses.replace(stage, gan_start_kimg=0.0))
        runs = dict.fromkeys(("vfm", "anchor", "decoder", "perceptual", "dino", "patch", "multi"), 0)

        def count(name, module):
            def hook(*_):
                runs[name] += 1

            if module is not None:
                module.register_forward_hook(hook)

        gan = trainer.gan
        count("vfm", trainer.tokenizer.vfm or trainer.target_vfm)
        count("anchor", trainer.anchor and trainer.anchor.vfm)
        count("decoder", trainer.tokenizer.decoder)
        count("perceptual", trainer.perceptual_net.vit)
        count("dino", gan.dino and gan.dino.vit)
        count("patch", gan.patch)
        for net in gan.multi:
            count("multi", net)
        trainer.step([batch], 0, 0)
        assert runs == dict(
            vfm=int(method != "vae"), anchor=int("encoder" in stage.trains), decoder=1,
            perceptual=2 * (stage.lpips > 0), dino=3 * (stage.dino > 0), patch=3 * (stage.patch > 0),
            multi=3 * 4 * (stage.multi > 0)), (stage.name, runs)


@with_diffusion_folder
def test_bytes_read(folder, cfg):
    """An epoch reads every image and caption of a tar once and nothing else; a batch of a cache its own rows alone."""
    pattern, _ = shards_and_folder(folder, n=16)
    data = tokenizer.Images(pattern, "train", 32, cache=folder)
    data.require_captions()
    order = tokenizer.step_batches(len(data), 4, 0, 0, 4, WORLD)
    with mock.patch.object(os, "pread", wraps=os.pread) as pread:
        assert len(list(tokenizer.make_loader(data, order, WORLD, 0))) == 4
    sizes = data.places[:, [2, 4]].flatten()
    assert sorted(call.args[1] for call in pread.call_args_list) == sorted(sizes)

    latents, _ = Cache(folder, cfg).make()
    array = latents.arrays["latents"]  # [n, C, h, w], a mapped file
    reads = []

    class Reads(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if any(argument is array for argument in arguments) and torch.is_tensor(result):
                reads.append(result.nbytes)
            return result

    order = tokenizer.step_batches(len(latents), 8, 0, 0, 3, WORLD)
    with Reads():
        assert len(list(tokenizer.make_loader(latents, order, WORLD, 0, collate=dict))) == 3
    assert reads == 3 * [8 * array[0].nbytes]


def test_freed_memory_is_kept():
    """On the CPU what a step frees serves the next one: the kernel need not fill its pages again."""
    program = """
import resource, tokenizer, torch
tokenizer.init_world()
for _ in range(4):  # the heap grows to what it takes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2 ** 24) + torch.ones(2 ** 24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    printed = script("-c", program).split()
    assert int(printed[-1]) < 3 * 2 ** 24 * 4 // resource.getpagesize(), printed  # three tensors' of 15


@mock.patch.object(tokenizer, "load_vfm", lambda *names, **keywords: tiny_vfm("toy", depth=1))
def test_every_method_compiles_whole():
    """What the trainer compiles of each method: no graph breaks, eager's losses and gradients, and a second step finds
    all its graphs."""
    from torch._dynamo.testing import CompileCounter
    tiny = dict(
        image_size=16, scale_factor=2.0, downsample=4, widths=(16, 8), fuse_dims=(8,), ch_mult=(1, 1, 1),
        layers=(0, -1), vit_decoder=(1, 16, 2, 32))
    batch = image(2, 3, 16, 16) * 2 - 1, torch.zeros(2, dtype=torch.long)
    for method, row in dict(vfmvae=0, aligntok=1, vavae=0, vae=0, rae=0, psvae=1).items():  # 1: with an anchor
        stage = dataclasses.replace(tokenizer.STAGES["paper"][method][row], gan_start_kimg=0.0, equivariance=False)
        counter = CompileCounter()
        compiled = functools.partial(torch.compile, fullgraph=True, backend=counter)
        torch._dynamo.reset()
        found = []
        graphs = []
        with mock.patch.object(torch, "compile", compiled):
            for compile, steps in (False, 1), (True, 2):
                trainer = tiny_trainer(method, compile=compile, **tiny)
                trainer.start_stage(stage)
                wake(trainer)
                for _ in range(steps):
                    torch.manual_seed(5)
                    losses, _, _ = trainer.generator_step(*batch, 0, 0)
                    found.append([*losses.values(), *take_gradients(trainer.parameters)])
                    graphs.append(counter.frame_count)
        assert graphs[0] == 0 < graphs[1] == graphs[2], (method, graphs)
        for want, got in zip(found[0], found[1], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# -----------------------------------------------------------------------------

def start_worker(method):
    """Its loader processes start as they do elsewhere."""
    multiprocessing.set_start_method(method, force=True)


def run_one(name):
    """-> the test's outcome, its seconds, why it was not passed."""
    start = time.perf_counter()
    outcome, reason = "passed", ""
    try:
        globals()[name]()
    except Skip as skipped:
        outcome, reason = "skipped", f"    {skipped}\n"
    except Exception:
        outcome, reason = "failed", traceback.format_exc()
    return outcome, time.perf_counter() - start, reason


def run_all(words):
    """Runs the tests whose names contain one of the words, in a process a core (up to eight), each on one thread ->
    whether any failed, or none ran."""
    names = [name for name in globals() if name.startswith("test_") and (not words or any(w in name for w in words))]
    counts = dict(passed=0, failed=0, skipped=0)
    workers = max(1, min(8, torch.get_num_threads(), len(names)))
    os.environ.update(OMP_NUM_THREADS="1", TEST_CACHE=SHARED)  # for the processes
    spawn = multiprocessing.get_context("spawn")  # a fork may hang where torch has threads
    with ProcessPoolExecutor(workers, spawn, start_worker, [multiprocessing.get_start_method()]) as pool:
        for name, (outcome, seconds, reason) in zip(names, pool.map(run_one, names)):
            counts[outcome] += 1
            print(f"{reason}{outcome:8s} {seconds:6.1f} s  {name}", flush=True)
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return counts["failed"] > 0 or not counts["passed"]


if __name__ == "__main__":
    sys.exit(run_all(sys.argv[1:]))
