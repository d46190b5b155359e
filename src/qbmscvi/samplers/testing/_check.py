"""The contract of a sampler, checked on small problems in one call."""

from __future__ import annotations

import io
import math
import pickle
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from qbmscvi.boltzmann.ising import IsingModel
from qbmscvi.exceptions import GraphMismatchError, QBMSCVIError
from qbmscvi.samplers import Sampler, SamplingRequest
from qbmscvi.samplers.annealers._dimod import as_sampler
from qbmscvi.samplers.testing._comparison import ALPHA, MIN_SAMPLES, compare_with_boltzmann
from qbmscvi.samplers.testing._problems import tiny_problems
from qbmscvi.samplers.testing._report import Failure, Report, SamplerCheckError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qbmscvi.boltzmann.ising import SampleBatch
    from qbmscvi.samplers.testing._comparison import Verdict

_N_CONTRACT = 200  # samples of the requests that test the contract, not the distribution
_MAX_ORDER_Z = 5.0


def check_sampler(
    sampler: Sampler,
    *,
    betas: Sequence[float] = (0.3, 1.0, 2.0),
    n_samples: int = 5_000,
    seed: int = 0,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
) -> Report:
    r"""Check a sampler against the contract of :class:`~qbmscvi.samplers.Sampler`.

    On each of :func:`tiny_problems` and in each precision:

    - ``answers``: no exception; spins int8, -1 or +1, of shape ``(n_samples, n_spins)``;
    - ``energies``: they agree with the energies of the problem in float64;
    - ``seeds``: equal seeds give equal samples bit for bit; for ``target="boltzmann"`` different seeds give different
      samples. Remote samplers are exempt;
    - ``state``: after :meth:`~qbmscvi.samplers.Sampler.load_state_dict` the sampler repeats the answers that followed
      the state, which holds only plain values and tensors. Remote samplers are exempt, and samplers that break
      ``seeds``;
    - ``random state``: torch's, numpy's and Python's global streams stay as they were;
    - ``requests``: problems and chain states of a request are not modified;
    - ``order``: several requests in one batch are answered in order;
    - ``distribution``: for ``target="boltzmann"`` samples pass :func:`compare_with_boltzmann` at every ``beta``. For
      ``"approximate"`` the report has the comparison and the total variation distance, but no result counts as a
      failure. For ``"ground_state"`` nothing is compared.

    All distribution tests of one call together have :math:`\alpha = 10^{-4}` (Bonferroni), so a correct sampler fails
    once in 10,000 seeds. With 5,000 samples these faults fail: couplings of the wrong sign, a missing coupling, a
    temperature off by 10 %, spins in the wrong order.

    Parameters
    ----------
    sampler
        Sampler to check. The requests have ``n_sweeps=None``, so that it chooses the length of its runs. Wrappers that
        learn from answers, such as ``Calibrated``, break ``seeds`` by design.
    betas
        Inverse temperatures.
    n_samples
        Samples per case of the distribution test, each taken as the end of an independent chain.
    seed
        First of the seeds of the requests.
    dtypes
        Precisions of the problems.

    Returns
    -------
    The report, if the sampler keeps the contract.

    Raises
    ------
    SamplerCheckError
        If a rule is broken. The message lists all of them; ``error.report`` has the details.
    TypeError
        If ``sampler`` is no sampler, or a class instead of an instance.
    ValueError
        If ``n_samples`` is below 100, or there are no ``betas`` or ``dtypes``.

    Examples
    --------
    >>> from qbmscvi.samplers import ExactSampler
    >>> check_sampler(ExactSampler(), betas=(1.0,)).has_passed
    True
    """
    sampler = as_sampler(sampler)
    if n_samples < MIN_SAMPLES or not len(betas) or not len(dtypes):
        msg = (
            f"n_samples={n_samples}, betas={tuple(betas)}, dtypes={tuple(dtypes)}: at least {MIN_SAMPLES} samples, "
            "one temperature and one precision are needed."
        )
        raise ValueError(msg)
    examination = _Examination(sampler, seed)
    cases: dict[str, IsingModel] = {}
    for dtype in dtypes:
        for name, problem in tiny_problems(dtype).items():
            try:
                sampler.check(problem)
            except GraphMismatchError as error:
                examination.skipped[name] = str(error)
            else:
                cases[f"{name}, {str(dtype).removeprefix('torch.')}"] = problem
    for case, problem in cases.items():
        examination.check_contract(case, problem)
    if cases:
        examination.check_order(list(cases.values()))
    else:
        examination.fail("answers", "all problems", "the sampler takes none of them")
    if sampler.traits.target != "ground_state":
        alpha = ALPHA / max(1, len(cases) * len(betas))
        for case, problem in cases.items():
            for beta in betas:
                examination.check_distribution(f"{case}, beta={beta:g}", problem, beta, n_samples, alpha)
    report = examination.report()
    if not report.has_passed:
        listed = "\n".join(f"- {failure}" for failure in report.failures)
        msg = f"{report.sampler} breaks the contract of a sampler in {len(report.failures)} cases:\n{listed}"
        raise SamplerCheckError(msg, report)
    return report


class _Examination:
    """Calls a sampler, checks every call, and collects the findings."""

    def __init__(self, sampler: Sampler, seed: int) -> None:
        self.sampler = sampler
        self.seed = seed
        self.failures: dict[tuple[str, str], Failure] = {}
        self.skipped: dict[str, str] = {}
        self.verdicts: dict[str, Verdict] = {}

    def report(self) -> Report:
        return Report(
            self.sampler.name, self.sampler.traits.target, self.verdicts, tuple(self.failures.values()), self.skipped
        )

    def fail(self, rule: str, case: str, reason: str) -> None:
        self.failures.setdefault((rule, case), Failure(rule, case, reason))

    def next_seed(self) -> int:
        self.seed += 1
        return self.seed - 1

    def ask(self, case: str, *requests: SamplingRequest) -> list[SampleBatch] | None:
        """Request samples once, with copies of the requests; None if there is no valid answer."""
        before = _global_state()
        copies = [_copy(request) for request in requests]
        try:
            batches = self.sampler.sample_batch(list(copies))
        except QBMSCVIError as error:
            self.fail("answers", case, f"raised {type(error).__name__}: {error}")
            return None
        touched = [name for name, state in _global_state().items() if not np.array_equal(state, before[name])]
        if touched:
            self.fail("random state", case, f"the global stream of {' and '.join(touched)} was used or seeded")
        for request, copied in zip(requests, copies, strict=True):
            after, due = _tensors(copied), _tensors(request)
            changed = [name for name in due if not torch.equal(after[name], due[name])]
            if changed:
                self.fail("requests", case, f"{', '.join(changed)} of the request was modified")
        are_sound = [self._is_sound(case, *pair) for pair in zip(requests, batches, strict=True)]
        return batches if all(are_sound) else None

    def _is_sound(self, case: str, request: SamplingRequest, batch: SampleBatch) -> bool:
        expected = (request.n_samples, request.problem.n_spins)
        if tuple(batch.spins.shape) != expected or batch.spins.dtype != torch.int8:
            found = f"{batch.spins.dtype} of shape {tuple(batch.spins.shape)}"
            self.fail("answers", case, f"spins are {found}; torch.int8 of shape {expected} is required")
            return False
        if not bool((batch.spins.abs() == 1).all()):
            self.fail("answers", case, "spins have values other than -1 and +1")
            return False
        problem = request.problem.to("cpu", torch.float64)
        tolerance = 1e-4 if request.problem.h.dtype == torch.float32 else 1e-9
        due = problem.energy(batch.spins.cpu())
        if batch.energies.shape != due.shape or not torch.allclose(
            batch.energies.cpu().double(), due, rtol=tolerance, atol=tolerance
        ):
            self.fail("energies", case, "energies are not those of the spins under the requested problem")
        return True

    def check_contract(self, case: str, problem: IsingModel) -> None:
        traits = self.sampler.traits
        request = SamplingRequest(problem, _N_CONTRACT, seed=self.next_seed())
        first = self.ask(case, request)
        if first is None:
            return
        if traits.is_persistent:
            self.ask(case, replace(request, initial_spins=first[0].spins, seed=self.next_seed()))
        if traits.is_remote:
            return
        again = self.ask(case, request)
        other = self.ask(case, replace(request, seed=self.next_seed()))
        if again is not None and not torch.equal(first[0].spins, again[0].spins):
            self.fail("seeds", case, "two calls with the same seed gave different samples")
        elif again is not None:
            initial_spins = first[0].spins if traits.is_persistent else None
            self.check_state(case, replace(request, initial_spins=initial_spins))
        if other is not None and traits.target == "boltzmann" and torch.equal(first[0].spins, other[0].spins):
            self.fail("seeds", case, "two calls with different seeds gave the same samples")

    def check_state(self, case: str, request: SamplingRequest) -> None:
        """Request samples, then others, restore the earlier state, and repeat the first request."""
        file = io.BytesIO()
        torch.save(self.sampler.state_dict(), file)
        file.seek(0)
        try:
            state = torch.load(file, weights_only=True)
        except pickle.UnpicklingError as error:
            self.fail("state", case, f"the state holds more than plain values and tensors: {error}")
            return
        due = self.ask(case, request)
        self.ask(case, replace(request, seed=self.next_seed()))
        self.sampler.load_state_dict(state)
        found = self.ask(case, request)
        if due is not None and found is not None and not torch.equal(due[0].spins, found[0].spins):
            self.fail("state", case, "the same state led to another answer: the state lacks something")

    def check_order(self, problems: list[IsingModel]) -> None:
        """Three requests of one shape with spins in different directions, and a fourth of another shape."""
        problem, case = problems[0], "several requests in one batch"
        node = torch.arange(problem.n_spins)
        signs = [torch.ones(problem.n_spins), 1.0 - 2.0 * (node % 2), 1.0 - 2.0 * (node // 2 % 2)]
        fields = [0.5 * sign.to(problem.h) for sign in signs]
        aligned = [IsingModel(h, torch.zeros_like(problem.J), problem.graph) for h in fields]
        sizes = [_N_CONTRACT] * 3 + [_N_CONTRACT // 2]
        requests = [
            SamplingRequest(asked, n, seed=self.next_seed())
            for asked, n in zip([*aligned, problems[-1]], sizes, strict=True)
        ]
        batches = self.ask(case, *requests)
        if batches is None:
            return
        for k, batch in enumerate(batches[:3]):
            for other in (1, 2):
                # Only an answer that fits another request better breaks this rule; a poor sampler does not.
                excess = batch.spins.cpu().double() @ (fields[(k + other) % 3] - fields[k]).cpu().double()
                if float(excess.mean()) < -_MAX_ORDER_Z * float(excess.std()) / math.sqrt(len(excess)):
                    self.fail("order", case, f"answer {k + 1} fits another request better than its own")

    def check_distribution(self, case: str, problem: IsingModel, beta: float, n_samples: int, alpha: float) -> None:
        request = SamplingRequest(problem, n_samples, beta, seed=self.next_seed())
        batches = self.ask(case, request)
        if batches is None:
            return
        is_due = self.sampler.traits.target == "boltzmann"
        try:
            verdict = compare_with_boltzmann(problem, batches[0], beta)
        except ValueError as error:
            if is_due:
                self.fail("distribution", case, str(error))
            return
        self.verdicts[case] = verdict
        if is_due and verdict.p_value < alpha:
            self.fail("distribution", case, str(verdict))


def _global_state() -> dict[str, np.ndarray]:
    """States of the global random streams, as arrays that can be compared."""
    _, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state().numpy(),
        "numpy": np.array([*keys, position, has_gauss, gauss]),
        "Python": np.array([*random.getstate()[1]]),
    }


def _tensors(request: SamplingRequest) -> dict[str, torch.Tensor]:
    problem = request.problem
    named = {"h": problem.h, "J": problem.J, "initial_spins": request.initial_spins}
    return {name: value for name, value in named.items() if value is not None}


def _copy(request: SamplingRequest) -> SamplingRequest:
    """Copy a request with all its tensors, so that a sampler cannot change the original."""
    tensors = {name: value.clone() for name, value in _tensors(request).items()}
    initial_spins = tensors.pop("initial_spins", None)
    return replace(request, problem=replace(request.problem, **tensors), initial_spins=initial_spins)
