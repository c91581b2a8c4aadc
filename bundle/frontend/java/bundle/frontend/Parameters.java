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
import java.util.TreeMap;
import java.util.TreeSet;

/**
 * A registration or scaling with an unknown parameter, or with a number that is none, changes nothing.
 *
 * <p>TorchServe takes the default instead: with `min_workers=3`, it scales a model to one worker. With `min_worker=-1`,
 * it ends all workers and answers 500.
 */
@ChannelHandler.Sharable
final class Parameters extends ChannelInboundHandlerAdapter {
    private static final Parameters GUARD = new Parameters();
    // the smallest numbers
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
        Map<String, List<String>> sent = new TreeMap<>(query.parameters());
        for (Map.Entry<String, List<String>> parameter : sent.entrySet()) {
            String name = parameter.getKey();
            if (!known.contains(name)) {
                return "There is no parameter " + name + ". This call has: " + String.join(", ", new TreeSet<>(known));
            }
            Integer least = NUMBERS.get(name);
            if (least != null && !isAtLeast(least, parameter.getValue().get(0))) {
                return name + " must be an integer of at least " + least + ", and is "
                        + parameter.getValue().get(0) + ".";
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
