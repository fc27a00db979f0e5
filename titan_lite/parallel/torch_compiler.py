"""Private names of torch's compiler. Imported inside functions: loading them takes seconds."""

from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics
from torch._inductor import config, cpp_builder
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.exc import InvalidCxxCompiler

__all__ = [
    "CustomGraphPass",
    "InvalidCxxCompiler",
    "clear_compilation_metrics",
    "config",
    "counters",
    "cpp_builder",
    "get_compilation_metrics",
]
