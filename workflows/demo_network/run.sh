#!/usr/bin/env bash
# Train the network that tilepipe ships, on synthetic nuclei; nothing is downloaded:
#     workflows/demo_network/run.sh [RESULTS]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-demo-network}
bin=${BIN:-$here/../../.venv/bin}
mkdir -p "$out"

"$bin/python" - "$out" <<'MAKE'
import pathlib, sys
from tilepipe import write_synthetic
out = pathlib.Path(sys.argv[1])
for name, size, seed in (("learned", 4096, 1_000_000), ("held-out", 1024, 7)):
    if not (out / f"{name}.zarr").exists():
        write_synthetic(out / f"{name}.zarr", (size, size), seed=seed, labels_path=out / f"{name}-labels.zarr")
MAKE
"$bin/tilepipe" train "$out/learned.zarr" "$out/learned-labels.zarr" \
    --validate-on "$out/held-out.zarr" "$out/held-out-labels.zarr" \
    -o "$out/nuclei-2d.pt" --config "$here/recipe.toml" --preview "$out/patches.png" --overwrite
"$bin/tilepipe" segment "$out/held-out.zarr" --model "$out/nuclei-2d.pt" -o "$out/found.zarr" --overwrite
"$bin/tilepipe" evaluate "$out/found.zarr" "$out/held-out-labels.zarr" --kind mask
echo "copy it to tilepipe/networks: $out/nuclei-2d.pt"
