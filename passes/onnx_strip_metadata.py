"""StripMetadata: drop what the exporter recorded for debugging, keep the names and the stamped sites.

Stack traces and scopes are most of an exported graph's bytes, and hold paths of the machine that exported it.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .onnx_stamp_sites import SITES_KEY


@dataclass(frozen=True)
class StripMetadata:
    """Remove documentation strings and metadata from the model, its values and its nodes.

    Attributes:
        kept: metadata keys that stay.
    """

    kept: frozenset[str] = frozenset({SITES_KEY})

    def run(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit `model` in place."""
        modified = self._strip(model) | self._strip(model.graph)
        for node in model.graph.all_nodes():
            modified |= self._strip(node)
            for value in node.outputs:
                modified |= self._strip(value)
        for value in (*model.graph.inputs, *model.graph.initializers.values()):
            modified |= self._strip(value)
        return ir.passes.PassResult(model, modified)

    def _strip(self, item: ir.Model | ir.Graph | ir.Node | ir.Value) -> bool:
        dropped = [key for key in item.metadata_props if key not in self.kept]
        for key in dropped:
            del item.metadata_props[key]
        documented = bool(item.doc_string)
        item.doc_string = None
        return documented or bool(dropped)
