#!/usr/bin/env bash
# What this project does on one CUDA machine, in about ten minutes -> assets/gpu.md: that every script and method runs,
# compiled and in bf16, then the papers' sizes on random data. SMALL=1: the same commands in miniature, on any machine.
#   bash assets/gpu.sh
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
report=assets/gpu.md
small=(--preset=imagenet)
steps=20
if [ -n "${SMALL:-}" ]; then
    report=$out/gpu.md
    small=(--preset=toy)
    steps=2
fi

run() {  # a row that says whether the command worked
    local log=$out/log start=$SECONDS
    if timeout 300 $python "$@" >"$log" 2>&1; then
        echo "| \`$*\` | $((SECONDS - start)) s |" >>"$report"
    else
        echo "| \`$*\` | FAILED: $(tail -n 1 "$log" | tail -c 200) |" >>"$report"
    fi
}

bench() {  # JSON as a row
    timeout 300 $python "$@" --bench=$steps "${small[@]}" >"$out/log" 2>&1
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
for method in vfmvae aligntok vavae vae; do
    run tokenizer.py --preset=toy --method=$method --kimg=0.5 --out="$out/$method" --cache="$out"
done
for flags in "" "--align=reg --arch=sit" "--text=toy" "--fsdp=1 --checkpointing=1 --resume=0"; do
    run diffusion.py --preset=toy --out="$out/vfmvae" --cache="$out" --steps=20 $flags
done
run sample.py --preset=toy --out="$out/vfmvae" --n=64
run fid.py --preset=toy --out="$out/vfmvae" --cache="$out"
run align.py --preset=toy --out="$out/vfmvae" --cache="$out" --steps=5

printf '\n| command: what | ms | least | most | images/s | TFLOP/s | MFU | GiB | GPU waits |\n' >>"$report"
echo '|---|---|---|---|---|---|---|---|---|' >>"$report"
bench diffusion.py --batch_size=256
bench sample.py --batch_size=128
bench tokenizer.py --stage=1 --batch_size=64
bench tokenizer.py --stage=3 --batch_size=64
bench tokenizer.py --method=aligntok --stage=2 --batch_size=32
bench diffusion.py --batch_size=256 --align=repa
cat "$report"
