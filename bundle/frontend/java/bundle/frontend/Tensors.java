package bundle.frontend;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonNull;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import com.google.gson.JsonPrimitive;
import com.google.protobuf.ByteString;
import com.google.protobuf.UnknownFieldSet;
import java.math.BigInteger;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.util.List;
import java.util.Map;
import java.util.UUID;
import java.util.function.BiConsumer;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.InferParameter;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.InferTensorContents;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ModelInferRequest;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ModelInferRequest.InferInputTensor;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ModelInferRequest.InferRequestedOutputTensor;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ModelInferResponse;
import org.pytorch.serve.grpc.openinference.OpenInferenceGrpc.ModelInferResponse.InferOutputTensor;
import org.pytorch.serve.http.BadRequestException;
import org.pytorch.serve.util.ConfigManager;
import org.pytorch.serve.util.messages.InputParameter;
import org.pytorch.serve.util.messages.RequestInput;

/**
 * Requests and answers of the Open Inference Protocol, from gRPC to HTTP and back.
 *
 * <p>Over HTTP, a request is JSON, and the bytes of its tensors follow. The handler checks whether they fit together.
 */
final class Tensors {
    private static final String JSON_SIZE = "Inference-Header-Content-Length";
    private static final String SIZE = "binary_data_size";
    // as in the handler; a few bytes of a message can become many of JSON
    private static final int MOST = 100;
    private static final int MOST_DIMENSIONS = 8;
    private static final int MOST_TEXT = 1 << 20; // bytes; a control character becomes six of JSON

    private Tensors() {}

    /** Return the input of the worker. */
    static RequestInput request(ModelInferRequest sent) {
        checkCount(sent.getInputsCount(), MOST, "inputs");
        checkCount(sent.getOutputsCount(), MOST, "outputs");
        checkText(sent);
        boolean raw = sent.getRawInputContentsCount() > 0;
        if (raw && sent.getRawInputContentsCount() != sent.getInputsCount()) {
            throw new BadRequestException("raw_input_contents must have one element for each input.");
        }
        JsonObject json = new JsonObject();
        if (!sent.getId().isEmpty()) {
            json.addProperty("id", sent.getId());
        }
        json.add("parameters", parameters(sent.getParametersMap(), "binary_data_output", new JsonPrimitive(true)));
        JsonArray inputs = new JsonArray();
        ByteString contents = ByteString.EMPTY;
        for (InferInputTensor tensor : sent.getInputsList()) {
            if (raw && tensor.getContents().getSerializedSize() > 0) {
                throw new BadRequestException("Send the elements of all inputs in raw_input_contents, or of none.");
            }
            ByteString content = raw ? sent.getRawInputContents(inputs.size()) : packed(tensor);
            JsonObject input = named(tensor.getName());
            input.addProperty("datatype", tensor.getDatatype());
            checkCount(tensor.getShapeCount(), MOST_DIMENSIONS, "dimensions");
            JsonArray shape = new JsonArray();
            tensor.getShapeList().forEach(shape::add);
            input.add("shape", shape);
            input.add("parameters", parameters(tensor.getParametersMap(), SIZE, new JsonPrimitive(content.size())));
            inputs.add(input);
            contents = contents.concat(content);
            checkSize(contents.size());
        }
        json.add("inputs", inputs);
        if (sent.getOutputsCount() > 0) {
            JsonArray outputs = new JsonArray();
            for (InferRequestedOutputTensor tensor : sent.getOutputsList()) {
                JsonObject output = named(tensor.getName());
                output.add(
                        "parameters", parameters(tensor.getParametersMap(), "binary_data", new JsonPrimitive(true)));
                outputs.add(output);
            }
            json.add("outputs", outputs);
        }
        ByteString text = ByteString.copyFromUtf8(json.toString());
        RequestInput input = new RequestInput(UUID.randomUUID().toString());
        input.updateHeaders(Routes.PROTOCOL, "v2");
        input.updateHeaders(JSON_SIZE, String.valueOf(text.size()));
        byte[] body = text.concat(contents).toByteArray();
        input.addParameter(new InputParameter("body", body, "application/octet-stream"));
        return input;
    }

    /** Return the worker's answer, whose tensors are all binary. */
    static ModelInferResponse response(byte[] body, Map<String, String> headers) {
        int at = Integer.parseInt(headers.get(JSON_SIZE));
        String text = new String(body, 0, at, StandardCharsets.UTF_8);
        JsonObject json = JsonParser.parseString(text).getAsJsonObject();
        ModelInferResponse.Builder answer = ModelInferResponse.newBuilder()
                .setModelName(json.get("model_name").getAsString())
                .setModelVersion(json.get("model_version").getAsString());
        if (json.has("id")) {
            answer.setId(json.get("id").getAsString());
        }
        for (JsonElement each : json.getAsJsonArray("outputs")) {
            JsonObject output = each.getAsJsonObject();
            InferOutputTensor.Builder tensor = answer.addOutputsBuilder()
                    .setName(output.get("name").getAsString())
                    .setDatatype(output.get("datatype").getAsString());
            output.getAsJsonArray("shape").forEach(size -> tensor.addShape(size.getAsLong()));
            int size = output.getAsJsonObject("parameters").get(SIZE).getAsInt();
            answer.addRawOutputContents(ByteString.copyFrom(body, at, size));
            at += size;
        }
        return answer.build();
    }

    private static JsonObject named(String name) {
        JsonObject tensor = new JsonObject();
        tensor.addProperty("name", name);
        return tensor;
    }

    /** Return parameters in JSON, and one of ours, which replaces the client's own. */
    private static JsonObject parameters(Map<String, InferParameter> sent, String name, JsonPrimitive value) {
        checkCount(sent.size(), MOST, "parameters");
        JsonObject json = new JsonObject();
        sent.forEach((key, each) -> json.add(key, value(each)));
        json.add(name, value);
        return json;
    }

    private static JsonElement value(InferParameter sent) {
        switch (sent.getParameterChoiceCase()) {
            case BOOL_PARAM:
                return new JsonPrimitive(sent.getBoolParam());
            case INT64_PARAM:
                return new JsonPrimitive(sent.getInt64Param());
            case STRING_PARAM:
                return new JsonPrimitive(sent.getStringParam());
            default: // the protocol got two more kinds, which TorchServe's messages do not have
                UnknownFieldSet more = sent.getUnknownFields();
                for (long bits : more.getField(4).getFixed64List()) {
                    return new JsonPrimitive(Double.longBitsToDouble(bits));
                }
                for (long bits : more.getField(5).getVarintList()) {
                    return new JsonPrimitive(new BigInteger(Long.toUnsignedString(bits)));
                }
                return JsonNull.INSTANCE;
        }
    }

    /** Return the raw bytes of a tensor whose elements were sent as numbers, or as a list of bytes. */
    private static ByteString packed(InferInputTensor tensor) {
        InferTensorContents sent = tensor.getContents();
        switch (tensor.getDatatype()) {
            case "BOOL":
                return packed(1, sent.getBoolContentsList(), (to, each) -> to.put((byte) (each ? 1 : 0)));
            case "UINT8":
                return packed(1, sent.getUintContentsList(), (to, each) -> to.put((byte) between(0, each, 0xFF)));
            case "UINT16":
                return packed(
                        2, sent.getUintContentsList(), (to, each) -> to.putShort((short) between(0, each, 0xFFFF)));
            case "UINT32":
                return packed(4, sent.getUintContentsList(), ByteBuffer::putInt);
            case "UINT64":
                return packed(8, sent.getUint64ContentsList(), ByteBuffer::putLong);
            case "INT8":
                return packed(1, sent.getIntContentsList(), (to, each) -> to.put((byte) between(-0x80, each, 0x7F)));
            case "INT16":
                return packed(2, sent.getIntContentsList(), (to, each) ->
                        to.putShort((short) between(-0x8000, each, 0x7FFF)));
            case "INT32":
                return packed(4, sent.getIntContentsList(), ByteBuffer::putInt);
            case "INT64":
                return packed(8, sent.getInt64ContentsList(), ByteBuffer::putLong);
            case "FP32":
                return packed(4, sent.getFp32ContentsList(), ByteBuffer::putFloat);
            case "FP64":
                return packed(8, sent.getFp64ContentsList(), ByteBuffer::putDouble);
            case "BYTES":
                return packedBytes(sent.getBytesContentsList());
            default: // FP16 has raw contents only; the handler rejects the others
                return ByteString.EMPTY;
        }
    }

    private static <T> ByteString packed(int size, List<T> elements, BiConsumer<ByteBuffer, T> put) {
        checkSize((long) size * elements.size()); // 8 bytes of a tensor may be a single one of the message
        ByteBuffer bytes = ByteBuffer.allocate(size * elements.size()).order(ByteOrder.LITTLE_ENDIAN);
        elements.forEach(each -> put.accept(bytes, each));
        return ByteString.copyFrom(bytes.array());
    }

    /** Return elements of BYTES, each with its length before it. */
    private static ByteString packedBytes(List<ByteString> elements) {
        long size = 0;
        for (ByteString each : elements) {
            size += Integer.BYTES + each.size();
        }
        checkSize(size);
        ByteBuffer bytes = ByteBuffer.allocate((int) size).order(ByteOrder.LITTLE_ENDIAN);
        elements.forEach(each -> each.copyTo(bytes.putInt(each.size())));
        return ByteString.copyFrom(bytes.array());
    }

    private static int between(int least, int value, int most) {
        if (value < least || value > most) {
            throw new BadRequestException("An input has a number that its datatype does not have.");
        }
        return value;
    }

    private static void checkCount(int count, int most, String what) {
        if (count > most) {
            throw new BadRequestException("At most " + most + " " + what + " are accepted, not " + count + ".");
        }
    }

    /** Check the size of what becomes JSON: everything but the elements. */
    private static void checkText(ModelInferRequest sent) {
        long bytes = sent.getSerializedSize();
        for (ByteString each : sent.getRawInputContentsList()) {
            bytes -= each.size();
        }
        for (InferInputTensor each : sent.getInputsList()) {
            bytes -= each.getContents().getSerializedSize();
        }
        if (bytes > MOST_TEXT) {
            throw new BadRequestException("The id, names and parameters have more than " + MOST_TEXT + " bytes.");
        }
    }

    private static void checkSize(long bytes) {
        if (bytes > ConfigManager.getInstance().getMaxRequestSize()) {
            throw new BadRequestException("The tensors have more bytes than max_request_size allows.");
        }
    }
}
