"""2,000 hostile inputs through the commands: exit code 2 and one line (0 where they are still valid), in bounds.

The cases and what is done to them: ``hostile_seeds``, ``hostile_mutations``; how they run: ``hostile_runner``.
"""

import json
import os
import subprocess
import sys

import pytest

CASES, WORKERS = 2000, 2


@pytest.mark.timeout(1800)
def test_hostile_inputs_end_in_one_line() -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "moeplan.tests.hostile_runner", str(first), str(CASES), str(WORKERS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"COLUMNS": "200"},
        )
        for first in range(WORKERS)
    ]
    ended = [worker.communicate() for worker in workers]
    lines = []
    for worker, (out, err) in zip(workers, ended, strict=True):
        assert worker.returncode == 0, err[-3000:]
        lines += [json.loads(line) for line in out.splitlines()]
    totals = [line for line in lines if "codes" in line]
    faults = [line for line in lines if "codes" not in line]
    assert not faults, "\n".join(f"{f['problem']}: {f['case']}: {f['argv']}: {f['err'][-500:]}" for f in faults[:20])
    refused = sum(total["codes"].get("2", 0) for total in totals)
    done = sum(total["codes"].get("0", 0) for total in totals)
    assert refused + done == CASES
    # The inputs are hostile, but not so much that nothing behind the readers is ever reached.
    assert refused > CASES / 2
    assert done > CASES / 50
    assert sum(total["reached"] for total in totals) > CASES / 100
