"""The dense FFNs of a model, as the names of its tensors tell them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from coreinfer_edge.binding.core import column_type
from coreinfer_edge.model.header import GGUFHeader, GGUFTensor, type_traits

FFN_TENSOR = re.compile(r"blk\.(\d+)\.ffn_(up|gate|down)\.(weight|bias|scale)")


@dataclass(frozen=True)
class LayerFFN:
    """The tensors of one layer's dense FFN, by ``up.weight``, ``down.bias`` and so on."""

    tensors: dict[str, GGUFTensor]

    @property
    def width(self) -> int:
        """Neurons. Taken from down, as up may hold gate and up fused."""
        return self.tensors["down.weight"].shape[0]

    def core_bytes(self, kept: int) -> int:
        """Bytes of the tensors with only so many neurons in them."""
        if kept == self.width:
            return sum(tensor.n_bytes for tensor in self.tensors.values())
        down = self.tensors["down.weight"]
        n_out = down.n_elements // self.width
        # Down's columns, and its bias (F32), which holds what stands for the neurons left out.
        total = type_traits(column_type(down.ggml_type)).n_bytes((kept, n_out)) + 4 * n_out
        for name, tensor in self.tensors.items():
            if not name.startswith("down"):
                total += tensor.n_bytes * kept // self.width
        return total


def dense_ffn(header: GGUFHeader) -> dict[int, LayerFFN]:
    """The dense FFN of each layer that has one."""
    layers: dict[int, dict[str, GGUFTensor]] = {}
    for name, tensor in header.tensors.items():
        if match := FFN_TENSOR.fullmatch(name):
            layers.setdefault(int(match[1]), {})[f"{match[2]}.{match[3]}"] = tensor
    return {
        layer: LayerFFN(tensors)
        for layer, tensors in sorted(layers.items())
        if {"up.weight", "down.weight"} <= tensors.keys()
        and tensors["down.weight"].n_elements > 0
        and tensors["down.weight"].shape
    }
