r"""Checks for samplers, also of other packages: small problems with known answers, and the contract in one call.

>>> from qbmscvi.samplers import ExactSampler
>>> from qbmscvi.samplers.testing import check_sampler
>>> report = check_sampler(ExactSampler())

Samples are compared with enumeration in float64. Draws of one request are treated as independent chains. The checks
test the distribution of their end states, at the length of run that the sampler chooses. They do not test time series,
effective sample sizes of single chains, GPU problems, or problems beyond enumeration.
"""

from __future__ import annotations

import io
import math
import pickle
import random
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats

from qbmscvi.boltzmann import graphs
from qbmscvi.boltzmann.enumeration import all_states, exact_moments
from qbmscvi.boltzmann.ising import IsingModel, SampleBatch
from qbmscvi.exceptions import GraphMismatchError, QBMSCVIError
from qbmscvi.samplers import Sampler, SamplingRequest
from qbmscvi.samplers.annealers._dimod import as_sampler

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "Failure",
    "Report",
    "SamplerCheckError",
    "Verdict",
    "assert_boltzmann",
    "check_sampler",
    "compare_with_boltzmann",
    "tiny_problems",
]

ALPHA = 1e-4
MAX_TABLE_SPINS = 12

_MIN_SAMPLES = 100  # below, the normal approximation of the mean energy is not worth a p-value
# Least expected number of (effective) samples in a merged cell. At 10 the tail of Pearson's chi-square is right down to
# 1e-4 within a factor of 1.5 (simulated, 15 to 850 cells).
_MIN_EXPECTED = 10
_N_CONTRACT = 200  # samples of the requests that test the contract, not the distribution
_MAX_ORDER_Z = 5.0


class SamplerCheckError(QBMSCVIError, AssertionError):
    """A sampler breaks the contract; ``report`` is the report of :func:`check_sampler`."""

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


# Problems ----------------------------------------------------------------------------------------------------------


def tiny_problems(dtype: torch.dtype = torch.float64) -> dict[str, IsingModel]:
    """Three small problems, by name, whose distribution can be enumerated.

    They are complete bipartite with layers of 3 and 5 spins, complete with 6 spins, and sparse. The sparse problem has
    12 qubits of the Chimera graph, or without ``dwave-networkx`` a ring of 9 spins with chords. Every field and
    coupling has a random sign and a size between 0.15 and 0.45. A test would notice if one were lost, and single-spin
    chains still forget a uniform start within 30 sweeps at ``beta = 2`` (total variation below 1e-3).
    """
    chords = [(i, (i + 1) % 9) for i in range(9)] + [(0, 2), (3, 7), (4, 8), (1, 5)]
    has_chimera = find_spec("dwave_networkx") is not None
    sparse = graphs.hardware("chimera", 12) if has_chimera else graphs.Graph(9, np.array(chords), "chorded ring")
    return {
        "bipartite-3x5": _draw_problem(graphs.bipartite(3, 5), 11, dtype),
        "complete-6": _draw_problem(graphs.complete(6), 12, dtype),
        "chimera-12" if has_chimera else "chorded-ring-9": _draw_problem(sparse, 10 if has_chimera else 3, dtype),
    }


def _draw_problem(graph: graphs.Graph, seed: int, dtype: torch.dtype) -> IsingModel:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.tensor(rng.uniform(0.15, 0.45, shape) * rng.choice([-1.0, 1.0], shape), dtype=dtype)

    h, J = draw(graph.n_nodes), draw(graph.n_edges)
    return IsingModel(h, J, graph, 0.25)


# The distribution
# -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Comparison of samples with a Boltzmann distribution.

    Parameters
    ----------
    moments
        p-value of the worst of all ``<s_i>`` and ``<s_i s_j>``, corrected for their number.
    energy
        p-value of the mean energy.
    cells
        p-value of the distribution over all states; None beyond 12 spins.
    worst_moment
        Name of the worst moment.
    distance
        Total variation distance between the samples and this distribution; None beyond 12 spins.
    distance_by_chance
        Mean distance of as many independent draws from the distribution itself.
    """

    moments: float
    energy: float
    cells: float | None
    worst_moment: str
    distance: float | None = None
    distance_by_chance: float | None = None

    @property
    def p_value(self) -> float:
        """Smallest of the p-values, corrected for their number."""
        p_values = [p for p in (self.moments, self.energy, self.cells) if p is not None]
        return min(1.0, len(p_values) * min(p_values))

    def __str__(self) -> str:
        cells = "" if self.cells is None else f", all states {self.cells:.1g}"
        distance = "" if self.distance is None else f"; distance {self.distance:.3f}, {self.distance_by_chance:.3f} due"
        return (
            f"p = {self.p_value:.1g} (moments {self.moments:.1g} at {self.worst_moment}, energy {self.energy:.1g}"
            f"{cells}{distance})"
        )


def compare_with_boltzmann(problem: IsingModel, batch: SampleBatch, beta: float) -> Verdict:
    r"""Compare samples with :math:`\exp(-\beta E)/Z`, taking them as independent.

    There are three tests. Every mean spin and every pair product is a binomial count with an exact two-sided p-value
    (Bonferroni over all :math:`n (n + 1) / 2`). The mean energy, sufficient for :math:`\beta`, has a z-score. Up to 12
    spins, Pearson's chi-square covers all states; the least likely states are merged until each cell expects 10
    samples.

    Parameters
    ----------
    problem
        Requested problem; enumerated, see :func:`~qbmscvi.boltzmann.enumeration.exact_moments`.
    batch
        Samples of it, spins of shape ``(n_samples, n_spins)``.
    beta
        Requested inverse temperature.

    Raises
    ------
    ValueError
        If there are fewer than 100 samples, or they have another number of spins than the problem.
    GraphMismatchError
        If the problem is too large to enumerate.
    """
    if batch.spins.shape[1:] != (problem.n_spins,):
        msg = f"The samples have shape {tuple(batch.spins.shape)}, the problem {problem.n_spins} spins."
        raise ValueError(msg)
    if batch.n_samples < _MIN_SAMPLES:
        msg = f"A verdict needs at least {_MIN_SAMPLES} samples, but there are {batch.n_samples}. Ask for more samples."
        raise ValueError(msg)
    problem = problem.to("cpu", torch.float64)
    spins = batch.spins.cpu().double()
    energies = problem.energy(spins).numpy()
    spins = spins.numpy().astype(np.int64)
    n_spins = problem.n_spins

    mean, second = (moment.numpy() for moment in exact_moments(problem, beta))
    i, j = np.triu_indices(n_spins, k=1)
    edges = problem.graph.edges
    mean_energy = float(
        problem.offset + problem.h.numpy() @ mean + problem.J.numpy() @ second[edges[:, 0], edges[:, 1]]
    )
    # One column per quantity: rates of up spins and of equal pairs.
    rates = np.clip(0.5 * (1.0 + np.concatenate([mean, second[i, j]])), 0.0, 1.0)
    hits = np.concatenate([spins > 0, spins[:, i] == spins[:, j]], axis=1)  # (n_samples, n_moments)
    p_moments = _binomial_p_values(hits.sum(0), batch.n_samples, rates)
    worst = int(p_moments.argmin())
    name = f"<s_{worst}>" if worst < n_spins else f"<s_{i[worst - n_spins]} s_{j[worst - n_spins]}>"

    p_cells = distance = by_chance = None
    energy_scale = float(energies.std())
    if n_spins <= MAX_TABLE_SPINS:
        table_energies = problem.energy(all_states(n_spins))
        law = torch.softmax(-beta * table_energies, 0).numpy()
        energy_scale = math.sqrt(law @ np.square(table_energies.numpy() - mean_energy))
        rows = ((spins + 1) // 2) @ (1 << np.arange(n_spins - 1, -1, -1))  # row of `all_states`
        counts = np.bincount(rows, minlength=len(law))
        p_cells = _cell_p_value(counts, law)
        distance = 0.5 * float(np.abs(counts / batch.n_samples - law).sum())
        by_chance = _mean_distance(law, batch.n_samples)
    if energy_scale > 0:
        z = (energies.mean() - mean_energy) / energy_scale * math.sqrt(batch.n_samples)
        p_energy = float(2.0 * stats.norm.sf(abs(z)))
    else:  # all samples at one energy: moments and cells judge
        p_energy = 1.0
    p_moment = min(1.0, len(p_moments) * float(p_moments[worst]))
    return Verdict(p_moment, p_energy, p_cells, name, distance, by_chance)


def assert_boltzmann(problem: IsingModel, batch: SampleBatch, beta: float, *, alpha: float = ALPHA) -> None:
    """Raise if samples do not follow the Boltzmann distribution of a problem.

    Parameters
    ----------
    problem, batch, beta
        As in :func:`compare_with_boltzmann`, which describes the tests.
    alpha
        Probability that correct samples fail, over all tests together.

    Raises
    ------
    SamplerCheckError
        If the p-value is below ``alpha``. It is an :class:`AssertionError`, too.
    ValueError, GraphMismatchError
        As :func:`compare_with_boltzmann`.
    """
    verdict = compare_with_boltzmann(problem, batch, beta)
    if verdict.p_value < alpha:
        msg = f"The samples do not follow the Boltzmann distribution at beta={beta:g}: {verdict}."
        raise SamplerCheckError(msg)


def _binomial_p_values(counts: np.ndarray, n: int, rates: np.ndarray) -> np.ndarray:
    """Two-sided and exact."""
    tails = np.minimum(stats.binom.cdf(counts, n, rates), stats.binom.sf(counts - 1, n, rates))
    return np.minimum(1.0, 2.0 * tails)


def _cell_p_value(counts: np.ndarray, law: np.ndarray) -> float:
    """p-value of the distribution over states, rare ones merged into cells."""
    n_samples = counts.sum()
    cell, n_cells, filled = np.empty(len(law), dtype=np.int64), 0, 0.0
    for state in np.argsort(law, kind="stable"):
        cell[state] = n_cells
        filled += n_samples * law[state]
        if filled >= _MIN_EXPECTED:
            n_cells, filled = n_cells + 1, 0.0
    cell = np.minimum(cell, n_cells - 1)  # the remainder joins the last cell, which holds the likeliest states
    if n_cells < 2:
        return 1.0
    due = n_samples * np.bincount(cell, law, n_cells)
    chi_square = (np.square(np.bincount(cell, counts, n_cells) - due) / due).sum()
    return float(stats.chi2.sf(chi_square, n_cells - 1))


def _mean_distance(law: np.ndarray, n: int) -> float:
    """Mean total variation distance of ``n`` draws to their distribution (De Moivre, per cell)."""
    m = np.floor(n * law) + 1.0
    return float((m * (1.0 - law) * stats.binom.pmf(m, n, law)).sum() / n)


# The contract ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """A rule that a sampler breaks, the case in which it does, and how."""

    law: str
    case: str
    reason: str

    def __str__(self) -> str:
        return f"{self.law} ({self.case}): {self.reason}"


@dataclass(frozen=True)
class Report:
    """Outcome of :func:`check_sampler`.

    Parameters
    ----------
    sampler
        Name of the sampler.
    target
        Its ``traits.target``.
    verdicts
        Comparison with the Boltzmann distribution by case, e.g. ``"complete-6, beta=1, float32"``; empty for a sampler
        of ground states.
    failures
        Broken rules.
    skipped
        Problems that the sampler refused, with its reason.
    """

    sampler: str
    target: str
    verdicts: dict[str, Verdict]
    failures: tuple[Failure, ...]
    skipped: dict[str, str]

    @property
    def has_passed(self) -> bool:
        """Whether no rule is broken."""
        return not self.failures

    @property
    def distances(self) -> dict[str, float]:
        """Total variation distance to the Boltzmann distribution, by case."""
        return {case: verdict.distance for case, verdict in self.verdicts.items() if verdict.distance is not None}

    def __str__(self) -> str:
        verdict = "keeps the contract" if self.has_passed else f"breaks the contract in {len(self.failures)} cases"
        lines = [f"{self.sampler} (target: {self.target}) {verdict}"]
        lines += [f"- {failure}" for failure in self.failures]
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"{case}: {verdict}" for case, verdict in self.verdicts.items()]
        return "\n".join(lines)


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
    if n_samples < _MIN_SAMPLES or not len(betas) or not len(dtypes):
        msg = (
            f"n_samples={n_samples}, betas={tuple(betas)}, dtypes={tuple(dtypes)}: at least {_MIN_SAMPLES} samples, "
            "one temperature and one precision are needed."
        )
        raise ValueError(msg)
    examination = _Examination(sampler, seed)
    cases = []
    for dtype in dtypes:
        for name, problem in tiny_problems(dtype).items():
            try:
                sampler.check(problem)
            except GraphMismatchError as error:
                examination.skipped[name] = str(error)
            else:
                cases.append((f"{name}, {str(dtype).removeprefix('torch.')}", problem))
    if not cases:
        examination.fail("answers", "all problems", "the sampler takes none of them")
    for case, problem in cases:
        examination.check_contract(case, problem)
    if cases:
        examination.check_order([problem for _, problem in cases])
    if sampler.traits.target != "ground_state":
        alpha = ALPHA / max(1, len(cases) * len(betas))
        for case, problem in cases:
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

    def fail(self, law: str, case: str, reason: str) -> None:
        self.failures.setdefault((law, case), Failure(law, case, reason))

    def next_seed(self) -> int:
        self.seed += 1
        return self.seed - 1

    def ask(self, case: str, *requests: SamplingRequest) -> list[SampleBatch] | None:
        """Request samples once; None if there is no valid answer."""
        before = _global_state()
        originals = [_copy(request) for request in requests]
        try:
            batches = self.sampler.sample_batch(list(requests))
        except QBMSCVIError as error:
            self.fail("answers", case, f"raised {type(error).__name__}: {error}")
            return None
        touched = [name for name, state in _global_state().items() if not np.array_equal(state, before[name])]
        if touched:
            self.fail("random state", case, f"the global stream of {' and '.join(touched)} was used or seeded")
        for request, original in zip(requests, originals, strict=True):
            after, due = _tensors(request), _tensors(original)
            changed = [name for name in due if not torch.equal(after[name], due[name])]
            if changed:
                self.fail("requests", case, f"{', '.join(changed)} of the request was modified")
        are_sound = [self._is_sound(case, *pair) for pair in zip(originals, batches, strict=True)]
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
        first = self.ask(case, _copy(request))
        if first is None:
            return
        if traits.is_persistent:
            self.ask(case, _copy(replace(request, initial_spins=first[0].spins, seed=self.next_seed())))
        if traits.is_remote:
            return
        again = self.ask(case, _copy(request))
        other = self.ask(case, _copy(replace(request, seed=self.next_seed())))
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
        due = self.ask(case, _copy(request))
        self.ask(case, _copy(replace(request, seed=self.next_seed())))
        self.sampler.load_state_dict(state)
        found = self.ask(case, _copy(request))
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
        batches = self.ask(case, _copy(request))
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
