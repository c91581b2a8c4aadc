package org.pytorch.serve.wlm;

import java.util.Map;
import org.pytorch.serve.job.Job;

/** What the agent reads of a worker's batch. It is in TorchServe's package, because the fields are not public. */
public final class Batch {
    private Batch() {}

    /** The requests that were collected for a worker, and are not answered. */
    public static Map<String, Job> requests(BatchAggregator of) {
        return of.jobs;
    }

    public static Model model(BatchAggregator of) {
        return of.model;
    }

    /** Return whether a worker has requests that are not answered. */
    public static boolean isBusy(WorkerThread of) {
        return of.aggregator.jobs != null && !of.aggregator.jobs.isEmpty();
    }

    public static Model model(WorkerThread of) {
        return of.model;
    }
}
