"""
Images from a diffusion checkpoint, and reconstructions of a folder of images.

    python sample.py                                        # toy: out/diffusion.pt -> out/samples/, a labelled grid, an .npz for fid.py
    python sample.py --classes=0,3 --n=16 --cfg_scale=2 --seed=7
    torchrun --nproc_per_node=8 sample.py --preset=imagenet # 50,000 images for FID (torchrun ... -- sample.py --n=...: else it takes --n for its own)
    python sample.py --ckpt=lightningdit-xl.pt --tokenizer=vfmvae.pth --latent_stats=latents_stats.pt       # official files
    python sample.py --reconstruct=FOLDER                   # the tokenizer's reconstructions, paired by name
    python sample.py --sweep=1                              # toy: Frechet distance and class accuracy by solver, steps, guidance

Guidance is arXiv 2207.12598, its interval 2404.07724, autoguidance 2406.02507, the SDE sampler SiT's 2401.08740.
"""
import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from diffusion import ImageNoise, fingerprint, load_diffusion, read_json, write_json
from tokenizer import (Images, UserError, center_crop, init_world, list_images, load_rgb, load_tokenizer, load_weights, main, parse_config,
                       save_grid, to_float, to_uint8)


@dataclass
class Config:
    preset: str = ""                  # toy, imagenet or reg; imagenet where there is CUDA and data/imagenet/train
    out: str = "out"                  # images go to OUT/samples
    ckpt: str = ""                    # diffusion model, ours or official; empty: OUT/diffusion.pt
    tokenizer: str = ""               # ours or official; empty: the one that the checkpoint names
    latent_stats: str = ""            # {"mean", "std"} of the latents, for official checkpoints
    num_heads: int = 0                # of an official checkpoint; 0: the published model's
    n: int = 1_000                    # images
    classes: tuple = ()               # class numbers, in turn; empty: all
    seed: int = 0                     # image i's noise is a function of (seed, i)
    batch_size: int = 64              # images to a batch and process
    # solver
    solver: str = "ab2"               # euler, heun, ab2 (Adams-Bashforth), sde (Euler-Maruyama)
    num_steps: int = 20               # times from noise to data: one evaluation less for euler and ab2, twice as many for heun
    cfg_scale: float = 3.0            # guidance: 1 is none
    cfg_interval_start: float = 0.0   # time from which guidance acts (0: noise, 1: data); not for sde
    cfg_channels: int = 0             # latent channels that it acts on, from the first (0: all); not for sde
    timestep_shift: float = 0.0       # s of t -> s t / (1 + (s - 1) t) (0: none); not for sde
    guide: str = ""                   # checkpoint of a weaker model, in place of the unconditional half (autoguidance)
    guidance_low: float = 0.0         # sde: guidance acts between these times, counted from data (0) to noise (1)
    guidance_high: float = 1.0        # the second of the two
    cls_cfg_scale: float = 0.0        # guidance of REG's class token (0: none)
    # machine and output
    compile: bool = torch.cuda.is_available()   # torch.compile the model
    npz: bool = True                  # also write OUT/samples.npz, as ADM's evaluator reads it
    threads: int = 4                  # that write PNGs
    # other jobs
    reconstruct: str = ""             # folder of images: write OUT/reconstructions, and OUT/originals as they were cropped
    sweep: bool = False               # toy: print the table of solvers, numbers of steps and guidance scales, and write OUT/sweep.json
    sweep_steps: tuple = (10, 20, 30, 50, 250)      # numbers of times that it tries


PRESETS = {"toy": {}, "imagenet": dict(n=50_000, batch_size=128, solver="euler", num_steps=250, cfg_scale=6.0, cfg_interval_start=0.125, cfg_channels=3,
                                       timestep_shift=0.3),      # VFM-VAE's and LightningDiT's of 64 epochs; of 560: --cfg_scale=4
           "reg": dict(n=50_000, batch_size=128, solver="sde", num_steps=250, cfg_scale=1.0)}
SOLVERS = "euler", "heun", "ab2"

# -----------------------------------------------------------------------------
# Integrating from noise to data

def guided(model, x, t, y, cls=None, cfg_scale=1.0, cls_cfg_scale=0.0, cfg_channels=None, guide=None):
    """[v] or, given a noised class token `cls`, [v, v_cls] of states at one time t: other + scale (conditional - other) where cfg_scale is
    not 1, the other being the null class, in the same batch, or the `guide`'s velocity. float32 into the model, the state's dtype out."""
    def evaluate(net, y, *state):
        out = net(state[0].float(), torch.full((len(y),), t, device=y.device), y, *(s.float() for s in state[1:]))
        return [v.to(x.dtype) for v in (out[:len(state)] if isinstance(out, tuple) else [out])]

    state = [x] if cls is None else [x, cls]
    if cfg_scale == 1:
        return evaluate(model, y, *state)
    if guide is None:
        both = evaluate(model, torch.cat((y, torch.full_like(y, model.num_classes))), *(torch.cat((s, s)) for s in state))
        conditional, other = zip(*(v.chunk(2) for v in both))
    else:
        conditional, other = evaluate(model, y, *state), evaluate(guide, y, *state)
    k = cfg_channels or x.shape[1]
    v = torch.cat((torch.lerp(other[0][:, :k], conditional[0][:, :k], cfg_scale), conditional[0][:, k:]), 1)
    return [v] + [torch.lerp(b, a, cls_cfg_scale) if cls_cfg_scale else a for a, b in zip(conditional[1:], other[1:])]


def ode(model, noise, y, num_steps=250, cfg_scale=1.0, cfg_interval_start=0.0, timestep_shift=0.0, cfg_channels=None, cls_noise=None, cls_cfg_scale=0.0,
        solver="euler", guide=None):
    """Latents [B, C, S, S] from noise of that shape along dx/dt = v(x, t, y), t from 0 to 1 at linspace(0, 1, num_steps), each time mapped
    t -> s t / (1 + (s - 1) t) if s = timestep_shift > 0. y: classes [B]. Guidance acts where t >= cfg_interval_start, on the first
    `cfg_channels` channels if given; elsewhere its other half is not computed. A class-token model integrates cls_noise [B, D] alongside.
    solver: "euler", "heun" (two evaluations a step), "ab2" (Adams-Bashforth of two steps, for unequal steps; the first is Euler's)."""
    if num_steps < 2 or solver not in SOLVERS:
        raise UserError(f"solver={solver}, num_steps={num_steps}: there are {', '.join(SOLVERS)}, from 2 steps")
    times = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    if timestep_shift > 0:
        times = timestep_shift * times / (1 + (timestep_shift - 1) * times)
    times = times.tolist()

    def velocity(state, t):
        return guided(model, state[0], t, y, *state[1:], cfg_scale=cfg_scale if t >= cfg_interval_start else 1.0, cls_cfg_scale=cls_cfg_scale,
                      cfg_channels=cfg_channels, guide=guide)

    advance = lambda state, v, h: [s + h * d for s, d in zip(state, v)]
    state, before, h_before = [noise] if cls_noise is None else [noise, cls_noise], None, None
    for t, after in zip(times, times[1:]):
        v, h = velocity(state, t), after - t
        move = v
        if solver == "heun":
            move = [(a + b) / 2 for a, b in zip(v, velocity(advance(state, v, h), after))]
        elif solver == "ab2" and before is not None:
            move = [a + (a - b) * (h / h_before / 2) for a, b in zip(v, before)]
        state, before, h_before = advance(state, move, h), v, h
    return state[0]


def score(v, x, t):
    """The score of the linear path x_t = (1 - t) data + t noise from its velocity noise - data (SiT, appendix A; t from data to noise)."""
    return ((t - 1) * v - x) / (t ** 2 - (t - 1) * t)


def sde(model, noise, y, num_steps=250, cfg_scale=1.0, guidance_low=0.0, guidance_high=1.0, cls_noise=None, cls_cfg_scale=0.0, generator=None, guide=None):
    """REG's Euler-Maruyama: latents [B, C, S, S] (and REG's class token, alongside) from noise. Times run from 1 (noise) to 0 (data), linspace(1,
    0.04, num_steps) and then 0: num_steps evaluations, all but the last followed by noise sqrt(2 t |dt|). Guidance where cfg_scale > 1
    and guidance_low <= t <= guidance_high. State in float64. `generator`: a torch.Generator, or a callable that gives noise like its argument."""
    if num_steps < 2:
        raise UserError(f"num_steps={num_steps}: the SDE takes 2 or more")
    draw = generator if callable(generator) else lambda like: torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)
    state = [noise.double()] if cls_noise is None else [noise.double(), cls_noise.double()]
    times = torch.linspace(1, 0.04, num_steps, dtype=torch.float64).tolist() + [0.0]
    for t, after in zip(times, times[1:]):
        scale = cfg_scale if cfg_scale > 1 and guidance_low <= t <= guidance_high else 1.0
        velocities = guided(model, state[0], 1 - t, y, *state[1:], cfg_scale=scale, cls_cfg_scale=cls_cfg_scale, guide=guide)
        # drifts are affine in v, so guiding velocities guides them; in REG's time v changes its sign
        state = [x + (-v - t * score(-v, x, t)) * (after - t) for x, v in zip(state, velocities)]
        if after > 0:
            state = [x + (2 * t * (t - after)) ** 0.5 * draw(x) for x in state]
    return state[0].float()


@torch.no_grad()
def generate(model, tokenizer, mean, std, indices, y, cfg, world, guide=None, rows=16):
    """Images [B, 3, H, W] in [-1, 1] of classes y [B]; image i depends on (cfg.seed, indices[i]) and its class, not on its batch. mean, std [C]:
    the latents'. At least `rows` are computed: BLAS rounds otherwise for a handful of rows than for many, and a compiled model wants one size."""
    device, count = world.device, len(y)
    some = np.arange(max(rows, count)) % count
    noise, y = ImageNoise(cfg.seed, np.asarray(indices)[some]), y[some].to(device)
    draw = lambda *shape: noise(torch.empty(len(some), *shape, device=device))
    x = draw(model.in_channels, model.input_size, model.input_size)
    keywords = dict(num_steps=cfg.num_steps, cfg_scale=cfg.cfg_scale, cls_cfg_scale=cfg.cls_cfg_scale, guide=guide,
                    cls_noise=draw(model.cls_dim) if model.cls_dim else None)
    with world.autocast():
        if cfg.solver == "sde":
            z = sde(model, x, y, guidance_low=cfg.guidance_low, guidance_high=cfg.guidance_high, generator=noise, **keywords)
        else:
            z = ode(model, x, y, cfg_interval_start=cfg.cfg_interval_start, timestep_shift=cfg.timestep_shift, cfg_channels=cfg.cfg_channels or None,
                    solver=cfg.solver, **keywords)
    mean, std = (s.to(device).view(1, -1, 1, 1) for s in (mean, std))
    return tokenizer.decode((z * std + mean)[:max(16, count)]).float()[:count]

# -----------------------------------------------------------------------------
# Files

def write_png(path, pixels):             # whole or not at all: a finished name is a finished image
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(temporary := path.with_suffix(".tmp"), "PNG", compress_level=1)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}")


def pixels_of(images):
    """[B, 3, H, W] in [-1, 1] -> NumPy uint8 [B, H, W, 3]."""
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()


def write_npz(path, paths, pool):
    """ADM's format, arr_0 uint8 [N, H, W, 3], from PNGs; a thousand images in memory at a time."""
    temporary = path.with_suffix(".tmp")
    height, width, _ = np.asarray(Image.open(paths[0])).shape
    with zipfile.ZipFile(temporary, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(len(paths), height, width, 3)))
        for start in range(0, len(paths), 1000):
            for pixels in pool.map(lambda path: np.asarray(Image.open(path)), paths[start:start + 1000]):
                file.write(pixels.tobytes())
    os.replace(temporary, path)


def load(cfg, world):
    """(model, guide or None, tokenizer, mean, std), ready to sample."""
    path = cfg.ckpt or f"{cfg.out}/diffusion.pt"
    if not os.path.exists(path):
        raise UserError(f"no diffusion model at {path}; run diffusion.py first, or name one with --ckpt")
    overrides = dict(num_heads=cfg.num_heads) if cfg.num_heads else {}
    model, guide = load_diffusion(path, **overrides), load_diffusion(cfg.guide) if cfg.guide else None
    statistics = load_weights(cfg.latent_stats) if cfg.latent_stats else dict(mean=model.about.get("latent_mean"), std=model.about.get("latent_std"))
    if not isinstance(statistics, dict) or not all(torch.is_tensor(statistics.get(key)) and statistics[key].numel() == model.in_channels for key in ("mean", "std")):
        where = f"{cfg.latent_stats} lacks" if cfg.latent_stats else f"{path} lacks, and --latent_stats=FILE does not give,"
        raise UserError(f"{where} the mean and std of the {model.in_channels} latent channels: the model lives in normalised latents, and without them the decoder "
                        "would be fed noise; the published latents_stats.pt has them")
    mean, std = statistics["mean"].float().flatten(), statistics["std"].float().flatten()
    if guide is not None and ((guide.in_channels, guide.input_size, guide.num_classes, guide.cls_dim) != (
            model.in_channels, model.input_size, model.num_classes, model.cls_dim) or not torch.equal(guide.about.get("latent_mean", mean), mean)):
        raise UserError(f"--guide={cfg.guide} is a model of other latents or classes than {path}")
    tokenizer = cfg.tokenizer or model.about.get("tokenizer", "")
    if not cfg.tokenizer and not os.path.exists(tokenizer):      # a folder that was moved as a whole
        tokenizer = str(Path(path).parent / Path(tokenizer).name)
    if not os.path.isfile(tokenizer):
        raise UserError(f"{path} does not say which tokenizer decodes its latents, or it is gone ({tokenizer}): --tokenizer=FILE")
    tokenizer = load_tokenizer(tokenizer)
    if tokenizer.z_dim != model.in_channels:
        raise UserError(f"the tokenizer's latents have {tokenizer.z_dim} channels, the model's {model.in_channels}: it was trained on another tokenizer")
    for net in filter(None, (model, guide)):
        net.projectors = torch.nn.ModuleList()                   # REPA's head only trains
    return model.to(world.device), guide and guide.to(world.device), tokenizer.to(world.device), mean, std


def reconstruct(cfg, world):
    """Every image of a folder, cropped to the tokenizer's resolution, in OUT/originals, and decoded again, under the same name, in OUT/reconstructions."""
    path = cfg.tokenizer or f"{cfg.out}/tokenizer.pt"
    if not os.path.exists(path):
        raise UserError(f"no tokenizer at {path}; run tokenizer.py first, or name one with --tokenizer")
    tokenizer, root, out = load_tokenizer(path).to(world.device), Path(cfg.reconstruct), Path(cfg.out)
    names = {file: file.relative_to(root).with_suffix(".png") for file in list_images(root)}
    if len(set(names.values())) < len(names):
        raise UserError(f"{root} has images whose names differ in the suffix alone: the reconstructions could not be told apart")
    if left := {file.relative_to(out / "reconstructions") for file in out.glob("reconstructions/**/*.png")} - set(names.values()):
        raise UserError(f"{out / 'reconstructions'} holds reconstructions of other images ({min(left)}, say): remove it, or give another --out")
    mine = list(names)[world.rank::world.size]
    with torch.inference_mode(), ThreadPoolExecutor(cfg.threads) as pool:
        for start in tqdm(range(0, len(mine), cfg.batch_size), desc="reconstructing", unit="batch", disable=world.rank > 0):
            files = mine[start:start + cfg.batch_size]
            pixels = np.stack(list(pool.map(lambda file: np.asarray(center_crop(load_rgb(file), tokenizer.resolution)), files)))
            images = to_float(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(world.device))
            decoded = pixels_of(tokenizer.decode(tokenizer.encode(images)[0]))
            for kind, arrays in ("originals", pixels), ("reconstructions", decoded):
                list(pool.map(write_png, [out / kind / names[file] for file in files], arrays))
    world.barrier()
    if world.rank == 0:
        print(f"{len(names):,} images in {out / 'reconstructions'}, as cropped in {out / 'originals'}")


def sweep(cfg, world):
    """Frechet distance to held-out images in the toy classifier's features, and the share of images that it takes for their class, by solver and
    number of times at cfg's guidance scale, then by scale at cfg's solver; on one process."""
    import fid                           # here alone: sampling needs no metrics
    if world.rank > 0:
        return
    model, guide, tokenizer, mean, std = load(cfg, world)
    trained = model.about.get("config", {})
    if trained.get("data") != "shapes":
        raise UserError("--sweep judges by the toy's classifier: it takes a model that diffusion.py trained on the shapes")
    extract = fid.load_features("toy", cfg.out, world.device)
    real = Images(trained["data"], "val", model.about["image_size"], trained["data_dir"], cache=cfg.out)

    @fid.full_float32()
    def judged(batch):
        return extract(batch)

    def look(batches):
        features, _, logits = zip(*map(judged, batches))
        features = torch.cat(features).double().cpu().numpy()
        return (features.mean(0), np.cov(features, rowvar=False)), torch.cat(logits).argmax(1).cpu()

    reference, _ = look(torch.stack([real[int(i)][0] for i in part]).to(world.device) for part in torch.arange(min(len(real), 5_000)).split(500))
    y, parts, rows = torch.arange(cfg.n) % model.num_classes, torch.arange(cfg.n).split(cfg.batch_size), []
    cells = [(solver, steps, cfg.cfg_scale) for solver in SOLVERS for steps in cfg.sweep_steps]
    cells += [(cfg.solver, cfg.num_steps, scale) for scale in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
    print("| solver | times | evaluations | guidance | FD | class accuracy |\n|---|---|---|---|---|---|")
    for solver, steps, scale in dict.fromkeys(cells):
        settings = replace(cfg, solver=solver, num_steps=steps, cfg_scale=scale)
        moments, found = look(to_uint8(generate(model, tokenizer, mean, std, part, y[part], settings, world, guide)) for part in parts)
        rows.append(dict(solver=solver, num_steps=steps, evaluations=(steps - 1) * (1 + (solver == "heun")), cfg_scale=scale,
                         fd=fid.frechet_distance(*moments, *reference), accuracy=(found == y).float().mean().item()))
        print("| {solver} | {num_steps} | {evaluations} | {cfg_scale} | {fd:.2f} | {accuracy:.1%} |".format(**rows[-1]), flush=True)
    write_json(f"{cfg.out}/sweep.json", rows)


def write_samples(cfg, world):
    """OUT/samples/000000.png and so on, labels.json (class by file name) and settings.json beside them; OUT/samples.png, the first 64 with their
    classes; OUT/samples.npz. What is there already, of the same settings, stays."""
    if cfg.solver not in (*SOLVERS, "sde"):
        raise UserError(f"--solver={cfg.solver}: there are {', '.join(SOLVERS)}, sde")
    model, guide, tokenizer, mean, std = load(cfg, world)
    classes = cfg.classes or tuple(range(model.num_classes))
    if cfg.n < 1 or not all(0 <= c <= model.num_classes for c in classes):
        raise UserError(f"--n={cfg.n} --classes={','.join(map(str, classes))}: at least one image, and classes 0 to {model.num_classes - 1} "
                        f"({model.num_classes}: none)")
    class_names = [*model.about.get("classes", map(str, range(model.num_classes))), "none"]
    y, out, folder = torch.tensor(classes)[torch.arange(cfg.n) % len(classes)], Path(cfg.out), Path(cfg.out) / "samples"
    paths = [folder / f"{i:06d}.png" for i in range(cfg.n)]
    if world.rank == 0:                  # what was made with other settings goes, the rest stays
        keys = ("seed", "solver", "num_steps", "num_heads", "cfg_scale", "cfg_interval_start", "cfg_channels", "timestep_shift", "guidance_low",
                "guidance_high", "cls_cfg_scale")
        settings = dict({key: getattr(cfg, key) for key in keys}, classes=list(classes), model=fingerprint(model), tokenizer=fingerprint(tokenizer),
                        guide=fingerprint(guide) if guide else "", latents=fingerprint(mean, std))
        there, before = set(folder.glob("*.png")), read_json(folder / "settings.json")
        if there and "solver" not in before:
            raise UserError(f"{folder} holds images that sample.py did not write: give another --out")
        if before and before != settings and there:
            print(f"{folder} holds images of other settings: starting over", flush=True)
        for path in there - set(paths) if before == settings else there:
            path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", settings)
        write_json(folder / "labels.json", {path.name: int(c) for path, c in zip(paths, y)})
    world.barrier()
    todo = [i for i, path in enumerate(paths) if not path.exists()]
    mine = todo[world.rank::world.size]
    world.barrier()                      # everyone has looked before anyone writes
    if cfg.compile:
        for net in filter(None, (model, guide)):
            net.forward = torch.compile(net.forward, fullgraph=True, dynamic=False)
    start, written = time.perf_counter(), []
    with ThreadPoolExecutor(cfg.threads) as pool:
        bar = tqdm(total=len(mine), desc="samples", unit="image", disable=world.rank > 0, dynamic_ncols=True)
        for part in (mine[k:k + cfg.batch_size] for k in range(0, len(mine), cfg.batch_size)):
            images = generate(model, tokenizer, mean, std, part, y[part], cfg, world, guide, cfg.batch_size if cfg.compile else 16)
            written += [pool.submit(write_png, paths[i], pixels) for i, pixels in zip(part, pixels_of(images))]      # while the next batch is made
            bar.update(len(part))
        for job in written:
            job.result()
        bar.close()
        world.barrier()
        if world.rank == 0:
            columns = len(classes) if 4 <= len(classes) <= 16 else 8
            shown = [to_float(torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)) for path in paths[:64]]
            save_grid(torch.stack(shown), out / "samples.png", columns, [class_names[c] for c in y[:64]])
            if cfg.npz:
                write_npz(out / "samples.npz", paths, pool)
            rate = f", {len(todo) / (time.perf_counter() - start):,.1f} images/s" if todo else ""
            print(f"{cfg.n:,} images in {folder} ({len(todo):,} new{rate}); the first {len(shown)}: {out / 'samples.png'}"
                  + (f"; all: {out / 'samples.npz'}" if cfg.npz else ""))


def run():
    cfg = parse_config(Config, PRESETS)
    (reconstruct if cfg.reconstruct else sweep if cfg.sweep else write_samples)(cfg, init_world())


if __name__ == "__main__":
    main(run)
