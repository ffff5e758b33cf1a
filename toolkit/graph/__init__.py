"""From a model to channel groups, and from a plan to a proved smaller program."""

from toolkit.graph.eager import as_module
from toolkit.graph.memory import Memory, memory_of
from toolkit.graph.program import Branch, Program, example_input, trace, unprunable
from toolkit.graph.proof import prove
from toolkit.graph.surgery import apply
from toolkit.graph.tracing import to_device

__all__ = [
    "Branch",
    "Memory",
    "Program",
    "apply",
    "as_module",
    "example_input",
    "memory_of",
    "prove",
    "to_device",
    "trace",
    "unprunable",
]
