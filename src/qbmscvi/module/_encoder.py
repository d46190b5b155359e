"""scVI's encoder with spins as its output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qbmscvi.boltzmann.posterior import FactorialPosterior

if TYPE_CHECKING:
    from scvi.nn import Encoder

    from qbmscvi.boltzmann.smoothing import Smoothing


class BoltzmannEncoder(nn.Module):
    """scVI's encoder network with a head for the logits of spins.

    Parameters
    ----------
    host
        The encoder built by scVI, which provides the hidden layers.
    n_spins
        Number of spins.
    smoothing
        Relaxation of the spins in training.
    """

    def __init__(self, host: Encoder, n_spins: int, smoothing: Smoothing) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.encoder = host.encoder
        self.logit_encoder = nn.Linear(host.mean_encoder.in_features, n_spins)

    def forward(self, x: Tensor, *cat_list: Tensor) -> tuple[FactorialPosterior, Tensor]:
        """Return the posterior and the decoder's input for one draw: relaxed in training, hard otherwise."""
        logits = self.logit_encoder(self.encoder(x, *cat_list))
        # In the precision of the parameters; mixed precision computes in a lower one.
        qz = FactorialPosterior(logits.to(self.logit_encoder.weight.dtype), self.smoothing)
        z = qz.rsample() if self.training else self.z_transformation(qz.sample())
        return qz, z

    def z_transformation(self, s: Tensor) -> Tensor:
        """Convert hard spins to the decoder's input."""
        return self.smoothing.emit(s, torch.rand_like(s))

    def recover(self, zeta: Tensor) -> Tensor:
        """Undo :meth:`z_transformation`: hard spins."""
        return self.smoothing.recover(zeta)
