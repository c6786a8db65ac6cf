"""The methods of `LLM` that take prompts now and give results later: `enqueue`, `as_completed`, `wait_for_completion`.

Owns the queue: what was enqueued and not yet taken. How prompts are run is `generation.py`'s.
Invariant: until `reset`, no result of an enqueued prompt is lost: Ctrl-C, or a loop that is left early, keeps them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydata_llm.engine.request import LoRARequest, RequestOutput
from raydata_llm.generation import Encode, Generation, tell_failures
from raydata_llm.progress import Progress
from raydata_llm.prompts import ParamsLike, Prompt
from raydata_llm.vllm_settings import refuse_arguments

Asked = tuple[list[Prompt], Encode]
ManyParams = ParamsLike | Sequence[ParamsLike] | None
Priority = int | Sequence[int] | None
ManyAdapters = LoRARequest | Sequence[LoRARequest | None] | None


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What `LLM.chat` hands to the chat template."""

    chat_template: str | None = None
    chat_template_content_format: str = "auto"
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[Any] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None


class QueueMethods(ABC):
    """What `LLM` has for prompts whose results are taken later."""

    _queue: Generation | None = None

    @abstractmethod
    def _ask_prompts(
        self,
        prompts: Any,
        sampling_params: Any,
        lora_request: Any,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        priority: Priority = None,
    ) -> Asked:
        """Prompts as `LLM.generate` takes them."""

    @abstractmethod
    def _ask_conversations(
        self,
        messages: Any,
        sampling_params: Any,
        lora_request: Any,
        options: ChatOptions,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        priority: Priority = None,
    ) -> Asked:
        """Conversations as `LLM.chat` takes them."""

    @abstractmethod
    def _begin(self) -> Generation:
        """A generation with no prompts."""

    @abstractmethod
    def _check_awake(self) -> None:
        """Raise while the LLM sleeps."""

    def enqueue(
        self,
        prompts: Any,
        sampling_params: ManyParams = None,
        lora_request: ManyAdapters = None,
        priority: Priority = None,
        use_tqdm: bool | Callable[..., Any] = True,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Queue prompts; arguments and errors as `generate`'s.

        They are tokenised at once, and run by `as_completed` or `wait_for_completion`. `use_tqdm` is taken and not
        used: tokenising is done beside, and what runs the prompts has the bar.

        Returns:
            The `request_id` of each prompt's result.
        """
        refuse_arguments(mm_processor_kwargs=mm_processor_kwargs)
        return self._enqueue(self._ask_prompts(prompts, sampling_params, lora_request, tokenization_kwargs, priority))

    def enqueue_chat(
        self,
        messages: Any,
        sampling_params: ManyParams = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: ManyAdapters = None,
        priority: Priority = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Queue conversations; arguments as `chat`'s, the rest as `enqueue`'s."""
        refuse_arguments(mm_processor_kwargs=mm_processor_kwargs)
        options = ChatOptions(
            chat_template=chat_template,
            chat_template_content_format=chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self._enqueue(
            self._ask_conversations(messages, sampling_params, lora_request, options, tokenization_kwargs, priority)
        )

    def as_completed(self) -> Iterator[RequestOutput]:
        """Run what is enqueued, and yield each result as it finishes.

        The loop may enqueue more, so that prompts can come from a source that is larger than memory:

            llm.enqueue(first_prompts)
            for output in llm.as_completed():
                write(output)
                llm.enqueue(next_prompts())

        Nothing is computed while the loop's body runs, but for steps that a GPU has begun.

        Raises:
            KeyboardInterrupt: on Ctrl-C; nothing is lost, and another call goes on.
        """
        self._check_awake()
        if self._queue is not None:
            yield from self._queue.results()

    def wait_for_completion(
        self, output_type: type | tuple[type, ...] | None = None, *, use_tqdm: bool | Callable[..., Any] = True
    ) -> list[RequestOutput]:
        """Run what is enqueued to the end.

        Args:
            output_type: The results' type, as vLLM's callers say it: `RequestOutput`.
            use_tqdm: As in `generate`.

        Returns:
            The results not yet taken, in the order in which they were enqueued; none if nothing is.

        Raises:
            KeyboardInterrupt: on Ctrl-C; nothing is lost, and another call goes on.
        """
        if output_type is not None and not issubclass(RequestOutput, output_type):
            raise ValueError(f"output_type={output_type!r} is not valid: enqueued prompts give RequestOutput")
        self._check_awake()
        if self._queue is None:
            return []
        with Progress(self._queue.num_untaken, use_tqdm, "Processed prompts") as progress:
            results = self._queue.run_keeping(progress)
        tell_failures(results)
        return results

    def reset(self) -> None:
        """Forget what is enqueued, done or not; the LLM can be asked anew."""
        if self._queue is not None:
            self._queue.abort()
            self._queue = None

    @property
    def num_enqueued(self) -> int:
        """Enqueued prompts whose results were not taken."""
        return 0 if self._queue is None else self._queue.num_untaken

    def _run_enqueued(self) -> None:
        if self._queue is not None:
            self._queue.run_untaken()

    def _enqueue(self, asked: Asked) -> list[str]:
        if self._queue is None:
            self._queue = self._begin()
        return self._queue.add(*asked)

    def _check_idle(self) -> None:
        if self._queue is not None and self._queue.is_under_way:
            raise ValueError("enqueued prompts are under way: call wait_for_completion(), or reset() to forget them")

    def _check_nothing_enqueued(self) -> None:
        if self.num_enqueued:
            raise ValueError(
                f"{self.num_enqueued} enqueued prompts have results that were not taken: call "
                "wait_for_completion(), or reset() to forget them"
            )
