"""What benchmarks of engines write, as they write it, and what is none of it."""

import json
from pathlib import Path

import pytest

from moeplan.profiler.serving_results import read_served
from moeplan.spec.errors import DocumentError

ENGINE = {
    "date": "20261201-120000",
    "backend": "vllm",
    "model_id": "m",
    "num_prompts": 100,
    "request_rate": "inf",
    "burstiness": 1.0,
    "max_concurrency": 32,
    "duration": 10.0,
    "completed": 100,
    "total_input_tokens": 102_400,
    "total_output_tokens": 12_800,
    "request_throughput": 10.0,
    "mean_ttft_ms": 80.5,
    "median_ttft_ms": 70.0,
    "mean_tpot_ms": 12.25,
    "mean_itl_ms": 12.0,
    "ttfts": [0.1, 0.2],
}
GENAI = """Metric,avg,min,max,p99,p95,p90,p75,p50,p25
Time To First Token (ms),"1,146.31",249.48,"3,485.23","3,457.97","3,349.56","3,215.06","1,330.93",640.07,286.52
Time To Second Token (ms),26.05,0.00,133.51,96.12,36.56,34.88,34.35,33.55,1.78
Request Latency (ms),"6,400.00","5,371.47","9,608.72","9,436.13","9,046.58","9,028.16","6,549.60","5,690.23","5,493.63"
Inter Token Latency (ms),30.35,27.59,35.60,35.23,33.88,32.53,31.05,30.13,29.04
Output Sequence Length (tokens),174.45,164.00,187.00,186.22,183.10,180.10,177.00,174.00,171.75
Input Sequence Length (tokens),"3,000.05","2,999.00","3,001.00","3,001.00","3,001.00","3,000.00","3,000.00","3,000.00"

Metric,Value
Output Token Throughput (per sec),261.25
Request Throughput (per sec),2.50
Request Count (count),15.00
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "bench.file"
    path.write_text(text)
    return path


def test_vllm_writes_one_object(tmp_path):
    (found,) = read_served(written(tmp_path, json.dumps(ENGINE)))
    assert found.model_dump() == {"isl": 1024, "osl": 128, "concurrency": 32, "ttft_ms": 80.5, "tpot_ms": 12.25}


def test_sglang_writes_an_object_a_line(tmp_path):
    lines = [ENGINE | {"max_concurrency": n, "concurrency": n - 0.4} for n in (8, 16)]
    found = read_served(written(tmp_path, "\n".join(map(json.dumps, lines)) + "\n"))
    assert [times.concurrency for times in found] == [8, 16]
    open_loop = {**ENGINE, "max_concurrency": None, "concurrency": 19.6}  # measured, where none was asked for
    assert read_served(written(tmp_path, json.dumps(open_loop)))[0].concurrency == 20


def test_requests_in_flight_follow_from_rate_and_latency(tmp_path):
    body = {**ENGINE, "max_concurrency": None, "mean_e2el_ms": 1600.0}
    assert read_served(written(tmp_path, json.dumps(body)))[0].concurrency == 16
    del body["mean_e2el_ms"]
    path = written(tmp_path, json.dumps(body))
    assert read_served(path, concurrency=24)[0].concurrency == 24
    with pytest.raises(DocumentError, match=r"max_concurrency is not told: run with --max-concurrency, or pass --conc"):
        read_served(path)


def test_genai_perf_writes_a_table(tmp_path):
    (found,) = read_served(written(tmp_path, GENAI))
    assert found.model_dump() == {"isl": 3000, "osl": 174, "concurrency": 16, "ttft_ms": 1146.31, "tpot_ms": 30.35}
    assert read_served(written(tmp_path, GENAI), concurrency=4)[0].concurrency == 4
    bare = GENAI.split("\n\n")[0]
    with pytest.raises(DocumentError, match="in flight is not told: pass --concurrency"):
        read_served(written(tmp_path, bare))


def test_plain_columns_in_any_order_with_others(tmp_path):
    text = "note, TPOT_ms ,isl,osl,concurrency\nx,10.5,128,64,4\ny,11,256,64,4\n"
    found = read_served(written(tmp_path, text))
    assert [(t.isl, t.tpot_ms, t.ttft_ms) for t in found] == [(128, 10.5, None), (256, 11, None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"columns isl, osl, concurrency and one or both of ttft_ms, tpot_ms are wanted, got 'a, b'"),
        ("isl,osl,concurrency\n1,2,3\n", "one or both of ttft_ms, tpot_ms"),
        ("isl,osl,concurrency,tpot_ms\n1,2,3,x\n", "line 2: tpot_ms: expected a number from 0, got 'x'"),
        ("isl,osl,concurrency,tpot_ms\n1,2,3,-1\n", "line 2: tpot_ms: expected a number from 0"),
        ("isl,osl,concurrency,tpot_ms\n1,2,3,nan\n", "line 2: tpot_ms: expected a number from 0"),
        ("isl,osl,concurrency,tpot_ms\n1,2,3,1,9\n", "line 2: more cells than columns"),
        ("isl,osl,concurrency,tpot_ms\n1,,3,1\n", "line 2: osl: Field required"),
        ("isl,osl,concurrency,tpot_ms\n1,2,3,\n", "line 2: document: neither ttft_ms nor tpot_ms is given"),
        ("isl,osl,concurrency,tpot_ms\n", "holds no measurement"),
        ("", "are wanted"),
        ("{}", "completed, total_input_tokens, total_output_tokens missing"),
        ("[1]", "expected the object that an engine's benchmark writes, got 1"),
        ("{", "not JSON"),
        (json.dumps(ENGINE) + "\n{broken\n", "line 2: not JSON"),
        (json.dumps(ENGINE | {"completed": 0}), "no request was completed"),
        (json.dumps(ENGINE | {"mean_tpot_ms": "fast"}), "mean_tpot_ms: expected a number from 0, got 'fast'"),
        (json.dumps(ENGINE | {"total_input_tokens": True}), "total_input_tokens: expected a number"),
        (json.dumps({k: v for k, v in ENGINE.items() if "ms" not in k}), "neither ttft_ms nor tpot_ms"),
        ("Metric,avg\nRequest Latency (ms),5\n", "rows missing: Input Sequence Length"),
    ],
)
def test_what_is_none_of_these_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(DocumentError, match=message) as caught:
        read_served(written(tmp_path, text))
    assert str(caught.value).isprintable()
