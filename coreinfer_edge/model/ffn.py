"""The definition of a dense FFN, by the tensors of a model.

Once the model is loaded, the library finds the FFNs by the graph (``discover`` in native/). Both
must agree, so that ``inspect`` promises nothing that loading refuses.
"""

from __future__ import annotations

from dataclasses import dataclass

from coreinfer_edge.binding.core import column_type, level_bytes
from coreinfer_edge.binding.gguf import bytes_of
from coreinfer_edge.choose.statistics import BLOCK, LEVELS, Level
from coreinfer_edge.model.header import FFN_TENSOR, GGUFHeader, GGUFTensor

# Architectures with the tensors of a dense FFN that cannot use a core set, and the reason. Their
# graphs (src/models of llama.cpp) do not use build_ffn, which has the library's hook.
NOT_DENSE = {
    "apertus": "llama.cpp computes its FFN, with the activation xIELU, in special code",
    "bitnet": "its FFN is normalised over all neurons before the last product",
    "gemma3n": "its FFN leaves out neurons by a threshold that depends on all of them",
}

# Rows are laid out in groups of so many, and what a column takes is counted over so many neurons.
_GROUP = 16
_COLUMNS = 1024


@dataclass(frozen=True)
class LayerFFN:
    """The tensors of one layer's dense FFN, by ``up.weight``, ``down.bias`` and so on."""

    tensors: dict[str, GGUFTensor]

    @property
    def width(self) -> int:
        """Number of neurons, from down, because up may hold gate and up fused."""
        return self.tensors["down.weight"].shape[0]

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors as they are."""
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the tensors without biases."""
        return sum(t.n_bytes for name, t in self.tensors.items() if name.endswith(".weight"))

    def core_bytes(self, kept: int) -> int:
        """Bytes of the tensors with only ``kept`` neurons."""
        if kept == self.width:
            return self.n_bytes
        down = self.tensors["down.weight"]
        n_out = down.n_elements // self.width
        # Down's columns, and its bias (F32), which holds the fill of the neurons left out.
        total = bytes_of(column_type(down.ggml_type), kept * n_out) + 4 * n_out
        for name, tensor in self.tensors.items():
            if not name.startswith("down"):
                total += tensor.n_bytes * kept // self.width
        return total

    def level_bytes(self, density: float, more: int = BLOCK) -> int:
        """The most bytes of the tensors whose neurons have levels, for a fraction of the bytes.

        ``more``: neurons that rounding to whole blocks of neurons may add.
        """
        if density >= 1:
            return self.n_bytes
        # the bias of down is always there
        down = self.tensors["down.weight"]
        return int((density + more / self.width) * self.n_bytes) + 4 * down.n_elements // self.width

    @property
    def neuron_bytes(self) -> tuple[float, ...]:
        """Bytes of a neuron of each of LEVELS in a core set here; 0 for one that it cannot have."""
        return self._neuron_bytes(on_device=False)

    @property
    def device_neuron_bytes(self) -> tuple[float, ...]:
        """As ``neuron_bytes``, for a core set on a device."""
        return self._neuron_bytes(on_device=True)

    def _neuron_bytes(self, on_device: bool) -> tuple[float, ...]:
        down = self.tensors["down.weight"]
        n_out = down.n_elements // self.width
        rows = [t for name, t in self.tensors.items() if name in ("up.weight", "gate.weight")]

        def of_row(level: Level, tensor: GGUFTensor) -> float:
            return level_bytes(level, tensor.ggml_type, tensor.shape[0], on_device=on_device)

        result = []
        for level in LEVELS:
            parts = [
                level_bytes(level, down.ggml_type, _COLUMNS, True, on_device) * n_out / _COLUMNS
                if on_device or n_out % _GROUP == 0
                else 0.0
            ]
            for tensor in rows:  # of a fused gate and up there are two rows for a neuron
                n_rows = tensor.shape[1] // self.width
                parts.append(n_rows * of_row(level, tensor))
            result.append(sum(parts) if all(parts) else 0.0)
        return tuple(result)

    def is_plain(self) -> bool:
        """Whether the FFN is up (with gate beside or within it), an activation, and down."""
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
    nextn = header.of_architecture("nextn_predict_layers")  # the last layers, which do not run
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
    """A clause that says why no layer of a model has a dense FFN."""
    if reason := NOT_DENSE.get(header.architecture):
        return reason
    if any("_exps." in name for name in header.tensors):
        return "its FFN is a mixture of experts"
    return "its FFN is of another kind" if header.ffn_tensors else "it has no FFN"
