"""What an engine cannot run, said before anything is queued.

Owns the checks of requests against one model and one engine's settings. Knows nothing that runs.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

from raydata_llm.engine.adapter_cache import adapter_stamp, load_adapter
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.logprobs import wanted_of_outputs, wanted_of_prompt
from raydata_llm.engine.model_config import ModelConfig
from raydata_llm.engine.param_values import shown
from raydata_llm.engine.position_logprobs import Wanted
from raydata_llm.engine.prompt_embeds import check_embeds
from raydata_llm.engine.prompt_scores import NamedIds, ids_of_each_row, scored_rows
from raydata_llm.engine.request import Request, TokenArray, token_array
from raydata_llm.engine.sampling_params import SamplingParams

# Log-probabilities of one request at most: all of a vocabulary of 128,256 tokens at 4,186 positions.
_MOST_LOGPROB_BYTES = 1 << 32


class RequestCheck:
    """See the module's docstring.

    Args:
        has_tokenizer: Whether the engine can find stop strings.
    """

    def __init__(self, config: EngineConfig, model: ModelConfig, max_model_len: int, *, has_tokenizer: bool) -> None:
        self._config, self._model, self._max_model_len = config, model, max_model_len
        self._has_tokenizer = has_tokenizer
        # Adapters that were looked at, and when they were written.
        self._adapters: dict[str, int] = {}

    def check(self, request: Request) -> TokenArray:
        """The prompt as it would be run, truncated.

        Raises:
            ValueError: for a request that cannot be run.
        """
        prompt = self._checked_prompt(request)
        params = request.sampling_params
        self._check_token_ids(request)
        self._check_logprob_bytes(params, len(prompt))
        if params.stop and not self._has_tokenizer:
            raise ValueError(f"stop={shown(params.stop)} needs a tokenizer: use stop_token_ids, or load the tokenizer")
        if params.prompt_logprob_token_ids is not None:
            scored_rows(params, len(prompt))
        self._check_adapter(request)
        if request.prompt_embeds is not None:
            check_embeds(
                request.prompt_embeds,
                enabled=self._config.enable_prompt_embeds,
                hidden_size=self._model.hidden_size,
                prompt_logprobs=params.prompt_logprobs is not None,
            )
        return prompt

    def _checked_prompt(self, request: Request) -> TokenArray:
        prompt = token_array(request.prompt_token_ids)
        if prompt.ndim != 1 or not len(prompt):
            raise ValueError("prompt_token_ids is empty: give at least one token")
        low, high = int(prompt.min()), int(prompt.max())
        if low < 0 or high >= self._model.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(
                f"prompt_token_ids holds {bad}, outside the vocabulary of {self._model.vocab_size} tokens: "
                "use the tokenizer of this model"
            )
        keep = request.sampling_params.truncate_prompt_tokens
        if keep is not None:
            # One place is left for an output token.
            prompt = prompt[-(self._max_model_len - 1 if keep == -1 else keep) :]
        if len(prompt) >= self._max_model_len:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and max_model_len={self._max_model_len} leaves no room for an "
                "output token: shorten it, set truncate_prompt_tokens, or raise max_model_len"
            )
        return prompt

    def _check_adapter(self, request: Request) -> None:
        adapter = request.lora_request
        if adapter is None:
            return
        if not self._config.enable_lora:
            raise ValueError(f"lora_request={adapter.lora_name!r} needs enable_lora=True")
        path = adapter.lora_path
        stamp = adapter_stamp(path)
        # Where more are asked for in turn than are kept on the host, each request would read its adapter anew.
        if not stamp or self._adapters.get(path) != stamp:
            load_adapter(path, self._model, self._config.max_lora_rank)
            self._adapters[path] = stamp

    def _check_token_ids(self, request: Request) -> None:
        params = request.sampling_params
        each = ids_of_each_row(params)
        named: dict[str, Collection[int]] = {
            "stop_token_ids": params.stop_token_ids,
            "allowed_token_ids": params.allowed_token_ids or (),
            "logit_bias": tuple(params.logit_bias or ()),
            "logprob_token_ids": params.logprob_token_ids or (),
            "prompt_logprob_token_ids": (
                [max(row) for row in each if row] if each else cast(NamedIds, params.prompt_logprob_token_ids or ())
            ),
        }
        for name, token_ids in named.items():
            self.check_in_vocabulary(name, token_ids)

    def _check_logprob_bytes(self, params: SamplingParams, num_prompt: int) -> None:
        """Refuse what would fill the host's memory with log-probabilities, before any is computed."""
        vocab_size, room = self._model.vocab_size, self._max_model_len - num_prompt
        num_outputs = params.n * min(room, room if params.max_tokens is None else params.max_tokens)
        named, each = params.prompt_logprob_token_ids or (), ids_of_each_row(params)
        width = len(named) if each is None else max(map(len, each), default=0)
        asked = {
            "logprobs": num_outputs * _record_bytes(wanted_of_outputs(params, vocab_size)),
            "prompt_logprobs": num_prompt * _record_bytes(wanted_of_prompt(params, vocab_size)),
            "prompt_logprob_token_ids": num_prompt * width * 4,
        }
        name = max(asked, key=lambda name: asked[name])
        if asked[name] > _MOST_LOGPROB_BYTES:
            raise ValueError(
                f"{name} asks for {asked[name] / 2**30:.1f} GiB of log-probabilities, more than the "
                f"{_MOST_LOGPROB_BYTES / 2**30:g} GiB of one request: ask for fewer a position, shorten the prompt, or "
                "lower max_tokens or n"
            )

    def check_in_vocabulary(self, name: str, token_ids: Collection[int]) -> None:
        """Refuse tokens that the model does not have.

        Raises:
            ValueError: naming the field.
        """
        vocab_size = self._model.vocab_size
        if token_ids and max(token_ids) >= vocab_size:
            bad = next(token_id for token_id in token_ids if token_id >= vocab_size)
            raise ValueError(
                f"{name} names token {bad}, outside the vocabulary of {vocab_size} tokens: use the tokenizer of this "
                "model"
            )


def _record_bytes(wanted: Wanted | None) -> int:
    return 0 if wanted is None else wanted.top_bytes + wanted.named_bytes
