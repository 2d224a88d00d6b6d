"""On CUDA a step that is not finite is kept from the weights by a flag on the device, which the host reads later."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llamafactory.train.guard import NotFiniteError, StepGuard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_weights_and_moments_stay_those_before_the_bad_step():
    device = torch.device("cuda")
    parameter = torch.nn.Parameter(torch.ones(8, device=device))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    accelerator = SimpleNamespace(scaler=None, num_processes=1, device=device)
    guard = StepGuard(accelerator, optimizer, max_skipped=0)
    module = torch.nn.Linear(1, 1, device=device)
    kept = noticed = None
    for step in range(6):
        parameter.grad = torch.full_like(parameter, float("nan") if step == 3 else 0.5)
        loss = torch.tensor(float("nan") if step == 3 else 1.0, device=device)
        try:
            guard.admits(step, loss, parameter.grad.norm(), module)
        except NotFiniteError as error:
            noticed = error.step, step
            break
        optimizer.step()
        if step == 2:
            kept = parameter.detach().clone(), optimizer.state[parameter]["step"].clone()
    assert noticed == (3, 4)
    assert kept is not None
    assert parameter.equal(kept[0])
    assert optimizer.state[parameter]["step"].equal(kept[1])
    assert bool(torch.isfinite(optimizer.state[parameter]["exp_avg"]).all())
