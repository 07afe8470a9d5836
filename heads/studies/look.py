"""The step of a study that asks where networks look: maps over a few images of test, as `heads.explain` makes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from heads.runs.run import Run, load_run
from heads.studies.spec import Look

if TYPE_CHECKING:
    from heads.studies.plan import Planned
    from heads.studies.run import Runner


def look(runner: Runner, step: Planned, made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Grad-CAM of the networks, attention of the ViTs among them and of the frozen one; the same images for all."""
    from heads.explanations.explain import explain
    from heads.explanations.methods import Transformer, has_class_token

    assert isinstance(step.step, Look)
    runs = [load_run(runner.folder / made[name]["made"]["run"]) for name in step.step.of]
    images, folder, files = images_of(runs[0], step.asked["images"]), Path("runs") / step.name, []
    looking = [run for run in runs if has_class_token(Transformer.of_run(run.head, run.model))]
    if step.step.attention:
        looking = [run_on(runner, made[step.step.attention], made[step.step.backbone]["made"]["label"]), *looking]
    for kind, of in (("grad-cam", runs), ("attention", looking)):
        if of:
            out = runner.folder / folder / kind
            found = explain(of, images, out=out, kinds=kind, device=runner.asked.device, say=runner.say)
            files += [folder / kind / path.name for path in found.files]
    return {"pictures": [str(path) for path in files]}


def images_of(run: Run, count: int) -> list[str]:
    """Ids of images of test: of each class in turn the first of the run's answers."""
    answers = run.answers("test")
    truth = answers.y if answers.y.ndim == 1 else answers.y.argmax(1)
    queues = [[i for i, y in zip(answers.ids, truth.tolist(), strict=True) if y == c] for c in range(len(run.classes))]
    turns = max(map(len, queues), default=0)
    return [queue[k] for k in range(turns) for queue in queues if k < len(queue)][:count]


def run_on(runner: Runner, record: dict[str, Any], label: str) -> Run:
    """The chosen head of a sweep on one view, on all of train."""
    from heads.sweeps.journal import load_sweep

    families = load_sweep(runner.folder / record["made"]["sweep"]).families
    return max((f for f in families if f.view == label), key=lambda family: family.fraction).runs[0]
