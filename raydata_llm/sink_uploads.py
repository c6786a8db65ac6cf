"""Uploads in parts that S3 keeps, and bills, after the process that began them died: found by key and aborted.

Other stores drop such parts by themselves. Neither pyarrow nor a plain file system lists them, so this asks S3 with
botocore, which comes with boto3 and s3fs. Invariant: only uploads to exactly the given keys are aborted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from raydata_llm.redaction import masked_logger

logger = masked_logger(__name__)


def abort_uploads(filesystem: Any, paths: Sequence[str]) -> int:
    """Abort unfinished uploads.

    Args:
        filesystem: Of pyarrow; what is not S3 is left alone.
        paths: `bucket/key` of files whose uploads may have been cut.

    Returns:
        How many were aborted.
    """
    call = _s3_call(filesystem)
    if call is None:
        return 0
    bucket = paths[0].partition("/")[0]
    keys = {path.partition("/")[2] for path in paths}
    aborted = 0
    for upload in _list_uploads(call, bucket, _common_start(keys)):
        if upload["Key"] in keys:
            call("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            aborted += 1
    return aborted


def _common_start(keys: set[str]) -> str:
    first, last = min(keys), max(keys)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(letter for letter, _ in same)


def _list_uploads(call: Callable[..., Any], bucket: str, prefix: str) -> Iterator[dict[str, str]]:
    marker: dict[str, str] = {}
    while True:
        answer = call("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker)
        yield from answer.get("Uploads") or []
        if not answer.get("IsTruncated"):
            return
        marker = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}


def _s3_call(filesystem: Any) -> Callable[..., Any] | None:
    """A function of S3's own operations, with the file system's credentials; None for what is not S3."""
    if filesystem.type_name == "s3":
        return _botocore_call(filesystem.__reduce__()[1][0])
    fsspec_filesystem = getattr(getattr(filesystem, "handler", None), "fs", None)
    return getattr(fsspec_filesystem, "call_s3", None)


def _botocore_call(options: dict[str, Any]) -> Callable[..., Any] | None:
    try:
        import botocore.config
        import botocore.session
    except ImportError:
        logger.info(
            "Parts of uploads that were cut stay on S3 until the bucket's AbortIncompleteMultipartUpload rule removes "
            "them: install boto3 to have them removed here"
        )
        return None
    endpoint = options["endpoint_override"]
    client = botocore.session.Session().create_client(
        "s3",
        region_name=options["region"] or None,
        endpoint_url=f"{options['scheme'] or 'https'}://{endpoint}"
        if endpoint and "://" not in endpoint
        else endpoint or None,
        aws_access_key_id=options["access_key"] or None,
        aws_secret_access_key=options["secret_key"] or None,
        aws_session_token=options["session_token"] or None,
        config=botocore.config.Config(
            s3={"addressing_style": "path"} if endpoint else None, connect_timeout=5, retries={"total_max_attempts": 2}
        ),
    )

    def call(operation: str, **arguments: Any) -> Any:
        return getattr(client, operation)(**arguments)

    return call
