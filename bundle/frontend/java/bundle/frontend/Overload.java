package bundle.frontend;

import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.MethodInsnNode;
import groovyjarjarasm.asm.tree.MethodNode;
import io.netty.channel.ChannelHandlerContext;
import io.netty.handler.codec.http.HttpResponseStatus;
import java.util.List;
import java.util.Set;
import org.pytorch.serve.archive.model.ModelNotFoundException;
import org.pytorch.serve.archive.model.ModelVersionNotFoundException;
import org.pytorch.serve.http.ServiceUnavailableException;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.util.NettyUtils;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;

/**
 * A full queue is 429, a model without workers is 503, both with Retry-After; a batch whose handler failed is 500.
 *
 * <p>TorchServe answers all three with 503, so that a client cannot tell overload, an outage and a bug apart. It also
 * accepts requests for a model whose workers it has given up restarting; nobody would ever answer them. Over gRPC the
 * three are RESOURCE_EXHAUSTED, UNAVAILABLE and INTERNAL, where TorchServe has INTERNAL, INTERNAL and UNAVAILABLE.
 */
public final class Overload implements Patch {
    private static final String API = "org/pytorch/serve/util/ApiUtils";
    private static final String AGGREGATOR = "org/pytorch/serve/wlm/BatchAggregator";
    // what TorchServe's Python worker says about a handler that raised, or returned something invalid
    private static final Set<String> FAILURES = Set.of(
            "Prediction failed",
            "Invalid model predict output",
            "number of batch response mismatched",
            "Unsupported model output data type.");
    private static final int FULL_SECONDS = 1;
    private static final int NO_WORKERS_SECONDS = 10;

    @Override
    public String name() {
        return "overload";
    }

    @Override
    public List<String> classes() {
        return List.of(API, Code.GRPC_INFERENCE, AGGREGATOR, Code.HTTP_HANDLER);
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        if (code.name.equals(API)) {
            String result = "Lorg/pytorch/serve/job/RestJob;";
            String input = "Lorg/pytorch/serve/util/messages/RequestInput;";
            String texts = "Ljava/lang/String;Ljava/lang/String;";
            String parameters = "(Lio/netty/channel/ChannelHandlerContext;" + texts + input + ")";
            redirectAdd(Code.method(code, "addRESTInferenceJob", parameters + result), "add");
        } else if (code.name.equals(Code.GRPC_INFERENCE)) {
            redirectAdd(Code.method(code, "prediction", Code.PREDICTION), "addGrpc");
        } else if (code.name.equals(AGGREGATOR)) {
            String answer = "(Lorg/pytorch/serve/util/messages/ModelWorkerResponse;)Z";
            MethodNode send = Code.method(code, "sendResponse", answer);
            String error = "(ILjava/lang/String;)V";
            Code.redirectAll(send, "org/pytorch/serve/job/Job", "sendError", error, Overload.class, "fail", false);
        } else {
            Code.redirectError(code, "SERVICE_UNAVAILABLE", Overload.class, "sendError");
        }
    }

    private static void redirectAdd(MethodNode in, String ours) throws Refusal {
        MethodInsnNode add = Code.calls(in, Code.MODEL_MANAGER, "addJob", "(Lorg/pytorch/serve/job/Job;)Z", 1).get(0);
        Code.redirect(in, add, Overload.class, ours, false);
    }

    /** Queue a request. Called in place of `manager.addJob(job)`. */
    public static boolean add(ModelManager manager, Job job)
            throws ModelNotFoundException, ModelVersionNotFoundException {
        Model model = manager.getModel(job.getModelName(), job.getModelVersion());
        if (model == null) {
            throw new ModelNotFoundException("Model not found: " + job.getModelName());
        }
        String named = "model \"" + model.getModelName() + "\"";
        if (manager.getWorkers(model.getModelVersionName()).isEmpty()) {
            throw new Rejection(503, NO_WORKERS_SECONDS, "NoWorkers", "The " + named + " has no workers.");
        }
        if (Lost.isAbandoned(model)) {
            String why = "The workers of " + named + " have not started within maxRetryTimeoutInSec. See the log.";
            throw new Rejection(503, NO_WORKERS_SECONDS, "NoWorkers", why);
        }
        if (manager.addJob(job)) {
            return true;
        }
        Timeouts.claim(job); // its clock stops
        if (model.isUseJobTicket() || model.isSequenceBatching()) {
            return false; // these reject requests for other reasons, too
        }
        int waiting = model.getPendingRequestsInJobQueue();
        throw new Rejection(
                429, FULL_SECONDS, "QueueFull", "The queue of " + named + " is full: " + waiting + " requests wait.");
    }

    /** Queue a request that came over gRPC, or answer it. */
    public static boolean addGrpc(ModelManager manager, Job job)
            throws ModelNotFoundException, ModelVersionNotFoundException {
        try {
            return add(manager, job);
        } catch (Rejection why) {
            job.sendError(why.status, why.getMessage() + " Retry later.");
            return true; // nothing is left to do
        }
    }

    /** Answer a request whose batch failed. Called in place of `job.sendError(status, message)`. */
    public static void fail(Job job, int status, String message) {
        job.sendError(status == 503 && FAILURES.contains(message) ? 500 : status, message);
    }

    /** Send the answer to a request that failed with 503. */
    public static void sendError(ChannelHandlerContext client, HttpResponseStatus status, Throwable error) {
        if (error instanceof Rejection) {
            Rejection why = (Rejection) error;
            Answers.error(client, why.status, why.type, why.getMessage() + " Retry later.", why.retryAfter);
        } else {
            NettyUtils.sendError(client, status, error);
        }
    }

    /** A request that was not queued. */
    private static final class Rejection extends ServiceUnavailableException {
        private final int status;
        private final int retryAfter;
        private final String type;

        Rejection(int status, int retryAfter, String type, String message) {
            super(message);
            this.status = status;
            this.retryAfter = retryAfter;
            this.type = type;
        }
    }
}
