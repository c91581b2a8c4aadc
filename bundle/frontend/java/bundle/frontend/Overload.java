package bundle.frontend;

import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.MethodNode;
import io.netty.channel.ChannelHandlerContext;
import io.netty.handler.codec.http.HttpResponseStatus;
import java.util.List;
import org.pytorch.serve.archive.model.ModelNotFoundException;
import org.pytorch.serve.archive.model.ModelVersionNotFoundException;
import org.pytorch.serve.http.ServiceUnavailableException;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.util.NettyUtils;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;

/**
 * A full queue is 429, a model without workers is 503, both with Retry-After.
 *
 * <p>TorchServe answers both with 503 and "has no worker", so that a client cannot tell overload from an outage. It also
 * accepts requests for a model whose workers it has given up restarting; nobody would ever answer them.
 */
public final class Overload implements Patch {
    private static final String API = "org/pytorch/serve/util/ApiUtils";
    private static final int FULL_SECONDS = 1;
    private static final int NO_WORKERS_SECONDS = 10;

    @Override
    public String name() {
        return "overload";
    }

    @Override
    public List<String> classes() {
        return List.of(API, Code.HTTP_HANDLER);
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        if (code.name.equals(API)) {
            String result = "Lorg/pytorch/serve/job/RestJob;";
            String input = "Lorg/pytorch/serve/util/messages/RequestInput;";
            String texts = "Ljava/lang/String;Ljava/lang/String;";
            MethodNode add = Code.method(
                    code, "addRESTInferenceJob", "(Lio/netty/channel/ChannelHandlerContext;" + texts + input + ")" + result);
            String manager = "org/pytorch/serve/wlm/ModelManager";
            Code.redirect(
                    add,
                    Code.calls(add, manager, "addJob", "(Lorg/pytorch/serve/job/Job;)Z", 1).get(0),
                    Overload.class,
                    "add",
                    false);
        } else {
            Code.redirectError(code, "SERVICE_UNAVAILABLE", Overload.class, "sendError");
        }
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
            throw new Rejection(
                    503, NO_WORKERS_SECONDS, "NoWorkers", "The workers of " + named + " fail at each start. See the log.");
        }
        if (manager.addJob(job)) {
            return true;
        }
        if (model.isUseJobTicket() || model.isSequenceBatching()) {
            return false; // these reject requests for other reasons, too
        }
        int waiting = model.getPendingRequestsInJobQueue();
        throw new Rejection(
                429, FULL_SECONDS, "QueueFull", "The queue of " + named + " is full: " + waiting + " requests wait.");
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
