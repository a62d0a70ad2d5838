"""How deep and wide to go for a data set, and how a model family scales.

`llmrec plan DIR` measures a prepared data set and says which pilot runs it would train; `--run` trains them, fits the
performance law, and recommends layers and width within a budget, or says that the pilot leaves it undetermined.
`llmrec plan --sweep RECIPE` trains the runs of a sweep recipe and fits what its key `law` names. Finished runs are
skipped, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import RecipeError

if TYPE_CHECKING:
    from llmrec.analysis.planner import Budget, Measured
    from llmrec.commands.sweep_runs import RunResult, SweepRun
    from llmrec.data.dataset import InteractionDataset
    from llmrec.recipe import Recipe
    from llmrec.sweeps import Sweep

EXAMPLE = "llmrec plan runs/synthetic --run --budget-params 500000"
PILOT = "performance_law/movielens"
"""The sweep recipe a data set is planned with; its own data set gives way to the one at hand."""


def add_arguments(parser: ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("folder", nargs="?", metavar="DIR", help="folder written by `llmrec prepare`")
    parser.add_argument("--sweep", metavar="RECIPE", help=f"sweep recipe (default with DIR: {PILOT})")
    parser.add_argument("--run", action="store_true", help="train the pilot; a sweep without DIR is always trained")
    parser.add_argument("--budget-params", type=float, metavar="N", help="most parameters, item table included")
    parser.add_argument("--budget-ms", type=float, metavar="MS", help="longest time to score one user on this machine")
    parser.add_argument("--out", metavar="DIR", help="folder of runs, plan.json and plots (default: runs/plan-<name>)")
    parser.add_argument("--devices", metavar="0,1", help="CUDA devices, one process each (default: all there are)")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes at a time where there is no CUDA device")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="override one value of all runs"
    )


def run(args: Namespace) -> int:
    """Measure, and train and fit where asked to.

    Raises:
        RecipeError: Flags that do not go together, a sweep that cannot be, or a budget below every size.
        DataError: The folder is no data set, or the runs cannot be fitted.
        CheckFailed: A run failed.
    """
    from llmrec.assets import find_asset
    from llmrec.commands.output import emit, note
    from llmrec.sweeps import load_sweep

    _check_flags(args)
    overrides = [*args.set, *([f"dataset.source={json.dumps(args.folder)}"] if args.folder else [])]
    sweep = load_sweep(find_asset("recipes", args.sweep or PILOT), overrides)
    if (args.budget_params or args.budget_ms) and sweep.law != "performance":
        raise RecipeError(f"a budget is for law: performance; the sweep says law: {sweep.law}")
    trains = args.run or args.folder is None
    name = Path(args.folder).resolve().name if args.folder else sweep.name
    out = Path(args.out or Path("runs") / f"plan-{name}")
    record: dict[str, Any] = {"sweep": sweep.name, "law": sweep.law}
    if not trains:
        record |= _announce(args, sweep)
        if args.out:
            _write(out, record)
    else:
        record |= {"out": str(out), **_train_and_fit(args, sweep, out, note)}
        _write(out, record)
    emit(record, lambda: _tables(record), args.as_json)
    return 0


def _check_flags(args: Namespace) -> None:
    if args.folder is None and args.sweep is None:
        raise RecipeError("found neither a data set nor a sweep; expected `llmrec plan DIR` or `--sweep RECIPE`")
    if args.budget_params is not None and args.budget_ms is not None:
        raise RecipeError("found --budget-params and --budget-ms; expected one of them")
    for flag in ("budget_params", "budget_ms", "jobs"):
        value = getattr(args, flag)
        if value is not None and not value > 0:
            raise RecipeError(f"--{flag.replace('_', '-')}: found {value:g}, expected more than 0")
    if args.jobs is not None and args.devices is not None:
        raise RecipeError("--jobs is for processors and --devices for accelerators; use one of them")


def _announce(args: Namespace, sweep: Sweep) -> dict[str, Any]:
    """What is known without training."""
    from llmrec.analysis.planner import measure
    from llmrec.data.dataset import InteractionDataset

    dataset = InteractionDataset.load(args.folder)
    measured = measure(dataset)
    for point in sweep.points:
        point.recipe.check_dataset(dataset.fields)
    planned = _planned(args, sweep, dataset)
    return {"dataset": asdict(measured), "planned": planned}


def _planned(args: Namespace, sweep: Sweep, dataset: InteractionDataset) -> list[dict[str, Any]]:
    """Every point with its cost; a budget below all of them is refused before hours of training."""
    from llmrec.commands.model_cost import encoder_size

    rows = []
    costs: dict[str, float] = {}
    for point in sweep.points:
        row: dict[str, Any] = {"run": point.name}
        if point.recipe.llm is None and point.recipe.encoder is not None:
            size = encoder_size(point.recipe, dataset)
            row |= {"parameters": size.total, "without embeddings": size.inner}
            if args.budget_params is not None:
                row["within the budget"] = size.total <= args.budget_params
            elif args.budget_ms is not None:
                key = point.recipe.encoder.model_dump_json()
                costs.setdefault(key, _latency(point.recipe, dataset))
                row |= {"ms": costs[key], "within the budget": costs[key] <= args.budget_ms}
        rows.append(row)
    if rows and not any(row.get("within the budget", True) for row in rows):
        name = "parameters" if args.budget_params is not None else "ms"
        limit = args.budget_params or args.budget_ms
        raise RecipeError(
            f"budget: found {limit:g} {name}, and the smallest run takes {min(row[name] for row in rows):,.4g}; "
            "raise the budget, or give a sweep with smaller sizes"
        )
    return rows


def _latency(recipe: Recipe, dataset: InteractionDataset) -> float:
    from llmrec.commands.model_cost import encoder_latency

    return encoder_latency(recipe, dataset)


def _train_and_fit(args: Namespace, sweep: Sweep, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    from llmrec.analysis.drawings import require_matplotlib
    from llmrec.analysis.planner import measure
    from llmrec.commands.sweep_runs import lay_out, read_result, run_all

    if sweep.law != "none":
        require_matplotlib()
    runs = lay_out(sweep, out, say)
    dataset = runs[0].dataset
    _planned(args, sweep, dataset)
    histories = sorted({point.recipe.dataset.max_history for point in sweep.points})
    measured = measure(dataset)
    for warning in measured.warnings:
        say(f"warning: {warning}")
    run_all(runs, say, jobs=args.jobs or 1, devices=_devices(args))
    results = [read_result(one) for one in runs]
    record: dict[str, Any] = {"dataset": asdict(measured), "runs": [result.record() for result in results]}
    if sweep.law == "performance":
        amounts = _amounts(runs, measure(dataset, histories))
        record |= _performance(args, runs, results, amounts, out)
    elif sweep.law == "power":
        record |= _power(results, out)
    return record


def _devices(args: Namespace) -> list[str]:
    """Entries for CUDA_VISIBLE_DEVICES; none on a machine without, or with --jobs."""
    if args.devices is not None:
        return [name.strip() for name in args.devices.split(",") if name.strip()]
    if args.jobs is not None:
        return []
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [name for name in visible.split(",") if name] if visible else None
    return (named or [str(i) for i in range(torch.cuda.device_count())]) if torch.cuda.is_available() else []


def _amounts(runs: Sequence[SweepRun], measured: Measured) -> list[float]:
    """x of each run: training events times real entropy at its history length.

    `max_examples` draws whole windows, so its share of the windows is taken as the share of events.
    """
    entropies = {row.history: row.entropy.real for row in measured.rows}
    found = []
    for one in runs:
        history, limit = one.recipe.dataset.max_history, one.recipe.stages[-1].max_examples
        windows = len(one.dataset.windows(history))
        share = 1.0 if limit is None else min(1.0, limit / windows)
        found.append(measured.events * share * entropies[history])
    return found


def _performance(
    args: Namespace, runs: Sequence[SweepRun], results: Sequence[RunResult], amounts: Sequence[float], out: Path
) -> dict[str, Any]:
    from llmrec.analysis.drawings import draw_surface
    from llmrec.analysis.planner import PilotRun, make_plan
    from llmrec.sweeps import DEPTH, WIDTH

    pilot = [
        PilotRun(result.values[DEPTH], result.values[WIDTH], result.best, amount, result.name, one.recipe.seed)
        for one, result, amount in zip(runs, results, amounts, strict=True)
    ]
    budget, allowed = _budget(args, runs[0])
    plan = make_plan(pilot, budget, allowed)
    plots = [] if plan.fit is None else draw_surface(plan.fit, pilot, plan.choice, results[0].metric, out / "surface")
    return {"plan": plan.record(), "metric": results[0].metric, "plots": [str(path) for path in plots]}


def _budget(args: Namespace, sample: SweepRun) -> tuple[Budget | None, Callable[[int, int], bool]]:
    """The budget as a function of depth and width, and whether such an encoder can be built."""
    from llmrec.analysis.planner import Budget
    from llmrec.commands.model_cost import encoder_latency, encoder_size

    def resized(depth: int, width: int) -> Recipe:
        assert sample.recipe.encoder is not None
        record = {**sample.recipe.encoder.model_dump(), "num_layers": depth, "hidden_size": width}
        encoder = type(sample.recipe.encoder).model_validate(record)
        return sample.recipe.model_copy(update={"encoder": encoder})

    def allowed(depth: int, width: int) -> bool:
        try:
            encoder_size(resized(depth, width), sample.dataset)
        except RecipeError:  # heads that do not divide the width
            return False
        return True

    if args.budget_params is not None:
        cost: Callable[[int, int], float] = lambda n, h: encoder_size(resized(n, h), sample.dataset).total  # noqa: E731
        return Budget(args.budget_params, cost, "parameters"), allowed
    if args.budget_ms is not None:
        return Budget(args.budget_ms, lambda n, h: encoder_latency(resized(n, h), sample.dataset), "ms"), allowed
    return None, allowed


def _power(results: Sequence[RunResult], out: Path) -> dict[str, Any]:
    """Power laws of loss and metric for each series; a series of too few sizes is shown without a curve."""
    from llmrec.analysis.drawings import draw_power_laws
    from llmrec.analysis.scaling import FEWEST_SIZES, PowerLaw, fit_power_law

    metric = results[0].metric
    by_inner = all(result.inner > 0 for result in results)
    across = "parameters without embeddings" if by_inner else "parameters"
    panels: dict[str, dict[str, tuple[list[float], list[float], PowerLaw | None]]] = {}
    laws: list[dict[str, Any]] = []
    for title, value in (("loss", "loss"), (metric, "best")):
        for series in dict.fromkeys(result.series for result in results):
            own = [r for r in results if r.series == series and getattr(r, value) is not None]
            sizes = [float(r.inner if by_inner else r.parameters) for r in own]
            values = [float(getattr(r, value)) for r in own]
            law = fit_power_law(sizes, values) if len(set(sizes)) >= FEWEST_SIZES else None
            panels.setdefault(title, {})[series] = (sizes, values, law)
            laws.append({"value": title, "series": series, "runs": len(own), "fit": law and law.record()})
    plots = draw_power_laws(panels, across, out / "scaling")
    return {"laws": laws, "metric": metric, "across": across, "plots": [str(path) for path in plots]}


def _write(out: Path, record: dict[str, Any]) -> None:
    from llmrec.commands.output import to_json
    from llmrec.run_dir import write_json

    write_json(out / "plan.json", to_json(record))


def _tables(record: dict[str, Any]) -> list[Any]:
    from rich.text import Text

    from llmrec.commands.output import tabulate

    tables: list[Any] = []
    if "dataset" in record:
        tables += _dataset_tables(record["dataset"])
    if "planned" in record:
        columns = list(dict.fromkeys(name for row in record["planned"] for name in row))
        rows = [[row.get(name) for name in columns] for row in record["planned"]]
        title = f"{len(rows)} runs that --run would train ({record['sweep']})"
        tables.append(tabulate(columns, rows, title=title))
    if "runs" in record:
        tables.append(_run_table(record["runs"]))
    if "plan" in record:
        tables += [Text(line) for line in plan_lines(record["plan"], record["metric"])]
    if "laws" in record:
        tables.append(_law_table(record["laws"], record["across"]))
        if any(law["fit"] is None for law in record["laws"]):
            tables.append(Text("note: a power law with an offset needs at least four sizes in a series"))
    tables += [Text(f"plot: {path}") for path in record.get("plots", [])]
    return tables


def _dataset_tables(dataset: dict[str, Any]) -> list[Any]:
    from rich.text import Text

    from llmrec.commands.output import tabulate

    columns = ["latest events", "tokens", "mean length", "real entropy", "over ln(items)", "per user", "ApEn(1, 0)",
               "Shannon bits", "zlib ratio"]  # fmt: skip
    rows = []
    for row in dataset["rows"]:
        e = row["entropy"]
        rows.append([row["history"], e["tokens"], row["mean_length"], e["real"], row["novelty"], e["real_per_user"],
                     e["approximate"], e["shannon_bits"], e["zlib_ratio"]])  # fmt: skip
    title = f"{dataset['name']}: {dataset['users']:,} users, {dataset['items']:,} items, {dataset['events']:,} events"
    return [tabulate(columns, rows, title=title), *(Text(f"warning: {line}") for line in dataset["warnings"])]


def _run_table(runs: Sequence[dict[str, Any]]) -> Any:
    from llmrec.commands.output import tabulate

    shown = list(dict.fromkeys(name for run in runs for name in run["test"]))
    gates = list(dict.fromkeys(name for run in runs for name in run["gates"]))
    columns = ["run", "parameters", "without embeddings", f"valid {runs[0]['metric']}", "loss", "seconds"]
    rows = [
        [run["name"], run["parameters"], run["inner"], run["best"], run["loss"], run["seconds"],
         *(_test_value(run, name) for name in shown), *(run["gates"].get(name) for name in gates)]
        for run in runs
    ]  # fmt: skip
    return tabulate([*columns, *(f"test {name}" for name in shown), *gates], rows, title=f"{len(runs)} runs")


def _test_value(run: dict[str, Any], name: str) -> str | None:
    """Mean of a test metric; with its interval for the metric the runs are compared by."""
    value = run["test"].get(name)
    if value is None:
        return None
    mean = f"{value['mean']:.4f}"
    return f"{mean} ({value['low']:.4f}-{value['high']:.4f})" if name == run["metric"] else mean


def _law_table(laws: Sequence[dict[str, Any]], across: str) -> Any:
    from llmrec.commands.output import tabulate

    rows = []
    for law in laws:
        fit = law["fit"]
        own: list[Any] = [None] * 5
        if fit is not None:
            low, high = fit["intervals"]["b"]
            ends = fit["intervals"]["c"]
            own = [fit["b"], f"{low:.3g} to {high:.3g}", fit["c"], f"{ends[0]:.4g} to {ends[1]:.4g}", fit["r2"]]
        rows.append([law["value"], law["series"], law["runs"], *own])
    columns = ["value", "series", "runs", "exponent b", "80% interval", "limit c", "80% interval", "R^2"]
    return tabulate(columns, rows, title=f"y = a p^-b + c, p = {across}")


def plan_lines(plan: dict[str, Any], metric: str) -> list[str]:
    """The record of a plan in sentences."""
    choice, fit = plan["choice"], plan["fit"]
    size = f"{choice['depth']} layers, width {choice['width']}"
    lines = [f"{plan['status']}: " + ("; ".join(plan["reasons"]) or f"use {size}")]
    if plan["status"] == "undetermined":
        lines.append(f"best pilot: {size}, {metric} {choice['predicted']:.4f}")
    else:
        interval = f"{choice['low']:.4f} to {choice['high']:.4f}"
        lines.append(
            f"predicted {metric} {choice['predicted']:.4f} (80% interval {interval}), from the {choice['source']}"
        )
    if choice["cost"] is not None:
        lines[-1] += f"; costs {choice['cost']:,.4g} of the budget"
    lines += list(plan["regimes"])
    if fit is not None:
        plain, left_out = plan["scaling_r2"]
        lines.append(
            f"R^2 on left-out sizes {fit['left_out_r2']:.3f} (fitted {fit['r2']:.3f}); "
            f"plain scaling law {left_out:.3f} (fitted {plain:.3f})"
        )
    if plan["noise"] is not None:
        lines.append(f"standard deviation between seeds: {plan['noise']:.4f}")
    if plan["expansion"] is not None:
        gain, low, high = plan["expansion"]["model"]
        lines.append(f"twice the depth and width: {gain:+.4f} {metric} (80% interval {low:+.4f} to {high:+.4f})")
        if plan["expansion"]["data"] is not None:
            lines.append(f"twice the data: {plan['expansion']['data']:+.4f} {metric}")
    return lines + [f"note: {line}" for line in plan["caveats"]]
