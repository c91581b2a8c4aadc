"""The archives in a stock TorchServe: nothing of the bundle except the packages that it installs."""

import os
import subprocess
import sys
import time

import psutil
import pytest
import requests

from bundle.catalog import select
from bundle.server.client import Client, check_sample
from bundle.server.java import java_home
from tests.shipped import SHIPPED

FOLDERS = select(list(SHIPPED))


@pytest.fixture
def stock(archives, place, tmp_path):
    """A TorchServe with its own defaults, except for the ports."""
    config = tmp_path / "config.properties"
    lines = [f"{key}=http://127.0.0.1:{place.ports[key]}" for key in place.ports if key.endswith("address")]
    lines += [f"{key}={place.ports[key]}" for key in place.ports if key.startswith("grpc")]
    config.write_text("\n".join([*lines, "disable_token_authorization=true", "default_workers_per_model=1"]))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TS_")}
    environment |= {"TMPDIR": str(tmp_path), "TEMP": str(tmp_path), "LOG_LOCATION": str(tmp_path / "logs")}
    environment |= {"METRICS_LOCATION": str(tmp_path / "logs"), "JAVA_HOME": str(java_home())}
    command = [sys.executable, "-m", "ts.model_server", "--start", "--ts-config", str(config)]
    command += ["--model-store", str(archives), "--models", *(f"{name}={name}.mar" for name in SHIPPED)]
    # no pipe: the server would keep it open
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
    java = psutil.Process(int((tmp_path / ".model_server.pid").read_text()))
    try:
        yield Client(
            f"http://127.0.0.1:{place.ports['inference_address']}",
            f"http://127.0.0.1:{place.ports['management_address']}",
        )
    finally:
        family = [java, *java.children(recursive=True)]
        java.terminate()
        _, left = psutil.wait_procs(family, timeout=30)
        for process in left:
            process.kill()


def test_every_archive_answers_its_sample_in_a_stock_torchserve(stock):
    deadline = time.monotonic() + 180
    for folder in FOLDERS:
        while True:
            try:
                if stock.workers(folder.name).ready:
                    break
            except requests.ConnectionError:
                pass
            assert time.monotonic() < deadline, f"{folder.name} has no worker"
            time.sleep(0.5)
        assert check_sample(stock, folder) == folder.bundle.expect
