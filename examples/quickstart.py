"""Answer every row of a Parquet folder on S3 with a model, and write the answers back to S3.

python examples/quickstart.py MODEL INPUT OUTPUT
"""

import sys

import ray

from raydata_llm import EngineProcessorConfig, build_llm_processor

model, source, target = sys.argv[1:]

config = EngineProcessorConfig(
    model_source=model,  # a local folder, a GGUF file, an s3:// folder or a Hub id
    engine_kwargs={"max_model_len": 1024},
    concurrency=1,  # engines side by side
    report_path=f"{target}-report",  # a page that says how fast it went, and why not faster
)
processor = build_llm_processor(
    config,
    preprocess=lambda row: {
        "messages": [
            {"role": "system", "content": "You explain code in one plain English sentence."},
            {"role": "user", "content": f"{row['code']}\n\nSay in one sentence what this function should do."},
        ],
        "sampling_params": {"temperature": 0.0, "max_tokens": 64},
    },
    postprocess=lambda row: {
        "task_id": row["task_id"],
        "code": row["code"],
        "answer": row["generated_text"],
        "num_generated_tokens": row["num_generated_tokens"],
        "seconds": row["time_taken_llm"],
    },
)

ds = ray.data.read_parquet(source)
ds = processor(ds)
ds.write_parquet(target)
