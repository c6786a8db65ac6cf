"""`LLM`: the engine without Ray, as vLLM's offline class.

Owns one engine and one tokenizer, and which methods the engine's kind allows. What happens in a call is
`generation.py`'s, what becomes of texts `llm_texts.py`'s. Knows no Ray and no rows. Used by one thread at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.known_names import named_arguments
from raydata_llm.engine.model_files import ModelFiles
from raydata_llm.engine.pooling_model import choose_runner
from raydata_llm.engine.request import LoRARequest, RequestOutput
from raydata_llm.engine.sampling_params import SAMPLING_REMEDIES, SamplingParams
from raydata_llm.generation import Generation
from raydata_llm.llm_beam import BeamMethods
from raydata_llm.llm_control import ControlMethods, read_profiler_config
from raydata_llm.llm_metrics import Metric, RequestHistograms, list_metrics
from raydata_llm.llm_pooling import PoolingMethods, read_older_settings
from raydata_llm.llm_queue import Asked, ChatOptions, Priority, QueueMethods
from raydata_llm.llm_sleep import SleepMethods
from raydata_llm.llm_texts import Texts, encode_conversations, write_conversations
from raydata_llm.llm_views import EngineView, ModelConfigView
from raydata_llm.model_source import named_as, resolve_model, with_revision
from raydata_llm.openmp import wait_passively
from raydata_llm.pooling_prompts import Tokenization
from raydata_llm.progress import Progress
from raydata_llm.prompts import (
    ParamsLike,
    Prompt,
    check_priority,
    list_conversations,
    list_prompts,
    pair_adapters,
    pair_params,
    read_prompt,
)
from raydata_llm.tokenizer import (
    CONTENT_FORMATS,
    check_chat_template,
    encode_chat,
    load_tokenizer,
    render_chat,
)
from raydata_llm.vllm_settings import refuse_arguments, split_llm_settings

if TYPE_CHECKING:
    from raydata_llm.engine.engine import Engine
    from raydata_llm.engine.engine_group import EngineGroup
    from raydata_llm.engine.pooling_engine import PoolingEngine

_ELSEWHERE = {**SAMPLING_REMEDIES, "prompt_token_ids": "give prompts=[{'prompt_token_ids': [...]}]"}


class LLM(SleepMethods, QueueMethods, BeamMethods, PoolingMethods, ControlMethods):
    """Loads a model and answers lists of prompts: with text, or with embeddings, classes and scores.

    Args:
        model: A local folder, a GGUF file, a Hub id, or a remote folder such as `s3://bucket/folder`.
        tokenizer: Where the tokenizer lies if not with the model, or a ready transformers tokenizer.
        skip_tokenizer_init: Load no tokenizer: token ids in, token ids out.
        trust_remote_code: Run code that comes with the tokenizer.
        chat_template: Of `chat`, instead of the tokenizer's own: a Jinja template, or a file that holds one.
        on_error: "return" gives a prompt that cannot be run as a result with `error` set; "raise" raises the first
            such prompt's error, before any prompt of the call is run where that can be told, as vLLM does.
        revision, tokenizer_revision: Which version of a model, or tokenizer, on the Hub.
        profiler_config: vLLM's, with `torch_profiler_dir`, for `start_profile`.
        data_parallel_size: Engines in processes of their own that share each call's prompts, a GPU or more each.
        engine_kwargs: Fields of `EngineConfig`, such as `dtype`, `max_model_len`, `seed` or `runner`;
            `task="embed"` and the like, as older vLLMs had it; and vLLM's other settings, which are left out with a
            warning if they cannot change an answer.

    Raises:
        ValueError: naming the setting, its value and the remedy.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: Any = None,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        chat_template: str | os.PathLike[str] | None = None,
        on_error: Literal["return", "raise"] = "return",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        profiler_config: Any = None,
        data_parallel_size: int = 1,
        **engine_kwargs: Any,
    ) -> None:
        own = {"skip_tokenizer_init": skip_tokenizer_init, "trust_remote_code": trust_remote_code}
        if on_error not in ("return", "raise"):
            raise ValueError(f"on_error={on_error!r} is not valid: choose 'return' or 'raise'")
        self._raises = on_error == "raise"
        self._chat_template = _read_template(chat_template)
        self._profiler_config = read_profiler_config(profiler_config)
        config = EngineConfig.from_mapping(model, {**split_llm_settings(read_older_settings(engine_kwargs)), **own})
        if skip_tokenizer_init and tokenizer is not None:
            raise ValueError(f"tokenizer={tokenizer!r} is not valid with skip_tokenizer_init=True: give one of them")
        named = model
        if isinstance(tokenizer, str):
            tokenizer = with_revision(tokenizer, tokenizer_revision, "tokenizer_revision")
        elif tokenizer_revision not in (None, "main", revision):
            tokenizer = with_revision(model, tokenizer_revision, "tokenizer_revision")
        with named_as("model"):
            model = with_revision(model, revision) if isinstance(model, str) else model
            path = resolve_model(model, load_format=config.load_format)
        config = dataclasses.replace(config, model=path)
        # Before the tokenizer, whose reader takes what is wrong with other files for a fault of its own.
        is_pooling = _check_files(config) == "pooling"
        self._tokenizer = None if skip_tokenizer_init else _find_tokenizer(tokenizer, path, trust_remote_code)
        wait_passively()
        # Imported here: it imports torch, which whoever only imports this class need not wait for.
        from raydata_llm.engine.engine import Engine
        from raydata_llm.engine.pooling_engine import PoolingEngine

        self._engine: Engine | EngineGroup | PoolingEngine | None
        if data_parallel_size != 1:
            self._engine = _make_group(config, data_parallel_size, self._tokenizer, is_pooling=is_pooling)
        else:
            self._engine = PoolingEngine(config) if is_pooling else Engine(config, tokenizer=self._tokenizer)
        self._config, self._data_parallel_size = config, data_parallel_size
        runner = "pooling" if is_pooling else "generate"
        self.model_config = ModelConfigView(config, named, self._engine.max_model_len, runner)
        self.llm_engine = EngineView(self)
        self._seed, self._model = config.seed, model
        self._request_ids = itertools.count()
        self._occurrences: Counter[bytes] = Counter()
        self._texts = Texts(self._tokenizer)
        self._histograms = RequestHistograms()

    @classmethod
    def from_engine_args(cls, engine_args: Any) -> LLM:
        """An LLM from `EngineArgs`, of this package or of vLLM."""
        return cls(**vars(engine_args))

    @functools.partial(named_arguments, elsewhere=_ELSEWHERE)
    def generate(
        self,
        prompts: Any,
        sampling_params: ParamsLike | Sequence[ParamsLike] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        priority: Priority = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Generate from prompts.

        Args:
            prompts: One or a list, mixed at will: text, `{"prompt": text}`, `{"prompt_token_ids": [...]}`, token ids;
                with `enable_prompt_embeds=True` also `{"prompt_embeds": tensor}` of shape [tokens, hidden_size].
            sampling_params: For all, or a list with one each; None takes the model's defaults.
            use_tqdm: Show a progress bar (on a terminal or in a notebook), or a class to use as tqdm.
            lora_request: An adapter for all, or a list with one (or None) each; needs `enable_lora=True`.
            priority: A number for all, or a list with one each. Taken and not used: the engine chooses the order,
                which changes no result.
            tokenization_kwargs: {"truncation": True, "max_length": n, "add_special_tokens": False}, for texts.
            mm_processor_kwargs: For images, which are not read.

        Returns:
            Results in the order of the prompts. A prompt that cannot be run has `error` set, and reading one of its
            outputs says that error (see `on_error` of the LLM); so have those that were not done when Ctrl-C
            interrupted the call.

        Raises:
            ValueError: for arguments that are wrong for all prompts.
        """
        refuse_arguments(mm_processor_kwargs=mm_processor_kwargs)
        asked = self._ask_prompts(prompts, sampling_params, lora_request, tokenization_kwargs, priority)
        return self._run(asked, use_tqdm)

    def _ask_prompts(
        self,
        prompts: Any,
        sampling_params: Any,
        lora_request: Any,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        priority: Priority = None,
    ) -> Asked:
        tokenization = Tokenization.from_mapping(tokenization_kwargs) if tokenization_kwargs else None
        asked = pair_params(list_prompts(prompts), sampling_params, self._live_engine().default_sampling_params)
        check_priority(priority, len(asked))
        for prompt in asked:
            prompt.attempt(read_prompt)
            if self._tokenizer is None and prompt.text is not None and prompt.token_ids is None:
                raise ValueError(
                    f"prompts[{prompt.index}] is text, but skip_tokenizer_init=True left the tokenizer out: "
                    'give {"prompt_token_ids": [...]}'
                )
        pair_adapters(asked, lora_request)
        return asked, functools.partial(self._texts.encode, tokenization, self._live_engine().max_model_len)

    @functools.partial(named_arguments, elsewhere=_ELSEWHERE)
    def chat(
        self,
        messages: Any,
        sampling_params: ParamsLike | Sequence[ParamsLike] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        priority: Priority = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Generate the next message of conversations.

        Args:
            messages: One conversation (a list of dicts with `role` and `content`) or a list of them.
            sampling_params: As in `generate`.
            use_tqdm: As in `generate`.
            lora_request: As in `generate`.
            priority: As in `generate`.
            chat_template: A Jinja template instead of the LLM's, or the tokenizer's own.
            chat_template_content_format: "openai" gives the template a message's content as a list of parts; "string",
                and "auto", as text.
            add_generation_prompt: Open the assistant's turn.
            continue_final_message: Go on in the last message; needs `add_generation_prompt=False`.
            tools: Function schemas, for templates that know tools.
            chat_template_kwargs: Further variables of the template.
            tokenization_kwargs: As in `generate`; special tokens are not added unless it says so, since templates
                write them.
            mm_processor_kwargs: As in `generate`.

        Returns:
            As `generate`; `prompt` is the rendered text.

        Raises:
            ValueError: for arguments that are wrong for all conversations.
        """
        refuse_arguments(mm_processor_kwargs=mm_processor_kwargs)
        template = ChatOptions(
            chat_template=chat_template,
            chat_template_content_format=chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        asked = self._ask_conversations(
            messages, sampling_params, lora_request, template, tokenization_kwargs, priority
        )
        return self._run(asked, use_tqdm)

    def _ask_conversations(
        self,
        messages: Any,
        sampling_params: Any,
        lora_request: Any,
        options: ChatOptions,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        priority: Priority = None,
    ) -> Asked:
        if options.chat_template is None:
            options = dataclasses.replace(options, chat_template=self._chat_template)
        if options.add_generation_prompt and options.continue_final_message:
            raise ValueError("continue_final_message=True needs add_generation_prompt=False: go on, or begin anew")
        if options.chat_template_content_format not in CONTENT_FORMATS:
            known = ", ".join(CONTENT_FORMATS)
            given = f"chat_template_content_format={options.chat_template_content_format!r}"
            raise ValueError(f"{given} is not valid: choose one of {known}")
        check_chat_template(self.get_tokenizer(), options.chat_template, options.chat_template_kwargs)
        defaults = self._live_engine().default_sampling_params
        asked = pair_params(list_conversations(messages), sampling_params, defaults)
        check_priority(priority, len(asked))
        pair_adapters(asked, lora_request)
        if not tokenization_kwargs:
            render = functools.partial(encode_chat, self._tokenizer, **dataclasses.asdict(options))
            return asked, functools.partial(encode_conversations, render, self._live_engine().max_model_len)
        # A template writes special tokens itself.
        tokenization = Tokenization.from_mapping({"add_special_tokens": False, **tokenization_kwargs})
        encode = functools.partial(self._texts.encode, tokenization, self._live_engine().max_model_len)
        write = functools.partial(render_chat, self._tokenizer, **dataclasses.asdict(options))

        def encode_written(prompts: list[Prompt]) -> None:
            write_conversations(write, prompts)
            encode(prompts)

        return asked, encode_written

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer.

        Raises:
            ValueError: when it was left out.
        """
        if self._tokenizer is None:
            raise ValueError("skip_tokenizer_init=True left the tokenizer out: build the LLM with False")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used when no sampling_params are given: the model's generation_config over the neutral values."""
        return SamplingParams.from_mapping(None, self._live_engine().default_sampling_params)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forget all cached prompt prefixes; returns that they are forgotten.

        Args:
            reset_running_requests: Taken and not used: what enqueued prompts have computed is theirs, and goes on.
            reset_connector: Taken and not used: there is no cache beside the engine's.
        """
        self._live_engine().reset_prefix_cache()
        return True

    def reset_mm_cache(self) -> None:
        """Nothing: models of text are run, and no images are cached."""

    def get_world_size(self, include_dp: bool = True) -> int:
        """Processes that the LLM is spread over: `tensor_parallel_size` times `pipeline_parallel_size`.

        Args:
            include_dp: Count those of all `data_parallel_size` engines.
        """
        return self._config.num_ranks * (self._data_parallel_size if include_dp else 1)

    def get_metrics(self) -> list[Metric]:
        """The engine's figures: `Counter`s since it started, `Gauge`s, and `Histogram`s of its results' tokens."""
        return list_metrics(self._open_engine().stats(), self._model) + self._histograms.metrics(self._model)

    def shutdown(self) -> None:
        """Free the device; the LLM cannot generate after. Done again it does nothing."""
        if self._engine is not None:
            self.reset()
            self._engine.shutdown()
            self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _open_engine(self) -> Engine | EngineGroup | PoolingEngine:
        if self._engine is None:
            raise RuntimeError("this LLM was shut down: make a new one")
        return self._engine

    def _live_engine(self) -> Engine | EngineGroup:
        from raydata_llm.engine.pooling_engine import PoolingEngine

        engine = self._open_engine()
        if isinstance(engine, PoolingEngine):
            raise ValueError(
                f"this LLM runs {engine.model.architecture} as a pooling model: use embed, classify, score or encode, "
                "or build it with runner='generate' if the model generates text"
            )
        return engine

    def _settle_enqueued(self, mode: str) -> None:
        if mode == "abort":
            self.reset()
        else:
            self._run_enqueued()

    def _engine_that_can_sleep(self, level: int) -> Engine:
        from raydata_llm.engine.engine import Engine

        engine = self._open_engine()
        if not isinstance(engine, Engine):
            kind = type(engine).__name__
            raise ValueError(f"level={level} is not supported by a {kind}: shut the LLM down, and make it anew")
        if engine.has_unfinished():
            raise ValueError(
                f"level={level} is not valid while enqueued prompts are under way: call wait_for_completion(), or "
                "reset() to forget them"
            )
        return engine

    def _engine_that_searches(self) -> Engine:
        from raydata_llm.engine.engine import Engine

        engine = self._live_engine()
        if not isinstance(engine, Engine):
            raise ValueError(
                "beam_search is not supported with data_parallel_size above 1: build the LLM with 1, and share the "
                "prompts among several of them"
            )
        self._check_nothing_enqueued()
        self._check_awake()
        return engine

    def _live_pooling_engine(self) -> PoolingEngine:
        from raydata_llm.engine.pooling_engine import PoolingEngine

        engine = self._open_engine()
        if not isinstance(engine, PoolingEngine):
            raise ValueError(
                "this LLM generates text: build it with runner='pooling' to use its model for embeddings or classes"
            )
        return engine

    def _begin(self) -> Generation:
        return Generation(
            self._live_engine(),
            self._seed,
            self._request_ids,
            self._occurrences,
            self._finish,
            raises=self._raises,
        )

    def _finish(self, prompt: Prompt, output: RequestOutput) -> None:
        self._texts.finish(prompt, output)
        self._histograms.add(output)

    def _run(self, asked: Asked, use_tqdm: bool | Callable[..., Any]) -> list[RequestOutput]:
        self._check_nothing_enqueued()
        self._check_awake()
        prompts, encode = asked
        generation = self._begin()
        generation.add(prompts, encode)
        with Progress(len(prompts), use_tqdm, "Processed prompts") as progress:
            return generation.run(progress)


def _make_group(config: EngineConfig, count: int, tokenizer: Any, *, is_pooling: bool) -> EngineGroup:
    from raydata_llm.engine.engine_group import EngineGroup

    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"data_parallel_size={count!r} is not valid: give a whole number, 1 or more")
    if is_pooling:
        raise ValueError(f"data_parallel_size={count} is not supported for pooling models: leave it at 1")
    return EngineGroup(config, count, tokenizer)


def _check_files(config: EngineConfig) -> Literal["generate", "pooling"]:
    """Check the model's files as far as that takes no torch; gives what the model is for."""
    files = ModelFiles.open(config.model, load_format=config.load_format, hf_overrides=config.hf_overrides)
    runner = choose_runner(config, files)
    if runner == "generate":
        files.check_weights(files.model_config())
    return runner


def _read_template(given: str | os.PathLike[str] | None) -> str | None:
    """A chat template, or the text of the file that is named.

    Raises:
        ValueError: when a file that is named cannot be read.
    """
    if given is None or (isinstance(given, str) and ("{" in given or "\n" in given)):
        return given if given is None else str(given)
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"chat_template={given!r} is neither a Jinja template nor a file that can be read ({error}): give one"
        ) from error


def _find_tokenizer(tokenizer: Any, model_path: str, trust_remote_code: bool) -> Any:
    if tokenizer is not None and not isinstance(tokenizer, str):
        return tokenizer
    with named_as("model" if tokenizer is None else "tokenizer"):
        path = model_path if tokenizer is None else resolve_model(tokenizer, weights=False)
        return load_tokenizer(path, trust_remote_code=trust_remote_code)
