"""A limit on the cost of a sampler."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qbmscvi.exceptions import BudgetExceeded
from qbmscvi.samplers.wrappers._wrapper import Wrapper, pass_on

if TYPE_CHECKING:
    from qbmscvi.samplers._contract import Draw, Sampler, SamplingRequest


class Budgeted(Wrapper):
    """Refuse requests beyond a budget, before they reach the child.

    Parameters
    ----------
    child
        The wrapped sampler.
    n_calls, n_samples
        Total number of trips to the child, and of samples; None for no limit.
    device_seconds
        Total device time, as the child reports it in ``info["device_seconds"]``; without a report, the time of its
        calls. The call that passes the limit is answered; the next is refused.
    """

    def __init__(
        self,
        child: Sampler,
        *,
        n_calls: int | None = None,
        n_samples: int | None = None,
        device_seconds: float | None = None,
    ) -> None:
        super().__init__(child)
        self.limits = {"n_calls": n_calls, "n_samples": n_samples, "device_seconds": device_seconds}
        if all(limit is None for limit in self.limits.values()):
            msg = "A budget needs a limit: set n_calls, n_samples or device_seconds."
            raise ValueError(msg)
        self.spent = {"n_calls": 0, "n_samples": 0, "device_seconds": 0.0}

    def state_dict(self) -> dict[str, Any]:
        """What is spent."""
        return {**super().state_dict(), "spent": dict(self.spent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the amounts spent."""
        super().load_state_dict(state)
        self.spent = dict(state["spent"])

    def _sample_batch(self, requests: list[SamplingRequest], seeds: list[int]) -> list[Draw]:
        asked = [replace(request, seed=seed) for request, seed in zip(requests, seeds, strict=True)]
        price = {"n_calls": 1, "n_samples": sum(request.n_samples for request in asked), "device_seconds": 0.0}
        for name, limit in self.limits.items():
            is_spent = limit is not None and (
                self.spent[name] + price[name] > limit or (name == "device_seconds" and self.spent[name] >= limit)
            )
            if is_spent:
                msg = (
                    f"The budget of {name}={limit:g} for {self.child.name} is spent ({self.spent[name]:g} used, "
                    f"{price[name]:g} more requested). Raise it, or let training continue with local samples."
                )
                raise BudgetExceeded(msg)
        # A call that fails may still cost something, so it is charged before it is made.
        self.spent["n_calls"] += 1
        self.spent["n_samples"] += price["n_samples"]
        batches = self.child.sample_batch(asked)
        self.spent["device_seconds"] += sum(
            batch.info.get("device_seconds", batch.info["seconds"]) for batch in batches
        )
        return [pass_on(batch, spent=dict(self.spent)) for batch in batches]
