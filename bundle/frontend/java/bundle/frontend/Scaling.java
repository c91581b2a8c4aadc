package bundle.frontend;

import groovyjarjarasm.asm.Opcodes;
import groovyjarjarasm.asm.tree.AbstractInsnNode;
import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.MethodInsnNode;
import groovyjarjarasm.asm.tree.MethodNode;
import java.util.List;
import java.util.concurrent.CopyOnWriteArrayList;

/**
 * The list of a model's workers can be read while the model is scaled.
 *
 * <p>TorchServe's is a plain list. A call such as /ping that reads it while another call changes it fails with
 * ConcurrentModificationException.
 */
public final class Scaling implements Patch {
    @Override
    public String name() {
        return "scaling";
    }

    @Override
    public List<String> classes() {
        return List.of("org/pytorch/serve/wlm/WorkLoadManager");
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        // the compiler's name for `k -> new ArrayList<>()` in modelChanged
        MethodNode make = Code.method(
                code, "lambda$modelChanged$0", "(Lorg/pytorch/serve/wlm/ModelVersionName;)Ljava/util/List;");
        Code.calls(make, "java/util/ArrayList", "<init>", "()V", 1);
        for (AbstractInsnNode instruction : make.instructions) {
            if (instruction.getOpcode() == Opcodes.ARETURN) {
                make.instructions.insertBefore(
                        instruction,
                        new MethodInsnNode(
                                Opcodes.INVOKESTATIC,
                                "bundle/frontend/Scaling",
                                "concurrent",
                                "(Ljava/util/List;)Ljava/util/List;"));
            }
        }
    }

    /** Return a list with the same elements, whose readers see one moment of it. */
    public static <T> List<T> concurrent(List<T> list) {
        return new CopyOnWriteArrayList<>(list);
    }
}
