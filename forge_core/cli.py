"""The command line: forge-core check | train | evaluate | export."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from forge_core import __version__
from forge_core.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from forge_core.train.check import CheckReport

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Domain fine-tuning of language models without catastrophic forgetting. Recipes: docs/recipe.md.",
)
_out = Console()
_err = Console(stderr=True)
_show_traceback = False

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe file (YAML)", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="options of the recipe to change, for example training.max_steps=5 for a cheap rehearsal, or lora=null",
        show_default=False,
    ),
]


def main() -> None:
    """Run the command line; errors that a user can mend are one clear line and exit code 1 (usage errors: 2)."""
    try:
        app()
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        if _show_traceback:
            raise
        _err.print(f"error: {_message(error)}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def _message(error: Exception) -> str:
    expected = isinstance(error, ValueError | OSError) or type(error).__module__.startswith("forge_core")
    return str(error) if expected else f"{type(error).__name__}: {error} (forge-core --traceback shows where)"


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="show where an error came from")] = False,
) -> None:
    """Global options."""
    global _show_traceback
    _show_traceback = traceback
    if version:
        _out.print(__version__, highlight=False)
        raise typer.Exit


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Validate a recipe, its model and all its data; spends no compute on the model."""
    options = load_recipe(recipe, overrides or ())
    from forge_core.train.check import check as check_recipe

    with _err.status("reading") as status:
        report = check_recipe(options, progress=lambda name: status.update(f"reading {name}"))
    _print_report(options, report)


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier run in output_dir")] = False,
) -> None:
    """Train; metrics, checkpoints and the result go to the recipe's output_dir."""
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other")
    options = load_recipe(recipe, overrides or ())
    from forge_core.train import train as run

    try:
        run(options, resume=resume, overwrite=overwrite, console=_out)
    except KeyboardInterrupt:
        _err.print("stopped; the same command with --resume goes on from the newest checkpoint", highlight=False)
        raise typer.Exit(130) from None


@app.command()
def evaluate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    adapter: Annotated[
        Path | None, typer.Option(help="PEFT adapter folder to measure beside the base", show_default=False)
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="tuned model folder (full rank) to measure beside the base", show_default=False)
    ] = None,
    to: Annotated[Path | None, typer.Option(help="write the results, predictions included, as JSON")] = None,
) -> None:
    """Measure the base model, and with --adapter or --model the tuned one, on the recipe's evaluation sets."""
    if adapter and model:
        raise typer.BadParameter("--adapter and --model exclude each other")
    options = load_recipe(recipe, overrides or ())
    from forge_core import atomic
    from forge_core.evaluate import compare_with_base, forgetting_summary, without_predictions

    with _err.status("loading") as status:
        results = compare_with_base(options, adapter=adapter, model=model, progress=status.update)
    numbers = {who: without_predictions(result) for who, result in results.items()}
    _out.print(_results_table(numbers))
    if "tuned" in numbers:
        for sentence in forgetting_summary(numbers["base"], numbers["tuned"]):
            _out.print(sentence, markup=False, highlight=False, soft_wrap=True)
    if to:
        atomic.write_text(to, json.dumps(results, ensure_ascii=False, indent=1) + "\n")


@app.command()
def export(
    recipe: RecipeFile,
    overrides: Overrides = None,
    to: Annotated[Path, typer.Option(help="folder to create", show_default=False)] = ...,  # type: ignore[assignment]
    merge: Annotated[bool, typer.Option("--merge", help="a whole model with the adapter merged in")] = False,
) -> None:
    """Write a finished run's result as a folder that transformers, PEFT and vLLM load."""
    options = load_recipe(recipe, overrides or ())
    from forge_core.train.export import export as write

    _out.print(f"Wrote {write(options, to, merge=merge)}", markup=False, highlight=False, soft_wrap=True)


def _print_report(recipe: Recipe, report: "CheckReport") -> None:
    options = recipe.training
    table = Table(title="Training data")
    columns = ("source", "part", "samples", "tokens", "loss tokens", "target share", "of the loss", "epochs", "notes")
    for column in columns:
        table.add_column(column, justify="left" if column in ("source", "part", "notes") else "right")
    loss_tokens = sum(row.loss_tokens_needed for row in report.rows)
    for row in report.rows:
        source = row.source
        numbers = [f"{len(source.store):,}", f"{source.tokens:,}", f"{source.loss_tokens:,}"]
        shares = [f"{100 * share:.2f} %" for share in (source.share, row.loss_tokens_needed / loss_tokens)]
        table.add_row(source.name, source.role, *numbers, *shares, f"{row.epochs:.2f}", row.notes)
    _out.print(table)
    if report.sets:
        table = Table("set", "kind", "role", "samples", title="Evaluation")
        for item in report.sets:
            table.add_row(item.options.name, item.options.kind, item.options.role, f"{item.samples:,}")
        _out.print(table)
    step_tokens = options.packs_per_step * recipe.data.max_length
    how = f"full rank: all {report.parameters:,} parameters are trained"
    if recipe.lora is not None:
        how = (
            f"LoRA r {recipe.lora.rank}, alpha {recipe.lora.alpha:g}: {report.trained_parameters:,} trained parameters "
            f"on {report.parameters:,} frozen ones"
        )
    lines = [
        f"{recipe.technique}, {how}",
        f"{options.max_steps} steps of {options.packs_per_step} packs of {recipe.data.max_length} tokens: up to "
        f"{step_tokens:,} tokens a step, {options.max_steps * step_tokens:,} in all",
        f"learning rate {options.learning_rate:g}: warmup {options.warmup_steps}, constant {options.constant_steps}, "
        f"{options.decay} decay to {options.min_lr:g}",
        f"target shares count {recipe.data.share_of}; 'of the loss': the share of the loss tokens that follows",
    ]
    for line in lines:
        _out.print(line, markup=False, highlight=False, soft_wrap=True)
    for warning in report.warnings:
        _out.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    _out.print("The recipe is valid.", style="green")


def _results_table(results: dict[str, dict[str, dict[str, Any]]]) -> Table:
    table = Table("set", "role", "measure", *results, title="Evaluation")
    for name, about in results["base"].items():
        measure, write = (
            ("loss (perplexity)", lambda r: f"{r['nll']:.4f} ({r['perplexity']:.2f})")
            if about["kind"] == "loss"
            else ("exact match", lambda r: f"{100 * r['accuracy']:.1f} % ({r['correct']}/{r['total']})")
        )
        table.add_row(name, about["role"], measure, *(write(result[name]) for result in results.values()))
    return table


if __name__ == "__main__":
    main()
