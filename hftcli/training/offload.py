"""AdamW on the host: float32 masters and moments of what trains live in host memory; the device holds rounded weights.

For one process. A gradient leaves the device as soon as the backward pass has made it: it is copied into page-locked memory
beside the computation and added up on the host in float32, so the device never holds more than a few of them. A step updates
the masters with torch's fused AdamW for CPUs and copies their rounding back. What trains is so updated exactly as by AdamW
with float32 masters on the device; only the gradient of each micro-batch has the device's rounding.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch

from hftcli.freezing.budget import IN_FLIGHT_BYTES

Masters = dict[torch.nn.Parameter, torch.nn.Parameter]


def copy_master(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """A parameter's values in float32, in host memory."""
    return torch.nn.Parameter(parameter.detach().to("cpu", torch.float32, copy=True))


def make_masters(model: torch.nn.Module, dtype: torch.dtype) -> Masters:
    """Take what trains to a data type for the device, after a copy of it that loses nothing."""
    masters = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            masters[parameter] = copy_master(parameter)
            parameter.data = parameter.data.to(dtype)
    return masters


class HostAdamW(torch.optim.AdamW):
    """AdamW over masters on the host, for parameters on a device.

    Args:
        parameters: what trains, in any floating-point type; or groups of it, as torch's optimizers take them.
        masters: what `make_masters` gave, where the parameters are its rounding; by default they are copied.
        options: those of torch's AdamW.

    Attributes:
        masters: the float32 weights by the parameter that is their rounding.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]], masters: Masters | None = None,
        **options: Any,
    ):  # fmt: skip
        given = list(parameters)
        groups = [group for group in given if isinstance(group, dict)]
        if not groups:
            groups = [{"params": given}]
        self.masters: Masters = {} if masters is None else masters
        held: list[dict[str, Any]] = []
        for group in groups:
            own = list(group["params"])
            for parameter in own:
                if parameter not in self.masters:
                    self.masters[parameter] = copy_master(parameter)
            held.append({**group, "params": [self.masters[parameter] for parameter in own]})
        super().__init__(held, **{**options, "fused": True})
        first = next(iter(self.masters))
        self.stream = torch.cuda.Stream(first.device) if first.is_cuda else None
        self.ferries = {parameter: _Ferry(parameter, master) for parameter, master in self.masters.items()}
        self.waiting: deque[_Ferry] = deque()
        self.handles = [parameter.register_post_accumulate_grad_hook(self._take) for parameter in self.masters]

    @property
    def host_bytes(self) -> int:
        """Bytes of masters, gradients, moments and page-locked memory, once a step has been taken."""
        return sum(16 * master.numel() + self.ferries[parameter].buffer.nbytes for parameter, master in self.masters.items())

    @torch.no_grad()
    def _take(self, parameter: torch.nn.Parameter) -> None:
        """Send a gradient to the host; the device is rid of it."""
        ferry = self.ferries[parameter]
        if ferry in self.waiting:  # of the micro-batch before
            self._land(ferry)
        assert parameter.grad is not None  # the hook runs when it has been made
        ferry.send(parameter.grad, self.stream)
        self.waiting.append(ferry)
        parameter.grad = None
        while sum(waiting.buffer.nbytes for waiting in self.waiting if not waiting.is_here()) > IN_FLIGHT_BYTES:
            next(waiting for waiting in self.waiting if not waiting.is_here()).wait()

    def _land(self, ferry: "_Ferry") -> None:
        ferry.land()
        self.waiting.remove(ferry)

    def collect(self) -> None:
        """Have every gradient that was sent in the masters' `grad`."""
        while self.waiting:
            self.waiting.popleft().land()

    @torch.no_grad()
    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients to a norm of at most `max_norm` in all; gives the norm that they had."""
        self.collect()
        return torch.nn.utils.clip_grad_norm_(list(self.masters.values()), max_norm)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the masters, have the device's weights be their rounding, and forget the gradients."""
        self.collect()
        super().step()
        self.zero_grad()  # the trainer's own reaches the device alone
        for parameter, ferry in self.ferries.items():
            ferry.bring(parameter, self.stream)
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

    def close(self) -> None:
        """Let the parameters keep their gradients again."""
        for handle in self.handles:
            handle.remove()


class _Ferry:
    """The way of one parameter's gradient to the host, and of its weights back."""

    def __init__(self, parameter: torch.nn.Parameter, master: torch.nn.Parameter):
        self.master = master
        self.buffer = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)
        self.total = torch.empty(parameter.shape, dtype=torch.float32)  # kept: fresh memory would come page by page
        self.sent: torch.cuda.Event | None = None

    def send(self, gradient: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        if stream is None:
            self.buffer.copy_(gradient)
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.buffer.copy_(gradient, non_blocking=True)
            self.sent = torch.cuda.Event()
            self.sent.record()
        gradient.record_stream(stream)

    def is_here(self) -> bool:
        return self.sent is None or self.sent.query()

    def wait(self) -> None:
        if self.sent is not None:
            self.sent.synchronize()

    def land(self) -> None:
        """Add what was sent to the master's gradient."""
        self.wait()
        if self.master.grad is None:
            self.master.grad = self.total.copy_(self.buffer)
        else:
            self.master.grad.add_(self.buffer)
        self.sent = None

    def bring(self, parameter: torch.nn.Parameter, stream: torch.cuda.Stream | None) -> None:
        """Copy the master's rounding to the device."""
        self.buffer.copy_(self.master)
        if stream is None:
            parameter.copy_(self.buffer)
            return
        with torch.cuda.stream(stream):
            parameter.copy_(self.buffer, non_blocking=True)
