package bundle.frontend;

import groovyjarjarasm.asm.Opcodes;
import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.FieldInsnNode;
import groovyjarjarasm.asm.tree.MethodInsnNode;
import groovyjarjarasm.asm.tree.MethodNode;
import io.netty.channel.ChannelHandler;
import io.netty.channel.ChannelPipeline;
import io.netty.util.concurrent.DefaultThreadFactory;
import io.netty.util.concurrent.EventExecutorGroup;
import io.netty.util.concurrent.NonStickyEventExecutorGroup;
import io.netty.util.concurrent.UnorderedThreadPoolEventExecutor;
import java.util.List;
import org.pytorch.serve.util.ConnectorType;

/**
 * A management call that waits for workers holds up no prediction.
 *
 * <p>TorchServe has a few threads that read and write all connections. A registration or scaling with
 * `synchronous=true` keeps one of them until the workers run, and predictions whose connections share that thread wait.
 * With this patch, calls on the management port run in threads of their own. Replicas and Parameters refuse some.
 */
public final class Management implements Patch {
    private static final String TYPE = "Lorg/pytorch/serve/util/ConnectorType;";
    private static final int THREADS = 8; // management calls at the same time; further ones wait

    @Override
    public String name() {
        return "management";
    }

    @Override
    public List<String> classes() {
        return List.of(Code.INITIALIZER);
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        MethodNode pipeline = Code.pipeline(code);
        MethodInsnNode added = Code.addedHandler(pipeline, "handler");
        MethodInsnNode ours = Code.redirect(pipeline, added, Management.class, "addLast", true);
        // not the object itself, but its field
        pipeline.instructions.insertBefore(
                ours, new FieldInsnNode(Opcodes.GETFIELD, Code.INITIALIZER, "connectorType", TYPE));
    }

    /** Add the handler of requests to a connection. */
    public static ChannelPipeline addLast(
            ChannelPipeline pipeline, String name, ChannelHandler handler, ConnectorType port) {
        return port == ConnectorType.MANAGEMENT_CONNECTOR
                ? Parameters.guard(Replicas.guard(pipeline)).addLast(Threads.GROUP, name, handler)
                : pipeline.addLast(name, handler);
    }

    /** Made when the first connection needs them. */
    private static final class Threads {
        // non-sticky: the calls of one connection keep their order, and those of others do not wait for them
        static final EventExecutorGroup GROUP = new NonStickyEventExecutorGroup(
                new UnorderedThreadPoolEventExecutor(THREADS, new DefaultThreadFactory("management", true)));
    }
}
