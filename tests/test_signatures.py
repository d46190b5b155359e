"""Names and arguments are the same in code, docstrings, pages and notebooks; for defaults see test_defaults.py."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from pathlib import Path

import lightning.pytorch
import scvi
from test_site import MODULES, public_names

from qbmscvi.module._qbmscanvae import QBMSCANVAE
from qbmscvi.module._qbmvae import QBMVAE
from qbmscvi.train._plan import QBMTrainingPlan

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))


def public_callables() -> dict[str, object]:
    """Public functions and classes, and their public methods, by dotted name."""
    found = {}
    for module in MODULES:
        loaded = importlib.import_module(module)
        for name in public_names(module):
            value = getattr(loaded, name)
            if not callable(value):
                continue
            found[f"{module}.{name}"] = value
            if inspect.isclass(value):
                for member, method in inspect.getmembers(value, inspect.isroutine):
                    owner = next((base for base in value.__mro__ if member in vars(base)), None)
                    if not member.startswith("_") and owner and owner.__module__.startswith("qbmscvi"):
                        found[f"{module}.{name}.{member}"] = method
    return found


CALLABLES = public_callables()


def documented_parameters(docstring: str) -> list[str]:
    """Names in the section "Parameters" of a numpydoc docstring."""
    section = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[\w ]*\n-+\n|\Z)", docstring, re.MULTILINE | re.DOTALL)
    lines = section.group(1).splitlines() if section else []
    return [name.strip() for line in lines if line and not line[0].isspace() for name in line.split(",")]


def unknown_parameters(function: object, docstring: str) -> list[str]:
    """Documented parameters that a function without ``**kwargs`` does not take."""
    documented = documented_parameters(docstring)
    parameters = inspect.signature(function).parameters if documented else {}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []
    return [name for name in documented if name not in parameters]


def test_documented_parameters_are_those_of_the_signature() -> None:
    found = {name: unknown_parameters(value, inspect.getdoc(value) or "") for name, value in CALLABLES.items()}
    assert {name: unknown for name, unknown in found.items() if unknown} == {}


def sources() -> list[tuple[str, str]]:
    """Python of pages and notebooks, also what cannot run here, by a name for messages."""
    found = []
    for page in PAGES:
        text = page.read_text()
        found += [
            (page.name, code) for code in re.findall(r"^```python[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        ]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        found += [(page.name, code) for code in re.findall(r"`([A-Za-z_][\w.]*\([^`]*\))`", prose)]
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text())["cells"]
        found += [(notebook.name, "".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]
    return found


def calls(code: str) -> list[tuple[str, list[str]]]:
    """Last name and keywords of every call; keys of ``plan_kwargs={...}`` count as keywords of a call of that name."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return []  # an ellipsis in prose
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            found.append((name, [keyword.arg for keyword in node.keywords if keyword.arg]))
        if isinstance(node, ast.keyword) and node.arg == "plan_kwargs" and isinstance(node.value, ast.Dict):
            found.append((node.arg, [ast.literal_eval(key) for key in node.value.keys if key]))
    return found


# Names that scanpy or an example has as well.
AMBIGUOUS = {"embedding", "Service", "complete"}
# Where other keywords go, and what takes them there; elsewhere `**kwargs` takes any.
PASSED_ON = {
    "QBMSCVI": (QBMVAE,),
    "QBMSCANVI": (QBMSCANVAE, QBMVAE),
    "train": (
        scvi.model.SCVI.train,
        scvi.model.SCANVI.train,
        scvi.train.Trainer,
        lightning.pytorch.Trainer,
        lightning.pytorch.Trainer.fit,
    ),
    "plan_kwargs": (QBMTrainingPlan, scvi.train.TrainingPlan, QBMSCANVAE.loss),
}
BY_LAST_NAME: dict[str, list[object]] = {}
for _name, _value in CALLABLES.items():
    BY_LAST_NAME.setdefault(_name.rsplit(".", 1)[-1], []).append(_value)


def refused_keywords(code: str) -> list[str]:
    """Keywords of calls that no public function of that name takes."""
    refused = []
    for name, keywords in calls(code):
        passed_on = PASSED_ON.get(name, ())
        candidates = [*BY_LAST_NAME.get(name, []), *passed_on]
        if not candidates or name in AMBIGUOUS:
            continue
        accepted: set[str] = set()
        for candidate in candidates:
            if inspect.isclass(candidate) and issubclass(candidate, Exception):
                continue  # takes a message
            parameters = inspect.signature(candidate).parameters.values()
            takes_any = not passed_on and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
            accepted |= {p.name for p in parameters} | (set(keywords) if takes_any else set())
        refused += [f"{name}({keyword}=)" for keyword in keywords if keyword not in accepted]
    return refused


def test_pages_and_notebooks_use_arguments_that_exist() -> None:
    assert [(place, bad) for place, code in sources() for bad in refused_keywords(code)] == []


def words() -> list[tuple[str, str]]:
    """Code of pages and notebooks, and what their prose has in backticks, by a name for messages."""
    found = sources()
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        found += [(page.name, span) for span in re.findall(r"`([^`\n]+)`", prose)]
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text())["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        found += [(notebook.name, span) for text in texts for span in re.findall(r"`([^`\n]+)`", text)]
    return found


def resolves(value: object, parts: list[str]) -> bool:
    for part in parts:
        fields = getattr(value, "__dataclass_fields__", {})
        if hasattr(value, part) or part in fields:
            value = getattr(value, part, None)
            continue
        try:
            value = importlib.import_module(f"{value.__name__}.{part}")  # type: ignore[attr-defined]
        except (ModuleNotFoundError, AttributeError):
            return False
    return True


def missing_names(code: str) -> list[str]:
    """Names that start with the package or with a public class, and lead nowhere."""
    missing = []
    for dotted in re.findall(r"(?<![\w./-])(?:qbmscvi|[A-Z]\w*)(?:\.[a-zA-Z_]\w*)+", code):
        first, *others = dotted.split(".")
        for root in [importlib.import_module("qbmscvi")] if first == "qbmscvi" else BY_LAST_NAME.get(first, []):
            if not resolves(root, others):
                missing.append(dotted)
    methods = re.findall(r"(?<!\w)((?:(?:get|update|sample|setup)_|from_\w*scvi)\w+)\(", code)
    return missing + [name for name in methods if name not in BY_LAST_NAME and not hasattr(scvi.model.SCVI, name)]


def test_pages_and_notebooks_use_names_that_exist() -> None:
    found = [(place, missing) for place, code in words() for missing in missing_names(code)]
    assert [pair for pair in found if pair not in OTHERS] == []
    assert set(OTHERS) <= set(found)


# Methods of other packages.
OTHERS = [("batch_integration.ipynb", "get_results")]


def test_planted_mistakes_are_found() -> None:
    assert refused_keywords("qbmscvi.SamplingSchedule(n_sweep=3)") == ["SamplingSchedule(n_sweep=)"]
    assert refused_keywords("SamplingSchedule(n_sweeps=3)") == []
    assert refused_keywords("QBMSCVI(adata, n_layer=2, n_layers=2, n_chains=3)") == ["QBMSCVI(n_layer=)"]
    assert refused_keywords("model.train(epochs=3, max_epochs=3, accelerator='cpu')") == ["train(epochs=)"]
    assert refused_keywords("model.train(plan_kwargs={'lr': 1e-3, 'rate': 1e-3})") == ["plan_kwargs(rate=)"]
    assert missing_names("see qbmscvi.samplers.Sampler, qbmscvi.pl.matrix") == ["qbmscvi.pl.matrix"]
    assert missing_names("SamplingSchedule.latency, SamplingSchedule.lag") == ["SamplingSchedule.lag"]
    assert missing_names("get_elbo(), get_evidence()") == ["get_evidence"]
    assert documented_parameters(
        "A.\n\nParameters\n----------\na, b\n    Two.\nc\n    One.\n\nReturns\n-------\nX."
    ) == [
        "a",
        "b",
        "c",
    ]
    entries = "A.\n\nParameters\n----------\npages, names\n    Two.\n"
    assert unknown_parameters(lambda names: None, entries) == ["pages"]
    assert unknown_parameters(lambda **kwargs: None, entries) == []
    assert len(CALLABLES) > 150
    assert sum(bool(documented_parameters(inspect.getdoc(value) or "")) for value in CALLABLES.values()) > 80
