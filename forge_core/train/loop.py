"""The training loop: packs in, optimizer steps out, every step a function of the recipe and the data alone."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from forge_core import atomic
from forge_core.data import PackedBatch, Tokenizer
from forge_core.evaluate import forgetting_summary, measure_sets, prepare_sets, without_predictions
from forge_core.evaluate.device import pick_device
from forge_core.evaluate.sets import Results
from forge_core.kernels import MixingLoss, PackPlan, weighted_linear_cross_entropy
from forge_core.model import CausalLM, adapter_parameters
from forge_core.recipe import Recipe, save_recipe

from .checkpoint import (
    Checkpoint,
    build_model,
    checkpoint_paths,
    newest_checkpoint,
    restore_optimizer,
    save_checkpoint,
    save_weights,
)
from .identity import ResumeError, compare, run_identity
from .metrics import MetricsLog
from .monitor import Monitor, format_seconds
from .optimizer import MasterAdamW
from .run_folder import claim_output_dir, clear_run
from .schedule import Schedule
from .sources import batch_stream, prepare_sources
from .window import Window

OnEvaluation = Callable[[int, Results], None]
OnStep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left behind."""

    output_dir: Path
    result: Path  # the adapter (PEFT) or the model (Hugging Face)
    steps: int
    tokens: int
    loss: float | None  # of the last log line; None when nothing was left to do
    evaluations: dict[int, Results]  # step -> results, of this process
    summary: list[str]  # gained and forgotten, in words


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_evaluation: OnEvaluation | None = None,
    on_step: OnStep | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train as the recipe says; write metrics, checkpoints and the result to its output_dir.

    The result does not depend on interruptions: a run that is killed at any moment and resumed gives the same losses
    and weights, bit for bit, on the same machine and number of threads.

    Args:
        recipe: the run.
        resume: go on from the newest checkpoint; from the start where there is none yet.
        overwrite: remove an earlier run from output_dir first.
        on_evaluation: called with step and results (predictions included) after each evaluation.
        on_step: called with each line of metrics, after evaluation and checkpoint of that step.
        console: where progress goes; default standard output.

    Raises:
        ResumeError: output_dir holds a run and neither resume nor overwrite is set; or the checkpoint's order, data or
            architecture differ from this recipe's.
        ValueError: this version draws the samples in another order than the one that began the run.
        NonFiniteError: loss or gradient are not finite; names step and samples.
        DataError, FileNotFoundError, ValueError: from data and model; the messages name file, line or key.
    """
    with claim_output_dir(recipe.output_dir):
        if overwrite and not resume:
            clear_run(recipe.output_dir)
        elif not resume and checkpoint_paths(recipe.output_dir):
            raise ResumeError(
                f"output_dir: {recipe.output_dir} holds a run with checkpoints; resume it (--resume), replace it "
                "(--overwrite), or choose another output_dir"
            )
        return _Trainer(recipe, resume, console or Console()).run(on_evaluation, on_step)


class _Trainer:
    def __init__(self, recipe: Recipe, resume: bool, console: Console) -> None:
        self.recipe = recipe
        self.console = console
        self.device = pick_device(recipe)
        self.tokenizer = Tokenizer.from_pretrained(recipe.model.path)
        with console.status("reading data") as status:
            self.sources = prepare_sources(
                recipe, self.tokenizer, progress=lambda name: status.update(f"reading {name}")
            )
            self.sets = prepare_sets(recipe, self.tokenizer, progress=lambda name: status.update(f"reading {name}"))
        self.stream = batch_stream(recipe, self.sources)
        self.identity = run_identity(recipe, self.sources)
        self.schedule = Schedule.of(recipe.training)
        checkpoint = newest_checkpoint(recipe.output_dir) if resume else None
        changed = compare(checkpoint.state["identity"], self.identity) if checkpoint else []
        self.model = build_model(recipe, self.device, checkpoint)
        self.optimizer = _optimizer(recipe, self.model)
        self.step = self.tokens = self.loss_tokens = 0
        self.seconds = 0.0
        self.baseline: Results | None = None
        if checkpoint:
            self._restore(checkpoint, changed)
        save_recipe(recipe, recipe.output_dir / "recipe.yaml")
        self.metrics = MetricsLog(recipe.output_dir, after_step=self.step)
        self.window = Window(self.sources)
        self.evaluations: dict[int, Results] = {}
        self.line: dict[str, Any] | None = None

    def _restore(self, checkpoint: Checkpoint, changed: list[str]) -> None:
        state = checkpoint.state
        self.stream.restore(state["stream"])
        # About a millisecond per step: draws the whole order anew, so that a version that mixes differently is noticed.
        self.stream.verify(state["stream"])
        restore_optimizer(checkpoint, self.optimizer)
        self.step, self.tokens, self.loss_tokens = state["step"], state["tokens"], state["loss_tokens"]
        self.seconds, self.baseline = state["seconds"], state["baseline"]
        self._say(f"Resumed from {checkpoint.path.name} of {self.recipe.training.max_steps} steps.")
        for line in changed:
            self._say(
                f"Changed since the run began: {line}. From here on the run is not the one that was begun.", "yellow"
            )

    def run(self, on_evaluation: OnEvaluation | None, on_step: OnStep | None) -> TrainResult:
        options, total = self.recipe.training, self.recipe.training.max_steps
        self.model.train()
        with Monitor(self.console, total=total, done=self.step) as self.monitor:
            if self.step == 0 and self.recipe.evaluation.at_start:
                self.baseline = self._evaluate(on_evaluation)
            tick, ticked_tokens = time.perf_counter(), self.tokens
            while self.step < total:
                self._train_step()
                evaluates = self._is_due(self.recipe.evaluation.every)
                saves = self._is_due(options.save_steps)
                # A log line ends the window, so windows must not depend on where a run was interrupted: every
                # checkpoint and every evaluation closes one.
                if not (self._is_due(options.log_steps) or evaluates or saves):
                    continue
                values = self.window.read()
                elapsed = time.perf_counter() - tick
                self.seconds += elapsed
                self.line = self._metrics_line(values, (self.tokens - ticked_tokens) / elapsed)
                self.metrics.write(self.line)
                self.monitor.step(self.line, self.seconds / self.step * (total - self.step))
                if evaluates:
                    self._evaluate(on_evaluation)
                if saves:
                    self._save()
                if on_step:
                    on_step(self.line)
                tick, ticked_tokens = time.perf_counter(), self.tokens
            result = self._finish()
        return result

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.recipe.training.max_steps

    def _train_step(self) -> None:
        packs = self.stream.next_step()
        self.step += 1
        normalizer = total_weight(packs)
        first_pack = (self.step - 1) * self.recipe.training.packs_per_step
        losses = []
        for number, pack in enumerate(packs):
            # Dropout, too, is a function of seed, step and pack, not of what ran before.
            self.model.dropout_seed = (self.recipe.seed << 40) + first_pack + number
            losses.append(self._forward_backward(pack, normalizer))
        grad_norm = self.optimizer.step(self.schedule(self.step))
        self.window.add(self.step, [pack.sample_ids for pack in packs], losses, grad_norm)
        self.tokens += sum(pack.tokens for pack in packs)
        self.loss_tokens += sum(pack.loss_tokens for pack in packs)

    def _forward_backward(self, pack: PackedBatch, normalizer: float) -> MixingLoss:
        move = self.device.type == "cuda"
        input_ids, targets, weights, source_ids, cu_seqlens = (
            tensor.pin_memory().to(self.device, non_blocking=True) if move else tensor
            for tensor in (pack.input_ids, pack.targets, pack.token_weights, pack.source_ids, pack.cu_seqlens)
        )
        hidden = self.model(input_ids, cu_seqlens, plan=PackPlan(pack.cu_seqlens.numpy()))
        loss = weighted_linear_cross_entropy(
            hidden,
            self.model.lm_head_weight,
            targets,
            weights,
            source_ids=source_ids,
            num_sources=len(self.sources),
            normalizer=normalizer,
            softcap=self.model.logit_softcap,
            counted_rows=pack.counted_rows,  # known here, so that a GPU's matmuls leave out the masked rows
        )
        loss.loss.backward()
        return loss

    def _metrics_line(self, values: dict[str, Any], tokens_per_second: float) -> dict[str, Any]:
        sources = {}
        for source, realised in zip(self.sources, self.stream.realised_shares(), strict=True):
            sources[source.name] = {
                "loss": values["sources"][source.name]["loss"],
                "accuracy": values["sources"][source.name]["accuracy"],
                "target_share": source.share,
                **realised,
            }
        return {
            "step": self.step,
            "loss": values["loss"],
            "lr": self.schedule(self.step),
            "grad_norm": values["grad_norm"],
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "tokens_per_second": tokens_per_second,
            "seconds": self.seconds,
            "sources": sources,
            "chain": self.stream.chain,
        }

    def _evaluate(self, on_evaluation: OnEvaluation | None) -> Results | None:
        if not self.sets:
            return None
        results = measure_sets(
            self.model,
            self.tokenizer,
            self.sets,
            progress=lambda name: self.monitor.working_on(f"evaluating {name}"),
        )
        numbers = without_predictions(results)
        for name, result in results.items():
            if "predictions" in result:
                lines = [json.dumps(item, ensure_ascii=False) for item in result["predictions"]]
                file = self.recipe.output_dir / "predictions" / f"step-{self.step:08d}" / f"{name}.jsonl"
                atomic.write_text(file, "\n".join(lines) + "\n")
        self.metrics.write({"step": self.step, "evaluation": numbers})
        self.evaluations[self.step] = numbers
        self.monitor.working_on(None)
        self.monitor.say(f"step {self.step}  {describe(numbers)}")
        if on_evaluation:
            on_evaluation(self.step, results)
        return numbers

    def _save(self) -> None:
        self.monitor.working_on("saving a checkpoint")
        self.metrics.sync()
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "seconds": self.seconds,
            "baseline": self.baseline,
            "recipe_digest": self.recipe.digest(),
            "identity": self.identity,
            "stream": self.stream.state(),
            "chain": self.stream.chain,
            "torch": torch.__version__,
        }
        save_checkpoint(
            self.recipe.output_dir, self.model, self.optimizer, state, keep=self.recipe.training.keep_checkpoints
        )
        self.monitor.working_on(None)

    def _finish(self) -> TrainResult:
        folder = self.recipe.output_dir
        result = save_weights(self.model, folder)
        self.metrics.sync()
        self.metrics.close()
        final = self.evaluations.get(self.step)
        summary = forgetting_summary(self.baseline, final) if self.baseline and final else []
        self._say(f"Trained {self.step} steps, {self.tokens:,} tokens, in {format_seconds(self.seconds)}: {result}")
        for sentence in summary:
            self._say(sentence)
        loss = None if self.line is None else self.line["loss"]
        return TrainResult(folder, result, self.step, self.tokens, loss, self.evaluations, summary)

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def total_weight(packs: Sequence[PackedBatch]) -> float:
    """Sum of the loss weights of a step's packs: what the step's loss is divided by, whatever the number of packs."""
    return float(sum(pack.token_weights.double().sum() for pack in packs))


def _optimizer(recipe: Recipe, model: CausalLM) -> MasterAdamW:
    options = recipe.training
    parameters = dict(model.named_parameters()) if recipe.lora is None else adapter_parameters(model)
    return MasterAdamW(
        parameters,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        lora_plus_ratio=1.0 if recipe.lora is None else recipe.lora.lora_plus_ratio,
    )


def describe(results: Results) -> str:
    """Write evaluation results in one line."""
    parts = []
    for name, result in results.items():
        if result["kind"] == "loss":
            parts.append(f"{name}: loss {result['nll']:.4f}")
        else:
            parts.append(f"{name}: {100 * result['accuracy']:.1f} % exact ({result['correct']}/{result['total']})")
    return ", ".join(parts)
