"""The chart's wrong values: each is refused with its place and the reason, and no refusal prints a secret."""

import json
from pathlib import Path

import pytest

from bundle.paths import ROOT
from bundle.signing import make_keys
from tests.helm import CHART, DIGEST, PEM, containers, helm, many_models, needs_helm, pods, render

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
        ("proxy: {rate: fast}", "at '/proxy/rate': 'fast' does not match pattern"),
        ("proxy: {maxBody: 16MiB}", "at '/proxy/maxBody': '16MiB' does not match pattern"),
        (
            "tracing: {endpoint: 'collector:4317'}",
            "tracing.endpoint: it must be http:// or https:// with a host and a port",
        ),
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
        (
            "archives: {source: url}",
            "groups.main.models.audio: archives.source=url needs its sha256, and its url or archives.downloader.image",
        ),
        (
            f"groups: {{main: {{models: {{mnist: {{url: 'https://a/b', sha256: {DIGEST}}}}}}}}}",
            "groups.main.models.mnist: url and sha256 need archives.source=url",
        ),
        (
            "groups: {main: {models: {mnist: {url: 's3://mnist.mar'}}}}",
            "groups.main.models.mnist.url: it must begin with",
        ),
        ("archives: {source: url, s3: {endpoint: minio:9000}}", "archives.s3.endpoint: it must be http:// or https://"),
        ("archives: {s3: {region: eu-central-1}}", "archives: s3 and downloader need archives.source=url"),
        ("archives: {netrcSecret: passwords}", "archives.netrcSecret: it needs archives.source=url"),
        (
            "archives: {source: url, downloader: {image: amazon/aws-cli}}",
            "groups.main.models.audio: archives.source=url needs its sha256, and its url or archives.downloader.image",
        ),
        (
            f"groups: {{main: null, a: {{models: {{mnist: {{url: 'https://a/b', sha256: {DIGEST}}}}}}}}}\n"
            "archives: {source: url, downloader: {image: amazon/aws-cli}}",
            "groups.a.models.mnist: archives.downloader gets it, so it needs no url",
        ),
        ("trustedKey: {pem: ssh-ed25519 AAAA}", "trustedKey.pem: this is not a public key (PEM). Give the .pub file"),
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


@pytest.mark.parametrize(
    ("canary", "reason"),
    [
        ("models: {mnist: {url: a/b}}", ".models.mnist.url: it must begin with http://"),
        (f"models: {{mnist: {{sha256: {DIGEST}}}}}", ".models.mnist: url and sha256 need archives.source=url"),
        ("settings: {model_store: /tmp}", ".settings.model_store: the chart sets it"),
        ("settings: {disable_token_authorization: false}", ": disable_token_authorization cannot be set"),
        ("env: {BUNDLE_GATE: /tmp}", ".env.BUNDLE_GATE: the chart sets it"),
        ("image: {repository: A}", ".image.repository: it must be like"),
        ("image: {digest: latest}", ".image.digest: it must be sha256:"),
    ],
)
def test_wrong_value_of_a_canary_is_refused_with_its_place(canary: str, reason: str):
    refused = helm("template", "bundle", str(CHART), values=f"groups: {{main: {{canary: {{weight: 1, {canary}}}}}}}")
    assert refused.returncode == 1
    assert f"): groups.main.canary{reason}" in refused.stderr


def test_name_that_only_the_canary_makes_too_long_is_refused_with_its_place():
    group = f"groups: {{{'g' * 35}: {{models: {{mnist: {{}}}}, canary: {{weight: 1}}}}}}"
    refused = helm("template", "bundle", str(CHART), values=group)
    assert f"): groups.{'g' * 35}.canary: the name bundle-{'g' * 35}-canary is longer than 46" in refused.stderr


@pytest.mark.parametrize("name", ["my.app", "2024"])
def test_release_whose_services_would_have_invalid_names_is_refused(name: str):
    refused = helm("template", name, str(CHART))
    assert refused.returncode == 1
    assert f"release {name}: names of Services begin with it" in refused.stderr


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        *(("tag", tag, "must have at most 128") for tag in ("a b", "-a", ".a", "a/b", "v1:2", "a@b", "ä", "a" * 129)),
        *(
            ("repository", name, "must be like registry.example:5000/team/name")
            for name in (
                "a b",
                "Name",
                "a/B",
                "a//b",
                "/a",
                "a/",
                "a:1.0",
                "https://a/b",
                "a..b",
                "a___b",
                "-a",
                "a@b",
                "./a",
                "-/a",
                "a..b/c",
            )
        ),
        *(
            ("digest", digest, "must be sha256: and 64 digits from 0-9 and a-f")
            for digest in ("latest", DIGEST, "sha256:abc", f"sha256:{DIGEST.upper()}", f"sha512:{DIGEST}")
        ),
    ],
)
def test_part_of_an_image_that_no_registry_accepts_is_refused(part: str, value: str, reason: str):
    refused = helm("template", "bundle", str(CHART), "--set-string", f"image.{part}={value}")
    assert refused.returncode == 1
    assert f"image.{part}: it {reason}" in refused.stderr


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ("proxy: {image: {tag: a b}}", "proxy.image.tag: it must have"),
        ("defaults: {image: {tag: a b}}", "defaults.image.tag: it must have"),
        ("groups: {main: {image: {tag: a b}}}", "groups.main.image.tag: it must have"),
        ("groups: {main: {canary: {weight: 1, image: {tag: a b}}}}", "groups.main.canary.image.tag: it must have"),
        ("defaults: {canary: {weight: 1, image: {tag: a b}}}", "defaults.canary.image.tag: it must have"),
        (
            "archives: {source: url, downloader: {image: 'a b:1'}}",
            "archives.downloader.image: it must be the name of an image",
        ),
    ],
)
def test_invalid_image_is_refused_with_its_place(values: str, reason: str):
    refused = helm("template", "bundle", str(CHART), values=values)
    assert refused.returncode == 1
    assert reason in refused.stderr


@pytest.mark.parametrize(
    "image",
    [
        {"repository": "localhost:5000/bundle", "tag": "v1.0_rc.1-2"},
        {"repository": "europe-docker.pkg.dev/my-project/my_models/bundle", "tag": "_"},
        {"repository": "123456789012.dkr.ecr.eu-central-1.amazonaws.com/a__b/c--d.e", "tag": "A" * 128},
        {"repository": "bundle", "digest": f"sha256:{DIGEST}"},
    ],
)
def test_image_that_registries_accept_is_accepted(image: dict):
    found = containers(dict(pods(render(json.dumps({"image": image}))))["bundle-main"])
    suffix = f"@{image['digest']}" if "digest" in image else f":{image['tag']}"
    assert found["torchserve"]["image"] == image["repository"] + suffix


# --- secrets: what Helm prints is in the log of a pipeline -----------------------------------------------------------

SECRET = "hunter2"


def refusal_of(place: str, file: Path) -> str:
    """Return what Helm prints when it refuses a file as a value, without the files that it finds linked."""
    refused = helm("template", "bundle", str(CHART), "--set-file", f"{place}={file}")
    assert refused.returncode == 1
    assert refused.stdout == ""
    return "".join(line for line in refused.stderr.splitlines(True) if "found symbolic link" not in line)


def test_private_key_as_the_trusted_key_is_refused_and_not_printed(tmp_path: Path):
    private = tmp_path / "signing.key"
    public = make_keys(private)
    said = refusal_of("trustedKey.pem", private)
    assert "trustedKey.pem: this is a private key" in said
    assert [line for line in private.read_text().splitlines() if line in said] == []
    accepted = helm("template", "bundle", str(CHART), "--set-file", f"trustedKey.pem={public}")
    assert accepted.returncode == 0, accepted.stderr


@pytest.mark.parametrize("values", ["image: {repository: %s}", "archives: {source: url, downloader: {image: %s}}"])
def test_password_in_the_name_of_an_image_is_not_printed(values: str):
    refused = helm("template", "bundle", str(CHART), values=values % f"https://me:{SECRET}@registry.example/a")
    assert refused.returncode == 1
    assert ": it must be" in refused.stderr
    assert SECRET not in refused.stderr


def test_key_of_openssh_and_another_file_as_the_trusted_key_are_refused_and_not_printed(tmp_path: Path):
    key = tmp_path / "id_ed25519"
    key.write_text(f"-----BEGIN OPENSSH PRIVATE KEY-----\n{SECRET}\n-----END OPENSSH PRIVATE KEY-----\n")
    said = refusal_of("trustedKey.pem", key)
    assert "trustedKey.pem: this is a private key" in said
    assert SECRET not in said
    said = refusal_of("trustedKey.pem", ROOT / "README.md")
    assert "trustedKey.pem: this is not a public key (PEM). Give the .pub file" in said
    assert len(said) < 400


@pytest.mark.parametrize(
    "place",
    [
        "archives.netrcSecret",
        "archives.caSecret",
        "archives.s3.credentialsSecret",
        "trustedKey.secret",
        "ingress.tlsSecret",
        "tracing.headersSecret",
        "pullSecrets[0]",
    ],
)
def test_content_in_place_of_the_name_of_a_secret_is_refused_and_not_printed(tmp_path: Path, place: str):
    """Otherwise, it would be in the Deployment, which more people can read than Secrets."""
    content = tmp_path / "content"
    content.write_text(f"machine models.example login me password {SECRET}\n")
    said = refusal_of(place, content)
    assert f"{place}: this is not the name of a Secret" in said
    assert SECRET not in said


@pytest.mark.parametrize(
    ("values", "place"),
    [
        (f"groups: {{main: {{models: {{mnist: {{url: 'ftp://me:{SECRET}@a/b'}}}}}}}}", "groups.main.models.mnist.url"),
        (
            f"groups: {{main: {{models: {{mnist: {{url: 'https://a/b?X-Amz-Signature={SECRET} '}}}}}}}}",
            "groups.main.models.mnist.url",
        ),
        (
            f"groups: {{main: {{canary: {{weight: 1, models: {{mnist: {{url: 'me:{SECRET}@a/b'}}}}}}}}}}",
            "groups.main.canary.models.mnist.url",
        ),
        (f"archives: {{source: url, s3: {{endpoint: 'http://me:{SECRET}@minio:9000'}}}}", "archives.s3.endpoint"),
        (f"tracing: {{endpoint: 'http://me:{SECRET}@collector:4317'}}", "tracing.endpoint"),
        (f"tracing: {{endpoint: 'http://me:{SECRET}@collector:99999'}}", "tracing.endpoint"),
        (f"defaults: {{autoscaling: {{prometheus: 'me:{SECRET}@a:9090'}}}}", "groups.main.autoscaling.prometheus"),
        (f"defaults: {{env: {{TOKEN: [{SECRET}]}}}}", "at '/defaults/env/TOKEN'"),
        (f"groups: {{main: {{env: {{TOKEN: {{a: {SECRET}}}}}}}}}", "at '/groups/main/env/TOKEN'"),
        (f"groups: {{main: {{env: {{TRUSTED_KEY: {SECRET}}}}}}}", "groups.main.env.TRUSTED_KEY"),
        (f"defaults: {{env: TOKEN={SECRET}}}", "at '/defaults/env'"),
        (f"defaults: {{settings: {{management_address: {SECRET}}}}}", "groups.main.settings.management_address"),
        (f"archives: {{downloader: {{env: {{TOKEN: [{SECRET}]}}}}}}", "at '/archives/downloader/env/TOKEN'"),
        (f"archives: {{downloader: {{args: {SECRET}}}}}", "at '/archives/downloader/args'"),
        (f"archives: {{s3: {{secretAccessKey: {SECRET}}}}}", "at '/archives/s3'"),
        (f"tracing: {{headers: authorization={SECRET}}}", "at '/tracing'"),
        (f"configProperties: keystore_pass={SECRET}", "configProperties"),
        (f"ingress: {{annotations: {{auth: [{SECRET}]}}}}", "at '/ingress/annotations/auth'"),
    ],
)
def test_refusal_names_the_place_and_does_not_print_the_secret(values: str, place: str):
    refused = helm("template", "bundle", str(CHART), values=values)
    assert refused.returncode == 1
    assert place in refused.stderr
    assert SECRET not in refused.stdout + refused.stderr
