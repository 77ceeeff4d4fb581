"""What counts as a dense FFN, told from the tensors of a model: the one definition of it.

The library finds the same from the graph (``discover`` in native/coreinfer.cpp) once the model is
loaded. Both must agree, so that nothing is promised which loading refuses.
"""

from __future__ import annotations

from dataclasses import dataclass

from coreinfer_edge.binding.core import column_type
from coreinfer_edge.binding.gguf import bytes_of
from coreinfer_edge.model.header import FFN_TENSOR, GGUFHeader, GGUFTensor

# Architectures with the tensors of a dense FFN, and the reason why no part of its neurons can stand
# for it. Their graphs (src/models of llama.cpp) do without build_ffn, which the library hooks into.
NOT_DENSE = {
    "apertus": "llama.cpp computes its FFN, with the activation xIELU, in code of its own",
    "bitnet": "its FFN is normalised over all neurons before the last product",
    "gemma3n": "its FFN leaves out neurons by a threshold that depends on all of them",
}


@dataclass(frozen=True)
class LayerFFN:
    """The tensors of one layer's dense FFN, by ``up.weight``, ``down.bias`` and so on."""

    tensors: dict[str, GGUFTensor]

    @property
    def width(self) -> int:
        """Neurons. Taken from down, as up may hold gate and up fused."""
        return self.tensors["down.weight"].shape[0]

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors as they are."""
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    @property
    def weight_bytes(self) -> int:
        """The same without biases."""
        return sum(t.n_bytes for name, t in self.tensors.items() if name.endswith(".weight"))

    def core_bytes(self, kept: int) -> int:
        """Bytes of the tensors with only so many neurons in them."""
        if kept == self.width:
            return self.n_bytes
        down = self.tensors["down.weight"]
        n_out = down.n_elements // self.width
        # Down's columns, and its bias (F32), which holds what stands for the neurons left out.
        total = bytes_of(column_type(down.ggml_type), kept * n_out) + 4 * n_out
        for name, tensor in self.tensors.items():
            if not name.startswith("down"):
                total += tensor.n_bytes * kept // self.width
        return total

    def is_plain(self) -> bool:
        """Whether it is up (with gate beside or within it), an activation, and down."""
        up, gate, down = (self.tensors.get(f"{part}.weight") for part in ("up", "gate", "down"))
        if not up or not down or any(name.endswith(".scale") for name in self.tensors):
            return False
        if len(up.shape) != 2 or len(down.shape) != 2 or not down.n_elements:
            return False
        n_up = up.shape[1]
        return (
            n_up == self.width and gate.shape == up.shape
            if gate
            else n_up in (self.width, 2 * self.width)
        )


def dense_ffn(header: GGUFHeader) -> dict[int, LayerFFN]:
    """The dense FFN of each layer that has one."""
    if header.architecture in NOT_DENSE:
        return {}
    nextn = header.of_architecture("nextn_predict_layers")  # at the end, and not run
    end = header.n_layers - nextn if isinstance(nextn, int) and nextn > 0 else None
    layers: dict[int, dict[str, GGUFTensor]] = {}
    for tensor in header.ffn_tensors:
        match = FFN_TENSOR.fullmatch(tensor.name)
        assert match is not None
        layers.setdefault(int(match[1]), {})[f"{match[2]}.{match[3]}"] = tensor
    found = ((layer, LayerFFN(tensors)) for layer, tensors in sorted(layers.items()))
    return {
        layer: ffn
        for layer, ffn in found
        if ffn.is_plain()
        and (end is None or layer < end)
        and f"blk.{layer}.ffn.act.scales" not in header.tensors
    }


def why_not_dense(header: GGUFHeader) -> str:
    """Why no layer of a model has a dense FFN, in a clause."""
    if reason := NOT_DENSE.get(header.architecture):
        return reason
    if any("_exps." in name for name in header.tensors):
        return "its FFN is a mixture of experts"
    return "its FFN is of another kind" if header.ffn_tensors else "it has no FFN"
