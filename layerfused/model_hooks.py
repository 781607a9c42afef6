"""How a model tells its `XGrad` of forward passes, saving and loading."""

import weakref

import torch


class Hook:
    """Calls a method of an XGrad for one module; inert in a copy of the module, and in an unpickled one."""

    def __init__(self, xgrad, module: torch.nn.Module, name: str, only_training: bool = False):
        self._xgrad, self._module = weakref.ref(xgrad), weakref.ref(module)
        self._name, self._only_training = name, only_training

    def __call__(self, module: torch.nn.Module, *_) -> None:
        xgrad = self._xgrad() if self._module() is module else None
        if xgrad is not None and (module.training or not self._only_training):
            getattr(xgrad, self._name)()

    def __reduce__(self):
        return nothing, ()


def nothing():
    return _nothing


def _nothing(*_) -> None:
    pass


def attach(xgrad, module: torch.nn.Module) -> None:
    """Predictions are fresh when a training forward pass begins, true weights there when it is saved or loaded."""
    module.register_forward_pre_hook(Hook(xgrad, module, "_refresh", only_training=True))
    module.register_state_dict_pre_hook(Hook(xgrad, module, "_put_back"))
    module.register_load_state_dict_pre_hook(Hook(xgrad, module, "_restore"))
