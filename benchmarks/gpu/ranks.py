"""Plans for several ranks, computed on one device by the code that the ranks run, and compared with one device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import shardplan as sp
from benchmarks.gpu.jobs import Job, planned, target_of
from shardplan.planner.unsplit import unsplit
from shardplan.rewrite import compile as compile_program
from shardplan.rewrite.compare import relative_error
from shardplan.rewrite.reference import run_program

_TINY = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 512}  # fmt: skip
_JOBS = (
    Job("Llama", "llama-3.2-1b", 8, 128, {**_TINY, "dtype": "float32"}),
    Job("GPT-2", "gpt2", 8, 128, {"n_layer": 4, "n_embd": 256, "n_head": 8, "vocab_size": 512, "attn_pdrop": 0.0,
                                  "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
)  # fmt: skip
_DEGREES = ({"dp": 2}, {"tp": 2}, {"pp": 2}, {"dp": 2, "tp": 2}, {"pp": 2, "tp": 2})


def rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """A row a model and plan. Products of matrices are in full float32."""
    torch.set_float32_matmul_precision("highest")
    for job in _JOBS:
        torch.manual_seed(0)
        target = target_of(job, False, on_meta=False)
        tensors = {**dict(target.model.named_parameters()), **dict(target.model.named_buffers())}
        state = {name: value.detach().to(device) for name, value in tensors.items()}
        expected = None
        for wanted in _DEGREES:
            count = 1
            for size in wanted.values():
                count *= size
            whole = {"dp": 1, "tp": 1, "pp": 1, **wanted}
            found = planned(
                target, f"{count}xh100", microbatches=2 if "pp" in wanted else 1, constraints=(sp.degrees(**whole),)
            )
            batch = {name: value.to(device) for name, value in found.batch.items()}
            if expected is None:
                expected = run_program(compile_program(found.trace, unsplit(found.trace)), state, batch)
            result = run_program(found.program, state, batch)
            assert result.loss is not None and expected.loss is not None
            gradients = {name: value for name, value in expected.gradients.items() if value is not None}
            found_ones = {name: result.gradients[name] for name in gradients}
            missing = [name for name, value in found_ones.items() if value is None]
            assert not missing, missing
            errors = [relative_error(value, gradients[name]) for name, value in found_ones.items() if value is not None]
            yield {
                "name": job.name,
                "degrees": found.plan.degrees(),
                "loss_error": relative_error(result.loss, expected.loss),
                "gradient_error": max(errors),
            }
