"""The patch `grpc` in TorchServe's own gRPC server, with Triton's client and without models."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from bundle.build import frontend as building
from bundle.paths import ROOT
from bundle.server.frontend import JAR, OFF
from bundle.server.grpc_client import GrpcError, predict
from bundle.server.java import java_home
from bundle.server.ports import free_ports
from tests.unit.test_frontend import NO_COMPILER, compile_java

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NO_COMPILER, reason="no JDK")]
# opens the gRPC ports until its input ends
PROGRAM = """
import io.netty.channel.nio.NioEventLoopGroup;
import org.pytorch.serve.ModelServer;
import org.pytorch.serve.metrics.MetricCache;
import org.pytorch.serve.util.*;
import org.pytorch.serve.wlm.*;

public class Ports {
    public static void main(String[] arguments) throws Exception {
        var given = new ConfigManager.Arguments();
        given.setModelStore(System.getProperty("user.dir"));
        ConfigManager.init(given);
        MetricCache.init();
        TokenAuthorization.init();
        ConfigManager config = ConfigManager.getInstance();
        ModelManager.init(config, new WorkLoadManager(config, new NioEventLoopGroup(1)));
        new ModelServer(config).startGRPCServers();
        System.out.println("OPEN");
        System.in.read();
        System.exit(0);
    }
}
"""
LIMIT = 100_000  # bytes of a request


@contextmanager
def ports(folder: Path, tokens: bool = False, **environment: str) -> Iterator[str]:
    """Open the ports while the block runs. Return the address of that of inference.

    Args:
        tokens: whether they accept only calls with a key of the file key_file.json in the folder.
    """
    torchserve = building.torchserve_jar()
    compile_java(folder, PROGRAM, torchserve)
    inference, management = free_ports(2)
    (folder / "ts").mkdir()
    (folder / "ts" / "version.txt").write_text((torchserve.parents[1] / "version.txt").read_text())
    (folder / "config.properties").write_text(
        f"metrics_config={ROOT / 'bundle' / 'config' / 'metrics.yaml'}\n"
        f"disable_token_authorization={str(not tokens).lower()}\n"
        f"grpc_inference_port={inference}\ngrpc_management_port={management}\nmax_request_size={LIMIT}\n"
    )
    command = [java_home() / "bin" / "java", f"-DtsConfigFile={folder / 'config.properties'}", f"-javaagent:{JAR}"]
    command += ["-cp", f"{folder}:{torchserve}", "Ports"]
    process = subprocess.Popen(
        command, cwd=folder, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line == "OPEN\n":
                break
        else:
            pytest.fail("".join(printed))
        try:
            yield f"127.0.0.1:{inference}"
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ports(tmp_path_factory.mktemp("ports")) as opened:
        yield opened


@pytest.fixture
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as connected:
        yield connected


def numbers(count: int = 1) -> triton.InferInput:
    return triton.InferInput("data", [count], "FP32").set_data_from_numpy(numpy.ones(count, numpy.float32))


def probe(address: str, service: str = "", call: str = "Check") -> bytes:
    """Ask the standard service for probes, in the bytes of its messages."""
    with grpc.insecure_channel(address) as channel:
        check = channel.unary_unary(f"/grpc.health.v1.Health/{call}")
        return check(bytes([1 << 3 | 2, len(service)]) + service.encode() if service else b"", timeout=20)


def test_server_answers_about_itself(client: triton.InferenceServerClient):
    assert client.is_server_live()
    assert client.is_server_ready()
    metadata = client.get_server_metadata()
    assert (metadata.name, metadata.version, metadata.extensions) == ("torchserve", "0.12.0", ["binary_tensor_data"])


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.is_model_ready("x"),
        lambda client: client.get_model_metadata("x"),
        lambda client: client.infer("x", [numbers()]),
        lambda client: client.infer("x", [numbers()], model_version="1"),
    ],
)
def test_unknown_model_is_not_found(client: triton.InferenceServerClient, ask: Callable):
    with pytest.raises(InferenceServerException, match="^.*Model not found: x$") as raised:
        ask(client)
    assert raised.value.status() == "StatusCode.NOT_FOUND"


def test_message_that_quotes_a_long_name_is_cut(client: triton.InferenceServerClient):
    with pytest.raises(InferenceServerException, match=r"Model not found: x+\.\.\.$") as raised:
        client.infer("x" * 50_000, [numbers()])
    assert len(raised.value.message()) < 1000


def test_request_above_the_limit_does_not_reach_the_model(client: triton.InferenceServerClient):
    with pytest.raises(InferenceServerException) as raised:
        client.infer("x", [numbers(LIMIT)])
    assert raised.value.status() in ("StatusCode.RESOURCE_EXHAUSTED", "StatusCode.CANCELLED")


def test_call_that_the_server_does_not_have_is_unimplemented(client: triton.InferenceServerClient):
    with pytest.raises(InferenceServerException) as raised:
        client.get_model_config("x")
    assert raised.value.status() == "StatusCode.UNIMPLEMENTED"


@pytest.mark.parametrize(
    "service", ["", "inference.GRPCInferenceService", "org.pytorch.serve.grpc.inference.InferenceAPIsService"]
)
def test_probe_of_a_ready_server_is_serving(address: str, service: str):
    assert probe(address, service) == b"\x08\x01"


def test_probe_of_an_unknown_service_is_not_found(address: str):
    with pytest.raises(grpc.RpcError) as raised:
        probe(address, "x")
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_watch_of_probes_is_unimplemented(address: str):
    with pytest.raises(grpc.RpcError) as raised:
        probe(address, call="Watch")
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(("fields", "words"), [(1000, "Model not found"), (1001, "more than 1,000 fields")])
def test_call_of_torchserves_service_may_have_a_thousand_fields(address: str, fields: int, words: str):
    with pytest.raises(GrpcError, match=words) as raised:
        predict(address, "x", {str(index): b"" for index in range(fields)})
    assert (raised.value.code is grpc.StatusCode.INVALID_ARGUMENT) == (fields > 1000)


def test_call_without_a_key_is_denied(tmp_path: Path):
    with ports(tmp_path, tokens=True) as address, triton.InferenceServerClient(address) as client:
        with pytest.raises(InferenceServerException) as raised:
            client.is_server_live()
        assert raised.value.status() == "StatusCode.PERMISSION_DENIED"
        key = json.loads((tmp_path / "key_file.json").read_text())["inference"]["key"]
        assert client.is_server_live(headers={"authorization": f"Bearer {key}"})


def test_port_is_torchserves_own_without_the_patch(tmp_path: Path):
    with ports(tmp_path, **{OFF: "grpc"}) as address, triton.InferenceServerClient(address) as client:
        with pytest.raises(InferenceServerException) as raised:
            client.is_server_live()
        assert raised.value.status() == "StatusCode.UNIMPLEMENTED"
        with pytest.raises(grpc.RpcError) as probed:
            probe(address)
        assert probed.value.code() is grpc.StatusCode.UNIMPLEMENTED
