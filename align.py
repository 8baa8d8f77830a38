"""
How far tokenizers and diffusion models agree with vision foundation models (VFMs).

    python align.py  # CKNNA, SE-CKNNA, probe of out/tokenizer.pt and out/diffusion.pt's blocks
    python align.py a/tokenizer.pt b/diffusion.pt --reference=toy-blind  # with their tokenizers
    python align.py --steps=1000 --side=both  # joint training -> out/joint-both/, measured before and after
    torchrun --nproc_per_node=8 align.py --study=1  # the papers' claim in miniature: 10 methods x 3 seeds
    python align.py --sweep=1  # toy: FD and accuracy by solver, steps, guidance -> out/sweep.md

CKNNA: arXiv 2405.07987; SE-CKNNA, dual alignment: VFM-VAE, 2510.18457; joint training: REPA-E, 2504.10483.
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

# before torch, for whose threads tokenizer.py sets the environment
from diffusion import PRESETS as DIFFUSION_PRESETS, Config as DiffusionConfig, train as train_diffusion
from diffusion import (
    ImageNoise, Sampling, build, draw_times, flow_losses, full_state, generate, learning_rate, load_diffusion, maps,
    to_sphere, update_ema, vfm_tokens)
from fid import Selection, distance, geneval, judge, judge_tokenizer, load_features
from tokenizer import PRESETS as TOKENIZER_PRESETS, Config as TokenizerConfig, train as train_tokenizer
from sample import check_tokenizer, tokenizer_beside
from tokenizer import (
    Images, Log, Positive, ShapesText, Tokenizer, Trainer, UserError, Watch, alone, average_gradients,
    average_weights, build_tokenizer, fingerprint, full_float32, init_world, load_checkpoint, load_state,
    load_tokenizer, load_vfm, load_weights, main, make_loader, open_data, parse_config, psnr, read_json, reading,
    replacing, save_checkpoint, seed_step, shrink, stages_of, step_batches, step_unless, to_float, to_uint8, vfm_of,
    write_json, write_text)

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import rankdata
from tqdm import tqdm


@dataclass
class Config:
    preset: str = ""  # imagenet (given CUDA and data/imagenet/train) or toy
    out: str = "out"  # unnamed checkpoints, what is written
    cache: str = "out"  # the toy's drawings, VFM, classifier
    seed: int = 0  # of all that is drawn
    # data
    data: str = "data/imagenet"  # a folder, shapes, CIFAR10, ...
    data_dir: str = "data"  # of torchvision's data sets
    download: bool = False  # fetch them
    caption_key: str = ""  # captions: this field of each NAME.json; empty: NAME.txt
    skip_bad: bool = False  # images that cannot be read: take the next, list them in OUT/bad_images.txt
    image_size: int = 0  # pixels; 0: the first tokenizer's
    workers: int = 8  # loader processes
    # measuring
    reference: str = ""  # VFMs beside the tokenizers': names, files
    images: Positive = 10_000  # held-out images
    k: Positive = 10  # neighbours of CKNNA
    encode_batch: Positive = 64  # images at once
    # joint training
    steps: int = 0  # 0: only measure
    side: Literal["none", "tokenizer", "diffusion", "both"] = "both"  # reached by the alignment loss
    tokenizer_weight: float = 1.5  # of the alignment loss there (REPA-E)
    batch_size: Positive = 256  # a step, of all processes
    accumulate: Positive = 1  # micro-batches a step
    compile: bool = torch.cuda.is_available()  # what trains
    log_interval: Positive = 100  # steps
    save_interval: Positive = 2_000  # of checkpoints
    # the study
    study: bool = False  # run the study, or what is left of it
    study_methods: str = (  # of METHODS
        "vae,vae-8,vavae,vfmvae,vfmvae-blind,aligntok,rae,psvae,rae-sphere,vfmvae-simvq")
    study_seeds: Positive = 3  # runs of each
    study_align: str = "none"  # diffusion models of classes: none, repa, reg
    study_text: str = "vae,vavae,vfmvae,aligntok"  # methods with one of captions, too
    study_kimg: float = 14.0  # thousand images a tokenizer, in batches of 8
    study_steps: Positive = 1_500  # of 64, a diffusion model
    study_points: tuple[int, ...] = (375, 750, 1_500)  # steps to judge it at
    study_samples: Positive = 1_000  # judged, and held-out images
    # the sweep
    sweep: bool = False  # of OUT/diffusion.pt
    sweep_steps: tuple[int, ...] = (10, 20, 30, 50, 250)  # numbers of times
    sweep_samples: Positive = 1_000  # images a row


PRESETS = dict(imagenet={}, toy=dict(
    data="shapes", workers=0, images=2_000, encode_batch=100, batch_size=32, log_interval=10, save_interval=500))

# --------------------------------------
# CKNNA: centered kernel nearest-neighbour alignment (arXiv 2405.07987), four functions

def hsic(K, L):
    """Unbiased HSIC of kernels [n, n] with zero diagonals, maybe asymmetric (Song et al. 2012, eq. 5)."""
    n = len(K)
    trace = (K * L.T).sum(dtype=torch.float64)  # of K L
    sums = K.sum(dtype=torch.float64) * L.sum(dtype=torch.float64)
    entries = K.sum(0, dtype=torch.float64) @ L.sum(1, dtype=torch.float64)  # of K L, summed
    return (trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * entries) / (n * (n - 3))


def neighbourhood(features, k):
    """Raw features [n, D] -> kernel [n, n] with a zero diagonal, mask [n, n] of each row's k nearest, HSIC of the
    masked kernel with itself. Features are clamped at 95% of all absolute values, rows normalised."""
    sizes = features.abs().flatten()
    q = sizes.kthvalue(min(len(sizes), int(0.95 * len(sizes)) + 1)).values
    rows = F.normalize(features.clamp(-q, q), dim=1)  # [n, D]
    kernel = (rows @ rows.T).fill_diagonal_(-torch.inf)
    nearest = kernel.topk(min(k, len(kernel) - 1)).indices  # [n, k]
    near = torch.zeros_like(kernel, dtype=torch.bool).scatter_(1, nearest, True)
    kernel.fill_diagonal_(0)
    return kernel, near, hsic(kernel * near, kernel * near)


def compare_neighbourhoods(a, b):
    """CKNNA of two `neighbourhood`s -> scalar."""
    K, near_a, self_a = a
    L, near_b, self_b = b
    both = near_a & near_b
    return hsic(K * both, L * both) / ((self_a * self_b).clamp(min=0).sqrt() + 1e-6)


def cknna(a, b, k=10):
    """CKNNA of raw features [n, D_a], [n, D_b] of the same n > 3 images -> float: 1 for equal neighbourhoods, about 0
    for unrelated ones."""
    return compare_neighbourhoods(neighbourhood(a, k), neighbourhood(b, k)).item()


# --------------------------------------
# SE-CKNNA (VFM-VAE): the mean of CKNNA over conditions that keep an image's meaning, seen by both models

SCALES = (1.0, 0.75, 0.5, 0.25)
NOISES = (0.05, 0.10, 0.15, 0.20)  # standard deviations / pixel range
CONDITIONS = ("clean", "equivariance", *(f"noise {std:.2f}" for std in NOISES))


def transformed(images, indices, scales, seed):
    """Yields (condition, [(rows, images of one size)]) of images [B, 3, S, S] in [-1, 1]. An image's quarter turns,
    scale and field of noise, which each std multiplies, are drawn by (seed, its index) alone."""
    every = list(range(len(images)))
    yield "clean", [(every, images)]

    turned = torch.empty_like(images)
    drawn = {scale: [] for scale in scales}  # rows
    for i, index in enumerate(indices):
        draw = np.random.default_rng((seed, int(index)))
        turned[i] = torch.rot90(images[i], int(draw.integers(4)), (1, 2))
        drawn[scales[draw.integers(len(scales))]].append(i)
    yield "equivariance", [(rows, shrink(turned[rows], scale)) for scale, rows in drawn.items() if rows]

    noise = ImageNoise(seed, indices)(images)  # [B, 3, S, S]
    for condition, std in zip(CONDITIONS[2:], NOISES):
        yield condition, [(every, (images + 2 * std * noise).clamp(-1, 1))]  # range 2


def linear_probe(features, labels, ridge=1e-3):
    """Accuracy of ridge regression of features [n, D] onto classes, fitted on even rows, on the odd ones."""
    x = features.double()
    x = (x - x[::2].mean(0)) / x[::2].std(0).clamp(min=1e-6)
    y = F.one_hot(labels).double()
    mean = y[::2].mean(0)
    gram = x[::2].T @ x[::2] / len(x[::2]) + ridge * torch.eye(x.shape[1]).to(x)  # [D, D]
    weight = torch.linalg.solve(gram, x[::2].T @ (y[::2] - mean) / len(x[::2]))  # [D, classes]
    predicted = (x[1::2] @ weight + mean).argmax(1)
    return (predicted == labels[1::2]).double().mean().item()


# --------------------------------------
# Measuring checkpoints

@dataclass
class Subject:
    """What is measured."""
    name: str  # the path
    tokenizer: Tokenizer
    vfm: str  # name
    networks: dict = field(default_factory=dict)  # diffusion models, {path: DiT}


def load_subjects(paths, world):
    """-> [Subject], diffusion models under their tokenizers, and {name: frozen VFM} that came along."""
    subjects = {}
    vfms = {}
    for path in paths:
        entries = load_weights(path.partition("::")[0])  # RAE's: FILE::VFM
        diffuses = entries.get("kind") == "diffusion"
        owner = tokenizer_beside(path, entries) if diffuses else path
        if owner not in subjects:
            tok = load_tokenizer(owner).to(world.device)
            config = tok.config
            vfm = f"VFM of {owner}" if tok.vfm is not None else ""
            if config:
                vfm, _ = vfm_of(TokenizerConfig(**config))
            if tok.vfm is not None and config.get("method", "vfmvae") == "vfmvae":
                vfms[vfm] = tok.vfm
            subjects[owner] = Subject(owner, tok, vfm)
        if diffuses:
            subjects[owner].networks[path] = load_diffusion(path).to(world.device)
            check_tokenizer(path, entries, subjects[owner].tokenizer, owner)
    return list(subjects.values()), vfms


def pooled_features(subjects, vfms, images):
    """Yields (key, [B, D], positions' means) of images [B, 3, s, s]; keys ("vfm", name), (tokenizer, "latents"),
    (diffusion model, "block 1"), ... A tokenizer's own VFM sees images at its size, others have a token for each of the
    first tokenizer's latents. A REG model gets its VFM's class token, which flatters its blocks."""
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
        tok = subject.tokenizer
        # `encode` without the decoder's size check
        z = tok.quantize(tok.moments(tok.features(images), side, side).float().chunk(2, 1)[0])  # [B, C, h, w]
        yield (subject.name, "latents"), z.mean((2, 3))
        for name, dit in subject.networks.items():
            statistics = (maps(dit.about[key]).to(z) for key in ("latent_mean", "latent_std"))
            mean, std = (F.adaptive_avg_pool2d(value, z.shape[2:]) for value in statistics)  # RAE's: [C, S, S]
            cls = None
            if dit.cls_dim:
                cls = tokens(dit.about["config"]["align_vfm"], z.shape[-1] // dit.patch_size)[:, 0]  # [B, D]
            # clean, t = 0.5, null class: what it makes of the image itself
            t = z.new_full((len(z),), 0.5)
            y = dit.null(len(t))
            clean = to_sphere(z) if dit.sphere else (z - mean) / std
            for i, x in enumerate(dit(clean, t, y, cls, blocks=True), 1):  # [B, (1 +) N, D]
                yield (name, f"block {i}"), x[:, int(dit.cls_dim > 0):].float().mean(1)


def fits(subjects, side):
    """Whether `side` px fit all patch and latent grids."""
    cells = []  # in px
    for subject in subjects:
        tok = subject.tokenizer
        cells.append(tok.downsample)
        cells += [tok.downsample * dit.patch_size for dit in subject.networks.values()]
        if tok.vfm is not None:
            cells.append(tok.vfm.patch_size / tok.scale_factor)
    return all(round(side / cell, 6).is_integer() for cell in cells)


@torch.inference_mode()
@full_float32()
def alignment(subjects, vfms, data, indices, cfg, world):
    """CKNNA of latents and DiT blocks against each VFM in each condition on `data`'s images at `indices` -> rows
    dict(name, part, vfm, each condition, SE-CKNNA, probe), the scales."""
    scales = [scale for scale in SCALES if fits(subjects, data.size * scale)]
    most = min((dit.input_size * s.tokenizer.downsample for s in subjects for dit in s.networks.values()), default=0)
    if 1 not in scales or 0 < most < data.size:
        raise UserError(f"{data.size} px do not fit all grids: try another --image_size")
    mine = np.arange(len(indices))[world.rank::world.size]
    parts = np.array_split(mine, -(-len(mine) // cfg.encode_batch))
    loader = make_loader(data, [indices[part].tolist() for part in parts], world, cfg.workers)
    bar = tqdm(loader, desc="features", disable=world.rank > 0, leave=False)
    found = {view: {} for view in CONDITIONS}  # view: key: features [n, D]
    labels = torch.zeros(len(indices), dtype=torch.long, device=world.device)
    for part, (images, classes) in zip(parts, bar):
        images = to_float(images.to(world.device))  # [B, 3, S, S]
        labels[part] = classes.to(world.device)
        for view, groups in transformed(images, indices[part], scales, cfg.seed):
            for rows, some in groups:
                for key, value in pooled_features(subjects, vfms, some):
                    if key not in found[view]:
                        found[view][key] = value.new_zeros(len(indices), value.shape[1])
                    found[view][key][part[rows]] = value

    world.sum(labels)
    table = {}
    for view, features in found.items():
        for value in features.values():
            world.sum(value)
        targets = {name: neighbourhood(features.pop(("vfm", name)), cfg.k) for name in vfms}
        for (name, part), value in features.items():
            own = neighbourhood(value, cfg.k)
            for vfm, target in targets.items():
                row = table.setdefault((name, part, vfm), dict(name=name, part=part, vfm=vfm))
                row[view] = compare_neighbourhoods(own, target).item()
                if view == "clean":
                    row["probe"] = linear_probe(value, labels) if labels.max() > 0 else math.nan  # one class
    for row in table.values():
        row["SE-CKNNA"] = float(np.mean([row[condition] for condition in CONDITIONS]))
    return list(table.values()), scales


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report(paths, cfg, world, folder):
    """Measures checkpoints on held-out images; prints a table, writes align.json, align.png into `folder`."""
    subjects, vfms = load_subjects(paths, world)
    names = cfg.reference.split(",")
    for subject in subjects:
        names.append(subject.vfm)
        names += [dit.about["config"]["align_vfm"] for dit in subject.networks.values() if dit.cls_dim]
    for name in filter(None, names):
        if name not in vfms:
            vfms[name] = load_vfm(name, cfg.cache).to(world.device)
    if not vfms:
        raise UserError("no VFM: give --reference=NAME")
    data = open_data(cfg, "val", cfg.image_size or subjects[0].tokenizer.resolution)
    indices = np.linspace(0, len(data) - 1, min(cfg.images, len(data))).astype(int)
    rows, scales = alignment(subjects, vfms, data, indices, cfg, world)
    if world.rank > 0:
        return
    columns = [*CONDITIONS, "SE-CKNNA", "probe"]
    lines = []
    series = defaultdict(list)
    for row in rows:
        lines.append([f"{row['name']} {row['part']}", row["vfm"], *(f"{row[column]:.4f}" for column in columns)])
        block = 0 if row["part"] == "latents" else int(row["part"].split()[1])
        series[f"{row['name']}, {row['vfm']}"].append((block, row["SE-CKNNA"], 0))
    print(f"{len(indices):,} held-out images of {cfg.data}, {data.size} px, k = {cfg.k}, scales {scales}\n")
    print(markdown(["", "against", *columns], lines))
    write_json(folder / "align.json", dict(images=len(indices), k=cfg.k, scales=scales, rows=rows))
    series = {name: np.array(points).T for name, points in series.items()}
    chart(folder / "align.png", {"SE-CKNNA by block (0: latents)": series}, columns=1)
    print(f"in {folder}: align.json, align.png")


# --------------------------------------
# Joint training

class JointTrainer(Trainer):
    """A tokenizer's Trainer: in its step a diffusion model learns from the same latents; REPA's loss reaches `side`:

        tokenizer:  its own losses + tokenizer_weight * repa  (side = tokenizer, both)
        DiT:        flow matching + repa_weight * repa        (side = diffusion, both)

    The velocity loss never reaches the tokenizer: it would teach it easy latents that say little (REPA-E, section 3).
    BatchNorm normalises the latents, with gradients through the batch's statistics, so that scaling them gains nothing;
    sampling uses the running ones. One forward pass of the DiT serves both: a second walk back gives REPA's gradient
    alone, for the encoder."""

    def __init__(self, tok_cfg, tokenizer, world, vfm, cfg, entries, resumed):
        """entries: a diffusion checkpoint's, of joint training if `resumed`."""
        super().__init__(tok_cfg, tokenizer, world, vfm, length_scale=0.0)  # schedules are over
        self.joint_cfg = cfg
        with reading(entries.path):
            config = dict(entries["config"], seed=cfg.seed, compile=False, fsdp=False, cooldown=0.0)
            self.dit_cfg = dit_cfg = DiffusionConfig(**config)
        self.dit_arch = entries["arch"]
        self.dit_vfm = None
        if dit_cfg.align == "none" and cfg.side != "none":
            dit_cfg.align = "repa"
        if dit_cfg.align != "none":  # maybe a new head
            self.dit_vfm = load_vfm(dit_cfg.align_vfm, cfg.cache).to(world.device)
            self.dit_arch = dict(
                self.dit_arch, z_dim=self.dit_vfm.embed_dim, projector_dim=dit_cfg.projector_dim,
                encoder_depth=min(dit_cfg.encoder_depth, self.dit_arch["depth"]))
        single = dataclasses.replace(world, size=1)  # `step` averages gradients
        saved = entries if resumed else None
        self.dit, _, self.dit_ema, self.dit_optimizer = build(dit_cfg, single, self.dit_arch, saved)
        self.statistics = nn.BatchNorm2d(tokenizer.z_dim, affine=False).to(world.device)
        with reading(entries.path):
            if resumed:
                self.statistics.load_state_dict(entries["statistics"])
            else:
                self.dit.load_state_dict(entries["model"], strict=False)  # not a new projection
                self.dit_ema.load_state_dict(dict(self.dit.state_dict(), **entries["ema"]))
                self.statistics.running_mean.copy_(entries["latent_mean"])
                self.statistics.running_var.copy_(entries["latent_std"].square())
        self.heads = [*self.dit.projectors.parameters()]
        self.body = [p for name, p in self.dit.named_parameters() if not name.startswith("projectors.")]
        if cfg.compile:  # a block each: some are walked back twice
            for block in self.dit.blocks:
                block.compile(fullgraph=True, dynamic=False)

    def latent_losses(self, images, labels, z, indices, mean, logvar, features, whole):
        values, fixed, vf = super().latent_losses(images, labels, z, indices, mean, logvar, features, whole)
        dit = self.dit
        cfg = self.dit_cfg
        side = self.joint_cfg.side
        shrunk = z.shape[-1] != dit.input_size
        if shrunk:  # by equivariance regularisation: the DiT takes whole images
            with torch.no_grad(), self.world.autocast():
                mean, logvar = self.tokenizer.posterior(self.tokenizer.features(whole), *whole.shape[-2:])
            z, _ = self.draw_latent(mean, logvar)  # [B, C, h, w]
        leaf = z.detach().requires_grad_(side in ("tokenizer", "both") and not shrunk)
        tokens = None
        if self.dit_vfm is not None:
            with torch.no_grad(), self.world.autocast():
                tokens = vfm_tokens(self.dit_vfm, whole, dit.input_size // dit.patch_size)  # [B, (1 +) N, D]
        dropped = torch.rand(len(z), device=z.device) < cfg.class_dropout
        y = torch.where(dropped, dit.num_classes, labels.to(z.device))
        cls_noise = torch.randn_like(tokens[:, 0]) if dit.cls_dim else None
        t = draw_times(len(z), 0, cfg, dit)
        with self.world.autocast():
            losses = flow_losses(dit, self.statistics(leaf), y, t, torch.randn_like(z), tokens, cls_noise)
        losses = {name: value.mean() for name, value in losses.items()}
        loss = losses["velocity"] + cfg.cosine_weight * losses["cosine"]
        if dit.cls_dim:
            loss = loss + cfg.cls_weight * losses["cls"]

        # the projection learns whichever side is aligned
        share = 1 / self.cfg.accumulate
        inputs = self.body
        if side in ("diffusion", "both"):
            loss = loss + cfg.repa_weight * losses["repa"]
            inputs = self.body + self.heads
        elif "repa" in losses:
            torch.autograd.backward(share * cfg.repa_weight * losses["repa"], inputs=self.heads, retain_graph=True)
        torch.autograd.backward(share * loss, inputs=inputs, retain_graph=leaf.requires_grad)
        if leaf.requires_grad:
            scale = images[0].numel() if self.stage.summed else 1  # LDM's losses: sums over pixels
            grad, = torch.autograd.grad(self.joint_cfg.tokenizer_weight * scale * losses["repa"], leaf)
            fixed = fixed + (z * grad).sum()  # with that gradient
        return {**values, **losses}, fixed, vf

    def step(self, batches, step, images_seen):
        """The tokenizer's step, then the diffusion model's -> the last micro-batch's losses."""
        statistics = self.statistics.running_mean, self.statistics.running_var
        before = [value.clone() for value in statistics]
        losses = super().step(batches, step, images_seen)
        cfg = self.dit_cfg
        params = self.body + self.heads
        average_gradients(params, self.world)
        self.dit_optimizer.param_groups[0]["lr"] = learning_rate(cfg, step)
        losses["dit_grad_norm"] = nn.utils.clip_grad_norm_(params, cfg.clip or math.inf)
        skipped = torch.maximum(losses["skipped"], self.world.any_bad([losses["dit_grad_norm"]]))
        step_unless(skipped, self.dit_optimizer)
        update_ema(self.dit_ema, self.dit, cfg.ema, skipped)
        for value, old in zip(statistics, before):
            value.copy_(torch.where(skipped > 0, old, self.world.mean(value)))
        return dict(losses, skipped=skipped)


def train_jointly(cfg, paths, world):
    """Trains the last path's diffusion model and its tokenizer, or goes on -> its paths before, after."""
    before = paths[-1]
    folder = Path(cfg.out) / f"joint-{cfg.side}"
    after = str(folder / "diffusion.pt")
    again = os.path.exists(after)
    source = after if again else before
    entries = load_checkpoint(source, "diffusion")
    if entries["arch"].get("text_tokens"):
        raise UserError(f"{source} is a text model: joint training takes those of classes")
    if entries["arch"].get("sphere"):
        raise UserError(f"{source} is of --path=sphere: joint training needs channel statistics")
    start = entries["step"] if again else 0
    settings = [before, cfg.seed, cfg.batch_size, cfg.tokenizer_weight]
    if again and entries["settings"] != settings:
        raise UserError(f"{folder} is another run's: give another --out")

    # averaged weights: the diffusion model knows their latents
    saved = load_checkpoint(tokenizer_beside(source, entries), "tokenizer")
    ours = {key: getattr(cfg, key) for key in ("out", "cache", "seed", "batch_size", "accumulate", "compile")}
    with reading(saved.path):
        tok_cfg = TokenizerConfig(**{**saved["config"], **ours})
    stages = [stage for stage in stages_of(tok_cfg) if "adapter" in stage.trains]
    if not stages:
        raise UserError(f"{saved.path}: {tok_cfg.method}'s encoder has nothing to train jointly")
    tok, vfm = build_tokenizer(tok_cfg)
    load_state(tok, saved["model"] if again else {**saved["model"], **saved["ema"]}, saved.path)
    if not again:  # joint ones do not say
        check_tokenizer(before, entries, tok, saved.path)
    tok = tok.to(world.device, memory_format=world.layout)
    trainer = JointTrainer(tok_cfg, tok, world, vfm and vfm.to(world.device), cfg, entries, again)
    seed_step(cfg.seed, -1)
    trainer.start_stage(stages[-1])
    trainer.load_state_dict(saved, same_stage=again)
    # the decoder's alone: the diffusion model learns this very encoder's latents
    with reading(saved.path):
        names = [name for name, _ in tok.named_parameters() if name.startswith("decoder.")]
        averages = {name: saved["ema"][name].to(world.device) for name in names}

    data = open_data(cfg, "train", tok_cfg.image_size, tok_cfg.crop, tok_cfg.flip)
    if list(data.classes) != list(entries["classes"]):
        raise UserError(f"--data={cfg.data} has other classes than the diffusion model's")
    world.agree(configuration=cfg, data=data.identity(), checkpoint=start)
    batch = cfg.batch_size
    images = saved["images"]
    order = step_batches(len(data), batch, cfg.seed, start, cfg.steps, world, cfg.accumulate)
    loader = iter(make_loader(data, order, world, cfg.workers))
    log = Log(folder, "align", world, cfg.steps, start)
    watch = Watch(world, after, entries if again else None)

    def save(done):
        state = full_state(trainer.dit, trainer.dit_ema, trainer.dit_optimizer)
        if world.rank == 0:  # diffusion.pt, which names its tokenizer, comes last
            path = folder / f"tokenizer-{done:07d}.pt"
            shared = dict(
                classes=entries["classes"], image_size=tok_cfg.image_size, step=done, skipped=int(watch.skipped))
            save_checkpoint(
                path, kind="tokenizer", config=dataclasses.asdict(tok_cfg), arch=tok.arch, ema=averages,
                stage=saved["stage"], images=images, **trainer.state_dict(), **shared)
            norm = trainer.statistics
            save_checkpoint(
                after, kind="diffusion", config=dataclasses.asdict(trainer.dit_cfg), arch=trainer.dit_arch,
                latent_mean=norm.running_mean.cpu(), statistics=norm.state_dict(),
                latent_std=(norm.running_var + norm.eps).sqrt().cpu(), tokenizer=str(path),
                images=done * batch, latents="", settings=settings, **state, **shared)
            for earlier in set(folder.glob("tokenizer-*.pt")) - {path}:
                earlier.unlink()
        world.barrier()

    for step in watch.steps(range(start, cfg.steps)):
        seed_step(cfg.seed, step, world.rank)
        losses = trainer.step(itertools.islice(loader, cfg.accumulate), step, step * batch)
        done = step + 1
        images += batch
        average_weights(averages, tok, images, batch, tok_cfg.ema_kimg, losses["skipped"])
        caught = watch.count(losses)
        log.bar.update()
        saving = done % cfg.save_interval == 0 or done == cfg.steps
        if done % cfg.log_interval == 0 or saving:
            losses = {name: world.mean(value) for name, value in losses.items()}
            log.write(done, done * batch, **losses)
        if saving or caught:
            save(done)
        watch.obey(caught, done)
    log.bar.close()
    return [before, after]


# --------------------------------------
# The study (which tokenizers diffuse well, at equal budgets?) and the sweep

# What differs; stages and losses: STAGES["study"]. A blind VFM never saw classes.
METHODS = {"vae": dict(method="vae"), "vae-8": dict(method="vae", z_dim=8)}
for name in ("vavae", "vfmvae", "aligntok", "rae", "psvae"):
    METHODS[name] = dict(method=name)
    METHODS[f"{name}-blind"] = dict(method=name, vfm="toy-blind")
    METHODS[f"{name}-simvq"] = dict(method=name, quantizer="simvq")
    METHODS[f"{name}-sphere"] = dict(method=name, path="sphere")  # diffusion.py's
QUALITIES = ("SE-CKNNA", "CKNNA", "SE-CKNNA to toy", "SE-CKNNA to toy-blind", "probe", "PSNR", "rFD", "rAccuracy")
OUTCOMES = ("gFD", "gFD to reconstructions", "accuracy")
TEXT_OUTCOMES = ("all six right", "all six, left out", "binding")  # of captions, by fid.py's `score_captions`


class Jury:
    """Held-out shapes and the toy's classifier."""

    def __init__(self, n, cache, world, size=32):
        self.world = world
        self.net = load_features("toy", cache, world.device)
        self.data = Images("shapes", "val", size, cache=cache)
        self.images = torch.stack([self.data[i][0] for i in range(min(n, len(self.data)))])  # uint8 [n, 3, S, S]
        self.labels = torch.as_tensor(self.data.labels[:len(self.images)])
        self.real = judge(self.images, self.net, world, self.labels)

    def judge_samples(self, subject, dit, n, sampling):
        """-> `judge` of n samples, of all classes in turn or of held-out captions, against held-out images; of captions
        `geneval`, else None."""
        captions = [self.data.caption(i) for i in range(n)] if dit.text_tokens else []
        if captions:
            y = ShapesText().ids(captions).long()  # [n, L]
            labels = self.labels[:n]
        else:
            y = labels = torch.arange(n) % dit.num_classes
        mean, std = (dit.about[key] for key in ("latent_mean", "latent_std"))
        images = []
        for part in torch.arange(n).split(250):
            images.append(generate(dit, subject.tokenizer, mean, std, part, y[part], sampling, self.world))
        images = to_uint8(torch.cat(images)).cpu()
        judged = judge(images, self.net, self.world, labels, self.real["statistics"])
        told = None
        if captions:
            told = geneval(images, captions, Selection(self.data, len(self.data)), self.net, self.world)
        return judged, told


def study_run(cfg, jury, vfms, method, seed, folder):
    """Trains and judges a tokenizer and, by alignment, diffusion models on it -> result.json's entries."""
    started = time.time()
    world = jury.world
    shared = dict(preset="toy", seed=seed, cache=cfg.cache, compile=False)
    row = dict(METHODS[method])
    flow = row.pop("path", "linear")
    train_tokenizer(TokenizerConfig(**dict(
        TOKENIZER_PRESETS["toy"], **shared, **row, recipe="study", decoder="vfmvae", batch_size=8, kimg=cfg.study_kimg,
        out=str(folder))), world)
    path = str(folder / "tokenizer.pt")
    (subject,), _ = load_subjects([path], world)
    subject.name = method
    rebuilt, values = judge_tokenizer(
        subject.tokenizer, jury.images, jury.net, world, dict(psnr=psnr), labels=jury.labels,
        reference=jury.real["statistics"])

    points = {}
    aligns = sorted(cfg.study_align.split(","), key=lambda align: align == "none")  # none reads the others' cache
    for align in aligns + ["text"] * (method in cfg.study_text.split(",")):
        text = "toy" if align == "text" else ""
        sampling = Sampling(seed=seed, solver="euler", num_steps=12, cfg_scale=3.0 if text else 1.0)
        train_diffusion(DiffusionConfig(**dict(
            DIFFUSION_PRESETS["toy"], **shared, path=flow, text=text, align="none" if text else align,
            align_vfm=subject.vfm, steps=cfg.study_steps, ema=0.99, keep=True,
            save_interval=math.gcd(*cfg.study_points), sample_interval=0, tokenizer=path,
            latents=str(folder / "latents"), out=str(folder / align))), world)
        points[align] = []
        for step in cfg.study_points:
            dit = load_diffusion(folder / align / f"diffusion{'-text' * bool(text)}-{step}.pt").to(world.device)
            judged, told = jury.judge_samples(subject, dit, cfg.study_samples, sampling)
            inner = distance(judged["statistics"], rebuilt["statistics"])
            point = dict(zip(OUTCOMES, (judged["fd"], inner, judged["agreement"])), step=step)
            if text:
                scores = [told["samples"][key] for key in ("all", "all_left_out", "binding")]
                point.update(zip(TEXT_OUTCOMES, np.array(scores, float).tolist()))  # None: nan
            points[align].append(point)
        subject.networks[align] = dit

    rows, scales = alignment([subject], vfms, jury.data, np.arange(len(jury.images)), cfg, world)
    latents = {row["vfm"]: row for row in rows if row["part"] == "latents"}
    own = latents[subject.vfm]
    return {
        "method": method, "seed": seed, "seconds": time.time() - started, "judge": jury.real["agreement"],
        "PSNR": values["psnr"], "rFD": rebuilt["fd"], "rAccuracy": rebuilt["agreement"],
        "CKNNA": own["clean"], "SE-CKNNA": own["SE-CKNNA"], "probe": own["probe"], "points": points,
        **{f"SE-CKNNA to {vfm}": row["SE-CKNNA"] for vfm, row in latents.items()}, "alignment": rows, "scales": scales}


def study(cfg):
    """The runs that OUT/study lacks, every size-th for this process of torchrun's, then the report. Processes share
    only files and may outnumber GPUs."""
    rank = int(os.environ.pop("RANK", 0))
    size = int(os.environ.pop("WORLD_SIZE", 1))
    os.environ["LOCAL_RANK"] = str(rank % max(1, torch.cuda.device_count()))
    world = init_world(cfg.out, cfg.cache)
    methods = cfg.study_methods.split(",")
    texts = list(filter(None, cfg.study_text.split(",")))
    unknown = {*methods, *texts} - METHODS.keys() | {*cfg.study_align.split(",")} - {"none", "repa", "reg"}
    if unknown:
        raise UserError(f"no {min(unknown)}: methods are {', '.join(METHODS)}, alignments none, repa, reg")
    if not all(0 < step <= cfg.study_steps for step in cfg.study_points or [0]):
        raise UserError("--study_points must be from 1, and must not exceed --study_steps")
    with alone(f"{cfg.cache}/study"):  # trains what is missing once
        vfms = {name: load_vfm(name, cfg.cache).to(world.device) for name in ("toy", "toy-blind")}
        jury = Jury(cfg.study_samples, cfg.cache, world)
    if cfg.study_samples > len(jury.data):
        raise UserError(f"--study_samples: there are {len(jury.data)} held-out images")
    if {*methods} & {*texts} and jury.data.in_text_training()[:cfg.study_samples].all():
        raise UserError("--study_samples must reach a caption of a left-out pair")

    settings = dict(study_points=list(cfg.study_points))
    for key in ("seed", "k", "study_align", "study_text", "study_kimg", "study_steps", "study_samples"):
        settings[key] = getattr(cfg, key)
    # equal in all of a table's runs
    stamp = dict(settings=settings, networks=fingerprint(*vfms.values(), jury.net))
    folder = Path(cfg.out) / "study"
    runs = []
    for seed, method in itertools.product(range(cfg.seed, cfg.seed + cfg.study_seeds), methods):
        path = folder / f"{method}-{seed}" / "result.json"
        before = read_json(path) or read_json(path.with_name("stamp.json"))  # done, or begun
        if before and {**before, **stamp} != before:
            raise UserError(f"{path} is of other settings, VFMs or classifier: another --out")
        runs.append((method, seed, path))
    for method, seed, path in runs[rank::size]:
        if not path.exists():
            write_json(path.with_name("stamp.json"), stamp)
            result = study_run(cfg, jury, vfms, method, seed, path.parent)
            write_json(path, {**result, **stamp})
        shutil.rmtree(path.parent / "latents", ignore_errors=True)
        for checkpoint in path.parent.rglob("*.pt"):
            checkpoint.unlink()
    paths = [path for *_, path in runs]
    if all(path.exists() for path in paths):
        print(study_report(cfg, folder, paths) + f"in {folder}: table.md, results.json, study.png")


def spread(values):
    deviation = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
    return f"{np.mean(values):.3g}{deviation}"


def study_report(cfg, folder, paths):
    """Writes table.md, results.json, study.png -> the table."""
    results = [read_json(path) for path in paths]
    methods = defaultdict(list)  # their results
    for result in results:
        methods[result["method"]].append(result)
    qualities = []
    means = {}  # [qualities] each
    for method, its in methods.items():
        known = np.array([[result[key] for key in QUALITIES] for result in its])  # [runs, qualities]
        qualities.append([method, *map(spread, known.T)])
        means[method] = known.mean(0)

    aligns = list(dict.fromkeys(itertools.chain(*(result["points"] for result in results))))
    panels = {}
    outcomes = []
    rhos = []
    spearman = defaultdict(dict)
    judged = list(itertools.product(OUTCOMES, aligns))
    if "text" in aligns:
        judged += [(outcome, "text") for outcome in TEXT_OUTCOMES]
    for outcome, align in judged:
        series = panels[f"{outcome} by diffusion steps, alignment: {align}"] = {}
        for method, its in methods.items():
            if align not in its[0]["points"]:
                continue
            ys = np.array([[point[outcome] for point in result["points"][align]] for result in its])  # [runs, points]
            series[method] = cfg.study_points, ys.mean(0), ys.std(0, ddof=len(ys) > 1)
            outcomes.append([outcome, align, method, *map(spread, ys.T)])
        ranked = [method for method in series if "path" not in METHODS[method]]  # each tokenizer once
        if len(ranked) > 1:
            final = [series[method][1][-1] for method in ranked]
            ranks = rankdata(np.column_stack([final, [means[method] for method in ranked]]), axis=0)
            rho = np.corrcoef(ranks, rowvar=False)[0, 1:].tolist()
            spearman[align][outcome] = dict(zip(QUALITIES, rho))
            rhos.append([outcome, align, *(f"{value:+.2f}" for value in rho)])

    real = np.mean([result["judge"] for result in results])
    steps = [f"at {step:,}" for step in cfg.study_points]
    text = f"""{len(results)} runs; mean ± standard deviation over seeds. Each tokenizer: {cfg.study_kimg:g} thousand \
images; each diffusion model: {cfg.study_steps:,} steps of 64, {cfg.study_samples:,} unguided samples of 12 Euler \
times (text: of held-out captions, guidance 3). FD: Frechet distance of a classifier's features to held-out images (r: \
reconstructed, g: generated). Accuracy: how many images it takes for their class, or shape (real ones: {real:.1%}). \
CKNNA, REPA: to the tokenizer's own VFM (vae: toy).

{markdown(["tokenizer", *QUALITIES], qualities)}
{markdown(["outcome", "alignment", "tokenizer", *steps], outcomes)}"""
    if rhos:
        text += f"""
Spearman's rank correlation of the tokenizers' means with the final outcome (not on the sphere). Of gFD and rFD less \
is better.

{markdown(["outcome", "alignment", *QUALITIES], rhos)}"""
    write_text(folder / "table.md", text)
    write_json(folder / "results.json", dict(runs=results, spearman=spearman))
    chart(folder / "study.png", panels, columns=len(aligns))
    return text


def sweep(cfg, world):
    """Judges samples of OUT/diffusion.pt by solver and times, by guidance, by --reuse of a model with a head ->
    OUT/sweep.md, .json. ms: an image's, decoded and judged, too."""
    (subject,), _ = load_subjects([f"{cfg.out}/diffusion.pt"], world)
    dit, = subject.networks.values()
    if dit.about["config"]["data"] != "shapes":
        raise UserError("--sweep needs a model trained on the shapes")
    jury = Jury(5_000, cfg.cache, world, dit.about["image_size"])
    solvers = ("euler",) if dit.sphere else ("euler", "heun", "ab2")
    cells = [(solver, steps, 3.0, 1) for solver in solvers for steps in cfg.sweep_steps]
    cells += [(solvers[-1], 20, scale, 1) for scale in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
    if dit.head_depth:
        cells += [("euler", 50, 3.0, reuse) for reuse in (1, 2, 3, 4, 6, 8)]
    rows = []
    for solver, steps, scale, reuse in tqdm(dict.fromkeys(cells), desc="sweep"):
        sampling = Sampling(
            seed=cfg.seed, solver=solver, num_steps=steps, cfg_scale=scale, reuse=reuse,
            train_shift=dit.about["config"].get("train_shift", 0))
        start = time.perf_counter()
        judged, _ = jury.judge_samples(subject, dit, cfg.sweep_samples, sampling)
        ms = 1000 * (time.perf_counter() - start) / cfg.sweep_samples
        evaluations = (steps - 1) * (2 if solver == "heun" else 1)
        rows.append(dict(
            solver=solver, num_steps=steps, evaluations=evaluations, cfg_scale=scale, reuse=reuse, ms=ms,
            fd=judged["fd"], accuracy=judged["agreement"]))
    lines = [[solver, *(f"{value:.4g}" for value in values)] for solver, *values in map(dict.values, rows)]
    text = markdown(list(rows[0]), lines)
    write_json(f"{cfg.out}/sweep.json", rows)
    write_text(f"{cfg.out}/sweep.md", text)
    print(text)


# --------------------------------------
# Charts

COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


def chart(path, panels, columns=2):
    """Line charts with one legend, a PNG; panels: {title: {name: (xs, ys, spreads)}}."""
    width, height = 1120, 720  # of a panel
    names = dict.fromkeys(itertools.chain(*panels.values()))
    colours = dict(zip(names, itertools.cycle(COLOURS)))
    legend = math.ceil(len(panels) / columns) * height
    canvas = Image.new("RGB", (columns * width, legend + 40 * len(names) + 20), "white")
    draw = ImageDraw.Draw(canvas)
    draw.font = ImageFont.load_default(26)
    for p, (title, series) in enumerate(panels.items()):
        left = p % columns * width + 132
        right = left + width - 180
        top = p // columns * height + 72
        bottom = top + height - 144
        all_xs, all_ys, deviations = (np.concatenate(parts) for parts in zip(*series.values()))
        low, high = (all_ys - deviations).min(), (all_ys + deviations).max()
        step = float(f"{(high - low) / 5 or 1:.0e}")
        ticks = np.arange(math.floor(low / step), math.ceil(high / step) + 1) * step
        x_range = all_xs.min(), all_xs.max()

        def at(x, y):
            return np.interp(x, x_range, (left + 40, right - 40)), np.interp(y, ticks[[0, -1]], (bottom, top))

        draw.text((left, top - 24), title, "black", anchor="lb")
        for tick in ticks:
            _, y = at(0, tick)
            draw.line([left, y, right, y], "#dddddd", 2)
            draw.text((left - 12, y), f"{tick:.6g}", "black", anchor="rm")
        for x in np.unique(all_xs):
            draw.text((at(x, 0)[0], bottom + 16), f"{x:g}", "black", anchor="mt")
        for name, (xs, ys, deviations) in series.items():
            draw.line(list(zip(*at(xs, ys))), colours[name], 4)
            for x, y, deviation in zip(xs, ys, deviations):
                draw.line([at(x, y - deviation), at(x, y + deviation)], colours[name], 2)
                x, y = at(x, y)
                draw.ellipse([x - 6, y - 6, x + 6, y + 6], colours[name])
    for y, (name, colour) in zip(itertools.count(legend + 20, 40), colours.items()):
        draw.line([60, y, 108, y], colour, 6)
        draw.text((120, y), name, "black", anchor="lm")
    with replacing(path) as temporary:
        canvas.reduce(2).save(temporary, "PNG")  # antialiased


def run():
    flags = []
    paths = []  # neither a --key nor after one without =
    key = False
    for item in sys.argv[1:]:
        (flags if item.startswith("-") or key else paths).append(item)
        key = item.startswith("-") and "=" not in item
    cfg = parse_config(Config, PRESETS, flags)
    if cfg.study:
        study(cfg)
        return
    world = init_world(cfg.out, cfg.cache)
    if cfg.sweep:
        if world.rank == 0:
            sweep(cfg, dataclasses.replace(world, size=1))
        return
    folder = Path(cfg.out)
    defaults = folder / "tokenizer.pt", folder / "diffusion.pt"
    paths = paths or [str(path) for path in defaults if path.exists()]
    if not paths:
        raise UserError(f"no checkpoints in {cfg.out}: run tokenizer.py first, or name some")
    if cfg.steps:
        paths = train_jointly(cfg, paths, world)
        folder = folder / f"joint-{cfg.side}"
    report(paths, cfg, world, folder)


if __name__ == "__main__":
    main(run)
