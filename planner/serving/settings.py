"""How each engine is started where nobody says otherwise."""

from ...spec.engines import engine_name
from ...spec.errors import MoeplanError
from .shapes import Settings

DEFAULTS = {
    "vllm": Settings("mixed", 8192, graph_tokens=512, calls=50, frontend=0.005, frontend_token=1e-6),
    "sglang": Settings(
        "prefill_first", 8192, fused=False, graph_tokens=0, calls=50, frontend=0.005, frontend_token=1e-6
    ),
    "tensorrt-llm": Settings("whole", 8192, graph_tokens=0, calls=50, frontend=0.005, frontend_token=1e-6),
}


def defaults(engine: str) -> Settings:
    """Of an engine by any of its names."""
    found = DEFAULTS.get(engine_name(engine))
    if found is None:
        raise MoeplanError(f"engine {engine}: not known to the prediction of serving; known: {', '.join(DEFAULTS)}")
    return found
