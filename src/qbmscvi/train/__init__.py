"""Training: the plan, its runner, when the prior is sampled, log Z on the way, and the fit of the prior."""
