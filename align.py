"""
How far tokenizers and diffusion models agree with vision foundation models (VFMs): measured, trained for, tested.

    python align.py  # CKNNA, SE-CKNNA, probe of out/tokenizer.pt and of each block of out/diffusion.pt
    python align.py a/tokenizer.pt b/diffusion.pt --reference=toy-blind  # diffusion models bring their tokenizers
    python align.py --steps=1000 --side=both  # both train on together -> out/joint-both/, measured before and after
    python align.py --study=1  # the papers' claim in miniature: 6 tokenizers x 3 seeds
    torchrun --nproc_per_node=8 align.py --study=1  # its runs shared out, each independent of the others
    python align.py --sweep=1  # toy: Frechet distance and accuracy by solver, steps, guidance -> out/sweep.md

CKNNA is arXiv 2405.07987, SE-CKNNA and dual alignment VFM-VAE's (2510.18457), joint training REPA-E's (2504.10483).
"""
import dataclasses
import functools
import itertools
import math
import os
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import rankdata
from tqdm import tqdm

from diffusion import PRESETS as DIFFUSION_PRESETS, Config as DiffusionConfig, train as train_diffusion
from diffusion import (ImageNoise, Sampling, build, draw_times, flow_losses, full_state, generate, load_diffusion,
                       update_ema, vfm_tokens)
from fid import full_float32, judge, judge_tokenizer, load_features
from tokenizer import PRESETS as TOKENIZER_PRESETS, Config as TokenizerConfig, train as train_tokenizer
from tokenizer import (Images, Log, Positive, Tokenizer, Trainer, UserError, alone, average_gradients, average_weights,
                       build_tokenizer, fingerprint, init_world, load_checkpoint, load_tokenizer, load_vfm,
                       load_weights, main, make_loader, open_data, parse_config, psnr, read_json, replacing,
                       save_checkpoint, seed_step, shrink, stages_of, step_batches, to_float, to_uint8, vfm_of,
                       write_json, write_text)


@dataclass
class Config:
    preset: str = ""  # imagenet (these defaults) where there is CUDA and data/imagenet/train, or toy
    out: str = "out"  # everything is written here; holds the checkpoints that are not named
    cache: str = "out"  # folder of the toy's drawings, VFM and classifier, shared by all runs
    seed: int = 0  # of batches, noise, transformations
    # data
    data: str = "data/imagenet"  # a folder (class folders or flat, maybe with train/ and val/), shapes, CIFAR10, ...
    data_dir: str = "data"  # where torchvision's data sets lie
    download: bool = False  # fetch them
    image_size: int = 0  # pixels; 0: what the first tokenizer was trained at
    workers: int = 8  # data loading processes
    # measuring
    reference: str = ""  # VFMs beside each tokenizer's own: names or files, comma-separated
    images: Positive = 10_000  # held-out images
    k: Positive = 10  # nearest neighbours of CKNNA
    encode_batch: Positive = 64  # images at once
    # joint training
    steps: int = 0  # train both for so many steps; 0: measure only
    side: Literal["none", "tokenizer", "diffusion", "both"] = "both"  # which the alignment loss reaches
    tokenizer_weight: float = 1.5  # of the alignment loss on the tokenizer (REPA-E)
    batch_size: Positive = 256  # images a step, over all processes
    accumulate: Positive = 1  # micro-batches a step
    compile: bool = torch.cuda.is_available()  # torch.compile the networks that train
    log_interval: Positive = 100  # steps
    save_interval: Positive = 2_000  # steps between checkpoints
    # the study
    study: bool = False  # run what is missing of it, then its table
    study_methods: str = "vae,vae-8,vavae,vfmvae,vfmvae-blind,aligntok"  # of METHODS
    study_seeds: Positive = 3  # runs of each, from --seed on
    study_align: str = "none,repa"  # diffusion models on each tokenizer: none, repa, reg
    study_kimg: float = 28.0  # thousands of images to each tokenizer, all stages together
    study_steps: Positive = 1_500  # of 64 latents to each diffusion model
    study_points: tuple[int, ...] = (375, 750, 1_500)  # steps at which it is judged
    study_samples: Positive = 1_000  # samples that are judged, and held-out images
    # the sweep
    sweep: bool = False  # judge samples of OUT/diffusion.pt by solver, steps, guidance
    sweep_steps: tuple[int, ...] = (10, 20, 30, 50, 250)  # numbers of times
    sweep_samples: Positive = 1_000  # images a row


PRESETS = dict(imagenet={}, toy=dict(data="shapes", workers=0, images=2_000, encode_batch=100, batch_size=32,
                                     log_interval=10, save_interval=500))

# -----------------------------------------------------------------------------
# CKNNA: centered kernel nearest-neighbour alignment (arXiv 2405.07987). To copy: these four functions

def hsic(K, L):
    """Unbiased HSIC of kernels [n, n] with zero diagonals, which need not be symmetric (Song et al. 2012, eq. 5)."""
    n = len(K)
    trace = (K * L.T).sum(dtype=torch.float64)  # of K L
    sums = K.sum(dtype=torch.float64) * L.sum(dtype=torch.float64)
    entries = K.sum(0, dtype=torch.float64) @ L.sum(1, dtype=torch.float64)  # of K L, added up
    return (trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * entries) / (n * (n - 3))


def neighbourhood(features, k):
    """Raw features [n, D] -> their kernel [n, n] with a zero diagonal, the mask [n, n] of each row's k nearest, the
    HSIC of the masked kernel with itself. Features are clamped at 95% of all absolute values, rows get unit length."""
    sizes = features.abs().flatten()
    q = sizes.kthvalue(min(len(sizes), int(0.95 * len(sizes)) + 1)).values
    rows = F.normalize(features.clamp(-q, q), dim=1)  # [n, D]
    kernel = (rows @ rows.T).fill_diagonal_(-torch.inf)
    nearest = kernel.topk(min(k, len(kernel) - 1)).indices  # [n, k]
    near = torch.zeros_like(kernel, dtype=torch.bool).scatter_(1, nearest, True)
    kernel.fill_diagonal_(0)
    return kernel, near, hsic(kernel * near, kernel * near)


def compare_neighbourhoods(a, b):
    """CKNNA of two `neighbourhood`s -> scalar. What is near in both counts."""
    K, near_a, self_a = a
    L, near_b, self_b = b
    both = near_a & near_b
    return hsic(K * both, L * both) / ((self_a * self_b).clamp(min=0).sqrt() + 1e-6)


def cknna(a, b, k=10):
    """CKNNA of raw features [n, D_a] and [n, D_b] of the same n > 3 images -> float, 1 where neighbourhoods and
    similarities are equal, about 0 where they are unrelated."""
    return compare_neighbourhoods(neighbourhood(a, k), neighbourhood(b, k)).item()


# -----------------------------------------------------------------------------
# SE-CKNNA (VFM-VAE): does the agreement survive what leaves an image's meaning as it is? Both models see the images
# transformed; SE-CKNNA is the mean of CKNNA over all conditions

SCALES = (1.0, 0.75, 0.5, 0.25)
NOISES = (0.05, 0.10, 0.15, 0.20)  # standard deviations, in parts of the pixel range
CONDITIONS = ("clean", "equivariance", *(f"noise {std:.2f}" for std in NOISES))


def se_cknna(row):
    """CKNNA by condition -> SE-CKNNA."""
    return float(np.mean([row[condition] for condition in CONDITIONS]))


def transformed(images, indices, scales, seed):
    """Yields (condition, [(rows, images of one size)]) of images [B, 3, S, S] in [-1, 1]. Quarter turns, one of the
    scales and one field of noise, which each std multiplies, are drawn for an image by (seed, its index) alone."""
    everything = torch.arange(len(images), device=images.device)
    yield "clean", [(everything, images)]

    turned = torch.empty_like(images)  # [B, 3, S, S]
    drawn = torch.empty(len(images), device=images.device)
    for i, index in enumerate(indices):
        draw = np.random.default_rng((seed, int(index)))
        turned[i] = torch.rot90(images[i], int(draw.integers(4)), (1, 2))
        drawn[i] = scales[int(draw.integers(len(scales)))]
    groups = [(torch.nonzero(drawn == scale)[:, 0], scale) for scale in scales]
    yield "equivariance", [(rows, shrink(turned[rows], scale)) for rows, scale in groups if len(rows)]

    noise = ImageNoise(seed, indices)(images)  # [B, 3, S, S]
    for condition, std in zip(CONDITIONS[2:], NOISES):
        yield condition, [(everything, (images + 2 * std * noise).clamp(-1, 1))]  # the range is 2 wide


def linear_probe(features, labels, ridge=1e-3):
    """Accuracy of a linear classifier of features [n, D]: ridge regression onto the classes, fitted to the even
    rows, judged on the odd ones."""
    x = features.double()
    x = (x - x[::2].mean(0)) / x[::2].std(0).clamp(min=1e-6)
    y = F.one_hot(labels).double()
    mean = y[::2].mean(0)
    gram = x[::2].T @ x[::2] / len(x[::2]) + ridge * torch.eye(x.shape[1]).to(x)  # [D, D]
    weight = torch.linalg.solve(gram, x[::2].T @ (y[::2] - mean) / len(x[::2]))  # [D, classes]
    predicted = (x[1::2] @ weight + mean).argmax(1)
    return (predicted == labels[1::2]).double().mean().item()


# -----------------------------------------------------------------------------
# Measuring checkpoints: features of the same images from every tokenizer, diffusion block and VFM

@dataclass
class Subject:
    """A tokenizer that is measured: its name (its path), its VFM's name, the diffusion models on it, {name: DiT}."""
    name: str
    tokenizer: Tokenizer
    vfm: str
    networks: dict = field(default_factory=dict)


def tokenizer_beside(path, entries):
    """The tokenizer that a diffusion checkpoint names, or one of that name beside it (the folder was moved)."""
    named = Path(entries["tokenizer"])
    return str(named if named.exists() else Path(path).parent / named.name)


def load_subjects(paths, world):
    """-> [Subject], diffusion models under their tokenizers, and {name: VFM} of the VFMs that came along unchanged."""
    subjects = {}
    vfms = {}
    for path in paths:
        entries = load_weights(path)
        diffuses = entries.get("kind") == "diffusion"
        owner = tokenizer_beside(path, entries) if diffuses else path
        if owner not in subjects:
            tokenizer = load_tokenizer(owner).to(world.device)
            config = tokenizer.about.get("config")
            vfm = f"VFM of {owner}" if tokenizer.vfm is not None else ""
            if config:
                vfm, _ = vfm_of(TokenizerConfig(**config))
            if tokenizer.vfm is not None and (not config or config["method"] == "vfmvae"):  # frozen
                vfms[vfm] = tokenizer.vfm
            subjects[owner] = Subject(owner, tokenizer, vfm)
        if diffuses:
            subjects[owner].networks[path] = load_diffusion(path).to(world.device)
    return list(subjects.values()), vfms


def pooled_features(subjects, vfms, images):
    """Yields (key, [B, D] averaged over positions) of images [B, 3, s, s]; keys ("vfm", name), (tokenizer, "latents"),
    (diffusion model, "block 1"), ... A tokenizer's own VFM sees images as the tokenizer shows them to it, another one
    at the size that gives a token for each position of the first tokenizer's latents. A REG model is given its VFM's
    clean class token, which flatters its blocks."""
    side = images.shape[-1]

    @functools.cache
    def tokens(name, grid):
        return vfm_tokens(vfms[name], images, grid)  # [B, (1 +) grid^2, D]

    grids = dict.fromkeys(vfms, side // subjects[0].tokenizer.downsample)
    for subject in reversed(subjects):
        if subject.tokenizer.vfm is not None:
            grids[subject.vfm] = round(side * subject.tokenizer.scale_factor) // subject.tokenizer.vfm.patch_size
    for name, vfm in vfms.items():
        yield ("vfm", name), tokens(name, grids[name])[:, int(vfm.cls_token is not None):].mean(1)

    for subject in subjects:
        tokenizer = subject.tokenizer
        # `encode` without its check: what the decoder demands of the size does not matter here
        z = tokenizer.moments(tokenizer.features(images), side, side).float().chunk(2, 1)[0]  # [B, C, h, w]
        yield (subject.name, "latents"), z.mean((2, 3))
        for name, dit in subject.networks.items():
            mean, std = (dit.about[key].to(z).view(1, -1, 1, 1) for key in ("latent_mean", "latent_std"))
            cls = None
            if dit.cls_dim:
                cls = tokens(dit.about["config"]["align_vfm"], z.shape[-1] // dit.patch_size)[:, 0]  # [B, D]
            # without noise, at t = 0.5, null class: what the model makes of an image, not of one draw of noise
            t = z.new_full((len(z),), 0.5)
            y = torch.full((len(z),), dit.num_classes, device=z.device)
            for i, x in enumerate(dit((z - mean) / std, t, y, cls, blocks=True), 1):  # [B, (1 +) N, D]
                yield (name, f"block {i}"), x[:, int(dit.cls_dim > 0):].float().mean(1)


def fits(subjects, side):
    """Whether images of `side` px lie on every patch and latent grid."""
    grids = []
    for subject in subjects:
        tokenizer = subject.tokenizer
        latent = side / tokenizer.downsample
        grids += [latent, *(latent / dit.patch_size for dit in subject.networks.values())]
        if tokenizer.vfm is not None:
            grids.append(side * tokenizer.scale_factor / tokenizer.vfm.patch_size)
    return all(grid >= 1 and abs(grid - round(grid)) < 1e-6 for grid in grids)


@torch.inference_mode()
@full_float32()
def alignment(subjects, vfms, data, indices, cfg, world):
    """CKNNA of all latents and DiT blocks against every VFM in every condition, of `data`'s images at `indices`, which
    processes share -> rows dict(name, part, vfm, each condition, SE-CKNNA, probe), the scales drawn from."""
    scales = [scale for scale in SCALES if fits(subjects, data.size * scale)]
    if not scales:
        raise UserError(f"images of {data.size} px do not fit the grids of all these models; try another --image_size")
    mine = indices[world.rank::world.size]
    parts = np.array_split(mine, -(-len(mine) // cfg.encode_batch))
    loader = make_loader(data, [part.tolist() for part in parts], world, cfg.workers)
    bar = tqdm(loader, desc="features", disable=world.rank > 0, leave=False)
    found = {condition: defaultdict(list) for condition in CONDITIONS}  # condition: key: each batch's
    for part, (images, _) in zip(parts, bar):
        images = to_float(images.to(world.device))  # [B, 3, S, S]
        for condition, groups in transformed(images, part, scales, cfg.seed):
            batch = {}
            for rows, some in groups:
                for key, features in pooled_features(subjects, vfms, some):
                    batch.setdefault(key, features.new_empty(len(images), features.shape[1]))[rows] = features
            for key, features in batch.items():
                found[condition][key].append(features)

    labels = torch.as_tensor(np.asarray(data.labels)[indices], device=world.device)
    table = {}
    for condition, batches in found.items():
        features = {}
        for key, own in batches.items():  # rank r has rows r, r + size, ...
            features[key] = torch.zeros(len(indices), own[0].shape[1], device=world.device)
            features[key][world.rank::world.size] = torch.cat(own)
            world.sum(features[key])
        targets = {name: neighbourhood(features.pop(("vfm", name)), cfg.k) for name in vfms}
        for (name, part), value in features.items():
            own = neighbourhood(value, cfg.k)
            for vfm, target in targets.items():
                row = table.setdefault((name, part, vfm), dict(name=name, part=part, vfm=vfm))
                row[condition] = compare_neighbourhoods(own, target).item()
                if condition == "clean":  # nan: there is one class
                    row["probe"] = linear_probe(value, labels) if labels.max() > 0 else math.nan
    for row in table.values():
        row["SE-CKNNA"] = se_cknna(row)
    return list(table.values()), scales


def markdown(header, rows):
    """-> a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report(paths, cfg, world, folder):
    """Measures checkpoints on held-out images; prints the table, writes align.json and align.png into `folder`."""
    subjects, vfms = load_subjects(paths, world)
    names = cfg.reference.split(",")
    for subject in subjects:
        names += [subject.vfm, *(dit.about["config"]["align_vfm"] for dit in subject.networks.values() if dit.cls_dim)]
    for name in filter(None, names):
        if name not in vfms:
            vfms[name] = load_vfm(name, cfg.cache).to(world.device)
    if not vfms:
        raise UserError("none of these tokenizers tells of a VFM; give one to compare with: --reference=NAME")
    data = open_data(cfg, "val", cfg.image_size or subjects[0].tokenizer.resolution)
    indices = np.linspace(0, len(data) - 1, min(cfg.images, len(data))).astype(int)
    rows, scales = alignment(subjects, vfms, data, indices, cfg, world)
    if world.rank > 0:
        return
    print(f"{len(indices):,} held-out images of {cfg.data}, {data.size} px, k = {cfg.k}; quarter turns and scales "
          f"{scales} (of {SCALES}, those that fit all grids)\n")
    columns = [*CONDITIONS, "SE-CKNNA", "probe"]
    lines = []
    for row in rows:
        lines.append([f"{row['name']} {row['part']}", row["vfm"], *(f"{row[column]:.4f}" for column in columns)])
    print(markdown(["", "against", *columns], lines))
    write_json(folder / "align.json", dict(images=len(indices), k=cfg.k, scales=scales, rows=rows))
    chart_alignment(rows, folder)
    print(f"in {folder}: align.json, align.png")


# -----------------------------------------------------------------------------
# Joint training

class JointTrainer(Trainer):
    """A tokenizer's Trainer in whose step a diffusion model learns from the same latents; REPA's loss reaches `side`:

        tokenizer:  its own losses + tokenizer_weight * repa  (side = tokenizer, both)
        DiT:        flow matching + repa_weight * repa        (side = diffusion, both)

    The velocity loss never reaches the tokenizer: it would teach it latents that are easy to denoise because they say
    little (REPA-E, section 3). BatchNorm normalises the latents, with gradients through the batch's statistics, so that
    growing or shrinking them gains nothing; sampling needs its running statistics.

    One forward pass of the DiT, behind a leaf, serves both. A second walk back, through the blocks before the
    projection, gives the leaf REPA's gradient alone, which goes on to the encoder with the latents' other losses.
    """

    def __init__(self, tok_cfg, tokenizer, world, vfm, cfg, entries, resumed):
        """entries: of the diffusion checkpoint, whose optimizer goes on if `resumed`."""
        super().__init__(tok_cfg, tokenizer, world, vfm, length_scale=0.0)  # schedules in images are over
        self.joint_cfg = cfg
        arch = entries["arch"]
        dit_cfg = DiffusionConfig(**entries["config"])
        align = "repa" if dit_cfg.align == "none" and cfg.side != "none" else dit_cfg.align
        self.dit_cfg = dataclasses.replace(dit_cfg, seed=cfg.seed, compile=False, fsdp=False, align=align)
        self.dit_vfm = load_vfm(dit_cfg.align_vfm, cfg.cache).to(world.device) if align != "none" else None
        if align != "none":  # a projection is added where there was none
            arch = dict(arch, z_dim=self.dit_vfm.embed_dim, projector_dim=dit_cfg.projector_dim,
                        encoder_depth=dit_cfg.encoder_depth)
        self.dit_arch = arch
        single = dataclasses.replace(world, size=1)  # `step` averages gradients
        saved = entries if resumed else None
        self.dit, _, self.dit_ema, self.dit_optimizer = build(self.dit_cfg, single, arch, saved)
        self.statistics = nn.BatchNorm2d(tokenizer.z_dim, affine=False).to(world.device)
        if resumed:
            self.statistics.load_state_dict(entries["statistics"])
        else:
            self.dit.load_state_dict(entries["model"], strict=False)  # all but a new projection
            self.dit_ema.load_state_dict(dict(self.dit.state_dict(), **entries["ema"]))
            self.statistics.running_mean.copy_(entries["latent_mean"])
            self.statistics.running_var.copy_(entries["latent_std"].square())
        self.heads = list(self.dit.projectors.parameters())
        self.body = [p for name, p in self.dit.named_parameters() if not name.startswith("projectors.")]
        if cfg.compile:  # a block each: those before the projection are walked back twice
            for block in self.dit.blocks:
                block.compile(fullgraph=True, dynamic=False)

    def latent_losses(self, images, labels, z, mean, logvar, features, whole):
        values, fixed, vf = super().latent_losses(images, labels, z, mean, logvar, features, whole)
        dit = self.dit
        cfg = self.dit_cfg
        side = self.joint_cfg.side
        shrunk = z.shape[-1] != dit.input_size
        if shrunk:  # by the equivariance regularisation: the DiT, whose latents have one size, learns from whole images
            with torch.no_grad(), self.world.autocast():
                mean, logvar = self.tokenizer.encode(whole)
            z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)  # [B, C, h, w]
        leaf = z.detach().requires_grad_(side in ("tokenizer", "both") and not shrunk)
        tokens = None
        if self.dit_vfm is not None:
            with torch.no_grad(), self.world.autocast():
                tokens = vfm_tokens(self.dit_vfm, whole, dit.input_size // dit.patch_size)  # [B, (1 +) N, D]
        dropped = torch.rand(len(z), device=z.device) < cfg.class_dropout
        y = torch.where(dropped, dit.num_classes, labels.to(z.device))
        cls_noise = torch.randn_like(tokens[:, 0]) if dit.cls_dim else None
        t = draw_times(len(z), 0, cfg, z.device)
        with self.world.autocast():
            losses = flow_losses(dit, self.statistics(leaf), y, t, torch.randn_like(z), tokens, cls_noise)
        losses = {name: value.mean() for name, value in losses.items()}
        loss = losses["velocity"] + cfg.cosine_weight * losses["cosine"]
        if dit.cls_dim:
            loss = loss + cfg.cls_weight * losses["cls"]

        # `inputs` keeps each loss to its own; the projection, which belongs to REPA's, learns whichever side is aligned
        share = 1 / self.cfg.accumulate
        inputs = self.body
        if side in ("diffusion", "both"):
            loss = loss + cfg.repa_weight * losses["repa"]
            inputs = self.body + self.heads
        elif "repa" in losses:
            torch.autograd.backward(share * cfg.repa_weight * losses["repa"], inputs=self.heads, retain_graph=True)
        torch.autograd.backward(share * loss, inputs=inputs, retain_graph=leaf.requires_grad)
        if leaf.requires_grad:
            scale = images[0].numel() if self.stage.summed else 1  # LDM's losses are sums over pixels
            grad, = torch.autograd.grad(self.joint_cfg.tokenizer_weight * scale * losses["repa"], leaf)
            fixed = fixed + (z * grad).sum()  # whose gradient that is
        return {**values, **losses}, fixed, vf

    def step(self, batches, step, images_seen):
        """One step of the tokenizer, its discriminators and the diffusion model -> losses of the last micro-batch."""
        losses = super().step(batches, step, images_seen)
        cfg = self.dit_cfg
        parameters = self.body + self.heads
        average_gradients(parameters, self.world)
        self.world.mean(self.statistics.running_mean)
        self.world.mean(self.statistics.running_var)
        self.dit_optimizer.param_groups[0]["lr"] = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup))
        losses["dit_grad_norm"] = nn.utils.clip_grad_norm_(parameters, cfg.clip)
        self.dit_optimizer.step()
        self.dit_optimizer.zero_grad(set_to_none=True)
        update_ema(self.dit_ema, self.dit, cfg.ema)
        return losses


def train_jointly(cfg, paths, world):
    """From a diffusion checkpoint and its tokenizer, or on from where it was -> paths of the model before and after."""
    paths = [path for path in paths if load_weights(path).get("kind") == "diffusion"]
    if len(paths) != 1:
        raise UserError(f"joint training takes one diffusion checkpoint (it names its tokenizer), not {len(paths)}")
    before = paths[0]
    folder = Path(cfg.out) / f"joint-{cfg.side}"
    after = str(folder / "diffusion.pt")
    entries = load_checkpoint(before, "diffusion")
    settings = [before, entries["step"], cfg.seed, cfg.batch_size, cfg.tokenizer_weight]
    resumed = os.path.exists(after)
    if resumed:
        entries = load_checkpoint(after, "diffusion")
        if entries["settings"] != settings:
            raise UserError(f"{folder} is another run's: give another --out, or remove it")
    start = entries["step"] if resumed else 0

    # the tokenizer, with its averaged weights: the diffusion model knows no other latents
    saved = load_checkpoint(tokenizer_beside(after if resumed else before, entries), "tokenizer")
    images_before = saved["images"] - start * cfg.batch_size
    ours = {key: getattr(cfg, key) for key in ("out", "cache", "seed", "batch_size", "accumulate", "compile")}
    tok_cfg = dataclasses.replace(TokenizerConfig(**saved["config"]), **ours)
    tokenizer, vfm = build_tokenizer(tok_cfg)
    tokenizer.load_state_dict(saved["model"] if resumed else {**saved["model"], **saved["ema"]})
    tokenizer = tokenizer.to(world.device, memory_format=world.layout)
    trainer = JointTrainer(tok_cfg, tokenizer, world, vfm and vfm.to(world.device), cfg, entries, resumed)
    stage = [stage for stage in stages_of(tok_cfg) if "adapter" in stage.trains][-1]
    seed_step(cfg.seed, -1)
    trainer.start_stage(stage)
    trainer.load_state_dict(saved, same_stage=resumed)
    # the decoder's weights are averaged, not the encoder's: the diffusion model learns the latents of this very encoder
    averages = {name: value.to(world.device) for name, value in saved["ema"].items() if name.startswith("decoder.")}

    data = open_data(cfg, "train", tok_cfg.image_size, tok_cfg.crop, tok_cfg.flip)
    classes = list(data.classes)
    if classes != list(entries["classes"]):
        raise UserError(f"--data={cfg.data} has other classes than the diffusion model's")

    def save(step):  # a pair is whole when diffusion.pt, which names its tokenizer, is renamed
        path = folder / f"tokenizer-{step:07d}.pt"
        state = full_state(trainer.dit, trainer.dit_ema, trainer.dit_optimizer)
        statistics = trainer.statistics
        shared = dict(classes=classes, image_size=tok_cfg.image_size, step=step)
        if world.rank == 0:
            images = step * cfg.batch_size
            save_checkpoint(path, kind="tokenizer", config=dataclasses.asdict(tok_cfg), arch=tokenizer.arch,
                            ema=averages, stage=saved["stage"], images=images_before + images, **trainer.state_dict(),
                            **shared)
            save_checkpoint(after, kind="diffusion", config=dataclasses.asdict(trainer.dit_cfg), arch=trainer.dit_arch,
                            latent_mean=statistics.running_mean.cpu(), statistics=statistics.state_dict(),
                            latent_std=(statistics.running_var + statistics.eps).sqrt().cpu(), tokenizer=str(path),
                            images=images, latents="", settings=settings, **state, **shared)
            for earlier in set(folder.glob("tokenizer-*.pt")) - {path}:
                earlier.unlink()
        world.barrier()

    order = step_batches(len(data), cfg.batch_size, cfg.seed, start, cfg.steps, world, cfg.accumulate)
    loader = iter(make_loader(data, order, world, cfg.workers))
    log = Log(folder, "align", world, cfg.steps, start)
    for step in range(start, cfg.steps):
        seed_step(cfg.seed, step, world.rank)
        losses = trainer.step(itertools.islice(loader, cfg.accumulate), step, step * cfg.batch_size)
        done = step + 1
        average_weights(averages, tokenizer, images_before + done * cfg.batch_size, cfg.batch_size, tok_cfg.ema_kimg)
        log.bar.update()
        saving = done % cfg.save_interval == 0 or done == cfg.steps
        if done % cfg.log_interval == 0 or saving:
            losses = {name: world.mean(value.to(world.device)) for name, value in losses.items()}
            log.write(done, done * cfg.batch_size, **losses)
            if not all(math.isfinite(losses[key]) for key in ("velocity", "grad_norm", "dit_grad_norm")):
                raise UserError(f"losses or gradients are not finite at step {done}; {after} is as it was")
        if saving:
            save(done)
    log.bar.close()
    return [before, after]


# -----------------------------------------------------------------------------
# The study (which tokenizers diffuse well, at equal budgets?) and the sweep

# Encoder, stages and losses differ and nothing else: see STAGES["study"]. The blind methods' VFM was never told the
# classes, on which the diffusion models are conditioned and judged.
METHODS = {"vae": dict(method="vae"), "vae-8": dict(method="vae", z_dim=8)}
for name in ("vavae", "vfmvae", "aligntok"):
    METHODS[name] = dict(method=name)
    METHODS[f"{name}-blind"] = dict(method=name, vfm="toy-blind")
QUALITIES = ("SE-CKNNA", "CKNNA", "SE-CKNNA to toy", "SE-CKNNA to toy-blind", "probe", "PSNR", "rFD", "rAccuracy")
OUTCOMES = ("gFD", "gFD to reconstructions", "accuracy", "accuracy / rAccuracy")


class Jury:
    """Held-out shapes, the toy's classifier, and what it makes of them."""

    def __init__(self, n, cache, world, size=32):
        self.world = world
        self.net = load_features("toy", cache, world.device)
        self.data = Images("shapes", "val", size, cache=cache)
        self.images = torch.stack([self.data[i][0] for i in range(min(n, len(self.data)))])  # uint8 [n, 3, S, S]
        self.labels = torch.as_tensor(self.data.labels[:len(self.images)])
        self.real = judge(self.images, self.net, world, self.labels)

    def judge_samples(self, dit, tokenizer, n, sampling, *references):
        """-> the judgements of n samples, of all classes in turn, by Frechet distance to each of the references."""
        y = torch.arange(n) % dit.num_classes
        images = []
        mean, std = (dit.about[key] for key in ("latent_mean", "latent_std"))
        for part in torch.arange(n).split(250):
            images.append(generate(dit, tokenizer, mean, std, part, y[part], sampling, self.world))
        images = to_uint8(torch.cat(images)).cpu()
        return [judge(images, self.net, self.world, y, reference["statistics"]) for reference in references]


def study_run(cfg, jury, vfms, method, seed, folder):
    """A tokenizer and a diffusion model on it for each kind of alignment, trained, or gone on with where the run was
    stopped, and judged -> result.json's entries."""
    started = time.time()
    world = jury.world
    shared = dict(preset="toy", seed=seed, cache=cfg.cache, compile=False)
    train_tokenizer(TokenizerConfig(**{**TOKENIZER_PRESETS["toy"], **METHODS[method], **shared, "recipe": "study",
                                       "decoder": "vfmvae", "kimg": cfg.study_kimg, "out": str(folder)}), world)
    path = str(folder / "tokenizer.pt")
    (subject,), _ = load_subjects([path], world)
    subject.name = method
    reconstructed, values = judge_tokenizer(subject.tokenizer, jury.images, jury.net, world, dict(psnr=psnr),
                                            labels=jury.labels, reference=jury.real["statistics"])

    points = {}
    sampling = Sampling(seed=seed, solver="euler", num_steps=12, cfg_scale=1.0)
    for align in sorted(cfg.study_align.split(","), reverse=True):  # none last: it reads the others' cache
        train_diffusion(DiffusionConfig(**{
            **DIFFUSION_PRESETS["toy"], **shared, "align": align, "align_vfm": subject.vfm, "steps": cfg.study_steps,
            "ema": 0.99, "keep": True, "save_interval": math.gcd(*cfg.study_points), "sample_interval": 0,
            "tokenizer": path, "latents": str(folder / "latents"), "out": str(folder / align)}), world)
        points[align] = []
        for step in cfg.study_points:
            dit = load_diffusion(folder / align / f"diffusion-{step}.pt").to(world.device)
            real, inner = jury.judge_samples(dit, subject.tokenizer, len(jury.images), sampling, jury.real,
                                             reconstructed)
            points[align].append({"step": step, "gFD": real["fd"], "accuracy": real["agreement"],
                                  "gFD to reconstructions": inner["fd"]})
        subject.networks[align] = dit

    rows, scales = alignment([subject], vfms, jury.data, np.arange(len(jury.images)), cfg, world)
    latents = {row["vfm"]: row for row in rows if row["part"] == "latents"}
    own = latents[subject.vfm]
    return {"method": method, "seed": seed, "seconds": time.time() - started, "judge": jury.real["agreement"],
            "PSNR": values["psnr"], "rFD": reconstructed["fd"], "rAccuracy": reconstructed["agreement"],
            "CKNNA": own["clean"], "SE-CKNNA": own["SE-CKNNA"], "probe": own["probe"], "points": points,
            **{f"SE-CKNNA to {vfm}": row["SE-CKNNA"] for vfm, row in latents.items()}, "alignment": rows,
            "scales": scales}


def study(cfg):
    """The runs that OUT/study lacks, every size-th of them for this process of torchrun's, then the report. Processes
    share files only: none joins a group, and there may be more of them than GPUs."""
    rank = int(os.environ.pop("RANK", 0))
    size = int(os.environ.pop("WORLD_SIZE", 1))
    os.environ["LOCAL_RANK"] = str(int(os.environ.get("LOCAL_RANK", 0)) % max(1, torch.cuda.device_count()))
    world = init_world()
    methods = cfg.study_methods.split(",")
    unknown = {*methods, *cfg.study_align.split(",")} - {*METHODS, "none", "repa", "reg"}
    if unknown:
        raise UserError(f"no {min(unknown)}: --study_methods are {', '.join(METHODS)}, --study_align none, repa, reg")
    marks = [0, *cfg.study_points, cfg.study_steps + 1]
    if len(marks) < 3 or marks != sorted(set(marks)):
        raise UserError("--study_points must rise from 1 at least to --study_steps at most")
    with alone(f"{cfg.cache}/study"):  # what is missing is trained once
        vfms = {name: load_vfm(name, cfg.cache).to(world.device) for name in ("toy", "toy-blind")}
        jury = Jury(cfg.study_samples, cfg.cache, world)

    # runs that differ in one of these do not go into one table
    networks = fingerprint(*vfms.values(), jury.net)
    settings = dict(seed=cfg.seed, k=cfg.k)
    for key, value in dataclasses.asdict(cfg).items():
        if key.startswith("study_") and key not in ("study_methods", "study_seeds"):
            settings[key] = list(value) if isinstance(value, tuple) else value
    folder = Path(cfg.out) / "study"
    runs = {}
    for seed in range(cfg.seed, cfg.seed + cfg.study_seeds):
        for method in methods:
            path = runs[method, seed] = folder / f"{method}-{seed}" / "result.json"
            before = read_json(path)
            if before and (before["settings"], before["networks"]) != (settings, networks):
                raise UserError(f"{path} is of other settings, VFMs or classifier: remove it, or give another --out")
    for (method, seed), path in list(runs.items())[rank::size]:
        if path.exists():
            continue
        result = study_run(cfg, jury, vfms, method, seed, path.parent)
        write_json(path, dict(result, settings=settings, networks=networks))
        shutil.rmtree(path.parent / "latents")
        for checkpoint in path.parent.rglob("*.pt"):
            checkpoint.unlink()
    if all(path.exists() for path in runs.values()):  # so finds the last process
        print(study_report(cfg, folder, runs.values()) + f"in {folder}: table.md, results.json, study.png")


def spread(values, digits):
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def curves(results, align, outcome):
    """-> [runs, points]"""
    return np.array([[point[outcome] for point in result["points"][align]] for result in results])


def study_report(cfg, folder, paths):
    """Writes table.md, results.json and study.png -> the table's text."""
    results = [read_json(path) for path in paths]
    methods = defaultdict(list)  # their results
    for result in results:
        methods[result["method"]].append(result)
        for point in itertools.chain(*result["points"].values()):
            point["accuracy / rAccuracy"] = point["accuracy"] / max(result["rAccuracy"], 1e-6)
    aligns = cfg.study_align.split(",")
    real = np.mean([result["judge"] for result in results])
    text = f"""{len(results)} runs; mean ± standard deviation over seeds. Each tokenizer: {cfg.study_kimg:g} thousand \
images, latents 4 x 4 x 32 (vae-8: x 8); each diffusion model: {cfg.study_steps:,} steps of 64, \
{cfg.study_samples:,} samples of 12 Euler times without guidance. gFD, rFD: Frechet distance in the toy \
classifier's features to held-out images (rFD: those reconstructed), in brackets to the reconstructions. Accuracy: how \
many samples the classifier takes for their class (real images: {real:.1%}; reconstructions: rAccuracy). CKNNA: to the \
tokenizer's own VFM (vae: toy), to which diffusion models are aligned, too; blind: never told the classes. VFMs and \
classifier are trained once: the spread leaves them out.
"""
    rows = []
    for method, its in methods.items():
        values = [spread([result[key] for result in its], 2 if key in ("PSNR", "rFD") else 3) for key in QUALITIES]
        rows.append([method, *values])
    text += "\n" + markdown(["tokenizer", *QUALITIES], rows)

    rows = []
    for method, its in methods.items():
        for align in aligns:
            gfd, inner, accuracy = (curves(its, align, outcome).T for outcome in OUTCOMES[:3])
            distances = [f"{spread(a, 1)} ({spread(b, 1)})" for a, b in zip(gfd, inner)]
            rows.append([method, align, *distances, *(spread(values, 3) for values in accuracy)])
        for align in aligns[1:]:  # paired: a seed's diffusion models share latents, order and noise
            gfd, accuracy = ((curves(its, align, key) - curves(its, aligns[0], key)).T for key in ("gFD", "accuracy"))
            gains = [spread(values, 1) for values in gfd] + [spread(values, 3) for values in accuracy]
            rows.append([method, f"{align} - {aligns[0]}", *gains])
    header = [f"{outcome} at {step:,}" for outcome in ("gFD", "accuracy") for step in cfg.study_points]
    text += "\n" + markdown(["tokenizer", "alignment", *header], rows)

    spearman = {align: {} for align in aligns}
    if len(methods) > 1:
        rows = []
        known = np.array([[result[quality] for quality in QUALITIES] for result in results])  # [runs, qualities]
        names = np.array([result["method"] for result in results])
        for outcome, align in itertools.product(OUTCOMES, aligns):
            values = np.column_stack([curves(results, align, outcome)[:, -1], known])
            means = np.stack([values[names == method].mean(0) for method in methods])
            rho = [np.corrcoef(rankdata(each, axis=0), rowvar=False)[0, 1:].tolist() for each in (values, means)]
            spearman[align][outcome] = dict(zip(QUALITIES, zip(*rho)))
            rows.append([outcome, align, *(f"{runs:+.2f} ({averages:+.2f})" for runs, averages in zip(*rho))])
        text += """
Spearman's rank correlation over the runs and, in brackets, over the means of the methods, whose seeds are not \
independent, of what is known before diffusion with what comes of it. Of gFD and rFD less is better.

""" + markdown(["with the final", "alignment", *QUALITIES], rows)
    write_text(folder / "table.md", text)
    write_json(folder / "results.json", dict(runs=results, spearman=spearman))

    panels = {}
    for outcome, align in itertools.product(OUTCOMES[:3], aligns):
        series = panels[f"{outcome} by diffusion steps, alignment: {align}"] = {}
        for method, its in methods.items():
            ys = curves(its, align, outcome)
            series[method] = np.array(cfg.study_points), ys.mean(0), ys.std(0, ddof=len(ys) > 1)
    chart(folder / "study.png", panels, columns=len(aligns))
    return text


def sweep(cfg, world):
    """Frechet distance and accuracy of samples of OUT/diffusion.pt by solver and number of times at guidance 3, then by
    guidance at 20 times of Adams-Bashforth; writes OUT/sweep.md and OUT/sweep.json."""
    (subject,), _ = load_subjects([f"{cfg.out}/diffusion.pt"], world)
    dit, = subject.networks.values()
    if dit.about["config"]["data"] != "shapes":
        raise UserError("--sweep judges by the toy's classifier: it takes a model that was trained on the shapes")
    jury = Jury(5_000, cfg.cache, world, dit.about["image_size"])
    cells = [(solver, steps, 3.0) for solver in ("euler", "heun", "ab2") for steps in cfg.sweep_steps]
    cells += [("ab2", 20, scale) for scale in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
    rows = []
    text = markdown(["solver", "times", "evaluations", "guidance", "FD", "class accuracy"], [])
    for solver, steps, scale in tqdm(dict.fromkeys(cells), desc="sweep"):
        sampling = Sampling(seed=cfg.seed, solver=solver, num_steps=steps, cfg_scale=scale)
        judged, = jury.judge_samples(dit, subject.tokenizer, cfg.sweep_samples, sampling, jury.real)
        row = dict(solver=solver, num_steps=steps, evaluations=(steps - 1) * (1 + (solver == "heun")), cfg_scale=scale,
                   fd=judged["fd"], accuracy=judged["agreement"])
        rows.append(row)
        text += "| {solver} | {num_steps} | {evaluations} | {cfg_scale} | {fd:.2f} | {accuracy:.1%} |\n".format(**row)
    write_json(f"{cfg.out}/sweep.json", rows)
    write_text(f"{cfg.out}/sweep.md", text)
    print(text)


# -----------------------------------------------------------------------------
# Charts

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


def chart(path, panels, columns=2, width=1120, height=720):
    """Line charts as one PNG with a common legend. panels: {title: {name: (xs, ys, spreads)}}. Drawn at twice the size,
    which antialiases the lines."""
    font = ImageFont.load_default(26)
    names = dict.fromkeys(itertools.chain(*panels.values()))
    colours = dict(zip(names, itertools.cycle(COLOURS)))
    below = math.ceil(len(panels) / columns) * height
    canvas = Image.new("RGB", (columns * width, below + 40 * len(names) + 20), "white")
    draw = ImageDraw.Draw(canvas)
    for p, (title, series) in enumerate(panels.items()):
        left = p % columns * width + 132
        bottom = (p // columns + 1) * height - 72
        xs, ys, spreads = (np.concatenate(parts) for parts in zip(*series.values()))
        low, high = (ys - spreads).min(), (ys + spreads).max()
        tick = float(f"{(high - low) / 5 or 1:.0e}")
        ticks = np.arange(math.floor(low / tick), math.ceil(high / tick) + 1) * tick
        x_scale = (width - 260) / (xs.max() - xs.min() or 1)
        y_scale = (height - 144) / (ticks[-1] - ticks[0] or 1)

        def at(x, y):
            return left + 40 + (x - xs.min()) * x_scale, bottom - (y - ticks[0]) * y_scale

        draw.text((left, bottom - height + 120), title, "black", font, "lb")
        for y in ticks:
            draw.line([left, at(0, y)[1], left + width - 180, at(0, y)[1]], "#dddddd", 2)
            draw.text((left - 12, at(0, y)[1]), f"{y:.6g}", "black", font, "rm")
        for x in np.unique(xs):
            draw.text((at(x, 0)[0], bottom + 16), f"{x:g}", "black", font, "mt")
        for name, values in series.items():
            points = [at(x, y) for x, y, _ in zip(*values)]
            draw.line(points, colours[name], 4, "curve")
            for (x, y), bar in zip(points, values[2] * y_scale):
                draw.ellipse([x - 6, y - 6, x + 6, y + 6], colours[name])
                draw.line([x, y - bar, x, y + bar], colours[name], 2)
    for i, (name, colour) in enumerate(colours.items()):
        y = below + 20 + 40 * i
        draw.line([60, y, 108, y], colour, 6)
        draw.text((120, y), name, "black", font, "lm")
    with replacing(path) as temporary:
        canvas.reduce(2).save(temporary, "PNG")


def chart_alignment(rows, folder):
    """SE-CKNNA over the blocks of each model."""
    series = defaultdict(list)
    for row in rows:
        block = 0 if row["part"] == "latents" else int(row["part"].split()[1])
        series[f"{row['name']}, {row['vfm']}"].append((block, row["SE-CKNNA"], 0))
    series = {name: np.array(points).T for name, points in series.items()}
    chart(folder / "align.png", {"SE-CKNNA by block (0: latents)": series}, columns=1)


# -----------------------------------------------------------------------------

def split_paths(argv):
    """A command line -> (flags, checkpoints): what is neither a --key nor follows one without = is a checkpoint."""
    flags = []
    paths = []
    value = False  # of the flag before
    for item in argv:
        key = item.startswith("-")
        (flags if key or value else paths).append(item)
        value = key and "=" not in item
    return flags, paths


def run():
    flags, paths = split_paths(sys.argv[1:])
    cfg = parse_config(Config, PRESETS, flags)
    if cfg.study:
        study(cfg)
        return
    world = init_world()
    if cfg.sweep:
        if world.rank == 0:
            sweep(cfg, dataclasses.replace(world, size=1))
        return
    if not paths:
        paths = [path for path in (f"{cfg.out}/tokenizer.pt", f"{cfg.out}/diffusion.pt") if os.path.exists(path)]
    if not paths:
        raise UserError(f"no checkpoints in {cfg.out}: run tokenizer.py first, then diffusion.py, or name some")
    if cfg.steps:
        report(train_jointly(cfg, paths, world), cfg, world, Path(cfg.out, f"joint-{cfg.side}"))
    else:
        report(paths, cfg, world, Path(cfg.out))


if __name__ == "__main__":
    main(run)
