package bundle.frontend;

import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.MethodNode;
import io.netty.channel.Channel;
import java.util.ArrayList;
import java.util.Collections;
import java.util.HashMap;
import java.util.IdentityHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.UUID;
import java.util.WeakHashMap;
import java.util.concurrent.ArrayBlockingQueue;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.TimeUnit;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.util.NettyUtils;
import org.pytorch.serve.util.messages.BaseModelRequest;
import org.pytorch.serve.util.messages.ModelInferenceRequest;
import org.pytorch.serve.util.messages.RequestInput;
import org.pytorch.serve.util.messages.WorkerCommands;
import org.pytorch.serve.wlm.Batch;
import org.pytorch.serve.wlm.BatchAggregator;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;
import org.pytorch.serve.wlm.WorkLoadManager;
import org.pytorch.serve.wlm.WorkerState;
import org.pytorch.serve.wlm.WorkerThread;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * No request is lost when a worker ends.
 *
 * <p>TorchServe forgets the requests that a worker's thread has collected and not yet sent, those in the queue of a
 * model that loses its last worker, and some of those that a client sends before it has the answer to the one before.
 * With this patch:
 *
 * <ul>
 *   <li>The requests of a worker that ends, collected or inside it, go back to the front of the queue, once.
 *   <li>One of them may be what ends workers. So each is then computed alone. If its worker ends again, it is answered
 *       500, without Retry-After; if that worker was scaled down, 503.
 *   <li>Those of a worker that did not answer in time are answered 504. A second worker would only take as long.
 *   <li>Those of a model without workers are answered 503.
 * </ul>
 *
 * The other answers have Retry-After.
 */
public final class Lost implements Patch {
    private static final String MODEL = "org/pytorch/serve/wlm/Model";
    private static final String AGGREGATOR = "org/pytorch/serve/wlm/BatchAggregator";
    private static final String REQUEST = "Lorg/pytorch/serve/util/messages/BaseModelRequest;";
    private static final int RETRY_SECONDS = 1;
    private static final Logger LOG = LoggerFactory.getLogger(Lost.class);
    private static final Set<WorkerThread> TIMED_OUT = ConcurrentHashMap.newKeySet();
    private static final ThreadLocal<Set<Job>> ANSWERED = // of the batch of a worker's thread
            ThreadLocal.withInitial(() -> Collections.newSetFromMap(new IdentityHashMap<>()));
    private static final Set<Job> RETURNED =
            Collections.synchronizedSet(Collections.newSetFromMap(new WeakHashMap<>()));

    @Override
    public String name() {
        return "lost";
    }

    @Override
    public List<String> classes() {
        return List.of(Code.WORKER, Code.MODEL_MANAGER, MODEL, Code.REST_JOB, AGGREGATOR, Code.REQUEST_PARSER);
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        if (code.name.equals(Code.WORKER)) {
            changeWorker(Code.method(code, "run", "()V"), Code.method(code, "shutdown", "()V"));
            return;
        }
        if (code.name.equals(Code.REST_JOB)) {
            Code.requireField(code, Answers.CLIENT);
            Code.requireField(code, Answers.STREAMS);
            return;
        }
        if (code.name.equals(Code.REQUEST_PARSER)) {
            MethodNode parse = Code.method(code, "parseRequest", Code.PARSE_REQUEST);
            String id = "(Lio/netty/channel/Channel;)Ljava/lang/String;";
            Code.redirectAll(parse, Code.NETTY, "getRequestId", id, Lost.class, "id", false);
            return;
        }
        if (code.name.equals(AGGREGATOR)) {
            String reply = "(Lorg/pytorch/serve/util/messages/ModelWorkerResponse;)Z";
            MethodNode send = Code.method(code, "sendResponse", reply);
            String answer = "([BLjava/lang/CharSequence;ILjava/lang/String;Ljava/util/Map;)V";
            Code.redirectAll(send, "org/pytorch/serve/job/Job", "response", answer, Lost.class, "respond", false);
            return;
        }
        if (code.name.equals(MODEL)) {
            String command = "()Lorg/pytorch/serve/util/messages/WorkerCommands;";
            MethodNode batch = Code.method(code, "pollBatch", Gather.POLL_BATCH);
            Code.redirectAll(batch, "org/pytorch/serve/job/Job", "getCmd", command, Lost.class, "command", false);
            String create = "(Lorg/pytorch/serve/archive/model/ModelArchive;I)V";
            MethodNode constructor = Code.method(code, "<init>", create); // the first queue is that of sequences
            Code.replaceNew(Code.calls(constructor, Gather.QUEUE, "<init>", "(I)V", 2).get(1), JobQueue.class);
            return;
        }
        MethodNode add = Code.method(code, "addJob", "(Lorg/pytorch/serve/job/Job;)Z");
        Code.redirectAll(add, MODEL, "addJob", "(Lorg/pytorch/serve/job/Job;)Z", Lost.class, "add", false);
        String unregister = "(Ljava/lang/String;Ljava/lang/String;Z)I";
        String update = "(Ljava/lang/String;Ljava/lang/String;IIZZ)Ljava/util/concurrent/CompletableFuture;";
        String changed = "(L" + MODEL + ";ZZ)Ljava/util/concurrent/CompletableFuture;";
        String manager = "org/pytorch/serve/wlm/WorkLoadManager";
        for (MethodNode method :
                List.of(Code.method(code, "unregisterModel", unregister), Code.method(code, "updateModel", update))) {
            Code.redirectAll(method, manager, "modelChanged", changed, Lost.class, "modelChanged", false);
        }
    }

    private static void changeWorker(MethodNode run, MethodNode shutdown) throws Refusal {
        String error = "(" + REQUEST + "Ljava/lang/String;I)V";
        String state = "(Ljava/lang/String;Lorg/pytorch/serve/wlm/WorkerState;)" + REQUEST;
        String queue = "java/util/concurrent/ArrayBlockingQueue";
        String poll = "(JLjava/util/concurrent/TimeUnit;)Ljava/lang/Object;";
        Code.redirectAll(run, AGGREGATOR, "getRequest", state, Lost.class, "collect", false);
        Code.redirectAll(run, queue, "poll", poll, Lost.class, "reply", true);
        Code.redirectAll(run, AGGREGATOR, "sendError", error, Lost.class, "fail", true);
        Code.redirectAll(run, AGGREGATOR, "cleanJobs", "()V", Lost.class, "clean", true);
        Code.redirectAll(run, Code.WORKER, "isHealthy", "()Z", Lost.class, "isHealthy", false);
        // the worker's own thread does this, too; both at once raise ConcurrentModificationException
        Code.redirectAll(shutdown, AGGREGATOR, "sendError", error, Lost.class, "leave", false);
    }

    /**
     * Return the id of the request that a connection has just sent.
     *
     * <p>TorchServe keeps one id for a connection, and removes it when an answer is sent. If the client does not wait
     * for one answer before it sends the next request (pipelining), this may be the next one's. A request without an
     * id is never sent to its worker, which then waits for the answer.
     */
    public static String id(Channel client) {
        String id = NettyUtils.getRequestId(client);
        return id == null ? UUID.randomUUID().toString() : id;
    }

    /** Return a request's kind, to decide whether it shares a batch: TorchServe leaves descriptions alone. */
    public static WorkerCommands command(Job job) {
        return RETURNED.contains(job) ? WorkerCommands.DESCRIBE : job.getCmd();
    }

    /** Collect the next batch of a worker. A worker that has died meanwhile does not get it. */
    public static BaseModelRequest collect(BatchAggregator batch, String worker, WorkerState state)
            throws InterruptedException, ExecutionException {
        ANSWERED.get().clear();
        BaseModelRequest request = batch.getRequest(worker, state);
        if (Thread.interrupted()) { // TorchServe interrupts the thread of a worker that has ended
            throw new InterruptedException();
        }
        return request;
    }

    /** Wait for the worker's answer, and remember whether it came in time. */
    public static Object reply(ArrayBlockingQueue<?> replies, long timeout, TimeUnit unit, WorkerThread worker)
            throws InterruptedException {
        Object reply = replies.poll(timeout, unit);
        if (reply == null) {
            TIMED_OUT.add(worker);
        }
        return reply;
    }

    /** Answer the requests inside a worker that has ended, if they are not to be repeated. */
    public static void fail(
            BatchAggregator batch, BaseModelRequest request, String error, int status, WorkerThread worker) {
        safely(() -> failUnsafely(batch, request, error, status, worker));
    }

    /** Run a part of what ends a worker. An exception here would keep TorchServe from starting the worker again. */
    private static void safely(Runnable part) {
        try {
            part.run();
        } catch (RuntimeException error) {
            LOG.error("A request of a worker that ended could not be answered.", error);
        }
    }

    private static void failUnsafely(
            BatchAggregator batch, BaseModelRequest request, String error, int status, WorkerThread worker) {
        if (!isPlain(batch) || !(request instanceof ModelInferenceRequest) || !error.equals("Worker died.")) {
            batch.sendError(request, error, status);
        } else if (TIMED_OUT.contains(worker) && worker.getState() != WorkerState.WORKER_SCALED_DOWN) {
            String message = "The worker of model \"" + Batch.model(batch).getModelName()
                    + "\" did not answer within responseTimeout.";
            for (Job job : Batch.requests(batch).values()) {
                Answers.fail(job, 504, "WorkerTimeout", message, RETRY_SECONDS);
            }
            batch.cleanJobs();
        } // otherwise, `clean` comes next
    }

    /** Return the requests that a worker which has ended still holds to the queue. */
    public static void clean(BatchAggregator batch, WorkerThread worker) {
        TIMED_OUT.remove(worker);
        if (isPlain(batch)) {
            Model model = Batch.model(batch);
            List<Job> left = new ArrayList<>(Batch.requests(batch).values());
            left.removeAll(ANSWERED.get());
            Collections.reverse(left); // each goes to the front
            for (Job job : left) {
                if (!job.isControlCmd()) {
                    safely(() -> giveBack(model, job, worker));
                }
            }
            if (isAbandoned(model)) {
                safely(() -> answerAll(model));
            }
        }
        batch.cleanJobs();
    }

    /**
     * Answer one request of a batch. TorchServe keeps it in the batch until all are answered.
     *
     * <p>An answer that cannot be sent, such as one whose header has a newline, does not end the worker and the rest of
     * its batch.
     */
    public static void respond(
            Job job, byte[] body, CharSequence type, int status, String phrase, Map<String, String> headers) {
        try {
            job.response(body, type, status, phrase, headers);
            if (!"true".equals(headers.get(RequestInput.TS_STREAM_NEXT))) { // the last part of a stream, or no stream
                ANSWERED.get().add(job);
            }
        } catch (RuntimeException error) {
            ANSWERED.get().add(job);
            LOG.error("The handler's answer cannot be sent.", error);
            String message = "The handler's answer cannot be sent: " + error.getMessage();
            safely(() -> Answers.fail(job, 500, "InvalidAnswer", message, 0));
        }
    }

    private static void giveBack(Model model, Job job, WorkerThread worker) {
        // the parts of a gRPC stream may have been sent
        boolean repeatable = job.getCmd() == WorkerCommands.PREDICT && !Answers.hasBegun(job);
        if (repeatable && RETURNED.add(job)) {
            model.addFirst(job);
            return;
        }
        String named = "of model \"" + model.getModelName() + "\" ended";
        if (repeatable && worker.getState() != WorkerState.WORKER_SCALED_DOWN) {
            String message = "Two workers " + named + " while they computed this request. Do not send it again.";
            Answers.fail(job, 500, "WorkerDied", message, 0);
        } else {
            String message = "The worker " + named + " before it answered this request. Retry later.";
            Answers.fail(job, 503, "WorkerDied", message, RETRY_SECONDS);
        }
    }

    /** Return whether TorchServe starts a worker again. If it gives up the last one, nobody is left to answer. */
    public static boolean isHealthy(WorkerThread worker) {
        boolean healthy = worker.isHealthy();
        if (!healthy && isAbandoned(Batch.model(worker))) {
            answerAll(Batch.model(worker));
        }
        return healthy;
    }

    /** Called in place of `sendError` when a worker is scaled down: see `clean`. */
    public static void leave(BatchAggregator batch, BaseModelRequest request, String error, int status) {
        if (!isPlain(batch)) {
            batch.sendError(request, error, status);
        }
    }

    /** Queue a request; the last worker may have gone since TorchServe looked. */
    public static boolean add(Model model, Job job) {
        boolean queued = model.addJob(job);
        if (queued && isAbandoned(model)) {
            answerAll(model);
        }
        return queued;
    }

    /** Change a model's number of workers. */
    public static CompletableFuture<Integer> modelChanged(
            WorkLoadManager manager, Model model, boolean isStartup, boolean isCleanUp) {
        CompletableFuture<Integer> done = manager.modelChanged(model, isStartup, isCleanUp);
        if (manager.hasNoWorker(model.getModelVersionName())) {
            answerAll(model);
        }
        return done;
    }

    /** Return whether a model has no workers, or only workers that TorchServe does not start again. */
    static boolean isAbandoned(Model model) {
        for (WorkerThread worker : ModelManager.getInstance().getWorkers(model.getModelVersionName())) {
            if (worker != null && worker.isHealthy()) { // null: the list was copied while it became shorter
                return false;
            }
        }
        return true;
    }

    /** Answer everything in a model's queue. */
    private static void answerAll(Model model) {
        try {
            Map<String, Job> one = new HashMap<>();
            while (model.pollMgmtJob(Model.DEFAULT_DATA_QUEUE, 0, one)) {
                String named = "The model \"" + model.getModelName() + "\" has no workers any more. Retry later.";
                one.values().forEach(job -> Answers.fail(job, 503, "NoWorkers", named, RETRY_SECONDS));
                one.clear();
            }
        } catch (InterruptedException error) {
            Thread.currentThread().interrupt();
        }
    }

    /** Return whether a worker takes one batch at a time: not with sequences, streams or asyncCommunication. */
    private static boolean isPlain(BatchAggregator batch) {
        return batch.getClass() == BatchAggregator.class;
    }
}
