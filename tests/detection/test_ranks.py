"""Two ranks by Gloo train and score a detector as one rank does."""

import json
from pathlib import Path

import pytest
import torch
from detection_ranks import detect

import ranks
import small_runs

pytest.importorskip("pycocotools", reason="pycocotools is not installed: no detection run without its evaluator")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

FLAGS = "--epochs 1 --optimizer sgd --lr 0.01 --warmup-epochs 0 --batch-norm sync --img-size 64 --anchor-size 8 "
FLAGS += "--fpn-channels 16 --kernel-size 3 --num-workers 0 --no-progress --save-minutes 0 --name run --device cpu"


@pytest.mark.slow
def test_two_ranks_train_and_score_as_one_does(tmp_path):
    held, summaries = {}, []
    for number, batch in ((1, 4), (2, 2)):
        output = tmp_path / str(number)
        codes, outputs = ranks.launch(output, number, detect, str(output), f"{FLAGS} --batch-size {batch}")
        assert codes == [0] * number, outputs
        held[number] = [torch.load(output / f"held{rank}.pt", weights_only=True) for rank in range(number)]
        summaries.append(json.loads((output / "runs/run/summary.json").read_text()))
    (alone,), (first, second) = held[1], held[2]
    assert len(alone["losses"]) == 2 and first["losses"] == pytest.approx(alone["losses"], abs=1e-6)
    assert small_runs.differences(first, second) == []
    for name, value in alone["model"].items():
        torch.testing.assert_close(first["model"][name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert [summary["val_images"] for summary in summaries] == [3, 3]
    assert Path(tmp_path / "2/runs/run/detections.png").exists()
