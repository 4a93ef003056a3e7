"""Owns the Triton model that adapts encodings: the hybrid-expert adaptor, on all rows of a batch of requests at once.

Inputs with `allow_ragged_batch` have a candidate axis [b, C, ...], the others one row a user [b, ...]; `b` is 1 but
for clients that send several users with equally many candidates. A bad request gets an error of its own.
"""

import json
import os
from pathlib import Path

import torch
import triton_python_backend_utils as pb_utils
from torch.utils.dlpack import to_dlpack

from kar_kernels import HybridExpertAdaptor


class TritonPythonModel:
    """One instance of the adaptor."""

    def initialize(self, args):
        """Load `adaptor.safetensors`, which lies beside this file, and run it once."""
        config = json.loads(args["model_config"])
        threads = int(config["parameters"]["threads"]["string_value"])
        torch.set_num_threads(min(threads, len(os.sched_getaffinity(0))))
        on_gpu = args["model_instance_kind"] == "GPU"
        self.device = torch.device("cuda", int(args["model_instance_device_id"])) if on_gpu else torch.device("cpu")
        path = Path(__file__).with_name("adaptor.safetensors")
        dims = {one["name"]: int(one["dims"][-1]) for one in config["input"]}
        self.towers = [one["name"].removesuffix("_knowledge") for one in config["output"]]
        try:
            self.adaptor = HybridExpertAdaptor.load(path).to(self.device).freeze()
            shapes = {f"{tower}_encoding": (1, dims[f"{tower}_encoding"]) for tower in self.towers}
            self._vectors(
                [
                    {name: torch.zeros(shape) for name, shape in shapes.items()}
                    | {f"{tower}_present": torch.ones(1, dtype=torch.bool) for tower in self.towers}
                ]
            )
        except Exception as error:
            raise pb_utils.TritonModelException(f"{path} is no adaptor that fits config.pbtxt: {error}") from error

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
        return answers


def _response(vectors):
    if isinstance(vectors, str):
        return pb_utils.InferenceResponse([], pb_utils.TritonError(vectors, pb_utils.TritonError.INVALID_ARG))
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor.from_dlpack(f"{tower}_knowledge", to_dlpack(value)) for tower, value in vectors.items()]
    )
