"""The embedded engine: Hugging Face transformers in this process, batched and reproducible; for CPUs, tests and small models.

Legend: B sequences of a batch, P prompt tokens (left-padded), R response tokens, T tokens of a sequence, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from megatron_opd.errors import EngineError, UserError
from megatron_opd.hf.lineage import fingerprint_model, tensor_index
from megatron_opd.hf.model_config import read_config, read_context_length, refuse_quantised
from megatron_opd.hf.turns import own_stop_ids
from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.records import Finish, SamplingParams, TeacherScores
from megatron_opd.serve.engine import (
    SERVE_QUANTISED,
    Engine,
    Generated,
    GenerateRequest,
    ScoreRequest,
    all_stop_ids,
    check_requests,
)
from megatron_opd.serve.loaded import check_loaded


class TransformersEngine(Engine):
    """See `serve.engine.Engine`."""

    def __init__(self, config: EngineConfig, model: str | Path):
        self.config = config
        self.device = _open_device(config.device)
        self.num_gpus = int(self.device.type == "cuda")
        dtype = config.dtype
        if dtype == "auto":
            dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        self.dtype = getattr(torch, dtype)
        self._open(model)

    def _open(self, model: str | Path) -> None:
        refuse_quantised(model, "engine 'transformers'", SERVE_QUANTISED)
        self.fingerprint = fingerprint_model(model)
        self.hf_config = hf_config = read_config(model)
        longest = read_context_length(model)
        self.context_length = self.config.context_length or longest
        self.vocab_size = int(hf_config["vocab_size"])
        self.stop_ids = list(own_stop_ids(model))
        transformers.utils.logging.disable_progress_bar()  # the stage has its own
        try:
            load: Any = AutoModelForCausalLM.from_pretrained
            loaded, found = load(str(model), dtype=self.dtype, local_files_only=True, output_loading_info=True)
        except Exception as error:  # it raises any type for what it does not like in a config or a file
            reason = " ".join(str(error).split())
            raise UserError(f"{model}: transformers can't load this model: {type(error).__name__}: {reason}") from error
        missing = sorted(found["missing_keys"])
        if missing:  # transformers would draw them at random
            raise UserError(f"{model}: {len(missing)} tensors are in no *.safetensors file (first: {missing[0]}); copy or convert it again")
        check_loaded(loaded, hf_config, f"{model}/config.json")
        self.model: Any = loaded.to(self.device).eval()
        # transformers fills what our own config leaves unset from the model's: penalties there would change the distribution.
        self.model.generation_config = GenerationConfig()

    def load(self, model: str | Path) -> None:
        """Into the model that is there, tensor by tensor; where its config or its tensors' names are others, as a new one."""
        parameters = dict(self.model.named_parameters())
        files = sorted(Path(model).glob("*.safetensors"))
        same = read_config(model) == self.hf_config and tensor_index(model).keys() == parameters.keys()
        if not same:
            del self.model, parameters
            self._open(model)
            return
        fingerprint, stop_ids = fingerprint_model(model), list(own_stop_ids(model))
        with torch.no_grad():
            for path in files:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - it is no dict
                        parameters[name].copy_(file.get_tensor(name).to(self.dtype))
        self.fingerprint, self.stop_ids = fingerprint, stop_ids

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "transformers",
            "version": transformers.__version__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
        }

    def close(self) -> None:
        del self.model

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[GenerateRequest], sampling: SamplingParams, progress: Callable[[int], Any] | None = None
    ) -> list[Generated]:
        """Reproducible: each (seed, prompt, sample) has its own stream of random numbers, whatever else is in the batch."""
        check_requests(requests, vocab_size=self.vocab_size, context_length=self.context_length)
        results: list[Generated | None] = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        for numbers in self._generate_batches(order, [self._max_new(request, sampling) for request in requests]):
            for number, generated in zip(numbers, self._generate_batch([requests[i] for i in numbers], sampling), strict=True):
                results[number] = generated
                if progress is not None:
                    progress(len(generated.tokens))
        return [result for result in results if result is not None]

    def _max_new(self, request: GenerateRequest, sampling: SamplingParams) -> int:
        """Most tokens of a response: what is asked for, or what the context has left."""
        max_new = min(sampling.max_new_tokens, self.context_length - len(request.prompt))
        if max_new < 1:
            raise EngineError(
                f"a prompt of {len(request.prompt)} tokens leaves no room for a response in a context of {self.context_length}"
            )
        return max_new

    def _generate_batches(self, order: list[int], max_new: list[int]) -> list[list[int]]:
        """Batches in which every response may be equally long, so that a response does not depend on its neighbours."""
        batches: list[list[int]] = []
        for number in order:
            if batches and len(batches[-1]) < self.config.batch_sequences and max_new[batches[-1][0]] == max_new[number]:
                batches[-1].append(number)
            else:
                batches.append([number])
        return batches

    def _generate_batch(self, requests: list[GenerateRequest], sampling: SamplingParams) -> list[Generated]:
        longest = max(len(request.prompt) for request in requests)
        max_new = self._max_new(requests[0], sampling)
        stop_ids = all_stop_ids(sampling, self.stop_ids)
        pad_id = stop_ids[0] if stop_ids else 0
        ids_BP = torch.full((len(requests), longest), pad_id, dtype=torch.long)
        mask_BP = torch.zeros_like(ids_BP)
        for row, request in enumerate(requests):
            ids_BP[row, longest - len(request.prompt) :] = torch.from_numpy(request.prompt.astype(np.int64))
            mask_BP[row, longest - len(request.prompt) :] = 1
        sampler = _SeededSampler(requests, sampling, prompt_len=longest)
        output = self.model.generate(
            input_ids=ids_BP.to(self.device),
            attention_mask=mask_BP.to(self.device),
            # A config of our own: the model's generation_config.json may hold top-k or penalties that would change the distribution.
            generation_config=GenerationConfig(
                max_new_tokens=max_new, do_sample=False, eos_token_id=stop_ids or None, pad_token_id=pad_id, use_cache=True
            ),
            logits_processor=LogitsProcessorList([sampler]),
        )
        response_BR = output[:, longest:].cpu().numpy().astype(np.int32)
        logp_BR = sampler.finish(output).cpu().numpy()
        results = []
        for row in range(len(requests)):
            stops = np.flatnonzero(np.isin(response_BR[row], stop_ids))
            length = int(stops[0]) + 1 if stops.size else response_BR.shape[1]
            finish = Finish.STOP if stops.size else Finish.LENGTH
            results.append(Generated(response_BR[row, :length].copy(), logp_BR[row, :length].copy(), finish))
        return results

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest], top_k: int = 0, progress: Callable[[int], Any] | None = None) -> list[TeacherScores]:
        check_requests(requests, vocab_size=self.vocab_size, context_length=self.context_length)
        if not 0 <= top_k <= self.vocab_size:
            raise EngineError(f"top_k {top_k} of a vocabulary of {self.vocab_size}")
        results: list[TeacherScores | None] = [None] * len(requests)
        for numbers in _batches([len(request.tokens) for request in requests], self.config.batch_tokens):
            for number, scores in zip(numbers, self._score_batch([requests[i] for i in numbers], top_k), strict=True):
                results[number] = scores
                if progress is not None:
                    progress(len(requests[number].tokens) - requests[number].start)
        return [result for result in results if result is not None]

    def _score_batch(self, requests: list[ScoreRequest], top_k: int) -> list[TeacherScores]:
        longest = max(len(request.tokens) for request in requests)
        first = min(request.start for request in requests)
        ids_BT = torch.zeros((len(requests), longest), dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, request in enumerate(requests):
            ids_BT[row, : len(request.tokens)] = torch.from_numpy(request.tokens.astype(np.int64))
            mask_BT[row, : len(request.tokens)] = 1
        # Right padding: a causal model's real positions never see it. Only logits that predict a response are made.
        ids_BT = ids_BT.to(self.device)
        logits = self.model(
            input_ids=ids_BT, attention_mask=mask_BT.to(self.device), use_cache=False, logits_to_keep=longest - first + 1
        ).logits
        results = []
        for row, request in enumerate(requests):
            T, start = len(request.tokens), request.start
            logp_RV = torch.log_softmax(logits[row, start - first : T - first].float(), -1)
            logp = np.full(T, np.nan, np.float32)
            logp[start:] = logp_RV.gather(1, ids_BT[row, start:T, None])[:, 0].cpu().numpy()
            if not top_k:
                results.append(TeacherScores(logp))
                continue
            values, ids = logp_RV.topk(top_k, dim=1)
            topk_ids = np.full((T, top_k), -1, np.int32)
            topk_logp = np.full((T, top_k), np.nan, np.float32)
            topk_ids[start:], topk_logp[start:] = ids.cpu().numpy(), values.cpu().numpy()
            results.append(TeacherScores(logp, topk_ids, topk_logp))
        return results


class _SeededSampler(LogitsProcessor):
    """Turns sampling into a greedy choice: all logits but the sampled token's become -inf; keeps log-probs at temperature 1."""

    def __init__(self, requests: Sequence[GenerateRequest], sampling: SamplingParams, *, prompt_len: int):
        self.sampling = sampling
        self.prompt_len = prompt_len
        self.streams = [
            np.random.Generator(np.random.Philox(key=[sampling.seed, (r.prompt_index << 20) + r.sample_index])) for r in requests
        ]
        self.logps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits_BV = scores.float()
        chosen_B = self._choose(logits_BV)
        self.logps.append(torch.log_softmax(logits_BV, -1).gather(1, chosen_B[:, None])[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_B[:, None], 0.0)

    def _choose(self, logits_BV: torch.Tensor) -> torch.Tensor:
        uniform = [stream.random() for stream in self.streams]  # one a step for every row keeps the streams in step
        if self.sampling.temperature == 0:
            return logits_BV.argmax(-1)
        probs_BV = torch.softmax(logits_BV / self.sampling.temperature, -1).double()
        if self.sampling.top_p == 1.0 and not self.sampling.top_k:
            return _draw(probs_BV, uniform)
        probs_BV, ids_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
        keep_BV = probs_BV.cumsum(-1) - probs_BV < self.sampling.top_p
        keep_BV[:, 0] = True
        if self.sampling.top_k:
            keep_BV[:, self.sampling.top_k :] = False
        return ids_BV.gather(1, _draw(probs_BV * keep_BV, uniform)[:, None])[:, 0]

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        """Log-probabilities float32 [B, R] of the response tokens; rows that ended early have values of no meaning after that."""
        return torch.stack(self.logps, 1)[:, : output.shape[1] - self.prompt_len]


def _draw(weights_BV: torch.Tensor, uniform: list[float]) -> torch.Tensor:
    """Column of each row where the cumulative weight passes `uniform` times the total; never a column of weight 0."""
    cumulative_BV = weights_BV.cumsum(-1)
    target_B = torch.tensor(uniform, dtype=torch.double, device=weights_BV.device) * cumulative_BV[:, -1]
    drawn_B = torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]
    # Rounding can put the target on the total itself: the last column with a weight is then the one.
    last_B = weights_BV.shape[1] - 1 - (weights_BV > 0).flip(-1).int().argmax(-1)
    return torch.minimum(drawn_B, last_B)


def _open_device(name: str) -> torch.device:
    """Raises UserError for a device that is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the second from a torch built without CUDA
        raise UserError(f"engine.device is {name!r}: {str(error).splitlines()[0]}; 'auto' takes what is there") from None
    return device


def _batches(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Indices in batches of similar length of at most `batch_tokens` padded tokens (a longer sequence stands alone)."""
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[number] <= batch_tokens:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches
