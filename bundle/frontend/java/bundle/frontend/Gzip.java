package bundle.frontend;

import groovyjarjarasm.asm.Opcodes;
import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.InsnList;
import groovyjarjarasm.asm.tree.MethodInsnNode;
import groovyjarjarasm.asm.tree.MethodNode;
import groovyjarjarasm.asm.tree.VarInsnNode;
import io.netty.buffer.ByteBufInputStream;
import io.netty.buffer.Unpooled;
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
        InsnList added = new InsnList(); // request = Gzip.decompressed(request)
        added.add(new VarInsnNode(Opcodes.ALOAD, 1));
        String request = "Lio/netty/handler/codec/http/FullHttpRequest;";
        added.add(new MethodInsnNode(
                Opcodes.INVOKESTATIC, "bundle/frontend/Gzip", "decompressed", "(" + request + ")" + request));
        added.add(new VarInsnNode(Opcodes.ASTORE, 1));
        parse.instructions.insert(added);
    }

    /** Return the request with its decompressed body, or the request itself. */
    public static FullHttpRequest decompressed(FullHttpRequest request) {
        if (!request.headers().contains(HttpHeaderNames.CONTENT_ENCODING, HttpHeaderValues.GZIP, true)) {
            return request;
        }
        int limit = ConfigManager.getInstance().getMaxRequestSize();
        try (InputStream body = new GZIPInputStream(new ByteBufInputStream(request.content().duplicate()))) {
            byte[] bytes = body.readNBytes(limit);
            if (body.read() >= 0) {
                throw new BadRequestException("The decompressed body has more than " + limit + " bytes.");
            }
            FullHttpRequest result = request.replace(Unpooled.wrappedBuffer(bytes));
            result.headers().remove(HttpHeaderNames.CONTENT_ENCODING);
            result.headers().set(HttpHeaderNames.CONTENT_LENGTH, bytes.length);
            return result;
        } catch (IOException error) {
            throw new BadRequestException("The body is not gzip, as Content-Encoding says: " + error.getMessage());
        }
    }
}
