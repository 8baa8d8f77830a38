"""
Tokenizers on vision foundation models (VFMs): what all scripts share, and tokenizer training.

    python tokenizer.py  # toy: a VFM-VAE on drawn shapes, minutes on a laptop
    python tokenizer.py --method=aligntok  # AlignTok's three stages; also vavae, vae, rae, psvae
    python tokenizer.py --preset=imagenet  # the paper's, on data/imagenet/{train,val}
    torchrun --nproc_per_node=8 tokenizer.py  # the same on eight GPUs
    python tokenizer.py --bench=20  # time steps of every stage on random data

VFM-VAE (arXiv 2510.18457) for ImageNet:

    image [3, 256, 256]
      |  ViT: resized to 512, frozen VFM (SigLIP2-L/16)
    levels 0, 12, -1: each [32 x 32 tokens, 1024]
      |  LevelAdapter: each level -> 64 channels; space to depth; concatenated; fused
    mean, logvar [32, 16, 16]  --  sample -->  z [32, 16, 16]
      |  post_quant, mapping: decompressed to [512, 16, 16]; its mean becomes the style w [512]
      |  LatentFusion, ConvNeXtLayer: fused into four blocks; w modulates every layer
    8 -> 16 -> 32 -> 64 -> 128 -> 256 px, an image at each; the last is the reconstruction [3, 256, 256]

AlignTok (2509.25162): DINOv2-L, trained in its second stage -> PointwiseAdapter -> z -> LDM's decoder.
VA-VAE (2501.01423) and the plain VAE (2112.10752): LDM's encoder and decoder.
RAE (2510.11690): DINOv2-B's own tokens are the latents; a ViT decodes them.
PS-VAE (2512.17909): DINOv2-B -> BlocksAdapter -> z -> LDM's decoder, and z -> semantic_head -> DINOv2-B's tokens.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import errno
import fcntl
import functools
import hashlib
import heapq
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
import tarfile
import textwrap
import time
import typing
import unicodedata
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

# How often an idle OpenMP thread looks for work before it sleeps (ours, measured): less slows a run that is alone, more
# lets two runs on one machine starve each other
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


@dataclass
class Config:
    preset: str = ""  # imagenet (given CUDA and data/imagenet/train) or toy
    method: Literal["vfmvae", "aligntok", "vavae", "vae", "rae", "psvae"] = "vfmvae"
    recipe: Literal["paper", "toy", "study"] = "paper"  # rows of STAGES
    stage: int = 0  # this alone, from the one before's checkpoint; 0: all
    out: str = "out"  # checkpoints, logs, grids
    cache: str = "out"  # for all runs: the toy's drawings, VFM, classifier; tars' indices
    resume: bool = True  # go on from OUT/tokenizer.pt
    seed: int = 0  # of weights, batches, noise
    # data
    data: str = "data/imagenet"  # folder (flat or of classes), FOLDER/{00000..00099}.tar, shapes, CIFAR10
    caption_key: str = ""  # captions: this field of each NAME.json; empty: NAME.txt
    data_dir: str = "data"  # torchvision's data sets
    download: bool = False  # fetch them
    skip_bad: bool = False  # images that cannot be read: take the next, list them in OUT/bad_images.txt
    image_size: Positive = 256  # side of images
    crop: bool = True  # augment: a square of 0.5 to 1 of the short side
    flip: bool = True  # augment: mirror half of them
    workers: int = 12  # load data
    # encoder
    vfm: str = ""  # name (dinov2_vitl14) or file; empty: the method's
    scale_factor: float = 0.0  # images to the VFM are scaled by; 0: the method's
    layers: tuple[int, ...] = (0, 12, -1)  # VFM-VAE's: 0 the embedding, i block i's output, -1 the last
    level_dim: Positive = 64  # channels of each level
    z_dim: Positive = 32  # latent channels C; of rae the VFM's width
    quantizer: Literal["", "simvq"] = ""  # latents become codes (VQRAE's are 1,536 wide: narrow ones use few of them)
    codebook: Positive = 16_384  # codes
    downsample: Positive = 16  # f: image side / latent side
    # VFM-VAE's decoder
    decoder: Literal["", "vfmvae", "ldm", "vit"] = ""  # empty: the method's
    post_factor: Positive = 16  # decompresses latent channels
    widths: tuple[int, ...] = (512, 512, 512, 512, 256, 128)  # of its blocks, each twice as fine
    fuse_dims: tuple[int, ...] = (512, 256, 128, 128)  # of the latent in its first blocks
    attention: tuple[int, ...] = (2, 2, 2)  # layers after its first blocks
    num_res_blocks: int = 2  # ConvNeXt layers: 1 + 3 x this in four blocks, then 1 + 2 x this
    w_dim: Positive = 512  # style width
    # RAE's decoder
    vit_decoder: tuple[int, ...] = (28, 1152, 16, 4096)  # blocks, width, heads, MLP
    # LDM's encoder and decoder
    ch: Positive = 128  # base channels
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # multiples, fine to coarse
    ldm_blocks: Positive = 2  # a level; one more in the decoder
    ldm_attention: bool = True  # on the coarsest level
    groups: Positive = 32  # of GroupNorms; one a channel would erase mean colours
    # training
    kimg: float = 0.0  # thousands of images, all stages; 0: as in STAGES
    batch_size: Positive = 512  # images a step
    accumulate: Positive = 1  # micro-batches a step
    cooldown: Share = 0.0  # last share of the run: learning rates fall linearly to 0 (ours)
    ema_kimg: float = 160.0  # half-life of the weights' average; at most 5% of the images seen
    perceptual: str = "lpips"  # or the VFM to use its formula on
    lpips_weights: str = ""  # files of VGG16, LPIPS, comma-separated; empty: public
    disc_vfm: str = "dino_vits16"  # projected discriminator's frozen ViT
    ndf: Positive = 64  # PatchGAN's base channels
    compile: bool = torch.cuda.is_available()  # torch.compile
    log_interval: Positive = 50  # steps
    grid_interval: Positive = 2000  # steps between pictures
    save_interval: Positive = 2000  # steps between checkpoints
    bench: int = 0  # time so many steps of each stage
    peak_tflops: float = 0.0  # the device's, for MFU; 0: PEAK_TFLOPS


PRESETS = dict(
    imagenet={},
    toy=dict(
        recipe="toy", data="shapes", image_size=32, crop=False, workers=0, vfm="toy", scale_factor=1.0, codebook=256,
        layers=(0, 2, -1), downsample=8, post_factor=4, widths=(128, 128, 64, 32), fuse_dims=(128, 64),
        attention=(1, 1), num_res_blocks=0, w_dim=128, vit_decoder=(4, 128, 4, 512), ch=32, ch_mult=(1, 1, 2, 4),
        ldm_blocks=1, ldm_attention=False, groups=8, batch_size=8, cooldown=0.4, perceptual="toy", disc_vfm="toy",
        ndf=16, log_interval=20, grid_interval=500, save_interval=1000))


@dataclass
class Stage:
    """A row of a recipe."""
    name: str
    kimg: float  # thousands of images
    trains: str  # encoder (the VFM), adapter (or LDM's encoder), decoder, high (3 last blocks)
    lr: float = 1e-4  # Adam's, both networks
    encoder_lr: float = 1e-5  # ... of a VFM that is trained (ours)
    betas: tuple = (0.0, 0.99)
    summed: bool = False  # l1, lpips, preserve, semantic, commit: sums over C, H, W (LDM), not means
    sample: bool = True  # of the posterior, not its mean
    noise: float = 0.0  # the decoder's latents get sigma n, sigma of each image from U(0, noise) (RAE, HAE)
    l1: float = 1.0
    lpips: float = 0.0
    ssim: float = 0.0
    multires: float = 0.0  # each coarser scale's L1, for the first multires_kimg
    multires_kimg: float = 0.0
    kl: float = 0.0
    vf: float = 0.0  # times the adaptive weight
    vf_margins: tuple = (0.0, 0.0)  # of the similarity matrices, of the cosine
    preserve: float = 0.0  # AlignTok's
    semantic: float = 0.0  # the VFM's tokens, as it came, by a head on the latent: L2 and cosine (PS-VAE)
    commit: float = 1.0  # with --quantizer
    detach: bool = False  # losses on images do not reach the encoder
    dino: float = 0.0  # projected discriminator, hinge
    patch: float = 0.0  # PatchGAN, hinge
    multi: float = 0.0  # three-scale PatchGAN, least squares
    matching: float = 0.0  # ... and its feature matching
    gan_adaptive: bool = False  # LDM's adaptive weight, of patch or dino
    gan_start_kimg: float = 0.0
    equivariance: bool = False  # VFM-VAE's regularisation

    def weight(self, name, images):
        summed = self.summed and name in ("l1", "lpips", "preserve", "semantic", "commit")
        return getattr(self, name) * (images[0].numel() if summed else 1)


# VFM-VAE: as published. VA-VAE: 100, 15 and, with margins, 15 epochs of ImageNet (1,281 kimg); vae: latent diffusion's
# losses for as long; LDM's GAN starts after 5,000 steps of 256. AlignTok: no KL, no sampling, preservation 1 (3 for
# text to image), by later notes on the paper; its lengths, learning rates, and preservation's scale are ours. PS-VAE:
# weights and learning rates; its lengths, and the LDM losses that the pixels' weight multiplies, are ours.
BOTH = "adapter decoder"
ALL = "encoder adapter decoder"
row = functools.partial(Stage, dino=1.0)
ldm = functools.partial(Stage, summed=True, betas=(0.5, 0.9), lpips=1.0, patch=0.5, gan_adaptive=True)
PAPER = dict(
    vfmvae=[
        row("strong alignment", 20_000, BOTH, vf=5.0, kl=1e-6, lpips=10.0, equivariance=True, multires=0.1,
            multires_kimg=5_000),
        row("weak alignment", 20_000, BOTH, vf=1.0, kl=1e-6, lpips=10.0, equivariance=True),
        row("ssim", 1_000, "decoder", lr=5e-5, lpips=2.0, ssim=1.0, equivariance=True),
        row("patchgan", 3_000, "high", lr=5e-5, l1=0.0, multi=1.0, matching=10.0)],
    aligntok=[
        ldm("latent alignment", 38_400, BOTH, sample=False, gan_start_kimg=1_280),
        ldm("perceptual alignment", 19_200, ALL, sample=False, preserve=1.0),
        ldm("decoder refinement", 12_800, "decoder", sample=False)],
    vavae=[
        ldm("strong alignment", 128_100, BOTH, vf=0.5, kl=1e-6, gan_start_kimg=1_280),
        ldm("weak alignment", 19_200, BOTH, vf=0.1, kl=1e-6),
        ldm("margins", 19_200, BOTH, vf=0.1, kl=1e-6, vf_margins=(0.25, 0.5))],
    vae=[ldm("reconstruction", 166_500, BOTH, kl=1e-6, gan_start_kimg=1_280)],
    # 16 epochs; not here: a discriminator that learns two epochs before its loss counts, rates that fall tenfold
    rae=[row("decoder", 20_500, "decoder", lr=2e-4, betas=(0.9, 0.95), sample=False, noise=0.8, lpips=1.0, dino=0.75,
             gan_adaptive=True, gan_start_kimg=10_250)],
    psvae=[
        ldm("semantic latents", 19_200, BOTH, summed=False, l1=0.1, lpips=0.1, kl=1e-6, semantic=1.0, detach=True,
            gan_start_kimg=1_280),
        ldm("pixels", 38_400, ALL, summed=False, l1=0.1, lpips=0.1, kl=1e-6, semantic=1.0, encoder_lr=1e-4)])


def short_rows(ldm, strong, weak):
    """What toy and study (ours, 28 kimg; the toy's VFM-VAE 20) share; strong, weak: VA-VAE's VF weights."""
    return dict(
        aligntok=[
            ldm("latent alignment", 15.2, BOTH, sample=False),
            ldm("perceptual alignment", 7.6, ALL, sample=False, preserve=0.2),
            ldm("decoder refinement", 5.2, "decoder", sample=False)],
        vavae=[
            ldm("strong alignment", 21.6, BOTH, vf=strong, kl=1e-6),
            ldm("weak alignment", 3.2, BOTH, vf=weak, kl=1e-6),
            ldm("margins", 3.2, BOTH, vf=weak, kl=1e-6, vf_margins=(0.25, 0.5))],
        vae=[ldm("reconstruction", 28.0, BOTH, kl=1e-6)],
        psvae=[
            ldm("semantic latents", 9.6, BOTH, kl=1e-6, semantic=1.0, detach=True),
            ldm("pixels", 18.4, ALL, kl=1e-6, semantic=1.0)])


# High learning rates, low alignment and perceptual weights, no GAN. LDM's stay grey at VFM-VAE's rate.
row = functools.partial(Stage, betas=(0.9, 0.99))
ldm = functools.partial(Stage, summed=True, betas=(0.9, 0.9), lr=6e-4, encoder_lr=1.8e-4, lpips=0.01)
TOY = dict(
    vfmvae=[
        row("strong alignment", 9.7, BOTH, lr=2e-3, vf=1.0, kl=1e-6, lpips=0.1, multires=0.1, multires_kimg=2.4),
        row("weak alignment", 9.7, BOTH, lr=2e-3, vf=0.2, kl=1e-6, lpips=0.1),
        row("ssim", 0.6, "decoder", lr=1e-3, lpips=0.02, ssim=1.0)],
    rae=[row("decoder", 28.0, "decoder", lr=2e-3, lpips=0.1, sample=False, noise=0.2)],
    **short_rows(ldm, 0.1, 0.02))

# `align.py --study=1`: one optimizer, a learning rate at which all learn, no loss on a VFM but the methods' own, and
# VFM-VAE's first VF weight lowered from 5, which would hold its images at 15 dB.
row = functools.partial(Stage, betas=(0.9, 0.99), lr=6e-4, encoder_lr=1.8e-4)
ldm = functools.partial(row, summed=True)
STUDY = dict(
    vfmvae=[
        row("strong alignment", 13.6, BOTH, vf=1.0, kl=1e-6, multires=0.1, multires_kimg=3.4),
        row("weak alignment", 13.6, BOTH, vf=1.0, kl=1e-6),
        row("ssim", 0.8, "decoder", lr=3e-4, ssim=1.0)],
    rae=[row("decoder", 28.0, "decoder", sample=False, noise=0.2)],
    **short_rows(ldm, 0.5, 0.1))

STAGES = dict(paper=PAPER, toy=TOY, study=STUDY)


# --------------------------------------
# The vision foundation model

def rotate_halves(x, cos, sin):
    """Rotary embedding of x [..., N, d]: its first half of channels turns against the second."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class ViTAttention(nn.Module):
    def __init__(self, dim, num_heads, causal=False):
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rope=None):  # [B, N, D]; DINOv3: (cosines, sines), each [N, d / 2]
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # [B, N, 3, heads, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, d]
        if rope is not None:
            q = rotate_halves(q, *rope).to(v.dtype)
            k = rotate_halves(k, *rope).to(v.dtype)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # [B, heads, N, d]
        return self.proj(x.transpose(1, 2).flatten(2))  # [B, N, D]


class MLP(nn.Module):
    """activation: gelu, gelu_tanh, gelu_quick (CLIP), swiglu (DINOv2-g): SiLU of one half times the other."""

    def __init__(self, dim, hidden, activation="gelu"):
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(dim, hidden * (2 if activation == "swiglu" else 1))
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):  # [B, N, D]
        x = self.fc1(x)  # [B, N, hidden (x 2)]
        if self.activation == "swiglu":
            gate, x = x.chunk(2, -1)
            return self.fc2(F.silu(gate) * x)
        if self.activation == "gelu_quick":
            return self.fc2(x * torch.sigmoid(1.702 * x))
        return self.fc2(F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x):
        return x * self.gamma


class ViTBlock(nn.Module):
    def __init__(self, dim, num_heads, hidden, activation, layer_scale=False, eps=1e-6, causal=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = ViTAttention(dim, num_heads, causal)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = MLP(dim, hidden, activation)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x, rope=None):  # [B, N, D]
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))


NORMALIZATION = dict(  # mean and std of [0, 1]
    imagenet=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    half=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    clip=((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))


class ViT(nn.Module):
    """The vision transformer of DINO, DINOv2 (with or without registers), DINOv3, SigLIP2, MAE, CLIP.

    vit(images [B, 3, H, W] in [-1, 1], layers=(0, 12, -1), cls=False) -> one [B, N, D] per layer: 0 the embedding, i
    block i's output, -1 the normalised last; patch tokens row-major, without registers (cls=True: behind the class
    token). H, W: multiples of the patch size; positions are resized bicubically. `rope`: DINOv3's base of
    rotary angles, in place of a position table."""

    def __init__(
            self, image_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_hidden=3072,
            activation="gelu", class_token=True, class_position=True, registers=0, layer_scale=False, pre_norm=False,
            normalize="imagenet", interpolation="bilinear", antialias=False, rope=0.0, eps=1e-6):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.image_size = image_size
        self.patch_size = patch_size
        self.embed_dim = self.level0_dim = embed_dim
        self.depth = depth
        self.interpolation = interpolation
        self.antialias = antialias
        self.rope = rope
        self.class_position = class_token and class_position and not rope
        positions = (image_size // patch_size) ** 2 + self.class_position
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, embed_dim, patch_size, patch_size)))
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02) if class_token else None
        self.register_tokens = nn.Parameter(torch.randn(1, registers, embed_dim) * 0.02) if registers else None
        self.pos_embed = nn.Parameter(torch.randn(1, positions, embed_dim) * 0.02) if not rope else None
        self.pre_norm = nn.LayerNorm(embed_dim, eps) if pre_norm else nn.Identity()
        block = embed_dim, num_heads, mlp_hidden, activation, layer_scale, eps
        self.blocks = nn.ModuleList(ViTBlock(*block) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZATION[normalize])
        self.register_buffer("input_scale", 0.5 / std, persistent=False)  # (x / 2 + 1 / 2 - mean) / std
        self.register_buffer("input_shift", (0.5 - mean) / std, persistent=False)

    def resize(self, images, size=None, scale=None):
        """To `size` (H, W), by `scale`, or to the model's."""
        if scale:
            size = [round(side * scale) for side in images.shape[-2:]]
        size = tuple(size or (self.image_size, self.image_size))
        if tuple(images.shape[-2:]) == size:
            return images
        return F.interpolate(images, size, mode=self.interpolation, antialias=size[0] < images.shape[-2])

    def embed(self, x):
        """-> patch tokens [B, N, D]; level 0, or None where these are it."""
        return self.patch_embed["proj"](x).flatten(2).mT, None

    def positions(self, h, w):
        n = self.pos_embed.shape[1] - self.class_position
        side = math.isqrt(n)
        if (side, side) == (h, w):
            return self.pos_embed  # [1, (1 +) N, D]
        grid = self.pos_embed[:, -n:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, D, side, side]
        grid = F.interpolate(grid, (h, w), mode="bicubic", antialias=self.antialias)
        return torch.cat([self.pos_embed[:, :-n], grid.flatten(2).mT], 1)

    def rotary(self, h, w, extra):
        """DINOv3's cosines, sines [extra + h w, d / 2] (arXiv 2508.10104, section 3.2): patch centres in [-1, 1], by
        row in the first half of the angles, by column in the second; tokens before the patches do not turn."""
        d = self.embed_dim // self.blocks[0].attn.num_heads
        rates = 2 * math.pi / self.rope ** (torch.arange(d // 4, device=self.input_scale.device) * 4 / d)
        y, x = (((2 * torch.arange(n, device=rates.device) + 1) / n - 1)[:, None] * rates for n in (h, w))
        angles = torch.cat([y[:, None].expand(h, w, -1), x.expand(h, w, -1)], -1).flatten(0, 1)  # [h w, d / 2]
        angles = F.pad(angles, (0, 0, extra, 0))
        return angles.cos(), angles.sin()

    def forward(self, images, layers=(-1,), cls=False):
        x = images * self.input_scale + self.input_shift  # [B, 3, H, W]
        h = x.shape[2] // self.patch_size
        w = x.shape[3] // self.patch_size
        x, level0 = self.embed(x)  # [B, N, D]
        if not self.rope:
            positions = self.positions(h, w)
            x = x + positions[:, self.class_position:]
        extra = 0  # tokens before the patches
        if self.cls_token is not None:
            first = self.cls_token + positions[:, :1] if self.class_position else self.cls_token
            if self.register_tokens is not None:
                first = torch.cat([first, self.register_tokens], 1)
            extra = first.shape[1]
            x = torch.cat([first.expand(len(x), -1, -1), x], 1)  # [B, extra + N, D]
        x = self.pre_norm(x)

        rope = self.rotary(h, w, extra) if self.rope else None
        states = {0: x}
        for i, block in enumerate(self.blocks[:self.depth if -1 in layers else max(layers)], 1):
            x = block(x, rope)
            if i in layers:  # the others' memory is free
                states[i] = x
        if -1 in layers:
            states[-1] = self.norm(x)
        if cls and extra:
            return [torch.cat([states[i][:, :1], states[i][:, extra:]], 1) for i in layers]
        return [level0 if i == 0 and level0 is not None else states[i][:, extra:] for i in layers]


HUB = "https://huggingface.co/{}/resolve/main/model.safetensors"


def vfm_table():
    """name -> (address of the weights, ViT arguments)."""

    def size(dim, depth, heads, hidden):
        return dict(embed_dim=dim, depth=depth, num_heads=heads, mlp_hidden=hidden)

    small = size(384, 12, 6, 1536)
    base = size(768, 12, 12, 3072)
    large = size(1024, 24, 16, 4096)
    giant = dict(size(1536, 40, 24, 4096), activation="swiglu")
    so400m = size(1152, 27, 16, 4304)
    meta = "https://dl.fbaipublicfiles.com"
    dino = f"{meta}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"
    table = dict(
        dino_vits16=(dino, dict(small, interpolation="bicubic")),
        mae_vitb16=(HUB.format("facebook/vit-mae-base"), base),
        mae_vitl16=(HUB.format("facebook/vit-mae-large"), large))
    for letter, vit in dict(s=small, b=base, l=large, g=giant).items():
        name = f"dinov2_vit{letter}14"
        url = f"{meta}/dinov2/{name}/{name}"
        vit = dict(vit, image_size=518, patch_size=14, layer_scale=True, interpolation="bicubic")
        table[name] = f"{url}_pretrain.pth", vit
        table[f"{name}_reg"] = f"{url}_reg4_pretrain.pth", dict(vit, registers=4, antialias=True)
    clip = "clip-vit-large-patch14"
    table[clip] = HUB.format(f"openai/{clip}"), dict(
        large, patch_size=14, pre_norm=True, activation="gelu_quick", normalize="clip", interpolation="bicubic",
        eps=1e-5)
    for letter, vit in dict(s=small, b=base, l=large).items():  # gated: fetched by hand, given as a file
        url = HUB.format(f"facebook/dinov3-vit{letter}16-pretrain-lvd1689m")
        table[f"dinov3_vit{letter}16"] = url, dict(vit, registers=4, layer_scale=True, rope=100.0, eps=1e-5)
    for word, vit, patch, sides in (
            ("base", base, 16, (224, 256, 384, 512)), ("large", large, 16, (256, 384, 512)),
            ("so400m", so400m, 14, (224, 384)), ("so400m", so400m, 16, (256, 384, 512))):
        vit = dict(vit, patch_size=patch, class_token=False, normalize="half", activation="gelu_tanh")
        for side in sides:
            name = f"siglip2-{word}-patch{patch}-{side}"
            table[name] = HUB.format(f"google/{name}"), dict(vit, image_size=side // patch * patch)
    return table


VFMS = vfm_table()


def vit_from(config):
    return ToyViT(**config) if "stem" in config else ViT(**config)


def load_vfm(name_or_path, cache="out", pretrained=True, **overrides):
    """A frozen ViT: "toy", "toy-blind" (trained when first needed, kept in `cache`), a name in VFMS (fetched once) or a
    file; pretrained=False: a name's random weights. `overrides`: what a state dict does not show (num_heads)."""
    name = str(name_or_path)
    url, config = VFMS.get(name, (name, {}))
    state = None
    if name in TOY_VFMS:
        config = TOY_VIT
        if pretrained:
            state = toy_vfm_weights(name, cache)
    elif pretrained or not config:
        if not config and not name.startswith("http") and not os.path.exists(name):
            raise UserError(f"no VFM {name}: neither file nor one of {', '.join([*TOY_VFMS, *VFMS])}")
        state = load_weights(url)
        with reading(name):
            state = to_vit_keys(state.get("teacher", state.get("model", state)))
            config = {**vit_config(state), **config}
    vit = vit_from({**config, **overrides})
    if state is not None:
        load_state(vit, state, name)
    return vit.requires_grad_(False).eval()


# --------------------------------------
# Adapters: VFM features -> moments of the latent (VFM-VAE, section 3.1; AlignTok, section 3)

class ProjectionAttention(nn.Module):
    """Heads are concatenated; if d_in > d_out averaged, then pooled to d_out if need be."""

    def __init__(self, d_in, d_out, num_heads):
        super().__init__()
        inner = max(d_in, d_out)
        if inner % num_heads:
            raise ValueError(f"{num_heads} attention heads do not divide {inner} channels")
        self.num_heads = num_heads
        self.narrow = d_in > d_out
        self.qkv = nn.Linear(d_in, 3 * inner, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(inner))
        self.v_bias = nn.Parameter(torch.zeros(inner))
        self.proj = nn.Linear(d_out, d_out)

    def forward(self, x):  # [B, N, d_in]
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, width]
        x = F.scaled_dot_product_attention(q, k, v)
        x = x.mean(1) if self.narrow else x.transpose(1, 2).flatten(2)  # [B, N, width or d_out]
        d_out = self.proj.in_features
        return self.proj(x if x.shape[-1] == d_out else F.adaptive_avg_pool1d(x, d_out))  # [B, N, d_out]


class GatedMLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.w0 = nn.Linear(dim, 2 * dim)
        self.w1 = nn.Linear(dim, 2 * dim)
        self.w2 = nn.Linear(2 * dim, dim)

    def forward(self, x):  # [B, N, D]
        x = self.norm(x)
        return self.w2(F.gelu(self.w0(x), approximate="tanh") * self.w1(x))


class AttnProjection(nn.Module):
    """y = W_p LN3(x) + Attn(LN1(x)), then y + MLP(LN2(y))."""

    def __init__(self, d_in, d_out, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_in)
        self.attn = ProjectionAttention(d_in, d_out, num_heads)
        self.norm3 = nn.LayerNorm(d_in)
        self.proj = nn.Linear(d_in, d_out)
        self.norm2 = nn.LayerNorm(d_out)
        self.mlp = GatedMLP(d_out)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x):  # [B, N, d_in]
        x = self.proj(self.norm3(x)) + self.attn(self.norm1(x))  # [B, N, d_out]
        return x + self.mlp(self.norm2(x))


class LevelAdapter(nn.Module):
    """VFM-VAE's: each level D_i -> d_i, space to depth, concatenated, -> 2 C moments."""

    def __init__(self, in_dims, level_dims, fold, z_dim):
        super().__init__()
        self.fold = fold
        self.levels = nn.ModuleList(AttnProjection(D, d, max(1, D // d)) for D, d in zip(in_dims, level_dims))
        fused = sum(level_dims) * fold ** 2
        self.fuse = AttnProjection(fused, 2 * z_dim, max(1, fused // (2 * z_dim)))

    def forward(self, features, grid):  # levels, each [B, N, D_i]; (h, w)
        levels = [level(tokens) for level, tokens in zip(self.levels, features)]  # each [B, N, d_i]
        x = torch.cat(levels, 2).mT  # [B, d, N]
        x = x.unflatten(2, [side * self.fold for side in grid])  # [B, d, h fold, w fold]
        x = F.pixel_unshuffle(x, self.fold).flatten(2).mT  # [B, h w, d fold^2]
        return self.fuse(x).mT.unflatten(2, grid)  # [B, 2 C, h, w]

    def last_weight(self):  # at which gradients are compared
        return self.fuse.mlp.w2.weight


class PointwiseAdapter(nn.Module):
    """AlignTok's two-layer MLP; LayerNorm before and SiLU between are ours."""

    def __init__(self, dim, z_dim):
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 2 * z_dim))

    def forward(self, features, grid):  # levels, each [B, N, D]; (h, w)
        return self.net(features[-1]).mT.unflatten(2, grid)  # [B, 2 C, h, w]

    def last_weight(self):
        return self.net[-1].weight


def transformer(dim, num_heads):
    return nn.Sequential(*(ViTBlock(dim, num_heads, 4 * dim, "gelu") for _ in range(3)))


class BlocksAdapter(PointwiseAdapter):
    """PS-VAE's (arXiv 2512.17909): three transformer blocks before the MLP."""

    def __init__(self, dim, num_heads, z_dim):
        super().__init__(dim, z_dim)
        self.blocks = transformer(dim, num_heads)

    def forward(self, features, grid):
        return super().forward([self.blocks(features[-1])], grid)  # [B, 2 C, h, w]


class SemanticHead(nn.Module):
    """PS-VAE's Ds: latents [B, C, h, w] -> a VFM's tokens [B, h w, D]: wide, then as `BlocksAdapter`."""

    def __init__(self, z_dim, dim, num_heads):
        super().__init__()
        self.embed = nn.Linear(z_dim, dim)
        self.blocks = transformer(dim, num_heads)
        self.net = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, z):
        return self.net(self.blocks(self.embed(z.flatten(2).mT)))  # [B, h w, D]


class IdentityAdapter(nn.Module):
    """RAE's: the VFM's last tokens are the latents, their LayerNorm without affine (arXiv 2510.11690, section 3)."""

    def forward(self, features, grid):  # levels, each [B, N, C], the last not normalised; (h, w)
        x = F.layer_norm(features[-1], features[-1].shape[-1:], eps=1e-6).mT.unflatten(2, grid)  # [B, C, h, w]
        return torch.cat([x, torch.full_like(x, -30.0)], 1)  # [B, 2 C, h, w]; logvar -30: no noise


@contextlib.contextmanager
def full_float32():
    """No TF32, in which cards differ most."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


class SimVQ(nn.Module):
    """VQRAE's quantizer (arXiv 2511.23386): fixed random codes times a trained W. z [B, C, h, w] -> the nearest codes
    (L2) [B, C, h, w], their indices [B, h, w]. Gradients reach W alone."""

    def __init__(self, dim, size):
        super().__init__()
        self.register_buffer("codebook", torch.randn(size, dim) / dim ** 0.5)
        self.W = nn.Linear(dim, dim, bias=False)

    @full_float32()
    def lookup(self, indices):
        with torch.autocast(indices.device.type, enabled=False):
            return self.W(self.codebook)[indices].movedim(-1, 1)  # [B, C, h, w]

    @full_float32()
    def forward(self, z):
        rows = z.detach().float().movedim(1, -1)  # [B, h, w, C]
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):  # bf16, TF32 would mistake codes
            codes = self.W(self.codebook)  # [K, C]
            distances = torch.addmm(codes.square().sum(1), rows.flatten(0, 2), codes.T, alpha=-2)  # but for |z|^2
            indices = distances.argmin(1).view(rows.shape[:3])
        return self.lookup(indices), indices


# --------------------------------------
# VFM-VAE's decoder: style, multi-scale latent fusion, progressive resolution reconstruction (section 3.2)

def pointwise(d_in, d_out, bias=True):
    return nn.Conv2d(d_in, d_out, 1, bias=bias)


def depthwise(dim, kernel, bias=True):
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=bias)


class EqualLinear(nn.Module):
    """StyleGAN's (arXiv 1812.04948, appendix C): W lr_mul / sqrt(in) x + b lr_mul."""

    def __init__(self, d_in, d_out, lr_mul=1.0, bias_init=0.0):
        super().__init__()
        self.lr_mul = lr_mul
        self.weight = nn.Parameter(torch.randn(d_out, d_in) / lr_mul)
        self.bias = nn.Parameter(torch.full((d_out,), bias_init / lr_mul))

    def forward(self, x):
        return F.linear(x, self.weight * (self.lr_mul / math.sqrt(x.shape[1])), self.bias * self.lr_mul)


class Style(nn.Module):
    """w [B, w_dim] -> scales of input channels [B, C]."""

    def __init__(self, w_dim, channels):
        super().__init__()
        self.affine = EqualLinear(w_dim, 3 * channels, bias_init=1.0)

    def forward(self, w):
        m1, m2, m3 = self.affine(w).chunk(3, 1)  # each [B, C]
        return m1 * m2 + m3


class LatentFusion(nn.Module):
    """The decompressed latent at a block's resolution: space to depth, or the reverse."""

    def __init__(self, z_dim, dim, fold, unfold):
        super().__init__()
        self.fold = fold
        self.unfold = unfold
        folded = z_dim * fold ** 2
        wide = dim * unfold ** 2
        self.depthwise = depthwise(folded, 3, bias=False)
        self.pointwise1 = pointwise(folded, wide, bias=False)
        self.norm1 = nn.GroupNorm(min(32, wide), wide)
        self.pointwise2 = pointwise(dim, dim, bias=False)
        self.norm2 = nn.GroupNorm(min(32, dim), dim)

    def forward(self, z):  # [B, z_dim, h, w]
        x = F.pixel_unshuffle(z, self.fold)  # [B, folded, ...]
        x = F.leaky_relu(self.norm1(self.pointwise1(self.depthwise(x))), 0.2)  # [B, wide, ...]
        x = F.pixel_shuffle(x, self.unfold)  # [B, dim, h', w']
        return self.norm2(self.pointwise2(x))


class Upsample(nn.Module):
    """GroupNorm (block 0: after the shuffle), depthwise 3x3, pointwise, depth to space, fixed blur."""

    def __init__(self, d_in, d_out, index):
        super().__init__()
        self.norm_first = index > 0
        normed = d_in if self.norm_first else d_out
        self.norm = nn.GroupNorm(min(32, normed // 4), normed)
        self.depthwise = depthwise(d_in, 3, bias=False)
        self.pointwise = pointwise(d_in, 4 * d_out, bias=False)
        row = torch.tensor([1.0, 2, 1] if index <= 2 else [1.0, 4, 6, 4, 1])
        kernel = row[:, None] * row / row.sum() ** 2
        self.register_buffer("blur", kernel.expand(d_out, 1, -1, -1).contiguous(), persistent=False)

    def forward(self, x):  # [B, d_in, h, w]
        if self.norm_first:
            x = self.norm(x)
        x = F.pixel_shuffle(self.pointwise(self.depthwise(x)), 2)  # [B, d_out, 2 h, 2 w]
        if not self.norm_first:
            x = self.norm(x)
        p = self.blur.shape[-1] // 2
        if torch.compiler.is_compiling() and x.device.type == "cpu":  # inductor fails at F.pad's backward pass
            for dim in 2, 3:
                x = torch.cat([*[x.narrow(dim, 0, 1)] * p, x, *[x.narrow(dim, -1, 1)] * p], dim)
        else:
            x = F.pad(x, [p] * 4, mode="replicate")
        return F.conv2d(x, self.blur, groups=len(self.blur))  # [B, d_out, 2 h, 2 w]


class ConvNeXtLayer(nn.Module):
    """ConvNeXt, its first pointwise layer modulated. A sample's weights W s / sqrt(sum (W s)^2) are never formed: s
    scales the input, with the GroupNorm's affine, the demodulation the output, with the bias."""

    def __init__(self, dim, kernel, w_dim, noise_size=0):
        super().__init__()
        self.dwconv = depthwise(dim, kernel)
        self.noise = NoiseMap(noise_size) if noise_size else nn.Identity()
        self.norm = nn.GroupNorm(min(32, dim // 4), dim)
        self.style = Style(w_dim, dim)
        self.pwconv1 = pointwise(dim, 4 * dim)
        self.pwconv2 = pointwise(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim, 1, 1), 1e-5))

    def forward(self, x, w):  # [B, C, h, w], [B, w_dim]
        s = self.style(w)  # [B, C]
        weight = self.pwconv1.weight  # [4 C, C, 1, 1]
        demod = torch.rsqrt(F.linear(s.square(), weight.flatten(1).square()) + 1e-8)  # [B, 4 C]
        y = self.noise(self.dwconv(x))
        y = F.group_norm(y, self.norm.num_groups, eps=self.norm.eps)
        y = torch.addcmul((self.norm.bias * s)[..., None, None], y, (self.norm.weight * s)[..., None, None])
        y = F.conv2d(y, weight)  # [B, 4 C, h, w]
        y = F.gelu(torch.addcmul(self.pwconv1.bias[:, None, None], y, demod[..., None, None]))
        return torch.addcmul(x, self.pwconv2(y), self.gamma)  # [B, C, h, w]


class ChannelNorm(nn.Module):
    """RMSNorm over channels: unit length times sqrt(C) * gamma."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x):  # [B, C, h, w]
        return F.normalize(x, dim=1) * (self.gamma * len(self.gamma) ** 0.5)


class DecoderAttention(nn.Module):
    """Self-attention with a learned null key and value, then a pointwise MLP; both start at zero."""
    num_heads = 8

    def __init__(self, dim):
        super().__init__()
        if dim % self.num_heads:
            raise ValueError(f"{self.num_heads} attention heads do not divide {dim} channels")
        self.norm = ChannelNorm(dim)
        self.to_q = pointwise(dim, dim, bias=False)
        self.to_k = pointwise(dim, dim, bias=False)
        self.to_v = pointwise(dim, dim, bias=False)
        self.to_out = pointwise(dim, dim, bias=False)
        self.null_kv = nn.Parameter(torch.randn(2, self.num_heads, dim // self.num_heads))
        self.ff = nn.Sequential(ChannelNorm(dim), pointwise(dim, 4 * dim), nn.GELU(), pointwise(4 * dim, dim))
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.ff[3].weight)

    def heads(self, x):
        return x.flatten(2).unflatten(1, (self.num_heads, -1)).mT  # [B, heads, h w, C / heads]

    def forward(self, x):  # [B, C, h, w]
        y = self.norm(x)
        q, k, v = (self.heads(layer(y)) for layer in (self.to_q, self.to_k, self.to_v))
        null_k, null_v = self.null_kv.to(k.dtype)[:, None, :, None].expand(-1, len(x), -1, -1, -1)  # [B, heads, 1, d]
        k = torch.cat([null_k, k], 2)  # [B, heads, 1 + h w, d]
        v = torch.cat([null_v, v], 2)
        y = F.scaled_dot_product_attention(q, k, v)  # [B, heads, h w, d]
        x = x + self.to_out(y.mT.flatten(1, 2).unflatten(2, x.shape[2:]))
        return x + self.ff(x)


class ToRGB(nn.Module):
    """Modulated, without demodulation."""

    def __init__(self, dim, w_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dim, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.style = Style(w_dim, dim)

    def forward(self, x, w):  # [B, C, h, w], [B, w_dim]
        s = self.style(w) / self.weight.shape[1] ** 0.5  # [B, C]
        return F.conv2d(x * s[..., None, None], self.weight, self.bias)  # [B, 3, h, w]


class DecoderBlock(nn.Module):
    """x [B, d_in, h, w], the sum of the blocks before -> x, sum [B, dim, 2 h, 2 w]."""

    def __init__(self, index, d_in, dim, w_dim, layers, attentions, sum_in, noise_size):
        super().__init__()
        kernel = 5 if index <= 1 else 7
        self.upsample = Upsample(d_in, dim, index)
        self.convs = nn.ModuleList(ConvNeXtLayer(dim, kernel, w_dim, noise_size) for _ in range(layers))
        self.attns = nn.ModuleList(DecoderAttention(dim) for _ in range(attentions))
        self.upsample_sum = Upsample(sum_in, dim, index) if sum_in else None
        self.to_rgb = ToRGB(dim, w_dim)

    def forward(self, x, x_sum, w):
        x = self.upsample(x)  # [B, dim, 2 h, 2 w]
        for conv in self.convs:
            x = conv(x, w)
        for attn in self.attns:
            x = attn(x)
        return x, x if x_sum is None else self.upsample_sum(x_sum) + x


class VFMVAEDecoder(nn.Module):
    """Latents [B, C, h, w] -> the finest image, or a list, coarse to fine (`scales=True`). Arguments: see Config."""

    def __init__(self, z_dim, downsample, post_factor, widths, fuse_dims, attention, num_res_blocks, w_dim,
                 noise_sizes=()):
        super().__init__()
        self.granularity = 2 ** len(widths) // downsample  # divides latent grids
        if not self.granularity:
            raise UserError(f"{len(widths)} --widths are too few for --downsample={downsample}")
        dim = post_factor * z_dim
        self.post_quant = AttnProjection(z_dim, dim, post_factor)
        self.mapping = nn.Sequential(EqualLinear(dim, dim, 0.01), nn.LeakyReLU(0.2), EqualLinear(dim, w_dim, 0.01))
        self.fusions = nn.ModuleList()
        self.blocks = nn.ModuleList()
        before = 0
        for i, width in enumerate(widths):
            d_in = before
            if i < len(fuse_dims):
                fold = max(1, self.granularity >> i)
                unfold = max(1, (downsample << i) >> len(widths))
                self.fusions.append(LatentFusion(dim, fuse_dims[i], fold, unfold))
                d_in += fuse_dims[i]
            layers = 1 + num_res_blocks * (3 if i <= 3 else 2)
            attentions = attention[i] if i < len(attention) else 0
            noise_size = noise_sizes[i] if noise_sizes else 0
            self.blocks.append(DecoderBlock(i, d_in, width, w_dim, layers, attentions, before, noise_size))
            before = width

    def decompress(self, z):
        """-> decompressed latent [B, post_factor C, h, w], style w [B, w_dim]"""
        h = self.post_quant(z.flatten(2).mT).mT.unflatten(2, z.shape[2:])
        pooled = h.mean((2, 3))
        return h, self.mapping(pooled * torch.rsqrt(pooled.square().mean(1, keepdim=True) + 1e-8))

    def body(self, z):
        """-> the sum after each block, w: all but the layers at which gradients are compared."""
        h, w = self.decompress(z)
        x = x_sum = None
        sums = []
        for i, block in enumerate(self.blocks):
            if i < len(self.fusions):
                fused = self.fusions[i](h)  # [B, fuse_dims[i], h', w']
                x = fused if x is None else torch.cat([x, fused], 1)
            x, x_sum = block(x, x_sum, w)
            sums.append(x_sum)
        return sums, w

    def forward(self, z, scales=False):
        sums, w = self.body(z)
        if not scales:
            return self.blocks[-1].to_rgb(sums[-1], w)  # [B, 3, H, W]
        return [block.to_rgb(x_sum, w) for block, x_sum in zip(self.blocks, sums)]

    def last_weight(self):
        return self.blocks[-1].to_rgb.weight


# --------------------------------------
# RAE's decoder

def grid_angles(grid, k):
    """index / 10000^(i / k), i < k, of rows and of columns, each [grid, grid, k]."""
    angle = torch.arange(grid, device="cpu")[:, None] / 10_000 ** (torch.arange(k, device="cpu").double() / k)
    return angle[:, None].expand(grid, grid, k), angle.expand(grid, grid, k)


def sincos_positions(grid, dim):
    """[grid, grid, dim]: half by column, half by row; sines, cosines (MAE, DiT)."""
    y, x = grid_angles(grid, dim // 4)
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), -1).float()


class ViTDecoder(nn.Module):
    """MAE's transformer (arXiv 2111.06377), a class token in front: latents [B, C, h, w], at most grid x grid, ->
    images [B, 3, h f, w f] (`scales=True`: as a list of one)."""
    granularity = 1

    def __init__(self, z_dim, downsample, grid, depth, dim, num_heads, mlp_hidden):
        super().__init__()
        if dim % num_heads or dim % 4:
            raise ValueError(f"{num_heads} attention heads and 4 do not both divide {dim} channels")
        self.downsample = downsample
        self.embed = nn.Linear(z_dim, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.blocks = nn.ModuleList(ViTBlock(dim, num_heads, mlp_hidden, "gelu", eps=1e-12) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, 1e-12)
        self.pred = nn.Linear(dim, 3 * downsample ** 2)
        self.register_buffer("pos_embed", sincos_positions(grid, dim), persistent=False)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZATION["imagenet"])
        self.register_buffer("output_scale", 2 * std, persistent=False)  # 2 (std x + mean) - 1
        self.register_buffer("output_shift", 2 * mean - 1, persistent=False)

    def body(self, z):
        h, w = z.shape[2:]
        x = self.embed(z.flatten(2).mT) + self.pos_embed[:h, :w].flatten(0, 1)  # [B, N, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)  # [B, 1 + N, D]
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 1:])  # [B, N, D]

    def forward(self, z, scales=False):
        if max(z.shape[2:]) > len(self.pos_embed):
            raise UserError(f"the decoder takes latents of at most {len(self.pos_embed)} a side")
        f = self.downsample
        x = self.pred(self.body(z)).unflatten(2, (f, f, 3)).unflatten(1, z.shape[2:])  # [B, h, w, f, f, 3]
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # [B, 3, h f, w f]
        x = x * self.output_scale + self.output_shift
        return [x] if scales else x

    def last_weight(self):
        return self.pred.weight


# --------------------------------------
# The tokenizer

class Tokenizer(nn.Module):
    """encode: images [B, 3, H, W] in [-1, 1] -> mean (with a `quantizer` its codes), logvar [B, C, H/f, W/f]; decode:
    latents -> images.

    The encoder is a VFM and an adapter (VFM-VAE's with `level_dims`, RAE's if `adapter_kind` is "identity", PS-VAE's if
    "blocks", else AlignTok's) or LDM's; modules' arguments are dictionaries. Tokenizer(**tokenizer.arch) is the same
    model."""

    def __init__(
            self, resolution=256, downsample=16, z_dim=32, vfm=None, layers=(0, 12, -1), scale_factor=2.0,
            level_dims=None, encoder=None, decoder=None, decoder_kind="vfmvae", vf_dim=0, adapter_kind="",
            semantic_head=None, quantizer=None):
        super().__init__()
        self.arch = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.resolution = resolution
        self.downsample = downsample
        self.z_dim = z_dim
        self.layers = tuple(layers)
        self.scale_factor = scale_factor
        self.vfm = None
        if vfm:
            self.vfm = vit_from(vfm).eval()  # BatchNorms keep their statistics, also in training
            dim = self.vfm.embed_dim
            if min(layers) < -1 or max(layers) > self.vfm.depth:
                raise UserError(f"layers {layers}: this VFM has 0 to {self.vfm.depth}, and -1")
            fold = downsample * scale_factor / self.vfm.patch_size
            if fold < 1 or fold % 1 or fold > 1 and not level_dims:
                raise UserError(f"VFM tokens {fold:g} times as fine as latents: see --scale_factor, --downsample")
            if level_dims:
                if len(level_dims) != len(layers):
                    raise UserError(f"an adapter of {len(level_dims)} levels, but layers {layers}")
                in_dims = [self.vfm.level0_dim if i == 0 else dim for i in layers]
                self.adapter = LevelAdapter(in_dims, level_dims, round(fold), z_dim)
            elif adapter_kind == "identity":
                if z_dim != dim:
                    raise UserError(f"latents of {z_dim} channels are not the tokens of a VFM of {dim}")
                self.adapter = IdentityAdapter()
            elif adapter_kind == "blocks":
                self.adapter = BlocksAdapter(dim, self.vfm.blocks[0].attn.num_heads, z_dim)
            else:
                self.adapter = PointwiseAdapter(dim, z_dim)
        else:
            self.adapter = LDMEncoder(z_dim, **encoder)
        if decoder_kind == "vfmvae":
            self.decoder = VFMVAEDecoder(z_dim, downsample, **decoder)
        elif decoder_kind == "vit":
            self.decoder = ViTDecoder(z_dim, downsample, **decoder)
        else:
            self.decoder = LDMDecoder(z_dim, **decoder)
        self.vf_proj = pointwise(z_dim, vf_dim, bias=False) if vf_dim else None  # for the VF loss alone
        self.semantic_head = SemanticHead(z_dim, **semantic_head) if semantic_head else None  # for its loss alone
        self.quantizer = SimVQ(z_dim, **quantizer) if quantizer else None

    def features(self, images):
        """What the adapter reads: the VFM's levels, or images."""
        if self.vfm is None:
            return images
        return self.vfm(self.vfm.resize(images, scale=self.scale_factor), self.layers)

    def check_size(self, height, width):
        f = self.downsample * self.decoder.granularity
        patch = self.vfm.patch_size if self.vfm else 1
        for side in (height, width):
            if side % f or round(side * self.scale_factor) % patch:
                scale = self.scale_factor
                raise UserError(f"{height} x {width}: sides must be multiples of {f}, times {scale:g} of {patch}")

    def moments(self, features, height, width):
        return self.adapter(features, (height // self.downsample, width // self.downsample))  # [B, 2 C, h, w]

    def posterior(self, features, height, width):
        mean, logvar = self.moments(features, height, width).float().chunk(2, 1)  # each [B, C, h, w]
        return mean, logvar.clamp(-30, 20)

    def encode(self, images):
        self.check_size(*images.shape[-2:])
        mean, logvar = self.posterior(self.features(images), *images.shape[-2:])
        return self.quantize(mean), logvar

    def quantize(self, z):
        return z if self.quantizer is None else self.quantizer(z)[0]

    def decode(self, z):
        return self.decoder(z)


def vfm_of(cfg):
    """(name, scale factor) of the method's VFM: the configured, or the paper's."""
    own = dict(
        vfmvae=("siglip2-large-patch16-512", 2.0), rae=("dinov2_vitb14_reg", 0.875), psvae=("dinov2_vitb14", 0.875))
    name, scale = own.get(cfg.method, ("dinov2_vitl14", 0.875))
    return cfg.vfm or name, cfg.scale_factor or scale


def build_tokenizer(cfg, pretrained=True):
    """-> an untrained Tokenizer (its VFM pretrained), the VF or semantic loss's VFM if another."""
    name, scale = vfm_of(cfg)
    on_vfm = cfg.method in ("vfmvae", "aligntok", "rae", "psvae")
    vf = any(stage.vf for stage in stages_of(cfg))
    semantic = any(stage.semantic for stage in stages_of(cfg))
    vfm = load_vfm(name, cfg.cache, pretrained) if vf or semantic or on_vfm else None
    kind = cfg.decoder or dict(vfmvae="vfmvae", rae="vit").get(cfg.method, "ldm")
    convs = dict(
        ch=cfg.ch, ch_mult=cfg.ch_mult, num_res_blocks=cfg.ldm_blocks, groups=cfg.groups,
        attn_levels=(len(cfg.ch_mult) - 1,) if cfg.ldm_attention else ())
    arch = dict(
        resolution=cfg.image_size, downsample=cfg.downsample, z_dim=cfg.z_dim, decoder_kind=kind,
        decoder=convs, vf_dim=vfm.embed_dim if vf else 0, quantizer=dict(size=cfg.codebook) if cfg.quantizer else None)
    if kind == "vfmvae":
        names = ("post_factor", "widths", "fuse_dims", "attention", "num_res_blocks", "w_dim")
        arch["decoder"] = {name: getattr(cfg, name) for name in names}
    elif kind == "vit":
        arch["decoder"] = dict(zip(("depth", "dim", "num_heads", "mlp_hidden"), cfg.vit_decoder))
        arch["decoder"]["grid"] = cfg.image_size // cfg.downsample
    if on_vfm:
        arch.update(vfm=vfm.config, scale_factor=scale, layers=(-1,))
    else:
        arch.update(encoder=convs, scale_factor=1.0)
    if semantic:
        arch["semantic_head"] = dict(dim=vfm.embed_dim, num_heads=vfm.blocks[0].attn.num_heads)
    if cfg.method == "rae":
        arch.update(z_dim=vfm.embed_dim, layers=(vfm.depth,), adapter_kind="identity")
    elif cfg.method == "psvae":
        arch["adapter_kind"] = "blocks"
    elif cfg.method == "vfmvae":
        arch.update(layers=cfg.layers, level_dims=(cfg.level_dim,) * len(cfg.layers))
        if cfg.layers[-1:] != (-1,):
            raise UserError("--layers must end with -1, which the VF loss reads")
    if (kind == "ldm" or not on_vfm) and 2 ** (len(cfg.ch_mult) - 1) != cfg.downsample:
        raise UserError(f"--ch_mult of {len(cfg.ch_mult)} levels does not downsample by {cfg.downsample}")
    if min(0, *cfg.widths, *cfg.fuse_dims, *cfg.attention, *cfg.ch_mult, *cfg.vit_decoder) < 0:
        raise UserError("--widths, --fuse_dims, --attention, --ch_mult, --vit_decoder must not be negative")
    try:
        tok = Tokenizer(**arch)
    except (ValueError, TypeError, ArithmeticError, IndexError) as error:  # groups, heads
        raise UserError(f"no network has such widths: {error}")
    tok.check_size(cfg.image_size, cfg.image_size)
    if on_vfm:
        tok.vfm = vfm
        vfm = None  # the loss reads the encoder's
    return tok, vfm


# --------------------------------------
# Losses on latents

def kl_loss(mean, logvar):
    """0.5 sum(mean^2 + var - 1 - logvar) over C, h, w; averaged over the batch."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def commit_loss(z, codes):
    """VQ-VAE's (arXiv 1711.00937, eq. 3): the codes' distance from the latents, a quarter of the latents' from them."""
    return F.mse_loss(codes, z.detach()) + 0.25 * F.mse_loss(z, codes.detach())


def pool_tokens(features, grid):
    """A VFM's tokens [B, N, D], detached, pooled to the latents' (h, w) -> [B, D, h, w]."""
    side = math.isqrt(features.shape[1] * grid[0] // grid[1])
    return F.adaptive_avg_pool2d(features.detach().float().mT.unflatten(2, (side, -1)), grid)


def semantic_loss(predicted, features, grid):
    """PS-VAE's (arXiv 2512.17909): predicted tokens [B, h w, D] against the VFM's [B, N, D], pooled to (h, w): mean
    squared error, and 1 - cosine."""
    predicted = predicted.float()
    target = pool_tokens(features, grid).flatten(2).mT  # [B, h w, D]
    return F.mse_loss(predicted, target) + 1 - F.cosine_similarity(predicted, target, dim=2).mean()


def vf_loss(projected, features, margin_matrix=0.0, margin_cos=0.0):
    """VA-VAE's VF loss (arXiv 2501.01423, section 3.2), VFM-VAE's representation regularisation: projected latents
    [B, D, h, w] against the VFM's tokens [B, N, D], pooled to their grid: cosines over all pairs, and one by one."""
    f = F.normalize(pool_tokens(features, projected.shape[2:]).flatten(2), dim=1)  # [B, D, h w]
    z = F.normalize(projected.float().flatten(2), dim=1)  # [B, D, h w]
    matrix = F.relu((z.mT @ z - f.mT @ f).abs() - margin_matrix).mean()
    return matrix + F.relu(1 - margin_cos - (z * f).sum(1)).mean()


def adaptive_weight(loss, other, weight, most):
    """LDM's weight of `other` beside `loss` (arXiv 2012.09841, eq. 7): their gradients' ratio at a layer."""
    norms = [torch.autograd.grad(each, weight, retain_graph=True)[0].float().norm() for each in (loss, other)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=most)


def stand_in(x, grad):
    """A loss whose gradient at x is `grad`."""
    return (x * grad).sum()


def draw_equivariance(seed, step, grid, granularity):
    """VFM-VAE's equivariance regularisation of a batch, alike on all processes -> (kind, scale, quarter turns): with
    probability 0.5 the "latent" is scaled and rotated, otherwise with 0.25 the "image" shrunk, else None."""
    rng = np.random.default_rng((seed, step, 1))
    latent = rng.uniform() < 0.5
    scales = (0.25, 0.5, 0.75, 1.0) if latent else (0.25, 0.5, 0.75)
    scales = [scale for scale in scales if grid * scale % granularity == 0]
    if latent:
        return "latent", float(rng.choice(scales)), int(rng.integers(4))
    if rng.uniform() < 0.25 and scales:
        return "image", float(rng.choice(scales)), 0
    return None, 1.0, 0


# --------------------------------------
# Training

class Trainer:
    """One tokenizer's training, alone or joint (align.py)."""

    def objective(self, images, images_seen=0):
        """The loss of images [B, 3, H, W] in plain form; `generator_step` computes its gradients fast."""
        stage, tok = self.stage, self.tokenizer
        mean, logvar, features = self.encode(images)
        z, indices = self.draw_latent(mean, logvar)
        outputs = self.decode(z.detach() if stage.detach else z, images_seen)
        reconstruction, _ = self.reconstruction_loss(outputs, images)  # L1, LPIPS, SSIM, multi-resolution L1
        loss = reconstruction + stage.kl * kl_loss(mean, logvar)
        if stage.preserve:
            loss = loss + stage.weight("preserve", images) * self.preserve_loss(images, mean)
        if tok.quantizer is not None:
            loss = loss + stage.weight("commit", images) * commit_loss(mean, tok.quantizer.lookup(indices))
        if stage.semantic:
            loss = loss + stage.weight("semantic", images) * self.semantic_loss(images, z, features)
        if stage.vf:
            vf = vf_loss(tok.vf_proj(z), features[-1], *stage.vf_margins)
            loss = loss + stage.vf * adaptive_weight(reconstruction, vf, tok.adapter.last_weight(), 1e8) * vf
        if self.gan and images_seen >= self.gan_start:
            gan, _ = self.adversarial_loss(outputs[-1], images)
            if stage.gan_adaptive:
                plain = gan / (stage.patch or stage.dino)
                gan = adaptive_weight(reconstruction, plain, tok.decoder.last_weight(), 1e4) * gan
            loss = loss + gan
        return loss

    def __init__(self, cfg, tokenizer, world, vfm=None, length_scale=1.0, pretrained=True):
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.world = world
        self.target_vfm = vfm  # the VF loss's, where the encoder is no VFM
        self.length_scale = length_scale
        self.pretrained = pretrained
        self.stage = self.anchor = self.gan = self.perceptual_net = None
        if any(stage.lpips for stage in stages_of(cfg)):
            if cfg.perceptual == "lpips":
                net = LPIPS(cfg.lpips_weights if pretrained else None)
            else:
                net = FeatureDistance(load_vfm(cfg.perceptual, cfg.cache, pretrained))
            self.perceptual_net = net.to(world.device, memory_format=world.layout)
        torch.backends.cudnn.benchmark = True
        if cfg.compile:
            torch._dynamo.config.cache_size_limit = 64  # sizes x scales x stages
            torch._functorch.config.donated_buffer = False  # a graph may be walked twice
            blocks = getattr(tokenizer.adapter, "blocks", None)
            levels = getattr(tokenizer.adapter, "levels", ())
            for module in (tokenizer.vfm, vfm, self.perceptual_net, blocks, tokenizer.semantic_head, *levels):
                if module is not None:
                    module.compile(dynamic=False)
            for module in (tokenizer.adapter, tokenizer.decoder):
                if hasattr(module, "body"):
                    module.body = torch.compile(module.body, dynamic=False)

    def start_stage(self, stage):
        """Freezes, unfreezes, makes discriminators and optimizers."""
        cfg, device = self.cfg, self.world.device
        if self.tokenizer.quantizer is not None:
            stage = dataclasses.replace(stage, kl=0.0)  # codes have no posterior
        self.stage = stage
        self.multires_end = stage.multires_kimg * 1000 * self.length_scale  # images
        self.gan_start = stage.gan_start_kimg * 1000 * self.length_scale
        groups = select_parameters(self.tokenizer, stage.trains)
        self.parameters = sum(groups.values(), [])
        adam = functools.partial(torch.optim.Adam, lr=stage.lr, betas=stage.betas, fused=True)
        rates = dict(encoder=stage.encoder_lr)
        self.optimizer = adam([dict(params=group, lr=rates.get(name, stage.lr)) for name, group in groups.items()])

        previous = self.gan
        self.gan = self.gan_optimizer = None
        if stage.dino or stage.patch or stage.multi:
            vit = load_vfm(cfg.disc_vfm, cfg.cache, self.pretrained) if stage.dino else None
            self.gan = GAN(stage, vit, cfg.ndf, cfg.image_size).to(device, memory_format=self.world.layout)
            if self.world.size > 1 and device.type == "cuda":
                self.gan = nn.SyncBatchNorm.convert_sync_batchnorm(self.gan)
            if previous:  # what the stages share goes on
                self.gan.load_state_dict(previous.state_dict(), strict=False)
            self.gan_parameters = [p for p in self.gan.parameters() if p.requires_grad]
            self.gan_optimizer = adam(self.gan_parameters)
            if stage.dino and cfg.compile:
                self.gan.dino.vit.compile(dynamic=False)
        if not (stage.preserve or stage.semantic and "encoder" in stage.trains):
            self.anchor = None
        elif self.anchor is None:  # the frozen encoder of the stage before; of PS-VAE the VFM as it came
            memo = {id(self.tokenizer.decoder): None}
            self.anchor = copy.deepcopy(self.tokenizer, memo).requires_grad_(False)
            if cfg.compile:
                self.anchor.vfm.compile(dynamic=False)

    def adopt(self, averages):
        """At a stage's start what it freezes, and the anchor, become the averages."""
        trained = {name for name, p in self.tokenizer.named_parameters() if p.requires_grad}
        frozen = {k: v for k, v in averages.items() if k not in trained}
        self.tokenizer.load_state_dict(frozen, strict=False)
        if self.anchor:
            self.anchor.load_state_dict(averages, strict=False)

    def state_dict(self):
        entries = dict(model=self.tokenizer.state_dict())
        for name in ("optimizer", "gan", "gan_optimizer", "anchor"):
            part = getattr(self, name)
            entries[name] = part and part.state_dict()
        return entries

    def load_state_dict(self, entries, same_stage=True):
        """After `start_stage`: all but the model."""
        with reading(entries.path):
            for name in ("anchor", "gan"):
                part = getattr(self, name)
                if part and entries[name]:
                    part.load_state_dict(entries[name], strict=False)
            if same_stage:
                load_moments(self.optimizer, entries["optimizer"])
                if self.gan:
                    load_moments(self.gan_optimizer, entries["gan_optimizer"])

    def set_lr(self, progress):
        """`progress`: of the whole run, 0 to 1."""
        factor = min(1, (1 - progress) / self.cfg.cooldown) if self.cfg.cooldown else 1
        for optimizer in filter(None, (self.optimizer, self.gan_optimizer)):
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("base_lr", group["lr"]) * factor

    def encode(self, images):
        """-> mean, logvar [B, C, h, w], the VFM's levels (None for the plain VAE)."""
        vfm = self.target_vfm
        with self.world.autocast():
            features = self.tokenizer.features(images)
            mean, logvar = self.tokenizer.posterior(features, *images.shape[-2:])
            if self.tokenizer.vfm is None:
                features = vfm and vfm(vfm.resize(images, scale=vfm_of(self.cfg)[1]))
        return mean, logvar, features

    def decode(self, z, images_seen):
        """-> images, coarse to fine while the multi-resolution loss is on, else the finest; of noised latents, if the
        stage says so (RAE, arXiv 2510.11690, section 4: diffusion's latents are not quite the encoder's)."""
        if self.stage.noise:
            sigma = self.stage.noise * torch.rand(len(z), 1, 1, 1, device=z.device)
            z = z + sigma * torch.randn_like(z)
        scales = images_seen < self.multires_end
        with self.world.autocast():
            outputs = self.tokenizer.decoder(z, scales=scales)
        return outputs if scales else [outputs]

    def draw_latent(self, mean, logvar):
        """-> what is decoded, the codes' indices or None."""
        if self.tokenizer.quantizer is not None:
            codes, indices = self.tokenizer.quantizer(mean)
            return mean + (codes - mean).detach(), indices  # straight through
        return mean + torch.exp(0.5 * logvar) * torch.randn_like(mean) if self.stage.sample else mean, None

    def preserve_loss(self, images, mean):
        """AlignTok's: the distance from the anchor's latents."""
        with self.world.autocast():
            anchor, _ = self.anchor.posterior(self.anchor.features(images), *images.shape[-2:])
        return F.mse_loss(mean, anchor)

    def semantic_loss(self, images, z, features):
        with self.world.autocast():
            if self.anchor:  # this stage trains the VFM
                features = self.anchor.features(images)
            predicted = self.tokenizer.semantic_head(z)
        return semantic_loss(predicted, features[-1], z.shape[2:])

    def latent_losses(self, images, labels, z, indices, mean, logvar, features, whole):
        """Losses that bypass the decoder -> values, weighted sum without the VF loss, that or None. `images`: as
        encoded; `whole` (as read), `labels`: for joint training."""
        stage = self.stage
        values = {}
        if stage.kl:
            values["kl"] = kl_loss(mean, logvar)
        if stage.preserve:
            values["preserve"] = self.preserve_loss(images, mean)
        if stage.semantic:
            values["semantic"] = self.semantic_loss(images, z, features)
        quantizer = self.tokenizer.quantizer
        if quantizer is not None:
            values["commit"] = commit_loss(mean, quantizer.lookup(indices))
        fixed = self.weigh(values, images)
        if quantizer is not None:
            used = torch.zeros_like(quantizer.codebook[:, 0]).index_fill(0, indices.flatten(), 1)
            values["codes"] = used.sum() / min(len(used), indices.numel())  # of as many as there could be
        vf = None
        if stage.vf:
            with self.world.autocast():
                projected = self.tokenizer.vf_proj(z)
            values["vf"] = vf = vf_loss(projected, features[-1], *stage.vf_margins)
        return values, fixed, vf

    def weigh(self, values, images):
        """The weighted sum."""
        total = images.new_zeros((), requires_grad=True)
        for name, value in values.items():
            total = total + self.stage.weight(name, images) * value
        return total

    def reconstruction_loss(self, outputs, target):
        """Of the decoder's scales -> (weighted sum, values)."""
        stage, fake = self.stage, outputs[-1]
        values = {}
        if stage.l1:
            values["l1"] = F.l1_loss(fake, target)
        if stage.lpips:
            with self.world.autocast():
                values["lpips"] = self.perceptual_net(fake, target).mean()
        if stage.ssim:
            values["ssim"] = 1 - ssim(fake.clamp(-1, 1), target, data_range=2).mean()
        if len(outputs) > 1:
            resize = self.tokenizer.vfm.resize
            values["multires"] = sum(F.l1_loss(small, resize(target, small.shape[-2:])) for small in outputs[:-1])
        return self.weigh(values, target), values

    def adversarial_loss(self, fake, target):
        """-> (weighted sum, values)."""
        self.gan.requires_grad_(False)
        with self.world.autocast():
            values = self.gan.generator_loss(fake, target)
        return self.weigh(values, target), values

    def generator_step(self, images, labels, step, images_seen, share=1.0):
        """Accumulates `share` times the objective's gradients on one (micro-)batch -> (losses, fake, target).

        The graph is cut at latent and images: losses on images are walked back once, LDM's adaptive weight costs its
        last layer alone, the VF loss's, beside a GAN, one walk more through the decoder."""
        stage, tok = self.stage, self.tokenizer
        kind = None
        if stage.equivariance:
            grid = images.shape[-1] // tok.downsample
            kind, scale, turns = draw_equivariance(self.cfg.seed, step, grid, tok.decoder.granularity)
        whole = images
        if kind == "image":
            images = shrink(images, scale)
        mean, logvar, features = self.encode(images)
        z, indices = self.draw_latent(mean, logvar)
        moved = z
        target = images
        if kind == "latent":  # one memory layout: compiled once
            target = torch.rot90(shrink(images, scale), turns, (2, 3)).contiguous()
            moved = torch.rot90(shrink(z, scale, antialias=False), turns, (2, 3))
            moved = moved.contiguous(memory_format=torch.channels_last)
        latent = moved.detach().requires_grad_(z.requires_grad and not stage.detach)
        outputs = self.decode(latent, images_seen)

        # gradients at the images
        leaves = [output.detach().float().requires_grad_() for output in outputs]
        rec, values = self.reconstruction_loss(leaves, target)
        grads = list(torch.autograd.grad(rec, leaves, materialize_grads=True))
        adv = None
        if self.gan and images_seen >= self.gan_start:
            loss, parts = self.adversarial_loss(leaves[-1], target)
            values.update(parts)
            adv, = torch.autograd.grad(loss, leaves[-1])
            if stage.gan_adaptive:
                ours = stand_in(outputs[-1], grads[-1])
                theirs = stand_in(outputs[-1], adv / (stage.patch or stage.dino))
                values["gan_weight"] = adaptive_weight(ours, theirs, tok.decoder.last_weight(), 1e4)
                adv = adv * values["gan_weight"]
        losses, fixed, vf = self.latent_losses(images, labels, z, indices, mean, logvar, features, whole)
        values.update(losses)

        # gradients at the latent; the VF loss is weighed against reconstruction alone
        rec_grad = None
        if adv is not None:
            if vf is not None:
                rec_grad, = torch.autograd.grad(share * sum(map(stand_in, outputs, grads)), latent, retain_graph=True)
            grads[-1] = grads[-1] + adv
        (share * sum(map(stand_in, outputs, grads))).backward()

        # gradients at the encoder
        if vf is not None:
            rec_grad = latent.grad if rec_grad is None else rec_grad
            ours = stand_in(moved, rec_grad / share)
            values["vf_weight"] = stage.vf * adaptive_weight(ours, vf, tok.adapter.last_weight(), 1e8)
            fixed = fixed + values["vf_weight"] * vf
        pixels = stand_in(moved, latent.grad) if latent.requires_grad else 0
        (pixels + share * fixed).backward()
        return {k: v.detach() for k, v in values.items()}, leaves[-1].detach(), target

    def discriminator_step(self, fake, target, share=1.0):
        """Accumulates gradients -> loss."""
        for p in self.gan_parameters:
            p.requires_grad_()
        with self.world.autocast():
            loss = self.gan.discriminator_loss(fake, target)
        (loss * share).backward()
        return loss.detach()

    def step(self, batches, step, images_seen):
        """On micro-batches (uint8 images, labels) -> losses of the last, "skipped": 1 if not finite, else 0."""
        share = 1 / self.cfg.accumulate
        pairs = []
        for images, labels in batches:
            images = to_float(images.to(self.world.device, non_blocking=True))  # [b, 3, H, W]
            losses, fake, target = self.generator_step(images, labels, step, images_seen, share)
            pairs.append((fake, target))
        average_gradients(self.parameters, self.world)
        losses["grad_norm"] = gradient_norm(self.parameters)
        optimizers = [self.optimizer]
        norms = []
        if self.gan and images_seen >= self.gan_start:
            for fake, target in pairs:
                losses["discriminator"] = self.discriminator_step(fake, target, share)
            average_gradients(self.gan_parameters, self.world)
            norms.append(gradient_norm(self.gan_parameters))
            optimizers.append(self.gan_optimizer)
        skipped = self.world.any_bad([*losses.values(), *norms])
        for optimizer in optimizers:  # all or none
            step_unless(skipped, optimizer)
        return dict(losses, skipped=skipped)


def select_parameters(tok, trains):
    """Freezes the rest -> {name: parameters}."""
    tok.requires_grad_(False)
    decoder = tok.decoder
    if isinstance(decoder, LDMDecoder):
        high = [*decoder.up[:3], decoder.norm_out, decoder.conv_out]
    elif isinstance(decoder, ViTDecoder):
        high = [*decoder.blocks[-3:], decoder.norm, decoder.pred]
    else:
        high = decoder.blocks[-3:]
    parts = dict(
        encoder=[tok.vfm], adapter=[tok.adapter, tok.vf_proj, tok.semantic_head],
        decoder=[decoder, tok.quantizer], high=high)
    groups = {}
    for name in trains.split():
        modules = nn.ModuleList(part for part in parts[name] if part is not None)
        groups[name] = list(modules.requires_grad_().parameters())
    return groups


def average_gradients(parameters, world):
    """Not DistributedDataParallel: losses walk a graph several times."""
    if world.size > 1:
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = world.mean(torch._utils._flatten_dense_tensors(grads))
        torch._foreach_copy_(grads, torch._utils._unflatten_dense_tensors(flat, grads))


def gradient_norm(parameters):
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def step_unless(skipped, optimizer):
    """A step of fused Adam, which does nothing where the tensor `skipped` is 1 (GradScaler's way): the GPU decides."""
    optimizer.found_inf = skipped
    optimizer.step()
    optimizer.zero_grad()


def lerp_unless(skipped, averages, weights, weight):
    """averages <- lerp(averages, weights, weight), unless the tensor `skipped` is 1."""
    moves = torch._foreach_sub(weights, averages)
    torch._foreach_mul_(moves, weight * (1 - skipped))
    torch._foreach_add_(averages, moves)


def load_moments(opt, saved):
    """Adam's state, at this run's rates, in parameters' memory layout, as fused Adam insists."""
    opt.load_state_dict(dict(opt.state_dict(), state=saved["state"]))
    for p, state in opt.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.empty_like(p).copy_(state[key])


def average_weights(averages, module, images, batch, half_kimg, skipped):
    """EMA of weights that train, {name: tensor}; half-life at most 5% of the images seen."""
    live = dict(module.named_parameters())
    names = [name for name in averages if live[name].requires_grad]
    decay = 0.5 ** (batch / max(1e-3, min(half_kimg * 1000, 0.05 * images)))
    weights = [live[name].detach() for name in names]
    lerp_unless(skipped, [averages[name] for name in names], weights, 1 - decay)


@contextlib.contextmanager
def use_weights(module, weights):
    """Swaps weights in, and back out."""
    live = dict(module.named_parameters())
    saved = {name: live[name].detach().clone() for name in weights}
    module.load_state_dict(weights, strict=False)
    try:
        yield
    finally:
        module.load_state_dict(saved, strict=False)


def stages_of(cfg):
    stages = STAGES[cfg.recipe][cfg.method]
    if cfg.stage > len(stages):
        raise UserError(f"--stage={cfg.stage}: {cfg.method} has {', '.join(stage.name for stage in stages)}")
    return stages


def stage_plan(cfg):
    """-> [(number, stage, first image, last image)], the factor of --kimg."""
    stages = stages_of(cfg)
    scale = cfg.kimg / sum(stage.kimg for stage in stages) if cfg.kimg else 1.0
    plan = []
    end = last = 0
    for number, stage in enumerate(stages, 1):
        first = last
        end += stage.kimg * 1000 * scale
        last = round(end / cfg.batch_size) * cfg.batch_size
        plan.append((number, stage, first, last))
    if last <= 0:
        raise UserError(f"--kimg={cfg.kimg:g} is less than one batch of {cfg.batch_size}")
    return plan, scale


@torch.no_grad()
def training_flops(cfg, tok, whole=False):
    """{stage's name: FLOPs of an image's training step}, thrice the forward pass where it trains, at equivariance's
    average size or of `whole` images; without losses and discriminators."""

    def count(part, *inputs):
        with FlopCounterMode(display=False) as counter:
            output = part(*inputs)
        return output, counter.get_total_flops()

    size = cfg.image_size
    device = next(tok.parameters()).device
    features, vfm = count(tok.features, torch.zeros(1, 3, size, size, device=device))
    moments, adapter = count(tok.moments, features, size, size)
    _, decoder = count(tok.decode, moments.chunk(2, 1)[0])
    grid = size // tok.downsample
    draws = [draw_equivariance(cfg.seed, step, grid, tok.decoder.granularity) for step in range(1000)]
    flops = {}
    for stage in stages_of(cfg):
        encoder = vfm * (3 if "encoder" in stage.trains else 1) + adapter * (3 if "adapter" in stage.trains else 1)
        encoded = decoded = 1.0
        if stage.equivariance and not whole:
            encoded = np.mean([scale ** 2 if kind == "image" else 1.0 for kind, scale, _ in draws])
            decoded = np.mean([scale ** 2 for _, scale, _ in draws])
        flops[stage.name] = float(encoder * encoded + 3 * decoder * decoded)
    return flops


def train(cfg, world):
    """The stages, or on from OUT/tokenizer.pt -> the averaged Tokenizer."""
    path = Path(cfg.out) / "tokenizer.pt"
    plan, length_scale = stage_plan(cfg)
    end = plan[-1][3]
    plan = [row for row in plan if cfg.stage in (0, row[0])]
    start, stop = plan[0][2], plan[-1][3]
    batch = cfg.batch_size
    if start >= stop:
        raise UserError(f"--stage={cfg.stage} is less than one batch of {batch}: raise --kimg")
    data = open_data(cfg, "train", cfg.image_size, cfg.crop, cfg.flip)
    held_out = open_data(cfg, "val", cfg.image_size)

    torch.manual_seed(cfg.seed)
    tok, vfm = build_tokenizer(cfg)
    tok = tok.to(world.device, memory_format=world.layout)
    vfm = vfm and vfm.to(world.device)
    entries = load_checkpoint(path, "tokenizer") if cfg.resume and path.exists() else None
    seen = 0
    if entries:
        with reading(path):
            keys = ("method", "recipe", "data", "batch_size", "seed", "kimg", "disc_vfm", "ndf")
            now = {**{key: getattr(cfg, key) for key in keys}, **tok.arch, "--vfm": vfm_of(cfg)[0]}
            then = {**entries["config"], **entries["arch"], "--vfm": vfm_of(Config(**entries["config"]))[0]}
            changed = [f"{key} {then.get(key)}, now {now[key]}" for key in now if now[key] != then.get(key)]
            if changed:
                raise UserError(f"{path} is another run's ({'; '.join(changed)}): another --out, or --resume=0")
            for state in ({**entries["model"], **entries["ema"]}, entries["model"]):  # both fit
                load_state(tok, state, str(path))
            seen = entries["images"]
    world.agree(configuration=cfg, checkpoint=seen, data=data.identity())
    if seen < start:
        raise UserError(f"stage {cfg.stage} starts at image {start}; {path} has seen {seen}, or is not read")
    if seen >= stop:
        if world.rank == 0:
            print(f"{path} is trained already; --resume=0 starts afresh")
        tok.load_state_dict(entries["ema"], strict=False)
        return tok
    # before compiling: dynamo skips what a dispatch mode has seen
    flops = training_flops(cfg, tok) if world.device.type == "cuda" else {}
    trainer = Trainer(cfg, tok, world, vfm, length_scale)
    ema = {}
    vfm_trains = any("encoder" in stage.trains for stage in stages_of(cfg))
    with reading(path):
        for name, p in tok.named_parameters():
            if vfm_trains or not name.startswith("vfm."):
                ema[name] = entries["ema"][name].to(world.device) if entries else p.detach().clone()
    if world.rank == 0:
        millions = sum(p.numel() for p in tok.parameters()) / 1e6
        print(f"{cfg.method} on {len(data)} images of {cfg.data}, {cfg.image_size} px; {millions:.1f} M parameters; "
              f"{world.size} x {world.device.type}; from image {seen}")
    log = Log(cfg.out, "tokenizer", world, stop // batch, seen // batch)
    watch = Watch(world, path, entries)
    pictures = torch.stack([held_out[i][0] for i in range(min(16, len(held_out)))])
    pictures = to_float(pictures.to(world.device))

    def save(number):
        if world.rank == 0:
            save_checkpoint(
                path, kind="tokenizer", config=dataclasses.asdict(cfg), arch=tok.arch, ema=ema, classes=data.classes,
                stage=number, images=seen, skipped=int(watch.skipped), **trainer.state_dict())
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
            trainer.load_state_dict(entries, same_stage=entries["stage"] == number)
            entries = None
        steps = range(seen // batch, last // batch)
        order = step_batches(len(data), batch, cfg.seed, steps.start, steps.stop, world, cfg.accumulate)
        batches = iter(make_loader(data, order, world, cfg.workers))
        if world.rank == 0:
            tqdm.write(f"stage {number}, {stage.name}: images {first} to {last}, trains {stage.trains}")
        for step in watch.steps(steps):
            seed_step(cfg.seed, step, world.rank)
            trainer.set_lr(seen / end)
            losses = trainer.step((next(batches) for _ in range(cfg.accumulate)), step, seen)
            seen += batch
            average_weights(ema, tok, seen, batch, cfg.ema_kimg, losses["skipped"])
            caught = watch.count(losses)
            log.bar.update()
            saving = (step + 1) % cfg.save_interval == 0 or seen == last
            if (step + 1) % cfg.log_interval == 0 or saving:
                losses = {k: world.mean(v) for k, v in losses.items()}
                lr = trainer.optimizer.param_groups[-1]["lr"]
                log.write(step + 1, seen, epoch=seen / len(data), stage=number, lr=lr, **losses)
            if world.rank == 0 and ((step + 1) % cfg.grid_interval == 0 or seen == last):
                with torch.no_grad(), world.autocast(), use_weights(tok, ema):
                    decoded = tok.decode(tok.encode(pictures)[0]).float()
                pairs = torch.stack([pictures, decoded], 1).flatten(0, 1)
                save_grid(pairs, Path(cfg.out) / f"grids/tokenizer-{step + 1:07d}.png", 8)
            if saving or caught:
                save(number)
            watch.obey(caught, step + 1)
    log.bar.close()
    tok.load_state_dict(ema, strict=False)
    return tok


def bench(cfg, world):
    """Times each stage's training step (without the weights' average) on random images and weights."""
    tok, vfm = build_tokenizer(cfg, pretrained=False)
    tok = tok.to(world.device, memory_format=world.layout)
    flops = training_flops(cfg, tok, whole=True)
    trainer = Trainer(cfg, tok, world, vfm and vfm.to(world.device), pretrained=False)
    shape = micro_batch(cfg.batch_size, world, cfg.accumulate), 3, cfg.image_size, cfg.image_size
    images = torch.randint(0, 256, shape, dtype=torch.uint8).to(world.device)
    batches = [(images, torch.zeros(len(images), dtype=torch.long))] * cfg.accumulate
    for number, stage in enumerate(stages_of(cfg), 1):
        if cfg.stage in (0, number):
            trainer.start_stage(dataclasses.replace(stage, gan_start_kimg=0.0, equivariance=False))
            title = f"{cfg.method}, {cfg.image_size} px, {stage.name}"
            time_steps(title, lambda: trainer.step(batches, 0, 0), cfg.bench, cfg.batch_size, flops[stage.name], world)


# --------------------------------------
# Latent diffusion's autoencoder (arXiv 2112.10752): AlignTok's decoder; both halves in the plain VAE and VA-VAE

class ResBlock(nn.Module):
    def __init__(self, d_in, d_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, d_in, 1e-6)
        self.conv1 = nn.Conv2d(d_in, d_out, 3, 1, 1)
        self.norm2 = nn.GroupNorm(groups, d_out, 1e-6)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, 1, 1)
        self.nin_shortcut = pointwise(d_in, d_out) if d_in != d_out else nn.Identity()

    def forward(self, x):  # [B, d_in, h, w]
        y = self.conv1(F.silu(self.norm1(x)))  # [B, d_out, h, w]
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class AttnBlock(nn.Module):
    """Self-attention over positions, one head."""

    def __init__(self, dim, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, 1e-6)
        self.q = pointwise(dim, dim)
        self.k = pointwise(dim, dim)
        self.v = pointwise(dim, dim)
        self.proj_out = pointwise(dim, dim)

    def forward(self, x):  # [B, C, h, w]
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))  # [B, 1, h w, C]
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].mT  # [B, C, h w]
        return x + self.proj_out(y.unflatten(2, x.shape[2:]))


class LDMLevel(nn.Module):
    """Residual blocks, each with self-attention if so; then half the size, twice, or neither."""

    def __init__(self, d_in, d_out, blocks, groups, attention, down=False, up=False):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(d_in if i == 0 else d_out, d_out, groups) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(d_out, groups) if attention else nn.Identity() for _ in range(blocks))
        self.downsample = nn.Identity()
        self.upsample = nn.Identity()
        if down:
            conv = nn.Conv2d(d_out, d_out, 3, stride=2)
            self.downsample = nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))
        if up:
            conv = nn.Conv2d(d_out, d_out, 3, 1, 1)
            self.upsample = nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2.0), conv=conv))

    def forward(self, x):  # [B, d_in, h, w]
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))  # [B, d_out, h, w]
        return self.upsample(self.downsample(x))


def ldm_middle(dim, groups):
    blocks = dict(block_1=ResBlock(dim, dim, groups), attn_1=AttnBlock(dim, groups), block_2=ResBlock(dim, dim, groups))
    return nn.Sequential(OrderedDict(blocks))


class LDMEncoder(nn.Module):
    """Images [B, 3, H, W] -> moments [B, 2 C, H/f, W/f], f = 2^(levels - 1)."""

    def __init__(self, z_dim, ch, ch_mult, num_res_blocks, attn_levels=(), z_channels=None, groups=32):
        super().__init__()
        z_channels = z_channels or z_dim
        self.conv_in = nn.Conv2d(3, ch, 3, 1, 1)
        self.down = nn.ModuleList()
        before = ch
        for i, multiple in enumerate(ch_mult):
            last = i == len(ch_mult) - 1
            level = LDMLevel(before, ch * multiple, num_res_blocks, groups, i in attn_levels, down=not last)
            self.down.append(level)
            before = ch * multiple
        self.mid = ldm_middle(before, groups)
        self.norm_out = nn.GroupNorm(groups, before, 1e-6)
        self.conv_out = nn.Conv2d(before, 2 * z_channels, 3, 1, 1)
        self.quant_conv = pointwise(2 * z_channels, 2 * z_dim)

    def body(self, images):
        x = self.conv_in(images)  # [B, ch, H, W]
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))  # [B, 2 z_channels, h, w]

    def forward(self, images, grid):
        return self.quant_conv(self.body(images))  # [B, 2 C, h, w]

    def last_weight(self):
        return self.quant_conv.weight


class LDMDecoder(nn.Module):
    """Latents [B, C, h, w] -> images [B, 3, h f, w f] (`scales=True`: as a list of one)."""
    granularity = 1

    def __init__(self, z_dim, ch, ch_mult, num_res_blocks, attn_levels=(), z_channels=None, groups=32):
        super().__init__()
        z_channels = z_channels or z_dim
        widths = [ch * multiple for multiple in ch_mult]
        self.post_quant_conv = pointwise(z_dim, z_channels)
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, 1, 1)
        self.mid = ldm_middle(widths[-1], groups)
        self.up = nn.ModuleList()  # fine to coarse
        for i, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]])):
            self.up.append(LDMLevel(before, width, num_res_blocks + 1, groups, i in attn_levels, up=i > 0))
        self.norm_out = nn.GroupNorm(groups, widths[0], 1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, 1, 1)

    def body(self, z):
        x = self.mid(self.conv_in(self.post_quant_conv(z)))  # [B, widths[-1], h, w]
        for level in reversed(self.up):
            x = level(x)
        return F.silu(self.norm_out(x))  # [B, ch, H, W]

    def forward(self, z, scales=False):
        x = self.conv_out(self.body(z))  # [B, 3, H, W]
        return [x] if scales else x

    def last_weight(self):
        return self.conv_out.weight


# --------------------------------------
# Image metrics and discriminators

def psnr(a, b):
    """In dB, of images in [-1, 1] -> [B]."""
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1).clamp_min(1e-10))


def ssim(a, b, data_range=1):
    """Of images in [-1, 1] -> [B] (Wang et al. 2004): Gaussian window 11, sigma 1.5; on [0, 1] as metrics do, or with
    data_range=2 on [-1, 1] as VFM-VAE's loss does."""
    if data_range == 1:
        a, b = a / 2 + 0.5, b / 2 + 0.5
    c = a.shape[1]
    size = min(11, *a.shape[-2:])
    row = torch.exp(-(torch.arange(size, device=a.device) - (size - 1) / 2).square() / (2 * 1.5 ** 2))
    row = (row / row.sum()).expand(5 * c, 1, 1, -1)
    x = torch.cat([a, b, a * a, b * b, a * b], 1).float()  # [B, 5 C, H, W]
    x = F.conv2d(F.conv2d(x, row, groups=5 * c), row.mT, groups=5 * c)
    ma, mb, aa, bb, ab = x.split(c, 1)
    c1 = (0.01 * data_range) ** 2
    c2 = (0.03 * data_range) ** 2
    means = (2 * ma * mb + c1) / (ma ** 2 + mb ** 2 + c1)
    structure = (2 * (ab - ma * mb) + c2) / (aa - ma ** 2 + bb - mb ** 2 + c2)
    return (means * structure).flatten(1).mean(1)


LPIPS_URLS = (
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth")


class LPIPS(nn.Module):
    """lpips(a, b) of images in [-1, 1] -> [B]: v0.1 on VGG16 (arXiv 1801.03924). Gradients reach a alone. `weights`:
    comma-separated files of torchvision's VGG16, the linear layers; empty: the public ones; None: random."""
    TAPS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}  # ReLUs: widths

    def __init__(self, weights=""):
        super().__init__()
        from torchvision.models import vgg  # here: it takes seconds, and the toy does without
        self.features = vgg.make_layers(vgg.cfgs["D"])[:30]
        self.lins = nn.ParameterList(torch.rand(1, width, 1, 1) for width in self.TAPS.values())
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        if weights is not None:
            state = {}
            for file in weights.split(",") if weights else LPIPS_URLS:
                state.update(load_weights(file))
            state = {re.sub(r"^lin(\d)\.model\.1\.weight$", r"lins.\1", k): v for k, v in state.items()}
            load_state(self, state, "LPIPS", ignore=(r"classifier\.", r"lin\d\.weight"))
        self.requires_grad_(False).eval()

    def maps(self, x):
        x = (x - self.shift) / self.scale  # [B, 3, H, W]
        maps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.TAPS:
                maps.append(F.normalize(x.float(), dim=1, eps=1e-10))
        return maps

    def forward(self, a, b):
        with torch.no_grad():
            targets = self.maps(b)
        return sum(((x - y).square() * lin).sum(1).mean((1, 2)) for x, y, lin in zip(self.maps(a), targets, self.lins))


class FeatureDistance(nn.Module):
    """LPIPS's formula on a frozen ViT's tokens, averaged over its blocks (ours)."""

    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def maps(self, x):
        layers = tuple(range(1, self.vit.depth + 1))
        return [F.normalize(tokens.float(), dim=2) for tokens in self.vit(x, layers)]

    def forward(self, a, b):
        with torch.no_grad():
            targets = self.maps(b)  # each [B, N, D]
        return sum((x - y).square().sum(2).mean(1) for x, y in zip(self.maps(a), targets)) / len(targets)  # [B]


class LocalBatchNorm(nn.Module):
    """BatchNorm over virtual batches of 8 (if they fit) and positions (StyleGAN-T, arXiv 2301.09515)."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):  # [B, C, ...]
        groups = len(x) // 8 if len(x) % 8 == 0 else 1
        y = x.float().unflatten(0, (groups, -1))  # [G, samples, C, ...]
        var, mean = torch.var_mean(y, [1, *range(3, y.dim())], correction=0, keepdim=True)
        y = ((y - mean) * torch.rsqrt(var + 1e-5)).flatten(0, 1)
        affine = (-1, *(1,) * (x.dim() - 2))
        return torch.addcmul(self.bias.view(affine), y, self.weight.view(affine)).to(x.dtype)


def diff_augment(x):
    """DiffAugment (arXiv 2006.10738) of [B, 3, H, W]: colour, translation by 1/8, cutout of 1/5."""
    b, c, h, w = x.shape

    def rand():
        return torch.rand(b, 1, 1, 1, device=x.device)

    x = x + rand() - 0.5  # brightness
    x = torch.lerp(x.mean(1, keepdim=True), x, rand() * 2)  # saturation
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, rand() + 0.5)  # contrast
    rows = torch.arange(h, device=x.device).view(1, 1, h, 1)
    columns = torch.arange(w, device=x.device).view(1, 1, 1, w)
    y_from = rows + (rand() * (2 * (h // 8) + 1)).floor()  # [B, 1, H, 1], in padded images
    x_from = columns + (rand() * (2 * (w // 8) + 1)).floor()  # [B, 1, 1, W]
    x = F.pad(x, (w // 8, w // 8, h // 8, h // 8))
    source = (y_from * x.shape[3] + x_from).long().flatten(2)  # [B, 1, H W]
    x = x.flatten(2).gather(2, source.expand(-1, c, -1)).view(b, c, h, w)
    hole_y = (rows - (rand() * h).floor()).abs() * 2 < h // 5
    hole_x = (columns - (rand() * w).floor()).abs() * 2 < w // 5
    return x * ~(hole_y & hole_x)


def projected_head(dim):
    def conv(d_out, kernel):
        layer = nn.Conv1d(dim, d_out, kernel, padding=kernel // 2, padding_mode="circular")
        return nn.utils.parametrizations.spectral_norm(layer)

    def block(kernel):
        return nn.Sequential(conv(dim, kernel), LocalBatchNorm(dim), nn.LeakyReLU(0.2))

    return nn.ModuleDict(dict(first=block(1), residual=block(9), last=conv(1, 1)))


class ProjectedDiscriminator(nn.Module):
    """Heads on a frozen ViT's tokens (StyleGAN-T, section 3.2): logits [B, levels x N]."""

    def __init__(self, vit):
        super().__init__()
        if vit.cls_token is None:
            raise UserError("--disc_vfm needs a class token")
        self.vit = vit
        self.layers = tuple(range(0, vit.depth + 1, max(1, vit.depth // 4)))
        self.heads = nn.ModuleList(projected_head(vit.embed_dim) for _ in self.layers)

    def forward(self, images):  # [B, 3, H, W]
        x = diff_augment(images)
        size = self.vit.image_size
        if min(x.shape[-2:]) >= size and torch.rand(()) < 0.5:  # a random crop, else the whole
            top, left = (int(torch.randint(side - size + 1, ())) for side in x.shape[-2:])
            x = x[..., top:top + size, left:left + size].contiguous()
        else:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        logits = []
        for tokens, head in zip(self.vit(x, self.layers, cls=True), self.heads):  # [B, 1 + N, D]
            x = (tokens[:, 1:] + tokens[:, :1]).mT  # [B, D, N]
            x = head["first"](x)
            logits.append(head["last"]((x + head["residual"](x)) / math.sqrt(2)).flatten(1))
        return torch.cat(logits, 1)


class PatchGAN(nn.Module):
    """pix2pix's (arXiv 1611.07004) -> the outputs of all layers, the last: logits."""

    def __init__(self, norm, ndf, layers):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, ndf, 4, 2, 1), nn.LeakyReLU(0.2))])
        d_in = ndf
        for i in range(1, layers + 1):
            d_out = ndf * min(8, 2 ** i)
            conv = nn.Conv2d(d_in, d_out, 4, 2 if i < layers else 1, 1, bias=False)
            self.layers.append(nn.Sequential(conv, norm(d_out), nn.LeakyReLU(0.2)))
            d_in = d_out
        self.layers.append(nn.Conv2d(d_in, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)

    def forward(self, x):  # [B, 3, H, W]
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return outputs


class GAN(nn.Module):
    """A row's discriminators."""

    def __init__(self, stage, vit, ndf, image_size):
        super().__init__()
        layers = min(3, max(1, int(math.log2(image_size)) - 4))  # fewer on small images
        self.dino = ProjectedDiscriminator(vit) if stage.dino else None
        self.patch = PatchGAN(nn.BatchNorm2d, ndf, layers) if stage.patch else None
        self.multi = nn.ModuleList(PatchGAN(LocalBatchNorm, ndf, layers) for _ in range(3 if stage.multi else 0))

    def pyramid(self, fake, real):
        """-> (discriminator, fakes, reals) of each scale."""
        return [(net, F.avg_pool2d(fake, 2 ** k), F.avg_pool2d(real, 2 ** k)) for k, net in enumerate(self.multi)]

    def generator_loss(self, fake, real):
        """-> unweighted losses, named as in the row."""
        losses = {}
        if self.dino:
            losses["dino"] = -self.dino(fake).mean()
        if self.patch:
            losses["patch"] = -self.patch(fake)[-1].mean()
        for net, x, y in self.pyramid(fake, real):
            *maps, logits = net(x)
            matching = sum(map(F.l1_loss, maps, net(y))) * 4 / len(maps)
            losses["multi"] = losses.get("multi", 0) + (logits - 1).square().mean() / 3
            losses["matching"] = losses.get("matching", 0) + matching / 3
        return losses

    def discriminator_loss(self, fake, real):
        loss = 0
        if self.dino:
            loss = loss + F.relu(1 - self.dino(real)).mean() + F.relu(1 + self.dino(fake)).mean()
        if self.patch:
            loss = loss + 0.5 * (F.relu(1 - self.patch(real)[-1]).mean() + F.relu(1 + self.patch(fake)[-1]).mean())
        for net, x, y in self.pyramid(fake, real):
            loss = loss + 0.5 / 3 * ((net(y)[-1] - 1).square().mean() + net(x)[-1].square().mean())
        return loss


# --------------------------------------
# Official weight files

VIT_KEYS = {  # Hugging Face's (SigLIP, DINOv2, DINOv3, ViT-MAE, CLIP) and timm's names -> DINOv2's own, the ViT's
    r"^(.*\.)?vision_model\.|^(module|backbone|vit|dinov2(_with_registers)?|model)\.": "",
    r"^embeddings\.patch_embedding(s\.projection|s)?\.": "patch_embed.proj.",
    r"^embeddings\.position_embeddings?(\.weight)?$": "pos_embed",
    r"^embeddings\.(cls_token|register_tokens|mask_token)$": r"\1",
    r"^embeddings\.class_embedding$": "cls_token",
    r"^pre_layrnorm\.": "pre_norm.",
    r"^reg_token$": "register_tokens",
    r"^(encoder\.)?layers?\.": "blocks.",
    r"\.(layer_norm|layernorm_)(1|before)\.": ".norm1.",
    r"\.(layer_norm|layernorm_)(2|after)\.": ".norm2.",
    r"\.(self_attn|attention|attention\.attention)\.(q|k|v)(_proj|uery|ey|alue)\.": r".attn.\2.",
    r"\.(self_attn\.out_proj|attention\.o_proj|attention\.output\.dense)\.": ".attn.proj.",
    r"\.(intermediate\.dense|mlp\.w12|mlp\.weights_in|mlp\.up_proj)\.": ".mlp.fc1.",
    r"(?<!attention)\.(output\.dense|mlp\.w3|mlp\.weights_out|mlp\.down_proj)\.": ".mlp.fc2.",
    r"\.layer_scale([12])\.lambda1$": r".ls\1.gamma",
    r"^(post_)?layernorm\.": "norm."}
VIT_UNUSED = (r"mask_token|(head|decoder|text_model|attn_pool|fc_norm|pooler|last_layer|classifier)\b|logit_|"
              r"(visual|text)_projection|embeddings\.position_ids")

RAE_KEYS = {  # its decoder's, after ViT-MAE's -> ours
    r"^(decoder\.)?(decoder_|trainable_)?(layers|embed|norm|pred|cls_token|pos_embed)\b": r"\3",
    **VIT_KEYS}

VFMVAE_KEYS = {  # the released VFM-VAE's names -> ours
    r"^ldm_adapter\.patch_quants\.(\d+)\.0\.blocks\.0\.": r"adapter.levels.\1.",
    r"^ldm_adapter\.final_quant\.blocks\.0\.": "adapter.fuse.",
    r"^ldm_adapter\.post_quant\.blocks\.0\.": "decoder.post_quant.",
    r"^ldm_adapter\.linear_proj\.": "vf_proj.",
    r"^mapping\.mlp\.fc0\.": "decoder.mapping.0.",
    r"^mapping\.mlp\.fc1\.": "decoder.mapping.2.",
    r"^synthesis\.blocks\.": "decoder.blocks.",
    r"\.seperate_upsample_conv\.": ".upsample.",
    r"\.last_upsample_conv\.": ".upsample_sum.",
    r"\.conv0\.": ".convs.0.",
    r"\.convs1\.(\d+)\.": lambda match: f".convs.{int(match[1]) + 1}.",
    r"\.noise_(strength|const)$": r".noise.\1",
    r"\.affine(_pw1)?\.proj\.": ".style.affine.",
    r"\.torgb\.": ".to_rgb.",
    r"\.self_attns\.(\d+)\.(attn\.)?": r".attns.\1."}
VFMVAE_UNUSED = r".*\.(zero_k_bias|blur_weight|x_avg)$|vfm_encoder\."

LDM_KEYS = {
    r"^encoder\.": "adapter.",
    r"^quant_conv\.": "adapter.quant_conv.",
    r"^post_quant_conv\.": "decoder.post_quant_conv."}
LDM_UNUSED = r"(loss|foundation_model|linear_proj|model_ema|logvar)\b"


class NoiseMap(nn.Module):
    """The stored noise that layers of VFM-VAE checkpoints from before October 2025 add."""

    def __init__(self, size):
        super().__init__()
        self.strength = nn.Parameter(torch.zeros([]))
        self.register_buffer("const", torch.randn(size, size))

    def forward(self, x):  # [B, C, h, w]
        return x + F.interpolate(self.const[None, None], x.shape[-2:], mode="bilinear") * self.strength


def rename(state, table, unused):
    """A state dict renamed by a table of regexes, without what then matches `unused`."""
    new = {}
    for key, value in state.items():
        for pattern, name in table.items():
            key = re.sub(pattern, name, key)
        if not re.match(unused, key):
            new[key] = value
    return new


def to_vit_keys(state):
    """A public ViT's state dict in the names of `ViT`, q, k, v joined."""
    new = rename(state, VIT_KEYS, VIT_UNUSED)
    if "pos_embed" in new or "register_tokens" not in new:
        new["pos_embed"] = new["pos_embed"].flatten(0, -2)[None]  # SigLIP's is [N, D]
    else:  # DINOv3: no bias on keys
        for key in [key for key in new if key.endswith(".attn.q.bias")]:
            new[key.replace(".attn.q.", ".attn.k.")] = torch.zeros_like(new[key])
    if "pre_norm.weight" in new:  # CLIP's
        new["cls_token"] = new["cls_token"].view(1, 1, -1)
        new["patch_embed.proj.bias"] = torch.zeros(len(new["patch_embed.proj.weight"]))
    return join_qkv(new)


def join_qkv(state):
    """attn.q, attn.k, attn.v -> attn.qkv, in place."""
    for key in [key for key in state if ".attn.q." in key]:
        parts = [state.pop(key.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        state[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return state


def count_parts(state, prefix):
    """How many numbered parts keys have under a prefix."""
    return len({key[len(prefix):].split(".")[0] for key in state if key.startswith(prefix)})


def vit_config(state):
    """The ViT arguments that a state dict shows, the rest as published."""
    width, _, _, patch = state["patch_embed.proj.weight"].shape
    rope = "pos_embed" not in state  # DINOv3
    n = (224 // patch) ** 2 if rope else state["pos_embed"].shape[1]
    hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
    cls = "cls_token" in state
    class_position = cls and math.isqrt(n) ** 2 != n
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    layer_scale = "blocks.0.ls1.gamma" in state  # DINOv2, DINOv3
    activation = "gelu" if cls else "gelu_tanh"
    if len(state["blocks.0.mlp.fc1.weight"]) == 2 * hidden:
        activation = "swiglu"
    config = dict(
        image_size=math.isqrt(n - class_position) * patch, patch_size=patch, embed_dim=width, mlp_hidden=hidden,
        depth=count_parts(state, "blocks."), num_heads=16 if width == 1152 else max(1, width // 64),
        activation=activation, class_token=cls, class_position=class_position, registers=registers,
        layer_scale=layer_scale, normalize="imagenet" if cls else "half",
        interpolation="bicubic" if layer_scale and not rope else "bilinear", antialias=registers > 0,
        rope=100.0 if rope else 0.0, eps=1e-5 if rope else 1e-6)
    if "pre_norm.weight" in state:
        config.update(pre_norm=True, activation="gelu_quick", normalize="clip", interpolation="bicubic", eps=1e-5)
    return config


def from_vfmvae(state):
    """A released VFM-VAE's state dict -> (arch, as far as shapes show, state dict in our names)."""
    prefix = "vfm_encoder.encoder."
    vit = to_vit_keys({k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)})
    new = {f"vfm.{k}": v for k, v in vit.items()}
    for key, value in rename(state, VFMVAE_KEYS, VFMVAE_UNUSED).items():
        fusion = re.match(r"synthesis\.z_convs\.(\d+)\.(\d)\.(\d)\.(\w+)", key)
        if fusion:  # two stages, numbered 0 1, 1 2 or 0 2: depthwise, pointwise, norm; then pointwise, norm
            i, stage, part, kind = fusion.groups()
            first = f"synthesis.z_convs.{i}.{stage}.2.weight" in state
            names = ("depthwise", "pointwise1", "norm1") if first else ("pointwise2", "norm2")
            key = f"decoder.fusions.{i}.{names[int(part)]}.{kind}"
        if key.endswith(".gamma"):
            value = value.reshape(-1, 1, 1)
        elif key.endswith(("pwconv1.bias", "to_rgb.bias")):
            value = value.flatten()
        new[key] = value

    def widths(prefix, name):
        return [len(new[f"{prefix}{i}.{name}"]) for i in range(count_parts(new, prefix))]

    blocks = widths("decoder.blocks.", "convs.0.dwconv.weight")
    dim, z_dim = new["decoder.post_quant.proj.weight"].shape
    fold = math.isqrt(len(new["decoder.fusions.0.depthwise.weight"]) // dim)
    noisy = "decoder.blocks.0.convs.0.noise.const" in new
    decoder = dict(
        post_factor=dim // z_dim, widths=blocks, fuse_dims=widths("decoder.fusions.", "pointwise2.weight"),
        attention=[count_parts(new, f"decoder.blocks.{i}.attns.") for i in range(len(blocks))],
        num_res_blocks=(count_parts(new, "decoder.blocks.0.convs.") - 1) // 3,
        w_dim=len(new["decoder.mapping.2.weight"]),
        noise_sizes=widths("decoder.blocks.", "convs.0.noise.const") if noisy else ())
    arch = dict(
        downsample=2 ** len(blocks) // fold, z_dim=z_dim, vfm=vit_config(vit), decoder=decoder,
        level_dims=widths("adapter.levels.", "proj.weight"), vf_dim=len(new.get("vf_proj.weight", ())))
    return arch, new


def from_ldm(state):
    """LDM's autoencoder's (LDM, SD-VAE, VA-VAE, FLUX's) -> (arch, state dict in our names)."""
    new = rename(state, LDM_KEYS, LDM_UNUSED)
    ch = len(new["adapter.conv_in.weight"])
    if "decoder.post_quant_conv.weight" not in new:  # FLUX's has no quant convolutions
        width = new["decoder.conv_in.weight"].shape[1]
        for name, n in ("adapter.quant_conv", 2 * width), ("decoder.post_quant_conv", width):
            new[f"{name}.weight"] = torch.eye(n)[:, :, None, None]
            new[f"{name}.bias"] = torch.zeros(n)
    z_channels, z_dim = new["decoder.post_quant_conv.weight"].shape[:2]
    levels = range(count_parts(new, "adapter.down."))
    half = dict(
        ch=ch, ch_mult=[len(new[f"adapter.down.{i}.block.0.conv2.weight"]) // ch for i in levels],
        num_res_blocks=count_parts(new, "adapter.down.0.block."), z_channels=z_channels,
        attn_levels=[i for i in levels if f"adapter.down.{i}.attn.0.norm.weight" in new])
    arch = dict(
        downsample=2 ** (len(levels) - 1), z_dim=z_dim, scale_factor=1.0, encoder=half, decoder=half,
        decoder_kind="ldm")
    return arch, new


def from_rae(state, vfm, decoder_heads=0):
    """RAE's decoder's state dict and the VFM whose tokens it decodes -> (arch, state dict in our names)."""
    new = join_qkv(rename(state, RAE_KEYS, "mask_token"))
    positions = new.pop("pos_embed", torch.zeros(1, 257, 1))  # fixed, a class token's first
    dim, z_dim = new["embed.weight"].shape
    f = math.isqrt(len(new["pred.weight"]) // 3)
    decoder = dict(
        grid=math.isqrt(positions.shape[1]), depth=count_parts(new, "blocks."), dim=dim,
        num_heads=decoder_heads or (16 if dim == 1152 else max(1, dim // 64)),
        mlp_hidden=len(new["blocks.0.mlp.fc1.weight"]))
    arch = dict(
        resolution=decoder["grid"] * f, downsample=f, z_dim=z_dim, vfm=vfm.config, layers=(vfm.depth,),
        scale_factor=vfm.patch_size / f, adapter_kind="identity", decoder_kind="vit", decoder=decoder)
    state = {f"vfm.{key}": value for key, value in vfm.state_dict().items()}
    return arch, {**state, **{f"decoder.{key}": value for key, value in new.items()}}


def load_tokenizer(path, **overrides):
    """A frozen Tokenizer with averaged weights: ours, an official VFM-VAE's, LDM's format (VA-VAE, SD-VAE, FLUX's), or
    RAE's decoder: "FILE::VFM" names its encoder, or the file of that (without: dinov2_vitb14_reg).
    What shapes do not show is as published, or overridden: num_heads (the VFM's), decoder_heads (RAE's), layers,
    scale_factor, resolution. `config`: our training's, else {}."""
    path, _, encoder = str(path).partition("::")
    entries = load_weights(path)
    with reading(path):
        if entries.get("kind", "tokenizer") != "tokenizer":
            raise UserError(f"{path} is a {entries['kind']} checkpoint, not a tokenizer")
        state = entries.get("G_ema", entries.get("state_dict", entries))
        state = {k.removeprefix("module."): v for k, v in state.items()}
        of_rae = any(key.endswith("decoder_embed.weight") for key in state)
        if encoder and not of_rae:
            raise UserError(f"{path} is no decoder of RAE: leave ::{encoder} out")
        if "kind" in entries:
            arch = entries["arch"]
            state = {**entries["model"], **entries["ema"]}
        elif any(key.startswith("ldm_adapter.") for key in state):
            arch, state = from_vfmvae(state)
        elif "decoder.conv_in.weight" in state:
            arch, state = from_ldm(state)
        elif of_rae:
            heads = dict(num_heads=overrides.pop("num_heads")) if "num_heads" in overrides else {}
            vfm = load_vfm(encoder or "dinov2_vitb14_reg", **heads)
            arch, state = from_rae(state, vfm, overrides.pop("decoder_heads", 0))
        else:
            raise UserError(f"{path} is no tokenizer: it has no keys of VFM-VAE (ldm_adapter.*), LDM or RAE")
        if "num_heads" in overrides and arch.get("vfm"):
            arch["vfm"]["num_heads"] = overrides.pop("num_heads")
        tok = Tokenizer(**{**arch, **overrides})
    tok = load_state(tok, state, str(path)).requires_grad_(False).eval()
    tok.config = entries.get("config", {})
    return tok


SAFETENSORS_TYPES = dict(
    F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64, I32=torch.int32,
    I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)


def read_safetensors(path):
    """Its tensors, mapped: 8-byte little-endian header length, JSON header, buffer."""
    file = np.memmap(path, np.uint8, "c")
    length = int(file[:8].view("<u8")[0])
    header = json.loads(bytes(file[8:8 + length]))
    header.pop("__metadata__", None)
    buffer = file[8 + length:]
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= len(buffer):
            raise ValueError(f"tensor {name} lies outside the file")
        tensors[name] = torch.from_numpy(buffer[begin:end]).view(SAFETENSORS_TYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


@contextlib.contextmanager
def alone(path):
    """One process at a time: eight ranks fetch a file once."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as file:
        lock(file)
        yield


def fetch(url):
    """A URL's file in torch.hub's cache."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", re.sub(r"[^\w.]+", "-", url.split("//")[1]))
    with alone(path):
        try:
            if not os.path.exists(path):
                torch.hub.download_url_to_file(url, path)
        except Exception as error:
            raise UserError(f"cannot fetch {url} ({error}); --vfm, --disc_vfm, --lpips_weights, --inception take files")
    return path


class Entries(dict):
    """A file's entries. A missing key is a UserError; so is a wrong type in our checkpoints."""
    types = dict(
        arch=dict, config=dict, ema=dict, model=dict, optimizer=dict, statistics=dict, image_size=int, images=int,
        skipped=int, stage=int, step=int, latent_mean=torch.Tensor, latent_std=torch.Tensor, classes=list,
        tokenizer=str)

    def __init__(self, path, entries):
        super().__init__(entries)
        self.path = path
        for key, kind in self.types.items():
            if "kind" in self and not isinstance(self.get(key, kind()), kind):
                raise UserError(f"{path} is damaged: its {key} is no {kind.__name__}")

    def __missing__(self, key):
        raise UserError(f"{self.path} is damaged or of another kind: it lacks {key}")


def load_weights(path_or_url):
    """The dictionary in a file (PyTorch's or .safetensors) or at a URL, on the CPU; never unpickles code."""
    path = str(path_or_url)
    if "://" in path:
        path = fetch(path)
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    try:
        if path.endswith(".safetensors"):
            entries = read_safetensors(path)
        else:
            mapped = zipfile.is_zipfile(path)  # eight processes do not hold eight copies
            if mapped:
                with zipfile.ZipFile(path) as archive:  # which checks sums, as torch does not
                    for entry in archive.namelist():
                        if entry.endswith("data.pkl"):
                            archive.read(entry)
            entries = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if not isinstance(entries, dict):
            raise ValueError("it holds no state dict")
    except Exception as error:  # of damaged or hostile files
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds code ({code[1]}), which is never run" if code else f"{type(error).__name__}: {error}"
        reason = re.sub("Weights only load failed.*", "it is damaged, or holds more than weights", reason, flags=re.S)
        raise UserError(f"cannot read weights from {path}: {reason}".splitlines()[0])
    return Entries(path, entries)


@contextlib.contextmanager
def reading(path):
    """Turns errors that a damaged or foreign file causes into a UserError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, KeyError):
            text = f"it lacks {error}"
        raise UserError(f"{path} is damaged or of another kind: {' '.join(text.split())[:1000]}")


def load_state(module, state, name, ignore=(), **keywords):
    """`load_state_dict` whose complaint is one line; `ignore`: regexes of keys not needed."""
    try:
        state = {k: v for k, v in state.items() if not any(re.match(pattern, k) for pattern in ignore)}
        module.load_state_dict(state, **keywords)
    except Exception as error:  # missing, unexpected, misshaped keys, other things
        raise UserError(f"{name}: the weights do not fit: {' '.join(str(error).split())[:1000]}")
    return module


# --------------------------------------
# Text: towers and their tokens

TEXTS = {name: url for name, (url, _) in VFMS.items() if name.startswith(("siglip2", "clip"))}

TEXT_KEYS = {  # before VIT_KEYS
    r"^text_model\.": "",
    r"^embeddings\.token_embedding\.": "embed.",
    r"^final_layer_norm\.": "norm.",
    r"^(head|text_projection)\.": "project."}
TEXT_UNUSED = r"vision_model|visual_projection|logit_"


def merge_pairs(symbols, ranks):
    """Byte pair encoding: joins the neighbours of lowest rank, leftmost first, until none has one; n log n."""
    symbols = list(symbols)
    n = len(symbols)
    after = list(range(1, n + 1))
    before = list(range(-1, n - 1))
    heap = []

    def push(i):
        if i >= 0 and after[i] < n and (symbols[i], symbols[after[i]]) in ranks:
            heapq.heappush(heap, (ranks[symbols[i], symbols[after[i]]], i))

    for i in range(n):
        push(i)
    while heap:
        rank, i = heapq.heappop(heap)
        j = after[i]
        if j == n or ranks.get((symbols[i], symbols[j])) != rank:  # one of the two was joined meanwhile
            continue
        symbols[i] += symbols[j]
        symbols[j] = None
        after[i] = after[j]
        if after[i] < n:
            before[after[i]] = i
        push(before[i])
        push(i)
    return [symbol for symbol in symbols if symbol is not None]


def merge_ranks(merges):
    """Merges ("a b" or ["a", "b"]) in order -> pair: rank."""
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in merges]
    return {pair: rank for rank, pair in enumerate(pairs)}


def gemma_tokens(read):
    """SigLIP2's: lower case; a space is ▁; the bytes of characters that the vocabulary lacks."""
    model = json.loads(read("tokenizer.json"))["model"]
    vocab = model["vocab"]
    ranks = merge_ranks(model["merges"])

    def tokens(text):
        symbols = []
        for char in text.lower().replace(" ", "▁"):
            symbols += [char] if char in vocab else [f"<0x{byte:02X}>" for byte in char.encode()]
        return [vocab.get(symbol, 3) for symbol in merge_pairs(symbols, ranks)]  # 3: <unk>

    return [], 1, 0, tokens  # no start; <eos>, <pad>


def clip_tokens(read):
    """CLIP's: byte pair encoding of each piece's bytes; unknown symbols and pads are the end's."""
    vocab = json.loads(read("vocab.json"))
    ranks = merge_ranks(line for line in read("merges.txt").split("\n")[1:] if line)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    numbers = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c)[0] == "N")
    pieces = re.compile(rf"'(?:s|t|re|ve|m|ll|d)|[^\W_{numbers}]+|[{numbers}]|(?:[^ \w{numbers}]|_)+")
    end = vocab["<|endoftext|>"]

    @functools.lru_cache(1 << 16)
    def piece_tokens(piece):
        symbols = [table[byte] for byte in piece.encode()]
        symbols[-1] += "</w>"
        return [vocab.get(symbol, end) for symbol in merge_pairs(symbols, ranks)]

    def tokens(text):
        text = re.sub(r"[^\S\x1c-\x1f]+", " ", unicodedata.normalize("NFC", text)).lower()  # Unicode's White_Space
        return [token for piece in pieces.findall(text) for token in piece_tokens(piece)]

    return [vocab["<|startoftext|>"]], end, end, tokens


class TextEncoder(nn.Module):
    """SigLIP2's text tower (bidirectional, pooled at the last place) or CLIP's (causal, pooled at the first end).

    encoder(texts) -> (tokens [B, L, D], pooled [B, pooled_dim]); or ids(texts) -> int32 [B, L], cut and padded, then
    encode(ids). dim: D, length: L. The tokenizer's files are read when first needed."""

    def __init__(self, root, vocab, length, dim, pooled_dim, depth, num_heads, hidden, clip):
        super().__init__()
        self.root = root
        self.length = length
        self.dim = dim
        self.pooled_dim = pooled_dim
        self.clip = clip
        self.make_tokens = clip_tokens if clip else gemma_tokens
        eps = 1e-5 if clip else 1e-6
        self.embed = nn.Embedding(vocab, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, length, dim))
        block = dim, num_heads, hidden, "gelu_quick" if clip else "gelu_tanh", False, eps, clip
        self.blocks = nn.ModuleList(ViTBlock(*block) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps)
        self.project = nn.Linear(dim, pooled_dim, bias=not clip)

    def read(self, name):
        """The text of a file beside the weights."""
        path = f"{self.root}/{name}"
        try:
            return Path(fetch(path) if "://" in path else path).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}, which belongs beside the text encoder's weights: {error}")

    @functools.cached_property
    def tokens(self):  # first ids, the last, the pad, text -> ids
        with reading(f"the tokenizer in {self.root}"):
            return self.make_tokens(self.read)

    def ids(self, texts):
        first, end, pad, tokens = self.tokens
        rows = torch.full((len(texts), self.length), pad, dtype=torch.int32)
        for row, text in zip(rows, texts):
            found = [*first, *tokens(text)[:self.length - len(first) - 1], end]
            row[:len(found)] = torch.tensor(found)
        return rows

    def forward(self, texts):
        return self.encode(self.ids(texts).to(self.embed.weight.device))

    def encode(self, ids):  # [B, L]
        x = self.embed(ids) + self.pos_embed  # [B, L, D]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        end = -1
        if self.clip:
            end = (ids == self.embed.num_embeddings - 1).int().argmax(1)
        return x, self.project(x[torch.arange(len(x), device=x.device), end])  # [B, pooled_dim]


def load_text(name_or_path, **overrides):
    """A frozen TextEncoder: a name in TEXTS (fetched once), a file of weights or a folder of .safetensors, with
    tokenizer.json (SigLIP2) or vocab.json and merges.txt (CLIP) beside them. `overrides`: num_heads."""
    name = str(name_or_path)
    path = TEXTS.get(name, name)
    if "://" not in path and not os.path.exists(path):
        raise UserError(f"no text encoder {name}: neither file, folder nor one of {', '.join(TEXTS)}")
    files = [path]
    root = os.path.dirname(path) or "."
    if os.path.isdir(path):
        root = path
        files = sorted(Path(path).glob("model.safetensors")) or sorted(Path(path).glob("*.safetensors"))
        if not files:
            raise UserError(f"no .safetensors in {path}")
    state = {}
    for file in files:
        state.update(load_weights(file))
    with reading(name):
        state = to_vit_keys(rename(state, TEXT_KEYS, TEXT_UNUSED))
        _, length, dim = state["pos_embed"].shape
        config = dict(
            vocab=len(state["embed.weight"]), length=length, dim=dim, pooled_dim=len(state["project.weight"]),
            depth=count_parts(state, "blocks."), num_heads=16 if dim == 1152 else max(1, dim // 64),
            hidden=len(state["blocks.0.mlp.fc1.weight"]), clip="project.bias" not in state)
    encoder = load_state(TextEncoder(root, **{**config, **overrides}), state, name).requires_grad_(False).eval()
    encoder.name = name
    return encoder


# --------------------------------------
# Data: folders, shards, torchvision's data sets, drawn shapes. An item is (uint8 [3, size, size], label)

def load_rgb(path, file=None):
    """Pillow's, in RGB: the first frame, transparency on white, 16 bits scaled to 8, EXIF rotation applied. `file`: its
    bytes in a shard."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd files and large ones
            image = ImageOps.exif_transpose(Image.open(file or path))
            if image.mode[0] in "IF":
                values = np.asarray(image).astype(np.float64)
                values = values / (257 if values.max() > 255 else 1)
                image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # of damaged files
        raise UserError(f"cannot read image {path}: {type(error).__name__}: {error}".replace("\n", " "))


def center_crop(image, size):
    """ADM's: box-halve while the short side is at least twice `size`, bicubic to it, then the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


def list_images(folder):
    """The image files under a folder, also a linked one, sorted; nothing hidden."""
    files = (Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names)
    paths = sorted(path for path in files if path.suffix.lower() in IMG_EXTENSIONS)
    paths = [path for path in paths if not any(part[0] == "." for part in path.relative_to(folder).parts)]
    if not paths:
        raise UserError(f"no images in {folder}, or no such folder")
    return paths


def expand_ranges(pattern):
    """a{08..10}.tar -> a08.tar, a09.tar, a10.tar, one by one."""
    head, *found = re.split(r"\{(\d+)\.\.(\d+)\}", pattern, maxsplit=1)
    if not found:
        yield pattern
        return
    first, last, tail = found
    for i in range(int(first), int(last) + 1):
        yield from expand_ranges(f"{head}{i:0{len(first)}}{tail}")


def index_shards(paths, captions, cache):
    """WebDataset's tars, as img2dataset writes them -> their paths; a row a sample: name (SHARD/NAME.jpg) and place
    [shard, image's start, size, caption's start, size], -1 for what it lacks. captions: their suffix. Tars are gone
    through once: `cache` keeps the rows."""
    try:
        files = [(os.fspath(path), os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths]
    except OSError as error:
        raise UserError(f"no shard {error.filename}")
    index = Path(cache) / f"shards-{fingerprint(files, captions)[:8]}.npy"
    with alone(index):  # the first process
        if not index.exists():
            rows = []
            for shard, (path, *_) in enumerate(tqdm(files, "reading shards", leave=False)):
                samples = {}
                try:
                    with tarfile.open(path, "r:") as archive:
                        for member in archive:
                            if member.size < 0:  # would lead back, for ever
                                raise tarfile.ReadError("a negative size")
                            stem, _, suffix = os.path.basename(member.name).partition(".")
                            if not member.isfile() or not stem:  # hidden
                                continue
                            key = os.path.dirname(member.name), stem
                            row = samples.setdefault(key, [b"", [shard, -1, -1, -1, -1]])
                            suffix = f".{suffix.lower()}"
                            if suffix in IMG_EXTENSIONS:
                                row[0] = os.fsencode(f"{path}/{member.name}")
                                row[1][1:3] = member.offset_data, member.size
                            elif suffix == captions:
                                row[1][3:] = member.offset_data, member.size
                except Exception as error:  # of damaged files
                    raise UserError(f"{path} is no whole, uncompressed tar: {error}".replace("\n", " "))
                rows += map(tuple, samples.values())
            width = max([1, *(len(name) for name, _ in rows)])
            with replacing(index) as temp, open(temp, "wb") as file:
                np.save(file, np.array(rows, [("name", f"S{width}"), ("place", np.int64, 5)]))
    return [path for path, *_ in files], np.load(index, mmap_mode="r")


@functools.lru_cache(256)
def open_shard(path):  # a file that is dropped closes itself
    return open(path, "rb", 0)


def read_captions(folder):
    """{relative name: caption} of a folder's captions.json ({name: caption}, or a list of {file_name, caption}) or
    captions.tsv (name TAB caption), {} without."""
    table = Path(folder, "captions.json")
    lines = Path(folder, "captions.tsv")
    if table.exists():
        with reading(table):
            found = json.loads(table.read_bytes())
            if isinstance(found, list):
                found = {row["file_name"]: row["caption"] for row in found}
            return dict(found)
    if lines.exists():
        with reading(lines):
            return dict(line.split("\t", 1) for line in lines.read_text("utf-8").split("\n") if line)
    return {}


def read_lines(path):
    """A file's lines, a prompt each."""
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    with reading(path):
        lines = Path(path).read_text("utf-8").splitlines()
    if not lines:
        raise UserError(f"{path} is empty")
    return lines


class Images(Dataset):
    """Images at one size. `data`: a folder (a subfolder a class, or flat: class 0; maybe in `train` and `val`),
    FOLDER/{00000..00099}.tar (class 0; held-out ones: FOLDER/val/*.tar), "shapes", or a torchvision data set under
    `data_dir`. Items are asked for as index, or as (index, key): then augmented (`crop`: a random square of 0.5 to 1 of
    the short side; `flip`), alike for the same key. A file that is no image: UserError; with `bad_list` the next
    index's image and label stand in, and that file lists the path."""
    bad_list = None
    captioned = False  # an image without a caption is a bad one
    captions = None  # a folder's table
    places = None  # in shards: see index_shards
    paths = ()  # of files

    def __init__(
            self, data, split, size, data_dir="data", download=False, crop=False, flip=False, cache="out",
            caption_key=""):
        self.size = size
        self.crop = crop
        self.flip = flip
        self.caption_key = caption_key
        self.caption_suffix = ".json" if caption_key else ".txt"
        self.note = ""
        if data == "shapes":
            self.source = Shapes(split, size, cache=cache)
            self.labels = self.source.labels
            self.classes = Shapes.classes
        elif data.isidentifier() and not os.path.exists(data):
            self.open_torchvision(data, split, data_dir, download)
        else:
            root = Path(data)
            shards = ".tar" in root.name and not root.is_dir()
            if shards:
                root = root.parent
            if split == "val" and not (root / "val").is_dir():
                self.note = f"{root} has no folder val: these are the training images"
                split = "train"
            if not shards:
                self.open_folder(root / split if (root / split).is_dir() else root)
            else:
                paths = expand_ranges(str(data)) if split != "val" else sorted(root.glob("val/*.tar"))
                self.open_shards(paths, cache)

    def open_shards(self, paths, cache):
        self.paths, rows = index_shards(paths, self.caption_suffix, cache)
        complete = (rows["place"] >= 0).all(1)
        if not complete.any():
            found = ", ".join(self.paths[:3]) or "there are no shards"
            raise UserError(f"no images with a {self.caption_suffix}: {found}")
        if not complete.all():
            note = f"{(~complete).sum()} incomplete samples are left out"
            self.note = f"{self.note}; {note}" if self.note else note
            rows = rows[complete]
        self.source = rows["name"]
        self.places = rows["place"]
        self.root = os.fsencode(os.path.commonprefix(self.paths))
        self.labels = np.zeros(len(rows), int)
        self.classes = ["image"]

    def open_folder(self, root):
        paths = list_images(root)
        if len({path.parent == root for path in paths}) == 2:
            raise UserError(f"{root} has images both in class folders and beside them")
        folders = ["image" if path.parent == root else path.relative_to(root).parts[0] for path in paths]
        if paths[0].parent != root:
            empty = {path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."} - set(folders)
            if empty:
                raise UserError(f"class folder {root / min(empty)} has no images, or may not be read")
        self.root = os.fsencode(root / "_")[:-1]
        classes, self.labels = np.unique(folders, return_inverse=True)
        self.classes = classes.tolist()
        self.source = self.paths = np.array([os.fsencode(path) for path in paths])  # workers would copy a list
        self.captions = read_captions(root)

    def open_torchvision(self, data, split, folder, download):
        from torchvision import datasets
        if data not in datasets.__all__:
            raise UserError(f"no images in {data}, or no such folder")
        Source = getattr(datasets, data)
        known = inspect.signature(Source).parameters
        keywords = dict(train=split == "train", split=split, download=download)
        if split == "val" and data != "ImageNet":
            keywords["split"] = "test"
        try:
            with alone(os.path.join(folder, data)) if download else contextlib.nullcontext():
                self.source = Source(folder, **{k: v for k, v in keywords.items() if k in known})
        except Exception as error:
            raise UserError(f"{data} under {folder}: {error} (--download=1 fetches it)".replace("\n", " "))
        labels = [v for k, v in vars(self.source).items() if k in ("targets", "labels", "_labels")]
        if not labels:
            raise UserError(f"torchvision's {data} has no class labels")
        self.labels = np.asarray(labels[0])
        self.classes = [str(name) for name in getattr(self.source, "classes", range(int(self.labels.max()) + 1))]

    def __len__(self):
        return len(self.source)

    def caption(self, index):
        """The toy's, the table's, or of NAME.txt or NAME.json beside the image. UserError where there is none."""
        if isinstance(self.source, Shapes):
            return self.source.caption(index)
        name = os.fsdecode(self.source[index])
        try:
            if self.captions:
                return self.captions[os.path.relpath(name, os.fsdecode(self.root))].strip()
            if self.places is None:
                text = Path(name).with_suffix(self.caption_suffix).read_bytes()
            else:
                text = self.read_shard(index, 3)
            if self.caption_key:
                text = json.loads(text)[self.caption_key].encode()
            return text.decode().strip()
        except Exception as error:  # of damaged files
            raise UserError(f"no caption of {name}: {type(error).__name__}: {error}".replace("\n", " "))

    def require_captions(self):
        """From here on an image without one cannot be read."""
        if not isinstance(self.source, (np.ndarray, Shapes)):
            raise UserError("--text: these data have no captions")
        self.captioned = isinstance(self.source, np.ndarray)

    def in_text_training(self):
        """[n] bools: which images text training sees."""
        if isinstance(self.source, Shapes):
            a = self.source.every_attribute
            return ~Shapes.left_out(a["shape"], a["hue"])
        return np.ones(len(self), bool)

    def identity(self):
        """What tells it from another, without a look at the files."""
        names = self.source.tolist() if isinstance(self.source, np.ndarray) else []
        return names, self.classes, self.labels.tolist()

    def read_shard(self, index, part):
        """A sample's image (part 1) or caption (3)."""
        place = self.places[index].tolist()
        start, size = place[part:part + 2]
        return os.pread(open_shard(self.paths[place[0]]).fileno(), size, start)

    def read(self, index):
        """-> (image, index), of the first readable one from there."""
        while True:
            item = self.source[index]
            if not isinstance(item, bytes):
                return item[0], index
            try:
                if self.captioned:
                    self.caption(index)
                file = None if self.places is None else io.BytesIO(self.read_shard(index, 1))
                return load_rgb(os.fsdecode(item), file), index
            except UserError:
                if not self.bad_list:
                    raise
            self.note_bad(item)
            index = (index + 1) % len(self)

    def note_bad(self, path):
        """Lists a bad file once, from any process; UserError above 1%."""
        self.bad_list.parent.mkdir(parents=True, exist_ok=True)
        with open(self.bad_list, "ab+") as file:  # small appends do not mix
            lock(file)
            file.seek(0)
            bad = set(file.read().splitlines())
            if path not in bad:
                file.write(path + b"\n")
        count = sum(line.startswith(self.root) for line in bad | {path})
        if count > len(self) / 100:
            raise UserError(
                f"{count} of {len(self)} images cannot be read, more than 1%: see, then remove {self.bad_list}")

    def __getitem__(self, item):
        index, key = item if isinstance(item, tuple) else (item, None)
        rng = None if key is None else np.random.default_rng(key)
        image, index = self.read(index)
        if torch.is_tensor(image):
            image = Image.fromarray(image.permute(1, 2, 0).numpy())
        image = image.convert("RGB")
        if self.crop and rng:
            side = max(1, round(min(image.size) * rng.uniform(0.5, 1)))
            left, top = (int(rng.integers(0, extent - side + 1)) for extent in image.size)
            box = (left, top, left + side, top + side)
            image = image.resize((self.size, self.size), Image.BICUBIC, box, reducing_gap=3)
        else:
            image = center_crop(image, self.size)
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if self.flip and rng and rng.uniform() < 0.5:
            image = image.flip(-1)
        return image, int(self.labels[index])


def open_data(cfg, split, size, crop=False, flip=False):
    """A Config's Images."""
    data = Images(cfg.data, split, size, cfg.data_dir, cfg.download, crop, flip, cfg.cache, cfg.caption_key)
    if cfg.skip_bad:
        data.bad_list = Path(cfg.out) / "bad_images.txt"
    if data.note and os.environ.get("RANK", "0") == "0":
        print(f"note: {data.note}")
    return data


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indices(n, batch, seed, step):
    """A step's items in an endless sequence of seeded permutations of n, their running numbers."""
    numbers = np.arange(step * batch, (step + 1) * batch)
    return np.array([permutation(n, seed, k // n)[k % n] for k in numbers.tolist()]), numbers


def micro_batch(batch, world, accumulate):
    """How many images a process takes at once."""
    size, rest = divmod(batch, world.size * accumulate)
    if rest:
        raise UserError(f"--batch_size={batch}: no multiple of {world.size} processes x --accumulate={accumulate}")
    return size


def step_batches(n, batch, seed, start, stop, world, accumulate=1):
    """A list of (index, key) for each micro-batch of the steps; a step's images depend neither on the number of
    processes nor on accumulation."""
    size = micro_batch(batch, world, accumulate)
    for step in range(start, stop):
        indices, numbers = batch_indices(n, batch, seed, step)
        mine = [(int(i), (seed, int(k))) for i, k in zip(indices, numbers)][world.rank::world.size]
        for k in range(0, len(mine), size):
            yield mine[k:k + size]


def make_loader(dataset, sampler, world, workers, collate=None):
    """Batches of (uint8 [b, 3, S, S], labels [b]) from `step_batches` or any batch sampler."""
    return DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, pin_memory=world.device.type == "cuda",
        worker_init_fn=leave_signals, collate_fn=collate)


def leave_signals(worker):
    """Loader processes ignore them: the training process handles them."""
    for number in Watch.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# --------------------------------------
# The toy: drawn shapes in place of ImageNet, a small ViT that knows them in place of the VFM

class Shapes(Dataset):
    """Drawn, labelled, captioned shapes on textured backgrounds, their attributes independent. An image is a function
    of (split, index): attributes come from a hash, edges from signed distances, so at any size."""
    classes = ["circle", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "T", "L"]
    hues = ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"]
    textures = ["plain", "gradient", "stripes", "checks", "clouds"]
    lengths = dict(train=30_000, val=5_000)

    def __init__(self, split, size=32, length=None, cache=None):
        self.split = split
        self.size = size
        self.images = None
        n = length or self.lengths[split]
        self.every_attribute = self.attributes(np.arange(n))
        self.labels = self.every_attribute["shape"]
        if cache and n * 3 * size * size < 1 << 29:  # drawn once, memory-mapped
            version = fingerprint(torch.from_numpy(self.draw(np.arange(16))))[:6]
            path = Path(cache) / f"shapes-{split}-{size}-{n}-{version}.npy"
            if not path.exists():
                with replacing(path) as temp:
                    array = allocate(temp, np.uint8, (n, 3, size, size))
                    for part in tqdm(np.array_split(np.arange(n), n // 500 + 1), f"drawing {n} shapes", leave=False):
                        array[part] = self.draw(part)
            self.images = np.load(path, mmap_mode="r")

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.draw(np.array([index]))[0] if self.images is None else self.images[index]
        return torch.from_numpy(np.array(image)), int(self.labels[index])

    def random(self, indices, k):
        """k uniform numbers in [0, 1) for each index: SplitMix64 (Steele et al. 2014) of a counter."""
        counter = np.asarray(indices, np.uint64)[:, None] * 64 + np.arange(k, dtype=np.uint64)
        z = (counter + ((self.split == "val") << 40)) * 0x9E3779B97F4A7C15
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        return ((z ^ (z >> 31)) >> 11).astype(np.float64) / (1 << 53)

    def attributes(self, indices):
        """Arrays: shape, hue, texture, ground; x, y, scale, angle, mirror, and coarsely place, size, turn; `free`."""
        u = self.random(indices, 24)

        def choose(k, choices):
            return (u[:, k] * len(choices)).astype(int)

        def quarter(values, low, high):
            return ((values - low) / (high - low) * 4).clip(0, 3).astype(int)

        scale = 0.55 + 0.25 * u[:, 4]
        x = (2 * u[:, 5] - 1) * (1 - scale)
        y = (2 * u[:, 6] - 1) * (1 - scale)
        angle = (2 * u[:, 7] - 1) * 0.4
        place = quarter(x, -0.45, 0.45) * 4 + quarter(y, -0.45, 0.45)
        return dict(
            shape=choose(0, self.classes), hue=choose(1, self.hues), texture=choose(2, self.textures),
            ground=choose(3, self.hues), x=x, y=y, scale=scale, angle=angle, mirror=np.where(u[:, 8] < 0.5, -1.0, 1.0),
            place=place, size=quarter(scale, 0.55, 0.8), turn=quarter(angle, -0.4, 0.4), free=u[:, 9:])

    def caption(self, index):
        a = {k: v[index] for k, v in self.every_attribute.items()}
        size = "large" if a["scale"] > 0.675 else "small"
        place = ("upper" if a["y"] < 0 else "lower") + (" left" if a["x"] < 0 else " right")
        return (f"a {size} {self.hues[a['hue']]} {self.classes[a['shape']]} at the {place} "
                f"on a {self.hues[a['ground']]} background, {self.textures[a['texture']]}")

    @staticmethod
    def left_out(shape, hue):
        """Of text training, to see if it composes: one pair in ten."""
        return (shape + hue) % 10 == 0

    def draw(self, indices):
        """uint8 [n, 3, size, size]."""
        a = self.attributes(indices)
        free = a["free"]
        px = (np.arange(self.size, dtype=np.float32) + 0.5) * (2 / self.size) - 1
        py = px[:, None]

        def column(values):  # [n] -> [n, 1, 1]
            return values[:, None, None].astype(np.float32)

        # background: a mixture of two tones of one hue, by texture
        value = 0.3 + 0.3 * free[:, 12:13]
        dark = self.colour(a["ground"], 0.6, value)
        light = self.colour(a["ground"], 0.5, value + 0.18)
        mixture = self.mixture(a["texture"], free.astype(np.float32), px, py)
        ground = dark + (light - dark) * np.clip(mixture, 0, 1)[:, None]

        # foreground: signed distance in the object's frame
        cos = column(np.cos(a["angle"]))
        sin = column(np.sin(a["angle"]))
        scale = column(a["scale"])
        dx = (px - column(a["x"])) / scale
        dy = (py - column(a["y"])) / scale
        u = (dx * cos + dy * sin) * column(a["mirror"])
        v = dy * cos - dx * sin
        distance = np.empty_like(u)
        for k, name in enumerate(self.classes):
            i = a["shape"] == k
            distance[i] = self.distance(name, u[i], v[i])
        coverage = np.clip(0.5 - distance * scale * (self.size / 2), 0, 1)[:, None]
        front = self.colour(a["hue"], 0.7 + 0.3 * free[:, 13:14], 0.85 + 0.15 * free[:, 14:15])
        return ((ground + (front - ground) * coverage) * 255 + 0.5).astype(np.uint8)

    def colour(self, hue, saturation, value):
        """HSV (hue [n], the others [n, 1] or one number) to RGB, [n, 3, 1, 1]."""
        k = (np.array([5, 3, 1]) + hue[:, None] / len(self.hues) * 6 + 0.3) % 6
        rgb = value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))
        return rgb.astype(np.float32)[:, :, None, None]

    def mixture(self, texture, free, px, py):
        """The lighter tone's share, [n, size, size]; `free` [n, 15]: the texture's numbers."""
        free = free[:, :, None, None]
        angle = free[:, 0] * 2 * np.pi
        frequency = np.pi * (1.5 + 1.5 * free[:, 1])
        along = px * np.cos(angle) + py * np.sin(angle)
        across = py * np.cos(angle) - px * np.sin(angle)
        wave = np.sin(along * frequency + free[:, 2] * 2 * np.pi)
        clouds = 0.5
        for k in (3, 6, 9):
            phase = px * (4 * free[:, k] - 2) + py * (4 * free[:, k + 1] - 2) + 2 * free[:, k + 2]
            clouds = clouds + 0.25 * np.sin(np.pi * phase)
        stripes = np.clip(0.5 + 4 * wave, 0, 1)
        checks = np.clip(0.5 + 4 * wave * np.sin(across * frequency), 0, 1)
        return np.choose(texture[:, None, None], [0 * along, (along + 1.4) / 2.8, stripes, checks, clouds])

    def distance(self, name, x, y):
        """Signed distance (negative inside) where the shape fills the unit disc, y down."""
        r = np.hypot(x, y)

        def box(x0, x1, y0, y1):
            return np.maximum(np.abs(x - (x0 + x1) / 2) - (x1 - x0) / 2, np.abs(y - (y0 + y1) / 2) - (y1 - y0) / 2)

        if name == "circle":
            return r - 0.85
        if name == "square":
            return box(-0.72, 0.72, -0.72, 0.72)
        if name == "triangle":
            return np.maximum(y, 0.8660254 * np.abs(x) - y / 2) - 0.48
        if name == "star":  # one of ten mirrored sectors: the edge from the tip (radius 0.95) to the inner corner (0.4)
            sector = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
            edge = 0.4 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)]) - [0.95, 0]
            normal = np.array([edge[1], -edge[0]], np.float32) / np.hypot(*edge)
            return normal[0] * (r * np.cos(sector) - 0.95) + normal[1] * r * np.sin(sector)
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
        return np.minimum(box(-0.62, -0.16, -0.85, 0.85), box(-0.62, 0.62, 0.4, 0.85))  # L


class ShapesText:
    """Words of Shapes.caption as ids, for a DiT that learns their embeddings."""
    name = "toy"
    length = 13  # all captions have
    words = sorted({
        *"a large small at the upper lower left right on background".split(), *Shapes.hues, *Shapes.textures,
        *map(str.lower, Shapes.classes)})

    def ids(self, texts):
        """Strings -> int32 [n, 13], padded with 0."""
        ids = torch.zeros(len(texts), self.length, dtype=torch.int32)
        for row, text in zip(ids, texts):
            for k, word in enumerate(text.lower().replace(",", " ").split()):
                if word not in self.words or k == self.length:
                    raise UserError(f"the toy reads {self.length} of these words: {' '.join(self.words)}; not '{text}'")
                row[k] = self.words.index(word) + 1
        return ids


# What networks learn to name: how many values each has. The VFM "toy-blind" is the control, never told the class on
# which the diffusion model is conditioned.
ATTRIBUTES = dict(shape=10, hue=8, texture=5, ground=8, place=16, size=4, turn=4)
TOY_VFMS = {"toy": list(ATTRIBUTES), "toy-blind": list(ATTRIBUTES)[1:]}
TOY_VIT = dict(image_size=32, patch_size=8, embed_dim=128, depth=3, num_heads=4, mlp_hidden=512, stem=32)


def attribute_counts(attributes):
    return [ATTRIBUTES[name] for name in attributes]


class ToyViT(ViT):
    """A ViT that embeds 8 px patches by three strided convolutions (arXiv 2106.14881); level 0 is the first one's
    output, space to depth: it still holds the pixels."""

    def __init__(self, stem, **config):
        super().__init__(**config)
        self.config["stem"] = stem
        self.level0_dim = stem * (self.patch_size // 2) ** 2
        width = [3, stem, 2 * stem, 4 * stem]
        self.patch_embed = nn.ModuleDict(dict(
            convs=nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in zip(width, width[1:])),
            norms=nn.ModuleList(nn.BatchNorm2d(b) for b in width[1:]),
            proj=pointwise(width[-1], self.embed_dim)))

    def embed(self, x):
        levels = []
        for conv, norm in zip(self.patch_embed["convs"], self.patch_embed["norms"]):
            levels.append(conv(x))  # [B, stem, H / 2, W / 2], ...
            x = F.gelu(norm(levels[-1]))
        level0 = F.pixel_unshuffle(levels[0], self.patch_size // 2).flatten(2).mT  # [B, N, level0_dim]
        return self.patch_embed["proj"](x).flatten(2).mT, level0


def train_on_shapes(title, net, logits, attributes, cache, device, images, batch, lr):
    """Trains `net` in place to name attributes of shapes (AdamW, one cycle): the toy's VFM, fid.py's classifier.
    `logits(x [B, 3, 32, 32] in [-1, 1])` -> a list of [B, sum(attribute_counts(attributes))]."""
    data = Shapes("train", 32, cache=cache)
    targets = torch.from_numpy(np.stack([data.every_attribute[name] for name in attributes], 1))
    net.train()
    opt = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, images // batch, pct_start=0.1)
    bar = tqdm(range(images // batch), title, mininterval=0.5)
    for step in bar:
        indices = np.sort(batch_indices(len(data), batch, 0, step)[0])
        x = to_float(torch.from_numpy(data.images[indices]).to(device))
        y = targets[indices].to(device)
        loss = 0
        for named in logits(x):
            for i, part in enumerate(named.split(attribute_counts(attributes), 1)):
                loss = loss + F.cross_entropy(part, y[:, i])
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}")


def toy_vfm_weights(name, cache):
    """A toy VFM's state dict; rank 0 trains it, in a minute, where `cache` has none."""
    path = Path(cache) / f"vfm-{name}.pt"
    world = init_world()
    if world.rank == 0 and not path.exists():
        with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []), torch.enable_grad():
            torch.manual_seed(0)
            vit = vit_from(TOY_VIT)
            count = sum(attribute_counts(TOY_VFMS[name]))
            heads = nn.ModuleList(nn.Linear(vit.embed_dim, count) for _ in range(2))

            def logits(x):  # on the class token, on the mean patch
                tokens, = vit(x, cls=True)  # [B, 1 + N, D]
                return [heads[0](tokens[:, 0]), heads[1](tokens[:, 1:].mean(1))]

            net = nn.ModuleList([vit, heads]).to(world.device)
            title = f"training the VFM '{name}' (once)"
            train_on_shapes(title, net, logits, TOY_VFMS[name], cache, world.device, 72_000, 64, 1e-3)
        save_checkpoint(path, kind="vfm", name=name, model=vit.cpu().state_dict())
    world.barrier()
    return load_checkpoint(path, "vfm")["model"]


# --------------------------------------
# What scripts begin and end with: command line, processes, checkpoints, log, pictures

class UserError(Exception):
    """The user's mistake: `main` prints its line and exits with status 1."""


Positive = typing.NewType("Positive", int)
Share = typing.NewType("Share", float)
Decay = typing.NewType("Decay", float)


LARGEST = 2 ** 62  # of a flag's numbers: it fits C's integers


def parse_config(Config, presets, argv=None, positional=()):
    """Config's defaults, then the preset's, then the flags. Fields may be int or float (0 or more), Positive, Share
    (in [0, 1]), Decay (in [0, 1)), bool (0/1), str, Literal[...] or tuple[int or float, ...] (comma-separated, maybe
    negative); those in `positional` need no flag. One line and exit status 2 for an unknown flag or a bad value."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"{self.prog}: {message}\n")

    def boolean(text):
        return ("0", "false", "1", "true").index(text.lower()) > 1

    def numbers(name, kind, least=-LARGEST, most=LARGEST, many=False):  # name: for argparse's complaint
        def convert(text):
            values = tuple(kind(part) for part in text.split(",") if part) if many else (kind(text),)
            if not all(least <= value <= most for value in values):
                raise ValueError
            return values if many else values[0]
        convert.__name__ = name
        return convert

    converters = {
        bool: boolean, str: str, int: numbers("integer (at least 0)", int, 0),
        Positive: numbers("positive integer (at least 1)", int, 1),
        float: numbers("finite number (at least 0)", float, 0), Share: numbers("number in [0, 1]", float, 0, 1),
        Decay: numbers("number in [0, 1)", float, 0, 1 - 2 ** -53),
        tuple[int, ...]: numbers("list_of_numbers", int, many=True),
        tuple[float, ...]: numbers("list_of_finite_numbers", float, many=True)}
    source = "".join(inspect.getsource(each) for each in Config.__mro__[-2::-1])
    comments = dict(re.findall(r"^    (\w+): .*?  #\s*(.*)$", source, re.M))
    epilog = "presets: " + "; ".join(f"{name}: {preset or 'the defaults'}" for name, preset in presets.items())
    parser = Parser(
        description=sys.modules[Config.__module__].__doc__, epilog=epilog, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    types = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        kind = types[field.name]
        default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        help = f"{comments.get(field.name, '')} [{default}]".replace("%", "%%")
        if field.name == "preset":
            parser.add_argument("--preset", choices=presets, help=help)
        elif typing.get_origin(kind) is Literal:
            parser.add_argument(f"--{field.name}", choices=typing.get_args(kind), help=help)
        else:
            parser.add_argument(f"--{field.name}", type=converters[kind], metavar=kind.__name__, help=help)
    for name in positional:
        parser.add_argument(name, nargs="?")
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        nearest = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], types, 1, 0)[0]
        parser.error(f"unknown argument {unknown[0]}; did you mean --{nearest}?")
    imagenet = torch.cuda.is_available() and os.path.isdir("data/imagenet/train")
    preset = getattr(given, "preset", "imagenet" if imagenet else "toy")
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"preset {preset}", flush=True)
    return Config(**{**presets[preset], **vars(given), "preset": preset})


MEMORY_FLAGS = dict(
    batch_size="lower --batch_size", accumulate="raise --accumulate", encode_batch="lower --encode_batch",
    checkpointing="--checkpointing=1", fsdp="--fsdp=1")
DISK_ERRORS = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO


def main(run):
    """Runs a script's `run()`. What a user, the machine or another process caused: one line, exit status 1."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # outside of `Watch.steps` it would kill
    try:
        run()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        line = complaint(error, run.__globals__.get("Config", Config))
        if not line:
            raise
        for bar in list(tqdm._instances):
            bar.close()
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(1)  # leaving the group could wait for the others
        sys.exit(1)
    finally:
        for worker in multiprocessing.active_children():  # a loader's: they leave SIGTERM to us
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would complain
            worker.kill()
        if dist.is_initialized():
            dist.destroy_process_group()


def out_of_memory(error):
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def complaint(error, Config):
    """The line for the user, or None where the mistake is ours."""
    text = str(error).strip()
    if out_of_memory(error):
        fields = [field.name for field in dataclasses.fields(Config)]
        return "out of memory: " + " or ".join(way for name, way in MEMORY_FLAGS.items() if name in fields)
    if isinstance(error, UserError) or "UserError: " in text:
        return text.splitlines()[-1].split("UserError: ")[-1]  # a DataLoader's worker adds a traceback
    if text.startswith("DataLoader worker") or getattr(error, "errno", None) in DISK_ERRORS:
        return text.splitlines()[0]
    if dist.is_initialized() and (isinstance(error, dist.DistError) or re.search("gloo|pair closure", text)):
        if re.search("time(d )?out", text, re.I):
            return f"another process hangs: no answer for {PATIENCE} seconds"
        return "another process has ended: its message is above"


# dense bf16, NVIDIA's datasheets
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}


@dataclass
class World:
    """This process among its peers."""
    rank: int
    size: int
    device: torch.device
    peak_tflops: float = 0.0  # the device's; 0: unknown
    layout = torch.channels_last  # of convolutions; on the CPU, too, 0.8 of the time

    def autocast(self):  # bf16 on CUDA, float32 on the CPU
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def mfu(self, flops, rate):
        """At `flops` an image, `rate` images a second over all processes; None where one is unknown."""
        return flops * rate / (self.peak_tflops * 1e12 * self.size) if flops and self.peak_tflops else None

    def barrier(self):
        """Waits, however long one process alone lists a million files."""
        if self.size > 1:
            dist.barrier(patient_group())

    def agree(self, **parts):
        """UserError unless all processes run the same code and have the same parts (tensors, text)."""
        if self.size == 1:
            return
        parts["code"] = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
        mine = {name: fingerprint(part) for name, part in parts.items()}
        every = [None] * self.size
        dist.all_gather_object(every, mine)
        for rank, theirs in enumerate(every):
            for name in parts:
                if theirs[name] != every[0][name]:
                    raise UserError(f"process {rank} has another {name} than process 0")

    def any_bad(self, values):
        """A tensor, so that nobody waits for the GPU: 1 if one of the values on any process is not finite, else 0."""
        bad = ~torch.stack([value.float() for value in values]).isfinite().all()
        return self.sum(bad.float()).clamp(max=1)

    def sum(self, tensor):
        """Over processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor):
        """Over processes, in place."""
        return self.sum(tensor.div_(self.size))


def init_world(*folders, peak_tflops=0.0):
    """Joins torchrun's process group (NCCL on GPUs, gloo on the CPU), or stands alone. Removes from the folders what
    killed runs left half-written."""
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        if device.index >= torch.cuda.device_count():
            raise UserError(f"{torch.cuda.device_count()} GPUs: lower --nproc_per_node")
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        name = torch.cuda.get_device_name()
        peak_tflops = peak_tflops or next((peak for gpu, peak in PEAK_TFLOPS.items() if gpu in name), 0.0)
    elif sys.platform == "linux":  # glibc's returned blocks fault: a third of the published decoder's step
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: keep what is freed
            libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks, too
    if rank == 0:
        for folder in folders:
            remove_leftovers(folder)
    if size > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=PATIENCE))
        patient_group()
    return World(rank, size, device, peak_tflops)


PATIENCE = 600  # seconds that a collective may take, PyTorch's


@functools.cache
def patient_group():
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))


def seed_step(seed, step, rank=0):
    """A step's randomness is a function of (seed, step, rank), so that resumed runs are exact."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))


class Watch:
    """Over a training's steps: signals, and steps whose losses or gradients are not finite. All processes act on the
    same step, and none waits for its GPU: what they act on is a step old, or older where the GPU lags."""
    SIGNALS = (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)  # save; save and end
    MAX_SKIPPED = 10  # in a row, then the run ends (ours)

    def __init__(self, world, path, entries=None):
        """path: the training's checkpoint, entries: what it held."""
        self.world = world
        self.path = path
        self.skipped = torch.tensor(float(entries.get("skipped", 0) if entries else 0), device=world.device)
        self.row = torch.zeros((), device=world.device)  # skipped in a row
        self.row_on_host = torch.zeros((), pin_memory=world.device.type == "cuda")  # the newest that has arrived
        self.received = 0  # the signal to be passed on, by its place in SIGNALS, from 1
        self.ending = None  # when the first that ends the run came
        self.pending = None  # (its maximum over processes, collective) of the step before

    def handle(self, number, frame):
        if number != signal.SIGUSR1:
            # torchrun passes on what a terminal or scheduler has sent to all
            if self.ending and time.monotonic() - self.ending > 2 * ("TORCHELASTIC_RUN_ID" in os.environ):
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self.ending = self.ending or time.monotonic()
        self.received = max(self.received, self.SIGNALS.index(number) + 1)

    def steps(self, steps):
        """The steps, while this object handles signals."""
        before = {number: signal.signal(number, self.handle) for number in self.SIGNALS}
        ended = False
        try:
            yield from steps
            if self.pending:
                self.pending[1].wait()
            ended = True
        finally:
            if ended or self.world.size == 1:  # else torchrun's SIGTERM could come before `main`'s line on the error
                for number, handler in before.items():
                    signal.signal(number, handler)
        if self.received > 1 and self.world.size == 1:  # after the last `count`; several must agree, and end anyway
            self.obey(self.SIGNALS[self.received - 1], steps.stop)

    def count(self, losses):
        """After each step, with its losses and "skipped" (then the number so far) -> the signal to obey now, or 0."""
        self.row = (self.row + 1) * losses["skipped"]
        self.skipped += losses["skipped"]
        losses["skipped"] = self.skipped.clone()
        self.row_on_host.copy_(self.row, non_blocking=True)
        received, self.received = self.received, 0  # no call between: a handler's signal would be lost
        state = torch.tensor([received, int(self.row_on_host)])
        if self.world.size > 1:
            work = dist.all_reduce(state, dist.ReduceOp.MAX, async_op=True)
            before = self.pending
            self.pending = state, work
            if not before:
                return 0
            before[1].wait()
            state = before[0]
        received, row = state.tolist()
        if row >= self.MAX_SKIPPED:
            bad = [name for name, value in losses.items() if not value.isfinite()]
            there = f"{self.path} is the last checkpoint" if os.path.exists(self.path) else "no checkpoint was written"
            first = bad[0] if bad else "another process's loss"
            raise UserError(f"{row} steps in a row were not finite, first of all {first}; {there}")
        return self.SIGNALS[received - 1] if received else 0

    def obey(self, number, step):
        """Ends the run, if the signal says so, when its checkpoint is written."""
        if not number:
            return
        if self.world.rank == 0:
            tqdm.write(f"{signal.Signals(number).name} at step {step}: saved to {self.path}")
        if number != signal.SIGUSR1:
            sys.exit(128 + number)


def lock(file, wait=True):
    """Locks an open file until it is closed or the process dies -> whether it got the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def replacing(path, sync=True):
    """A temporary path, renamed onto `path` when the block ends: readers never see half a file; nor, with `sync`, after
    a power cut."""
    path = Path(path)
    temp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temp, "wb") as file:
            lock(file)
            yield temp
            if sync:
                os.fsync(file.fileno())
        os.replace(temp, path)
        if sync:
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's, of a full disk
        raise UserError(f"cannot write {path}: {error}".splitlines()[0])
    finally:
        if temp.exists():
            temp.unlink()


def allocate(path, dtype, shape):
    """A new .npy's array, mapped; on a full disk UserError now, not SIGBUS as it is filled."""
    try:
        array = np.lib.format.open_memmap(path, "w+", dtype, tuple(shape))
        if hasattr(os, "posix_fallocate"):
            with open(path, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}")
    return array


def remove_leftovers(folder):
    """Temporary files that no living process has locked."""
    for depth in ("", "*/", "*/*/"):
        for temp in Path(folder).glob(f"{depth}*.tmp"):
            with contextlib.suppress(OSError), open(temp, "rb+") as file:
                if re.search(r"\.\d+\.tmp$", temp.name) and lock(file, wait=False):
                    temp.unlink()


def save_checkpoint(path, **entries):
    with replacing(path) as temp:
        torch.save(entries, temp)


def load_checkpoint(path, kind):
    """Its entries, on the CPU; UserError if of another kind."""
    entries = load_weights(path)
    if entries.get("kind") != kind:
        raise UserError(f"{path} is no {kind} checkpoint; its kind: {entries.get('kind', 'unknown')}")
    return entries


def write_text(path, text):
    with replacing(path) as temp:
        temp.write_text(text)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path):
    """{} if there is none, or half of one."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}


def fingerprint(*parts):
    """A hash of tensors' bytes, modules' weights, the text of anything else."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        items = part.state_dict().items() if isinstance(part, nn.Module) else [("", part)]
        for name, item in items:
            digest.update(name.encode())
            if torch.is_tensor(item):
                digest.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            else:
                digest.update(repr(item).encode())
    return digest.hexdigest()


class Log:
    """A tqdm bar, a line of JSON in `out/log.jsonl` per log interval; on rank 0."""

    def __init__(self, out, script, world, total, start=0):
        self.path = Path(out) / "log.jsonl"
        self.script = script
        self.world = world
        self.flops = 0  # of one image's training step, for MFU
        self.last = None  # (time, images seen) of the line before
        self.bar = tqdm(total=total, initial=start, desc=script, unit="step", disable=world.rank > 0, mininterval=0.5)
        if world.rank == 0:  # lines past the checkpoint go, and half a line
            kept = ""
            for line in self.path.read_text().splitlines() if self.path.exists() else ():
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    if entry["script"] != script or entry["step"] <= start:
                        kept += line + "\n"
            write_text(self.path, kept)

    def write(self, step, images, **values):
        """`images`: seen so far."""
        values = {k: float(v) for k, v in values.items()}
        now = time.perf_counter()
        if self.last:
            rate = (images - self.last[1]) / (now - self.last[0])
            values.update(images_per_second=rate, mfu=self.world.mfu(self.flops, rate))
        self.last = now, images
        if self.world.rank == 0:
            values = {k: float(f"{v:.6g}") for k, v in values.items() if v is not None and math.isfinite(v)}
            with open(self.path, "a") as file:
                file.write(json.dumps(dict(script=self.script, step=step, images=images, **values)) + "\n")
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()}, refresh=False)


def time_steps(title, step, n, images, flops, world):
    """Times n calls of `step` after three; prints a line of JSON. `images` a call; `flops` an image; `gpu_waits`:
    the share of the time in which no kernel runs."""
    cuda = world.device.type == "cuda"

    def mark():
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    marks = []
    for _ in range(3 + n):
        step()
        marks.append(mark())
    if cuda:
        torch.cuda.synchronize()
    times = [a.elapsed_time(b) if cuda else 1000 * (b - a) for a, b in zip(marks[2:], marks[3:])]
    ms = np.median(times)
    rate = 1000 * images / ms
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    waits = None
    if cuda:
        peak = torch.cuda.max_memory_allocated()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        kernels = sum(event.self_device_time_total for event in profile.key_averages())  # microseconds
        waits = max(0.0, 1 - kernels / 1000 / ms)
    result = dict(
        title=title, device=torch.cuda.get_device_name() if cuda else "cpu", processes=world.size, images=images, ms=ms,
        ms_min=min(times), ms_max=max(times), images_per_second=rate, tflops=flops * rate / 1e12,
        mfu=world.mfu(flops, rate), peak_gib=peak / 2 ** 30, gpu_waits=waits)
    result = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}
    if world.rank == 0:
        print(json.dumps(result), flush=True)


def to_uint8(images):
    """float [..., H, W] in [-1, 1] -> uint8, rounded."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def to_float(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def shrink(images, scale, antialias=True):
    """Images [B, C, H, W] at `scale` times their size, bilinear; unchanged at 1."""
    if scale == 1:
        return images
    size = [round(side * scale) for side in images.shape[-2:]]
    return F.interpolate(images, size, mode="bilinear", antialias=antialias)


def save_grid(images, path, columns, labels=None):
    """Images [N, 3, H, W] in [-1, 1] -> a PNG, `columns` to the row, `labels` (strings) under them."""
    images = F.interpolate(images.float(), scale_factor=max(1, 96 // max(images.shape[-2:])))
    n, _, h, w = images.shape
    labels = [textwrap.wrap(label, w // 6) for label in labels or []]  # Pillow's font: about 4 px a letter
    width = w + 2  # of a cell
    height = h + 2 + 12 * max(map(len, labels), default=0)
    canvas = Image.new("RGB", (columns * width, math.ceil(n / columns) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()):
        x = i % columns * width
        y = i // columns * height
        canvas.paste(Image.fromarray(image), (x, y))
        if labels:
            draw.text((x + 1, y + h), "\n".join(labels[i]), fill="black", spacing=1)
    with replacing(path) as temp:
        canvas.save(temp, "PNG")


# --------------------------------------

def run():
    cfg = parse_config(Config, PRESETS)
    action = bench if cfg.bench else train
    action(cfg, init_world(cfg.out, cfg.cache, peak_tflops=cfg.peak_tflops))


if __name__ == "__main__":
    main(run)
