"""Every method of ``benchmarks/layers.py`` that is installed computes the same layer, on two ranks."""

from dataclasses import asdict

from moeplan.benchmarks.layers import Case, page
from moeplan.benchmarks.layers_methods import METHODS, ROUTINGS, Shape
from moeplan.runtime.launch import LocalLauncher

ENTRY = "moeplan.benchmarks.layers_measure:measure"
SHAPES = {"gated": Shape(8, 2, 32, 16), "plain": Shape(8, 1, 32, 16, matrices=1)}


def test_outputs_are_equal_and_tabled():
    job = {"shapes": {name: asdict(shape) for name, shape in SHAPES.items()}, "dtypes": ["f32", "bf16"]}
    job |= {"tokens": [2, 30], "routings": ROUTINGS, "methods": list(METHODS), "seconds": 0.01}
    results = LocalLauncher(2, threads=1).run(ENTRY, job, timeout=60)  # raises where an output is wrong
    assert {"ep", "sharded", "gathered"} <= set(results[0]["errors"])
    assert len(results[0]["rows"]) == 2 * 2 * 2 * 2
    gated = [result | {"rows": [row for row in result["rows"] if row["shape"] == "gated"]} for result in results]
    found = [name for name in METHODS if name in gated[0]["rows"][0]["seconds"]]
    assert {"Transformers all_to_all", "Transformers all_reduce"} <= set(found)
    for result in gated:
        result["missing"] = {name: why for name, why in result["missing"].items() if name not in found}
    text = page("test", Case({"gated": SHAPES["gated"]}, (2, 30)), gated, "command")
    assert text.count("| gated | ") == 2 * 2 * 2
