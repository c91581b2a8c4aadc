package bundle.frontend;

import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.MethodNode;
import io.netty.channel.ChannelHandler;
import io.netty.channel.ChannelOption;
import io.netty.channel.ChannelPipeline;
import io.netty.handler.codec.http.HttpServerKeepAliveHandler;
import java.util.List;

/**
 * A connection is closed after the answer if the client asks for it.
 *
 * <p>TorchServe keeps every connection open, and says so in its answers. A client that reads until the end of the
 * connection, as HTTP/1.0 and `Connection: close` allow, therefore waits until its own timeout.
 */
public final class Close implements Patch {
    @Override
    public String name() {
        return "close";
    }

    @Override
    public List<String> classes() {
        return List.of(Code.INITIALIZER);
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        MethodNode pipeline = Code.pipeline(code);
        Code.redirect(pipeline, Code.addedHandler(pipeline, "http"), Close.class, "addLast", false);
    }

    /** Add the parser of requests to a connection, and netty's own handler for the end of a connection. */
    public static ChannelPipeline addLast(ChannelPipeline pipeline, String name, ChannelHandler parser) {
        // TorchServe sets 0: the end of a connection would then discard what is not sent yet, and reset the connection
        pipeline.channel().config().setOption(ChannelOption.SO_LINGER, -1);
        return pipeline.addLast(name, parser).addLast("close", new HttpServerKeepAliveHandler());
    }
}
