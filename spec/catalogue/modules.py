"""Names of the modules that hold a layer's matrices, as quantisation schemes list them.

A scheme says which modules it covers by their names: those of the published checkpoint, or of Transformers' classes,
which differ in places. Each matrix has all of its names.
"""

from ..model import Block

Names = dict[str, tuple[str, ...]]  # matrix -> names of its module

# Names inside an FFN of gate, up and down.
_FFN = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}
_SWITCH = {"up": "wi", "down": "wo"}
_LATENT = {"q": "q_proj", "q_a": "q_a_proj", "q_b": "q_b_proj", "kv_a": "kv_a_proj_with_mqa", "kv_b": "kv_b_proj"}
_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
# vLLM fuses these on loading; checkpoints made by its users sometimes list the fused name.
_FUSED = {"gate": "gate_up_proj", "up": "gate_up_proj", "q": "qkv_proj", "k": "qkv_proj", "v": "qkv_proj"}


class LayerModules:
    """Module names of one layer of a family."""

    def __init__(self, family: str, index: int, block: Block, encoder_layers: int) -> None:
        self.family, self.block = family, block
        if family == "switch_transformers":
            stack, i = ("encoder", index) if index < encoder_layers else ("decoder", index - encoder_layers)
            self.prefix = f"{stack}.block.{i}.layer."
        elif family == "longcat_flash":  # a layer of the checkpoint is two of ours
            self.prefix = f"model.layers.{index // 2}."
        else:
            self.prefix = f"model.layers.{index}."
        self.half = f"{index % 2}." if family == "longcat_flash" else ""

    def attention(self) -> Names:
        if self.family == "switch_transformers":
            own: Names = {name: (f"{self.prefix}0.SelfAttention.{name}",) for name in "qkvo"}
            cross: Names = {f"cross_{name}": (f"{self.prefix}1.EncDecAttention.{name}",) for name in "qkvo"}
            return own | (cross if self.prefix.startswith("decoder") else {})
        return self._named(f"{self.prefix}self_attn.{self.half}", _LATENT | _ATTENTION)

    def dense(self) -> Names:
        if self.family == "switch_transformers":
            return {k: (f"{self.prefix}{self._feed_forward()}.mlp.{v}",) for k, v in _SWITCH.items()}
        return self._named(f"{self.prefix}{'mlps' if self.half else 'mlp'}.{self.half}", _FFN)

    def shared(self) -> Names:
        name = "shared_expert" if self.family == "qwen2_moe" else "shared_experts"
        return self._named(f"{self.prefix}mlp.{name}.", _FFN)

    def expert(self, number: int) -> Names:
        if self.family == "switch_transformers":
            inside = f"{self.prefix}{self._feed_forward()}.mlp.experts.expert_{number}."
            return {k: (f"{inside}{v}",) for k, v in _SWITCH.items()}
        inside = f"{self.prefix}mlp.experts."
        names = self._named(f"{inside}{number}.", _FFN)
        if self.family == "mixtral":
            published = self._named(f"{self.prefix}block_sparse_moe.experts.{number}.", _MIXTRAL)
            names = {k: published[k] + names[k] for k in names}
        together = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}  # all experts in one tensor
        return {k: (*v, f"{inside}{together[k]}") for k, v in names.items()}

    def _feed_forward(self) -> int:
        return 2 if self.prefix.startswith("decoder") else 1

    @staticmethod
    def _named(prefix: str, table: dict[str, str]) -> Names:
        fused = {k: (f"{prefix}{_FUSED[k]}",) if k in _FUSED else () for k in table}
        return {k: (f"{prefix}{v}", *fused[k]) for k, v in table.items()}
