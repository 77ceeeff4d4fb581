"""The commands of ``coreinfer-edge``, a module each; ``coreinfer_edge.cli`` joins them."""
