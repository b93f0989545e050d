"""What ran beside what was predicted, in one file for ui.perfetto.dev, or as a picture."""

import json
from pathlib import Path

import pytest

from moeplan.planner.simulator import Operation, simulate
from moeplan.service.pages.timeline import perfetto
from moeplan.service.pages.timeline_picture import draw_timeline
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


def test_transfers_inside_hosts_have_a_track_of_their_own():
    far = Operation("across hosts", "dispatch", 0, 0, 1.0, transfer=True)
    near = Operation("inside hosts", "dispatch", 0, 0, 0.5, transfer=True, lane=1)
    events = json.loads(perfetto([], simulate([far, near])))["traceEvents"]
    assert {e["name"]: e["tid"] for e in events if e["ph"] == "X"} == {"across hosts": 1, "inside hosts": 2}
    assert [e["args"]["name"] for e in events if e["name"] == "thread_name"] == [
        "compute",
        "transfer",
        "transfer inside hosts",
    ]


@pytest.mark.parametrize("layers", [1, 3])
def test_the_picture_has_a_row_per_device_and_kind_and_a_closer_look_at_many_layers(tmp_path: Path, layers: int):
    laps, calls = [], []
    for layer in range(layers):
        for device in (0, 1):
            laps.append(Lap(device=device, layer=layer, part="expert", begin=layer, end=layer + 0.5))
            calls.append(Operation("experts", "expert", device, layer, 0.5, {"cores": 1.0}))
            calls.append(Operation("all_to_all", "combine", device, layer, 0.25, {"link": 1.0}, transfer=True))
    for predicted, rows in ((simulate(calls), 4), (None, 2)):
        path = tmp_path / f"{rows}.svg"
        draw_timeline("ep", laps, predicted, path)
        text = path.read_text()
        panels = 1 if layers == 1 else 2
        assert text.count("<!-- device 0, ran -->") == text.count("<!-- device 1, ran -->") == panels
        assert text.count("<!-- device 1, predicted -->") == (panels if rows == 4 else 0)
        assert text.count("layers 0 to 1, each row from where they begin -->") == panels - 1
