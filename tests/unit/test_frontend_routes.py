"""The patch `routes` in TorchServe's own HTTP handlers, without a server and without models."""

import json
from pathlib import Path

import pytest

from bundle.build import frontend as building
from bundle.paths import ROOT
from tests.unit.schemas import write_archive
from tests.unit.test_frontend import JAR, NO_COMPILER, compile_java, run_java

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NO_COMPILER, reason="no JDK")]
# registers each "register ARCHIVE NAME", without workers, and makes each "default NAME VERSION" the default; sends each
# other "METHOD URI" through a connection's handlers, and prints the status, the body, and what was passed on
PROGRAM = """
import io.netty.buffer.Unpooled;
import io.netty.channel.embedded.EmbeddedChannel;
import io.netty.channel.nio.NioEventLoopGroup;
import io.netty.handler.codec.http.*;
import java.nio.charset.StandardCharsets;
import java.util.HashMap;
import org.pytorch.serve.http.*;
import org.pytorch.serve.http.api.rest.*;
import org.pytorch.serve.metrics.MetricCache;
import org.pytorch.serve.util.*;
import org.pytorch.serve.wlm.*;

public class Routes {
    public static void main(String[] tries) throws Exception {
        var arguments = new ConfigManager.Arguments();
        arguments.setModelStore(System.getProperty("user.dir"));
        ConfigManager.init(arguments);
        MetricCache.init();
        ConfigManager config = ConfigManager.getInstance();
        ModelManager.init(config, new WorkLoadManager(config, new NioEventLoopGroup(1)));
        for (String each : tries) {
            String[] words = each.split(" ");
            if (words[0].equals("register")) {
                ModelManager.getInstance().registerModel(
                        words[1], words[2], null, null, 1, 1, 1, 1, words[2], false, false, false);
                continue;
            }
            if (words[0].equals("default")) {
                ModelManager.getInstance().setDefaultVersion(words[1], words[2]);
                continue;
            }
            HttpRequestHandlerChain first = new ApiDescriptionRequestHandler(ConnectorType.INFERENCE_CONNECTOR);
            first.setNextHandler(new InferenceRequestHandler(new HashMap<>()))
                    .setNextHandler(new InvalidRequestHandler());
            var channel = new EmbeddedChannel(new HttpRequestHandler(first));
            var request = new DefaultFullHttpRequest(
                    HttpVersion.HTTP_1_1, HttpMethod.valueOf(words[0]), words[1], Unpooled.wrappedBuffer(new byte[2]));
            request.headers().set("Bundle-Protocol", "the client's own").set("Content-Type", "application/json");
            if (words.length > 2) request.headers().set("Inference-Header-Content-Length", words[2]);
            channel.writeInbound(request);
            FullHttpResponse answer = channel.readOutbound();
            HttpHeaders passed = request.headers();
            System.out.println("ANSWER\\t" + each + "\\t" + answer.status().code()
                    + "\\t" + answer.content().toString(StandardCharsets.UTF_8).replaceAll("\\\\s+", " ")
                    + "\\t" + request.uri() + "\\t" + passed.get("bundle-protocol") + "\\t" + passed.get("content-type")
                    + "\\t" + passed.getAll("explain"));
        }
        System.exit(0);
    }
}
"""
PREDICTION, EXPLANATION = "[False]", "[False, True]"  # the headers `explain`, of which the last one counts
ASKED = [
    ("GET /", 200, '{ "status": "alive" }'),
    ("GET /?a=b", 200, '{ "status": "alive" }'),
    ("POST /", 405, '"MethodNotAllowedException"'),
    ("OPTIONS /", 200, '"openapi"'),
    ("GET /v2", 200, '"binary_tensor_data"'),
    ("GET /v2/health/live", 200, '"live": true'),
    ("GET /v2/health/ready", 200, '"ready": true'),
    ("POST /v2/health/ready", 405, '"error"'),
    ("GET /v2/health/well", 404, '"error"'),
    ("GET /v2/models/x", 404, '{"error":"Model not found: x"}'),
    ("GET /v2/models/x/versions/1/ready", 404, '{"error":"Model not found: x"}'),
    ("GET /v2/models/x/config", 404, '"error"'),
    ("GET /v1/models", 200, '{ "models": [] }'),
    ("GET /v1/models/x", 404, '"ModelNotFoundException"'),
    ("GET /v1/x/models", 404, '"ResourceNotFoundException"'),
    ("POST /v1/models/x:regress", 404, '"ResourceNotFoundException"'),
    ("GET /v1/models/x:predict", 405, '"MethodNotAllowedException"'),
    ("POST /invocations", 400, "Name the model"),
    ("GET /openapi.json", 200, '"openapi":"3.1.0"'),
    ("POST /openapi.json", 405, '"MethodNotAllowedException"'),
    ("GET /openapi.json/x", 404, '"ResourceNotFoundException"'),
    ("POST /invocations?model_name=&a=b", 400, "Name the model"),
    ("GET /models/x/other", 404, '"ResourceNotFoundException"'),
]
INFERRED = [  # request, URI with the query that the handler gets, protocol, content type, kind
    ("POST /v2/models/x/infer", "/v2/models/x/infer", "v2", "application/json", PREDICTION),
    ("POST /v2/models/x/infer 2", "/v2/models/x/infer", "v2", "application/octet-stream", PREDICTION),
    (
        "POST /v2/models/x/versions/1/infer?a=b",
        "/v2/models/x/versions/1/infer?a=b",
        "v2",
        "application/json",
        PREDICTION,
    ),
    ("POST /v2/models/x/explain", "/v2/models/x/explain", "v2", "application/json", EXPLANATION),
    ("POST /v1/models/x:predict", "/v1/models/x:predict", "null", "application/json", PREDICTION),
    ("POST /v1/models/x:explain", "/v1/models/x:explain", "null", "application/json", EXPLANATION),
    ("POST /invocations?a=b&model_name=x&c=d", "/invocations?a=b&c=d", "null", "application/json", PREDICTION),
    ("POST /models/x/invoke?a=b", "/models/x/invoke?a=b", "null", "application/json", PREDICTION),
    ("POST /predictions/x", "/predictions/x", "null", "application/json", PREDICTION),
]


# metadata that are nested so deeply that Java's stack overflows
DEEP = '{"platform": "", "inputs": ' + "[" * 100_000 + "]" * 100_000 + "}"


def ask(folder: Path, *asked: str) -> list[list[str]]:
    """Return what Java printed about each request: the request, the status, the body, ...

    Args:
        folder: TorchServe's working folder and model store.
    """
    compile_java(folder, PROGRAM, building.torchserve_jar())
    (folder / "config.properties").write_text(f"metrics_config={ROOT / 'bundle' / 'config' / 'metrics.yaml'}\n")
    version = Path(building.torchserve_jar()).parents[1] / "version.txt"
    (folder / "ts").mkdir()
    (folder / "ts" / "version.txt").write_text(version.read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = f"-DtsConfigFile={folder / 'config.properties'}"
        command = [config, f"-javaagent:{JAR}", "-cp", f"{folder}:{building.torchserve_jar()}", "Routes"]
        printed = run_java(*command, *asked)
    return [line.split("\t")[1:] for line in printed.splitlines() if line.startswith("ANSWER")]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Return what Java printed about each request."""
    folder = tmp_path_factory.mktemp("routes")
    registered = f"register {write_archive(folder, 'deep', None, metadata=DEEP)} deep"
    asked = [each[0] for each in [*ASKED, *INFERRED]]
    return {request: rest for request, *rest in ask(folder, *asked, registered, "GET /v2/models/deep")}


@pytest.mark.parametrize(("request_", "status", "words"), ASKED)
def test_question_is_answered_in_the_form_of_its_protocol(answers, request_: str, status: int, words: str):
    code, body, *_ = answers[request_]
    assert (int(code), words in body) == (status, True), body
    assert list(json.loads(body)) == ["error"] or '"error"' not in words


def test_exception_of_torchserve_is_an_error_of_the_protocol_without_its_text(answers):
    code, body, *_ = answers["GET /v2/models/deep"]
    assert (code, json.loads(body)) == ("500", {"error": "The server failed on this request. Its log has the reason."})


@pytest.mark.parametrize(("request_", "uri", "protocol", "content_type", "kind"), INFERRED)
def test_inference_becomes_torchserves_own(answers, request_, uri, protocol, content_type, kind):
    code, body, *passed = answers[request_]
    assert passed == [uri, protocol, content_type, kind]
    assert code == "404"
    assert ('{"error":"Model not found: x"}' in body) == (protocol == "v2")
