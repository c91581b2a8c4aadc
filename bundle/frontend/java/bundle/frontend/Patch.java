package bundle.frontend;

import groovyjarjarasm.asm.tree.ClassNode;
import java.util.List;

/**
 * One repair of TorchServe's frontend.
 *
 * <p>A patch changes classes before the JVM loads them. It finds the places by what the compiled code does there, such
 * as "the third call of LinkedBlockingDeque.poll in Model.pollBatch", and makes it call a method of ours instead. If it
 * does not find exactly what it expects, it throws Refusal, and no class is changed.
 */
interface Patch {
    /** The name in the log, in `make status` and in BUNDLE_FRONTEND_OFF. */
    String name();

    /** The classes that it changes, such as "org/pytorch/serve/wlm/Model". */
    List<String> classes();

    /** Change one of these classes. */
    void change(ClassNode code) throws Refusal;

    /** A class is not as the patch expects it. */
    class Refusal extends Exception {
        Refusal(String message) {
            super(message);
        }
    }
}
