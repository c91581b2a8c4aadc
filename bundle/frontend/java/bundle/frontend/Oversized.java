package bundle.frontend;

import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.MethodNode;
import io.grpc.stub.StreamObserver;
import io.netty.channel.ChannelFutureListener;
import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelPipeline;
import io.netty.handler.codec.http.FullHttpResponse;
import io.netty.handler.codec.http.HttpMessage;
import io.netty.handler.codec.http.HttpObjectAggregator;
import io.netty.handler.codec.http.HttpResponse;
import io.netty.handler.codec.http.HttpResponseStatus;
import io.netty.handler.codec.http.HttpUtil;
import io.netty.util.ReferenceCountUtil;
import java.util.List;
import org.pytorch.serve.grpc.inference.PredictionsRequest;
import org.pytorch.serve.http.BadRequestException;
import org.pytorch.serve.util.messages.InputParameter;
import org.pytorch.serve.util.messages.RequestInput;

/**
 * A body that is larger than max_request_size is answered with JSON that names the limit, instead of an empty 413. A
 * form, or a call of TorchServe's gRPC service, may have 1,000 fields.
 *
 * <p>A few megabytes can have a million fields. A worker would read nothing else for many seconds.
 */
public final class Oversized implements Patch {
    private static final String AGGREGATOR = "io/netty/handler/codec/http/HttpObjectAggregator";
    private static final String INPUT = "org/pytorch/serve/util/messages/RequestInput";
    private static final String FIELD = "Lorg/pytorch/serve/util/messages/InputParameter;";
    private static final int MOST_FIELDS = 1000;
    private static final String TOO_MANY = "The request has more than 1,000 fields. Send several requests.";

    @Override
    public String name() {
        return "oversized";
    }

    @Override
    public List<String> classes() {
        return List.of(Code.INITIALIZER, Code.REQUEST_PARSER, Code.GRPC_INFERENCE);
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        if (code.name.equals(Code.INITIALIZER)) {
            Code.replaceNew(Code.calls(Code.pipeline(code), AGGREGATOR, "<init>", "(I)V", 1).get(0), Aggregator.class);
        } else if (code.name.equals(Code.REQUEST_PARSER)) {
            MethodNode parse = Code.method(code, "parseRequest", Code.PARSE_REQUEST);
            Code.redirectAll(parse, INPUT, "addParameter", "(" + FIELD + ")V", Oversized.class, "add", false);
        } else {
            Code.guard(Code.method(code, "prediction", Code.PREDICTION), Oversized.class, "accepts", 1, 2);
        }
    }

    /** Add a field to a request. Called in place of `input.addParameter(field)`. */
    public static void add(RequestInput input, InputParameter field) {
        if (input.getParameters().size() >= MOST_FIELDS) {
            throw new BadRequestException(TOO_MANY);
        }
        input.addParameter(field);
    }

    /**
     * Check the number of fields of a call of TorchServe's own gRPC service.
     *
     * @return whether TorchServe handles the call; otherwise, it was answered
     */
    public static boolean accepts(PredictionsRequest request, StreamObserver<?> client) {
        boolean few = request.getInputCount() <= MOST_FIELDS;
        if (!few) {
            client.onError(InferenceJob.error(400, TOO_MANY));
        }
        return few;
    }

    /** Netty's collector of a request's parts, which also checks its size. */
    public static final class Aggregator extends HttpObjectAggregator {
        public Aggregator(int limit) {
            super(limit);
        }

        /**
         * Answer a request that is too large. Netty then drops the rest of its body.
         *
         * <p>The connection stays open until the client has sent that rest: otherwise, it would see a broken connection
         * instead of the answer.
         */
        @Override
        protected void handleOversizedMessage(ChannelHandlerContext client, HttpMessage request) {
            client.writeAndFlush(answer())
                    .addListener(
                            HttpUtil.isKeepAlive(request)
                                    ? ChannelFutureListener.CLOSE_ON_FAILURE
                                    : ChannelFutureListener.CLOSE);
        }

        /** Answer a client that first asks whether it may send its body. */
        @Override
        protected Object newContinueResponse(HttpMessage request, int limit, ChannelPipeline pipeline) {
            Object theirs = super.newContinueResponse(request, limit, pipeline);
            if (theirs instanceof HttpResponse
                    && ((HttpResponse) theirs).status().equals(HttpResponseStatus.REQUEST_ENTITY_TOO_LARGE)) {
                ReferenceCountUtil.release(theirs);
                return answer();
            }
            return theirs;
        }

        private FullHttpResponse answer() {
            String message = String.format(
                    "The body is larger than %,d bytes, the limit of max_request_size.", maxContentLength());
            FullHttpResponse answer = Answers.response(413, "BodyTooLarge", message);
            HttpUtil.setContentLength(answer, answer.content().readableBytes());
            return answer;
        }
    }
}
