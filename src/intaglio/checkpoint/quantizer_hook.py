"""Loading weights into a model with replaced modules, through transformers' quantizer hook.

`from_pretrained` creates a model without weights, passes it to the given quantizer, and reads the weights into the
result. Ours inserts the modules of live parts. Its traces are removed after loading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from intaglio.errors import IntaglioError
from intaglio.methods.base import HasCustomModules
from intaglio.methods.registry import get_method
from intaglio.modeling.replacement import REPLACED

NAME = "intaglio"


@register_quantization_config(NAME)
class _Rebuild(QuantizationConfigMixin):
    """Quantization config that carries a function to the point where the model exists without its weights."""

    def __init__(self, rebuild: Callable[[nn.Module], None] | None = None, **kwargs: Any) -> None:
        super().__init__(quant_method=cast(Any, NAME))
        if rebuild is None:
            raise IntaglioError(f"the quantization method {NAME!r} belongs to no checkpoint")
        self.rebuild = rebuild

    def to_dict(self) -> dict[str, Any]:
        """Return the printable form."""
        return {"quant_method": NAME}


@register_quantizer(NAME)
class _Rebuilder(HfQuantizer):
    """Quantizer that calls the function of `_Rebuild`."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        cast(_Rebuild, self.quantization_config).rebuild(model)
        # Some families initialise a whole layer by the names of its projections; that is skipped, since every weight
        # is in the files. Modules with buffers of their own must still fill them.
        for name, module in model.named_modules():
            if isinstance(module, REPLACED):
                while name:
                    name = name.rpartition(".")[0]
                    owner = model.get_submodule(name)
                    if not any(True for _ in owner.buffers(recurse=False)):
                        owner._is_hf_initialized = True

    def is_serializable(self) -> bool:
        """Return True; read by transformers."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Always True; read by transformers."""
        return True


def quantizer_kwargs(name: str, live: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return arguments for `from_pretrained` that load the weights of replaced modules; empty where there are none."""
    parts = [(get_method(str(part["slug"])), part) for part in live if isinstance(part.get("slug"), str)]
    rebuilding_parts = [
        (cast(type[HasCustomModules], method), part) for method, part in parts if isinstance(method, HasCustomModules)
    ]
    if not rebuilding_parts:
        return {}

    def rebuild(model: nn.Module) -> None:
        for method, part in rebuilding_parts:
            try:
                method.build_empty(part, model)
            except (KeyError, TypeError, ValueError) as error:
                raise IntaglioError(
                    f"the live part of {part['slug']} in {name!r} cannot be put back: {error}"
                ) from error

    return {"quantization_config": _Rebuild(rebuild)}


def remove_quantizer_state(model: Any) -> None:
    """Remove the traces of the quantizer from a model."""
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
