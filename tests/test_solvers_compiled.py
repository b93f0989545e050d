"""Compiled loops are loaded ahead, all of them, as the searches call them."""

import subprocess
import sys

PROGRAM = """
import sys
from numba.core.dispatcher import Dispatcher
from moeplan.planner.place.fleet import even_fleet
from moeplan.planner.place.request import Request
from moeplan.planner.place.solve import place
from moeplan.solvers import compiled
from moeplan.spec.trace import Trace
from moeplan.tests.routings import random_trace

def signatures():
    modules = [module for name, module in sys.modules.items() if name.startswith("moeplan.solvers")]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Dispatcher)]
    return {loop.py_func.__qualname__: set(loop.signatures) for loop in found}

compiled.load_all()
ready = signatures()
assert sum(map(len, ready.values())) >= 10
trace = random_trace(0, 3, 16, 400, 3)
requests = [(16, {}), (16, {"movement": "ep"}), (16, {"objective": "locality"}), (16, {"groups": 4})]
requests += [(20, {"equal_slots": True}), (20, {"shares": "optimal"}), (20, {"groups": 4})]
requests += [(20, {"objective": "balance"})]
for slots, more in requests:
    fleet = even_fleet(4, 2, slots, more.get("equal_slots", False))
    place(trace, Request(fleet, slots, steps=2000, time_limit=60.0, **more))
counts = Trace.of_counts(trace.expert_counts)
place(counts, Request(even_fleet(4, 2, 20, False), 20, objective="balance", shares="optimal", time_limit=60.0))
later = signatures()
print({name: later[name] - ready[name] for name in ready if later[name] - ready[name]} or "nothing", "more")
"""


def test_no_search_compiles_after_loading():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "nothing more"
