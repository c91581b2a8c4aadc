package bundle.frontend;

import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.MethodNode;
import java.io.File;
import java.util.Collections;
import java.util.List;
import java.util.Map;
import java.util.WeakHashMap;
import java.util.concurrent.LinkedBlockingDeque;
import java.util.concurrent.TimeUnit;
import org.pytorch.serve.archive.model.Manifest;
import org.pytorch.serve.archive.utils.ArchiveUtils;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.wlm.Model;

/**
 * A free worker takes the requests that wait, at once.
 *
 * <p>TorchServe takes the first request, then waits up to maxBatchDelay for each further one, although the worker is
 * idle. With this patch, it takes what is in the queue, up to batchSize. Batches form while all workers are busy: the
 * more load, the larger they are. A model whose model-config.yaml has `patience: fixed` waits for maxBatchDelay as
 * before.
 */
public final class Gather implements Patch {
    static final String QUEUE = "java/util/concurrent/LinkedBlockingDeque";
    static final String POLL_BATCH = "(Ljava/lang/String;JLjava/util/Map;)V";
    static final String POLL = "(JLjava/util/concurrent/TimeUnit;)Ljava/lang/Object;";
    private static final Map<Model, Boolean> FIXED = Collections.synchronizedMap(new WeakHashMap<>());

    @Override
    public String name() {
        return "gather";
    }

    @Override
    public List<String> classes() {
        return List.of("org/pytorch/serve/wlm/Model");
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        // the first poll of each method takes a management job, or waits for the first request
        MethodNode batch = Code.method(code, "pollBatch", POLL_BATCH);
        Code.redirect(batch, Code.calls(batch, QUEUE, "poll", POLL, 3).get(2), Gather.class, "next", true);
        // this one is for workers with asyncCommunication
        MethodNode async = Code.method(code, "pollInferJob", "(Ljava/util/Map;IL" + QUEUE + ";)V");
        Code.redirect(async, Code.calls(async, QUEUE, "poll", POLL, 2).get(1), Gather.class, "next", true);
        for (MethodNode method : List.of(batch, async)) {
            Code.redirectRead(method, code.name, "maxBatchDelay", "I", Gather.class, "delay");
        }
    }

    /** Take the next request of a batch. Called in place of `queue.poll(delay, unit)`. */
    public static Object next(LinkedBlockingDeque<Job> queue, long delay, TimeUnit unit, Model model)
            throws InterruptedException {
        Job waiting = queue.poll();
        return waiting != null || !fixed(model) ? waiting : queue.poll(delay, unit);
    }

    /**
     * Return for how many milliseconds a batch is collected.
     *
     * <p>TorchServe looks at the clock after each request. So a batch ended early, although requests waited, if a
     * maxBatchDelay of 1 ms began just before the next millisecond; one of 0 allowed two requests.
     */
    public static int delay(Model model) {
        return fixed(model) ? model.getMaxBatchDelay() : Integer.MAX_VALUE;
    }

    private static boolean fixed(Model model) {
        return FIXED.computeIfAbsent(model, Gather::isFixed);
    }

    /** Return whether a model's configuration file has `patience: fixed`. */
    private static boolean isFixed(Model model) {
        Manifest.Model manifest = model.getModelArchive().getManifest().getModel();
        if (manifest.getConfigFile() == null) {
            return false;
        }
        try {
            File file = new File(model.getModelDir(), manifest.getConfigFile());
            return "fixed".equals(ArchiveUtils.readYamlFile(file).get("patience"));
        } catch (Exception error) { // TorchServe, too, ignores a file that it cannot read
            return false;
        }
    }
}
