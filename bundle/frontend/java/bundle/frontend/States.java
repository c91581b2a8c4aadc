package bundle.frontend;

import com.google.gson.JsonArray;
import com.google.gson.JsonObject;
import com.google.gson.JsonParseException;
import io.netty.channel.ChannelHandlerContext;
import io.netty.handler.codec.http.HttpResponseStatus;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;
import java.util.WeakHashMap;
import org.pytorch.serve.archive.model.ModelNotFoundException;
import org.pytorch.serve.archive.model.ModelVersionNotFoundException;
import org.pytorch.serve.http.ResourceNotFoundException;
import org.pytorch.serve.util.ConfigManager;
import org.pytorch.serve.util.JsonUtils;
import org.pytorch.serve.util.NettyUtils;
import org.pytorch.serve.wlm.Batch;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;
import org.pytorch.serve.wlm.ModelVersionedRefs;
import org.pytorch.serve.wlm.WorkerState;
import org.pytorch.serve.wlm.WorkerThread;

/** Answers about the server and its models, for the clients of KServe's protocols. */
public final class States {
    static final String NAME = "torchserve";
    static final String EXTENSION = "binary_tensor_data";
    private static final String METADATA = "open_inference.json"; // bundle/build writes it into the archive

    // for each version that had all its workers once: their number at the last time that it had them
    private static final Map<Model, Integer> COMPLETE = new WeakHashMap<>();

    private States() {}

    /** Answer `GET /`. */
    static void alive(ChannelHandlerContext client) {
        JsonObject answer = new JsonObject();
        answer.addProperty("status", "alive");
        NettyUtils.sendJsonResponse(client, answer);
    }

    /** Answer v2 (""), v2/health/live or v2/health/ready. */
    static void server(ChannelHandlerContext client, String asked) {
        JsonObject answer = new JsonObject();
        if (asked.isEmpty()) {
            JsonArray extensions = new JsonArray();
            extensions.add(EXTENSION);
            answer.addProperty("name", NAME);
            answer.addProperty("version", ConfigManager.getInstance().getVersion());
            answer.add("extensions", extensions);
            NettyUtils.sendJsonResponse(client, answer);
        } else if (asked.equals("live")) {
            answer.addProperty("live", true);
            NettyUtils.sendJsonResponse(client, answer);
        } else if (asked.equals("ready")) {
            sendReady(client, answer, isReady());
        } else {
            throw new ResourceNotFoundException();
        }
    }

    /**
     * Answer whether a model is ready, or what it takes and returns.
     *
     * @param version null for the default version
     */
    static void model(ChannelHandlerContext client, String name, String version, boolean readiness)
            throws ModelNotFoundException, ModelVersionNotFoundException {
        Model model = find(name, version);
        JsonObject answer = new JsonObject();
        answer.addProperty("name", name);
        if (readiness) {
            sendReady(client, answer, isReady(model));
            return;
        }
        answer.add("versions", array(versions(name)));
        metadata(model).entrySet().forEach(each -> answer.add(each.getKey(), each.getValue()));
        NettyUtils.sendJsonResponse(client, answer);
    }

    /**
     * Return a version of a model.
     *
     * @param version null or "" for the default version
     */
    static Model find(String name, String version) throws ModelNotFoundException, ModelVersionNotFoundException {
        String given = version == null || version.isEmpty() ? null : version;
        Model model = ModelManager.getInstance().getModel(name, given);
        if (model == null) {
            throw new ModelNotFoundException("Model not found: " + name);
        }
        return model;
    }

    /** Answer the names of all models, for v1/models. */
    static void models(ChannelHandlerContext client) {
        JsonObject answer = new JsonObject();
        answer.add("models", array(new TreeSet<>(ModelManager.getInstance().getDefaultModels(true).keySet())));
        NettyUtils.sendJsonResponse(client, answer);
    }

    /** Return the name of the only model; null if there are several, or none. */
    static String onlyModel() {
        Set<String> names = ModelManager.getInstance().getDefaultModels(true).keySet();
        return names.size() == 1 ? names.iterator().next() : null;
    }

    /** Return the registered versions of a model, sorted. */
    static Set<String> versions(String name) throws ModelNotFoundException {
        Set<String> sorted = new TreeSet<>();
        ModelManager.getInstance().getAllModelVersions(name).forEach(each -> sorted.add(each.getKey()));
        return sorted;
    }

    static JsonArray array(Set<String> names) {
        JsonArray array = new JsonArray();
        names.forEach(array::add);
        return array;
    }

    private static void sendReady(ChannelHandlerContext client, JsonObject answer, boolean ready) {
        answer.addProperty("ready", ready);
        HttpResponseStatus status = ready ? HttpResponseStatus.OK : HttpResponseStatus.SERVICE_UNAVAILABLE;
        NettyUtils.sendJsonResponse(client, answer, status);
    }

    /**
     * Return whether every version has its minimum of READY workers.
     *
     * <p>A version that never had does not count, unless the server was started with its model: whoever registers it
     * sees that it fails, and the others still answer. A version that gets more workers is ready meanwhile.
     * bundle/supervisor decides alike.
     */
    static synchronized boolean isReady() {
        ModelManager manager = ModelManager.getInstance();
        for (Map.Entry<String, ModelVersionedRefs> each : manager.getAllModels()) {
            boolean started = !manager.getStartupModels().contains(each.getKey());
            for (Map.Entry<String, Model> version : each.getValue().getAllVersions()) {
                Model model = version.getValue();
                noteIfComplete(model, readyWorkers(model));
                Integer expected = COMPLETE.get(model);
                if (expected != null && readyWorkers(model) < Math.min(expected, model.getMinWorkers())) {
                    return false;
                }
                started |= expected != null;
            }
            if (!started) {
                return false;
            }
        }
        return true;
    }

    /**
     * Note whether a version has all its workers. Called before the state of one of them changes, so that the answer
     * does not depend on who asked when. (Two patches answer readiness, so it is called twice.)
     */
    public static synchronized void note(WorkerThread worker, WorkerState next) {
        boolean joins = next == WorkerState.WORKER_MODEL_LOADED && worker.isRunning() && !isReady(worker);
        noteIfComplete(Batch.model(worker), readyWorkers(Batch.model(worker)) + (joins ? 1 : 0));
    }

    private static void noteIfComplete(Model model, int ready) {
        if (ready >= model.getMinWorkers()) {
            COMPLETE.put(model, model.getMinWorkers());
        }
    }

    /** Return whether a model has its minimum of READY workers, and at least one. */
    static boolean isReady(Model model) {
        return readyWorkers(model) >= Math.max(1, model.getMinWorkers());
    }

    private static int readyWorkers(Model model) {
        int ready = 0;
        for (WorkerThread worker : ModelManager.getInstance().getWorkers(model.getModelVersionName())) {
            if (worker != null && isReady(worker)) { // null: the list was copied while it became shorter
                ready++;
            }
        }
        return ready;
    }

    private static boolean isReady(WorkerThread worker) {
        return worker.isRunning() && worker.getState() == WorkerState.WORKER_MODEL_LOADED;
    }

    /** Return what the archive says about its inputs and outputs; nothing if the bundle did not build it. */
    static JsonObject metadata(Model model) {
        JsonObject known = read(model, METADATA);
        if (known != null) {
            return known;
        }
        JsonObject unknown = new JsonObject();
        unknown.addProperty("platform", "");
        unknown.add("inputs", new JsonArray());
        unknown.add("outputs", new JsonArray());
        return unknown;
    }

    /** Return the JSON object in a file of the model's archive; null if it is missing or cannot be read. */
    static JsonObject read(Model model, String name) {
        Path file = model.getModelDir().toPath().resolve(name);
        try {
            if (Files.isRegularFile(file)) {
                return JsonUtils.GSON_PRETTY.fromJson(Files.readString(file), JsonObject.class);
            }
        } catch (IOException | JsonParseException error) {
            Agent.say("routes", "in; " + name + " of " + model.getModelName() + " cannot be read: " + error);
        }
        return null;
    }
}
