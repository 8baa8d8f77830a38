"""
Metrics of generated images, with the arithmetic of OpenAI's ADM evaluator, so that they can stand beside the papers' numbers.

    python fid.py                                           # toy: out/samples against the toy's data
    python fid.py SAMPLES REFERENCE                         # FID, sFID, IS, precision, recall; each a folder or an .npz of images (arr_0)
    python fid.py out/samples.npz VIRTUAL_imagenet256_labeled.npz          # the reference may also be ADM's statistics
    python fid.py SAMPLES REFERENCE --metrics=fid,is --inception=pt_inception-2015-12-05-6726825d.pth
    python fid.py SAMPLES REFERENCE --features=dinov2_vitl14               # Frechet distance on another network's features
    python fid.py RECONSTRUCTIONS ORIGINALS --pairs=1       # PSNR, SSIM, LPIPS of the images of equal names
    torchrun --nproc_per_node=8 fid.py SAMPLES REFERENCE    # the same numbers from eight GPUs

A measured folder's or .npz's statistics are kept beside it (REFERENCE.inception.npz), which may itself be given as the reference.
FID: arXiv 1706.08500; sFID: 2103.03841; IS: 1606.03498; precision and recall: 1904.06991; the evaluator: github.com/openai/guided-diffusion.
"""
import contextlib
import hashlib
import json
import os
import struct
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from scipy.linalg import lapack
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader
from tqdm import tqdm

from tokenizer import (LPIPS, Shapes, UserError, center_crop, init_world, list_images, load_checkpoint, load_rgb, load_state, load_tokenizer, load_vfm,
                       load_weights, main, parse_config, psnr, save_checkpoint, ssim, to_float, to_uint8)


@dataclass
class Config:
    preset: str = ""                 # toy or imagenet (default: imagenet where CUDA and data/imagenet/train are at hand)
    samples: str = ""                # folder or .npz of images; empty: OUT/samples
    reference: str = ""              # folder, .npz of images, ADM's statistics or a cache of fid.py's; empty: the toy's data
    metrics: str = ""                # of fid,sfid,is,precision,recall,psnr,ssim,lpips; empty: the first five, or with --pairs=1 the last three
    features: str = ""               # inception, toy (a small classifier) or a VFM's name or file; empty: inception, against the toy's data toy
    inception: str = ""              # file of the Inception weights; empty: pytorch-fid's public one, fetched once
    pairs: bool = False              # PSNR, SSIM, LPIPS of the images of equal names in two folders
    lpips_weights: str = ""          # files of VGG16 and LPIPS's linear layers, comma-separated; empty: the public ones, fetched once
    image_size: int = 0              # crop the images of folders to this size as ADM does; 0: they must be of one size already
    batch_size: int = 64             # images per step and process
    workers: int = 2                 # loader processes (0: none)
    out: str = "out"                 # where fid.json is written, and the toy's files are


PRESETS = {"toy": {}, "imagenet": dict(reference="data/imagenet/VIRTUAL_imagenet256_labeled.npz", batch_size=256, workers=8)}
# ADM's reference: openaipublic.blob.core.windows.net/diffusion/jan-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SPLIT, NEIGHBOURS, FEW = 5000, 10_000, 10_000      # ADM's images per Inception Score split and reference images for recall; fewer than FEW are warned of
METRICS = {                                        # name: (its heading, what it needs beside images)
    "fid": ("FID", ""), "sfid": ("sFID", "spatial features (Inception's) of both sides"), "is": ("IS", "class logits (Inception's)"),
    "precision": ("precision", "the reference's images (arr_0)"), "recall": ("recall", "the reference's images (arr_0)"),
    "psnr": ("PSNR", ""), "ssim": ("SSIM", ""), "lpips": ("LPIPS", "its weights (--lpips_weights)")}
PAIRED = ("psnr", "ssim", "lpips")


# -----------------------------------------------------------------------------
# Features: a network(uint8 [B, 3, H, W]) -> (features [B, D], spatial [B, S] or None, logits [B, K] or None)

def resize_tf1(images, size):
    """uint8 or float [B, 3, H, W] -> float32 [B, 3, size, size] in the same range, as TensorFlow 1's `resize_bilinear` did: output i lies
    at i * in/out (no half-pixel shift), the upper neighbour is clamped to the last pixel, no antialiasing, no rounding."""
    for dim in (2, 3):
        n = images.shape[dim]
        position = torch.arange(size, device=images.device) * n      # in units of 1/size pixel, so exact
        lower = position // size
        weight = ((position % size) / size).view(-1, *[1] * (3 - dim))
        a, b = images.index_select(dim, lower).float(), images.index_select(dim, (lower + 1).clamp_max(n - 1)).float()
        images = a + (b - a) * weight
    return images


class Conv(nn.Module):
    """Convolution, BatchNorm, ReLU; padded to keep the size unless strided. `fold` puts the BatchNorm into the convolution."""

    def __init__(self, d_in, d_out, kernel, stride=1, padding=None):
        super().__init__()
        kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = padding if padding is not None else tuple(side // 2 if stride == 1 else 0 for side in kernel)
        self.conv, self.bn = nn.Conv2d(d_in, d_out, kernel, stride, padding, bias=False), nn.BatchNorm2d(d_out, eps=1e-3)

    def fold(self):
        self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Branches side by side, concatenated. A branch is a row of (kernel, channels[, stride]); its last entry may be a pair, also side by
    side. `branch_pool` begins with `pool`, "avg" or "max" (3 x 3, same size); pool "down" is a branch of its own: 3 x 3 max, stride 2."""

    def __init__(self, d_in, pool, **branches):
        super().__init__()
        self.pool, self.rows, self.d_out = pool, {}, d_in if pool == "down" else 0
        for branch, row in branches.items():
            d, self.rows[branch] = d_in, []
            for i, convs in enumerate(row, 1):
                convs = convs if isinstance(convs, list) else [convs]
                names = [branch + (f"_{i}" if len(row) > 1 else "") + (letter if len(convs) > 1 else "") for letter in "ab"[:len(convs)]]
                for name, (kernel, d_out, *stride) in zip(names, convs):
                    self.add_module(name, Conv(d, d_out, kernel, *stride))
                self.rows[branch].append(names)
                d = d_out
            self.d_out += d * len(names)

    def forward(self, x):
        parts = []
        for branch, row in self.rows.items():
            ends = [x]
            if branch == "branch_pool":      # unlike torchvision's, the average leaves out the padding
                ends = [F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)]
            for names in row:
                ends = [getattr(self, name)(ends[0]) for name in names]
            parts += ends
        return torch.cat(parts + [F.max_pool2d(x, 3, 2)] if self.pool == "down" else parts, 1)


def mixed_5(pooled):
    return dict(pool="avg", branch1x1=[(1, 64)], branch5x5=[(1, 48), (5, 64)], branch3x3dbl=[(1, 64), (3, 96), (3, 96)], branch_pool=[(1, pooled)])


def mixed_6(c):
    return dict(pool="avg", branch1x1=[(1, 192)], branch7x7=[(1, c), ((1, 7), c), ((7, 1), 192)],
                branch7x7dbl=[(1, c), ((7, 1), c), ((1, 7), c), ((7, 1), c), ((1, 7), 192)], branch_pool=[(1, 192)])


def mixed_7(pool):
    pair = [((1, 3), 384), ((3, 1), 384)]
    return dict(pool=pool, branch1x1=[(1, 320)], branch3x3=[(1, 384), pair], branch3x3dbl=[(1, 448), (3, 384), pair], branch_pool=[(1, 192)])


MIXED = dict(
    Mixed_5b=mixed_5(32), Mixed_5c=mixed_5(64), Mixed_5d=mixed_5(64),
    Mixed_6a=dict(pool="down", branch3x3=[(3, 384, 2)], branch3x3dbl=[(1, 64), (3, 96), (3, 96, 2)]),
    Mixed_6b=mixed_6(128), Mixed_6c=mixed_6(160), Mixed_6d=mixed_6(160), Mixed_6e=mixed_6(192),
    Mixed_7a=dict(pool="down", branch3x3=[(1, 192), (3, 320, 2)], branch7x7x3=[(1, 192), ((1, 7), 192), ((7, 1), 192), (3, 192, 2)]),
    Mixed_7b=mixed_7("avg"), Mixed_7c=mixed_7("max"))


class Inception(nn.Module):
    """The Inception-v3 of 2015-12-05 with 1008 classes on which FID is defined (arXiv 1512.00567; keys of pytorch-fid's and
    torch-fidelity's ports). net(uint8 [B, 3, H, W]) -> pool [B, 2048], spatial [B, 2023] (the first 7 channels of Mixed_6d,
    channel last, for sFID), logits without bias [B, 1008] (for IS, as in ADM's graph)."""
    name = "inception"

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        d = 192
        for name, block in MIXED.items():
            self.add_module(name, Block(d, **block))
            d = getattr(self, name).d_out
        self.fc = nn.Linear(d, 1008)

    def forward(self, images):
        x = ((resize_tf1(images, 299) - 128) / 128).contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in MIXED:
            x = getattr(self, name)(x)
            if name == "Mixed_6d":
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        pool = x.mean((2, 3))
        return pool, spatial, F.linear(pool, self.fc.weight)


def load_inception(path=""):
    """The Inception of a public port's file (empty: pytorch-fid's, fetched once into torch.hub's cache), frozen, BatchNorms folded.
    Raises UserError if it can't be had, or has missing or left-over keys."""
    net = Inception()
    counters = {key: value for key, value in net.state_dict().items() if key.endswith("num_batches_tracked")}      # the ports' files have none
    try:
        load_state(net, {**counters, **load_weights(path or INCEPTION_URL)}, str(path or INCEPTION_URL), ignore=(r"AuxLogits\.",))
    except UserError as error:
        raise UserError(f"FID needs the Inception weights, {INCEPTION_URL.rsplit('/')[-1]}; give their file by --inception=PATH ({error})")
    net.requires_grad_(False).eval()
    for module in net.modules():
        if isinstance(module, Conv):
            module.fold()
    return net.to(memory_format=torch.channels_last)


class VFMFeatures(nn.Module):
    """A VFM's class token (as FD-DINOv2, arXiv 2306.04675), or the mean of its patch tokens where it has none."""

    def __init__(self, name, out):
        super().__init__()
        self.name, self.vfm = Path(name).stem, load_vfm(name, out)

    def forward(self, images):
        tokens, = self.vfm(self.vfm.resize(to_float(images)), cls=True)
        return tokens.mean(1) if self.vfm.cls_token is None else tokens[:, 0], None, None


class Classifier(nn.Module):
    """What judges the toy (ours): a small convolutional network that names shape, hue, texture and ground of a drawn image. Its features,
    128 averages before the heads, must tell all four, not the class alone, so that their Frechet distance sees what a sample looks like."""
    name = "toy"
    heads = dict(shape=len(Shapes.classes), hue=len(Shapes.hues), texture=len(Shapes.textures), ground=len(Shapes.hues))

    def __init__(self):
        super().__init__()
        layers, d = [], 3
        for width, kernel, stride, pool in ((24, 4, 2, False), (48, 3, 1, True), (96, 3, 1, True), (128, 3, 1, False)):
            layers += [nn.Conv2d(d, width, kernel, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()] + [nn.MaxPool2d(2)] * pool
            d = width
        self.body, self.head = nn.Sequential(*layers), nn.Linear(d, sum(self.heads.values()))

    def average(self, images):
        x = to_float(images)
        if x.shape[-2:] != (32, 32):
            x = F.interpolate(x, (32, 32), mode="bilinear", antialias=True, align_corners=False)
        return self.body(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    def forward(self, images):
        features = self.average(images)
        return features, None, self.head(features)[:, :self.heads["shape"]]


def load_classifier(out="out", device="cpu", steps=900, batch=64, lr=1e-2):
    """The toy's Classifier, frozen; trained the first time it is needed (about half a minute), then kept in `out`/classifier.pt."""
    path, fingerprint = Path(out) / "classifier.pt", f"{steps} {batch} {lr} {zlib.crc32(Shapes('train', 32).draw(np.arange(16))):08x}"
    entries = load_checkpoint(path, "classifier") if path.exists() else {}
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(0)
        net = Classifier().to(device, memory_format=torch.channels_last)
        if entries.get("fingerprint") != fingerprint:
            data = Shapes("train", 32, cache=out)
            attributes = data.attributes(np.arange(len(data)))
            targets = torch.from_numpy(np.stack([attributes[key] for key in net.heads], 1))
            optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.2)
            order = torch.cat([torch.randperm(len(data)) for _ in range(-(-steps * batch // len(data)))])
            for index in tqdm(order.split(batch)[:steps], desc="training the toy's classifier", mininterval=0.5, leave=False):
                logits = net.head(net.average(torch.from_numpy(data.images[index.numpy()]).to(device)))
                loss = sum(F.cross_entropy(part, target) for part, target in zip(logits.split([*net.heads.values()], 1), targets[index].to(device).T))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            entries = dict(kind="classifier", fingerprint=fingerprint, model=net.state_dict())
            save_checkpoint(path, **entries)
    return load_state(net, entries["model"], str(path)).requires_grad_(False).eval()


def load_features(name, out="out", device="cpu", inception=""):
    """The network of that name, frozen, with its `.name`: "inception" (of the file `inception`), "toy" (the Classifier), or a VFM's name or file."""
    net = load_inception(inception) if name == "inception" else load_classifier(out, device) if name == "toy" else VFMFeatures(name, out)
    return net.to(device)


@contextlib.contextmanager
def full_float32():
    """No TF32: numbers must not depend on the card."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


# -----------------------------------------------------------------------------
# Sets of images: whatever has len() and gives source[range] as uint8 [b, 3, H, W]; a tensor is one

class Folder:
    """The images of a folder, sorted by path, all of one size (`crop`: centre-cropped to it as ADM does). UserError names the first that differs."""

    def __init__(self, folder, crop=0):
        self.paths, self.crop = list_images(folder), crop
        self.size = self.load(0).size

    def load(self, i):
        image = load_rgb(self.paths[i])
        return center_crop(image, self.crop) if self.crop else image

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, indices):
        images = [self.load(i) for i in indices]
        for i, image in zip(indices, images):
            if image.size != self.size:
                raise UserError("images of mixed sizes: {} is {}x{}, {} is {}x{}; --image_size=N crops them all".format(
                    self.paths[0], *self.size, self.paths[i], *image.size))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


class Npz:
    """The images of an .npz: `arr_0`, uint8 [N, H, W, 3], as ADM writes them. np.load would read the member whole; this reads a batch at a
    time, from the file itself or, compressed, from the stream. UserError for any other layout."""

    def __init__(self, path):
        self.path, self.file = path, None
        try:
            with zipfile.ZipFile(path) as archive:
                if "arr_0.npy" not in archive.namelist():
                    raise UserError(f"{path} has no arr_0 (uint8 images [N, H, W, 3]); it has {', '.join(Path(name).stem for name in archive.namelist())}")
                info = archive.getinfo("arr_0.npy")
                with archive.open(info) as member:
                    version = np.lib.format.read_magic(member)
                    self.shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(member)
                    self.start, self.stored = member.tell(), info.compress_type == zipfile.ZIP_STORED
                if self.stored:                  # where the member begins: after its local header of 30 bytes, name, extra field
                    archive.fp.seek(info.header_offset + 26)
                    self.start += info.header_offset + 30 + sum(struct.unpack("<HH", archive.fp.read(4)))
        except (OSError, ValueError, AttributeError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read {path}: {error}")
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3 or fortran:
            raise UserError(f"{path}: arr_0 must be uint8 images [N, H, W, 3] in C order; it is {dtype} {list(self.shape)}")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, indices):
        if self.file is None:                    # not before, as every loader process needs its own
            self.file = open(self.path, "rb") if self.stored else zipfile.ZipFile(self.path).open("arr_0.npy")
        images = np.empty((len(indices), *self.shape[1:]), np.uint8)
        try:
            self.file.seek(self.start + indices.start * images[0].nbytes)
            if self.file.readinto(images) < images.nbytes:
                raise EOFError("the file ends early")
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read images {indices.start} to {indices.stop - 1} of {self.path}: {error}")
        return torch.from_numpy(images).permute(0, 3, 1, 2)


def open_images(path, crop=0):
    """The images that a path names: a folder's or an .npz's. UserError if there are none."""
    if not Path(path).exists():
        raise UserError(f"no folder or .npz {path}")
    return Folder(path, crop) if Path(path).is_dir() else Npz(path)


def batches(source, world, batch_size, workers=0, title="images"):
    """This process's share of a source, one contiguous part, as (range, images on the device), under a progress bar of that title."""
    share = -(-len(source) // world.size)
    start, stop = (min(len(source), k * share) for k in (world.rank, world.rank + 1))
    ranges = [range(i, min(i + batch_size, stop)) for i in range(start, stop, batch_size)]
    loader = DataLoader(source, None, sampler=ranges, num_workers=workers, pin_memory=world.device.type == "cuda")
    with tqdm(total=stop - start, desc=title, unit="image", disable=world.rank > 0 or not title, mininterval=0.5, leave=False) as bar:
        for indices, images in zip(ranges, loader):
            yield indices, images.to(world.device, non_blocking=True)
            bar.update(len(indices))


# -----------------------------------------------------------------------------
# One pass over a set

def total(world, tensor):
    """The sum over processes, in place. Where each fills its own rows of a zero tensor, the whole comes out in the order of the images."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


class Moments:
    """Mean and covariance of rows in one pass, in float64: a batch is centred on its own mean, then merged (Chan et al. 1979), so that a
    mean far above the spread costs no digits."""

    def __init__(self, dim, device="cpu"):
        self.n, self.mean = 0, torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)       # sum of (x - mean)(x - mean)^T

    def update(self, rows):
        b, rows = len(rows), rows.double()
        mean = rows.mean(0)
        shift, n = mean - self.mean, self.n + b
        rows = torch.cat([rows - mean, (shift * (self.n * b / n) ** 0.5)[None]])       # the merge's rank-one term rides along
        self.scatter.addmm_(rows.T, rows)
        self.mean += shift * (b / n)
        self.n = n

    def reduce(self, world):
        """Of all processes together."""
        n = int(total(world, torch.tensor(self.n, device=self.mean.device)))
        mean = total(world, self.mean * (self.n / n))
        shift = self.mean - mean
        self.n, self.mean, self.scatter = n, mean, total(world, self.scatter.addr_(shift, shift, alpha=self.n))

    def statistics(self):
        """-> mean [D], unbiased covariance [D, D], NumPy arrays."""
        return self.mean.cpu().numpy(), (self.scatter / (self.n - 1)).cpu().numpy()


@torch.no_grad()
def measure(source, net, world, batch_size=64, workers=0, keep=0, title="images"):
    """One pass of a set of images through a network -> dict: n; mu, sigma of its features; mu_s, sigma_s of its spatial features and, from
    its logits, inception_score (mean, std) and predictions [n], where it has them; features [keep, D] of `keep` evenly spaced images.
    Raises UserError for fewer than 2 images and for features that are not finite."""
    n, device = len(source), world.device
    if n < 2:
        raise UserError(f"{title}: {n} image; a covariance needs 2 at least")
    width, spatial_width, classes = (0 if part is None else part.shape[1] for part in net(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=device)))
    moments = {key: Moments(dim, device) for key, dim in (("", width), ("_s", spatial_width)) if dim}
    finite, predictions = torch.zeros(n, dtype=torch.uint8, device=device), torch.zeros(n, dtype=torch.long, device=device)
    splits = torch.zeros(-(-n // SPLIT), 2 + classes, dtype=torch.float64, device=device)
    keep = min(keep, n)
    kept = torch.zeros(keep, width, device=device)
    with full_float32():
        for indices, images in batches(source, world, batch_size, workers, title):
            features, spatial, logits = net(images)
            i, j = indices.start, indices.stop
            finite[i:j] = features.isfinite().all(1)
            for part, rows in zip(moments.values(), (features, spatial)):
                part.update(rows)
            if classes:
                predictions[i:j] = logits.argmax(1)
                splits.index_add_(0, torch.arange(i, j, device=device) // SPLIT, score_terms(logits))
            if keep:                             # kept image p is number p * n // keep
                a, b = -(-i * keep // n), -(-j * keep // n)
                kept[a:b] = features[torch.arange(a, b, device=device) * n // keep - i]
    if len(bad := (total(world, finite) == 0).nonzero()):
        first = source.paths[bad[0]] if isinstance(source, Folder) else f"number {int(bad[0])}"
        raise UserError(f"{title}: the {net.name} features of {len(bad)} images hold NaN or infinity, first of image {first}")
    found = dict(n=n, features=total(world, kept))
    for key, part in moments.items():
        part.reduce(world)
        found["mu" + key], found["sigma" + key] = part.statistics()
    if classes:
        found.update(inception_score=score(total(world, splits)), predictions=total(world, predictions))
    return found


# -----------------------------------------------------------------------------
# Formulas

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians (FID, arXiv 1706.08500, eq. 6), in float64. Means [D], covariances [D, D].

    The trace of the root is the sum of the roots of the eigenvalues of C1 C2, which are those of the symmetric L^T C2 L for any L with
    L L^T = C1, C1^(1/2) among them; the pivoted Cholesky factor is the cheapest L, and has as many columns as C1 has rank.
    Raises UserError for statistics of different widths or with NaN."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(x.cpu() if torch.is_tensor(x) else x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == mu1.shape * 2:
        raise UserError(f"statistics of different features: means {mu1.shape} and {mu2.shape}, covariances {sigma1.shape} and {sigma2.shape}")
    if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
        raise UserError("the statistics hold NaN or infinity")
    factor, pivots, rank, _ = lapack.dpstrf(sigma1, lower=1)
    factor, permuted = (torch.from_numpy(x) for x in (np.tril(factor)[:, :rank], sigma2[np.ix_(pivots - 1, pivots - 1)]))
    roots = torch.linalg.eigvalsh(factor.T @ permuted @ factor).clamp_min(0).sqrt()      # torch's: SciPy's stalls on a busy machine
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.sum().item())


def score_terms(logits):
    """[B, K] -> [B, 2 + K]: what the Inception Score sums over a split: 1, sum p log p, p."""
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    return torch.cat([torch.ones_like(p[:, :1]), (p * log_p).sum(1, keepdim=True), p], 1)


def score(splits):
    """Sums of `score_terms` [S, 2 + K] -> (mean, std) over the splits of exp(mean KL(p || mean p)), with the population's std (ADM)."""
    mean = splits[:, 1:] / splits[:, :1]
    scores = (mean[:, 0] + torch.special.entr(mean[:, 1:]).sum(1)).exp()
    return scores.mean().item(), scores.std(correction=0).item()


def inception_score(logits, splits):
    """Logits [N, K] -> (mean, std) of the Inception Score (arXiv 1606.03498) over `splits` contiguous parts of about equal size."""
    logits = torch.as_tensor(logits)
    part = torch.arange(len(logits), device=logits.device) * splits // len(logits)
    terms = score_terms(logits)
    return score(terms.new_zeros(splits, terms.shape[1]).index_add_(0, part, terms))


def precision_recall(reference, samples, k=3, block=4096):
    """Features [N, D], [M, D] -> (precision, recall) (arXiv 1904.06991): the share of samples that lie in the ball of any reference image,
    and the reverse; a ball reaches to the k-th nearest of its own set, itself not counted. By blocks: beyond a copy of the features it takes a
    few block^2 numbers. Raises UserError where a set has no k-th neighbour."""
    reference, samples = torch.as_tensor(reference), torch.as_tensor(samples)
    if min(len(reference), len(samples)) <= k:
        raise UserError(f"precision and recall with k={k} need more than {k} images on both sides")
    centre = reference.mean(0)           # leaves distances as they are, and their rounding small
    sets = [[(rows, rows.square().sum(1)) for rows in (x - centre).split(block)] for x in (reference, samples)]

    def distances(a, b):                 # squared
        return (a[1][:, None] + b[1]).addmm_(a[0], b[0].T, alpha=-2).clamp_min_(0)

    def radii(parts):
        """Per block its balls' squared radii; each pair of blocks is computed once, for its rows and for its columns."""
        nearest = [part[1].new_empty(len(part[1]), 0) for part in parts]
        for i, a in enumerate(parts):
            for j, b in enumerate(parts[i:], i):
                d = distances(a, b)
                if i == j:
                    d.fill_diagonal_(torch.inf)
                for which, found in ((i, d), (j, d.T))[:1 + (i != j)]:
                    found = torch.cat([nearest[which], found.topk(min(k, found.shape[1]), largest=False).values], 1)
                    nearest[which] = found.topk(min(k, found.shape[1]), largest=False).values
        return [found[:, -1] for found in nearest]

    with full_float32():
        balls = [radii(parts) for parts in sets]
        inside = [[torch.zeros_like(ball, dtype=torch.bool) for ball in side] for side in balls]
        for i, a in enumerate(sets[0]):
            for j, b in enumerate(sets[1]):
                d = distances(a, b)
                inside[1][j] |= (d <= balls[0][i][:, None]).any(0)
                inside[0][i] |= (d <= balls[1][j]).any(1)
    recall, precision = (torch.cat(flags).double().mean().item() for flags in inside)
    return precision, recall


# -----------------------------------------------------------------------------
# Two sets

KEPT = ("mu", "sigma", "mu_s", "sigma_s", "features", "n", "network", "source")      # in a statistics file; ADM's has the first four


def read_statistics(path):
    """The entries of ADM's or our own statistics file, without its images; {} for whatever else."""
    if not zipfile.is_zipfile(path):
        return {}
    try:
        with np.load(path) as file:
            entries = {key: file[key] for key in KEPT if key in file.files}
        return {key: value if value.ndim else value.item() for key, value in entries.items()}
    except (OSError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {error}")


def measure_reference(path, net, cfg, world, neighbours):
    """A reference's statistics under `measure`'s names: ADM's, a cache of ours, or measured now and kept beside the images. `neighbours`: with
    features for precision and recall, for which ADM's file needs its images looked at."""
    network = f"{net.name} {zlib.crc32([*net.parameters()][-1].cpu().numpy()):08x}"       # one tensor tells weights apart
    given = read_statistics(path) if Path(path).is_file() else {}
    theirs = given.get("network", network if isinstance(net, Inception) else "inception")
    if given and theirs != network:
        raise UserError(f"{path} holds statistics of other features: {theirs}, not {network}")
    if given and not neighbours:
        return given
    try:
        source = open_images(path, cfg.image_size)
    except UserError:
        if given:
            return given
        raise
    cache = Path(f"{str(path).rstrip('/')}.{net.name}.npz")
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in getattr(source, "paths", [Path(path)])]
    fingerprint = hashlib.blake2b(repr((files, cfg.image_size, network)).encode(), digest_size=16).hexdigest()
    found = read_statistics(cache) if cache.is_file() else {}
    if total(world, torch.tensor(int(found.get("source") == fingerprint), device=world.device)) < world.size:      # stale for one, measured by all
        found = measure(source, net, world, cfg.batch_size, cfg.workers, NEIGHBOURS, str(path))
        found = {**found, "features": found["features"].cpu().numpy(), "network": network, "source": fingerprint}
        temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
        try:
            if world.rank == 0:
                with open(temporary, "wb") as file:
                    np.savez(file, **{key: found[key] for key in KEPT if key in found})
                os.replace(temporary, cache)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            print(f"note: the statistics of {path} are not kept ({error})", file=sys.stderr)
    return {**found, **given, "n": None} if given else found


def compare(samples, reference, metrics):
    """Those of `metrics` that both sides' statistics allow."""
    values = {}
    for metric, key in (("fid", ""), ("sfid", "_s")):
        if metric in metrics and "mu" + key in samples and "mu" + key in reference:
            values[metric] = frechet_distance(*(side[name + key] for side in (samples, reference) for name in ("mu", "sigma")))
    if "is" in metrics and "inception_score" in samples:
        values["is"], values["is_std"] = samples["inception_score"]
    if {"precision", "recall"} & {*metrics} and "features" in reference:
        both = precision_recall(torch.as_tensor(reference["features"], device=samples["features"].device), samples["features"])
        values.update({metric: value for metric, value in zip(("precision", "recall"), both) if metric in metrics})
    return values


@torch.no_grad()
def measure_pairs(folders, metrics, cfg, world):
    """The images of two folders that have the same path within them but for the suffix -> dict: pairs (their number) and, for each metric,
    metric: mean, metric_std: standard deviation (the population's). Raises UserError that names those without a partner."""
    sides = [Folder(folder, cfg.image_size) for folder in folders]
    names = [{str(path.relative_to(folder).with_suffix("")): path for path in side.paths} for folder, side in zip(folders, sides)]
    for folder, side, mine, theirs in zip(folders, sides, names, names[::-1]):
        if alone := sorted(mine.keys() - theirs.keys()):
            raise UserError(f"{len(alone)} images of {folder} have no partner of the same name: {', '.join(alone[:10])}" + ", ..." * (len(alone) > 10))
        if len(mine) < len(side.paths):
            raise UserError(f"{folder} has images whose names differ in the suffix alone")
        side.paths = [mine[name] for name in sorted(mine)]
    if sides[0].size != sides[1].size:
        raise UserError("pairs need equal sizes: {} has {}x{}, {} has {}x{}".format(folders[0], *sides[0].size, folders[1], *sides[1].size))
    measures = {name: function for name, function in (("psnr", psnr), ("ssim", ssim)) if name in metrics}
    if "lpips" in metrics:
        try:
            measures["lpips"] = LPIPS(cfg.lpips_weights).to(world.device)
        except UserError as error:
            print(f"note: {error}", file=sys.stderr)
    values = torch.zeros(len(measures), len(sides[0]), device=world.device)
    with full_float32():
        for (indices, a), (_, b) in zip(*(batches(side, world, cfg.batch_size, cfg.workers, title) for side, title in zip(sides, ("pairs", "")))):
            for row, function in zip(values, measures.values()):
                row[indices.start:indices.stop] = function(to_float(a), to_float(b))
    values = total(world, values).double()
    moments = zip(measures, values.mean(1).tolist(), values.std(1, correction=0).tolist())
    return dict(pairs=len(sides[0])) | {key: value for name, mean, std in moments for key, value in ((name, mean), (f"{name}_std", std))}


@torch.no_grad()
def measure_toy(cfg, net, world, reconstructed=2000):
    """A toy run at a glance: Frechet distance to the held-out images, and the share of images that the classifier takes for the class they
    should show -> {row: dict(label, images, fd, agreement[, psnr])}.

    A distance says little by itself. Beside the samples' stand that of as many training images (the floor), of the tokenizer's
    reconstructions, and of an untrained pipeline: since DiT's last layer starts at zero, an untrained one returns its noise as the latent."""
    samples, rows = open_images(cfg.samples), {}
    file, paths = Path(cfg.samples, "labels.json"), [Path(cfg.out, f"{kind}.pt") for kind in ("tokenizer", "diffusion")]
    labels = json.loads(file.read_text()) if file.exists() else None       # a list in the order of the names, or {name: class}
    labels = [labels[path.name] for path in samples.paths if path.name in labels] if isinstance(labels, dict) else labels
    if labels is not None and len(labels) != len(samples):
        raise UserError(f"{file} has {len(labels)} labels for {len(samples)} images; run sample.py again")
    diffusion = load_checkpoint(paths[1], "diffusion") if paths[1].exists() else {}
    if (data := diffusion.get("config", {}).get("data", "shapes")) != "shapes":
        raise UserError(f"{cfg.samples} was made from --data={data}, not from the toy's; give the reference, too: python fid.py {cfg.samples} FOLDER")
    size = samples[range(1)].shape[-1]

    def drawn(split, n):
        data = Shapes(split, size, cache=cfg.out)
        images = data.images[:n] if data.images is not None else np.concatenate([data.draw(part) for part in np.array_split(np.arange(n), -(-n // 500))])
        return torch.from_numpy(np.array(images)), data.targets()[:n]

    def decoded(tokenizer, latents):
        return torch.cat([to_uint8(tokenizer.decode(z.to(world.device))).cpu() for z in latents])

    def row(key, label, source, labels=None, against=None):
        found = measure(source, net, world, cfg.batch_size, title=label)
        fd = compare(found, against, ("fid",))["fid"] if against else None
        agreement = float(np.mean(found["predictions"].cpu().numpy() == np.asarray(labels))) if labels is not None and "predictions" in found else None
        rows[key] = dict(label=label, images=len(source), fd=fd, agreement=agreement)
        return found

    images, classes = drawn("val", Shapes.lengths["val"])
    held_out = row("held_out", "held-out images (the classifier's accuracy)", images, classes)
    row("real", "training images, as many as samples (floor)", *drawn("train", len(samples)), held_out)
    generated = row("samples", "samples", samples, labels, held_out)
    if paths[0].exists():
        tokenizer = load_tokenizer(paths[0]).to(world.device)
        originals, classes = images[:reconstructed], classes[:reconstructed]
        outputs = decoded(tokenizer, (tokenizer.encode(to_float(part.to(world.device)))[0] for part in originals.split(cfg.batch_size)))
        again = row("reconstructions", "reconstructions of held-out images (rFD)", outputs, classes, held_out)
        rows["reconstructions"]["psnr"] = psnr(to_float(outputs), to_float(originals)).mean().item()
        fd = compare(generated, again, ("fid",))["fid"]
        rows["samples_to_reconstructions"] = dict(label="samples, against the reconstructions", images=len(samples), fd=fd)
        if diffusion:
            side, mean, std = size // tokenizer.downsample, *(diffusion[key].view(-1, 1, 1) for key in ("latent_mean", "latent_std"))
            noise = torch.randn(len(samples), tokenizer.z_dim, side, side, generator=torch.Generator().manual_seed(0)) * std + mean
            row("untrained", "untrained pipeline: decoded Gaussian latents", decoded(tokenizer, noise.split(cfg.batch_size)), labels, held_out)
    return rows


# -----------------------------------------------------------------------------
# The command

def show(result, metrics):
    """Prints the table, with a line also for each metric that could not be had."""
    if "features" in result:
        print(f"features: {result['features']}" + ("" if result["features"] == "inception" else "; not comparable with numbers on Inception's"))
    if "rows" in result:
        print(f"{'':46} {'images':>7} {'FD':>9} {'agreement':>9} {'PSNR':>9}")
        for row in result["rows"].values():
            cells = (("fd", "9.3f"), ("agreement", "9.1%"), ("psnr", "9.2f"))
            print(f"{row['label']:46} {row['images']:7}", *(f"{'-':>9}" if row.get(key) is None else f"{row[key]:{form}}" for key, form in cells))
        return
    print(f"{result['samples']} against {result['reference']}; images: " + ", ".join(f"{key} {n or 'not stated'}" for key, n in result["images"].items()))
    for metric in metrics:
        heading, needs = METRICS[metric]
        heading = heading if metric != "fid" or result["features"] == "inception" else f"FD ({result['features']})"
        spread = f" +- {result[metric + '_std']:.4f}" if metric + "_std" in result else ""
        print(f"{heading:12}", f"{result[metric]:10.4f}{spread}" if metric in result else f"left out: it needs {needs}")


def run():
    cfg = parse_config(Config, PRESETS, positional=("samples", "reference"))
    world = init_world()
    metrics = list(dict.fromkeys(filter(None, cfg.metrics.split(","))))
    metrics += [*PAIRED] * (cfg.pairs and not {*PAIRED} & {*metrics})
    metrics = metrics or [name for name in METRICS if name not in PAIRED]
    if unknown := {*metrics} - {*METRICS}:
        raise UserError(f"--metrics={unknown.pop()}: there are {', '.join(METRICS)}")
    cfg.samples = cfg.samples or f"{cfg.out}/samples"
    if not Path(cfg.samples).exists():
        raise UserError(f"no folder or .npz {cfg.samples}" + "; python sample.py makes one" * (cfg.samples == f"{cfg.out}/samples"))
    result = dict(samples=cfg.samples, reference=cfg.reference or "held-out shapes", images={})

    if {*PAIRED} & {*metrics}:
        if not (Path(cfg.samples).is_dir() and Path(cfg.reference or "?").is_dir()):
            raise UserError("pairs are of two folders: python fid.py RECONSTRUCTIONS ORIGINALS --pairs=1")
        found = measure_pairs((cfg.samples, cfg.reference), metrics, cfg, world)
        result["images"]["pairs"] = found.pop("pairs")
        result.update(found)

    if {*metrics} - {*PAIRED}:
        if world.rank > 0:                       # the first process fetches or trains what is missing, the others find it
            world.barrier()
        net = load_features(cfg.features or ("inception" if cfg.reference else "toy"), cfg.out, world.device, cfg.inception)
        if world.rank == 0:
            world.barrier()
        result["features"] = net.name
        if cfg.reference:
            source = open_images(cfg.samples, cfg.image_size)
            neighbours = bool({"precision", "recall"} & {*metrics})
            reference = measure_reference(cfg.reference, net, cfg, world, neighbours)
            neighbours = neighbours and "features" in reference
            samples = measure(source, net, world, cfg.batch_size, cfg.workers, len(source) if neighbours else 0, cfg.samples)
            result["images"].update(samples=samples["n"], reference=reference.get("n"))
            if neighbours:
                result["images"]["reference_for_recall"] = len(reference["features"])
            if world.rank == 0:
                result.update(compare(samples, reference, metrics))
                if {"fid", "sfid"} & {*metrics} and min(samples["n"], reference.get("n") or FEW) < FEW:
                    print(f"warning: FID of fewer than {FEW} images is biased upwards; papers use 50000", file=sys.stderr)
        else:
            result["rows"] = measure_toy(cfg, net, world)

    if world.rank == 0:
        show(result, metrics)
        path = Path(cfg.out) / "fid.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(result, indent=1) + "\n")
        os.replace(path.with_suffix(".tmp"), path)


if __name__ == "__main__":
    main(run)
