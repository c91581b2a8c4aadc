package bundle.frontend;

import com.google.protobuf.ByteString;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.UnknownFieldSet;
import io.grpc.MethodDescriptor;
import io.grpc.ServerServiceDefinition;
import io.grpc.Status;
import io.grpc.stub.ServerCalls;
import io.grpc.stub.StreamObserver;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.util.List;
import java.util.Set;
import org.pytorch.serve.grpc.inference.InferenceAPIsServiceGrpc;

/**
 * gRPC's standard service for probes: SERVING when all models have their workers READY.
 *
 * <p>TorchServe has no classes of its messages. They have one field each: the name of a service, and a number. `Watch`
 * stays UNIMPLEMENTED, which its specification allows.
 */
final class Health {
    private static final String NAME = "grpc.health.v1.Health";
    // the empty name is that of the whole server
    private static final Set<String> SERVICES = Set.of("", InferenceService.NAME, InferenceAPIsServiceGrpc.SERVICE_NAME);
    private static final byte SERVING = 1;
    private static final byte NOT_SERVING = 2;

    private Health() {}

    static ServerServiceDefinition definition() {
        MethodDescriptor<byte[], byte[]> check = MethodDescriptor.newBuilder(new Bytes(), new Bytes())
                .setType(MethodDescriptor.MethodType.UNARY)
                .setFullMethodName(NAME + "/Check")
                .build();
        return ServerServiceDefinition.builder(NAME)
                .addMethod(check, ServerCalls.asyncUnaryCall(Health::check))
                .build();
    }

    private static void check(byte[] request, StreamObserver<byte[]> client) {
        if (!SERVICES.contains(service(request))) {
            client.onError(Status.NOT_FOUND.withDescription("There is no such service.").asRuntimeException());
            return;
        }
        client.onNext(new byte[] {1 << 3, States.isReady() ? SERVING : NOT_SERVING}); // field 1, a number
        client.onCompleted();
    }

    private static String service(byte[] request) {
        try {
            List<ByteString> names =
                    UnknownFieldSet.parseFrom(request).getField(1).getLengthDelimitedList();
            return names.isEmpty() ? "" : names.get(names.size() - 1).toStringUtf8();
        } catch (InvalidProtocolBufferException error) {
            throw new UncheckedIOException(error);
        }
    }

    /** A message as it is sent. */
    private static final class Bytes implements MethodDescriptor.Marshaller<byte[]> {
        @Override
        public InputStream stream(byte[] message) {
            return new ByteArrayInputStream(message);
        }

        @Override
        public byte[] parse(InputStream message) {
            try {
                return message.readAllBytes();
            } catch (IOException error) {
                throw new UncheckedIOException(error);
            }
        }
    }
}
