package bundle.frontend;

import com.google.gson.JsonObject;
import com.google.gson.JsonParseException;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.ServerCallStreamObserver;
import io.grpc.stub.StreamObserver;
import java.nio.charset.StandardCharsets;
import java.util.List;
import java.util.Map;
import java.util.concurrent.TimeUnit;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ModelInferResponse;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.metrics.IMetric;
import org.pytorch.serve.metrics.MetricCache;
import org.pytorch.serve.util.ConfigManager;
import org.pytorch.serve.util.GRPCUtils;
import org.pytorch.serve.util.JsonUtils;
import org.pytorch.serve.util.messages.RequestInput;
import org.pytorch.serve.util.messages.WorkerCommands;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * A prediction of the Open Inference Protocol over gRPC, in a model's queue.
 *
 * <p>TorchServe's own job for gRPC drops the status and the headers of the handler's answer.
 */
final class InferenceJob extends Job {
    private static final int LONGEST_MESSAGE = 800; // characters, of up to 9 bytes: clients accept 8 KiB of metadata
    private static final Logger LOG = LoggerFactory.getLogger(InferenceJob.class);
    private final ServerCallStreamObserver<ModelInferResponse> client;

    InferenceJob(StreamObserver<ModelInferResponse> client, String model, String version, RequestInput input) {
        super(model, version, WorkerCommands.PREDICT, input);
        this.client = (ServerCallStreamObserver<ModelInferResponse>) client;
    }

    /** Send the handler's answer. */
    @Override
    public void response(
            byte[] body, CharSequence type, int status, String phrase, Map<String, String> headers) {
        if (status >= 400) {
            sendError(status, message(body));
            return;
        }
        ModelInferResponse answer;
        try {
            answer = Tensors.response(body, headers);
        } catch (RuntimeException error) { // of the parser, or of the places where it looks
            LOG.error("The answer of model {} is not one of the Open Inference Protocol.", getModelName(), error);
            sendError(500, "The model's handler does not answer in the form of the Open Inference Protocol.");
            return;
        }
        if (claims()) {
            client.onNext(answer);
            client.onCompleted();
            countQueueTime();
        }
    }

    @Override
    public void sendError(int status, String message) {
        if (claims()) {
            client.onError(error(status, message));
        }
    }

    /** Return whether the client may be answered now: it has no other answer, and has not gone. */
    private boolean claims() {
        return Timeouts.claim(this) && !client.isCancelled();
    }

    @Override
    public boolean isOpen() {
        return !client.isCancelled();
    }

    /** Return the error of gRPC that means the same as a status of HTTP. */
    static StatusRuntimeException error(int status, String message) {
        // TorchServe's RESOURCE_EXHAUSTED and FAILED_PRECONDITION would say that the same request may succeed later
        boolean invalid = status == 413 || status == 415 || status == 422;
        Status theirs = invalid ? Status.INVALID_ARGUMENT : GRPCUtils.getGRPCStatusCode(status);
        boolean fits = message == null || message.length() <= LONGEST_MESSAGE;
        return theirs.withDescription(fits ? message : message.substring(0, LONGEST_MESSAGE) + "...")
                .asRuntimeException();
    }

    /** Return what the body of an error says. */
    private static String message(byte[] body) {
        String text = new String(body, StandardCharsets.UTF_8);
        try {
            JsonObject error = JsonUtils.GSON_PRETTY.fromJson(text, JsonObject.class);
            return error.get(error.has("error") ? "error" : "message").getAsString();
        } catch (JsonParseException | NullPointerException | UnsupportedOperationException error) {
            return text; // of a handler that has another form
        }
    }

    private void countQueueTime() {
        IMetric waited = MetricCache.getInstance().getMetricFrontend("QueueTime");
        if (waited != null) {
            long time = TimeUnit.NANOSECONDS.toMillis(getScheduled() - getBegin());
            waited.addOrUpdate(List.of("Host", ConfigManager.getInstance().getHostName()), time);
        }
    }
}
