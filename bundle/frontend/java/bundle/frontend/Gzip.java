package bundle.frontend;

import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.MethodNode;
import io.netty.buffer.ByteBufInputStream;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpHeaderValues;
import java.io.IOException;
import java.io.InputStream;
import java.util.List;
import java.util.zip.GZIPInputStream;
import org.pytorch.serve.http.BadRequestException;
import org.pytorch.serve.util.ConfigManager;

/** Bodies of predictions with `Content-Encoding: gzip` are decompressed; max_request_size limits the result, too. */
public final class Gzip implements Patch {
    @Override
    public String name() {
        return "gzip";
    }

    @Override
    public List<String> classes() {
        return List.of(Code.REQUEST_PARSER);
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        MethodNode parse = Code.method(code, "parseRequest", Code.PARSE_REQUEST);
        Code.begin(parse, Gzip.class, "decompress", 1); // a static method's second parameter: the request
    }

    /** Decompress a request's body in place. Called before the request is parsed. */
    public static void decompress(FullHttpRequest request) {
        if (!request.headers().contains(HttpHeaderNames.CONTENT_ENCODING, HttpHeaderValues.GZIP, true)) {
            return;
        }
        int limit = ConfigManager.getInstance().getMaxRequestSize();
        try (InputStream body = new GZIPInputStream(new ByteBufInputStream(request.content().duplicate()))) {
            byte[] bytes = body.readNBytes(limit);
            if (body.read() >= 0) {
                throw new BadRequestException("The decompressed body has more than " + limit + " bytes.");
            }
            request.content().clear().writeBytes(bytes);
            request.headers().remove(HttpHeaderNames.CONTENT_ENCODING);
            request.headers().set(HttpHeaderNames.CONTENT_LENGTH, bytes.length);
        } catch (IOException error) {
            throw new BadRequestException("The body is not gzip, as Content-Encoding says: " + error.getMessage());
        }
    }
}
