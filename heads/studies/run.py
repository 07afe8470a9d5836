"""Run a study: its steps one after another, each kept, none done twice; then its page.

    studies/<name>/
      study.json         what was asked, of which images
      steps/<step>.json  of every finished step: what it was asked, what it made, how long it took
      runs/<step>/       the run of a network, the sweep of heads, or pictures
      splits-<part>.csv  where the study has splits of its own
      few/ drawn/        the images of --quick
      report.html        the page; <part>/metrics.csv and metrics.json beside it

The same command goes on where it was stopped; asked for anything else, the folder is refused.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from featurecache import __version__
from featurecache.errors import FeatureCacheError, RunError, StepFailed, Stopped
from heads.studies.checks import check_extras, check_options, check_weights
from heads.studies.folder import FORMAT, RECORD, as_json, check_images, finished_in, record_in, with_kept_data
from heads.studies.images import Given, names_of_sets, open_sets, trials
from heads.studies.minutes import machine_gflops
from heads.studies.plan import Asked, Plan, Planned, backbones_of, make_plan, read_weights, wanted_steps
from heads.studies.spec import Extract, Heads, Network, Study, load_study
from heads.studies.words import plan_lines, what_of
from heads.task import Say


@dataclass(frozen=True)
class Done:
    """A study as it lies in its folder. ``made``: step -> its record; ``report``: None where it was only planned."""

    study: Study
    asked: Asked
    folder: Path
    given: dict[str, Given]
    plan: Plan
    made: dict[str, dict[str, Any]]
    report: Any = None


def run_study(
    name: str, *, data: Sequence[str] = (), quick: bool = False, out: str | Path | None = None,
    only: Sequence[str] = (), skip: Sequence[str] = (), random_weights: bool = False, weights: Sequence[str] = (),
    image_size: int | None = None, epochs: int | None = None, train_per_class: int | None = None,
    device: str = "auto", cache: str | Path | None = None, images: bool = True, hash_ids: bool = False,
    dry_run: bool = False, say: Say | None = None, progress: bool = False,
) -> Done:  # fmt: skip
    """Run the study ``name``; the options are those of ``featurecache study``.

    Raises UnknownStudy, BadOption, WeightsNotFound (before anything is computed), SourceError, RunError (a folder in
    the way), StepFailed (which step, and why).
    """
    say = say or (lambda line: None)
    study = load_study(name)
    asked = Asked(
        tuple(data), quick, random_weights, read_weights(weights, study), image_size, epochs, train_per_class,
        tuple(only), tuple(skip), device,
    )  # fmt: skip
    check_options(asked)
    folder = Path(out) if out is not None else Path("studies") / (f"{name}-quick" if quick else name)
    record = record_in(folder, study, asked)
    asked, kept = with_kept_data(asked, record, say), finished_in(folder)
    sets = names_of_sets(study, asked.data)
    wanted = [step for step in wanted_steps(study, asked) if study.set_of(step) in sets]
    missing = [step for step in wanted if step.name not in kept]
    check_extras(missing, quick)
    if not dry_run:  # which would fetch them
        check_weights(study, asked, list(backbones_of(missing)))
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) if dry_run else folder
        given = open_sets(study, asked.data, quick, place, [study.set_of(step) for step in wanted])
        check_images(folder, record, given)
        given = trials(given, place) if quick else given
    plan = make_plan(study, asked, given, machine_gflops(_device(device)))
    for line in plan_lines(study, asked, given, plan, kept):
        say(line)
    if dry_run:
        return Done(study, asked, folder, given, plan, kept)
    runner = Runner(study, asked, folder, given, Path(cache) if cache else None, say, progress)
    made = runner.run(plan, record)
    from heads.studies.page import write_study

    done = Done(study, asked, folder, given, plan, made)
    return Done(study, asked, folder, given, plan, made, write_study(done, images=images, hash_ids=hash_ids))


def _device(device: str) -> str:
    from featurecache.extraction.pipeline import pick_device

    return pick_device(device).type


@dataclass
class Runner:
    """Runs the steps that are not finished, and keeps what they made."""

    study: Study
    asked: Asked
    folder: Path
    given: dict[str, Given]
    cache: Path | None
    say: Say
    progress: bool

    def run(self, plan: Plan, record: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
        from featurecache.files.atomic import writing
        from featurecache.files.locks import exclusive_lock

        with writing(self.folder):
            for below in ("steps", "runs"):
                (self.folder / below).mkdir(parents=True, exist_ok=True)
        with exclusive_lock(self.folder, f"study {self.study.name}"):
            made = finished_in(self.folder)
            self._write_record(record)
            for number, step in enumerate(plan.steps, start=1):
                if step.name in made:
                    self._check_same(step, made[step.name])
                else:
                    self.say("")
                    self.say(f"step       {step.name}   ({number} of {len(plan.steps)}): {what_of(step.asked)}")
                    made[step.name] = self._one(step, made)
        return made

    def _write_record(self, record: dict[str, Any] | None) -> None:
        from featurecache.files.atomic import write_whole

        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        old = record or {"format": FORMAT, "study": self.study.name, "created": now, "asked": self.asked.to_dict()}
        new = old | {
            "featurecache": __version__,
            "data": list(self.asked.data),
            "images": old.get("images", {}) | {name: given.mark for name, given in self.given.items()},
        }
        write_whole(self.folder / RECORD, as_json(new))

    def _check_same(self, step: Planned, record: dict[str, Any]) -> None:
        if record["asked"] != json.loads(json.dumps(step.asked)):
            raise RunError(
                f"{self.folder / 'steps' / step.name}.json: this step was asked otherwise, by another version of "
                "featurecache. Remove the file and its folder under runs/ to do it again, or give another --out."
            )

    def _one(self, step: Planned, made: dict[str, dict[str, Any]]) -> dict[str, Any]:
        from featurecache.files.atomic import write_whole

        begin = time.perf_counter()
        try:
            found = self._do(step, made)
        except (KeyboardInterrupt, Stopped) as error:
            raise Stopped("stopped. What is finished is safe; the same command goes on where it was.") from error
        except FeatureCacheError as error:
            raise StepFailed(f"step {step.name}: {error}\n       --skip {step.name} goes on without it.") from error
        seconds = time.perf_counter() - begin
        record = {"asked": step.asked, "made": found, "seconds": round(seconds, 2), "featurecache": __version__}
        write_whole(self.folder / "steps" / f"{step.name}.json", as_json(record))
        return record

    def _do(self, step: Planned, made: dict[str, dict[str, Any]]) -> dict[str, Any]:
        if isinstance(step.step, Extract):
            return self._extract(step)
        if isinstance(step.step, Heads):
            return self._heads(step, made)
        if isinstance(step.step, Network):
            return self._network(step, made)
        from heads.studies.look import look

        return look(self, step, made)

    def _extract(self, step: Planned) -> dict[str, Any]:
        from featurecache.commands import extract
        from featurecache.extraction import plan
        from featurecache.store.write_view import open_view

        options = {key: value for key, value in step.asked.items() if key != "extract"}
        dataset = self.dataset(step)
        untrained = isinstance(step.step, Extract) and step.step.untrained
        name = f"{dataset.name}-untrained" if untrained else dataset.name
        cache = self.cache or (self.folder / "cache" if self.asked.quick else None)
        prepared = plan.prepare(
            dataset, name=name, cache=cache, device=self.asked.device, remember=True, progress=self.progress, **options
        )
        result = prepared.run(progress=self.progress)
        label = open_view(result.view).label
        self.say(extract.result_lines(result, label))
        return {"view": str(Path(result.view).resolve()), "label": label, "failed": len(result.failed)}

    def _heads(self, step: Planned, made: dict[str, dict[str, Any]]) -> dict[str, Any]:
        from featurecache.store.write_view import open_view
        from heads.api import ablate

        options = {key: value for key, value in step.asked.items() if key not in ("ablate", "heads")}
        views = [open_view(made[name]["made"]["view"]) for name in step.asked["ablate"]]
        out = self.folder / "runs" / step.name
        ablate(
            views, step.asked["heads"], out=out, controls=self._first_of_part(step, made), say=self.say,
            progress=self.progress, **self._splits(step), **options,
        )  # fmt: skip
        return {"sweep": f"runs/{step.name}"}

    def _network(self, step: Planned, made: dict[str, dict[str, Any]]) -> dict[str, Any]:
        from heads.api import train_baseline

        options = {key: value for key, value in step.asked.items() if key not in ("train_baseline", "arch")}
        runs = self.folder / "runs"
        begun = next(runs.glob(f".{step.name}-{'[0-9a-f]' * 12}.checkpoint"), None)
        whole = (runs / step.name / "config.json").is_file()  # killed between the run and its record
        if not whole:
            train_baseline(
                self.dataset(step), step.asked["arch"], out=runs / step.name, resume=begun is not None, report=False,
                controls=self._first_of_part(step, made), device=self.asked.device, say=self.say,
                progress=self.progress, **self._splits(step), **options,
            )  # fmt: skip
        return {"run": f"runs/{step.name}"}

    def dataset(self, step: Planned) -> Any:
        return self.given[self.study.set_of(step.step)].dataset

    def _first_of_part(self, step: Planned, made: dict[str, dict[str, Any]]) -> bool:
        """The controls stand beside the first of a part that is finished."""
        assert not isinstance(step.step, Extract)
        done = {
            self.study.part(s.part).name for s in self.study.steps if s.name in made and isinstance(s, Heads | Network)
        }
        return step.step.part not in done

    def _splits(self, step: Planned) -> dict[str, Any]:
        """The study's own splits as a file, where it has some."""
        from featurecache.files.atomic import write_whole
        from heads.splits import splits_csv

        assert not isinstance(step.step, Extract)
        part = self.study.part(step.step.part)
        path, dataset = self.folder / f"splits-{part.name}.csv", self.dataset(step)
        names = part.splits(dataset)
        if names is None:
            return {}
        if not path.is_file():
            write_whole(path, splits_csv(dataset.ids, names).encode())
        return {"splits": path}
