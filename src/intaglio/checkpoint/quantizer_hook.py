"""Loading weights into a model some of whose modules are not the stock ones, through transformers' own hook for it.

`from_pretrained` makes a model without weights, hands it to the quantizer that its caller named, and reads the weights
into what that one left. Ours puts the modules of live parts in their places. It is gone again after loading: the model
has nothing of it.
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
    """Carries a function to the moment at which the model is there without its weights.

    Args:
        rebuild: puts modules into it.
    """

    def __init__(self, rebuild: Callable[[nn.Module], None] | None = None, **more: Any) -> None:
        super().__init__(quant_method=cast(Any, NAME))
        if rebuild is None:
            raise IntaglioError(f"the quantization method {NAME!r} belongs to no checkpoint")
        self.rebuild = rebuild

    def to_dict(self) -> dict[str, Any]:
        """What transformers prints of it."""
        return {"quant_method": NAME}


@register_quantizer(NAME)
class _Rebuilder(HfQuantizer):
    """See the module."""

    def _process_model_before_weight_loading(self, model: Any, **more: Any) -> None:
        cast(_Rebuild, self.quantization_config).rebuild(model)
        # Some families draw random weights for a whole layer by the names of its projections; nothing is to be drawn
        # here, since every weight is in the files. What has buffers of its own must still fill them.
        for name, module in model.named_modules():
            if isinstance(module, REPLACED):
                while name:
                    name = name.rpartition(".")[0]
                    owner = model.get_submodule(name)
                    if not any(True for _ in owner.buffers(recurse=False)):
                        owner._is_hf_initialized = True

    def is_serializable(self) -> bool:
        """Read by transformers."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Read by transformers."""
        return True


def quantizer_kwargs(name: str, live: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arguments for `from_pretrained` with which it reads the weights of live parts, too; none where none needs it.

    Args:
        name: of the model, for sentences.
        live: the parts in the checkpoint's record.
    """
    parts = [(get_method(str(part["slug"])), part) for part in live if isinstance(part.get("slug"), str)]
    ours = [
        (cast(type[HasCustomModules], method), part) for method, part in parts if isinstance(method, HasCustomModules)
    ]
    if not ours:
        return {}

    def rebuild(model: nn.Module) -> None:
        for method, part in ours:
            try:
                method.build_empty(part, model)
            except (KeyError, TypeError, ValueError) as error:
                raise IntaglioError(
                    f"the live part of {part['slug']} in {name!r} cannot be put back: {error}"
                ) from error

    return {"quantization_config": _Rebuild(rebuild)}


def remove_quantizer_state(model: Any) -> None:
    """Leave nothing in a model of how it was read: for transformers, too, it is a model like any other.

    Args:
        model: just loaded.
    """
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False


__all__ = ["quantizer_kwargs", "remove_quantizer_state"]
