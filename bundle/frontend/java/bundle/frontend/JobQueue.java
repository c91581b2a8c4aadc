package bundle.frontend;

import java.util.concurrent.LinkedBlockingDeque;
import org.pytorch.serve.job.Job;

/**
 * The queue of a model's requests. Its bound counts for new requests only.
 *
 * <p>A request that comes back from a worker which has ended was accepted before, so that it always has a place at the
 * front. The queue exceeds its bound by what workers held, at most.
 */
public final class JobQueue extends LinkedBlockingDeque<Job> {
    private final int bound;

    public JobQueue(int bound) {
        this.bound = bound;
    }

    /** Queue a new request, unless the queue is full. */
    @Override
    public synchronized boolean offer(Job job) {
        return remainingCapacity() > 0 && super.offer(job);
    }

    @Override
    public int remainingCapacity() {
        return Math.max(0, bound - size());
    }
}
