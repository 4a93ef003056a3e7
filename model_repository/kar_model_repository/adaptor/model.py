"""Owns the Triton model that adapts encodings: the hybrid-expert adaptor, on all rows of a batch of requests at once.

Inputs with `allow_ragged_batch` have a candidate axis [b, C, ...], the others one row per user [b, ...]; `b` is 1
unless a client sends several users, all with the same number of candidates. A bad request fails alone.

Every instance reports the implementation that it runs, in the log and on Triton's metrics page as
`kar_adaptor_info{model,instance,path,reason,dtype,device} 1`. The precision that the release asks for is a parameter of
the model's configuration.
"""

import json
import logging
import os
from pathlib import Path

import torch
import triton_python_backend_utils as pb_utils
from torch.utils.dlpack import to_dlpack

from kar_kernels import HybridExpertAdaptor

USERS, CANDIDATES = 1, 100
"""Size of the request that warms an instance; it decides which implementation the instance reports first."""


class TritonPythonModel:
    """One instance of the adaptor."""

    def initialize(self, args):
        """Load `adaptor.safetensors`, which lies beside this file, run it once and report its implementation."""
        config = json.loads(args["model_config"])
        parameters = {name: parameter["string_value"] for name, parameter in config["parameters"].items()}
        torch.set_num_threads(min(int(parameters["threads"]), len(os.sched_getaffinity(0))))
        on_gpu = args["model_instance_kind"] == "GPU"
        self.device = torch.device("cuda", int(args["model_instance_device_id"])) if on_gpu else torch.device("cpu")
        self.labels = {"model": args["model_name"], "instance": args["model_instance_name"], "device": str(self.device)}
        path = Path(__file__).with_name("adaptor.safetensors")
        dims = {tensor["name"]: int(tensor["dims"][-1]) for tensor in config["input"]}
        self.towers = [tensor["name"].removesuffix("_knowledge") for tensor in config["output"]]
        # The kernels log the implementation that they choose; what goes to stderr is in Triton's log.
        logging.basicConfig(format=f"{args['model_instance_name']}: %(message)s")
        logging.getLogger("kar_kernels").setLevel(logging.INFO)
        # Each instance is a process with its own gauge: the server would free a shared one when one instance ends.
        self.info = pb_utils.MetricFamily(
            name="kar_adaptor_info",
            description="Which implementation of the adaptor runs, and why",
            kind=pb_utils.MetricFamily.GAUGE,
        )
        self.choice = self.gauge = None
        try:
            adaptor = HybridExpertAdaptor.load(path)
            if adaptor.precision != parameters["precision"]:
                raise ValueError(f"its precision is {adaptor.precision}, not {parameters['precision']}")
            self.adaptor = adaptor.to(self.device).freeze()
            rows = {"user": (USERS,), "item": (USERS, CANDIDATES)}
            self._vectors(
                [
                    {f"{tower}_encoding": torch.zeros(*rows[tower], dims[f"{tower}_encoding"]) for tower in self.towers}
                    | {f"{tower}_present": torch.ones(rows[tower], dtype=torch.bool) for tower in self.towers}
                ]
            )
        except Exception as error:
            raise pb_utils.TritonModelException(f"{path} is not an adaptor that fits config.pbtxt: {error}") from error

    def finalize(self):
        """Remove this instance's gauge, which Triton would go on showing; a gauge must go before its metric family."""
        self.gauge = None
        self.info = None

    def execute(self, requests):
        """Answer every request; rows of all requests, of users and of items, run together."""
        inputs = [self._read(request) for request in requests]  # tensors, or the reason of an error
        valid = [tensors for tensors in inputs if isinstance(tensors, dict)]
        answers = iter(self._vectors(valid) if valid else ())
        return [_response(tensors if isinstance(tensors, str) else next(answers)) for tensors in inputs]

    def _read(self, request):
        """Tensors of one request by name, or the reason why it cannot be answered."""
        names = [f"{tower}_{part}" for tower in self.towers for part in ("encoding", "present")]
        # The backend was built for numpy 1: under numpy 2 its `as_numpy` repeats the first element; DLPack works.
        tensors = {name: torch.from_dlpack(pb_utils.get_input_tensor_by_name(request, name)) for name in names}
        if "item" not in self.towers:
            return tensors
        encoded, present = tensors["item_encoding"].shape[:2], tensors["item_present"].shape
        if encoded != present or not present[1]:
            return (
                f"item_encoding has {encoded[1]} candidates, item_present {present[1]}: send the same number in both, "
                "at least one"
            )
        return tensors

    def _vectors(self, batch):
        """Knowledge vectors of each request by tower, [b, K] or [b, C, K]."""
        encodings = {
            tower: (
                torch.cat([tensors[f"{tower}_encoding"].flatten(0, -2) for tensors in batch]).to(self.device),
                torch.cat([tensors[f"{tower}_present"].flatten() for tensors in batch]).to(self.device),
            )
            for tower in self.towers
        }
        answers = [{} for _ in batch]
        for tower, vectors in self.adaptor.adapt(encodings).items():
            shapes = [tensors[f"{tower}_encoding"].shape[:-1] for tensors in batch]
            parts = vectors.float().cpu().split([shape.numel() for shape in shapes])
            for answer, part, shape in zip(answers, parts, shapes, strict=True):
                answer[tower] = part.unflatten(0, shape)
        self._report(self.adaptor.choice(sum(len(encoding) for encoding, _ in encodings.values())))
        return answers

    def _report(self, choice):
        """Show the implementation of this batch on the metrics page, if another one is shown there."""
        if choice == self.choice:
            return
        dtype = str(self.adaptor.weights.first.dtype).removeprefix("torch.")
        self.choice, self.gauge = choice, None
        self.gauge = self.info.Metric(
            labels=self.labels | {"path": choice.path, "reason": choice.reason, "dtype": dtype}
        )
        self.gauge.set(1)


def _response(vectors):
    if isinstance(vectors, str):
        return pb_utils.InferenceResponse([], pb_utils.TritonError(vectors, pb_utils.TritonError.INVALID_ARG))
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor.from_dlpack(f"{tower}_knowledge", to_dlpack(value)) for tower, value in vectors.items()]
    )
