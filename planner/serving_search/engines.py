"""What engines are told to use, which the plan counts with and the exported command says."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineFacts:
    """title; tables: its name in measured tables; step_tokens: of one step at most, prefill in chunks of it."""

    title: str
    tables: str
    step_tokens: int = 8192


FACTS = {
    "vllm": EngineFacts("vLLM", "vllm"),
    "sglang": EngineFacts("SGLang", "sglang"),
    "tensorrt-llm": EngineFacts("TensorRT-LLM", "trtllm"),
}
MEMORY_FRACTION = 0.9
"""Of a GPU's memory that an engine may fill, weights, cache, buffers and all; the rest is a reserve."""
