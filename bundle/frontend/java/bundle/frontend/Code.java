package bundle.frontend;

import bundle.frontend.Patch.Refusal;
import groovyjarjarasm.asm.ClassReader;
import groovyjarjarasm.asm.ClassWriter;
import groovyjarjarasm.asm.Opcodes;
import groovyjarjarasm.asm.Type;
import groovyjarjarasm.asm.tree.AbstractInsnNode;
import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.FieldInsnNode;
import groovyjarjarasm.asm.tree.FrameNode;
import groovyjarjarasm.asm.tree.InsnList;
import groovyjarjarasm.asm.tree.InsnNode;
import groovyjarjarasm.asm.tree.JumpInsnNode;
import groovyjarjarasm.asm.tree.LabelNode;
import groovyjarjarasm.asm.tree.LdcInsnNode;
import groovyjarjarasm.asm.tree.MethodInsnNode;
import groovyjarjarasm.asm.tree.MethodNode;
import groovyjarjarasm.asm.tree.TypeInsnNode;
import groovyjarjarasm.asm.tree.VarInsnNode;
import java.util.ArrayList;
import java.util.List;

/**
 * Find and change instructions.
 *
 * <p>The library is ASM, which is inside TorchServe's own jar (a part of Groovy), so that it need not be delivered
 * here. Every change replaces a call or the read of a field, or adds a call. None changes the types on the stack, so
 * the verification data of the JVM stay valid.
 */
final class Code {
    static final String HTTP_HANDLER = "org/pytorch/serve/http/HttpRequestHandler";
    static final String REST_JOB = "org/pytorch/serve/job/RestJob";
    static final String GRPC_JOB = "org/pytorch/serve/job/GRPCJob";
    static final String INITIALIZER = "org/pytorch/serve/ServerInitializer"; // of a connection
    static final String MODEL_MANAGER = "org/pytorch/serve/wlm/ModelManager";
    static final String NETTY = "org/pytorch/serve/util/NettyUtils";
    static final String WORKER = "org/pytorch/serve/wlm/WorkerThread";
    static final String GRPC_INFERENCE = "org/pytorch/serve/grpcimpl/InferenceImpl";
    static final String PREDICTION = "(Lorg/pytorch/serve/grpc/inference/PredictionsRequest;"
            + "Lio/grpc/stub/StreamObserver;Lorg/pytorch/serve/util/messages/WorkerCommands;)V";
    static final String REQUEST_PARSER = "org/pytorch/serve/http/api/rest/InferenceRequestHandler";
    static final String PARSE_REQUEST =
            "(Lio/netty/channel/ChannelHandlerContext;Lio/netty/handler/codec/http/FullHttpRequest;"
                    + "Lio/netty/handler/codec/http/QueryStringDecoder;)"
                    + "Lorg/pytorch/serve/util/messages/RequestInput;";
    static final String WORKFLOW_PARSER = "org/pytorch/serve/workflow/api/http/WorkflowInferenceRequestHandler";
    static final String PARSE_WORKFLOW_REQUEST =
            "(Lio/netty/channel/ChannelHandlerContext;Lio/netty/handler/codec/http/FullHttpRequest;)"
                    + "Lorg/pytorch/serve/util/messages/RequestInput;";
    static final String SEND_ERROR =
            "(Lio/netty/channel/ChannelHandlerContext;Lio/netty/handler/codec/http/HttpResponseStatus;"
                    + "Ljava/lang/Throwable;)V";

    private Code() {}

    static ClassNode read(byte[] bytes) {
        ClassNode code = new ClassNode();
        new ClassReader(bytes).accept(code, 0);
        return code;
    }

    static byte[] write(ClassNode code) {
        ClassWriter writer = new ClassWriter(ClassWriter.COMPUTE_MAXS);
        code.accept(writer);
        return writer.toByteArray();
    }

    /** Return the only method with this name and these parameters, such as "(JLjava/lang/String;)V". */
    static MethodNode method(ClassNode code, String name, String descriptor) throws Refusal {
        for (MethodNode method : code.methods) {
            if (method.name.equals(name) && method.desc.equals(descriptor)) {
                return method;
            }
        }
        throw new Refusal("method " + name + descriptor + " is missing");
    }

    /** Return the method of INITIALIZER that adds the handlers of a new connection. */
    static MethodNode pipeline(ClassNode initializer) throws Refusal {
        return method(initializer, "initChannel", "(Lio/netty/channel/Channel;)V");
    }

    /** Return the method of WORKER that changes the state of a worker. */
    static MethodNode setState(ClassNode worker) throws Refusal {
        return method(worker, "setState", "(Lorg/pytorch/serve/wlm/WorkerState;I)V");
    }

    /** Check that a class has a field that the patch reads later. */
    static void requireField(ClassNode code, String name) throws Refusal {
        if (code.fields.stream().noneMatch(field -> field.name.equals(name))) {
            throw new Refusal("field " + name + " is missing");
        }
    }

    /**
     * Return the calls of a method inside another method, in the order of the code.
     *
     * @param count how many there must be; 0 for one or more
     */
    static List<MethodInsnNode> calls(MethodNode in, String owner, String name, String descriptor, int count)
            throws Refusal {
        List<MethodInsnNode> found = new ArrayList<>();
        for (AbstractInsnNode instruction : in.instructions) {
            if (instruction instanceof MethodInsnNode) {
                MethodInsnNode call = (MethodInsnNode) instruction;
                if (call.owner.equals(owner) && call.name.equals(name) && call.desc.equals(descriptor)) {
                    found.add(call);
                }
            }
        }
        if (count == 0 ? found.isEmpty() : found.size() != count) {
            String expected = count == 0 ? "at least one" : String.valueOf(count);
            throw new Refusal(
                    in.name + " has " + found.size() + " calls of " + owner + "." + name + ", not " + expected);
        }
        return found;
    }

    /** Redirect every call of a method inside another method; there must be at least one. */
    static void redirectAll(
            MethodNode in, String owner, String called, String descriptor, Class<?> to, String name, boolean self)
            throws Refusal {
        for (MethodInsnNode call : calls(in, owner, called, descriptor, 0)) {
            redirect(in, call, to, name, self);
        }
    }

    /**
     * Make a call, or the read of a field, go to a static method of ours.
     *
     * <p>Ours gets the object that the method was called on, then the arguments. With `self`, it also gets the object
     * whose code this is, as its last parameter.
     */
    static MethodInsnNode redirect(MethodNode in, AbstractInsnNode from, Class<?> to, String name, boolean self)
            throws Refusal {
        if (self) {
            in.instructions.insertBefore(from, new VarInsnNode(Opcodes.ALOAD, 0));
        }
        String owner = Type.getInternalName(to);
        MethodInsnNode ours = new MethodInsnNode(Opcodes.INVOKESTATIC, owner, name, descriptor(owner, name));
        in.instructions.set(from, ours);
        return ours;
    }

    /**
     * Make the only read of an object's field inside a method go to a static method of ours, which gets the object.
     *
     * @param type the field's, such as "I" for int; our method returns the same
     */
    static void redirectRead(MethodNode in, String owner, String field, String type, Class<?> to, String name)
            throws Refusal {
        List<FieldInsnNode> found = new ArrayList<>();
        for (AbstractInsnNode instruction : in.instructions) {
            if (instruction.getOpcode() == Opcodes.GETFIELD) {
                FieldInsnNode read = (FieldInsnNode) instruction;
                if (read.owner.equals(owner) && read.name.equals(field) && read.desc.equals(type)) {
                    found.add(read);
                }
            }
        }
        if (found.size() != 1) {
            throw new Refusal(
                    in.name + " reads " + field + " of type " + type + " " + found.size() + " times, not once");
        }
        redirect(in, found.get(0), to, name, false);
    }

    /** Create an object of a subclass of ours, with the same arguments. */
    static void replaceNew(MethodInsnNode call, Class<?> to) throws Refusal {
        AbstractInsnNode create = call.getPrevious(); // new X, dup, the arguments, the call
        while (create != null && create.getOpcode() != Opcodes.NEW) {
            create = create.getPrevious();
        }
        if (create == null || !((TypeInsnNode) create).desc.equals(call.owner)) {
            throw new Refusal("the instruction that creates " + call.owner + " is missing");
        }
        call.owner = Type.getInternalName(to);
        ((TypeInsnNode) create).desc = call.owner;
    }

    /** Return the call that adds the handler with this name to a connection's pipeline. */
    static MethodInsnNode addedHandler(MethodNode in, String handler) throws Refusal {
        String added = "(Ljava/lang/String;Lio/netty/channel/ChannelHandler;)Lio/netty/channel/ChannelPipeline;";
        for (MethodInsnNode call : calls(in, "io/netty/channel/ChannelPipeline", "addLast", added, 0)) {
            AbstractInsnNode before = call;
            while (before != null && !(before instanceof LdcInsnNode)) {
                before = before.getPrevious();
            }
            if (before != null && handler.equals(((LdcInsnNode) before).cst)) {
                return call;
            }
        }
        throw new Refusal(in.name + " adds no handler with the name " + handler);
    }

    /**
     * Call a static method of ours at the beginning of a method.
     *
     * @param variables the numbers of the local variables that it gets; they must be objects
     */
    static void begin(MethodNode in, Class<?> to, String name, int... variables) throws Refusal {
        InsnList added = new InsnList();
        for (int variable : variables) {
            added.add(new VarInsnNode(Opcodes.ALOAD, variable));
        }
        String owner = Type.getInternalName(to);
        added.add(new MethodInsnNode(Opcodes.INVOKESTATIC, owner, name, descriptor(owner, name)));
        in.instructions.insert(added);
    }

    /**
     * Make a method that returns nothing return at once where a method of ours returns false.
     *
     * @param variables the numbers of the local variables that ours gets, such as 0 for the object whose method this is
     */
    static void guard(MethodNode in, Class<?> to, String name, int... variables) throws Refusal {
        InsnList added = new InsnList();
        LabelNode goesOn = new LabelNode();
        String owner = Type.getInternalName(to);
        for (int variable : variables) {
            added.add(new VarInsnNode(Opcodes.ALOAD, variable));
        }
        added.add(new MethodInsnNode(Opcodes.INVOKESTATIC, owner, name, descriptor(owner, name)));
        added.add(new JumpInsnNode(Opcodes.IFNE, goesOn));
        added.add(new InsnNode(Opcodes.RETURN));
        added.add(goesOn);
        added.add(new FrameNode(Opcodes.F_SAME, 0, null, 0, null)); // for the verifier: nothing has changed here
        in.instructions.insert(added);
    }

    /**
     * Redirect how TorchServe's HTTP handler answers one kind of error.
     *
     * @param status the name of the status that it answers with, such as "SERVICE_UNAVAILABLE"
     */
    static void redirectError(ClassNode handler, String status, Class<?> to, String name) throws Refusal {
        MethodNode read = method(
                handler,
                "channelRead0",
                "(Lio/netty/channel/ChannelHandlerContext;Lio/netty/handler/codec/http/FullHttpRequest;)V");
        for (AbstractInsnNode instruction : read.instructions) {
            // sendError(ctx, HttpResponseStatus.X, error): the status, the error, the call
            if (instruction instanceof FieldInsnNode && ((FieldInsnNode) instruction).name.equals(status)) {
                AbstractInsnNode call = instruction.getNext().getNext();
                if (call instanceof MethodInsnNode && ((MethodInsnNode) call).desc.equals(SEND_ERROR)) {
                    redirect(read, (MethodInsnNode) call, to, name, false);
                    return;
                }
            }
        }
        throw new Refusal("channelRead0 does not answer with " + status);
    }

    /**
     * Return the parameters and the result of a method of ours, from the code of its class.
     *
     * <p>Reflection would load the classes of the parameters, before they could be changed.
     */
    private static String descriptor(String owner, String name) throws Refusal {
        ClassNode code = read(Patches.code(owner));
        for (MethodNode method : code.methods) {
            if (method.name.equals(name) && (code.access & method.access & Opcodes.ACC_PUBLIC) != 0) {
                return method.desc;
            }
        }
        throw new Refusal("this jar has no public method " + owner + "." + name);
    }
}
