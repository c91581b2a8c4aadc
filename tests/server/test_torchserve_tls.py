"""TorchServe's own TLS, with the certificate of a private authority."""

import os
import subprocess
import sys
from pathlib import Path

from bundle.paths import ROOT
from tests.certificates import Authority
from tests.server.place import Place


def test_server_with_a_private_certificate_is_served_and_loaded_with_the_file_of_its_authority(
    place: Place, tmp_path: Path
):
    folder = tmp_path / "authority"
    folder.mkdir()
    authority = Authority.make(folder)
    certificate, key = authority.issue()
    for name in ("inference_address", "management_address"):
        place.environment[f"TS_{name.upper()}"] = place.url(name).replace("http:", "https:")
    place.environment.update(TS_CERTIFICATE_FILE=str(certificate), TS_PRIVATE_KEY_FILE=str(key))

    refused = place.bundle("serve", "mnist", CA_FILE="")
    assert refused.returncode == 1, refused.stderr
    assert "is not trusted: unable to get local issuer certificate. Set CA_FILE to a PEM file" in refused.stderr
    assert place.bundle("status").returncode == 3

    place.environment["CA_FILE"] = str(authority.file)
    served = place.bundle("serve", "mnist")
    assert served.returncode == 0, served.stderr
    assert f"curl --cacert {authority.file} -T models/mnist/sample.png https://127.0.0.1:" in served.stdout
    url = place.environment["TS_INFERENCE_ADDRESS"]
    load = [sys.executable, "-m", "loadtest", "run", "mnist", "--host", url, "--users", "1", "--duration", "5s"]
    limits = tmp_path / "thresholds.yaml"
    limits.write_text("defaults: {failures: 0, wrong: 0}\n")
    load += ["--thresholds", str(limits), "--results", str(tmp_path / "results")]
    environment = os.environ | {"CA_FILE": str(authority.file)}
    loaded = subprocess.run(load, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert loaded.returncode == 0, loaded.stdout + loaded.stderr
