"""Defaults that docstrings, help texts, messages and pages state are those of the code."""

from __future__ import annotations

import ast
import inspect
import re
from fractions import Fraction
from typing import TYPE_CHECKING

from scvi.train import TrainingPlan
from tables import over
from test_signatures import CALLABLES, PAGES, ROOT

import qbmscvi
from qbmscvi.boltzmann.enumeration import MAX_ENUMERATED_SPINS
from qbmscvi.boltzmann.log_z import _MAX_ENUMERATED, _MAX_TREEWIDTH
from qbmscvi.boltzmann.prior import _TRACKING_SHARE
from qbmscvi.module._qbmscanvae import QBMSCANVAE
from qbmscvi.samplers import SamplerTraits, Vetted, build_kaiwu_sampler
from qbmscvi.train._plan import _PRIOR_LR_SHARE, QBMTrainingPlan, auto_kl_warmup
from qbmscvi.train._schedule import _MAX_STALENESS

if TYPE_CHECKING:
    from pathlib import Path

LITERAL = r"(\"[^\"]*\"|'[^']*'|-?\d[\d_]*(?:\.\d+)?(?:e-?\d+)?|None|True|False)"
STATED = re.compile(rf"\b[Dd]efaults?(?: of| is|:)? `*{LITERAL}")


def default(function: object, parameter: str) -> object:
    return inspect.signature(function).parameters[parameter].default


# What None in the signature stands for, in the order of the text.
RESOLVED = {"plan_kwargs": [default(QBMSCANVAE.loss, "classification_ratio")]}


def wrong_in_docstring(function: object, docstring: str) -> list[str]:
    """Parameters of a numpydoc docstring whose stated defaults are not those of the signature."""
    section = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[\w ]*\n-+\n|\Z)", docstring, re.MULTILINE | re.DOTALL)
    if section is None:
        return []
    parameters = inspect.signature(function).parameters
    wrong = []
    for names, text in re.findall(r"^(\w[^\n]*)\n((?:[ ]+[^\n]*\n|\n)*)", f"{section[1]}\n", re.MULTILINE):
        stated = [ast.literal_eval(value) for value in STATED.findall(" ".join(text.split()))]
        for name in filter(parameters.__contains__, names.split(", ")):
            value = parameters[name].default
            expected = RESOLVED.get(name) if value is None else [value]
            if stated and stated != expected:
                wrong.append(f"{name}: {stated} for {expected}")
    return wrong


def wrong_in_source(source: str) -> list[str]:
    """Arguments of commands, and parameters in messages, whose stated defaults are not those of the code."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            text = getattr(keywords.get("help"), "value", "")
            stated = re.search(r"\(default:? ([^()]+)\)", text) if isinstance(text, str) else None
            if stated is None:
                continue
            code = ast.unparse(keywords["default"]) if "default" in keywords else "None"
            # Without a default the text says in words what is done then, and not in numbers.
            is_right = (
                not re.fullmatch(LITERAL, stated[1]) if code == "None" else stated[1] in re.findall(r"[\w.]+", code)
            )
            if not is_right:
                wrong.append(f"{ast.unparse(node.args[0])}: {stated[1]} for {code}")
        elif isinstance(node, ast.FunctionDef):
            arguments = node.args
            values = [None] * (len(arguments.args) - len(arguments.defaults)) + [*arguments.defaults]
            of_name = {argument.arg: value for argument, value in zip(arguments.args, values, strict=True)}
            of_name |= {a.arg: value for a, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)}
            for message in filter(lambda inner: isinstance(inner, ast.JoinedStr), ast.walk(node)):
                text = "".join(part.value if isinstance(part, ast.Constant) else "…" for part in message.values)
                said = re.match(rf"`(\w+)`.*The default of {LITERAL}", text)
                if said and ast.unparse(of_name[said[1]]) != said[2]:
                    wrong.append(f"{said[1]}: {said[2]} for {ast.unparse(of_name[said[1]])}")
    return wrong


ORDINAL = {
    Fraction(1, 8): "one chain in eight",
    Fraction(1, 10): "tenth",
    Fraction(1, 40): "fortieth",
}
WARMUP = ORDINAL[Fraction(auto_kl_warmup(10_000), 10_000)]
PRIOR_RATE = ORDINAL[Fraction(_PRIOR_LR_SHARE).limit_denominator(100)]
NUMBER = {2: "two", 4: "four", 20: "twenty"}
schedule = qbmscvi.SamplingSchedule()
# What pages say of the code's numbers, with these filled in.
CLAIMS = [
    ("README.md", f"at most {MAX_ENUMERATED_SPINS} spins in the smaller layer"),
    ("docs/model.md", f'| `"{default(qbmscvi.QBMSCVI, "smoothing")}"` (default) |'),
    ("docs/model.md", f"at most {_MAX_ENUMERATED} spins have to be enumerated"),
    ("docs/model.md", f"treewidth of the graph is at most {_MAX_TREEWIDTH}."),
    ("docs/model.md", f"in use above {default(qbmscvi.QBMSCVI.get_active_units, 'threshold')}."),
    ("docs/model.md", f"does on {ORDINAL[Fraction(1, _TRACKING_SHARE)]}."),
    (
        "docs/model.md",
        f"after the first {WARMUP} of all steps, not after {default(TrainingPlan, 'n_epochs_kl_warmup')} epochs",
    ),
    (
        "docs/model.md",
        f"learning rate is {default(QBMTrainingPlan, 'lr')} instead of {default(TrainingPlan, 'lr')}",
    ),
    (
        "docs/model.md",
        f"Adam's `eps` is {default(QBMTrainingPlan, 'eps'):.0e} instead of {default(TrainingPlan, 'eps')}".replace(
            "e-0", "e-"
        ),
    ),
    ("docs/model.md", f"learns at a {PRIOR_RATE} of the networks'"),
    ("docs/settings.md", f"by default a {PRIOR_RATE} of `lr`"),
    ("docs/settings.md", f'`"{default(QBMTrainingPlan, "n_epochs_kl_warmup")}"` is the first {WARMUP} of the steps'),
    ("docs/samplers.md", f"older than `max_staleness` steps: {_MAX_STALENESS}, and without limit"),
    ("docs/samplers.md", f"off by more than a factor of {NUMBER[int(default(Vetted, 'max_ratio'))]},"),
    ("docs/dwave.md", f"the default `SamplingSchedule(latency={schedule.latency})`"),
    ("docs/kaiwu.md", f"lifts the limit of {_MAX_STALENESS} steps"),
    ("docs/kaiwu.md", f"`Retrying` ({NUMBER[default(build_kaiwu_sampler, 'n_attempts')]} calls in all)"),
    ("docs/benchmark.md", f"all scVI's {default(TrainingPlan, 'n_epochs_kl_warmup')} epochs"),
]
SAID_OF_DEFAULTS = re.compile(rf"`[^`\n]+`[^.|`]{{0,14}}\bdefaults?\b|\bdefaults?\b[^.|`]{{0,20}}(?:`[^`]+`|{LITERAL})")
# Sentences that `SAID_OF_DEFAULTS` takes for a claim, and that are none.
NO_CLAIMS = ("own KL warm-up; `default`",)


def prose(text: str) -> str:
    return " ".join(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).split())


def unlisted_claims(text: str, listed: list[str]) -> list[str]:
    """Defaults that a page states and that `CLAIMS` does not know."""
    for claim in (*listed, *NO_CLAIMS):
        text = text.replace(claim, " … ")
    return [found.group() for found in SAID_OF_DEFAULTS.finditer(text)]


@over("name", sorted(CALLABLES))
def test_docstring_states_the_defaults_of_the_signature(name: str) -> None:
    assert wrong_in_docstring(CALLABLES[name], inspect.getdoc(CALLABLES[name]) or "") == []


@over("path", sorted((ROOT / "src").rglob("*.py")))
def test_help_and_messages_state_the_defaults_of_the_code(path: Path) -> None:
    assert wrong_in_source(path.read_text()) == []


@over(("page", "claim"), CLAIMS)
def test_page_states_the_number_of_the_code(page: str, claim: str) -> None:
    assert claim in prose((ROOT / page).read_text())


@over("page", PAGES)
def test_no_page_states_a_default_that_is_not_compared(page: Path) -> None:
    listed = [claim for name, claim in CLAIMS if ROOT / name == page]
    assert unlisted_claims(prose(page.read_text()), listed) == []


def test_default_sampler_is_marked_in_the_table_of_samplers() -> None:
    rows = [row.split("|") for row in (ROOT / "docs" / "samplers.md").read_text().splitlines() if row.startswith("| `")]
    marked = [row[1].strip() for row in rows if len(row) > 4 and row[4].strip() == "default"]
    assert marked == [f'`"{default(QBMTrainingPlan, "sampler")}"`']


def test_no_trait_is_missing_in_the_table_of_traits() -> None:
    text = (ROOT / "docs" / "extending.md").read_text()
    named = set(re.findall(r"^\| `(\w+)", text, re.MULTILINE))
    assert set(inspect.signature(SamplerTraits).parameters) - named == UNNAMED_TRAITS
    assert named <= set(inspect.signature(SamplerTraits).parameters)


UNNAMED_TRAITS: set[str] = set()


def test_planted_mistakes_are_found() -> None:
    def own(plan_kwargs: dict | None = None, scale: float = 1e-3) -> None: ...

    (ratio,) = RESOLVED["plan_kwargs"]
    entries = f"plan_kwargs\n    Ratio, by\n    default {ratio}.\nscale\n    Width (default 0.001).\n"
    right = f"A.\n\nParameters\n----------\n{entries}"
    assert wrong_in_docstring(own, right) == []
    assert wrong_in_docstring(own, right.replace(f"{ratio}.", "7.")) == [f"plan_kwargs: [7] for [{ratio}]"]
    assert wrong_in_docstring(own, right.replace("0.001", "0.01")) == ["scale: [0.01] for [0.001]"]

    command = "parser.add_argument('--seeds', type=int, default=5, help='number (default 5)')"
    assert wrong_in_source(command) == []
    assert wrong_in_source(command.replace("(default 5)", "(default 3)")) == ["'--seeds': 3 for 5"]
    assert wrong_in_source(command.replace("default=5, ", "")) == ["'--seeds': 5 for None"]
    message = "def f(bins=50):\n    msg = f'`bins` is {bins}. The default of 50 suits most.'"
    assert wrong_in_source(message) == []
    assert wrong_in_source(message.replace("of 50", "of 40")) == ["bins: 40 for 50"]

    page = prose((ROOT / "docs" / "model.md").read_text())
    listed = [claim for name, claim in CLAIMS if name == "docs/model.md"]
    assert len(listed) > 5
    assert unlisted_claims(page.replace('`"straight-through"` (default)', '`"other"` (default)'), listed) != []
    assert unlisted_claims(f"{page} By default 512 chains.", listed) == ["default 512"]
