"""Logits processors with vLLM's interfaces do here what they do there, whatever rows run beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.request import Request
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.vllm_logits import AdapterLogitsProcessor, BatchUpdate, LogitsProcessor


class Only(LogitsProcessor):
    """Lets the token `extra_args["only"]` through, of each row of a batch."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        only = sampling_params.extra_args and sampling_params.extra_args.get("only")  # as vLLM's pages write it
        if only is not None and not isinstance(only, int):
            raise ValueError("only must be a token id")

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.vocab_size = vllm_config.model_config.get_vocab_size()
        self.device, self.rows = device, dict[int, int]()
        assert is_pin_memory is False

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        for index, params, _, _ in batch_update.added if batch_update else ():
            if params.extra_args and "only" in params.extra_args:
                self.rows[index] = params.extra_args["only"]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        assert logits.shape[1] == self.vocab_size
        for row, token in self.rows.items():
            kept = logits[row, token].clone()
            logits[row] = float("-inf")
            logits[row, token] = kept
        return logits


class CountsUp(LogitsProcessor):
    """Writes `first`, `first + 1` and so on: it reads the output, which grows in the list that it was handed."""

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        for _, params, prompt, output in batch_update.added if batch_update else ():
            assert prompt
            self.first, self.output = (params.extra_args or {}).get("first"), output

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if self.first is not None:
            logits[:, self.first + len(self.output)] = 1e4
        return logits


class Repeats(AdapterLogitsProcessor):
    """One request at a time: says the prompt's first token again, as a function of three or of two."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[..., torch.Tensor] | None:
        how = params.extra_args and params.extra_args.get("repeats")

        def of_three(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
            logits[prompt[0]] = 1e4
            return logits

        def of_two(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            logits[output[-1] + 1 if output else 20] = 1e4
            return logits

        functions: dict[str, Callable[..., torch.Tensor]] = {"prompt": of_three, "output": of_two}
        return functions.get(str(how))


class Invariant(Only):
    def is_argmax_invariant(self) -> bool:
        return True


GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def run(tiny_model: Callable[..., Path]) -> Iterator[Callable[..., list[list[int]]]]:
    engines: dict[str, Engine] = {}

    def run(kinds: list[Any], params: list[dict[str, Any]]) -> list[list[int]]:
        key = str(kinds)
        if key not in engines:
            engines[key] = Engine(
                EngineConfig(model=str(tiny_model("llama")), device="cpu", max_num_seqs=4, logits_processors=kinds)
            )
        engine = engines[key]
        for index, one in enumerate(params):
            sampling = SamplingParams(**{**GREEDY, **one})
            request = Request(request_id=str(index), prompt_token_ids=[5 + index, 9, 11], sampling_params=sampling)
            engine.add_request(request)
        outputs: dict[str, list[int]] = {}
        while engine.has_unfinished():
            outputs |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
        engine.check_integrity()
        return [outputs[str(index)] for index in range(len(params))]

    yield run
    for engine in engines.values():
        engine.shutdown()


def test_a_processor_of_batches_treats_each_row_by_its_own_parameters(run: Callable[..., list[list[int]]]) -> None:
    plain = run([], [{}, {}, {}])
    rows = [{"extra_args": {"only": 77}}, {}, {"extra_args": {"only": 5}}]
    assert run([Only], rows) == [[77] * 4, plain[1], [5] * 4]
    # More rows than run at once: a place in the batch is taken by one after the other.
    many = [{"extra_args": {"only": 100 + index}, "max_tokens": 1 + index % 4} for index in range(13)]
    assert run([Only], many) == [[100 + index] * (1 + index % 4) for index in range(13)]


def test_the_output_that_a_processor_of_batches_holds_grows(run: Callable[..., list[list[int]]]) -> None:
    rows = [{"extra_args": {"first": 100}}, {"extra_args": {"first": 300}, "max_tokens": 2}]
    assert run([CountsUp], rows) == [[100, 101, 102, 103], [300, 301]]


def test_a_processor_of_one_request_takes_two_arguments_or_three(run: Callable[..., list[list[int]]]) -> None:
    plain = run([], [{}] * 3)
    rows = [{"extra_args": {"repeats": "prompt"}}, {"extra_args": {"repeats": "output"}}, {}]
    assert run([Repeats], rows) == [[5] * 4, [20, 21, 22, 23], plain[2]]


def test_greedy_requests_go_without_what_leaves_the_likeliest_token(run: Callable[..., list[list[int]]]) -> None:
    plain = run([], [{}])
    assert run([Invariant], [{"extra_args": {"only": 77}}]) == plain
    drawn = run([Invariant], [{"extra_args": {"only": 77}, "temperature": 1.0}])
    assert drawn == [[77] * 4]


def test_a_classs_check_of_parameters_is_the_requests_error(run: Callable[..., list[list[int]]]) -> None:
    with pytest.raises(ValueError, match="only must be a token id"):
        run([Only], [{"extra_args": {"only": "x"}}])


def test_a_class_is_named_as_in_vllm(run: Callable[..., list[list[int]]]) -> None:
    assert run([f"{__name__}:Only"], [{"extra_args": {"only": 3}}]) == [[3] * 4]
    with pytest.raises(ValueError, match=r"has no method new_request_processor.*update_state, apply"):
        run(["collections:OrderedDict"], [{}])
