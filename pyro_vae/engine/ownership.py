"""Whose a parameter is: a module's parameters are its own tensors, whatever Pyro's store holds under their names.

Pyro's store keeps the first tensor under a name. With networks made anew under old names, as in a notebook or a loop
over folds, it would hold the old ones: these would be trained, saved and loaded, and the new ones would run.
"""

import copyreg
import sys
import weakref
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import Any

import pyro
from pyro.distributions import constraints
from pyro.nn.module import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_vae.engine.modules import Hook
from pyro_vae.errors import PyroVAEError

TWO_MODULES = "_two_modules"  # in a parameter's `infer`: the run has two modules with a parameter of that name

# The PyroModule of each parameter that one had in a run. Tensors that the store read from a file have none: Pyro gives
# them to the next module that has their names.
_owners: Any = WeakTensorKeyDictionary()


class OwnParameters(Messenger):
    """Around a run: puts the own parameters of its modules into Pyro's store, in place of other modules'.

    What ``pyro.param`` makes stays the store's. So does what a module takes from the store on demand, by
    ``pyro.module(..., update_module_params=True)``.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.modules = list(modules)
        self._adopted: set[nn.Module] = set()
        self._used: dict[str, Tensor] = {}

    def __enter__(self) -> Any:
        for module in self.modules:
            self._adopt(module)
        _RUNNING.enter(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _RUNNING.leave(self)
        super().__exit__(*error)

    def _adopt(self, module: nn.Module) -> None:
        """Put a PyroModule's own PyroParams in place of those that the store has of another module."""
        if not isinstance(module, PyroModule) or module in self._adopted or pyro.settings.get("module_local_params"):
            return
        self._adopted.update(module.modules())
        for part in module.modules():
            if not isinstance(part, PyroModule) or not (part._pyro_name or part is module):
                continue  # Pyro names a part that was converted in place when it is first used
            for name, (constraint, _) in part._pyro_params.items():
                full = f"{part._pyro_name}.{name}" if part._pyro_name else name
                own = part._parameters.get(f"{name}_unconstrained")
                if own is not None and _is_of_another(full, part):
                    _put(full, own, constraint)

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        init = msg["args"][1] if len(msg["args"]) > 1 else None
        frame = _caller_of_param()
        code = None if frame is None else frame.f_code
        if frame is None or code not in _OF_MODULES:
            return  # the program's own pyro.param
        store = pyro.get_param_store()
        if code is _MODULE and isinstance(init, Tensor) and store._params.get(name) is init:
            self._used.setdefault(name, init)
            return  # as in every step but the first: to read a frame's variables takes time
        if code is _SETTER:  # a new parameter of a module that runs
            if _is_of_another(name, frame.f_locals["self"]):
                _put(name, None)
            return
        if isinstance(init, nn.Parameter):
            on_demand = code is _MODULE and frame.f_locals["update_module_params"] and name in store
            # The store would copy a parameter that is not contiguous, and the module would not learn.
            if not on_demand and (init.requires_grad or name in store) and store._params.get(name) is not init:
                _put(name, init)
        own = store._params[name] if name in store else init
        if code is _GETTER and own is not None:
            _owners[own] = weakref.ref(frame.f_locals["self"])
        if own is not None and self._used.setdefault(name, own) is not own:
            msg["infer"][TWO_MODULES] = True


def merged(*found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of model and guide as one dictionary; refuse two modules with one name."""
    both: dict[str, Tensor] = {}
    for parameters in found:
        for name, value in parameters.items():
            if both.setdefault(name, value) is not value:
                raise _two_modules(name)
    return both


def parameters_of(trace: Trace) -> dict[str, Tensor]:
    """The parameters in a trace, by name: unconstrained, as an optimiser steps them."""
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "param"}
    for name, site in sites.items():
        if (site["infer"] or {}).get(TWO_MODULES):
            raise _two_modules(name)
    return {name: unconstrained(site["value"]) for name, site in sites.items()}


def names_in_store() -> set[str]:
    """The names of the parameters that Pyro's store has."""
    return set(pyro.get_param_store()._params)


def forget(made: set[str]) -> None:
    """Free the names of parameters that a failed run has made, so that the next run makes them anew."""
    store = pyro.get_param_store()
    for name in made & names_in_store():
        del store[name]


def unconstrained(value: Any) -> Any:
    """A parameter as an optimiser steps it."""
    # Under Pyro's module_local_params, a module's parameters are unconstrained already.
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def _reduced(parameter: nn.Parameter) -> Any:
    """What a pickle has of a parameter: all but weak references, such as Pyro's to the parameter itself."""
    bare = nn.Parameter(parameter.data, parameter.requires_grad)
    vars(bare).update({name: value for name, value in vars(parameter).items() if not isinstance(value, weakref.ref)})
    return bare.__reduce_ex__(2)


# No pickle takes a weak reference, and Pyro puts one on every parameter that a program uses. Any module can hold such a
# parameter, also a network that is no part of a pair, so that a method of a pair would come too late.
copyreg.pickle(nn.Parameter, _reduced)


def _two_modules(name: str) -> PyroVAEError:
    return PyroVAEError(
        f"expected a name of its own for each network of a program, got two modules with a parameter '{name}', of "
        "which one would be neither trained nor saved. Pass other names to pyro.module; a PyroModule gets its names "
        "from the attributes that hold its parts."
    )


def _adopt_called(module: nn.Module, _: Any) -> None:
    # A PyroModule takes a PyroParam from the store before any handler gets to know.
    if isinstance(module, PyroModule):
        for run in _RUNNING.within:
            run._adopt(module)


_RUNNING = Hook(register_module_forward_pre_hook, _adopt_called)


def _put(name: str, own: Tensor | None, constraint: Any = constraints.real) -> None:
    """Make a module's tensor the store's, or leave the name free.

    To set an item of the store would copy some tensors, and unfreeze those that are frozen.
    """
    store = pyro.get_param_store()
    old = store._params.pop(name, None)
    store._constraints.pop(name, None)
    if old is not None and store._param_to_name.get(old) == name:
        del store._param_to_name[old]
    if own is not None:
        store._params[name], store._constraints[name], store._param_to_name[own] = own, constraint, name


def _is_of_another(name: str, module: nn.Module) -> bool:
    """Whether the store has, under that name, the parameter of a PyroModule other than this one."""
    stored = pyro.get_param_store()._params.get(name)
    owner = None if stored is None else _owners.get(stored)
    return owner is not None and owner() is not module


_MODULE: CodeType = pyro.module.__code__
_GETTER: CodeType = PyroModule.__getattr__.__code__
_SETTER: CodeType = PyroModule.__setattr__.__code__
_OF_MODULES = (_MODULE, _GETTER, _SETTER)


def _caller_of_param() -> FrameType | None:
    """The frame that has called pyro.param: nothing in Pyro's message tells a module's parameter from any other."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not pyro.param.__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_back
