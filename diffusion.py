"""
The diffusion transformer, its training by flow matching on cached latents, and the latent cache.

    python diffusion.py                                     # toy: latents of out/tokenizer.pt, then the model, minutes on a laptop
    python diffusion.py --align=reg --arch=sit              # with REG's class token and REPA, the diffusion side of VFM-VAE's dual alignment
    python diffusion.py --preset=imagenet                   # LightningDiT-XL/1, 80 epochs; --preset=reg: SiT-XL/1 with REG
    torchrun --nproc_per_node=8 diffusion.py                # the same on eight GPUs; --fsdp=1 shards what does not fit on one
    python diffusion.py --bench=20 --model=XL --batch_size=256      # step time, images a second, MFU, memory on random latents

LightningDiT is arXiv 2501.01423, SiT 2401.08740, REPA 2410.06940, REG 2507.01467, DiT 2212.09748.
"""
import copy
import hashlib
import json
import math
import os
import re
import shutil
import sys
import warnings
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice, repeat
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

from tokenizer import (Images, Log, StepSampler, UserError, init_world, load_checkpoint, load_state, load_tokenizer, load_vfm, load_weights, main,
                       make_loader, parse_config, save_checkpoint, save_grid, seed_step, to_float, update_ema, write_text)

sys.modules.setdefault("diffusion", sys.modules[__name__])      # as a script: sample.py must not import a second copy


@dataclass
class Config:
    preset: str = ""                  # toy, imagenet or reg; imagenet where there is CUDA and data/imagenet/train
    out: str = "out"                  # folder for everything written; holds tokenizer.pt unless --tokenizer says otherwise
    resume: bool = True               # go on from OUT/diffusion.pt if it is there
    seed: int = 0                     # of weights, data order, times, noises
    # data and its latents
    tokenizer: str = ""               # checkpoint, ours or official; empty: OUT/tokenizer.pt
    data: str = "shapes"              # shapes, a folder of class folders (or with train/ and val/), or a torchvision data set
    data_dir: str = "data"            # where torchvision's data sets lie
    download: bool = False            # fetch them
    image_size: int = 0               # pixels; 0: what the tokenizer was trained at
    latents: str = ""                 # folder of the latent cache; empty: OUT/latents
    cache_dtype: str = "bf16"         # bf16, fp16 or fp32
    cache_features: bool = True       # with --align: cache the VFM's tokens, too, instead of running it at every step
    sample_posterior: bool = False    # cache logvar, too, and train on samples of the posterior instead of its mean
    encode_batch: int = 100           # images (each with its mirror image) encoded at once
    val_images: int = 2_000           # of the val split, for the validation loss
    workers: int = 0                  # data loading processes
    # model
    model: str = "toy"                # toy, B, L, XL, 1.0B, 1.6B
    depth: int = 0                    # blocks; 0: the model's
    hidden_size: int = 0              # width; 0: the model's
    num_heads: int = 0                # 0: the model's
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
    steps: int = 3_000                # of batch_size images
    epochs: float = 0.0               # instead of steps, if not 0
    batch_size: int = 64              # of all processes and accumulation steps together
    accumulate: int = 1               # micro-batches to a step
    lr: float = 2e-3                  # AdamW, betas (0.9, beta2), no weight decay
    warmup: int = 100                 # steps of linear warm-up (0: none)
    cooldown: float = 0.5             # last share of the steps over which the learning rate falls linearly to 0 (ours; the papers' is constant)
    beta2: float = 0.95               # of AdamW's second moments
    clip: float = 1.0                 # gradient norm
    ema: float = 0.995                # decay a step
    # machine
    compile: bool = torch.cuda.is_available()   # torch.compile the model
    checkpointing: bool = False       # recompute blocks in the backward pass instead of keeping activations
    fsdp: bool = False                # FSDP2: shard weights, gradients and optimizer over the processes
    bench: int = 0                    # time this many training steps, and evaluations, on random latents, then stop
    bench_latents: tuple = (32, 16, 16)         # their shape: f16 latents of a 256 px image
    # intervals, in steps
    log_interval: int = 50            # between lines of the log
    val_interval: int = 500           # between validation losses (0: at the end alone)
    sample_interval: int = 500        # a grid of samples, OUT/grids/diffusion-STEP.png (0: none)
    save_interval: int = 500          # between checkpoints (0: at the end alone)


IMAGENET = dict(data="data/imagenet", model="XL", batch_size=1024, steps=100_000, lr=2e-4, warmup=0, cooldown=0.0, ema=0.9999, workers=8, encode_batch=64,
                align_vfm="dinov2_vitb14", encoder_depth=8, projector_dim=2048, val_images=4_096, log_interval=100, val_interval=5_000,
                sample_interval=5_000, save_interval=5_000)
PRESETS = {"toy": {}, "imagenet": IMAGENET,
           "reg": dict(IMAGENET, arch="sit", qk_norm=True, times="uniform", cosine_weight=0.0, align="reg",
                       cache_features=False)}     # its tokens of ImageNet and the mirror images are a terabyte

SIZES = {"toy": (4, 128, 4), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "1.0B": (24, 1536, 24), "1.6B": (28, 1792, 28)}     # depth, width, heads

# -----------------------------------------------------------------------------
# The transformer. Parameter names are those of the public LightningDiT and REG checkpoints

class RMSNorm(nn.RMSNorm):
    def forward(self, x):             # in float32, as autocast does for LayerNorm
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def rotate(x, cos, sin):
    """Rotary embedding of x [B, N, heads, d]: neighbouring channels (a, b) turn by the angle of their position; cos, sin [N, 1, d/2]. All a come
    before all b in the result: queries and keys are permuted alike, which their products do not see, and nothing need be interleaved."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


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
        # float32 under autocast, too: bf16 would round 1 + scale to 1/128
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).float()[:, None].chunk(6, -1)
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
        x = modulate(self.norm_final(x), *self.adaLN_modulation(c).float()[:, None].chunk(2, -1))
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
        p, side = self.patch_size, self.input_size
        v = x.view(-1, side // p, side // p, p, p, self.in_channels).permute(0, 5, 1, 3, 2, 4).reshape(-1, self.in_channels, side, side).contiguous()
        return (v, v_cls, projection) if self.cls_dim or self.projectors else v

    def flops(self):
        """Of one image's forward pass: two for each multiply-add of the matrix products."""
        tokens = self.pos_embed.shape[1]
        once = ("t_embedder", "adaLN", "cls_projectors2", "linear_cls")                       # per image; the others work per token
        weights = {name: w.numel() for name, w in self.named_parameters() if w.ndim > 1 and "y_embedder" not in name}
        matrices = sum(size * (1 if any(part in name for part in once) else tokens) for name, size in weights.items())
        return 2 * (matrices + 2 * len(self.blocks) * tokens ** 2 * self.pos_embed.shape[2])


def turn_round(weights):
    """REPA and REG learn v = noise - data with time from data to noise. The same function in our direction is an exact change of a few
    weights: the outputs' signs, and cos((1-t)f) = cos(f) cos(tf) + sin(f) sin(tf), likewise the sine, folded into the time embedding."""
    cos, sin = TimestepEmbedder.freqs.cos(), TimestepEmbedder.freqs.sin()
    a, b = weights["t_embedder.mlp.0.weight"].double().chunk(2, 1)
    signs = {key: -value for key, value in weights.items() if key.startswith(("final_layer.linear.", "final_layer.linear_cls."))}
    return {**weights, **signs, "t_embedder.mlp.0.weight": torch.cat((a * cos + b * sin, a * sin - b * cos), 1).to(a)}


def official_arch(weights):
    """The DiT arguments of a LightningDiT, REPA or REG state dict, from its keys and shapes. Head counts without QK norm, and the
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
    """A DiT, in eval mode on the CPU, from a checkpoint of diffusion.py, or an official LightningDiT, REPA or REG file.

    Official files are {"ema": ..., "model": ...} or a bare state dict, keys perhaps behind "module." or "_orig_mod."; `weights` picks one.
    What they cannot tell is an override (`num_heads=4, encoder_depth=2, input_size=16`). The model runs in our time whatever the file's.
    `model.about` holds what else a checkpoint of ours says: latent_mean, latent_std, tokenizer, classes, step, config; {} for official ones.
    UserError for a missing file, another kind of file, and left-over or missing keys.
    """
    entries, about = load_weights(path), {}
    entries = entries if isinstance(entries, dict) else {}
    if entries.get("kind", "diffusion") != "diffusion":
        raise UserError(f"{path} is a {entries['kind']} checkpoint, not a diffusion model")
    if "kind" in entries:
        state, arch = entries[weights], entries["arch"]
        about = {key: value for key, value in entries.items() if key not in ("model", "ema", "optimizer")}
    else:
        state = next((entries[key] for key in (weights, "ema", "model", "state_dict") if isinstance(entries.get(key), dict)), entries)
        state = {re.sub(r"^((module|model|_orig_mod)\.)+", "", key): value for key, value in state.items() if torch.is_tensor(value)}
        try:
            arch = official_arch(state)
        except (KeyError, ValueError) as error:
            raise UserError(f"{path} is no diffusion transformer that load_diffusion knows (LightningDiT, REPA, REG): it lacks or misshapes {error}")
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
    files = len(images)
    if isinstance(images.source, np.ndarray):    # paths
        files = [(Path(os.fsdecode(path)).parts[-2:], os.stat(path).st_size) for path in images.source]
    return fingerprint(files, images.classes, torch.as_tensor(images.labels), torch.as_tensor(indices), *(images[i][0] for i in indices[::-(-len(indices) // 16)]))


def vfm_tokens(vfm, images, grid):
    """The VFM's last tokens [B, (1 +) grid^2, D] of images in [-1, 1], at the input size that gives a token for each of the DiT's (REPA's way)."""
    return vfm(vfm.resize(images, (grid * vfm.patch_size,) * 2), cls=True)[0].float()


def mapped(path, dtype):
    """A memory-mapped .npy as a tensor that nobody may write to: a private writable mapping would be charged against memory and swap."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)             # PyTorch's, of read-only memory
        return torch.from_numpy(np.load(path, mmap_mode="r")).view(dtype)


class Latents(Dataset):
    """A finished cache: `arrays` [2 n, ...] by name (mean, logvar, features), memory-mapped; `labels` [n]; `mean`, `std` [C] over its images.
    Items are asked for as a StepSampler does, a batch at once; `read` copies rows and does nothing else. UserError if it is not finished."""

    def __init__(self, folder, names):
        folder = Path(folder)
        self.meta = read_json(folder / "meta.json")
        if not self.meta.get("complete") or not set(names) <= self.meta["arrays"].keys():
            raise UserError(f"the latents in {folder} are not finished; run diffusion.py, which goes on with them")
        self.labels = torch.from_numpy(np.load(folder / "labels.npy"))
        self.mean, self.std = torch.tensor(self.meta["mean"]), torch.tensor(self.meta["std"])
        self.arrays = {}
        for name in names:
            self.arrays[name] = mapped(folder / f"{name}.npy", DTYPES[self.meta["arrays"][name]["dtype"]][0])

    def __len__(self):
        return len(self.labels)

    def read(self, index, mirror):
        """{name: rows, "labels": classes} of images `index` [B], of their mirror images where `mirror` [B] is 1."""
        return dict(labels=self.labels[index], **{name: array.index_select(0, 2 * index + mirror) for name, array in self.arrays.items()})

    def __getitems__(self, items):       # the mirror image where Images(flip=True) gives it for the same key
        mirror = [np.random.default_rng(key).uniform() < 0.5 for _, key in items]
        return self.read(torch.tensor([index for index, _ in items]), torch.tensor(mirror).long())


def read_json(path):
    """{} if there is none, or half of one."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1))


def cache_latents(folder, tokenizer, images, world, indices=None, dtype="bf16", posterior=False, vfm=None, grid=None, batch=100, workers=0):
    """The Latents of `images` (those at `indices`) in `folder`, encoded unless they are there already.

    meta.json says of each array what it was made of: a cache of another tokenizer, VFM, data set or precision is made anew. done.npy has a
    flag an image, set after its rows are on disk, so a killed run, or one with another number of processes, encodes the rest. Last, meta.json
    gets the statistics and is marked complete. `posterior` adds logvar; `vfm` adds features, its tokens for a DiT of grid x grid tokens.
    """
    folder = Path(folder)
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)
    names = ["mean"] + ["logvar"] * posterior + ["features"] * (vfm is not None)
    if world.rank == 0:
        origin, rows, side = fingerprint(tokenizer, data_fingerprint(images, indices)), 2 * len(indices), images.size // tokenizer.downsample
        wanted = {name: dict(shape=[rows, tokenizer.z_dim, side, side], dtype=dtype, of=origin) for name in names if name != "features"}
        if vfm is not None:
            shape = vfm_tokens(vfm, torch.zeros(1, 3, images.size, images.size, device=world.device), grid).shape
            wanted["features"] = dict(shape=[rows, *shape[1:]], dtype=dtype, of=fingerprint(vfm, origin))
        if not usable_cache(folder, wanted):
            start_cache(folder, wanted, np.asarray(images.labels)[indices].astype(np.int64))
    world.barrier()
    if not read_json(folder / "meta.json")["complete"]:
        fill_cache(folder, names, tokenizer, images, world, indices, vfm, grid, batch, workers)
    return Latents(folder, names)


def usable_cache(folder, wanted):
    """Whether what is in the folder is, or when finished will be, what is wanted, and whole."""
    meta = read_json(folder / "meta.json")
    arrays = meta.get("arrays", {})
    try:
        whole = all(list(np.load(folder / f"{name}.npy", mmap_mode="r").shape) == spec["shape"] for name, spec in arrays.items())
    except (OSError, ValueError):        # missing or cut short
        whole = False
    return whole and all(arrays.get(name) == spec for name, spec in wanted.items()) and (meta.get("complete") or arrays.keys() == wanted.keys())


def start_cache(folder, wanted, labels):
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        if "arrays" not in read_json(folder / "meta.json"):
            raise UserError(f"{folder} holds something else than latents: give another --latents")
        print(f"the latents in {folder} are of another tokenizer, data set or format, or damaged: encoding anew", flush=True)
        for path in folder.glob("*.npy"):
            path.unlink()
    write_json(folder / "meta.json", dict(arrays={}, complete=False))            # first, so that the folder is known as ours
    size = sum(math.prod(spec["shape"]) * DTYPES[spec["dtype"]][0].itemsize for spec in wanted.values())
    if size > (free := shutil.disk_usage(folder).free):
        raise UserError(f"the latents in {folder} need {size / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free: --latents=FOLDER elsewhere, or --cache_features=0")
    for name, spec in wanted.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", DTYPES[spec["dtype"]][1], tuple(spec["shape"]))
    np.save(folder / "done.npy", np.zeros(len(labels), np.uint8))
    np.save(folder / "labels.npy", labels)
    write_json(folder / "meta.json", dict(arrays=wanted, complete=False))


def fill_cache(folder, names, tokenizer, images, world, indices, vfm, grid, batch, workers):
    """Encodes what is not done yet, this process its share; then the statistics."""
    arrays, done = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in names}, np.load(folder / "done.npy", mmap_mode="r+")
    low = DTYPES[read_json(folder / "meta.json")["arrays"]["mean"]["dtype"]][0]
    mine = np.array_split(np.flatnonzero(done == 0), world.size)[world.rank]
    world.barrier()                      # everyone has read the flags before anyone sets one
    parts = [mine[i:i + batch] for i in range(0, len(mine), batch)]

    def write(part, values):
        for array, value in zip(arrays.values(), values):                        # [2 b, ...]: images, then mirror images
            value = value.to(low).cpu()
            value = (value.view(torch.uint16) if low == torch.bfloat16 else value).numpy()
            array[2 * part], array[2 * part + 1] = value[:len(part)], value[len(part):]
            array.flush()
        done[part] = 1
        done.flush()

    bar = tqdm(total=len(mine), desc=f"latents {folder.name}", unit="image", disable=world.rank > 0, dynamic_ncols=True)
    with torch.inference_mode(), ThreadPoolExecutor(1) as writer:                # the disk works while the next batch is encoded
        pending = deque()
        for part, (pixels, _) in zip(parts, make_loader(images, [indices[part].tolist() for part in parts], world, workers)):
            x = to_float(pixels.to(world.device, non_blocking=True))
            x = torch.cat((x, x.flip(-1)))
            values = list(tokenizer.encode(x)[:1 + ("logvar" in names)])         # in float32 (TF32 on CUDA): they are kept for good
            if vfm is not None:
                with world.autocast():
                    values.append(vfm_tokens(vfm, x, grid))
            pending.append(writer.submit(write, part, values))
            if len(pending) > 2:
                pending.popleft().result()
            bar.update(len(part))
        for job in pending:
            job.result()
    bar.close()
    world.barrier()
    if world.rank == 0:
        write_json(folder / "meta.json", dict(read_json(folder / "meta.json"), complete=True, **latent_statistics(folder, names, low)))
    world.barrier()


def latent_statistics(folder, names, dtype, count=20_000):
    """{"mean", "std"} per channel, over positions and `count` rows (LightningDiT: 10,000 images); of samples, where there is a logvar."""
    means, logvars = (mapped(folder / f"{name}.npy", dtype) if name in names else None for name in ("mean", "logvar"))
    total, squares, number = 0, 0, 0
    for rows in torch.linspace(0, len(means) - 1, min(len(means), count)).long().split(1000):
        z = means[rows].double()
        total, squares, number = total + z.sum((0, 2, 3)), squares + z.square().sum((0, 2, 3)), number + z[:, 0].numel()
        if logvars is not None:
            squares = squares + logvars[rows].double().exp().sum((0, 2, 3))
    mean = total / number
    std = (squares / number - mean.square()).clamp(min=0).sqrt()
    if bad := torch.where(~((std > 0) & std.isfinite()))[0].tolist():
        raise UserError(f"channels {bad} of the latents in {folder} are constant or not finite: is the tokenizer trained? (delete {folder} to encode anew)")
    return dict(mean=mean.tolist(), std=std.tolist())


# -----------------------------------------------------------------------------
# Flow matching

class ImageNoise:
    """Gaussian noise that depends on (seed, image index) alone: each image has a stream of its own, on the CPU; called with a tensor [B, ...],
    gives the next numbers of every stream in its shape, dtype and device."""

    def __init__(self, seed, indices):
        self.generators = [torch.Generator().manual_seed(int(np.random.SeedSequence((seed, int(i))).generate_state(1, np.uint64)[0])) for i in indices]

    def __call__(self, like):
        return torch.stack([torch.randn(like.shape[1:], generator=g, dtype=like.dtype) for g in self.generators]).to(like.device, non_blocking=True)


def flow_losses(model, latents, labels, t, noise, tokens=None, cls_noise=None):
    """The terms of the objective at x_t = t latents + (1 - t) noise, each [B]; the caller weighs them, and decides what each one reaches.

    velocity: mean squared error; cosine: mean over positions of 1 - cos over channels (LightningDiT). `tokens` [B, (1 +) N, D] are the VFM's for
    the clean images. repa: negative cosine similarity of the projection and the tokens (REPA eq. 8). cls: the velocity error of the class
    token, tokens[:, 0] noised with `cls_noise` [B, D] (REG). latents: normalised, [B, C, S, S]; labels after class dropout; t, noise as drawn.
    """
    x, target = torch.lerp(noise, latents, t.view(-1, 1, 1, 1)), latents - noise
    if cls_noise is None:
        out = model(x, t, labels)
    else:
        out = model(x, t, labels, torch.lerp(cls_noise, tokens[:, 0], t[:, None]))
    v, v_cls, projection = out if isinstance(out, tuple) else (out, None, None)
    v = v.float()
    losses = dict(velocity=(v - target).square().mean((1, 2, 3)), cosine=1 - F.cosine_similarity(v, target, dim=1).mean((1, 2)))
    if v_cls is not None:
        losses["cls"] = (v_cls.float() - (tokens[:, 0] - cls_noise)).square().mean(1)
    if projection is not None:
        losses["repa"] = -F.cosine_similarity(projection.float(), tokens[:, -projection.shape[1]:], dim=-1).mean(1)
    return losses


def draw_times(n, step, cfg, device):
    """Logit-normal(0, 1), LightningDiT's (after Stable Diffusion 3), or uniform."""
    uniform = cfg.times == "uniform" or 0 < cfg.uniform_from <= step
    return torch.rand(n, device=device) if uniform else torch.randn(n, device=device).sigmoid()


def build(cfg, world, arch, saved=None):
    """(model, the same wrapped for several processes, its EMA, optimizer), from a checkpoint's entries if `saved`."""
    seed_step(cfg.seed, -1)
    model = DiT(**arch)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if saved:
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
    model.checkpointing = cfg.checkpointing
    model, ema = model.to(world.device).train(), ema.to(world.device)
    if cfg.compile:
        # alone: one graph; else one a block, compiled once for all of them, so that gradients leave and weights arrive block by block
        for module in [model] if world.size == 1 and not cfg.fsdp else model.blocks:
            module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False)
    parallel = model
    if cfg.fsdp:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        if not dist.is_initialized():
            dist.init_process_group("nccl" if world.device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if world.device.type == "cuda" else MixedPrecisionPolicy()
        for part in (*model.blocks, model, *ema.blocks, ema):
            fully_shard(part, mp_policy=policy, reshard_after_forward=True)      # the root, too: the EMA has no backward pass to reshard it
    elif world.size > 1:
        parallel = DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None, gradient_as_bucket_view=True,
                                           broadcast_buffers=False)              # they are constants
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, (0.9, cfg.beta2), weight_decay=0, fused=True)
    if saved:
        set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=StateDictOptions(full_state_dict=True))
    return model, parallel, ema, optimizer


def full_state(model, ema, optimizer):
    """Plain CPU state dicts, whatever the sharding; empty but on rank 0 under FSDP."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(model=get_model_state_dict(model, options=options), ema=get_model_state_dict(ema, options=options),
                optimizer=get_optimizer_state_dict(model, optimizer, options=options))


def train_step(model, parallel, ema, optimizer, batches, cfg, world, step):
    """One optimizer step on `accumulate` batches of dict(latents, labels, tokens or None) -> this process's losses, on the device."""
    weights = dict(velocity=1.0, cosine=cfg.cosine_weight, cls=cfg.cls_weight, repa=cfg.repa_weight)
    left = max(0.0, cfg.steps - step) / max(1.0, cfg.cooldown * cfg.steps) if cfg.cooldown else 1.0
    optimizer.param_groups[0]["lr"] = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup), left)
    seed_step(cfg.seed, step, world.rank)
    totals = {}
    for k, batch in enumerate(batches):
        z, y, tokens = batch["latents"], batch["labels"], batch["tokens"]
        y = torch.where(torch.rand(len(y), device=y.device) < cfg.class_dropout, model.num_classes, y)
        cls_noise = torch.randn_like(tokens[:, 0]) if model.cls_dim else None
        if cfg.fsdp:
            parallel.set_requires_gradient_sync(k == cfg.accumulate - 1)
        elif parallel is not model:
            parallel.require_backward_grad_sync = k == cfg.accumulate - 1
        with world.autocast():
            losses = flow_losses(parallel, z, y, draw_times(len(y), step, cfg, y.device), torch.randn_like(z), tokens, cls_noise)
        losses = {name: value.mean() for name, value in losses.items()}
        loss = sum(weights[name] * value for name, value in losses.items())
        (loss / cfg.accumulate).backward()
        for name, value in dict(loss=loss, **losses).items():
            totals[name] = totals.get(name, 0) + value.detach() / cfg.accumulate
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if cfg.fsdp:
        ema.reshard()                    # sampling from it may have left the root whole
    update_ema(ema, model, cfg.ema)
    return dict(totals, grad_norm=norm.full_tensor() if cfg.fsdp else norm)


def prepare(batch, mean, std, tokens=None):
    """Rows of the cache -> dict(latents: normalised, sampled where logvar is cached; labels; tokens) on the device of mean, std [C, 1, 1], in float32."""
    batch = {name: value.to(mean.device, non_blocking=True) for name, value in batch.items()}
    z = batch["mean"].float()
    if "logvar" in batch:
        z = torch.addcmul(z, (0.5 * batch["logvar"].float()).exp(), torch.randn_like(z))
    return dict(latents=(z - mean) / std, labels=batch["labels"], tokens=batch["features"].float() if "features" in batch else tokens)


def training_batches(latents, mean, std, sampler, world, cfg, images=None, vfm=None, grid=None):
    """Prepared batches in the sampler's order; `images` (with flip=True) and `vfm`: tokens on the fly, of the same pictures."""
    loader = DataLoader(latents, batch_sampler=sampler, collate_fn=dict, num_workers=cfg.workers, pin_memory=world.device.type == "cuda")
    pictures = repeat((None, None)) if images is None else make_loader(images, sampler, world, cfg.workers)

    def tokens(picture):
        with torch.no_grad(), world.autocast():
            return vfm_tokens(vfm, to_float(picture.to(world.device, non_blocking=True)), grid)

    # zip asks for its iterators now: a loader draws a random number when it starts, which must not happen within a step
    return (prepare(batch, mean, std, None if picture is None else tokens(picture)) for batch, (picture, _) in zip(loader, pictures))


@torch.no_grad()
def validate(model, val, mean, std, world, batch):
    """Mean losses on held-out latents at times and noises that depend on the image's number alone: comparable between runs on the same latents."""
    mine, totals = torch.arange(len(val) // world.size * world.size)[world.rank::world.size], {}
    for index in mine.split(batch):
        data, noise = prepare(val.read(index, 0 * index), mean, std), ImageNoise(0, index)
        t = (index.double() * 0.6180339887498949 % 1).float().to(world.device)       # golden ratio: even over [0, 1] in any run of images
        cls_noise = noise(data["tokens"][:, 0]) if model.cls_dim else None
        with world.autocast():
            losses = flow_losses(model, data["latents"], data["labels"], t, noise(data["latents"]), data["tokens"], cls_noise)
        for name, value in losses.items():
            totals[name] = totals.get(name, 0) + value.sum() / len(mine)
    return {f"val_{name}": world.mean(value) for name, value in totals.items()}


def bench(cfg, world):
    """Times training steps, and evaluations as in sampling, on random latents."""
    from torch.utils.benchmark import Timer      # importing it warns where there is no CUDA
    dim = load_vfm(cfg.align_vfm, pretrained=False).embed_dim if cfg.align != "none" else 0
    model, parallel, ema, optimizer = build(cfg, world, model_arch(cfg, cfg.bench_latents[0], cfg.bench_latents[1], 1000, dim))
    n, cuda = cfg.batch_size // world.size // cfg.accumulate, world.device.type == "cuda"
    batch = dict(latents=torch.randn(n, *cfg.bench_latents, device=world.device), labels=torch.randint(1000, (n,), device=world.device),
                 tokens=torch.randn(n, 1 + model.pos_embed.shape[1] - bool(model.cls_dim), dim, device=world.device) if dim else None)

    seconds = lambda f: Timer("f()", globals=dict(f=f), num_threads=torch.get_num_threads()).timeit(cfg.bench).mean        # after two calls to warm up
    step = seconds(lambda: train_step(model, parallel, ema, optimizer, [batch] * cfg.accumulate, cfg, world, 0))
    memory = f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB" if cuda else "not measured on the CPU"
    model.eval()

    @torch.no_grad()
    def evaluate():
        with world.autocast():
            model(batch["latents"], torch.full((n,), 0.5, device=world.device), batch["labels"], *([batch["tokens"][:, 0]] if model.cls_dim else []))

    forward = seconds(evaluate)
    if world.rank == 0:
        show = lambda flops, rate: f"{rate:9.1f} images/s" + (f", MFU {mfu:.1%}" if (mfu := world.mfu(flops, rate)) else "")
        print(f"{cfg.model}/{cfg.patch_size} {cfg.arch}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {model.flops() / 1e9:.2f} GFLOP "
              f"an image forward, batch {cfg.batch_size} on {world.size} x {torch.cuda.get_device_name() if cuda else 'CPU'}")
        print(f"training step   {step * 1e3:9.1f} ms  {show(3 * model.flops(), cfg.batch_size / step)}, peak memory {memory}")
        print(f"evaluation      {forward * 1e3:9.1f} ms  {show(model.flops(), n * world.size / forward)}")


def model_arch(cfg, channels, side, num_classes, vfm_dim):
    """The DiT arguments that the flags ask for."""
    for key, choices in dict(model=SIZES, arch=("lightningdit", "sit"), align=("none", "repa", "reg"), times=("lognormal", "uniform"), cache_dtype=DTYPES).items():
        if getattr(cfg, key) not in choices:
            raise UserError(f"--{key}={getattr(cfg, key)}: there are {', '.join(choices)}")
    depth, width, heads = (given or default for given, default in zip((cfg.depth, cfg.hidden_size, cfg.num_heads), SIZES[cfg.model]))
    if cfg.align != "none" and not 1 <= cfg.encoder_depth <= depth:
        raise UserError(f"--encoder_depth={cfg.encoder_depth} is not one of the model's {depth} blocks")
    return dict(input_size=side, in_channels=channels, patch_size=cfg.patch_size, hidden_size=width, depth=depth, num_heads=heads, num_classes=num_classes,
                arch=cfg.arch, qk_norm=cfg.qk_norm, cls_dim=vfm_dim if cfg.align == "reg" else 0, z_dim=vfm_dim, projector_dim=cfg.projector_dim,
                encoder_depth=cfg.encoder_depth)


def train(cfg, world):
    """All of `diffusion.py`: caches the latents, trains or goes on, writes OUT/diffusion.pt, OUT/log.jsonl, pictures in OUT/grids."""
    out, device = Path(cfg.out), world.device
    path, tokenizer_path = out / "diffusion.pt", cfg.tokenizer or str(out / "tokenizer.pt")
    if not os.path.exists(tokenizer_path):
        raise UserError(f"no tokenizer at {tokenizer_path}; run tokenizer.py first, or name one with --tokenizer")

    # data
    tokenizer = load_tokenizer(tokenizer_path).to(device)
    size = cfg.image_size or tokenizer.resolution
    images, held_out = (Images(cfg.data, split, size, cfg.data_dir, cfg.download, flip=split == "train", cache=cfg.out) for split in ("train", "val"))
    if list(held_out.classes) != list(images.classes):
        raise UserError(f"{cfg.data}: val has other classes than train ({len(held_out.classes)}, {len(images.classes)}): both need the same folders")
    if held_out.note and world.rank == 0:
        print(f"note: {held_out.note}")
    side = size // tokenizer.downsample
    vfm, tokens_side = load_vfm(cfg.align_vfm, out=cfg.out).to(device) if cfg.align != "none" else None, side // cfg.patch_size
    if cfg.align == "reg" and vfm.cls_token is None:
        raise UserError(f"--align=reg needs a VFM with a class token; {cfg.align_vfm} has none (--align=repa does without)")
    arch = model_arch(cfg, tokenizer.z_dim, side, len(images.classes), vfm.embed_dim if vfm else 0)
    folder, on_the_fly = Path(cfg.latents or out / "latents"), vfm is not None and not cfg.cache_features
    keywords = dict(dtype=cfg.cache_dtype, grid=tokens_side, batch=cfg.encode_batch, workers=cfg.workers)
    latents = cache_latents(folder / "train", tokenizer, images, world, posterior=cfg.sample_posterior, vfm=None if on_the_fly else vfm, **keywords)
    some = np.linspace(0, len(held_out) - 1, min(cfg.val_images, len(held_out))).astype(int)
    val = cache_latents(folder / "val", tokenizer, held_out, world, some, vfm=vfm, **keywords)
    mean, std = (s.view(-1, 1, 1).to(device) for s in (latents.mean, latents.std))

    # model, resumed if there is a checkpoint of the same run
    origin = latents.meta["arrays"]["mean"]["of"]
    saved = load_checkpoint(path, "diffusion") if cfg.resume and path.exists() else None
    if saved:
        keys = ["batch_size", "seed", "sample_posterior", *["align_vfm"] * (vfm is not None)]
        now = dict(arch, latents=origin, **{key: getattr(cfg, key) for key in keys})
        then = dict(saved["arch"], latents=saved["latents"], **{key: saved["config"][key] for key in keys})
        if changed := [f"{key} {then.get(key)}, now {now[key]}" for key in now if now[key] != then.get(key)]:
            raise UserError(f"{path} is another run's ({'; '.join(changed)}): repeat its flags to go on with it, --resume=0 to replace it, or give another --out")
    start, steps = saved["step"] if saved else 0, round(cfg.epochs * len(images) / cfg.batch_size) or cfg.steps
    cfg = replace(cfg, steps=steps)      # the cooldown counts them
    model, parallel, ema, optimizer = build(cfg, world, arch, saved)
    del saved
    if world.rank == 0:
        print(f"{cfg.model}/{cfg.patch_size} {cfg.arch}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; {steps:,} steps of {cfg.batch_size:,} = "
              f"{steps * cfg.batch_size / len(images):.1f} epochs of {len(images):,} images" + (f"; going on from step {start:,}" if start else ""), flush=True)

    def save(step):
        state = full_state(model, ema, optimizer)
        if world.rank == 0:
            save_checkpoint(path, kind="diffusion", config=asdict(cfg), arch=arch, **state, latent_mean=latents.mean, latent_std=latents.std, latents=origin,
                            tokenizer=tokenizer_path, classes=list(images.classes), image_size=size, step=step, images=step * cfg.batch_size)

    def grid(step):                      # sample.py imports this file: it is asked for only when a grid is due
        from sample import Config as Sampling, generate
        columns = min(len(images.classes), 10)
        y = torch.arange(columns).repeat(4)
        pictures = generate(ema, tokenizer, latents.mean, latents.std, range(len(y)), y, Sampling(seed=cfg.seed), world)
        if world.rank == 0:
            save_grid(pictures, out / "grids" / f"diffusion-{step:07d}.png", columns, [images.classes[i] for i in y])

    # loop
    sampler = StepSampler(len(images), cfg.batch_size, cfg.seed, start, steps, world, cfg.accumulate)
    batches = training_batches(latents, mean, std, sampler, world, cfg, *((images, vfm, tokens_side) if on_the_fly else ()))
    log = Log(out, "diffusion", world, steps, start)
    log.flops = 3 * model.flops()        # a backward pass costs two forward ones
    for step in range(start, steps):
        losses = train_step(model, parallel, ema, optimizer, islice(batches, cfg.accumulate), cfg, world, step)
        done = step + 1
        due = lambda interval: done == steps or interval and done % interval == 0
        log.bar.update(1)
        if due(cfg.val_interval):
            losses.update(validate(ema, val, mean, std, world, cfg.encode_batch))
        if due(cfg.log_interval) or due(cfg.val_interval) or due(cfg.save_interval):         # nothing is saved that was not looked at
            losses = {name: world.mean(value.clone()) for name, value in losses.items()}
            log.write(done, done * cfg.batch_size, lr=optimizer.param_groups[0]["lr"], epoch=done * cfg.batch_size / len(images), **losses)
            if not all(math.isfinite(losses[key]) for key in ("loss", "grad_norm")):          # an infinite norm has just made the weights NaN
                raise UserError(f"the loss is {float(losses['loss']):g}, its gradients' norm {float(losses['grad_norm']):g} at step {done}: "
                                f"try a lower --lr, or --qk_norm=1; {path} is as it was")
        if cfg.sample_interval and due(cfg.sample_interval):
            grid(done)
        if due(cfg.save_interval):
            save(done)
    log.bar.close()
    if start >= steps and world.rank == 0:
        print(f"{path} has its {steps:,} steps; more: --steps={2 * steps}, again from the start: --resume=0")


def run():
    cfg = parse_config(Config, PRESETS)
    (bench if cfg.bench else train)(cfg, init_world())


if __name__ == "__main__":
    main(run)
