"""Finding a model's layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def find_layers(model: nn.Module, layers: Sequence[nn.Module] | None = None) -> tuple[nn.Module, ...]:
    """The layers of ``model`` in the order in which forward runs them.

    Without ``layers``: the ``nn.ModuleList`` (or ``nn.Sequential``) of one repeated class that holds the most
    parameters, which is ``model.model.layers`` of a transformers model.
    """
    if layers is not None:
        inside = set(model.modules())
        for i, layer in enumerate(layers):
            if layer not in inside:
                raise ValueError(f"layers[{i}] ({type(layer).__name__}) is not a module of the model given")
        if not layers:
            raise ValueError("layers is empty: name the model's layers in forward order")
        return tuple(layers)
    best: tuple[int, tuple[nn.Module, ...]] = (0, ())
    for module in model.modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        children = tuple(module)
        if len({type(child) for child in children}) == 1:
            best = max(best, (sum(map(_elements, module.parameters())), children), key=lambda pair: pair[0])
    if not best[1]:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList of equal layers: pass layers=[...] in forward order"
        )
    return best[1]


def _elements(parameter: nn.Parameter) -> int:
    """Of the whole parameter: DeepSpeed ZeRO-3 leaves an empty tensor where it has not gathered it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
