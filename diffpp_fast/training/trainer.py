"""The training loop."""

from __future__ import annotations

import logging
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffpp_fast.errors import CheckpointError, ConfigurationError, NonFiniteError, UserError
from diffpp_fast.methods import Batch, RewardOutput, StepOutput
from diffpp_fast.training.baseline import Baseline, baseline_facts, measure_baseline, read_baseline, write_baseline
from diffpp_fast.training.batches import Batches, MicroBatch
from diffpp_fast.training.build import build_run
from diffpp_fast.training.build.text import open_embeddings
from diffpp_fast.training.callbacks import Callback, Environment, describe_environment, standard_callbacks
from diffpp_fast.training.capture import Captured, StaticGradients, Work, make_tape, of_step, of_tensor
from diffpp_fast.training.checkpoint import Checkpoints, SavedGenerator, read_scores
from diffpp_fast.training.config import Config, EmaSection
from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines import Engine, make_engine
from diffpp_fast.training.export import export_generator, refuse_foreign_folder
from diffpp_fast.training.faults import RewardWatch, SkippedUpdates
from diffpp_fast.training.grids import Grid, write_png
from diffpp_fast.training.inputs import refuse_changed_inputs, refuse_unequal_inputs, refuse_unknown_inputs
from diffpp_fast.training.interrupt import Interrupt
from diffpp_fast.training.metrics import Means
from diffpp_fast.training.output import claim_output, write_config
from diffpp_fast.training.phases import LARGE, Memory, Phases
from diffpp_fast.training.prompts import open_prompts
from diffpp_fast.training.reward_scale import RewardScale
from diffpp_fast.training.state import Position, find_checkpoint, read_record, read_state, write_state
from diffpp_fast.training.watch import Watch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The end of a run: after which step, and which signal stopped it before its last one, if one did."""

    step: int
    signal: int | None


class _Mark(NamedTuple):
    """The place of a run at a moment: seconds of the clock, step, next sample."""

    time: float
    step: int
    samples: int


class Trainer:
    """One run of a configuration, in this process or in all of a launcher's.

    Every update, of the fake score or of the generator, takes the next `global_batch` sample numbers; prompts,
    latents, times and noise follow from them and the seed, so that neither the number of processes, nor the size of
    the micro-batches, nor an interruption changes what a run computes.

    Args:
        config: from `load_config`.
        resume: "latest", "best" or the folder of a checkpoint or run to go on from; see `find_checkpoint`.
        callbacks: told about the run, in the main process, in addition to those of the configuration.
        accept_changed: inputs that may have other content than the resumed run had, by the names of `inputs.INPUTS`.
        world: the processes; None: those of the launcher's environment, else this one.
        unlock: take the output folder over from a process elsewhere that may be alive; see `FolderLock`.

    Raises a UserError where the run can't be done as asked; nothing has been written by then.
    """

    def __init__(
        self,
        config: Config,
        *,
        resume: str | None = None,
        callbacks: Sequence[Callback] = (),
        accept_changed: Sequence[str] = (),
        world: World | None = None,
        unlock: bool = False,
    ) -> None:
        self.config = config
        self.output = Path(config.output)
        self.world = World.join(config.device, peer_timeout=config.distributed.peer_timeout) if world is None else world
        refuse_unknown_inputs(accept_changed)
        self._lock = claim_output(config, self.world, unlock=unlock)
        try:
            with self.world.explained():
                self._prepare(resume, callbacks, accept_changed)
        except BaseException:
            self._release()
            raise

    def _prepare(self, resume: str | None, callbacks: Sequence[Callback], accept_changed: Sequence[str]) -> None:
        config = self.config
        self.prompts = open_prompts(config.prompts)
        self.checkpoints = Checkpoints(
            self.output / "checkpoints", self.world, config.training.keep, config.training.keep_best
        )
        checkpoint = find_checkpoint(resume, self.checkpoints, config, self.prompts)
        if config.training.threads is not None:
            torch.set_num_threads(config.training.threads)
        self.batches = Batches(config, self.world, self.prompts)
        self.phases = Phases(self.world.device)
        embeddings = open_embeddings(config, self.prompts, self.world.device)
        self.parts = build_run(config, self.world, self.phases, embeddings, self.prompts)
        self.phases.gives_back = self.world.device.type == "cpu" and self.parts.weight_bytes() >= LARGE
        refuse_unequal_inputs(self.parts.inputs, self.world)
        before: dict[str, Any] = {} if checkpoint is None else read_record(checkpoint)
        if checkpoint is not None:
            refuse_changed_inputs(checkpoint, before.get("inputs"), self.parts.inputs, accept_changed)
        self.generator = self._make_engine("generator", config.ema)
        self.fake = self._make_engine("fake")
        self.grid = Grid(config, self.parts, self.prompts, self.world.device)
        self.position = Position()
        self._saved: Position | None = None
        #: Whether the engines are where the position says: not in the middle of an update.
        self._whole = True
        self._told: set[str] = set()
        self._saved_in: Path | None = None
        #: The last value of every scalar that was logged.
        self._scores: dict[str, float] = {}
        if checkpoint is not None:
            self.position = read_state(checkpoint, self._engines)
            self._scores = read_scores(checkpoint)
            self._saved, self._saved_in = replace(self.position), checkpoint
            logger.info("resuming from %s", checkpoint)
        self.callbacks: list[Callback] = []
        if self.world.is_main:
            watch = Watch(lambda *warning: self._tell("on_warning", *warning), self.output / "metrics.jsonl")
            facts = describe_environment(self.world, self.grid.prompts)
            environment = Environment(self.output / "environment.json", facts)
            self.callbacks = [environment, *standard_callbacks(config, self.grid.prompts), watch, *callbacks]
        self._baseline: Baseline | None = None
        self._encode = self.phases.wrap(self.parts.sampler.encode, "prompts")
        self._means = Means()
        self._memory = Memory(self.world.device)
        reward, rows = self.parts.reward, before.get("skips", {})
        name = None if reward is None else reward.name
        self._skips = {
            "generator": SkippedUpdates("generator", self.batches, name, *rows.get("generator", ())),
            "fake": SkippedUpdates("fake", self.batches, None, *rows.get("fake", ())),
        }
        #: Updates that were asked for, and of those that were not skipped, before this session.
        self._begun = {engine.role: (engine.updates, engine.applied) for engine in self._engines}
        optimised = config.rewards.optimised
        self._reward_scale = RewardScale(optimised, self.parts.method, self.world.device)
        self._captured = self._capture()
        self._reward_watch = RewardWatch(
            name,
            optimised is not None and optimised.scale != 0.0,
            self.world,
            self.batches.prompts,
            self._warn,
            before,
        )

    @property
    def step(self) -> int:
        """Updates of the generator so far; while the fake score warms up, minus the rounds to go."""
        return self.position.step or self.position.warmup - self.config.training.fake_warmup

    def run(self) -> Outcome:
        """Trains to `training.steps` and exports the generator, or stops after the step in which a signal comes.

        Either way the last step is saved as a checkpoint; in one process, also before an error ends the run. What only
        tells of the run (a callback, a sample grid after the first) may fail: that is told once, and the run goes on.
        An update whose gradient is not finite changes no weight; more than `training.skip_limit` of them in a row raise
        NonFiniteError, and so does an end at which a network has not been updated once. Raises ConfigurationError for a
        reward that never had a gradient, CheckpointError when a checkpoint can't be written, and PeerLostError where
        other processes are gone.
        """
        try:
            with self.world.explained():
                return self._run()
        finally:
            self._tell("on_end", self.step)
            self._release()
            self.world.close()

    def _run(self) -> Outcome:
        settings = self.config.training
        self._make_output()
        self._tell("on_start", self.step, settings.steps)
        with Interrupt(self.world) as interrupt:
            self._baseline = self._find_baseline()
            self._mark = self._now()
            if self._saved is None and settings.grid_every is not None:
                self._draw_grid()
            try:
                while self.step < settings.steps and interrupt.agree() is None:
                    self._advance()
            except (CheckpointError, NonFiniteError):
                raise
            except Exception:
                self._save_before_error()
                raise
            if self.step >= settings.steps:
                self._finish()
            if self._saved != self.position:
                self._save()
        if self.step < settings.steps:
            return Outcome(self.step, interrupt.signal)
        self._export()
        return Outcome(self.step, None)

    @property
    def _engines(self) -> tuple[Engine, Engine]:
        return self.generator, self.fake

    def _make_engine(self, role: str, ema: EmaSection | None = None) -> Engine:
        trained = self.parts.trained(role)
        return make_engine(role, trained.network, trained.parameters, self.config, self.world, ema)

    def _capture(self) -> Captured | None:
        """Record what both updates compute, where it is asked for, in every shape that a micro-batch of theirs has."""
        settings, method = self.config.training, self.parts.method
        if not settings.capture:
            return None
        learn = {
            "generator": partial(self._learn, self.generator, method.generator_loss),
            "fake": partial(self._learn, self.fake, method.fake_loss),
        }
        work: dict[str, Work] = {role: (function, of_step) for role, function in learn.items()}
        work["normalizers"] = (lambda batch, _: method.normalizers(batch).sum(), of_tensor)
        captured = Captured(make_tape(self.config, self.world.device, self._engines), work, self.phases.muted)
        with self.phases("capture", whole=True):
            every = self.batches.micro_batches(0, self._encode, self.parts.null)
            for part in {len(part.batch): part for part in every}.values():
                if method.normalizes_update and not self.batches.is_whole:
                    captured.prepare("normalizers", part)
                    one = torch.ones((), device=self.world.device)
                    part = replace(part, batch=replace(part.batch, normalizer=one))
                made = captured.prepare("generator", part)
                if settings.fake_warmup > 0 or method.fake_rounds > method.share_samples:
                    captured.prepare("fake", replace(part, batch=replace(part.batch, normalizer=None)))
                if method.share_samples:
                    captured.prepare("fake", replace(part, batch=replace(part.batch, x0=made.x0, steps=made.steps)))
            self._gradients = {engine.role: StaticGradients(engine) for engine in self._engines}
        return captured

    def _learn(self, engine: Engine, loss_of: Callable[[Batch], StepOutput], batch: Batch, weight: float) -> StepOutput:
        """The static part of an update: loss and gradient of a micro-batch."""
        output = loss_of(batch)
        with self.parts.trained(engine.role).active():
            engine.backward(weight * output.loss, last=True)
        return output._replace(loss=output.loss.detach())

    def _make_output(self) -> None:
        refused = f"output: can't write to {self.output}: "
        with self.world.together(lambda said: ConfigurationError(refused + said), OSError):
            if self.world.is_main:
                write_config(self.config)

    def _find_baseline(self) -> Baseline | None:
        """Return what the reference's own samples are like: as the folder says, or measured once (collective)."""
        steps, method = self.config.training.baseline_steps, self.config.method
        if steps is None:
            return None
        path, facts = self.output / "baseline.json", baseline_facts(self.config, steps, self.grid.prompts)
        found = read_baseline(path, facts)
        if not self.world.any(found is None):
            return found
        with self.phases("baseline", whole=True):
            measured = measure_baseline(
                self.parts.reference,
                self.parts.sampler.schedule,
                self.grid.batches(self.parts.null),
                steps=steps,
                guidance_scale=method.guidance_scale,
                guidance_rescale=method.guidance_rescale,
            )
        if measured.undefined:
            self._warn(
                "baseline-undefined",
                f"the reference's own samples are not finite for {measured.undefined} of the grid's prompts",
            )
        if not math.isfinite(measured.x0_std):
            return None
        if self.world.is_main:
            try:
                write_baseline(path, measured, facts)
            except OSError as failed:
                self._warn_once("baseline", f"can't write {path}: {failed.strerror}; a resumed run measures it again")
        return measured

    def _advance(self) -> None:
        """One step: a warm-up round of the fake score, or its rounds and the generator's update."""
        settings, method = self.config.training, self.parts.method
        if self.position.warmup < settings.fake_warmup:
            self._update(self.fake, method.fake_loss)
        else:
            while self.position.rounds < method.fake_rounds - method.share_samples:
                self._update(self.fake, method.fake_loss)
            self._reward_scale.set(self.position.step + 1)
            made = self._update(self.generator, method.generator_loss)
            if method.share_samples:
                self._update(self.fake, method.fake_loss, made)
        self._tell("on_step", self.step)
        if self.step % settings.log_every == 0:
            self._log()
        if self.step > 0 and settings.grid_every is not None and self.step % settings.grid_every == 0:
            self._try_grid()
        if self.step > 0 and self.step % settings.checkpoint_every == 0:
            self._save()

    def _finish(self) -> None:
        """After the last step: what was not logged yet, and whether there is something to show for it (collective)."""
        if self.step > self._mark.step:
            self._log()
        self._reward_watch.judge_gradient(self.position.step, first=False, enough=True)
        for engine in self._engines:
            asked, applied = engine.updates, engine.applied
            asked_before, applied_before = self._begun[engine.role]
            if applied and (applied > applied_before or asked == asked_before):
                continue
            since = " since it was resumed" if applied else ""
            raise NonFiniteError(
                f"{self._skips[engine.role].explain(self.step)}\nThe run has trained nothing{since}: none of "
                f"the {asked - (asked_before if applied else 0)} updates of the {engine.role} was made, and so nothing "
                "is exported."
            )

    def _update(
        self, engine: Engine, loss_of: Callable[[Batch], StepOutput], shared: Sequence[MicroBatch] = ()
    ) -> list[MicroBatch]:
        """One update of one network on the next `global_batch` samples.

        Args:
            engine: of the network.
            loss_of: the method's loss for it.
            shared: the generator's update that has made the samples, which are looked at with times and noise of
                the next `global_batch` numbers; empty: they are made anew.

        Returns the micro-batches, with the samples that the generator has made of them in an update of its own.
        """
        first = self.position.samples
        later = self.batches.size  # from the numbers of the generator's update to the next ones
        made: list[MicroBatch] = []
        trained = self.parts.trained(engine.role)
        defined: torch.Tensor | None = None
        rewards: list[RewardOutput] = []
        if self._captured is not None:
            self._gradients[engine.role].put_on()
        for part in [part.later(later) for part in shared] or self._micro_batches(engine, first):
            if self._captured is not None:
                with self.phases(f"{engine.role}_graph"):
                    output: StepOutput = self._captured(engine.role, part)
            else:
                with self.phases("loss"):
                    output = loss_of(part.batch)
            made.append(replace(part, batch=replace(part.batch, x0=output.x0, steps=output.steps)))
            loss = output.loss if part.weight == 1.0 else part.weight * output.loss
            if "reward_undefined" in output.metrics:
                share = 1.0 - output.metrics["reward_undefined"]
                defined = share if defined is None else defined + share
                if part.last and self._captured is not None:
                    self._gradients[engine.role].spoil(self._one_or_nan(defined))
                elif part.last:
                    loss = loss * self._one_or_nan(defined)
            if self._captured is None:
                with self.phases("backward"), trained.active():
                    engine.backward(loss, last=part.last)
            self._means.add(output.metrics, prefix=engine.role, weight=part.weight)
            rewards += [] if output.rewards is None else [output.rewards]
        with self.phases("optimizer"):
            self._whole = False
            norm = engine.step()
            self._count(engine, shared=bool(shared))
            # The samples of the generator's update are gone with an error before they are shared.
            self._whole = engine is not self.generator or not self.parts.method.share_samples
        self._means.add({"gradient_norm": norm}, prefix=engine.role)
        prompts_of = first - later if shared else first
        self._skips[engine.role].note(norm, prompts_of, self._note_rewards(rewards, first))
        return made

    def _count(self, engine: Engine, *, shared: bool) -> None:
        """Brings the position behind an update."""
        position = self.position
        position.samples += self.batches.size
        if shared:
            return  # a round of the step that the generator's update has ended
        if engine is self.generator:
            position.step, position.rounds = position.step + 1, 0
        elif position.warmup < self.config.training.fake_warmup:
            position.warmup += 1
        else:
            position.rounds += 1

    def _micro_batches(self, engine: Engine, first: int) -> Iterator[MicroBatch]:
        """This process's part of an update (collective, for methods that divide by a mean over all of it)."""

        images = self.parts.images if engine is self.generator else None

        def parts() -> Iterator[MicroBatch]:
            return self.batches.micro_batches(first, self._encode, self.parts.null, images)

        method = self.parts.method
        if engine is not self.generator or not method.normalizes_update or self.batches.is_whole:
            return parts()
        captured = self._captured
        with self.phases("loss" if captured is None else "generator_graph"):
            sums = [
                method.normalizers(part.batch).sum() if captured is None else captured("normalizers", part)
                for part in parts()
            ]
            total = torch.stack(sums).sum()
            mean = self.world.sum(total) / self.batches.size
        return (replace(part, batch=replace(part.batch, normalizer=mean)) for part in parts())

    def _note_rewards(self, given: Sequence[RewardOutput], first: int) -> torch.Tensor | None:
        """Keeps for the log what this process's samples were given in an update; returns it, if they were."""
        if not given:
            return None
        rewards = torch.cat([part.values for part in given])
        self._means.add_samples("generator/reward", rewards)
        for name in given[0].parts:
            part = torch.cat([output.parts[name] for output in given])
            self._means.add_samples(f"generator/reward/{name}", part, spread=False)
        self._reward_watch.note(first, any(output.differentiable for output in given))
        return rewards

    def _log(self) -> None:
        """Brings the figures of all steps and processes together: the one moment that waits for the device."""
        steps = self.step - self._mark.step
        times = {f"time/{name}": seconds / steps for name, seconds in self.phases.take().items()}
        scalars = self._means.take(self.world, {**times, **self._memory.take()}, self._reward_watch.judge)
        for engine in self._engines:
            scalars[f"{engine.role}/learning_rate"] = engine.learning_rate
            skipped = self._skips[engine.role].take_share()
            if skipped is not None:
                scalars[f"{engine.role}/updates_skipped"] = skipped
        scalars |= self._reward_scale.scalars()
        if self._baseline is not None:
            scalars |= self._baseline.scalars()
        before, self._mark = self._mark, self._now()
        scalars["samples_per_second"] = (self._mark.samples - before.samples) / (self._mark.time - before.time)
        self._scores |= scalars
        self._tell("on_log", self.step, scalars)
        for engine in self._engines:
            if self._skips[engine.role].row() > self.config.training.skip_limit:
                raise NonFiniteError(self._skips[engine.role].explain(self.step))
        step, settings = self.position.step, self.config.training
        self._reward_watch.judge_log(scalars, step, first=step <= settings.log_every, enough=step > settings.skip_limit)

    def _one_or_nan(self, defined: torch.Tensor) -> torch.Tensor:
        """The factor of an update's loss: NaN, for which the update is skipped, where no sample's reward counts.

        Args:
            defined: 0 where none of this process's samples has a reward with a finite gradient (collective).
        """
        return torch.where(self.world.sum(defined) > 0.0, 1.0, torch.nan)

    def _now(self) -> _Mark:
        return _Mark(time.monotonic(), self.step, self.position.samples)

    def _try_grid(self) -> None:
        """A grid that may fail: it only shows the run (collective)."""
        try:
            with self.world.together(RuntimeError):
                self._draw_grid()
        except RuntimeError as failed:
            self._warn_once("grid", f"no sample grid at step {self.step}: {failed}. The run goes on")

    def _draw_grid(self) -> None:
        """Samples of the averaged generator at fixed prompts and latents, and what the rewards say of them."""
        with self.phases("grid", whole=True), self.generator.averaged():
            pixels, scores, troubles = self.grid.draw()
        path = self.output / "grids" / f"step_{self.position.step:06d}.png"
        if self.world.is_main:
            try:
                write_png(path, pixels)
            except OSError as failed:
                self._warn_once("picture", f"can't write {path}: {failed.strerror or failed}. The run goes on")
        self._tell("on_grid", self.step, pixels, path)
        for trouble in troubles:
            self._warn("grid-undefined", trouble)
        if scores:
            self._scores |= scores
            self._tell("on_log", self.step, scores)

    def _save(self) -> None:
        self._check_lock()
        with self.phases("checkpoint"):
            path = self.checkpoints.save(
                self.position.step,
                lambda folder: write_state(
                    folder, self.config, self.prompts, self.position, self._engines, self.world, self._record()
                ),
                self._scores,
            )
        self._saved, self._saved_in = replace(self.position), path
        self._tell("on_checkpoint", self.step, path)

    def _save_before_error(self) -> None:
        """Saves the updates since the last checkpoint, where no other process has to take part."""
        before, now = self._saved or Position(), self.position
        if self.world.size > 1 or not self._whole or (now.step, now.warmup) == (before.step, before.warmup):
            return
        try:
            self._save()
        except Exception as failed:
            logger.warning("the steps since the last checkpoint can't be saved: %s", failed)
        else:
            logger.warning("an error ends the run; its state was saved in %s", self.checkpoints.folder)

    def _check_lock(self) -> None:
        """Raises CheckpointError in all processes where another run writes into the output folder by now."""
        with self.world.together(CheckpointError, CheckpointError):
            if self._lock is not None:
                self._lock.check()

    def _record(self) -> dict[str, Any]:
        """Return the counts besides the position that a resumed run goes on from."""
        return {
            "skips": {role: skips.record() for role, skips in self._skips.items()},
            **self._reward_watch.record(),
            "inputs": self.parts.inputs,
        }

    def _warn(self, name: str, message: str) -> None:
        """A named warning, in the main process."""
        if self.world.is_main:
            logger.warning("step %d: %s: %s", self.step, name, message)
            self._tell("on_warning", self.step, name, message)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _export(self) -> None:
        """The averaged generator in diffusers' format, written by the main process from the last checkpoint
        (collective)."""
        assert self._saved_in is not None
        self._check_lock()
        folder = self.output / "generator"
        command = shlex.join(["diffpp-fast", "export", str(self.output), "--out", "FOLDER"])

        def explain(said: str) -> CheckpointError:
            return CheckpointError(
                f"the run is complete and its last checkpoint is saved, but the generator can't be exported: {said}. "
                f"To export it elsewhere:\n  {command}"
            )

        with self.world.together(explain):
            if self.world.is_main:
                refuse_foreign_folder(folder)
                name = "generator" if self.config.ema is None else "generator_ema"
                export_generator(folder, self.config, SavedGenerator(self._saved_in, name))

    def _tell(self, event: str, *arguments: Any) -> None:
        """Tells the callbacks; of one that fails a warning is given once, for no log is worth a run.

        Raises a UserError of `on_start`, when there is nothing to lose yet.
        """
        for callback in tuple(self.callbacks):
            try:
                getattr(callback, event)(*arguments)
            except Exception as error:
                if event == "on_start":
                    if isinstance(error, UserError):
                        raise
                    self.callbacks.remove(callback)
                name = type(callback).__name__
                said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                self._warn_once(
                    name, f"{name} failed at step {self.step} ({said}). The run goes on without what it tells"
                )

    def _warn_once(self, about: str, sentence: str) -> None:
        if self.world.is_main and about not in self._told:
            self._told.add(about)
            logger.warning("%s", sentence)
