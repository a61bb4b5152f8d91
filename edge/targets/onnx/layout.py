"""Graph -> Graph for ONNX: attention as one node, with little to transpose."""

from ...coreml_graph import default_layout


def with_attention(graph):
    """The Graph with attention as one node, whose heads are moved at once where they must be moved."""
    return default_layout(graph, fused=False)
