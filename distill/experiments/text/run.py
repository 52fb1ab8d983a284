"""An experiment on text: a student distilled from a published teacher, and the same student by cross-entropy alone.

Every stage keeps its result in the run folder and is skipped when it stands there already:

    RUN/                the student, distilled from the live teacher
    RUN/equal_tokens/   the same student by cross-entropy: same start, same batches, same schedule
    RUN/equal_time/     likewise, for as many seconds of training as distilling took
    RUN/student_hf/     the distilled student, as transformers opens it
    RUN/evaluation.json, RUN/summary.json

Seconds of training are steps · the median time of a step: compiling, evaluating and saving are no part of them, and a
hiccup of the machine is none either.
"""

import collections
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill import losses
from distill.batch import Batch
from distill.checkpoint import fingerprint, lock
from distill.config import to_dict, write_json
from distill.data import prepared
from distill.data.loader import Loader
from distill.data.packing import Rows
from distill.data.stream import StreamLoader, blocks, open_rows
from distill.devices import processes
from distill.devices.speed import flops_per_token
from distill.evaluation.heldout import Heldout
from distill.experiments.addition.measure import greedy
from distill.experiments.cost import Trained, cost, ledger, restore
from distill.experiments.folder import configured, read_config
from distill.experiments.preflight import Side, memory_plan, preflight, print_checks
from distill.experiments.text.config import StudentConfig, TextConfig
from distill.features import feature_terms, projector_shapes, with_projectors, without_projectors
from distill.metrics import read_metrics
from distill.models import Model, decoder
from distill.models.int8 import int8, quantizer
from distill.objective import Terms, router_terms, task_term, terms_of
from distill.parallel import RULES, make_mesh, param_shardings
from distill.reports.table import print_rows
from distill.shapes import Params
from distill.students.cut import CHOICES, part_of
from distill.students.start import Calibration, Start, start
from distill.students.vocabulary import Pruned, prune_by, prune_model
from distill.tokenizer import TextTokenizer
from distill.train import Evaluate, Task, fit, lower
from distill.training import TrainingConfig
from distill.vocab import align
from distill.weights import STUDENT, save
from distill.weights.published import Published, read

PREFLIGHT_TOKENS = 256
"""Of a held-out row, for the checks before the first step: there logits of all words are alive at once."""


class World(NamedTuple):
    """What all arms share."""

    teacher: Trained
    tokenizer: TextTokenizer
    begin: Start
    """The student before its first step, the same of every arm."""
    student: Model
    """The plain student, as it is measured and saved; its ``init`` gives the start."""
    train: Batch | Callable[[int], Batch]
    """All examples, or batch k of them."""
    heldout: Heldout
    prompts: np.ndarray
    """``[prompts, prompt_tokens]``: how held-out rows begin."""
    fingerprints: dict[str, str]


def run_experiment(config: TextConfig, run: Path) -> dict[str, Any]:
    """Does what is not done yet of an experiment; returns the summary."""
    with lock(run / ".experiment"), configured(run, config):
        world = make_world(config)
        look_before(config, run, world)
        distil(config, run, world)
        for arm in config.arms:
            train_alone(config, run, world, arm)
        return evaluate_run(config, run, world)


def make_world(config: TextConfig) -> World:
    """Teacher, tokenizer, student, text: everything that can be wrong is found here, before any training."""
    source, rules = config.student.source, config.parallel.student
    late = config.teacher_dtype == "int8" and (source is None or config.vocabulary is not None)
    dtype = "bfloat16" if late else config.teacher_dtype
    teacher = _read(config, config.teacher, dtype, config.parallel.teacher)
    own = None if source is None else _read(config, source, "float32", rules)
    if own is not None:
        teacher = _within(teacher, own.tokenizer)
        align(own.tokenizer.ids(), teacher.tokenizer.ids(), own.model.vocab_size, teacher.model.vocab_size)
    if config.vocabulary is not None:
        pruned = prune_by(teacher.tokenizer, _uses(config, teacher.tokenizer), config.vocabulary)
        teacher, own = (None if one is None else _pruned(one, pruned) for one in (teacher, own))
    tokenizer, network = teacher.tokenizer, Trained(teacher.model, teacher.params)
    loader, heldout = _text(config, tokenizer)
    begin = _cut_out(config, network, loader) if own is None else _started_at(own)
    if late:
        network, begin = _rounded(network, begin, config.training.seed)
    plain = begin.model
    if not config.student.start.plain:
        plain = decoder(plain.config).with_vocabulary(plain.vocab_size)
        plain = dataclasses.replace(plain, init=lambda key: begin.plain(begin.model.init(key)))
    learner(config, begin.model, network.model)
    heldout = heldout.take(slice(config.heldout_rows))
    prints = {"tokenizer": tokenizer.fingerprint(), "teacher_weights": fingerprint(network.params)}
    prints["text"] = prepared.fingerprint(config.data, tokenizer)
    prompts = _prompts(config, heldout)
    train = loader.examples if isinstance(loader, Loader) else loader.batch
    return World(network, tokenizer, begin, plain, train, Heldout(*network, heldout.batch()), prompts, prints)


def _text(config: TextConfig, tokenizer: TextTokenizer) -> tuple[Loader | StreamLoader, Rows]:
    """The text to train on, in memory or on the disk, and the held-out rows."""
    options = config.training.batch_size, config.training.seed
    if config.streaming:
        source = open_rows(config.data, tokenizer, "train", config.data_dir)
        heldout = prepared.prepare(config.data, tokenizer, config.data_dir, ("heldout",))
        return StreamLoader(source, *options), heldout["heldout"]
    rows = prepared.prepare(config.data, tokenizer, config.data_dir)
    return Loader(rows["train"].batch(), *options), rows["heldout"]


def _uses(config: TextConfig, tokenizer: TextTokenizer) -> collections.Counter[int]:
    """How often the text to train on uses each token."""
    uses: collections.Counter[int] = collections.Counter()
    for rows in blocks(open_rows(config.data, tokenizer, "train", config.data_dir)):
        uses.update(rows.tokens[rows.segments > 0].tolist())
    return uses


def _within(teacher: Published, known: TextTokenizer) -> Published:
    """The teacher without control tokens that its student has no rows for; unchanged if they differ in more."""
    try:
        tokenizer = teacher.tokenizer.within(known.vocab_size)
    except ValueError:
        return teacher  # said by ``align``
    return Published(teacher.model.with_vocabulary(tokenizer.vocab_size), teacher.params, tokenizer)


def _pruned(whole: Published, pruned: Pruned) -> Published:
    model, params = prune_model(whole.model, whole.params, pruned.ids)
    return Published(model, params, pruned.tokenizer)


def _read(config: TextConfig, name: str, dtype: str, rules: str) -> Published:
    """A published model, each parameter read straight to where the mesh wants it."""
    several = config.parallel.backend == "mesh" or (config.parallel.backend == "auto" and jax.device_count() > 1)
    sharding = (lambda model: param_shardings(model, make_mesh(config.parallel), RULES[rules])) if several else None
    return read(name, dtype=dtype, activations=config.activations, sharding=sharding)


def _cut_out(config: TextConfig, teacher: Trained, loader: Loader | StreamLoader) -> Start:
    """The student as a part of its teacher; units are chosen by importance on the training text."""
    asked, whole = config.student, teacher.model.config
    sizes = {name: getattr(asked, name) for name in ("kv_heads", "feed_forward", "width")}
    layers = asked.start.layers or (asked.layers and CHOICES[asked.start.choice](asked.layers, whole.layers))

    def batches() -> Iterator[Batch]:
        return map(loader.batch, range(asked.calibration_batches))

    small = part_of(whole, layers=layers, **sizes)
    begin = start(*teacher, small, asked.start, Calibration(_nll, batches))

    def init(key: Any) -> Params:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), begin.model.init(key))

    return begin._replace(model=dataclasses.replace(begin.model, init=init))


def _rounded(teacher: Trained, begin: Start, seed: int) -> tuple[Trained, Start]:
    """The teacher's kernels as int8, once the student is cut out of it, which keeps no hold on them as they were."""
    params = begin.model.init(jax.random.key(seed))
    small = jax.tree_util.tree_map_with_path(quantizer(teacher.model), teacher.params)
    begin = begin._replace(model=dataclasses.replace(begin.model, init=lambda key: params))
    return Trained(int8(teacher.model), small), begin


def _nll(model: Model, params: Params, batch: Batch) -> Any:
    states = model.apply(params, batch.inputs, positions=batch.positions, segments=batch.segments).hidden
    student = states, model.head(params)
    return losses.divide(losses.chunked(_cross_entropy, student, None, batch.labels, batch.mask))


def _cross_entropy(student_logits, _, labels):
    return losses.cross_entropy(student_logits, labels)


def _started_at(own: Published) -> Start:
    """A published model that learns from its own parameters on."""
    return Start(dataclasses.replace(own.model, init=lambda key: own.params), None)


def _prompts(config: TextConfig, heldout: Rows) -> np.ndarray:
    """How held-out rows begin, where one document reaches so far."""
    length = config.prompt_tokens
    whole = heldout.segments[:, length - 1] == 1
    if not whole.any():
        raise ValueError(f"prompt_tokens={length}: no held-out row begins with so many tokens of one document.")
    return heldout.tokens[whole][: config.prompts, :length].astype(np.int32)


def learner(config: TextConfig, student: Model, teacher: Model) -> tuple[Model, Terms]:
    """The student with the projectors it learns beside itself, and the terms of its objective."""
    features = config.objective.features
    student = with_projectors(student, projector_shapes(features, student, teacher))
    more = feature_terms(features, student, teacher)
    return student, terms_of(config.objective, (*more, *router_terms(student, config.objective.router_weight)))


def identity(config: TextConfig, world: World, training: TrainingConfig, *parts: str) -> dict[str, Any]:
    """What may not change when an arm goes on."""
    everything = to_dict(config)
    if config.student.start == StudentConfig.start:
        del everything["student"]["start"]  # as in run folders from before there was a choice
    named = {part: everything[part] for part in ("teacher", "data", "student", "activations", *parts)}
    return named | {"training": to_dict(training)} | world.fingerprints


def distillation(config: TextConfig, world: World) -> Task:
    """What the distilled student learns."""
    model, terms = learner(config, world.begin.model, world.teacher.model)
    return Task(
        student=model,
        terms=terms,
        reduction=config.objective.reduction,
        examples=world.train,
        teacher=world.teacher.model,
        teacher_params=world.teacher.params,
        base_params=world.begin.base,
        evaluate=_curve(config, world),
        identity=identity(config, world, config.training, "objective", "teacher_dtype"),
    )


def _curve(config: TextConfig, world: World) -> Evaluate:
    """Held-out measures for the learning curve, from all of the student's parameters."""
    return lambda whole: world.heldout.measure(world.begin.model, without_projectors(whole), config.curve_rows)


def look_before(config: TextConfig, run: Path, world: World) -> None:
    """Preflight of a run that has not begun, on the start of a held-out row; prints it, writes RUN/preflight.json."""
    if (run / "checkpoints").exists():
        return
    task, plan = distillation(config, world), None
    if config.parallel.backend != "pmap":
        plan = memory_plan(*lower(task, config.training, config.parallel))
    begin = jax.tree.map(lambda field: jnp.asarray(field[:1, :PREFLIGHT_TOKENS]), world.heldout.batch)
    student = Side(world.student, _params_of(config, run, world, "start"), world.tokenizer)
    teacher = Side(*world.teacher, world.tokenizer)
    checks = preflight(student, teacher, begin, task.terms, plan=plan, run=run)
    if config.log.progress:
        print_checks(checks)


def distil(config: TextConfig, run: Path, world: World) -> Trained:
    """The student, from the soft targets of the live teacher; also written as RUN/student_hf."""
    task = distillation(config, world)
    each = flops_per_token(world.begin.model, world.teacher.model, config.data.length)
    with cost(run, _tokens(config.training, config) * each):
        params = fit(run, task, config.training, parallel_config=config.parallel, log=config.log, label="student")
    student = Trained(world.student, world.begin.plain(without_projectors(params)))
    save(run / STUDENT, *student, world.tokenizer)
    return student


def train_alone(config: TextConfig, run: Path, world: World, arm: str) -> Trained:
    """The student by cross-entropy on the same text, from the same start."""
    training = config.training
    if arm == "equal_time":
        training = dataclasses.replace(training, steps=_equal_steps(config, run))
    task = Task(
        student=world.begin.model,
        terms=[task_term(), *router_terms(world.begin.model, config.objective.router_weight)],
        reduction=config.objective.reduction,
        examples=world.train,
        base_params=world.begin.base,
        evaluate=_curve(config, world),
        identity=identity(config, world, training),
    )
    flops = _tokens(training, config) * flops_per_token(world.begin.model, None, config.data.length)
    with cost(run / arm, flops):
        params = fit(run / arm, task, training, parallel_config=config.parallel, log=config.log, label=arm)
    return Trained(world.student, world.begin.plain(params))


def _tokens(training: TrainingConfig, config: TextConfig) -> int:
    return training.steps * training.batch_size * config.data.length


def _equal_steps(config: TextConfig, run: Path) -> int:
    """Steps of cross-entropy that take as long as distilling did; decided once, kept in RUN/equal_time/steps.json."""
    return processes.from_first(lambda: _steps_of_equal_time(config, run))


def _steps_of_equal_time(config: TextConfig, run: Path) -> int:
    file = run / "equal_time" / "steps.json"
    if not file.exists():
        seconds = {
            arm: seconds_per_step(folder, config)
            for arm, folder in (("distilled", run), ("alone", run / "equal_tokens"))
        }
        unit = config.training.dispatch
        steps = max(round(config.training.steps * seconds["distilled"] / seconds["alone"] / unit), 1) * unit
        write_json(file, {"steps": steps, "seconds_per_step": seconds})
    return json.loads(file.read_text())["steps"]


def seconds_per_step(folder: Path, config: TextConfig) -> float:
    """Median over the dispatches of a training, from its metrics."""
    speeds = [record["tokens_per_second"] for record in read_metrics(folder) if record["kind"] == "train"]
    return config.training.batch_size * config.data.length / float(np.median(speeds))


def evaluate_run(config: TextConfig, run: Path, world: World) -> dict[str, Any]:
    """Writes RUN/evaluation.json and RUN/summary.json; returns the summary."""
    evaluation: dict[str, Any] = {}
    with cost(run / "evaluation", None):
        teacher, length = world.teacher, config.data.length
        evaluation["teacher"] = (
            world.heldout.of_teacher() | _sizes(teacher.model, length) | _write(config, world, *teacher)
        )
        for name in ("student", *config.arms, "start"):
            params = _params_of(config, run, world, name)
            evaluation[name] = world.heldout.measure(world.student, params) | _sizes(world.student, length)
            evaluation[name] |= _write(config, world, world.student, params)
            if name != "start":
                evaluation[name] |= _training_of(run if name == "student" else run / name, config)
    evaluation["heldout"] = {"rows": len(world.prompts), "tokens": world.heldout.tokens}
    evaluation["prompts"] = [world.tokenizer.decode(row) for row in world.prompts]
    packed = prepared.summaries(config.data, world.tokenizer, config.data_dir)
    evaluation["text"] = {side: dataclasses.asdict(summary) for side, summary in packed.items()}
    evaluation["verdict"] = verdict(evaluation)
    arms = {NAMES[arm]: run / arm for arm in config.arms}
    evaluation["ledger"] = ledger({"distillation": run} | arms | {"evaluation": run / "evaluation"})
    write_json(run / "evaluation.json", evaluation)
    summary = summarize(evaluation)
    write_json(run / "summary.json", summary)
    return summary


def _params_of(config: TextConfig, run: Path, world: World, name: str, best: str | None = None) -> Params:
    if name == "start":
        return world.student.init(jax.random.key(config.training.seed))
    return world.begin.plain(restore(world.begin.model, run if name == "student" else run / name, best).params)


def _sizes(model: Model, length: int) -> dict[str, float]:
    return {"parameters": model.parameter_count(), "flops_per_token": model.config.flops_per_token(length)}


def _training_of(folder: Path, config: TextConfig) -> dict[str, float]:
    """Tokens and seconds an arm learnt from."""
    steps = max(record["step"] for record in read_metrics(folder) if record["kind"] == "train")
    tokens = steps * config.training.batch_size * config.data.length
    return {"steps": steps, "training_tokens": tokens, "training_seconds": steps * seconds_per_step(folder, config)}


def _write(config: TextConfig, world: World, model: Model, params: Params) -> dict[str, Any]:
    """How a model continues the prompts, and how many tokens a second it writes."""
    written = write(model, params, world.prompts, world.tokenizer, config.new_tokens)
    start = time.perf_counter()
    write(model, params, world.prompts, world.tokenizer, config.new_tokens)
    seconds = time.perf_counter() - start
    texts = [world.tokenizer.decode(row) for row in written]
    return {"written": texts, "tokens_per_second": written.size / seconds}


def write(model: Model, params: Params, prompts: np.ndarray, tokenizer: TextTokenizer, count: int) -> np.ndarray:
    """``[B, count]`` ids a model writes greedily after prompts ``[B, L]``."""
    ids = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.eos_id}
    return processes.fetch(greedy(model, params, jax.device_put(prompts), max_new_tokens=count, **ids))


def verdict(evaluation: dict[str, Any]) -> list[str]:
    """Distilled beside cross-entropy, a line for each arm: by how many nats it is better, or worse.

    Example:
      >>> verdict({"student": {"kl": 1.0, "nll": 3.0}, "equal_time": {"kl": 1.5, "nll": 2.9}})
      ['distilled, at equal time: KL to the teacher 0.5000 better, nats per token 0.1000 worse: not better on both']
    """
    lines = []
    for arm in ("equal_tokens", "equal_time"):
        if arm in evaluation:
            gains = [evaluation[arm][key] - evaluation["student"][key] for key in ("kl", "nll")]
            kl, nll = (f"{abs(gain):.4f} {'better' if gain > 0 else 'worse'}" for gain in gains)
            both = "better on both" if min(gains) > 0 else "not better on both"
            lines.append(f"distilled, at {arm.replace('_', ' ')}: KL to the teacher {kl}, nats per token {nll}: {both}")
    return lines


def summarize(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The few numbers of summary.json."""
    keep = ("parameters", "kl", "nll", "perplexity", "agreement", "flops_per_token", "tokens_per_second")
    keep += ("training_tokens", "training_seconds")
    names = [name for name in ("teacher", "student", "equal_tokens", "equal_time", "start") if name in evaluation]
    rows = {name: {key: evaluation[name][key] for key in keep if key in evaluation[name]} for name in names}
    seconds = sum(row["seconds"] for row in evaluation["ledger"]["rows"])
    agreement = evaluation["student"]["agreement"]
    return rows | {"agreement": agreement, "verdict": evaluation["verdict"], "seconds": seconds}


NAMES = {
    "teacher": "teacher",
    "student": "distilled",
    "equal_tokens": "cross-entropy, equal tokens",
    "equal_time": "cross-entropy, equal time",
    "start": "untrained start",
}
"""Models as tables call them."""
COLUMNS = {
    "KL": ("kl", ".4f"),
    "nats/token": ("nll", ".4f"),
    "perplexity": ("perplexity", ",.1f"),
    "agreement": ("agreement", ".2%"),
    "parameters": ("parameters", ",.0f"),
    "FLOPs/token": ("flops_per_token", ".3g"),
    "tokens/s": ("tokens_per_second", ",.0f"),
    "trained on": ("training_tokens", ",.0f"),
    "seconds": ("training_seconds", ",.0f"),
}
"""Column → key and format."""


def print_summary(summary: dict[str, Any], run: Path) -> None:
    """The table of the arms, and what comes of it."""
    rows = [[NAMES[name], *cells(summary[name])] for name in NAMES if name in summary]
    print_rows(str(run), ("model", *COLUMNS), rows)
    print(*summary["verdict"], sep="\n")


def cells(values: dict[str, Any]) -> list[str]:
    """A model's numbers, written."""
    return [format(values[key], how) if key in values else "–" for key, how in COLUMNS.values()]


def _open(run: Path) -> tuple[TextConfig, World]:
    config = read_config(run, TextConfig)
    if not (run / "checkpoints").is_dir():
        raise FileNotFoundError(f"{run}: no checkpoints; expected a run folder, made by scripts/distill.py.")
    return config, make_world(config)


def evaluate_folder(run: Path) -> dict[str, Any]:
    """``evaluate_run`` of what stands in a run folder."""
    config, world = _open(run)
    return evaluate_run(config, run, world)


def answer(run: Path, prompts: list[str], best: str | None = None) -> list[dict[str, str]]:
    """How teacher and student of a run folder go on, as rows for a table; the student newest, or best by a metric."""
    config, world = _open(run)
    student = world.student, _params_of(config, run, world, "student", best)
    rows = []
    for prompt in prompts:
        ids = np.asarray([[*world.tokenizer.start, *world.tokenizer.encode(prompt)]], np.int32)
        if not ids.size:
            raise ValueError("an empty prompt; expected some text to go on with.")
        row = {"prompt": prompt}
        for name, model in (("teacher", world.teacher), ("student", student)):
            row[name] = world.tokenizer.decode(write(*model, ids, world.tokenizer, config.new_tokens)[0])
        rows.append(row)
    return rows
