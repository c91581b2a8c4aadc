package bundle.frontend;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import io.netty.channel.ChannelHandlerContext;
import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.pytorch.serve.archive.model.ModelNotFoundException;
import org.pytorch.serve.util.JsonUtils;
import org.pytorch.serve.util.NettyUtils;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;

/** Answers the OpenAPI document of the models that are registered, which has the documents of their archives. */
final class Schema {
    private static final String FILE = "openapi.json"; // in an archive, and in this jar: bundle/openapi.py
    private static final String UNKNOWN = "MODEL"; // the model in this jar's file, for archives without one

    private static List<Object> described = List.of(); // the models that `text` describes
    private static String text;

    private Schema() {}

    static void send(ChannelHandlerContext client) throws ModelNotFoundException {
        NettyUtils.sendJsonResponse(client, document());
    }

    private static synchronized String document() throws ModelNotFoundException {
        Map<String, Model> models = new TreeMap<>(ModelManager.getInstance().getDefaultModels(true));
        models.keySet().removeIf(name -> !name.matches("[A-Za-z0-9._-]+")); // no component may have another name
        List<Object> now = new ArrayList<>();
        for (Map.Entry<String, Model> each : models.entrySet()) {
            now.add(List.of(each.getKey(), each.getValue().getModelDir(), States.versions(each.getKey())));
        }
        if (text == null || !now.equals(described)) {
            text = united(models).toString();
            described = now;
        }
        return text;
    }

    private static JsonObject united(Map<String, Model> models) throws ModelNotFoundException {
        JsonObject own = own();
        JsonObject united = own.getAsJsonObject("server");
        for (Map.Entry<String, Model> each : models.entrySet()) {
            String name = each.getKey();
            JsonArray versions = States.array(States.versions(name));
            JsonObject document = States.read(each.getValue(), FILE);
            if (document != null) {
                try {
                    JsonObject more = united.deepCopy();
                    add(more, renamed(document, archivedName(document), name), name, versions);
                    united = more;
                    continue;
                } catch (RuntimeException error) {
                    Agent.say("routes", "in; " + FILE + " of " + name + " is not the bundle's: " + error);
                }
            }
            add(united, renamed(own.getAsJsonObject("model"), UNKNOWN, name), name, versions);
        }
        return united;
    }

    private static JsonObject own() {
        try (InputStream file = Schema.class.getResourceAsStream(FILE)) {
            String content = new String(file.readAllBytes(), StandardCharsets.UTF_8);
            return JsonUtils.GSON.fromJson(content, JsonObject.class);
        } catch (IOException error) {
            throw new UncheckedIOException(error);
        }
    }

    /** Return the model's name in a document. The manifest, as TorchServe keeps it, has the name of the registration. */
    private static String archivedName(JsonObject document) {
        String own = "/predictions/";
        return document.getAsJsonObject("paths").keySet().stream()
                .filter(path -> path.startsWith(own) && path.indexOf('/', own.length()) < 0)
                .findFirst()
                .orElseThrow(() -> new IllegalArgumentException("it has no path " + own + "NAME"))
                .substring(own.length());
    }

    /** Return a model's document for the name under which the model is registered. */
    private static JsonObject renamed(JsonObject document, String archived, String registered) {
        String name = Pattern.quote(archived);
        String replacement = "$1" + Matcher.quoteReplacement(registered);
        String places = "\"\\$ref\":\"#/components/\\w+/|\"operationId\":\"[^_\"]+_|\"tags\":\\[\""
                + "|\"summary\":\"[^\"\\\\]* |\"/(?:predictions|explanations|v[12]/models)/";
        String changed = document.toString()
                .replaceAll("(" + places + ")" + name + "(?=[-/:.\"])", replacement)
                .replaceAll("(\")" + name + "(?=-\\w+\":\\{)", replacement); // the names of components
        return JsonUtils.GSON.fromJson(changed, JsonObject.class);
    }

    /**
     * Add a model's paths and components to a document. What the document already has is common to all models.
     *
     * @throws RuntimeException the model's document is not one that the bundle makes
     */
    private static void add(JsonObject united, JsonObject document, String name, JsonArray versions) {
        JsonObject components = document.getAsJsonObject("components");
        JsonObject version = components.getAsJsonObject("parameters").getAsJsonObject(name + "-version");
        version.getAsJsonObject("schema").add("enum", versions);
        for (Map.Entry<String, JsonElement> kind : components.entrySet()) {
            addMissing(united.getAsJsonObject("components"), kind.getKey(), kind.getValue());
        }
        addMissing(united, "paths", document.get("paths"));
    }

    private static void addMissing(JsonObject target, String part, JsonElement named) {
        if (!target.has(part)) {
            target.add(part, new JsonObject());
        }
        JsonObject present = target.getAsJsonObject(part);
        for (Map.Entry<String, JsonElement> each : named.getAsJsonObject().entrySet()) {
            if (!present.has(each.getKey())) {
                present.add(each.getKey(), each.getValue());
            }
        }
    }
}
