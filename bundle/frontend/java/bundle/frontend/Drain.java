package bundle.frontend;

import groovyjarjarasm.asm.Opcodes;
import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.InsnList;
import groovyjarjarasm.asm.tree.MethodInsnNode;
import groovyjarjarasm.asm.tree.MethodNode;
import groovyjarjarasm.asm.tree.VarInsnNode;
import io.grpc.Server;
import io.netty.channel.ChannelFuture;
import java.lang.reflect.Field;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import org.pytorch.serve.ModelServer;
import org.pytorch.serve.util.ServerGroups;
import org.pytorch.serve.wlm.Batch;
import org.pytorch.serve.wlm.Model;
import org.pytorch.serve.wlm.ModelManager;
import org.pytorch.serve.wlm.ModelVersionedRefs;
import org.pytorch.serve.wlm.WorkerThread;

/**
 * SIGTERM: accept no more connections, answer what was accepted, then end.
 *
 * <p>TorchServe drops the requests in its queue and in its workers. This waits for them, up to 25 seconds, because
 * Kubernetes sends SIGKILL after 30. HTTP clients that keep their connections open get `Connection: close`; a new
 * gRPC call is UNAVAILABLE.
 */
public final class Drain implements Patch {
    private static final String SERVER = "org/pytorch/serve/ModelServer";
    private static final String PORTS = "futures"; // fields of the server
    private static final List<String> GRPC_PORTS = List.of("inferencegRPCServer", "managementgRPCServer");
    private static final String GROUPS = "org/pytorch/serve/util/ServerGroups";
    private static final long LONGEST_SECONDS = 25;
    private static final int QUIET_MILLISECONDS = 200; // time without a request after which there are no more
    private static final int STEP_MILLISECONDS = 20;
    private static final CountDownLatch DONE = new CountDownLatch(1);
    private static volatile boolean draining;

    @Override
    public String name() {
        return "drain";
    }

    @Override
    public List<String> classes() {
        return List.of(SERVER, Code.NETTY);
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        if (code.name.equals(SERVER)) {
            Code.requireField(code, PORTS);
            for (String port : GRPC_PORTS) {
                Code.requireField(code, port);
            }
            Code.begin(Code.method(code, "stop", "()V"), Drain.class, "drain", 0);
            MethodNode start = Code.method(code, "startAndWait", "()V");
            Code.redirectAll(start, GROUPS, "shutdown", "(Z)V", Drain.class, "shutdown", false);
            return;
        }
        String answer = "Lio/netty/handler/codec/http/HttpResponse;";
        String client = "Lio/netty/channel/ChannelHandlerContext;";
        MethodNode send = Code.method(code, "sendHttpResponse", "(" + client + answer + "Z)V");
        InsnList added = new InsnList(); // keepAlive = Drain.keepAlive(keepAlive)
        added.add(new VarInsnNode(Opcodes.ILOAD, 2));
        added.add(new MethodInsnNode(Opcodes.INVOKESTATIC, "bundle/frontend/Drain", "keepAlive", "(Z)Z"));
        added.add(new VarInsnNode(Opcodes.ISTORE, 2));
        send.instructions.insert(added);
    }

    /** Return whether a connection stays open after an answer. */
    public static boolean keepAlive(boolean wanted) {
        return wanted && !draining;
    }

    /** Wait until all requests are answered. Called when Java has received SIGTERM, before TorchServe stops. */
    public static void drain(ModelServer server) {
        draining = true;
        try {
            List<Server> grpc = closePorts(server);
            long end = System.nanoTime() + TimeUnit.SECONDS.toNanos(LONGEST_SECONDS);
            int quiet = 0;
            while (quiet < QUIET_MILLISECONDS && System.nanoTime() < end) {
                Thread.sleep(STEP_MILLISECONDS);
                quiet = isIdle() ? quiet + STEP_MILLISECONDS : 0;
            }
            for (Server port : grpc) { // TorchServe waits without a limit
                port.awaitTermination(Math.max(0, end - System.nanoTime()), TimeUnit.NANOSECONDS);
                port.shutdownNow();
            }
        } catch (ReflectiveOperationException | RuntimeException error) {
            Agent.say("drain", "failed: " + error); // TorchServe stops as it always did
        } catch (InterruptedException error) {
            Thread.currentThread().interrupt();
        } finally {
            DONE.countDown();
        }
    }

    /** End the threads of connections. TorchServe's main thread calls this as soon as the ports are closed. */
    public static void shutdown(ServerGroups groups, boolean graceful) throws InterruptedException {
        if (draining) {
            DONE.await();
        }
        groups.shutdown(graceful);
    }

    /** Close all ports, and return those of gRPC, which may still answer calls. */
    private static List<Server> closePorts(ModelServer server) throws ReflectiveOperationException {
        for (Object port : (List<?>) read(server, PORTS)) {
            ((ChannelFuture) port).channel().close();
        }
        List<Server> grpc = new ArrayList<>();
        for (String name : GRPC_PORTS) {
            Server port = (Server) read(server, name);
            if (port != null) {
                grpc.add(port.shutdown());
            }
        }
        return grpc;
    }

    private static Object read(ModelServer server, String name) throws ReflectiveOperationException {
        Field field = ModelServer.class.getDeclaredField(name);
        field.setAccessible(true);
        return field.get(server);
    }

    /** Return whether no model has a request in its queue or in a worker. */
    private static boolean isIdle() {
        ModelManager manager = ModelManager.getInstance();
        for (Map.Entry<String, ModelVersionedRefs> versions : manager.getAllModels()) {
            for (Map.Entry<String, Model> version : versions.getValue().getAllVersions()) {
                Model model = version.getValue();
                if (model.getPendingRequestsInJobQueue() > 0) {
                    return false;
                }
                for (WorkerThread worker : manager.getWorkers(model.getModelVersionName())) {
                    if (worker.isRunning() && Batch.isBusy(worker)) {
                        return false;
                    }
                }
            }
        }
        return true;
    }
}
