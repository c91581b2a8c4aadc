package bundle.frontend;

import groovyjarjarasm.asm.Opcodes;
import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.FieldInsnNode;
import groovyjarjarasm.asm.tree.MethodInsnNode;
import groovyjarjarasm.asm.tree.MethodNode;
import io.prometheus.client.Histogram;
import io.prometheus.client.SimpleCollector;
import java.util.List;

/**
 * Histograms have buckets that fit what they measure.
 *
 * <p>TorchServe gives all of them the default buckets of the Prometheus client, which are made for requests that take
 * seconds: 0.005 to 10. All batches over 10 requests share one bucket, and all times under 5 ms another.
 */
public final class Buckets implements Patch {
    private static final String HISTOGRAM = "org/pytorch/serve/metrics/format/prometheous/PrometheusHistogram";
    private static final double[] SECONDS = {
        0.00025, 0.0005, 0.001, 0.0025, // the defaults follow, so that queries which name one of them stay valid
        0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10
    };
    private static final double[] COUNT = {1, 2, 4, 8, 16, 32, 64, 128, 256};

    @Override
    public String name() {
        return "buckets";
    }

    @Override
    public List<String> classes() {
        return List.of(HISTOGRAM);
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        String parameters = "(Lorg/pytorch/serve/metrics/MetricBuilder$MetricType;"
                + "Ljava/lang/String;Ljava/lang/String;Ljava/util/List;)V";
        MethodNode constructor = Code.method(code, "<init>", parameters);
        String builder = "io/prometheus/client/Histogram$Builder";
        String result = "()Lio/prometheus/client/SimpleCollector;";
        MethodInsnNode register = Code.calls(constructor, builder, "register", result, 1).get(0);
        MethodInsnNode ours = Code.redirect(constructor, register, Buckets.class, "register", true);
        // not the object itself, but its field
        constructor.instructions.insertBefore(
                ours, new FieldInsnNode(Opcodes.GETFIELD, HISTOGRAM, "unit", "Ljava/lang/String;"));
    }

    /** Create a histogram. Called in place of `builder.register()`. */
    public static SimpleCollector<?> register(Histogram.Builder builder, String unit) {
        if (unit.equals("Seconds")) {
            builder.buckets(SECONDS);
        } else if (unit.equals("Count")) {
            builder.buckets(COUNT);
        }
        return builder.register();
    }
}
