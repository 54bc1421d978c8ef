#!/usr/bin/env bash
# Membranes in 3D from numbered neurons (FIB-25): learn planes 0 to 127, hold out the rest:
#     workflows/fib25/run.sh [DATA] [RESULTS]
# Stopped, the same command goes on.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=${1:-$here/../../../shared/data/fib25}
out=${2:-fib25}
bin=${BIN:-$here/../../.venv/bin}
image=$data/volume.tif labels=$data/labels.tif held_out=128:160,:,:
mkdir -p "$out"

resume=(); [ -e "$out/unet.pt.training/state.pt" ] && resume=(--resume)
"$bin/tilepipe" train "$image" "$labels" -o "$out/unet.pt" --config "$here/cpu.toml" \
    --preview "$out/patches.png" "${resume[@]}"
"$bin/tilepipe" segment "$image" --model "$out/unet.pt" -o "$out/segmented.zarr" --overwrite
score=("$out/segmented.zarr" "$labels" --membrane --objects 0 --components volume --region "$held_out")
"$bin/tilepipe" evaluate "${score[@]}"
"$bin/tilepipe" evaluate "${score[@]}" --json > "$out/scores.json"
"$bin/python" "$here/../report.py" "FIB-25: membranes of planes 128 to 159" --image "$image" \
    --labels "$labels" --prediction "$out/segmented.zarr" --scores "$out/scores.json" \
    --model "$out/unet.pt" --region "$held_out" --membrane-of-objects --output "$out"
echo "$out/report.md"
