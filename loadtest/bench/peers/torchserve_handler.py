"""TorchServe: a handler like that of its example for MNIST, which decodes one request after the other."""

import torch
from ts.torch_handler.base_handler import BaseHandler

from loadtest.bench.pipeline import Pipeline


class Handler(BaseHandler):
    def initialize(self, context):
        settings = context.model_yaml_config["handler"]
        self.pipeline = Pipeline(settings["case"], settings["threads"])
        self.model = self.pipeline.model
        self.device = torch.device("cpu")
        self.initialized = True

    def preprocess(self, data):
        samples = []
        for row in data:
            body = row.get("data") or row.get("body")
            samples.append(self.pipeline.decode(body.encode() if isinstance(body, str) else body))
        return samples

    def inference(self, data):
        return self.pipeline.predict(data)

    def postprocess(self, data):
        return data
