"""What KubeRay takes, as far as our manifests use it: our own wording of its API reference (docs.ray.io,
KubeRay 1.6), closed, so that a field which is misspelt or unknown there is refused. Pods are Kubernetes'
own.
"""

from typing import Any

POD = {"$ref": "/api/_definitions.json#/$defs/io.k8s.api.core.v1.PodTemplateSpec"}
TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _kind(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"$ref": "/api/_definitions.json#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_object(
            ("apiVersion", "kind", "metadata", "spec"),
            apiVersion={"const": "ray.io/v1"},
            kind={"const": kind},
            metadata=metadata,
            spec=spec,
        ),
    }


CLUSTER = _object(
    ("headGroupSpec",),
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=_object(mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=_object(
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        version={"enum": ["v1", "v2"]},
        resources={"$ref": "/api/_definitions.json#/$defs/io.k8s.api.core.v1.ResourceRequirements"},
        securityContext={"$ref": "/api/_definitions.json#/$defs/io.k8s.api.core.v1.SecurityContext"},
    ),
    headGroupSpec=_object(
        ("template",),
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        enableIngress={"type": "boolean"},
        rayStartParams=TEXTS,
        template=POD,
    ),
    workerGroupSpecs={
        "type": "array",
        "items": _object(
            ("groupName", "template"),
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=TEXTS,
            template=POD,
        ),
    },
)
JOB = _object(
    ("entrypoint",),
    clusterSelector=TEXTS,
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    submitterConfig=_object(backoffLimit=COUNT),
    submitterPodTemplate=POD,
)
KINDS = {"RayCluster": _kind("RayCluster", CLUSTER), "RayJob": _kind("RayJob", JOB)}
