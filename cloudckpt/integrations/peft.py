"""Save the adapters of a PEFT model, and nothing of the model that they adapt.

```python
state = {"adapter": Adapter(model), "rng": RandomState()}
```

**What is saved**: the weights of one adapter, under the names of PEFT's own files (`adapter_model.safetensors`).
**What PEFT still does itself**: making the model (`get_peft_model`) before a restore, and `save_pretrained`.
**Limits**: weights alone, of one adapter for each `Adapter`. The optimizer of an adapter that is trained wants the
names of its parameters: put `cloudckpt.Trainable(model)` into the state instead of an `Adapter`, and the optimizer
beside it. Sharded models (FSDP, DTensor) are saved by `Trainable`, too; and so is, while it is trained, what PEFT's
files have in another form: P-tuning and prefix projection (what their encoders compute), AdaLoRA once it gave up ranks.

Run with peft 0.21.2 and torch 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from cloudckpt.errors import OptionsError
from cloudckpt.integrations.framework import framework

with framework("peft", lowest="0.21", extra="peft"):
    from peft import AdaLoraConfig, PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

__all__ = ["Adapter"]


class Adapter:
    """The weights of one adapter of a PEFT model, as an object of a state.

    A restore fills the adapter of that name in place; where names or shapes are others, nothing is changed. Without the
    model, `cloudckpt.read(url, keys="adapter")["adapter"]` is what PEFT keeps in `adapter_model.safetensors`.
    """

    def __init__(self, model: nn.Module, name: str = "default", *, save_embedding_layers: bool = False) -> None:
        """Stand for the adapter `name` of `model`.

        Args:
            model: what `get_peft_model` returned, also inside of DDP or `torch.compile`.
            name: the adapter's.
            save_embedding_layers: save the embeddings of the base model, too, as after a vocabulary that grew.

        Raises:
            OptionsError: it is no PEFT model, or has no adapter of that name.
        """
        # What wraps a model may answer for it, and has other names.
        while isinstance(inner := model._modules.get("_orig_mod") or model._modules.get("module"), nn.Module):
            model = inner
        if not hasattr(model, "peft_config"):
            raise OptionsError(f"a {type(model).__name__} has no adapters; give what peft.get_peft_model returned")
        known = list(cast("Mapping[str, object]", model.peft_config))
        if name not in known:
            raise OptionsError(f"the model has no adapter {name!r}; it has {', '.join(map(repr, known))}")
        self.model = model
        self.name = name
        self._saves_embeddings = save_embedding_layers

    def state_dict(self) -> dict[str, object]:
        """Return the adapter's weights, by PEFT's names, in the model's own memory.

        Raises:
            OptionsError: PEFT keeps what an encoder computes, or fewer ranks than are here, and not the weights.
        """
        found: dict[str, object] = get_peft_model_state_dict(
            self.model, adapter_name=self.name, save_embedding_layers=self._saves_embeddings
        )
        if why := self._why_not_whole(found):
            raise OptionsError(
                f"PEFT's files have no way back to the weights of the adapter {self.name!r}: {why}; put "
                "cloudckpt.Trainable(model) into the state instead of the Adapter"
            )
        return found

    def _why_not_whole(self, found: Mapping[str, object]) -> str:
        config = cast("Mapping[str, PeftConfig]", self.model.peft_config)[self.name]
        if isinstance(config, AdaLoraConfig) and config.rank_pattern:
            return "AdaLoRA has given up some of their ranks"
        if not config.is_prompt_learning:
            return ""
        encoder = cast("Mapping[str, nn.Module]", self.model.prompt_encoder)[self.name]
        # What is kept as `prompt_embeddings` are these weights only where nothing comes after them.
        more = [name for name, _ in encoder.named_parameters() if name != "embedding.weight" and name not in found]
        return f"they hold what its encoder computes, and not {', '.join(more)}" if more else ""

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Fill the adapter.

        Raises:
            ValueError: names or shapes are not those of this adapter; nothing was changed.
        """
        here = self.state_dict()
        wrong = sorted(here.keys() ^ state_dict.keys()) or [
            name for name, value in here.items() if _shape(value) != _shape(state_dict[name])
        ]
        if wrong:
            raise ValueError(
                f"the saved adapter is not like {self.name!r} here, it differs in {', '.join(wrong[:5])} "
                f"({len(wrong)} in all); make the model with the configuration of the one that was saved"
            )
        set_peft_model_state_dict(self.model, state_dict, adapter_name=self.name)


def _shape(value: object) -> object:
    return getattr(value, "shape", None)
