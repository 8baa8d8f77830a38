"""
Every test: `python test_all.py` (`python test_all.py vit cache` runs those whose names contain one of the words), or `pytest test_all.py`.

Networks are held to golden values that public reference implementations printed for small models (testdata/*.json): their weights
are rebuilt from their keys, written to files laid out as the official ones, and loaded through the public functions.
"""
import contextlib
import dataclasses
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
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import tokenizer
from tokenizer import UserError

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


# -----------------------------------------------------------------------------
# tokenizer.py: command line, data

def test_config():
    parse = lambda *argv: tokenizer.parse_config(tokenizer.Config, tokenizer.PRESETS, argv)
    cfg = parse("--batch_size=7", "--lr_scale", "2.5", "--layers=0,1", "--flip=0")
    assert (cfg.batch_size, cfg.lr_scale, cfg.layers, cfg.flip, cfg.preset) == (7, 2.5, (0, 1), False, "toy")
    assert parse("--preset=imagenet").image_size == 256 and parse("--preset=imagenet", "--image_size=64").image_size == 64
    for argv, words in ((["--batchsize=7"], ("batchsize", "batch_size")), (["--batch_size=x"], ("batch_size", "int")), (["--preset=none"], ("toy", "imagenet")), (["stray"], ("stray",))):
        result = captured_exit(2, parse, *argv)
        assert result.count("\n") == 1 and all(word in result for word in words), result
    for name in ("tokenizer", "diffusion", "align", "sample", "fid"):
        module = __import__(name)
        text = captured_exit(0, tokenizer.parse_config, module.Config, module.PRESETS, ["--help"])
        for field in dataclasses.fields(module.Config):
            line = re.search(rf"--{field.name} .*", text.replace("\n" + " " * 24, " "))
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
        assert len(lines) == 2 and lines[-1]["images"] == 64 and lines[-1]["l1"] > 0


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
            rec, _ = trainer.reconstruction_loss(outputs, x, 0)
            loss, last = rec, tok.adapter.last_weight()
            parts = trainer.gan.generator_loss(outputs[-1], x)
            gan = sum(getattr(stage, name) * value for name, value in parts.items())
            if stage.gan_adaptive:
                norm = lambda loss: torch.autograd.grad(loss, tok.decoder.last_weight(), retain_graph=True)[0].norm()
                weight = norm(rec) / (norm(sum(parts.values()) * stage.patch) + 1e-4)
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
        assert len(losses[0]) == len(losses[1]) == 3 and abs(losses[0][0] - losses[1][0]) < 0.1


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


class FakeFeatures:
    name = "toy"

    def __call__(self, images):
        return images.float().flatten(1)[:, ::300] / 255, None, None


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
