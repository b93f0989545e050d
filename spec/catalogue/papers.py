"""Models that the papers measured and that have no Hugging Face configuration."""

from ..model import Attention, Block, Dense, Gate, Model, Moe
from .shared import merge_runs


def gpt_moe(experts: int) -> Model:
    """GPT-2 medium with experts in every layer, top-1, as ExFlow (arXiv 2401.08383) evaluates it.

    The Model document has no field for learned positions and for the bias of a layer norm: about 1.2 million of the
    parameters are not counted.
    """
    hidden = 1024
    attention = Attention(heads=16, kv_heads=16, head_dim=64, bias=True)
    moe = Moe(
        num_experts=experts,
        top_k=1,
        ffn_size=4 * hidden,
        gated=False,
        activation="gelu",
        bias=True,
        gate=Gate(normalize=False),
    )
    return Model(
        name=f"gpt-moe-{experts}",
        family="gpt_moe",
        vocab_size=50257,
        blocks=(Block(count=24, hidden_size=hidden, attention=attention, moe=moe),),
        rope_theta=None,
        tie_embeddings=True,
        dtype="f16",
        source="ExFlow, arXiv 2401.08383: GPT MoE 350M, 24 layers, hidden 1024, top-1",
    )


def swin_moe(size: str) -> Model:
    """Swin-MoE for 192 x 192 pixels with 8 experts, top-1, experts in every other block of the last two stages.

    Stage s works at 48 / 2^s tokens a side in windows of at most 12 x 12. The patch embedding, the merging between
    stages, the position networks and the classifier have no place in the Model document.
    """
    width, heads = {"small": (96, 3), "base": (128, 4)}[size]
    layers = []
    for stage, blocks in enumerate((2, 2, 18, 2)):
        hidden = width * 2**stage
        attention = Attention(
            kind="window",
            heads=heads * 2**stage,
            kv_heads=heads * 2**stage,
            head_dim=32,
            bias=True,
            sliding_window=min(12, 48 // 2**stage) ** 2,
        )
        shape = {"ffn_size": 4 * hidden, "gated": False, "activation": "gelu", "bias": True}
        dense = Block(hidden_size=hidden, attention=attention, dense=Dense.model_validate(shape))
        moe = Moe.model_validate({"num_experts": 8, "top_k": 1, "gate": Gate(normalize=False), **shape})
        routed = Block(hidden_size=hidden, attention=attention, moe=moe)
        layers += [routed if stage >= 2 and i % 2 else dense for i in range(blocks)]
    return Model(
        name=f"swin-moe-{size}",
        family="swin_moe",
        vocab_size=0,
        blocks=merge_runs(layers),
        rope_theta=None,
        causal=False,
        dtype="f32",
        source=f"github.com/microsoft/Swin-Transformer, swin_moe_{size}_patch4_window12_192_8expert_32gpu_22k.yaml",
    )
