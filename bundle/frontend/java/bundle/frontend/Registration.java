package bundle.frontend;

import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.MethodNode;
import java.io.IOException;
import java.net.HttpURLConnection;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.ExecutionException;
import org.pytorch.serve.archive.DownloadArchiveException;
import org.pytorch.serve.archive.model.Manifest;
import org.pytorch.serve.archive.model.ModelArchive;
import org.pytorch.serve.archive.model.ModelException;
import org.pytorch.serve.http.InternalServerException;
import org.pytorch.serve.http.StatusResponse;
import org.pytorch.serve.http.messages.RegisterModelRequest;
import org.pytorch.serve.util.ApiUtils;
import org.pytorch.serve.util.ConfigManager;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;
import org.pytorch.serve.wlm.WorkerInitializationException;

/**
 * The answer to a registration names the parameters without effect, and where the reason of a failure is.
 *
 * <p>Settings of the archive's model-config.yaml have precedence over the parameters of `POST /models`. TorchServe does
 * not say so.
 */
public final class Registration implements Patch {
    private static final String REQUEST = "(Lorg/pytorch/serve/http/messages/RegisterModelRequest;)";
    private static final String ANSWER = "Lorg/pytorch/serve/http/StatusResponse;";
    private static final String NAMED = "(Ljava/lang/String;Ljava/lang/String;"
            + "Lorg/pytorch/serve/archive/model/Manifest$RuntimeType;Ljava/lang/String;";
    private static final String LOAD =
            NAMED + "IIIILjava/lang/String;ZZZ)Lorg/pytorch/serve/archive/model/ModelArchive;";
    private static final String UTILITIES = "org/pytorch/serve/util/ApiUtils";
    private static final ThreadLocal<ModelArchive> ARCHIVE = new ThreadLocal<>(); // of the call of a thread

    @Override
    public String name() {
        return "registration";
    }

    @Override
    public List<String> classes() {
        return List.of("org/pytorch/serve/http/api/rest/ManagementRequestHandler", UTILITIES);
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        if (code.name.equals(UTILITIES)) {
            MethodNode handle = Code.method(code, "handleRegister", NAMED + "IIIIIZZZ)" + ANSWER);
            Code.redirectAll(handle, Code.MODEL_MANAGER, "registerModel", LOAD, Registration.class, "load", false);
            return;
        }
        String handler = "(Lio/netty/channel/ChannelHandlerContext;"
                + "Lio/netty/handler/codec/http/QueryStringDecoder;Lio/netty/handler/codec/http/FullHttpRequest;)V";
        MethodNode handle = Code.method(code, "handleRegisterModel", handler);
        String register = REQUEST + ANSWER;
        Code.redirectAll(handle, UTILITIES, "registerModel", register, Registration.class, "register", false);
    }

    /** Load an archive, and remember it for the answer. */
    public static ModelArchive load(
            ModelManager manager,
            String url,
            String name,
            Manifest.RuntimeType runtime,
            String handler,
            int batchSize,
            int maxBatchDelay,
            int responseTimeout,
            int startupTimeout,
            String defaultName,
            boolean ignoresDuplicate,
            boolean isWorkflow,
            boolean isEncrypted)
            throws ModelException, IOException, InterruptedException, DownloadArchiveException {
        ModelArchive archive = manager.registerModel(
                url,
                name,
                runtime,
                handler,
                batchSize,
                maxBatchDelay,
                responseTimeout,
                startupTimeout,
                defaultName,
                ignoresDuplicate,
                isWorkflow,
                isEncrypted);
        ARCHIVE.set(archive);
        return archive;
    }

    /** Register a model, and complete the answer. */
    public static StatusResponse register(RegisterModelRequest request)
            throws ModelException, ExecutionException, InterruptedException, DownloadArchiveException,
                    WorkerInitializationException {
        ARCHIVE.remove();
        StatusResponse answer = ApiUtils.registerModel(request);
        ModelArchive archive = ARCHIVE.get();
        ARCHIVE.remove();
        if (answer.getHttpResponseCode() == HttpURLConnection.HTTP_INTERNAL_ERROR) {
            answer.setE(new InternalServerException(answer.getStatus() + ". The server's log has the reason."));
        } else if (archive != null) {
            Model model = ModelManager.getInstance().getModel(archive.getModelName(), archive.getModelVersion());
            List<String> unused = model == null ? List.of() : withoutEffect(request, model);
            if (!unused.isEmpty()) {
                answer.setStatus(answer.getStatus() + "; parameters without effect, because the archive's "
                        + "model-config.yaml sets other values: " + String.join(", ", unused));
            }
        }
        return answer;
    }

    /** Return the parameters that have other values than the model, with those of the model. */
    private static List<String> withoutEffect(RegisterModelRequest sent, Model model) {
        List<String> unused = new ArrayList<>();
        int usual = ConfigManager.getInstance().getConfiguredDefaultWorkersPerModel();
        if (sent.getInitialWorkers() != usual) {
            compare("initial_workers", sent.getInitialWorkers(), model.getMinWorkers(), unused);
        }
        compare("batch_size", sent.getBatchSize(), model.getBatchSize(), unused);
        compare("max_batch_delay", sent.getMaxBatchDelay(), model.getMaxBatchDelay(), unused);
        compare("response_timeout", sent.getResponseTimeout(), model.getResponseTimeout(), unused);
        compare("startup_timeout", sent.getStartupTimeout(), model.getStartupTimeout(), unused);
        return unused;
    }

    private static void compare(String parameter, int sent, int used, List<String> unused) {
        if (sent >= 0 && sent != used) { // negative: the client did not send it
            unused.add(parameter + "=" + sent + " (" + used + ")");
        }
    }
}
