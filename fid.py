"""
Judges images as OpenAI's ADM evaluator does, the papers' one.

    python fid.py  # the toy's out/samples beside what bounds them
    python fid.py SAMPLES REFERENCE  # FID, sFID, IS, precision, recall; folders, .npz, ADM's statistics
    python fid.py SAMPLES REFERENCE --metrics=fid --features=dinov2_vitl14  # another network's features
    python fid.py RECONSTRUCTIONS ORIGINALS --pairs=1  # PSNR, SSIM, LPIPS by name
    python fid.py --tokenizer=out/tokenizer.pt  # and rFID, equivariance on held-out images
    python fid.py SAMPLES --clip=FOLDER  # CLIP score of samples and their prompts

A reference's statistics are kept in REFERENCE.FEATURES.npz (a reference, too).
FID: arXiv 1706.08500; sFID: 2103.03841; IS: 1606.03498; precision and recall: 1904.06991; the evaluator:
github.com/openai/guided-diffusion.
"""
import contextlib
import math
import os
import re
import sys
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# before torch, for whose threads tokenizer.py sets the environment
from tokenizer import (
    LPIPS, TEXTS, Images, Positive, Shapes, UserError, alone, attribute_counts, center_crop, fingerprint,
    full_float32, init_world, list_images, load_checkpoint, load_rgb, load_state, load_text, load_tokenizer,
    load_vfm, load_weights, main, open_data, parse_config, psnr, read_json, read_lines, reading, replacing,
    save_checkpoint, shrink, ssim, to_float, to_uint8, train_on_shapes, write_json)

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.linalg import lapack
from torch.nn.utils import fuse_conv_bn_eval
from torch.utils.data import DataLoader
from tqdm import tqdm


@dataclass
class Config:
    preset: str = ""  # imagenet (given CUDA and data/imagenet/train) or toy
    samples: str = ""  # folder or .npz; empty: OUT/samples
    reference: str = "data/imagenet/VIRTUAL_imagenet256_labeled.npz"  # or a folder; empty: the toy
    metrics: str = ""  # of fid,sfid,is,precision,recall or psnr,ssim,lpips; empty: all
    features: str = ""  # inception, toy, a VFM's name or file; empty: toy for shapes, else inception
    inception: str = ""  # its weights; empty: fetch pytorch-fid's
    pairs: bool = False  # PSNR, SSIM, LPIPS of equal names in two folders
    lpips_weights: str = ""  # files of VGG16,LPIPS; empty: fetch them
    clip: str = ""  # CLIP score by clip-vit-large-patch14, or its folder
    prompts: str = ""  # ... of these lines in turn; empty: SAMPLES/prompts.json
    tokenizer: str = ""  # judge this one on held-out images
    data: str = ""  # ... of this data set; empty: its own
    caption_key: str = ""  # ... of tars: samples are NAME.json's, not NAME.txt's
    data_dir: str = "data"  # ... torchvision's folder
    download: bool = False  # ... them, if need be
    skip_bad: bool = False  # images that cannot be read: take the next, list them in OUT/bad_images.txt
    images: Positive = 50_000  # ... at most so many
    image_size: int = 0  # crop as ADM does; 0: the images' or tokenizer's
    batch_size: Positive = 256  # of each process
    workers: int = 8  # loader processes
    out: str = "out"  # of fid.json or eval.json
    cache: str = "out"  # the toy's drawings, VFM, classifier


PRESETS = dict(imagenet={}, toy=dict(reference="", images=2000, batch_size=64, workers=2))
# ADM's reference: openaipublic.blob.core.windows.net/diffusion/jan-2021/ref_batches/imagenet/256/
INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SETS = ("fid", "sfid", "is", "precision", "recall")
PAIRS = ("psnr", "ssim", "lpips")
HEADINGS = dict(
    clip="CLIP score", sfid="sFID", precision="precision", recall="recall", rfid="rFID",
    rotation="equivariance error, quarter turn", scaling="equivariance error, half size")
NEEDS = dict(
    precision="the reference's images, four of each set", recall="the reference's images, four of each set",
    lpips="--lpips_weights", scaling="another --image_size")


# --------------------------------------
# The formulas

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians (FID, arXiv 1706.08500, eq. 6), in float64.
    Means [D], covariances [D, D].

    The root's trace sums the roots of C1 C2's eigenvalues, those of the symmetric L^T C2 L for any L L^T = C1, here the
    pivoted Cholesky factor. (scipy.linalg.sqrtm is NaN or wrong with some BLAS builds.)"""
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if sigma1.shape != sigma2.shape or not np.isfinite(mu1.sum() + mu2.sum() + sigma1.sum() + sigma2.sum()):
        raise UserError(f"covariances {sigma1.shape} and {sigma2.shape}, or NaN in them (of one image?)")
    factor, pivots, rank, _ = lapack.dpstrf(sigma1, lower=1)
    factor = torch.from_numpy(np.tril(factor)[:, :rank])  # [D, rank], rows permuted
    permuted = torch.from_numpy(sigma2[np.ix_(pivots - 1, pivots - 1)])  # [D, D]
    roots = torch.linalg.eigvalsh(factor.T @ permuted @ factor).clamp_min(0).sqrt()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.sum())


def inception_score(logits, splits):
    """Logits [N, K] -> (mean, std) of the Inception Score (arXiv 1606.03498) over contiguous parts."""
    return score_parts(torch.as_tensor(logits).tensor_split(splits))


def score_parts(parts):
    """exp(mean KL(p || mean p)) of each part's logits [n, K] -> their mean, population's deviation."""
    scores = []
    for part in parts:
        log_p = part.double().log_softmax(1)  # [n, K]
        p = log_p.exp()
        scores.append(((p * log_p).sum(1).mean() + torch.special.entr(p.mean(0)).sum()).exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


@full_float32()
def precision_recall(reference, samples, k=3, block=1024):
    """Features [N, D], [M, D] -> (precision, recall) (arXiv 1904.06991): the share of samples in any ball of
    the reference, and the reverse. A ball reaches to the k-th nearest of its own set."""
    reference = torch.as_tensor(reference)
    centre = reference.mean(0)  # for small rounding errors
    reference = reference - centre
    samples = torch.as_tensor(samples) - centre

    def radii(rows):  # [n, D] -> [n]; row itself: nearest
        return torch.cat([torch.cdist(part, rows).kthvalue(k + 1, 1).values for part in rows.split(block)])

    def share_inside(rows, centres):
        radius = radii(centres)
        inside = [(torch.cdist(part, centres) <= radius).any(1) for part in rows.split(block)]
        return torch.cat(inside).double().mean().item()

    return share_inside(samples, reference), share_inside(reference, samples)


# --------------------------------------
# Features: a network(uint8 [B, 3, H, W]) -> (features [B, D], spatial [B, S] or None, logits [B, K] or None)

def resize_tf1(images, size):
    """[B, 3, H, W] -> float32 [B, 3, size, size], TensorFlow 1's `resize_bilinear`: output i at i * in/out (no
    half-pixel shift); no antialiasing."""
    for dim in (2, 3):
        n = images.shape[dim]
        position = torch.arange(size, device=images.device) * n  # [size], 1/size px: exact
        lower = position // size
        upper = (lower + 1).clamp_max(n - 1)
        weight = (position % size) / size
        a = images.index_select(dim, lower).float()
        b = images.index_select(dim, upper).float()
        images = a + (b - a) * (weight[:, None] if dim == 2 else weight)
    return images


def without_padding(branch_pool, inputs):
    """Hook: torchvision's average counts padding, TensorFlow's not."""
    pooled, = inputs  # [B, C, h, w]
    inside = F.avg_pool2d(torch.ones_like(pooled[:1, :1]), 3, 1, 1)  # share of the image
    return pooled / inside


class Mixed7c(nn.Module):
    """torchvision's InceptionE; pools by the maximum, alone."""

    def __init__(self, block):
        super().__init__()
        for name, layer in block.named_children():
            self.add_module(name, layer)

    def forward(self, x):  # [B, 2048, 8, 8]
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1)
        return torch.cat([
            self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single), self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double), self.branch_pool(pooled)], 1)


class Inception(nn.Module):
    """FID's Inception-v3 (arXiv 1512.00567): torchvision's but for its pools. uint8 [B, 3, H, W] -> pool [B, 2048],
    spatial [B, 2023] (Mixed_6d's first 7 channels, channels last), logits without bias [B, 1008] (ADM's)."""
    name = "inception"

    def __init__(self):
        super().__init__()
        from torchvision.models.inception import Inception3  # here: it takes seconds
        for name, block in Inception3(1008, aux_logits=False, init_weights=False).named_children():
            if name == "Mixed_7c":
                block = Mixed7c(block)
            elif hasattr(block, "branch_pool"):
                block.branch_pool.register_forward_pre_hook(without_padding)
            self.add_module(name, block)

    def forward(self, images):
        x = (resize_tf1(images, 299) - 128) / 128  # [B, 3, 299, 299]
        for name, block in self.named_children():  # in forward order
            if name == "avgpool":
                break
            x = block(x)
            if name == "Mixed_6d":
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # [B, 17 * 17 * 7]
        pool = x.mean((2, 3))  # [B, 2048]
        return pool, spatial, F.linear(pool, self.fc.weight)


def load_inception(path=""):
    """Of a public port's file (empty: pytorch-fid's), frozen, BatchNorms folded."""
    net = Inception()
    path = path or INCEPTION
    try:
        load_state(net, load_weights(path), path, ignore=(r"AuxLogits\.",))
    except UserError as error:
        raise UserError(f"FID needs {Path(INCEPTION).name}: --inception=PATH, or other --features ({error})")
    net.requires_grad_(False).eval()
    for layer in net.modules():
        if hasattr(layer, "bn"):
            layer.conv = fuse_conv_bn_eval(layer.conv, layer.bn)
            layer.bn = nn.Identity()
    return net.to(memory_format=torch.channels_last)


class VFMFeatures(nn.Module):
    """A VFM's class token (as FD-DINOv2, arXiv 2306.04675), or else its patch tokens' mean."""

    def __init__(self, name, cache):
        super().__init__()
        self.name = Path(name).stem
        self.vfm = load_vfm(name, cache)

    def forward(self, images):
        tokens, = self.vfm(self.vfm.resize(to_float(images)), cls=True)  # [B, 1 + N, D], or [B, N, D]
        return tokens.mean(1) if self.vfm.cls_token is None else tokens[:, 0], None, None


class Classifier(nn.Module):
    """The toy's judge names a drawing's shape, hue, texture and ground, so that the Frechet distance of its features
    sees them all; place and size off an earlier map, which does not learn from them."""
    name = "toy"
    attributes = ("shape", "hue", "texture", "ground", "place", "size")

    def __init__(self):
        super().__init__()

        def layer(d_in, d_out, kernel, stride):
            return nn.Conv2d(d_in, d_out, kernel, stride, 1, bias=False), nn.BatchNorm2d(d_out), nn.ReLU()

        self.body = nn.Sequential(
            *layer(3, 24, 4, 2), *layer(24, 48, 3, 1), nn.MaxPool2d(2), *layer(48, 96, 3, 1), nn.MaxPool2d(2),
            *layer(96, 128, 3, 1))
        self.head = nn.Linear(128, sum(attribute_counts(self.attributes[:4])))
        self.placement = nn.Sequential(
            *layer(48, 64, 3, 1), *layer(64, 64, 3, 1), nn.Flatten(),
            nn.Linear(64 * 8 * 8, sum(attribute_counts(self.attributes[4:]))))

    def logits(self, x):  # float [B, 3, 32, 32]
        maps = self.body[:7](x)  # [B, 48, 8, 8]; the last map, 4 x 4, is too coarse for edges
        features = self.body[7:](maps).mean((2, 3))
        return torch.cat([self.head(features), self.placement(maps.detach())], 1)

    def resize(self, images):
        return F.interpolate(to_float(images), (32, 32), mode="bilinear", antialias=True)

    def forward(self, images):
        features = self.body(self.resize(images)).mean((2, 3))  # [B, 128]
        return features, None, self.head(features)[:, :len(Shapes.classes)]

    def names(self, images):
        """uint8 [B, 3, H, W] -> the values of `attributes` [B, 6], place and size as `CAPTION` has them."""
        parts = self.logits(self.resize(images)).split(attribute_counts(self.attributes), 1)
        *values, place, size = (part.argmax(1) for part in parts)
        return torch.stack([*values, place // 8 * 2 + place % 4 // 2, size // 2], 1)  # of 16 and 4


def load_classifier(cache, device):
    """The toy's Classifier, frozen; trained once, kept in `cache`."""
    path = Path(cache) / "classifier.pt"
    recipe = dict(images=57_600, batch=64, lr=1e-2)
    with alone(path), torch.random.fork_rng([]), torch.enable_grad():  # the first process trains
        torch.default_generator.manual_seed(0)
        net = Classifier().to(device, memory_format=torch.channels_last)
        version = fingerprint(Shapes("train", 32).draw(np.arange(16)), *recipe.values(), str(net))
        saved = load_checkpoint(path, "classifier") if path.exists() else {}
        if saved.get("version") != version:
            train_on_shapes(
                "training the toy's classifier (once)", net, lambda x: [net.logits(x)], net.attributes, cache, device,
                **recipe)
            saved = dict(kind="classifier", version=version, model=net.state_dict())
            save_checkpoint(path, **saved)
    return load_state(net, saved["model"], str(path)).requires_grad_(False).eval()


def load_features(name, cache="out", device="cpu", inception=""):
    """Frozen: "inception" (of that file), "toy", a VFM's name or file."""
    if name == "toy":
        return load_classifier(cache, device)
    net = load_inception(inception) if name == "inception" else VFMFeatures(name, cache)
    return net.to(device)


# --------------------------------------
# Sets of images: len() and source[range], uint8 [b, 3, H, W]; a tensor is one

class Folder:
    """A folder's images by path, of one size (`crop`: cropped as ADM does)."""

    def __init__(self, folder, crop=0):
        self.paths = list_images(folder)
        self.crop = crop
        self.size = self.load(self.paths[0]).size

    def load(self, path):
        image = load_rgb(path)
        return center_crop(image, self.crop) if self.crop else image

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, indices):
        images = []
        for i in indices:
            image = self.load(self.paths[i])
            if image.size != self.size:
                raise UserError(f"not of {self.size}: {self.paths[i]} {image.size}; --image_size=N crops them all")
            images.append(np.asarray(image))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


class Npz:
    """`arr_0` of an .npz, uint8 [N, H, W, 3] as ADM's, streamed."""

    def __init__(self, path):
        self.paths = [path]
        self.process = None  # that opened the file: a fork would share its position
        with reading(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            np.lib.format.read_magic(member)
            self.shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            self.start = member.tell()
        if dtype != np.uint8 or self.shape[3:] != (3,) or fortran:
            raise UserError(f"{path}: arr_0 must be uint8 images [N, H, W, 3], not {dtype} {list(self.shape)}")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, indices):
        shape = self.shape[1:]
        nbytes = math.prod(shape)
        with reading(self.paths[0]):
            if self.process != os.getpid():
                self.file = zipfile.ZipFile(self.paths[0]).open("arr_0.npy")
                self.process = os.getpid()
            self.file.seek(self.start + indices.start * nbytes)
            data = bytearray(self.file.read(len(indices) * nbytes))
            images = np.frombuffer(data, np.uint8).reshape(len(indices), *shape)
        return torch.from_numpy(images).permute(0, 3, 1, 2)


class Selection:
    """At most `n` evenly spaced images of an Images, and their labels."""

    def __init__(self, data, n):
        self.data = data
        self.indices = np.linspace(0, len(data), min(n, len(data)), endpoint=False).astype(int)
        self.labels = np.asarray(data.labels)[self.indices]

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, indices):
        return torch.stack([self.data[int(self.indices[i])][0] for i in indices])


def open_images(path, crop=0):
    if not Path(path).exists():
        raise UserError(f"no folder or .npz {path} (python sample.py makes out/samples)")
    return Folder(path, crop) if Path(path).is_dir() else Npz(path)


def batches(source, world, batch_size=64, workers=0, title="images"):
    """(range, images) of this process's contiguous share."""
    share = -(-len(source) // world.size)
    start = min(len(source), world.rank * share)
    stop = min(len(source), start + share)
    ranges = [range(i, min(i + batch_size, stop)) for i in range(start, stop, batch_size)]
    loader = DataLoader(source, None, sampler=ranges, num_workers=workers, pin_memory=world.device.type == "cuda")
    hidden = world.rank > 0 or not title
    for indices, images in tqdm(zip(ranges, loader), title, len(ranges), leave=False, disable=hidden):
        yield indices, images.to(world.device, non_blocking=True)


# --------------------------------------
# One pass over a set

def moments(rows):
    """Rows [N, D] -> mean [D], unbiased covariance [D, D] in float64."""
    mean = rows.mean(0, dtype=torch.float64)
    scatter = 0
    for part in rows.split(4096):
        centred = part - mean
        scatter = scatter + centred.T @ centred
    return mean.cpu().numpy(), (scatter / (len(rows) - 1)).cpu().numpy()


@torch.no_grad()
@full_float32()
def image_statistics(source, net, world, batch_size=64, workers=0, title="images", transform=None):
    """One pass -> dict: n; features [n, D], mu, sigma; where the network has them mu_s, sigma_s (spatial) and, from
    logits, inception_score (mean, std), predictions [n]. `transform(range, batch)`: the uint8 images to look at."""
    n = len(source)
    outputs = []
    for rows in net(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=world.device)):  # widths
        outputs.append(None if rows is None else torch.zeros(n, rows.shape[1], device=world.device))
    for indices, images in batches(source, world, batch_size, workers, title):
        if transform:
            images = transform(indices, images)
        for output, rows in zip(outputs, net(images)):
            if output is not None:
                output[indices.start:indices.stop] = rows
    for output in outputs:
        if output is not None:
            world.sum(output)  # each has filled its rows
    features, spatial, logits = outputs  # [n, D], [n, S], [n, K]
    found = dict(n=n, features=features)
    found["mu"], found["sigma"] = moments(features)
    if spatial is not None:
        found["mu_s"], found["sigma_s"] = moments(spatial)
    if logits is not None:
        found.update(inception_score=score_parts(logits.split(5000)), predictions=logits.argmax(1))  # ADM's parts
    return found


def distance(a, b, key=""):
    """Frechet distance of two `image_statistics`; key "_s": spatial."""
    return frechet_distance(a["mu" + key], a["sigma" + key], b["mu" + key], b["sigma" + key])


def judge(images, net, world, labels=None, reference=None, batch_size=64, title="images", workers=0, transform=None):
    """A source -> dict: images, n; fd, the Frechet distance to the statistics `reference`; agreement, the share that
    the net takes for its `labels` (None where not asked); statistics, by `image_statistics`."""
    stats = image_statistics(images, net, world, batch_size, workers, title, transform)
    fd = agreement = None
    if reference is not None:
        fd = distance(stats, reference)
    if labels is not None and "predictions" in stats and not isinstance(net, Inception):  # the toy's labels
        agreement = (stats["predictions"].cpu() == torch.as_tensor(labels)).double().mean().item()
    return dict(images=len(images), fd=fd, agreement=agreement, statistics=stats)


# --------------------------------------
# Pairs and tokenizers

def note(world, text):
    if world.rank == 0:
        print(f"note: {text}", file=sys.stderr)


def paired_measures(names, lpips_weights, world):
    """{name: function of two batches in [-1, 1] -> [B]}; LPIPS if its weights are there."""
    known = dict(psnr=psnr, ssim=ssim)
    measures = {name: known[name] for name in known if name in names}
    if "lpips" in names:
        try:
            measures["lpips"] = LPIPS(lpips_weights).to(world.device)
        except UserError as error:
            note(world, error)
    return measures


def summary(values, world):
    """{name: [n], this process's rows filled} -> {name: mean, name_std: population's}."""
    found = {}
    for name, rows in values.items():
        rows = world.sum(rows).double()
        found[name] = rows.mean().item()
        found[f"{name}_std"] = rows.std(correction=0).item()
    return found


@torch.no_grad()
@full_float32()
def judge_pairs(cfg, metrics, world):
    """Of two folders' images, equal paths but for suffixes."""
    if not cfg.reference:
        raise UserError("--pairs=1 takes two folders, RECONSTRUCTIONS and ORIGINALS")
    sides = []
    names = []
    for folder in (cfg.samples, cfg.reference):
        side = Folder(folder, cfg.image_size)
        side.paths.sort(key=lambda path: path.with_suffix(""))
        names.append([str(path.relative_to(folder).with_suffix("")) for path in side.paths])
        sides.append(side)
    a, b = map(Counter, names)
    single = sorted((a - b) + (b - a))
    if single:
        raise UserError(f"{len(single)} images have no partner of the same name: {', '.join(single[:10])}")
    left, right = sides
    if left.size != right.size:
        raise UserError(f"pairs need equal sizes, not {left.size} and {right.size}")
    measures = paired_measures(metrics, cfg.lpips_weights, world)
    n = len(left)
    values = {name: torch.zeros(n, device=world.device) for name in measures}
    left = batches(left, world, cfg.batch_size, cfg.workers, "pairs")
    right = batches(right, world, cfg.batch_size, cfg.workers, "")
    for (indices, images), (_, others) in zip(left, right):
        for name, measure in measures.items():
            values[name][indices.start:indices.stop] = measure(to_float(images), to_float(others))
    return dict(samples=cfg.samples, reference=cfg.reference, images=dict(pairs=n), **summary(values, world))


MOVES = dict(  # antialias: images, not latents
    rotation=lambda x, antialias: torch.rot90(x, 1, (2, 3)),
    scaling=lambda x, antialias: shrink(x, 0.5, antialias=antialias))


def judge_tokenizer(tokenizer, source, net, world, measures, moves=(), **keywords):
    """-> `judge` of reconstructions, the means of `measures` over the pairs and, for T in `moves`, of the equivariance
    error |encode(T x) - T encode(x)| / |T encode(x)|."""
    values = {name: torch.zeros(len(source), device=world.device) for name in (*measures, *moves)}

    def reconstruct(indices, images):  # uint8 [B, 3, H, W]
        rows = slice(indices.start, indices.stop)
        x = to_float(images)
        mean, _ = tokenizer.encode(x)  # [B, C, h, w]
        decoded = to_uint8(tokenizer.decode(mean))
        for name, measure in measures.items():
            values[name][rows] = measure(x, to_float(decoded))
        for name in moves:
            moved = MOVES[name](mean, False).flatten(1)
            error = tokenizer.encode(MOVES[name](x, True))[0].flatten(1) - moved
            values[name][rows] = error.norm(dim=1) / moved.norm(dim=1)
        return decoded

    judged = judge(source, net, world, title="reconstructions", transform=reconstruct, **keywords)
    return judged, summary(values, world)


def no_features(images):
    """If Inception has no weights."""
    return torch.zeros(len(images), 1, device=images.device), None, None


def evaluate(cfg, world):
    """A tokenizer on held-out images, its training's unless cfg says otherwise."""
    tok = load_tokenizer(cfg.tokenizer).to(world.device)
    if not cfg.data:
        cfg.data = tok.config.get("data", "data/imagenet")
        cfg.caption_key = cfg.caption_key or tok.config.get("caption_key", "")
    size = cfg.image_size or tok.resolution
    data = open_data(cfg, "val", size)
    source = Selection(data, cfg.images)
    toy = cfg.data == "shapes"
    try:
        net = load_features(cfg.features or ("toy" if toy else "inception"), cfg.cache, world.device, cfg.inception)
    except UserError as error:
        if cfg.features:
            raise
        note(world, error)
        net = no_features
    measures = paired_measures(PAIRS[:2] if toy and not cfg.lpips_weights else PAIRS, cfg.lpips_weights, world)
    moves = ["rotation"]
    with contextlib.suppress(UserError):
        tok.check_size(size // 2, size // 2)
        moves.append("scaling")
    loading = dict(batch_size=cfg.batch_size, workers=cfg.workers)
    real = judge(source, net, world, title="originals", **loading)["statistics"]
    judged, means = judge_tokenizer(tok, source, net, world, measures, moves, reference=real, **loading)
    if net is not no_features:
        means.update(features=net.name, rfid=judged["fd"])
    return dict(
        samples=cfg.tokenizer, reference=f"held-out {cfg.data}, {size} px", images=dict(pairs=len(source)), **means)


@torch.no_grad()
@full_float32()
def clip_score(cfg, world):
    """Mean over samples of 100 max(cosine of CLIP's (arXiv 2103.00020) image and text vectors, 0)."""
    source = open_images(cfg.samples, cfg.image_size)
    named = read_json(Path(cfg.samples, "prompts.json"))
    captions = [named.get(Path(path).name) for path in source.paths]
    if cfg.prompts:
        lines = read_lines(cfg.prompts)
        captions = [lines[i % len(lines)] for i in range(len(source))]
    if None in captions:
        raise UserError(f"{cfg.samples} has no prompts.json of all its images: --prompts=FILE, one a line")
    file = f"{cfg.clip}/model.safetensors" if os.path.isdir(cfg.clip) else TEXTS.get(cfg.clip, cfg.clip)
    text = load_text(cfg.clip).to(world.device)
    vision = load_vfm(file).to(world.device)
    projection = load_weights(file)["visual_projection.weight"].to(world.device, torch.float32)
    scores = torch.zeros(len(source), device=world.device)
    for indices, images in batches(source, world, cfg.batch_size, cfg.workers, cfg.samples):
        rows = slice(indices.start, indices.stop)
        tokens, = vision(vision.resize(to_float(images)), cls=True)  # [B, 1 + N, D]
        _, pooled = text(captions[rows])
        scores[rows] = 100 * F.cosine_similarity(tokens[:, 0] @ projection.T, pooled).clamp_min(0)
    means = summary(dict(clip=scores), world)
    return dict(samples=cfg.samples, reference=cfg.prompts or "their prompts", images=dict(pairs=len(source)), **means)


# --------------------------------------
# Samples against a reference; the toy's

KEPT = ("mu", "sigma", "mu_s", "sigma_s", "features", "n", "network", "source")  # ADM's files have the first four


def read_statistics(path):
    """ADM's or our statistics (`images`: whether the file holds them, too); {} for other files."""
    if not zipfile.is_zipfile(path):
        return {}
    with reading(path), np.load(path) as file:
        if "mu" not in file:
            return {}
        entries = {key: file[key] if file[key].ndim else file[key].item() for key in KEPT if key in file}
        return dict(entries, images="arr_0" in file)


def reference_statistics(path, net, cfg, world, neighbours):
    """ADM's, the cache's, or measured and kept; `neighbours`: with features."""
    network = f"{net.name} {fingerprint([*net.parameters()][-1])}"  # the weights' stamp
    given = read_statistics(path)
    theirs = given.get("network", network if isinstance(net, Inception) else "inception")
    if given and theirs != network:
        raise UserError(f"{path} has statistics of other features: {theirs}, not {network}")
    if given and not (neighbours and given["images"]):
        return given
    source = open_images(path, cfg.image_size)
    cache = Path(f"{path.rstrip('/')}.{net.name}.npz")
    files = [(str(p), os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in source.paths]
    version = fingerprint(files, cfg.image_size, network)
    found = read_statistics(cache)
    if found.get("source") != version:
        found = image_statistics(source, net, world, cfg.batch_size, cfg.workers, path)
        chosen = np.linspace(0, len(source), min(len(source), 10_000), endpoint=False).astype(int)  # ADM's
        found.update(features=found["features"][chosen].cpu().numpy(), network=network, source=version)
        try:
            if world.rank == 0:
                with replacing(cache) as temporary, open(temporary, "wb") as file:
                    np.savez(file, **{key: found[key] for key in KEPT if key in found})
        except UserError as error:
            note(world, error)
    return {**found, **given, "n": None} if given else found


def judge_sets(cfg, metrics, net, world):
    source = open_images(cfg.samples, cfg.image_size)
    near = bool({"precision", "recall"} & {*metrics})
    ref = reference_statistics(cfg.reference, net, cfg, world, near)
    near = near and "features" in ref
    samples = image_statistics(source, net, world, cfg.batch_size, cfg.workers, cfg.samples)
    images = dict(samples=samples["n"], reference=ref.get("n"))
    if near:
        images["reference_for_recall"] = len(ref["features"])
    if {"fid", "sfid"} & {*metrics} and min(samples["n"], ref.get("n") or 10_000) < 10_000:
        note(world, "FID of fewer than 10000 images is biased upwards")
    result = dict(samples=cfg.samples, reference=cfg.reference, images=images, features=net.name)
    for metric, key in (("fid", ""), ("sfid", "_s")):
        if metric in metrics and "mu" + key in samples and "mu" + key in ref:
            result[metric] = distance(samples, ref, key)
    if "inception_score" in samples:
        result["is"], result["is_std"] = samples["inception_score"]
    if near and min(len(samples["features"]), len(ref["features"])) > 3:
        theirs = torch.as_tensor(ref["features"], device=world.device)
        result["precision"], result["recall"] = precision_recall(theirs, samples["features"])
    return result


def toy_table(cfg, net, world):
    """-> {row: dict(label, images, fd, agreement[, psnr])}, `geneval` or None. A distance says little by itself: beside
    it stand those of training images (the floor), reconstructions, an untrained pipeline (its DiT returns the noise).
    """
    samples = open_images(cfg.samples)
    size = samples[range(1)].shape[-1]
    prompts = read_json(Path(cfg.samples, "prompts.json"))
    path = Path(cfg.out, "diffusion-text.pt" if prompts else "diffusion.pt")
    saved = load_checkpoint(path, "diffusion") if path.exists() else {}
    data = saved.get("config", {}).get("data", "shapes")
    if data != "shapes":
        raise UserError(f"samples made from --data={data}: give a REFERENCE")
    classes = prompts or read_json(Path(cfg.samples, "labels.json"))
    labels = [classes.get(path.name) for path in samples.paths] if classes else None
    if classes and None in labels:
        raise UserError(f"{'prompts' if prompts else 'labels'}.json lacks some of {cfg.samples}: run sample.py again")
    if prompts:
        captions = labels
        labels = [read_caption(text)["shape"] for text in captions]
    rows = {}

    def add(key, label, judged):
        statistics = judged.pop("statistics")
        rows[key] = dict(label=label, **judged)
        return statistics

    val, train = (Images("shapes", split, size, cache=cfg.cache) for split in ("val", "train"))
    some = Selection(val, cfg.images)
    val = Selection(val, len(val))
    train = Selection(train, len(samples))
    real = add("held_out", "held-out images (the classifier's accuracy)", judge(val, net, world, val.labels))
    add("real", "training images, as many as samples (floor)", judge(train, net, world, train.labels, real))
    generated = add("samples", "samples", judge(samples, net, world, labels, real))
    path = Path(cfg.out, "tokenizer.pt")
    if path.exists():
        tok = load_tokenizer(path).to(world.device)
        judged, means = judge_tokenizer(tok, some, net, world, dict(psnr=psnr), labels=some.labels, reference=real)
        judged["psnr"] = means["psnr"]
        decoded = add("reconstructions", "reconstructions of held-out images (rFD)", judged)
        rows["samples_to_reconstructions"] = dict(
            label="samples, against the reconstructions", images=len(samples), fd=distance(generated, decoded))
        if saved and saved.get("tokenizer_is") in (None, fingerprint(tok)):
            side = size // tok.downsample
            noise = torch.randn(len(samples), tok.z_dim, side, side, generator=torch.Generator().manual_seed(0))
            mean, std = (saved[key].view(tok.z_dim, -1) for key in ("latent_mean", "latent_std"))  # [C, 1 or h w]
            latents = (noise.flatten(2) * std + mean).view_as(noise)
            judged = judge(latents, net, world, labels, real, transform=lambda _, z: to_uint8(tok.decode(z)))
            add("untrained", "untrained pipeline: decoded Gaussian latents", judged)
    return rows, geneval(samples, captions, val, net, world) if prompts and hasattr(net, "names") else None


# --------------------------------------
# The toy's GenEval (after arXiv 2310.11513): what the classifier names, beside what captions ask for

CAPTION = dict(  # words of Shapes.caption by value, in order
    size=["small", "large"], hue=Shapes.hues, shape=[*map(str.lower, Shapes.classes)],
    place=["upper left", "lower left", "upper right", "lower right"], ground=Shapes.hues, texture=Shapes.textures)
PATTERN = "a {size} {hue} {shape} at the {place} on a {ground} background {texture}".format(
    **{name: f"({'|'.join(words)})" for name, words in CAPTION.items()})


def read_caption(text):
    """Shapes.caption's inverse -> {attribute: value}; case and commas do not matter. UserError for other texts."""
    found = re.fullmatch(PATTERN, " ".join(text.lower().replace(",", " ").split()))
    if not found:
        raise UserError(f"not a caption of shapes: '{text}'; give a REFERENCE")
    return {name: CAPTION[name].index(word) for name, word in zip(CAPTION, found.groups())}


def score_captions(named, asked):
    """Values named, asked for, [n, 6] as Classifier.attributes -> {measure: share, None of no images}: each; overall,
    their mean; all six right; binding, hue and ground right where they differ, or swapped there; of pairs of shape and
    hue seen in text training or left_out."""
    right = named == asked
    everything = right.all(1)
    shape, hue, _, ground, *_ = asked.T
    differ = hue != ground
    left_out = Shapes.left_out(shape, hue)

    def share(rows):
        return float(rows.mean()) if len(rows) else None

    scores = {name: share(right[:, k]) for k, name in enumerate(Classifier.attributes)}
    scores.update(
        overall=share(right), all=share(everything), binding=share((right[:, 1] & right[:, 3])[differ]),
        swapped=share(((named[:, 1] == ground) & (named[:, 3] == hue))[differ]))
    for key, rows in (("seen", ~left_out), ("left_out", left_out)):
        scores.update({f"shape_{key}": share(right[rows, 0]), f"all_{key}": share(everything[rows])})
    return scores


def geneval(samples, captions, val, net, world):
    """`score_captions` of samples and of as many real, held-out images, the judge's ceiling; same_captions: whether
    both are of equal ones."""
    first = range(min(len(samples), len(val)))
    theirs = [val.data.caption(i) for i in first]
    result = dict(images=len(samples), same_captions=captions == theirs)
    for key, source, texts in (("samples", samples, captions), ("real", val[first], theirs)):
        asked = np.array([[read_caption(text)[name] for name in Classifier.attributes] for text in texts])
        named = image_statistics(source, lambda x: (net.names(x).float(), None, None), world, title=key)["features"]
        result[key] = score_captions(named.cpu().numpy(), asked)
    return result


# --------------------------------------
# The command

def show_geneval(result):
    captions = "the same" if result["same_captions"] else "other"
    print(f"\n{'right, of what captions ask for':46} {'samples':>9} {'real':>9} images of {captions} captions")
    for measure in result["real"]:
        line = f"{measure.replace('_', ' '):46}"
        for key in ("samples", "real"):
            share = result[key][measure]
            line += f" {'-':>9}" if share is None else f" {share:9.1%}"
        print(line)


def show_rows(rows):
    print(f"{'':46} {'images':>7} {'FD':>9} {'agreement':>9} {'PSNR':>9}")
    for row in rows.values():
        line = f"{row['label']:46} {row['images']:7}"
        for key, form in (("fd", "9.3f"), ("agreement", "9.1%"), ("psnr", "9.2f")):
            value = row.get(key)
            line += f" {'-':>9}" if value is None else f" {value:{form}}"
        print(line)


def show_metrics(result, metrics):
    images = ", ".join(f"{key} {n or 'not stated'}" for key, n in result["images"].items())
    print(f"{result['samples']} against {result['reference']}; images: {images}")
    for metric in metrics:
        heading = HEADINGS.get(metric, metric.upper())
        if result.get("features", "inception") != "inception":
            heading = heading.replace("FID", f"FD ({result['features']})")
        value = f"left out: it needs {NEEDS.get(metric, 'Inception')}"
        if metric in result:
            value = f"{result[metric]:10.4f}"
        if f"{metric}_std" in result:
            value += f" +- {result[f'{metric}_std']:.4f}"
        print(f"{heading:33}{value}")


def run():
    cfg = parse_config(Config, PRESETS, positional=("samples", "reference"))
    world = init_world(cfg.out, cfg.cache)
    cfg.samples = cfg.samples or f"{cfg.out}/samples"
    known = PAIRS if cfg.pairs else SETS
    metrics = cfg.metrics.split(",") if cfg.metrics else known
    if cfg.metrics and (cfg.tokenizer or cfg.clip):
        raise UserError("--metrics chooses among those of two sets, or of --pairs=1")
    if not {*metrics} <= {*known}:
        raise UserError(f"--metrics={cfg.metrics}: there are {', '.join(known)}")
    if cfg.tokenizer:
        metrics = (*PAIRS, "rfid", "rotation", "scaling")
        result = evaluate(cfg, world)
    elif cfg.clip:
        metrics = ["clip"]
        result = clip_score(cfg, world)
    elif cfg.pairs:
        result = judge_pairs(cfg, metrics, world)
    else:
        features = cfg.features or ("inception" if cfg.reference else "toy")
        net = load_features(features, cfg.cache, world.device, cfg.inception)
        if cfg.reference:
            result = judge_sets(cfg, metrics, net, world)
        else:
            rows, told = toy_table(cfg, net, world)
            result = dict(samples=cfg.samples, reference="held-out shapes", images={}, features=net.name, rows=rows)
            if told:
                result["geneval"] = told
    if world.rank > 0:
        return
    if "features" in result:
        other = "" if result["features"] == "inception" else "; not comparable with numbers on Inception's"
        print(f"features: {result['features']}{other}")
    if "rows" in result:
        show_rows(result["rows"])
        if told:
            show_geneval(told)
    else:
        show_metrics(result, metrics)
    write_json(f"{cfg.out}/{'eval' if cfg.tokenizer else 'fid'}.json", result)


if __name__ == "__main__":
    main(run)
