"""Checks Kubernetes objects against the schemas of three versions, or against those in crds.yaml."""

import functools
import json

import jsonschema
import kubernetes_validate
import yaml
from kubernetes_validate import utils

from bundle.paths import ROOT

KUBERNETES = ("1.35", "1.36", "1.37")
utils.schema_contents = functools.cache(utils.schema_contents)  # each of them is megabytes of JSON
CRDS = yaml.safe_load((ROOT / "tests" / "crds.yaml").read_text())


def check(found: dict) -> None:
    """Check an object against the schemas of Kubernetes, or against those in crds.yaml.

    Raises:
        jsonschema.ValidationError: a field is unknown or missing, or has another type.
    """
    kind = f"{found['apiVersion']} {found['kind']}"
    if kind not in CRDS["objects"]:
        for version in KUBERNETES:
            assert kubernetes_validate.validate(found, version, strict=True) == version
        return
    assert found.keys() == {"apiVersion", "kind", "metadata", "spec"}
    jsonschema.validate(found["metadata"], {**CRDS, "$ref": "#/$defs/metadata"})
    jsonschema.validate(found["spec"], CRDS | CRDS["objects"][kind])


@functools.cache
def check_once(found: str) -> None:
    check(json.loads(found))
