"""What ran beside what was predicted, in one file for ui.perfetto.dev."""

import json

from moeplan.planner.simulator import Operation, simulate
from moeplan.service.pages.timeline import perfetto
from moeplan.spec.report import Lap


def test_every_lap_and_every_operation_that_takes_time_is_there():
    laps = [
        Lap(device=0, layer=-1, part="embed", begin=0.0, end=0.25),
        Lap(device=0, layer=0, part="attention", begin=0.25, end=0.25),
        Lap(device=1, layer=0, part="dispatch", begin=0.5, end=1.5),
    ]
    call = Operation("attention_prefill", "attention", 0, 0, 0.5)
    transfer = Operation("all_gather", "gather", 1, 3, 0.25, {"link": 1.0}, transfer=True)
    nothing = Operation("wait", "gather", 1, 3, 0.0)
    trace = json.loads(perfetto(laps, simulate([call, transfer, nothing])))
    slices = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert [(e["name"], e["pid"], e["tid"], e["ts"], e["dur"]) for e in slices] == [
        ("embed", 0, 0, 0.0, 2.5e5),
        ("dispatch", 2, 0, 5e5, 1e6),
        ("attention_prefill", 1, 0, 0.0, 5e5),
        ("all_gather", 3, 1, 0.0, 2.5e5),
    ]
    assert slices[3]["args"] == {"layer": 3, "seconds alone": 0.25}
    names = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert (names[2], names[3]) == ("device 1, measured", "device 1, predicted")
    assert all("predicted" not in json.dumps(e) for e in json.loads(perfetto(laps))["traceEvents"])
