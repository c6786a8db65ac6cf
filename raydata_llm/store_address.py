"""An address in a store, such as `s3://bucket/folder`: whether it can be one at all.

Knows no store and asks none.
"""

from __future__ import annotations

# Stores where an address begins with a bucket, and an upload becomes visible when it is complete.
OBJECT_STORES = ("s3", "s3a", "gcs", "gs", "abfs", "abfss", "az", "adl")


def check_bucket(field: str, address: str) -> None:
    """Check that an address in an object store names a bucket: clients list all buckets else, or ask a wrong host.

    Args:
        field: What the user calls it.
        address: Without credentials, as it is shown.

    Raises:
        ValueError: when there is none.
    """
    scheme, separator, place = address.partition("://")
    if separator and scheme in OBJECT_STORES and not place.partition("?")[0].partition("/")[0]:
        raise ValueError(f"{field}={address!r} names no bucket: give {scheme}://bucket/folder")
