package bundle.frontend;

import java.lang.instrument.Instrumentation;
import java.util.Arrays;
import java.util.HashSet;
import java.util.Set;

/**
 * The entry of this jar. `java -javaagent:frontend.jar ...` calls `premain` before TorchServe's own `main`.
 *
 * <p>Whatever goes wrong here, TorchServe starts all the same, without the patches that did not work. (Java itself does
 * not start without the jar or its own module java.instrument; bundle/server checks that before.) Each patch has one
 * line on standard output, which bundle/server/frontend.py reads.
 */
public final class Agent {
    static final String OFF = "BUNDLE_FRONTEND_OFF";

    private Agent() {}

    /**
     * @param arguments what follows the jar's name: off=gather+overload
     */
    public static void premain(String arguments, Instrumentation instrumentation) {
        try {
            Patches patches = new Patches(off(arguments));
            instrumentation.addTransformer(patches);
            patches.states().forEach(Agent::say);
            for (String name : patches.loadedTooEarly(instrumentation)) {
                say("all", "refused: " + name + " was loaded before it could be changed");
            }
        } catch (Throwable error) {
            say("all", "refused: " + error);
        }
    }

    /**
     * Show the state of each patch for the TorchServe on the class path, without starting it.
     *
     * @param arguments "verify" to have the JVM verify the changed classes, too
     */
    public static void main(String[] arguments) throws ClassNotFoundException {
        Patches patches = new Patches(off(null));
        patches.states().forEach(Agent::say);
        if (arguments.length > 0 && arguments[0].equals("verify")) {
            patches.verify();
        }
    }

    static void say(String patch, String state) {
        System.out.println("frontend patch " + patch + ": " + state);
    }

    /** Return the names of the patches to leave out, from the argument and from the environment. */
    private static Set<String> off(String arguments) {
        String given = arguments != null && arguments.startsWith("off=") ? arguments.substring(4) : "";
        String environment = System.getenv().getOrDefault(OFF, "");
        Set<String> names = new HashSet<>(Arrays.asList((given + " " + environment).split("[ ,+]+")));
        names.remove("");
        return names;
    }
}
