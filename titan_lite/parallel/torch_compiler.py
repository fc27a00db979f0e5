"""Private names of torch's compiler. Imported inside functions: loading them takes seconds."""

from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

__all__ = [
    "CustomGraphPass",
    "clear_compilation_metrics",
    "config",
    "counters",
    "get_compilation_metrics",
]
