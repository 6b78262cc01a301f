"""Domain fine-tuning of open-weight language models without catastrophic forgetting.

`import forge_core` is cheap: torch and the kernels are loaded with the first name that needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import (
        CausalLM,
        LoraConfig,
        ModelConfig,
        adapter_parameters,
        add_lora,
        load_adapter,
        load_model,
        merge_lora,
        remove_lora,
        save_adapter,
        save_model,
        unmerge_lora,
    )

__version__ = "0.1.0"

__all__ = [
    "CausalLM",
    "LoraConfig",
    "ModelConfig",
    "__version__",
    "adapter_parameters",
    "add_lora",
    "dequantize_model",
    "load_adapter",
    "load_model",
    "merge_lora",
    "remove_lora",
    "save_adapter",
    "save_model",
    "unmerge_lora",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(".model", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
