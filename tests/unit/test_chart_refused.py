"""The chart's wrong values: each is refused with its place and the reason."""

import json

import pytest

from tests.helm import CHART, DIGEST, PEM, helm, many_models, needs_helm

pytestmark = needs_helm


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ("replica: 2", "additional properties 'replica' not allowed"),
        ("groups: {main: {replicas: two}}", "at '/groups/main/replicas': got string, want integer"),
        ("groups: {main: {models: {mnist: {workers: 0}}}}", "at '/groups/main/models/mnist/workers': minimum"),
        ("groups: {main: {models: {../x: {}}}}", "invalid propertyName '../x'"),
        ("groups: {main: {canary: {image: {tag: next}}}}", "properties 'weight' required, if 'image' exists"),
        ("groups: {main: {canary: {weight: 101}}}", "at '/groups/main/canary/weight': maximum"),
        ("groups: {a-canary: {models: {mnist: {}}}}", "invalid propertyName 'a-canary'"),
        ("groups: {main: null}", "groups: name at least one group of models"),
        ("groups: {main: {resources: {limit: {cpu: 1}}}}", "additional properties 'limit' not allowed"),
        ("groups: {main: {resources: {limits: {memory: 4GB}}}}", "'4GB' does not match pattern"),
        ("defaults: {resources: {limits: null}}", "at '/defaults/resources': missing property 'limits'"),
        ("defaults: {resources: {limits: {memory: null}}}", "missing property 'memory'"),
        ("image: {digest: latest}", "at '/image/digest': 'latest' does not match pattern"),
        ("proxy: {rate: fast}", "at '/proxy/rate': 'fast' does not match pattern"),
        ("proxy: {maxBody: 16MiB}", "at '/proxy/maxBody': '16MiB' does not match pattern"),
        ("tracing: {endpoint: 'collector:4317'}", "at '/tracing/endpoint': 'collector:4317' does not match pattern"),
        ("tracing: {ratio: 10}", "at '/tracing/ratio': maximum"),
        *(
            (f"tracing: {{ratio: {given}}}", f"tracing.ratio: {given} must be a number from 0 to 1 with at most four")
            for given in ("0.12345", "5e-05")
        ),
        ("tracing: {endpoint: 'http://collector:99999'}", "tracing.endpoint: http://collector:99999 has a port beyond"),
        ("tracing: {headersSecret: otlp}", "tracing.headersSecret: it needs tracing.endpoint"),
        (
            "defaults: {env: {OTEL_TRACES_SAMPLER: always_on}}",
            "groups.main.env.OTEL_TRACES_SAMPLER: the chart sets it",
        ),
        ("archives: {source: s3}", "at '/archives/source': value must be one of 'image', 'claim', 'url'"),
        ("archives: {source: claim}", "at '/archives/claim': minLength"),
        ("archives: {claim: archives}", "at '/archives/claim': maxLength"),
        ("archives: {source: url}", "groups.main.models.audio: archives.source=url needs its url and sha256"),
        (
            f"groups: {{main: {{models: {{mnist: {{url: 'https://a/b', sha256: {DIGEST}}}}}}}}}",
            "groups.main.models.mnist: url and sha256 need archives.source=url",
        ),
        ("groups: {main: {models: {mnist: {url: 's3://mnist.mar'}}}}", "does not match pattern '^(https?://"),
        ("archives: {source: url, s3: {endpoint: minio:9000}}", "'minio:9000' does not match pattern"),
        ("archives: {s3: {region: eu-central-1}}", "archives: s3 and downloader need archives.source=url"),
        ("archives: {netrcSecret: passwords}", "archives.netrcSecret: it needs archives.source=url"),
        (
            "archives: {source: url, downloader: {image: amazon/aws-cli}}",
            "groups.main.models.audio: archives.source=url needs its url and sha256",
        ),
        (
            f"groups: {{main: null, a: {{models: {{mnist: {{url: 'https://a/b', sha256: {DIGEST}}}}}}}}}\n"
            "archives: {source: url, downloader: {image: amazon/aws-cli}}",
            "groups.a.models.mnist: archives.downloader gets it, so it needs no url",
        ),
        ("trustedKey: {pem: ssh-ed25519 AAAA}", "at '/trustedKey/pem': 'ssh-ed25519 AAAA' does not match pattern"),
        (f"trustedKey: {{pem: {json.dumps(PEM)}, secret: key}}", "at '/trustedKey/secret': maxLength"),
        (
            "groups: {main: {autoscaling: {enabled: true, min: 0}}}",
            "groups.main.autoscaling: min=0 needs by=queue, and activation",
        ),
        (
            "groups: {main: {autoscaling: {enabled: true, by: queue, min: 0}}}",
            "groups.main.autoscaling: min=0 needs by=queue, and activation",
        ),
        ("groups: {main: {autoscaling: {enabled: true, min: 9}}}", "groups.main.autoscaling: min is 9, and max is 4"),
        (
            "groups: {other: {models: {mnist: {}}}}\ningress: {enabled: true}",
            "groups: mnist is in main and in other, and a route leads to one of them",
        ),
        ("gateway: {enabled: true}", "gateway.parents: name the Gateway"),
        (
            "defaults: {settings: {inference_address: 'http://0.0.0.0:8080'}}",
            "groups.main.settings.inference_address: the chart sets it",
        ),
        (
            "defaults: {settings: {disable_token_authorization: false}}",
            "groups.main: disable_token_authorization cannot be set: TorchServe makes keys of its own in each pod",
        ),
        (
            "defaults: {env: {TS_DISABLE_TOKEN_AUTHORIZATION: false}}",
            "groups.main: disable_token_authorization cannot be set: TorchServe makes keys of its own in each pod",
        ),
        (
            "defaults: {env: {TS_GRPC_MANAGEMENT_ADDRESS: 0.0.0.0}}",
            "groups.main.env.TS_GRPC_MANAGEMENT_ADDRESS: the chart sets it",
        ),
        (
            'configProperties: "enable_envvars_config=true\\ndisable_token_authorization=false\\n"',
            "configProperties: disable_token_authorization=false has no effect: TorchServe makes keys of its own",
        ),
        ("configProperties: job_queue_size=9", "configProperties: without the line enable_envvars_config=true"),
        (
            "groups: {main: {canary: {weight: 5}}}\ningress: {enabled: true, className: traefik}",
            "groups.main.canary: the controllers of Ingresses other than ingress-nginx ignore its weight",
        ),
        (
            f"groups: {{main: null, a: {{models: {{{many_models(22)}}}}}, b: {{models: {{x: {{}}}}}}}}\n"
            "gateway: {enabled: true, parents: [{name: public}]}",
            "groups.a.models: an HTTPRoute has no more than 128 paths",
        ),
        ("defaults: {env: {BUNDLE_GATE: /tmp}}", "groups.main.env.BUNDLE_GATE: the chart sets it"),
        (
            "defaults: {settings: {job_queue_size: 9}, env: {TS_JOB_QUEUE_SIZE: 8}}",
            "groups.main.env.TS_JOB_QUEUE_SIZE: the chart sets it",
        ),
        (f"groups: {{{'g' * 40}: {{models: {{mnist: {{}}}}}}}}", "is longer than 46 characters"),
    ],
)
def test_wrong_value_is_refused_with_the_reason(values: str, reason: str):
    refused = helm("template", "bundle", str(CHART), values=values)
    assert refused.returncode == 1
    assert reason in refused.stderr
    assert refused.stdout == ""


@pytest.mark.parametrize("name", ["my.app", "2024"])
def test_release_whose_services_would_have_invalid_names_is_refused(name: str):
    refused = helm("template", name, str(CHART))
    assert refused.returncode == 1
    assert f"release {name}: names of Services begin with it" in refused.stderr
