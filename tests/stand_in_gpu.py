"""A stand-in for a Mac's GPU: tensors on the CPU that say that they are on `mps`, and refuse what those refuse.

    python tests/stand_in_gpu.py hftcli.training.worker RUN/rounds/00-sft

runs a module as on a machine that has such a GPU. There is no float64 on it, inside functions of torch neither; tensors of two
devices do not go together; numpy reads none of its values. Which kernels Metal lacks or computes otherwise is not known here.
"""

import runpy
import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("mps", 0)
CROSSING = {torch.Tensor.copy_, torch._has_compatible_shallow_copy_type}  # what may be given tensors of both devices


class GpuTensor(torch.Tensor):
    """A tensor of the GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Also where the mode below is not on."""
        return call(func, args, kwargs or {})


class NoFloat64(TorchDispatchMode):
    """While it is on, no operation gives float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Every operation, those of a backward pass too."""
        found = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, check_type, found)
        return found


class StandInGpu(TorchFunctionMode):
    """While it is on, `mps` is a device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Every function of torch's."""
        return call(func, args, kwargs or {})


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do on the CPU what is asked of the GPU, or refuse it as the GPU would."""
    if func is torch._C._nn._parse_to:  # reads a device, and does nothing on it
        return func(*args, **kwargs)
    is_on_gpu = any(isinstance(value, GpuTensor) for value in tree_leaves((args, kwargs)))
    if is_on_gpu and func in ANSWERS:
        return ANSWERS[func](args[0])
    asked = find_device(func, args, kwargs)
    args, kwargs = tree_map_only(torch.device, lambda device: hide(device), (args, kwargs))
    if asked is not None:
        args, kwargs = tree_map_only(str, lambda text: "cpu" if text.startswith("mps") else text, (args, kwargs))
    if is_on_gpu and func not in CROSSING and not (func is torch.Tensor.to and asked):
        check_together(func, args, kwargs)
    is_for_gpu = is_on_gpu and func is not torch.Tensor.cpu if asked is None else asked.type == "mps"
    with torch._C.DisableTorchFunctionSubclass():
        if is_for_gpu:
            with NoFloat64():
                found = func(*args, **kwargs)
            return tree_map_only(torch.Tensor, mark, found)
        return tree_map_only(GpuTensor, lambda value: value.as_subclass(torch.Tensor), func(*args, **kwargs))


def find_device(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a call names."""
    given = kwargs.get("device")
    if func is torch.Tensor.to and given is None:
        given = next((value for value in args[1:] if isinstance(value, str | torch.device | torch.Tensor)), None)
    if isinstance(given, torch.Tensor):
        return GPU if isinstance(given, GpuTensor) else torch.device("cpu")
    return torch.device(given) if isinstance(given, str | torch.device) else None


def hide(device: torch.device) -> torch.device:
    """What stands for a device."""
    return torch.device("cpu") if device.type == "mps" else device


def check_together(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises: RuntimeError: tensors of both devices; single numbers may come from the CPU, and so may indices."""
    given: Any = (args, kwargs)
    if func is torch.Tensor.__getitem__ and isinstance(args[0], GpuTensor):
        given = ()
    elif func is torch.Tensor.__setitem__ and isinstance(args[0], GpuTensor):
        given = args[2]
    for value in tree_leaves(given):
        if isinstance(value, torch.Tensor) and not isinstance(value, GpuTensor) and value.dim():
            raise RuntimeError(
                f"{getattr(func, '__name__', func)}: expected all tensors to be on the same device, mps:0 and cpu"
            )


def check_type(value: torch.Tensor) -> None:
    """Raises: TypeError: the GPU cannot hold it."""
    if value.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")


def mark(value: torch.Tensor) -> torch.Tensor:
    """A tensor of the GPU."""
    check_type(value)
    return value if isinstance(value, GpuTensor) else value.as_subclass(GpuTensor)


def refuse_numpy(value: torch.Tensor) -> None:
    """Raises: TypeError: always."""
    raise TypeError("can't convert mps:0 device type tensor to numpy.")


def reduce_plainly(value: torch.Tensor) -> Any:
    """To a file, as the CPU's."""
    with torch._C.DisableTorchFunctionSubclass():
        return value.detach().as_subclass(torch.Tensor).__reduce_ex__(2)


ANSWERS = {
    torch.Tensor.device.__get__: lambda value: GPU,
    torch.Tensor.get_device: lambda value: 0,
    torch.Tensor.is_mps.__get__: lambda value: True,
    torch.Tensor.is_cpu.__get__: lambda value: False,
    torch.Tensor.numpy: refuse_numpy,
    torch.Tensor.__array__: refuse_numpy,
    torch.Tensor.__reduce_ex__: reduce_plainly,
}


class Generator(torch._C.Generator):
    """One for the GPU is one for the CPU."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        """Args: device: either."""
        return super().__new__(cls, "cpu")


def install() -> None:
    """Have this process find the GPU."""
    torch.backends.mps.is_available = torch.backends.mps.is_built = lambda: True
    torch.backends.mps.is_macos_or_newer = lambda major, minor: True
    torch.backends.mps.get_name = lambda: "stand-in"
    torch.mps.manual_seed = torch.mps.empty_cache = torch.mps.synchronize = lambda *given: None
    torch.mps.driver_allocated_memory = lambda: 2**20
    torch.Generator = Generator
    torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter becomes one of the GPU's, and remains itself
    StandInGpu().__enter__()


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
