package bundle.frontend;

import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.MethodInsnNode;
import groovyjarjarasm.asm.tree.MethodNode;
import io.grpc.ServerBuilder;
import io.grpc.ServerInterceptors;
import io.grpc.ServerServiceDefinition;
import io.grpc.netty.shaded.io.grpc.netty.NettyServerBuilder;
import java.util.List;
import org.pytorch.serve.grpc.inference.InferenceAPIsServiceGrpc;
import org.pytorch.serve.grpcimpl.GRPCInterceptor;
import org.pytorch.serve.util.ConnectorType;

/**
 * The gRPC port of inference has the service that clients of KServe and Triton call, `inference.GRPCInferenceService`.
 *
 * <p>TorchServe has it, if it is asked to, under a name of its own that no client calls, without metadata and raw
 * tensors, and with a readiness that is always true. The standard service for probes is added, too.
 */
public final class Grpc implements Patch {
    private static final String SERVER = "org/pytorch/serve/ModelServer";
    private static final String PACKAGE = "org/pytorch/serve/grpc/openinference/";
    private static final String CALLS = PACKAGE + "GRPCInferenceServiceGrpc$GRPCInferenceServiceImplBase";
    private static final String REQUEST = PACKAGE + "OpenInferenceGrpc$ModelInferRequest";
    private static final String RESPONSE = PACKAGE + "OpenInferenceGrpc$ModelInferResponse";

    @Override
    public String name() {
        return "grpc";
    }

    @Override
    public List<String> classes() {
        return List.of(SERVER, CALLS, REQUEST, RESPONSE, Code.WORKER);
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        if (code.name.equals(SERVER)) {
            String service = "(Lio/grpc/ServerServiceDefinition;)Lio/grpc/ServerBuilder;";
            String builder = "io/grpc/netty/shaded/io/grpc/netty/NettyServerBuilder";
            String parameters = "(Lorg/pytorch/serve/util/ConnectorType;)Lio/grpc/Server;";
            MethodNode start = Code.method(code, "startGRPCServer", parameters);
            MethodInsnNode add = Code.calls(start, builder, "addService", service, 1).get(0);
            Code.redirect(start, add, Grpc.class, "addService", false);
        } else if (code.name.equals(CALLS)) {
            Code.method(code, "bindService", "()Lio/grpc/ServerServiceDefinition;");
        } else if (code.name.equals(Code.WORKER)) {
            Code.begin(Code.setState(code), States.class, "note", 0, 1);
        } else {
            Code.requireField(code, code.name.equals(REQUEST) ? "rawInputContents_" : "rawOutputContents_");
        }
    }

    /** Add TorchServe's service to a port, and ours to that of inference. Called in place of `server.addService`. */
    public static ServerBuilder<?> addService(NettyServerBuilder server, ServerServiceDefinition service) {
        server.addService(service);
        if (service.getServiceDescriptor().getName().equals(InferenceAPIsServiceGrpc.SERVICE_NAME)) {
            try {
                for (ServerServiceDefinition ours : List.of(InferenceService.definition(), Health.definition())) {
                    // checks the token, and writes the access log
                    GRPCInterceptor interceptor = new GRPCInterceptor(ConnectorType.INFERENCE_CONNECTOR);
                    server.addService(ServerInterceptors.intercept(ours, interceptor));
                }
            } catch (RuntimeException | LinkageError error) {
                Agent.say("grpc", "failed: " + error); // TorchServe starts without them
            }
        }
        return server;
    }
}
