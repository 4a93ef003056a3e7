"""Owns the Triton model that scores: a backbone's ONNX graph, run once for all candidates of a batch of requests.

Inputs with `allow_ragged_batch` have a candidate axis [b, C, ...], the others one row a user [b, ...]; `b` is 1 but
for clients that send several users with equally many candidates. Users are stacked [R, ...], candidates joined
[N, ...], and `request_of_row` [N] tells the graph whose each candidate is. A bad request gets an error of its own.
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
        self.ragged = {one["name"]: one.get("allow_ragged_batch", False) for one in config["input"]}
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
            raise pb_utils.TritonModelException(f"{path} is no backbone that fits config.pbtxt: {error}") from error

    def execute(self, requests):
        """Answer every request; candidates of all requests run together."""
        read = [self._read(request) for request in requests]
        scores = iter(self._score([one for one in read if isinstance(one, dict)]))
        return [_response(one if isinstance(one, str) else next(scores)) for one in read]

    def _read(self, request):
        """Tensors of one request by name, or the reason why it cannot be answered."""
        tensors = {name: _array(request, name) for name in self.ragged}
        counts = {name: tensors[name].shape[1] for name, ragged in self.ragged.items() if ragged}
        if len(set(counts.values())) > 1 or 0 in counts.values():
            said = ", ".join(f"{name} {count}" for name, count in counts.items())
            return f"candidates differ in number ({said}): send as many in each input, at least one"
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
        ends = np.cumsum([len(one["item_index"]) for one in batch])
        parts = zip(np.split(flat, ends[:-1]), batch, strict=True)
        return [part.reshape(len(one["history_item"]), -1) for part, one in parts]

    def _score_alone(self, batch):
        return [scores for one in batch for scores in self._score([one])]


def _join(batch, ragged):
    """The graph's inputs for a batch of requests."""
    users = [len(one["history_item"]) for one in batch]
    per_user = [len(one["item_index"]) // count for one, count in zip(batch, users, strict=True)]
    joined = {name: np.concatenate([one[name] for one in batch]) for name in ragged}
    return joined | {"request_of_row": np.repeat(np.arange(sum(users)), np.repeat(per_user, users))}


def _array(request, name):
    # The backend was built for numpy 1: under numpy 2 its `as_numpy` repeats the first element, DLPack is right.
    return np.from_dlpack(pb_utils.get_input_tensor_by_name(request, name))


def _tensor(name, array):
    # Likewise `Tensor(name, array)` is empty. The backend marks a consumed capsule with a name that numpy does not
    # know, so that numpy would print an error for each one that it frees.
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
        # TF32 would move scores by 1e-3 from those that training and the CPU give.
        device = {"device_id": args["model_instance_device_id"], "use_tf32": "0"}
        provider = ("CUDAExecutionProvider", device)
    session = onnxruntime.InferenceSession(path, options, providers=[provider])
    wanted = provider if isinstance(provider, str) else provider[0]
    if wanted not in session.get_providers():
        raise RuntimeError(f"{wanted} is not available here: install onnxruntime-gpu or use the CPU repository")
    return session
