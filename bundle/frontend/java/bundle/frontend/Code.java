package bundle.frontend;

import bundle.frontend.Patch.Refusal;
import groovyjarjarasm.asm.ClassReader;
import groovyjarjarasm.asm.ClassWriter;
import groovyjarjarasm.asm.Opcodes;
import groovyjarjarasm.asm.Type;
import groovyjarjarasm.asm.tree.AbstractInsnNode;
import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.MethodInsnNode;
import groovyjarjarasm.asm.tree.MethodNode;
import groovyjarjarasm.asm.tree.VarInsnNode;
import java.util.ArrayList;
import java.util.List;

/**
 * Find and change instructions.
 *
 * <p>The library is ASM, which is inside TorchServe's own jar (a part of Groovy), so that it need not be delivered here.
 * Every change replaces a call, or adds one. Neither changes the types on the stack, so the JVM's verification data stay
 * valid.
 */
final class Code {
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

    /**
     * Make a call go to a static method of ours.
     *
     * <p>Ours gets the object that the method was called on, then the arguments. With `self`, it also gets the object
     * whose code this is, as its last parameter.
     */
    static void redirect(MethodNode in, MethodInsnNode call, Class<?> to, String name, boolean self) throws Refusal {
        if (self) {
            in.instructions.insertBefore(call, new VarInsnNode(Opcodes.ALOAD, 0));
        }
        String owner = Type.getInternalName(to);
        in.instructions.set(call, new MethodInsnNode(Opcodes.INVOKESTATIC, owner, name, descriptor(owner, name)));
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
