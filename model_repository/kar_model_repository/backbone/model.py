"""Owns the Triton model that scores: a backbone's ONNX graph, run once for all candidates of a batch of requests.

Inputs with `allow_ragged_batch` have a candidate axis [b, C, ...], the others one row per user [b, ...]; `b` is 1
unless a client sends several users, all with the same number of candidates. Users are stacked [R, ...],
candidates joined [N, ...], and `request_of_row` [N] gives the user row of each candidate. A bad request fails alone.
"""

import ctypes
import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

SCORE = "score"
CONSUMED = ctypes.c_char_p(b"used_dltensor")
DTYPES = {"TYPE_INT64": np.int64, "TYPE_FP32": np.float32}


class TritonPythonModel:
    """One instance of a backbone."""

    def initialize(self, args):
        """Load `model.onnx`, which lies beside this file, and score one candidate with it."""
        config = json.loads(args["model_config"])
        self.ragged = {tensor["name"]: tensor.get("allow_ragged_batch", False) for tensor in config["input"]}
        path = Path(__file__).with_name("model.onnx")
        zeros = {
            one["name"]: np.zeros([1 if int(size) < 0 else int(size) for size in one["dims"]], DTYPES[one["data_type"]])
            for one in config["input"]
        }
        probe = {name: value if self.ragged[name] else value[None] for name, value in zeros.items()}
        try:
            self.session = _session(path, args, int(config["parameters"]["threads"]["string_value"]))
            self.session.run([SCORE], _join([probe], self.ragged))
        except Exception as error:
            raise pb_utils.TritonModelException(f"{path} is not a backbone that fits config.pbtxt: {error}") from error

    def execute(self, requests):
        """Answer every request; candidates of all requests run together."""
        inputs = [self._read(request) for request in requests]  # tensors, or the reason of an error
        scores = iter(self._score([tensors for tensors in inputs if isinstance(tensors, dict)]))
        return [_response(tensors if isinstance(tensors, str) else next(scores)) for tensors in inputs]

    def _read(self, request):
        """Tensors of one request by name, or the reason why it cannot be answered."""
        tensors = {name: _array(request, name) for name in self.ragged}
        counts = {name: tensors[name].shape[1] for name, ragged in self.ragged.items() if ragged}
        if len(set(counts.values())) > 1 or 0 in counts.values():
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            return f"candidates differ in number ({listed}): send the same number in each input, at least one"
        return {
            name: value.reshape(-1, *value.shape[2:]) if self.ragged[name] else value for name, value in tensors.items()
        }

    def _score(self, batch):
        """Scores [b, C] of each request, or the reason why it has none."""
        if not batch:
            return []
        try:
            (flat,) = self.session.run([SCORE], _join(batch, self.ragged))
        except Exception as error:
            # One request's bad index must not fail the others of its batch.
            return [f"the backbone refuses the input: {error}"] if len(batch) == 1 else self._score_alone(batch)
        ends = np.cumsum([len(tensors["item_index"]) for tensors in batch])
        parts = zip(np.split(flat, ends[:-1]), batch, strict=True)
        return [part.reshape(len(tensors["history_item"]), -1) for part, tensors in parts]

    def _score_alone(self, batch):
        return [scores for tensors in batch for scores in self._score([tensors])]


def _join(batch, ragged):
    """The graph's inputs for a batch of requests."""
    users = [len(tensors["history_item"]) for tensors in batch]
    per_user = [len(tensors["item_index"]) // count for tensors, count in zip(batch, users, strict=True)]
    joined = {name: np.concatenate([tensors[name] for tensors in batch]) for name in ragged}
    return joined | {"request_of_row": np.repeat(np.arange(sum(users)), np.repeat(per_user, users))}


def _array(request, name):
    # The backend was built for numpy 1: under numpy 2 its `as_numpy` repeats the first element; DLPack works.
    return np.from_dlpack(pb_utils.get_input_tensor_by_name(request, name))


def _tensor(name, array):
    # For the same reason `Tensor(name, array)` would be empty. The backend renames a capsule that it has consumed, and
    # numpy prints an error when it frees a capsule with an unknown name: give it the name that numpy knows.
    capsule = array.__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), CONSUMED)
    return tensor


def _response(scores):
    if not isinstance(scores, str) and np.isfinite(scores).all():
        return pb_utils.InferenceResponse([_tensor(SCORE, scores)])
    reason = scores if isinstance(scores, str) else "a score is not finite: send finite numbers"
    return pb_utils.InferenceResponse([], pb_utils.TritonError(reason, pb_utils.TritonError.INVALID_ARG))


def _session(path, args, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = min(threads, len(os.sched_getaffinity(0)))
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    provider = "CPUExecutionProvider"
    if args["model_instance_kind"] == "GPU":
        # TF32 would change scores by 1e-3 against training and the CPU.
        device = {"device_id": args["model_instance_device_id"], "use_tf32": "0"}
        provider = ("CUDAExecutionProvider", device)
    session = onnxruntime.InferenceSession(path, options, providers=[provider])
    provider_name = provider if isinstance(provider, str) else provider[0]
    if provider_name not in session.get_providers():
        raise RuntimeError(f"{provider_name} is not available here: install onnxruntime-gpu or use the CPU repository")
    return session
