"""Training: plan, runner, sampling of the prior, log Z during training, and the fit of the prior."""
