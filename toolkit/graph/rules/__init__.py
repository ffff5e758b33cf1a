"""One rule per ATen operator: how labels flow from an operator's inputs to its output.

A rule gets the node, the labels and shapes known so far and the `Labels` to write equalities into, and returns the dimensions of
the output (a list of them for an operator with several outputs). An operator without a rule fixes everything that enters it, by
name, so that it is never sliced wrongly.
"""

from toolkit.graph.rules import entrywise, indexing, mixing, reducing, reshaping
from toolkit.graph.rules.core import Flow, Mixing, argument, aten, place, propagate

__all__ = ["Flow", "Mixing", "argument", "aten", "entrywise", "indexing", "mixing", "place", "propagate", "reducing", "reshaping"]
