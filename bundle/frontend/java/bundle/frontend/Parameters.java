package bundle.frontend;

import io.netty.channel.ChannelHandler;
import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelInboundHandlerAdapter;
import io.netty.channel.ChannelPipeline;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.HttpMethod;
import io.netty.handler.codec.http.QueryStringDecoder;
import java.util.List;
import java.util.Map;

/**
 * A registration or scaling changes nothing if a parameter is unknown or has an invalid value.
 *
 * <p>TorchServe takes the default instead: with `min_workers=3`, it scales a model to one worker. With `min_worker=-1`,
 * it ends all workers and answers 500.
 */
@ChannelHandler.Sharable
final class Parameters extends ChannelInboundHandlerAdapter {
    private static final Parameters GUARD = new Parameters();
    // the smallest valid values
    private static final Map<String, Integer> NUMBERS = Map.of(
            "min_worker", 0,
            "max_worker", 0,
            "initial_workers", 0,
            "batch_size", 1,
            "max_batch_delay", 0,
            "response_timeout", 1,
            "startup_timeout", 1);
    // those that TorchServe reads, and those that its documentation also names
    private static final List<String> SCALING =
            List.of("min_worker", "max_worker", "synchronous", "model_version", "timeout", "number_gpu");
    private static final List<String> REGISTRATION = List.of(
            "url",
            "model_name",
            "initial_workers",
            "synchronous",
            "batch_size",
            "max_batch_delay",
            "response_timeout",
            "startup_timeout",
            "handler",
            "runtime",
            "s3_sse_kms");

    private Parameters() {}

    /** Check the calls over a connection of the management port. */
    static ChannelPipeline guard(ChannelPipeline pipeline) {
        return pipeline.addLast("parameters", GUARD);
    }

    @Override
    public void channelRead(ChannelHandlerContext client, Object message) {
        String problem = message instanceof FullHttpRequest ? problem((FullHttpRequest) message) : null;
        if (problem == null) {
            client.fireChannelRead(message);
        } else {
            Answers.refuse(client, (FullHttpRequest) message, 400, "InvalidParameter", problem);
        }
    }

    /** Return what is wrong with the parameters of a call; null if nothing is. */
    private static String problem(FullHttpRequest request) {
        QueryStringDecoder query = new QueryStringDecoder(request.uri());
        List<String> known = known(request.method(), query.path().split("/"));
        if (known == null) {
            return null;
        }
        for (Map.Entry<String, List<String>> parameter : query.parameters().entrySet()) {
            String name = parameter.getKey();
            String value = parameter.getValue().get(0); // TorchServe, too, takes the first one
            if (!known.contains(name)) {
                return "There is no parameter " + name + ". This call has: " + String.join(", ", known) + ".";
            }
            Integer least = NUMBERS.get(name);
            if (least != null && !isAtLeast(least, value)) {
                return name + " must be an integer of at least " + least + ", and is " + value + ".";
            }
        }
        return null;
    }

    /** Return the parameters of a call; null if it is no registration and no scaling. */
    private static List<String> known(HttpMethod method, String[] path) {
        if (path.length < 2 || !path[1].equals("models")) {
            return null;
        }
        if (method.equals(HttpMethod.POST) && path.length == 2) {
            return REGISTRATION;
        }
        return method.equals(HttpMethod.PUT) && (path.length == 3 || path.length == 4) ? SCALING : null;
    }

    private static boolean isAtLeast(int least, String number) {
        try {
            return Integer.parseInt(number) >= least;
        } catch (NumberFormatException error) {
            return false;
        }
    }
}
