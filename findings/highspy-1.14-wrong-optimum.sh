#!/usr/bin/env bash
# highspy 1.14.0: the answer of a mixed program with two variables is called optimal and is not.
#
#     minimise 2 x + 3 z   with   2 x + 2 z >= 8,   0 <= x <= 10 real,   0 <= z <= 10 whole
#
# x costs less per unit of the row than z, so x = 4, z = 0 is the optimum, 8. Presolve of highspy 1.14.0 answers with a
# larger value and status "Optimal"; with presolve off the same version finds 8. 1.13.1 and 1.16.0 find 8 either way.
# Known upstream as ERGO-Code/HiGHS#3043; whoever pins `highspy>=1.10` gets it.
#
# A good engineer would expect a solver's status "Optimal" to be a proof.
#
# Seen:
#   1.13.1 presolve on 8.0 off 8.0 | 1.14.0 presolve on 12.0 off 8.0 | 1.16.0 presolve on 8.0 off 8.0
#
# Exits 1 if the behaviour has changed.
set -euo pipefail
# PYTHON: an interpreter with numpy; packages are installed beside it, not into it.
PYTHON=${PYTHON:-$(dirname "$0")/../.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/seen.py" <<'PYTHON_END'
import sys
import highspy

found = []
for presolve in ("on", "off"):
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("presolve", presolve)
    x = solver.addVariable(lb=0, ub=10)
    z = solver.addIntegral(lb=0, ub=10)
    solver.addConstr(2 * x + 2 * z >= 8)
    solver.minimize(2 * x + 3 * z)
    assert solver.modelStatusToString(solver.getModelStatus()) == "Optimal"
    found.append(round(solver.getObjectiveValue(), 5))
print("presolve on", found[0], "off", found[1])
sys.exit(0 if found == [float(value) for value in sys.argv[1:]] else 1)
PYTHON_END
for want in "1.13.1 8" "1.14.0 12" "1.16.0 8"; do
    set -- $want
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$work/$1" "highspy==$1"
    echo -n "highspy $1: "
    PYTHONPATH="$work/$1" "$PYTHON" "$work/seen.py" "$2" 8
done
