"""What the kernels compile to, on any machine, without a GPU: registers, spills, shared memory, matrix instructions.

    python -m moeplan.runtime.kernels.gpu.compiled [--all | --brief]

prints a table of every kernel in its default configurations for sm_80 and sm_90; ``--all`` adds the other types and
heights, and the configurations that tuning tries. ``--brief`` compiles bfloat16 and even sizes alone, for sm_80 the
lowest and highest tiles, and prints, with tabs between them, kernel, type, rows, tile, architecture, bytes of shared
memory and bytes spilled.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .config import HEIGHTS
from .specialisations import Case, cases

# Bytes of shared memory that one block may ask for, by architecture.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
HEADER = f"{'kernel':<24}{'type':<10}{'rows':>5}{'tile':>14}{'arch':>6}{'regs':>6}{'spilled':>8}{'shared':>8}  products"


@dataclass(frozen=True)
class Compiled:
    """registers: of a thread; spilled: bytes of local memory of a thread; shared: bytes of a block; wgmma, mma: how
    many such instructions the PTX has."""

    label: str
    dtype: str
    height: int
    tile: str
    arch: int
    registers: int
    spilled: int
    shared: int
    wgmma: int
    mma: int

    def __str__(self) -> str:
        products = " ".join(f"{n} {name}" for n, name in ((self.wgmma, "wgmma"), (self.mma, "mma.sync")) if n) or "-"
        return (
            f"{self.label:<24}{self.dtype:<10}{self.height or '-':>5}{self.tile:>14}{self.arch:>6}"
            f"{self.registers:>6}{self.spilled:>8}{self.shared:>8}  {products}"
        )


def compile_case(case: Case, arch: int) -> Compiled:
    """Compile for sm_<arch>; what the assembler reports."""
    constants = dict(case.constants)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list] = {}
    for place, parameter in enumerate(case.kernel.params):
        name = parameter.name
        element = case.pointers.get(name, "")
        if element is None:
            constants[name] = None
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = f"*{element}" if element else "i32"
            if not parameter.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constants, attributes)
    config = case.config
    options = {"num_warps": config.warps, "num_stages": config.stages}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _resources(built.asm["cubin"])
    ptx = built.asm["ptx"]
    return Compiled(
        label=case.label,
        dtype=str(case.dtype).removeprefix("torch."),
        height=case.height,
        tile=f"{config.columns}x{config.depth} w{config.warps}s{config.stages}" if case.height else "-",
        arch=arch,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=built.metadata.shared,
        wgmma=len(re.findall(r"\bwgmma\.mma_async", ptx)),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
    )


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}


def main(arguments: list[str]) -> None:
    if set(arguments) - {"--all", "--brief"}:
        raise SystemExit(__doc__)
    if "--brief" in arguments:
        brief()
        return
    print(HEADER)
    for arch in SHARED:
        for case in cases(arch, everything="--all" in arguments):
            print(compile_case(case, arch), flush=True)


def brief() -> None:
    for arch in SHARED:
        for case in cases(arch):
            wanted = arch >= 90 or case.height in (HEIGHTS[0], HEIGHTS[-1])
            if wanted and case.dtype == torch.bfloat16 and "ragged" not in case.label:
                c = compile_case(case, arch)
                print(c.label, c.dtype, c.height, c.tile, c.arch, c.shared, c.spilled, sep="\t", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
