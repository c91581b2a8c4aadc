package bundle.frontend;

import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.MethodInsnNode;
import groovyjarjarasm.asm.tree.MethodNode;
import java.util.Collections;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.WeakHashMap;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.LinkedBlockingDeque;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.job.RestJob;
import org.pytorch.serve.util.messages.WorkerCommands;

/**
 * A request that is not answered within its model's clientTimeoutInMills is answered 504, with Retry-After; over gRPC,
 * DEADLINE_EXCEEDED.
 *
 * <p>TorchServe then only drops the worker's answer, and the client waits until its own timeout ends. A worker that
 * becomes free also computes the first request of its batch if that has timed out in the queue; here it does not.
 */
public final class Timeouts implements Patch {
    private static final String MODEL = "org/pytorch/serve/wlm/Model";
    private static volatile Thread clockThread;
    private static final ScheduledExecutorService CLOCK = Executors.newSingleThreadScheduledExecutor(run -> {
        Thread thread = new Thread(run, "client-timeouts");
        thread.setDaemon(true);
        clockThread = thread;
        return thread;
    });
    // the requests that can time out; both maps are locked by PENDING
    private static final Map<Job, Future<?>> PENDING = new WeakHashMap<>();
    private static final Set<Job> EXPIRED = Collections.newSetFromMap(new WeakHashMap<>());
    private static volatile boolean used; // no lock is taken before a model has this timeout

    @Override
    public String name() {
        return "timeouts";
    }

    @Override
    public List<String> classes() {
        return List.of(Code.REST_JOB, Code.GRPC_JOB, Code.MODEL_MANAGER, MODEL);
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        if (code.name.equals(Code.REST_JOB)) {
            Code.requireField(code, Answers.CLIENT);
            Code.requireField(code, Answers.STREAMS);
        }
        if (code.name.equals(Code.REST_JOB) || code.name.equals(Code.GRPC_JOB)) {
            String response = "([BLjava/lang/CharSequence;ILjava/lang/String;Ljava/util/Map;)V";
            Code.guard(Code.method(code, "response", response), Timeouts.class, "claim", 0);
            Code.guard(Code.method(code, "sendError", "(ILjava/lang/String;)V"), Timeouts.class, "claim", 0);
        } else if (code.name.equals(MODEL)) {
            MethodNode batch = Code.method(code, "pollBatch", Gather.POLL_BATCH);
            // the first call takes a management job, the second waits for the first request
            List<MethodInsnNode> polls = Code.calls(batch, Gather.QUEUE, "poll", Gather.POLL, 0);
            if (polls.size() < 2) {
                throw new Refusal("pollBatch does not wait for a first request");
            }
            Code.redirect(batch, polls.get(1), Timeouts.class, "first", false);
        } else {
            MethodNode add = Code.method(code, "addJob", "(Lorg/pytorch/serve/job/Job;)Z");
            Code.begin(add, Timeouts.class, "start", 1);
        }
    }

    /** Start a request's clock. Called before it is queued. */
    public static void start(Job job) {
        long expires = job.getPayload().getClientExpireTS();
        // the other stream of gRPC answers each of its requests inside one call
        if (expires == Long.MAX_VALUE || job.getCmd() == WorkerCommands.STREAMPREDICT2) {
            return;
        }
        used = true;
        synchronized (PENDING) {
            long wait = Math.max(0, expires - System.currentTimeMillis());
            PENDING.put(job, CLOCK.schedule(() -> expire(job), wait, TimeUnit.MILLISECONDS));
        }
    }

    /** Wait for the first request of a batch that has not timed out. Called in place of `queue.poll(timeout, unit)`. */
    public static Object first(LinkedBlockingDeque<Job> queue, long timeout, TimeUnit unit)
            throws InterruptedException {
        Job job = queue.poll(timeout, unit);
        while (used && job != null && isExpired(job)) {
            job = queue.poll(timeout, unit);
        }
        return job;
    }

    private static boolean isExpired(Job job) {
        synchronized (PENDING) {
            return EXPIRED.contains(job);
        }
    }

    private static void expire(Job job) {
        synchronized (PENDING) {
            if (PENDING.remove(job) == null) {
                return; // answered at this moment
            }
            EXPIRED.add(job);
        }
        String message = "There was no answer within the model's clientTimeoutInMills. Retry later.";
        if (job instanceof RestJob) {
            Answers.send((RestJob) job, 504, "ClientTimeout", message, 1);
        } else {
            job.sendError(504, message); // gRPC
        }
    }

    /** Return whether a request may be answered now: it has not timed out, or this is that answer. Its clock stops. */
    public static boolean claim(Job job) {
        if (!used || Thread.currentThread() == clockThread) {
            return true;
        }
        synchronized (PENDING) {
            Future<?> clock = PENDING.remove(job);
            if (clock != null) {
                clock.cancel(false);
            }
            return !EXPIRED.contains(job);
        }
    }
}
