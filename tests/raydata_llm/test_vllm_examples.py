"""What the examples of vLLM's offline-inference pages do with `LLM`, run here with only the import line changed.

The programs are ours; the calls, arguments and result fields are those of the pages. MODEL and ADAPTER stand for the
names of models. The first examples of the pooling page are in tests/raydata_llm/test_llm_pooling.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.engine.lora_adapters import adapter_pairs, save_adapter
from tests.engine.tiny_pooling import save_pooling_model
from tests.raydata_llm.tiny_tokenizer import save_pair_tokenizer, save_tokenizer

# Each with a line that it prints; what is random in it is not in that line.
GENERATING: dict[str, tuple[str, str]] = {
    "a list of prompts": (
        """
from vllm import LLM, SamplingParams
prompts = ["Good morning, I am", "The tallest mountain is", "Tomorrow's weather"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
llm = LLM(model=MODEL)
outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    generated_text = output.outputs[0].text
    print(f"Prompt: {output.prompt!r}, {isinstance(generated_text, str)}")
""",
        "Prompt: 'The tallest mountain is', True",
    ),
    "the model's default parameters": (
        """
from vllm import LLM
llm = LLM(model=MODEL)
sampling_params = llm.get_default_sampling_params()
sampling_params.temperature = 0.5
sampling_params.max_tokens = 7
sampling_params.ignore_eos = True
outputs = llm.generate("Good morning", sampling_params)
print(len(outputs[0].outputs[0].token_ids), "tokens")
""",
        "7 tokens",
    ),
    "chat": (
        """
from vllm import LLM
llm = LLM(model=MODEL, max_model_len=256)
sampling_params = llm.get_default_sampling_params()
conversation = [
    {"role": "system", "content": "You answer briefly"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Name a river."},
]
outputs = llm.chat(conversation, sampling_params, use_tqdm=False)
outputs += llm.chat([conversation for _ in range(4)], sampling_params, use_tqdm=True)
print(len(outputs), outputs[0].prompt.endswith("Name a river.</s><|assistant|>"))
""",
        "5 True",
    ),
    "chat with a template and tools": (
        """
from vllm import LLM, SamplingParams
from vllm.sampling_params import SamplingParams as Same
llm = LLM(model=MODEL, max_model_len=512)
tools = [{"type": "function", "function": {"name": "get_river", "parameters": {"type": "object", "properties": {}}}}]
messages = [{"role": "user", "content": "Which river?"}]
sampling_params = Same(max_tokens=20, temperature=0.0)
print("get_river" in llm.chat(messages, sampling_params=sampling_params, tools=tools)[0].prompt)
outputs = llm.chat(messages, sampling_params, chat_template="{{ messages[0]['content'] }}!", add_generation_prompt=True)
print(outputs[0].prompt)
""",
        "Which river?!",
    ),
    "prompts of token ids": (
        """
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
llm = LLM(model=MODEL, skip_tokenizer_init=True)
outputs = llm.generate(TokensPrompt(prompt_token_ids=[5, 6, 7]), SamplingParams(max_tokens=3, ignore_eos=True))
print(outputs[0].prompt_token_ids, len(outputs[0].outputs[0].token_ids))
""",
        "[5, 6, 7] 3",
    ),
    "prompts of embeddings": (
        """
import transformers
from vllm import LLM, SamplingParams
tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
transformers_model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
embedding_layer = transformers_model.get_input_embeddings()
llm = LLM(model=MODEL, enable_prompt_embeds=True)
chats = [[{"role": "user", "content": text}] for text in ("Name a river.", "Which is the tallest mountain?")]
token_ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt",
                                           return_dict=True)["input_ids"] for chat in chats]
prompt_embeds = [embedding_layer(ids).squeeze(0) for ids in token_ids]
greedy = SamplingParams(temperature=0.0, max_tokens=8)
single = llm.generate({"prompt_embeds": prompt_embeds[0]}, greedy)
outputs = llm.generate([{"prompt_embeds": embeds} for embeds in prompt_embeds], greedy)
same = llm.chat(chats, greedy)
print(single[0].outputs[0].text == outputs[0].outputs[0].text,
      [output.outputs[0].token_ids == other.outputs[0].token_ids for output, other in zip(outputs, same)])
""",
        "True [True, True]",
    ),
    "scores of a student's tokens": (
        """
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
llm = LLM(MODEL)
prompt_ids, response_ids = [5, 6, 7, 8], [9, 10, 11]
student_topk_ids = [[9, 3], [10, 4], [11, 5]]
output = llm.generate(
    TokensPrompt(prompt_token_ids=prompt_ids + response_ids),
    SamplingParams(
        max_tokens=1,
        prompt_logprob_token_ids=student_topk_ids,
        prompt_logprob_start=len(prompt_ids) - 1,
        prompt_logprobs=0,
    ),
)
scores = output[0].prompt_token_id_logprobs
own = [output[0].prompt_logprobs[place][token].logprob for place, token in enumerate(response_ids, len(prompt_ids))]
print(scores.shape == (len(response_ids), 2), [bool(abs(one - other) < 1e-4) for one, other in zip(scores[:, 0], own)])
""",
        "True [True, True, True]",
    ),
    "structured outputs": (
        """
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams
llm = LLM(model=MODEL, max_model_len=512)
structured_outputs_params = StructuredOutputsParams(choice=["Positive", "Negative"])
sampling_params = SamplingParams(structured_outputs=structured_outputs_params)
outputs = llm.generate(prompts="Which is it: a wonderful day!", sampling_params=sampling_params)
print(outputs[0].outputs[0].text in ("Positive", "Negative"))
params = StructuredOutputsParams(regex=r"[a-c]{2}@host[.]com\\n")
outputs = llm.generate("Write an address:", SamplingParams(structured_outputs=params, stop=["\\n"], max_tokens=50))
print(outputs[0].outputs[0].text.endswith("@host.com"))
schema = {"type": "object", "properties": {"big": {"type": "boolean"}}, "required": ["big"]}
sampling_params = SamplingParams(structured_outputs=StructuredOutputsParams(json=schema), max_tokens=50)
print("big" in outputs[0].prompt, "big" in llm.generate("x", sampling_params)[0].outputs[0].text)
""",
        "False True",
    ),
    "lora": (
        """
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
llm = LLM(model=MODEL, enable_lora=True, max_lora_rank=16, max_loras=2)
sampling_params = SamplingParams(temperature=0, max_tokens=20, stop=["[/assistant]"], ignore_eos=True)
plain = llm.generate(["Select all rivers"], sampling_params)
adapted = llm.generate(["Select all rivers"], sampling_params, lora_request=LoRARequest("sql_adapter", 1, ADAPTER))
print(plain[0].outputs[0].token_ids != adapted[0].outputs[0].token_ids, adapted[0].lora_request.lora_name)
""",
        "True sql_adapter",
    ),
    "prefix caching": (
        """
from vllm import LLM, SamplingParams
prefix = "You are a helpful guide of the mountains, of their lakes and their rivers. " * 3
llm = LLM(model=MODEL, enable_prefix_caching=True, gpu_memory_utilization=0.4)
sampling_params = SamplingParams(temperature=0.0)
llm.generate(prefix + "Where?", sampling_params)
outputs = llm.generate([prefix + "When?", prefix + "Why?"], sampling_params)
print(all(output.num_cached_tokens > 0 for output in outputs), llm.reset_prefix_cache())
""",
        "True",
    ),
    "log-probabilities": (
        """
from vllm import LLM, SamplingParams
llm = LLM(model=MODEL)
output = llm.generate("Good morning", SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=1, ignore_eos=True))[0]
first = output.outputs[0].logprobs[0][output.outputs[0].token_ids[0]]
print(output.prompt_logprobs[0], first.logprob <= 0, first.rank >= 1, isinstance(first.decoded_token, str))
""",
        "None True True True",
    ),
    "beam search": (
        """
from vllm import LLM
from vllm.sampling_params import BeamSearchParams
llm = LLM(model=MODEL)
params = BeamSearchParams(beam_width=5, max_tokens=12)
outputs = llm.beam_search([{"prompt": "Good morning, I am"}, {"prompt_token_ids": [1, 5, 6]}], params)
for output in outputs:
    print(len(output.sequences), all(sequence.tokens[0] == 1 for sequence in output.sequences))
generated_text = outputs[0].sequences[0].text
print(generated_text.startswith("<s>Good morning, I am"), outputs[0].sequences[0].cum_logprob < 0)
""",
        "5 True\n5 True\nTrue True",
    ),
    "metrics": (
        """
from vllm import LLM, SamplingParams
from vllm.v1.metrics.reader import Counter, Gauge
llm = LLM(model=MODEL, disable_log_stats=False)
llm.generate(["Good morning"], SamplingParams(max_tokens=4, ignore_eos=True))
for metric in llm.get_metrics():
    if isinstance(metric, Gauge):
        print(f"{metric.name} (gauge) = {metric.value}")
    elif isinstance(metric, Counter):
        print(f"{metric.name} (counter) = {metric.value}")
""",
        "output_tokens (counter) = 4",
    ),
    "sleep": (
        """
from vllm import LLM
llm = LLM(MODEL, enable_sleep_mode=True)
before = llm.generate("Good morning", {"temperature": 0.0})
llm.sleep(level=1)
llm.wake_up()
llm.sleep(level=2)
llm.wake_up(tags=["weights"])
llm.wake_up(tags=["kv_cache"])
print(llm.generate("Good morning", {"temperature": 0.0})[0].outputs[0].token_ids == before[0].outputs[0].token_ids)
""",
        "True",
    ),
    "enqueue": (
        """
from vllm import LLM, RequestOutput, SamplingParams
llm = LLM(model=MODEL)
llm.sleep(level=0)
ids = llm.enqueue(["Good morning", "Good night"], SamplingParams(max_tokens=4))
llm.wake_up(tags=["scheduling"])
outputs = llm.wait_for_completion(output_type=RequestOutput)
print([output.request_id for output in outputs] == ids)
""",
        "True",
    ),
}
POOLING: dict[str, tuple[str, str, str]] = {
    "rewards": (
        "reward",
        """
from vllm import LLM
llm = LLM(model=MODEL, runner="pooling", enforce_eager=True)
outputs = llm.encode(["Good morning", "Good night"], pooling_task="token_classify")
for output in outputs:
    print("Reward:", tuple(output.outputs.data.shape) == (len(output.prompt_token_ids), 1))
""",
        "Reward: True",
    ),
    "several embeddings": (
        "embed",
        """
from vllm import LLM, PoolingParams
llm = LLM(model=MODEL, runner="pooling", enforce_eager=True)
outputs = llm.embed(["Good morning", "Good night"], pooling_params=PoolingParams(use_activation=True), use_tqdm=False)
for output in outputs:
    print(output.prompt is not None, len(output.outputs.embedding))
""",
        "True 48",
    ),
    "scores of pairs": (
        "score",
        """
from vllm import LLM
llm = LLM(model=MODEL, runner="pooling", enforce_eager=True)
outputs = llm.score("Which river?", ["The Rhine.", "A stone."])
outputs += llm.score(["Which river?", "Which stone?"], ["The Rhine.", "A stone."])
print(len(outputs), all(0 <= output.outputs.score <= 1 for output in outputs))
""",
        "4 True",
    ),
    "classes": (
        "classify",
        """
from vllm import LLM
llm = LLM(model=MODEL, runner="pooling", enforce_eager=True)
outputs = llm.classify(["Good morning", "Good night"])
print([output.outputs.num_classes for output in outputs], round(sum(outputs[0].outputs.probs), 3))
""",
        "[3, 3] 1.0",
    ),
}
# Where vLLM keeps what is raydata_llm's own name here.
IMPORTS = {
    "from vllm.sampling_params": "from raydata_llm",
    "from vllm.inputs": "from raydata_llm",
    "from vllm.lora.request": "from raydata_llm",
    "from vllm.v1.metrics.reader": "from raydata_llm.llm_metrics",
    "from vllm ": "from raydata_llm ",
}


@pytest.fixture(scope="module")
def generating(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_model("llama"), folder / "tiny")
    auto: Any = transformers.AutoModelForCausalLM
    save_adapter(folder / "adapter", *adapter_pairs(auto.from_pretrained(folder / "tiny"), 3))
    return {"MODEL": str(save_tokenizer(folder / "tiny")), "ADAPTER": str(folder / "adapter")}


def run(code: str, names: dict[str, str]) -> None:
    for theirs, ours in IMPORTS.items():
        code = code.replace(theirs, ours)
    exec(compile(code, "example", "exec"), dict(names))


@pytest.mark.parametrize("name", GENERATING)
def test_an_example_of_generation(name: str, generating: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = GENERATING[name]
    run(code, generating)
    assert printed in capsys.readouterr().out


@pytest.mark.parametrize("name", POOLING)
def test_an_example_of_pooling(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, code, printed = POOLING[name]
    heads = {"embed": None, "score": 1, "classify": 3, "reward": 1}
    labels: dict[str, Any] = {} if heads[kind] is None else {"num_labels": heads[kind]}
    auto = {"embed": "AutoModel", "reward": "AutoModelForTokenClassification"}
    save_pooling_model(tmp_path, "bert", auto.get(kind, "AutoModelForSequenceClassification"), pad_token_id=0, **labels)
    run(code, {"MODEL": str(save_pair_tokenizer(tmp_path))})
    assert printed in capsys.readouterr().out
