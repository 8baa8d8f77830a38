"""
Speed on this machine as ratios: the two of a pair take turns in one run; and how cost grows, by the scripts' --bench.

    python assets/ratios.py  # writes assets/ratios.md
    python assets/ratios.py sampling growth  # the named parts alone, nothing written
"""
import copy
import functools
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import MethodType

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import tokenizer
import diffusion
import fid

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

WORLD = tokenizer.init_world()


def pair(what, ours, other, rounds=5):
    """A table's row: medians of both in seconds, their ratio, after a call to warm up."""
    times = [], []
    for turn in range(rounds + 1):
        for function, list_ in zip((ours, other), times):
            start = time.perf_counter()
            function()
            if turn or rounds == 1:
                list_.append(time.perf_counter() - start)
        if rounds == 1:
            break
    a, b = map(statistics.median, times)
    return what, f"{a:.3g}", f"{b:.3g}", f"{a / b:.2g}"


def per_sample(self, x, w):
    """ConvNeXtLayer.forward with the modulated weights of each sample formed, a grouped convolution (StyleGAN2's)."""
    weight = self.pwconv1.weight.flatten(1) * self.style(w)[:, None]  # [B, 4 C, C]
    weight = weight * torch.rsqrt(weight.square().sum(2, keepdim=True) + 1e-8)
    y = self.norm(self.noise(self.dwconv(x))).flatten(0, 1)[None]  # [1, B C, h, w]
    y = F.conv2d(y, weight.flatten(0, 1)[..., None, None], groups=len(x))  # [1, B 4 C, h, w]
    y = F.gelu(y.unflatten(1, (len(x), -1))[0] + self.pwconv1.bias[:, None, None])
    return x + self.gamma * self.pwconv2(y)


def with_per_sample_weights(module):
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, tokenizer.ConvNeXtLayer):
            layer.forward = MethodType(per_sample, layer)
    return module


def forward_backward(module, *inputs):
    module(*inputs).square().mean().backward()


def decoder():
    """Modulation against per-sample weights, in the paper's layers and in its whole decoder (125.7 M)."""
    for batch in 1, 4:
        for dim, side, kernel in (512, 16, 5), (512, 32, 7), (256, 64, 7), (128, 128, 7):
            layer = tokenizer.ConvNeXtLayer(dim, kernel, 512).to(memory_format=WORLD.layout)
            x = torch.randn(batch, dim, side, side).to(memory_format=WORLD.layout).requires_grad_()
            w = torch.randn(batch, 512)
            both = [functools.partial(forward_backward, m, x, w) for m in (layer, with_per_sample_weights(layer))]
            yield pair(f"layer, {dim} channels, {side} px, batch {batch}, forward and backward", *both)
    cfg = tokenizer.Config()
    names = ("post_factor", "widths", "fuse_dims", "attention", "num_res_blocks", "w_dim")
    ours = tokenizer.VFMVAEDecoder(cfg.z_dim, cfg.downsample, **{name: getattr(cfg, name) for name in names})
    ours = ours.to(memory_format=WORLD.layout)
    other = with_per_sample_weights(ours)
    z = torch.randn(1, 32, 16, 16, requires_grad=True)
    with torch.no_grad():
        yield pair("published decoder, one image, forward", lambda: ours(z), lambda: other(z), 3)
        with FlopCounterMode(display=False) as counter:
            ours(z.detach())
        flops = counter.get_total_flops()
        a = torch.randn(2048, 2048)
        products = range(round(flops / (2 * 2048 ** 3)))
        yield pair(f"... or its {flops / 1e9:.0f} GFLOP as products of 2,048 x 2,048", lambda: ours(z),
                   lambda: [a @ a for _ in products], 3)
    both = [functools.partial(forward_backward, m, z) for m in (ours, other)]
    yield pair("published decoder, one image, forward and backward", *both, 2)


def sampling():
    """The toy's DiT: latents cached or encoded on the fly, guidance in an interval or always, fewer evaluations."""
    cfg = diffusion.Config(**diffusion.PRESETS["toy"])
    parts = diffusion.build(cfg, WORLD, diffusion.bench_arch(cfg))
    tok, _ = tokenizer.build_tokenizer(tokenizer.Config(**tokenizer.PRESETS["toy"]), pretrained=False)
    tok.to(memory_format=WORLD.layout)
    images = torch.randn(64, 3, 32, 32)
    batch = dict(latents=torch.randn(64, 32, 4, 4), labels=torch.arange(64) % 10, tokens=torch.zeros(64, 0, 0))

    def train():
        diffusion.train_step(*parts, [batch], cfg, WORLD, 0)

    def encode_and_train():
        with torch.no_grad():
            tok.encode(images)
        train()

    yield pair("toy's training step on cached latents, or encoding its images", train, encode_and_train, 20)
    noise = torch.randn(16, 32, 4, 4)

    def solve(**keywords):
        with torch.no_grad():
            diffusion.ode(parts[2], noise, batch["labels"][:16], cfg_scale=3.0, **keywords)

    yield pair(
        "250 Euler steps, guided from 0.125 on (shift 0.3), or always",
        lambda: solve(num_steps=250, timestep_shift=0.3, cfg_interval=(0.125, 1.0)),
        lambda: solve(num_steps=250, timestep_shift=0.3), 3)
    yield pair(
        "ab2 with 20 times, or Euler with 250 (equal FD: sweep.md)",
        lambda: solve(num_steps=20, solver="ab2"), lambda: solve(num_steps=250), 3)


def metrics():
    rng = np.random.default_rng(0)
    mu = rng.normal(size=(2, 2048))
    sigmas = [np.cov(rng.normal(size=(4096, 2048)), rowvar=False) for _ in range(2)]

    def plain():
        root = scipy.linalg.sqrtm(sigmas[0] @ sigmas[1]).real
        return ((mu[0] - mu[1]) ** 2).sum() + np.trace(sigmas[0] + sigmas[1] - 2 * root)

    yield pair("FID of 2,048 features, or with scipy's sqrtm",
               lambda: fid.frechet_distance(mu[0], sigmas[0], mu[1], sigmas[1]), plain, 1)
    a, b = torch.randn(2, 5000, 2048)

    def full():
        radii = [torch.cdist(x, x).kthvalue(4).values for x in (a, b)]
        distances = torch.cdist(a, b)
        return (distances <= radii[0][:, None]).any(0).float().mean(), (distances <= radii[1]).any(1).float().mean()

    yield pair("precision and recall of 5,000 in blocks (so 50,000 fit in memory), or whole distance matrices",
               lambda: fid.precision_recall(a, b), full, 3)
    cfg = tokenizer.parse_config(tokenizer.Config, tokenizer.PRESETS, ["--preset=toy"])
    tok, _ = tokenizer.build_tokenizer(cfg, pretrained=False)
    trainer = tokenizer.Trainer(cfg, tok.to(memory_format=WORLD.layout), WORLD, pretrained=False)
    trainer.start_stage(tokenizer.stages_of(cfg)[0])
    images = torch.zeros(16, 3, 32, 32, dtype=torch.uint8)
    shapes = tokenizer.Shapes("train", 32, 16)
    yield pair("drawing the toy's 16 images, or a training step on them", lambda: shapes.draw(np.arange(16)),
               lambda: trainer.step([(images, torch.zeros(16))], 0, 0), 10)


def bench(*words):
    output = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, cwd=HERE.parent)
    return json.loads(output.stdout.splitlines()[-1])


def growth():
    """How cost grows."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    train = "tokenizer.py", "--preset=toy", "--bench=10", "--stage=1"
    runs = [((*torchrun, *train), "2 processes of 1 thread"), (train, "1 process of 2 threads")]
    runs += [((*train, f"--batch_size={n}"), f"batches of {n}") for n in (2, 4, 16, 32)]
    runs += [((*train, f"--image_size={n}"), f"{n} px") for n in (64, 128)]
    dit = "diffusion.py", "--preset=imagenet", "--bench=2", "--model=B", "--batch_size=4"
    runs += [((*dit, f"--patch_size={p}"), f"DiT-B, 4 images of {256 // p ** 2} tokens") for p in (4, 2, 1)]
    for words, name in runs:
        found = bench(*words)
        yield name, f"{found['ms']:.4g}", f"{found['images_per_second']:.3g}", f"{found['peak_gib']:.2g}"


def table(header, rows):
    lines = []
    for row in itertools.chain([header, ["---"] * len(header)], rows):
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    asked = sys.argv[1:] or ["growth", "decoder", "sampling", "metrics"]  # growth first: a child's peak starts at ours
    text = []
    for name in asked:
        header = ("the first, or the second", "s", "s", "ratio")
        if name == "growth":
            header = ("toy tokenizer, 8 images of 32 px, but for", "ms a step", "images a second", "peak GiB")
        text += [f"## {name}", table(header, globals()[name]())]
    if not sys.argv[1:]:
        machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}; by `python assets/ratios.py`"
        (HERE / "ratios.md").write_text(machine + "\n\n" + "\n\n".join(text) + "\n")
