package bundle.frontend;

import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import io.grpc.ServerMethodDefinition;
import io.grpc.ServerServiceDefinition;
import io.grpc.stub.ServerCallStreamObserver;
import io.grpc.stub.StreamObserver;
import java.util.List;
import org.pytorch.serve.archive.model.ModelException;
import org.pytorch.serve.grpc.openinference.GRPCInferenceServiceGrpc.GRPCInferenceServiceImplBase;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ModelInferRequest;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ModelInferResponse;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ModelMetadataRequest;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ModelMetadataResponse;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ModelMetadataResponse.TensorMetadata;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ModelReadyRequest;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ModelReadyResponse;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ServerLiveRequest;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ServerLiveResponse;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ServerMetadataRequest;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ServerMetadataResponse;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ServerReadyRequest;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ServerReadyResponse;
import org.pytorch.serve.http.BadRequestException;
import org.pytorch.serve.metrics.IMetric;
import org.pytorch.serve.metrics.MetricCache;
import org.pytorch.serve.util.ConfigManager;
import org.pytorch.serve.util.messages.RequestInput;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;

/**
 * The Open Inference Protocol over gRPC.
 *
 * <p>The messages are those that TorchServe has. They are KServe's, field by field, so that only the name of the service
 * differs. A prediction becomes the request that a client of the protocol would send over HTTP: the handler knows
 * nothing of gRPC.
 */
final class InferenceService extends GRPCInferenceServiceImplBase {
    static final String NAME = "inference.GRPCInferenceService";

    /** Return the service under the name that clients call. */
    static ServerServiceDefinition definition() {
        ServerServiceDefinition.Builder service = ServerServiceDefinition.builder(NAME);
        for (ServerMethodDefinition<?, ?> method : new InferenceService().bindService().getMethods()) {
            service.addMethod(renamed(method));
        }
        return service.build();
    }

    private static <Q, A> ServerMethodDefinition<Q, A> renamed(ServerMethodDefinition<Q, A> method) {
        String name = NAME + "/" + method.getMethodDescriptor().getBareMethodName();
        return ServerMethodDefinition.create(
                method.getMethodDescriptor().toBuilder().setFullMethodName(name).build(),
                method.getServerCallHandler());
    }

    @Override
    public void serverLive(ServerLiveRequest request, StreamObserver<ServerLiveResponse> client) {
        answer(client, () -> ServerLiveResponse.newBuilder().setLive(true).build());
    }

    @Override
    public void serverReady(ServerReadyRequest request, StreamObserver<ServerReadyResponse> client) {
        answer(client, () -> ServerReadyResponse.newBuilder().setReady(States.isReady()).build());
    }

    @Override
    public void modelReady(ModelReadyRequest request, StreamObserver<ModelReadyResponse> client) {
        answer(client, () -> {
            Model model = States.find(request.getName(), request.getVersion());
            return ModelReadyResponse.newBuilder().setReady(States.isReady(model)).build();
        });
    }

    @Override
    public void serverMetadata(ServerMetadataRequest request, StreamObserver<ServerMetadataResponse> client) {
        answer(client, () -> ServerMetadataResponse.newBuilder()
                .setName(States.NAME)
                .setVersion(ConfigManager.getInstance().getVersion())
                .addExtensions(States.EXTENSION)
                .build());
    }

    @Override
    public void modelMetadata(ModelMetadataRequest request, StreamObserver<ModelMetadataResponse> client) {
        answer(client, () -> {
            JsonObject metadata = States.metadata(States.find(request.getName(), request.getVersion()));
            ModelMetadataResponse.Builder answer = ModelMetadataResponse.newBuilder()
                    .setName(request.getName())
                    .addAllVersions(States.versions(request.getName()))
                    .setPlatform(metadata.get("platform").getAsString());
            metadata.getAsJsonArray("inputs").forEach(each -> answer.addInputs(tensor(each)));
            metadata.getAsJsonArray("outputs").forEach(each -> answer.addOutputs(tensor(each)));
            return answer.build();
        });
    }

    private static TensorMetadata tensor(JsonElement described) {
        JsonObject tensor = described.getAsJsonObject();
        TensorMetadata.Builder answer = TensorMetadata.newBuilder()
                .setName(tensor.get("name").getAsString())
                .setDatatype(tensor.get("datatype").getAsString());
        tensor.getAsJsonArray("shape").forEach(size -> answer.addShape(size.getAsLong()));
        return answer.build();
    }

    @Override
    public void modelInfer(ModelInferRequest request, StreamObserver<ModelInferResponse> client) {
        // without a handler, an answer to a client that has gone would be an exception
        ((ServerCallStreamObserver<ModelInferResponse>) client).setOnCancelHandler(() -> {});
        String version = request.getModelVersion().isEmpty() ? null : request.getModelVersion();
        try {
            Model model = States.find(request.getModelName(), version);
            RequestInput input = Tensors.request(request);
            input.setClientExpireTS(model.getClientTimeoutInMills());
            count(request.getModelName(), version);
            InferenceJob job = new InferenceJob(client, request.getModelName(), version, input);
            if (!Overload.addGrpc(ModelManager.getInstance(), job)) {
                job.sendError(503, "The model does not accept this request. Retry later.");
            }
        } catch (ModelException error) {
            client.onError(InferenceJob.error(404, error.getMessage()));
        } catch (BadRequestException error) {
            client.onError(InferenceJob.error(400, error.getMessage()));
        }
    }

    /** Count a request where TorchServe counts those of its own services. */
    private static void count(String model, String version) {
        IMetric requests = MetricCache.getInstance().getMetricFrontend("ts_inference_requests_total");
        if (requests != null) {
            String host = ConfigManager.getInstance().getHostName();
            requests.addOrUpdate(List.of(model, version == null ? "default" : version, host), 1);
        }
    }

    /** What makes an answer that needs no worker. */
    private interface Question<T> {
        T ask() throws ModelException;
    }

    private static <T> void answer(StreamObserver<T> client, Question<T> question) {
        try {
            client.onNext(question.ask());
            client.onCompleted();
        } catch (ModelException error) {
            client.onError(InferenceJob.error(404, error.getMessage()));
        }
    }
}
