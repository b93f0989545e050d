"""Shortcut-connected experts (ScMoE, arXiv 2404.05019): what the experts read, and what runs beside them.

A block's routed experts read a state of the preceding block instead of the state after its own attention, and their
output is added at the block's end. Between the two lie operators of the backbone that do not wait for them:

    output   the preceding block's output (Pos-1)              attention and FFN of the block
    mid      the preceding block's state after attention (Pos-2)   the preceding block's FFN, then the same
    input    the preceding block's input (Pos-3)               the preceding block's attention, its FFN, then the same

The block's FFN is its shared experts or a dense FFN (LongCat-Flash: ``mid`` with a dense FFN), on the state after its
attention. The preceding block of ``mid`` and ``input`` has no routed experts.
"""

from .model import Block, Model

WINDOWS: dict[str, tuple[str, ...]] = {
    "none": (),
    "output": ("attention", "ffn"),
    "mid": ("ffn before", "attention", "ffn"),
    "input": ("attention before", "ffn before", "attention", "ffn"),
}
"""The operators beside the experts of each shortcut, in order."""


def slots(block: Block) -> int:
    """Places for the experts: before each operator of the window, and after the last."""
    return len(WINDOWS[block.shortcut]) + 1


def reads_before(block: Block) -> bool:
    """Whether the experts read a state that lies inside the preceding block."""
    return block.shortcut in ("mid", "input")


def missing_before(model: Model, index: int) -> str:
    """What a shortcut lacks before it, as text; "" where nothing."""
    if not reads_before(model.layers[index]):
        return ""
    if index == 0:
        return "a shortcut from a preceding layer that does not exist"
    return "a shortcut from inside a layer that has experts itself" if model.layers[index - 1].moe else ""
