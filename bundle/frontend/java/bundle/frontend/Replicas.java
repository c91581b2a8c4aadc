package bundle.frontend;

import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelInboundHandlerAdapter;
import io.netty.channel.ChannelPipeline;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.HttpMethod;
import java.net.InetSocketAddress;
import java.net.SocketAddress;
import java.util.Set;

/**
 * A management call from outside does not change one of several replicas.
 *
 * <p>They serve the same behind one proxy, so a change of one alone would give the same request different answers. With
 * BUNDLE_REPLICAS over 1, only calls over loopback may change something: `bundle manage` makes them inside every
 * replica.
 */
final class Replicas extends ChannelInboundHandlerAdapter {
    private static final Set<HttpMethod> READING = Set.of(HttpMethod.GET, HttpMethod.HEAD, HttpMethod.OPTIONS);
    private static final int COUNT = count();

    private Replicas() {}

    /** Refuse changes over a connection of the management port, if there are several replicas. */
    static ChannelPipeline guard(ChannelPipeline pipeline) {
        return COUNT > 1 && !isLocal(pipeline.channel().remoteAddress())
                ? pipeline.addLast("replicas", new Replicas())
                : pipeline;
    }

    @Override
    public void channelRead(ChannelHandlerContext client, Object message) {
        if (!(message instanceof FullHttpRequest) || READING.contains(((FullHttpRequest) message).method())) {
            client.fireChannelRead(message);
            return;
        }
        FullHttpRequest request = (FullHttpRequest) message;
        String call = request.method() + " " + request.uri();
        String problem = "This server is one of " + COUNT + " replicas that must serve the same. To change all of them, "
                + "run: make manage CALL=\"" + call + "\", or to replace a model's version: make rollout MODEL=...";
        Answers.refuse(client, request, 409, "OneOfSeveralReplicas", problem);
    }

    private static boolean isLocal(SocketAddress client) {
        return !(client instanceof InetSocketAddress) || ((InetSocketAddress) client).getAddress().isLoopbackAddress();
    }

    private static int count() {
        try {
            return Integer.parseInt(System.getenv().getOrDefault("BUNDLE_REPLICAS", "1"));
        } catch (NumberFormatException error) {
            return 1; // the supervisor refuses such a value
        }
    }
}
