"""The RayJob manifest: its fields are KubeRay's, and it asks for what its own command line uses.

The schema below holds the fields of ray.io/v1 RayJob that a manifest of ours may use, by their official names. It is
not the operator's whole CRD: defaults, validation rules and the rest of a pod's fields are not covered, and no operator
has run this manifest.
"""

from __future__ import annotations

import argparse
import copy
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from launch import command
from trainer.cli import parse

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}


def fields(required: str, **known: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {"type": "object", "properties": known, "required": required.split(), "additionalProperties": False}


PROBE = fields(
    "httpGet",
    httpGet=fields("path port", path={"type": "string", "pattern": "^/"}, port=COUNT),
    initialDelaySeconds=COUNT,
    periodSeconds=COUNT,
    timeoutSeconds=COUNT,
    failureThreshold=COUNT,
)
QUANTITIES = {"type": "object", "additionalProperties": {"type": "string", "pattern": "^[0-9]+(m|Ki|Mi|Gi|Ti)?$"}}
CONTAINER = fields(
    "name image resources",
    name={"type": "string", "pattern": "^[a-z0-9-]+$"},
    image={"type": "string"},
    env={
        "type": "array",
        "items": {
            "oneOf": [
                fields("name value", name={"type": "string"}, value={"type": "string"}),
                fields(
                    "name valueFrom",
                    name={"type": "string"},
                    valueFrom=fields("fieldRef", fieldRef=fields("fieldPath", fieldPath={"type": "string"})),
                ),
            ]
        },
    },
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    resources=fields("requests limits", requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts={
        "type": "array",
        "items": fields("name mountPath", name={"type": "string"}, mountPath={"type": "string", "pattern": "^/"}),
    },
)
VOLUME = fields(
    "name",
    name={"type": "string"},
    persistentVolumeClaim=fields("claimName", claimName={"type": "string"}),
    emptyDir=fields("", medium={"enum": ["", "Memory"]}, sizeLimit={"type": "string"}),
)
TEMPLATE = fields(
    "spec",
    spec=fields(
        "containers",
        containers={"type": "array", "minItems": 1, "items": CONTAINER},
        volumes={"type": "array", "items": VOLUME},
    ),
)
WORKERS = fields(
    "groupName replicas minReplicas maxReplicas template",
    groupName={"type": "string"},
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    rayStartParams=TEXTS,
    template=TEMPLATE,
)
CLUSTER = fields(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=fields("mode", mode={"enum": ["token"]}, secretName={"type": "string"}),
    headGroupSpec=fields("template", rayStartParams=TEXTS, template=TEMPLATE),
    workerGroupSpecs={"type": "array", "minItems": 1, "items": WORKERS},
)
SCHEMA = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields("name", name={"type": "string", "maxLength": 47}),
    spec=fields(
        "entrypoint rayClusterSpec",
        entrypoint={"type": "string"},
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
        runtimeEnvYAML={"type": "string"},
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        activeDeadlineSeconds=COUNT,
        backoffLimit=COUNT,
        rayClusterSpec=CLUSTER,
    ),
)


@pytest.fixture
def manifest() -> Any:
    """The manifest as Kubernetes reads it."""
    return yaml.safe_load((ROOT / "launch" / "kubernetes" / "rayjob.yaml").read_text())


def test_the_manifest_has_the_fields_of_a_ray_job(manifest: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(manifest, SCHEMA)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("spec/shutdownAfterJobFinish", True),
        ("spec/backoffLimit", "3"),
        ("spec/rayClusterSpec/authOptions/mode", "disabled"),
        ("spec/rayClusterSpec/headGroupSpec/rayStartParams/num-cpus", 0),
        ("spec/rayClusterSpec/workerGroupSpecs/0/replica", 2),
        ("spec/rayClusterSpec/workerGroupSpecs/0/template/spec/containers/0/resources/limits/nvidia.com~gpu", 8),
    ],
)
def test_the_schema_finds_mistakes(manifest: Any, place: str, value: Any) -> None:
    broken = copy.deepcopy(manifest)
    *path, last = (word.replace("~", "/") for word in place.split("/"))
    found = broken
    for word in path:
        found = found[int(word)] if word.isdigit() else found[word]
    found[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_the_entrypoint_is_a_driver_that_the_cluster_can_hold(manifest: Any) -> None:
    spec = manifest["spec"]
    words = shlex.split(spec["entrypoint"])
    parser = argparse.ArgumentParser()
    command.configure(parser)
    arguments = parse(parser, words[words.index("launch") + 1 :])
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    assert (arguments.place, arguments.address) == ("ray", None)
    assert arguments.nodes == workers["replicas"] == workers["minReplicas"]
    assert str(arguments.gpus_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(container["resources"]["limits"]["cpu"]) >= arguments.gpus_per_node, "a rank takes a CPU of Ray's"
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert "/dev/shm" in mounts
    (run_dir,) = [word.removeprefix("run.dir=") for word in arguments.overrides if word.startswith("run.dir=")]
    assert any(run_dir.startswith(f"{mount}/") for mount in mounts), "a new cluster finds the checkpoints"


def test_the_cluster_asks_for_a_token_and_does_not_listen_everywhere(manifest: Any) -> None:
    cluster = manifest["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    head = cluster["headGroupSpec"]
    (container,) = head["template"]["spec"]["containers"]
    given = {entry["name"]: entry.get("valueFrom") for entry in container["env"]}
    assert head["rayStartParams"]["dashboard-host"] == "$POD_IP"
    assert given["POD_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert "env_vars" not in manifest["spec"].get("runtimeEnvYAML", ""), "the dashboard shows them"


def test_the_cluster_has_the_ray_that_is_tested_here(manifest: Any) -> None:
    (tested,) = [
        line.partition("==")[2] for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("ray==")
    ]
    assert manifest["spec"]["rayClusterSpec"]["rayVersion"] == tested
