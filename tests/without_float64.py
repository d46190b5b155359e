"""A stand-in for a device that has no float64, such as Apple's MPS: tensors of the CPU that say they are elsewhere."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("mps")
_DEVICE_OF = torch.Tensor.device.__get__
_GENERATOR = torch.Generator


class OnDevice(torch.Tensor):
    """A tensor that is on the device."""


def is_on_device(value) -> bool:
    return isinstance(value, OnDevice)


def names_device(value) -> bool:
    return isinstance(value, torch.device | str) and not isinstance(value, torch.dtype) and str(value) == DEVICE.type


class WithoutFloat64(TorchFunctionMode):
    """Inside, whatever is made on the device or of its tensors is on it, and float64 there is an error.

    A cast that is one call with a move away from the device is an error, too: MPS casts before it moves.
    """

    def __enter__(self):
        torch.Generator = lambda device="cpu": _GENERATOR()
        return super().__enter__()

    def __exit__(self, *exception):
        torch.Generator = _GENERATOR
        return super().__exit__(*exception)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        arguments = (args, kwargs or {})
        values, _ = tree_flatten(arguments)
        takes_part = any(map(is_on_device, values))
        if func == _DEVICE_OF:
            return DEVICE if takes_part else func(*args)
        is_wanted = any(map(names_device, values))
        leaves = takes_part and (
            func is torch.Tensor.cpu or (func is torch.Tensor.to and any(str(value) == "cpu" for value in values))
        )
        if leaves and torch.float64 in values:
            raise RuntimeError("Cannot convert a tensor of the device to float64 while it is moved.")
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):  # `to(other)`
            is_wanted, leaves = is_on_device(args[1]), takes_part and not is_on_device(args[1])
            if leaves and args[1].dtype == torch.float64:
                raise RuntimeError("Cannot convert a tensor of the device to float64 while it is moved.")

        def plain(value):
            if is_on_device(value):
                return value.as_subclass(torch.Tensor)
            return torch.device("cpu") if names_device(value) else value

        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = tree_map(plain, arguments)
            result = func(*args, **kwargs)
        into_main_memory = func is torch.Tensor.copy_ and not is_on_device(arguments[0][0])
        if leaves or into_main_memory or not (takes_part or is_wanted):
            return result

        def place(value):
            if not isinstance(value, torch.Tensor):
                return value
            if value.dtype == torch.float64:
                raise RuntimeError(f"Cannot make a float64 tensor on the device ({getattr(func, '__name__', func)}).")
            return value.as_subclass(OnDevice)

        with torch._C.DisableTorchFunctionSubclass():
            return tree_map(place, result)
