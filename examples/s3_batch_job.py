"""Answer the prompts of a Parquet folder on S3, and write them, all other columns kept, back to S3.

On a cluster, or on one machine after `ray start --head`:

    ray job submit --working-dir examples -- python s3_batch_job.py \
        --model s3://my-bucket/models/my-model \
        --input s3://my-bucket/prompts --output s3://my-bucket/answers --concurrency 4

Submitted again after it was stopped or killed, it does what is left. Keys and region come from the AWS_* variables, or
from the role of the machines. A row that fails does not stop the job: its cause is in the column `__inference_error__`,
which is empty for all others.
"""

import argparse
from typing import Any

import ray

from raydata_llm import EngineProcessorConfig, ResumeConfig, build_llm_processor, write_parquet

KEPT = ("generated_text", "finish_reason", "num_input_tokens", "num_generated_tokens", "__inference_error__")


def main() -> None:
    """Run the job."""
    arguments = parse_arguments()
    config = EngineProcessorConfig(
        model_source=arguments.model,
        engine_kwargs={"max_model_len": arguments.max_model_len},
        concurrency=arguments.concurrency,
        batch_size=arguments.batch_size,
        accelerator_type=arguments.accelerator_type,
        should_continue_on_error=True,
        resume=ResumeConfig(arguments.output),
    )

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        messages = [{"role": "user", "content": row[arguments.prompt_column]}]
        if arguments.system:
            messages.insert(0, {"role": "system", "content": arguments.system})
        params = {"temperature": arguments.temperature, "max_tokens": arguments.max_tokens}
        # The whole row goes along, as the engine's own columns (`prompt` is one) would hide some of it.
        return {"messages": messages, "sampling_params": params, "source_row": row}

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        return {**row["source_row"], **{name: row[name] for name in KEPT}}

    processor = build_llm_processor(config, preprocess=ask, postprocess=answer)
    summary = write_parquet(processor(ray.data.read_parquet(arguments.input)), arguments.output)
    print(summary)


def parse_arguments() -> argparse.Namespace:
    """The job's command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="an s3:// folder, a local folder, a GGUF file or a Hub id")
    parser.add_argument("--input", required=True, help="folder of Parquet files, such as s3://bucket/prompts")
    parser.add_argument("--output", required=True, help="folder for the answers")
    parser.add_argument("--prompt-column", default="prompt", help="column with the user's text (default: prompt)")
    parser.add_argument("--system", help="system prompt of all rows")
    parser.add_argument("--concurrency", type=int, default=1, help="engines side by side (default: 1)")
    parser.add_argument("--accelerator-type", help="the GPU that an engine needs, such as H100 (default: any, or none)")
    parser.add_argument("--batch-size", type=int, help="rows of a block (default: 256 on GPUs, 16 on CPUs)")
    parser.add_argument("--max-model-len", type=int, help="prompt plus output tokens of a row at most")
    parser.add_argument("--max-tokens", type=int, default=256, help="output tokens of a row at most (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
