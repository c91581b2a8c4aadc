package bundle.frontend;

import io.netty.buffer.Unpooled;
import io.netty.channel.ChannelHandlerContext;
import io.netty.handler.codec.http.DefaultFullHttpResponse;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.FullHttpResponse;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpHeaderValues;
import io.netty.handler.codec.http.HttpResponseStatus;
import io.netty.handler.codec.http.HttpVersion;
import io.netty.util.ReferenceCountUtil;
import java.lang.reflect.Field;
import java.nio.charset.StandardCharsets;
import org.pytorch.serve.http.ErrorResponse;
import org.pytorch.serve.http.InternalServerException;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.job.RestJob;
import org.pytorch.serve.util.JsonUtils;
import org.pytorch.serve.util.NettyUtils;

/** Answer a request with an error, in TorchServe's JSON. */
final class Answers {
    static final String CLIENT = "ctx"; // the fields of a request that are read here
    static final String STREAMS = "numStreams";
    private static final Field CLIENT_FIELD = field(CLIENT);
    private static final Field STREAMS_FIELD = field(STREAMS);

    private Answers() {}

    /** Answer a queued request with an error, unless it was answered already. */
    static void fail(Job job, int status, String type, String message, int retryAfter) {
        if (!(job instanceof RestJob)) {
            job.sendError(status, message); // gRPC
        } else if (Timeouts.claim(job)) {
            send((RestJob) job, status, type, message, retryAfter);
        }
    }

    /** Answer a queued request with an error. */
    static void send(RestJob job, int status, String type, String message, int retryAfter) {
        ChannelHandlerContext client = (ChannelHandlerContext) read(CLIENT_FIELD, job);
        if (client != null && !client.channel().isActive()) {
            return; // an answer is counted in the metrics, and this client has gone
        }
        if (client != null && hasBegun(job)) {
            client.close(); // the client sees that the answer is incomplete
        } else if (client != null) {
            error(client, status, type, message, retryAfter);
        } else if (job.getResponsePromise() != null) { // a step of a workflow
            job.getResponsePromise().completeExceptionally(new InternalServerException(message));
        }
    }

    /** Return whether the first part of an answer was sent, so that no other answer can follow. */
    static boolean hasBegun(Job job) {
        return job instanceof RestJob && (Integer) read(STREAMS_FIELD, (RestJob) job) > 0;
    }

    private static Object read(Field field, RestJob of) {
        try {
            return field.get(of);
        } catch (IllegalAccessException error) {
            throw new IllegalStateException(error);
        }
    }

    private static Field field(String name) {
        try {
            Field field = RestJob.class.getDeclaredField(name);
            field.setAccessible(true);
            return field;
        } catch (NoSuchFieldException error) {
            throw new IllegalStateException(error);
        }
    }

    /**
     * @param retryAfter seconds after which the client may try again; 0 leaves the header out
     */
    static void error(ChannelHandlerContext client, int status, String type, String message, int retryAfter) {
        FullHttpResponse answer = response(status, type, message);
        if (retryAfter > 0) {
            answer.headers().set(HttpHeaderNames.RETRY_AFTER, retryAfter);
        }
        NettyUtils.sendHttpResponse(client, answer, true);
    }

    /** Answer a request with an error before TorchServe has seen it. */
    static void refuse(ChannelHandlerContext client, FullHttpRequest request, int status, String type, String message) {
        try {
            NettyUtils.requestReceived(client.channel(), request);
            error(client, status, type, message, 0);
        } finally {
            ReferenceCountUtil.release(request);
        }
    }

    static FullHttpResponse response(int status, String type, String message) {
        String json = JsonUtils.GSON_PRETTY.toJson(new ErrorResponse(status, type, message)) + "\n";
        FullHttpResponse answer = new DefaultFullHttpResponse(
                HttpVersion.HTTP_1_1,
                HttpResponseStatus.valueOf(status),
                Unpooled.wrappedBuffer(json.getBytes(StandardCharsets.UTF_8)));
        answer.headers().set(HttpHeaderNames.CONTENT_TYPE, HttpHeaderValues.APPLICATION_JSON);
        return answer;
    }
}
