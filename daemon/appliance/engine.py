"""The one way from a validated request to a result, and the one place that knows all models.

Transports see this interface only. A transport that wants no task per request makes a `Plan` and submits a `Call` whose
`Sink` it is; `infer` does the same for those that would rather await.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from appliance.activity import Activity
from appliance.call import FINISHED, NEW, Call, OutputTable, Plan
from appliance.chooser import Chooser
from appliance.clients import NOBODY, Client, Clients
from appliance.config import Config
from appliance.deadline import Deadlines
from appliance.errands import Errands
from appliance.errors import ApplianceError, BackendError, ModelNotFound, ShuttingDown
from appliance.hardware import Hardware, Survey
from appliance.idler import Idler
from appliance.inventory import Inventory
from appliance.inventory.asking import directories_of, take_inventory
from appliance.jobs import Jobs
from appliance.manifest import MODEL_NAME, check_model_name
from appliance.metrics import ModelStatistics
from appliance.models import Model
from appliance.planner import check_contents, make_plan
from appliance.plugins import BackendRecord
from appliance.quantizer import Quantizer
from appliance.registry import Registry
from appliance.shares import Shares
from appliance.single_flight import SingleFlight
from appliance.text import TextEncoder, Tokens
from appliance.tuner import Tuner
from appliance.types import InferRequest, InferResult, ModelDescription, ModelState, ModelStatus, Tensor, Timings
from appliance.wire.elements import split_elements

_log = logging.getLogger("appliance.engine")

#: Threads that tokenise. Tokenizers release the interpreter lock, so two keep a small machine busy.
_TEXT_THREADS: Final = 2

Listener = Callable[[str, bool], None]


class Engine:
    """All models and the way to them.

    Attributes:
        accepting: False from the moment draining starts.
        clients: Who is connected.
        hardware: The machine and the backends.
        registry: What was learned about it.
        chooser: Decides how models run.
        jobs: Measuring and quantising under way.
        tuner: Measures.
        quantizer: Makes variants of lower precision.
    """

    def __init__(self, config: Config, inventory: Inventory, survey: Survey = take_inventory) -> None:
        self.accepting = True
        self._config = config
        self._loop = asyncio.get_running_loop()
        self.clients = Clients(config.clients, self._client_left)
        self._deadlines = Deadlines(self._loop, lambda call: call.plan.instance.expire(call))
        self._models: dict[str, Model] = {}
        self._repository = Path(config.repository.path).resolve()
        self._activity = Activity()
        self._shares = Shares(self._loop)
        sections = config.backends.items()
        disabled = [name for name, section in sections if not section.enabled]
        pythons = {name: section.python for name, section in sections if section.python}
        self.hardware = Hardware(inventory, directories_of(config), disabled, pythons, survey)
        self.registry = Registry(config.state_directory())
        self._opening: asyncio.Task[None] | None = None
        self.chooser = Chooser(
            self._known_backends,
            lambda: self.hardware.inventory,
            self.registry,
            config.cache_directory(),
            config.state_directory(),
        )
        self.jobs = Jobs()
        errands = Errands(self._activity, self._is_busy, config.tuning.resume_seconds)
        self.tuner = Tuner(self.chooser, self.jobs, errands, self.model, config.tuning, config.cache_directory())
        self.quantizer = Quantizer(self.chooser, self.jobs, errands, self.model, self.tuner)
        self._idler = Idler(self.tuner, self.jobs, self._activity, self._is_busy, self._ready_models, config.tuning)
        self.hardware.on_change = self._hardware_changed
        self._threads = ThreadPoolExecutor(_TEXT_THREADS, thread_name_prefix="text")
        self._listeners: list[Listener] = []
        self._told: dict[str, bool] = {}
        self._startup: set[str] = set()
        self._is_started = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle_work: asyncio.Task[None] | None = None

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        """Find backends and load the startup models; returns when each is READY or FAILED."""
        names = self.scan()
        wanted = names if "*" in self._config.repository.load else list(self._config.repository.load)
        self._startup = set(wanted)
        for failure in await asyncio.gather(*(self.load(name) for name in wanted), return_exceptions=True):
            if isinstance(failure, ApplianceError):
                _log.error("%s", failure)
            elif isinstance(failure, BaseException):
                raise failure
        self._is_started = True
        self._tell()
        self._idle_work = self._loop.create_task(self._begin_idle_work())

    async def _begin_idle_work(self) -> None:
        """What can wait until the startup models serve."""
        await self._open_registry()
        self.hardware.watch()
        await self._resume_wanted()
        self._idler.start()

    async def _resume_wanted(self) -> None:
        """Queue again what somebody asked for before the daemon was stopped."""
        for wanted in self.registry.wanted():
            question = wanted.question
            try:
                if wanted.kind == "tune":
                    await self.tuner.tune(wanted.model, question.get("budget_seconds"), bool(question.get("fresh")))
                else:
                    await self.quantizer.quantize(wanted.model, **question)
            except (ApplianceError, TypeError) as error:
                _log.warning("%s %s is not taken up again: %s", wanted.kind, wanted.model, error)
                await self.registry.remove_wanted(wanted.model, wanted.kind)

    def begin_drain(self) -> None:
        """Refuse what is new and say so to everybody who watches."""
        self.accepting = False
        self._tell()

    async def stop(self, grace_seconds: float) -> None:
        """Let requests in flight finish within the grace, end the workers."""
        self.begin_drain()
        if self._idle_work is not None:
            self._idle_work.cancel()
        self._idler.stop()
        await self.jobs.close()
        await self.hardware.stop()
        await asyncio.gather(*(model.stop(grace_seconds) for model in self._models.values()))
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self.registry.close()

    def scan(self) -> list[str]:
        """Look for model directories; returns the names of all models, sorted."""
        try:
            entries = [
                entry.name for entry in self._repository.iterdir() if entry.is_dir() and not entry.name.startswith(".")
            ]
        except OSError as error:
            _log.warning("cannot read the model repository: %s", error.strerror)
            return sorted(self._models)
        for name in set(self._models) - set(entries):
            if self._models[name].is_idle:
                del self._models[name]
        for name in entries:
            if MODEL_NAME.fullmatch(name):
                self._model_or_new(name)
            elif name not in self._told:
                self._told[name] = False
                _log.warning(
                    "ignoring the directory %r of the model repository: the rule is %s", name, MODEL_NAME.pattern
                )
        return sorted(self._models)

    def _model_or_new(self, name: str) -> Model:
        model = self._models.get(name)
        if model is None:
            model = Model(
                name,
                self._repository / name,
                self.chooser,
                self._config.workers,
                self._deadlines,
                self._activity,
                self._shares,
                self._model_changed,
            )
            self._models[name] = model
        return model

    async def diagnose(self, environment: Mapping[str, str]) -> dict[str, Any]:
        """What is wrong with the installation, and what to do about it.

        Args:
            environment: Environment variables of whoever asks.

        Returns:
            ``findings``, the worst first; ``healthy`` where none is worse than a note; ``checks``, names of all made.
        """
        # Late: a daemon that nobody asks need not have it in memory.
        from appliance.doctor.diagnosis import CHECKS, diagnose, is_healthy
        from appliance.doctor.gathering import gather_facts

        self.scan()
        models = [model for _, model in sorted(self._models.items())]
        facts = await gather_facts(
            await self.hardware.refresh(),
            await self.backends(),
            models,
            self.tuner,
            self.registry,
            self._config,
            environment,
        )
        findings = diagnose(facts)
        return {
            "findings": [asdict(finding) for finding in findings],
            "healthy": is_healthy(findings),
            "checks": list(CHECKS),
        }

    def _hardware_changed(self) -> None:
        """Models leave devices that are gone, and come back to those that are there again."""
        self._idler.look_again()
        for model in self._models.values():
            if model.variant or model.has_lost_its_device:
                task = self._loop.create_task(self._follow_hardware(model))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _follow_hardware(self, model: Model) -> None:
        placed = model.requested_device
        device = self.hardware.inventory.device(placed)
        try:
            if model.has_lost_its_device:
                await model.load()
            elif device is None:
                await model.displace(placed, "it is not there any more")
            elif device.failed is not None:
                await model.displace(placed, device.failed.reason)
            elif model.is_displaced:
                await self.tuner.restore(model.name)
        except ApplianceError as error:
            _log.error("%s: %s", model.name, error)

    def _client_left(self, client: Client) -> None:
        for model in self._models.values():
            model.forget(client)

    def _is_busy(self) -> bool:
        return any(model.is_busy for model in self._models.values())

    def _ready_models(self) -> list[Model]:
        return [model for _, model in sorted(self._models.items()) if model.state is ModelState.READY]

    async def backends(self) -> Mapping[str, BackendRecord]:
        """Every backend by name, probed once and on first need."""
        return await self.hardware.backends()

    async def _known_backends(self) -> Mapping[str, BackendRecord]:
        """The backends, once what the registry knows of them can be looked up too."""
        records, _ = await asyncio.gather(self.hardware.backends(), self._open_registry())
        return records

    async def _open_registry(self) -> None:
        if self._opening is None:
            self._opening = self._loop.create_task(self.registry.open())
        await asyncio.shield(self._opening)

    # ---------------------------------------------------------------- models

    def model(self, name: str) -> Model:
        """The model of that name.

        Raises:
            ModelNotFound: The repository has none.
            InvalidRequest: `name` cannot be a model's.
        """
        model = self._models.get(name)
        if model is None:
            check_model_name(name)
            raise ModelNotFound(f"cannot find model {name!r}: the repository has none of that name")
        return model

    def is_ready(self) -> bool:
        """True once the startup models are READY or FAILED (with `strict`, all READY) and until draining starts."""
        if not self.accepting or not self._is_started:
            return False
        if not self._config.repository.strict:
            return True
        models = (self._models.get(name) for name in self._startup)
        return all(model is not None and model.state is ModelState.READY for model in models)

    def model_is_ready(self, name: str, version: str = "") -> bool:
        """True where the model answers requests now.

        Raises:
            ModelNotFound: No such model or version.
            InvalidRequest: `name` cannot be a model's.
        """
        model = self.model(name)
        model.check_version(version)
        return self.accepting and model.state is ModelState.READY

    def describe(self, name: str, version: str = "") -> ModelDescription:
        """What a client must know to call a model.

        Raises:
            ModelNotFound: No such model or version.
            ModelNotReady: It was never loaded.
        """
        return self.model(name).describe(version)

    def statuses(self) -> list[ModelStatus]:
        """Every model of the repository, by name."""
        self.scan()
        return [self._models[name].status() for name in sorted(self._models)]

    def statistics(self, name: str = "", version: str = "") -> list[tuple[ModelStatus, ModelStatistics]]:
        """Counters of one model, or of all that were ever loaded.

        Raises:
            ModelNotFound: No such model or version.
        """
        if name:
            model = self.model(name)
            model.check_version(version)
            return [(model.status(), model.statistics)]
        return [(model.status(), model.statistics) for _, model in sorted(self._models.items()) if model.version]

    async def load(self, name: str) -> None:
        """Load a model, or reload it if it changed on disk. Concurrent loads of one model join.

        Raises:
            ApplianceError: The model cannot be loaded; what served before still serves.
        """
        check_model_name(name)
        if not self.accepting:
            raise ShuttingDown("cannot load a model: the daemon is stopping")
        if name not in self._models and not (self._repository / name).is_dir():
            raise ModelNotFound(f"cannot find model {name!r}: the repository has none of that name")
        await self._model_or_new(name).load()
        self._idler.look_again()

    async def unload(self, name: str) -> None:
        """Unload a model; requests it has admitted are answered first.

        Raises:
            ModelNotFound: No such model.
        """
        await self.model(name).unload()

    # ---------------------------------------------------------------- readiness listeners

    def watch(self, listener: Listener) -> Callable[[], None]:
        """Have `listener` called with (model name, or "" for the server, and is_ready) on every change.

        Returns:
            A function that ends it.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def _model_changed(self, name: str) -> None:
        self._tell(name)
        model = self._models.get(name)
        if model is not None and model.state is ModelState.RESTARTING and model.requested_device != "cpu":
            self.hardware.doubt()  # its worker may have died of the device

    def _tell(self, *names: str) -> None:
        for name in names or tuple(self._models):
            model = self._models.get(name)
            self._tell_one(name, self.accepting and model is not None and model.state is ModelState.READY)
        self._tell_one("", self.is_ready())

    def _tell_one(self, name: str, is_ready: bool) -> None:
        if self._told.get(name, False) is not is_ready:
            self._told[name] = is_ready
            for listener in tuple(self._listeners):
                listener(name, is_ready)

    # ---------------------------------------------------------------- requests

    def plan(
        self, name: str, version: str, inputs: Sequence[tuple[str, str, tuple[int, ...]]], outputs: Sequence[str]
    ) -> Plan:
        """Check a request's head: (name, datatype, shape) of each input, and the outputs wanted (none for all).

        Raises:
            ShuttingDown, ModelNotFound, ModelNotReady, InvalidRequest: The request cannot run.
        """
        if not self.accepting:
            raise ShuttingDown("cannot run the request: the daemon is stopping")
        instance = self.model(name).serving(version)
        return make_plan(instance, instance.signature, inputs, outputs)

    def submit(self, name: str, call: Call) -> None:
        """Queue a call; tokenises its texts first where it has any. The sink hears of everything after this.

        Raises:
            ApplianceError: The call is not admitted.
        """
        instance = call.plan.instance
        try:
            if not self.accepting:
                raise self._refused(name, ShuttingDown("cannot run the request: the daemon is stopping"))
            try:
                call.charge()
            except ApplianceError as error:
                raise self._refused(name, error) from None
            if instance.single_flight is not None:
                self._submit_shared(name, call, instance.single_flight)
            elif call.plan.is_text:
                self._submit_text(name, call)
            else:
                instance.submit(call)
        except ApplianceError:
            call.let_go()
            raise

    def _refused(self, name: str, error: ApplianceError) -> ApplianceError:
        """Count a request that does not get as far as its instance, which counts those it refuses itself."""
        self.model(name).statistics.refuse(error.kind)
        return error

    def _submit_shared(self, name: str, call: Call, single_flight: SingleFlight) -> None:
        """Queue a call of a model with a cache, unless an answer is known or on its way."""
        instance = call.plan.instance
        if not instance.accepts:
            raise self._refused(name, instance.refusal())
        queued = single_flight.enter(call)
        is_own = queued is call
        if queued is not None:
            try:
                if queued.plan.is_text:
                    self._submit_text(name, queued, is_watched=not is_own)
                else:
                    instance.submit(queued, was_held=not is_own)
            except ApplianceError:
                if is_own or single_flight.give_up(queued, call):
                    raise
        if call.deadline_ns and not is_own:
            self._deadlines.add(call)

    def _submit_text(self, name: str, call: Call, is_watched: bool = False) -> None:
        """Have a call's texts tokenised, and queue it then.

        Args:
            name: The model.
            call: The call.
            is_watched: Somebody else watches its deadline.

        Raises:
            ApplianceError: It is not admitted.
        """
        instance = call.plan.instance
        if not instance.accepts:
            raise self._refused(name, instance.refusal())
        try:
            instance.check_room(call.nbytes)
        except ApplianceError as error:
            raise self._refused(name, error) from None
        # Taken now: a reload may bring another tokenizer while this one works.
        model = self.model(name)
        encoder = model.encoder
        if encoder is None:
            raise instance.refusal()
        if call.deadline_ns and not is_watched:
            self._deadlines.add(call)
        instance.hold(call.nbytes)
        task = self._loop.create_task(self._tokenise(encoder, model.statistics, call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tokenise(self, encoder: TextEncoder, statistics: ModelStatistics, call: Call) -> None:
        instance = call.plan.instance
        nbytes = call.nbytes
        try:
            tokens = await self._tokens(encoder, call)
            # Withdrawn meanwhile, a call is nobody's any more, and its id may already be another's.
            if tokens is not None and call.state is NEW:
                statistics.tokenise.add(tokens.took_ns)
                instance.give_tokens(call, _text_place(call), tokens)
                instance.submit(call, was_held=True)
        except ApplianceError as error:
            _fail(call, error)
        except Exception:
            _log.exception("tokenising for %s failed", instance.placement.load.model)
            _fail(call, BackendError("cannot run the request: tokenising failed"))
        finally:
            instance.unhold(nbytes)

    async def _tokens(self, encoder: TextEncoder, call: Call) -> Tokens | None:
        """The tokens of a call's texts; None where it was withdrawn.

        Raises:
            InvalidRequest: Its texts cannot be tokenised.
        """
        if call.state is not NEW:
            return None
        name, place = call.plan.instance.signature.text, _text_place(call)
        texts = split_elements(call.contents[place], call.plan.tensors[place].elements, name)
        try:
            return await self._loop.run_in_executor(self._threads, _encode, encoder, texts, call)
        except Exception:
            if call.state is not NEW:
                return None
            raise

    async def infer(self, request: InferRequest) -> InferResult:
        """Run one request. Cancelling the task withdraws it.

        Raises:
            ApplianceError: As the request deserves.
        """
        heads = [(tensor.name, tensor.datatype, tensor.shape) for tensor in request.inputs]
        plan = self.plan(request.model, request.version, heads, request.outputs)
        contents = [tensor.content for tensor in request.inputs]
        nbytes = check_contents(plan, [tensor.name for tensor in request.inputs], contents)
        waiter = _Waiter(self._loop.create_future())
        call = Call(plan, contents, waiter, client=request.client or NOBODY)
        call.ask(request.options, request.timeout_us)
        call.nbytes = nbytes
        self.submit(request.model, call)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            call.plan.instance.cancel(call)
            raise


def _encode(encoder: TextEncoder, texts: Sequence[bytes], call: Call) -> Tokens | None:
    """In a thread: the tokens, unless the call was withdrawn while it waited for the thread."""
    return encoder.encode(texts) if call.state is NEW else None


def _text_place(call: Call) -> int:
    return next(place for place, tensor in enumerate(call.plan.tensors) if tensor.place < 0)


def _fail(call: Call, error: ApplianceError) -> None:
    call.state = FINISHED
    call.let_go()
    call.sink.fail(call, error)
    call.sink.flush()


class _Waiter:
    """Turns one call's answer into a future's result."""

    __slots__ = ("future",)

    def __init__(self, future: "asyncio.Future[InferResult]") -> None:
        self.future = future

    def deliver(self, call: Call, table: OutputTable, memory: memoryview, row: int, timings: Timings) -> None:
        """Copy the outputs out of the slab."""
        if self.future.done():
            return
        plan = call.plan
        outputs: list[Tensor] = [table.tensor(index, memory, row, plan.rows) for index in plan.outputs]
        load = plan.instance.placement.load
        own = Timings(
            timings.decode_ns,
            call.tokenise_ns,
            call.queue_ns,
            timings.copy_ns,
            timings.compute_ns,
            timings.postprocess_ns,
            timings.batch_rows,
        )
        self.future.set_result(InferResult(load.model, load.version, outputs, own))

    def fail(self, call: Call, error: ApplianceError) -> None:
        """Raise in the waiting task."""
        if not self.future.done():
            self.future.set_exception(error)

    def flush(self) -> None:
        """Nothing is held back."""
