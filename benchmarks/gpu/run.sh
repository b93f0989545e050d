#!/usr/bin/env bash
# Everything that moeplan does on a GPU, shown in one go: see main.py, which this starts.
#
#     benchmarks/gpu/run.sh [--dry] [--out FOLDER] [--stages NAME ...]
#
# Needs a Python with torch, triton and transformers; other packages that are missing come from build/gpu-wheels, where
# wheels.py put them. Nothing is downloaded or installed for good. With --dry everything runs on the processor.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The repository's root is the package: Python sees it under its real name through a link.
mkdir "$work/site"
ln -s "$root" "$work/site/moeplan"
if compgen -G "$root/build/gpu-wheels/*.whl" > /dev/null && [ "${MOEPLAN_WHEELS:-1}" = 1 ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
        --target "$work/site" "$root"/build/gpu-wheels/*.whl
fi
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TMPDIR="$work"
case " $* " in
    *" --dry "*) export TRITON_INTERPRET=1 ;;
    # Compiled kernels and tuned configurations are of this run alone, so that each run shows the whole way.
    *) export TRITON_CACHE_DIR="$work/triton" XDG_CACHE_HOME="$work/cache" ;;
esac
status=0
"$python" -P -m moeplan.benchmarks.gpu.main "$@" || status=$?
exit "$status"
