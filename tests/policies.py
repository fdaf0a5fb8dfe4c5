"""Would S3 allow a request? AWS's rule, as far as infra/policies/ uses it: something allows it and nothing
denies it.
"""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "infra" / "policies"
ACTIONS = {
    "get_object": "s3:GetObject",
    "head_object": "s3:GetObject",
    "put_object": "s3:PutObject",
    "create_multipart_upload": "s3:PutObject",
    "upload_part": "s3:PutObject",
    "complete_multipart_upload": "s3:PutObject",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "delete_object": "s3:DeleteObject",
    "list_objects_v2": "s3:ListBucket",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
}
"""What boto3's operations need."""


def allows(role: str, operation: str, arguments: Mapping[str, Any]) -> bool:
    """A request of a role of that name, in a bucket with our policy."""
    action = ACTIONS[operation]
    bucket = f"arn:aws:s3:::{arguments['Bucket']}"
    resource = bucket if "Key" not in arguments else f"{bucket}/{arguments['Key']}"
    creates = operation in ("put_object", "complete_multipart_upload")
    context = {"aws:SecureTransport": "true", "s3:ObjectCreationOperation": str(creates).lower()}
    if "IfNoneMatch" in arguments:
        context["s3:if-none-match"] = arguments["IfNoneMatch"]
    statements = [*read(role), *read("bucket-of-runs")]
    effects = {s["Effect"] for s in statements if _applies(s, action, resource, context)}
    return effects == {"Allow"}


def read(name: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{name}.json").read_text())["Statement"]


def _applies(statement: dict[str, Any], action: str, resource: str, context: dict[str, str]) -> bool:
    actions, conditions = statement["Action"], statement.get("Condition", {})
    return (
        any(fnmatchcase(action, one) for one in ([actions] if isinstance(actions, str) else actions))
        and any(fnmatchcase(resource, one) for one in statement["Resource"])
        and all(
            _holds(kind, key, value, context) for kind, of in conditions.items() for key, value in of.items()
        )
    )


def _holds(kind: str, key: str, value: str, context: dict[str, str]) -> bool:
    if kind == "Null":
        return (key not in context) == (value == "true")
    assert kind in ("Bool", "StringEquals")
    return context.get(key) == value
