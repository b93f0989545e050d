"""Hostile forms of a valid file, drawn from a seed: what a broken disk, a careless script or an attacker would hand in.

Everything is harmless to the machine: files in a temporary folder, devices that are only read.
"""

import io
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DEEP, LARGE = "[" * 60, 2**22
NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**18, 10**400, 0.5, -0.0, 1e-320, 1e300, 1e308, -1e308)
VALUES: tuple[Any, ...] = (
    *NUMBERS, float("nan"), float("inf"), True, False, None, "", "x", "\x00", "a\nb\x1b[31m", "\u202e\ufffe", "é" * 300,
    "1", "2026-01-01", "../../etc/passwd", "/dev/zero", [], {}, [[]], [None], {"a": 1}, "9" * 5000,
)  # fmt: skip
TEXTS = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 3000, "{}", '"\\ud800"', "\x00", "\ufeff", "'",
         "*a", "&a [*a]", "!!python/object:os.x {}", "2026-99-99", "!!int ''", "<<: {}", "---", "\t", "1:1:1", "0x",
         "1_0", "\u2028", "// c", ",", "]")  # fmt: skip


def paths(value: Any, found: list[tuple[Any, ...]] | None = None, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values, a list's first and last items only."""
    found = [] if found is None else found
    found.append(at)
    items = value.items() if isinstance(value, dict) else []
    if isinstance(value, list) and value:
        items = [(i, value[i]) for i in {0, len(value) - 1}]
    for name, item in items:
        paths(item, found, (*at, name))
    return found


def get(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def put(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of ``body`` with another value at a path."""
    if not path:
        return value
    body = json.loads(json.dumps(body))
    get(body, path[:-1])[path[-1]] = value
    return body


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def mutate_tree(rng: random.Random, body: Any) -> Any:
    """Another value, a longer list, a missing or an unknown field somewhere."""
    path = rng.choice(paths(body))
    here = get(body, path)
    match rng.randrange(8):
        case 0 if isinstance(here, dict) and here:
            copy = json.loads(json.dumps(body))
            del get(copy, path)[rng.choice(list(here))]
            return copy
        case 1 if isinstance(here, dict):
            return put(body, path, here | {rng.choice(["surprise", "", "\x00", "kind", "x" * 1000]): 1})
        case 2 if isinstance(here, list) and here:
            return put(body, path, here * rng.choice([2, 50, 5000]))
        case 3 if isinstance(here, list):
            return put(body, path, here[: len(here) // 2])
        case 4 if isinstance(here, int | float) and not isinstance(here, bool):
            return put(body, path, here * rng.choice([-1, 2, 1000, 10**9]))
        case 5:
            return put(body, path, deep(rng.choice([3, 90, 600])))
        case 6 if isinstance(here, int | float) and not isinstance(here, bool):
            return put(body, path, rng.choice(NUMBERS))
    return put(body, path, rng.choice(VALUES))


def mutate_text(rng: random.Random, text: str) -> str:
    """Something hostile in the place of a piece of the text, a field twice, or the text cut."""
    at = rng.randrange(len(text) + 1)
    match rng.randrange(4):
        case 0:
            return text[:at]
        case 1 if ":" in text[at:]:
            colon = text.index(":", at)
            return text[: colon + 1] + " " + rng.choice(TEXTS) + text[colon + rng.randrange(1, 6) :]
        case 2 if ":" in text:
            lines = text.splitlines(keepends=True)
            line = rng.choice(lines)
            return text.replace(line, line + line.replace("1", "2"), 1)
    return text[:at] + rng.choice(TEXTS) + text[at + rng.randrange(4) :]


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bits flipped, bytes cut out or repeated, the beginning gone, another size in the first eight bytes."""
    at = rng.randrange(len(data) or 1)
    match rng.randrange(6):
        case 0:
            return data[:at]
        case 1:
            return data[at:]
        case 2:
            return data[:at] + data[at + rng.randrange(1, 64) :]
        case 3:
            return struct.pack("<Q", rng.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1])) + data[8:]
        case 4:
            return data[:at] + bytes(rng.randrange(256) for _ in range(8)) + data[at + 8 :]
    flipped = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def mutate_file(rng: random.Random, path: Path) -> None:
    """No file any more, or one that never ends."""
    path.unlink()
    match rng.randrange(9):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.touch()
        case 3:
            with open(path, "wb") as file:
                file.truncate(2**40)
        case 4:
            path.symlink_to(path.name)
        case 5:
            pass
        case _:
            path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/proc/self/mem", "/proc/kmsg", "/dev/random"]))


def mutate_array(rng: random.Random, array: np.ndarray) -> np.ndarray:
    """Other numbers, another type, another shape."""
    kinds: list[Any] = [
        np.uint8,
        np.int64,
        np.uint64,
        np.float16,
        np.float64,
        np.complex64,
        bool,
        "U3",
        "S3",
        "M8[s]",
        ">i8",
    ]
    match rng.randrange(6):
        case 0:
            with np.errstate(all="ignore"):
                return np.resize(np.array(rng.choice([0, 1, 255, 3.5])), array.shape).astype(rng.choice(kinds))
        case 1:
            shapes = [(), (0,), (1,), (1, 1, 1, 1), array.shape[::-1], (*array.shape, 1), (70_000, 1, 1), (1, 5000, 2)]
            return np.resize(array, rng.choice(shapes))
        case 2 if array.dtype.kind == "f":
            extreme = array.astype(np.float64)
            extreme[(0,) * extreme.ndim] = rng.choice([np.nan, np.inf, -1.0, 1e308, 1e-308, 65504.0])
            return extreme
        case 3 if array.dtype.kind in "iu":
            extreme = array.astype(np.int64)
            extreme[(0,) * extreme.ndim] = rng.choice([-1, -(2**63), 2**62, 65535, 65536, 255])
            return extreme
        case 4:
            return np.zeros_like(array)
        case 5:
            return np.full(array.shape, rng.choice([1e308, 1e-308, 2.0**60]))
    return np.concatenate([array] * 3) if array.ndim else array


def header(descr: Any, shape: tuple[int, ...]) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": descr, "fortran_order": False, "shape": shape})
    return content.getvalue()


def mutate_npz(rng: random.Random, path: Path) -> None:
    """An array of an npz in another form, or its member without a name, a header or an end."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    name = rng.choice(list(arrays))
    choice = rng.randrange(10)
    if choice < 5:
        arrays[name] = mutate_array(rng, arrays[name])
        with open(path, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        return
    if choice == 5:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        return
    if choice == 9 and rng.random() < 0.8:  # it takes a while to make
        choice = 7
    huge = rng.choice([(2**40, 1, 1), (2**62, 4), (2**31, 2**31, 2**31), (-1, 3), (0, 2**62, 2), ()])
    hostile = {
        6: {f"{name}.npy": header("<i8", huge) + bytes(64)},
        7: {name: b"not an array"},
        8: {f"{name}.npy": rng.choice([b"", b"\x93NUMPY", b"text", header("|O", ()) + b"cos\nmkdir\n(Vx\ntR."])},
        9: {f"{name}.npy": header("|u1", (2**28, 1, 1)) + bytes(2**28)},
    }[choice]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
        for other, array in arrays.items():
            if other != name:
                content = io.BytesIO()
                np.save(content, array, allow_pickle=False)
                out.writestr(f"{other}.npy", content.getvalue())
        for member, data in hostile.items():
            out.writestr(member, data)


def mutate_json(rng: random.Random, path: Path) -> None:
    text = path.read_text()
    if rng.random() < 0.7:
        tree = mutate_tree(rng, json.loads(text))
        flat = json.dumps(tree)  # a list of deep ones would be gigabytes of indentation
        path.write_text(flat if DEEP in flat or len(flat) > LARGE else json.dumps(tree, indent=1))
    else:
        path.write_bytes(mutate_text(rng, text).encode("utf-8", "surrogatepass"))


def mutate_yaml(rng: random.Random, path: Path) -> None:
    """JSON is YAML too: half of the time the tree is changed, else the text."""
    import yaml

    text = path.read_text()
    if rng.random() < 0.5:
        path.write_text(json.dumps(mutate_tree(rng, json.loads(json.dumps(yaml.safe_load(text))))))
    else:
        path.write_bytes(mutate_text(rng, text).encode("utf-8", "surrogatepass"))


def mutate_words(rng: random.Random, path: Path) -> None:
    path.write_bytes(mutate_text(rng, path.read_text()).encode("utf-8", "surrogatepass"))


def mutate_binary(rng: random.Random, path: Path) -> None:
    path.write_bytes(mutate_bytes(rng, path.read_bytes()))


def mutate_safetensors(rng: random.Random, path: Path) -> None:
    """The JSON header of a safetensors file changed, its length kept right; or any byte."""
    data = path.read_bytes()
    if rng.random() < 0.3:
        return mutate_binary(rng, path)
    (length,) = struct.unpack("<Q", data[:8])
    changed = json.dumps(mutate_tree(rng, json.loads(data[8 : 8 + length]))).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + length :])
    return None


MUTATIONS: dict[str, Callable[[random.Random, Path], None]] = {
    ".json": mutate_json,
    ".jsonl": mutate_json,
    ".yaml": mutate_yaml,
    ".txt": mutate_words,
    ".npz": mutate_npz,
    ".npy": mutate_binary,
    ".pt": mutate_binary,
    ".safetensors": mutate_safetensors,
}


def mutate(rng: random.Random, path: Path) -> None:
    """One hostile form of a file, by its ending; in one of twelve draws another kind of file."""
    if rng.random() < 1 / 12:
        mutate_file(rng, path)
    else:
        MUTATIONS[path.suffix](rng, path)
