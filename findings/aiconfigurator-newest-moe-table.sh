#!/usr/bin/env bash
# aiconfigurator-core 0.12.0 ships measured times of experts (moe_perf.parquet) in one folder per version of an engine. One
# expects that the newest version has what older ones have, and takes it. TensorRT-LLM's newest has almost nothing of it:
# on H200, 1.3.0rc23 has 3 shapes of models (hidden, ffn, top-k, experts), 1.3.0rc20 has 24; on B200 2 and 26. Whoever
# reads the newest table alone loses most models: the version must be chosen by shape.
# Seen: "h200_sxm: 1.3.0rc20 24 shapes, 1.3.0rc23 3", "b200_sxm: 1.3.0rc20 26 shapes, 1.3.0rc23 2".
# Exits non-zero if the behaviour changes. The package is read as files, nothing of it is imported.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --quiet --disable-pip-version-check)
"${pip[@]}" install --no-deps --target "$folder/package" aiconfigurator-core==0.12.0
"${pip[@]}" install pandas==3.1.1 pyarrow==26.0.1
cat > "$folder/check.py" <<'PY'
import sys
from pathlib import Path

import pandas as pd

SHAPE = ["hidden_size", "inter_size", "topk", "num_experts"]
data = Path(sys.argv[1]) / "aiconfigurator_core" / "systems" / "data"
seen = []
for gpu in ("h200_sxm", "b200_sxm"):
    older, newest = (
        pd.read_parquet(data / gpu / "moe" / "trtllm" / version / "moe_perf.parquet", columns=SHAPE).drop_duplicates()
        for version in ("1.3.0rc20", "1.3.0rc23")
    )
    print(f"{gpu}: 1.3.0rc20 {len(older)} shapes, 1.3.0rc23 {len(newest)}")
    seen.append((len(older), len(newest)))
raise SystemExit(0 if seen == [(24, 3), (26, 2)] else "changed")
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder/package"
