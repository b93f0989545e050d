"""Names of engines and of recordings' formats as people type them, for every command that takes one."""

import re

# By letters and digits alone: case, spaces, dashes, dots and underscores do not count.
_SPELLINGS = {
    "sglang": ("sglang", "sgl"),
    "tensorrt-llm": ("tensorrtllm", "trtllm", "tensorrt", "trt"),
    "vllm": ("vllm",),
    "vllm-ascend": ("vllmascend", "ascendvllm", "ascend", "vllmnpu"),
    "megatron": ("megatron", "megatroncore", "megatronlm", "mcore"),
    "deepspeed": ("deepspeed", "deepspeedmoe", "autoep"),
    "transformers": ("transformers", "huggingface", "hf"),
    "llama.cpp": ("llamacpp", "llama"),
    "rows": ("rows", "jsonl", "jsonlines"),
    "npz": ("npz", "trace"),
}
_NAMES = {spelling: name for name, spellings in _SPELLINGS.items() for spelling in spellings}


def engine_name(typed: str) -> str:
    """The name that moeplan uses: ``trt-llm``, ``TRTLLM`` and ``tensorrt_llm`` are ``tensorrt-llm``.

    What is no engine's name comes back as it was typed: the caller lists the names that it knows.
    """
    return _NAMES.get(re.sub(r"[^a-z0-9]", "", typed.lower()), typed)
