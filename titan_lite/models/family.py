"""One model family as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from titan_lite.models.args import DecoderArgs
from titan_lite.models.hf_config import HFConfig, HFLayout
from titan_lite.models.roles import PlanRow


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family as data: its sizes, builder, tensor-parallel plan and Hugging Face names."""

    name: str
    """Value of model.name."""
    flavors: Mapping[str, DecoderArgs]
    """Published sizes by the name that model.flavor selects."""
    build: str
    """The function that builds it: "module:function" of (args) -> nn.Module, imported only when
    built."""
    tp_plan: tuple[PlanRow, ...]
    """Tensor-parallel roles; the module of each parameter is matched by exactly one row."""
    hf_key_map: Mapping[str, str]
    """Our parameter names -> Hugging Face's, `*` being the layer's number, or weight and bias."""
    objective: Literal["causal_lm", "masked_lm"] = "causal_lm"
    """Training objective: the next token, or masked tokens and next-sentence prediction."""
    hf_config: HFConfig | None = None
    """How its args are written in config.json; None: transformers has no such model."""
    hf_layouts: Mapping[str, HFLayout] = field(default_factory=dict)
    """Hugging Face parameter name -> its layout, if that differs from ours."""
    hf_ignored: tuple[str, ...] = ()
    """Tensors in Hugging Face files that are not parameters."""
