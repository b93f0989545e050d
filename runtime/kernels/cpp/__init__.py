"""Expert kernels for CPUs, in C++: AVX2, AVX-512 and AMX, chosen at run time; built by ``build`` at first use."""

from ....spec import MoeplanError


def obstacle() -> str | None:
    """Why these kernels cannot run on this machine, in one line; None if they can. Builds them if that is still due."""
    from .library import load

    try:
        load()
    except MoeplanError as error:
        return str(error)
    return None
