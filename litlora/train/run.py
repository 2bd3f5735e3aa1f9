"""Run: a fine-tuning run, from its settings to final/. What all methods share; a method is which
parameters train, and on which objective."""

import dataclasses
import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from litlora import cli, console, report
from litlora.checkpoint import Beside, reference_to, write_adapter, write_full
from litlora.data.sources import Dataset
from litlora.errors import UserError, setting, with_options
from litlora.evaluate.subject import Subject
from litlora.frozen.linear import stored_weights
from litlora.frozen.quantize import joined
from litlora.load import pick_device
from litlora.lora import Adapter
from litlora.paths import FINAL, HYPERPARAMETERS_FILE, WEIGHTS_FILE, keep_inputs
from litlora.report.console import Console
from litlora.report.events import Done
from litlora.report.loggers import check_loggers, make_loggers
from litlora.report.metrics import METRICS_FILE, Metrics
from litlora.report.page import Page
from litlora.report.sinks import Sinks
from litlora.settings import Finetune, dump
from litlora.stop_tokens import taught_stops
from litlora.storage.atomic import replacing_file
from litlora.train.activations import block_inputs, offloading
from litlora.train.arena import Arena
from litlora.train.auto_batch import fit_to_memory
from litlora.train.checkpoints import EarlyCheckpoints
from litlora.train.claim import claimed
from litlora.train.compile import compile_blocks, compile_head, settle_compile
from litlora.train.device_check import check_device
from litlora.train.fit import Data, Trainer
from litlora.train.interrupts import Interrupts
from litlora.train.learning_rate import settle_learning_rate
from litlora.train.method import Method
from litlora.train.parallel import Parallel
from litlora.train.plan import most_tokens
from litlora.train.precision import bf16_speedup, cast, check_frozen, count_rounded, decide, stored_dtype
from litlora.train.prepare import Preparation
from litlora.train.probe import read_probes
from litlora.train.rates import described_rates
from litlora.train.resume import (
    State,
    as_measured,
    changed_devices,
    changed_settings,
    facts,
    read_state,
    stored_settings,
)
from litlora.train.run_directory import RunDirectory
from litlora.train.said import kept, outcome, what_it_learns, what_trains
from litlora.train.start import check_resumed_start, start_adapter, start_state
from litlora.train.streamed import load_base, settle_packs
from litlora.train.through_transformers import check_through
from litlora.train.vocabulary import AddedTokens, missing_tokens
from litlora.train.watch import watched


def finetune(settings: Finetune, method: Method, dataset: Dataset, place: RunDirectory) -> None:
    """Train, and write hyperparameters.yaml, metrics.csv, early checkpoints and final/ to the place
    of the run. Exits if the run is stopped early."""
    run = Run(settings, method, dataset, place)
    with watched(run.parallel, lambda: place.how_to_go_on(run.resume_command())):
        run.load()
        run.choose_what_trains()
        run.prepare_data()
        start_adapter(run)
        run.fit_to_memory()
        state, rows = run.find_start()
        if place.complete:
            run.say(f"the run in {place.path} is complete, nothing is left to do; result: {run.result}")
            return
        with run.interrupts, run.claimed(anew=state is None) as run.forget_earlier:
            done = run.train(state, rows)
            if done.stopped is None:
                run.write_result(done)
            run.check_directory()
    # Other ranks exit with status 0: the launcher ends all processes when one has another status.
    if run.parallel.is_main:
        run.close(done)


class Run:
    """A run directory, and what is trained in it. Its methods are called in the order of
    `finetune`.

    It takes a command's settings, because it stores them as resolved.
    """

    def __init__(self, settings: Finetune, method: Method, dataset: Dataset, place: RunDirectory) -> None:
        """Raises UserError, before anything is loaded, for what this machine cannot do."""
        check_loggers(settings.log)
        self.probes = read_probes(settings, place.path)
        self.interrupts = Interrupts(settings.train.max_time)
        devices, nodes = settings.num_devices
        self.parallel = Parallel(pick_device(settings.accelerator), devices, nodes, settings.strategy)
        settings = dataclasses.replace(settings, devices=devices, num_nodes=nodes if nodes > 1 else None)
        if dataset.read_once is not None and self.parallel.world_size > 1:
            raise UserError(
                f"{dataset.read_once}: can be read only once, and each of {self.parallel.world_size} devices "
                "reads the data: write it to a file first"
            )
        self.parallel.launch(settings.seed)
        self.about: list[str] = []
        """What was said of the run so far."""
        self.say = self._say if self.parallel.is_main else lambda *_: None
        if place.start is not None:
            settings = as_measured(settings, place.start)
            if not place.complete:
                check_resumed_start(settings, place.start, stored_settings(place.start))
        self.settings, self.method, self.dataset, self.place = settings, method, dataset, place
        self.path = place.path
        self.result = place.path / FINAL / WEIGHTS_FILE
        self.forget_earlier: Callable[[], None] | None = None
        """Removes what an earlier run left here; on rank 0, once the directory is claimed."""
        self.arena: Arena | None = None
        """Where block inputs are offloaded to."""
        check_device(settings.train, self.parallel.device)

    # ---- before training

    def load(self) -> None:
        """Load the model to start from, and choose the prompt style."""
        settings, place = self.settings, self.place
        self.parallel.check_same("step directory to resume from", (place.start, place.complete))
        self.loaded = load_base(settings, self.method, self.parallel)
        keep_inputs(self.path, self.loaded.chain.directories)
        self.base, self.model = self.loaded.chain.top, self.loaded.model
        if not self.model.packs:
            check_through(settings)
        self.style, self.style_reason = self.loaded.style(settings.prompt_style, default="alpaca")
        self.added = AddedTokens()
        asked = settings.tokenizer.add_tokens
        if asked and (tokens := missing_tokens(asked, self.style, self.loaded.tokenizer)):
            self.loaded = self.added.extend(self.loaded, tokens)
        weights = (*self.model.named_parameters(), *stored_weights(self.model).items())
        self.stored_dtypes = {name: weight.dtype for name, weight in weights}

    def choose_what_trains(self) -> None:
        """Settle the precision, mark what trains, and make the objective."""
        method, model, device = self.method, self.model, self.parallel.device
        decision = None
        if self.parallel.is_main:  # a measurement may differ between processes, so one decides
            decision = decide(
                self.settings.precision,
                stored_dtype(model),
                lambda: bf16_speedup(device),
                trains_base=method.trains_base,
                device=device,
            )
        self.precision = precision = self.parallel.broadcast(decision)
        self.undivided = list(model.parameters())
        if method.trains_base:
            method.prepare(model)  # first: what is frozen needs no memory of its own
        if self.parallel.is_sharded:  # it is converted while it is divided
            num_rounded = count_rounded(model, precision.dtype)
            check_frozen(model, precision.dtype, trains_base=method.trains_base)
        else:
            num_rounded = cast(model, precision.dtype, copy=method.trains_base)
        if not method.trains_base:
            method.prepare(model)
            self.added.train(model)
        self.say(*what_trains(self, num_rounded))
        self.settings = settle_compile(self.settings, model, device, self.say)
        self.settings = settle_learning_rate(self.settings, model.config.hidden_size, self.say)
        contexts = [lambda: precision.computing(device)]
        if self.settings.train.offload_activations:
            contexts.append(lambda: offloading(model, self.arena))
        self.objective = method.objective(model, self.settings.train, contexts)
        if rates := described_rates(self.objective.trainable(), self.settings.train):
            self.say(rates)

    def prepare_data(self) -> None:
        """Split the records and tokenise them."""
        settings, tokenizer = self.settings, self.loaded.tokenizer
        limit = min(settings.train.max_seq_length, self.model.config.max_position_embeddings)
        prepare = Preparation(
            settings.data, tokenizer, self.style, limit, self.say, self.parallel, self.method.tokenize
        )
        made, made_val = prepare.examples(self.dataset)
        self.data = Data(made.examples, made_val.examples if made_val else [], settings.seed)
        for notice in (*self.dataset.late_notices(), *prepare.notices):
            self.say(f"data: {notice}")
        self.say(what_it_learns(self))
        for notice in made.notices(limit):
            self.say(f"data: {notice}")

    def fit_to_memory(self) -> None:
        """Settle what depends on the memory of this machine. With that, the settings are
        resolved."""
        dtype, trains_base = self.precision.dtype, self.method.trains_base
        prints = self.parallel.shard(self.objective, self.undivided, dtype, trains_base=trains_base)
        if prints and self.loaded.quantized is not None:
            quantized = dataclasses.replace(self.loaded.quantized, fingerprint=joined(prints))
            self.loaded = dataclasses.replace(self.loaded, quantized=quantized)
        config, stream = self.settings.train, self.loaded.stream
        if stream is not None:
            config = settle_packs(stream, config, dtype, self.parallel, self.say)
        self.config = config = fit_to_memory(
            self.parallel,
            self.objective,
            self.data.train,
            config,
            self.say,
            size_is_set=self.settings.train.micro_batch_tokens is not None,
        )
        if config.offload_activations and config.checkpoint_activations == "full":
            tokens = most_tokens(self.objective.lengths(self.data.train), config)
            self.arena = Arena(block_inputs(self.model, tokens), self.parallel.device)
        if config.compiles:
            compile_blocks(self.model, recomputed=config.checkpoint_activations == "full")
            compile_head(self.objective)
        # The configuration repeats this run: how its directory was found does not belong to it.
        resolved = dataclasses.replace(
            self.settings,
            data=self.dataset.source,
            prompt_style=self.style.name,
            tokenizer=dataclasses.replace(self.settings.tokenizer, add_tokens=self.added.tokens),
            precision=self.precision.name,
            stream_base=self.settings.stream_base if stream is None else True,
            train=config,
            out_dir=str(self.path),
            overwrite=False,
            resume=None,
            resume_force=False,
        )
        notice = f"# data: {self.dataset.notice}\n" if self.dataset.notice else ""
        self.hyperparameters = notice + dump(resolved)
        self.facts = facts(
            self.objective, self.parallel.device, self.base.fingerprint, self.data.train, self.data.val
        )
        if (quantized := self.loaded.quantized) is not None:
            self.facts["quantised base"] = quantized.fingerprint
        for name, fact in self.facts.items():
            self.parallel.check_same(name, fact)

    def find_start(self) -> tuple[State | None, str | None]:
        """The state to resume from and its metrics.csv, if any. Raises UserError if the run there
        is another one."""
        start = self.place.start
        if start is None:
            if self.settings.resume:
                self.say(f"resume: {self.path} holds no early checkpoint, so the run begins")
            for name in self.place.outdated:
                self.say(f"note: {self.path / name} stays; it may come from the run that this one replaces")
            return None, None
        here, there = yaml.safe_load(self.hyperparameters), stored_settings(start)
        differences = changed_settings(here, there)
        for difference in changed_devices(here, there):
            self.say(f"note: {difference}: the result is that of the uninterrupted run up to rounding")
        state = rows = None
        if not self.place.complete:
            state, rows, others = read_state(start, self.facts)
            # Another base or setting can make other examples of the same records: name the cause
            # before the effect.
            first = others[:1] if others and others[0].startswith("base") else []
            differences = first + differences + others[len(first) :]
        if differences and not self.settings.resume_force:
            raise UserError(
                f"{setting('resume')} {start}: {differences[0]}; resume with what it was, "
                f"or resume all the same with {setting('resume_force')}"
            )
        for difference in differences:
            self.say(f"note: resumed although {difference}")
        if state is not None:
            state.is_forced = bool(differences)
            self.say(f"resumed: {start}, {state.at.step} steps done")
        return state, rows

    # ---- training

    def claimed(self, *, anew: bool) -> AbstractContextManager:
        """A context in which no other run writes to this directory: see `litlora.train.claim`."""
        return claimed(self.path, anew=anew) if self.parallel.is_main else nullcontext()

    def train(self, state: State | None, rows: str | None) -> Done:
        """Train from the start, or from this state, when metrics.csv held `rows`."""
        checkpoints = EarlyCheckpoints(
            self.path,
            self._write,
            keep=self.config.keep_checkpoints,
            newest=None if state is None else state.directory,
            prunes=self.parallel.is_main,
        )
        if self.objective.ahead is not None:
            self.say(self.objective.ahead)
        parts = (self.data.train, self.data.val)
        train, val = (self.objective.prepared(part, self.parallel) for part in parts)
        self.objective.ready()
        data = Data(train, val, self.data.seed)
        sink = Sinks()
        trainer = Trainer(
            self.parallel,
            self.objective,
            data,
            self.config,
            checkpoints,
            sink=sink,
            interrupts=self.interrupts,
        )
        for probe in self.probes:
            probe.subject = Subject(self.model, self.loaded.tokenizer, self.style)
        if self.parallel.is_main:
            trainer.probes = self.probes
        if state is not None:
            trainer.restore(state)  # before anything is written: it may not fit
        if self.parallel.is_main:
            with replacing_file(self.path / HYPERPARAMETERS_FILE) as staging:
                staging.write_text(self.hyperparameters, encoding="utf-8")
            self.metrics = Metrics(self.path / METRICS_FILE, rows, self.figures)
            repeat = self._command(self.method.repeat)
            page = Page(self.path, tuple(self.about), self.hyperparameters, repeat)
            loggers = make_loggers(self.settings.log, self.path, self.hyperparameters)
            sink.add(Console(), self.metrics, page, *loggers, *(make(self.path) for make in report.SINKS))
        return trainer.fit()

    def write_result(self, done: Done) -> None:
        """Write final/. Raises UserError if that fails; early checkpoints remain."""
        try:
            self._write(self.path / FINAL)
        except OSError as error:
            raise UserError(
                f"{self.path / FINAL}: could not be written ({error.strerror or error}); {kept(done)}; "
                f"make room, then: {self.resume_command()}"
            ) from None

    def check_directory(self) -> None:
        """Raise UserError if the run's directory was deleted or renamed since training began. What
        there is, is then saved under its name anew."""
        if not self.parallel.is_main:
            return
        files = {HYPERPARAMETERS_FILE: self.hyperparameters, METRICS_FILE: self.metrics.text}
        lost = {name: text for name, text in files.items() if not (self.path / name).exists()}
        if not lost:
            return
        for name, text in lost.items():
            with replacing_file(self.path / name) as staging:
                staging.write_text(text, encoding="utf-8", newline="")
        saved = ", ".join(sorted(path.name for path in self.path.iterdir()))
        raise UserError(
            f"{setting('out_dir')} {self.path}: was deleted or renamed during the run, with what it held; "
            f"saved there anew: {saved}"
        )

    def close(self, done: Done) -> None:
        """Say what the run did. Exits with the signal's status if it was stopped early."""
        if done.stopped is not None:
            self.say(
                f"stopped by {done.stopped} after step {done.steps}; {kept(done)}",
                f"resume: {self.resume_command()}",
            )
            raise SystemExit(done.stopped.status)
        self.say(*outcome(self, done))

    @property
    def figures(self) -> tuple[str, ...]:
        """What is measured besides losses, as metrics.csv has it."""
        return (*self.objective.figures, *(name for probe in self.probes for name in probe.figures))

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """The tokens that answers are taught to end with."""
        return tuple(taught_stops(self.loaded.tokenizer, self.style))

    def _write(self, directory: Path, training: dict[str, Any] | None = None) -> None:
        """Write a checkpoint directory; with the training state, a run can resume from it. All
        ranks call this together."""
        failed, content = None, self.method.content(self.model)
        if not isinstance(content, Adapter):
            content = self._as_stored(content)
        try:
            with self.parallel.gathering((content, training)) as whole:
                if whole is not None:
                    self._write_whole(directory, *whole)
        except OSError as error:  # on rank 0, which writes
            failed = error
        failed = self.parallel.broadcast(failed)
        if failed is not None:
            raise failed

    def _write_whole(
        self, directory: Path, content: Adapter | dict[str, Any], training: dict[str, Any] | None
    ) -> None:
        state = None
        if training is not None:
            begun = start_state(self)
            state = {**training, **begun, "facts": self.facts, "metrics": self.metrics.text}
        sources = [*self.added.sources, *self.loaded.chain.sources]
        beside = Beside(self.style, self.hyperparameters, state, self.stops)

        def check(_: Path) -> None:
            # Before the directory gets its name: a crash in between must not leave an earlier run's
            # result beside it.
            self.forget_earlier()

        config = self.model.config
        if isinstance(content, Adapter):
            if content.rows is not None:  # a base is known by its architecture
                config = dataclasses.replace(config, vocab_size=self.added.base_rows)
            adapter = dataclasses.replace(
                content,
                whole=self._as_stored(content.whole),
                base=reference_to(self.base, directory, self.loaded.quantized),
            )
            write_adapter(directory, adapter, config, sidecars_from=sources, beside=beside, check=check)
        else:
            beside = dataclasses.replace(beside, base=self.loaded.chain.base)
            write_full(directory, content, config, sidecars_from=sources, beside=beside, check=check)

    def _as_stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the base in the base's dtype."""
        return {
            name: tensor.to(self.stored_dtypes.get(name, tensor.dtype)) for name, tensor in tensors.items()
        }

    # ---- what it says

    def _say(self, *lines: str) -> None:
        lines = [with_options(line, self._option) for line in lines]
        self.about += lines
        console.say(*lines)

    def _option(self, name: str) -> str:
        return cli.option_for(type(self.settings), name)

    def resume_command(self) -> str:
        """The command that continues this run."""
        return self._command(self.method.resume)

    def _command(self, form: str) -> str:
        config = shlex.quote(str(self.path / HYPERPARAMETERS_FILE))
        return form.format(command=cli.this_command(), config=config)
