"""What `mkdocs build` draws and fills in: figures and tables from the library itself."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np

import fastlr
from fastlr import plots, schedules

DOCS = Path(__file__).parent
GENERATED = DOCS / "generated"

# What stands beside the pictures, by the names in the pages.
DRAWN: dict[str, str] = {}

# One picture for each schedule; several where a setting changes the shape.
SHOWN = {
    "Constant": ["Constant(1e-3)", "Constant(1e-3).warmup(100)"],
    "TimeBased": ["TimeBased(1e-3, 1e-4)", "TimeBased(1e-3, 1e-3)"],
    "InverseTime": ["InverseTime(1e-3, 0.01)", "InverseTime(1e-3, 0.01, 50)"],
    "StepDecay": ["StepDecay(1e-3, 0.5, 100)"],
    "MultiStep": ["MultiStep(1e-3, (100, 300), 0.3)"],
    "Exponential": ["Exponential(1e-3, half_life=100)", "Exponential(1e-3, half_life=100, every=50)"],
    "Linear": ["Linear(1e-3, 1e-4, 400)"],
    "Polynomial": ["Polynomial(1e-3, 400, 2.0)", "Polynomial(1e-3, 100, 2.0, cycle=True)"],
    "Cosine": ["Cosine(1e-3, 400)", "Cosine(1e-3, 350, end=1e-4).warmup(50)"],
    "CosineRestarts": ["CosineRestarts(1e-3, 60, growth=2)", "CosineRestarts(1e-3, 60, decay=0.7)"],
    "OneCycle": ["OneCycle(1e-3, 400)", "OneCycle(1e-3, 400, phases=3, shape='linear')"],
    "Cyclic": ["Cyclic(1e-4, 1e-3, 50)", "Cyclic(1e-4, 1e-3, 50, mode='triangular2')"],
    "InverseSqrt": ["InverseSqrt(1e-3, 50)"],
    "WarmupStableDecay": ["WarmupStableDecay(1e-3, 400, warmup_steps=40, decay_steps=100)"],
    "SlantedTriangular": ["SlantedTriangular(1e-3, 400)"],
    "Piecewise": ["Piecewise((100, 250), (1e-3, 5e-4, 1e-4))"],
    "Interpolated": ["Interpolated((100, 250), (1e-4, 1e-3, 2e-4))"],
    "Plateau": ["Plateau(Cosine(1e-3, 400))"],
}


def figures_of_schedules() -> str:
    """A section for each schedule: what it is, and a picture."""
    assert set(SHOWN) == set(plots.named()), set(SHOWN) ^ set(plots.named())
    out = []
    for name, expressions in SHOWN.items():
        n = np.arange(0, 500)
        curves = {e: (n, plots.parse(e)(n)) for e in expressions}
        plots.draw(curves, GENERATED / f"{name}.svg", xlabel="step", ylabel="value")
        first = (getattr(schedules, name).__doc__ or "").split("\n\n")[0]
        out.append(f"## {name}\n\n{' '.join(first.split())}\n\n![{name}](generated/{name}.svg)\n")
    return "\n".join(out)


def digits() -> tuple[dict[str, np.ndarray], Any]:
    """A softmax regression on scikit-learn's digits: its parameters, and a function of them over random batches."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    rng = np.random.default_rng(0)
    params = {"w": (0.01 * rng.standard_normal((64, 10))).astype(np.float32), "b": np.zeros(10, np.float32)}

    def fun(p: Any) -> tuple[float, dict[str, np.ndarray]]:
        batch = rng.integers(0, len(x), 64)
        z = x[batch] @ p["w"] + p["b"]
        d = np.exp(z - z.max(1, keepdims=True))
        d /= d.sum(1, keepdims=True)
        loss = -float(np.log(d[np.arange(64), y[batch]] + 1e-30).mean())
        d[np.arange(64), y[batch]] -= 1
        return loss, {"w": x[batch].T @ d / 64, "b": d.mean(0)}

    return params, fun


def range_test() -> str:
    """The range test's picture and words."""
    params, fun = digits()
    found = fastlr.find_lr(fastlr.SGD(params, momentum=0.9, backend="numpy"), fun, 1e-4, 300.0, 150)
    found.plot(GENERATED / "range_test.svg")
    return f"`{found!r}`"


def convergence() -> None:
    """Loss over steps on a quadratic, for rates and for what bears too high a rate."""
    curvature = np.array([1.0, 25.0])
    schedule = schedules.Cosine(0.1, steps=100)
    ways: dict[str, Any] = {
        "SGD, 0.001: too low": (fastlr.SGD, {"lr": 0.001}),
        "SGD, 0.04: good": (fastlr.SGD, {"lr": 0.04}),
        "SGD, 0.081: too high": (fastlr.SGD, {"lr": 0.081}),
        "SGD, cosine from 0.1": (fastlr.SGD, {"lr": schedule}),
        "SGD, momentum 0.9, 0.04": (fastlr.SGD, {"lr": 0.04, "momentum": 0.9}),
        "Adam, 0.3": (fastlr.Adam, {"lr": 0.3}),
        "Adam, cosine from 0.3": (fastlr.Adam, {"lr": 3 * schedule}),
        "Prodigy": (fastlr.Prodigy, {}),
    }
    curves = {}
    for name, (make, settings) in ways.items():
        w = np.array([3.0, 2.0])
        opt = make(w, backend="numpy", **settings)
        losses = []
        for _ in range(101):
            losses.append(max(float(np.sum(curvature * w**2) / 2), 1e-12))
            opt.step(curvature * w)
        curves[name] = np.arange(101), np.minimum(np.array(losses), 1e4)
    plots.draw(curves, GENERATED / "convergence.svg", xlabel="step", ylabel="loss", yscale="log")


def found() -> None:
    """The rates that rules find by themselves on the digits."""
    curves = {}
    for name, make in (("DoG", fastlr.DoG), ("Prodigy", fastlr.Prodigy)):
        params, fun = digits()
        opt = make(params, backend="numpy")
        rates = [float(opt.step(fun(params)[1]).lr) for _ in range(400)]
        curves[name] = np.arange(len(rates)), np.array(rates)
    plots.draw(curves, GENERATED / "found.svg", xlabel="step", ylabel="rate", yscale="log")


def line_searches() -> str:
    """Calls and steps beside SciPy's."""
    from scipy import optimize

    scale = np.arange(1.0, 51)
    problems = {
        "Rosenbrock, 2": (lambda p: (optimize.rosen(p), optimize.rosen_der(p)), np.array([-1.2, 1.0])),
        "Rosenbrock, 20": (lambda p: (optimize.rosen(p), optimize.rosen_der(p)), np.tile([-1.2, 1.0], 10)),
        "quadratic, 50": (lambda p: (float(p @ (scale * p)) / 2, scale * p), np.linspace(-3, 4, 50)),
    }
    lines = []
    for name, (fun, start) in problems.items():
        calls = []

        def counted(p: Any, fun: Any = fun, calls: list = calls) -> Any:
            calls.append(1)
            return fun(p)

        info = fastlr.LBFGS(start.copy()).minimize(counted, grad_tolerance=1e-6)
        theirs = optimize.minimize(fun, start, jac=True, method="L-BFGS-B", options={"gtol": 1e-6, "ftol": 0})
        lines.append(f"| {name} | {len(calls)}, {info.step} | {theirs.nfev}, {theirs.nit} |")
    return "\n".join(lines)


def rules() -> str:
    """A row for each optimizer: what it computes, and where that stands."""
    lines = ["| optimizer | update | source |", "|---|---|---|"]
    for name in sorted(fastlr.optimizers.__all__):
        doc = inspect.cleandoc(getattr(fastlr, name).__doc__ or "")
        formula = " ".join(doc.split("\n\n")[1].split()).rstrip(".").replace("`", "")
        source = " ".join(doc.split("Source: ")[1].split("\n\n")[0].split()).rstrip(".")
        lines.append(f"| `{name}` | `{formula}` | {source} |")
    return "\n".join(lines)


def _entry(module: Any, name: str) -> str:
    """A name in the reference, read where it is defined: the kernels stand in a folder of their own."""
    thing, called = getattr(module, name), f"{module.__name__}.{name}"
    if not hasattr(thing, "__module__") or isinstance(thing, fastlr.rule):
        return f"::: {called}"
    path = (
        f"{thing.__module__}.{thing.__qualname__}".removeprefix("fastlr.")
        if ".kernels." in thing.__module__
        else called
    )
    return f"::: {path}\n    options:\n      heading: {called}\n      toc_label: {name}"


def _entries(module: Any, names: list[str]) -> str:
    return "\n\n".join(_entry(module, name) for name in names)


def on_pre_build(config: Any) -> None:
    """Draw what pages show as pictures, before MkDocs collects its files."""
    GENERATED.mkdir(exist_ok=True)
    convergence()
    found()
    DRAWN.update(figures_of_schedules=figures_of_schedules(), range_test=range_test())


def on_page_markdown(markdown: str, **unused: Any) -> str:
    """Fill in what is generated."""
    parts = {
        **{name: (lambda text=text: text) for name, text in DRAWN.items()},
        "line_searches": line_searches,
        "rules": rules,
        "optimizers": lambda: _entries(fastlr, ["Optimizer", *fastlr.optimizers.__all__]),
        "schedules": lambda: _entries(schedules, schedules.__all__),
        "others": lambda: _entries(
            fastlr,
            [
                n
                for n in fastlr.__all__
                if n not in ("Optimizer", "__version__", "bench", "rule", "schedules", *fastlr.optimizers.__all__)
            ],
        ),
    }
    for name, make in parts.items():
        if "{{ " + name + " }}" in markdown:
            markdown = markdown.replace("{{ " + name + " }}", make())
    return markdown
