"""
The diffusion transformer, flow matching, and training on cached latents.

    python diffusion.py  # toy, on out/tokenizer.pt; minutes
    python diffusion.py --align=reg --arch=sit  # REG, REPA (VFM-VAE's dual alignment)
    python diffusion.py --text=toy  # captions in place of classes
    python diffusion.py --preset=imagenet  # LightningDiT-XL/1, 80 epochs; --preset=reg: SiT-XL/1 with REG
    torchrun --nproc_per_node=8 diffusion.py  # --fsdp=1: shards

The data's way at ImageNet's 256 px:

    image [3, 256, 256] and its mirror image
      |  cache_latents: tokenizer.encode, once
    latents [32, 16, 16] on disk
      |  Latents: one of the two, normalised; flow_losses: x_t = t data + (1 - t) noise, v = data - noise
    256 tokens [1152] (REG: and the VFM's class token)
      |  DiT; guided, ode, sde: dx/dt = v from noise (t = 0) to data (t = 1)
    latents [32, 16, 16]
      |  generate: normalisation undone, tokenizer.decode
    image [3, 256, 256]

LightningDiT: arXiv 2501.01423, SiT 2401.08740, REPA 2410.06940, REG 2507.01467, DiT 2212.09748; guidance 2207.12598,
its interval 2404.07724, autoguidance 2406.02507; flow on the sphere: HAE 2601.22904.
"""
import copy
import functools
import itertools
import math
import os
import re
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

# before torch, for whose threads tokenizer.py sets the environment
from tokenizer import (
    MLP, Decay, IdentityAdapter, Log, Positive, Share, ShapesText, UserError, Watch, allocate, fingerprint, grid_angles,
    init_world, lerp_unless, load_checkpoint, load_state, load_text, load_tokenizer, load_vfm, load_weights, main,
    make_loader, micro_batch, open_data, parse_config, read_json, reading, replacing, save_checkpoint, save_grid,
    seed_step, sincos_positions, step_batches, step_unless, time_steps, to_float, write_json)

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from tqdm import tqdm


@dataclass
class Config:
    preset: str = ""  # imagenet (given CUDA and data/imagenet/train), reg or toy
    out: str = "out"  # checkpoints, log, grids
    cache: str = "out"  # the toy's drawings and VFM
    resume: bool = True  # from OUT/diffusion.pt
    seed: int = 0  # of weights, batches, noise
    # data and its latents
    tokenizer: str = ""  # ours or official, RAE's decoder: FILE::VFM; empty: OUT/tokenizer.pt
    data: str = "data/imagenet"  # folder, FOLDER/{00000..00099}.tar, shapes, CIFAR10, ...
    caption_key: str = ""  # captions: this field of each NAME.json; empty: NAME.txt
    data_dir: str = "data"  # of torchvision's data sets
    download: bool = False  # if need be
    skip_bad: bool = False  # images that cannot be read: take the next, list them in OUT/bad_images.txt
    image_size: int = 0  # pixels; 0: the tokenizer's
    flip: bool = True  # encode mirror images, too: half of the items; never with text, where left would be right
    latents: str = ""  # their cache; empty: OUT/latents
    cache_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    cache_features: bool = True  # with --align: cache the VFM's tokens, or run it each step
    encode_batch: Positive = 64  # images, and their mirrors; validation's, too
    val_images: Positive = 4_096  # of the validation loss
    workers: int = 8  # loader processes
    # model
    text: str = ""  # captions, not classes: toy (their words), or load_text's encoder -> diffusion-text.pt
    model: Literal["toy", "B", "L", "XL", "1.0B", "1.6B", "2B"] = "XL"
    depth: int = 0  # 0: the model's
    hidden_size: int = 0  # likewise
    num_heads: int = 0  # likewise
    head_depth: int = 0  # blocks of a head that the others' output modulates, token by token (DDT, DiT^DH); 0: none
    head_size: int = 0  # its width; 0: hidden_size
    patch_size: Positive = 1  # latents a token's side
    arch: Literal["lightningdit", "sit"] = "lightningdit"  # RMSNorm, SwiGLU, RoPE; or LayerNorm, GELU
    qk_norm: bool = False  # of queries and keys: for long runs
    # objective
    path: Literal["linear", "sphere"] = "linear"  # sphere: tokens' directions alone, along great circles (HAE)
    times: Literal["lognormal", "uniform"] = "lognormal"  # lognormal: LightningDiT's name for logit-normal(0, 1)
    train_shift: int = 0  # more noise for wide latents, by shift_times' base (RAE: 4096; 0: none)
    uniform_from: int = 0  # uniform from this step (0: never); LightningDiT: 600000 of 700,000
    cosine_weight: float = 1.0  # of 1 - cosine(v, target)
    class_dropout: Share = 0.1  # share of labels made null
    align: Literal["none", "repa", "reg"] = "none"  # reg: REPA and a class token
    align_vfm: str = "dinov2_vitb14"  # that VFM
    encoder_depth: Positive = 8  # block, from 1, projected
    projector_dim: Positive = 2_048  # width of its head
    repa_weight: float = 0.5  # of REPA's term
    cls_weight: float = 0.03  # of REG's term
    # optimisation
    steps: Positive = 100_000  # of batch_size images: 80 epochs
    batch_size: Positive = 1_024  # images a step, of all processes
    accumulate: Positive = 1  # micro-batches a step
    lr: float = 2e-4  # of AdamW, without weight decay
    beta2: Decay = 0.95  # of its second moments
    warmup: int = 0  # steps of linear warm-up
    cooldown: Share = 0.0  # last share of the steps: linear fall to 0 (ours)
    clip: float = 1.0  # gradient norm (0: any)
    ema: Decay = 0.9999  # decay a step
    # machine
    compile: bool = torch.cuda.is_available()  # the model
    checkpointing: bool = False  # recompute blocks in the backward pass
    fsdp: bool = False  # shard all of it (FSDP2)
    bench: int = 0  # time so many steps on random latents
    peak_tflops: float = 0.0  # the device's, for MFU; 0: PEAK_TFLOPS
    # intervals, in steps
    log_interval: Positive = 100  # of the log
    val_interval: int = 5_000  # of validation (0: at the end)
    sample_interval: int = 5_000  # of grids of samples (0: none)
    save_interval: int = 5_000  # of checkpoints (0: at the end)
    keep: bool = False  # each as diffusion-STEP.pt, too


PRESETS = dict(
    imagenet={},
    toy=dict(
        data="shapes", flip=False, model="toy", align_vfm="toy", encoder_depth=2, projector_dim=256, steps=2_400,
        batch_size=64, lr=2e-3, warmup=100, cooldown=0.5, ema=0.995, encode_batch=100, val_images=2_000, workers=0,
        log_interval=50, val_interval=500, sample_interval=500, save_interval=500),
    reg=dict(  # cached features would be a terabyte
        arch="sit", qk_norm=True, times="uniform", cosine_weight=0.0, align="reg", cache_features=False))

SIZES = {  # depth, width, heads
    "toy": (4, 128, 4), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "1.0B": (24, 1536, 24),
    "1.6B": (28, 1792, 28), "2B": (26, 2048, 16)}

# --------------------------------------
# The transformer. Parameters are named as in LightningDiT's and REG's checkpoints

class RMSNorm(nn.RMSNorm):
    """In float32, as autocast's LayerNorm."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def rotate(x, cos, sin):
    """Rotary embedding of x [B, N, heads, d]: channels (a, b) turn by angles [N, 1, d / 2]. The result has all a before
    all b, which q k^T does not see."""
    a = x[..., 0::2]
    b = x[..., 1::2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class DiTAttention(nn.Module):
    def __init__(self, dim, num_heads, norm):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = norm(dim // num_heads)
        self.k_norm = norm(dim // num_heads)

    def forward(self, x, rope):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [B, N, heads, d]
        q = self.q_norm(q)
        k = self.k_norm(k)
        if rope is not None:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        q = q.to(v.dtype).transpose(1, 2)  # [B, heads, N, d]
        k = k.to(v.dtype).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v.transpose(1, 2))
        return self.proj(x.transpose(1, 2).flatten(2))  # [B, N, D]


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, -1)  # [B, N, hidden]
        return self.w3(F.silu(a) * b)  # [B, N, D]


class DiTBlock(nn.Module):
    def __init__(self, dim, num_heads, mlp, norm, head_norm):
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = DiTAttention(dim, num_heads, head_norm)
        self.norm2 = norm(dim)
        self.mlp = mlp()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, rope):  # [B, N, D], [B, 1 or in a head N, D]
        # bf16 would round 1 + scale to 1/128
        modulation = self.adaLN_modulation(c).float()  # [B, 1 or N, 6 D]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rope)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


FREQUENCIES = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128)  # ADM's sinusoids


class TimestepEmbedder(nn.Module):
    """fourier: so many fixed random frequencies W (RAE), else ADM's."""

    def __init__(self, dim, fourier=0):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * fourier or 256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.register_buffer("W", torch.randn(fourier) if fourier else None)
        self.register_buffer("frequencies", FREQUENCIES.float(), persistent=False)

    def forward(self, t):  # [B], 0 to 1, unscaled
        frequencies = self.frequencies if self.W is None else 2 * math.pi * self.W
        angles = t.float()[:, None] * frequencies  # [B, 128 or fourier]
        return self.mlp(torch.cat((angles.cos(), angles.sin()), -1))  # [B, D]


class TextEmbedder(nn.Module):
    """Captions for the DiT (ours, after FLUX and PixArt): y, an encoder's states [B, L (+ 1, the pooled one), dim] or
    with a `vocabulary` ids [B, L] -> tokens [B, L, D], what its pooled state adds to adaLN's condition [B, D] or 0. No
    mask: lengths are fixed, pads are attended."""

    def __init__(self, width, length, dim, pooled, vocabulary):
        super().__init__()
        self.length = length
        self.embedding = None
        self.pool = None
        norm = functools.partial(RMSNorm, eps=1e-6)
        if vocabulary:
            self.embedding = nn.Embedding(vocabulary, dim)
            self.positions = nn.Parameter(torch.randn(length, dim) * 0.02)
        else:  # the encoder's states of an empty caption
            self.register_buffer("null", torch.zeros(length + pooled, dim))
        self.mlp = nn.Sequential(norm(dim), nn.Linear(dim, width), nn.GELU("tanh"), nn.Linear(width, width))
        if pooled:
            self.pool = nn.Sequential(norm(dim), nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, y):
        if self.embedding is not None:
            y = self.embedding(y) + self.positions  # [B, L, dim]
        pooled = self.pool(y[:, self.length]) if self.pool is not None else 0  # [B, D]
        return self.mlp(y[:, :self.length]), pooled  # [B, L, D]


class FinalLayer(nn.Module):
    def __init__(self, dim, out, cls_dim, norm):
        super().__init__()
        self.norm_final = norm(dim)
        self.linear = nn.Linear(dim, out)
        self.linear_cls = nn.Linear(dim, cls_dim) if cls_dim else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):  # [B, (1 +) N, D], [B, 1 or N, D]
        shift, scale = self.adaLN_modulation(c).float().chunk(2, -1)  # [B, 1 or N, D]
        x = modulate(self.norm_final(x), shift, scale)
        if self.linear_cls is None:
            return self.linear(x), None  # [B, N, p p C]
        return self.linear(x[:, 1:]), self.linear_cls(x[:, 0])  # [B, N, p p C], [B, cls_dim]


class DiT(nn.Module):
    """model(x, t, y) -> v: latents x [B, C, S, S] (or smaller), times t [B] from 0 (noise) to 1 (data), classes y [B]
    (num_classes: null) or captions (text_tokens > 0: see TextEmbedder), velocity v = data - noise. cls [B, cls_dim]:
    REG's class token, noised. With it (cls_dim > 0) or REPA's head (z_dim > 0): -> (v, v_cls [B, cls_dim] or None,
    projection [B, (1 +) N, z_dim] or None). blocks=True: -> each block's tokens [B, (1 +) N, D].

    head_depth: so many blocks more, of width head_size, embed x anew (x_embedder; the others' is then s_embedder) and
    are modulated, token by token, by SiLU(time + the others' output) (DDT, arXiv 2504.05741, section 3; RAE's DiT^DH,
    2510.11690, section 5). kept: a dictionary that keeps that output by batch size; once there, it is not computed.

    sphere: it learns `geodesic`'s flow, and `ode` follows great circles."""

    def __init__(
            self, input_size=16, in_channels=32, patch_size=1, hidden_size=1152, depth=28, num_heads=16,
            num_classes=1000, arch="lightningdit", mlp_hidden=0, qk_norm=False, cls_dim=0, z_dim=0, projector_dim=2048,
            encoder_depth=8, text_tokens=0, text_dim=0, text_pooled=False, vocabulary=0, head_depth=0, head_size=0,
            head_heads=0, fourier=0, sphere=False):
        super().__init__()
        H = head_size or hidden_size
        head_heads = head_heads or (num_heads if H == hidden_size else max(1, H // 128))  # RAE's: 128 channels each
        if input_size % patch_size or hidden_size % (4 * num_heads) or H % (4 * head_heads):
            raise UserError(
                f"{patch_size=} must divide {input_size=}, 4 x {num_heads=} {hidden_size=}, 4 x {head_heads=} "
                f"head_size={H}")
        if cls_dim and head_depth:
            raise UserError("REG's class token has no place in a head: --align=reg or --head_depth")
        self.input_size = input_size
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.grid = input_size // patch_size
        self.num_classes = num_classes
        self.cls_dim = cls_dim
        self.text_tokens = text_tokens
        self.encoder_depth = encoder_depth
        self.depth = depth
        self.head_depth = head_depth
        self.sphere = sphere
        self.checkpointing = False
        D = hidden_size
        if arch == "lightningdit":
            norm = qk = functools.partial(RMSNorm, eps=1e-6)
        else:
            norm = functools.partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6)
            qk = nn.LayerNorm
        if not qk_norm:
            qk = nn.Identity

        def block(dim, heads, hidden):
            if arch == "lightningdit":
                mlp = functools.partial(SwiGLU, dim, hidden or int(2 / 3 * 4 * dim))
            else:
                mlp = functools.partial(MLP, dim, hidden or 4 * dim, "gelu_tanh")
            return DiTBlock(dim, heads, mlp, norm, qk)

        def embedder(dim):
            return nn.ModuleDict(dict(proj=nn.Conv2d(in_channels, dim, patch_size, patch_size)))

        self.x_embedder = embedder(H if head_depth else D)
        self.t_embedder = TimestepEmbedder(D, fourier)
        if text_tokens:
            self.text_embedder = TextEmbedder(D, text_tokens, text_dim, text_pooled, vocabulary)
        else:
            self.y_embedder = nn.ModuleDict(dict(embedding_table=nn.Embedding(num_classes + 1, D)))
        self.blocks = nn.ModuleList(block(D, num_heads, mlp_hidden) for _ in range(depth))
        if head_depth:
            self.s_embedder = embedder(D)
            self.s_projector = nn.Linear(D, H) if H != D else nn.Identity()
            self.blocks.extend(block(H, head_heads, 0) for _ in range(head_depth))
        self.final_layer = FinalLayer(H if head_depth else D, patch_size ** 2 * in_channels, cls_dim, norm)
        if cls_dim:
            self.cls_projectors2 = nn.Linear(cls_dim, D)
            self.wg_norm = nn.LayerNorm(D, eps=1e-6)
        self.projectors = nn.ModuleList()
        if z_dim:
            self.projectors.append(nn.Sequential(
                nn.Linear(D, projector_dim), nn.SiLU(), nn.Linear(projector_dim, projector_dim), nn.SiLU(),
                nn.Linear(projector_dim, z_dim)))
        self.register_buffer("pos_embed", sincos_positions(self.grid, D), persistent=False)
        for name, head_dim in ("rope_angles", D // num_heads), ("head_angles", H // head_heads):
            angles = torch.cat(grid_angles(self.grid, head_dim // 4), -1).float()  # half by row, half by column
            self.register_buffer(name, angles if arch == "lightningdit" else None, persistent=False)
        self.initialize()

    def initialize(self):
        """DiT's: Xavier, normal 0.02 for embeddings, zero adaLN and output."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for part in (*self.blocks, self.final_layer):
            nn.init.zeros_(part.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        if self.cls_dim:
            nn.init.zeros_(self.final_layer.linear_cls.weight)

    def null(self, n):
        """y of n images without class or caption."""
        device = self.pos_embed.device
        if not self.text_tokens:
            return torch.full((n,), self.num_classes, device=device)
        if self.text_embedder.embedding is not None:
            return torch.zeros(n, self.text_tokens, dtype=torch.long, device=device)
        return self.text_embedder.null.expand(n, -1, -1)

    def walk(self, blocks, x, c, angles):
        """-> tokens after each block. angles [h, w, d / 2]: of the last h w tokens, or None."""
        rope = None
        if angles is not None:
            angles = angles.flatten(0, 1)[:, None]  # [N, 1, d / 2]
            angles = F.pad(angles, (0, 0, 0, 0, x.shape[1] - len(angles), 0))
            rope = angles.cos(), angles.sin()
        for block in blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, c, rope, use_reentrant=False)
            else:
                x = block(x, c, rope)  # [B, L + (1 +) N, D]
            yield x

    def forward(self, x, t, y, cls=None, blocks=False, kept=None):
        p = self.patch_size
        h = x.shape[2] // p
        w = x.shape[3] // p
        rope_angles, head_angles = (a if a is None else a[:h, :w] for a in (self.rope_angles, self.head_angles))
        latents = x
        c = time = self.t_embedder(t)  # [B, D]
        states = []
        projection = None
        if self.head_depth and kept and len(x) in kept:
            x = kept[len(x)]
        else:
            embedder = self.s_embedder if self.head_depth else self.x_embedder
            x = embedder["proj"](x).flatten(2).transpose(1, 2)  # [B, N, D]
            x = x + self.pos_embed[:h, :w].flatten(0, 1)
            if self.cls_dim:  # first, without a position
                token = self.wg_norm(self.cls_projectors2(cls))  # [B, D]
                x = torch.cat((token[:, None], x), 1)  # [B, 1 + N, D]
            if self.text_tokens:  # before all, without positions
                text, pooled = self.text_embedder(y)
                c = c + pooled
                x = torch.cat((text.to(x.dtype), x), 1)  # [B, L + (1 +) N, D]
            else:
                c = c + self.y_embedder["embedding_table"](y)
            c = c[:, None]  # [B, 1, D]
            trunk = F.silu(c) if self.head_depth else c  # RAE's, before adaLN's own
            for i, x in enumerate(self.walk(self.blocks[:self.depth], x, trunk, rope_angles), 1):
                if blocks:
                    states.append(x[:, self.text_tokens:])
                if self.projectors and i == self.encoder_depth:
                    projection = self.projectors[0](x[:, self.text_tokens:])  # [B, (1 +) N, z_dim]
            x = x[:, self.text_tokens:]
            if kept is not None:
                kept[len(x)] = x
        if self.head_depth:
            c = self.s_projector(F.silu(time[:, None] + x))  # [B, N, H]
            x = self.x_embedder["proj"](latents).flatten(2).transpose(1, 2)  # [B, N, H]
            for x in self.walk(self.blocks[self.depth:], x, c, head_angles):
                if blocks:
                    states.append(x)
        if blocks:
            return states
        v, v_cls = self.final_layer(x, c)  # [B, N, p p C], [B, cls_dim]
        v = v.view(-1, h, w, p, p, self.in_channels).permute(0, 5, 1, 3, 2, 4)  # [B, C, h, p, w, p]
        v = v.flatten(4).flatten(2, 3).contiguous()  # [B, C, S, S]
        return (v, v_cls, projection) if self.cls_dim or self.projectors else v

    def flops(self):
        """Of an image's forward pass, matrix products alone."""
        image = self.grid ** 2 + (self.cls_dim > 0)
        tokens = self.text_tokens + image
        products = 2 * self.depth * tokens ** 2 * self.pos_embed.shape[-1]  # attention
        products += 2 * self.head_depth * image ** 2 * len(self.x_embedder["proj"].weight)
        for name, weight in self.named_parameters():
            if weight.ndim > 1 and not re.search(r"y_embedder|embedding|positions", name):
                count = tokens
                block = re.match(r"blocks\.(\d+)", name)
                if self.head_depth and re.match("final|s_projector", name) or block and int(block[1]) >= self.depth:
                    count = image
                elif re.search(r"\bt_embedder|adaLN|cls|pool", name):
                    count = 1
                elif "text" in name:
                    count = self.text_tokens
                elif re.search("x_embedder|s_embedder|final|projectors", name):
                    count = image
                products += weight.numel() * count
        return 2 * products


# --------------------------------------
# The flow: objective and solvers

def to_sphere(x):
    """Tokens, of [B, C, S, S], at norm sqrt(C)."""
    return F.normalize(x, dim=1) * x.shape[1] ** 0.5


def radial(v, x):
    """v's part along tokens x of norm sqrt(C), each [B, C, S, S]."""
    return (v * x).mean(1, keepdim=True) * x


def geodesic(noise, latents, t):
    """-> x_t, its velocity dx/dt, each [B, C, S, S]: from noise to latents at constant speed along great circles of the
    sphere of norm sqrt(C), where both are put token by token (HAE, arXiv 2601.22904). t: [B, 1, 1, 1]."""
    start = to_sphere(noise)
    end = to_sphere(latents)
    side = to_sphere(end - radial(end, start))  # at right angles to start
    angle = torch.atan2((end * side).mean(1, keepdim=True), (end * start).mean(1, keepdim=True))  # [B, 1, S, S]
    cos = (t * angle).cos()
    sin = (t * angle).sin()
    return cos * start + sin * side, angle * (cos * side - sin * start)


def geodesic_step(x, move):
    """x on the sphere, moved along the great circle by the tangent part of `move`, each [B, C, S, S]."""
    move = move - radial(move, x)
    angle = move.square().mean(1, keepdim=True).sqrt()  # length / sqrt(C)
    return angle.cos() * x + angle.sin() * to_sphere(move)


def flow_losses(model, latents, labels, t, noise, tokens=None, cls_noise=None, sphere=False):
    """The objective's terms [B] at x_t = t latents + (1 - t) noise, unweighted. latents [B, C, S, S]: normalised;
    labels: the DiT's y, after dropout; sphere: x_t is `geodesic`'s, errors are of v's tangent part, and `velocity` has
    0.1 |radial part|^2 more (HAE's weight).

    velocity: squared error; cosine: 1 - cos over channels (LightningDiT); repa: - cos(projection, the
    VFM's `tokens` [B, (1 +) N, D] of the clean images) (REPA eq. 8); cls: velocity error of the class token
    tokens[:, 0], noised with `cls_noise` [B, D] (REG)."""
    if sphere:
        x, target = geodesic(noise, latents, t.view(-1, 1, 1, 1))
    else:
        x = torch.lerp(noise, latents, t.view(-1, 1, 1, 1))  # [B, C, S, S]
        target = latents - noise
    if cls_noise is None:
        out = model(x, t, labels)
    else:
        out = model(x, t, labels, torch.lerp(cls_noise, tokens[:, 0], t[:, None]))
    v, v_cls, projection = out if isinstance(out, tuple) else (out, None, None)
    v = v.float()
    if sphere:
        outward = radial(v, x)
        v = v - outward
    losses = dict(
        velocity=(v - target).square().mean((1, 2, 3)),
        cosine=1 - F.cosine_similarity(v, target, dim=1).mean((1, 2)))
    if sphere:
        losses["velocity"] = losses["velocity"] + 0.1 * outward.square().mean((1, 2, 3))
    if v_cls is not None:
        losses["cls"] = (v_cls.float() - (tokens[:, 0] - cls_noise)).square().mean(1)
    if projection is not None:
        clean = tokens[:, -projection.shape[1]:]  # with the model's class token only
        losses["repa"] = -F.cosine_similarity(projection.float(), clean, dim=-1).mean(1)
    return losses


def shift_times(t, shift, base=0, model=None):
    """t -> s t / (1 + (s - 1) t), s = `shift` (0: t itself). With a base: s = sqrt(base / numbers in the model's
    latents) where that is below 1, else no shift (RAE, arXiv 2510.11690, section 4: wide latents need more noise)."""
    if base:
        shift = math.sqrt(base / (model.in_channels * model.input_size ** 2))
        shift = shift if shift < 1 else 0
    return t / (t + (1 - t) / shift) if shift > 0 else t  # 1 stays 1


def draw_times(n, step, cfg, model):
    """[n], logit-normal(0, 1), as Stable Diffusion 3's, or uniform; maybe shifted."""
    device = model.pos_embed.device
    if cfg.times == "uniform" or 0 < cfg.uniform_from <= step:
        t = torch.rand(n, device=device)
    else:
        t = torch.randn(n, device=device).sigmoid()
    return shift_times(t, 0, cfg.train_shift, model)


def guided(
        model, state, t, y, cfg_scale=1.0, cfg_interval=(0.0, 1.0), cfg_channels=0, cls_cfg_scale=0.0, guide=None,
        negative=None, kept=(None, None)):
    """Velocities of state = [x] or [x, REG's class token] at time t: other + scale (conditional - other) in
    cfg_interval, else conditional. The other: of y = `negative` (None: the null class or caption), in the same batch,
    or the weaker model `guide`'s (autoguidance). cfg_channels: the first so many (0: all); cls_cfg_scale: of the class
    token (0: none). kept: two dictionaries, the model's and the guide's `kept` (see DiT)."""
    ours, theirs = [{} if each is None else dict(kept=each) for each in kept]

    def evaluate(net, state, y, keywords=ours):
        x, *cls = (s.float() for s in state)
        out = net(x, torch.full((len(y),), t, device=y.device), y, *cls, **keywords)
        return [v.to(s.dtype) for v, s in zip(out if isinstance(out, tuple) else [out], state)]

    low, high = cfg_interval
    if cfg_scale == 1 or not low <= t <= high:
        return evaluate(model, state, y)
    if guide is None:
        if negative is not None:
            other = negative.expand_as(y)
        else:
            other = torch.full_like(y, model.num_classes) if y.ndim == 1 else model.null(len(y))
        both = evaluate(model, [torch.cat((s, s)) for s in state], torch.cat((y, other.to(y.dtype))))
        own, other = zip(*(v.chunk(2) for v in both))
    else:
        own = evaluate(model, state, y)
        other = evaluate(guide, state, y, theirs)
    v, *v_cls = own  # [B, C, S, S], maybe [B, cls_dim]
    v = v.clone()
    k = cfg_channels or v.shape[1]
    v[:, :k] = torch.lerp(other[0][:, :k], v[:, :k], cfg_scale)
    if v_cls and cls_cfg_scale:
        v_cls = [torch.lerp(other[1], v_cls[0], cls_cfg_scale)]
    return [v, *v_cls]


def check_solver(model, solver, num_steps):
    if getattr(model, "sphere", False) and solver != "euler":
        raise UserError(f"{solver=}: for models of --path=sphere there is euler alone")
    if solver not in ("euler", "heun", "ab2", "sde") or num_steps < 1 + (solver != "sde"):
        raise UserError(f"{solver=}, {num_steps=}: there are euler, heun and ab2 from 2 times, sde from 1")


def ode(
        model, noise, y, num_steps=250, timestep_shift=0.0, cls_noise=None, solver="euler", train_shift=0,
        reuse=1, **guidance):
    """Latents [B, C, S, S] of classes y [B] from noise along dx/dt = v(x, t, y), t at linspace(0, 1, num_steps), mapped
    by shift_times(t, timestep_shift, train_shift); REG's class token from cls_noise [B, D]. solver: "euler", "heun"
    (two evaluations a step), "ab2" (Adams-Bashforth); where model.sphere, Euler's along great circles alone. reuse: so
    many evaluations in a row share what a model with a head keeps (DDT, section 3.3). guidance: of `guided`."""
    check_solver(model, solver, num_steps)
    sphere = getattr(model, "sphere", False)  # a model may be any function
    times = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    times = shift_times(times, timestep_shift, train_shift, model).tolist()
    kept = ({}, {}) if reuse > 1 else (None, None)
    evaluations = itertools.count()

    def velocity(state, t):
        if reuse > 1 and next(evaluations) % reuse == 0:
            for each in kept:
                each.clear()
        return guided(model, state, t, y, kept=kept, **guidance)

    noise = to_sphere(noise) if sphere else noise
    state = [s for s in (noise, cls_noise) if s is not None]
    before = None  # the last step's
    h_before = None
    for t, after in zip(times, times[1:]):
        h = after - t
        v = velocity(state, t)
        slope = v
        if solver == "heun":
            ahead = [x + h * d for x, d in zip(state, v)]
            slope = [(a + b) / 2 for a, b in zip(v, velocity(ahead, after))]
        elif solver == "ab2" and before:
            slope = [a + (a - b) * (h / h_before / 2) for a, b in zip(v, before)]
        moved = [x + h * d for x, d in zip(state, slope)]
        if sphere:
            moved[0] = geodesic_step(state[0], h * slope[0])
        state = moved
        before = v
        h_before = h
    return state[0]


def velocity_to_score(v, x, t):
    """-E[noise] / (1 - t) at x_t, the noise being x - t v (SiT, appendix A)."""
    return (t * v - x) / (1 - t)


def sde(model, noise, y, num_steps=250, cls_noise=None, generator=None, **guidance):
    """REG's Euler-Maruyama: latents, as by `ode`, along dx = (v + (1 - t) score) dt + sqrt(2 (1 - t)) dW, t at
    linspace(0, 0.96, num_steps), then 1, in float64; noise after all evaluations but the last. `generator`: a
    torch.Generator, or a callable: tensor -> noise like it."""
    check_solver(model, "sde", num_steps)

    def draw(like):
        if callable(generator):
            return generator(like)
        return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)

    state = [s.double() for s in (noise, cls_noise) if s is not None]
    times = torch.linspace(0, 0.96, num_steps, dtype=torch.float64).tolist() + [1.0]
    for t, after in zip(times, times[1:]):
        h = after - t
        # drifts are affine in velocities: guided, too
        v = guided(model, state, t, y, **guidance)
        state = [x + h * (d + (1 - t) * velocity_to_score(d, x, t)) for x, d in zip(state, v)]
        if after < 1:
            state = [x + (2 * (1 - t) * h) ** 0.5 * draw(x) for x in state]
    return state[0].float()


class ImageNoise:
    """Gaussian noise of (seed, image index) alone: called with a tensor [B, ...], each image's next."""

    def __init__(self, seed, indices):
        self.generators = []
        for i in indices:
            word, = np.random.SeedSequence((seed, int(i))).generate_state(1, np.uint64)
            self.generators.append(torch.Generator().manual_seed(int(word)))

    def __call__(self, like):
        rows = [torch.randn(like.shape[1:], generator=g, dtype=like.dtype) for g in self.generators]
        return torch.stack(rows).to(like.device, non_blocking=True)


def maps(statistics):
    """Latents' mean or std [C] -> [C, 1, 1]; RAE's [C, h, w] as they are."""
    return statistics.view(*statistics.shape, 1, 1) if statistics.ndim == 1 else statistics


@dataclass
class Sampling:
    """What `generate` reads."""
    seed: int = 0
    solver: str = "euler"
    num_steps: int = 250
    cfg_scale: float = 1.0
    cfg_interval: tuple[float, ...] = (0.0, 1.0)
    cfg_channels: int = 0
    timestep_shift: float = 0.0
    train_shift: int = 0
    reuse: int = 1
    cls_cfg_scale: float = 0.0


@torch.no_grad()
def generate(model, tokenizer, mean, std, indices, y, cfg, world, guide=None, rows=16, negative=None):
    """Images [B, 3, H, W] in [-1, 1] of classes y [B] or captions, by the latents' mean, std [C] or [C, S, S]. Image i
    is a function of (cfg.seed, indices[i], y[i]), not its batch: `rows` at least are computed, as BLAS rounds otherwise
    for few."""
    device = world.device
    some = np.arange(max(rows, len(y))) % len(y)
    noise = ImageNoise(cfg.seed, np.asarray(indices)[some])
    x = noise(torch.empty(len(some), model.in_channels, model.input_size, model.input_size, device=device))
    cls = noise(torch.empty(len(some), model.cls_dim, device=device)) if model.cls_dim else None
    labels = y[some].to(device)
    guidance = dict(
        cfg_scale=cfg.cfg_scale, cfg_interval=cfg.cfg_interval, cls_cfg_scale=cfg.cls_cfg_scale, guide=guide,
        negative=negative)
    with world.autocast():
        if cfg.solver == "sde":
            z = sde(model, x, labels, cfg.num_steps, cls, noise, **guidance)  # [B, C, S, S]
        else:
            z = ode(
                model, x, labels, cfg.num_steps, cfg.timestep_shift, cls, cfg.solver, cfg.train_shift, cfg.reuse,
                cfg_channels=cfg.cfg_channels, **guidance)
    z = z * maps(std.to(device)) + maps(mean.to(device))
    return tokenizer.decode(z[:max(16, len(y))]).float()[:len(y)]


# --------------------------------------
# Checkpoints, ours and official

def turn_round(weights):
    """REPA, REG and RAE learn v = noise - data from data (0) to noise (1). Ours is an exact change of weights: the
    outputs' signs, and in the time embedding cos((1-t)f) = cos(f) cos(tf) + sin(f) sin(tf), likewise the sine."""
    frequencies = FREQUENCIES
    a, b = weights["t_embedder.mlp.0.weight"].double().chunk(2, 1)  # cosines, sines
    if "t_embedder.W" in weights:  # RAE's: sines, cosines
        frequencies = 2 * math.pi * weights["t_embedder.W"].double()
        b, a = a, b
    cos = frequencies.cos()
    sin = frequencies.sin()
    turned = {**weights, "t_embedder.mlp.0.weight": torch.cat((a * cos + b * sin, a * sin - b * cos), 1).to(a)}
    for key, value in weights.items():
        if key.startswith("final_layer.linear"):
            turned[key] = -value
    return turned


def official_arch(weights):
    """DiT arguments of an official state dict; heads, without QK norm, are the published models'."""
    shape = {key: tuple(value.shape) for key, value in weights.items()}
    head = "s_embedder.proj.weight" in shape  # RAE's DiT^DH
    D, channels, p, _ = shape[f"{'s' if head else 'x'}_embedder.proj.weight"]
    sit = "blocks.0.mlp.fc1.weight" in shape
    arch = dict(
        hidden_size=D, in_channels=channels, patch_size=p, arch="sit" if sit else "lightningdit",
        depth=len({key.split(".")[1] for key in shape if key.startswith("blocks.")}),
        num_classes=shape["y_embedder.embedding_table.weight"][0] - 1,
        mlp_hidden=shape["blocks.0.mlp.fc2.weight" if sit else "blocks.0.mlp.w3.weight"][1],
        qk_norm="blocks.0.attn.q_norm.weight" in shape, cls_dim=shape.get("cls_projectors2.weight", (0, 0))[1],
        projector_dim=shape.get("projectors.0.0.weight", (2048,))[0], z_dim=shape.get("projectors.0.4.weight", (0,))[0],
        num_heads={width: heads for _, width, heads in SIZES.values()}.get(D, D // 64))
    if arch["qk_norm"]:
        arch["num_heads"] = D // shape["blocks.0.attn.q_norm.weight"][0]
    if head:
        last = arch["depth"] - 1
        arch["head_size"] = H = shape["x_embedder.proj.weight"][0]
        widths = [shape[f"blocks.{i}.attn.proj.weight"][0] for i in range(last + 1)]
        arch["head_depth"] = widths.count(H) if H != D else 2
        arch["depth"] -= arch["head_depth"]
        arch["fourier"] = shape.get("t_embedder.W", (0,))[0]
        if arch["qk_norm"]:
            arch["head_heads"] = H // shape[f"blocks.{last}.attn.q_norm.weight"][0]
    if "pos_embed" in shape:
        arch["input_size"] = p * math.isqrt(shape["pos_embed"][1])  # floor: maybe a class token
    return arch


def load_diffusion(path, **overrides):
    """A DiT with EMA weights, in eval mode on the CPU, of our checkpoint or an official LightningDiT, REPA, REG or RAE
    file ({"ema": ...}, {"model": ...} or a bare state dict), in our time. `overrides`: what official files do not tell
    (num_heads, head_heads, encoder_depth, input_size). `model.about`: what else ours says (latent_mean, latent_std,
    tokenizer, classes, step, config)."""
    entries = load_weights(path)
    about = {}
    with reading(path):
        if entries.get("kind", "diffusion") != "diffusion":
            raise UserError(f"{path} is a {entries['kind']} checkpoint, not a diffusion model")
        if "kind" in entries:
            state = entries["ema"]
            arch = entries["arch"]
            about = {key: value for key, value in entries.items() if key not in ("model", "ema", "optimizer")}
        else:
            state = {}
            for key, value in entries.get("ema", entries.get("model", entries)).items():
                key = re.sub(r"^((module|model|_orig_mod)\.)+", "", key)
                key = re.sub(r"^t_embedder\.\w+$", "t_embedder.W", key)
                if torch.is_tensor(value) and not re.match(r"\w*feat_rope\.", key):  # tables
                    state[key] = value
            if "x_embedder.proj.weight" not in state:
                raise UserError(f"{path} is no LightningDiT, REPA, REG or RAE: it lacks x_embedder.proj.weight")
            arch = official_arch(state)
            state = turn_round(state) if arch["arch"] == "sit" or "head_depth" in arch else state
            state.pop("pos_embed", None)
        with torch.device("meta"):
            model = DiT(**{**arch, **overrides})
        state = {key: value.float() for key, value in state.items()}
    load_state(model, state, str(path), assign=True)
    model.about = about
    return model.eval()


# --------------------------------------
# Training

def model_arch(cfg, channels, side, num_classes, vfm_dim, text=None):
    """DiT arguments by the flags; vfm_dim: width of the tokens to align with, or 0; text: ShapesText or load_text's."""
    depth, width, heads = SIZES[cfg.model]
    depth = cfg.depth or depth
    if vfm_dim and cfg.encoder_depth > depth:
        raise UserError(f"--encoder_depth={cfg.encoder_depth} of {depth} blocks")
    if cfg.fsdp and "RANK" not in os.environ:
        raise UserError("--fsdp=1 shards over torchrun's processes: torchrun --nproc_per_node=8 diffusion.py --fsdp=1")
    arch = dict(
        input_size=side, in_channels=channels, patch_size=cfg.patch_size, hidden_size=cfg.hidden_size or width,
        depth=depth, num_heads=cfg.num_heads or heads, num_classes=num_classes, arch=cfg.arch, qk_norm=cfg.qk_norm,
        cls_dim=vfm_dim if cfg.align == "reg" else 0, z_dim=vfm_dim, projector_dim=cfg.projector_dim,
        encoder_depth=cfg.encoder_depth)
    if cfg.head_depth:
        arch.update(head_depth=cfg.head_depth, head_size=cfg.head_size)
    if cfg.path == "sphere":
        arch["sphere"] = True
    if text:
        vocabulary = len(text.words) + 1 if isinstance(text, ShapesText) else 0
        if not vocabulary and text.pooled_dim != text.dim:
            raise UserError(f"--text={cfg.text}: its pooled state is {text.pooled_dim} wide, its tokens {text.dim}")
        arch.update(
            num_classes=0, qk_norm=True, text_tokens=text.length, vocabulary=vocabulary,
            text_dim=arch["hidden_size"] if vocabulary else text.dim,
            text_pooled=not vocabulary)
    with torch.device("meta"):
        DiT(**arch)  # complains before hours of encoding
    return arch


def build(cfg, world, arch, saved=None):
    """-> (model, parallel model, EMA, optimizer), from a checkpoint's entries if `saved`."""
    seed_step(cfg.seed, -1)
    model = DiT(**arch).to(world.device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if saved:
        load_state(model, saved["model"], saved.path)
        load_state(ema, saved["ema"], saved.path)
    model.checkpointing = cfg.checkpointing
    cuda = world.device.type == "cuda"
    if cfg.compile:
        # parallel: gradients leave and weights arrive block by block
        for module in [model] if world.size == 1 and not cfg.fsdp else model.blocks:
            module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False)
    parallel = model
    if cfg.fsdp:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # here: it takes seconds
        policy = MixedPrecisionPolicy(torch.bfloat16 if cuda else None, torch.float32, cast_forward_inputs=False)
        for part in (*model.blocks, model, *ema.blocks, ema):
            fully_shard(part, mp_policy=policy, reshard_after_forward=True)
    elif world.size > 1:
        devices = [world.device] if cuda else None
        parallel = DistributedDataParallel(model, devices, broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, (0.9, cfg.beta2), weight_decay=0, fused=True)
    if saved:
        from torch.distributed.checkpoint import state_dict
        options = state_dict.StateDictOptions(full_state_dict=True)
        with reading(saved.path):
            state_dict.set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)
            optimizer.param_groups[0]["betas"] = 0.9, cfg.beta2  # this run's
    return model, parallel, ema, optimizer


def full_state(model, ema, optimizer):
    """CPU state dicts; if sharded, on rank 0 alone."""
    from torch.distributed.checkpoint import state_dict
    options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = state_dict.get_state_dict(model, optimizer, options=options)
    return dict(model=weights, ema=state_dict.get_model_state_dict(ema, options=options), optimizer=moments)


def update_ema(ema, model, decay, skipped):
    """ema <- decay ema + (1 - decay) model, unless the step was skipped. The buffers are constants."""
    lerp_unless(skipped, list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - decay)


def learning_rate(cfg, step):
    rate = cfg.lr * min(1, (step + 1) / max(1, cfg.warmup))
    if cfg.cooldown:
        rate = min(rate, cfg.lr * (cfg.steps - step) / (cfg.cooldown * cfg.steps))
    return rate


def train_step(model, parallel, ema, optimizer, batches, cfg, world, step):
    """A step on batches dict(latents, labels, tokens) -> this process's losses, "skipped": 1 if not finite, else 0."""
    weights = dict(velocity=1.0, cosine=cfg.cosine_weight, cls=cfg.cls_weight, repa=cfg.repa_weight)
    optimizer.param_groups[0]["lr"] = learning_rate(cfg, step)
    totals = {}
    for k, batch in enumerate(batches, 1):
        x = batch["latents"]
        tokens = batch["tokens"]
        labels = batch["labels"]
        dropped = torch.rand(len(x), device=world.device) < cfg.class_dropout
        labels = torch.where(dropped.view(-1, *[1] * (labels.ndim - 1)), model.null(len(x)).to(labels.dtype), labels)
        cls_noise = torch.randn_like(tokens[:, 0]) if model.cls_dim else None
        t = draw_times(len(x), step, cfg, model)
        if cfg.fsdp:
            parallel.set_requires_gradient_sync(k == cfg.accumulate)
        elif parallel is not model:
            parallel.require_backward_grad_sync = k == cfg.accumulate
        with world.autocast():
            losses = flow_losses(parallel, x, labels, t, torch.randn_like(x), tokens, cls_noise, model.sphere)
        losses = {name: value.mean() for name, value in losses.items()}
        losses["loss"] = sum(weights[name] * value for name, value in losses.items())
        (losses["loss"] / cfg.accumulate).backward()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0) + value.detach() / cfg.accumulate
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
    if cfg.fsdp:
        ema.reshard()  # sampling unshards its root
        norm = norm.full_tensor()
    totals["grad_norm"] = norm
    skipped = world.any_bad(totals.values())
    step_unless(skipped, optimizer)
    update_ema(ema, model, cfg.ema, skipped)
    return dict(totals, skipped=skipped)


@torch.no_grad()
def caption_states(text, ids):
    """The DiT's y of captions' ids [B, L]: the toy's themselves, else the encoder's states, the pooled one last."""
    if isinstance(text, ShapesText):
        return ids.long()
    tokens, pooled = text.encode(ids)  # [B, L, D], [B, D]
    return torch.cat((tokens, pooled[:, None]), 1)


def normalise_rows(rows, mean, std, text=None):
    """Cache rows -> dict(latents, labels: the DiT's y, tokens or None), float32, on mean's device; mean, std: maps.
    """
    rows = {name: value.to(mean.device, non_blocking=True) for name, value in rows.items()}
    tokens = rows["features"].float() if "features" in rows else None  # [B, (1 +) N, D]
    labels = caption_states(text, rows["labels"]) if text else rows["labels"]
    return dict(latents=(rows["latents"].float() - mean) / std, labels=labels, tokens=tokens)


@torch.no_grad()
def validate(model, val, mean, std, world, batch, text=None):
    """Mean losses on held-out latents; an item's time and noise depend on its index alone."""
    mine = torch.arange(world.rank, len(val) // world.size * world.size, world.size)
    totals = {}
    for index in mine.split(batch):
        data = normalise_rows(val.read(index, torch.zeros_like(index)), mean, std, text)
        x = data["latents"]
        noise = ImageNoise(0, index)
        t = (index.double() * 0.6180339887498949 % 1).float().to(world.device)  # golden ratio
        cls_noise = noise(data["tokens"][:, 0]) if model.cls_dim else None
        with world.autocast():
            losses = flow_losses(model, x, data["labels"], t, noise(x), data["tokens"], cls_noise, model.sphere)
        for name, value in losses.items():
            totals[name] = totals.get(name, 0) + value.sum() / len(mine)
    return {f"val_{name}": world.mean(value) for name, value in totals.items()}


def train(cfg, world):
    """Caches latents, trains or goes on -> OUT/diffusion.pt, OUT/log.jsonl, OUT/grids."""
    out = Path(cfg.out)
    stem = "diffusion-text" if cfg.text else "diffusion"
    path = out / f"{stem}.pt"
    source = cfg.tokenizer or f"{out}/tokenizer.pt"
    if not os.path.exists(source.partition("::")[0]):
        raise UserError(f"no {source}: run tokenizer.py first, or give --tokenizer")

    # data
    tok = load_tokenizer(source).to(world.device)
    size = cfg.image_size or tok.resolution
    tok.check_size(size, size)  # before an older cache goes
    images = open_data(cfg, "train", size, flip=True)
    held = open_data(cfg, "val", size)
    classes = list(images.classes)
    text = None
    if cfg.text:
        text = ShapesText() if cfg.text == "toy" else load_text(cfg.text).to(world.device)
        images.require_captions()
        held.require_captions()
    elif list(held.classes) != classes:
        raise UserError(f"{cfg.data}: val's classes are not train's")
    vfm = None
    if cfg.align != "none":
        vfm = load_vfm(cfg.align_vfm, cfg.cache).to(world.device)
        if cfg.align == "reg" and vfm.cls_token is None:
            raise UserError(f"--align=reg: {cfg.align_vfm} has no class token")
    side = size // tok.downsample
    arch = model_arch(cfg, tok.z_dim, side, len(classes), vfm.embed_dim if vfm else 0, text)
    grid = side // cfg.patch_size
    folder = Path(cfg.latents or out / "latents")
    shared = dict(dtype=cfg.cache_dtype, grid=grid, batch=cfg.encode_batch, workers=cfg.workers)
    live = vfm and not cfg.cache_features
    flip = cfg.flip and not text
    cache = folder / ("train-flip" if flip else "train")
    latents = cache_latents(cache, tok, images, world, vfm=None if live else vfm, flip=flip, **shared)
    if live:
        latents.images = images
    some = np.linspace(0, len(held) - 1, min(cfg.val_images, len(held))).astype(int)
    val = cache_latents(folder / "val", tok, held, world, some, vfm=vfm, **shared)
    if cfg.path == "sphere":  # no statistics but the tokens' norm (root mean square), which decoding gives back
        scale = (latents.mean.square() + latents.std.square()).mean().sqrt().item()
        latents.mean = torch.zeros_like(latents.mean)
        latents.std = torch.full_like(latents.std, scale)
    mean, std = (maps(values).to(world.device) for values in (latents.mean, latents.std))
    if text:
        latents.labels = caption_ids(folder, text, images, latents.images_read, world)  # [n, L]
        val.labels = caption_ids(folder, text, held, val.images_read, world)
        latents.rows = torch.from_numpy(np.flatnonzero(images.in_text_training()[latents.images_read]))

    # the model
    origin = latents.meta["arrays"]["latents"]["of"]
    identity = fingerprint(tok)
    start = 0
    saved = load_checkpoint(path, "diffusion") if cfg.resume and path.exists() else None
    if saved:
        with reading(path):
            start = saved["step"]
            now = dict(
                arch, latents=origin, seed=cfg.seed, batch_size=cfg.batch_size, align_vfm=cfg.align_vfm, text=cfg.text,
                path=cfg.path, head_depth=cfg.head_depth)
            then = {
                "path": "linear", "head_depth": 0, **saved["config"], **saved["arch"], "latents": saved["latents"]}
            changed = [f"{key} {then.get(key)}, now {now[key]}" for key in now if now[key] != then.get(key)]
            if changed:
                raise UserError(f"{path} is another run's ({'; '.join(changed)}): --resume=0 or another --out")
    world.agree(configuration=cfg, data=images.identity(), checkpoint=start)
    model, parallel, ema, optimizer = build(cfg, world, arch, saved)
    if text and not arch["vocabulary"] and not saved:
        for net in (model, ema):
            net.text_embedder.null.copy_(caption_states(text, text.ids([""]).to(world.device))[0])
    watch = Watch(world, path, saved)
    del saved
    if world.rank == 0:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        epochs = cfg.steps * cfg.batch_size / len(latents)
        print(f"{millions:.1f} M parameters; {epochs:.1f} epochs; from step {start:,}", flush=True)

    def save(step):
        entries = full_state(model, ema, optimizer)
        if world.rank == 0:
            entries.update(
                kind="diffusion", config=asdict(cfg), arch=arch, latent_mean=latents.mean, latent_std=latents.std,
                latents=origin, tokenizer=source, tokenizer_is=identity, classes=classes, image_size=size, step=step,
                images=step * cfg.batch_size, skipped=int(watch.skipped))
            if cfg.keep:  # first: a kill leaves no gap
                save_checkpoint(out / f"{stem}-{step}.pt", **entries)
            save_checkpoint(path, **entries)
        world.barrier()

    def picture(step):
        columns = 8 if text else min(len(classes), 10)
        if text:
            names = [held.caption(i) for i in val.images_read[:4 * columns].tolist()]
            y = caption_states(text, text.ids(names).to(world.device))
        else:
            y = torch.arange(columns).repeat(4)
            names = [classes[i] for i in y]
        solver = "euler" if cfg.path == "sphere" else "ab2"
        sampling = Sampling(seed=cfg.seed, solver=solver, num_steps=20, cfg_scale=3.0, train_shift=cfg.train_shift)
        pictures = generate(ema, tok, latents.mean, latents.std, range(len(y)), y, sampling, world)
        if world.rank == 0:
            save_grid(pictures, out / f"grids/{stem}-{step:07d}.png", columns, names)

    def due(step, interval):
        return step == cfg.steps or interval > 0 and step % interval == 0

    # the loop. The loader draws a random number as it starts: not in a step
    order = step_batches(len(latents), cfg.batch_size, cfg.seed, start, cfg.steps, world, cfg.accumulate)
    loader = iter(make_loader(latents, order, world, cfg.workers, collate=dict))

    def next_batch():
        rows = next(loader)
        if live:
            with torch.no_grad(), world.autocast():
                rows["features"] = vfm_tokens(vfm, to_float(rows.pop("pictures").to(world.device)), grid)
        return normalise_rows(rows, mean, std, text)

    log = Log(out, stem, world, cfg.steps, start)
    log.flops = 3 * model.flops()  # backward: twice forward
    for step in watch.steps(range(start, cfg.steps)):
        seed_step(cfg.seed, step, world.rank)
        batches = (next_batch() for _ in range(cfg.accumulate))
        losses = train_step(model, parallel, ema, optimizer, batches, cfg, world, step)
        caught = watch.count(losses)
        done = step + 1
        log.bar.update()
        if due(done, cfg.val_interval):
            losses.update(validate(ema, val, mean, std, world, cfg.encode_batch, text))
        if due(done, cfg.log_interval) or due(done, cfg.val_interval) or due(done, cfg.save_interval):
            losses = {name: world.mean(value) for name, value in losses.items()}
            seen = done * cfg.batch_size
            log.write(done, seen, lr=optimizer.param_groups[0]["lr"], epoch=seen / len(latents), **losses)
        if cfg.sample_interval and due(done, cfg.sample_interval):
            picture(done)
        if due(done, cfg.save_interval) or caught:
            save(done)
        watch.obey(caught, done)
    log.bar.close()
    if start >= cfg.steps and world.rank == 0:
        print(f"{path} has its {cfg.steps:,} steps; --resume=0 starts afresh")


def bench_arch(cfg):
    """The preset's DiT arguments."""
    dim = load_vfm(cfg.align_vfm, pretrained=False).embed_dim if cfg.align != "none" else 0
    return model_arch(cfg, 32, *((4, 10) if cfg.model == "toy" else (16, 1000)), dim)


def bench(cfg, world):
    """Times training steps on random latents."""
    arch = bench_arch(cfg)
    parts = build(cfg, world, arch)
    n = micro_batch(cfg.batch_size, world, cfg.accumulate)
    side = arch["input_size"]
    with world.device:
        tokens = torch.randn(n, 1 + parts[0].grid ** 2, arch["z_dim"])
        batch = dict(latents=torch.randn(n, 32, side, side), labels=parts[0].null(n), tokens=tokens)

    def step():
        train_step(*parts, [batch] * cfg.accumulate, cfg, world, 0)

    title = f"{cfg.model}/{cfg.patch_size} {cfg.arch}, a training step"
    time_steps(title, step, cfg.bench, cfg.batch_size, 3 * parts[0].flops(), world)


# --------------------------------------
# The latent cache: memory-mapped; row i is image i; with mirror images 2 i, and 2 i + 1 mirrored

DTYPES = dict(  # NumPy has no bfloat16: its bits
    bf16=(torch.bfloat16, np.uint16), fp16=(torch.float16, np.float16), fp32=(torch.float32, np.float32))


def vfm_tokens(vfm, images, grid):
    """The VFM's last tokens [B, (1 +) grid^2, D] of images in [-1, 1]."""
    side = grid * vfm.patch_size
    return vfm(vfm.resize(images, (side, side)), cls=True)[0].float()


class Latents(Dataset):
    """A finished cache, for `step_batches`: `arrays` [n or, with mirror images, 2 n, ...] (latents, maybe features),
    `images_read` [n] (their indices), `labels` [n] (or captions' ids [n, L]), the latents' `mean`, `std` [C] (RAE's
    [C, h, w]). Items are the images `rows`. The pixels of `images`, if set, come along."""
    images = None

    def __init__(self, folder, names, labels):
        folder = Path(folder)
        self.meta = read_json(folder / "meta.json")
        self.images_read = torch.from_numpy(np.load(folder / "images_read.npy"))
        self.labels = torch.as_tensor(labels)[self.images_read].long()
        self.rows = torch.arange(len(self.labels))
        self.mean = torch.tensor(self.meta["mean"])
        self.std = torch.tensor(self.meta["std"])
        self.arrays = {}
        for name in names:
            self.arrays[name] = mapped(folder / f"{name}.npy", self.meta["arrays"][name]["dtype"])
        self.copies = len(self.arrays["latents"]) // len(self.labels)

    def __len__(self):
        return len(self.rows)

    def read(self, index, mirror):
        """{name: rows, "labels"} of images `index` [B], mirrored where `mirror` is 1."""
        rows = {name: array.index_select(0, self.copies * index + mirror) for name, array in self.arrays.items()}
        return dict(rows, labels=self.labels[index])

    def __getitems__(self, items):  # mirrored as by Images(flip=True)
        index = self.rows[[item for item, _ in items]]
        flip = self.copies == 2
        mirror = [int(flip and np.random.default_rng(key).uniform() < 0.5) for _, key in items]
        rows = self.read(index, torch.tensor(mirror))
        if self.images is not None:
            keys = [key if flip else None for _, key in items]
            rows["pictures"] = torch.stack([self.images[item][0] for item in zip(index.tolist(), keys)])
        return rows


def caption_ids(folder, text, images, indices, world):
    """Ids [n, L] of the captions of `images` at `indices` [n], kept in the folder."""
    captions = [images.caption(i) for i in indices.tolist()]
    path = folder / f"ids-{fingerprint(text.name, text.length, captions)[:8]}.npy"
    if world.rank == 0 and not path.exists():
        ids = text.ids(captions).numpy()
        with replacing(path) as temp, open(temp, "wb") as file:
            np.save(file, ids)
    world.barrier()
    return mapped(path)


def mapped(path, dtype=None):
    """A tensor; read-only, as private writable maps are charged to memory."""
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # PyTorch's
    tensor = torch.from_numpy(np.load(path, mmap_mode="r"))
    return tensor.view(DTYPES[dtype][0]) if dtype else tensor


def cache_latents(
        folder, tokenizer, images, world, indices=None, dtype="bf16", vfm=None, grid=None, batch=100, workers=0,
        flip=False):
    """The Latents of `images` (at `indices`; with `flip` mirrored, too) in `folder`, encoded unless there; with `vfm`
    its grid x grid tokens, too ("features"). By meta.json, those of another tokenizer, VFM, data set or precision are
    made anew; done.npy flags the images on disk: after a kill the rest is encoded."""
    folder = Path(folder)
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)
    names = ["latents", "features"] if vfm else ["latents"]
    if world.rank == 0:
        origin = fingerprint(tokenizer, *describe_images(images, indices))
        side = images.size // tokenizer.downsample
        shape = [(1 + flip) * len(indices), tokenizer.z_dim, side, side]
        wanted = dict(latents=dict(shape=shape, dtype=dtype, of=origin))
        if vfm:
            shape = [shape[0], (vfm.cls_token is not None) + grid ** 2, vfm.embed_dim]
            wanted["features"] = dict(shape=shape, dtype=dtype, of=fingerprint(vfm, origin))
        open_cache(folder, wanted, indices)
    world.barrier()
    meta = read_json(folder / "meta.json")
    if meta["complete"]:
        return Latents(folder, names, images.labels)

    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in names}
    images_read = np.load(folder / "images_read.npy", mmap_mode="r+")
    done = np.load(folder / "done.npy", mmap_mode="r+")
    mine = np.array_split(np.flatnonzero(done == 0), world.size)[world.rank]
    world.barrier()  # all have read
    parts = [mine[i:i + batch] for i in range(0, len(mine), batch)]
    numbered = copy.copy(images)
    numbered.labels = np.arange(len(images))  # of the images that are read: see Images
    loader = make_loader(numbered, [indices[part].tolist() for part in parts], world, workers)
    for (pixels, read), part in zip(tqdm(loader, f"latents {folder.name}", disable=world.rank > 0), parts):
        x = to_float(pixels.to(world.device))
        if flip:
            x = torch.stack((x, x.flip(-1)), 1).flatten(0, 1)  # [2 b, 3, S, S]
        with torch.inference_mode():
            values = dict(latents=tokenizer.encode(x)[0])  # in float32
            if vfm:
                with world.autocast():
                    values["features"] = vfm_tokens(vfm, x, grid)
        for name, array in arrays.items():
            rows = torch.from_numpy(array).view(DTYPES[dtype][0]).unflatten(0, (-1, 1 + flip))
            rows[part] = values[name].to("cpu", rows.dtype).unflatten(0, (-1, 1 + flip))
            array.flush()
        images_read[part] = read
        images_read.flush()
        done[part] = 1
        done.flush()
    world.barrier()
    if world.rank == 0:
        by_position = isinstance(tokenizer.adapter, IdentityAdapter)
        mean, std = latent_statistics(mapped(folder / "latents.npy", dtype), by_position)
        write_json(folder / "meta.json", dict(meta, complete=True, mean=mean.tolist(), std=std.tolist()))
    world.barrier()
    return Latents(folder, names, images.labels)


def describe_images(images, indices):
    """What tells a data set: files' names and sizes, classes, indices, 16 images' pixels."""
    files = []
    for path in images.paths:
        files.append((Path(os.fsdecode(path)).parts[-2:], os.path.exists(path) and os.stat(path).st_size))
    pixels = [images[i][0] for i in indices[::-(-len(indices) // 16)]]
    return [files, len(images), images.classes, images.captioned, torch.as_tensor(indices), *pixels]


def open_cache(folder, wanted, indices):
    """Makes the arrays `wanted`, empty, unless they are there, finished or not."""
    meta = read_json(folder / "meta.json")
    arrays = meta.get("arrays", {})
    if arrays == wanted or meta.get("complete") and wanted.items() <= arrays.items():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        if "arrays" not in meta:
            raise UserError(f"{folder} holds something else: another --latents")
        print(f"{folder} does not fit this run: encoding anew")
        for path in folder.glob("*.npy"):
            path.unlink()
    write_json(folder / "meta.json", dict(arrays={}, complete=False))  # it is ours
    size = sum(math.prod(spec["shape"]) * DTYPES[spec["dtype"]][0].itemsize for spec in wanted.values()) / 1e9
    free = shutil.disk_usage(folder).free / 1e9
    if size > free:
        raise UserError(f"{folder} needs {size:,.1f} GB, {free:,.1f} GB are free")
    np.save(folder / "done.npy", np.zeros(len(indices), np.uint8))
    np.save(folder / "images_read.npy", indices)
    for name, spec in wanted.items():
        allocate(folder / f"{name}.npy", DTYPES[spec["dtype"]][1], spec["shape"])
    write_json(folder / "meta.json", dict(arrays=wanted, complete=False))


def latent_statistics(latents, by_position=False):
    """mean, std [C] of [n, C, h, w], or [C, h, w] (RAE's), of at most 20,000 rows (LightningDiT's 10,000 images,
    twice)."""
    def total(values):
        return (values if by_position else values.mean((2, 3))).sum(0)

    mean = 0
    squares = 0
    count = min(len(latents), 20_000)
    every = torch.linspace(0, len(latents) - 1, count, dtype=torch.float64).long()
    for rows in every.split(100 if by_position else 1000):
        z = latents[rows].double()
        mean = mean + total(z) / count
        squares = squares + total(z.square()) / count
    std = (squares - mean.square()).clamp(min=0).sqrt()
    bad = torch.where(~((std > 0) & std.isfinite()))[0].unique().tolist()
    if bad:
        raise UserError(f"the latents' channels {bad} are constant or not finite")
    return mean, std


def run():
    cfg = parse_config(Config, PRESETS)
    action = bench if cfg.bench else train
    action(cfg, init_world(cfg.out, cfg.cache, peak_tflops=cfg.peak_tflops))


if __name__ == "__main__":
    main(run)
