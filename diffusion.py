"""
The diffusion transformer, its training by flow matching on cached latents, and the latent cache.

    python diffusion.py                                     # toy: latents of out/tokenizer.pt, then the model, minutes on a laptop
    python diffusion.py --align=reg --arch=sit              # with REG's class token and REPA, the diffusion side of VFM-VAE's dual alignment
    python diffusion.py --preset=imagenet                   # LightningDiT-XL/1, 80 epochs; --preset=reg: SiT-XL/1 with REG
    torchrun --nproc_per_node=8 diffusion.py                # the same on eight GPUs; --fsdp=1 shards what does not fit on one
    python diffusion.py --bench=1 --model=XL --batch_size=256       # step time, images a second, MFU, memory on random latents

LightningDiT is arXiv 2501.01423, SiT 2401.08740, REPA 2410.06940, REG 2507.01467, DiT 2212.09748.
"""
import copy
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import time
import warnings
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tokenizer import (PEAK_FLOPS, Images, Log, StepSampler, UserError, init_world, load_checkpoint, load_state, load_tokenizer, load_vfm, load_weights, main,
                       make_loader, parse_config, save_checkpoint, save_grid, seed_step, to_float, update_ema)


@dataclass
class Config:
    preset: str = "toy"               # toy, imagenet, reg
    out: str = "out"                  # folder for everything written; holds tokenizer.pt unless --tokenizer says otherwise
    fresh: bool = False               # start over instead of going on from OUT/diffusion.pt
    seed: int = 0                     # of weights, data order, times, noises
    # data and its latents
    tokenizer: str = ""               # checkpoint, ours or official [OUT/tokenizer.pt]
    data: str = "shapes"              # shapes, a folder of class folders (or with train/ and val/), or a torchvision data set
    data_dir: str = "data"            # where torchvision's data sets lie
    download: bool = False            # fetch them
    image_size: int = 0               # pixels [what the tokenizer was trained at]
    latents: str = ""                 # folder of the latent cache [OUT/latents]
    cache_dtype: str = "bf16"         # bf16, fp16 or fp32
    cache_features: bool = True       # with --align: cache the VFM's tokens, too, instead of running it at every step
    sample_posterior: bool = False    # cache logvar, too, and train on samples of the posterior instead of its mean
    encode_batch: int = 100           # images (each with its mirror image) encoded at once
    val_images: int = 2_000           # of the val split, for the validation loss
    workers: int = 0                  # data loading processes
    # model
    model: str = "toy"                # toy, B, L, XL, 1.0B, 1.6B
    depth: int = 0                    # blocks [the model's]
    hidden_size: int = 0              # width [the model's]
    num_heads: int = 0                # [the model's]
    patch_size: int = 1               # latent positions to a side of a token
    arch: str = "lightningdit"        # lightningdit (RMSNorm, SwiGLU, rotary) or sit (LayerNorm, GELU)
    qk_norm: bool = False             # normalise queries and keys: for long runs
    # objective
    times: str = "lognormal"          # logit-normal(0, 1), or uniform
    uniform_from: int = 0             # step from which times are uniform (0: never); LightningDiT's 700,000-step run: 600000
    cosine_weight: float = 1.0        # of 1 - cosine(v, target)
    class_dropout: float = 0.1        # share of labels that become the null class, for guidance
    align: str = "none"               # none, repa (project tokens onto the VFM's), reg (and denoise its class token alongside)
    align_vfm: str = "toy"            # that VFM
    encoder_depth: int = 2            # block after which tokens are projected, from 1
    projector_dim: int = 256          # width of the projection's MLP
    repa_weight: float = 0.5          # of the negative cosine similarity
    cls_weight: float = 0.03          # of the class token's velocity error
    # optimisation
    steps: int = 2_000                # of batch_size images
    epochs: float = 0.0               # instead of steps, if not 0
    batch_size: int = 64              # of all processes and accumulation steps together
    accumulate: int = 1               # micro-batches to a step
    lr: float = 1e-3                  # AdamW, betas (0.9, beta2), no weight decay
    warmup: int = 100                 # steps of linear warm-up
    beta2: float = 0.95
    clip: float = 1.0                 # gradient norm
    ema: float = 0.995                # decay a step
    # machine
    compile: int = -1                 # torch.compile: 1, 0, or -1: where there is CUDA
    checkpointing: bool = False       # recompute blocks in the backward pass instead of keeping activations
    fsdp: bool = False                # FSDP2: shard weights, gradients and optimizer over the processes
    bench: int = 0                    # 1: time training steps on random latents, write nothing
    bench_latents: tuple = (32, 16, 16)     # their shape: f16 latents of a 256 px image
    # intervals, in steps
    log_interval: int = 50
    val_interval: int = 500
    sample_interval: int = 500        # a grid of samples, OUT/diffusion-STEP.png (0: none)
    save_interval: int = 500


IMAGENET = dict(data="data/imagenet", model="XL", batch_size=1024, steps=100_000, lr=2e-4, warmup=0, ema=0.9999, workers=8, encode_batch=64,
                val_images=4_096, log_interval=100, val_interval=5_000, sample_interval=5_000, save_interval=5_000)
PRESETS = {"toy": {}, "imagenet": IMAGENET,
           "reg": dict(IMAGENET, arch="sit", qk_norm=True, times="uniform", cosine_weight=0.0, align="reg", align_vfm="dinov2_vitb14", encoder_depth=8,
                       projector_dim=2048, cache_features=False)}     # its tokens of ImageNet and the mirror images are a terabyte

SIZES = {"toy": (4, 128, 4), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "1.0B": (24, 1536, 24), "1.6B": (28, 1792, 28)}     # depth, width, heads

# -----------------------------------------------------------------------------
# The transformer. Parameter names are those of the public LightningDiT and REG checkpoints

class RMSNorm(nn.RMSNorm):
    def forward(self, x):             # in float32, as autocast does for LayerNorm
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def rotate(x, cos, sin):
    """Rotary embedding of x [B, N, heads, d]: neighbouring channels (a, b) turn by the angle of their position; cos, sin [N, 1, d/2]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, norm):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = norm(dim // num_heads), norm(dim // num_heads)

    def forward(self, x, rope):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)                # [B, N, heads, d]
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        x = F.scaled_dot_product_attention(q.to(v.dtype).transpose(1, 2), k.to(v.dtype).transpose(1, 2), v.transpose(1, 2))
        return self.proj(x.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(a) * b)


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp, norm, head_norm):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm(dim), Attention(dim, num_heads, head_norm), norm(dim), mlp()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, rope):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate_a * self.attn(modulate(self.norm1(x), shift_a, scale_a), rope)
        return x + gate_m * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class TimestepEmbedder(nn.Module):
    freqs = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128)       # ADM's sinusoids

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.register_buffer("frequencies", self.freqs.float(), persistent=False)

    def forward(self, t):             # [B], 0 to 1, unscaled
        angles = t.float()[:, None] * self.frequencies
        return self.mlp(torch.cat((angles.cos(), angles.sin()), -1))


class FinalLayer(nn.Module):
    def __init__(self, dim, out, cls_dim, norm):
        super().__init__()
        self.norm_final, self.linear = norm(dim), nn.Linear(dim, out)
        self.linear_cls = nn.Linear(dim, cls_dim) if cls_dim else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        x = modulate(self.norm_final(x), *self.adaLN_modulation(c)[:, None].chunk(2, -1))
        return (self.linear(x[:, 1:]), self.linear_cls(x[:, 0])) if self.linear_cls else (self.linear(x), None)


def position_tables(grid, dim, head_dim):
    """Sin-cos positions [1, N, dim] (half of the channels for the column, then the row; sines, then cosines), and the rotary angles
    [N, 1, head_dim / 2] (first half by row, second by column) of a square grid, row-major."""
    index = torch.arange(grid ** 2, device="cpu").double()[:, None]
    angles = lambda position, k: position / 10_000 ** (torch.arange(k, device="cpu").double() / k)
    sincos = [f(angles(position, dim // 4)) for position in (index % grid, index // grid) for f in (torch.sin, torch.cos)]
    return torch.cat(sincos, -1)[None].float(), torch.cat([angles(index // grid, head_dim // 4), angles(index % grid, head_dim // 4)], -1)[:, None]


class DiT(nn.Module):
    """LightningDiT (`arch="lightningdit"`: RMSNorm, SwiGLU, rotary positions) or SiT (`arch="sit"`: LayerNorm, GELU), with adaLN-zero.

    model(x, t, y) -> v: latents x [B, C, S, S], times t [B] from 0 (noise) to 1 (data), classes y [B] (num_classes: the null class),
    velocity v = data - noise. With a class token (`cls_dim` > 0, REG) model(x, t, y, cls) takes it noised, [B, cls_dim], too; with it or
    a projection head (`z_dim` > 0, REPA) the answer is (v, v_cls [B, cls_dim] or None, projection [B, tokens, z_dim] or None), tokens
    class token first.
    """

    def __init__(self, input_size=16, in_channels=32, patch_size=1, hidden_size=1152, depth=28, num_heads=16, num_classes=1000, arch="lightningdit",
                 mlp_hidden=0, qk_norm=False, cls_dim=0, z_dim=0, projector_dim=2048, encoder_depth=8):
        super().__init__()
        if input_size % patch_size or hidden_size % (4 * num_heads):
            raise UserError(f"a DiT needs latents ({input_size}) divisible by its patches ({patch_size}) and a width ({hidden_size}) divisible by "
                            f"4 x its heads ({num_heads})")
        self.input_size, self.in_channels, self.patch_size, self.num_classes, self.cls_dim = input_size, in_channels, patch_size, num_classes, cls_dim
        self.encoder_depth, self.checkpointing = encoder_depth, False
        D, p, grid, lightning = hidden_size, patch_size, input_size // patch_size, arch == "lightningdit"
        if lightning:
            norm = head_norm = lambda dim: RMSNorm(dim, eps=1e-6)
            mlp = lambda: SwiGLU(D, mlp_hidden or int(2 / 3 * 4 * D))
        else:
            norm, head_norm = lambda dim: nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6), nn.LayerNorm
            hidden = mlp_hidden or 4 * D
            mlp = lambda: nn.Sequential(OrderedDict(fc1=nn.Linear(D, hidden), act=nn.GELU("tanh"), fc2=nn.Linear(hidden, D)))
        self.x_embedder = nn.Sequential(OrderedDict(proj=nn.Conv2d(in_channels, D, p, p)))
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = nn.Sequential(OrderedDict(embedding_table=nn.Embedding(num_classes + 1, D)))
        self.blocks = nn.ModuleList(Block(D, num_heads, mlp, norm, head_norm if qk_norm else nn.Identity) for _ in range(depth))
        self.final_layer = FinalLayer(D, p * p * in_channels, cls_dim, norm)
        widths = [D, projector_dim, projector_dim, z_dim]
        self.projectors = nn.ModuleList([nn.Sequential(*[layer for i in range(3) for layer in (nn.Linear(*widths[i:i + 2]), nn.SiLU())][:-1])] if z_dim else [])
        if cls_dim:
            self.cls_projectors2, self.wg_norm = nn.Linear(cls_dim, D), nn.LayerNorm(D, eps=1e-6)
        positions, angles = position_tables(grid, D, D // num_heads)
        if cls_dim:                   # the class token stands nowhere: a zero position, no rotation
            positions, angles = F.pad(positions, (0, 0, 1, 0)), F.pad(angles, (0, 0, 0, 0, 1, 0))
        self.register_buffer("pos_embed", positions, persistent=False)
        for name, f in ("rope_cos", torch.cos), ("rope_sin", torch.sin):
            self.register_buffer(name, f(angles).float() if lightning else None, persistent=False)
        self.initialize()

    def initialize(self):             # DiT's: Xavier, normal 0.02 embeddings, zeros for what adaLN gates and for the output
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                nn.init.zeros_(module.bias)
        for weight in (self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight, self.y_embedder.embedding_table.weight):
            nn.init.normal_(weight, std=0.02)
        for linear in [m.adaLN_modulation[1] for m in (*self.blocks, self.final_layer)] + [self.final_layer.linear, self.final_layer.linear_cls]:
            if linear is not None:
                nn.init.zeros_(linear.weight)

    def forward(self, x, t, y, cls=None):
        x = self.x_embedder(x).flatten(2).transpose(1, 2)                                     # [B, N, D]
        if self.cls_dim:
            x = torch.cat((self.wg_norm(self.cls_projectors2(cls))[:, None], x), 1)
        x, c = x + self.pos_embed, self.t_embedder(t) + self.y_embedder(y)
        rope, projection = None if self.rope_cos is None else (self.rope_cos, self.rope_sin), None
        for i, block in enumerate(self.blocks, 1):
            x = checkpoint(block, x, c, rope, use_reentrant=False) if self.checkpointing and self.training else block(x, c, rope)
            if self.projectors and i == self.encoder_depth:
                projection = self.projectors[0](x)
        x, v_cls = self.final_layer(x, c)
        p, grid = self.patch_size, self.input_size // self.patch_size
        v = x.unflatten(-1, (p, p, -1)).unflatten(1, (grid, grid)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return (v, v_cls, projection) if self.cls_dim or self.projectors else v

    def flops(self):
        """Of one image's forward pass: two for each multiply-add of the matrix products."""
        tokens = self.pos_embed.shape[1]
        once = ("t_embedder", "adaLN", "cls_projectors2", "linear_cls")                       # per image; the others work per token
        weights = {name: w.numel() for name, w in self.named_parameters() if w.ndim > 1 and "y_embedder" not in name}
        matrices = sum(size * (1 if any(part in name for part in once) else tokens) for name, size in weights.items())
        return 2 * (matrices + 2 * len(self.blocks) * tokens ** 2 * self.pos_embed.shape[2])


def turn_round(weights):
    """SiT and REG learn v = noise - data with time from data to noise. The same function in our direction is an exact change of a few
    weights: the outputs' signs, and cos((1-t)f) = cos(f) cos(tf) + sin(f) sin(tf), likewise the sine, folded into the time embedding."""
    cos, sin = TimestepEmbedder.freqs.cos(), TimestepEmbedder.freqs.sin()
    a, b = weights["t_embedder.mlp.0.weight"].double().chunk(2, 1)
    signs = {key: -value for key, value in weights.items() if key.startswith(("final_layer.linear.", "final_layer.linear_cls."))}
    return {**weights, **signs, "t_embedder.mlp.0.weight": torch.cat((a * cos + b * sin, a * sin - b * cos), 1).to(a)}


def official_arch(weights):
    """The DiT arguments of a LightningDiT, SiT, REPA or REG state dict, from its keys and shapes. Head counts without QK norm, and the
    depth at which a projection sits, cannot be read off: they are the published models'."""
    shape = {key: tuple(value.shape) for key, value in weights.items()}
    (D, channels, p, _), sit = shape["x_embedder.proj.weight"], "blocks.0.mlp.fc1.weight" in shape
    arch = dict(hidden_size=D, in_channels=channels, patch_size=p, depth=len({key.split(".")[1] for key in shape if key.startswith("blocks.")}),
                num_classes=shape["y_embedder.embedding_table.weight"][0] - 1, arch="sit" if sit else "lightningdit",
                mlp_hidden=shape["blocks.0.mlp.fc2.weight" if sit else "blocks.0.mlp.w3.weight"][1])
    if "cls_projectors2.weight" in shape:
        arch["cls_dim"] = shape["cls_projectors2.weight"][1]
    if "projectors.0.0.weight" in shape:
        arch.update(projector_dim=shape["projectors.0.0.weight"][0], z_dim=shape["projectors.0.4.weight"][0])
    if "pos_embed" in shape:
        arch["input_size"] = p * math.isqrt(shape["pos_embed"][1])                            # a class token adds one to the square
    arch["qk_norm"] = "blocks.0.attn.q_norm.weight" in shape
    published = {width: heads for _, width, heads in SIZES.values()}
    arch["num_heads"] = D // shape["blocks.0.attn.q_norm.weight"][0] if arch["qk_norm"] else published.get(D, D // 64)
    return arch


def load_diffusion(path, weights="ema", **overrides):
    """A DiT, in eval mode on the CPU, from a checkpoint of diffusion.py, or an official LightningDiT, SiT, REPA or REG file.

    Official files are {"ema": ..., "model": ...} or a bare state dict, keys perhaps behind "module." or "_orig_mod."; `weights` picks one.
    What they cannot tell is an override (`num_heads=4, encoder_depth=2, input_size=16`). The model runs in our time whatever the file's.
    `model.about` holds what else a checkpoint of ours says: latent_mean, latent_std, tokenizer, classes, step, config; {} for official ones.
    UserError for a missing file, another kind of file, and left-over or missing keys.
    """
    entries, about = load_weights(path), {}
    if entries.get("kind", "diffusion") != "diffusion":
        raise UserError(f"{path} is a {entries['kind']} checkpoint, not a diffusion model")
    if "kind" in entries:
        state, arch = entries[weights], entries["arch"]
        about = {key: value for key, value in entries.items() if key not in ("model", "ema", "optimizer")}
    else:
        state = next((entries[key] for key in (weights, "ema", "model", "state_dict") if isinstance(entries.get(key), dict)), entries)
        state = {re.sub(r"^((module|model|_orig_mod)\.)+", "", key): value for key, value in state.items()}
        try:
            arch = official_arch(state)
        except (KeyError, ValueError) as error:
            raise UserError(f"{path} is no diffusion transformer that load_diffusion knows (LightningDiT, SiT, REPA, REG): it lacks or misshapes {error}")
        state = {key: value for key, value in state.items() if key != "pos_embed" and not key.startswith("feat_rope.")}      # tables that we compute
        if arch["arch"] == "sit" and "t_embedder.mlp.0.weight" in state:
            state = turn_round(state)
    with torch.device("meta"):        # the weights come from the file: none are drawn first
        model = DiT(**{**arch, **overrides})
    with warnings.catch_warnings():   # copying onto meta tensors does nothing, with a warning each: this only compares keys and shapes
        warnings.simplefilter("ignore")
        load_state(model, state, str(path))
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    model.about = about
    return model.eval()


# -----------------------------------------------------------------------------
# The latent cache: memory-mapped arrays whose row 2 i is image i, 2 i + 1 its mirror image

DTYPES = {"bf16": (torch.bfloat16, np.uint16), "fp16": (torch.float16, np.float16), "fp32": (torch.float32, np.float32)}      # NumPy has no bfloat16: its bits


def fingerprint(*parts):
    """A hash of tensors' bytes, of modules' weights, and of the text of anything else."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        for item in chain.from_iterable(part.state_dict().items()) if isinstance(part, nn.Module) else [part]:
            digest.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy() if torch.is_tensor(item) else repr(item).encode())
    return digest.hexdigest()


def data_fingerprint(images, indices):
    """Of which images these are: names and sizes of files, labels, and the pixels of 16 of them."""
    files = [(path.parts[-2:], path.stat().st_size) for path in images.source] if isinstance(images.source, list) else len(images)
    return fingerprint(files, images.classes, torch.as_tensor(images.labels), torch.as_tensor(indices), *(images[i][0] for i in indices[::-(-len(indices) // 16)]))


def vfm_tokens(vfm, images, grid):
    """The VFM's last tokens [B, (1 +) grid^2, D] of images in [-1, 1], at the input size that gives a token for each of the DiT's (REPA's way)."""
    return vfm(vfm.resize(images, (grid * vfm.patch_size,) * 2), cls=True)[0].float()


class Latents(Dataset):
    """A finished cache: `arrays` [2 n, ...] by name (mean, logvar, features), memory-mapped; `labels` [n]; `mean`, `std` [C] over its images.
    Items are asked for as a StepSampler does, a batch at once; `read` copies rows and does nothing else. UserError if it is not finished."""

    def __init__(self, folder, names):
        self.meta = read_meta(folder)
        if not self.meta.get("complete") or not set(names) <= self.meta["arrays"].keys():
            raise UserError(f"the latents in {folder} are not finished; run diffusion.py, which goes on with them")
        self.labels = torch.from_numpy(np.load(Path(folder) / "labels.npy"))
        self.mean, self.std = torch.tensor(self.meta["mean"]), torch.tensor(self.meta["std"])
        self.arrays = {}
        for name in names:
            array = np.load(Path(folder) / f"{name}.npy", mmap_mode="c")         # copy on write: PyTorch warns of read-only memory
            self.arrays[name] = torch.from_numpy(array).view(DTYPES[self.meta["arrays"][name]["dtype"]][0])

    def __len__(self):
        return len(self.labels)

    def read(self, index, mirror):
        """{name: rows, "labels": classes} of images `index` [B], of their mirror images where `mirror` [B] is 1."""
        return dict(labels=self.labels[index], **{name: array[2 * index + mirror] for name, array in self.arrays.items()})

    def __getitems__(self, items):       # the mirror image where Images(flip=True) gives it for the same key
        mirror = [np.random.default_rng(key).uniform() < 0.5 for _, key in items]
        return self.read(torch.tensor([index for index, _ in items]), torch.tensor(mirror).long())


def read_meta(folder):
    try:
        return json.loads((Path(folder) / "meta.json").read_text())
    except (OSError, ValueError):
        return {}


def write_json(path, value):
    temporary = Path(path).with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


def cache_latents(folder, tokenizer, images, world, indices=None, dtype="bf16", posterior=False, vfm=None, grid=None, batch=100, workers=0, stat_images=10_000):
    """The Latents of `images` (those at `indices`) in `folder`, encoded unless they are there already -> Latents.

    meta.json says of each array what it was made of; a cache of another tokenizer, VFM, data set or precision is made anew. done.npy has a flag
    an image, set after its rows are on disk: a killed run, or one with another number of processes, encodes the rest. meta.json is marked
    complete, with the statistics per channel, last. `posterior` adds logvar; a `vfm` adds features, its tokens for a DiT of grid x grid tokens.
    """
    folder = Path(folder)
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)
    n, side, device = len(indices), images.size // tokenizer.downsample, world.device
    names = ["mean"] + ["logvar"] * posterior + ["features"] * (vfm is not None)
    if world.rank == 0:
        made_of = fingerprint(tokenizer, data_fingerprint(images, indices), images.size)
        wanted = {name: dict(shape=[2 * n, tokenizer.z_dim, side, side], dtype=dtype, of=made_of) for name in names if name != "features"}
        if vfm is not None:
            shape = vfm_tokens(vfm, torch.zeros(1, 3, images.size, images.size, device=device), grid).shape
            wanted["features"] = dict(shape=[2 * n, *shape[1:]], dtype=dtype, of=fingerprint(vfm, made_of))
        meta = read_meta(folder)
        arrays = meta.get("arrays", {})
        usable = all(arrays.get(name) == spec for name, spec in wanted.items()) and (meta.get("complete") or arrays.keys() == wanted.keys())
        for name, spec in arrays.items():
            try:
                usable &= list(np.load(folder / f"{name}.npy", mmap_mode="r").shape) == spec["shape"]
            except (OSError, ValueError):                                        # missing or cut short
                usable = False
        if not usable:
            if meta:
                print(f"the latents in {folder} are of another tokenizer, data set or format: encoding anew", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            size = sum(math.prod(spec["shape"]) for spec in wanted.values()) * DTYPES[dtype][0].itemsize
            if size > (free := shutil.disk_usage(folder).free):
                raise UserError(f"the latents in {folder} need {size / 1e9:,.0f} GB, {free / 1e9:,.0f} GB are free: --latents=FOLDER elsewhere, or --cache_features=0")
            for name, spec in wanted.items():
                np.lib.format.open_memmap(folder / f"{name}.npy", "w+", DTYPES[dtype][1], tuple(spec["shape"]))
            np.lib.format.open_memmap(folder / "done.npy", "w+", np.uint8, (n,))
            np.save(folder / "labels.npy", np.asarray(images.labels)[indices].astype(np.int64))
            write_json(folder / "meta.json", dict(arrays=wanted, complete=False))
    world.barrier()
    if not read_meta(folder)["complete"]:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in names}
        done = np.load(folder / "done.npy", mmap_mode="r+")
        mine = np.array_split(np.flatnonzero(done == 0), world.size)[world.rank]
        world.barrier()                  # everyone has read the flags before anyone sets one
        rows = [mine[i:i + batch] for i in range(0, len(mine), batch)]
        loader = make_loader(images, [indices[part].tolist() for part in rows], world, workers)

        def write(part, values):
            for name, value in zip(names, values):                               # [2 b, ...], images and then mirror images
                value = value.to(DTYPES[dtype][0]).cpu()
                value = value.view(torch.uint16).numpy() if dtype == "bf16" else value.numpy()
                arrays[name][2 * part], arrays[name][2 * part + 1] = value[:len(part)], value[len(part):]
                arrays[name].flush()
            done[part] = 1
            done.flush()

        bar = tqdm(total=len(mine), desc=f"latents {folder.name}", unit="image", disable=world.rank > 0, dynamic_ncols=True)
        with torch.inference_mode(), ThreadPoolExecutor(1) as writer:            # the disk works while the next batch is encoded
            pending = deque()
            for part, (pixels, _) in zip(rows, loader):
                x = to_float(pixels.to(device, non_blocking=True))
                x = torch.cat((x, x.flip(-1)))
                values = list(tokenizer.encode(x)[:1 + posterior])               # in float32 (TF32 on CUDA): they are kept for good
                if vfm is not None:
                    with world.autocast():
                        values.append(vfm_tokens(vfm, x, grid))
                pending.append(writer.submit(write, part, values))
                while len(pending) > 2:
                    pending.popleft().result()
                bar.update(len(part))
            for job in pending:
                job.result()
        bar.close()
        world.barrier()
        if world.rank == 0:
            meta = read_meta(folder)
            write_json(folder / "meta.json", dict(meta, complete=True, **latent_statistics(folder, n, names, dtype, stat_images)))
        world.barrier()
    return Latents(folder, names)


def latent_statistics(folder, n, names, dtype, count):
    """{"mean", "std"}: per channel, over positions and `count` images and their mirror images; of samples, where there is a logvar."""
    view = lambda name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")).view(DTYPES[dtype][0])
    mean, logvar = view("mean"), view("logvar") if "logvar" in names else None
    total, squares, number = 0, 0, 0
    for rows in torch.linspace(0, 2 * n - 1, min(2 * n, 2 * count)).long().split(1000):
        z = mean[rows].double()
        total, squares, number = total + z.sum((0, 2, 3)), squares + z.square().sum((0, 2, 3)), number + z[:, 0].numel()
        if logvar is not None:
            squares = squares + logvar[rows].double().exp().sum((0, 2, 3))
    mean = total / number
    std = (squares / number - mean.square()).clamp(min=0).sqrt()
    if not (std > 0).all():              # NaN included
        raise UserError(f"channels {torch.where(~(std > 0))[0].tolist()} of the latents in {folder} are constant or not finite: is the tokenizer trained? (delete {folder} to encode anew)")
    return dict(mean=mean.tolist(), std=std.tolist())
