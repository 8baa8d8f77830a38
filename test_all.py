"""
Every test: `python test_all.py` (`python test_all.py vit cache` runs those whose names contain one of the words), or `pytest test_all.py`.

Networks are held to golden values that public reference implementations printed for small models (testdata/*.json): their weights
are rebuilt from their keys, written to files laid out as the official ones, and loaded through the public functions.
"""
import atexit
import contextlib
import copy
import dataclasses
import functools
import gzip
import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import align
import diffusion
import fid
import sample
import tokenizer
from tokenizer import Shapes, UserError

HERE = Path(__file__).resolve().parent


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
        value = value * (3.0 / (n // shape[0])) ** 0.5            # unit gain: uniform with variance 1/fan_in
    else:
        value = 0.1 * value + key.endswith(("weight", "gamma", "scale", "running_var"))
    if key.startswith("mapping.mlp"):
        value = value * 100                                       # layers with a learning-rate multiplier of 0.01
    if "affine" in key and key.endswith("proj.bias"):
        value = value + 1                                         # styles start around one
    return value.reshape(shape).float()


def image(b, c, h, w, key="image", salt=""):
    """A float32 image batch in [0, 1)."""
    return ((noise(b * c * h * w, key, salt) + 1) / 2).reshape(b, c, h, w).float()


def golden(name):
    return json.loads((HERE / "testdata" / f"{name}.json").read_text())


def fill(g):
    """The state dict that a golden file describes."""
    return {key: torch.zeros(shape) if key in g.get("not_filled", ()) else tensor(key, shape, g["salt"]) for key, shape in g["keys"].items()}


def check(t, digest, rtol=1e-4, atol=1e-5):
    flat = t.detach().double().flatten()
    assert list(t.shape) == digest["shape"], (list(t.shape), digest["shape"])
    for name, value in dict(mean=flat.mean(), std=flat.std(), abs_mean=flat.abs().mean(), values=flat[digest["at"]]).items():
        np.testing.assert_allclose(value.numpy(), digest[name], rtol=rtol, atol=atol, err_msg=name)


def fails(function, *words):
    """Asserts that a UserError of one line is raised that contains all the words."""
    try:
        function()
    except UserError as error:
        line = str(error)
        assert "\n" not in line and all(word in line for word in words), line
        return line
    raise AssertionError(f"no UserError with {words}")


def script(*arguments, status=0, **environment):
    """Runs one of the scripts -> its output; with a status, asserts that one clear line and no traceback came out."""
    result = subprocess.run([sys.executable, *map(str, arguments)], cwd=HERE, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment})
    output = result.stdout + result.stderr
    assert result.returncode == status if isinstance(status, int) else result.returncode in status, f"status {result.returncode}: {output[-2000:]}"
    assert status == 0 or "Traceback" not in output, output[-2000:]
    return output


def torchrun(*arguments, processes=2):
    return script("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *arguments)


def tiny_vfm(name, out="out", pretrained=True, **overrides):
    """In place of training the toy VFM: its network with fixed random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return tokenizer.ViT(**{**tokenizer.TOY_VIT, **overrides}).requires_grad_(False).eval()


def tiny_config(out, **overrides):
    """A tokenizer that trains in seconds."""
    return tokenizer.Config(**{**dict(preset="toy", out=str(out), image_size=32, widths=(16, 16, 8, 8), fuse_dims=(16, 8), attention=(1,), w_dim=16, z_dim=4, level_dim=8, post_factor=4,
                                      ch=32, ch_mult=(1, 1, 1, 1), kimg=0.08, batch_size=8, log_interval=1, save_interval=5, grid_interval=100, compile=False, gan_scale=1.0, ndf=8), **overrides})


def with_tiny_vfm(function):
    def wrapped():
        original, tokenizer.load_vfm = tokenizer.load_vfm, tiny_vfm
        lengths, tokenizer.Shapes.lengths = tokenizer.Shapes.lengths, dict(train=64, val=32)
        try:
            function()
        finally:
            tokenizer.load_vfm, tokenizer.Shapes.lengths = original, lengths
    wrapped.__name__ = function.__name__
    return wrapped


WORLD = tokenizer.World(0, 1, torch.device("cpu"))
SHARED = tempfile.mkdtemp()              # what several tests use: the toy classifier, drawn shapes
atexit.register(shutil.rmtree, SHARED, ignore_errors=True)


# -----------------------------------------------------------------------------
# tokenizer.py: command line, data

def test_config():
    parse = lambda *argv: tokenizer.parse_config(tokenizer.Config, tokenizer.PRESETS, argv)
    cfg = parse("--batch_size=7", "--lr_scale", "2.5", "--layers=0,1", "--flip=0")
    assert (cfg.batch_size, cfg.lr_scale, cfg.layers, cfg.flip, cfg.preset) == (7, 2.5, (0, 1), False, "toy")
    assert parse("--preset=imagenet").image_size == 256 and parse("--preset=imagenet", "--image_size=64").image_size == 64
    for argv, words in ((["--batchsize=7"], ("batchsize", "batch_size")), (["--batch_size=x"], ("batch_size", "int")), (["--preset=none"], ("toy", "imagenet")), (["stray"], ("stray",)),
                        (["--flip=yes"], ("flip", "yes"))):
        result = captured_exit(2, parse, *argv)
        assert result.count("\n") == 1 and all(word in result for word in words), result
    for name, wrong, right in (("tokenizer", "batch_size=0", "workers=0"), ("diffusion", "encode_batch=0", "warmup=0"), ("diffusion", "seed=-1", "val_interval=0"),
                               ("align", "log_interval=0", "steps=0"), ("sample", "threads=0", "cfg_channels=0"), ("fid", "batch_size=0", "workers=0")):
        module = __import__(name)        # 0 where the comment says what it means
        shown = captured_exit(2, tokenizer.parse_config, module.Config, module.PRESETS, [f"--{wrong}"])
        assert f"--{wrong}: must be at least" in shown and shown.count("\n") == 1, shown
        tokenizer.parse_config(module.Config, module.PRESETS, [f"--{right}"])
    for name in ("tokenizer", "diffusion", "align", "sample", "fid"):
        module = __import__(name)
        text = captured_exit(0, tokenizer.parse_config, module.Config, module.PRESETS, ["--help"])
        for field in dataclasses.fields(module.Config):
            line = re.search(rf"--{field.name} .*", text.split("options:")[1].replace("\n" + " " * 24, " "))       # not the usage line
            assert line and len(line[0].split("[")[0].split(maxsplit=2)[-1]) > 3, f"{name} --{field.name} has no comment"


def captured_exit(status, function, *arguments):
    """What a call that exits with that status prints."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            function(*arguments)
    except SystemExit as error:
        assert error.code == status, output.getvalue()
        return output.getvalue()
    raise AssertionError("did not exit")


def test_shapes():
    shapes = tokenizer.Shapes("train", 32)
    assert len(shapes.classes) >= 10
    batch = shapes.draw(np.arange(40))
    assert batch.dtype == np.uint8 and (shapes.draw(np.array([17]))[0] == batch[17]).all()                    # an image is a function of its index
    assert zlib.crc32(shapes.attributes(np.arange(1000))["shape"].astype(np.int64).tobytes()) == 2572087595       # ... on every machine
    assert (tokenizer.Shapes("val", 32).draw(np.arange(40)) != batch).mean() > 0.5
    a = shapes.attributes(np.arange(30_000))
    for key, count in (("shape", 10), ("hue", 8), ("texture", 5), ("ground", 8)):
        assert (np.bincount(a[key], minlength=count) > 30_000 / count * 0.9).all()
    numbers = np.stack([a[key] for key in ("shape", "hue", "texture", "ground", "x", "y", "scale", "angle", "mirror")])
    assert np.abs(np.corrcoef(numbers) - np.eye(9)).max() < 0.03                                                # vary independently
    fine = tokenizer.Shapes("train", 256).draw(np.arange(8))
    small = F.adaptive_avg_pool2d(torch.from_numpy(fine).float(), 32)
    assert (small - torch.from_numpy(batch[:8]).float()).abs().mean() < 4                                       # the same picture at any size, antialiased
    caption = shapes.caption(3)
    assert shapes.classes[a["shape"][3]] in caption and shapes.hues[a["hue"][3]] in caption and shapes.textures[a["texture"][3]] in caption
    with tempfile.TemporaryDirectory() as folder:
        cached = tokenizer.Shapes("train", 32, 64, folder)
        assert (cached.images[:40] == batch).all() and cached[5][1] == a["shape"][5]


def test_images_of_any_mode():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rgb = (image(1, 3, 20, 30)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        picture = Image.fromarray(rgb)
        same = dict(rgb=picture, palette=picture.quantize(256), cmyk=picture.convert("CMYK"))
        same["cmyk"].save(folder / "cmyk.tif")
        for name in ("rgb", "palette"):
            same[name].save(folder / f"{name}.png")
        for name, tolerance in (("rgb.png", 0), ("cmyk.tif", 2), ("palette.png", 60)):
            loaded = tokenizer.load_rgb(folder / name)
            assert loaded.mode == "RGB" and np.abs(np.asarray(loaded).astype(int) - rgb).mean() <= tolerance, name
        alpha = np.dstack([rgb, np.zeros((20, 30), np.uint8)])
        Image.fromarray(alpha).save(folder / "clear.png")
        assert (np.asarray(tokenizer.load_rgb(folder / "clear.png")) == 255).all()                              # transparency on white
        Image.fromarray(np.full((4, 4), 32896, np.uint16)).save(folder / "deep.png")
        assert (np.asarray(tokenizer.load_rgb(folder / "deep.png")) == 128).all()                               # 16 bits
        Image.fromarray(np.full((4, 4), 77, np.uint8)).save(folder / "grey.png")
        assert (np.asarray(tokenizer.load_rgb(folder / "grey.png")) == 77).all()
        exif = Image.Exif()
        exif[0x112] = 6                                                                                         # rotated by 90 degrees
        picture.save(folder / "turned.jpg", exif=exif)
        assert tokenizer.load_rgb(folder / "turned.jpg").size == (20, 30)
        (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
        fails(lambda: tokenizer.load_rgb(folder / "broken.png"), "broken.png")


def test_center_crop():
    smooth = F.interpolate(image(1, 3, 8, 8), (300, 200), mode="bicubic")[0].clamp(0, 1)
    picture = Image.fromarray((smooth.permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    cropped = tokenizer.center_crop(picture, 64)
    assert cropped.size == (64, 64)
    reference = F.interpolate(smooth[None, :, 50:250], (64, 64), mode="bilinear", antialias=True)[0]
    assert np.abs(np.asarray(cropped) / 255 - reference.permute(1, 2, 0).numpy()).mean() < 0.02
    assert tokenizer.center_crop(picture.resize((64, 64)), 64).size == (64, 64)


def test_image_folders():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        fails(lambda: tokenizer.Images(str(folder), "train", 32), "no images")
        fails(lambda: tokenizer.Images(str(folder / "nowhere"), "train", 32), "nowhere")
        picture = Image.fromarray((image(1, 3, 40, 50)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))
        for split in ("train", "val"):
            for name in ("cat", "dog"):
                (folder / split / name).mkdir(parents=True)
                for i in range(3):
                    picture.rotate(30 * i).save(folder / split / name / f"{i}.png")
        data = tokenizer.Images(str(folder), "train", 32, crop=True, flip=True)
        assert len(data) == 6 and data.classes == ["cat", "dog"] and data.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert data[0][0].shape == (3, 32, 32) and data[0][0].dtype == torch.uint8 and data[4][1] == 1
        assert (data[0, (0, 5)][0] == data[0, (0, 5)][0]).all() and (data[0, (0, 5)][0] != data[0, (0, 6)][0]).any()      # augmented by key
        flat = tokenizer.Images(str(folder / "val" / "dog"), "train", 16)
        assert len(flat) == 3 and flat.labels.tolist() == [0] * 3
        assert not tokenizer.Images(str(folder), "val", 32).note
        (folder / "val").rename(folder / "other")                # without val, the training images stand in, with their classes, and it is said
        stand_in = tokenizer.Images(str(folder), "val", 32)
        assert stand_in.classes == ["cat", "dog"] and "no folder val" in stand_in.note
        (folder / "other").rename(folder / "val")
        loader = tokenizer.make_loader(data, tokenizer.StepSampler(6, 4, 0, 0, 2, WORLD), WORLD, 2)
        assert [batch.shape for batch, _ in loader] == [(4, 3, 32, 32)] * 2
        (folder / "train" / "cat" / "0.png").write_bytes(b"not an image")
        output = script("tokenizer.py", f"--data={folder}", f"--out={folder}/out", "--method=vae", "--batch_size=6", "--kimg=0.012", "--workers=1", "--lpips_scale=0", status=1)
        assert "0.png" in output and output.strip().splitlines()[-1].startswith("tokenizer.py: cannot read image"), output
    fails(lambda: tokenizer.Images("CIFAR10", "train", 32, "/nonexistent"), "CIFAR10", "--download=1")


def test_fashion_mnist():
    """Real images through torchvision's loader: Debian's package dataset-fashion-mnist has the original files."""
    source = next((Path(p) for p in ("/usr/share/datasets/fashion-mnist", "data/FashionMNIST/raw") if Path(p).is_dir()), None)
    if source is None:
        skip("no Fashion-MNIST on this machine (Debian: dataset-fashion-mnist)")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for file in source.glob("*.gz"):
            (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        data = tokenizer.Images("FashionMNIST", "train", 32, folder)
        assert len(data) == 60_000 and len(data.classes) == 10 and data[0][0].shape == (3, 32, 32) and (data[0][0][0] == data[0][0][2]).all()
        script("tokenizer.py", "--data=FashionMNIST", f"--data_dir={folder}", f"--out={folder}/out", "--method=vae", "--kimg=0.064", "--lpips_scale=0", "--log_interval=1")
        lines = [json.loads(line) for line in (Path(folder) / "out" / "log.jsonl").read_text().splitlines()]
        assert len(lines) == 4 and lines[-1]["images"] == 64 and lines[-1]["l1"] > 0


def test_step_sampler():
    """Any number of processes and accumulation steps sees the same images; epochs are permutations; runs can start anywhere."""
    def seen(processes, accumulate, start=0):
        samplers = [tokenizer.StepSampler(10, 4, 3, start, 5, tokenizer.World(rank, processes, torch.device("cpu")), accumulate) for rank in range(processes)]
        lists = [list(sampler) for sampler in samplers]
        return [sorted(item for rank in lists for part in rank[step * accumulate:(step + 1) * accumulate] for item in part) for step in range(5 - start)]
    assert seen(1, 1) == seen(2, 1) == seen(4, 1) == seen(2, 2) == seen(1, 4)
    assert seen(1, 1)[2:] == seen(1, 1, 2)
    order = [item[0] for step in tokenizer.StepSampler(10, 4, 3, 0, 5, WORLD) for item in step]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    fails(lambda: tokenizer.StepSampler(10, 5, 0, 0, 1, tokenizer.World(0, 2, torch.device("cpu"))), "multiple")


# -----------------------------------------------------------------------------
# tokenizer.py: weights, the ViT

def write_safetensors(path, tensors):
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.float64: "F64", torch.uint8: "U8"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for key, value in tensors.items():
        raw = value.contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        header[key] = dict(dtype=names[value.dtype], shape=list(value.shape), data_offsets=[len(data), len(data) + len(raw)])
        data += raw
    text = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_safetensors():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        tensors = {str(dtype): torch.arange(6).to(dtype).view(2, 3) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8)}
        tensors.update(scalar=torch.tensor(3.5), empty=torch.empty(0, 4))
        write_safetensors(path, tensors)
        loaded = tokenizer.load_weights(path)
        assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[key], tensors[key]) and loaded[key].dtype == tensors[key].dtype for key in tensors)
        whole = path.read_bytes()
        length = struct.unpack("<Q", whole[:8])[0]
        hostile = dict(short=whole[:5], header=whole[:20], data=whole[:-1], huge=struct.pack("<Q", 1 << 62) + whole[8:], text=whole[:8] + b"x" * length + whole[8 + length:])
        for field, value in (("data_offsets", [0, 1 << 40]), ("data_offsets", [-8, 16]), ("shape", [2, 4]), ("shape", [-1, 3]), ("dtype", "F99"), ("data_offsets", "abc")):
            header = json.loads(whole[8:8 + length])
            header["torch.float32"][field] = value
            text = json.dumps(header).encode()
            hostile[f"{field} {value}"] = struct.pack("<Q", len(text)) + text + whole[8 + length:]
        for name, content in hostile.items():
            path.write_bytes(content)
            fails(lambda: tokenizer.load_weights(path), "weights.safetensors")
        pickled = Path(folder) / "code.pt"
        torch.save({"x": captured_exit}, pickled)
        fails(lambda: tokenizer.load_weights(pickled), "code.pt")                                               # never unpickles code
        fails(lambda: tokenizer.load_weights(Path(folder) / "none.pt"), "none.pt")
    fails(lambda: tokenizer.load_weights("https://nowhere.invalid/weights.pth"), "https://nowhere.invalid/weights.pth", "--vfm")


def test_vit_golden():
    g = golden("dinov2_tiny")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        torch.save(fill(g), f"{folder}/dinov2_pretrain.pth")
        vit = tokenizer.load_vfm(f"{folder}/dinov2_pretrain.pth", num_heads=4)
        assert (vit.image_size, vit.patch_size, vit.embed_dim, vit.depth) == (70, 14, 48, 4)
        for size in (70, 56, 112):
            hidden, final = vit(image(2, 3, size, size) * 2 - 1, layers=(2, -1), cls=True)
            check(final, g["expect"][f"{size}px_final"])
            check(hidden, g["expect"][f"{size}px_hidden_2"])
        patches, = vit(image(2, 3, 112, 112) * 2 - 1)
        assert torch.equal(patches, final[:, 1:])
        assert vit(torch.zeros(1, 3, 56, 98))[0].shape == (1, 4 * 7, 48)                                        # not square
        del g["keys"]["norm.weight"]
        torch.save({**fill(g), "stray": torch.zeros(1)}, f"{folder}/faulty.pth")
        fails(lambda: tokenizer.load_vfm(f"{folder}/faulty.pth", num_heads=4), "norm.weight", "stray")
    fails(lambda: tokenizer.load_vfm("dinov3_vitx99"), "dinov3_vitx99", "dinov2_vitl14")


def test_vit_key_maps():
    """The same network under Meta's, Hugging Face's and timm's names, in .pth and .safetensors, gives the same features."""
    state = fill(golden("dinov2_tiny"))
    x = image(1, 3, 70, 70) * 2 - 1

    def features(state, name="x.pth", **overrides):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            (write_safetensors if name.endswith("safetensors") else lambda path, value: torch.save(value, path))(*((f"{folder}/{name}", state)))
            return tokenizer.load_vfm(f"{folder}/{name}", num_heads=4, **overrides)(x, (0, 2, -1), cls=True)

    def split_qkv(state, names):
        out = {}
        for key, value in state.items():
            if ".attn.qkv." in key:
                out.update({key.replace("attn.qkv", name): part for name, part in zip(names, value.chunk(3))})
            else:
                out[key] = value
        return out

    def rename(state, *pairs):
        for old, new in pairs:
            state = {re.sub(old, new, key): value for key, value in state.items()}
        return state

    reference = features(state)
    hf = rename(split_qkv(state, ["attention.attention." + name for name in ("query", "key", "value")]), (r"^(cls_token|mask_token)", r"embeddings.\1"), ("^pos_embed$", "embeddings.position_embeddings"),
                (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"), (r"^blocks\.", "encoder.layer."), (r"attn\.proj", "attention.output.dense"),
                (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"), (r"^norm\.", "layernorm."))
    assert all(torch.equal(a, b) for a, b in zip(reference, features(hf, "model.safetensors")))
    registers = {**state, "register_tokens": tensor("register_tokens", [1, 4, 48])}
    official = features(registers, antialias=False)
    assert [t.shape[1] for t in official] == [26] * 3 and not torch.allclose(official[1], reference[1])         # registers act, and are dropped
    timm = {**{key: value for key, value in registers.items() if key != "mask_token"}, "reg_token": registers["register_tokens"]}
    timm["cls_token"], timm["pos_embed"] = timm["cls_token"] + timm["pos_embed"][:, :1], timm["pos_embed"][:, 1:]      # timm: no class position
    del timm["register_tokens"]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(official, features(timm, antialias=False)))

    plain = {key: value for key, value in state.items() if ".ls" not in key and key != "mask_token"}
    meta = features(plain)
    mae = rename(split_qkv(plain, ["attention.attention." + name for name in ("query", "key", "value")]), (r"^(cls_token)", r"embeddings.\1"), ("^pos_embed$", "embeddings.position_embeddings"),
                 (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"), (r"^blocks\.", "encoder.layer."), (r"attn\.proj", "attention.output.dense"), (r"norm1", "layernorm_before"), (r"norm2", "layernorm_after"),
                 (r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense"), (r"^norm\.", "layernorm."), ("^", "vit."))
    assert all(torch.equal(a, b) for a, b in zip(meta, features({**mae, "decoder.decoder_norm.weight": torch.zeros(3)}, "model.safetensors")))

    swiglu = {**state, **{f"blocks.{i}.mlp.fc{j}.{kind}": tensor(f"{i}{j}{kind}", shape) for i in range(4) for j, kind, shape in
                          ((1, "weight", [128, 48]), (1, "bias", [128]), (2, "weight", [48, 64]), (2, "bias", [48]))}}
    giant = features(swiglu)
    assert all(torch.equal(a, b) for a, b in zip(giant, features(rename(swiglu, ("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3")))))
    block = tokenizer.ViT(**{**tokenizer.vit_config(swiglu), "num_heads": 4}).blocks[0]
    y = torch.randn(2, 3, 48)
    a, b = block.mlp.fc1(y).chunk(2, -1)
    torch.testing.assert_close(block.mlp(y), block.mlp.fc2(a * torch.sigmoid(a) * b))                           # DINOv2-g: silu(first half) * second


def test_vfm_table():
    """The published models' sizes; parameter counts from their papers and model cards."""
    with torch.device("meta"):
        count = lambda name: sum(p.numel() for p in tokenizer.ViT(**tokenizer.VFMS[name][1]).parameters()) / 1e6
        for name, millions in (("dinov2_vits14", 22.06), ("dinov2_vitb14", 86.58), ("dinov2_vitl14", 304.37), ("dinov2_vitg14", 1136.48), ("mae_vitl16", 303.3), ("dino_vits16", 21.67)):
            assert abs(count(name) / millions - 1) < 0.002, (name, count(name))


# -----------------------------------------------------------------------------
# tokenizer.py: the tokenizers

def test_vfmvae_golden():
    for name in ("vfmvae_tiny_legacy", "vfmvae_tiny"):
        g = golden(name)
        e, scale_factor, state = g["expect"], g["upstream_config"]["scale_factor"], fill(g)
        older = {key.replace("encoder.vision_model.", "encoder.vision_model.vision_model."): value for key, value in state.items()}
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            same = []
            for layout in ({"G_ema": state, "cfg": {}}, state, {"G_ema": older}):
                torch.save(layout, f"{folder}/vfmvae.pt")
                tok = tokenizer.load_tokenizer(f"{folder}/vfmvae.pt", num_heads=4, layers=(0, 2, -1), scale_factor=scale_factor, resolution=128)
                same.append(tok.state_dict())
            assert all(torch.equal(same[0][key], other[key]) for other in same[1:] for key in same[0])
            assert (tok.z_dim, tok.downsample, tok.resolution) == (8, 16, 128)
            x = image(2, 3, 128, 128, salt=g["salt"]) * 2 - 1
            mean, logvar = tok.encode(x)
            outputs = tok.decoder(mean, scales=True)
            check(outputs[-1], e["reconstruction"])
            assert torch.equal(tok.decode(mean), outputs[-1])
            features = tok.features(x)
            for i, level in enumerate(features):
                check(level, e[f"vfm_feature_{i}"])
            moments = tok.moments(features, 128, 128)
            check(moments, e["moments"])
            assert torch.equal(torch.cat([mean, logvar], 1), torch.cat([moments[:, :8], moments[:, 8:].clamp(-30, 20)], 1))
            decompressed, style = tok.decoder.decompress(mean)
            check(decompressed, e["post_quant"])
            check(style, e["style"])
            for output in outputs[:-1]:
                check(output, e[f"multiscale_{output.shape[-1]}"])
            np.testing.assert_allclose(tokenizer.vf_loss(tok.vf_proj(mean), features[-1]), e["vf_loss"], rtol=1e-4)
            np.testing.assert_allclose(tokenizer.kl_loss(mean, logvar), e["kl_loss"], rtol=1e-4)
            half = F.interpolate(x, (64, 64), mode="bilinear", antialias=True)
            check(tok.moments(tok.features(half), 64, 64), e["half_scale_moments"])
            check(tok.decode(tok.encode(half)[0]), e["half_scale_reconstruction"], 5e-3, 5e-4)
            wide = torch.rand(1, 3, 64, 192) * 2 - 1
            assert tok.decode(tok.encode(wide)[0]).shape == wide.shape                                          # not square
            fails(lambda: tok.encode(torch.zeros(1, 3, 72, 64)), "72 x 64")
            torch.save({key: value for key, value in state.items() if "torgb" not in key}, f"{folder}/vfmvae.pt")
            fails(lambda: tokenizer.load_tokenizer(f"{folder}/vfmvae.pt", num_heads=4, layers=(0, 2, -1)), "missing", "to_rgb")


def test_ldm_golden():
    g = golden("vavae_tiny")
    state = fill(g)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path, x = f"{folder}/vavae.ckpt", image(2, 3, 64, 64) * 2 - 1
        for extra in ({}, {"loss.logvar": torch.zeros(1), "foundation_model.x": torch.zeros(1), "linear_proj.weight": torch.zeros(1)}):
            torch.save({"state_dict": {**state, **extra}}, path)
            tok = tokenizer.load_tokenizer(path, resolution=64)
            check(tok.moments(x, 64, 64), g["expect"]["moments"])
            mean, logvar = tok.encode(x)
            check(tok.decode(mean), g["expect"]["reconstruction"])
        assert (tok.z_dim, tok.downsample) == (8, 16)
        sd = {**state, "quant_conv.weight": torch.randn(8, 16, 1, 1), "quant_conv.bias": torch.zeros(8), "post_quant_conv.weight": torch.randn(8, 4, 1, 1)}
        torch.save(sd, path)                                                                                    # SD's: fewer latent than inner channels
        assert tokenizer.load_tokenizer(path).encode(x)[0].shape == (2, 4, 4, 4)
        torch.save({"something": torch.zeros(1)}, path)
        fails(lambda: tokenizer.load_tokenizer(path), "not a tokenizer")
        torch.save({"kind": "diffusion"}, path)
        fails(lambda: tokenizer.load_tokenizer(path), "diffusion")


def test_lpips_golden():
    g = golden("lpips_vgg")
    vgg = {key: tensor(key, list(value.shape)) for key, value in tokenizer.LPIPS(None).state_dict().items() if key.startswith("features.")}
    lin = torch.load(HERE / "testdata" / "lpips_v0.1_vgg.pth", map_location="cpu", weights_only=True)
    np.testing.assert_allclose([value.sum().item() for value in lin.values()], g["lin_sums"], rtol=1e-5)
    a, b = image(2, 3, 64, 64, key="a") * 2 - 1, image(2, 3, 64, 64, key="b") * 2 - 1
    with tempfile.TemporaryDirectory() as folder:
        torch.save({**vgg, "classifier.0.weight": torch.zeros(1)}, f"{folder}/vgg16.pth")
        net = tokenizer.LPIPS(f"{folder}/vgg16.pth,{HERE}/testdata/lpips_v0.1_vgg.pth")
        np.testing.assert_allclose(net(a, b), g["expect"], rtol=1e-4)
        torch.save({f"lin{k}.model.1.weight": tensor(f"lin{k}.model.1.weight", shape).abs() for k, shape in enumerate(g["lin_shapes"])}, f"{folder}/lin.pth")
        np.testing.assert_allclose(tokenizer.LPIPS(f"{folder}/vgg16.pth,{folder}/lin.pth")(a, b), g["expect_with_lin_from_recipe_abs"], rtol=1e-4)
        fails(lambda: tokenizer.LPIPS(f"{folder}/none.pth"), "none.pth", "--lpips_weights")


def test_published_size():
    """The published VFM-VAE (SigLIP2-L at 512, f16, 32 channels) has the paper's parameter counts; the full model is run by test_published_size_runs."""
    with torch.device("meta"):
        cfg = tokenizer.Config(**{**tokenizer.PRESETS["imagenet"], "method": "vfmvae"})
        tok, _ = build_meta(cfg)
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6
    head = (1024 + 4 * 1024 * 1024 + 4 * 1024 + 2 * 1024 + 2 * 4096 * 1024 + 4096 + 1024) / 1e6                 # SigLIP's pooling head, which we leave out
    assert abs(count(tok.vfm) + head - 316.7) < 0.1, count(tok.vfm)
    assert abs(count(tok.adapter) + count(tok.vf_proj) + count(tok.decoder.post_quant) - 13.5) < 0.05
    assert abs(count(tok.decoder.mapping) - 0.53) < 0.01
    synthesis = count(tok.decoder) - count(tok.decoder.mapping) - count(tok.decoder.post_quant)
    assert abs(synthesis - 125.7) < 0.1, synthesis
    print(f"    VFM {count(tok.vfm):.1f} M (+ head {head:.1f}), adapter {count(tok.adapter) + count(tok.vf_proj) + count(tok.decoder.post_quant):.1f} M, decoder {synthesis:.1f} M; paper: 316.7, 13.5, 125.7")


def build_meta(cfg):
    original, tokenizer.load_vfm = tokenizer.load_vfm, lambda name, *a, **k: tokenizer.ViT(**tokenizer.VFMS[name][1])
    try:
        return tokenizer.build_tokenizer(cfg, pretrained=False)
    finally:
        tokenizer.load_vfm = original


def test_published_size_runs():
    """One 256 px image through the published size with random weights, within 6 GB."""
    code = ("import resource, torch, tokenizer\n"
            "cfg = tokenizer.Config(**tokenizer.PRESETS['imagenet'])\n"
            "with torch.no_grad():\n"
            "    tok = tokenizer.build_tokenizer(cfg, pretrained=False)[0].eval()\n"
            "    mean, logvar = tok.encode(torch.rand(1, 3, 256, 256) * 2 - 1)\n"
            "    print(tuple(mean.shape), tuple(tok.decode(mean).shape), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)")
    output = script("-c", code, OMP_NUM_THREADS="2")
    assert "(1, 32, 16, 16) (1, 3, 256, 256)" in output and float(output.split()[-1]) < 6, output


def test_modulation():
    """The modulated layer equals the convolution with each sample's own weights (spec: W s, demodulated)."""
    torch.manual_seed(0)
    layer = tokenizer.ConvNeXtLayer(16, 5, 12)
    for p in layer.parameters():
        nn.init.normal_(p, 0.5, 0.5)
    x, w = torch.randn(3, 16, 6, 6), torch.randn(3, 12)
    s = layer.style(w)
    weights = layer.pwconv1.weight[None, :, :, 0, 0] * s[:, None]
    weights = weights / (weights.square().sum(2, keepdim=True) + 1e-8).sqrt()
    y = torch.einsum("boc,bchw->bohw", weights, layer.norm(layer.dwconv(x))) + layer.pwconv1.bias[:, None, None]
    torch.testing.assert_close(layer(x, w), x + layer.gamma * layer.pwconv2(F.gelu(y)), rtol=1e-4, atol=1e-4)
    rgb = tokenizer.ToRGB(16, 12)
    s = rgb.style(w) / 4
    torch.testing.assert_close(rgb(x, w), torch.einsum("oc,bc,bchw->bohw", rgb.weight[:, :, 0, 0], s, x) + rgb.bias[:, None, None], rtol=1e-4, atol=1e-4)


def test_decoder_compiles_whole():
    """No graph breaks in the decoder and the VFM; the same images, eager or traced."""
    torch.manual_seed(0)
    decoder = tokenizer.VFMVAEDecoder(4, 8, 4, (16, 16, 8, 8), (16, 8), (1, 0, 0, 0), 1, 16)
    z = torch.randn(2, 4, 4, 4)
    compiled = torch.compile(decoder, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z), decoder(z), rtol=1e-4, atol=1e-4)
    vit = tiny_vfm("toy")
    torch.compile(vit, fullgraph=True, backend="eager")(torch.randn(2, 3, 32, 32), (0, 2, -1))


# -----------------------------------------------------------------------------
# tokenizer.py: losses and training

def test_psnr_ssim():
    from scipy.ndimage import gaussian_filter
    a, b = image(2, 1, 32, 32, key="a"), image(2, 1, 32, 32, key="b") * 0.3 + 0.35
    np.testing.assert_allclose(tokenizer.psnr(a * 2 - 1, b * 2 - 1), [-10 * np.log10(((x - y) ** 2).mean()) for x, y in zip(a.numpy(), b.numpy())], rtol=1e-5)
    blur = lambda x: gaussian_filter(x.astype(np.float64), 1.5, truncate=5 / 1.5)[5:-5, 5:-5]
    for x, y, value in zip(a[:, 0].numpy(), b[:, 0].numpy(), tokenizer.ssim(a * 2 - 1, b * 2 - 1)):
        mx, my = blur(x), blur(y)
        sx, sy, sxy = blur(x * x) - mx ** 2, blur(y * y) - my ** 2, blur(x * y) - mx * my
        expected = ((2 * mx * my + 0.01 ** 2) * (2 * sxy + 0.03 ** 2) / ((mx ** 2 + my ** 2 + 0.01 ** 2) * (sx + sy + 0.03 ** 2))).mean()
        np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_vf_margins():
    z, f = torch.randn(2, 8, 4, 4), torch.randn(2, 16, 8)
    full, margins = tokenizer.vf_loss(z, f), tokenizer.vf_loss(z, f, 0.25, 0.5)
    assert 0 < margins < full and tokenizer.vf_loss(f.transpose(1, 2).unflatten(2, (4, 4)), f) < 1e-5
    assert tokenizer.vf_loss(torch.randn(1, 8, 2, 4), torch.randn(1, 32, 8)).isfinite()                         # pooled from 4 x 8, not square


def test_diff_augment():
    torch.manual_seed(0)
    x = torch.rand(64, 3, 32, 32)
    y = tokenizer.diff_augment(x)
    assert y.shape == x.shape and (y == 0).all(1).flatten(1).any(1).all() and (y - x).abs().mean() > 0.1       # holes or shifts in every image
    y.sum().backward() if y.requires_grad else None
    x.requires_grad_(True)
    tokenizer.diff_augment(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_local_batch_norm():
    norm, x = tokenizer.LocalBatchNorm(4), torch.randn(16, 4, 10) * 3 + 1
    y = norm(x)
    torch.testing.assert_close(y[:8], norm(x[:8]))                                                              # virtual batches of 8 do not see each other
    torch.testing.assert_close(y[8:].mean((0, 2)), torch.zeros(4), atol=1e-5, rtol=0)


@with_tiny_vfm
def test_handed_gradients_equal_autograd():
    """Cutting the graph at latent and images gives what one backward pass through the plainly written loss gives, adaptive weights included."""
    for method, number in (("vfmvae", 1), ("vfmvae", 4), ("vavae", 1), ("vavae", 3), ("aligntok", 2), ("aligntok", 3)):
        with tempfile.TemporaryDirectory() as folder:
            cfg = tiny_config(folder, method=method, equivariance=False)
            torch.manual_seed(0)
            tok, vfm = tokenizer.build_tokenizer(cfg)
            trainer = tokenizer.Trainer(cfg, tok, WORLD, vfm)
            stage = dataclasses.replace(tokenizer.STAGES[method][number - 1], sample=False, gan_start_kimg=0.0)
            trainer.start_stage(stage)
            trainer.gan.eval()           # spectral normalisation stays where it is between the two
            for module in tok.modules():
                if isinstance(module, tokenizer.ConvNeXtLayer):
                    nn.init.ones_(module.gamma)
            x = image(8, 3, 32, 32) * 2 - 1
            torch.manual_seed(5)
            values, fake, _ = trainer.generator_step(x, 0, 0)
            grads = [None if p.grad is None else p.grad.clone() for p in trainer.parameters]
            for p in trainer.parameters:
                p.grad = None

            torch.manual_seed(5)
            torch.randn_like(x[:, :1]) if stage.sample else None
            mean, logvar, features = trainer.encode(x)
            scales = bool(stage.multires)
            outputs = tok.decoder(mean, scales=scales)
            outputs = outputs if scales else [outputs]
            rec, _ = trainer.reconstruction_loss(outputs, x)
            loss, last = rec, tok.adapter.last_weight()
            parts = trainer.gan.generator_loss(outputs[-1], x)
            gan = sum(getattr(stage, name) * value for name, value in parts.items())
            if stage.gan_adaptive:
                norm = lambda loss: torch.autograd.grad(loss, tok.decoder.last_weight(), retain_graph=True)[0].norm()
                weight = norm(rec) / (norm(sum(parts.values())) + 1e-4)
                np.testing.assert_allclose(values["gan_weight"], weight.clamp(0, 1e4), rtol=1e-3)
                gan = gan * weight.detach().clamp(0, 1e4)
            loss = loss + gan
            _, fixed, vf = trainer.latent_losses(x, mean, mean, logvar, features)
            loss = loss + fixed
            if vf is not None:
                norm = lambda loss: torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
                weight = norm(rec) / (norm(vf) + 1e-4) * stage.vf * cfg.vf_scale
                np.testing.assert_allclose(values["vf_weight"], weight, rtol=1e-3)
                loss = loss + weight.detach() * vf
            loss.backward()
            total = sum(p.grad.square().sum() for p in trainer.parameters if p.grad is not None).sqrt()
            for p, grad in zip(trainer.parameters, grads):
                assert (p.grad is None) == (grad is None)
                if grad is not None:
                    assert (p.grad - grad).norm() < 1e-4 * total, (method, number, tuple(p.shape), (p.grad - grad).norm() / total)


@with_tiny_vfm
def test_anchor_is_the_averaged_first_stage():
    """AlignTok's second stage stays close to the tokenizer that the first one saved, and what a stage freezes is the average."""
    with tempfile.TemporaryDirectory() as folder:
        cfg, saved = tiny_config(folder, method="aligntok", gan_scale=0.0), []
        for stage in (1, 2, 3):
            quiet(tokenizer.train, dataclasses.replace(cfg, stage=stage), WORLD)
            saved.append(torch.load(f"{folder}/tokenizer.pt", weights_only=True))
        names = [name for name in saved[0]["ema"] if name.startswith(("vfm.", "adapter."))]
        assert any(not torch.equal(saved[0]["ema"][name], saved[0]["model"][name]) for name in names)
        assert all(torch.equal(saved[1]["anchor"][name], saved[0]["ema"][name]) for name in names)
        assert all(torch.equal(saved[2]["model"][name], saved[1]["ema"][name]) for name in names)


@with_tiny_vfm
def test_tokenizer_flops():
    """The count behind MFU against a counter that watches a forward and backward pass; what is frozen, and smaller images, cost less."""
    from torch.utils.flop_counter import FlopCounterMode
    for method, number in (("vae", 0), ("aligntok", 0), ("aligntok", 1), ("aligntok", 2)):
        cfg = tiny_config("unused", method=method)
        tok, _ = tokenizer.build_tokenizer(cfg)
        stage = tokenizer.STAGES[method][number]
        tokenizer.select_parameters(tok, stage.trains)
        with FlopCounterMode(display=False) as counter:
            tok.decode(tok.encode(torch.zeros(1, 3, 32, 32))[0]).sum().backward()
        ratio = tokenizer.count_flops(cfg, tok)[stage.name] / counter.get_total_flops()
        assert 0.97 < ratio < 1.05, (method, stage.name, ratio)         # the first layer's input takes no gradient
    cfg = tiny_config("unused", equivariance=True)
    tok, _ = tokenizer.build_tokenizer(cfg)
    less, full = (tokenizer.count_flops(c, tok)["strong alignment"] for c in (cfg, dataclasses.replace(cfg, equivariance=False)))
    assert 0.4 < less / full < 0.9, less / full
    name, torch.cuda.get_device_name = torch.cuda.get_device_name, lambda: "NVIDIA H200"
    try:
        assert tokenizer.World(0, 8, torch.device("cuda")).mfu(989e9, 4000.0) == 0.5 and WORLD.mfu(1.0, 1.0) is None
    finally:
        torch.cuda.get_device_name = name


@with_tiny_vfm
def test_losses_add_up_as_the_recipe_says():
    """Every stage's sums, written out: each loss with its weight and scale. A test that only compares gradients would not see that a loss is left out."""
    x, y = image(8, 3, 32, 32) * 2 - 1, image(8, 3, 32, 32, "another") * 2 - 1
    for method, stages in tokenizer.STAGES.items():
        cfg = tiny_config("unused", method=method, gan_scale=0.0)
        torch.manual_seed(0)
        tok, vfm = tokenizer.build_tokenizer(cfg)
        trainer = tokenizer.Trainer(cfg, tok, WORLD, vfm)
        for stage in stages:
            trainer.start_stage(stage)
            rates = {"encoder": cfg.encoder_lr} if "encoder" in stage.trains else {}
            base = stage.lr * cfg.lr_scale * (1 if method == "vfmvae" else cfg.ldm_lr)
            assert [group["lr"] for group in trainer.optimizer.param_groups] == [base * rates.get(name, 1) for name in stage.trains.split()], stage.name
            if stage.preserve:           # away from where the stage began
                before = copy.deepcopy(tok)
                for p in tok.adapter.parameters():
                    p.data.mul_(1.2)
            mean, logvar, features = trainer.encode(x)
            _, fixed, vf = trainer.latent_losses(x, mean, mean, logvar, features)
            want = stage.kl * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean() / 2
            if stage.preserve:
                distance = (mean - before.encode(x)[0]).square().mean()
                assert distance > 1e-4
                want = want + stage.preserve * cfg.preserve_scale * distance * 3 * 32 * 32       # LDM's other losses are sums over C, H, W
            torch.testing.assert_close(fixed, want, rtol=1e-4, atol=1e-9)
            assert (vf is not None) == bool(stage.vf and "adapter" in stage.trains)
            outputs = [F.avg_pool2d(y, 2), y] if stage.multires else [y]
            perceptual = trainer.perceptual_net(y, x).mean() if stage.lpips else 0
            want = 3 * 32 * 32 * (stage.l1 * (x - y).abs().mean() + stage.lpips * cfg.lpips_scale * perceptual) / (1 if stage.summed else 3 * 32 * 32)
            want = want + stage.ssim * (1 - tokenizer.ssim(y, x, data_range=2).mean())
            if stage.multires:
                want = want + stage.multires * (outputs[0] - F.interpolate(x, (16, 16), mode="bilinear", antialias=True, align_corners=False)).abs().mean()
            torch.testing.assert_close(trainer.reconstruction_loss(outputs, x)[0], torch.as_tensor(want), rtol=1e-4, atol=1e-6)


@with_tiny_vfm
def test_frozen_vfm_runs_once():
    """A step runs the VFM once on the batch, for the encoder or the VF loss and the perceptual distance together, and keeps no activations of it."""
    for method in ("vfmvae", "aligntok", "vavae"):
        cfg = tiny_config("unused", method=method, equivariance=False, gan_scale=0.0)
        tok, vfm = tokenizer.build_tokenizer(cfg)
        trainer = tokenizer.Trainer(cfg, tok, WORLD, vfm)
        trainer.start_stage(tokenizer.STAGES[method][0])
        calls = dict(encoder=0, perceptual=0)
        for name, net in (("encoder", tok.vfm or vfm), ("perceptual", trainer.perceptual_net.vit)):

            def count(net, arguments, output, name=name):
                calls[name] += 1
                assert name != "encoder" or not any(level.requires_grad for level in output)
            net.register_forward_hook(count)
        trainer.step([(image(8, 3, 32, 32) * 255).to(torch.uint8)], 0, 0)
        assert calls == dict(encoder=1, perceptual=1), (method, calls)          # the perceptual network sees the decoder's images alone


@with_tiny_vfm
def test_every_stage_trains_what_it_names():
    """All methods, all stages, every loss: the named parts move and no others; frozen parts have no gradients and no optimizer state."""
    expected = dict(vfmvae={"adapter", "decoder"}, aligntok={"vfm", "adapter", "decoder"}, vavae={"adapter", "decoder"}, vae={"adapter", "decoder"})
    for method, stages in tokenizer.STAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            cfg = tiny_config(folder, method=method)
            torch.manual_seed(0)
            tok, vfm = tokenizer.build_tokenizer(cfg)
            trainer, moved = tokenizer.Trainer(cfg, tok, WORLD, vfm), set()
            batch = (image(8, 3, 32, 32) * 255).to(torch.uint8)
            for stage in stages:
                stage = dataclasses.replace(stage, gan_start_kimg=0.0)
                trainer.start_stage(stage)
                before = {name: p.detach().clone() for name, p in tok.named_parameters()}
                values = [trainer.step([batch], step, 0) for step in range(3)]
                changed = {name for name, p in tok.named_parameters() if not torch.equal(p, before[name])}
                assert len(trainer.optimizer.state) == len(changed) or len(trainer.optimizer.state) <= len(trainer.parameters)
                allowed = tuple(dict(encoder="vfm.", adapter=("adapter.", "vf_proj."), decoder="decoder.", high="decoder.")[part] for part in stage.trains.split())
                allowed = tuple(prefix for part in allowed for prefix in ([part] if isinstance(part, str) else part))
                assert changed and all(name.startswith(allowed) for name in changed), (method, stage.name, changed)
                if stage.trains == "high":
                    assert all(int(name.split(".")[2]) >= len(tok.decoder.blocks) - 3 for name in changed)
                assert all(p.grad is None for p in tok.parameters())
                for column, key in (("l1", "l1"), ("lpips", "lpips"), ("ssim", "ssim"), ("multires", "multires"), ("kl", "kl"), ("vf", "vf"), ("preserve", "preserve"), ("dino", "dino"),
                                    ("patch", "patch"), ("multi", "multi"), ("matching", "matching"), ("dino", "discriminator")):
                    assert not getattr(stage, column) or any(key in v for v in values), (method, stage.name, key)
                assert all(torch.isfinite(v).all() for losses in values for v in losses.values()), (method, stage.name)
                moved |= {name.split(".")[0] for name in changed}
            assert moved - {"vf_proj"} == expected[method], (method, moved)


def test_ldm_learns_at_toy_size():
    """The plain VAE of the toy preset learns eight images by heart: a grey image's L1 is 0.33, and 32 groups in its GroupNorms or the rate of
    VFM-VAE, with which it stayed near that on many images, leave 0.18 and 0.21 here."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = tokenizer.Config(method="vae", out=folder, lpips_scale=0.0, cooldown=0.0, compile=False)
        torch.manual_seed(0)
        trainer = tokenizer.Trainer(cfg, tokenizer.build_tokenizer(cfg)[0], WORLD)
        trainer.start_stage(tokenizer.STAGES["vae"][0])
        images = torch.from_numpy(Shapes("train").draw(np.arange(8)))
        for step in range(80):
            tokenizer.seed_step(0, step)
            l1 = trainer.step([images], step, 0)["l1"].item()
        assert l1 < 0.17, l1


@with_tiny_vfm
def test_impossible_tokenizers_are_refused():
    """One line for what no network can be built of, before anything is trained."""
    build = lambda **overrides: tokenizer.build_tokenizer(tiny_config("out", **overrides))
    fails(lambda: build(downsample=32), "--downsample")
    fails(lambda: build(method="aligntok", scale_factor=2.0), "2 times as fine")
    fails(lambda: build(downsample=4, widths=(16, 16, 8)), "0.5 times as fine")
    fails(lambda: build(level_dim=48), "heads")
    fails(lambda: build(layers=(-1, 2)), "--layers")
    fails(lambda: build(method="vae", groups=5), "widths")
    with tempfile.TemporaryDirectory() as folder:
        fails(lambda: tokenizer.train(tiny_config(folder, kimg=0.001), WORLD), "--kimg=0.001")


@with_tiny_vfm
def test_trained_encoder_is_no_perceptual_network():
    """AlignTok's perceptual distance is the pretrained VFM's to the end: in stage 3 it is zero between an image and itself."""
    cfg = tiny_config("unused", method="aligntok", gan_scale=0.0)
    torch.manual_seed(0)
    tok, vfm = tokenizer.build_tokenizer(cfg)
    trainer = tokenizer.Trainer(cfg, tok, WORLD, vfm)
    x = image(8, 3, 32, 32) * 2 - 1
    for p in tok.vfm.parameters():
        p.data.mul_(1.5)                 # as stage 2 might have left it
    trainer.start_stage(tokenizer.STAGES["aligntok"][2])
    trainer.encode(x)
    assert trainer.reconstruction_loss([x], x, trainer.shared)[1]["lpips"] < 1e-6


def test_equivariance_draws():
    draws = [tokenizer.draw_equivariance(0, step, 16, 4) for step in range(4000)]
    share = lambda kind: sum(draw[0] == kind for draw in draws) / len(draws)
    assert abs(share("latent") - 0.5) < 0.03 and abs(share("image") - 0.125) < 0.02
    assert {draw[1] for draw in draws if draw[0] == "latent"} == {0.25, 0.5, 0.75, 1.0} and {draw[2] for draw in draws if draw[0] == "latent"} == {0, 1, 2, 3}
    assert {draw[1] for draw in draws if draw[0] == "image"} == {0.25, 0.5, 0.75}
    assert {tokenizer.draw_equivariance(0, step, 4, 2)[1] for step in range(200)} == {0.5, 1.0}                 # only grids that the decoder admits


@with_tiny_vfm
def test_tokenizer_resumes_exactly():
    """Stopped in the middle of a stage, and at every later one, the run ends with the same bits as one that was not stopped."""
    for method in ("vfmvae", "aligntok"):
        with tempfile.TemporaryDirectory() as folder:
            cfg = tiny_config(Path(folder) / "whole", method=method, kimg=0.12, save_interval=2)
            tokenizer.train(cfg, WORLD)
            whole = torch.load(Path(folder) / "whole" / "tokenizer.pt", weights_only=True)
            assert whole["images"] == 120
            parts = dataclasses.replace(cfg, out=str(Path(folder) / "parts"))
            save, count = tokenizer.save_checkpoint, 0

            class Killed(Exception):
                pass

            def save_and_die(path, **entries):
                nonlocal count
                save(path, **entries)
                count += 1
                if count in (1, 3, 6):
                    raise Killed
            tokenizer.save_checkpoint = save_and_die
            try:
                while True:
                    try:
                        tokenizer.train(parts, WORLD)
                        break
                    except Killed:
                        pass
            finally:
                tokenizer.save_checkpoint = save
            again = torch.load(Path(folder) / "parts" / "tokenizer.pt", weights_only=True)
            for part in ("model", "ema", "optimizer"):
                flat = lambda entry: [t for t in (torch.utils._pytree.tree_leaves(entry)) if torch.is_tensor(t)]
                assert all(torch.equal(a, b) for a, b in zip(flat(whole[part]), flat(again[part]), strict=True)), (method, part)
            log = [json.loads(line) for line in (Path(folder) / "parts" / "log.jsonl").read_text().splitlines()]
            assert [line["step"] for line in log] == list(range(1, 16))                                         # one line a step, none twice
            fails(lambda: tokenizer.train(dataclasses.replace(parts, z_dim=8), WORLD), "z_dim", "--resume=0")
            loaded = tokenizer.load_tokenizer(Path(folder) / "parts" / "tokenizer.pt")
            assert all(torch.equal(dict(loaded.named_parameters())[name], value) for name, value in again["ema"].items())      # EMA weights are what is loaded
            assert list((Path(folder) / "parts" / "grids").glob("*.png"))


@with_tiny_vfm
def test_other_sizes():
    """The shapes, the toy VFM and every tokenizer at twice the resolution; one that does not fit is refused."""
    for method in tokenizer.STAGES:
        with tempfile.TemporaryDirectory() as folder:
            tok = tokenizer.train(tiny_config(folder, method=method, image_size=64, kimg=0.016, gan_scale=0.0), WORLD)
            assert tok.encode(torch.zeros(1, 3, 64, 96))[0].shape == (1, 4, 8, 12)
    fails(lambda: tokenizer.build_tokenizer(tiny_config("out", image_size=36)), "36 x 36")


@with_tiny_vfm
def test_stage_by_stage():
    with tempfile.TemporaryDirectory() as folder:
        cfg = tiny_config(folder, method="aligntok")
        fails(lambda: tokenizer.train(dataclasses.replace(cfg, stage=2), WORLD), "stage 2")
        for stage in (1, 2, 3):
            tokenizer.train(dataclasses.replace(cfg, stage=stage), WORLD)
            assert torch.load(f"{folder}/tokenizer.pt", weights_only=True)["stage"] == stage
        fails(lambda: tokenizer.train(dataclasses.replace(cfg, stage=9), WORLD), "--stage=9", "1 (latent alignment)")
        original = torch.load(f"{folder}/tokenizer.pt", weights_only=True)
        one = tokenizer.train(dataclasses.replace(cfg, out=f"{folder}/one"), WORLD)
        assert all(torch.equal(value, dict(one.named_parameters())[name]) for name, value in original["ema"].items())


@with_tiny_vfm
def test_accumulation_equals_one_batch():
    """Micro-batches give the gradient of the whole batch (without batch statistics and sampling)."""
    results = []
    for accumulate in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            cfg = tiny_config(folder, accumulate=accumulate, gan_scale=0.0)
            torch.manual_seed(0)
            tok, vfm = tokenizer.build_tokenizer(cfg)
            trainer = tokenizer.Trainer(cfg, tok, WORLD, vfm)
            trainer.start_stage(dataclasses.replace(tokenizer.STAGES["vfmvae"][0], sample=False, vf=0.0, equivariance=False))
            batch = (image(8, 3, 32, 32) * 255).to(torch.uint8)
            for part in batch.chunk(accumulate):
                trainer.generator_step(tokenizer.to_float(part), 0, 0, 1 / accumulate)
            results.append(torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None]))
    assert (results[0] - results[1]).norm() < 1e-4 * results[0].norm()


def test_tokenizer_on_two_processes():
    """torchrun with gloo: trains, sees as many images as one process, and the weights agree but for the noise of each rank."""
    with tempfile.TemporaryDirectory() as folder:
        common = ["--method=vae", "--kimg=0.096", "--lpips_scale=0", "--save_interval=1000", "--log_interval=1", "--ch_mult=1,1,1,1"]
        output = torchrun("tokenizer.py", f"--out={folder}/two", *common)
        assert output.count("preset toy") == 1 and "2 x cpu" in output
        script("tokenizer.py", f"--out={folder}/one", *common)
        one, two = (torch.load(f"{folder}/{name}/tokenizer.pt", weights_only=True) for name in ("one", "two"))
        assert one["images"] == two["images"] == 96
        losses = [[json.loads(line)["l1"] for line in Path(f"{folder}/{name}/log.jsonl").read_text().splitlines()] for name in ("one", "two")]
        assert len(losses[0]) == len(losses[1]) == 6 and abs(losses[0][0] - losses[1][0]) < 0.1


@with_tiny_vfm
def test_evaluate():
    import fid
    with tempfile.TemporaryDirectory() as folder:
        cfg = tiny_config(folder, method="vfmvae", eval_images=32)
        tok = tokenizer.train(cfg, WORLD)
        original, fid.load_features = fid.load_features, lambda *a, **k: FakeFeatures()
        try:
            result = tokenizer.evaluate(cfg, tok, WORLD)
        finally:
            fid.load_features = original
        assert {"PSNR (dB)", "SSIM", "rFD (toy)", "equivariance error, rotation", "equivariance error, scaling"} <= result.keys()
        assert json.loads(Path(f"{folder}/eval.json").read_text())["PSNR (dB)"] == result["PSNR (dB)"] > 3


@with_tiny_vfm
def test_evaluates_on_what_it_was_trained_for():
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.train(tiny_config(folder, method="vae", image_size=64, kimg=0.008, gan_scale=0.0), WORLD)
        for flags, size in (((), 64), (("--image_size=48",), 48)):
            with mock.patch.object(tokenizer, "evaluate") as evaluate, mock.patch.object(sys, "argv", ["tokenizer.py", "--eval=1", "--out", folder, *flags]):
                tokenizer.run()
            assert evaluate.call_args[0][0].image_size == size


def test_one_process_fetches():
    """`alone`: what several do at once is done one after the other."""
    inside, most = [], []

    def enter(_):
        with tokenizer.alone(f"{folder}/sub/file"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(8)))
    assert most == [1] * 8


class FakeFeatures(nn.Module):
    name = "toy"

    def forward(self, images):
        return images.float().flatten(1)[:, ::300] / 255, None, None


# -----------------------------------------------------------------------------
# diffusion.py and sample.py

TIGHT = dict(rtol=1e-5, atol=1e-5)       # looser ones let exact GELU and another eps pass


def official_file(path, name, prefix=""):
    """The reference's weights as its files are laid out; the position tables in them must not be used."""
    weights = {prefix + key: value for key, value in fill(golden(name)).items()}
    torch.save({"ema": weights, "model": {key: value + 1 for key, value in weights.items()}} if name == "lightningdit_tiny" else {"ema": weights}, path)
    return path


def golden_model(name, prefix="", **overrides):
    """-> expectations, the model through load_diffusion, latent, noise."""
    with tempfile.TemporaryDirectory() as folder:
        model = diffusion.load_diffusion(official_file(f"{folder}/official.pt", name, prefix), num_heads=4, **overrides)
    return golden(name)["expect"], model, *((image(2, 8, 4, 4, key) - 0.5) * 3.4 for key in ("latent", "noise"))


@torch.no_grad()
def test_lightningdit_golden():
    expect, model, x, noises = golden_model("lightningdit_tiny")
    check(model.pos_embed, expect["pos_embed"], **TIGHT)
    check(model.rope_cos.flatten(1).repeat_interleave(2, 1), expect["rope_cos"], **TIGHT)
    check(model(x, torch.tensor([0.1, 0.73]), torch.tensor([3, 10])), expect["velocity"], **TIGHT)
    y = torch.tensor([3, 1])
    check(sample.guided(model, x, 0.5, y, cfg_scale=4.0, cfg_channels=3)[0], expect["cfg_velocity_t0p5_scale4"], **TIGHT)
    losses = diffusion.flow_losses(model, x, y, torch.tensor([0.3, 0.8]), noises)
    np.testing.assert_allclose(losses["velocity"], expect["mse"], **TIGHT)
    np.testing.assert_allclose(losses["cosine"], expect["cos"], **TIGHT)
    check(sample.ode(model, noises, y, num_steps=10, timestep_shift=0.3), expect["ode_euler_10_shift0p3_nocfg"], **TIGHT)
    guided = sample.ode(model, noises, y, num_steps=10, cfg_scale=2.0, cfg_interval_start=0.125, timestep_shift=0.3, cfg_channels=3)
    check(guided, expect["ode_euler_10_shift0p3_cfg2"], **TIGHT)


@torch.no_grad()
def test_reg_golden():
    expect, model, x, noises = golden_model("reg_sit_tiny", prefix="module.", encoder_depth=2)
    check(model.pos_embed, expect["pos_embed"], **TIGHT)
    cls, cls_noise = ((image(2, 1, 1, 24, key).reshape(2, 24) - 0.5) * 3.4 for key in ("cls", "noisecls"))
    t = torch.tensor([0.1, 0.73])        # the reference's, from data to noise
    v, v_cls, projection = model(x, 1 - t, torch.tensor([3, 10]), cls)
    check(-v, expect["velocity"], **TIGHT)
    check(-v_cls, expect["cls_velocity"], **TIGHT)
    check(projection, expect["projection"], **TIGHT)
    check(sample.score(-v, x, t.view(2, 1, 1, 1)), expect["score_t"], **TIGHT)
    for name, keywords in ("em_8_nocfg", {}), ("em_8_cfg2", dict(cfg_scale=2.0, cls_cfg_scale=2.0, guidance_low=0.0, guidance_high=0.8)):
        calls = []

        def draw(like):                  # asked for the latent and then the class token, at every step but the last, in float64
            calls.append("latent" if like.dim() == 4 else "cls")
            assert like.dtype == torch.float64
            return (noise(like.numel(), f"step{calls.count(calls[-1]) - 1}_{calls[-1]}") * 1.7).reshape(like.shape)

        check(sample.sde(model, noises, torch.tensor([3, 1]), num_steps=8, cls_noise=cls_noise, generator=draw, **keywords), expect[name], **TIGHT)
        assert calls == ["latent", "cls"] * 7


def test_load_diffusion():
    with tempfile.TemporaryDirectory() as folder:
        path, weights = f"{folder}/x.pt", fill(golden("lightningdit_tiny"))
        args = torch.randn(2, 8, 4, 4), torch.rand(2), torch.tensor([1, 2])
        outputs = []
        for entries in ({"ema": weights}, {"model": weights}, weights, {"ema": {"module._orig_mod." + key: value for key, value in weights.items()}}, {"ema": {key: value.double() for key, value in weights.items()}}):
            torch.save(entries, path)
            with torch.no_grad():
                outputs.append(diffusion.load_diffusion(path)(*args))        # with QK norm the head count shows
        assert all(torch.equal(outputs[0], other) for other in outputs[1:]) and outputs[0].std() > 0.5
        load = lambda entries: (torch.save(entries, path), diffusion.load_diffusion(path))[1]
        fails(lambda: load({**weights, "blocks.0.attn.surplus": torch.zeros(1)}), "blocks.0.attn.surplus", "left over")
        fails(lambda: load({key: value for key, value in weights.items() if key != "blocks.1.mlp.w12.bias"}), "blocks.1.mlp.w12.bias", "missing")
        fails(lambda: load({"ema": {"conv.weight": torch.zeros(1)}}), path, "x_embedder.proj.weight")
        fails(lambda: load(dict(kind="tokenizer", model={})), "tokenizer")
        fails(lambda: diffusion.load_diffusion(f"{folder}/none.pt"), "none.pt")
        sizes = dict(input_size=8, in_channels=3, patch_size=2, hidden_size=48, depth=2, num_heads=3, num_classes=5, arch="sit", mlp_hidden=40, z_dim=7, projector_dim=9, cls_dim=7)
        model = diffusion.DiT(**sizes)
        found = diffusion.official_arch({**model.state_dict(), "pos_embed": model.pos_embed})
        assert {**found, "num_heads": 3} == dict(sizes, qk_norm=False)
        torch.save([1, 2], path)
        fails(lambda: diffusion.load_diffusion(path), "no diffusion transformer")


def test_published_diffusion_sizes():
    """Parameters of the published models: 675 M, with REG 685 M; B 130 M (DiT-B/1's size)."""
    with torch.device("meta"):
        millions = lambda **arch: sum(p.numel() for p in diffusion.DiT(**arch).parameters()) / 1e6
        sizes = {name: dict(zip(("depth", "hidden_size", "num_heads"), size)) for name, size in diffusion.SIZES.items()}
        assert abs(millions(**sizes["XL"]) - 675) < 2 and abs(millions(**sizes["XL"], arch="sit", cls_dim=768, z_dim=768, qk_norm=True) - 685) < 2
        assert abs(millions(**sizes["B"]) - 130) < 3 and 950 < millions(**sizes["1.0B"]) < 1100 and 1500 < millions(**sizes["1.6B"]) < 1700


def small_dit(arch="lightningdit", random=True, **arguments):
    torch.manual_seed(0)
    model = diffusion.DiT(**{**dict(input_size=4, in_channels=8, hidden_size=32, depth=3, num_heads=2, num_classes=10, arch=arch, projector_dim=16, encoder_depth=2), **arguments})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1 * random)
    return model


REG = dict(arch="sit", cls_dim=24, z_dim=24, qk_norm=True)
REG_INPUT = torch.randn(3, 8, 4, 4), torch.rand(3), torch.tensor([1, 10, 2]), torch.randn(3, 24)


def test_dit_starts_at_zero_and_learns_everywhere():
    """adaLN-zero: the velocity starts at 0; after the first steps every parameter receives a gradient (but the unused rows of the table)."""
    for arguments in ({}, dict(patch_size=2), REG):
        model = small_dit(random=False, **arguments)
        out = model(*REG_INPUT[:3 + bool(model.cls_dim)])
        assert not (out[0] if model.cls_dim else out).any()
        model = small_dit(**arguments)
        out = model(*REG_INPUT[:3 + bool(model.cls_dim)])
        sum(part.square().sum() for part in (out if model.cls_dim else [out])).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_dit_compiles_whole():
    """No graph break in the model, alone (sampling) or block by block (several processes): one graph serves all blocks; in bf16 autocast, too."""
    from torch._dynamo.testing import CompileCounter
    for arguments in ({}, REG):
        for checkpointing in (False, True):
            whole, blocks = small_dit(**arguments), small_dit(**arguments)
            counters = CompileCounter(), CompileCounter()
            whole.checkpointing = blocks.checkpointing = checkpointing
            want = whole(*REG_INPUT[:3 + bool(whole.cls_dim)])
            torch._dynamo.reset()
            whole.forward = torch.compile(whole.forward, fullgraph=True, dynamic=False, backend=counters[0])
            for block in blocks.blocks:
                block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=counters[1])
            for model, counter in zip((whole, blocks), counters):
                for _ in range(2):
                    got = model(*REG_INPUT[:3 + bool(model.cls_dim)])
                assert counter.frame_count == 1
                torch.testing.assert_close(got, want)
    with torch.autocast("cpu", torch.bfloat16):
        low = small_dit(**REG)(*REG_INPUT)
    for a, b in zip(low, small_dit(**REG)(*REG_INPUT)):
        assert (a - b).norm() < 0.03 * b.norm()


def test_dit_flops():
    from torch.utils.flop_counter import FlopCounterMode
    for arguments in ({}, dict(patch_size=2), REG):
        model = small_dit(**arguments)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model(*(part[:1] for part in REG_INPUT[:3 + bool(model.cls_dim)]))
        assert abs(model.flops() / counter.get_total_flops() - 1) < 2e-3


# --- sampling ---

class Growth:
    """dx/dt = (1 + cos 3t) x, so x(1) = x(0) exp(1 + sin(3) / 3); it counts its calls."""
    num_classes, calls = 10, 0

    def __call__(self, x, t, y):
        self.calls += 1
        self.batches = getattr(self, "batches", []) + [len(x)]
        return (1 + torch.cos(3 * t)).view(-1, 1, 1, 1) * x + 0 * y.view(-1, 1, 1, 1)


def test_solvers_converge_with_their_order():
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    exact = math.exp(1 + math.sin(3) / 3)
    for shift in (0.0, 0.3):             # unequal steps, too
        for solver, order in ("euler", 1), ("heun", 2), ("ab2", 2):
            errors = [abs(sample.ode(Growth(), x, torch.zeros(1).long(), steps + 1, solver=solver, timestep_shift=shift).item() - exact) for steps in (64, 128, 256)]
            rates = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
            assert all(abs(rate - order) < 0.3 for rate in rates), (solver, shift, rates)
    model = Growth()
    sample.ode(model, x, torch.zeros(1).long(), 11, solver="heun")
    assert model.calls == 20
    fails(lambda: sample.ode(model, x, torch.zeros(1).long(), 10, solver="rk4"), "rk4", "heun")


def test_sde_reaches_the_data():
    """For Gaussian data N(m, s^2) the velocity is known: samples have that mean and deviation, for the ODE and the SDE."""
    m, s = 0.7, 0.5

    def velocity(x, t, y):               # E[x_1 - x_0 | x_t]
        t = t.view(-1, 1, 1, 1).double()
        variance = t ** 2 * s ** 2 + (1 - t) ** 2
        return m + (t * s ** 2 - (1 - t)) / variance * (x - t * m)

    start = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    for x in (sample.ode(velocity, start, torch.zeros(20_000).long(), 100), sample.sde(velocity, start, torch.zeros(20_000).long(), 250, generator=torch.Generator().manual_seed(1))):
        assert abs(x.mean() - m) < 0.02 and abs(x.std() - s) < 0.02, (x.mean(), x.std())


@torch.no_grad()
def test_guidance():
    """Both halves in one batch, the unconditional one inside the interval alone; autoguidance extrapolates from another model."""
    x, y, model, guide = torch.randn(2, 8, 4, 4), torch.tensor([3, 1]), small_dit(), small_dit(depth=1)
    counter = Growth()
    sample.ode(counter, x.double(), y, 11, cfg_scale=2.0, cfg_interval_start=0.55)
    assert counter.batches == [2] * 6 + [4] * 4
    t = torch.full((2,), 0.4)
    a, b, c = model(x, t, y), model(x, t, torch.tensor([10, 10])), guide(x, t, y)
    torch.testing.assert_close(sample.guided(model, x, 0.4, y, cfg_scale=3.0)[0], b + 3 * (a - b))
    torch.testing.assert_close(sample.guided(model, x, 0.4, y, cfg_scale=3.0, guide=guide)[0], c + 3 * (a - c))
    model, cls = small_dit(**REG), torch.randn(2, 24)
    (a, a_cls, _), (b, b_cls, _) = model(x, t, y, cls), model(x, t, torch.tensor([10, 10]), cls)
    for scale, want in (0.0, a_cls), (2.0, b_cls + 2 * (a_cls - b_cls)):
        v, v_cls = sample.guided(model, x, 0.4, y, cls, cfg_scale=3.0, cls_cfg_scale=scale)
        torch.testing.assert_close(v, b + 3 * (a - b))
        torch.testing.assert_close(v_cls, want)
    z = sample.ode(model, x, y, 3, cls_noise=cls)                            # the class token moves along, and the latent with it
    v, v_cls, _ = model(x, 0 * t, y, cls)
    torch.testing.assert_close(z, x + v / 2 + model(x + v / 2, 0 * t + 0.5, y, cls + v_cls / 2)[0] / 2)
    torch.testing.assert_close(sample.ode(model, x, y, 11, cls_noise=cls, solver="heun"), sample.ode(model, x, y, 201, cls_noise=cls), atol=0.05, rtol=0.05)


# --- cache and training, with a tokenizer of random weights and a folder of 96 shapes ---

TINY_LDM = dict(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, attn_levels=())


def tiny_tokenizer(path, seed=0):
    torch.manual_seed(seed)
    tok = tokenizer.Tokenizer(resolution=32, downsample=8, z_dim=4, encoder=TINY_LDM, decoder=TINY_LDM, decoder_kind="ldm", scale_factor=1.0)
    tokenizer.save_checkpoint(path, kind="tokenizer", arch=tok.arch, model=tok.state_dict(), ema={})
    return tokenizer.load_tokenizer(path)


def diffusion_folder(folder):
    """A place to work in: images in data/, a tokenizer in out/ -> a small diffusion.Config for it."""
    shapes = tokenizer.Shapes("train", 32, 72)
    for i in range(len(shapes)):
        pixels, _ = shapes[i]
        path = Path(folder) / "data" / ("train" if i < 48 else "val") / f"{i % 10}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    tiny_tokenizer(f"{folder}/out/tokenizer.pt")
    return diffusion.Config(out=f"{folder}/out", data=f"{folder}/data", depth=2, hidden_size=32, num_heads=2, batch_size=16, encode_batch=16, steps=6, warmup=2, val_interval=3,
                            log_interval=1, sample_interval=0, save_interval=3, compile=False, projector_dim=16, encoder_depth=1)


def with_diffusion_folder(function):
    def wrapped():
        original, diffusion.load_vfm = diffusion.load_vfm, tiny_vfm
        try:
            with tempfile.TemporaryDirectory() as folder:
                function(folder, diffusion_folder(folder))
        finally:
            diffusion.load_vfm = original
    wrapped.__name__ = function.__name__
    return wrapped


def quiet(function, *arguments):
    """Calls it -> what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        function(*arguments)
    return out.getvalue()


@with_diffusion_folder
def test_latent_cache(folder, cfg):
    tok, images = tokenizer.load_tokenizer(f"{folder}/out/tokenizer.pt"), tokenizer.Images(cfg.data, "train", 32)
    make = lambda tok=tok, images=images, **keywords: diffusion.cache_latents(f"{folder}/cache", tok, images, WORLD, **{**dict(dtype="fp32", batch=20), **keywords})
    vfm = tiny_vfm("toy")
    latents = make(posterior=True, vfm=vfm, grid=4)
    x = tokenizer.to_float(torch.stack([images[i][0] for i in range(48)]))
    for mirror, pictures in (0, x), (1, x.flip(-1)):
        got = latents.read(torch.arange(48), torch.full((48,), mirror))
        mean, logvar = tok.encode(pictures)
        for name, want in dict(mean=mean, logvar=logvar, features=vfm(pictures, cls=True)[0], labels=torch.from_numpy(images.labels)).items():
            torch.testing.assert_close(got[name], want, atol=1e-5, rtol=1e-4)
    everything, logvar = latents.arrays["mean"].double(), latents.arrays["logvar"].double()
    torch.testing.assert_close(latents.mean.double(), everything.mean((0, 2, 3)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(latents.std.double(), (everything.var((0, 2, 3), unbiased=False) + logvar.exp().mean((0, 2, 3))).sqrt(), atol=1e-6, rtol=1e-5)
    stream = [(5, (0, k)) for k in range(200)]                               # StepSampler's items: image and mirror image, as Images flips them
    batch, flipped = latents.__getitems__(stream)["mean"], tokenizer.Images(cfg.data, "train", 32, flip=True)
    for k in range(20):
        original = torch.equal(flipped[stream[k]][0], images[5][0])
        assert torch.equal(batch[k], latents.arrays["mean"][10 if original else 11])

    # what is there is used; a subset of it, too; anything else is made anew
    calls = []
    encode, tok.encode = tok.encode, lambda x: (calls.append(len(x) // 2), encode(x))[1]
    make(posterior=True, vfm=vfm, grid=4), make()
    assert not calls
    for name, (dtype, bound) in dict(bf16=(torch.bfloat16, 4e-3), fp16=(torch.float16, 5e-4)).items():
        low = make(dtype=name)
        assert low.arrays["mean"].dtype == dtype and sum(calls) == 48
        assert ((low.arrays["mean"].float() - everything).abs() <= bound * everything.abs() + 1e-6).all()
        calls.clear()
    with torch.no_grad():
        tok.adapter.conv_in.weight[0, 0, 0, 0] += 1e-6
    assert "anew" in quiet(make, tok) and sum(calls) == 48                   # another tokenizer
    calls.clear()
    next(Path(cfg.data, "train", "3").glob("*.png")).unlink()
    images = tokenizer.Images(cfg.data, "train", 32)
    assert len(make(images=images)) == 47 and sum(calls) == 47               # other data
    calls.clear()
    Image.new("RGB", (32, 32), "red").save(os.fsdecode(images.source[1]))    # one file of another size, which is not among the 16 that are looked at
    assert "anew" in quiet(functools.partial(make, images=images)) and sum(calls) == 47
    calls.clear()

    # killed in the middle: what was encoded stays, the rest is encoded; never trained on before
    whole = make(images=images).arrays["mean"].clone()
    shutil.rmtree(f"{folder}/cache")

    class Killed(Exception):
        pass

    def die(x):
        calls.append(len(x) // 2)
        if len(calls) == 3:
            raise Killed
        return encode(x)
    tok.encode = die
    try:
        make(images=images)
        raise AssertionError
    except Killed:
        pass
    tok.encode = lambda x: (calls.append(len(x) // 2), encode(x))[1]
    fails(lambda: diffusion.Latents(f"{folder}/cache", ["mean"]), "not finished")
    assert calls == [20, 20, 7]
    calls.clear()
    assert torch.equal(make(images=images, batch=7).arrays["mean"], whole) and calls == [7]
    with open(f"{folder}/cache/mean.npy", "r+b") as file:                    # a full disk, a copy that was cut short
        file.truncate(1000)
    calls.clear()
    assert torch.equal(make(images=images).arrays["mean"], whole) and sum(calls) == 47


@with_diffusion_folder
def test_cache_refuses_what_cannot_be_trained_on(folder, cfg):
    tok = tokenizer.load_tokenizer(f"{folder}/out/tokenizer.pt")
    images = tokenizer.Images(cfg.data, "train", 32)
    tok.adapter.quant_conv.weight[0] = 0
    fails(lambda: diffusion.cache_latents(f"{folder}/cache", tok, images, WORLD), "channels [0]", "constant")
    tok.adapter.quant_conv.weight[0] = float("nan")
    fails(lambda: diffusion.cache_latents(f"{folder}/cache", tok, images, WORLD), "not finite")
    fails(lambda: diffusion.cache_latents(f"{cfg.data}/train", tok, images, WORLD), "something else", "--latents")      # --latents=DATA must not cost the data
    assert len(tokenizer.list_images(f"{cfg.data}/train")) == 48
    usage, shutil.disk_usage = shutil.disk_usage, lambda path: type(usage(path))(10, 10, 10)
    try:
        fails(lambda: diffusion.cache_latents(f"{folder}/other", tok, images, WORLD), "GB", "free")
    finally:
        shutil.disk_usage = usage


def tensors(entry):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(entry) if torch.is_tensor(leaf)]


@with_diffusion_folder
def test_diffusion_resumes_exactly(folder, cfg):
    """With everything random in play (posterior samples, class token, dropout, accumulation), 6 steps equal 3 and then 3, bit for bit."""
    cfg = dataclasses.replace(cfg, align="reg", arch="sit", sample_posterior=True, accumulate=2, sample_interval=6)
    quiet(diffusion.train, cfg, WORLD)
    path = f"{folder}/out/diffusion.pt"
    whole, lines = torch.load(path, weights_only=True), Path(f"{folder}/out/log.jsonl").read_text()
    assert whole["kind"] == "diffusion" and (whole["step"], whole["images"]) == (6, 96) and Path(f"{folder}/out/grids/diffusion-0000006.png").exists()
    assert all((a - b).abs().max() > 0 for a, b in zip(tensors(whole["model"]), tensors(whole["ema"])))
    os.remove(path)
    save = diffusion.save_checkpoint

    def save_and_stop(*arguments, **entries):
        save(*arguments, **entries)
        raise KeyboardInterrupt

    with mock.patch.object(diffusion, "save_checkpoint", save_and_stop), contextlib.suppress(KeyboardInterrupt):
        quiet(diffusion.train, cfg, WORLD)
    assert torch.load(path, weights_only=True)["step"] == 3
    assert "going on from step 3" in quiet(diffusion.train, cfg, WORLD)
    again = torch.load(path, weights_only=True)
    for part in ("model", "ema", "optimizer"):
        assert all(torch.equal(a, b) for a, b in zip(tensors(whole[part]), tensors(again[part]), strict=True)), part
    keep = lambda text: [{key: value for key, value in json.loads(line).items() if key != "images_per_second"} for line in text.splitlines()]
    assert keep(lines) == keep(Path(f"{folder}/out/log.jsonl").read_text()) and [line["step"] for line in keep(lines)] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "velocity", "cosine", "cls", "repa", "val_velocity", "val_repa", "grad_norm", "epoch", "lr"} <= keep(lines)[5].keys()
    assert "has its 6 steps" in quiet(diffusion.train, cfg, WORLD)
    fails(lambda: quiet(diffusion.train, dataclasses.replace(cfg, hidden_size=64), WORLD), "hidden_size 32, now 64", "--resume=0")
    tiny_tokenizer(f"{folder}/out/tokenizer.pt", seed=1)
    fails(lambda: quiet(diffusion.train, cfg, WORLD), "latents", "another run")
    quiet(diffusion.train, dataclasses.replace(cfg, resume=False, steps=1, align="none", sample_interval=0), WORLD)
    assert torch.load(path, weights_only=True)["step"] == 1


@with_diffusion_folder
def test_alignment_features_cached_or_not(folder, cfg):
    """The VFM's tokens from the cache and on the fly, of image and mirror image, give the same losses."""
    logs = []
    for cached in (True, False):
        cfg = dataclasses.replace(cfg, align="repa", cache_dtype="fp32", cache_features=cached, out=f"{folder}/{cached}", tokenizer=f"{folder}/out/tokenizer.pt", resume=False, steps=3)
        quiet(diffusion.train, cfg, WORLD)
        logs.append([json.loads(line) for line in Path(cfg.out, "log.jsonl").read_text().splitlines()])
        assert Path(cfg.out, "latents", "train", "features.npy").exists() == cached
    for a, b in zip(*logs):
        assert abs(a["repa"] - b["repa"]) < 1e-4 and abs(a["velocity"] - b["velocity"]) < 1e-4 and a["repa"] != 0
    fails(lambda: quiet(diffusion.train, dataclasses.replace(cfg, encoder_depth=3), WORLD), "--encoder_depth=3")


def test_diffusion_learns():
    """200 steps on latents that are a constant a class, and a little noise: the velocity error falls, samples are of their class."""
    torch.manual_seed(0)
    cfg, means = diffusion.Config(lr=3e-3, warmup=10, compile=False, ema=0.98), torch.randn(3, 4, 1, 1)
    parts = diffusion.build(cfg, WORLD, dict(input_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=3))
    first = None
    for step in range(200):
        labels = torch.randint(3, (32,), generator=torch.Generator().manual_seed(step))
        losses = diffusion.train_step(*parts, [dict(latents=means[labels].expand(-1, -1, 2, 2) + 0.1 * torch.randn(32, 4, 2, 2), labels=labels, tokens=None)], cfg, WORLD, step)
        first = first or losses["velocity"].item()
    assert losses["velocity"] < 0.35 * first
    y = torch.arange(3).repeat(20)
    with torch.no_grad():
        z = sample.ode(parts[2], torch.randn(60, 4, 2, 2), y, 30, solver="heun")
    nearest = (z.mean((2, 3))[:, None] - means[None, :, :, 0, 0]).norm(dim=2).argmin(1)
    assert (nearest == y).float().mean() > 0.95


def test_time_distributions():
    torch.manual_seed(0)
    cfg = diffusion.Config(uniform_from=10)
    lognormal, uniform = (diffusion.draw_times(50_000, step, cfg, "cpu") for step in (9, 10))
    assert abs(torch.logit(lognormal).mean()) < 0.02 and abs(torch.logit(lognormal).std() - 1) < 0.02
    assert abs(uniform.std() - 12 ** -0.5) < 0.005 and abs(diffusion.draw_times(50_000, 0, diffusion.Config(times="uniform"), "cpu").std() - 12 ** -0.5) < 0.005


def test_losses_reach_what_they_should():
    """For joint training: the alignment loss reaches the latents; the terms come apart, so that the velocity loss need not."""
    model, latents = small_dit(**REG), torch.randn(3, 8, 4, 4, requires_grad=True)
    losses = diffusion.flow_losses(model, latents, torch.tensor([1, 2, 3]), torch.tensor([0.2, 0.5, 0.8]), torch.randn(3, 8, 4, 4), torch.randn(3, 17, 24), torch.randn(3, 24))
    assert {name: tuple(value.shape) for name, value in losses.items()} == dict.fromkeys(("velocity", "cosine", "cls", "repa"), (3,))
    grad, = torch.autograd.grad(losses["repa"].sum(), latents, retain_graph=True)
    assert grad.abs().sum() > 0
    (losses["velocity"] + losses["cls"]).sum().backward(inputs=list(model.parameters()))
    assert latents.grad is None and model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


@with_diffusion_folder
def test_validation_is_comparable(folder, cfg):
    """The same numbers for any batch size, whatever the state of the generator."""
    tok = tokenizer.load_tokenizer(f"{folder}/out/tokenizer.pt")
    val = diffusion.cache_latents(f"{folder}/val", tok, tokenizer.Images(cfg.data, "val", 32), WORLD, np.arange(0, 24, 2))
    model = small_dit(in_channels=4).eval()
    a, b = (diffusion.validate(model, val, val.mean.view(-1, 1, 1), val.std.view(-1, 1, 1), WORLD, batch) for batch in (5, 12))
    assert len(val) == 12 and abs(a["val_velocity"] - b["val_velocity"]) < 1e-5 and abs(a["val_cosine"] - b["val_cosine"]) < 1e-5


def test_diffusion_bench():
    shown = quiet(diffusion.bench, diffusion.Config(bench=1, depth=1, hidden_size=32, num_heads=2, batch_size=4, bench_latents=(4, 4, 4), compile=False, align="reg", projector_dim=16, encoder_depth=1), WORLD)
    assert "images/s" in shown and "GFLOP" in shown


def sampled(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder, "samples").glob("*.png"))}


@with_diffusion_folder
def test_sampling_files(folder, cfg):
    """Each image depends on the seed and its index alone; a second call makes what is missing; other settings start over; formats."""
    cfg = dataclasses.replace(cfg, align="reg", arch="sit", steps=3)
    quiet(diffusion.train, cfg, WORLD)
    out = Path(folder, "out")
    weights = torch.load(out / "diffusion.pt", weights_only=True)
    for value in weights["ema"].values():                                    # away from the zero velocity of the start
        value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(value))) * 0.1)
    torch.save(weights, out / "diffusion.pt")
    config = sample.Config(out=str(out), n=17, num_steps=4, compile=False)
    sets = {}
    for solver in ("ab2", "sde"):
        for batch in (1, 7, 17):
            shutil.rmtree(out / "samples", ignore_errors=True)
            quiet(sample.write_samples, dataclasses.replace(config, solver=solver, batch_size=batch), WORLD)
            sets[solver, batch] = sampled(out)
        assert len(sets[solver, 1]) == 17 and sets[solver, 1] == sets[solver, 7] == sets[solver, 17] and len(set(sets[solver, 1].values())) == 17
    assert sets["ab2", 1] != sets["sde", 1]
    config = dataclasses.replace(config, solver="sde")
    with np.load(out / "samples.npz") as archive:
        pixels = archive["arr_0"]
    assert pixels.dtype == np.uint8 and pixels.shape == (17, 32, 32, 3) and np.array_equal(pixels[5], np.asarray(Image.open(out / "samples" / "000005.png")))
    labels = json.loads((out / "samples" / "labels.json").read_text())
    names = json.loads(json.dumps(weights["classes"]))
    assert labels["000003.png"] == 3 % len(names) and len(labels) == 17 and Image.open(out / "samples.png").width > 32

    (out / "samples" / "000004.png").unlink(), (out / "samples" / "000009.png").unlink()
    before = (out / "samples" / "000000.png").stat().st_mtime_ns
    assert "(2 new" in quiet(sample.write_samples, config, WORLD) and sampled(out) == sets["sde", 1] and (out / "samples" / "000000.png").stat().st_mtime_ns == before
    quiet(sample.write_samples, dataclasses.replace(config, n=5), WORLD)
    assert list(sampled(out)) == [f"{i:06d}.png" for i in range(5)]
    assert "starting over" in quiet(sample.write_samples, dataclasses.replace(config, n=3, seed=1, classes=(2,)), WORLD) and len(sampled(out)) == 3
    assert set(json.loads((out / "samples" / "labels.json").read_text()).values()) == {2}
    fails(lambda: sample.write_samples(dataclasses.replace(config, classes=(99,)), WORLD), "--classes=99")
    (out / "samples" / "settings.json").unlink()
    fails(lambda: sample.write_samples(config, WORLD), "did not write")
    fails(lambda: sample.write_samples(dataclasses.replace(config, solver="rk4"), WORLD), "rk4", "ab2")
    quiet(sample.write_samples, dataclasses.replace(config, out=f"{folder}/guided", ckpt=str(out / "diffusion.pt"), tokenizer=str(out / "tokenizer.pt"), guide=str(out / "diffusion.pt"), n=2), WORLD)
    shutil.copytree(out, f"{folder}/moved")                                  # the checkpoint names out/tokenizer.pt; the one beside it serves
    shutil.rmtree(f"{folder}/moved/samples"), (out / "tokenizer.pt").unlink()
    quiet(sample.write_samples, dataclasses.replace(config, out=f"{folder}/moved", n=2), WORLD)
    fails(lambda: sample.write_samples(dataclasses.replace(config, out=f"{folder}/empty"), WORLD), "run diffusion.py")


def test_official_files_sample():
    """Random weights in the public layouts: LightningDiT and REG, with a VA-VAE (LDM) tokenizer and published-style latent statistics."""
    g = golden("vavae_tiny")
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"state_dict": fill(g)}, f"{folder}/vavae.pt")
        channels = tokenizer.load_tokenizer(f"{folder}/vavae.pt").z_dim
        torch.save({"mean": torch.zeros(1, channels, 1, 1), "std": torch.ones(1, channels, 1, 1)}, f"{folder}/latents_stats.pt")
        for name, steps in ("lightningdit_tiny", 4), ("reg_sit_tiny", 4):
            weights = fill(golden(name))
            weights["x_embedder.proj.weight"] = tensor("x_embedder.proj.weight", (48, channels, 1, 1))
            weights["final_layer.linear.weight"], weights["final_layer.linear.bias"] = tensor("final_layer.linear.weight", (channels, 48)), torch.zeros(channels)
            torch.save({"ema": weights}, f"{folder}/{name}.pt")
            config = sample.Config(out=f"{folder}/{name}", ckpt=f"{folder}/{name}.pt", tokenizer=f"{folder}/vavae.pt", n=3, num_steps=steps, num_heads=4, compile=False,
                                   solver="sde" if "reg" in name else "euler")
            fails(lambda: sample.write_samples(config, WORLD), "--latent_stats", "normalised")
            fails(lambda: sample.write_samples(dataclasses.replace(config, tokenizer="", latent_stats=f"{folder}/latents_stats.pt"), WORLD), "--tokenizer")
            quiet(sample.write_samples, dataclasses.replace(config, latent_stats=f"{folder}/latents_stats.pt"), WORLD)
            pictures = sampled(f"{folder}/{name}")
            assert len(set(pictures.values())) == 3
        fails(lambda: sample.write_samples(dataclasses.replace(config, latent_stats=f"{folder}/vavae.pt"), WORLD), "lacks")


@with_diffusion_folder
def test_reconstruct(folder, cfg):
    root = Path(cfg.data, "val")
    quiet(sample.reconstruct, sample.Config(out=f"{folder}/out", reconstruct=str(root), batch_size=7), WORLD)
    names = lambda where: {str(path.relative_to(where)) for path in Path(where).rglob("*.png")}
    assert names(root) == names(f"{folder}/out/reconstructions") == names(f"{folder}/out/originals") != set()
    some = sorted(names(root))[0]
    read = lambda path: tokenizer.to_float(torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1))[None]
    assert torch.equal(read(root / some), read(f"{folder}/out/originals/{some}"))
    tok = tokenizer.load_tokenizer(f"{folder}/out/tokenizer.pt")
    want = tokenizer.to_uint8(tok.decode(tok.encode(read(root / some))[0]))
    assert (want.int() - tokenizer.to_uint8(read(f"{folder}/out/reconstructions/{some}")).int()).abs().max() <= 1
    fails(lambda: sample.reconstruct(sample.Config(out=f"{folder}/out", reconstruct=f"{folder}/nowhere"), WORLD), "no folder")
    fails(lambda: sample.reconstruct(sample.Config(out=f"{folder}/out", reconstruct=str(root / Path(some).parent)), WORLD), "other images")


@with_diffusion_folder
def test_diffusion_on_two_processes(folder, cfg):
    """torchrun with gloo: the same cache and the same samples as one process; FSDP learns what DDP learns, and its checkpoint loads anywhere."""
    flags = [f"--{field.name}={int(value) if isinstance(value, bool) else value}" for field in dataclasses.fields(cfg)
             if (value := getattr(cfg, field.name)) != field.default and field.name not in ("preset", "out", "bench_latents")]
    for out, extra in ("ddp", ["--accumulate=2"]), ("fsdp", ["--fsdp=1", "--checkpointing=1", "--accumulate=2", "--sample_interval=2"]):
        Path(folder, out).mkdir()
        shutil.copy(f"{folder}/out/tokenizer.pt", f"{folder}/{out}/tokenizer.pt")
        shown = torchrun(HERE / "diffusion.py", f"--out={folder}/{out}", *flags, *extra)
        assert shown.count("6 steps of 16 = 2.0 epochs of 48 images") == 1
    ddp, fsdp = (torch.load(f"{folder}/{out}/diffusion.pt", weights_only=True) for out in ("ddp", "fsdp"))
    for part in ("model", "ema", "optimizer"):
        for a, b in zip(tensors(ddp[part]), tensors(fsdp[part]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    quiet(diffusion.train, dataclasses.replace(cfg, out=f"{folder}/fsdp", steps=7), WORLD)       # one process goes on from the sharded run
    assert torch.load(f"{folder}/fsdp/diffusion.pt", weights_only=True)["step"] == 7
    quiet(diffusion.train, dataclasses.replace(cfg, steps=1), WORLD)
    for split in ("train", "val"):
        assert np.array_equal(*(np.load(f"{folder}/{out}/latents/{split}/mean.npy") for out in ("ddp", "out")))
    torchrun("--", HERE / "sample.py", f"--out={folder}/ddp", "--n=21", "--num_steps=5", "--batch_size=4")
    two = sampled(f"{folder}/ddp")
    shutil.rmtree(f"{folder}/ddp/samples")
    quiet(sample.write_samples, sample.Config(out=f"{folder}/ddp", n=21, num_steps=5, batch_size=21, compile=False), WORLD)
    assert len(two) == 21 and two == sampled(f"{folder}/ddp")


@with_diffusion_folder
def test_sweep(folder, cfg):
    import fid
    quiet(diffusion.train, dataclasses.replace(cfg, steps=1), WORLD)
    fails(lambda: sample.sweep(sample.Config(out=f"{folder}/out", compile=False), WORLD), "toy's classifier")
    saved = torch.load(f"{folder}/out/diffusion.pt", weights_only=True)
    saved["config"]["data"] = "shapes"   # of the same ten classes
    torch.save(saved, f"{folder}/out/diffusion.pt")
    original, fid.load_features = fid.load_features, lambda *a: lambda images: (images.float().mean((2, 3)), None, images.float()[:, 0, :2].flatten(1))
    try:
        shown = quiet(sample.sweep, sample.Config(out=f"{folder}/out", n=20, num_steps=3, sweep_steps=(2, 3), compile=False), WORLD)
    finally:
        fid.load_features = original
    rows = json.loads(Path(f"{folder}/out/sweep.json").read_text())
    assert len(rows) == 3 * 2 + 5 == shown.count("%") and all(row["fd"] > 0 and 0 <= row["accuracy"] <= 1 for row in rows)
    assert {row["evaluations"] for row in rows if row["solver"] == "heun"} == {2, 4}


def test_diffusion_error_lines():
    with tempfile.TemporaryDirectory() as folder:
        shown = script("diffusion.py", f"--out={folder}", status=1)
        assert "run tokenizer.py first" in shown and shown.count("\n") == 2
        assert "did you mean --cfg_scale" in script("sample.py", "--cfgscale=2", status=2)
    with tempfile.TemporaryDirectory() as folder:
        cfg = diffusion_folder(folder)
        shutil.rmtree(f"{folder}/data/val/3")                    # class 4 of val would pass for class 3
        fails(lambda: diffusion.train(cfg, WORLD), "val has other classes than train (9, 10)")
        shutil.rmtree(f"{folder}/data/train/3")
        quiet(diffusion.train, dataclasses.replace(cfg, steps=3), WORLD)
        before, original = Path(f"{folder}/out/diffusion.pt").read_bytes(), nn.utils.clip_grad_norm_
        nn.utils.clip_grad_norm_ = lambda parameters, most: torch.tensor(float("inf"))         # as of gradients that overflow under a finite loss
        try:
            fails(lambda: quiet(diffusion.train, dataclasses.replace(cfg, steps=6), WORLD), "norm inf", "as it was")
        finally:
            nn.utils.clip_grad_norm_ = original
        assert Path(f"{folder}/out/diffusion.pt").read_bytes() == before
        fails(lambda: diffusion.train(dataclasses.replace(cfg, sample_posterior=True), WORLD), "sample_posterior False, now True")
    fails(lambda: diffusion.model_arch(diffusion.Config(model="XXL"), 4, 4, 10, 0), "--model=XXL", "1.6B")
    fails(lambda: diffusion.DiT(hidden_size=30, num_heads=4), "width")
    with tempfile.TemporaryDirectory() as folder:
        fails(lambda: sample.write_samples(sample.Config(out=folder), WORLD), "run diffusion.py first")
        tokenizer.save_checkpoint(f"{folder}/diffusion.pt", kind="tokenizer")
        fails(lambda: sample.write_samples(sample.Config(out=folder), WORLD), "tokenizer checkpoint, not a diffusion model")
        fails(lambda: tokenizer.load_checkpoint(f"{folder}/diffusion.pt", "diffusion"), "diffusion.pt", "tokenizer")


# -----------------------------------------------------------------------------
# fid.py

def raises(part, function, *arguments, **keywords):
    """The function raises a UserError whose last line holds `part` (a loader's process puts its traceback before it)."""
    try:
        function(*arguments, **keywords)
    except UserError as error:
        assert part in str(error).strip().splitlines()[-1], str(error)
    else:
        raise AssertionError(f"no UserError that says {part!r}")


def run_fid(*arguments, net=None):
    """fid.py's run() in this process -> (its fid.json, what it printed). `net` stands in for the network of load_features."""
    out, load, argv = next(a.split("=")[1] for a in arguments if a.startswith("--out=")), fid.load_features, sys.argv
    sys.argv = ["fid.py", *map(str, arguments)]
    if net is not None:
        fid.load_features = lambda *_: net
    try:
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(text):
            fid.run()
    finally:
        fid.load_features, sys.argv = load, argv
    return json.loads((Path(out) / "fid.json").read_text()), text.getvalue()


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




# the network

def test_inception_golden():
    file = golden("inception_fid")
    with tempfile.TemporaryDirectory() as folder:
        state, path = fill(file), f"{folder}/pt_inception.pth"
        torch.save(state, path)
        net = fid.load_inception(path)
        other = {**state, "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0), "AuxLogits.fc.weight": torch.zeros(2)}
        torch.save(other, path)
        again = fid.load_inception(path)
        missing = state.pop("Mixed_7c.branch3x3_2a.bn.bias")
        torch.save({**state, "extra": missing}, path)
        raises("1 keys missing: Mixed_7c.branch3x3_2a.bn.bias; 1 keys left over: extra", fid.load_inception, path)
    images = (image(3, 3, file["S"], file["S"], salt=file["salt"]) * 255).round().to(torch.uint8)
    with torch.no_grad():
        pool, spatial, logits = net(images)
        assert torch.equal(again(images)[0], pool)
    expect = file["expect"]
    check(pool, expect["pool_2048"])
    check(logits, expect["logits_unbiased"])
    check(logits + net.fc.bias, expect["logits"])
    check(spatial.reshape(3, 17, 17, 7).permute(0, 3, 1, 2), expect["spatial_7x17x17"])
    # a half-pixel resize passes the pool at 1e-3 only; torchvision's pools and eps do not pass at all
    half = F.interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False)
    assert (fid.resize_tf1(images, 299) - half).abs().max() > 10


def test_inception_compiles_whole():
    net = fid.Inception().requires_grad_(False).eval()
    images = torch.zeros(2, 3, 20, 30, dtype=torch.uint8)
    for a, b in zip(torch.compile(net, fullgraph=True, backend="eager")(images), net(images)):
        assert torch.equal(a, b)


def test_inception_missing_weights():
    raises("pt_inception-2015-12-05-6726825d.pth; give their file by --inception=PATH", fid.load_inception, "/nowhere/file.pth")


def test_resize_tf1_exact():
    def reference(images, size):         # straight from the definition, pixel by pixel, float64
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
        np.testing.assert_allclose(found.double().numpy(), reference(images.double().numpy(), size), rtol=0, atol=4e-5)      # 2 roundings near 255


# the formulas

def test_fid_math_golden():
    file = golden("fid_math")
    n1, n2, d, expect = file["n1"], file["n2"], file["d"], file["expect"]
    mix = noise(d * d, "mix").reshape(d, d) / d ** 0.5
    a, b = noise(n1 * d, "fa").reshape(n1, d) @ mix, (noise(n2 * d, "fb").reshape(n2, d) * 1.2) @ mix + 0.1
    logits = noise(n1 * 10, "lg").reshape(n1, 10) * 4
    statistics = []
    for rows in (a, b):
        moments = fid.Moments(d)
        for part in rows.split(97):
            moments.update(part)
        statistics += moments.statistics()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(fid.frechet_distance(*statistics), expect["fid"])
    close(fid.inception_score(logits, 10), expect["inception_score_10_splits"])
    close(fid.inception_score(logits, 1), [expect["inception_score_one_split"], 0])
    for block in (4096, 100, 3):
        close(fid.precision_recall(a, b, k=3, block=block), [expect["precision_k3_reference_a_samples_b"], expect["recall_k3"]])
    close(fid.precision_recall(a.float() + 100, b.float() + 100), [expect["precision_k3_reference_a_samples_b"], expect["recall_k3"]])


def test_frechet_rank_deficient():
    """Fewer images than dimensions: tr (C1 C2)^(1/2) is the nuclear norm of X Y^T / sqrt((n-1)(m-1)) of the centred features."""
    d = 200
    for n, m in ((30, 500), (500, 30), (20, 30), (2, 2), (300, 400)):
        x, y = noise(n * d, "x").reshape(n, d).numpy(), noise(m * d, "y").reshape(m, d).numpy() * 3 + 0.5
        xc, yc = (x - x.mean(0)) / (n - 1) ** 0.5, (y - y.mean(0)) / (m - 1) ** 0.5
        exact = ((x.mean(0) - y.mean(0)) ** 2).sum() + (xc ** 2).sum() + (yc ** 2).sum() - 2 * np.linalg.svd(xc @ yc.T, compute_uv=False).sum()
        found = fid.frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
        np.testing.assert_allclose(found, exact, rtol=1e-6)
    zero, one = np.zeros((3, 3)), np.eye(3)
    assert fid.frechet_distance(np.zeros(3), zero, np.ones(3), one) == 6 and fid.frechet_distance(np.zeros(3), one, np.ones(3), zero) == 6
    assert fid.frechet_distance([0.0], [[4.0]], [1.0], [[9.0]]) == 2        # 1 + (2 - 3)^2


def test_frechet_equals_sqrtm():
    """What scipy.linalg.sqrtm of the product gives, where it is right."""
    from scipy.linalg import sqrtm
    d = 128
    mix = noise(d * d, "mix").reshape(d, d).numpy() * np.exp(-np.arange(d) / 60)
    a, b = (np.cov(noise(n * d, key).reshape(n, d).numpy() @ mix, rowvar=False) for n, key in ((1500, "a"), (1200, "b")))
    found = fid.frechet_distance(np.zeros(d), a, np.zeros(d), b)
    np.testing.assert_allclose(found, np.trace(a) + np.trace(b) - 2 * np.trace(sqrtm(a @ b)).real, rtol=1e-6)


def test_frechet_refuses():
    mean, one, two = np.zeros(2), np.eye(2), np.eye(3)
    raises("statistics of different features", fid.frechet_distance, mean, one, np.zeros(3), two)
    raises("NaN", fid.frechet_distance, mean, one, mean, one * np.nan)


def test_moments():
    """One pass, stable for a mean far above the spread, the same for any batches, mergeable."""
    x = noise(1000 * 20, "m").reshape(1000, 20) * 1e-3 + 1e6
    exact = np.cov((x - 1e6).numpy(), rowvar=False)
    found = []
    for batch in (1, 7, 1000):
        moments = fid.Moments(20)
        for rows in x.split(batch):
            moments.update(rows)
        mean, covariance = moments.statistics()
        np.testing.assert_allclose(mean, x.mean(0).numpy(), rtol=1e-14)
        np.testing.assert_allclose(covariance, exact, rtol=1e-5, atol=1e-12)     # 1e6's own rounding is 1e-10 of a spread of 1e-3
        found.append(covariance)
    np.testing.assert_allclose(found[0], found[2], rtol=1e-6, atol=1e-13)
    naive = (x.float().T @ x.float() / 1000 - torch.outer(x.float().mean(0), x.float().mean(0))).numpy()
    assert abs(naive - exact).max() > 1                                         # what it guards against


def test_precision_recall_definition():
    reference, samples = noise(60 * 5, "r").reshape(60, 5), noise(45 * 5, "s").reshape(45, 5) * 1.3
    for k in (1, 3, 5):
        radius = [torch.cdist(x, x).sort(1).values[:, k] for x in (reference, samples)]
        distance = torch.cdist(reference, samples)
        exact = ((distance <= radius[0][:, None]).any(0).double().mean().item(), (distance <= radius[1]).any(1).double().mean().item())
        for block in (2, 16, 64):
            assert fid.precision_recall(reference, samples, k, block) == exact
    assert fid.precision_recall(samples, samples) == (1, 1) and fid.precision_recall(samples, samples + 100) == (0, 0)
    raises("more than 3 images", fid.precision_recall, reference[:3], samples)


def test_inception_score_bounds():
    one_hot = torch.eye(8).repeat(5, 1) * 100
    np.testing.assert_allclose(fid.inception_score(one_hot, 1), [8, 0], rtol=1e-9)      # sure and diverse: the number of classes
    np.testing.assert_allclose(fid.inception_score(torch.zeros(40, 8), 4), [1, 0], atol=1e-12)


# sources and streaming

def test_sources_agree_and_stream():
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
                assert torch.equal(got.permute(0, 2, 3, 1), torch.from_numpy(images)), (path, workers)
            thirds = [torch.cat([b for _, b in fid.batches(source, tokenizer.World(rank, 3, WORLD.device), 4)]) for rank in range(3)]
            assert torch.equal(torch.cat(thirds), got)
            assert torch.equal(source[range(3, 5)], got[3:5])       # back again
        large = np.zeros((400, 256, 256, 3), np.uint8)              # 79 MB, of which a batch may lie in memory
        np.savez(f"{folder}/large.npz", large)
        np.savez_compressed(f"{folder}/tight.npz", large)
        del large
        for path in ("large.npz", "tight.npz"):
            tracemalloc.start()
            assert sum(len(batch) for _, batch in fid.batches(fid.Npz(f"{folder}/{path}"), WORLD, 16)) == 400
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 16e6, peak


def test_bad_sources():
    with tempfile.TemporaryDirectory() as folder:
        write_images(f"{folder}/mixed", [pixels(1, 8, "a")[0], pixels(1, 16, "b")[0]])
        for workers in (0, 1):
            raises("0000.png is 8x8, " + folder, lambda: list(fid.batches(fid.Folder(f"{folder}/mixed"), WORLD, 2, workers)))
        assert fid.Folder(f"{folder}/mixed", 8)[range(2)].shape == (2, 3, 8, 8)
        Path(f"{folder}/mixed/0001.png").write_bytes(b"\x89PNG no image")
        raises("cannot read image", lambda: list(fid.batches(fid.Folder(f"{folder}/mixed"), WORLD, 2)))
        os.mkdir(f"{folder}/empty")
        raises("no images in", fid.open_images, f"{folder}/empty")
        raises("no folder or .npz", fid.open_images, f"{folder}/nothing")
        np.savez(f"{folder}/other.npz", images=pixels(3, 8, "c"), labels=np.arange(3))
        raises("has no arr_0 (uint8 images [N, H, W, 3]); it has images, labels", fid.open_images, f"{folder}/other.npz")
        for array in (np.zeros((3, 8, 8, 3), np.float32), np.zeros((3, 3, 8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8), np.asfortranarray(np.zeros((3, 8, 8, 3), np.uint8))):
            np.savez(f"{folder}/layout.npz", array)
            raises("arr_0 must be uint8 images [N, H, W, 3]", fid.open_images, f"{folder}/layout.npz")
        Path(f"{folder}/text.npz").write_text("not an archive")
        raises("cannot read", fid.open_images, f"{folder}/text.npz")
        np.savez_compressed(f"{folder}/torn.npz", np.random.default_rng(0).integers(0, 255, (50, 32, 32, 3), np.uint8))
        data = bytearray(Path(f"{folder}/torn.npz").read_bytes())
        data[len(data) // 2:len(data) // 2 + 64] = bytes(64)
        Path(f"{folder}/torn.npz").write_bytes(data)
        raises("cannot read images", lambda: list(fid.batches(fid.Npz(f"{folder}/torn.npz"), WORLD, 50)))


def test_measure_refuses():
    class Broken(Means):
        def forward(self, images):
            features, spatial, logits = super().forward(images)
            return torch.where((images == 7).all((1, 2, 3))[:, None], torch.nan, features), spatial, logits
    images = torch.from_numpy(pixels(9, 8, "n")).permute(0, 3, 1, 2)
    images[5] = 7
    raises("set: the means features of 1 images hold NaN or infinity, first of image number 5", fid.measure, images, Broken(), WORLD, 4, title="set")
    raises("1 image", fid.measure, images[:1], Means(), WORLD)
    with tempfile.TemporaryDirectory() as folder:
        write_images(f"{folder}/a", images.permute(0, 2, 3, 1).numpy())
        raises("0005.png", fid.measure, fid.Folder(f"{folder}/a"), Broken(), WORLD, 4)


# the command

def test_metrics_end_to_end():
    """Each number of the command against its definition, for every kind of reference; the cache; what is left out."""
    a, b = pixels(40, 12, "left", 200), pixels(50, 12, "right", 180)
    net = Means()
    feats = [net(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (a, b)]
    cov = lambda x: (x.double().mean(0).numpy(), np.cov(x.double().numpy(), rowvar=False))
    exact = dict(fid=fid.frechet_distance(*cov(feats[0][0]), *cov(feats[1][0])), sfid=fid.frechet_distance(*cov(feats[0][1]), *cov(feats[1][1])))
    exact["is"], exact["is_std"] = fid.inception_score(feats[0][2], 1)
    exact["precision"], exact["recall"] = fid.precision_recall(feats[1][0], feats[0][0])
    with tempfile.TemporaryDirectory() as folder:
        write_images(f"{folder}/a", a)
        write_images(f"{folder}/b", b)
        np.savez(f"{folder}/a.npz", a)
        np.savez_compressed(f"{folder}/b.npz", b)
        out = f"--out={folder}/out"
        for samples, reference in (("a", "b"), ("a.npz", "b"), ("a", "b.npz"), ("a", "b.means.npz"), ("a", "b")):
            result, text = run_fid(f"{folder}/{samples}", f"{folder}/{reference}", out, "--batch_size=7", "--workers=0", net=net)
            for key, value in exact.items():
                np.testing.assert_allclose(result[key], value, rtol=1e-6, atol=1e-9, err_msg=f"{samples} {reference} {key}")
            assert result["images"] == dict(samples=40, reference=50, reference_for_recall=50) and result["features"] == "means"
            assert "FD (means)" in text and "not comparable with numbers on Inception's" in text and "biased" in text
        assert Path(f"{folder}/b.means.npz").exists() and Path(f"{folder}/b.npz.means.npz").exists()

        # a stale cache is measured anew: other weights, another image
        other = Means()
        other.weight.mul_(0.5)
        other.forward = lambda images: [2 * part for part in Means.forward(other, images)]
        result, _ = run_fid(f"{folder}/a", f"{folder}/b", out, "--workers=0", "--metrics=fid", net=other)
        np.testing.assert_allclose(result["fid"], 4 * exact["fid"], rtol=1e-6)
        raises("statistics of other features", run_fid, f"{folder}/a", f"{folder}/b.npz.means.npz", out, net=other)
        Image.fromarray(a[0]).save(f"{folder}/b/0050.png")
        assert run_fid(f"{folder}/a", f"{folder}/b", out, "--workers=0", net=net)[0]["images"]["reference"] == 51

        # chosen metrics, and those that cannot be had
        result, text = run_fid(f"{folder}/a", f"{folder}/b", out, "--metrics=recall,is", "--workers=0", net=net)
        assert {*fid.METRICS} & {*result} == {"recall", "is"} and "biased" not in text
        raises("--metrics=fad: there are fid, sfid", run_fid, f"{folder}/a", f"{folder}/b", out, "--metrics=fad", net=net)
        raises("no folder or .npz", run_fid, f"{folder}/c", f"{folder}/b", out, net=net)
        raises("no folder or .npz", run_fid, f"{folder}/a", f"{folder}/c", out, net=net)
        raises("python sample.py", run_fid, out, net=net)
        one = f"{folder}/one"
        write_images(one, a[:1])
        raises("1 image; a covariance needs 2", run_fid, one, f"{folder}/b", out, net=net)


def test_inception_command_and_adm_statistics():
    """The real network through the command, against ADM's statistics file with and without images."""
    a, b = pixels(6, 32, "ia"), pixels(7, 32, "ib", 150)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(fill(golden("inception_fid")), f"{folder}/weights.pth")
        np.savez(f"{folder}/a.npz", a)
        net = fid.load_inception(f"{folder}/weights.pth")
        with torch.no_grad():
            left, right = (net(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (a, b))
        (mu, sigma), (mu_s, sigma_s) = (((x := part.double().numpy()).mean(0), np.cov(x, rowvar=False)) for part in right[:2])
        np.savez(f"{folder}/adm.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, arr_0=b)
        np.savez(f"{folder}/adm_bare.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
        flags = (f"--out={folder}/out", "--workers=0", f"--inception={folder}/weights.pth")
        result, text = run_fid(f"{folder}/a.npz", f"{folder}/adm.npz", *flags)
        gap = lambda k: fid.frechet_distance(left[k].double().mean(0), np.cov(left[k].double().numpy(), rowvar=False), *((mu, sigma), (mu_s, sigma_s))[k])
        np.testing.assert_allclose([result["fid"], result["sfid"]], [gap(0), gap(1)], rtol=1e-5)
        np.testing.assert_allclose(result["is"], fid.inception_score(left[2], 1)[0], rtol=1e-6)
        assert (result["precision"], result["recall"]) == fid.precision_recall(right[0], left[0])
        assert result["images"] == dict(samples=6, reference=None, reference_for_recall=7) and "features: inception\n" in text and "FID " in text
        bare, text = run_fid(f"{folder}/a.npz", f"{folder}/adm_bare.npz", *flags, "--metrics=fid,precision")
        np.testing.assert_allclose(bare["fid"], result["fid"], rtol=1e-9)
        assert "precision" not in bare and "precision    left out: it needs the reference's images (arr_0)" in text
        raises("holds statistics of other features: inception, not means", run_fid, f"{folder}/a.npz", f"{folder}/adm.npz", *flags, net=Means())


def test_pairs():
    a = pixels(5, 24, "pairs")
    b = np.clip(a.astype(int) + np.array([0, 5, 10, 20, 40])[:, None, None, None], 0, 255).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        write_images(f"{folder}/a", a)
        write_images(f"{folder}/b", b)
        os.rename(f"{folder}/b/0003.png", f"{folder}/b/0003.bmp")       # another suffix is no other name
        mse = ((a / 255.0 - b / 255.0) ** 2).mean((1, 2, 3))
        exact = 10 * np.log10(1 / np.maximum(mse, 1e-10 / 4))
        flags = (f"--out={folder}/out", "--pairs=1", "--workers=0")
        result, text = run_fid(f"{folder}/a", f"{folder}/b", *flags, "--metrics=psnr,ssim,psnr", "--batch_size=2")
        assert text.count("PSNR") == 1 and "LPIPS" not in text
        np.testing.assert_allclose([result["psnr"], result["psnr_std"]], [exact.mean(), exact.std()], rtol=1e-4)
        as_float = [torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1 for x in (a, b)]
        np.testing.assert_allclose(result["ssim"], tokenizer.ssim(*as_float).mean().item(), rtol=1e-5)
        assert result["images"]["pairs"] == 5 and "pairs 5" in text and "+-" in text and "features" not in result
        lpips = tokenizer.LPIPS(None)                                   # random weights, in the public files' keys
        state = lpips.state_dict()
        torch.save({key if key.startswith("features") else f"lin{key[-1]}.model.1.weight": value for key, value in state.items()}, f"{folder}/vgg.pth")
        result, _ = run_fid(f"{folder}/a", f"{folder}/b", *flags, f"--lpips_weights={folder}/vgg.pth")
        np.testing.assert_allclose(result["lpips"], lpips(*as_float).mean().item(), rtol=1e-4)
        _, text = run_fid(f"{folder}/a", f"{folder}/b", *flags, "--lpips_weights=/nowhere.pth")
        assert "LPIPS        left out" in text and "/nowhere.pth" in text
        result, _ = run_fid(f"{folder}/a", f"{folder}/b", f"--out={folder}/out", "--metrics=fid,psnr", "--workers=0", net=Means())
        assert {"fid", "psnr"} <= result.keys()
        os.remove(f"{folder}/b/0001.png")
        os.remove(f"{folder}/b/0002.png")
        raises("2 images of " + folder + "/a have no partner of the same name: 0001, 0002", run_fid, f"{folder}/a", f"{folder}/b", *flags)
        raises("2 images of " + folder + "/a have no partner", run_fid, f"{folder}/b", f"{folder}/a", *flags)
        write_images(f"{folder}/c", pixels(5, 16, "small"))
        raises("pairs need equal sizes", run_fid, f"{folder}/a", f"{folder}/c", *flags)
        raises("pairs are of two folders", run_fid, f"{folder}/a", f"--out={folder}/out", "--pairs=1")


def test_vfm_features():
    with tempfile.TemporaryDirectory() as folder:
        vit = tokenizer.ViT(image_size=28, patch_size=14, embed_dim=64, depth=1, num_heads=1, mlp_hidden=64, layer_scale=True)
        torch.save(vit.state_dict(), f"{folder}/small.pth")
        net = fid.load_features(f"{folder}/small.pth")
        images = torch.from_numpy(pixels(4, 40, "v")).permute(0, 3, 1, 2)
        features, spatial, logits = net(images)
        assert net.name == "small" and spatial is None and logits is None
        vit = net.vfm
        torch.testing.assert_close(features, vit(vit.resize(images.float() / 127.5 - 1), cls=True)[0][:, 0])
        raises("no VFM nonsense", fid.load_features, "nonsense", folder)


def test_splits_and_kept_images():
    """The Inception Score in splits of SPLIT images, the last one shorter; neighbours from evenly spaced images; both in any shares."""
    images, net, split = torch.from_numpy(pixels(21, 8, "splits")).permute(0, 3, 1, 2), Means(), fid.SPLIT
    features, _, logits = net(images)
    try:
        fid.SPLIT = 8
        found = fid.measure(images, net, WORLD, 5, keep=6)
    finally:
        fid.SPLIT = split
    parts = [fid.inception_score(part, 1)[0] for part in logits.split(8)]
    np.testing.assert_allclose(found["inception_score"], [np.mean(parts), np.std(parts)], rtol=1e-5)
    assert torch.equal(found["features"], features[[0, 3, 7, 10, 14, 17]]) and torch.equal(found["predictions"], logits.argmax(1))
    assert torch.equal(fid.measure(images, net, WORLD, 4, keep=100)["features"], features)


def toy_out(folder):
    """An out folder with the shared run's classifier and drawn shapes."""
    fid.load_features("toy", SHARED)
    os.makedirs(folder, exist_ok=True)
    for path in (Path(SHARED, "classifier.pt"), *Path(SHARED).glob("shapes-*.npy")):
        os.symlink(path.resolve(), f"{folder}/{path.name}")
    return folder


def test_two_processes_same_numbers():
    a, b = pixels(21, 32, "pa", 200), pixels(19, 32, "pb", 180)
    with tempfile.TemporaryDirectory() as folder:
        write_images(f"{folder}/a", a)
        np.savez_compressed(f"{folder}/b.npz", b)
        arguments = [f"{folder}/a", f"{folder}/b.npz", f"--out={toy_out(folder + '/out')}", "--features=toy", "--batch_size=4", "--workers=0"]
        alone, _ = run_fid(*arguments)
        os.remove(f"{folder}/b.npz.toy.npz")
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(HERE / "fid.py"), *arguments],
                       check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        together = json.loads(Path(f"{folder}/out/fid.json").read_text())
        assert alone["images"] == together["images"] and {"fid", "is", "precision", "recall"} <= together.keys()
        for key in ("fid", "is", "precision", "recall"):
            np.testing.assert_allclose(together[key], alone[key], rtol=1e-5)


def test_command_errors():
    """One line and a status, no traceback."""
    def exits(*arguments):
        argv, sys.argv, errors = sys.argv, ["fid.py", *arguments], io.StringIO()
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                tokenizer.main(fid.run)
        except SystemExit as stop:
            return stop.code, errors.getvalue()
        finally:
            sys.argv = argv
    assert exits("/nowhere/a", "/nowhere/b") == ("fid.py: no folder or .npz /nowhere/a", "")
    status, line = exits("--metric=fid")
    assert status == 2 and "did you mean --metrics?" in line and line.count("\n") == 1


# the toy

def test_toy_classifier():
    """At least 97% on held-out images; the features see colour and texture, not the class alone."""
    net = fid.load_features("toy", SHARED)
    val = tokenizer.Shapes("val", 32, cache=SHARED)
    images, labels = torch.from_numpy(np.array(val.images[:1000])), torch.from_numpy(val.targets()[:1000])
    with torch.no_grad():
        features, spatial, logits = net(images)
        assert features.shape == (1000, 128) and spatial is None and logits.shape == (1000, 10)
        assert (logits.argmax(1) == labels).double().mean() >= 0.97
        larger = F.interpolate(images[:200].float(), scale_factor=2, mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)
        assert (net(larger)[2].argmax(1) == labels[:200]).double().mean() > 0.9
        stat = lambda x: (x.mean(0), np.cov(x.numpy(), rowvar=False))
        same, grey = stat(features[:500]), net(images[500:].float().mean(1, keepdim=True).expand(-1, 3, -1, -1).to(torch.uint8))[0]
        assert fid.frechet_distance(*same, *stat(grey)) > 10 * fid.frechet_distance(*same, *stat(features[500:]))
    assert torch.equal(fid.load_features("toy", SHARED).head.weight, net.head.weight)                           # kept, not trained again


def test_toy_report():
    """python fid.py without arguments, on a stand-in run: training images as samples, an untrained tokenizer."""
    with tempfile.TemporaryDirectory() as out, mock.patch.dict(tokenizer.Shapes.lengths, val=1000):
        toy_out(out)
        train = tokenizer.Shapes("train", 32, cache=SHARED)
        write_images(f"{out}/samples", train.images[-200:].transpose(0, 2, 3, 1))
        first = run_fid(f"--out={out}")[0]["rows"]
        assert first.keys() == {"held_out", "real", "samples"} and first["samples"]["agreement"] is None
        labels = train.targets()[-200:]
        labels[:20] = (labels[:20] + 1) % 10
        Path(f"{out}/samples/labels.json").write_text(json.dumps(labels.tolist()))
        config = dict(resolution=32, downsample=8, z_dim=4, decoder_kind="ldm", encoder=dict(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1),
                      decoder=dict(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1))
        model = tokenizer.Tokenizer(**config)
        tokenizer.save_checkpoint(f"{out}/tokenizer.pt", kind="tokenizer", arch=model.arch, model=model.state_dict(), ema={})
        tokenizer.save_checkpoint(f"{out}/diffusion.pt", kind="diffusion", latent_mean=torch.zeros(4), latent_std=torch.ones(4))
        result, text = run_fid(f"--out={out}")
        rows = result["rows"]
        assert rows["held_out"]["agreement"] > 0.97 and abs(rows["samples"]["agreement"] - 0.9) < 0.03
        assert rows["samples"]["fd"] < 3 * rows["real"]["fd"] and rows["samples"]["fd"] < rows["untrained"]["fd"] / 4
        assert rows["reconstructions"]["psnr"] < 20 and rows["samples_to_reconstructions"]["fd"] > rows["samples"]["fd"]
        assert all(row["label"] in text for row in rows.values()) and "not comparable with numbers on Inception's" in text
        named = {path.name: int(label) for path, label in zip(sorted(Path(f"{out}/samples").glob("*.png")), labels)}
        Path(f"{out}/samples/labels.json").write_text(json.dumps(dict(reversed(named.items()))))
        assert run_fid(f"--out={out}")[0]["rows"]["samples"] == rows["samples"]
        Path(f"{out}/samples/labels.json").write_text("[1, 2]")
        raises("has 2 labels for 200 images", run_fid, f"--out={out}")
        os.remove(f"{out}/samples/labels.json")
        tokenizer.save_checkpoint(f"{out}/diffusion.pt", kind="diffusion", config=dict(data="CIFAR10"))
        raises("made from --data=CIFAR10, not from the toy's; give the reference", run_fid, f"--out={out}")


# -----------------------------------------------------------------------------
# align.py

@contextlib.contextmanager
def small_world(methods=("vfmvae",), reg=False):
    """A folder like out/ after tokenizer.py and diffusion.py, with random weights and a few hundred shapes; the judge has random weights, too."""
    import fid
    lengths, load_features, threads = Shapes.lengths, align.load_features, torch.get_num_threads()
    Shapes.lengths = dict(train=320, val=200)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.manual_seed(0)
            judge = fid.Classifier().requires_grad_(False).eval()
            align.load_features = lambda name, out, device: judge
            for name in tokenizer.TOY_VFMS:
                tokenizer.save_checkpoint(f"{folder}/vfm-{name}.pt", kind="vfm", name=name, model=tokenizer.ViT(**tokenizer.TOY_VIT).state_dict())
            (Path(folder) / "classifier.pt").touch()             # what the study's other processes wait for
            for method in methods:
                sub = folder if len(methods) == 1 else f"{folder}/{method}"
                cfg = tokenizer.Config(method=method, out=folder, widths=(16, 16, 16, 16), fuse_dims=(16, 16), level_dim=16, w_dim=16, post_factor=2, z_dim=4, decoder="vfmvae")
                net, _ = tokenizer.build_tokenizer(cfg)
                tokenizer.save_checkpoint(f"{sub}/tokenizer.pt", kind="tokenizer", config=dataclasses.asdict(cfg), arch=net.arch, model=net.state_dict(), ema={}, gan=None,
                                          stage=1, images=3200, classes=Shapes.classes)
                save_dit(sub, "diffusion.pt", "reg" if reg else "none")
            yield folder
        finally:
            Shapes.lengths, align.load_features = lengths, load_features
            torch.set_num_threads(threads)


def save_dit(folder, name, kind, step=3):
    cfg = diffusion.Config(out=str(folder), compile=0, align=kind, hidden_size=32, num_heads=2, depth=3, projector_dim=16, warmup=0)
    arch = diffusion.model_arch(cfg, 4, 4, 10, 128 if kind != "none" else 0)
    model, _, ema, optimizer = diffusion.build(cfg, tokenizer.init_world(), arch)
    for p in model.parameters():                                 # away from the zeros of adaLN-zero, where blocks do nothing
        p.data.add_(torch.randn_like(p) * 0.02)
    ema.load_state_dict(model.state_dict())
    tokenizer.save_checkpoint(f"{folder}/{name}", kind="diffusion", config=dataclasses.asdict(cfg), arch=arch, **diffusion.full_state(model, ema, optimizer), step=step, images=0,
                              latent_mean=torch.zeros(4), latent_std=torch.ones(4) * 0.5, latents="", tokenizer=f"{folder}/tokenizer.pt", classes=Shapes.classes, image_size=32)
    return f"{folder}/{name}"


def run_align(*argv):
    """align.py's command line, in this process -> what it prints."""
    out, saved = io.StringIO(), sys.argv
    sys.argv = ["align.py", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            align.run()
    finally:
        sys.argv = saved
    return out.getvalue()


def refused(*argv):
    try:
        run_align(*argv)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError(f"{argv} was not refused")


def test_cknna_golden():
    g = golden("cknna")
    n, (da, db) = g["n"], g["dims"]
    base = noise(n * 6, "base").reshape(n, 6)
    mixed = lambda key, d: (base @ noise(6 * d, key).reshape(6, d) + 0.3 * noise(n * d, "e" + key).reshape(n, d)).float()
    A, B, C = map(align.prepare, (mixed("A", da), mixed("B", db), noise(n * db, "C").reshape(n, db).float()))
    for k in (5, 10, 20):
        for name, other in (("B", B), ("C", C)):
            np.testing.assert_allclose(align.cknna(A, other, k), g["expect"][f"cknna_A_{name}_k{k}"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(align.cknna(A, B, n - 1), g["expect"]["cka_unbiased_A_B"], rtol=1e-5)       # every mask full: unbiased CKA
    np.testing.assert_allclose(align.cknna(A, A), 1, rtol=1e-3)


def test_transformations_depend_on_seed_and_index():
    torch.manual_seed(0)
    images = torch.rand(12, 3, 32, 32) * 2 - 1
    index = np.arange(100, 112)

    def full(rows, seed=0):
        """condition -> {index: transformed image}"""
        found = {}
        for condition, parts in align.transformed(images[rows], index[rows], [1.0, 0.5, 0.25], seed):
            found[condition] = {int(index[rows][int(i)]): image for at, part in parts for i, image in zip(at, part)}
        return found

    whole, some, other = full(np.arange(12)), full(np.array([7, 2, 9])), full(np.arange(12), seed=1)
    assert list(whole) == list(align.CONDITIONS)
    for condition in whole:
        assert len(whole[condition]) == 12
        assert all(torch.equal(whole[condition][i], image) for i, image in some[condition].items()), condition      # whatever the batch
        same = [i for i in whole[condition] if whole[condition][i].shape == other[condition][i].shape and torch.equal(whole[condition][i], other[condition][i])]
        assert len(same) == 12 if condition == "clean" else len(same) < 6
    assert {image.shape[-1] for image in whole["equivariance"].values()} == {32, 16, 8}
    for condition, std in zip(align.CONDITIONS[2:], align.NOISES):
        moved = torch.stack([whole[condition][i] for i in index])
        inside = images.abs() < 0.2                              # where clipping does nothing
        assert abs((moved - images)[inside].std() / (2 * std) - 1) < 0.05 and moved.abs().max() <= 1


def test_block_features():
    torch.manual_seed(0)
    for cls_dim in (0, 6):
        dit = diffusion.DiT(4, 8, hidden_size=32, depth=3, num_heads=2, num_classes=10, cls_dim=cls_dim).eval()
        for p in dit.parameters():
            p.data.add_(torch.randn_like(p) * 0.05)
        z, cls = torch.randn(5, 8, 4, 4), [torch.randn(5, cls_dim)] * bool(cls_dim)
        with torch.no_grad():
            before = dit(z, torch.full((5,), 0.5), torch.full((5,), 10), *cls)
            found = align.block_features(dit, z, *cls)
            assert [f.shape for f in found] == [(5, 32)] * 3
            last = []                                            # the last block's output is what the final layer reads
            hook = dit.final_layer.register_forward_pre_hook(lambda module, inputs: last.append(inputs[0]))
            dit(z, torch.full((5,), 0.5), torch.full((5,), 10), *cls)
            hook.remove()
            torch.testing.assert_close(found[-1], last[0][:, bool(cls_dim):].mean(1))
            small = align.block_features(dit, z[..., :2, :2], *cls)          # the corner of the position tables
            assert small[0].shape == (5, 32) and not dit.blocks[0]._forward_hooks
            corner = diffusion.DiT(2, 8, hidden_size=32, depth=3, num_heads=2, num_classes=10, cls_dim=cls_dim).eval()
            corner.load_state_dict(dit.state_dict())
            torch.testing.assert_close(small[2], align.block_features(corner, z[..., :2, :2], *cls)[2])
            after = dit(z, torch.full((5,), 0.5), torch.full((5,), 10), *cls)
        torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_linear_probe():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (600,), generator=g)
    centres = torch.randn(5, 16, generator=g) * 3
    assert align.linear_probe(centres[labels] + torch.randn(600, 16, generator=g), labels) > 0.97
    chance = align.linear_probe(torch.randn(600, 16, generator=g), labels)
    assert 0.1 < chance < 0.32
    assert align.linear_probe(torch.cat([torch.randn(600, 16, generator=g), torch.zeros(600, 1)], 1), labels) < 0.32      # a dead channel does no harm


def test_chart():
    from PIL import Image
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chart.png"
        align.chart(path, [dict(title=t, x="x", y="y", series={"a": ([0, 1, 2], [0.1, 0.4, 0.2], [0.1, 0.1, 0.1]), "b": ([0, 1], [0.3, 0.3], None)}) for t in "pq"])
        image = np.array(Image.open(path).convert("RGB")).reshape(-1, 3).astype(int)
        for colour in ([0x1f, 0x77, 0xb4], [0xff, 0x7f, 0x0e]):                  # both series are there
            assert (np.abs(image - colour).max(1) < 30).sum() > 100
        assert os.listdir(folder) == ["chart.png"]
        align.chart(path, [dict(title="one point", x="x", y="y", series={"a": ([0], [0.5], None)})])
    assert align.ticks(0, 1) == [0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0] and align.ticks(0, 2000)[-1] == 2000 and align.ticks(3, 3)[0] <= 3


def test_align_measures():
    with small_world(("vfmvae", "vae"), reg=True) as folder:
        later = save_dit(f"{folder}/vfmvae", "later.pt", "repa", step=9)
        printed = run_align("--out", folder, f"{folder}/vfmvae/diffusion.pt", "--images=60", f"{folder}/vae/tokenizer.pt", later, "--reference=toy-blind")
        found = json.loads((Path(folder) / "align.json").read_text())
        parts = [(row["name"], row["part"]) for row in found["rows"] if row["vfm"] == "toy"]
        assert len(parts) == len(set(parts)) == 2 + 2 * 3 and len(found["rows"]) == 2 * len(parts)             # two tokenizers, two DiTs of three blocks, two VFMs
        for row in found["rows"]:
            assert abs(row["SE-CKNNA"] - np.mean([row[c] for c in align.CONDITIONS])) < 1e-9 and 0 <= row["probe"] <= 1
            assert all(math.isfinite(row[c]) for c in align.CONDITIONS)
        assert found["scales"] == [1, 0.75, 0.5, 0.25] and f"{folder}/vae/tokenizer.pt latents" in printed and (Path(folder) / "align.png").stat().st_size > 1000
        # the first row again, the long way round
        net, vfm = tokenizer.load_tokenizer(f"{folder}/vfmvae/tokenizer.pt"), tokenizer.load_vfm("toy", folder)
        data = Shapes("val")
        index = np.linspace(0, 199, 60).astype(int)
        x = tokenizer.to_float(torch.stack([data[i][0] for i in index]))
        with torch.no_grad():
            want = align.cknna(align.prepare(net.encode(x)[0].mean((2, 3))), align.prepare(vfm(x)[0].mean(1)))
        row = next(r for r in found["rows"] if r["part"] == "latents" and r["vfm"] == "toy" and "vfmvae" in r["name"])
        np.testing.assert_allclose(row["clean"], want, rtol=1e-3, atol=1e-5)
        rows = []
        for workers, order in enumerate((("vfmvae", "vae"), ("vae", "vfmvae"))):     # whoever stands beside it, a tokenizer measures the same
            run_align("--out", folder, "--images=20", f"--workers={workers}", *(f"{folder}/{method}/tokenizer.pt" for method in order))
            rows.append(sorted(json.loads((Path(folder) / "align.json").read_text())["rows"], key=lambda row: (row["name"], row["vfm"])))
        assert rows[0] == rows[1]
        printed = run_align("--out", folder, f"{folder}/vfmvae/tokenizer.pt", "--images=20", "--image_size=48")    # 48 / 4 and 48 * 3/4 are off the grid of 8
        assert "0.75, 0.25 do not fit" in printed, printed


def joint_trainer(folder, side, reg=False):
    """A JointTrainer of the small world's two models, and the gradients that one step leaves in the tokenizer and in the DiT."""
    captured = {}

    class Stop(Exception):
        pass

    def capture(trainer, loader, step, images):
        captured["trainer"] = trainer
        captured["batch"] = next(loader)
        raise Stop

    whole, align.JointTrainer.joint_step = align.JointTrainer.joint_step, capture
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            align.train(align.Config(out=folder, steps=1, side=side, batch_size=8, compile=False), [f"{folder}/diffusion.pt"], tokenizer.init_world())
    except Stop:
        pass
    finally:
        align.JointTrainer.joint_step = whole
    return captured["trainer"], captured["batch"]


def gradients(trainer, batch, repa, step=0):
    """{name: gradient} of one generator step with a REPA weight of `repa` on both sides."""
    state = copy.deepcopy(trainer.normalise.state_dict())
    trainer.dit_cfg, trainer.joint = dataclasses.replace(trainer.dit_cfg, repa_weight=repa), dataclasses.replace(trainer.joint, tokenizer_weight=repa)
    tokenizer.seed_step(0, step)
    list(zip([0], trainer.batches(iter([batch]))))
    trainer.generator_step(tokenizer.to_float(batch[0]), step, 0)
    trainer.normalise.load_state_dict(state)
    found = {f"{prefix}.{name}": p.grad.clone() for prefix, net in (("tok", trainer.tokenizer), ("dit", trainer.dit)) for name, p in net.named_parameters() if p.grad is not None}
    trainer.tokenizer.zero_grad()
    trainer.dit.zero_grad()
    return found


def test_joint_gradients_reach_their_side_only():
    for reg in (False, True):
        with small_world(reg=reg) as folder:
            for side in align.SIDES:
                trainer, batch = joint_trainer(folder, side)
                a, b = gradients(trainer, batch, 0.0), gradients(trainer, batch, 5.0)
                moved = lambda *prefixes: {name for name in b if name.startswith(prefixes) and (name not in a or not torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-9))}
                early = [f"dit.blocks.{i}." for i in range(trainer.dit.encoder_depth)]
                assert bool(moved("tok.adapter.")) == (side in ("tokenizer", "both")), side
                assert bool(moved(*early)) == (side in ("diffusion", "both")), side
                assert moved("dit.projectors.") or not trainer.heads
                assert not moved("tok.decoder.") and not moved("dit.blocks.2.", "dit.final_layer."), side
                assert any(name.startswith("dit.final_layer.") for name in a)            # the velocity loss does reach the diffusion model ...
                # ... and never the tokenizer: with REPA's weight at zero its gradients are those of its Trainer alone
                with torch.no_grad():
                    for p in trainer.dit.final_layer.parameters():
                        p.mul_(7).add_(0.3)
                c = gradients(trainer, batch, 0.0)
                assert all(torch.equal(a[name], c[name]) for name in a if name.startswith("tok."))
                assert not torch.equal(a["dit.final_layer.linear.weight"], c["dit.final_layer.linear.weight"])


def test_joint_alignment_gradient_is_exact():
    """What reaches the latents is the gradient of weight x REPA, through the batch's statistics, at the step's own t and noise."""
    with small_world() as folder:
        trainer, batch = joint_trainer(folder, "tokenizer")
        z = torch.randn(8, 4, 4, 4, requires_grad=True)
        images = tokenizer.to_float(batch[0])
        trainer.images, trainer.labels = batch
        trainer.stage = dataclasses.replace(trainer.stage, kl=0.0, vf=0.0)
        torch.manual_seed(5)
        _, fixed, _ = trainer.latent_losses(images, z, z.detach(), 0 * z.detach(), None)
        got, = torch.autograd.grad(fixed, z)
        torch.manual_seed(5)
        torch.rand(8)                                            # class dropout
        t, eps = torch.randn(8).sigmoid(), torch.randn(8, 4, 4, 4)
        torch.manual_seed(5)
        y = torch.where(torch.rand(8) < 0.1, 10, batch[1])
        centred = z - z.mean((0, 2, 3), keepdim=True)
        normal = centred / centred.square().mean((0, 2, 3), keepdim=True).sqrt()
        tokens = diffusion.vfm_tokens(trainer.align_vfm, images, 4)
        repa = diffusion.flow_losses(trainer.dit, normal, y, t, eps, tokens)["repa"].mean()
        want, = torch.autograd.grad(1.5 * repa, z)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-8)


def test_joint_training_resumes_bit_for_bit():
    with small_world(reg=True) as folder:
        options = ["--steps=4", "--batch_size=8", "--images=20", "--side=both", "--compile=0", "--log_interval=2", "--reference="]
        printed = run_align(f"--out={folder}", *options)
        assert printed.count("latents") == 2                     # before and after
        joint = Path(folder) / "joint-both"
        load = lambda: [torch.load(joint / f"{name}.pt", weights_only=True) for name in ("tokenizer", "diffusion")]
        whole = load()
        assert whole[0]["pair"] == whole[1]["pair"] == diffusion.fingerprint(tokenizer.load_tokenizer(joint / "tokenizer.pt"))
        assert whole[0]["step"] == whole[1]["step"] == 4 and whole[0]["images"] == 3232
        begin = torch.load(f"{folder}/tokenizer.pt", weights_only=True)["model"]
        changed = [name for name in begin if not torch.equal(begin[name], whole[0]["model"][name])]
        assert any(n.startswith("adapter.") for n in changed) and any(n.startswith("decoder.") for n in changed) and not any(n.startswith("vfm.") for n in changed)
        assert not torch.equal(whole[1]["latent_mean"], torch.zeros(4))
        for path in joint.iterdir():
            path.unlink()
        run_align(f"--out={folder}", *options, "--steps=2")
        run_align(f"--out={folder}", *options)                   # goes on

        def same(a, b, at=""):
            if isinstance(a, dict):
                assert a.keys() == b.keys(), at
                [same(a[key], b[key], f"{at}.{key}") for key in a]
            elif isinstance(a, (list, tuple)):
                assert len(a) == len(b), at
                [same(x, y, f"{at}[]") for x, y in zip(a, b)]
            else:
                assert torch.equal(a, b) if torch.is_tensor(a) else a == b, at
        same(whole, load())
        # a kill between the two renames: the second one is made up for; a kill before both files were written: the old pair stays
        os.replace(joint / "diffusion.pt", joint / "diffusion.next.pt")
        align.finish_pair(joint)
        same(whole, load())
        (joint / "tokenizer.next.pt").write_bytes(b"of a later step")
        align.finish_pair(joint)
        same(whole, load())
        assert not list(joint.glob("*.next.pt"))
        # files of different steps are not measured as a pair; another run's are not gone on with
        entries = torch.load(joint / "tokenizer.pt", weights_only=True)
        entries["ema"] = {name: value + 1 for name, value in entries["ema"].items()}
        torch.save(entries, joint / "tokenizer.pt")
        assert "different steps" in refused(f"--out={folder}", joint / "diffusion.pt", "--images=20")
        assert "another run" in refused(f"--out={folder}", *options, "--seed=1")


def test_joint_training_of_every_method():
    """Each tokenizer's own losses beside a plain diffusion model, which gets a projection; accumulation; the equivariance regularisation's small latents."""
    for method, side in (("vfmvae", "tokenizer"), ("aligntok", "both"), ("vavae", "diffusion"), ("vae", "none")):
        with small_world((method,)) as folder:
            run_align(f"--out={folder}", "--steps=4", "--batch_size=8", "--accumulate=2", "--images=20", f"--side={side}", "--compile=0", "--log_interval=1", "--seed=3")
            logged = [json.loads(line) for line in (Path(folder) / f"joint-{side}" / "log.jsonl").read_text().splitlines()]
            assert len(logged) == 4 and all(math.isfinite(line["velocity"]) and ("repa" in line) == (side != "none") for line in logged)
            arch = diffusion.load_diffusion(f"{folder}/joint-{side}/diffusion.pt").about["arch"]
            assert bool(arch["z_dim"]) == (side != "none")
    kinds = [tokenizer.draw_equivariance(3, step, 4, 2)[0] for step in range(4)]
    assert "image" in kinds, kinds


def test_study():
    from scipy.stats import spearmanr
    with small_world() as folder:
        options = [f"--out={folder}", "--study=1", "--study_methods=vae-8,vfmvae", "--study_seeds=2", "--study_kimg=0.128", "--study_steps=3", "--study_points=1,3",
                   "--study_images=96", "--study_samples=24", "--study_sampling=3", "--encode_batch=24"]
        sizes, methods = dict(diffusion.SIZES), {name: dict(method) for name, method in align.METHODS.items()}
        diffusion.SIZES["toy"] = (2, 32, 2)
        for method in align.METHODS.values():
            method.update(widths=(16, 16, 16, 16), fuse_dims=(16, 16), level_dim=16, w_dim=16, post_factor=2, ch_mult=(1, 1, 1, 1))
        try:
            printed = run_align(*options)
            study = Path(folder) / "study"
            runs = sorted(study.glob("*/result.json"))
            assert [path.parent.name for path in runs] == ["vae-8-0", "vae-8-1", "vfmvae-0", "vfmvae-1"]
            results = json.loads((study / "results.json").read_text())
            table = (study / "table.md").read_text()
            assert table in printed and "4 of 4 runs" in table and (study / "study.png").stat().st_size > 1000
            for r in results["runs"]:
                assert [p["step"] for p in r["points"]["none"]] == [1, 3] and r["points"].keys() == {"none", "repa"}
                assert all(math.isfinite(v) for points in r["points"].values() for p in points for v in p.values())
                assert {(row["name"], row["part"]) for row in r["alignment"]} == {(r["method"], "latents"), *((a, f"block {i}") for a in ("none", "repa") for i in (1, 2))}
            rho = spearmanr([r["PSNR"] for r in results["runs"]], [r["points"]["repa"][-1]["gFD"] for r in results["runs"]])[0]
            assert abs(results["spearman"]["repa"]["gFD"]["PSNR"][0] - rho) < 1e-12 and abs(abs(results["spearman"]["repa"]["gFD"]["PSNR"][1]) - 1) < 1e-12
            pairs = [r["points"]["repa"][-1]["gFD"] - r["points"]["none"][-1]["gFD"] for r in results["runs"] if r["method"] == "vfmvae"]
            assert f"| {np.mean(pairs):.1f} ± {np.std(pairs, ddof=1):.1f} |" in next(line for line in table.splitlines() if line.startswith("| vfmvae | repa - none"))
            psnrs = [r["PSNR"] for r in results["runs"] if r["method"] == "vfmvae"]
            row = next(line for line in table.splitlines() if line.startswith("| vfmvae | "))
            assert f"| {np.mean(psnrs):.2f} ± {np.std(psnrs, ddof=1):.2f} |" in row
            # one run is lost: it alone is made again, and comes out the same
            before, times = json.loads(runs[2].read_text()), [path.stat().st_mtime_ns for path in runs]
            runs[2].unlink()
            run_align(*options)
            after = json.loads(runs[2].read_text())
            assert {k: v for k, v in before.items() if k != "seconds"} == {k: v for k, v in after.items() if k != "seconds"}
            assert [path.stat().st_mtime_ns == t for path, t in zip(runs, times)] == [True, True, False, True]
            # torchrun's second process takes every second run and joins no group
            for path in runs[:3]:
                path.unlink()
            with contextlib.ExitStack() as stack:
                for key, value in dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1").items():
                    stack.callback(functools.partial(os.environ.pop, key, None))
                    os.environ[key] = value
                run_align(*options)
                assert not torch.distributed.is_initialized()
            assert [path.exists() for path in runs] == [False, False, True, True]      # vfmvae-0 is number 1 of the list, vfmvae-1 number 3
            assert "other settings" in refused(*options, "--study_steps=4")
            runs[2].write_text(runs[2].read_text().replace(before["networks"], "0" * 32))
            assert "other VFMs" in refused(*options)             # two runs are lacking: the networks are looked at
        finally:
            diffusion.SIZES.update(sizes)
            align.METHODS.update(methods)


def test_align_refuses():
    with small_world() as folder:
        assert "tokenizer.py first" in refused(f"--out={folder}/nowhere")
        assert "no checkpoint" in refused(f"--out={folder}", "missing.pt")
        assert "vfm checkpoint, not a tokenizer" in refused(f"--out={folder}", f"{folder}/vfm-toy.pt")
        assert "no VFM nothing" in refused(f"--out={folder}", "--reference=nothing", "--images=20")
        assert "one diffusion checkpoint" in refused(f"--out={folder}", "--steps=1", f"{folder}/tokenizer.pt")
        assert "there are none, tokenizer" in refused(f"--out={folder}", "--steps=1", "--side=left")
        assert "there are vae" in refused(f"--out={folder}", "--study=1", "--study_methods=vq")
        assert "study_points" in refused(f"--out={folder}", "--study=1", "--study_points=2000")
        assert "do not fit" in refused(f"--out={folder}", "--image_size=36", "--images=20")


# -----------------------------------------------------------------------------

def run_all(words):
    torch.set_num_threads(2)
    counts = dict(passed=0, failed=0, skipped=0)
    for name, test in list(globals().items()):
        if not name.startswith("test_") or words and not any(word in name for word in words):
            continue
        start, outcome = time.perf_counter(), "passed"
        try:
            test()
        except Skip as reason:
            outcome = "skipped"
            print(f"    {reason}")
        except Exception:
            traceback.print_exc()
            outcome = "failed"
        counts[outcome] += 1
        print(f"{outcome:8s} {time.perf_counter() - start:6.1f} s  {name}", flush=True)
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return counts["failed"] > 0 or not counts["passed"]


if __name__ == "__main__":
    sys.exit(run_all(sys.argv[1:]))
