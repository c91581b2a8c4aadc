package bundle.frontend;

import bundle.frontend.Patch.Refusal;
import groovyjarjarasm.asm.tree.ClassNode;
import java.io.IOException;
import java.io.InputStream;
import java.lang.instrument.ClassFileTransformer;
import java.lang.instrument.Instrumentation;
import java.security.ProtectionDomain;
import java.util.Arrays;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.stream.Collectors;

/** Apply the patches to TorchServe's classes, and give the JVM the changed ones when it loads them. */
final class Patches implements ClassFileTransformer {
    private static final List<Patch> ALL = 
            List.of(
                    new Gather(),
                    new Overload(),
                    new Lost(),
                    new Timeouts(),
                    new Forms(),
                    new Drain(),
                    new Management(),
                    new Scaling(),
                    new Gzip(),
                    new Buckets(),
                    new Close(),
                    new Query(),
                    new Routes(),
                    new Grpc(),
                    new Oversized(),
                    new Registration());

    private final Map<String, byte[]> originals = new HashMap<>();
    private final Map<String, byte[]> changed = new HashMap<>();
    private final Map<String, String> states = new LinkedHashMap<>();

    Patches(Set<String> off) {
        for (Patch patch : ALL) {
            states.put(patch.name(), off.contains(patch.name()) || off.contains("all") ? "off" : apply(patch));
        }
        for (String name : off) {
            if (!name.equals("all") && !states.containsKey(name)) {
                states.put(name, "refused: there is no patch with this name (" + Agent.OFF + ")");
            }
        }
    }

    /** Return the state of each patch: "in", "off", or "refused: " and the reason. */
    Map<String, String> states() {
        return states;
    }

    /** Apply one patch to all of its classes, or to none. */
    private String apply(Patch patch) {
        Map<String, byte[]> results = new HashMap<>();
        for (String name : patch.classes()) {
            try {
                ClassNode code = Code.read(changed.containsKey(name) ? changed.get(name) : original(name));
                patch.change(code);
                results.put(name, Code.write(code));
            } catch (Exception | LinkageError error) {
                String reason = error instanceof Refusal ? error.getMessage() : error.toString();
                return "refused: " + name.replace('/', '.') + ": " + reason;
            }
        }
        changed.putAll(results);
        return "in";
    }

    private byte[] original(String name) throws Refusal {
        byte[] known = originals.get(name);
        if (known == null) {
            known = code(name);
            originals.put(name, known);
        }
        return known;
    }

    /** Return the code of a class as it is on the class path. */
    static byte[] code(String name) throws Refusal {
        try (InputStream file = ClassLoader.getSystemResourceAsStream(name + ".class")) {
            if (file == null) {
                throw new Refusal("the class is missing");
            }
            return file.readAllBytes();
        } catch (IOException error) {
            throw new Refusal(error.toString());
        }
    }

    /** Return the names of the classes that are loaded already, so that a change of them has no effect. */
    List<String> loadedTooEarly(Instrumentation instrumentation) {
        return Arrays.stream(instrumentation.getAllLoadedClasses())
                .map(loaded -> loaded.getName())
                .filter(name -> changed.containsKey(name.replace('.', '/')))
                .collect(Collectors.toList());
    }

    /**
     * Load each changed class, and have the JVM verify it.
     *
     * @throws LinkageError the JVM rejects a class
     */
    void verify() throws ClassNotFoundException {
        ClassLoader loader = new ClassLoader(Patches.class.getClassLoader()) {
            @Override
            protected Class<?> loadClass(String name, boolean resolve) throws ClassNotFoundException {
                if (!name.startsWith("org.pytorch.")) {
                    return super.loadClass(name, resolve);
                }
                Class<?> known = findLoadedClass(name); // all of them here, because they refer to each other
                return known != null ? known : define(name, name.replace('.', '/'));
            }

            private Class<?> define(String name, String path) throws ClassNotFoundException {
                try {
                    byte[] code = changed.containsKey(path) ? changed.get(path) : code(path);
                    return defineClass(name, code, 0, code.length);
                } catch (Refusal error) {
                    throw new ClassNotFoundException(name, error);
                }
            }
        };
        for (String name : changed.keySet()) {
            try {
                Class.forName(name.replace('/', '.'), true, loader);
            } catch (ExceptionInInitializerError error) {
                // the class was verified; its initializer needs a running TorchServe
            }
        }
    }

    /** Called by the JVM for each class that it loads; null leaves the class as it is. */
    @Override
    public byte[] transform(
            ClassLoader loader, String name, Class<?> redefined, ProtectionDomain domain, byte[] loaded) {
        byte[] replacement = changed.get(name);
        if (replacement != null && !Arrays.equals(loaded, originals.get(name))) {
            Agent.say("all", "refused: " + name.replace('/', '.') + ": another agent or class path has changed it");
            return null;
        }
        return replacement;
    }
}
