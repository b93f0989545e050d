#!/usr/bin/env bash
# highspy 1.15.1 and OR-Tools 9.15.6755 cannot be imported by one process, in whichever order.
#
# Both wheels bring a shared library of HiGHS, and the loader binds the second one's symbols to the first one's library.
# With highspy 1.13.1 and 1.16.0 both load. The two wheels' requirements do not contradict each other, so that pip
# installs them together and says nothing. Known upstream as google/or-tools#5246.
#
# A good engineer would expect the import of the second package to work, as it does in the versions before and after.
#
# Seen:
#   highspy 1.13.1: both, both | 1.15.1: ImportError (undefined symbol), ImportError (undefined symbol) | 1.16.0: both, both
#
# Exits 1 if the behaviour has changed.
set -euo pipefail
# PYTHON: an interpreter with what both depend on; packages are installed beside it, not into it.
PYTHON=${PYTHON:-$(dirname "$0")/../.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
install() { "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$@" 2> >(grep -v WARNING >&2); }
install "$work/ortools" ortools==9.15.6755
cat > "$work/seen.py" <<'PYTHON_END'
import importlib
import sys

first, second = sys.argv[1:]
importlib.import_module(first)
try:
    importlib.import_module(second)
    print("both")
except ImportError as error:
    print("undefined symbol" if "undefined symbol" in str(error) else error)
PYTHON_END
code=0
for want in "1.13.1 both" "1.15.1 undefined symbol" "1.16.0 both"; do
    version=${want%% *}
    install "$work/$version" "highspy==$version"
    for order in "highspy ortools.sat.python.cp_model" "ortools.sat.python.cp_model highspy"; do
        got=$(PYTHONPATH="$work/$version:$work/ortools" "$PYTHON" "$work/seen.py" $order)
        echo "highspy $version, ${order%% *} first: $got"
        [ "$got" = "${want#* }" ] || code=1
    done
done
exit $code
