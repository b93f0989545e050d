#!/usr/bin/env bash
# highspy 1.16.0 writes two lines to standard output when a process makes its first solver, before output can be off.
#
# `Highs()` itself prints "Running HiGHS ..." and a line on third parties, through the C library, not through sys.stdout;
# setOptionValue("output_flag", False) and silent() come too late, and contextlib.redirect_stdout does not see it. 1.13.1
# prints nothing where output is off.
#
# A good engineer would expect a library to be silent where its log is turned off: a program that prints JSON no longer
# does.
#
# Seen: 1.13.1: 0 lines, 1.16.0: 2 lines. Exits 1 if the behaviour has changed.
set -euo pipefail
# PYTHON: an interpreter with numpy; packages are installed beside it, not into it.
PYTHON=${PYTHON:-$(dirname "$0")/../.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/seen.py" <<'PYTHON_END'
import contextlib
import io

import highspy

with contextlib.redirect_stdout(io.StringIO()):
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    x = solver.addIntegral(lb=1, ub=10)
    solver.minimize(3 * x)
assert solver.getObjectiveValue() == 3
PYTHON_END
for want in "1.13.1 0" "1.16.0 2"; do
    set -- $want
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$work/$1" "highspy==$1"
    lines=$(PYTHONPATH="$work/$1" "$PYTHON" "$work/seen.py" | wc -l)
    echo "highspy $1: $lines lines"
    [ "$lines" = "$2" ] || exit 1
done
