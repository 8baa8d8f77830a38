"""
Tokenizers on vision foundation models (VFMs), and the parts that all stages share.

    python tokenizer.py                                     # toy: a VFM-VAE on drawn shapes, minutes on a laptop
    python tokenizer.py --method=aligntok                   # AlignTok's three stages; also vavae, vae
    python tokenizer.py --preset=imagenet                   # the paper's recipe, data in data/imagenet/{train,val}
    torchrun --nproc_per_node=8 tokenizer.py                # the same on eight GPUs
    python tokenizer.py --eval=1                            # PSNR, SSIM, LPIPS, rFD of out/tokenizer.pt

VFM-VAE is arXiv 2510.18457, AlignTok arXiv 2509.25162, VA-VAE arXiv 2501.01423, the plain VAE that of latent diffusion (2112.10752).
"""
import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import functools
import hashlib
import http.client
import inspect
import json
import math
import mmap
import os
import re
import struct
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.modules.setdefault("tokenizer", sys.modules[__name__])      # as a script: `import tokenizer` elsewhere must not make a second copy


@dataclass
class Config:
    preset: str = ""                     # toy or imagenet; imagenet where there is CUDA and data/imagenet/train
    method: str = "vfmvae"               # vfmvae, aligntok, vavae or vae
    stage: int = 0                       # this stage alone, from the checkpoint that the one before wrote; 0: all in turn
    out: str = "out"                     # folder of checkpoints, logs, grids
    resume: bool = True                  # go on from out/tokenizer.pt if it is there
    eval: bool = False                   # evaluate out/tokenizer.pt (or --ckpt) on held-out images, then stop
    ckpt: str = ""                       # what --eval evaluates: ours or an official file
    bench: int = 0                       # time this many steps of every stage's losses on random data and weights, then stop
    # data
    data: str = "shapes"                 # shapes, a folder (of class folders or flat, maybe with train/ and val/), or torchvision's name (CIFAR10, ...)
    data_dir: str = "data"               # where torchvision's data sets lie
    download: bool = False               # let torchvision download them
    image_size: int = 32                 # side of the training images
    crop: bool = False                   # augment: a random square of 0.5 to 1 of the short side
    flip: bool = True                    # augment: mirror with probability 0.5
    workers: int = 0                     # data loading processes
    # model
    vfm: str = "toy"                     # toy, toy-blind, a name (dinov2_vitl14, siglip2-large-patch16-512, ...) or a file; empty: the method's
    scale_factor: float = 1.0            # the VFM sees images of this times their size; 0: the method's
    layers: tuple = (0, 2, -1)           # VFM levels that VFM-VAE reads: 0 the embedding, i the output of block i, -1 the normalised last
    z_dim: int = 32                      # latent channels C
    downsample: int = 8                  # f: image side / latent side
    level_dim: int = 64                  # channels of each level before fusion
    decoder: str = ""                    # vfmvae or ldm; empty: the method's own
    post_factor: int = 4                 # VFM-VAE decoder: latent channels are decompressed by this
    widths: tuple = (128, 128, 64, 32)   # channels of its blocks, coarse to fine; their number is log2(f) + log2(coarsest fold)
    fuse_dims: tuple = (128, 64)         # channels of the latent fused into its first blocks
    attention: tuple = (1, 1)            # self-attentions after its first blocks
    num_res_blocks: int = 0              # ConvNeXt layers: 1 + 3 x this, or 1 + 2 x this above block 3
    w_dim: int = 128                     # style width
    ch: int = 32                         # LDM autoencoder: base channels
    ch_mult: tuple = (1, 1, 2, 4)        # ... and their multiples, fine to coarse
    ldm_blocks: int = 1                  # residual blocks a level; one more in the decoder
    ldm_attention: bool = False          # self-attention on the coarsest level, beside the one in the middle
    groups: int = 8                      # of its GroupNorms; as many as channels (LDM's 32 here) would keep an image's mean colours from the output
    # training
    kimg: float = 28.0                   # thousands of images over all stages, shared out as in STAGES; 0: STAGES' own numbers
    batch_size: int = 16                 # images a step, over all processes
    accumulate: int = 1                  # micro-batches a step
    lr_scale: float = 20.0               # times the learning rates of STAGES
    encoder_lr: float = 0.3              # ... and of a VFM that is trained (ours)
    ldm_lr: float = 0.3                  # ... where LDM's encoder or decoder takes part: at VFM-VAE's toy rates they stay grey (ours)
    cooldown: float = 0.4                # last share of the run over which the learning rates fall linearly to 0 (ours; the papers' are constant)
    beta1: float = 0.9                   # Adam's; negative: the stage's own
    vf_scale: float = 0.2                # times the VF weights of STAGES
    preserve_scale: float = 0.2          # times the semantic preservation weight of STAGES
    gan_scale: float = 0.0               # times the GAN weights of STAGES; 0: no GAN
    lpips_scale: float = 0.01            # times the perceptual weights of STAGES
    equivariance: bool = False           # VFM-VAE's equivariance regularisation, in the stages that have it
    ema_kimg: float = 160.0              # half-life of the weights' moving average; at most 5% of the images seen
    perceptual: str = "toy"              # lpips, or the VFM on whose features its formula is used instead
    lpips_weights: str = ""              # VGG16 and LPIPS linear layers, comma-separated files; empty: fetch the public ones
    disc_vfm: str = "toy"                # the frozen ViT under the projected discriminator
    ndf: int = 16                        # PatchGAN's base channels
    seed: int = 0                        # of weights, batches, noise
    compile: bool = torch.cuda.is_available()   # torch.compile the networks
    log_interval: int = 20               # steps
    grid_interval: int = 500             # steps between pictures of reconstructions
    save_interval: int = 1000            # steps between checkpoints
    eval_images: int = 2000              # held-out images


PRESETS = dict(
    toy={},
    imagenet=dict(data="data/imagenet", image_size=256, crop=True, workers=12, vfm="", scale_factor=0.0, layers=(0, 12, -1), downsample=16, post_factor=16,
                  widths=(512, 512, 512, 512, 256, 128), fuse_dims=(512, 256, 128, 128), attention=(2, 2, 2), num_res_blocks=2, w_dim=512, ch=128,
                  ch_mult=(1, 1, 2, 2, 4), ldm_blocks=2, ldm_attention=True, groups=32, kimg=0.0, batch_size=512, lr_scale=1.0, encoder_lr=0.1, ldm_lr=1.0,
                  cooldown=0.0, beta1=-1.0, vf_scale=1.0, preserve_scale=1.0, gan_scale=1.0, lpips_scale=1.0, equivariance=True, perceptual="lpips",
                  disc_vfm="dino_vits16", ndf=64, log_interval=50, grid_interval=2000, save_interval=2000, eval_images=50_000))


@dataclass
class Stage:
    """One row of a recipe; a column that is left out is zero or off."""
    name: str
    kimg: float                          # length, thousands of images
    trains: str                          # encoder (the VFM), adapter (or LDM's encoder), decoder, high (the decoder's three finest blocks: above 32 px of 256)
    lr: float = 1e-4
    betas: tuple = (0.0, 0.99)           # Adam's, both networks
    summed: bool = False                 # LDM sums pixel and perceptual terms over C, H, W
    sample: bool = True                  # decode a sample of the posterior, not its mean
    l1: float = 1.0
    lpips: float = 0.0
    ssim: float = 0.0
    multires: float = 0.0                # each coarser scale's L1, for the first multires_kimg
    multires_kimg: float = 0.0
    kl: float = 0.0
    vf: float = 0.0                      # times the adaptive weight
    vf_margins: tuple = (0.0, 0.0)       # of the similarity matrices, of the cosine
    preserve: float = 0.0                # AlignTok's semantic preservation
    dino: float = 0.0                    # projected discriminator, hinge
    patch: float = 0.0                   # PatchGAN, hinge
    multi: float = 0.0                   # three-scale PatchGAN, least squares
    matching: float = 0.0                # ... and its feature matching
    gan_adaptive: bool = False           # LDM's adaptive weight
    gan_start_kimg: float = 0.0
    equivariance: bool = False


def rows(*stages, **shared):
    return [Stage(**{**shared, **stage}) for stage in stages]


# The recipes. VFM-VAE: the paper's configuration. VA-VAE: 130 epochs of ImageNet (1,281 kimg each), adaptive weight 0.5, then 0.1, then
# with margins. vae: latent diffusion's losses, as long as VA-VAE. AlignTok: the paper gives what trains under which losses; lengths,
# learning rates and lambda_sp = 1 on mean squared differences, beside means over pixels, are ours, the first stage longest, since
# semantics are learnt slowly. LDM's GAN starts after 5,000 steps of 256 images.
LDM = dict(betas=(0.5, 0.9), lpips=1.0, kl=1e-6, patch=0.5, gan_adaptive=True)
STAGES = dict(
    vfmvae=rows(
        dict(name="strong alignment", kimg=20_000, trains="adapter decoder", vf=5.0, kl=1e-6, lpips=10.0, multires=0.1, multires_kimg=5_000, equivariance=True),
        dict(name="weak alignment", kimg=20_000, trains="adapter decoder", vf=1.0, kl=1e-6, lpips=10.0, equivariance=True),
        dict(name="ssim", kimg=1_000, trains="decoder", lr=5e-5, lpips=2.0, ssim=1.0, equivariance=True),
        dict(name="patchgan", kimg=3_000, trains="high", lr=5e-5, l1=0.0, multi=1.0, matching=10.0), dino=1.0),
    aligntok=rows(
        dict(name="latent alignment", kimg=38_400, trains="adapter decoder", gan_start_kimg=1_280),
        dict(name="perceptual alignment", kimg=19_200, trains="encoder adapter decoder", preserve=1.0),
        dict(name="decoder refinement", kimg=12_800, trains="decoder", kl=0.0), summed=True, **LDM),
    vavae=rows(
        dict(name="strong alignment", kimg=128_100, trains="adapter decoder", vf=0.5, gan_start_kimg=1_280),
        dict(name="weak alignment", kimg=19_200, trains="adapter decoder", vf=0.1),
        dict(name="margins", kimg=19_200, trains="adapter decoder", vf=0.1, vf_margins=(0.25, 0.5)), summed=True, **LDM),
    vae=rows(dict(name="reconstruction", kimg=166_500, trains="adapter decoder", gan_start_kimg=1_280), summed=True, **LDM))


# -----------------------------------------------------------------------------
# Command line, processes, checkpoints, logs: what every script of this repository begins and ends with

class UserError(Exception):
    """A mistake of the user's: `main` prints its one line and exits with status 1."""


def parse_config(Config, presets, argv=None, positional=()):
    """A Config from the command line: its defaults, then the preset's overrides, then the flags.

    Fields may be int (from 1, or from 0 where that is the default or the comment says "0: ..."), float, bool (0/1), str or tuple
    (comma-separated ints). `positional` names the fields that may also be given without a flag. Exits with status 2 and one line for an
    unknown flag and a value of the wrong type or out of range.
    """
    def boolean(text):
        return ("0", "false", "1", "true").index(text.lower()) > 1        # ValueError: argparse's complaint

    def integers(text):
        return tuple(int(part) for part in text.split(",") if part)

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"{self.prog}: {message}\n")

    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(Config), re.M))
    parser = Parser(description=sys.modules[Config.__module__].__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Config):
        convert = {bool: boolean, tuple: integers}.get(field.type, field.type)
        default = ",".join(map(str, field.default)) if field.type is tuple else int(field.default) if field.type is bool else field.default
        parser.add_argument(f"--{field.name}", type=convert, default=argparse.SUPPRESS, metavar=field.type.__name__,
                            help=f"{comments.get(field.name, '')} [{default}]".replace("%", "%%"))
    parser.epilog = "presets:\n" + "\n".join(
        f"  --preset={name}: " + (", ".join(f"{k}={v}" for k, v in preset.items()) or "the defaults") for name, preset in presets.items())
    for name in positional:
        parser.add_argument(f"@{name}", nargs="?", metavar=name, default=argparse.SUPPRESS)
    given, unknown = parser.parse_known_args(argv)
    names = [field.name for field in dataclasses.fields(Config)]
    if unknown:
        nearest = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], names, 1, 0)[0]
        parser.error(f"unknown argument {unknown[0]}; did you mean --{nearest}? (--help lists all)")
    given = {key.lstrip("@"): value for key, value in vars(given).items()}
    imagenet = torch.cuda.is_available() and os.path.isdir("data/imagenet/train")
    preset = given.get("preset") or ("imagenet" if imagenet and "imagenet" in presets else "toy")
    if preset not in presets:
        parser.error(f"unknown preset {preset}; there are {', '.join(presets)}")
    cfg = Config(**{**presets[preset], **given, "preset": preset})
    for field in dataclasses.fields(Config):
        low = int(field.type is int and field.default > 0 and "0: " not in comments.get(field.name, ""))      # 0 where the comment says what it means
        if field.type is int and getattr(cfg, field.name) < low:
            parser.error(f"--{field.name}={getattr(cfg, field.name)}: must be at least {low}")
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"preset {preset}", flush=True)
    return cfg


def main(run):
    """Runs a script's `run()`; a UserError becomes one line and exit status 1."""
    try:
        run()
    except UserError as error:
        for bar in list(tqdm._instances):
            bar.close()
        line = str(error).strip().splitlines()[-1].split("UserError: ")[-1]      # a DataLoader worker wraps the line into a traceback
        sys.exit(f"{Path(sys.argv[0]).name}: {line}")
    except OSError as error:             # a full disk, a folder that may not be written: the system's own line
        if not error.strerror:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {error.strerror}" + (f": {error.filename}" if error.filename else ""))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}    # dense bf16, NVIDIA's datasheets


@dataclass
class World:
    """This process among its peers."""
    rank: int
    size: int
    device: torch.device

    @property
    def layout(self):                    # of convolutions
        return torch.channels_last if self.device.type == "cuda" else torch.contiguous_format

    def autocast(self):                  # bf16 on CUDA, float32 on the CPU
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def mfu(self, flops, rate):          # of `flops` an image at `rate` images a second over all processes; None where the device's peak is not known
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        return next((flops * rate / (peak * self.size) for gpu, peak in PEAK_FLOPS.items() if gpu in name), None)

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def mean(self, tensor):              # average over processes, in place
        if self.size > 1:
            dist.all_reduce(tensor.div_(self.size))
        return tensor


def init_world():
    """Joins the process group that torchrun describes (NCCL on GPUs, gloo on the CPU), or stands alone."""
    rank, size, local = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda and local >= torch.cuda.device_count():
        raise UserError(f"{local + 1} processes, but {torch.cuda.device_count()} GPUs: --nproc_per_node must not exceed them")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    elif sys.platform == "linux":        # glibc returns large blocks at every free: their page faults are a fifth of a toy step
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-1, 2 ** 31 - 1)         # M_TRIM_THRESHOLD
            libc.mallopt(-3, 2 ** 25)             # M_MMAP_THRESHOLD
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))      # the others wait while one lists a million files
    return World(rank, size, device)


def seed_step(seed, step, rank=0):
    """All randomness of a step is a function of (seed, step, rank), so a resumed run needs no RNG state to be exact."""
    torch.manual_seed(int.from_bytes(hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=7).digest(), "little"))


def save_checkpoint(path, **entries):
    """Writes to a temporary name, then renames: a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(entries, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}".splitlines()[0])


def load_checkpoint(path, kind, hint=""):
    """The entries of a checkpoint that one of these scripts wrote, on the CPU. UserError if it is missing or of another kind."""
    if not Path(path).exists():
        raise UserError(f"no {kind} checkpoint at {path}" + (f"; {hint}" if hint else ""))
    entries = load_weights(path)
    if entries.get("kind") != kind:
        raise UserError(f"{path} is not a {kind} checkpoint of this repository (its kind: {entries.get('kind', 'unknown')})")
    return entries


def write_text(path, text):
    """Whole or not at all."""
    temporary = Path(path).with_name(f"{Path(path).name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


class Log:
    """One tqdm bar and one line of JSON in `out/log.jsonl` per log interval; silent but on rank 0."""

    def __init__(self, out, script, world, total, start=0, unit="step"):
        self.path, self.script, self.main, self.device = Path(out) / "log.jsonl", script, world.rank == 0, world.device
        self.bar = tqdm(total=total, initial=start, desc=script, unit=unit, disable=not self.main, mininterval=0.5, dynamic_ncols=True)
        self.world, self.clock, self.images, self.flops = world, time.perf_counter(), None, None
        if self.main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text().splitlines() if self.path.exists() else []

            def current(line):           # not what came after the checkpoint that is resumed from, nor half a line
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    return entry["script"] != script or entry["step"] <= start

            write_text(self.path, "".join(line + "\n" for line in filter(current, lines)))

    def write(self, step, images, **values):
        """`images` seen so far; tensors among `values` are read here, once per interval."""
        values = dict(zip(values, torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values.values()]).tolist()))
        now, seconds = time.perf_counter(), time.perf_counter() - self.clock
        if self.images is not None:
            values["images_per_second"] = (images - self.images) / seconds
            if mfu := self.world.mfu(self.flops or 0, values["images_per_second"]):
                values["mfu"] = mfu
        self.clock, self.images = now, images
        if self.main:
            with open(self.path, "a") as file:
                file.write(json.dumps(dict(script=self.script, step=step, images=images, **{k: float(f"{v:.6g}") for k, v in values.items()})) + "\n")
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()}, refresh=False)


def update_ema(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, for all parameters at once; a DiT's buffers are constants."""
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - decay)


def to_uint8(images):
    """float [..., H, W] in [-1, 1] -> uint8, rounded."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def to_float(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def save_grid(images, path, columns, labels=None, scale=None):
    """Images [N, 3, H, W] in [-1, 1] as one PNG with `columns` to the row; `labels`, N strings, are written under them."""
    n, _, h, w = images.shape
    scale = scale or max(1, 96 // max(h, w))
    text, rows = (12 if labels else 0), -(-n // columns)
    canvas = Image.new("RGB", (columns * (w * scale + 2), rows * (h * scale + 2 + text)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()):
        x, y = i % columns * (w * scale + 2), i // columns * (h * scale + 2 + text)
        canvas.paste(Image.fromarray(image).resize((w * scale, h * scale), Image.NEAREST), (x, y))
        if labels:
            draw.text((x + 1, y + h * scale), labels[i], fill="black")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


# -----------------------------------------------------------------------------
# Data: drawn shapes, folders, torchvision's data sets. An item is (uint8 [3, size, size], label)

class Shapes(Dataset):
    """Drawn, labelled, captioned images that stand in for ImageNet: `classes` of shapes in 8 hues on 5 textured backgrounds in 8 hues;
    size, position, rotation and mirroring vary independently. An image is a function of (split, index) alone: its attributes come
    from a counter-based hash, its edges from signed distances (antialiased at any size)."""
    classes = ["circle", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "T", "L"]
    hues = ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"]
    textures = ["plain", "gradient", "stripes", "checks", "clouds"]
    lengths = dict(train=30_000, val=5_000)

    def __init__(self, split, size=32, length=None, cache=None):
        self.split, self.size, self.n = split, size, length or self.lengths[split]
        self.images, self.labels = None, self.targets()
        if cache and self.n * 3 * size * size < 1 << 29:      # drawn once and memory-mapped by every later process
            version = hashlib.blake2b(self.draw(np.arange(16)), digest_size=3).hexdigest()      # who changes the drawing gets new ones
            path = Path(cache) / f"shapes-{split}-{size}-{self.n}-{version}.npy"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
                array = np.lib.format.open_memmap(temporary, "w+", np.uint8, (self.n, 3, size, size))
                for start in tqdm(range(0, self.n, 500), desc=f"drawing {self.n} shapes", leave=False):
                    array[start:start + 500] = self.draw(np.arange(start, min(start + 500, self.n)))
                array.flush()
                os.replace(temporary, path)
            self.images = np.load(path, mmap_mode="r")

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        image = self.images[index] if self.images is not None else self.draw(np.array([index]))[0]
        return torch.from_numpy(np.array(image)), int(self.labels[index])

    def targets(self):
        return self.attributes(np.arange(self.n))["shape"]

    def random(self, indices, k):
        """k uniform numbers in [0, 1) for each index: SplitMix64 (Steele et al. 2014) of a counter."""
        with np.errstate(over="ignore"):
            counter = np.asarray(indices, np.uint64)[:, None] * np.uint64(64) + np.arange(k, dtype=np.uint64)
            z = (counter + np.uint64(["train", "val"].index(self.split) << 40)) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / (1 << 53)

    def attributes(self, indices):
        """A dictionary of arrays: four categorical attributes, then x, y, scale, angle, mirror and the texture's own numbers."""
        u = self.random(indices, 24)
        pick = lambda k, choices: (u[:, k] * len(choices)).astype(int)
        scale = 0.55 + 0.25 * u[:, 4]
        return dict(shape=pick(0, self.classes), hue=pick(1, self.hues), texture=pick(2, self.textures), ground=pick(3, self.hues),
                    scale=scale, x=(2 * u[:, 5] - 1) * (1 - scale), y=(2 * u[:, 6] - 1) * (1 - scale),
                    angle=(2 * u[:, 7] - 1) * 0.4, mirror=np.where(u[:, 8] < 0.5, -1.0, 1.0), free=u[:, 9:])

    def caption(self, index):
        a = {key: value[0] for key, value in self.attributes([index]).items()}
        where = ("upper" if a["y"] < 0 else "lower") + (" left" if a["x"] < 0 else " right")
        return (f"a {'large' if a['scale'] > 0.675 else 'small'} {self.hues[a['hue']]} {self.classes[a['shape']]} at the {where} "
                f"on a {self.hues[a['ground']]} background, {self.textures[a['texture']]}")

    def draw(self, indices):
        """uint8 [n, 3, size, size]."""
        a = self.attributes(indices)
        free = a["free"][:, :, None, None].astype(np.float32)
        axis = (np.arange(self.size, dtype=np.float32) + 0.5) * (2 / self.size) - 1
        px, py = axis[None, None, :], axis[None, :, None]

        def colour(hue, saturation, value):      # HSV to RGB, [n, 3, 1, 1]
            k = (np.array([5, 3, 1]) + hue[:, None] / len(self.hues) * 6 + 0.3) % 6
            return (value[:, None] * (1 - saturation[:, None] * np.clip(np.minimum(k, 4 - k), 0, 1))).astype(np.float32)[:, :, None, None]

        # background: a mixture of two tones of one hue, by texture
        angle, frequency, phase = free[:, 0] * 2 * np.pi, 1.5 + 1.5 * free[:, 1], free[:, 2] * 2 * np.pi
        along, across = px * np.cos(angle) + py * np.sin(angle), py * np.cos(angle) - px * np.sin(angle)
        step = lambda wave: np.clip(0.5 + 4 * wave, 0, 1)
        mixture = np.zeros((len(along), self.size, self.size), np.float32)
        textures = [lambda i: 0 * along[i], lambda i: (along[i] + 1.4) / 2.8, lambda i: step(np.sin(along[i] * np.pi * frequency[i] + phase[i])),
                    lambda i: step(np.sin(along[i] * np.pi * frequency[i] + phase[i]) * np.sin(across[i] * np.pi * frequency[i])),
                    lambda i: 0.5 + 0.25 * sum(np.sin(np.pi * (px * (4 * free[i, 3 + 3 * k] - 2) + py * (4 * free[i, 4 + 3 * k] - 2))
                                                      + 2 * np.pi * free[i, 5 + 3 * k]) for k in range(3))]
        for k, texture in enumerate(textures):
            i = np.flatnonzero(a["texture"] == k)
            mixture[i] = texture(i)
        value = 0.3 + 0.3 * a["free"][:, 12]
        dark, light = colour(a["ground"], 0.6 + 0 * value, value), colour(a["ground"], 0.5 + 0 * value, value + 0.18)
        ground = dark + (light - dark) * np.clip(mixture, 0, 1)[:, None]

        # foreground: signed distance in the object's frame
        cos, sin = (f(a["angle"])[:, None, None].astype(np.float32) for f in (np.cos, np.sin))
        scale, mirror, x, y = (a[key][:, None, None].astype(np.float32) for key in ("scale", "mirror", "x", "y"))
        dx, dy = (px - x) / scale, (py - y) / scale
        u, v = (dx * cos + dy * sin) * mirror, dy * cos - dx * sin
        distance = np.empty_like(u)
        for k, name in enumerate(self.classes):
            i = np.flatnonzero(a["shape"] == k)
            distance[i] = self.distance(name, u[i], v[i])
        coverage = np.clip(0.5 - distance * scale * (self.size / 2), 0, 1)[:, None]
        front = colour(a["hue"], 0.7 + 0.3 * a["free"][:, 13], 0.85 + 0.15 * a["free"][:, 14])
        return ((ground + (front - ground) * coverage) * 255 + 0.5).astype(np.uint8)

    @staticmethod
    def distance(name, x, y):
        """Signed distance (negative inside, exact near most edges) of points in a frame where the shape about fills the unit disc, y down."""
        r = np.hypot(x, y)
        box = lambda x0, x1, y0, y1: np.maximum(np.abs(x - (x0 + x1) / 2) - (x1 - x0) / 2, np.abs(y - (y0 + y1) / 2) - (y1 - y0) / 2)
        if name == "circle":
            return r - 0.85
        if name == "square":
            return box(-0.72, 0.72, -0.72, 0.72)
        if name == "triangle":
            return np.maximum(y, 0.8660254 * np.abs(x) - y / 2) - 0.48
        if name == "star":               # one of ten mirrored sectors: the edge from the tip (radius 0.95) to the inner corner (0.4)
            sector = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
            tip, inner = np.array([0.95, 0]), 0.4 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
            normal = np.array([inner[1] - tip[1], tip[0] - inner[0]], np.float32) / np.hypot(*(inner - tip))
            return normal[0] * (r * np.cos(sector) - np.float32(0.95)) + normal[1] * r * np.sin(sector)
        if name == "cross":
            return np.minimum(box(-0.26, 0.26, -0.85, 0.85), box(-0.85, 0.85, -0.26, 0.26))
        if name == "ring":
            return np.abs(r - 0.64) - 0.21
        if name == "crescent":
            return np.maximum(r - 0.85, 0.68 - np.hypot(x - 0.42, y))
        if name == "heart":
            y = y - 0.08
            lobe = np.hypot(np.abs(x) - 0.36, y + 0.36) - 0.51
            return np.minimum(lobe, np.maximum(np.abs(x + y), np.abs(x - y)) * 0.7071068 - 0.51)
        if name == "T":
            return np.minimum(box(-0.8, 0.8, -0.85, -0.4), box(-0.23, 0.23, -0.85, 0.85))
        if name == "L":
            return np.minimum(box(-0.62, -0.16, -0.85, 0.85), box(-0.62, 0.62, 0.4, 0.85))
        raise KeyError(name)


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}


def load_rgb(path):
    """A PIL image in RGB from any file that Pillow opens: transparency on white, 16 bits scaled to 8, EXIF rotation applied."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            values = np.asarray(image).astype(np.float64)
            image = Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).round().astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read image {path}: {type(error).__name__}: {error}".replace("\n", " "))


def center_crop(image, size):
    """ADM's: box-halve while the short side is at least twice `size`, bicubic to it, then the centre (guided-diffusion's evaluation data)."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def list_images(folder):
    """The image files under a folder, sorted. UserError if it is missing or has none."""
    if not Path(folder).is_dir():
        raise UserError(f"no folder {folder}")
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"no images in {folder} (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


class Images(Dataset):
    """Images of any data set at one size. `data`: "shapes", a folder (one subfolder a class, or flat: class 0) that may hold
    `train` and `val`, or the name of a torchvision data set under `data_dir`. Items are asked for as an index, or as (index, key):
    then the picture is augmented (`crop`: a random square of 0.5 to 1 of the short side; `flip`), the same way for the same key."""

    def __init__(self, data, split, size, data_dir="data", download=False, crop=False, flip=False, cache="out"):
        self.size, self.crop, self.flip, self.note = size, crop, flip, ""
        if data == "shapes":
            self.source = Shapes(split, size, cache=cache)
            self.labels, self.classes = self.source.labels, Shapes.classes
        elif inspect.isclass(getattr(torchvision.datasets, data, None)):
            Source, folder = getattr(torchvision.datasets, data), data_dir
            keywords = dict(root=folder, download=download) if "download" in inspect.signature(Source).parameters else dict(root=folder)
            if "train" in inspect.signature(Source).parameters:
                keywords["train"] = split == "train"
            else:
                keywords["split"] = split if split == "train" or data == "ImageNet" else "test"
            try:
                with alone(os.path.join(folder, data)) if download else contextlib.nullcontext():
                    self.source = Source(**keywords)
            except Exception as error:
                raise UserError(f"torchvision's {data} under {folder}: {error}".replace("\n", " ") + ("" if download else " (--download=1 fetches it)"))
            labels = getattr(self.source, "targets", getattr(self.source, "labels", getattr(self.source, "_labels", None)))
            if labels is None:
                raise UserError(f"torchvision's {data} has no class labels; unpack it into a folder and give --data=FOLDER")
            self.labels = np.asarray(labels)
            self.classes = [str(name) for name in getattr(self.source, "classes", range(int(self.labels.max()) + 1))]
        else:
            root = next((Path(data) / name for name in (split, "train") if (Path(data) / name).is_dir()), Path(data))
            if split == "val" and root != Path(data) / split:
                self.note = f"{data} has no folder val: these are the training images"
            if not root.is_dir():
                raise UserError(f"--data={data}: no such folder, and not the name of a torchvision data set")
            paths = list_images(root)
            folders = sorted({path.relative_to(root).parts[0] for path in paths if path.parent != root})
            if folders and any(path.parent == root for path in paths):
                raise UserError(f"{root} has images both in class folders and beside them")
            self.classes = folders or ["image"]
            index = {name: i for i, name in enumerate(folders)}
            self.labels = np.array([index.get(path.relative_to(root).parts[0], 0) for path in paths])
            self.source = np.array([os.fsencode(path) for path in paths])        # one buffer: of a list, every worker would come to hold a copy

    def __len__(self):
        return len(self.source)

    def __getitem__(self, item):
        index, key = item if isinstance(item, tuple) else (item, None)
        image, label = self.source[index], int(self.labels[index])
        image = load_rgb(os.fsdecode(image)) if isinstance(image, bytes) else image[0] if isinstance(image, tuple) else image
        draw = np.random.default_rng(key) if key is not None else None
        if self.crop and draw is not None:
            if torch.is_tensor(image):
                image = Image.fromarray(image.permute(1, 2, 0).numpy())
            side = max(1, round(min(image.size) * draw.uniform(0.5, 1)))
            left, top = (int(draw.integers(0, extent - side + 1)) for extent in image.size)
            image = image.convert("RGB").resize((self.size,) * 2, Image.BICUBIC, (left, top, left + side, top + side), reducing_gap=3)
        if not torch.is_tensor(image):
            image = image.convert("RGB")
            image = image if image.size == (self.size,) * 2 else center_crop(image, self.size)
            image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if self.flip and draw is not None and draw.uniform() < 0.5:
            image = image.flip(-1)
        return image, label


def batch_indices(n, batch, seed, step):
    """The items of global step `step` in an endless sequence of seeded permutations of n items, and their running numbers."""
    numbers = np.arange(step * batch, (step + 1) * batch)
    parts = [permutation(n, seed, epoch)[numbers[numbers // n == epoch] % n] for epoch in np.unique(numbers // n)]
    return np.concatenate(parts), numbers


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


class StepSampler:
    """One list of (index, key) per micro-batch, from `start` to `stop` steps: rank r of `size` takes every size-th image of the global
    batch, so the images seen depend neither on the number of processes nor on accumulation."""

    def __init__(self, n, batch, seed, start, stop, world, accumulate=1):
        if batch % (world.size * accumulate):
            raise UserError(f"--batch_size={batch} must be a multiple of processes x accumulation = {world.size} x {accumulate}")
        self.__dict__.update(locals())

    def __len__(self):
        return (self.stop - self.start) * self.accumulate

    def __iter__(self):
        for step in range(self.start, self.stop):
            indices, numbers = batch_indices(self.n, self.batch, self.seed, step)
            mine = [(int(i), (self.seed, int(k))) for i, k in zip(indices, numbers)][self.world.rank::self.world.size]
            for part in np.array_split(np.arange(len(mine)), self.accumulate):
                yield [mine[k] for k in part]


def make_loader(dataset, sampler, world, workers):
    """Batches of (uint8 [b, 3, S, S], labels [b]) from a StepSampler or any batch sampler."""
    return DataLoader(dataset, batch_sampler=sampler, num_workers=workers, pin_memory=world.device.type == "cuda",
                      persistent_workers=False, prefetch_factor=4 if workers else None)


# -----------------------------------------------------------------------------
# Weights from files

SAFETENSORS_TYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, F8_E4M3=torch.float8_e4m3fn,
                         F8_E5M2=torch.float8_e5m2, I64=torch.int64, I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)


def read_safetensors(path):
    """The tensors of a .safetensors file: 8-byte little-endian header length, JSON header, one buffer. Memory-mapped, bounds checked."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
        if length > size - 8:
            raise ValueError("truncated, or not a safetensors file")
        header = json.loads(file.read(length))
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = SAFETENSORS_TYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        count = math.prod(shape)
        if any(n < 0 for n in shape) or not 0 <= begin <= end <= size - 8 - length or end - begin != count * dtype.itemsize:
            raise ValueError(f"tensor {name} lies outside the file")
        tensors[name] = (torch.frombuffer(buffer, dtype=dtype, count=count, offset=8 + length + begin) if count else torch.empty(0, dtype=dtype)).view(shape)
    return tensors


@contextlib.contextmanager
def alone(path):
    """One process of this machine at a time: eight ranks fetch a file once."""
    try:
        import fcntl
    except ImportError:                  # Windows
        yield
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def load_weights(path_or_url):
    """The contents of a .pt, .pth, .ckpt, .bin or .safetensors file, tensors on the CPU; never unpickles code (`weights_only`).

    A URL is fetched once into torch.hub's cache. Raises UserError when the file is missing, damaged, or cannot be fetched.
    """
    path = str(path_or_url)
    if path.startswith(("https://", "http://")):
        url, (place, name) = path, path.split("//")[1].rsplit("/", 1)
        path = os.path.join(torch.hub.get_dir(), "checkpoints", re.sub(r"\W+", "-", place) + "-" + name)
        with alone(path):
            try:
                if not os.path.exists(path):
                    torch.hub.download_url_to_file(url, path)
            except (OSError, http.client.HTTPException) as error:
                raise UserError(f"cannot fetch {url} ({error}); get it elsewhere and give its path (--vfm, --disc_vfm, --lpips_weights, --inception)")
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    try:
        # mapped, where the format and the system allow: eight processes do not hold eight copies of the optimizer that they will not use
        mmap_file = os.name == "posix" and zipfile.is_zipfile(path)
        return read_safetensors(path) if path.endswith(".safetensors") else torch.load(path, map_location="cpu", weights_only=True, mmap=mmap_file)
    except Exception as error:           # whatever a damaged or hostile file provokes
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"cannot read weights from {path}: damaged, or of another format ({type(error).__name__}: {first})")


def load_state(module, state, name, ignore=()):
    """`load_state_dict` whose complaint is one line that lists the missing and the left-over keys; `ignore`: regexes of keys not needed."""
    state = {key: value for key, value in state.items() if not any(re.match(pattern, key) for pattern in ignore)}
    own = module.state_dict()
    faults = [("missing", sorted(own.keys() - state.keys())), ("left over", sorted(state.keys() - own.keys())),
              ("of another shape", [f"{key} {list(state[key].shape)}, wanted {list(own[key].shape)}"
                                    for key in sorted(own.keys() & state.keys()) if own[key].shape != state[key].shape])]
    if any(keys for _, keys in faults):
        raise UserError(f"{name}: the weights do not fit: " + "; ".join(
            f"{len(keys)} keys {what}: " + ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "") for what, keys in faults if keys))
    module.load_state_dict(state)
    return module


# -----------------------------------------------------------------------------
# The vision foundation model

class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):                # [B, N, D]
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, GELU (exact or tanh), Linear; with `swiglu` (DINOv2-g) SiLU of one half of the first times the other."""

    def __init__(self, dim, hidden, activation="gelu"):
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(dim, hidden * (2 if activation == "swiglu" else 1))
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        x = self.fc1(x)
        if self.activation == "swiglu":
            gate, x = x.chunk(2, -1)
            return self.fc2(F.silu(gate) * x)
        return self.fc2(F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x):
        return x * self.gamma


class ViTBlock(nn.Module):
    def __init__(self, dim, num_heads, hidden, activation, layer_scale):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, num_heads), MLP(dim, hidden, activation)
        self.ls1, self.ls2 = (LayerScale(dim) if layer_scale else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


NORMALIZATION = dict(imagenet=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), half=((0.5,) * 3, (0.5,) * 3))    # torchvision; SigLIP's processor


class ViT(nn.Module):
    """The vision transformer of DINO, DINOv2 (with or without registers), SigLIP2, MAE; with `stem` the toy's, whose patches are
    embedded by strided convolutions ("Early Convolutions Help Transformers See Better", arXiv 2106.14881).

    vit(images [B, 3, H, W] in [-1, 1], layers=(0, 12, -1), cls=False) -> one [B, N, D] per layer: 0 is the embedding before the first
    block, i the output of block i, -1 the last block's after the final norm; patch tokens row-major (cls=True: the class token first).
    H and W may be any multiples of the patch size: positions are resized bicubically. It normalises but does not resize: see `resize`.
    """

    def __init__(self, image_size=32, patch_size=8, embed_dim=128, depth=3, num_heads=4, mlp_hidden=512, activation="gelu", class_token=True,
                 class_position=True, registers=0, layer_scale=False, normalize="imagenet", interpolation="bilinear", antialias=False, stem=0):
        super().__init__()
        self.config = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        self.image_size, self.patch_size, self.embed_dim, self.depth = image_size, patch_size, embed_dim, depth
        self.interpolation, self.antialias = interpolation, antialias
        if stem:
            width = [3, stem, 2 * stem, 4 * stem]
            self.patch_embed = nn.ModuleDict(dict(
                convs=nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in zip(width, width[1:])),
                norms=nn.ModuleList(nn.BatchNorm2d(b) for b in width[1:]), proj=nn.Conv2d(width[-1], embed_dim, 1)))
            if patch_size != 2 ** (len(width) - 1):
                raise UserError(f"a stem of {len(width) - 1} strided convolutions makes patches of {2 ** (len(width) - 1)}, not {patch_size}")
        else:
            self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, embed_dim, patch_size, patch_size)))
        self.level0_dim = stem * (patch_size // 2) ** 2 if stem else embed_dim
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02) if class_token else None
        self.register_tokens = nn.Parameter(torch.randn(1, registers, embed_dim) * 0.02) if registers else None
        self.class_position = class_token and class_position
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2 + self.class_position, embed_dim) * 0.02)
        self.blocks = nn.ModuleList(ViTBlock(embed_dim, num_heads, mlp_hidden, activation, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZATION[normalize])
        self.register_buffer("input_scale", 0.5 / std, persistent=False)      # ((x / 2 + 1 / 2) - mean) / std in one pass
        self.register_buffer("input_shift", (0.5 - mean) / std, persistent=False)

    def resize(self, images, size=None, scale=None):
        """To `size` (height, width), by `scale`, or to the model's own size, with its own interpolation; antialiased only when shrinking."""
        size = size or ([round(side * scale) for side in images.shape[-2:]] if scale else (self.image_size, self.image_size))
        if tuple(images.shape[-2:]) == tuple(size):
            return images
        return F.interpolate(images, size, mode=self.interpolation, align_corners=False, antialias=size[0] < images.shape[-2])

    def positions(self, h, w):
        n = self.pos_embed.shape[1] - self.class_position
        side = math.isqrt(n)
        if (side, side) == (h, w):
            return self.pos_embed
        grid = self.pos_embed[:, -n:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (h, w), mode="bicubic", align_corners=False, antialias=self.antialias).flatten(2).transpose(1, 2)
        return torch.cat([self.pos_embed[:, :-n], grid], 1)

    def forward(self, images, layers=(-1,), cls=False):
        x = images * self.input_scale + self.input_shift
        h, w = (side // self.patch_size for side in x.shape[-2:])
        raw = None
        if "convs" in self.patch_embed:
            for i, (conv, norm) in enumerate(zip(self.patch_embed["convs"], self.patch_embed["norms"])):
                x = conv(x)
                raw = x if i == 0 else raw       # before any norm or activation: it still holds the pixels
                x = F.gelu(norm(x))
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        positions = self.positions(h, w)
        extra = 0
        if self.cls_token is not None:
            token = self.cls_token + positions[:, :1] if self.class_position else self.cls_token
            prefix = [token] if self.register_tokens is None else [token, self.register_tokens]
            extra = sum(part.shape[1] for part in prefix)
            x = torch.cat([torch.cat(prefix, 1).expand(len(x), -1, -1), x + positions[:, self.class_position:]], 1)
        else:
            x = x + positions
        last = self.depth if -1 in layers else max(layers)
        states = {0: x} if 0 in layers else {}
        for i, block in enumerate(self.blocks[:last], 1):
            x = block(x)
            if i in layers:
                states[i] = x
        if -1 in layers:
            states[-1] = self.norm(x)
        if cls:                                  # without registers; a model without a class token has none to keep
            return [torch.cat([states[i][:, :1], states[i][:, extra:]], 1) if extra > 1 else states[i] for i in layers]
        level0 = None if 0 not in layers else states[0][:, extra:] if raw is None else F.pixel_unshuffle(raw, self.patch_size // 2).flatten(2).transpose(1, 2)
        return [level0 if i == 0 else states[i][:, extra:] for i in layers]


def vit_configs():
    """name -> (where the official weights are, ViT arguments). DINO, DINOv2: Meta's files; SigLIP2 and MAE: Hugging Face's."""
    sizes = dict(s=(384, 12, 6, 1536), b=(768, 12, 12, 3072), l=(1024, 24, 16, 4096), g=(1536, 40, 24, 4096), so400m=(1152, 27, 16, 4304))
    base = lambda size: dict(zip(("embed_dim", "depth", "num_heads", "mlp_hidden"), sizes[size]))
    table = {"dino_vits16": ("https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
                             dict(base("s"), image_size=224, patch_size=16, interpolation="bicubic"))}
    for size in "sblg":
        for suffix, file, registers in (("", "pretrain", 0), ("_reg", "reg4_pretrain", 4)):
            name = f"dinov2_vit{size}14"
            table[name + suffix] = (f"https://dl.fbaipublicfiles.com/dinov2/{name}/{name}_{file}.pth", dict(
                base(size), image_size=518, patch_size=14, registers=registers, antialias=registers > 0, layer_scale=True, interpolation="bicubic",
                activation="swiglu" if size == "g" else "gelu"))
    for size, word, patch, sides in (("b", "base", 16, (224, 256, 384, 512)), ("l", "large", 16, (256, 384, 512)),
                                     ("so400m", "so400m", 14, (224, 384)), ("so400m", "so400m", 16, (256, 384, 512))):
        for side in sides:
            name = f"siglip2-{word}-patch{patch}-{side}"
            table[name] = (f"https://huggingface.co/google/{name}/resolve/main/model.safetensors", dict(
                base(size), image_size=side // patch * patch, patch_size=patch, class_token=False, normalize="half", activation="gelu_tanh"))
    for size, word in (("b", "base"), ("l", "large")):
        table[f"mae_vit{size}16"] = (f"https://huggingface.co/facebook/vit-mae-{word}/resolve/main/model.safetensors",
                                     dict(base(size), image_size=224, patch_size=16))
    return table


VFMS = vit_configs()
VIT_KEYS = [      # Hugging Face's (SigLIP, DINOv2, ViT-MAE) and timm's names -> DINOv2's own, which are the ViT's
    (r"^(?:.*\.)?vision_model\.|^(?:module|backbone|vit|dinov2(?:_with_registers)?|model)\.", ""),
    (r"^embeddings\.patch_embedding(?:s\.projection)?\.", "patch_embed.proj."), (r"^embeddings\.position_embeddings?(?:\.weight)?$", "pos_embed"),
    (r"^embeddings\.(cls_token|register_tokens|mask_token)$", r"\1"), (r"^reg_token$", "register_tokens"),
    (r"^encoder\.layers?\.", "blocks."), (r"\.(?:layer_norm|layernorm_)(?:1|before)\.", ".norm1."), (r"\.(?:layer_norm|layernorm_)(?:2|after)\.", ".norm2."),
    (r"\.(?:self_attn\.(q|k|v)_proj|attention\.attention\.(q)uery|attention\.attention\.(k)ey|attention\.attention\.(v)alue)\.", r".attn.\1\2\3\4."),
    (r"\.(?:self_attn\.out_proj|attention\.output\.dense)\.", ".attn.proj."), (r"\.(?:intermediate\.dense|mlp\.w12|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"(?<!attention)\.(?:output\.dense|mlp\.w3|mlp\.weights_out)\.", ".mlp.fc2."), (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^(?:post_)?layernorm\.", "norm.")]
VIT_UNUSED = (r"mask_token", r"(head|decoder|text_model|attn_pool|fc_norm|pooler|last_layer|classifier)\b", r"logit_", r"embeddings\.position_ids")


def to_vit_keys(state):
    """A public ViT's state dict under the names of `ViT`; separate q, k, v are joined, what a ViT does not need is dropped."""
    renamed = {}
    for key, value in state.items():
        for pattern, name in VIT_KEYS:
            key = re.sub(pattern, name, key)
        if not any(re.match(pattern, key) for pattern in VIT_UNUSED):
            renamed[key] = value
    for key in [key for key in renamed if ".attn.q." in key]:
        parts = [renamed.pop(key.replace(".attn.q.", f".attn.{part}."), None) for part in "qkv"]
        if any(part is None for part in parts):
            raise UserError(f"the weights have {key}, but not the k and v beside it")
        renamed[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    if renamed.get("pos_embed", torch.empty(1, 1, 1)).dim() == 2:
        renamed["pos_embed"] = renamed["pos_embed"][None]
    return renamed


def vit_config(state):
    """The ViT arguments that a state dict (in the ViT's names) shows, and for the rest the published model of that family."""
    if not {"pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight"} <= state.keys():
        raise UserError("these weights are not a vision transformer's (no pos_embed, patch_embed.proj, blocks)")
    width, cls = state["pos_embed"].shape[-1], "cls_token" in state
    n, scale = state["pos_embed"].shape[1], "blocks.0.ls1.gamma" in state
    patch, registers = state["patch_embed.proj.weight"].shape[-1], state["register_tokens"].shape[1] if "register_tokens" in state else 0
    class_position = cls and math.isqrt(n) ** 2 != n
    hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
    swiglu = state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * hidden
    return dict(image_size=math.isqrt(n - class_position) * patch, patch_size=patch, embed_dim=width, num_heads=16 if width == 1152 else max(1, width // 64),
                depth=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")), mlp_hidden=hidden,
                activation="swiglu" if swiglu else "gelu" if cls else "gelu_tanh", class_token=cls, class_position=class_position, registers=registers,
                layer_scale=scale, normalize="imagenet" if cls else "half", interpolation="bicubic" if scale else "bilinear", antialias=registers > 0)


def load_vfm(name_or_path, out="out", pretrained=True, **overrides):
    """A frozen ViT in eval mode: "toy" (trained the first time it is needed, cached under `out`), a name in VFMS (the official file,
    fetched once) or a path to such a file. `overrides` are ViT arguments that a state dict does not show (`num_heads`, say).
    Raises UserError for an unknown name, a file that cannot be read, and missing or left-over keys."""
    name = str(name_or_path)
    if name in TOY_VFMS:
        state = train_toy_vfm(name, out)["model"] if pretrained else None
        vit = ViT(**{**TOY_VIT, **overrides})
    elif not pretrained and name in VFMS:
        vit, state = ViT(**{**VFMS[name][1], **overrides}), None
    else:
        if name not in VFMS and not name.startswith("http") and not os.path.exists(name):
            raise UserError(f"no VFM {name}: neither a file nor one of {', '.join([*TOY_VFMS, *VFMS])}")
        state = load_weights(VFMS[name][0] if name in VFMS else name)
        state = to_vit_keys(state.get("teacher", state.get("model", state)))
        vit = ViT(**{**vit_config(state), **(VFMS[name][1] if name in VFMS else {}), **overrides})
    if state is not None:
        load_state(vit, state, name)
    return vit.requires_grad_(False).eval()


# The toy's VFM learns to name attributes of the shapes: "toy" all of them, as SigLIP's captions do; "toy-blind" all but the shape, so
# that it has never been told the class on which the diffusion model is conditioned (the control for that advantage).
TOY_VIT = dict(image_size=32, patch_size=8, embed_dim=128, depth=3, num_heads=4, mlp_hidden=512, stem=32)
TOY_VFMS = {"toy": ("shape", "hue", "texture", "ground", "place", "size", "turn"), "toy-blind": ("hue", "texture", "ground", "place", "size", "turn")}


def train_toy_vfm(name, out, images=96_000, batch=64, lr=1e-3):
    """The checkpoint of a toy VFM; trains it, for about a minute and a half on two cores, where `out` has none (rank 0 does, the others wait)."""
    path, world = Path(out) / f"vfm-{name}.pt", init_world()
    if world.rank == 0 and not path.exists():
        data = Shapes("train", TOY_VIT["image_size"], cache=out)
        a = data.attributes(np.arange(len(data)))
        quantise = lambda x, low, high, n: ((x - low) / (high - low) * n).clip(0, n - 1).astype(int)
        a["place"] = quantise(a["x"], -0.45, 0.45, 4) * 4 + quantise(a["y"], -0.45, 0.45, 4)
        a["size"], a["turn"] = quantise(a["scale"], 0.55, 0.8, 4), quantise(a["angle"], -0.4, 0.4, 4)
        targets = torch.from_numpy(np.stack([a[key] for key in TOY_VFMS[name]], 1))
        counts = (targets.amax(0) + 1).tolist()
        with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
            torch.manual_seed(0)
            vit = ViT(**TOY_VIT).to(world.device).train()
            heads = nn.ModuleList(nn.Linear(TOY_VIT["embed_dim"], sum(counts)) for _ in range(2)).to(world.device)      # on the class token, on the mean patch
            optimizer = torch.optim.AdamW([*vit.parameters(), *heads.parameters()], lr=lr, weight_decay=0.05)
            steps = images // batch
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
            for step in (bar := tqdm(range(steps), desc=f"training the VFM '{name}' (once)")):
                indices, _ = batch_indices(len(data), batch, 0, step)
                x = to_float(torch.from_numpy(data.images[np.sort(indices)]).to(world.device))
                y = targets[np.sort(indices)].to(world.device)
                tokens, = vit(x, cls=True)
                logits = heads[0](tokens[:, 0]), heads[1](tokens[:, 1:].mean(1))
                loss = sum(F.cross_entropy(part, y[:, i]) for l in logits for i, part in enumerate(l.split(counts, 1)))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                if step % 20 == 0:
                    right = (logits[1].split(counts, 1)[0].argmax(1) == y[:, 0]).float().mean()
                    bar.set_postfix(loss=f"{loss.item():.2f}", accuracy=f"{right.item():.2f}")
        save_checkpoint(path, kind="vfm", name=name, model=vit.cpu().state_dict())
    world.barrier()
    return load_checkpoint(path, "vfm")


# -----------------------------------------------------------------------------
# Adapters: VFM features -> moments of the latent (VFM-VAE section 3.1; AlignTok section 3)

class ProjectionAttention(nn.Module):
    """Attention that changes the width. Narrowing: heads of width d_in / num_heads are averaged, then pooled to d_out if need be;
    otherwise heads of width d_out / num_heads are concatenated."""

    def __init__(self, d_in, d_out, num_heads):
        super().__init__()
        self.num_heads, self.d_out, self.narrow = num_heads, d_out, d_in > d_out
        inner = max(d_in, d_out)
        if inner % num_heads:
            raise ValueError(f"{num_heads} attention heads do not divide {inner} channels")
        self.qkv = nn.Linear(d_in, 3 * inner, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(inner)), nn.Parameter(torch.zeros(inner))
        self.proj = nn.Linear(d_out, d_out)

    def forward(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)                     # [B, heads, N, width]
        x = x.mean(1) if self.narrow else x.transpose(1, 2).flatten(2)
        return self.proj(x if x.shape[-1] == self.d_out else F.adaptive_avg_pool1d(x, self.d_out))


class GatedMLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.w0, self.w1, self.w2 = nn.Linear(dim, 2 * dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        x = self.norm(x)
        return self.w2(F.gelu(self.w0(x), approximate="tanh") * self.w1(x))


class AttnProjection(nn.Module):
    """Tokens [B, N, d_in] -> [B, N, d_out]: y = W_p LN3(x) + Attn(LN1(x)), then y + MLP(LN2(y))."""

    def __init__(self, d_in, d_out, num_heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d_in), nn.LayerNorm(d_out), nn.LayerNorm(d_in)
        self.attn, self.proj, self.mlp = ProjectionAttention(d_in, d_out, num_heads), nn.Linear(d_in, d_out), GatedMLP(d_out)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x):
        x = self.proj(self.norm3(x)) + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LevelAdapter(nn.Module):
    """VFM-VAE's: each level D_i -> d_i, space to depth onto the latent grid, concatenated, -> 2 C moments."""

    def __init__(self, in_dims, level_dims, fold, z_dim):
        super().__init__()
        self.levels = nn.ModuleList(AttnProjection(D, d, max(1, D // d)) for D, d in zip(in_dims, level_dims))
        self.fold, fused = fold, sum(level_dims) * fold ** 2
        self.fuse = AttnProjection(fused, 2 * z_dim, max(1, fused // (2 * z_dim)))

    def forward(self, features, grid):
        x = torch.cat([level(tokens) for level, tokens in zip(self.levels, features)], 2).transpose(1, 2)
        x = F.pixel_unshuffle(x.unflatten(2, [side * self.fold for side in grid]), self.fold).flatten(2)
        return self.fuse(x.transpose(1, 2)).transpose(1, 2).unflatten(2, grid)

    def last_weight(self):               # at which VFM-VAE compares gradients
        return self.fuse.mlp.w2.weight


class PointwiseAdapter(nn.Module):
    """AlignTok's, as light as its paper says; its form is ours: LayerNorm, two pointwise linear layers with SiLU between."""

    def __init__(self, in_dim, hidden, z_dim):
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, hidden), nn.SiLU(), nn.Linear(hidden, 2 * z_dim))

    def forward(self, features, grid):
        return self.net(features[-1]).transpose(1, 2).unflatten(2, grid)

    def last_weight(self):
        return self.net[-1].weight


# -----------------------------------------------------------------------------
# VFM-VAE's decoder: style, multi-scale latent fusion, progressive resolution reconstruction (section 3.2)

def group_norm(channels, most):
    return nn.GroupNorm(min(32, most), channels)


class EqualLinear(nn.Module):
    """StyleGAN's linear layer: the weight is used as W * lr_mul / sqrt(in), the bias as b * lr_mul (arXiv 1812.04948, appendix C)."""

    def __init__(self, d_in, d_out, lr_mul=1.0, bias_init=0.0):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d_out, d_in) / lr_mul), nn.Parameter(torch.full((d_out,), bias_init / lr_mul))
        self.weight_gain, self.bias_gain = lr_mul / math.sqrt(d_in), lr_mul

    def forward(self, x):
        return F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)


class Style(nn.Module):
    """The affine map of w to a scale for each input channel, m1 * m2 + m3: [B, w_dim] -> [B, C]."""

    def __init__(self, w_dim, channels):
        super().__init__()
        self.affine = EqualLinear(w_dim, 3 * channels, bias_init=1.0)

    def forward(self, w):
        m1, m2, m3 = self.affine(w).chunk(3, 1)
        return m1 * m2 + m3


class LatentFusion(nn.Module):
    """The decompressed latent at a block's input resolution: `fold` > 1 folds space to depth first, `unfold` > 1 unfolds depth to space."""

    def __init__(self, z_dim, dim, fold=1, unfold=1):
        super().__init__()
        folded, wide = z_dim * fold ** 2, dim * unfold ** 2
        self.fold, self.unfold = fold, unfold
        self.depthwise = nn.Conv2d(folded, folded, 3, padding=1, groups=folded, bias=False)
        self.pointwise1, self.norm1 = nn.Conv2d(folded, wide, 1, bias=False), group_norm(wide, wide)
        self.pointwise2, self.norm2 = nn.Conv2d(dim, dim, 1, bias=False), group_norm(dim, dim)

    def forward(self, z):
        x = F.pixel_unshuffle(z, self.fold) if self.fold > 1 else z
        x = F.leaky_relu(self.norm1(self.pointwise1(self.depthwise(x))), 0.2)
        return self.norm2(self.pointwise2(F.pixel_shuffle(x, self.unfold) if self.unfold > 1 else x))


class Upsample(nn.Module):
    """GroupNorm, depthwise 3x3, pointwise to four times the channels, depth to space, fixed blur. Block 0 normalises after the shuffle."""

    def __init__(self, d_in, d_out, index):
        super().__init__()
        self.norm_first = index > 0
        normed = d_in if self.norm_first else d_out
        self.norm = group_norm(normed, normed // 4)
        self.depthwise = nn.Conv2d(d_in, d_in, 3, padding=1, groups=d_in, bias=False)
        self.pointwise = nn.Conv2d(d_in, 4 * d_out, 1, bias=False)
        row = torch.tensor([1.0, 2, 1] if index <= 2 else [1.0, 4, 6, 4, 1])
        kernel = row[:, None] * row
        self.register_buffer("blur", (kernel / kernel.sum()).expand(d_out, 1, -1, -1).contiguous(), persistent=False)

    def forward(self, x):
        x = self.norm(x) if self.norm_first else x
        x = F.pixel_shuffle(self.pointwise(self.depthwise(x)), 2)
        x = x if self.norm_first else self.norm(x)
        return F.conv2d(F.pad(x, [self.blur.shape[-1] // 2] * 4, mode="replicate"), self.blur, groups=len(self.blur))


class ConvNeXtLayer(nn.Module):
    """ConvNeXt with a modulated first pointwise layer. A sample's weights W * s / sqrt(sum (W s)^2) are never formed: s scales the
    layer's input, in the one pass that also applies the GroupNorm's affine; the demodulation scales its output, in the pass that adds the bias."""

    def __init__(self, dim, kernel, w_dim, noise_size=0):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        if noise_size:                   # checkpoints from before October 2025 add a stored noise map
            self.noise_strength = nn.Parameter(torch.zeros([]))
            self.register_buffer("noise_const", torch.randn(noise_size, noise_size))
        self.noise_size = noise_size
        self.norm = group_norm(dim, dim // 4)
        self.style = Style(w_dim, dim)
        self.pwconv1, self.pwconv2 = nn.Conv2d(dim, 4 * dim, 1), nn.Conv2d(4 * dim, dim, 1)
        self.gamma = nn.Parameter(torch.full((dim, 1, 1), 1e-5))

    def forward(self, x, w):
        s, weight = self.style(w), self.pwconv1.weight
        demodulation = torch.rsqrt(F.linear(s.square(), weight.flatten(1).square()) + 1e-8)
        y = self.dwconv(x)
        if self.noise_size:
            noise = self.noise_const[None, None]
            if noise.shape[-2:] != y.shape[-2:]:
                noise = F.interpolate(noise, y.shape[-2:], mode="bilinear", align_corners=False)
            y = y + noise * self.noise_strength
        y = F.group_norm(y, self.norm.num_groups, eps=self.norm.eps)
        y = torch.addcmul((self.norm.bias * s)[..., None, None], y, (self.norm.weight * s)[..., None, None])
        y = F.conv2d(y, weight)
        y = F.gelu(torch.addcmul(self.pwconv1.bias[:, None, None], y, demodulation[..., None, None]))
        return torch.addcmul(x, self.pwconv2(y), self.gamma)


class ChannelNorm(nn.Module):
    """RMSNorm over channels: unit length times sqrt(C) * gamma."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x):
        return F.normalize(x, dim=1) * (self.gamma * len(self.gamma) ** 0.5)


class DecoderAttention(nn.Module):
    """Self-attention over positions with one learned null key and value, then a pointwise MLP; both are residual and start at zero."""

    def __init__(self, dim, num_heads=8):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} attention heads do not divide {dim} channels")
        self.num_heads = num_heads
        self.norm = ChannelNorm(dim)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Conv2d(dim, dim, 1, bias=False) for _ in range(4))
        self.null_kv = nn.Parameter(torch.randn(2, num_heads, dim // num_heads))
        self.ff = nn.Sequential(ChannelNorm(dim), nn.Conv2d(dim, 4 * dim, 1), nn.GELU(), nn.Conv2d(4 * dim, dim, 1))
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.ff[3].weight)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3) for layer in (self.to_q, self.to_k, self.to_v))
        null_k, null_v = self.null_kv.to(k.dtype)[:, None, :, None].expand(-1, len(x), -1, -1, -1)
        y = F.scaled_dot_product_attention(q, torch.cat([null_k, k], 2), torch.cat([null_v, v], 2))
        x = x + self.to_out(y.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:]))
        return x + self.ff(x)


class ToRGB(nn.Module):
    """Modulated pointwise layer to three channels, without demodulation."""

    def __init__(self, dim, w_dim):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, dim, 1, 1)), nn.Parameter(torch.zeros(3))
        self.style = Style(w_dim, dim)

    def forward(self, x, w):
        return F.conv2d(x * (self.style(w) / self.weight.shape[1] ** 0.5)[..., None, None], self.weight, self.bias)


class DecoderBlock(nn.Module):
    def __init__(self, index, d_in, dim, w_dim, layers, attentions, sum_in=0, noise_size=0):
        super().__init__()
        self.upsample = Upsample(d_in, dim, index)
        self.convs = nn.ModuleList(ConvNeXtLayer(dim, 5 if index <= 1 else 7, w_dim, noise_size) for _ in range(layers))
        self.attns = nn.ModuleList(DecoderAttention(dim) for _ in range(attentions))
        self.upsample_sum = Upsample(sum_in, dim, index) if sum_in else None
        self.to_rgb = ToRGB(dim, w_dim)


class VFMVAEDecoder(nn.Module):
    """Latents [B, C, h, w] -> images, as a list from the coarsest to the finest (`scales=True`) or the finest alone.

    `widths`: channels of the blocks, each of which doubles the resolution up to h * downsample; `fuse_dims`: channels of the latent
    fused into the first blocks' inputs; `attention`: self-attentions after the first blocks.
    """

    def __init__(self, z_dim=32, downsample=16, post_factor=16, widths=(512, 512, 512, 512, 256, 128), fuse_dims=(512, 256, 128, 128),
                 attention=(2, 2, 2), num_res_blocks=2, w_dim=512, noise_sizes=()):
        super().__init__()
        dim = post_factor * z_dim
        self.post_quant = AttnProjection(z_dim, dim, post_factor)
        self.mapping = nn.Sequential(EqualLinear(dim, dim, 0.01), nn.LeakyReLU(0.2), EqualLinear(dim, w_dim, 0.01))
        self.fusions, self.blocks = nn.ModuleList(), nn.ModuleList()
        self.granularity = 2 ** len(widths) // downsample         # the latent grid must be a multiple of it
        if not self.granularity:
            raise UserError(f"{len(widths)} decoder blocks cannot double their way to {downsample} times the latents; see --widths, --downsample")
        for i, width in enumerate(widths):
            fused = fuse_dims[i] if i < len(fuse_dims) else 0
            if fused:
                fold, unfold = max(1, self.granularity >> i), max(1, (downsample << i) >> len(widths))
                self.fusions.append(LatentFusion(dim, fused, fold, unfold))
            self.blocks.append(DecoderBlock(i, (widths[i - 1] if i else 0) + fused, width, w_dim, 1 + num_res_blocks * (3 if i <= 3 else 2),
                                            attention[i] if i < len(attention) else 0, widths[i - 1] if i else 0, noise_sizes[i] if noise_sizes else 0))

    def decompress(self, z):
        """-> decompressed latent [B, post_factor * C, h, w], style w [B, w_dim]"""
        h = self.post_quant(z.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, z.shape[2:])
        pooled = h.mean((2, 3))
        return h, self.mapping(pooled * torch.rsqrt(pooled.square().mean(1, keepdim=True) + 1e-8))

    def forward(self, z, scales=False):
        sums, w = self.body(z, scales)
        outputs = [block.to_rgb(x, w) for block, x in zip(self.blocks[-len(sums):], sums)]
        return outputs if scales else outputs[-1]

    def body(self, z, scales):
        h, w = self.decompress(z)
        x = x_sum = None
        sums = []
        for i, block in enumerate(self.blocks):
            if i < len(self.fusions):
                fused = self.fusions[i](h)
                x = fused if x is None else torch.cat([x, fused], 1)
            x = block.upsample(x)
            for conv in block.convs:
                x = conv(x, w)
            for attn in block.attns:
                x = attn(x)
            x_sum = x if x_sum is None else block.upsample_sum(x_sum) + x
            if scales or i == len(self.blocks) - 1:
                sums.append(x_sum)
        return sums, w

    def last_weight(self):
        return self.blocks[-1].to_rgb.weight


# -----------------------------------------------------------------------------
# The autoencoder of latent diffusion (arXiv 2112.10752): AlignTok's decoder; both halves in the plain VAE and VA-VAE. LDM's key names

def ldm_norm(channels, groups):
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, d_in, d_out, groups):
        super().__init__()
        self.norm1, self.conv1 = ldm_norm(d_in, groups), nn.Conv2d(d_in, d_out, 3, padding=1)
        self.norm2, self.conv2 = ldm_norm(d_out, groups), nn.Conv2d(d_out, d_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(d_in, d_out, 1) if d_in != d_out else nn.Identity()

    def forward(self, x):
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class AttnBlock(nn.Module):
    def __init__(self, dim, groups):
        super().__init__()
        self.norm = ldm_norm(dim, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(dim, dim, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


class Resample(nn.Module):
    """Half the size by a strided 3x3 that pads on the right and below, or twice the size by nearest neighbour and a 3x3."""

    def __init__(self, dim, up):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(dim, dim, 3, padding=1) if up else nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1)))


def ldm_level(d_in, d_out, blocks, groups, attention, resample, up):
    level = nn.ModuleDict(dict(block=nn.ModuleList(ResBlock(d_in if i == 0 else d_out, d_out, groups) for i in range(blocks)),
                               attn=nn.ModuleList(AttnBlock(d_out, groups) for _ in range(blocks if attention else 0))))
    if resample:
        level["upsample" if up else "downsample"] = Resample(d_out, up)
    return level


def ldm_middle(dim, groups):
    return nn.ModuleDict(dict(block_1=ResBlock(dim, dim, groups), attn_1=AttnBlock(dim, groups), block_2=ResBlock(dim, dim, groups)))


def run_level(level, x):
    for i, block in enumerate(level["block"]):
        x = block(x)
        if len(level["attn"]):
            x = level["attn"][i](x)
    return x


def run_middle(middle, x):
    return middle["block_2"](middle["attn_1"](middle["block_1"](x)))


class LDMEncoder(nn.Module):
    """Images [B, 3, H, W] -> moments [B, 2 C, H/f, W/f], f = 2^(levels - 1)."""

    def __init__(self, z_dim=32, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_levels=(4,), z_channels=None, groups=32):
        super().__init__()
        z_channels, widths = z_channels or z_dim, [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList(ldm_level(widths[i - 1] if i else ch, width, num_res_blocks, groups, i in attn_levels, i < len(widths) - 1, up=False)
                                  for i, width in enumerate(widths))
        self.mid = ldm_middle(widths[-1], groups)
        self.norm_out, self.conv_out = ldm_norm(widths[-1], groups), nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_dim, 1)

    def body(self, images):
        x = self.conv_in(images)
        for level in self.down:
            x = run_level(level, x)
            x = level["downsample"](x) if "downsample" in level else x
        return self.conv_out(F.silu(self.norm_out(run_middle(self.mid, x))))

    def forward(self, images, grid=None):
        return self.quant_conv(self.body(images))

    def last_weight(self):
        return self.quant_conv.weight


class LDMDecoder(nn.Module):
    """Latents [B, C, h, w] -> images [B, 3, h f, w f]."""
    granularity = 1

    def __init__(self, z_dim=32, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_levels=(4,), z_channels=None, groups=32):
        super().__init__()
        z_channels, widths = z_channels or z_dim, [ch * m for m in ch_mult]
        self.post_quant_conv = nn.Conv2d(z_dim, z_channels, 1)
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = ldm_middle(widths[-1], groups)
        self.up = nn.ModuleList(ldm_level(widths[min(i + 1, len(widths) - 1)], width, num_res_blocks + 1, groups, i in attn_levels, i > 0, up=True)
                                for i, width in enumerate(widths))
        self.norm_out, self.conv_out = ldm_norm(widths[0], groups), nn.Conv2d(widths[0], 3, 3, padding=1)

    def body(self, z):
        x = run_middle(self.mid, self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):
            x = run_level(level, x)
            x = level["upsample"](x) if "upsample" in level else x
        return F.silu(self.norm_out(x))

    def forward(self, z, scales=False):
        x = self.conv_out(self.body(z))
        return [x] if scales else x

    def last_weight(self):
        return self.conv_out.weight


# -----------------------------------------------------------------------------
# The tokenizer

class Tokenizer(nn.Module):
    """encode: images [B, 3, H, W] in [-1, 1] -> mean, logvar [B, C, H/f, W/f];  decode: latents -> images.

    The encoder is a VFM and an adapter ("levels": VFM-VAE, "pointwise": AlignTok) or LDM's convolutions; the decoder is VFM-VAE's or
    LDM's; each argument is the dictionary of its module's arguments. H and W: any multiples of f times the decoder's granularity that
    the VFM's patches divide after scaling. `arch` rebuilds the model: Tokenizer(**arch).
    """

    def __init__(self, resolution=256, downsample=16, z_dim=32, vfm=None, layers=(0, 12, -1), scale_factor=2.0, level_dims=None, adapter_hidden=0,
                 encoder=None, decoder=None, decoder_kind="vfmvae", vf_dim=0):
        super().__init__()
        self.arch = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        self.resolution, self.downsample, self.z_dim, self.layers, self.scale_factor = resolution, downsample, z_dim, tuple(layers), scale_factor
        self.vfm = ViT(**vfm).eval() if vfm else None        # the toy's stem has BatchNorms: their statistics stay as they are, also while the VFM is trained
        if vfm and not all(-1 <= i <= self.vfm.depth for i in layers):
            raise UserError(f"layers {','.join(map(str, layers))}: this VFM has blocks 1 to {self.vfm.depth} (0: the embedding, -1: the normalised last)")
        fold = downsample * scale_factor / self.vfm.patch_size if vfm else 1
        if fold < 1 or fold != round(fold) or fold > 1 and not level_dims:
            raise UserError(f"the VFM's tokens are {fold:g} times as fine as the latents: AlignTok's adapter takes 1, VFM-VAE's 1, 2, 3, ...; "
                            "see --scale_factor, --downsample")
        if vfm and level_dims:
            self.adapter = LevelAdapter([self.vfm.level0_dim if i == 0 else self.vfm.embed_dim for i in layers], level_dims, round(fold), z_dim)
        elif vfm:
            self.adapter = PointwiseAdapter(self.vfm.embed_dim, adapter_hidden or self.vfm.embed_dim, z_dim)
        else:
            self.adapter = LDMEncoder(z_dim, **(encoder or {}))
        self.decoder = VFMVAEDecoder(z_dim, downsample, **(decoder or {})) if decoder_kind == "vfmvae" else LDMDecoder(z_dim, **(decoder or {}))
        self.vf_proj = nn.Conv2d(z_dim, vf_dim, 1, bias=False) if vf_dim else None      # VFM-VAE's and VA-VAE's, for the VF loss alone

    def features(self, images):
        """What the adapter reads: the VFM's levels, or the images themselves."""
        if self.vfm is None:
            return images
        return self.vfm(self.vfm.resize(images, scale=self.scale_factor), self.layers)

    def check_size(self, height, width):
        f = self.downsample * self.decoder.granularity
        patch = self.vfm.patch_size if self.vfm else 1
        if height % f or width % f or round(height * self.scale_factor) % patch or round(width * self.scale_factor) % patch:
            raise UserError(f"images of {height} x {width} do not fit this tokenizer: it takes multiples of {f}"
                            + (f" whose {self.scale_factor}-fold its VFM's patches of {patch} divide" if self.vfm else ""))

    def moments(self, features, height, width):
        """-> [B, 2 C, h, w]: mean and log variance before the clamp."""
        return self.adapter(features, (height // self.downsample, width // self.downsample))

    def encode(self, images):
        self.check_size(*images.shape[-2:])
        mean, logvar = self.moments(self.features(images), *images.shape[-2:]).float().chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        return self.decoder(z)


VFMVAE_KEYS = [   # the released VFM-VAE's names -> ours
    (r"^ldm_adapter\.patch_quants\.(\d+)\.0\.blocks\.0\.", r"adapter.levels.\1."), (r"^ldm_adapter\.final_quant\.blocks\.0\.", "adapter.fuse."),
    (r"^ldm_adapter\.post_quant\.blocks\.0\.", "decoder.post_quant."), (r"^ldm_adapter\.linear_proj\.", "vf_proj."),
    (r"^mapping\.mlp\.fc0\.", "decoder.mapping.0."), (r"^mapping\.mlp\.fc1\.", "decoder.mapping.2."), (r"^synthesis\.blocks\.", "decoder.blocks."),
    (r"\.seperate_upsample_conv\.", ".upsample."), (r"\.last_upsample_conv\.", ".upsample_sum."), (r"\.conv0\.", ".convs.0."),
    (r"\.convs1\.(\d+)\.", lambda match: f".convs.{int(match[1]) + 1}."), (r"\.affine_pw1\.proj\.", ".style.affine."),
    (r"\.torgb\.affine\.proj\.", ".torgb.style.affine."), (r"\.torgb\.", ".to_rgb."), (r"\.self_attns\.(\d+)\.(?:attn\.)?", r".attns.\1.")]
VFMVAE_UNUSED = (r".*\.zero_k_bias$", r".*\.blur_weight$", r"mapping\.x_avg$")


def from_vfmvae(state, num_heads=None, layers=(0, 12, -1), scale_factor=2.0, resolution=256):
    """A released VFM-VAE state dict -> (arch, state dict in our names). All widths are read from the shapes."""
    vit = {key[len("vfm_encoder.encoder."):]: value for key, value in state.items() if key.startswith("vfm_encoder.")}
    vit = to_vit_keys(vit)
    renamed = {f"vfm.{key}": value for key, value in vit.items()}
    for key, value in state.items():
        if key.startswith("vfm_encoder.") or any(re.match(pattern, key) for pattern in VFMVAE_UNUSED):
            continue
        fusion = re.match(r"synthesis\.z_convs\.(\d+)\.(\d)\.(\d)\.(\w+)", key)
        if fusion:                       # two stages, numbered 0 1, 1 2 or 0 2: depthwise, pointwise, norm; then pointwise, norm
            i, stage, part, kind = fusion.groups()
            first = f"synthesis.z_convs.{i}.{stage}.2.weight" in state
            key = f"decoder.fusions.{i}." + (("depthwise", "pointwise1", "norm1") if first else ("pointwise2", "norm2"))[int(part)] + f".{kind}"
        for pattern, name in VFMVAE_KEYS:
            key = re.sub(pattern, name, key)
        bias_like = key.endswith((".gamma", "pwconv1.bias", "to_rgb.bias"))
        renamed[key] = value.reshape(-1, *(1,) * (2 * key.endswith(".gamma"))) if bias_like else value
    try:
        shape = lambda key: tuple(renamed[key].shape)
        count = lambda prefix: len({key[len(prefix):].split(".")[0] for key in renamed if key.startswith(prefix)})
        blocks = range(count("decoder.blocks."))
        level_dims = [shape(f"adapter.levels.{i}.proj.weight")[0] for i in range(count("adapter.levels."))]
        dim, z_dim = shape("decoder.post_quant.proj.weight")
        config = vit_config(vit)
        config["num_heads"] = num_heads or config["num_heads"]
        arch = dict(resolution=resolution, z_dim=z_dim, vfm=config, layers=tuple(layers), scale_factor=scale_factor, level_dims=level_dims,
                    downsample=2 ** len(blocks) // math.isqrt(shape("decoder.fusions.0.depthwise.weight")[0] // dim),
                    vf_dim=shape("vf_proj.weight")[0] if "vf_proj.weight" in renamed else 0,
                    decoder=dict(post_factor=dim // z_dim, widths=[shape(f"decoder.blocks.{i}.convs.0.dwconv.weight")[0] for i in blocks],
                                 fuse_dims=[shape(f"decoder.fusions.{i}.pointwise2.weight")[0] for i in range(count("decoder.fusions."))],
                                 attention=[count(f"decoder.blocks.{i}.attns.") for i in blocks], num_res_blocks=(count("decoder.blocks.0.convs.") - 1) // 3,
                                 w_dim=shape("decoder.mapping.2.weight")[0],
                                 noise_sizes=[shape(key)[0] for i in blocks if (key := f"decoder.blocks.{i}.convs.0.noise_const") in renamed]))
    except KeyError as error:
        raise UserError(f"this looks like a VFM-VAE, but has no {error}")
    return arch, renamed


def from_ldm(state, resolution=256):
    """An autoencoder in LDM's format (LDM, the original SD-VAE, VA-VAE) -> (arch, state dict in our names)."""
    renamed = {}
    for key, value in state.items():
        if re.match(r"(encoder|quant_conv)\.", key):
            renamed["adapter." + key.removeprefix("encoder.")] = value
        elif re.match(r"(decoder|post_quant_conv)\.", key):
            renamed["decoder." + key.removeprefix("decoder.")] = value
        elif not re.match(r"(loss|foundation_model|linear_proj|model_ema|logvar)\b", key):
            renamed[key] = value         # left over: load_state says so
    try:
        ch = renamed["adapter.conv_in.weight"].shape[0]
        levels = sorted({int(key.split(".")[2]) for key in renamed if key.startswith("adapter.down.")})
        parts = dict(ch=ch, ch_mult=[renamed[f"adapter.down.{i}.block.0.conv2.weight"].shape[0] // ch for i in levels],
                     num_res_blocks=len({key.split(".")[4] for key in renamed if key.startswith("adapter.down.0.block.")}),
                     attn_levels=[i for i in levels if f"adapter.down.{i}.attn.0.norm.weight" in renamed],
                     z_channels=renamed["decoder.post_quant_conv.weight"].shape[0])
        return dict(resolution=resolution, downsample=2 ** (len(levels) - 1), z_dim=renamed["decoder.post_quant_conv.weight"].shape[1], scale_factor=1.0,
                    encoder=parts, decoder=parts, decoder_kind="ldm"), renamed
    except KeyError as error:
        raise UserError(f"this looks like an LDM autoencoder, but has no {error}")


def load_tokenizer(path, **overrides):
    """A frozen Tokenizer in eval mode, EMA weights where there are any, from a checkpoint of ours, an official VFM-VAE ({"G_ema": ...} or
    a bare state dict) or a file in LDM's format (VA-VAE, SD-VAE; `state_dict` inside): told apart by their keys. What shapes do not show
    has the published model's value and can be overridden: num_heads (the VFM's), layers, scale_factor, resolution.
    `tokenizer.about` holds what else a checkpoint of ours says (config, classes, images, stage).
    Raises UserError for a missing or damaged file, another kind of file, missing or left-over keys."""
    entries = load_weights(path)
    if not isinstance(entries, dict):
        raise UserError(f"{path} holds no state dict")
    if "kind" in entries:
        if entries["kind"] != "tokenizer":
            raise UserError(f"{path} is a {entries['kind']} checkpoint, not a tokenizer")
        arch, state = entries["arch"], {**entries["model"], **entries["ema"]}
        if "num_heads" in overrides:
            arch["vfm"]["num_heads"] = overrides.pop("num_heads")
        arch.update(overrides)
    else:
        state = entries.get("G_ema", entries.get("state_dict", entries))
        state = {key.removeprefix("module."): value for key, value in state.items()} if isinstance(state, dict) else {}
        if any(key.startswith("ldm_adapter.") for key in state):
            arch, state = from_vfmvae(state, **overrides)
        elif "post_quant_conv.weight" in state:
            arch, state = from_ldm(state, **overrides)
        else:
            raise UserError(f"{path} is not a tokenizer: it has neither VFM-VAE's keys (ldm_adapter.*) nor LDM's (post_quant_conv.*)")
    tokenizer = load_state(Tokenizer(**arch), state, str(path)).requires_grad_(False).eval()
    tokenizer.about = {key: value for key, value in entries.items() if key in ("config", "classes", "images", "stage", "pair")} if "kind" in entries else {}
    return tokenizer


# -----------------------------------------------------------------------------
# Losses

def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images in [-1, 1] -> [B]."""
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1).clamp_min(1e-10))


def ssim(a, b, data_range=1):
    """Structural similarity of images in [-1, 1] -> [B]: Gaussian window 11 (or the image), sigma 1.5, valid positions (Wang et al. 2004).
    Evaluated on [0, 1] with data range 1, as metrics do, or with `data_range=2` on [-1, 1], as VFM-VAE's loss does: means matter to it."""
    if data_range == 1:
        a, b = a / 2 + 0.5, b / 2 + 0.5
    size = min(11, *a.shape[-2:])
    row = torch.exp(-(torch.arange(size, device=a.device) - (size - 1) / 2).square() / (2 * 1.5 ** 2))
    row = (row / row.sum()).expand(5 * a.shape[1], 1, 1, -1)
    c = a.shape[1]
    x = torch.cat([a, b, a * a, b * b, a * b], 1).float()
    x = F.conv2d(F.conv2d(x, row, groups=5 * c), row.transpose(2, 3), groups=5 * c)
    ma, mb, aa, bb, ab = x.split(c, 1)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    value = (2 * ma * mb + c1) * (2 * (ab - ma * mb) + c2) / ((ma * ma + mb * mb + c1) * (aa - ma * ma + bb - mb * mb + c2))
    return value.flatten(1).mean(1)


LPIPS_URLS = ("https://download.pytorch.org/models/vgg16-397923af.pth",
              "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth")


class LPIPS(nn.Module):
    """lpips(a, b) of images in [-1, 1] -> [B]: LPIPS v0.1 on VGG16 (Zhang et al., arXiv 1801.03924).

    `weights`: one or two comma-separated files that hold torchvision's VGG16 (`features.*`) and the published linear layers
    (`lin0.model.1.weight`, ...); empty: both public files, fetched once; None: random weights.
    """
    SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))      # the convolutions of VGG16.features, up to each ReLU that is compared
    WIDTHS = (64, 128, 256, 512, 512)

    def __init__(self, weights=""):
        super().__init__()
        self.features, d_in = nn.ModuleDict(), 3
        for layers, width in zip(self.SLICES, self.WIDTHS):
            for i in layers:
                self.features[str(i)] = nn.Conv2d(d_in, width, 3, padding=1)
                d_in = width
        self.lins = nn.ParameterList(torch.rand(1, width, 1, 1) for width in self.WIDTHS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        if weights is not None:
            try:
                state = {key: value for file in (weights.split(",") if weights else LPIPS_URLS) for key, value in load_weights(file).items()}
            except UserError as error:
                raise UserError(f"LPIPS needs VGG16 and its linear layers: {error}; give --lpips_weights=vgg16-397923af.pth,vgg.pth")
            state = {re.sub(r"^lin(\d)\.model\.1\.weight$", r"lins.\1", key): value for key, value in state.items()}
            load_state(self, state, "LPIPS", ignore=(r"classifier\.", r"lin\d\.weight"))
        self.requires_grad_(False).eval()

    def maps(self, x):
        x, maps = (x - self.shift) / self.scale, []
        for k, layers in enumerate(self.SLICES):
            x = F.max_pool2d(x, 2) if k else x
            for i in layers:
                x = F.relu(self.features[str(i)](x))
            maps.append(F.normalize(x.float(), dim=1, eps=1e-10))
        return maps

    def forward(self, a, b):             # gradients reach a alone
        with torch.no_grad():
            targets = self.maps(b)
        return sum(((x - y).square() * lin).sum(1).mean((1, 2)) for x, y, lin in zip(self.maps(a), targets, self.lins))


class FeatureDistance(nn.Module):
    """LPIPS's formula on a frozen ViT's tokens, averaged over its blocks: the toy's perceptual distance, where no VGG is at hand (ours)."""

    def __init__(self, vit):
        super().__init__()
        self.vit, self.layers = vit, tuple(range(1, vit.depth + 1))

    def forward(self, a, b, target=None):        # target: b's features, if they are at hand
        if target is None:
            with torch.no_grad():
                target = self.vit(b, self.layers)
        pairs = zip(self.vit(a, self.layers), target)
        return sum((F.normalize(x.float(), dim=2) - F.normalize(y.float(), dim=2)).square().sum(2).mean(1) for x, y in pairs) / len(target)


def kl_loss(mean, logvar):
    """0.5 sum(mean^2 + var - 1 - logvar) over C, h, w; averaged over the batch."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def vf_loss(projected, features, margin_matrix=0.0, margin_cos=0.0):
    """VA-VAE's vision foundation model loss (arXiv 2501.01423, section 3.2): projected latents [B, D, h, w] against the VFM's tokens
    [B, N, D], pooled to the latent grid: distances of the two cosine matrices over all token pairs, plus those of the tokens."""
    side = math.isqrt(features.shape[1] * projected.shape[2] // projected.shape[3])
    target = features.detach().float().transpose(1, 2).unflatten(2, (side, -1))
    z = F.normalize(projected.float().flatten(2), dim=1)
    f = F.normalize(F.adaptive_avg_pool2d(target, projected.shape[2:]).flatten(2), dim=1)
    matrix = F.relu((z.transpose(1, 2) @ z - f.transpose(1, 2) @ f).abs() - margin_matrix).mean()
    return matrix + F.relu(1 - margin_cos - (z * f).sum(1)).mean()


class LocalBatchNorm(nn.Module):
    """BatchNorm over virtual batches of 8 samples and all positions (StyleGAN-T, arXiv 2301.09515); one batch where 8 does not divide it."""

    def __init__(self, channels, virtual=8):
        super().__init__()
        self.virtual = virtual
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):                # [B, C, ...]
        groups = len(x) // self.virtual if len(x) % self.virtual == 0 else 1
        y = x.float().unflatten(0, (groups, -1))                                # [G, samples, C, ...]
        var, mean = torch.var_mean(y, [1, *range(3, y.dim())], correction=0, keepdim=True)
        y, affine = ((y - mean) * torch.rsqrt(var + 1e-5)).flatten(0, 1), (-1, *(1,) * (x.dim() - 2))
        return torch.addcmul(self.bias.view(affine), y, self.weight.view(affine)).to(x.dtype)


def diff_augment(x):
    """DiffAugment (arXiv 2006.10738) with its colour, translation (1/8) and cutout (1/5) policies, drawn per image."""
    b, _, h, w = x.shape
    rand = lambda: torch.rand(b, 1, 1, 1, device=x.device)
    x = x + rand() - 0.5                                                                            # brightness
    x = torch.lerp(x.mean(1, keepdim=True), x, rand() * 2)                                          # saturation
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, rand() + 0.5)                                # contrast
    rows, columns = torch.arange(h, device=x.device).view(1, 1, h, 1), torch.arange(w, device=x.device).view(1, 1, 1, w)
    dy, dx = ((rand() * (2 * (side // 8) + 1)).floor() - side // 8 for side in (h, w))
    sy, sx = (rows + dy).long(), (columns + dx).long()
    inside = ((sy >= 0) & (sy < h)) & ((sx >= 0) & (sx < w))
    flat = sy.clamp(0, h - 1) * w + sx.clamp(0, w - 1)
    x = x.flatten(2).gather(2, flat.flatten(2).expand(-1, x.shape[1], -1)).view_as(x)
    cy, cx = (rand() * h).floor(), (rand() * w).floor()
    hole = ((rows - cy).abs() * 2 < h // 5) & ((columns - cx).abs() * 2 < w // 5)
    return x * (inside & ~hole)


class ProjectedDiscriminator(nn.Module):
    """Heads on the tokens of a frozen ViT (DINO ViT-S/16 in the papers), after StyleGAN-T (arXiv 2301.09515, section 3.2): logits [B, levels x N]."""

    def __init__(self, vit):
        super().__init__()
        if vit.cls_token is None:
            raise UserError("the projected discriminator needs a ViT with a class token: another --disc_vfm")
        self.vit = vit
        step = max(1, vit.depth // 4)
        self.layers = tuple(range(0, vit.depth + 1, step))
        spectral = torch.nn.utils.parametrizations.spectral_norm
        conv = lambda d_out, kernel: spectral(nn.Conv1d(vit.embed_dim, d_out, kernel, padding=kernel // 2, padding_mode="circular" if kernel > 1 else "zeros"))
        self.heads = nn.ModuleList(nn.ModuleDict(dict(
            first=nn.Sequential(conv(vit.embed_dim, 1), LocalBatchNorm(vit.embed_dim), nn.LeakyReLU(0.2)),
            residual=nn.Sequential(conv(vit.embed_dim, 9), LocalBatchNorm(vit.embed_dim), nn.LeakyReLU(0.2)), last=conv(1, 1))) for _ in self.layers)

    def forward(self, images):
        x, size = diff_augment(images), self.vit.image_size
        if min(x.shape[-2:]) >= size and torch.rand(()) < 0.5:       # a random crop, else the whole; the coin is tossed on the CPU
            top, left = (int(torch.randint(side - size + 1, ())) for side in x.shape[-2:])
            x = x[..., top:top + size, left:left + size].contiguous()
        else:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
        logits = []
        for tokens, head in zip(self.vit(x, self.layers, cls=True), self.heads):
            tokens = (tokens[:, 1:] + tokens[:, :1]).transpose(1, 2)
            y = head["first"](tokens)
            logits.append(head["last"]((y + head["residual"](y)) / math.sqrt(2)).flatten(1))
        return torch.cat(logits, 1)


class PatchGAN(nn.Module):
    """pix2pix's discriminator (arXiv 1611.07004): the outputs of all layers, the last one the logits."""

    def __init__(self, norm, ndf=64, layers=3):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, ndf, 4, 2, 1), nn.LeakyReLU(0.2))])
        for i in range(1, layers + 1):
            d_in, d_out = ndf * min(8, 2 ** (i - 1)), ndf * min(8, 2 ** i)
            self.layers.append(nn.Sequential(nn.Conv2d(d_in, d_out, 4, 2 if i < layers else 1, 1, bias=False), norm(d_out), nn.LeakyReLU(0.2)))
        self.layers.append(nn.Conv2d(ndf * min(8, 2 ** layers), 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)

    def forward(self, x):
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return outputs


class GAN(nn.Module):
    """The discriminators of a stage: `dino` (hinge, VFM-VAE), `patch` (hinge, LDM) or `multi` (three scales, least squares with feature
    matching, VFM-VAE's last stage), each with its weight in the stage's row."""

    def __init__(self, stage, vit, ndf=64, image_size=256):
        super().__init__()
        self.stage = stage
        layers = min(3, max(1, int(math.log2(image_size)) - 4))      # fewer where a coarse image would shrink to nothing
        self.dino = ProjectedDiscriminator(vit) if stage.dino else None
        self.patch = PatchGAN(nn.BatchNorm2d, ndf, layers) if stage.patch else None
        self.multi = nn.ModuleList(PatchGAN(LocalBatchNorm, ndf, layers) for _ in range(3)) if stage.multi else None

    def pyramid(self, x):
        return [x if k == 0 else F.avg_pool2d(x, 2 ** k) for k in range(3)]

    def generator_loss(self, fake, real):
        """-> a dictionary of unweighted losses, each as named in the stage's row."""
        losses = {}
        if self.dino:
            losses["dino"] = -self.dino(fake).mean()
        if self.patch:
            losses["patch"] = -self.patch(fake)[-1].mean()
        if self.multi:
            losses["multi"] = losses["matching"] = 0
            for net, x, y in zip(self.multi, self.pyramid(fake), self.pyramid(real)):
                outputs, targets = net(x), net(y)
                losses["multi"] = losses["multi"] + (outputs[-1] - 1).square().mean() / 3
                losses["matching"] = losses["matching"] + sum(F.l1_loss(a, b) for a, b in zip(outputs[:-1], targets[:-1])) * 4 / (len(outputs) - 1) / 3
        return losses

    def discriminator_loss(self, fake, real):
        loss = 0
        if self.dino:
            loss = loss + F.relu(1 - self.dino(real)).mean() + F.relu(1 + self.dino(fake)).mean()
        if self.patch:
            loss = loss + 0.5 * (F.relu(1 - self.patch(real)[-1]).mean() + F.relu(1 + self.patch(fake)[-1]).mean())
        for net, x, y in zip(self.multi or (), self.pyramid(fake), self.pyramid(real)):
            loss = loss + 0.5 / 3 * ((net(y)[-1] - 1).square().mean() + net(x)[-1].square().mean())
        return loss


def draw_equivariance(seed, step, grid, granularity):
    """VFM-VAE's equivariance regularisation for one batch, the same on all processes -> ("latent" or "image" or None, scale, quarter turns).
    With probability 0.5 the latent is scaled and rotated, otherwise with 0.25 the image is shrunk first; scales that the decoder's grid admits."""
    rng = np.random.default_rng((seed, step, 1))
    kind = "latent" if rng.uniform() < 0.5 else "image" if rng.uniform() < 0.25 else None
    scales = [s for s in (0.25, 0.5, 0.75, 1.0) if grid * s >= granularity and (grid * s) % granularity == 0 and (kind == "latent" or s < 1)]
    if kind is None or not scales:
        return None, 1.0, 0
    return kind, float(rng.choice(scales)), int(rng.integers(4)) if kind == "latent" else 0


# -----------------------------------------------------------------------------
# Training

def vfm_of(cfg):
    """(name, scale factor) of the VFM that the method uses: the configured one, or the paper's."""
    name, scale = {"vfmvae": ("siglip2-large-patch16-512", 2.0)}.get(cfg.method, ("dinov2_vitl14", 0.875))
    return cfg.vfm or name, cfg.scale_factor or scale


def build_tokenizer(cfg, pretrained=True):
    """The untrained Tokenizer of a Config, around its pretrained VFM -> (tokenizer, VF loss's VFM or None)."""
    name, scale = vfm_of(cfg)
    stages = STAGES[cfg.method]
    vf = bool(cfg.vf_scale) and any(stage.vf for stage in stages)
    vfm = load_vfm(name, cfg.out, pretrained) if vf or cfg.method in ("vfmvae", "aligntok") else None
    ldm = dict(ch=cfg.ch, ch_mult=list(cfg.ch_mult), num_res_blocks=cfg.ldm_blocks, attn_levels=[len(cfg.ch_mult) - 1] * cfg.ldm_attention, groups=cfg.groups)
    arch = dict(resolution=cfg.image_size, downsample=cfg.downsample, z_dim=cfg.z_dim, scale_factor=1.0, encoder=ldm,
                vf_dim=vfm.embed_dim if vf else 0)
    if cfg.method in ("vfmvae", "aligntok"):
        layers = cfg.layers if cfg.method == "vfmvae" else (-1,)
        if not layers or layers[-1] != -1:
            raise UserError(f"--layers={','.join(map(str, layers))} must end with -1, the VFM's output, which the VF loss reads")
        arch.update(vfm=vfm.config, scale_factor=scale, layers=list(layers), encoder=None)
    if cfg.method == "vfmvae":
        arch.update(level_dims=[cfg.level_dim] * len(layers))
    if (cfg.decoder or ("vfmvae" if cfg.method == "vfmvae" else "ldm")) == "vfmvae":
        arch.update(decoder_kind="vfmvae", decoder=dict(post_factor=cfg.post_factor, widths=list(cfg.widths), fuse_dims=list(cfg.fuse_dims),
                                                        attention=list(cfg.attention), num_res_blocks=cfg.num_res_blocks, w_dim=cfg.w_dim))
    else:
        arch.update(decoder_kind="ldm", decoder=ldm)
        if 2 ** (len(cfg.ch_mult) - 1) != cfg.downsample:
            raise UserError(f"--ch_mult={','.join(map(str, cfg.ch_mult))} downsamples by {2 ** (len(cfg.ch_mult) - 1)}, but --downsample={cfg.downsample}")
    try:
        tokenizer = Tokenizer(**arch)
    except ValueError as error:          # of channels that groups or heads do not divide
        raise UserError(f"no network has these widths: {error}")
    tokenizer.check_size(cfg.image_size, cfg.image_size)
    if tokenizer.vfm is not None:
        tokenizer.vfm, vfm = vfm, None   # the loss reads the encoder's own features
    return tokenizer, vfm


def select_parameters(tokenizer, trains):
    """Marks what a stage trains ("encoder", "adapter", "decoder", "high": the decoder's three finest blocks); the rest is frozen -> groups."""
    tokenizer.requires_grad_(False)
    decoder = tokenizer.decoder
    modules = dict(encoder=[tokenizer.vfm], adapter=[tokenizer.adapter, tokenizer.vf_proj], decoder=[decoder],
                   high=decoder.blocks[-3:] if hasattr(decoder, "blocks") else [*decoder.up[:3], decoder.norm_out, decoder.conv_out])
    groups = {}
    for name in trains.split():
        groups[name] = [p for module in modules[name] if module is not None for p in module.requires_grad_(True).parameters()]
    return groups


def average_gradients(parameters, world):
    """One all-reduce of all gradients. Not DistributedDataParallel: the adaptive loss weights walk one graph in several backward passes."""
    if world.size > 1:
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = world.mean(torch._utils._flatten_dense_tensors(grads))
        torch._foreach_copy_(grads, torch._utils._unflatten_dense_tensors(flat, grads))


def load_moments(optimizer, saved):
    """Adam's state, with this run's rates, each moment in its parameter's memory layout, which the fused kernel insists on."""
    optimizer.load_state_dict(dict(optimizer.state_dict(), state=saved["state"]))
    for p, state in optimizer.state.items():
        state.update({key: torch.empty_like(p).copy_(state[key]) for key in ("exp_avg", "exp_avg_sq")})


def norm_of(tensors):
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


def average_weights(averages, module, images, batch, half_kimg):
    """Moves the averages {name: tensor} of the weights that are being trained towards them; half-life in thousands of images, at most 5% of those seen."""
    live = dict(module.named_parameters())
    names = [name for name in averages if live[name].requires_grad]
    decay = 0.5 ** (batch / max(1e-3, min(half_kimg * 1000, 0.05 * images)))
    torch._foreach_lerp_([averages[name] for name in names], [live[name].detach() for name in names], 1 - decay)


class Trainer:
    """The two networks' losses for one batch: what `train` and align.py's joint training share.

    The graph is cut at the latent and at the images, and the gradients are handed over by hand: losses on images are walked back once to
    the images, LDM's adaptive weight costs its last layer alone, and the VF loss's, if there is a GAN, one walk more through the decoder (its
    activations; compiled, the whole of it).
    """

    def __init__(self, cfg, tokenizer, world, vfm=None, length_scale=1.0, pretrained=True):
        self.cfg, self.tokenizer, self.world, self.target_vfm = cfg, tokenizer, world, vfm
        self.perceptual_net = None
        if any(stage.lpips for stage in STAGES[cfg.method]) and cfg.lpips_scale:
            lpips = cfg.perceptual == "lpips"
            net = LPIPS(cfg.lpips_weights if pretrained else None) if lpips else FeatureDistance(load_vfm(cfg.perceptual, cfg.out, pretrained))
            self.perceptual_net = net.to(world.device, memory_format=world.layout)
        self.pretrained, self.anchor, self.gan, self.length_scale = pretrained, None, None, length_scale
        self.stamp = lambda part: None   # `bench` puts a stopwatch here
        torch.backends.cudnn.benchmark = True
        if cfg.compile:
            torch._dynamo.config.cache_size_limit = 64           # sizes x scales x stages
            torch._functorch.config.donated_buffer = False       # the decoder's graph may be walked twice
            for module in (tokenizer.vfm, vfm, self.perceptual_net):
                if module is not None:
                    module.compile(dynamic=False)
            for module in (tokenizer.adapter, tokenizer.decoder):        # all but the last layers, at which gradients are compared
                if hasattr(module, "body"):
                    module.body = torch.compile(module.body, dynamic=False)
            for level in getattr(tokenizer.adapter, "levels", ()):
                level.compile(dynamic=False)

    def start_stage(self, stage):
        """Freezes and unfreezes, makes the discriminators and both optimizers."""
        cfg, device, stages = self.cfg, self.world.device, STAGES[self.cfg.method]
        self.stage = stage
        reached = stages[:[s.name for s in stages].index(stage.name) + 1]        # a VFM that has been trained is no longer the perceptual distance's
        self.shares = (isinstance(self.perceptual_net, FeatureDistance) and (cfg.perceptual, 1) == vfm_of(cfg)
                       and not any("encoder" in s.trains for s in reached))
        groups = select_parameters(self.tokenizer, stage.trains)
        self.parameters = [p for group in groups.values() for p in group]
        adam = functools.partial(torch.optim.Adam, betas=(stage.betas[0] if cfg.beta1 < 0 else cfg.beta1, stage.betas[1]), fused=device.type == "cuda")
        lr = stage.lr * cfg.lr_scale * (cfg.ldm_lr if isinstance(self.tokenizer.adapter, LDMEncoder) or isinstance(self.tokenizer.decoder, LDMDecoder) else 1)
        self.optimizer = adam([dict(params=group, lr=lr * (cfg.encoder_lr if name == "encoder" else 1)) for name, group in groups.items()])
        previous, self.gan, self.gan_optimizer = self.gan, None, None
        if cfg.gan_scale and (stage.dino or stage.patch or stage.multi):
            vit = load_vfm(cfg.disc_vfm, cfg.out, self.pretrained) if stage.dino else None
            self.gan = GAN(stage, vit, cfg.ndf, cfg.image_size).to(device, memory_format=self.world.layout)
            if self.world.size > 1 and device.type == "cuda":
                self.gan = nn.SyncBatchNorm.convert_sync_batchnorm(self.gan)
            if previous is not None:     # the discriminators that the stages share go on
                self.gan.load_state_dict(previous.state_dict(), strict=False)
            self.gan_parameters = [p for p in self.gan.parameters() if p.requires_grad]
            self.gan_optimizer = adam(self.gan_parameters, lr=lr)
        self.anchor = self.anchor if stage.preserve else None
        if stage.preserve and self.anchor is None:      # the frozen stage-1 encoder of AlignTok's semantic preservation loss
            self.anchor = copy.deepcopy(nn.ModuleDict(dict(vfm=self.tokenizer.vfm, adapter=self.tokenizer.adapter))).requires_grad_(False)
            if cfg.compile:
                self.anchor["vfm"].compile(dynamic=False)
        if self.gan and stage.dino and cfg.compile:
            self.gan.dino.vit.compile(dynamic=False)

    def adopt(self, averages):
        """At a stage's beginning: what it freezes, and AlignTok's anchor, become what is saved, the averages."""
        frozen = {name: averages[name] for name, p in self.tokenizer.named_parameters() if name in averages and not p.requires_grad}
        self.tokenizer.load_state_dict(frozen, strict=False)
        if self.anchor:
            self.anchor.load_state_dict({name: averages[name] for name, _ in self.anchor.named_parameters()}, strict=False)

    def set_lr(self, progress):
        """The stage's learning rates, cooling down over the last share of the whole run, of which `progress` (0 to 1) is behind."""
        factor = min(1, (1 - progress) / self.cfg.cooldown) if self.cfg.cooldown else 1
        for optimizer in filter(None, (self.optimizer, self.gan_optimizer)):
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("base_lr", group["lr"]) * factor

    def encode(self, images):
        """-> mean, logvar, VFM features, the last of which the VF loss reads (None for the plain VAE). The VFM runs once: what the perceptual
        distance needs of the same network is kept in `shared`. What is frozen leaves no graph."""
        tok, self.shared = self.tokenizer, None
        vfm, scale, layers = (self.target_vfm, vfm_of(self.cfg)[1], (-1,)) if tok.vfm is None else (tok.vfm, tok.scale_factor, tok.layers)
        features = None
        with self.world.autocast():
            if vfm is not None:
                more = self.perceptual_net.layers if self.shares else ()
                features = vfm(vfm.resize(images, scale=scale), (*layers, *more))
                features, self.shared = features[:len(layers)], features[len(layers):] or None
            moments = tok.moments(images if tok.vfm is None else features, *images.shape[-2:]).float()
        mean, logvar = moments.chunk(2, 1)
        return mean, logvar.clamp(-30, 20), features

    def latent_losses(self, images, z, mean, logvar, features):
        """The weighted KL and preservation losses, and the unweighted VF loss: those that reach the encoder without the decoder."""
        stage, zero = self.stage, mean.new_zeros(())
        values, fixed, vf = {}, zero, None
        if stage.kl:
            values["kl"] = kl_loss(mean, logvar)
            fixed = fixed + stage.kl * values["kl"]
        if stage.preserve:
            with self.world.autocast():
                vfm, tok = self.anchor["vfm"], self.tokenizer
                anchor = self.anchor["adapter"](vfm(vfm.resize(images, scale=tok.scale_factor), tok.layers), mean.shape[-2:]).float().chunk(2, 1)[0]
            values["preserve"] = F.mse_loss(mean, anchor)
            scale = images[0].numel() if stage.summed else 1
            fixed = fixed + stage.preserve * self.cfg.preserve_scale * scale * values["preserve"]
        if stage.vf and self.cfg.vf_scale and "adapter" in stage.trains:
            with self.world.autocast():
                projected = self.tokenizer.vf_proj(z)
            values["vf"] = vf = vf_loss(projected, features[-1], *stage.vf_margins)
        return values, fixed, vf

    def reconstruction_loss(self, outputs, target, shared=None):
        """The weighted sum of pixel, perceptual, SSIM and multi-resolution terms, on all the decoder's scales -> (loss, parts).
        shared: the target's features of the perceptual network, if `encode` has them."""
        stage, fake = self.stage, outputs[-1]
        scale = target[0].numel() if stage.summed else 1
        values, loss = {}, fake.new_zeros((), requires_grad=True)
        if stage.l1:
            values["l1"] = F.l1_loss(fake, target)
            loss = loss + stage.l1 * scale * values["l1"]
        if stage.lpips and self.perceptual_net is not None:
            with self.world.autocast():
                values["lpips"] = self.perceptual_net(fake, target, *([shared] if shared else [])).mean()
            loss = loss + stage.lpips * self.cfg.lpips_scale * scale * values["lpips"]
        if stage.ssim:
            values["ssim"] = 1 - ssim(fake.clamp(-1, 1), target, data_range=2).mean()
            loss = loss + stage.ssim * values["ssim"]
        if len(outputs) > 1:
            mode = self.tokenizer.vfm.interpolation if self.tokenizer.vfm else "bilinear"
            resize = lambda size: F.interpolate(target, size, mode=mode, antialias=True, align_corners=False)
            values["multires"] = sum(F.l1_loss(small, resize(small.shape[-2:])) for small in outputs[:-1])
            loss = loss + stage.multires * values["multires"]
        return loss, values

    def generator_step(self, images, step, images_seen, share=1.0):
        """Accumulates the tokenizer's gradients for one (micro-)batch -> (losses, fake, target)."""
        stage, tok, cfg = self.stage, self.tokenizer, self.cfg
        kind, scale, turns = None, 1.0, 0
        if stage.equivariance and cfg.equivariance:
            kind, scale, turns = draw_equivariance(cfg.seed, step, cfg.image_size // tok.downsample, tok.decoder.granularity)
        shrink = lambda x, s: x if s == 1 else F.interpolate(x, [round(side * s) for side in x.shape[-2:]], mode="bilinear", antialias=True, align_corners=False)
        if kind == "image":
            images = shrink(images, scale)
        mean, logvar, features = self.encode(images)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean) if stage.sample else mean
        target, moved = images, z
        if kind == "latent":
            target = torch.rot90(shrink(images, scale), turns, (2, 3)).contiguous()      # one layout, whatever the turn: compiled once
            moved = z if scale == 1 else F.interpolate(z, [round(side * scale) for side in z.shape[-2:]], mode="bilinear", align_corners=False)
            moved = torch.rot90(moved, turns, (2, 3)).contiguous(memory_format=torch.channels_last)
        self.stamp("encoder")
        cut = moved.detach().requires_grad_(z.requires_grad)
        scales = bool(stage.multires) and images_seen < stage.multires_kimg * 1000 * self.length_scale
        with self.world.autocast():
            outputs = tok.decoder(cut, scales=scales)
        outputs = outputs if scales else [outputs]
        self.stamp("decoder")
        leaves = [output.detach().float().requires_grad_() for output in outputs]
        fake = leaves[-1]
        reconstruction, values = self.reconstruction_loss(leaves, target, self.shared if target is images else None)
        grads = list(torch.autograd.grad(reconstruction, leaves, materialize_grads=True))        # zeros, where no loss looks
        self.stamp("reconstruction losses")
        adversarial = None
        if self.gan is not None and images_seen >= stage.gan_start_kimg * 1000 * self.length_scale:
            self.gan.requires_grad_(False)
            with self.world.autocast():
                parts = self.gan.generator_loss(fake, target)
            values.update(parts)
            adversarial, = torch.autograd.grad(cfg.gan_scale * sum(getattr(stage, name) * value for name, value in parts.items()), fake)
            if stage.gan_adaptive:       # LDM: the ratio of both gradients at the decoder's last layer
                last = tok.decoder.last_weight()
                at = lambda grad: torch.autograd.grad(outputs[-1], last, grad.to(outputs[-1].dtype), retain_graph=True)[0].float().norm()
                values["gan_weight"] = (at(grads[-1]) / (at(adversarial) / (cfg.gan_scale * stage.patch) + 1e-4)).clamp(0, 1e4)
                adversarial = adversarial * values["gan_weight"]
        self.stamp("adversarial losses")
        latent_values, fixed, vf = self.latent_losses(images, z, mean, logvar, features)
        values.update(latent_values)
        self.stamp("latent losses")
        give = lambda grads: [(grad * share).to(output.dtype) for output, grad in zip(outputs, grads)]
        total = grads if adversarial is None else [*grads[:-1], grads[-1] + adversarial]
        if cut.requires_grad and vf is not None:
            # the reconstruction's own gradient at the latent: a walk through the activations, needed only where the GAN's is mixed in
            apart = None if adversarial is None else torch.autograd.grad(outputs, cut, give(grads), retain_graph=True)[0]
            torch.autograd.backward(outputs, give(total))
            last = tok.adapter.last_weight()
            reach = torch.autograd.grad(moved, last, (cut.grad if apart is None else apart) / share, retain_graph=True)[0].norm()
            values["vf_weight"] = (reach / (torch.autograd.grad(vf, last, retain_graph=True)[0].norm() + 1e-4)).clamp(0, 1e8) * stage.vf * cfg.vf_scale
            fixed = fixed + values["vf_weight"].detach() * vf
        else:
            torch.autograd.backward(outputs, give(total))
        if cut.requires_grad:
            ((moved * cut.grad).sum() + share * fixed).backward()                # of the first, cut.grad is the gradient
        self.stamp("backward")
        return {key: value.detach() for key, value in values.items()}, fake.detach(), target

    def discriminator_step(self, fake, target, share=1.0):
        """Accumulates the discriminators' gradients -> loss."""
        for p in self.gan_parameters:
            p.requires_grad_(True)
        with self.world.autocast():
            loss = self.gan.discriminator_loss(fake, target)
        (loss * share).backward()
        return loss.detach()

    def step(self, batches, step, images_seen):
        """One optimizer step on both networks from the micro-batches of one global batch (uint8) -> losses of the last micro-batch."""
        pairs = []
        for images in batches:
            images = to_float(images.to(self.world.device, non_blocking=True))
            losses, fake, target = self.generator_step(images, step, images_seen, 1 / self.cfg.accumulate)
            pairs.append((fake, target))
        average_gradients(self.parameters, self.world)
        self.optimizer.step()
        losses["grad_norm"] = norm_of([p.grad for p in self.parameters if p.grad is not None])
        self.optimizer.zero_grad(set_to_none=True)
        self.stamp("optimizer")
        if self.gan is not None and images_seen >= self.stage.gan_start_kimg * 1000 * self.length_scale:
            for fake, target in pairs:
                losses["discriminator"] = self.discriminator_step(fake, target, 1 / self.cfg.accumulate)
            average_gradients(self.gan_parameters, self.world)
            self.gan_optimizer.step()
            self.gan_optimizer.zero_grad(set_to_none=True)
            self.stamp("discriminator")
        return losses


def stage_plan(cfg):
    """The stages with something to optimise under this configuration -> [(number, stage, first image, last image)], length scale."""
    stages = [(i, stage) for i, stage in enumerate(STAGES[cfg.method], 1)
              if stage.l1 or stage.lpips and cfg.lpips_scale or stage.ssim or cfg.gan_scale and (stage.dino or stage.patch or stage.multi)]
    total, plan, start = sum(stage.kimg for _, stage in stages) * 1000, [], 0.0
    scale = cfg.kimg * 1000 / total if cfg.kimg else 1.0
    for i, stage in stages:
        first, start = round(start / cfg.batch_size) * cfg.batch_size, start + stage.kimg * 1000 * scale
        plan.append((i, stage, first, round(start / cfg.batch_size) * cfg.batch_size))
    return plan, scale


def describe(tokenizer):
    """Parameter counts, one line."""
    count = lambda *modules: sum(p.numel() for module in modules if module is not None for p in module.parameters()) / 1e6
    return (f"parameters: VFM {count(tokenizer.vfm):.2f} M, {'adapter' if tokenizer.vfm else 'encoder'} {count(tokenizer.adapter, tokenizer.vf_proj):.2f} M, "
            f"decoder {count(tokenizer.decoder):.2f} M")


@torch.no_grad()
def count_flops(cfg, tokenizer):
    """{stage's name: FLOPs of one image's training step}: VFM, adapter, decoder, and for those that train twice as many backwards, at the sizes to
    which the equivariance regularisation shrinks on average; losses and discriminators are left out."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(part, *inputs):
        with FlopCounterMode(display=False) as counter:
            output = part(*inputs)
        return output, counter.get_total_flops()

    size = cfg.image_size
    features, vfm = count(tokenizer.features, torch.zeros(1, 3, size, size, device=next(tokenizer.parameters()).device))
    moments, adapter = count(tokenizer.moments, features, size, size)
    _, decoder = count(tokenizer.decode, moments.chunk(2, 1)[0])
    draws = [draw_equivariance(cfg.seed, step, size // tokenizer.downsample, tokenizer.decoder.granularity) for step in range(1000)]
    flops = {}
    for stage in STAGES[cfg.method]:
        kinds = draws if stage.equivariance and cfg.equivariance else [(None, 1.0, 0)]
        encoded, decoded = np.mean([scale ** 2 if kind == "image" else 1.0 for kind, scale, _ in kinds]), np.mean([scale ** 2 for _, scale, _ in kinds])
        passes = lambda part: 3 if part in stage.trains else 1
        flops[stage.name] = float((vfm * passes("encoder") + adapter * passes("adapter")) * encoded + 3 * decoder * decoded)
    return flops


def train(cfg, world):
    """All of `tokenizer.py`: builds or resumes, then the stages in turn; writes out/tokenizer.pt, out/log.jsonl and pictures in out/grids."""
    path = Path(cfg.out) / "tokenizer.pt"
    plan, length_scale = stage_plan(cfg)
    if cfg.stage and cfg.stage not in [number for number, *_ in plan]:
        stages = ", ".join(f"{number} ({stage.name})" for number, stage, *_ in plan)
        raise UserError(f"--stage={cfg.stage}: {cfg.method} has the stages {stages} with these weights")
    end = plan[-1][3]
    if not end:
        raise UserError(f"--kimg={cfg.kimg:g} is less than one batch of {cfg.batch_size}")
    plan = [row for row in plan if cfg.stage in (0, row[0])]
    data = Images(cfg.data, "train", cfg.image_size, cfg.data_dir, cfg.download, cfg.crop, cfg.flip, cfg.out)
    held_out = Images(cfg.data, "val", cfg.image_size, cfg.data_dir, cfg.download, cache=cfg.out)

    torch.manual_seed(cfg.seed)
    entries = load_checkpoint(path, "tokenizer") if cfg.resume and path.exists() else None
    if entries:
        fixed = ("method", "data", "image_size", "vfm", "scale_factor", "layers", "z_dim", "downsample", "level_dim", "decoder", "post_factor", "widths",
                 "fuse_dims", "attention", "num_res_blocks", "w_dim", "ch", "ch_mult", "ldm_blocks", "ldm_attention", "groups", "batch_size", "seed", "kimg",
                 "vf_scale", "gan_scale", "disc_vfm", "ndf")
        changed = [f"{key}={entries['config'].get(key)}, now {getattr(cfg, key)}" for key in fixed if entries["config"].get(key) != getattr(cfg, key)]
        if changed:
            raise UserError(f"{path} was trained with {'; '.join(changed)}: choose another --out, or --resume=0 to start afresh")
    tokenizer, vfm = build_tokenizer(cfg)
    tokenizer = tokenizer.to(world.device, memory_format=world.layout)
    vfm = vfm.to(world.device) if vfm else None
    seen = 0
    if entries:
        load_state(tokenizer, entries["model"], str(path))
        seen = entries["images"]
    if seen < plan[0][2]:
        raise UserError(f"stage {plan[0][0]} starts from the end of the one before, {plan[0][2]} images, but {path} "
                        + (f"has seen {seen}" if entries else "does not exist" if cfg.resume else "is not read with --resume=0"))
    if seen >= plan[-1][3]:
        if world.rank == 0:
            print(f"{path} is already trained ({seen} images); --resume=0 starts afresh")
        tokenizer.load_state_dict(entries["ema"], strict=False)
        return tokenizer
    # before anything is compiled: dynamo skips what a dispatch mode has seen
    flops = count_flops(cfg, tokenizer) if world.device.type == "cuda" else {}
    trainer = Trainer(cfg, tokenizer, world, vfm, length_scale)
    ema = {name: p.detach().clone() for name, p in tokenizer.named_parameters() if not name.startswith("vfm.") or cfg.method == "aligntok"}
    if entries:
        ema = {name: value.to(world.device) for name, value in entries["ema"].items()}
    if world.rank == 0:
        print(f"{cfg.method} on {len(data)} images of {cfg.data}, {cfg.image_size} px, latents {cfg.image_size // cfg.downsample}^2 x {cfg.z_dim}; "
              f"{world.size} x {world.device.type}; {describe(tokenizer)}")
        if entries:
            print(f"resuming {path} at {seen} images")
    log = Log(cfg.out, "tokenizer", world, plan[-1][3] // cfg.batch_size, seen // cfg.batch_size)
    pictures = to_float(torch.stack([held_out[i][0] for i in range(min(16, len(held_out)))])).to(world.device)

    def save(number, images):
        if world.rank == 0:
            save_checkpoint(path, kind="tokenizer", config=dataclasses.asdict(cfg), arch=tokenizer.arch, model=tokenizer.state_dict(), ema=ema, classes=data.classes,
                            optimizer=trainer.optimizer.state_dict(), gan=trainer.gan and trainer.gan.state_dict(), stage=number, images=images,
                            gan_optimizer=trainer.gan and trainer.gan_optimizer.state_dict(), anchor=trainer.anchor and trainer.anchor.state_dict())
        world.barrier()

    for number, stage, first, last in plan:
        if seen >= last:
            continue
        seed_step(cfg.seed, -number)
        trainer.start_stage(stage)
        log.flops = flops.get(stage.name)
        if seen == first:
            trainer.adopt(ema)
        if entries:
            same = entries["stage"] == number
            if same:
                load_moments(trainer.optimizer, entries["optimizer"])
            if trainer.anchor and entries["anchor"]:
                trainer.anchor.load_state_dict(entries["anchor"])
            if trainer.gan and entries["gan"]:
                trainer.gan.load_state_dict(entries["gan"], strict=False)
                if same:
                    load_moments(trainer.gan_optimizer, entries["gan_optimizer"])
            entries = None               # later stages begin as they would have
        sampler = StepSampler(len(data), cfg.batch_size, cfg.seed, seen // cfg.batch_size, last // cfg.batch_size, world, cfg.accumulate)
        batches = iter(make_loader(data, sampler, world, cfg.workers))
        if world.rank == 0:
            tqdm.write(f"stage {number}, {stage.name}: images {first} to {last}, trains {stage.trains}")
        for step in range(seen // cfg.batch_size, last // cfg.batch_size):
            seed_step(cfg.seed, step, world.rank)
            trainer.set_lr(seen / end)
            losses = trainer.step((next(batches)[0] for _ in range(cfg.accumulate)), step, seen)
            seen += cfg.batch_size
            average_weights(ema, tokenizer, seen, cfg.batch_size, cfg.ema_kimg)
            log.bar.update()
            saving = (step + 1) % cfg.save_interval == 0 or seen == last
            if (step + 1) % cfg.log_interval == 0 or saving:
                losses = {name: world.mean(value.to(world.device)) for name, value in losses.items()}
                if not math.isfinite(losses["grad_norm"]):
                    raise UserError(f"the gradients are not finite at step {step + 1}: try a lower --lr_scale; {path} is as it was")
                log.write(step + 1, seen, epoch=seen / len(data), stage=number, lr=trainer.optimizer.param_groups[-1]["lr"], **losses)
            if (step + 1) % cfg.grid_interval == 0 or seen == last:
                if world.rank == 0:
                    with torch.no_grad(), world.autocast(), use_weights(tokenizer, ema):
                        decoded = tokenizer.decode(tokenizer.encode(pictures)[0])
                    save_grid(torch.stack([pictures, decoded.float()], 1).flatten(0, 1), Path(cfg.out) / "grids" / f"tokenizer-{step + 1:07d}.png", 8)
            if saving:
                save(number, seen)
    log.bar.close()
    tokenizer.load_state_dict(ema, strict=False)
    return tokenizer


@contextlib.contextmanager
def use_weights(module, weights):
    """Swaps the named weights in, and back out on leaving."""
    live = dict(module.named_parameters())
    saved = {name: live[name].detach().clone() for name in weights}
    module.load_state_dict(weights, strict=False)
    try:
        yield
    finally:
        module.load_state_dict(saved, strict=False)


@torch.no_grad()
def evaluate(cfg, tokenizer, world):
    """PSNR, SSIM, LPIPS where its weights are at hand, rFID (through fid.py) and latent equivariance over held-out images -> dictionary."""
    import fid
    data = Images(cfg.data, "val", cfg.image_size, cfg.data_dir, cfg.download, cache=cfg.out)
    n, notes = min(cfg.eval_images, len(data)), [data.note] * bool(data.note)
    if n < 2 * world.size:
        raise UserError(f"{n} images are too few to evaluate on in {world.size} processes")
    tokenizer = tokenizer.to(world.device).eval()

    def at_hand(load):
        try:
            return load().to(world.device)
        except UserError as error:
            notes.append(str(error))

    lpips = at_hand(lambda: LPIPS(cfg.lpips_weights)) if cfg.perceptual == "lpips" or cfg.lpips_weights else None
    extractor = at_hand(lambda: fid.load_features("toy" if cfg.data == "shapes" else "inception", cfg.out, world.device))
    moves = dict(rotation=lambda x: torch.rot90(x, 1, (2, 3)), scaling=lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=x.shape[1] == 3))
    sums, moments = {}, {}

    def add(name, values):
        sums[name] = sums.get(name, 0) + torch.stack([values.double().sum(), values.new_tensor(len(values)).double()])

    mine = torch.arange(world.rank, n, world.size).split(min(cfg.batch_size, 32))
    with fid.full_float32():
        for images, _ in tqdm(make_loader(data, [part.tolist() for part in mine], world, cfg.workers), desc="evaluating", disable=world.rank > 0):
            images = to_float(images.to(world.device))
            mean = tokenizer.encode(images)[0]
            decoded = to_float(to_uint8(tokenizer.decode(mean)))         # as it would be saved
            for name, metric in (("PSNR (dB)", psnr), ("SSIM", ssim), ("LPIPS", lpips)):
                if metric is not None:
                    add(name, metric(images, decoded))
            for key, batch in (("real", images), ("decoded", decoded)):
                if extractor is not None:
                    features = extractor(to_uint8(batch))[0]
                    if key not in moments:
                        moments[key] = fid.Moments(features.shape[1], world.device)
                    moments[key].update(features)
            for name, move in moves.items():                            # |encode(T x) - T encode(x)| / |T encode(x)|
                with contextlib.suppress(UserError):                    # half the size may not fit this tokenizer
                    ours, theirs = tokenizer.encode(move(images))[0], move(mean)
                    add(f"equivariance error, {name}", (ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1))
    result = {}
    for name, pair in sums.items():
        total, count = fid.total(world, pair).tolist()
        result[name] = total / count
    if moments:
        for part in moments.values():
            part.reduce(world)
        name = "rFID" if extractor.name == "inception" else f"rFD ({extractor.name})"
        result[name] = fid.frechet_distance(*moments["real"].statistics(), *moments["decoded"].statistics())
    if world.rank == 0:
        print(f"{n} held-out images of {cfg.data}, {cfg.image_size} px")
        print("\n".join([*(f"  {name:32s} {value:10.4f}" for name, value in result.items()), *(f"  note: {note}" for note in notes)]))
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        write_text(Path(cfg.out) / "eval.json", json.dumps(dict(images=n, **result), indent=1) + "\n")
    return result


def bench(cfg, world):
    """Times `--bench` steps of each stage with random images and weights: nothing is fetched or written."""
    tokenizer, vfm = build_tokenizer(cfg, pretrained=False)
    tokenizer = tokenizer.to(world.device, memory_format=world.layout)
    cuda, cfg = world.device.type == "cuda", dataclasses.replace(cfg, equivariance=False)
    flops = count_flops(cfg, tokenizer)
    trainer = Trainer(cfg, tokenizer, world, vfm and vfm.to(world.device), pretrained=False)
    say = functools.partial(print, flush=True) if world.rank == 0 else lambda line: None
    say(f"{cfg.method}, {cfg.image_size} px, {world.size} x {torch.cuda.get_device_name() if cuda else 'cpu'}, batch {cfg.batch_size}; {describe(tokenizer)}")
    shape = cfg.batch_size // world.size // cfg.accumulate, 3, cfg.image_size, cfg.image_size
    batches = [torch.randint(0, 256, shape, dtype=torch.uint8).to(world.device)] * cfg.accumulate

    def mark():
        event = torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter()
        if cuda:
            event.record()
        return event

    for number, stage, *_ in stage_plan(cfg)[0]:
        if cfg.stage not in (0, number):
            continue
        trainer.start_stage(dataclasses.replace(stage, gan_start_kimg=0.0))
        start = time.perf_counter()
        for step in range(3):            # compilation, autotuning
            trainer.step(batches, step, 0)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        say(f"  stage {number}, {stage.name}: first 3 steps {time.perf_counter() - start:.1f} s")
        marks = [("", mark())]
        trainer.stamp = lambda part: marks.append((part, mark()))
        for step in range(cfg.bench):
            trainer.step(batches, step, 0)
        trainer.stamp = lambda part: None
        if cuda:
            torch.cuda.synchronize()
        parts = {}
        for (_, before), (part, after) in zip(marks, marks[1:]):
            parts[part] = parts.get(part, 0) + (before.elapsed_time(after) if cuda else 1000 * (after - before)) / cfg.bench
        total = sum(parts.values())
        memory = f", peak memory {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB" if cuda else ""
        shares = ", ".join(f"{part} {100 * t / total:.0f}%" for part, t in parts.items())
        rate = 1000 * cfg.batch_size / total
        mfu = world.mfu(flops[stage.name], rate)
        say(f"  {total:.1f} ms a step, {rate:.1f} images a second{memory}" + (f", MFU {mfu:.1%} (without losses)" if mfu else "") + f": {shares}")


def run():
    cfg = parse_config(Config, PRESETS)
    if cfg.method not in STAGES:
        raise UserError(f"--method={cfg.method}: there are {', '.join(STAGES)}")
    if cfg.decoder not in ("", "vfmvae", "ldm"):
        raise UserError(f"--decoder={cfg.decoder}: there are vfmvae, ldm")
    if min(cfg.kimg, cfg.ema_kimg) < 0:
        raise UserError(f"--kimg={cfg.kimg:g}, --ema_kimg={cfg.ema_kimg:g}: must not be negative")
    world = init_world()
    if cfg.eval:
        tokenizer = load_tokenizer(cfg.ckpt or Path(cfg.out) / "tokenizer.pt")
        default, trained = Config(**PRESETS[cfg.preset]), tokenizer.about.get("config", {})
        same = [key for key in ("data", "data_dir", "image_size") if key in trained and getattr(cfg, key) == getattr(default, key)]
        cfg = dataclasses.replace(cfg, **{key: trained[key] for key in same})        # on what it was trained for, where no flag says otherwise
        evaluate(cfg, tokenizer, world)
    elif cfg.bench:
        bench(cfg, world)
    else:
        train(cfg, world)


if __name__ == "__main__":
    main(run)
