"""The training loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffpp_fast.errors import CheckpointError, ConfigurationError, NonFiniteError
from diffpp_fast.methods import Batch, StepOutput
from diffpp_fast.training.build import build_run
from diffpp_fast.training.callbacks import Callback, JsonLines, Progress, TensorBoard
from diffpp_fast.training.checkpoint import Checkpoints
from diffpp_fast.training.config import Config
from diffpp_fast.training.distributed import choose_device
from diffpp_fast.training.engine import PlainEngine
from diffpp_fast.training.export import export_generator
from diffpp_fast.training.grids import FIRST_GRID_SAMPLE, decode, sample_latents, tile, write_png
from diffpp_fast.training.interrupt import Interrupt
from diffpp_fast.training.loading import dump_config
from diffpp_fast.training.metrics import Means
from diffpp_fast.training.prompts import PromptOrder, read_prompts
from diffpp_fast.training.rewards import LatentReward
from diffpp_fast.training.state import Position, read_state, refuse_other_run, write_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after which step, and which signal stopped it before its last one, if one did."""

    step: int
    signal: int | None


class Trainer:
    """One run of a configuration.

    Every update, of the fake score or of the generator, takes the next `global_batch` sample numbers; prompts,
    latents, times and noise follow from them and the seed, so that neither the size of the micro-batches nor an
    interruption changes what a run computes.

    Args:
        config: from `load_config`.
        resume: go on from the newest undamaged checkpoint in the output folder, if it holds any.
        callbacks: told about the run in addition to metrics.jsonl, TensorBoard and the terminal.

    Raises a UserError where the run can't be done as asked; nothing has been written by then.
    """

    def __init__(self, config: Config, *, resume: bool = False, callbacks: Sequence[Callback] = ()) -> None:
        self.config = config
        self.output = Path(config.output)
        self.prompts = read_prompts(config.prompts)
        self.order = PromptOrder(config.seed, len(self.prompts))
        self.checkpoints = Checkpoints(self.output / "checkpoints", config.training.keep)
        checkpoint = self._find_checkpoint(resume)
        if config.training.threads is not None:
            torch.set_num_threads(config.training.threads)
        self.device = choose_device(config.device)
        self.run_parts = build_run(config, self.device)
        generator, fake = self.run_parts.sampler.trained, self.run_parts.fake
        self.generator = PlainEngine(
            "generator", generator.network, config.optimizers.generator, config.ema, generator.parameters
        )
        self.fake = PlainEngine("fake", fake.network, config.optimizers.fake, parameters=fake.parameters)
        self.position = Position()
        self._saved: Position | None = None
        if checkpoint is not None:
            self.position = read_state(checkpoint, self._engines)
            self._saved = replace(self.position)
            logger.info("resuming from %s", checkpoint)
        self.callbacks = [
            JsonLines(self.output / "metrics.jsonl"),
            TensorBoard(self.output / "tensorboard"),
            Progress(),
            *callbacks,
        ]
        self._means = Means()

    @property
    def step(self) -> int:
        """Updates of the generator so far; while the fake score warms up, minus the rounds to go."""
        return self.position.step or self.position.warmup - self.config.training.fake_warmup

    def run(self) -> Outcome:
        """Trains to `training.steps` and exports the generator, or stops after the step in which a signal comes.

        Either way the last step is saved as a checkpoint. Raises NonFiniteError before a weight is touched by a loss
        or a gradient that is not finite, and CheckpointError when one can't be written.
        """
        settings = self.config.training
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "config.yaml").write_text(dump_config(self.config))
        except OSError as error:
            raise ConfigurationError(f"output: can't write to {self.output}: {error.strerror}") from None
        try:
            self._tell("on_start", self.step, settings.steps)
            with Interrupt() as interrupt:
                self._mark = time.monotonic(), self.position.samples
                if self._saved is None and settings.grid_every is not None:
                    self._draw_grid()
                while self.step < settings.steps and interrupt.signal is None:
                    self._advance()
                if self._saved != self.position:
                    self._save()
            if self.step < settings.steps:
                return Outcome(self.step, interrupt.signal)
            with self.generator.averaged():
                export_generator(self.output / "generator", self.config, self.run_parts.sampler.trained)
            return Outcome(self.step, None)
        finally:
            self._tell("on_end", self.step)

    @property
    def _engines(self) -> tuple[PlainEngine, PlainEngine]:
        return self.generator, self.fake

    def _find_checkpoint(self, resume: bool) -> Path | None:
        if not self.checkpoints.paths():
            if resume:
                logger.warning("%s holds no checkpoint: starting from the beginning", self.checkpoints.folder)
            return None
        if not resume:
            raise CheckpointError(
                f"{self.output} already holds checkpoints: go on with --resume latest, or choose another output=FOLDER"
            )
        latest = self.checkpoints.latest()
        if latest is None:
            raise CheckpointError(f"no checkpoint in {self.checkpoints.folder} is whole: choose another output=FOLDER")
        refuse_other_run(latest, self.config, self.prompts)
        return latest

    def _advance(self) -> None:
        """One step: a warm-up round of the fake score, or its rounds and the generator's update."""
        settings, method = self.config.training, self.run_parts.method
        if self.position.warmup < settings.fake_warmup:
            self._update(self.fake, method.fake_loss)
            self.position.warmup += 1
        else:
            for _ in range(method.fake_rounds):
                self._update(self.fake, method.fake_loss)
            self._update(self.generator, method.generator_loss)
            self.position.step += 1
        self._tell("on_step", self.step)
        if self.step % settings.log_every == 0:
            self._log()
        if self.step > 0 and settings.grid_every is not None and self.step % settings.grid_every == 0:
            self._draw_grid()
        if self.step > 0 and self.step % settings.checkpoint_every == 0:
            self._save()

    def _update(self, engine: PlainEngine, loss_of: Callable[[Batch], StepOutput]) -> None:
        """One update of one network on the next `global_batch` samples."""
        settings = self.config.training
        numbers = torch.arange(self.position.samples, self.position.samples + settings.global_batch)
        prompts = [self.prompts[index] for index in self.order(numbers).tolist()]
        loss = torch.zeros((), device=self.device)
        for start in range(0, settings.global_batch, self._micro_batch):
            part = slice(start, start + self._micro_batch)
            batch = self._batch(numbers[part], prompts[part])
            output = loss_of(batch)
            weight = len(batch) / settings.global_batch
            with (self.run_parts.fake if engine is self.fake else self.run_parts.sampler.trained).active():
                engine.backward(weight * output.loss)
            loss += weight * output.loss.detach()
            # Of the reward the whole batch's statistics are logged below.
            metrics = {name: value for name, value in output.metrics.items() if name not in ("reward", "reward_std")}
            self._means.add(metrics, prefix=engine.role, weight=weight)
        norm = engine.gradient_norm()
        rewards = None
        if engine is self.generator and self.run_parts.reward is not None:
            rewards = self.run_parts.reward.take_given()
            parts = {f"reward/{name}": part.mean() for name, part in self.run_parts.reward.take_parts().items()}
            spread = {"reward": rewards.mean(), "reward_std": rewards.std(correction=0)}
            self._means.add({**spread, **parts}, prefix=engine.role)
        if not torch.isfinite(loss + norm if rewards is None else loss + norm + rewards.sum()):
            raise NonFiniteError(self._explain_non_finite(engine, loss, norm, prompts, rewards))
        self._means.add({"gradient_norm": norm}, prefix=engine.role)
        engine.step()
        engine.zero_grad()
        self.position.samples += settings.global_batch

    @property
    def _micro_batch(self) -> int:
        return self.config.training.micro_batch or self.config.training.global_batch

    def _batch(self, numbers: torch.Tensor, prompts: Sequence[str]) -> Batch:
        null = self.run_parts.null
        return Batch(
            samples=numbers.to(self.device),
            conditioning=self.run_parts.sampler.encode(prompts),
            seed=self.config.seed,
            shape=self.config.models.latent_shape,
            null_conditioning=None if null is None else null.expand(len(prompts)),
        )

    def _explain_non_finite(
        self,
        engine: PlainEngine,
        loss: torch.Tensor,
        norm: torch.Tensor,
        prompts: Sequence[str],
        rewards: torch.Tensor | None,
    ) -> str:
        first = self.position.samples
        said = f"{engine.role}, after step {self.step}: the loss is {float(loss)}, the gradient's norm {float(norm)}. "
        if rewards is not None and self.run_parts.reward is not None and not rewards.isfinite().all():
            bad = [prompt for prompt, fine in zip(prompts, rewards.isfinite().tolist(), strict=True) if not fine]
            said += f"{self.run_parts.reward.name} is not finite for {len(bad)} of {len(prompts)} samples: {_some(bad)}"
        else:
            said += f"Samples {first} to {first + len(prompts) - 1}, prompts: {_some(prompts)}"
        return f"{said}. No weight was changed by it."

    def _log(self) -> None:
        scalars = self._means.take()
        for engine in self._engines:
            scalars[f"{engine.role}/learning_rate"] = engine.learning_rate
        now, (then, samples) = time.monotonic(), self._mark
        scalars["samples_per_second"] = (self.position.samples - samples) / (now - then)
        self._mark = now, self.position.samples
        self._tell("on_log", self.step, scalars)

    def _draw_grid(self) -> None:
        """Samples of the averaged generator at fixed prompts and latents, and what the rewards say of them."""
        run, wanted = self.run_parts, self.config.training.grid_prompts
        prompts = self.prompts[:wanted] if isinstance(wanted, int) else wanted
        numbers = torch.arange(FIRST_GRID_SAMPLE, FIRST_GRID_SAMPLE + len(prompts), device=self.device)
        with self.generator.averaged():
            latents = sample_latents(
                run.sampler,
                prompts,
                numbers,
                seed=self.config.seed,
                shape=self.config.models.latent_shape,
                batch=self._micro_batch,
            )
        images = decode(run.sampler, latents, batch=self._micro_batch)
        pixels = tile(images, columns=_columns(len(prompts)))
        path = self.output / "grids" / f"step_{self.position.step:06d}.png"
        write_png(path, pixels)
        self._tell("on_grid", self.step, pixels, path)
        scalars = {
            f"grid/{name}": self._mean_score(reward, images, prompts)
            for name, reward in (("reward", run.reward), ("held_out", run.held_out))
            if reward is not None
        }
        if scalars:
            self._tell("on_log", self.step, scalars)

    @torch.no_grad()
    def _mean_score(self, reward: LatentReward, images: torch.Tensor, prompts: Sequence[str]) -> float:
        parts = [slice(start, start + self._micro_batch) for start in range(0, len(prompts), self._micro_batch)]
        return float(torch.cat([reward.score(images[part], prompts[part]).float() for part in parts]).mean())

    def _save(self) -> None:
        path = self.checkpoints.save(
            self.position.step,
            lambda folder: write_state(folder, self.config, self.prompts, self.position, self._engines),
        )
        self._saved = replace(self.position)
        self._tell("on_checkpoint", self.step, path)

    def _tell(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*arguments)


def _some(prompts: Sequence[str]) -> str:
    """Enough of them to find the trouble."""
    shown = ", ".join(repr(prompt) for prompt in prompts[:4])
    return f"{shown} and {len(prompts) - 4} more" if len(prompts) > 4 else shown


def _columns(count: int) -> int:
    """As square as it gets, rather wide than high."""
    columns = 1
    while columns * columns < count:
        columns += 1
    return columns
