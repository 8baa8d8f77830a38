"""
Alignment of tokenizers and diffusion models with vision foundation models (VFMs): measured, trained jointly, and its worth put to the test.

    python align.py                                         # CKNNA, SE-CKNNA, linear probe of out/tokenizer.pt and of each block of out/diffusion.pt
    python align.py a/tokenizer.pt b/diffusion.pt c/*.pt --reference=toy-blind      # any number, side by side; a diffusion model brings its tokenizer
    python align.py --steps=1000 --side=both                # both go on training together -> out/joint-both/, measured before and after
    python align.py --study=1                               # the papers' claim in miniature: 6 tokenizers x 3 seeds, a quarter of an hour each on a core
    torchrun --nproc_per_node=8 align.py --study=1          # its runs shared out over processes and GPUs, each independent of the others

CKNNA is arXiv 2405.07987, SE-CKNNA and dual alignment VFM-VAE's (2510.18457), joint training REPA-E's (2504.10483).
"""
import dataclasses
import functools
import itertools
import json
import math
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import spearmanr
from tqdm import tqdm

import diffusion
import tokenizer
from diffusion import DiT, ImageNoise, build, fingerprint, flow_losses, full_state, load_diffusion, model_arch, train_step, vfm_tokens, write_json
from fid import frechet_distance, full_float32, load_features, total
from sample import ode
from tokenizer import (STAGES, Images, Log, Shapes, StepSampler, Tokenizer, Trainer, UserError, average_gradients, average_weights, batch_indices,
                       build_tokenizer, init_world, load_checkpoint, load_moments, load_tokenizer, load_vfm, load_weights, main, make_loader, parse_config, psnr,
                       save_checkpoint, seed_step, stage_plan, to_float, to_uint8, update_ema, use_weights, vfm_of, write_text)


@dataclass
class Config:
    preset: str = ""                  # toy or imagenet (default: imagenet where CUDA and data/imagenet/train are at hand)
    out: str = "out"                  # everything is written here; holds the checkpoints that are not named
    seed: int = 0                     # of batches, noise, transformations
    # data
    data: str = "shapes"              # shapes, a folder of class folders (or with train/ and val/), or a torchvision data set
    data_dir: str = "data"            # where torchvision's data sets lie
    download: bool = False            # fetch them
    image_size: int = 0               # pixels [what the first tokenizer was trained at]
    workers: int = 0                  # data loading processes
    # measuring
    reference: str = ""               # VFMs to compare with beside each tokenizer's own: names or files, comma-separated
    images: int = 2_000               # held-out images (the paper: 10,000)
    k: int = 10                       # nearest neighbours of CKNNA
    encode_batch: int = 100           # images at once
    # joint training
    steps: int = 0                    # train both for so many steps; 0: measure only
    side: str = "both"                # which side the alignment loss reaches: none, tokenizer, diffusion, both
    tokenizer_weight: float = 1.5     # of the alignment loss on the tokenizer (REPA-E); on the diffusion model its own --repa_weight holds
    momentum: float = 0.1             # of the latents' running statistics (BatchNorm's)
    batch_size: int = 32              # images a step, over all processes
    accumulate: int = 1               # micro-batches a step
    compile: bool = torch.cuda.is_available()   # torch.compile the networks that train
    log_interval: int = 10            # steps
    save_interval: int = 500          # steps between checkpoints
    # the study
    study: bool = False               # run what is missing of it, then its table
    study_methods: str = "vae,vae-8,vavae,vfmvae,vfmvae-blind,aligntok"      # of METHODS
    study_seeds: int = 3              # runs of each, from --seed on
    study_align: str = "none,repa"    # diffusion models on each tokenizer: none, repa, reg
    study_kimg: float = 28.0          # thousands of images to each tokenizer, all stages together
    study_steps: int = 1_500          # of 64 latents to each diffusion model
    study_points: tuple = (375, 750, 1_500)     # steps at which it is evaluated
    study_images: int = 12_000        # training images (there are 30,000)
    study_samples: int = 1_000        # samples of an evaluation, and held-out images
    study_sampling: int = 12          # Euler times
    study_guidance: float = 1.0       # guidance scale


PRESETS = {"toy": {}, "imagenet": dict(data="data/imagenet", images=10_000, encode_batch=64, batch_size=256, workers=8, log_interval=100, save_interval=2_000)}
SIDES = "none", "tokenizer", "diffusion", "both"
SCALES, NOISES = (1.0, 0.75, 0.5, 0.25), (0.05, 0.10, 0.15, 0.20)                # SE-CKNNA's; noise in parts of the pixel range
CONDITIONS = "clean", "equivariance", *(f"noise {std:.2f}" for std in NOISES)

# -----------------------------------------------------------------------------
# CKNNA

def prepare(features):
    """[n, D] -> [n, D]: clamped to +-q, q at 95% of the sorted absolute values of the whole matrix, then rows of unit length."""
    size = features.abs().flatten()
    q = size.kthvalue(min(len(size), int(0.95 * len(size)) + 1)).values
    return F.normalize(features.clamp(-q, q), dim=1)


def neighbours(features, k):
    """Prepared features [n, D] -> their kernel [n, n] with a zero diagonal, the mask of each row's k nearest, the kernel's masked HSIC with itself."""
    kernel = (features @ features.T).fill_diagonal_(-torch.inf)
    near = torch.zeros_like(kernel, dtype=torch.bool).scatter_(1, kernel.topk(min(k, len(kernel) - 1)).indices, True)
    kernel.fill_diagonal_(0)
    return kernel, near, hsic(kernel * near, kernel * near)


def hsic(K, L):
    """Unbiased HSIC of kernels with zero diagonals (Song et al. 2012, eq. 5) -> scalar, float64. They need not be symmetric."""
    n = len(K)
    add = lambda x, *dim: x.sum(*dim, dtype=torch.float64)
    product = add(K, 0) @ add(L, 1)                                              # the sum of all entries of K L
    return (add(K * L.T) + add(K) * add(L) / ((n - 1) * (n - 2)) - 2 / (n - 2) * product) / (n * (n - 3))


def agreement(a, b):
    """CKNNA of two `neighbours` -> scalar tensor."""
    (K, near_a, self_a), (L, near_b, self_b) = a, b
    both = near_a & near_b
    return hsic(K * both, L * both) / ((self_a * self_b).clamp(min=0).sqrt() + 1e-6)


def cknna(a, b, k=10):
    """Centered kernel nearest-neighbour alignment (arXiv 2405.07987) of the same n > 3 images' prepared features [n, D_a] and [n, D_b] -> float, 1 if
    neighbourhoods and similarities are equal, about 0 if unrelated."""
    return agreement(neighbours(a, k), neighbours(b, k)).item()


def linear_probe(features, labels, ridge=1e-3):
    """Accuracy of a linear classifier of features [n, D]: ridge regression onto the classes in closed form, fitted to the even rows, judged on the odd."""
    x, y = features.double(), F.one_hot(labels).double()
    x = (x - x[::2].mean(0)) / x[::2].std(0).clamp(min=1e-6)
    mean = y[::2].mean(0)
    gram = x[::2].T @ x[::2] / len(x[::2])
    w = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), x[::2].T @ (y[::2] - mean) / len(x[::2]))
    return ((x[1::2] @ w + mean).argmax(1) == labels[1::2]).double().mean().item()


# -----------------------------------------------------------------------------
# Measuring: features of the same transformed images from every tokenizer, diffusion block and VFM

@dataclass
class Network:
    """A diffusion model that is measured: its name, the DiT, its latents' mean and std [C], training step, the VFM of its class token."""
    name: str
    dit: DiT
    mean: torch.Tensor
    std: torch.Tensor
    step: int = 0
    vfm: str = ""


@dataclass
class Subject:
    """A tokenizer that is measured: its name (its path), its own VFM's name, the diffusion models on its latents."""
    name: str
    tokenizer: Tokenizer
    vfm: str
    networks: list = field(default_factory=list)


def tokenizer_beside(path, entries):
    """The tokenizer that a diffusion checkpoint names, or the file of that name beside it (a folder that was moved)."""
    named = Path(entries["tokenizer"])
    return str(named if named.exists() else Path(path).parent / named.name)


def load_subjects(paths, world):
    """-> [Subject], {name: VFM}: each checkpoint loaded once, diffusion models under their tokenizers. UserError for another kind of file."""
    subjects, vfms = {}, {}

    def subject(path):
        if path not in subjects:
            net = load_tokenizer(path).to(world.device)
            config = tokenizer.Config(**net.about["config"]) if net.about else None
            own = vfm_of(config)[0] if config else f"VFM of {path}" if net.vfm else ""
            if net.vfm and net.layers[-1] == -1 and (config is None or config.method == "vfmvae"):
                vfms.setdefault(own, net.vfm)                                    # frozen: it is the pretrained one
            subjects[path] = Subject(path, net, own)
        return subjects[path]

    for path in paths:
        entries = load_weights(path)
        if entries.get("kind") != "diffusion":
            subject(path)
            continue
        owner = subject(tokenizer_beside(path, entries))
        if entries["arch"]["in_channels"] != owner.tokenizer.z_dim:
            raise UserError(f"{path} is for latents of {entries['arch']['in_channels']} channels, {owner.name} has {owner.tokenizer.z_dim}: "
                            "it was trained on another tokenizer")
        if "pair" in entries and entries["pair"] != fingerprint(owner.tokenizer):
            raise UserError(f"{path} was trained jointly with another {owner.name}: the two files are of different steps or runs")
        align = entries["config"]["align_vfm"] if entries["arch"]["cls_dim"] else ""
        owner.networks.append(Network(path, load_diffusion(path).to(world.device), entries["latent_mean"], entries["latent_std"], entries["step"], align))
    return list(subjects.values()), vfms


def block_features(dit, z, *cls):
    """Every block's output at t = 0.5 for the null class, averaged over patch tokens -> one [B, D] per block. The input is the normalised latent
    itself (and REG's class token), without noise: what the model makes of an image, not of one draw of noise. z [B, C, s, s] may be smaller than the
    DiT's latents: positions count from 0, so it gets the corner of their tables."""
    found, side, cells = [], dit.input_size, torch.arange(z.shape[-1] // dit.patch_size)
    corner = (cells[:, None] * (side // dit.patch_size) + cells).flatten()
    corner = torch.cat((corner[:1], corner + 1)) if dit.cls_dim else corner      # the class token's comes first
    tables = {name: getattr(dit, name) for name in ("pos_embed", "rope_cos", "rope_sin")}
    hooks = [block.register_forward_hook(lambda block, inputs, x: found.append(x[:, int(dit.cls_dim > 0):].float().mean(1))) for block in dit.blocks]
    try:
        dit.input_size, dit.pos_embed = z.shape[-1], dit.pos_embed[:, corner]
        dit.rope_cos, dit.rope_sin = (None if tables[name] is None else tables[name][corner] for name in ("rope_cos", "rope_sin"))
        dit(z, z.new_full((len(z),), 0.5), torch.full((len(z),), dit.num_classes, device=z.device), *cls)
    finally:
        dit.input_size = side
        for name, table in tables.items():
            setattr(dit, name, table)
        for hook in hooks:
            hook.remove()
    return found


def transformed(images, indices, scales, seed):
    """Yields (condition, [(rows, images of one size)]) of images [B, 3, S, S]. What is drawn for an image depends on (seed, its index) alone: a number of
    quarter turns, one of `scales`, and one field of Gaussian noise, added with each std and clipped."""
    everything = torch.arange(len(images), device=images.device)
    yield "clean", [(everything, images)]
    draws = [np.random.default_rng((seed, int(i))) for i in indices]
    turned = torch.stack([torch.rot90(image, int(draw.integers(4)), (1, 2)) for image, draw in zip(images, draws)])
    drawn = torch.tensor([scales[int(draw.integers(len(scales)))] for draw in draws], device=images.device)
    shrink = lambda x, s: x if s == 1 else F.interpolate(x, [round(side * s) for side in x.shape[-2:]], mode="bilinear", antialias=True, align_corners=False)
    groups = [(scale, torch.nonzero(drawn == scale)[:, 0]) for scale in scales]
    yield "equivariance", [(rows, shrink(turned[rows], scale)) for scale, rows in groups if len(rows)]
    noise = ImageNoise(seed, indices)(images)
    for condition, std in zip(CONDITIONS[2:], NOISES):
        yield condition, [(everything, (images + 2 * std * noise).clamp(-1, 1))]                # the range is 2 wide


def pooled_features(subjects, vfms, images):
    """Yields (key, [B, D] averaged over positions) of images [B, 3, s, s]; keys are ("vfm", name), (tokenizer's name, "latents"), (diffusion model's
    name, "block 1"), ... A VFM on which a tokenizer stands sees the images at the size at which the tokenizer shows them to it; another one at the size
    that gives it a token for each position of the first tokenizer's latents, REPA's way."""
    side = images.shape[-1]
    owners = {subject.vfm: subject.tokenizer for subject in reversed(subjects) if subject.tokenizer.vfm is not None}
    tokens = functools.cache(lambda name, grid: vfm_tokens(vfms[name], images, grid))
    for name, vfm in vfms.items():
        grid = round(side * owners[name].scale_factor) // vfm.patch_size if name in owners else side // subjects[0].tokenizer.downsample
        yield ("vfm", name), tokens(name, grid)[:, int(vfm.cls_token is not None):].mean(1)
    for subject in subjects:
        net = subject.tokenizer
        levels = net.features(images)
        # `encode` without its check: what the decoder demands of the size does not matter here
        z = net.moments(levels, side, side).float().chunk(2, 1)[0]
        yield (subject.name, "latents"), z.mean((2, 3))
        for network in subject.networks:
            mean, std = (s.to(z.device).view(1, -1, 1, 1) for s in (network.mean, network.std))
            cls = [tokens(network.vfm, z.shape[-1] // network.dit.patch_size)[:, 0]] if network.dit.cls_dim else []
            blocks = block_features(network.dit, (z - mean) / std, *cls)
            for i, block in enumerate(blocks, 1):
                yield (network.name, f"block {i}"), block


def fits(subjects, side):
    """Whether images of `side` px lie on every patch and latent grid, and within every DiT's."""
    whole = lambda x: x >= 1 and abs(x - round(x)) < 1e-6
    return all(whole(side / net.downsample) and (net.vfm is None or whole(side * net.scale_factor / net.vfm.patch_size))
               and all(whole(side / net.downsample / n.dit.patch_size) and side <= n.dit.input_size * net.downsample for n in s.networks)
               for s in subjects for net in [s.tokenizer])


@torch.inference_mode()
@full_float32()
def measure(subjects, vfms, size, images, labels, indices, cfg, world):
    """CKNNA of every part of every subject against every VFM, in each condition -> rows: dict(name, part, step, vfm, conditions..., SE-CKNNA, probe).

    `images(parts)` gives uint8 [B, 3, size, size] for each part, a list of rows; labels [n] and indices [n] (what is drawn for an image depends on it).
    Processes share the images."""
    scales = [scale for scale in SCALES if fits(subjects, size * scale)]
    if not scales:
        raise UserError(f"images of {size} px do not fit the grids of all these models; try another --image_size")
    mine, found = np.arange(len(labels))[world.rank::world.size], {condition: defaultdict(list) for condition in CONDITIONS}
    parts = np.array_split(mine, max(1, -(-len(mine) // cfg.encode_batch)))
    bar = tqdm(images(parts), total=len(parts), desc="features", disable=world.rank > 0, leave=False, mininterval=0.5)
    for x, rows in zip(bar, parts):
        x = to_float(x.to(world.device))
        for condition, pieces in transformed(x, indices[rows], scales, cfg.seed):
            whole = {}
            for at, part in pieces:
                for key, value in pooled_features(subjects, vfms, part):
                    whole.setdefault(key, value.new_empty(len(x), value.shape[1]))[at] = value
            for key, value in whole.items():
                found[condition][key].append(value)

    def gather(parts):                   # rank r's rows are r, r + size, ...
        value = torch.zeros(len(labels), parts[0].shape[1], device=world.device)
        value[world.rank::world.size] = torch.cat(parts)
        return total(world, value)

    found = {condition: {key: gather(parts) for key, parts in sets.items()} for condition, sets in found.items()}
    labels = torch.as_tensor(labels, device=world.device)
    keys, rows = [key for key in found["clean"] if key[0] != "vfm"], {}
    steps = {network.name: network.step for subject in subjects for network in subject.networks}
    for condition, sets in tqdm(found.items(), desc="CKNNA", disable=world.rank > 0, leave=False):
        targets = {name: neighbours(prepare(sets["vfm", name]), cfg.k) for name in vfms}
        for key in keys:
            own = neighbours(prepare(sets[key]), cfg.k)
            for name, target in targets.items():
                rows.setdefault((key, name), dict(name=key[0], part=key[1], step=steps.get(key[0]), vfm=name))[condition] = agreement(own, target).item()
    probes = {key: linear_probe(found["clean"][key], labels) if labels.max() > 0 else math.nan for key in keys}      # nothing to tell apart
    for (key, _), row in rows.items():
        row.update({"SE-CKNNA": float(np.mean([row[condition] for condition in CONDITIONS])), "probe": probes[key]})
    return list(rows.values()), scales


def report(paths, cfg, world, folder):
    """Measures checkpoints on held-out images; prints the table, writes align.json and align.png into `folder` -> rows."""
    subjects, vfms = load_subjects(paths, world)
    networks = [network for subject in subjects for network in subject.networks]
    for name in filter(None, dict.fromkeys([s.vfm for s in subjects] + [n.vfm for n in networks] + cfg.reference.split(","))):
        if name not in vfms:
            vfms[name] = load_vfm(name, cfg.out).to(world.device)
    if not vfms:
        raise UserError("none of these tokenizers tells of a VFM; give one to compare with: --reference=NAME")
    size = cfg.image_size or subjects[0].tokenizer.resolution
    trained = subjects[0].tokenizer.about.get("config", {}).get("data", cfg.data)
    data = Images(cfg.data, "val", size, cfg.data_dir, cfg.download, cache=cfg.out)
    elsewhere = f"{subjects[0].name} was trained on {trained}; --data={trained} measures there" if trained != cfg.data else ""
    for note in filter(None, (elsewhere, data.note)):
        if world.rank == 0:
            print(f"note: {note}")
    indices = np.linspace(0, len(data) - 1, min(cfg.images, len(data))).astype(int)
    if len(indices) < 4:
        raise UserError(f"{len(indices)} held-out images: CKNNA needs 4 at least")
    read = lambda parts: (x for x, _ in make_loader(data, [indices[rows].tolist() for rows in parts], world, cfg.workers))
    rows, scales = measure(subjects, vfms, size, read, np.asarray(data.labels)[indices], indices, cfg, world)
    if world.rank == 0:
        left_out = [scale for scale in SCALES if scale not in scales]
        listed = lambda values: ", ".join(f"{value:g}" for value in values)
        print(f"{len(indices):,} held-out images of {cfg.data}, {size} px, k = {cfg.k}; equivariance: quarter turns and scales {listed(scales)}"
              + (f" ({listed(left_out)} do not fit the grids of all models)" if left_out else "")
              + ("; blocks of models with a class token are given the VFM's, which flatters them" if any(n.dit.cls_dim for n in networks) else ""))
        columns = *CONDITIONS, "SE-CKNNA", "probe"
        width = max(len(f"{row['name']} {row['part']}") for row in rows) + 2
        print(f"{'':{width}}{'against':16}" + "".join(f"{column:>14}" for column in columns))
        for row in rows:
            print(f"{row['name'] + ' ' + row['part']:{width}}{row['vfm'][-15:]:16}" + "".join(f"{row[column]:14.4f}" for column in columns))
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "align.json", dict(images=len(indices), k=cfg.k, scales=scales, rows=rows))
        chart_alignment(rows, subjects, folder / "align.png")
        print(f"{folder / 'align.json'}, {folder / 'align.png'}")
    return rows


# -----------------------------------------------------------------------------
# Charts

COLOURS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"]      # Tableau's ten


def ticks(low, high, most=6):
    """Round numbers, at steps of 1, 2 or 5 times a power of ten, that cover [low, high]."""
    raw = max(high - low, 1e-9) / most
    step = next(m * 10 ** math.floor(math.log10(raw)) for m in (1, 2, 5, 10) if m * 10 ** math.floor(math.log10(raw)) >= raw * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)]


def chart(path, panels, columns=2, width=560, height=380):
    """Line charts as one PNG, with a common legend. panels: dict(title, x, y: what the axes show, series: {name: (xs, ys, spreads or None)}); a series has
    the same colour in all panels; spreads are drawn as bars. Drawn at twice the size, which antialiases the lines."""
    z, font = 2, ImageFont.load_default(26)
    names = list(dict.fromkeys(name for panel in panels for name in panel["series"]))
    entry = 40 * z + max(font.getlength(name) for name in names)
    columns = min(columns, len(panels))
    across = max(1, int((columns * width * z - 60 * z) // entry))
    rows, legend = -(-len(panels) // columns), 24 + 22 * -(-len(names) // across)
    canvas = Image.new("RGB", (columns * width * z, (rows * height + legend) * z), "white")
    draw = ImageDraw.Draw(canvas)
    for p, panel in enumerate(panels):
        x0, y0 = (p % columns * width + 66) * z, (p // columns * height + 36) * z
        x1, y1 = x0 + (width - 90) * z, y0 + (height - 92) * z
        points = [(x, y + sign * s) for xs, ys, spread in panel["series"].values() for x, y, s in zip(xs, ys, spread or [0] * len(ys)) for sign in (-1, 1)]
        xt, yt = (ticks(min(values), max(values)) for values in zip(*points))
        at = lambda x, y: (x0 + (x - xt[0]) / (xt[-1] - xt[0] or 1) * (x1 - x0), y1 - (y - yt[0]) / (yt[-1] - yt[0] or 1) * (y1 - y0))
        for t in yt:
            draw.line([at(xt[0], t), at(xt[-1], t)], "#dddddd", z)
            draw.text((x0 - 6 * z, at(xt[0], t)[1]), f"{t:.6g}", "black", font, "rm")
        for t in xt:
            draw.line([at(t, yt[0]), (at(t, yt[0])[0], y1 + 5 * z)], "black", z)
            draw.text((at(t, yt[0])[0], y1 + 8 * z), f"{t:.6g}", "black", font, "mt")
        draw.line([(x0, y0), (x0, y1), (x1, y1)], "black", z)
        draw.text(((x0 + x1) / 2, y0 - 12 * z), panel["title"], "black", font, "mb")
        draw.text(((x0 + x1) / 2, y1 + 28 * z), panel["x"], "black", font, "mt")
        draw.text((x0 - 50 * z, y0 - 12 * z), panel["y"], "black", font, "lb")
        for name, (xs, ys, spread) in panel["series"].items():
            colour, line = COLOURS[names.index(name) % len(COLOURS)], [at(x, y) for x, y in zip(xs, ys)]
            draw.line(line, colour, 2 * z, "curve")
            for i, (x, y) in enumerate(line):
                draw.ellipse([x - 3 * z, y - 3 * z, x + 3 * z, y + 3 * z], colour)
                if spread:
                    draw.line([at(xs[i], ys[i] - spread[i]), at(xs[i], ys[i] + spread[i])], colour, z)
    for i, name in enumerate(names):
        x, y = 30 * z + i % across * entry, (rows * height + 12 + 22 * (i // across)) * z
        draw.line([x, y, x + 24 * z, y], COLOURS[i % len(COLOURS)], 3 * z)
        draw.text((x + 30 * z, y), name, "black", font, "lm")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(path).with_suffix(".tmp")
    canvas.resize((canvas.width // z, canvas.height // z), Image.LANCZOS).save(temporary, "PNG")
    os.replace(temporary, path)


def chart_alignment(rows, subjects, path):
    """SE-CKNNA over blocks (0: the latents), one line a model and VFM; with several steps of one run, its mean over blocks over training, too."""
    value = {(row["name"], row["part"], row["vfm"]): row["SE-CKNNA"] for row in rows}
    blocks, training = {}, defaultdict(list)
    for subject in subjects:
        for vfm in dict.fromkeys(row["vfm"] for row in rows):
            first = value[subject.name, "latents", vfm]
            for network in subject.networks:
                ys = [value[network.name, f"block {i}", vfm] for i in range(1, len(network.dit.blocks) + 1)]
                blocks[f"{network.name}, {vfm}"] = list(range(len(ys) + 1)), [first, *ys], None
                training[f"on {subject.name}, {vfm}"].append((network.step, float(np.mean(ys))))
            if not subject.networks:
                blocks[f"{subject.name}, {vfm}"] = [0], [first], None
    panels = [dict(title="over the blocks of the diffusion model", x="block (0: the latents)", y="SE-CKNNA", series=blocks)]
    training = {name: (*zip(*sorted(points)), None) for name, points in training.items() if len({step for step, _ in points}) > 1}
    if training:
        panels.append(dict(title="over its training, mean of the blocks", x="step", y="SE-CKNNA", series=training))
    chart(path, panels)


# -----------------------------------------------------------------------------
# Joint training

class JointTrainer(Trainer):
    """A tokenizer's Trainer in whose step the diffusion model learns from the same latents, and the alignment loss (REPA's) reaches `side`.

    One forward pass of the DiT on the latents, behind a leaf, serves both: its weights get the gradients of the velocity losses and, where the
    diffusion side is aligned, of the alignment loss; the leaf gets those of the alignment loss alone, by a second walk back through the
    blocks before the projection (activations' gradients only), and they are handed on to the encoder with the other losses of the latents.
    So the velocity loss never reaches the tokenizer, which it would teach latents that are easy to denoise because they say
    little (REPA-E, section 3). Latents are normalised by the batch's own statistics, as BatchNorm does, with gradients through them, so that
    growing or shrinking them gains nothing; the running statistics are what sampling needs.
    """

    def __init__(self, cfg, tokenizer, world, vfm, joint, dit_cfg, dit, ema, optimizer, statistics, align_vfm):
        super().__init__(cfg, tokenizer, world, vfm, length_scale=0.0)           # schedules in images have all run out
        self.joint, self.dit_cfg, self.dit, self.dit_ema, self.dit_optimizer, self.normalise = joint, dit_cfg, dit, ema, optimizer, statistics
        self.align_vfm = align_vfm
        self.heads = list(dit.projectors.parameters())
        self.body = [p for name, p in dit.named_parameters() if not name.startswith("projectors.")]

    def batches(self, loader):
        """One step's micro-batches for `Trainer.step`; `latent_losses`, which sees neither labels nor whole images, finds them here."""
        for _ in range(self.cfg.accumulate):
            self.images, labels = next(loader)
            self.labels = labels.to(self.world.device, non_blocking=True)
            yield self.images

    def latent_losses(self, images, z, mean, logvar, features):
        values, fixed, vf = super().latent_losses(images, z, mean, logvar, features)
        side, dit, cfg = self.joint.side, self.dit, self.dit_cfg
        whole = z.shape[-1] == dit.input_size
        if not whole:                    # shrunk by the equivariance regularisation: the DiT, whose latents have one size, learns from the whole images
            images = to_float(self.images.to(self.world.device, non_blocking=True))
            with torch.no_grad(), self.world.autocast():
                mean, logvar = self.tokenizer.encode(images)
            z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        leaf = z.detach().requires_grad_(whole and side in ("tokenizer", "both"))
        tokens = None
        if self.align_vfm is not None:
            with torch.no_grad(), self.world.autocast():
                tokens = vfm_tokens(self.align_vfm, images, dit.input_size // dit.patch_size)
        latents = self.normalise(leaf)
        y = torch.where(torch.rand(len(z), device=z.device) < cfg.class_dropout, dit.num_classes, self.labels)
        cls_noise = torch.randn_like(tokens[:, 0]) if dit.cls_dim else None
        with self.world.autocast():
            losses = flow_losses(dit, latents, y, diffusion.draw_times(len(z), 0, cfg, z.device), torch.randn_like(z), tokens, cls_noise)
        losses = {name: value.mean() for name, value in losses.items()}
        flow = losses["velocity"] + cfg.cosine_weight * losses["cosine"] + (cfg.cls_weight * losses["cls"] if "cls" in losses else 0)
        share, repa = 1 / self.cfg.accumulate, losses.get("repa")
        # `inputs` keeps each loss to its own; the projection, which belongs to the loss, learns whichever side is aligned
        aligned = side in ("diffusion", "both")
        if repa is not None and not aligned:
            torch.autograd.backward(share * cfg.repa_weight * repa, inputs=self.heads, retain_graph=True)
        everything, inputs = (flow + cfg.repa_weight * repa, self.body + self.heads) if aligned else (flow, self.body)
        torch.autograd.backward(share * everything, inputs=inputs, retain_graph=leaf.requires_grad)
        if leaf.requires_grad:
            scale = images[0].numel() if self.stage.summed else 1                # LDM's other losses are sums over pixels
            grad, = torch.autograd.grad(self.joint.tokenizer_weight * scale * repa, leaf)
            fixed = fixed + (z * grad).sum()                                     # whose gradient that is
        return {**values, **losses}, fixed, vf

    def joint_step(self, loader, step, images_seen):
        """One step of the tokenizer, its discriminators, and the diffusion model -> losses of the last micro-batch."""
        losses = self.step(self.batches(loader), step, images_seen)
        cfg, parameters = self.dit_cfg, self.body + self.heads
        average_gradients(parameters, self.world)
        for statistic in (self.normalise.running_mean, self.normalise.running_var):
            self.world.mean(statistic)
        self.dit_optimizer.param_groups[0]["lr"] = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup))
        losses["dit_grad_norm"] = nn.utils.clip_grad_norm_(parameters, cfg.clip)
        self.dit_optimizer.step()
        self.dit_optimizer.zero_grad(set_to_none=True)
        update_ema(self.dit_ema, self.dit, cfg.ema)
        return losses


def finish_pair(folder):
    """Both files of a pair are written under other names, then renamed; this completes, or drops, what a kill left of that."""
    ready = (folder / "diffusion.next.pt").exists()                              # written last: then the tokenizer's is whole, too
    for name in ("tokenizer", "diffusion"):
        path = folder / f"{name}.next.pt"
        if path.exists():
            os.replace(path, folder / f"{name}.pt") if ready else path.unlink()


def train(cfg, paths, world):
    """Joint training from a diffusion checkpoint and its tokenizer, or on from where it was -> the paths of the pair before and after."""
    if cfg.side not in SIDES:
        raise UserError(f"--side={cfg.side}: there are {', '.join(SIDES)}")
    begin = [(path, entries) for path in paths if (entries := load_weights(path)).get("kind") == "diffusion"]
    if len(begin) != 1:
        raise UserError(f"joint training takes one diffusion checkpoint of diffusion.py's (it names its tokenizer), not {len(begin)}")
    (path, dit_entries), folder = begin[0], Path(cfg.out) / f"joint-{cfg.side}"
    if world.rank == 0:
        finish_pair(folder)
    world.barrier()
    settings = dict({key: getattr(cfg, key) for key in ("seed", "batch_size", "tokenizer_weight", "momentum")}, start=path, start_step=dit_entries["step"])
    after = str(folder / "diffusion.pt")
    if resumed := os.path.exists(after):
        dit_entries = load_checkpoint(after, "diffusion")
    entries = load_checkpoint(folder / "tokenizer.pt" if resumed else tokenizer_beside(path, dit_entries), "tokenizer")
    if resumed and (dit_entries.get("settings") != settings or entries.get("pair") != dit_entries["pair"]):
        raise UserError(f"{folder} holds another run's checkpoints ({dit_entries.get('settings')}): give another --out, or remove it")
    start = dit_entries["step"] if resumed else 0
    images = entries["images"] - start * cfg.batch_size                          # that the tokenizer had seen before

    # the tokenizer, with its averaged weights: the diffusion model knows no other latents
    ours = {key: getattr(cfg, key) for key in ("out", "seed", "batch_size", "accumulate", "compile")}
    tok_cfg = dataclasses.replace(tokenizer.Config(**entries["config"]), **ours)
    number, stage = [(i, stage) for i, stage in enumerate(STAGES[tok_cfg.method], 1) if "adapter" in stage.trains][-1]
    seed_step(cfg.seed, -1)
    net, vfm = build_tokenizer(tok_cfg)
    net.load_state_dict(entries["model"] if resumed else {**entries["model"], **entries["ema"]})
    net = net.to(world.device, memory_format=world.layout)

    # the diffusion model, with a projection if it has none; both begin with new optimizers
    dit_cfg, arch = diffusion.Config(**dit_entries["config"]), dit_entries["arch"]
    dit_cfg = dataclasses.replace(dit_cfg, seed=cfg.seed, compile=0, fsdp=False, align="repa" if dit_cfg.align == "none" and cfg.side != "none" else dit_cfg.align,
                                  encoder_depth=min(dit_cfg.encoder_depth, arch["depth"]))
    align_vfm = load_vfm(dit_cfg.align_vfm, cfg.out).to(world.device) if dit_cfg.align != "none" else None
    if align_vfm is not None and not arch["z_dim"]:
        arch = dict(arch, z_dim=align_vfm.embed_dim, projector_dim=dit_cfg.projector_dim, encoder_depth=dit_cfg.encoder_depth)
    dit, _, ema, optimizer = build(dit_cfg, dataclasses.replace(world, size=1), arch, dit_entries if resumed else None)
    statistics = nn.BatchNorm2d(net.z_dim, momentum=cfg.momentum, affine=False).to(world.device)
    if resumed:
        statistics.load_state_dict(dit_entries["statistics"])
    else:
        dit.load_state_dict(dit_entries["model"], strict=False)                  # all but a new projection
        ema.load_state_dict(dict(dit.state_dict(), **dit_entries["ema"]))
        statistics.running_mean.copy_(dit_entries["latent_mean"])
        statistics.running_var.copy_(dit_entries["latent_std"].square())
    if cfg.compile:                      # a block each: the blocks before the projection are walked back twice
        for block in dit.blocks:
            block.compile(fullgraph=True, dynamic=False)

    trainer = JointTrainer(tok_cfg, net, world, vfm.to(world.device) if vfm else None, cfg, dit_cfg, dit, ema, optimizer, statistics, align_vfm)
    seed_step(cfg.seed, -2)
    trainer.start_stage(stage)
    if trainer.gan and entries["gan"]:
        trainer.gan.load_state_dict(entries["gan"], strict=False)                # another stage may have had more discriminators
    if resumed:
        load_moments(trainer.optimizer, entries["optimizer"])
        if trainer.gan:
            load_moments(trainer.gan_optimizer, entries["gan_optimizer"])
        if trainer.anchor:
            trainer.anchor.load_state_dict(entries["anchor"])
    # the decoder's weights are averaged, the encoder's are not: the diffusion model learns the latents of this very encoder
    decoder = {name: p.detach().clone() for name, p in net.named_parameters() if name.startswith("decoder.")}
    if resumed:
        decoder = {name: value.to(world.device) for name, value in entries["ema"].items()}

    size = tok_cfg.image_size
    data = Images(cfg.data, "train", size, cfg.data_dir, cfg.download, tok_cfg.crop, tok_cfg.flip, cfg.out)
    if list(data.classes) != list(dit_entries["classes"]):
        raise UserError(f"--data={cfg.data} has other classes ({len(data.classes)}) than the diffusion model was trained for ({len(dit_entries['classes'])})")

    def save(step):
        with use_weights(net, decoder):  # what load_tokenizer will give
            pair = fingerprint(net)
        state = full_state(dit, ema, optimizer)
        if world.rank == 0:
            both = dict(classes=list(data.classes), step=step, pair=pair)
            save_checkpoint(folder / "tokenizer.next.pt", kind="tokenizer", config=dataclasses.asdict(tok_cfg), arch=net.arch, model=net.state_dict(), ema=decoder,
                            optimizer=trainer.optimizer.state_dict(), gan=trainer.gan and trainer.gan.state_dict(), anchor=trainer.anchor and trainer.anchor.state_dict(),
                            gan_optimizer=trainer.gan and trainer.gan_optimizer.state_dict(), stage=number, images=images + step * cfg.batch_size, **both)
            save_checkpoint(folder / "diffusion.next.pt", kind="diffusion", config=dataclasses.asdict(dit_cfg), arch=arch, **state, statistics=statistics.state_dict(),
                            latent_mean=statistics.running_mean.cpu(), latent_std=(statistics.running_var + statistics.eps).sqrt().cpu(), latents=pair, settings=settings,
                            tokenizer=str(folder / "tokenizer.pt"), image_size=size, images=step * cfg.batch_size, **both)
            finish_pair(folder)
        world.barrier()

    if world.rank == 0 and start < cfg.steps:
        print(f"{tok_cfg.method} (losses of '{stage.name}', trains {stage.trains}) and its diffusion model, {cfg.steps:,} steps of {cfg.batch_size}; "
              f"{dit_cfg.align} against {dit_cfg.align_vfm} reaches: {cfg.side}" + (f"; going on from step {start:,}" if start else ""), flush=True)
    sampler = StepSampler(len(data), cfg.batch_size, cfg.seed, start, cfg.steps, world, cfg.accumulate)
    loader, log = iter(make_loader(data, sampler, world, cfg.workers)), Log(folder, "align", world, cfg.steps, start)
    for step in range(start, cfg.steps):
        seed_step(cfg.seed, step, world.rank)
        losses = trainer.joint_step(loader, step, step * cfg.batch_size)
        average_weights(decoder, net, images + (step + 1) * cfg.batch_size, cfg.batch_size, tok_cfg.ema_kimg)
        log.bar.update()
        saving = (step + 1) % cfg.save_interval == 0 or step + 1 == cfg.steps
        if (step + 1) % cfg.log_interval == 0 or saving:
            losses = {name: world.mean(value.to(world.device)) for name, value in losses.items()}
            log.write(step + 1, (step + 1) * cfg.batch_size, **losses)
            if not all(math.isfinite(losses[key]) for key in ("velocity", "grad_norm", "dit_grad_norm")):
                raise UserError(f"the losses or gradients are not finite at step {step + 1}: {float(losses['velocity']):g} of velocity; the checkpoints in {folder} are as they were")
        if saving:
            save(step + 1)
    log.bar.close()
    return [path, after]


# -----------------------------------------------------------------------------
# The study: which tokenizers diffuse well, at equal budgets?

# Decoder, images, batches, optimizer and learning rate (one at which all learn) are the same, and no reconstruction loss looks at a VFM; what differs
# is the encoder and the recipe's stages and losses. The blind methods' VFM has never been told an image's class, on which the diffusion models are
# conditioned and judged.
METHODS = {"vae": dict(method="vae"), "vae-8": dict(method="vae", z_dim=8)}
for method in "vavae", "vfmvae", "aligntok":
    METHODS[method], METHODS[f"{method}-blind"] = dict(method=method), dict(method=method, vfm="toy-blind")
QUALITIES = "SE-CKNNA", "CKNNA", "SE-CKNNA to toy", "SE-CKNNA to toy-blind", "probe", "PSNR", "rFD", "rAccuracy"     # of a tokenizer alone
OUTCOMES = "gFD", "gFD to reconstructions", "accuracy", "accuracy / rAccuracy"


class Study:
    """What all runs share, on the device: images, labels, VFMs, their tokens of the images, the judge (the toy's classifier)."""

    def __init__(self, cfg, world, row):
        self.cfg, self.world, self.row = cfg, world, row         # row: of the terminal, for this process's bar
        self.vfms = {name: load_vfm(name, cfg.out).to(world.device) for name in ("toy", "toy-blind")}
        self.judge = load_features("toy", cfg.out, world.device)
        sets = [Shapes("train", cache=cfg.out), Shapes("val", cache=cfg.out)]
        self.indices = [np.arange(min(n, len(data))) for n, data in zip((cfg.study_images, cfg.study_samples), sets)]
        self.train, self.val = (torch.from_numpy(data.images[i]).to(world.device) for data, i in zip(sets, self.indices))
        self.labels, self.val_labels = (torch.from_numpy(data.targets()[i]).to(world.device) for data, i in zip(sets, self.indices))
        self.tokens = {}
        self.real, predicted = self.look(self.val)
        self.real_accuracy = (predicted == self.val_labels).double().mean().item()
        self.networks = fingerprint(*self.vfms.values(), self.judge)             # runs that learnt from others do not go into one table

    @torch.no_grad()
    @full_float32()
    def look(self, images):
        """uint8 images -> (mean, covariance) of the judge's features, predicted classes [n]."""
        features, _, logits = map(list, zip(*(self.judge(part) for part in images.split(500))))
        features = torch.cat(features).double().cpu().numpy()
        return (features.mean(0), np.cov(features.T)), torch.cat(logits).argmax(1)

    def order(self, batch, seed, first, last, title):
        """Yields the indices of each batch, uploaded at once, [batch]; a progress bar shows how far they are."""
        parts = [batch_indices(len(self.train), batch, seed, step)[0] for step in range(first, last)]
        indices = torch.from_numpy(np.array(parts, np.int64).reshape(-1, batch)).to(self.world.device)
        return tqdm(indices, desc=title, position=self.row, leave=False, mininterval=1)

    @torch.no_grad()
    def vfm_tokens(self, name, grid, part=500):
        if name not in self.tokens:
            self.tokens[name] = torch.cat([vfm_tokens(self.vfms[name], to_float(images), grid).half() for images in self.train.split(part)])
        return self.tokens[name]

    def tokenizer(self, method, seed):
        """Trains one -> Tokenizer with averaged weights, its Config. `tokenizer.train` without its files, and with its data on the device."""
        cfg, world = self.cfg, self.world
        tok_cfg = tokenizer.Config(**METHODS[method], seed=seed, kimg=cfg.study_kimg, decoder="vfmvae", lr_scale=6.0, ldm_lr=1.0, lpips_scale=0.0,
                                   vf_scale=1.0, out=cfg.out, compile=False)
        seed_step(seed, -1)
        net, vfm = build_tokenizer(tok_cfg)
        plan, scale = stage_plan(tok_cfg)
        trainer = Trainer(tok_cfg, net.to(world.device).eval(), world, vfm.to(world.device) if vfm else None, scale)
        ema = {name: p.detach().clone() for name, p in net.named_parameters()}
        for number, stage, first, last in plan:
            seed_step(seed, -1 - number)
            # VFM-VAE's first VF weight of 5 holds the toy's reconstructions at 15 dB
            trainer.start_stage(dataclasses.replace(stage, betas=(0.9, 0.99), vf=min(stage.vf, 1.0)))
            trainer.adopt(ema)
            first, last = first // tok_cfg.batch_size, last // tok_cfg.batch_size
            for step, index in enumerate(self.order(tok_cfg.batch_size, seed, first, last, f"{method}, seed {seed}: {stage.name}"), first):
                seed_step(seed, step)
                images = self.train[index]
                mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
                trainer.set_lr(step * tok_cfg.batch_size / plan[-1][3])
                trainer.step([torch.where(mirrored, images.flip(-1), images)], step, step * tok_cfg.batch_size)
                average_weights(ema, net, (step + 1) * tok_cfg.batch_size, tok_cfg.batch_size, tok_cfg.ema_kimg)
        net.load_state_dict(ema, strict=False)
        return net.requires_grad_(False).eval(), tok_cfg

    def diffusion(self, net, latents, mean, std, align, align_vfm, seed, reconstructed):
        """Trains one diffusion model on `latents` (normalised) -> (DiT, [what each point gives])."""
        cfg, world, n = self.cfg, self.world, len(self.val)
        dit_cfg = diffusion.Config(seed=seed, steps=cfg.study_steps, compile=0, align=align, align_vfm=align_vfm, ema=0.99)     # the first point comes early
        vfm = self.vfms[align_vfm] if align != "none" else None
        arch = model_arch(dit_cfg, net.z_dim, latents.shape[-1], len(Shapes.classes), vfm.embed_dim if vfm else 0)
        dit, parallel, ema, optimizer = build(dit_cfg, world, arch)
        tokens = self.vfm_tokens(align_vfm, latents.shape[-1]) if vfm else None
        noise = torch.randn(n, *latents.shape[1:], generator=torch.Generator().manual_seed(seed)).to(world.device)
        cls_noise = torch.randn(n, dit.cls_dim, generator=torch.Generator().manual_seed(seed)).to(world.device) if dit.cls_dim else None
        y, points = torch.arange(n, device=world.device) % len(Shapes.classes), []
        for step, index in enumerate(self.order(dit_cfg.batch_size, seed, 0, cfg.study_steps, f"  its diffusion model, alignment {align}"), 1):
            batch = dict(latents=latents[index], labels=self.labels[index], tokens=tokens[index].float() if vfm else None)
            train_step(dit, parallel, ema, optimizer, [batch], dit_cfg, world, step - 1)
            if step in cfg.study_points:
                with torch.no_grad(), world.autocast():
                    samples = [ode(ema, noise[rows], y[rows], cfg.study_sampling, cfg.study_guidance, cls_noise=None if cls_noise is None else cls_noise[rows])
                               for rows in torch.arange(n, device=world.device).split(500)]
                    images = torch.cat([to_uint8(net.decode(z * std + mean)) for z in samples])
                features, predicted = self.look(images)
                points.append({"step": step, "gFD": frechet_distance(*features, *self.real), "gFD to reconstructions": frechet_distance(*features, *reconstructed),
                               "accuracy": (predicted == y).double().mean().item()})
        return ema, points

    def run(self, method, seed):
        """One tokenizer, measured, and a diffusion model on it for each kind of alignment -> what result.json holds."""
        cfg, started = self.cfg, time.time()
        net, tok_cfg = self.tokenizer(method, seed)
        with torch.no_grad():
            latents, held_out = (torch.cat([net.encode(to_float(part))[0] for part in images.split(500)]) for images in (self.train, self.val))
            with self.world.autocast():
                decoded = torch.cat([to_uint8(net.decode(z)) for z in held_out.split(500)])
        reconstructed, recognised = self.look(decoded)
        mean, std = latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True)
        latents = (latents - mean) / std
        subject, points = Subject(method, net, tok_cfg.vfm), {}
        for align in cfg.study_align.split(","):
            dit, points[align] = self.diffusion(net, latents, mean, std, align, tok_cfg.vfm, seed, reconstructed)
            subject.networks.append(Network(align, dit, mean.flatten(), std.flatten(), cfg.study_steps, tok_cfg.vfm))
        read = lambda parts: (self.val[torch.as_tensor(rows, device=self.val.device)] for rows in parts)
        rows, scales = measure([subject], self.vfms, self.val.shape[-1], read, self.val_labels, self.indices[1], cfg, self.world)
        own, toy, blind = (next(row for row in rows if row["part"] == "latents" and row["vfm"] == name) for name in (tok_cfg.vfm, "toy", "toy-blind"))
        return {"method": method, "seed": seed, "settings": settings_of(cfg), "networks": self.networks, "seconds": time.time() - started, "judge": self.real_accuracy,
                "PSNR": psnr(to_float(self.val), to_float(decoded)).mean().item(), "rFD": frechet_distance(*reconstructed, *self.real),
                "rAccuracy": (recognised == self.val_labels).double().mean().item(), "CKNNA": own["clean"], "SE-CKNNA": own["SE-CKNNA"],
                "SE-CKNNA to toy": toy["SE-CKNNA"], "SE-CKNNA to toy-blind": blind["SE-CKNNA"],
                "probe": own["probe"], "points": points, "alignment": rows, "scales": scales}


def settings_of(cfg):
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(cfg).items()
            if key.startswith("study_") and key not in ("study_methods", "study_seeds") or key in ("seed", "k")}


def study_report(cfg, folder, wanted):
    """table.md, results.json and study.png of the runs that are finished -> the table's text."""
    results = [json.loads(path.read_text()) for path in wanted if path.exists()]
    for r in results:
        for point in itertools.chain(*r["points"].values()):
            point["accuracy / rAccuracy"] = point["accuracy"] / max(r["rAccuracy"], 1e-6)
    methods, aligns = list(dict.fromkeys(r["method"] for r in results)), cfg.study_align.split(",")
    of = lambda method: [r for r in results if r["method"] == method]
    line = lambda *cells: "| " + " | ".join(cells) + " |"
    head = lambda *cells: ["", line(*cells), "|" + "---|" * len(cells)]
    spread = lambda values, digits: f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")
    points = range(len(cfg.study_points))
    lines = [f"{len(results)} of {len(wanted)} runs; mean ± standard deviation over seeds. Each tokenizer: {cfg.study_kimg:g} thousand images, VFM-VAE's decoder for "
             f"all, latents 4 x 4 x 32 (vae-8: x 8); each diffusion model: {cfg.study_steps:,} steps of 64, {cfg.study_samples:,} samples of {cfg.study_sampling} Euler times, "
             f"guidance {cfg.study_guidance:g}. FD: the Frechet distance of the toy classifier's features; gFD against real held-out images (rFD: against the very "
             "images that were reconstructed), in brackets against the tokenizer's own reconstructions. Accuracy: the share of samples that the classifier "
             f"recognises as the class asked for (of real images {np.mean([r['judge'] for r in results]):.1%}; of reconstructions: rAccuracy, the most that "
             "samples can be expected to reach). CKNNA is against the tokenizer's own VFM (vae: toy), which is also the one that diffusion models are aligned to; "
             "blind: one that was never told the class. The VFMs and the classifier are trained once: the spread leaves them out. The learning rate falls over the "
             "second half of diffusion training."]
    lines += head("tokenizer", *QUALITIES)
    lines += [line(method, *(spread([r[key] for r in of(method)], 2 if key in ("PSNR", "rFD") else 3) for key in QUALITIES)) for method in methods]
    lines += head("tokenizer", "alignment", *(f"{outcome} at {step:,}" for outcome in ("gFD", "accuracy") for step in cfg.study_points))
    for method in methods:
        for align in aligns:
            at = lambda i, key, digits: spread([r["points"][align][i][key] for r in of(method)], digits)
            distances = (f"{at(i, 'gFD', 1)} ({at(i, 'gFD to reconstructions', 1)})" for i in points)
            lines.append(line(method, align, *distances, *(at(i, "accuracy", 3) for i in points)))
        for align in aligns[1:]:         # paired: a seed's diffusion models share latents, order and noise
            gain = lambda i, key, digits: spread([r["points"][align][i][key] - r["points"][aligns[0]][i][key] for r in of(method)], digits)
            lines.append(line(method, f"{align} - {aligns[0]}", *(gain(i, "gFD", 1) for i in points), *(gain(i, "accuracy", 3) for i in points)))
    rho = {}
    if len(results) > 2:
        lines += ["", f"Spearman's rank correlation, over the {len(results)} runs and, in brackets, over the means of the {len(methods)} methods (the seeds of one are "
                  "not independent), of what is known before diffusion with what comes of it. Of gFD and rFD less is better: where SE-CKNNA helps, its sign with gFD "
                  "is negative."]
        lines += head("with the final", "alignment", *QUALITIES)
        for outcome in OUTCOMES:
            for align in aligns:
                final = lambda r: r["points"][align][-1][outcome]
                means = lambda value: [np.mean([value(r) for r in of(method)]) for method in methods]
                found = {q: [float(spearmanr(*pair).statistic) for pair in (([r[q] for r in results], list(map(final, results))), (means(lambda r: r[q]), means(final)))]
                         for q in QUALITIES}
                rho.setdefault(align, {})[outcome] = found
                lines.append(line(outcome, align, *(f"{runs:+.2f} ({averages:+.2f})" for runs, averages in found.values())))
    text = "\n".join(lines) + "\n"
    write_text(folder / "table.md", text)
    write_json(folder / "results.json", dict(runs=results, spearman=rho))
    panels = []
    for outcome in OUTCOMES[:3]:
        for align in aligns:
            curves = {method: np.array([[p[outcome] for p in r["points"][align]] for r in of(method)]) for method in methods}
            series = {method: (cfg.study_points, c.mean(0).tolist(), c.std(0, ddof=1).tolist() if len(c) > 1 else None) for method, c in curves.items()}
            panels.append(dict(title=f"{outcome}, diffusion model's alignment: {align}", x="diffusion steps", y="", series=series))
    chart(folder / "study.png", panels, columns=len(aligns))
    return text


def study(cfg):
    """All runs of the study that OUT/study lacks, every size-th of them for this process of torchrun's, each by itself; then the report."""
    # processes share files only: none joins a group, and there may be more of them than GPUs
    rank, size, local = int(os.environ.pop("RANK", 0)), int(os.environ.pop("WORLD_SIZE", 1)), int(os.environ.pop("LOCAL_RANK", 0))
    os.environ["LOCAL_RANK"] = str(local % max(1, torch.cuda.device_count()))
    world, folder = init_world(), Path(cfg.out) / "study"
    methods, aligns = cfg.study_methods.split(","), cfg.study_align.split(",")
    if unknown := [f"--study_methods={m}" for m in methods if m not in METHODS] + [f"--study_align={a}" for a in aligns if a not in ("none", "repa", "reg")]:
        raise UserError(f"{unknown[0]}: there are {', '.join(METHODS)}; none, repa, reg")
    if not cfg.study_points or sorted(set(cfg.study_points)) != [*cfg.study_points] or not 1 <= cfg.study_points[0] <= cfg.study_points[-1] <= cfg.study_steps:
        raise UserError("--study_points must rise from 1 at least to --study_steps at most")
    if cfg.study_samples < 4 or cfg.study_seeds < 1 or cfg.study_sampling < 2 or cfg.study_kimg <= 0:
        raise UserError("the study takes --study_samples of 4 at least, --study_seeds of 1, --study_sampling of 2, --study_kimg above 0")
    runs = [(method, cfg.seed + k) for k in range(cfg.study_seeds) for method in methods]
    paths = {run: folder / f"{run[0]}-{run[1]}" / "result.json" for run in runs}
    for path in paths.values():
        if path.exists() and json.loads(path.read_text())["settings"] != settings_of(cfg):
            raise UserError(f"{path} is of a study with other settings: give another --out, or remove {folder}")
    shared = [Path(cfg.out) / name for name in ("vfm-toy.pt", "vfm-toy-blind.pt", "classifier.pt")]
    if not all(path.exists() for path in paths.values()):
        while rank and not all(path.exists() for path in shared):                # made by the first process, once
            time.sleep(1)
        common = Study(cfg, world, rank)
        for path in paths.values():
            if path.exists() and json.loads(path.read_text()).get("networks") != common.networks:
                raise UserError(f"{path} was made with other VFMs or another classifier than lie in {cfg.out}: give another --out, or remove {folder}")
    for run in runs[rank::size]:
        if not paths[run].exists():
            result = common.run(*run)
            paths[run].parent.mkdir(parents=True, exist_ok=True)
            write_json(paths[run], result)
            final = ", ".join(f"{align}: gFD {p[-1]['gFD']:.1f}, accuracy {p[-1]['accuracy']:.3f}" for align, p in result["points"].items())
            print(f"{run[0]}, seed {run[1]}: PSNR {result['PSNR']:.2f}, SE-CKNNA {result['SE-CKNNA']:.3f}; {final}; {result['seconds']:.0f} s", flush=True)
            if rank == 0:
                study_report(cfg, folder, paths.values())
    if rank == 0:
        done = 0
        while (now := sum(path.exists() for path in paths.values())) < len(paths):              # the others' runs; torchrun ends this one if one of them fails
            if now != done:
                study_report(cfg, folder, paths.values())
            done = now
            time.sleep(1)
        print(study_report(cfg, folder, paths.values()) + f"{folder / 'table.md'}, {folder / 'results.json'}, {folder / 'study.png'}")


# -----------------------------------------------------------------------------

def split_paths(argv):
    """A command line -> (flags, checkpoints): what follows a --key without = is its value, what else stands alone is a path."""
    flags, paths, items = [], [], iter(argv)
    for item in items:
        if item.startswith("-"):
            flags += [item] if "=" in item or item in ("-h", "--help") else [item, *itertools.islice(items, 1)]
        else:
            paths.append(item)
    return flags, paths


def run():
    flags, paths = split_paths(sys.argv[1:])
    cfg = parse_config(Config, PRESETS, flags)
    if cfg.study:
        return study(cfg)
    world, out = init_world(), Path(cfg.out)
    if not paths:
        paths = [str(out / "tokenizer.pt")] + [str(out / "diffusion.pt")] * (out / "diffusion.pt").exists()
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"no checkpoint {path}; run tokenizer.py first, then diffusion.py, or name checkpoints")
    if cfg.steps:
        pair = train(cfg, paths, world)
        report(pair, cfg, world, out / f"joint-{cfg.side}")
    else:
        report(paths, cfg, world, out)


if __name__ == "__main__":
    main(run)
