package bundle.frontend;

import com.google.gson.JsonObject;
import com.google.gson.JsonSyntaxException;
import groovyjarjarasm.asm.Opcodes;
import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.FieldInsnNode;
import groovyjarjarasm.asm.tree.MethodNode;
import io.netty.channel.ChannelHandlerContext;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.FullHttpResponse;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpHeaderValues;
import io.netty.handler.codec.http.HttpMethod;
import io.netty.handler.codec.http.HttpResponse;
import io.netty.handler.codec.http.HttpResponseStatus;
import io.netty.handler.codec.http.QueryStringDecoder;
import io.netty.util.AttributeKey;
import java.nio.charset.StandardCharsets;
import java.util.Arrays;
import java.util.List;
import java.util.stream.Collectors;
import org.pytorch.serve.archive.DownloadArchiveException;
import org.pytorch.serve.archive.model.ModelException;
import org.pytorch.serve.archive.workflow.WorkflowException;
import org.pytorch.serve.http.BadRequestException;
import org.pytorch.serve.http.InternalServerException;
import org.pytorch.serve.http.MethodNotAllowedException;
import org.pytorch.serve.http.ResourceNotFoundException;
import org.pytorch.serve.http.api.rest.InferenceRequestHandler;
import org.pytorch.serve.util.ConnectorType;
import org.pytorch.serve.util.JsonUtils;
import org.pytorch.serve.wlm.WorkerInitializationException;

/**
 * The routes of KServe (Open Inference Protocol and v1) and of SageMaker are those of predictions and explanations; and
 * /openapi.json describes the models.
 *
 * <p>TorchServe has some of them, in a form that their clients do not understand: without versions, metadata and binary
 * tensors, and with a readiness that is always true. `GET /`, with which clients of v1 ask whether the server is alive,
 * is 405.
 */
public final class Routes implements Patch {
    static final String PROTOCOL = "bundle-protocol"; // tells the handler how to read and answer
    private static final String JSON_SIZE = "inference-header-content-length";
    private static final String DESCRIPTION = "org/pytorch/serve/http/api/rest/ApiDescriptionRequestHandler";
    private static final String PORT = "connectorType"; // its field
    private static final String PORT_TYPE = "Lorg/pytorch/serve/util/ConnectorType;";
    private static final AttributeKey<Boolean> OPEN_INFERENCE = AttributeKey.valueOf("bundle.open_inference");

    @Override
    public String name() {
        return "routes";
    }

    @Override
    public List<String> classes() {
        return List.of(Code.HTTP_HANDLER, DESCRIPTION, Code.REQUEST_PARSER, Code.NETTY, Code.WORKER);
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        String client = "Lio/netty/channel/ChannelHandlerContext;";
        String request = "Lio/netty/handler/codec/http/FullHttpRequest;";
        String rest = "Lio/netty/handler/codec/http/QueryStringDecoder;[Ljava/lang/String;";
        String handle = "(" + client + request + rest + ")V";
        if (code.name.equals(Code.HTTP_HANDLER)) {
            String parameters = "(" + client + request + ")V";
            Code.begin(Code.method(code, "channelRead0", parameters), Routes.class, "receive", 1, 2);
        } else if (code.name.equals(DESCRIPTION)) {
            Code.requireField(code, PORT);
            MethodNode describe = Code.method(code, "handleRequest", handle);
            Code.guard(describe, Routes.class, "live", 0, 1, 2, 3);
            // not the object itself, but its field
            describe.instructions.insert(
                    describe.instructions.getFirst(),
                    new FieldInsnNode(Opcodes.GETFIELD, DESCRIPTION, PORT, PORT_TYPE));
        } else if (code.name.equals(Code.REQUEST_PARSER)) {
            Code.guard(Code.method(code, "handleRequest", handle), Routes.class, "pass", 0, 1, 2, 3, 4);
        } else if (code.name.equals(Code.WORKER)) {
            Code.begin(Code.setState(code), States.class, "note", 0, 1);
        } else {
            String parameters = "(" + client + "Lio/netty/handler/codec/http/HttpResponse;Z)V";
            Code.begin(Code.method(code, "sendHttpResponse", parameters), Routes.class, "answer", 0, 1);
            Code.guard(Code.method(code, "sendError", Code.SEND_ERROR), Routes.class, "fail", 0, 1, 2);
        }
    }

    /** Note the protocol of a request. Called when it has arrived. */
    public static void receive(ChannelHandlerContext client, FullHttpRequest request) {
        request.headers().remove(PROTOCOL); // only `pass` may set it
        String uri = request.uri();
        boolean open = uri.equals("/v2") || uri.startsWith("/v2/") || uri.startsWith("/v2?");
        client.channel().attr(OPEN_INFERENCE).set(open);
    }

    /**
     * Answer `GET /` on the port of predictions. Called before TorchServe looks for `OPTIONS /` and at the token.
     *
     * @param port what the port is for
     * @return whether TorchServe handles the request
     */
    public static boolean live(
            ConnectorType port, ChannelHandlerContext client, FullHttpRequest request, QueryStringDecoder query) {
        boolean predicts = port == ConnectorType.INFERENCE_CONNECTOR || port == ConnectorType.ALL;
        if (!predicts || !HttpMethod.GET.equals(request.method()) || !query.path().equals("/")) {
            return true;
        }
        States.alive(client);
        return false;
    }

    /**
     * Handle a request of a route that is not TorchServe's. Called before TorchServe looks at the path, and after it has
     * checked the token.
     *
     * @return whether TorchServe handles the request
     */
    public static boolean pass(
            InferenceRequestHandler handler,
            ChannelHandlerContext client,
            FullHttpRequest request,
            QueryStringDecoder query,
            String[] segments)
            throws ModelException, DownloadArchiveException, WorkflowException, WorkerInitializationException {
        List<String> path = Arrays.asList(segments).subList(Math.min(1, segments.length), segments.length);
        String first = path.isEmpty() ? "" : path.get(0);
        String[] to;
        if (first.equals("v2")) {
            to = openInference(client, request, path);
        } else if (first.equals("v1") && path.size() > 1 && path.size() <= 3 && path.get(1).equals("models")) {
            to = firstProtocol(client, request, path);
        } else if (first.equals("invocations") && path.size() == 1) {
            to = invocation(request, query);
        } else if (first.equals("openapi.json") && path.size() == 1) {
            require(HttpMethod.GET, request);
            Schema.send(client);
            to = null;
        } else if (first.equals("models") && path.size() == 3 && path.get(2).equals("invoke")) {
            to = predictions(path.get(1), null, "predict", request);
        } else {
            return true;
        }
        if (to != null) {
            handler.handleRequest(client, request, query, to);
        }
        return false;
    }

    /** Return the segments of TorchServe's own route; null if the request was answered. */
    private static String[] openInference(ChannelHandlerContext client, FullHttpRequest request, List<String> path)
            throws ModelException {
        if (path.size() == 1 || (path.size() == 3 && path.get(1).equals("health"))) {
            require(HttpMethod.GET, request);
            States.server(client, path.size() == 1 ? "" : path.get(2));
            return null;
        }
        boolean versioned = path.size() > 4 && path.get(3).equals("versions");
        int parts = versioned ? 5 : 3; // v2/models/NAME or v2/models/NAME/versions/VERSION
        if (path.size() < 3 || path.size() > parts + 1 || !path.get(1).equals("models")) {
            throw new ResourceNotFoundException();
        }
        String version = versioned ? path.get(4) : null;
        String verb = path.size() > parts ? path.get(parts) : "";
        if (verb.isEmpty() || verb.equals("ready")) {
            require(HttpMethod.GET, request);
            States.model(client, path.get(2), version, !verb.isEmpty());
            return null;
        }
        String[] to = predictions(path.get(2), version, verb.equals("infer") ? "predict" : verb, request);
        request.headers().set(PROTOCOL, "v2");
        if (request.headers().contains(JSON_SIZE)) { // otherwise, the worker would try to parse the body as JSON
            request.headers().set(HttpHeaderNames.CONTENT_TYPE, HttpHeaderValues.APPLICATION_OCTET_STREAM);
        }
        return to;
    }

    /** The same for v1/models, v1/models/NAME, and v1/models/NAME:predict. */
    private static String[] firstProtocol(ChannelHandlerContext client, FullHttpRequest request, List<String> path)
            throws ModelException {
        String last = path.size() == 3 ? path.get(2) : "";
        int colon = last.lastIndexOf(':');
        if (colon >= 0) {
            return predictions(last.substring(0, colon), null, last.substring(colon + 1), request);
        }
        require(HttpMethod.GET, request);
        if (last.isEmpty()) {
            States.models(client);
        } else {
            States.model(client, last, null, true);
        }
        return null;
    }

    /** The same for invocations?model_name=NAME. The rest of the query are options. */
    private static String[] invocation(FullHttpRequest request, QueryStringDecoder query) {
        List<String> named = query.parameters().getOrDefault("model_name", List.of());
        String name = named.stream().filter(each -> !each.isEmpty()).findFirst().orElseGet(States::onlyModel);
        if (name == null) {
            throw new BadRequestException("Name the model: /invocations?model_name=NAME.");
        }
        String options = Arrays.stream(query.rawQuery().split("&"))
                .filter(each -> !each.startsWith("model_name="))
                .collect(Collectors.joining("&"));
        request.setUri(query.rawPath() + (options.isEmpty() ? "" : "?" + options));
        return predictions(name, null, "predict", request);
    }

    private static String[] predictions(String model, String version, String verb, FullHttpRequest request) {
        if (!verb.equals("predict") && !verb.equals("explain")) {
            throw new ResourceNotFoundException();
        }
        if (!HttpMethod.PUT.equals(request.method())) {
            require(HttpMethod.POST, request);
        }
        String route = verb.equals("predict") ? "predictions" : "explanations";
        return version == null ? new String[] {"", route, model} : new String[] {"", route, model, version};
    }

    private static void require(HttpMethod method, FullHttpRequest request) {
        if (!method.equals(request.method())) {
            throw new MethodNotAllowedException();
        }
    }

    /**
     * Answer a request of v2 on which TorchServe itself failed. Called before TorchServe answers with the text of the
     * exception, which names Java classes. It has logged the exception.
     *
     * @return whether TorchServe answers
     */
    public static boolean fail(ChannelHandlerContext client, HttpResponseStatus status, Throwable error) {
        boolean failed = status.equals(HttpResponseStatus.INTERNAL_SERVER_ERROR);
        if (!failed || error instanceof InternalServerException || !isOpenInference(client)) {
            return true;
        }
        String message = "The server failed on this request. Its log has the reason.";
        Answers.error(client, 500, "InternalServerException", message, 0);
        return false;
    }

    private static boolean isOpenInference(ChannelHandlerContext client) {
        return Boolean.TRUE.equals(client.channel().attr(OPEN_INFERENCE).get());
    }

    /** Give an error of TorchServe the form of the client's protocol. Called before it is sent. */
    public static void answer(ChannelHandlerContext client, HttpResponse response) {
        if (!isOpenInference(client) || response.status().code() < 400 || !(response instanceof FullHttpResponse)) {
            return;
        }
        FullHttpResponse whole = (FullHttpResponse) response;
        try {
            String text = whole.content().toString(StandardCharsets.UTF_8);
            JsonObject error = JsonUtils.GSON_PRETTY.fromJson(text, JsonObject.class);
            if (error != null && error.has("message")) {
                JsonObject theirs = new JsonObject();
                theirs.add("error", error.get("message"));
                // shorter than what it replaces, so that it fits into the buffer
                whole.content().clear().writeBytes(theirs.toString().getBytes(StandardCharsets.UTF_8));
            }
        } catch (JsonSyntaxException error) {
            // it is not an error of TorchServe, and stays as it is
        }
    }
}
