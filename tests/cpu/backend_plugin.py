"""Registers the CPU backend alone, without the rest of the plugin; for `VERL_USE_EXTERNAL_MODULES`."""

import importlib

import wrapt

from rredcot_verl.cpu import HOOKS


def _call(target: str, module) -> None:
    module_name, function_name = target.split(":")
    getattr(importlib.import_module(module_name), function_name)(module)


for _name, _target in HOOKS.items():
    wrapt.when_imported(_name)(lambda module, target=_target: _call(target, module))
