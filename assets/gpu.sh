#!/usr/bin/env bash
# What this project does on one CUDA machine, in about ten minutes -> assets/gpu.md: that every script and method runs,
# compiled and in bf16, then the papers' sizes on random data.
#   bash assets/gpu.sh
#   SMALL=1 bash assets/gpu.sh  # in miniature, on the CPU: bf16 and traced as on a GPU, for errors of dtype and graph
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
script=$python
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export RANK=0 WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=29531  # of --fsdp in one process, as torchrun sets them
report=assets/gpu.md
small=(--preset=imagenet)
kimg=0.5
steps=20
if [ -n "${SMALL:-}" ]; then
    report=$out/gpu.md
    small=(--preset=toy --batch_size=4)
    kimg="0.04 --batch_size=2"
    steps=2
    cat >"$out/small.py" <<'PYTHON'
import functools
import importlib
import sys
import tokenizer
import torch
torch.compile = functools.partial(torch.compile, backend=sys.argv.pop(1))
tokenizer.Shapes.lengths = dict(train=320, val=200)
tokenizer.train_on_shapes = lambda *arguments, **keywords: None  # the toy's VFM and classifier stay random
tokenizer.World.autocast = lambda self: torch.autocast("cpu", torch.bfloat16)
tokenizer.main(importlib.import_module(sys.argv.pop(1).removesuffix(".py")).run)
PYTHON
    # BACKEND=aot_eager traces backward passes, too, and inductor compiles: minutes a network
    script="env PYTHONPATH=. $python $out/small.py ${BACKEND:-eager}"
fi

run() {  # a row that says whether the command worked
    local log=$out/log start=$SECONDS
    if timeout 300 $script "$@" >"$log" 2>&1; then
        echo "| \`$*\` | $((SECONDS - start)) s |" >>"$report"
    else
        echo "| \`$*\` | FAILED: $(tail -n 1 "$log" | tail -c 200) |" >>"$report"
    fi
}

bench() {  # JSON as a row
    timeout 300 $script "$@" --bench=$steps "${small[@]}" >"$out/log" 2>&1
    $python - "$*" "$out/log" >>"$report" <<'PYTHON'
import json, sys
words, log = sys.argv[1:]
lines = open(log).read().splitlines()
found = [json.loads(line) for line in lines if line.startswith("{")]
for row in found:
    keys = "ms", "ms_min", "ms_max", "images_per_second", "tflops", "mfu", "peak_gib", "gpu_waits"
    print(f"| `{words}`: {row['title']} | " + " | ".join(str(row[key]) for key in keys) + " |")
if not found:
    print(f"| `{words}` | FAILED: {lines[-1][-200:] if lines else ''} |")
PYTHON
}

$python -c 'import torch; c = torch.cuda; print(c.get_device_name() if c.is_available() else "CPU", torch.__version__)' >"$report"
printf '\n| command | runs in |\n|---|---|\n' >>"$report"
for method in vfmvae aligntok vavae vae rae psvae; do
    run tokenizer.py --preset=toy --method=$method --kimg=$kimg --compile=1 --out="$out/$method" --cache="$out"
done
for flags in "" "--align=reg --arch=sit --resume=0" "--text=toy" "--fsdp=1 --checkpointing=1 --resume=0"; do
    run diffusion.py --preset=toy --out="$out/vfmvae" --cache="$out" --steps=$steps --compile=1 $flags
done
run sample.py --preset=toy --out="$out/vfmvae" --n=64 --compile=1
run fid.py --preset=toy --out="$out/vfmvae" --cache="$out"
run align.py --preset=toy --out="$out/vfmvae" --cache="$out" --steps=$steps --images=100 --compile=1

printf '\n| command: what | ms | least | most | images/s | TFLOP/s | MFU | GiB | GPU waits |\n' >>"$report"
echo '|---|---|---|---|---|---|---|---|---|' >>"$report"
bench diffusion.py --batch_size=256
bench sample.py --batch_size=128
bench tokenizer.py --stage=1 --batch_size=64
bench tokenizer.py --stage=3 --batch_size=64
bench tokenizer.py --method=aligntok --stage=2 --batch_size=32
bench diffusion.py --batch_size=256 --align=repa
cat "$report"
