#!/usr/bin/env bash
# aiconfigurator-core 0.12.0 ships measured times of attention in decoding (generation_attention_perf.parquet). One expects
# measured times to be possible. TensorRT-LLM 1.0.0's on A100 SXM are not: keys and values of a decoding step must be read
# once from memory, whose rate is 2.04 TB/s (the package's own a100_sxm.yaml: 2,039,000,000,000 bytes a second), yet of the
# 570 rows that read more than 500 MB, too much for the 40 MB cache, 291 are faster than that, up to 3.5 TB/s. The tables
# of SGLang 0.5.10 and vLLM 0.14.0 for this GPU have no such row (at most 1.3 and 1.7 TB/s).
# Seen: "sglang 0.5.10: 0 of 468 rows over the memory's rate, at most 1.35 TB/s", "trtllm 1.0.0: 291 of 570 ..., 3.45",
# "vllm 0.14.0: 0 of 351 ..., 1.73".
# Exits non-zero if the behaviour changes. The package is read as files, nothing of it is imported.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --quiet --disable-pip-version-check)
"${pip[@]}" install --no-deps --target "$folder/package" aiconfigurator-core==0.12.0
"${pip[@]}" install pandas==3.1.1 pyarrow==26.0.1
cat > "$folder/check.py" <<'PY'
import re
import sys
from pathlib import Path

import pandas as pd

systems = Path(sys.argv[1]) / "aiconfigurator_core" / "systems"
rate = float(re.search(r"mem_bw:\s*([0-9.eE+_]+)", (systems / "a100_sxm.yaml").read_text())[1].replace("_", ""))
print(f"memory's rate: {rate / 1e12:.2f} TB/s")
seen = {}
for path in sorted((systems / "data" / "a100_sxm" / "attention").rglob("generation_attention_perf.parquet")):
    rows = pd.read_parquet(path)
    if "window_size" in rows:
        rows = rows[rows.window_size == 0]
    heads = rows.num_key_value_heads.where(rows.num_key_value_heads > 0, rows.num_heads)
    size = rows.batch_size * 2 * heads * rows.head_dim * (rows.isl + rows.step) * 2  # bfloat16
    rates = (size / (rows.latency * 1e-3))[size > 5e8]
    name = f"{path.parts[-3]} {path.parts[-2]}"
    seen[name] = (int((rates > rate).sum()), len(rates))
    print(f"{name}: {seen[name][0]} of {len(rates)} rows over the memory's rate, at most {rates.max() / 1e12:.2f} TB/s")
expected = {"sglang 0.5.10": (0, 468), "trtllm 1.0.0": (291, 570), "vllm 0.14.0": (0, 351)}
raise SystemExit(0 if seen == expected else "changed")
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder/package"
