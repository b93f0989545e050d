"""Measured tables: what is read from their files, in which unit, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from moeplan.profiler.silicon import files, tables
from moeplan.profiler.silicon.audited import open_tables
from moeplan.profiler.silicon.frames import read_frame
from moeplan.profiler.silicon.layouts import LAYOUTS, NAMES
from moeplan.profiler.silicon.tables import MeasuredTables, version_key
from moeplan.spec.errors import DocumentError, MoeplanError
from moeplan.tests.silicon_cases import gemm_columns, write_example, write_parquet, write_sheet


def comm(dtype: str, size: int) -> dict[str, list[object]]:
    return {
        "kernel_source": ["NCCL"],
        "nccl_dtype": [dtype],
        "num_gpus": [8],
        "message_size": [size],
        "op_name": ["all_gather"],
        "latency": [0.5],
    }


@pytest.mark.parametrize(("dtype", "size", "expected"), [("half", 1024, 2048), ("int8", 1024, 1024)])
def test_messages_are_counted_in_elements(tmp_path: Path, dtype: str, size: int, expected: int) -> None:
    write_sheet(tmp_path, "gpu_a")
    write_parquet(tmp_path, "gpu_a/comm/nccl/2.29.2/nccl", comm(dtype, size))
    frame = MeasuredTables(tmp_path).table("nccl", "gpu_a", "nccl").frame
    assert frame["bytes"].tolist() == [expected]
    assert frame["seconds"].tolist() == pytest.approx([0.5e-3])
    assert frame["collective"].tolist() == ["all_gather"]


def test_deepep_is_in_microseconds_both_ways_and_whole_nodes(tmp_path: Path) -> None:
    write_sheet(tmp_path, "gpu_a")
    columns = {
        "kernel_source": ["deepep"],
        "node_num": [2],
        "hidden_size": [7168],
        "num_token": [128],
        "num_topk": [8],
        "num_experts": [256],
        "dispatch_sms": [20],
        "dispatch_transmit_us": [40.0],
        "dispatch_notify_us": [2.0],
        "combine_sms": [24],
        "combine_transmit_us": [80.0],
        "combine_notify_us": [0.0],
    }
    write_parquet(tmp_path, "gpu_a/comm/sglang/0.5.12/wideep_deepep_normal", columns)
    frame = MeasuredTables(tmp_path).table("moe_alltoall", "gpu_a", "sglang").frame.set_index("phase")
    assert frame["seconds"].to_dict() == pytest.approx({"dispatch": 42e-6, "combine": 80e-6})
    assert frame["sms"].to_dict() == {"dispatch": 20, "combine": 24}
    assert set(frame["ep"]) == {16}


def test_repeats_are_their_median_and_curves_come_whole_from_the_newest(tmp_path: Path) -> None:
    write_sheet(tmp_path, "gpu_a")
    shape = {"kernel_source": "c", "gemm_dtype": "fp8", "n": 64, "k": 64}

    def rows(*measured: tuple[int, int, float]) -> dict[str, list[object]]:
        columns: dict[str, list[object]] = {name: [value] * len(measured) for name, value in shape.items()}
        columns["n"] = [n for n, _, _ in measured]
        return columns | {"m": [m for _, m, _ in measured], "latency": [t for _, _, t in measured]}

    write_parquet(tmp_path, "gpu_a/gemm/vllm/0.9.0/gemm", rows((64, 1, 9.0), (64, 2, 9.0), (128, 1, 9.0)))
    write_parquet(tmp_path, "gpu_a/gemm/vllm/0.10.0/gemm", rows((64, 1, 1.0), (64, 1, 3.0), (64, 1, 1.5)))
    read = MeasuredTables(tmp_path)
    table = read.table("gemm", "gpu_a", "vllm")
    assert table.version == "0.10.0"  # newer than 0.9.0, though not as texts
    found = table.frame.set_index(["n", "m"])["seconds"].to_dict()
    assert found == pytest.approx({(64, 1): 1.5e-3, (128, 1): 9e-3})  # not m = 2 of the older version
    assert len(read.table("gemm", "gpu_a", "vllm", "0.9.0").frame) == 3
    with pytest.raises(MoeplanError, match=r"there are those of 0.10.0, 0.9.0"):
        read.table("gemm", "gpu_a", "vllm", "0.11.0")


def test_versions_are_ordered_as_engines_order_them() -> None:
    texts = ["1.3.0rc20", "1.3.0rc3", "1.3.0", "0.5.6.post2", "0.5.6", "0.1.dev19262"]
    ordered = sorted(texts, key=lambda text: version_key(text, Path("x")))
    assert ordered == ["0.1.dev19262", "0.5.6", "0.5.6.post2", "1.3.0rc3", "1.3.0rc20", "1.3.0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": None}, "no column 'm'"),
        ({"latency": None}, "no column 'latency'"),
        ({"kernel_source": None}, "no column 'kernel_source'"),
        ({"gemm_dtype": None}, "no column 'gemm_dtype'"),
        ({"m": ["a"]}, "column 'm': expected whole numbers"),
        ({"m": [1.5]}, "column 'm': expected whole numbers"),
        ({"m": [-1]}, "column 'm': -1: expected numbers from 0"),
        ({"m": [None]}, "column 'm'"),
        ({"gemm_dtype": [7]}, "column 'gemm_dtype': expected texts"),
        ({"latency": [0.0]}, "1 rows without a time"),
        ({"latency": [float("nan")]}, "1 rows without a time"),
        ({"latency": [float("inf")]}, "1 rows without a time"),
        ({"latency": ["fast"]}, "column 'latency': expected times"),
    ],
)
def test_another_layout_is_one_line_with_file_and_column(
    tmp_path: Path, change: dict[str, list[object] | None], message: str
) -> None:
    columns = {name: [value[0]] for name, value in gemm_columns().items()} | change
    write_sheet(tmp_path, "gpu_a")
    path = write_parquet(
        tmp_path, "gpu_a/gemm/vllm/0.24.0/gemm", {name: value for name, value in columns.items() if value is not None}
    )
    with pytest.raises(DocumentError) as raised:
        MeasuredTables(tmp_path).table("gemm", "gpu_a", "vllm")
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_are_none_or_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sheet(tmp_path, "gpu_a")
    path = write_parquet(tmp_path, "gpu_a/gemm/vllm/0.24.0/gemm", gemm_columns())
    (layout,) = (one for one in LAYOUTS if one.file == "gemm")
    monkeypatch.setattr(files, "MAX_ROWS", 10)
    with pytest.raises(DocumentError, match="too large, refused"):
        read_frame(path, layout)
    monkeypatch.setattr(files, "MAX_BYTES", 100)
    with pytest.raises(DocumentError, match="larger than 100 bytes"):
        read_frame(path, layout)
    monkeypatch.undo()
    path.write_bytes(b"PAR1" + b"\0" * 100)
    with pytest.raises(DocumentError, match="not a Parquet file"):
        read_frame(path, layout)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data_dir: x\n", "gpu: expected the fields"),
        ("data_dir: x\ngpu: {mem_bw: 0}\nnode: {}\n", "mem_capacity: expected a number above 0"),
        ("data_dir: x\ngpu: &a {b: *a}\n", "not YAML|alias"),
    ],
)
def test_data_sheets_are_checked(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "gpu_a.yaml").write_text(text)
    with pytest.raises(DocumentError, match=message):
        MeasuredTables(tmp_path).system("gpu_a")


def test_the_missing_extra_is_named_and_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    with pytest.raises(MoeplanError, match=r"pip install 'moeplan\[silicon\]'"):
        open_tables()


def test_a_folder_is_found_by_any_of_its_parents(tmp_path: Path) -> None:
    root = tmp_path / "aiconfigurator_core" / "systems"
    write_example(root)
    assert files.find_root(tmp_path) == files.find_root(root.parent) == files.find_root(root) == root
    with pytest.raises(DocumentError, match="expected a folder with"):
        files.find_root(root / "data")
    with pytest.raises(DocumentError, match="no such folder"):
        files.find_root(tmp_path / "none")


def test_unknown_names_get_the_nearest(tmp_path: Path) -> None:
    read = MeasuredTables(write_example(tmp_path))
    with pytest.raises(MoeplanError, match=r"nearest: gpu_a, gpu_b|nearest: gpu_b, gpu_a"):
        read.system("gpu")
    with pytest.raises(MoeplanError, match="nearest: gemm"):
        read.table("gem", "gpu_a", "vllm")
    with pytest.raises(MoeplanError, match="sglang and trtllm and vllm have one"):
        read.table("gemm", "gpu_a", "other")
    assert tables.nearest("zzz", ["a", "b"]) == "there are a, b"


def test_layouts_name_every_column_once() -> None:
    for layout in LAYOUTS:
        names = [*layout.columns, *layout.optional, *layout.constant]
        assert len(names) == len(set(names)), layout.file
        assert set(layout.axes) <= set(names), layout.file
        assert not set(layout.own) & set(layout.seconds)
    assert len(set(NAMES.values()) & set(NAMES)) == 0


class TestInstalled:
    """The package of the extra, as it is."""

    def test_every_kind_of_file_is_read(self) -> None:
        """One of each, the smallest; all rows have a time, and no two the same shape and kernel."""
        root = files.find_root()
        names = MeasuredTables(root).systems()
        assert len(names) == 14
        every = [place for name in names for place in files.list_places(root, name)]
        assert len(every) == 736  # none is of an unknown kind
        for layout in LAYOUTS:
            place = min((p for p in every if p.kind == layout.file), key=lambda p: p.path.stat().st_size)
            frame = read_frame(place.path, layout)
            assert np.isfinite(frame["seconds"]).all()
            assert not frame.drop(columns="seconds").duplicated().any()

    def test_bandwidth_of_links_shows_that_sizes_are_bytes(self) -> None:
        """Counted in elements as bytes, half of the link would seem idle: a large all-gather has over half of it."""
        read = MeasuredTables(files.find_root())
        frame = read.table("nccl", "h200_sxm", "nccl").frame
        rows = frame[(frame["gpus"] == 8) & (frame["collective"] == "all_gather")].sort_values("bytes")
        for dtype in ("half", "int8"):
            last = rows[rows["dtype"] == dtype].iloc[-1]
            rate = last["bytes"] * 7 / 8 / last["seconds"]
            assert 0.5 < rate / read.system("h200_sxm").intra_node_bytes_per_second <= 1
