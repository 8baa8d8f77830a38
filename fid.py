"""
Judges images with the arithmetic of OpenAI's ADM evaluator, so that the numbers can stand beside the papers'.

    python fid.py                                       # the toy's out/samples beside what bounds them
    python fid.py SAMPLES REFERENCE                     # FID, sFID, IS, precision, recall; folders or .npz (arr_0)
    python fid.py out/samples.npz VIRTUAL_imagenet256_labeled.npz          # ADM's statistics
    python fid.py SAMPLES REFERENCE --metrics=fid --features=dinov2_vitl14 # on another network's features
    python fid.py RECONSTRUCTIONS ORIGINALS --pairs=1   # PSNR, SSIM, LPIPS of the images of equal names
    python fid.py --tokenizer=out/tokenizer.pt          # PSNR, SSIM, LPIPS, rFID, equivariance on held-out images
    torchrun --nproc_per_node=8 fid.py SAMPLES REFERENCE

A reference's statistics are kept beside it (REFERENCE.inception.npz), which may itself be the reference.
FID: arXiv 1706.08500; sFID: 2103.03841; IS: 1606.03498; precision and recall: 1904.06991; the evaluator:
github.com/openai/guided-diffusion.
"""
import contextlib
import math
import sys
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.linalg import lapack
from torch.nn.utils import fuse_conv_bn_eval
from torch.utils.data import DataLoader
from torchvision.models.inception import BasicConv2d, Inception3, InceptionE
from tqdm import tqdm

from tokenizer import (LPIPS, Images, Positive, Shapes, UserError, alone, attribute_counts, center_crop, fingerprint,
                       init_world, list_images, load_checkpoint, load_rgb, load_state, load_tokenizer, load_vfm,
                       load_weights, main, open_data, parse_config, psnr, read_json, replacing, save_checkpoint,
                       shrink, ssim, to_float, to_uint8, train_on_shapes, write_json)


@dataclass
class Config:
    preset: str = ""            # imagenet or toy; imagenet where there is CUDA and data/imagenet/train
    samples: str = ""           # folder or .npz of images; empty: OUT/samples
    reference: str = "data/imagenet/VIRTUAL_imagenet256_labeled.npz"  # folder, .npz, ADM's statistics; empty: the toy
    metrics: str = ""           # of fid,sfid,is,precision,recall, with --pairs=1 of psnr,ssim,lpips; empty: all
    features: str = ""          # inception, toy (a small classifier), a VFM's name or file; empty: toy for shapes alone
    inception: str = ""         # file of the Inception weights; empty: fetch pytorch-fid's
    pairs: bool = False         # PSNR, SSIM, LPIPS of the images of equal names in two folders
    lpips_weights: str = ""     # files of VGG16 and LPIPS, comma-separated; empty: fetch the public ones
    tokenizer: str = ""         # evaluate this checkpoint, ours or an official one, on held-out images
    data: str = ""              # ... of this data set, as tokenizer.py's; empty: of what it was trained on
    data_dir: str = "data"      # ... where torchvision's data sets lie
    download: bool = False      # ... let torchvision download them
    images: Positive = 50_000   # ... at most so many
    image_size: int = 0         # crop to this size as ADM does; 0: as the images are, or the tokenizer's
    batch_size: Positive = 256  # a step and process
    workers: int = 8            # loader processes
    out: str = "out"            # where fid.json or eval.json is written
    cache: str = "out"          # folder of the toy's drawings, VFM and classifier, shared by all runs


PRESETS = dict(imagenet={}, toy=dict(reference="", images=2000, batch_size=64, workers=2))
# ADM's reference: openaipublic.blob.core.windows.net/diffusion/jan-2021/ref_batches/imagenet/256/
INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SPLIT = 5000  # ADM's images per split of the Inception Score
NEIGHBOURS = 10_000  # ADM's reference images for precision and recall
SETS = ("fid", "sfid", "is", "precision", "recall")
PAIRS = ("psnr", "ssim", "lpips")
TOKENIZER = (*PAIRS, "rfid", "rotation", "scaling")
HEADINGS = dict(sfid="sFID", precision="precision", recall="recall", rfid="rFID",
                rotation="equivariance error, quarter turn", scaling="equivariance error, half size")
NEEDS = dict(precision="the reference's images", recall="the reference's images", lpips="--lpips_weights",
             scaling="another --image_size")


# -----------------------------------------------------------------------------
# The formulas

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians (FID, arXiv 1706.08500, eq. 6), in float64.
    Means [D], covariances [D, D]. UserError for different widths or NaN.

    The trace of the root is the sum of the roots of the eigenvalues of C1 C2, which are those of the symmetric
    L^T C2 L for any L with L L^T = C1; the pivoted Cholesky factor has as many columns as C1 has rank.
    (scipy.linalg.sqrtm of the product is NaN or wrong with some BLAS builds.)"""
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if sigma1.shape != sigma2.shape or not np.isfinite(mu1.sum() + mu2.sum() + sigma1.sum() + sigma2.sum()):
        raise UserError(f"covariances {sigma1.shape} and {sigma2.shape}, or NaN in them (of one image?)")
    factor, pivots, rank, _ = lapack.dpstrf(sigma1, lower=1)
    factor = torch.from_numpy(np.tril(factor)[:, :rank])  # [D, rank], rows permuted
    permuted = torch.from_numpy(sigma2[np.ix_(pivots - 1, pivots - 1)])  # [D, D]
    roots = torch.linalg.eigvalsh(factor.T @ permuted @ factor).clamp_min(0).sqrt()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.sum())


def inception_score(logits, splits):
    """Logits [N, K] -> (mean, std) of the Inception Score (arXiv 1606.03498) over `splits` contiguous parts."""
    logits = torch.as_tensor(logits)
    split = torch.arange(len(logits), device=logits.device) * splits // len(logits)  # [N]: image i's
    return score_of_sums(split_sums(logits, split, splits))


def split_sums(logits, split, splits):
    """What the Inception Score needs of logits [B, K], sums per split of 1, sum p log p, p -> [splits, 2 + K]."""
    log_p = logits.double().log_softmax(1)  # [B, K]
    p = log_p.exp()
    terms = torch.cat([torch.ones_like(p[:, :1]), (p * log_p).sum(1, keepdim=True), p], 1)
    return terms.new_zeros(splits, terms.shape[1]).index_add_(0, split, terms)


def score_of_sums(sums):
    """exp(mean KL(p || mean p)) of each split -> their mean and standard deviation (the population's, as ADM's)."""
    means = sums[:, 1:] / sums[:, :1]  # [splits, 1 + K]
    scores = (means[:, 0] + torch.special.entr(means[:, 1:]).sum(1)).exp()  # -> [splits]
    return scores.mean().item(), scores.std(correction=0).item()


@contextlib.contextmanager
def full_float32():
    """No TF32: numbers must not depend on the card."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@full_float32()
def precision_recall(reference, samples, k=3, block=1024):
    """Features [N, D], [M, D] -> (precision, recall) (arXiv 1904.06991): the share of samples that lie in the ball of
    any reference image, and the reverse. A ball reaches to the k-th nearest of its own set, itself not counted."""
    reference, samples = torch.as_tensor(reference), torch.as_tensor(samples)
    centre = reference.mean(0)  # leaves distances as they are, their rounding small
    reference, samples = reference - centre, samples - centre

    def radii(rows):  # [n, D] -> [n]; the nearest is the row itself
        return torch.cat([torch.cdist(part, rows).kthvalue(k + 1, 1).values for part in rows.split(block)])

    def share_inside(rows, centres):
        radius = radii(centres)
        inside = [(torch.cdist(part, centres) <= radius).any(1) for part in rows.split(block)]
        return torch.cat(inside).double().mean().item()

    return share_inside(samples, reference), share_inside(reference, samples)


# -----------------------------------------------------------------------------
# Features: a network(uint8 [B, 3, H, W]) -> (features [B, D], spatial [B, S] or None, logits [B, K] or None)

def resize_tf1(images, size):
    """[B, 3, H, W] -> float32 [B, 3, size, size] in the same range, as TensorFlow 1's `resize_bilinear`: output i lies
    at i * in/out (no half-pixel shift), no antialiasing, no rounding."""
    for dim in (2, 3):
        n = images.shape[dim]
        position = torch.arange(size, device=images.device) * n  # [size], in 1/size pixels: exact
        lower = position // size
        upper = (lower + 1).clamp_max(n - 1)
        weight = (position % size) / size
        a = images.index_select(dim, lower).float()
        b = images.index_select(dim, upper).float()
        images = a + (b - a) * (weight[:, None] if dim == 2 else weight)
    return images


def without_padding(branch_pool, inputs):
    """A hook before `branch_pool`: torchvision's average counts the padding, TensorFlow's does not."""
    pooled, = inputs  # [B, C, h, w]
    inside = F.avg_pool2d(torch.ones_like(pooled[:1, :1]), 3, 1, 1)  # each window's share of the image
    return pooled / inside


class Mixed7c(InceptionE):
    """Here alone the network pools by the maximum."""

    def forward(self, x):  # [B, 2048, 8, 8]
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1)
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
                          self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)], 1)


class Inception(Inception3):
    """The Inception-v3 of 2015-12-05 with 1008 classes on which FID is defined (arXiv 1512.00567): torchvision's but
    for its pools. net(uint8 [B, 3, H, W]) -> pool [B, 2048], spatial [B, 2023] (the first 7 channels of Mixed_6d,
    channel last, for sFID), logits without bias [B, 1008] (for IS, as in ADM's graph)."""
    name = "inception"

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
        for block in self.children():
            if hasattr(block, "branch_pool"):
                block.branch_pool.register_forward_pre_hook(without_padding)
        self.Mixed_7c = Mixed7c(2048)

    def forward(self, images):
        x = (resize_tf1(images, 299) - 128) / 128  # [B, 3, 299, 299]
        for name, block in self.named_children():  # in the order of the forward pass
            if name == "avgpool":
                break
            x = block(x)
            if name == "Mixed_6d":
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # [B, 17 * 17 * 7]
        pool = x.mean((2, 3))  # [B, 2048, 8, 8] -> [B, 2048]
        return pool, spatial, F.linear(pool, self.fc.weight)


def load_inception(path=""):
    """Of a public port's file (empty: pytorch-fid's, fetched once), frozen, BatchNorms folded."""
    net = Inception()
    try:
        load_state(net, load_weights(path or INCEPTION), path or INCEPTION, ignore=(r"AuxLogits\.",))
    except UserError as error:
        raise UserError(f"FID needs {Path(INCEPTION).name}: --inception=PATH, or other --features ({error})")
    net.requires_grad_(False).eval()
    for layer in net.modules():
        if isinstance(layer, BasicConv2d):
            layer.conv = fuse_conv_bn_eval(layer.conv, layer.bn)
            layer.bn = nn.Identity()
    return net.to(memory_format=torch.channels_last)


class VFMFeatures(nn.Module):
    """A VFM's class token (as FD-DINOv2, arXiv 2306.04675), or the mean of its patch tokens where it has none."""

    def __init__(self, name, cache):
        super().__init__()
        self.name = Path(name).stem
        self.vfm = load_vfm(name, cache)

    def forward(self, images):
        tokens, = self.vfm(self.vfm.resize(to_float(images)), cls=True)  # [B, 1 + N, D], or [B, N, D]
        return tokens.mean(1) if self.vfm.cls_token is None else tokens[:, 0], None, None


class Classifier(nn.Module):
    """What judges the toy (ours): it names shape, hue, texture and ground of a drawing, not the class alone, so that
    the Frechet distance of its features sees what a sample looks like."""
    name = "toy"
    attributes = ("shape", "hue", "texture", "ground")

    def __init__(self):
        super().__init__()
        layers = []
        d = 3
        for width, kernel, stride, pool in ((24, 4, 2, False), (48, 3, 1, True), (96, 3, 1, True), (128, 3, 1, False)):
            layers += [nn.Conv2d(d, width, kernel, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            if pool:
                layers.append(nn.MaxPool2d(2))
            d = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(d, sum(attribute_counts(self.attributes)))

    def features(self, x):  # float [B, 3, 32, 32]
        return self.body(x).mean((2, 3))  # [B, 128, 4, 4] -> [B, 128]

    def forward(self, images):
        features = self.features(F.interpolate(to_float(images), (32, 32), mode="bilinear", antialias=True))
        return features, None, self.head(features)[:, :len(Shapes.classes)]


def load_classifier(cache="out", device="cpu", images=57_600, batch=64, lr=1e-2):
    """The toy's Classifier, frozen; trained the first time (half a minute), then kept in `cache`."""
    path = Path(cache) / "classifier.pt"
    version = fingerprint(Shapes("train", 32).draw(np.arange(16)), images, batch, lr)
    with alone(path), torch.random.fork_rng([]), torch.enable_grad():  # the first process trains it, the others find it
        torch.default_generator.manual_seed(0)
        net = Classifier().to(device, memory_format=torch.channels_last)
        entries = load_checkpoint(path, "classifier") if path.exists() else {}
        if entries.get("version") != version:
            train_on_shapes("training the toy's classifier (once)", net, lambda x: [net.head(net.features(x))],
                            net.attributes, cache, device, images, batch, lr)
            entries = dict(kind="classifier", version=version, model=net.state_dict())
            save_checkpoint(path, **entries)
    return load_state(net, entries["model"], str(path)).requires_grad_(False).eval()


def load_features(name, cache="out", device="cpu", inception=""):
    """A frozen network: "inception" (of the file `inception`), "toy" or a VFM's name or file."""
    if name == "toy":
        return load_classifier(cache, device)
    net = load_inception(inception) if name == "inception" else VFMFeatures(name, cache)
    return net.to(device)


# -----------------------------------------------------------------------------
# Sets of images: whatever has len() and gives source[range] as uint8 [b, 3, H, W]; a tensor is one

class Folder:
    """The images of a folder, sorted by path, of one size (`crop`: centre-cropped to it as ADM does)."""

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
                raise UserError(f"images of mixed sizes: {self.paths[0]} {self.size}, {self.paths[i]} {image.size}; "
                                "--image_size=N crops them all")
            images.append(np.asarray(image))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@contextlib.contextmanager
def reading(path):
    """What a damaged archive provokes becomes a UserError."""
    try:
        yield
    except (OSError, EOFError, KeyError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: {error}")


class Npz:
    """The images of an .npz as ADM's: `arr_0`, uint8 [N, H, W, 3]; streamed, as np.load would read them all."""

    def __init__(self, path):
        self.paths = [path]
        self.file = None
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
            if self.file is None:  # not before, as every loader process needs its own
                self.file = zipfile.ZipFile(self.paths[0]).open("arr_0.npy")
            self.file.seek(self.start + indices.start * nbytes)
            data = bytearray(self.file.read(len(indices) * nbytes))
            images = np.frombuffer(data, np.uint8).reshape(len(indices), *shape)
        return torch.from_numpy(images).permute(0, 3, 1, 2)


class Selection:
    """`n` evenly spaced images of an Images (all, if it has no more), and their `labels`."""

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
    """This process's contiguous share of a source: (range, images on the device)."""
    share = -(-len(source) // world.size)
    start = min(len(source), world.rank * share)
    stop = min(len(source), start + share)
    ranges = [range(i, min(i + batch_size, stop)) for i in range(start, stop, batch_size)]
    loader = DataLoader(source, None, sampler=ranges, num_workers=workers, pin_memory=world.device.type == "cuda")
    hidden = world.rank > 0 or not title
    for indices, images in tqdm(zip(ranges, loader), title, len(ranges), leave=False, disable=hidden):
        yield indices, images.to(world.device, non_blocking=True)


# -----------------------------------------------------------------------------
# One pass over a set

class Moments:
    """Mean and covariance of rows in one pass, in float64: a batch is centred on its own mean, then merged (Chan et al.
    1979), so a mean far above the spread costs no digits."""

    def __init__(self, dim, device="cpu"):
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum of (x - mean)(x - mean)^T

    def update(self, rows):  # [B, D]
        b = len(rows)
        n = self.n + b
        mean = rows.double().mean(0)
        centred = rows - mean
        shift = mean - self.mean
        self.scatter.addmm_(centred.T, centred).addr_(shift, shift, alpha=self.n * b / n)
        self.mean += shift * (b / n)
        self.n = n

    def statistics(self, world):
        """Of all processes together -> mean [D], unbiased covariance [D, D], NumPy's."""
        n = int(world.sum(torch.tensor(self.n, device=self.mean.device)))
        mean = world.sum(self.mean * (self.n / n))
        shift = self.mean - mean
        scatter = world.sum(self.scatter.addr(shift, shift, alpha=self.n))
        return mean.cpu().numpy(), (scatter / (n - 1)).cpu().numpy()


@torch.no_grad()
@full_float32()
def image_statistics(source, net, world, batch_size=64, workers=0, keep=0, title="images", transform=None):
    """One pass through a network -> dict: n; mu, sigma of its features; mu_s, sigma_s of its spatial features and, from
    its logits, inception_score (mean, std) and predictions [n], where it has them; features [keep, D] of `keep` evenly
    spaced images. `transform(range, batch)` gives the uint8 images that are looked at in a batch's place."""
    n, device = len(source), world.device
    features, spatial, logits = net(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=device))  # for their widths
    moments = {"": Moments(features.shape[1], device)}
    if spatial is not None:
        moments["_s"] = Moments(spatial.shape[1], device)
    if logits is not None:
        predictions = torch.zeros(n, dtype=torch.long, device=device)
        sums = torch.zeros(-(-n // SPLIT), 2 + logits.shape[1], dtype=torch.float64, device=device)
    keep = min(keep, n)
    kept = torch.zeros(keep, features.shape[1], device=device)
    for indices, images in batches(source, world, batch_size, workers, title):
        if transform:
            images = transform(indices, images)
        features, spatial, logits = net(images)  # [B, D], [B, S], [B, K]
        for part, rows in zip(moments.values(), (features, spatial)):
            part.update(rows)
        i, j = indices.start, indices.stop
        if logits is not None:
            predictions[i:j] = logits.argmax(1)
            sums += split_sums(logits, torch.arange(i, j, device=device) // SPLIT, len(sums))
        if keep:  # kept image p is number p * n // keep
            chosen = torch.arange(-(-i * keep // n), -(-j * keep // n), device=device)
            kept[chosen] = features[chosen * n // keep - i]
    found = dict(n=n, features=world.sum(kept))  # each process has filled its own rows
    for key, part in moments.items():
        found["mu" + key], found["sigma" + key] = part.statistics(world)
    if logits is not None:
        found.update(inception_score=score_of_sums(world.sum(sums)), predictions=world.sum(predictions))
    return found


def distance(a, b, key=""):
    """Frechet distance of two results of `image_statistics`; key "_s": of their spatial features."""
    return frechet_distance(a["mu" + key], a["sigma" + key], b["mu" + key], b["sigma" + key])


def judge(images, net, world, labels=None, reference=None, batch_size=64, title="images", workers=0, transform=None):
    """Judges a source or a uint8 tensor [n, 3, H, W] -> dict: images, n; fd, the Frechet distance to the statistics
    `reference`; agreement, the share that the net takes for their `labels` (None where not asked); statistics, and
    `transform` as in `image_statistics`."""
    statistics = image_statistics(images, net, world, batch_size, workers, title=title, transform=transform)
    fd = agreement = None
    if reference is not None:
        fd = distance(statistics, reference)
    if labels is not None and "predictions" in statistics:
        agreement = (statistics["predictions"].cpu() == torch.as_tensor(labels)).double().mean().item()
    return dict(images=len(images), fd=fd, agreement=agreement, statistics=statistics)


# -----------------------------------------------------------------------------
# Pairs and tokenizers

def note(world, text):
    if world.rank == 0:
        print(f"note: {text}", file=sys.stderr)


def paired_measures(names, lpips_weights, world):
    """{name: function of two batches in [-1, 1] -> [B]}, without LPIPS where its weights can't be had."""
    measures = dict(psnr=psnr, ssim=ssim)
    if "lpips" in names:
        try:
            measures["lpips"] = LPIPS(lpips_weights).to(world.device)
        except UserError as error:
            note(world, error)
    return {name: measures[name] for name in names if name in measures}


def summary(values, world):
    """{name: [n], this process's rows filled} -> {name: mean, name_std: the population's standard deviation}."""
    found = {}
    for name, rows in values.items():
        rows = world.sum(rows).double()
        found[name] = rows.mean().item()
        found[f"{name}_std"] = rows.std(correction=0).item()
    return found


@torch.no_grad()
@full_float32()
def judge_pairs(cfg, metrics, world):
    """Of the images of two folders that have the same path in them but for the suffix."""
    if not cfg.reference:
        raise UserError("--pairs=1 takes two folders, RECONSTRUCTIONS and ORIGINALS")
    sides, names = [], []
    for folder in (cfg.samples, cfg.reference):
        side = Folder(folder, cfg.image_size)
        side.paths.sort(key=lambda path: path.with_suffix(""))
        names.append([str(path.relative_to(folder).with_suffix("")) for path in side.paths])
        sides.append(side)
    a, b = map(Counter, names)
    single = sorted((a - b) + (b - a))
    if single:
        raise UserError(f"{len(single)} images have no partner of the same name: {', '.join(single[:10])}")
    if sides[0].size != sides[1].size:
        raise UserError(f"pairs need equal sizes, not {sides[0].size} and {sides[1].size}")
    measures = paired_measures(metrics, cfg.lpips_weights, world)
    n = len(sides[0])
    values = {name: torch.zeros(n, device=world.device) for name in measures}
    left = batches(sides[0], world, cfg.batch_size, cfg.workers, "pairs")
    right = batches(sides[1], world, cfg.batch_size, cfg.workers, "")
    for (indices, images), (_, others) in zip(left, right):
        for name, measure in measures.items():
            values[name][indices.start:indices.stop] = measure(to_float(images), to_float(others))
    return dict(samples=cfg.samples, reference=cfg.reference, images=dict(pairs=n), **summary(values, world))


MOVES = dict(rotation=lambda x: torch.rot90(x, 1, (2, 3)),
             scaling=lambda x: shrink(x, 0.5, antialias=x.shape[1] == 3))  # of images, not of latents


@torch.no_grad()
@full_float32()
def judge_tokenizer(tokenizer, source, net, world, measures, moves=(), **keywords):
    """`judge` on a tokenizer's reconstructions of a source -> the judgement, and a dict of the means of `measures` over
    the pairs and, for T in `moves`, of the equivariance error |encode(T x) - T encode(x)| / |T encode(x)|."""
    values = {name: torch.zeros(len(source), device=world.device) for name in (*measures, *moves)}

    def reconstruct(indices, images):  # uint8 [B, 3, H, W] -> the same
        rows = slice(indices.start, indices.stop)
        originals = to_float(images)
        mean, _ = tokenizer.encode(originals)  # [B, C, h, w]
        decoded = to_uint8(tokenizer.decode(mean))
        for name, measure in measures.items():
            values[name][rows] = measure(originals, to_float(decoded))
        for name in moves:
            moved = MOVES[name](mean).flatten(1)
            error = tokenizer.encode(MOVES[name](originals))[0].flatten(1) - moved
            values[name][rows] = error.norm(dim=1) / moved.norm(dim=1)
        return decoded

    judgement = judge(source, net, world, title="reconstructions", transform=reconstruct, **keywords)
    return judgement, summary(values, world)


def evaluate(cfg, world):
    """A tokenizer on held-out images of the data and size that it was trained for, unless cfg says otherwise."""
    tokenizer = load_tokenizer(cfg.tokenizer).to(world.device)
    cfg.data = cfg.data or tokenizer.about.get("config", {}).get("data", "data/imagenet")
    size = cfg.image_size or tokenizer.resolution
    data = open_data(cfg, "val", size)
    source = Selection(data, cfg.images)
    if data.note:
        note(world, data.note)
    toy = cfg.data == "shapes"
    net = load_features(cfg.features or ("toy" if toy else "inception"), cfg.cache, world.device, cfg.inception)
    measures = paired_measures(PAIRS[:2] if toy and not cfg.lpips_weights else PAIRS, cfg.lpips_weights, world)
    moves = ["rotation"]
    with contextlib.suppress(UserError):
        tokenizer.check_size(size // 2, size // 2)
        moves.append("scaling")
    loading = dict(batch_size=cfg.batch_size, workers=cfg.workers)
    real = judge(source, net, world, title="originals", **loading)["statistics"]
    judgement, means = judge_tokenizer(tokenizer, source, net, world, measures, moves, reference=real, **loading)
    return dict(samples=cfg.tokenizer, reference=f"held-out {cfg.data}, {size} px", images=dict(pairs=len(source)),
                features=net.name, rfid=judgement["fd"], **means)


# -----------------------------------------------------------------------------
# Samples against a reference, whose statistics are kept beside it; the toy's

KEPT = ("mu", "sigma", "mu_s", "sigma_s", "features", "n", "network", "source")  # ADM's files have the first four


def read_statistics(path):
    """ADM's or our own statistics file (`images`: whether it has them, too); {} for whatever else."""
    if not zipfile.is_zipfile(path):
        return {}
    with reading(path), np.load(path) as file:
        if "mu" not in file.files:
            return {}
        entries = dict(images="arr_0" in file.files)
        for key in KEPT:
            if key in file.files:
                entries[key] = file[key] if file[key].ndim else file[key].item()
    return entries


def reference_statistics(path, net, cfg, world, neighbours):
    """ADM's, a cache of ours, or measured now and kept beside the images; `neighbours`: with the features for precision
    and recall."""
    network = f"{net.name} {fingerprint([*net.parameters()][-1])}"  # one tensor tells weights apart
    given = read_statistics(path)
    theirs = given.get("network", network if isinstance(net, Inception) else "inception")
    if given and theirs != network:
        raise UserError(f"{path} holds statistics of other features: {theirs}, not {network}")
    if given and not (neighbours and given["images"]):
        return given
    source = open_images(path, cfg.image_size)
    cache = Path(f"{path.rstrip('/')}.{net.name}.npz")
    files = [(str(file), Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in source.paths]
    version = fingerprint(files, cfg.image_size, network)
    found = read_statistics(cache)
    fresh = torch.tensor(int(found.get("source") == version), device=world.device)
    if world.sum(fresh) < world.size:  # stale for one process, measured by all
        found = image_statistics(source, net, world, cfg.batch_size, cfg.workers, NEIGHBOURS, path)
        found.update(features=found["features"].cpu().numpy(), network=network, source=version)
        try:
            if world.rank == 0:
                with replacing(cache) as temporary, open(temporary, "wb") as file:
                    np.savez(file, **{key: found[key] for key in KEPT if key in found})
        except UserError as error:
            note(world, error)
    return {**found, **given, "n": None} if given else found


def judge_sets(cfg, metrics, net, world):
    """The samples against the reference."""
    source = open_images(cfg.samples, cfg.image_size)
    neighbours = bool({"precision", "recall"} & {*metrics})
    reference = reference_statistics(cfg.reference, net, cfg, world, neighbours)
    neighbours = neighbours and "features" in reference
    keep = len(source) if neighbours else 0
    samples = image_statistics(source, net, world, cfg.batch_size, cfg.workers, keep, cfg.samples)
    images = dict(samples=samples["n"], reference=reference.get("n"))
    if neighbours:
        images["reference_for_recall"] = len(reference["features"])
    if {"fid", "sfid"} & {*metrics} and min(samples["n"], reference.get("n") or 10_000) < 10_000:
        note(world, "FID of fewer than 10000 images is biased upwards; papers use 50000")
    result = dict(samples=cfg.samples, reference=cfg.reference, images=images, features=net.name)
    for metric, key in (("fid", ""), ("sfid", "_s")):
        if metric in metrics and "mu" + key in samples and "mu" + key in reference:
            result[metric] = distance(samples, reference, key)
    if "inception_score" in samples:
        result["is"], result["is_std"] = samples["inception_score"]
    if neighbours and min(len(samples["features"]), len(reference["features"])) > 3:
        theirs = torch.as_tensor(reference["features"], device=world.device)
        result["precision"], result["recall"] = precision_recall(theirs, samples["features"])
    return result


def toy_table(cfg, net, world):
    """A toy run at a glance -> {row: dict(label, images, fd, agreement[, psnr])}. A distance says little by itself:
    beside the samples' stand those of training images (the floor), of reconstructions, and of an untrained pipeline
    (as DiT's last layer starts at zero, it returns its noise as the latent)."""
    samples = open_images(cfg.samples)
    size = samples[range(1)].shape[-1]
    path = Path(cfg.out, "diffusion.pt")
    diffusion = load_checkpoint(path, "diffusion") if path.exists() else {}
    data = diffusion.get("config", {}).get("data", "shapes")
    if data != "shapes":
        raise UserError(f"the samples were made from --data={data}: python fid.py {cfg.samples} REFERENCE")
    classes = read_json(Path(cfg.samples, "labels.json"))  # {name of the file: class}
    labels = [classes.get(path.name) for path in samples.paths] if classes else None
    if classes and None in labels:
        raise UserError(f"{cfg.samples} has images that are not in labels.json; run sample.py again")
    rows = {}

    def add(key, label, judgement):
        statistics = judgement.pop("statistics")
        rows[key] = dict(label=label, **judgement)
        return statistics

    data = Images("shapes", "val", size, cache=cfg.cache)
    val = Selection(data, len(data))
    some = Selection(data, cfg.images)
    train = Selection(Images("shapes", "train", size, cache=cfg.cache), len(samples))
    real = add("held_out", "held-out images (the classifier's accuracy)", judge(val, net, world, val.labels))
    add("real", "training images, as many as samples (floor)", judge(train, net, world, train.labels, real))
    generated = add("samples", "samples", judge(samples, net, world, labels, real))
    path = Path(cfg.out, "tokenizer.pt")
    if path.exists():
        tokenizer = load_tokenizer(path).to(world.device)
        judgement, means = judge_tokenizer(tokenizer, some, net, world, dict(psnr=psnr), labels=some.labels,
                                           reference=real)
        judgement["psnr"] = means["psnr"]
        decoded = add("reconstructions", "reconstructions of held-out images (rFD)", judgement)
        rows["samples_to_reconstructions"] = dict(label="samples, against the reconstructions", images=len(samples),
                                                  fd=distance(generated, decoded))
        if diffusion:
            side = size // tokenizer.downsample
            noise = torch.randn(len(samples), tokenizer.z_dim, side, side, generator=torch.Generator().manual_seed(0))
            latents = noise * diffusion["latent_std"].view(-1, 1, 1) + diffusion["latent_mean"].view(-1, 1, 1)
            judgement = judge(latents, net, world, labels, real, transform=lambda _, z: to_uint8(tokenizer.decode(z)))
            add("untrained", "untrained pipeline: decoded Gaussian latents", judgement)
    return rows


# -----------------------------------------------------------------------------
# The command

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
    world = init_world()
    cfg.samples = cfg.samples or f"{cfg.out}/samples"
    known = PAIRS if cfg.pairs else SETS
    metrics = cfg.metrics.split(",") if cfg.metrics else known
    if not {*metrics} <= {*known}:
        raise UserError(f"--metrics={cfg.metrics}: there are {', '.join(known)}")
    if cfg.tokenizer:
        metrics = TOKENIZER
        result = evaluate(cfg, world)
    elif cfg.pairs:
        result = judge_pairs(cfg, metrics, world)
    else:
        features = cfg.features or ("inception" if cfg.reference else "toy")
        net = load_features(features, cfg.cache, world.device, cfg.inception)
        if cfg.reference:
            result = judge_sets(cfg, metrics, net, world)
        else:
            rows = toy_table(cfg, net, world)
            result = dict(samples=cfg.samples, reference="held-out shapes", images={}, features=net.name, rows=rows)
    if world.rank > 0:
        return
    if "features" in result:
        other = "" if result["features"] == "inception" else "; not comparable with numbers on Inception's"
        print(f"features: {result['features']}{other}")
    if "rows" in result:
        show_rows(result["rows"])
    else:
        show_metrics(result, metrics)
    write_json(Path(cfg.out) / ("eval.json" if cfg.tokenizer else "fid.json"), result)


if __name__ == "__main__":
    main(run)
