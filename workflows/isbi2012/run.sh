#!/usr/bin/env bash
# Train on slices 0 to 19 of the ISBI 2012 challenge, hold out 20 to 23, segment, score, report:
#     workflows/isbi2012/run.sh [cpu|gpu] [DATA] [RESULTS]
# Stopped, the same command goes on.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
budget=${1:-cpu}
data=${2:-$here/../../../shared/data/isbi2012}
out=${3:-isbi2012-$budget}
bin=${BIN:-$here/../../.venv/bin}
image=$data/train-volume.tif labels=$data/train-labels.tif held_out=20:24,:,:
mkdir -p "$out"

resume=(); [ -e "$out/unet.pt.training/state.pt" ] && resume=(--resume)
"$bin/tilepipe" train "$image" "$labels" -o "$out/unet.pt" --config "$here/$budget.toml" \
    --preview "$out/patches.png" "${resume[@]}"
"$bin/tilepipe" segment "$image" --model "$out/unet.pt" -o "$out/segmented.zarr" --overwrite
"$bin/tilepipe" segment "$image" --model "$out/unet.pt" -o "$out/probabilities.zarr" --overwrite \
    --write probabilities
for threshold in 0.5 0.6 0.7 0.75 0.8 0.85 0.9 0.95; do  # the challenge takes the best of each score
    "$bin/tilepipe" evaluate "$out/probabilities.zarr" "$labels" --membrane --region "$held_out" \
        --channel 1 --threshold $threshold --json > "$out/scores-$threshold.json"
done
"$bin/python" "$here/../report.py" "ISBI 2012: membranes of slices 20 to 23" --image "$image" \
    --labels "$labels" --prediction "$out/segmented.zarr" --scores "$out"/scores-*.json \
    --model "$out/unet.pt" --region "$held_out" --show 0 --truth 0 --output "$out"
grep -A 12 "^| threshold" "$out/report.md"
echo "$out/report.md"
