package bundle.frontend;

import groovyjarjarasm.asm.tree.ClassNode;
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

/** A body that is larger than max_request_size is answered with JSON that names the limit, instead of an empty 413. */
public final class Oversized implements Patch {
    private static final String AGGREGATOR = "io/netty/handler/codec/http/HttpObjectAggregator";

    @Override
    public String name() {
        return "oversized";
    }

    @Override
    public List<String> classes() {
        return List.of(Code.INITIALIZER);
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        Code.replaceNew(Code.calls(Code.pipeline(code), AGGREGATOR, "<init>", "(I)V", 1).get(0), Aggregator.class);
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
