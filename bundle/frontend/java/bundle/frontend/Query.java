package bundle.frontend;

import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.MethodNode;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.QueryStringDecoder;
import java.util.List;
import org.pytorch.serve.http.BadRequestException;

/**
 * The query of a prediction (`?top_k=1`) reaches the handler, as the header `bundle-query`.
 *
 * <p>TorchServe ignores it there.
 */
public final class Query implements Patch {
    private static final String HEADER = "bundle-query";

    @Override
    public String name() {
        return "query";
    }

    @Override
    public List<String> classes() {
        return List.of(Code.REQUEST_PARSER);
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        MethodNode parse = Code.method(code, "parseRequest", Code.PARSE_REQUEST);
        Code.begin(parse, Query.class, "pass", 1, 2); // a static method's second and third parameter
    }

    /**
     * Write the query into a header, which replaces the client's own. Called before a request is parsed.
     *
     * @param passed what TorchServe makes parameters of; null on the routes that ignore the query
     */
    public static void pass(FullHttpRequest request, QueryStringDecoder passed) {
        request.headers().remove(HEADER);
        int start = request.uri().indexOf('?') + 1;
        if (passed == null && start > 0 && start < request.uri().length()) {
            try {
                request.headers().set(HEADER, request.uri().substring(start));
            } catch (IllegalArgumentException error) {
                throw new BadRequestException("The query has a control character. Percent-encode it.");
            }
        }
    }
}
