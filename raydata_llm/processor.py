"""`build_llm_processor`: a config and two functions of a row become a lazy `Dataset -> Dataset`.

Owns the three operators and how Ray Data runs them. Building checks what the driver can check and runs nothing; no
DataContext is changed. Knows no tokens; imports Ray only when a dataset is handed in.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from raydata_llm.config import EngineProcessorConfig, ProcessorConfig
from raydata_llm.dispatch_plan import DispatchPlan, ReplicaPlan
from raydata_llm.engine.known_names import named_arguments
from raydata_llm.finish import FinishPlan, finish
from raydata_llm.model_source import check_model, settle_hf_overrides
from raydata_llm.pooled_rows import pooling_task
from raydata_llm.prepare import prepare
from raydata_llm.prepare_plan import PreparePlan, RowFunction
from raydata_llm.processor_stages import Stage, find_stage, input_columns, stages_of
from raydata_llm.ray_operators import (
    cpus_of_tasks,
    dispatcher_options,
    map_blocks,
    regroup,
    replica_options,
    task_options,
    tell_of_waiting_tasks,
    with_own_context,
)
from raydata_llm.redaction import masked_logger
from raydata_llm.replica import EngineFactory, start_engine
from raydata_llm.replica_gang import engine_factory
from raydata_llm.replica_pool import Cluster, ReplicaPool
from raydata_llm.resume import PLAN_SETTING
from raydata_llm.resume_plan import resume_plan
from raydata_llm.sink_dataset import refuse_ray_checkpoint, with_setting
from raydata_llm.stage_config import StageConfig
from raydata_llm.tokenizer import check_chat_template

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from raydata_llm.job_report import JobReport
    from raydata_llm.job_run import Job

logger = masked_logger(__name__)


class Processor:
    """A lazy `Dataset -> Dataset`, to be used on any number of datasets.

    Made by `build_llm_processor`.
    """

    def __init__(
        self,
        config: EngineProcessorConfig,
        preprocess: RowFunction | None = None,
        postprocess: RowFunction | None = None,
        *,
        preprocess_map_kwargs: Mapping[str, Any] | None = None,
        postprocess_map_kwargs: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        output_schema: pa.Schema | None = None,
        engine_factory: EngineFactory = start_engine,
    ) -> None:
        self.config = config = _with_settled_overrides(config)
        self.preprocess = preprocess
        self.postprocess = postprocess
        self.preprocess_map_kwargs = dict(preprocess_map_kwargs or {})
        self.postprocess_map_kwargs = dict(postprocess_map_kwargs or {})
        self.stages: OrderedDict[str, Stage] = stages_of(config, chat_template_kwargs)
        self._engine_factory = engine_factory
        self._job: Job | None = None
        chat, tokenize, detokenize = config.chat_template_options, config.tokenize_options, config.detokenize_options
        engine = config.engine_config()
        self._prepare_plan = PreparePlan(
            model_source=_tokenizer_source(config, chat, tokenize),
            skip_tokenizer=engine.skip_tokenizer_init,
            trust_remote_code=engine.trust_remote_code,
            preprocess=_bound("preprocess", preprocess, preprocess_map_kwargs),
            apply_chat_template=chat.enabled,
            chat_template=chat.chat_template,
            chat_template_kwargs=chat.chat_template_kwargs or chat_template_kwargs or {},
            tokenize=tokenize.enabled,
            keep_going=config.should_continue_on_error,
            resume=resume_plan(config),
            adapters=(config.dynamic_lora_loading_path or "") if engine.enable_lora else None,
            adapter_sources=tuple(config.allowed_lora_sources),
            adapters_of=config.model_source,
            prompt_embeds=engine.enable_prompt_embeds,
            task=pooling_task(config.task_type),
            engine=engine,
        )
        self._finish_plan = FinishPlan(
            model_source=detokenize.model_source or config.model_source,
            skip_tokenizer=engine.skip_tokenizer_init,
            trust_remote_code=engine.trust_remote_code,
            detokenize=detokenize.enabled,
            postprocess=_bound("postprocess", postprocess, postprocess_map_kwargs),
            keep_going=config.should_continue_on_error,
            max_error_fraction=config.max_error_fraction,
            output_schema=_checked_schema(output_schema),
            task=pooling_task(config.task_type),
        )
        self._prepare_options = task_options("preprocess_map_kwargs", preprocess_map_kwargs, [chat, tokenize], config)
        self._finish_options = task_options("postprocess_map_kwargs", postprocess_map_kwargs, [detokenize], config)

    def __call__(self, dataset: Dataset) -> Dataset:
        """The dataset with an answer in each row; nothing runs until it is consumed.

        Raises:
            ValueError: for anything that is not a `ray.data.Dataset`.
        """
        if not hasattr(dataset, "map_batches"):
            raise ValueError(
                f"dataset={type(dataset).__name__} is not valid: give a ray.data.Dataset, such as "
                "ray.data.from_items([...]), from_pandas(...) or read_parquet(...)"
            )
        from raydata_llm.dispatcher import Dispatcher  # imports Ray

        if self._prepare_plan.resume is not None:
            refuse_ray_checkpoint(dataset)
            dataset = with_setting(dataset, PLAN_SETTING, self._prepare_plan.resume)
        dataset = with_own_context(dataset, preserve_order=self.config.preserve_order)
        cluster = Cluster.current()
        pool = ReplicaPool.plan(self.config, cluster)
        for function, options in (("preprocess", self._prepare_options), ("postprocess", self._finish_options)):
            tell_of_waiting_tasks(function, options, cluster)
        # Ray Data hands a small Parquet folder on as one block, which would keep one replica busy; and tiny blocks
        # would be as many tasks. Exact sizes also keep a block's rows the same in every run.
        rows, cpus = pool.block_rows, cpus_of_tasks(dataset, cluster)
        dataset = regroup(dataset, rows, cluster)
        self._job = job = self._start_job(pool)
        prepare_kwargs = {"plan": self._prepare_plan, "stats_sender": job.link}
        dataset = map_blocks(dataset, prepare, rows, fn_kwargs=prepare_kwargs, **cpus | self._prepare_options)
        dataset = map_blocks(dataset, Dispatcher, rows, **self._dispatcher_options(pool, job))
        finish_kwargs = {"plan": self._finish_plan, "stats_sender": job.link}
        finish_options = cpus | self._finish_options
        return job.watch(map_blocks(dataset, finish, rows, fn_kwargs=finish_kwargs, **finish_options))

    def report(self) -> JobReport:
        """What the latest run did, how fast and why not faster; of a run under way, so far.

        A run is one execution of a dataset that this processor returned: a write, a `take`, a loop over it.

        Raises:
            ValueError: when nothing has run yet.
        """
        if self._job is None:
            raise ValueError("there is no report yet: nothing has run; give the processor a dataset and consume it")
        return self._job.report()

    def list_stage_names(self) -> list[str]:
        """The names of the stages that are on, in order, as Ray Data LLM calls them."""
        return list(self.stages)

    def get_stage_by_name(self, name: str) -> Stage:
        """One stage by its name, or an operator: "prepare", "replica" or "finish".

        Raises:
            ValueError: for an unknown name, and a stage that is off.
        """
        return find_stage(self.stages, name)

    def log_input_column_names(self) -> None:
        """Log the columns that a row may have for the first operator; printed where nobody takes log lines."""
        if logger.isEnabledFor(logging.INFO):
            logger.info(input_columns())
        else:
            print(input_columns(), file=sys.stderr)

    def _start_job(self, pool: ReplicaPool) -> Job:
        from raydata_llm.job_run import Job

        return Job.of(self.config, pool)

    def _dispatcher_options(self, pool: ReplicaPool, job: Job) -> dict[str, Any]:
        pending = self.config.max_pending_requests
        factory = self._engine_factory
        if factory is start_engine:
            factory = engine_factory(self.config, pool)
        replica = ReplicaPlan(
            model_source=self.config.model_source,
            engine_kwargs=pool.engine_kwargs,
            actor_options=replica_options(pool, self.config),
            max_pending_rows=pending if pending is not None and pending > 0 else None,
            hang_timeout_s=self.config.hang_timeout_s,
            engine_factory=factory,
            stats_sender=job.link,
        )
        plan = DispatchPlan(
            min_replicas=pool.min_size,
            max_replicas=pool.max_size,
            replica=replica,
            keep_going=self.config.should_continue_on_error,
            job_seed=self.config.engine_config().seed,
            placement_timeout_s=self.config.placement_timeout_s,
        )
        return {"fn_constructor_kwargs": {"plan": plan}, **dispatcher_options(pool, self.config)}


@named_arguments
def build_llm_processor(
    config: ProcessorConfig,
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
    preprocess_map_kwargs: Mapping[str, Any] | None = None,
    postprocess_map_kwargs: Mapping[str, Any] | None = None,
    builder_kwargs: Mapping[str, Any] | None = None,
    *,
    output_schema: pa.Schema | None = None,
) -> Processor:
    """Build a processor: a lazy `Dataset -> Dataset` that answers each row with a model.

    Args:
        config: The model, the engine's settings and the pool.
        preprocess: Row to a dict with `messages`, `prompt` or `tokenized_prompt`, `sampling_params`, and anything
            that `postprocess` should see.
        postprocess: Row, with its input columns and the engine's, to the row that is wanted.
        preprocess_map_kwargs: Ray options of the tasks that run `preprocess`: num_cpus, memory, concurrency, ...
        postprocess_map_kwargs: The same for `postprocess`.
        builder_kwargs: {"chat_template_kwargs": {...}}, variables of the chat template.
        output_schema: A `pyarrow.Schema` of the output: its columns in this order, in these types, null where a row has
            none. A row that does not fit fails. Without it, a block takes the types of its good rows.

    Raises:
        ValueError: for what the driver can tell is wrong with the config or the model's files.
    """
    if not isinstance(config, EngineProcessorConfig):
        raise ValueError(f"config={_type_name(config)} is not valid: give an EngineProcessorConfig of raydata_llm")
    processor = Processor(
        config,
        preprocess,
        postprocess,
        preprocess_map_kwargs=preprocess_map_kwargs,
        postprocess_map_kwargs=postprocess_map_kwargs,
        chat_template_kwargs=_chat_template_kwargs(builder_kwargs or {}),
        output_schema=output_schema,
    )
    _check_template(processor)
    check_model(config.model_source, config.engine_config(), task=pooling_task(config.task_type))
    return processor


build_processor = build_llm_processor


def _check_template(processor: Processor) -> None:
    plan = processor._prepare_plan
    given = plan.chat_template or plan.chat_template_kwargs.get("chat_template")
    if given is None:
        return
    if not isinstance(given, str):
        raise ValueError(f"chat_template={given!r} is a {type(given).__name__}: give a Jinja template as text")
    check_chat_template(None, given)


def _with_settled_overrides(config: EngineProcessorConfig) -> EngineProcessorConfig:
    """The config with values in place of a function of the model's: replicas, reports and later runs see the values."""
    overrides = config.engine_kwargs.get("hf_overrides")
    if not callable(overrides):
        return config
    values = settle_hf_overrides(config.model_source, overrides)
    return config.model_copy(update={"engine_kwargs": {**config.engine_kwargs, "hf_overrides": values}})


def _type_name(value: object) -> str:
    """A value's type, or a class, by its full name: Ray Data LLM's configs are called as ours."""
    kind = value if isinstance(value, type) else type(value)
    return f"{'' if kind.__module__ == 'builtins' else f'{kind.__module__}.'}{kind.__qualname__}"


def _chat_template_kwargs(builder_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in builder_kwargs:
        if name not in ("chat_template_kwargs", "telemetry_agent"):
            raise ValueError(
                f"builder_kwargs[{name!r}] is not valid: only 'chat_template_kwargs' is; "
                "preprocess, postprocess and their map kwargs are arguments of their own"
            )
    kwargs = builder_kwargs.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"builder_kwargs['chat_template_kwargs']={kwargs!r} is not valid: give a dict")
    return kwargs


def _checked_schema(schema: Any) -> Any:
    if schema is not None and not all(hasattr(schema, name) for name in ("names", "types", "field")):
        raise ValueError(f"output_schema={schema!r} is not valid: give a pyarrow.schema([(name, type), ...])")
    return schema


def _tokenizer_source(config: EngineProcessorConfig, *stages: StageConfig) -> str:
    sources = {stage.model_source for stage in stages if stage.model_source is not None}
    if len(sources) > 1:
        raise ValueError(
            f"chat_template_stage and tokenize_stage name two tokenizers, {' and '.join(sorted(sources))}: name one"
        )
    return sources.pop() if sources else config.model_source


def _bound(name: str, function: RowFunction | None, map_kwargs: Mapping[str, Any] | None) -> RowFunction | None:
    """The user's function with its further arguments."""
    if function is None:
        return None
    if isinstance(function, type) or not callable(function):
        raise ValueError(f"{name}={function!r} is not valid: give a function of a row that returns a dict")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise ValueError(f"{name}={function!r} is not valid: give a plain function, neither async nor a generator")
    kwargs = map_kwargs or {}
    args = tuple(kwargs.get("fn_args") or ())
    if not args and not kwargs.get("fn_kwargs"):
        return function
    return functools.partial(_call, function, args, dict(kwargs.get("fn_kwargs") or {}))


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], row: dict[str, Any]) -> Any:
    return function(row, *args, **kwargs)
