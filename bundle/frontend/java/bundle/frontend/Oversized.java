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
import io.netty.handler.codec.http.HttpRequest;
import io.netty.handler.codec.http.HttpResponse;
import io.netty.handler.codec.http.HttpResponseStatus;
import io.netty.handler.codec.http.HttpUtil;
import io.netty.handler.codec.http.multipart.Attribute;
import io.netty.handler.codec.http.multipart.DefaultHttpDataFactory;
import io.netty.handler.codec.http.multipart.FileUpload;
import io.netty.handler.codec.http.multipart.HttpPostRequestDecoder.ErrorDataDecoderException;
import io.netty.util.ReferenceCountUtil;
import java.nio.charset.Charset;
import java.util.List;
import org.pytorch.serve.grpc.inference.PredictionsRequest;

/**
 * A body that is larger than max_request_size is answered with JSON that names the limit, instead of an empty 413. A
 * form, or a call of TorchServe's gRPC service, may have 1,000 fields.
 *
 * <p>A few megabytes can have a million fields. A worker would read nothing else for many seconds, and the fields of a
 * few such forms would fill Java's memory. So a form's fields are counted while it is decoded.
 */
public final class Oversized implements Patch {
    private static final String AGGREGATOR = "io/netty/handler/codec/http/HttpObjectAggregator";
    private static final String FACTORY = "io/netty/handler/codec/http/multipart/DefaultHttpDataFactory";
    private static final int MOST_FIELDS = 1000;
    private static final int MOST_PARAMETERS = 10 * MOST_FIELDS; // a file has two: its field's name, and its own
    private static final String TOO_MANY = "The request has more than 1,000 fields. Send several requests.";

    @Override
    public String name() {
        return "oversized";
    }

    @Override
    public List<String> classes() {
        return List.of(Code.INITIALIZER, Code.REQUEST_PARSER, Code.WORKFLOW_PARSER, Code.GRPC_INFERENCE);
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        if (code.name.equals(Code.INITIALIZER)) {
            Code.replaceNew(Code.calls(Code.pipeline(code), AGGREGATOR, "<init>", "(I)V", 1).get(0), Aggregator.class);
        } else if (code.name.equals(Code.GRPC_INFERENCE)) {
            Code.guard(Code.method(code, "prediction", Code.PREDICTION), Oversized.class, "accepts", 1, 2);
        } else {
            boolean workflow = code.name.equals(Code.WORKFLOW_PARSER); // it parses before it knows the workflow
            MethodNode parse =
                    Code.method(code, "parseRequest", workflow ? Code.PARSE_WORKFLOW_REQUEST : Code.PARSE_REQUEST);
            Code.replaceNew(Code.calls(parse, FACTORY, "<init>", "(J)V", 1).get(0), Fields.class);
        }
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

    /** Netty's maker of the fields of one form, which also limits their number. */
    public static final class Fields extends DefaultHttpDataFactory {
        private int fields;
        private int parameters;

        public Fields(long minimumOnDisk) {
            super(minimumOnDisk);
        }

        @Override
        public Attribute createAttribute(HttpRequest request, String name) {
            countField();
            return super.createAttribute(request, name);
        }

        @Override
        public Attribute createAttribute(HttpRequest request, String name, long size) {
            countField();
            return super.createAttribute(request, name, size);
        }

        @Override
        public FileUpload createFileUpload(
                HttpRequest request, String name, String file, String type, String coding, Charset charset, long size) {
            countField();
            return super.createFileUpload(request, name, file, type, coding, charset, size);
        }

        /** Create a parameter of a part's headers, such as the name of its file. Netty keeps it until the form's end. */
        @Override
        public Attribute createAttribute(HttpRequest request, String name, String value) {
            if (++parameters > MOST_PARAMETERS) {
                throw new ErrorDataDecoderException("The headers of its parts have more than 10,000 parameters.");
            }
            return super.createAttribute(request, name, value);
        }

        /** Netty passes on this kind of exception only. The patch `forms` answers it with 400. */
        private void countField() {
            if (++fields > MOST_FIELDS) {
                throw new ErrorDataDecoderException(TOO_MANY);
            }
        }
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
