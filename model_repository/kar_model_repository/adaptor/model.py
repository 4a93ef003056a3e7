"""Owns the Triton model that adapts encodings: the hybrid-expert adaptor, on all rows of a batch of requests at once.

Inputs with `allow_ragged_batch` have a candidate axis [b, C, ...], the others one row a user [b, ...]; `b` is 1 but
for clients that send several users with equally many candidates. A bad request gets an error of its own.

What runs is on Triton's Prometheus page, as `kar_adaptor_info{model,instance,path,reason,dtype,device} 1` of every
instance, and in the log. The precision that the release asks for is a parameter of the model's configuration.
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
"""The request that warms an instance, and whose rows decide which implementation it tells of first."""


class TritonPythonModel:
    """One instance of the adaptor."""

    def initialize(self, args):
        """Load `adaptor.safetensors`, which lies beside this file, run it once and tell which implementation ran."""
        config = json.loads(args["model_config"])
        parameters = {name: one["string_value"] for name, one in config["parameters"].items()}
        torch.set_num_threads(min(int(parameters["threads"]), len(os.sched_getaffinity(0))))
        on_gpu = args["model_instance_kind"] == "GPU"
        self.device = torch.device("cuda", int(args["model_instance_device_id"])) if on_gpu else torch.device("cpu")
        self.labels = {"model": args["model_name"], "instance": args["model_instance_name"], "device": str(self.device)}
        path = Path(__file__).with_name("adaptor.safetensors")
        dims = {one["name"]: int(one["dims"][-1]) for one in config["input"]}
        self.towers = [one["name"].removesuffix("_knowledge") for one in config["output"]]
        # The kernels log the implementation that they choose; what goes to stderr is in Triton's log.
        logging.basicConfig(format=f"{args['model_instance_name']}: %(message)s")
        logging.getLogger("kar_kernels").setLevel(logging.INFO)
        # Each instance is a process with a gauge of its own: the server would free one that two share with the first.
        self.info = pb_utils.MetricFamily(
            name="kar_adaptor_info",
            description="Which implementation of the adaptor runs, and why",
            kind=pb_utils.MetricFamily.GAUGE,
        )
        self.choice = self.gauge = None
        try:
            adaptor = HybridExpertAdaptor.load(path)
            if adaptor.precision != parameters["precision"]:
                raise ValueError(f"it is of precision {adaptor.precision}, not {parameters['precision']}")
            self.adaptor = adaptor.to(self.device).freeze()
            rows = {"user": (USERS,), "item": (USERS, CANDIDATES)}
            self._vectors(
                [
                    {f"{tower}_encoding": torch.zeros(*rows[tower], dims[f"{tower}_encoding"]) for tower in self.towers}
                    | {f"{tower}_present": torch.ones(rows[tower], dtype=torch.bool) for tower in self.towers}
                ]
            )
        except Exception as error:
            raise pb_utils.TritonModelException(f"{path} is no adaptor that fits config.pbtxt: {error}") from error

    def finalize(self):
        """Take back what this instance told: Triton would go on showing it. A gauge must go before its family."""
        self.gauge = None
        self.info = None

    def execute(self, requests):
        """Answer every request; rows of all requests, of users and of items, run together."""
        read = [self._read(request) for request in requests]
        good = [one for one in read if isinstance(one, dict)]
        answers = iter(self._vectors(good) if good else ())
        return [_response(one if isinstance(one, str) else next(answers)) for one in read]

    def _read(self, request):
        """Tensors of one request by name, or the reason why it cannot be answered."""
        names = [f"{tower}_{part}" for tower in self.towers for part in ("encoding", "present")]
        # The backend was built for numpy 1: under numpy 2 its `as_numpy` repeats the first element, DLPack is right.
        tensors = {name: torch.from_dlpack(pb_utils.get_input_tensor_by_name(request, name)) for name in names}
        if "item" not in self.towers:
            return tensors
        encoded, present = tensors["item_encoding"].shape[:2], tensors["item_present"].shape
        if encoded != present or not present[1]:
            return f"item_encoding has {encoded[1]} candidates, item_present {present[1]}: send as many, at least one"
        return tensors

    def _vectors(self, batch):
        """Knowledge vectors of each request by tower, [b, K] or [b, C, K]."""
        encodings = {
            tower: (
                torch.cat([one[f"{tower}_encoding"].flatten(0, -2) for one in batch]).to(self.device),
                torch.cat([one[f"{tower}_present"].flatten() for one in batch]).to(self.device),
            )
            for tower in self.towers
        }
        answers = [{} for _ in batch]
        for tower, vectors in self.adaptor.adapt(encodings).items():
            shapes = [one[f"{tower}_encoding"].shape[:-1] for one in batch]
            parts = vectors.float().cpu().split([shape.numel() for shape in shapes])
            for answer, part, shape in zip(answers, parts, shapes, strict=True):
                answer[tower] = part.unflatten(0, shape)
        self._tell(self.adaptor.choice(sum(len(encoding) for encoding, _ in encodings.values())))
        return answers

    def _tell(self, choice):
        """Show the implementation of a batch, until one gets another."""
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
