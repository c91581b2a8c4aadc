package bundle.frontend;

import groovyjarjarasm.asm.tree.ClassNode;
import groovyjarjarasm.asm.tree.MethodNode;
import io.netty.buffer.ByteBuf;
import io.netty.buffer.Unpooled;
import io.netty.channel.ChannelHandlerContext;
import io.netty.handler.codec.DecoderException;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpHeaderValues;
import io.netty.handler.codec.http.HttpResponseStatus;
import io.netty.handler.codec.http.HttpUtil;
import io.netty.handler.codec.http.multipart.FileUpload;
import io.netty.handler.codec.http.multipart.HttpData;
import java.io.IOException;
import java.nio.charset.CharacterCodingException;
import java.nio.charset.Charset;
import java.nio.charset.StandardCharsets;
import java.util.Arrays;
import java.util.List;
import java.util.Locale;
import org.pytorch.serve.http.BadRequestException;
import org.pytorch.serve.util.ConfigManager;
import org.pytorch.serve.util.NettyUtils;

/**
 * `curl --data-binary @file` works without a Content-Type, a form that cannot be decoded is 400, and a part of a form
 * has the charset that it declares.
 *
 * <p>curl calls every body of `-d` and `--data-binary` a form (application/x-www-form-urlencoded). TorchServe answers a
 * photograph that is sent like that with 500 and a stack trace in its log. The charset of a part, such as
 * `curl -F "data=@text.txt;type=text/plain;charset=iso-8859-1"`, does not reach the handler, which expects UTF-8.
 */
public final class Forms implements Patch {
    private static final String PARTS = "io/netty/handler/codec/http/multipart/";

    @Override
    public String name() {
        return "forms";
    }

    @Override
    public List<String> classes() {
        return List.of(Code.REQUEST_PARSER, Code.HTTP_HANDLER, Code.NETTY);
    }

    @Override
    public void change(ClassNode code) throws Refusal {
        if (code.name.equals(Code.REQUEST_PARSER)) {
            MethodNode parse = Code.method(code, "parseRequest", Code.PARSE_REQUEST);
            Code.begin(parse, Forms.class, "check", 1); // a static method's second parameter: the request
        } else if (code.name.equals(Code.NETTY)) {
            String field = "(L" + PARTS + "InterfaceHttpData;)Lorg/pytorch/serve/util/messages/InputParameter;";
            MethodNode read = Code.method(code, "getFormData", field);
            for (String kind : List.of("Attribute", "FileUpload")) {
                String content = "()Lio/netty/buffer/ByteBuf;";
                Code.redirectAll(read, PARTS + kind, "getByteBuf", content, Forms.class, "content", false);
            }
        } else {
            Code.redirectError(code, "INTERNAL_SERVER_ERROR", Forms.class, "sendError");
        }
    }

    /** Give a body that is no form, although it is called one, its real type. Called before a request is parsed. */
    public static void check(FullHttpRequest request) {
        CharSequence type = HttpUtil.getMimeType(request);
        if (type != null && HttpHeaderValues.APPLICATION_X_WWW_FORM_URLENCODED.contentEqualsIgnoreCase(type)) {
            ByteBuf body = request.content();
            if (isJson(body)) {
                request.headers().set(HttpHeaderNames.CONTENT_TYPE, HttpHeaderValues.APPLICATION_JSON);
            } else if (isRaw(body)) {
                request.headers().set(HttpHeaderNames.CONTENT_TYPE, HttpHeaderValues.APPLICATION_OCTET_STREAM);
            }
        }
    }

    /** Return the content of a form's field: of a text, in UTF-8. */
    public static ByteBuf content(HttpData field) throws IOException {
        Charset charset = field.getCharset();
        boolean isText = !(field instanceof FileUpload)
                || String.valueOf(((FileUpload) field).getContentType()).toLowerCase(Locale.ROOT).startsWith("text/");
        if (!isText || charset == null || charset.equals(StandardCharsets.UTF_8)) {
            return field.getByteBuf();
        }
        try {
            byte[] text = charset.newDecoder()
                    .decode(field.getByteBuf().nioBuffer())
                    .toString()
                    .getBytes(StandardCharsets.UTF_8);
            if (text.length > ConfigManager.getInstance().getMaxRequestSize()) {
                throw new BadRequestException("The field \"" + field.getName() + "\" is too long in UTF-8.");
            }
            return Unpooled.wrappedBuffer(text);
        } catch (CharacterCodingException error) {
            throw new BadRequestException("The field \"" + field.getName() + "\" is not in " + charset + ".");
        }
    }

    /** Return whether the first visible character opens a JSON object or array. */
    private static boolean isJson(ByteBuf body) {
        int first = body.forEachByte(value -> value >= 0 && value <= ' ');
        return first >= 0 && (body.getByte(first) == '{' || body.getByte(first) == '[');
    }

    /** Return whether a body has no `name=value`, or something that is no text. */
    private static boolean isRaw(ByteBuf body) {
        if (!body.isReadable()) {
            return false; // a form without fields
        }
        int name = body.bytesBefore((byte) '='); // its length; -1 without the sign
        boolean controls = body.forEachByte(value -> value < 0 || value >= ' ' || Character.isWhitespace(value)) >= 0;
        if (name < 0 || controls) {
            return true;
        }
        try {
            StandardCharsets.UTF_8.newDecoder().decode(body.nioBuffer());
            return false;
        } catch (CharacterCodingException error) {
            // after a name, it is a field in another charset: the handler knows which, or says that it is missing
            return name == 0 || body.forEachByte(body.readerIndex(), name, Forms::isOfName) >= 0;
        }
    }

    private static boolean isOfName(byte value) {
        return value == '_' || value == '-' || value == '.' || Character.isLetterOrDigit(value);
    }

    /** Send the answer to a request that failed with 500. */
    public static void sendError(ChannelHandlerContext client, HttpResponseStatus status, Throwable error) {
        if (isOfForm(error)) {
            boolean explained = error instanceof DecoderException && error.getCause() == null;
            String why = explained ? error.getMessage() : "it is malformed";
            Answers.error(client, 400, "InvalidForm", "The form cannot be decoded: " + why, 0);
        } else {
            NettyUtils.sendError(client, status, error);
        }
    }

    /** Return whether the library that decodes forms failed. For some malformed forms, it raises IndexOutOfBounds. */
    private static boolean isOfForm(Throwable error) {
        return Arrays.stream(error.getStackTrace())
                .anyMatch(caller -> caller.getClassName().startsWith("io.netty.handler.codec.http.multipart."));
    }
}
