#!/usr/bin/env bash
# Land and ocean in a colour picture of the earth: learn the west, hold out the east of it:
#     workflows/bluemarble/run.sh [DATA] [RESULTS]
# Stopped, the same command goes on.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=${1:-$here/../../../shared/data/bluemarble}
out=${2:-bluemarble}
bin=${BIN:-$here/../../.venv/bin}
image=$data/west.tif labels=$data/west-land.tif held_out=:,2048:2700
mkdir -p "$out"

resume=(); [ -e "$out/unet.pt.training/state.pt" ] && resume=(--resume)
"$bin/tilepipe" train "$image" "$labels" -o "$out/unet.pt" --config "$here/cpu.toml" \
    --preview "$out/patches.png" "${resume[@]}"
"$bin/tilepipe" segment "$image" --model "$out/unet.pt" -o "$out/segmented.zarr" --overwrite
score=("$out/segmented.zarr" "$labels" --kind classes --ignore 2 --region "$held_out")
"$bin/tilepipe" evaluate "${score[@]}"
"$bin/tilepipe" evaluate "${score[@]}" --json > "$out/scores.json"
"$bin/python" "$here/../report.py" "Blue Marble: land and ocean" --image "$image" \
    --labels "$labels" --prediction "$out/segmented.zarr" --scores "$out/scores.json" \
    --model "$out/unet.pt" --region "$held_out" --output "$out"
echo "$out/report.md"
