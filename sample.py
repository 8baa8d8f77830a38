"""
Images from a diffusion checkpoint (solvers: diffusion.py), reconstructions of a folder's images.

    python sample.py  # toy: out/diffusion.pt -> out/samples/, .png, .npz
    torchrun --nproc_per_node=8 sample.py --preset=imagenet  # 50,000 for FID
    python sample.py --ckpt=lightningdit-xl.pt --tokenizer=vfmvae.pth --latent_stats=latents_stats.pt
    python sample.py --prompt="a large red star at the upper left on a blue background, stripes|a ..."
    python sample.py --reconstruct=FOLDER  # through the tokenizer; its codes -> out/tokens.npz
    python sample.py --reconstruct=out/tokens.npz
    python sample.py --bench=20  # time guided evaluations
"""
import math
import os
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

# before torch, for whose threads tokenizer.py sets the environment
from diffusion import PRESETS as DIFFUSION_PRESETS, Config as DiffusionConfig
from diffusion import (
    DiT, Sampling, bench_arch, caption_states, check_solver, generate, guided, load_diffusion, ode, sde)
from tokenizer import (
    Images, Positive, Shapes, ShapesText, UserError, fingerprint, init_world, load_text, load_tokenizer, load_weights,
    main, make_loader, parse_config, read_json, read_lines, reading, replacing, save_grid, time_steps, to_float,
    to_uint8, write_json)

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm, trange


@dataclass
class Config:
    preset: str = ""  # imagenet (given CUDA and data/imagenet/train), reg or toy
    out: str = "out"  # images go to OUT/samples
    ckpt: str = ""  # diffusion model; empty: OUT/diffusion.pt, of prompts OUT/diffusion-text.pt
    tokenizer: str = ""  # empty: what ckpt names; RAE's decoder: FILE::VFM
    latent_stats: str = ""  # official ckpt: file of its latents' "mean", "std", or RAE's "mean", "var"
    num_heads: int = 0  # official ckpt; 0: the published model's
    n: int = 0  # images; 0: 50,000; toy 1,000; of --prompt 4 each
    classes: tuple[int, ...] = ()  # in turn; empty: all
    prompt: str = ""  # captions in turn, separated by |
    prompts: str = ""  # or a file with one a line; neither: the toy's text model takes held-out captions
    negative: str = ""  # caption to be guided away from; empty: the null one
    seed: int = 0  # image i's noise: by (seed, i)
    batch_size: Positive = 128  # of each process
    # defaults: VFM-VAE's and LightningDiT's after 64 epochs (after 560: --cfg_scale=4)
    solver: Literal["euler", "heun", "ab2", "sde"] = "euler"  # ab2: Adams-Bashforth; sde: Euler-Maruyama
    num_steps: Positive = 250  # times; evaluations: one less (euler, ab2), twice that (heun), as many (sde)
    cfg_scale: float = 6.0  # guidance: 1 is none
    cfg_interval: tuple[float, ...] = (0.125, 1.0)  # of its times (0: noise, 1: data)
    cfg_channels: int = 3  # on so many latent channels (0: all); not sde
    timestep_shift: float = 0.3  # s of t -> s t / (1 + (s - 1) t) (0: none); not sde
    train_shift: int = 0  # in its place the --train_shift of the model's training (0: none); not sde
    reuse: Positive = 1  # evaluations that share the output of a head model's other blocks (DDT; 1: none); not sde
    cls_cfg_scale: float = 0.0  # guidance of REG's class token (0: none), if --cfg_scale is not 1
    guide: str = ""  # a weaker model: autoguidance
    # machine and output
    compile: bool = torch.cuda.is_available()  # the model
    npz: bool = True  # also write OUT/samples.npz (ADM's format)
    bench: int = 0  # time so many guided evaluations: of --ckpt, or random weights of the preset's size
    peak_tflops: float = 0.0  # the device's, for MFU; 0: PEAK_TFLOPS
    reconstruct: str = ""  # folder of images, or tokens.npz: just reconstruct them


PLAIN = dict(cfg_interval=(0.0, 1.0), cfg_channels=0, timestep_shift=0.0)
PRESETS = dict(
    imagenet={},
    toy=dict(batch_size=64, solver="ab2", num_steps=20, cfg_scale=3.0, **PLAIN),
    reg=dict(solver="sde", cfg_scale=1.0, **PLAIN))


def tokenizer_beside(path, entries):
    """The tokenizer that a diffusion checkpoint names, or one of that name beside it."""
    if "tokenizer" not in entries:
        raise UserError(f"{path} names no tokenizer: give --tokenizer=FILE")
    file, colons, encoder = entries["tokenizer"].partition("::")  # RAE's
    named = Path(file)
    return f"{named if named.exists() else Path(path).parent / named.name}{colons}{encoder}"


def check_tokenizer(path, entries, tokenizer, named):
    """UserError unless this diffusion model was trained on these weights (old and joint ones do not say)."""
    known = entries.get("tokenizer_is")
    if known and known != fingerprint(tokenizer):
        raise UserError(f"{named} was trained again: {path} knows other latents (sample.py --tokenizer=FILE takes any)")


def load_pipeline(cfg, world):
    """-> (model, guide or None, tokenizer, mean, std [C]), ready to sample."""
    text = cfg.prompt or cfg.prompts
    path = cfg.ckpt or f"{cfg.out}/{'diffusion-text' if text else 'diffusion'}.pt"
    if not os.path.exists(path):
        first = "diffusion.py --text=toy" if text else "diffusion.py"
        raise UserError(f"no diffusion model at {path}: run {first} first, or give --ckpt")
    model = load_diffusion(path, **(dict(num_heads=cfg.num_heads) if cfg.num_heads else {}))
    guide = load_diffusion(cfg.guide) if cfg.guide else None
    if cfg.reuse > 1 and not model.head_depth:
        raise UserError(f"--reuse={cfg.reuse}: {path} has no head (diffusion.py --head_depth)")
    if len(cfg.cfg_interval) != 2:
        raise UserError("--cfg_interval takes two times, LOW,HIGH")
    stats = model.about
    if cfg.latent_stats:
        stats = {f"latent_{key}": value for key, value in load_weights(cfg.latent_stats).items()}
        if "latent_var" in stats:  # RAE's
            stats["latent_std"] = (stats["latent_var"] + 1e-5).sqrt()
    if "latent_std" not in stats or "latent_mean" not in stats:
        raise UserError(f"{cfg.latent_stats or path} lacks the latents' mean and std: --latent_stats=FILE")
    mean, std = (stats[key].float().flatten() for key in ("latent_mean", "latent_std"))
    shape = model.in_channels, model.input_size, model.input_size
    if len(mean) == len(std) == math.prod(shape):  # RAE's, by position
        mean = mean.view(shape)
        std = std.view(shape)
    for key in ("in_channels", "input_size", "num_classes", "cls_dim", "text_tokens", "sphere"):
        if guide and getattr(guide, key) != getattr(model, key):
            raise UserError(f"--guide={cfg.guide} has another {key} than {path}")
    for key, value in ("latent_mean", mean), ("latent_std", std):
        if guide and not torch.equal(guide.about.get(key, value), value):
            raise UserError(f"--guide={cfg.guide} is of other latents")
    named = cfg.tokenizer or tokenizer_beside(path, model.about)
    tokenizer = load_tokenizer(named).to(world.device)
    if not cfg.tokenizer:
        check_tokenizer(path, model.about, tokenizer, named)
    if not tokenizer.z_dim == model.in_channels == len(mean) == len(std):
        raise UserError(f"{path}, its tokenizer and its statistics are of latents of other widths")
    for net in filter(None, (model, guide)):
        prepare(net, cfg, world)
    return model, guide, tokenizer, mean, std


def prepare(model, cfg, world):
    model.projectors = torch.nn.ModuleList()  # only for training
    model.to(world.device)
    if cfg.compile:
        torch._dynamo.config.cache_size_limit = 64  # batch sizes x what is kept
        model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)
    return model


def write_png(path, pixels):
    """pixels: uint8 [3, H, W]."""
    with replacing(path, sync=False) as temporary:  # half an hour for 50,000
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(temporary, "PNG", compress_level=1)


def write_npz(path, paths):
    """ADM's format, arr_0 uint8 [N, H, W, 3], from PNGs, one at a time."""
    shape = len(paths), *np.asarray(Image.open(paths[0])).shape
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
            for each in paths:
                file.write(np.asarray(Image.open(each)).tobytes())


def read_conditions(cfg, model, world):
    """-> classes or captions, taken in turn; a function: some of them -> the DiT's y."""
    if not model.text_tokens:
        classes = cfg.classes or tuple(range(model.num_classes))
        if cfg.prompt or cfg.prompts or cfg.negative:
            raise UserError("this model knows classes: prompts are for those of diffusion.py --text")
        if not 0 <= min(classes) <= max(classes) <= model.num_classes:
            raise UserError(f"--classes: there are 0 to {model.num_classes - 1}, {model.num_classes}: none")
        return classes, torch.tensor
    if cfg.classes:
        raise UserError("this model knows captions: --prompt, not --classes")
    if cfg.prompt and cfg.prompts:
        raise UserError("--prompt or --prompts, not both")
    if cfg.negative and cfg.guide:
        raise UserError("--negative and --guide: guidance is away from one of them")
    name = model.about["config"]["text"]
    text = ShapesText() if name == "toy" else load_text(name).to(world.device)
    prompts = cfg.prompt.split("|")
    if cfg.prompts:
        prompts = read_lines(cfg.prompts)
    elif not cfg.prompt:
        if name != "toy":
            raise UserError("a text model needs --prompt or --prompts")
        shapes = Shapes("val")
        prompts = [shapes.caption(i) for i in range(len(shapes))]
    text.ids([*prompts, cfg.negative])  # complains of unknown words before all work
    return prompts, lambda some: caption_states(text, text.ids(some).to(world.device))


def write_samples(cfg, world):
    """OUT/samples/000000.png, ..., labels.json (class by file name) or prompts.json, settings.json; OUT/samples.png, a
    grid; OUT/samples.npz. What is there of the same settings stays, but for images beyond --n."""
    model, guide, tokenizer, mean, std = load_pipeline(cfg, world)
    check_solver(model, cfg.solver, cfg.num_steps)  # before older samples go
    conditions, condition = read_conditions(cfg, model, world)
    many = 1_000 if cfg.preset == "toy" else 50_000
    n = cfg.n or (4 * len(conditions) if cfg.prompt else many)
    asked = [conditions[i % len(conditions)] for i in range(n)]
    negative = condition([cfg.negative])[0] if cfg.negative else None
    out = Path(cfg.out)
    folder = out / "samples"
    paths = [folder / f"{i:06d}.png" for i in range(n)]
    if world.rank == 0:
        settings = {field.name: getattr(cfg, field.name) for field in fields(Sampling)}
        settings.update(
            cfg_interval=list(cfg.cfg_interval), num_heads=cfg.num_heads, conditions=list(conditions),
            negative=cfg.negative, weights=fingerprint(model, guide, tokenizer, mean, std))
        there = set(folder.glob("*.png"))
        before = read_json(folder / "settings.json")
        if there and not before:
            raise UserError(f"{folder} holds other images: another --out")
        if before == settings:
            there -= set(paths)
        elif there:
            print(f"{folder} holds images of other settings: starting over")
        for path in (*there, folder / "labels.json", folder / "prompts.json"):
            path.unlink(missing_ok=True)
        write_json(folder / "settings.json", settings)
        by_file = {path.name: each for path, each in zip(paths, asked)}
        write_json(folder / ("prompts.json" if model.text_tokens else "labels.json"), by_file)
    world.barrier()
    todo = [i for i, path in enumerate(paths) if not path.exists()]
    world.barrier()  # all have looked
    mine = todo[world.rank::world.size]
    rows = cfg.batch_size if cfg.compile else 16
    for k in trange(0, len(mine), cfg.batch_size, desc="samples", disable=world.rank > 0):
        part = mine[k:k + cfg.batch_size]
        y = condition([asked[i] for i in part])
        images = generate(model, tokenizer, mean, std, part, y, cfg, world, guide, rows, negative)
        for i, pixels in zip(part, to_uint8(images).cpu()):
            write_png(paths[i], pixels)
    world.barrier()
    if world.rank == 0:
        classes = [*model.about.get("classes", map(str, range(model.num_classes))), "none"]
        names = asked if model.text_tokens else [classes[c] for c in asked]
        columns = len(conditions) if 4 <= len(conditions) <= 16 else 8
        shown = min(n, 64) // columns * columns or n  # whole rows
        images = torch.from_numpy(np.stack([Image.open(path) for path in paths[:shown]])).permute(0, 3, 1, 2)
        save_grid(to_float(images), out / "samples.png", columns, names[:shown])
        if cfg.npz:
            write_npz(out / "samples.npz", paths)
        print(f"{n:,} images in {folder} ({len(todo):,} new); some: {out / 'samples.png'}")


def reconstruct(cfg, world):
    """Every image of a folder, cropped to the tokenizer's resolution, in OUT/originals, and decoded again in
    OUT/reconstructions (for fid.py --pairs=1); codes' indices in OUT/tokens.npz: names [N], tokens [N, h, w]."""
    tok = load_tokenizer(cfg.tokenizer or f"{cfg.out}/tokenizer.pt").to(world.device)
    if not os.path.isdir(cfg.reconstruct):
        raise UserError(f"no folder {cfg.reconstruct}")
    data = Images(os.path.join(cfg.reconstruct, ""), "", tok.resolution)  # a folder, also of the name shapes
    names = [Path(os.fsdecode(path)).relative_to(cfg.reconstruct).with_suffix(".png") for path in data.source]
    originals = Path(cfg.out, "originals")
    copies = Path(cfg.out, "reconstructions")
    left = {path.relative_to(copies) for path in copies.rglob("*.png")} - set(names)
    if left or len(set(names)) < len(names):
        raise UserError(f"{copies} holds other images, or two names differ only in the suffix: another --out")
    mine = range(len(names))[world.rank::world.size]
    batches = [list(mine[k:k + cfg.batch_size]) for k in range(0, len(mine), cfg.batch_size)]
    loader = make_loader(data, batches, world, workers=4)
    side = tok.resolution // tok.downsample
    n = len(names) if tok.quantizer is not None else 0
    tokens = torch.zeros(n, side, side, dtype=torch.int32, device=world.device)
    for batch, (pixels, _) in zip(batches, tqdm(loader, desc="reconstructing", disable=world.rank > 0)):
        with torch.inference_mode():
            images = to_float(pixels.to(world.device))
            z, _ = tok.posterior(tok.features(images), *images.shape[-2:])  # [B, C, h, w]
            if tok.quantizer is not None:
                z, indices = tok.quantizer(z)
                tokens[batch] = indices.int()
            decoded = to_uint8(tok.decode(z)).cpu()
        for i, before, after in zip(batch, pixels, decoded):
            write_png(originals / names[i], before)
            write_png(copies / names[i], after)
    world.sum(tokens)
    if world.rank == 0:
        print(f"{len(names):,} images in {copies}, {originals}")
        if tok.quantizer is not None:
            with replacing(Path(cfg.out, "tokens.npz")) as temporary, open(temporary, "wb") as file:
                np.savez(file, names=list(map(str, names)), tokens=tokens.cpu(), tokenizer=fingerprint(tok))


def decode_tokens(cfg, world):
    """The images of such a tokens.npz in OUT/reconstructions."""
    tok = load_tokenizer(cfg.tokenizer or f"{cfg.out}/tokenizer.pt").to(world.device)
    with reading(cfg.reconstruct), np.load(cfg.reconstruct) as archive:
        names = [os.path.normpath(f"/{name}").lstrip("/") for name in archive["names"]]  # below OUT
        tokens = torch.from_numpy(archive["tokens"]).long()
        if tok.quantizer is None or archive["tokenizer"] != fingerprint(tok):
            raise UserError(f"{cfg.reconstruct} holds another tokenizer's codes: give --tokenizer=FILE")
        if not 0 <= tokens.min() <= tokens.max() < len(tok.quantizer.codebook):
            raise UserError(f"{cfg.reconstruct} is damaged: it holds codes that there are not")
    for part in torch.arange(len(names))[world.rank::world.size].split(cfg.batch_size):
        with torch.inference_mode():
            images = to_uint8(tok.decode(tok.quantizer.lookup(tokens[part].to(world.device)))).cpu()
        for i, pixels in zip(part, images):
            write_png(Path(cfg.out, "reconstructions", names[i]), pixels)
    if world.rank == 0:
        print(f"{len(names):,} images in {Path(cfg.out, 'reconstructions')}")


@torch.no_grad()
def bench(cfg, world):
    """Times guided evaluations."""
    guide = None
    if cfg.ckpt:
        model, guide, *_ = load_pipeline(cfg, world)
    else:
        size = DiffusionConfig(**DIFFUSION_PRESETS[cfg.preset])
        model = prepare(DiT(**bench_arch(size)).eval(), cfg, world)
    n = cfg.batch_size
    state = [torch.randn(n, model.in_channels, model.input_size, model.input_size, device=world.device)]
    if model.cls_dim:
        state.append(torch.randn(n, model.cls_dim, device=world.device))
    y = model.null(n)

    def step():
        with world.autocast():
            guided(model, state, 0.5, y, cfg.cfg_scale, guide=guide)

    flops = model.flops() + (cfg.cfg_scale != 1) * (guide or model).flops()
    time_steps("guided evaluation", step, cfg.bench, n * world.size, flops, world)


def run():
    cfg = parse_config(Config, PRESETS)
    world = init_world(cfg.out, peak_tflops=cfg.peak_tflops)
    if cfg.bench:
        bench(cfg, world)
    elif cfg.reconstruct.endswith(".npz"):
        decode_tokens(cfg, world)
    elif cfg.reconstruct:
        reconstruct(cfg, world)
    else:
        write_samples(cfg, world)


if __name__ == "__main__":
    main(run)
