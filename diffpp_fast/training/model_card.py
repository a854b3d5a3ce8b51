"""The model card of an export: README.md with what the run knows of itself, and nothing else.

Paths of this machine stay out of it: of a file or folder its name is told, and that of the pipeline that it is part of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks.loading import exists, is_file, split_hub_id
from diffpp_fast.networks.lora_formats import LoraFormat, LoraTarget, is_for_diffusers, kohyas_program
from diffpp_fast.training.build.networks import stored_weights
from diffpp_fast.training.callbacks import read_sessions
from diffpp_fast.training.checkpoint import SavedGenerator, read_scores
from diffpp_fast.training.config import Config
from diffpp_fast.training.extraction import Extraction
from diffpp_fast.training.output import CARD
from diffpp_fast.training.schedulers import pipeline_call
from diffpp_fast.training.state import read_record
from diffpp_fast.user_paths import public_name

#: Scalars of a run that are figures of the generator.
FIGURES = {
    "grid/held_out": "held-out reward, mean over the run's sample grid",
    "grid/reward": "optimised reward, mean over the run's sample grid",
    "generator/reward": "optimised reward, mean over the last steps' samples",
}
#: Methods as their papers call them.
METHOD_NAMES = {
    "diff_instruct": "Diff-Instruct",
    "diff_instruct_pp": "Diff-Instruct++",
    "dmd2": "DMD2",
    "decoupled_dmd": "Decoupled DMD",
    "sid": "SiD",
    "sim": "SIM",
    "diff_instruct_star": "Diff-Instruct*",
    "didr": "DIDR",
}


@dataclass(frozen=True)
class Licence:
    """A licence as the hub's cards name it.

    Attributes:
        name: an identifier of the hub, such as "apache-2.0", or with a link the name of another licence.
        link: to the text of a licence that the hub has no identifier for.
    """

    name: str
    link: str | None = None

    def __post_init__(self) -> None:
        if self.link is None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.name):
            raise ConfigurationError(
                f"--license {self.name}: identifiers of the hub's licences are like apache-2.0 or openrail++; "
                "for any other licence give --license-link URL, too"
            )
        if self.name == "other" and self.link is None:
            raise ConfigurationError("--license other: name the licence, and give --license-link URL")
        if self.link is not None and not re.fullmatch(r"https?://[^\s<>]+", self.link):
            raise ConfigurationError(f"--license-link {self.link}: an address begins with https:// or http://")
        if not self.name.strip() or not self.name.isprintable():
            raise ConfigurationError("--license: a licence's name is a line of text")

    def metadata(self) -> dict[str, str]:
        if self.link is None:
            return {"license": self.name}
        return {"license": "other", "license_name": self.name, "license_link": self.link}


@dataclass(frozen=True)
class CardFacts:
    """Facts for a card besides the run's configuration.

    Attributes:
        licence: None: nobody has said.
        evaluation: of the generator, from `read_evaluation`.
        title: None: the name of the run's folder.
    """

    licence: Licence | None = None
    evaluation: Mapping[str, Any] | None = None
    title: str | None = None


NOTHING_SAID = CardFacts()
Form = Literal["network", "pipeline", "lora"]


def write_card(
    folder: Path,
    config: Config,
    generator: object,
    form: Form,
    facts: CardFacts,
    *,
    target: LoraTarget,
    scheduler: str | None,
    kind: LoraFormat | None = None,
    file: str | None = None,
    extraction: Extraction | None = None,
) -> None:
    """Write the card into an export.

    Args:
        folder: of the export.
        config: of the run.
        generator: a `SavedGenerator`, whose run is asked; anything else: nothing is known but the configuration.
        form: of what is exported.
        facts: what the user says.
        target: the network.
        scheduler: the class of the one in `scheduler/`; None: there is none.
        kind, file: the format of a LoRA, and the name of its file.
        extraction: what is lost, where the LoRA was extracted.
    """
    saved = generator if isinstance(generator, SavedGenerator) else None
    title = facts.title or public_name(Path(config.output).resolve()) or "generator"
    sections = [
        f"# {_text(title)}",
        _about(config, form, kind),
        _use(config, form, target, scheduler, kind, file, extraction),
        _training(config, saved),
        _figures(saved, facts.evaluation),
        *([] if extraction is None else [_extraction(extraction)]),
        _licence(config, facts.licence),
        "## Unknown\n\nNobody has written down here what the generator should not be used for, which biases it has "
        "from its base, its prompts and its reward, or what it costs in energy: whoever publishes it should.",
    ]
    text = f"---\n{_metadata(config, form, facts, title, extraction)}\n---\n\n" + "\n\n".join(sections) + "\n"
    (folder / CARD).write_text(text, encoding="utf-8")


def read_evaluation(folder: Path, generator: SavedGenerator) -> dict[str, Any]:
    """Return what `diffpp-fast evaluate` has found of a generator: its `summary.json`, with `model` the one entry.

    Raises ConfigurationError for a folder without one, and for an evaluation of other generators.
    """
    said = f"--evaluation {folder}: it holds no summary.json of `diffpp-fast evaluate`"
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        models = {str(model["origin"]): model for model in summary["models"]}
        own = [model for origin, model in models.items() if _place(origin) == _place(str(generator))]
        found = {**summary, "model": own[0] if own else None}
        if own:
            _figures(None, found)  # with all that it needs
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigurationError(f"{said} ({type(error).__name__})") from None
    if not own:
        raise ConfigurationError(
            f"--evaluation {folder}: it is of {', '.join(models)} and not of {generator}: evaluate that one, or leave "
            "the option out"
        )
    return found


def _place(origin: str) -> tuple[str, ...]:
    """The run, checkpoint and weights that an origin names, wherever the run lies."""
    return Path(origin).absolute().parts[-4:]


def _metadata(config: Config, form: Form, facts: CardFacts, title: str, extraction: Extraction | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    base = _hub_base(config, extraction)
    optional: dict[str, Any] = {} if facts.licence is None else facts.licence.metadata()
    if base is not None:
        optional["base_model_relation"] = "adapter" if form == "lora" else "finetune"
    results = []
    if facts.evaluation is not None:
        prompts = _prompts(facts.evaluation["prompts"]["from"])
        results = [
            EvalResult(
                task_type="text-to-image",
                dataset_type="prompts",
                dataset_name=prompts,
                metric_type=name,
                metric_name=name,
                metric_value=score["mean"],
            )
            for name, score in facts.evaluation["model"]["scores"].items()
            if score["mean"] is not None
        ]
    data = ModelCardData(
        base_model=base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[
            "one-step" if len(config.models.generator.times) == 1 else "few-step",
            "diffpp_fast",
            config.method.name.replace("_", "-"),
            *(["lora"] if form == "lora" else []),
        ],
        eval_results=results or None,
        model_name=title if results else None,
        **{"license": "unknown", **optional},
    )
    return str(data.to_yaml(line_break="\n"))


def _hub_base(config: Config, extraction: Extraction | None) -> str | None:
    """The repository that the weights are a change of; None where it is a folder or a file of this machine."""
    if extraction is not None and not extraction.from_begun:
        return extraction.base_id
    path = stored_weights(config.models, "generator").path
    return None if path.startswith(("/", "package:")) else split_hub_id(path)[0]


def _about(config: Config, form: Form, kind: LoraFormat | None) -> str:
    steps = len(config.models.generator.times)
    generator = f"{'one' if steps == 1 else steps}-step text-to-image generator"
    a = "An" if steps == 8 else "A"
    what = {
        "network": f"The network of {a.lower()} {generator}",
        "pipeline": f"{a} {generator} as a whole pipeline",
        "lora": f"A LoRA that makes {a.lower()} {generator} of its base, in the format of {kind}",
    }[form]
    method = METHOD_NAMES[config.method.name]
    rewarded = config.rewards.optimised is not None and config.rewards.optimised.scale != 0.0
    aligned = "with a reward" if rewarded else "without a reward"
    return f"{what}, trained with {method} {aligned} by diffpp_fast. It needs prompts alone; no picture was trained on."


def _use(
    config: Config,
    form: Form,
    target: LoraTarget,
    scheduler: str | None,
    kind: LoraFormat | None,
    file: str | None,
    extraction: Extraction | None,
) -> str:
    call = config.models.generator
    one = len(call.times) == 1
    where = "there" if one else "at the first"
    scale = f"the schedule's sigma {where}" if call.input_scale == "sigma" else f"{call.input_scale:g}"
    if one:
        made = "One call of the network makes a picture: one step, no guidance (guidance scale 1), at timestep "
        adapter = "OneStepGenerator"
    else:
        between = "new noise" if call.renoise == "fresh" else "the noise that each predicts (DDIM)"
        made = f"{len(call.times)} calls of the network make a picture: no guidance (guidance scale 1), {between} "
        made += "between them, at timesteps "
        adapter = "FewStepGenerator"
    said = f"## Use\n\n{made}{', '.join(map(str, call.times))}, from noise times {scale}."
    if kind == "comfyui":
        said += f" ComfyUI finds {_literal(file)} in its folder `models/loras`."
    begun = _other_weights(config, extraction) if form == "lora" else None
    if begun is not None:
        said += (
            f" The LoRA is a change of {begun}: load that into the pipeline first. One of the pipeline's own network "
        )
        said += "is made by `diffpp-fast export RUN --extract-lora RANK --base PIPELINE`."
    if kind == "kohya":
        said += f" {_literal(file)} is for {kohyas_program(target)} and programs that read its files."
    if scheduler is None:
        steps = "that step" if one else "these steps"
        return f"{said} No scheduler of diffusers makes {steps}: use `diffpp_fast.networks.{adapter}`."
    if kind in ("comfyui", "kohya") and not is_for_diffusers(kind, target):
        return said
    lines = [
        "from diffusers import DiffusionPipeline" + ("" if form == "pipeline" else f", {scheduler}"),
        *(["from peft import PeftModel"] if form == "lora" and not target.loadable else []),
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("{_pipeline(config, form, extraction)}")',
        *([] if begun is None else [f"# first load what the LoRA is a change of into pipeline.{target.part}"]),
        *_put_in(form, target, kind, file),
        *(
            []
            if form == "pipeline"
            else [f'pipeline.scheduler = {scheduler}.from_pretrained(FOLDER, subfolder="scheduler")']
        ),
        f"image = pipeline(prompt=PROMPT, {pipeline_call(config)}).images[0]",
    ]
    code = "\n".join(lines).replace('"FOLDER"', "FOLDER")
    return f"{said} In diffusers, FOLDER being where these files are:\n\n```python\n{code}\n```"


def _other_weights(config: Config, extraction: Extraction | None) -> str | None:
    """Name the weights that a LoRA is a change of where they are not the reference's, as a released generator's."""
    if extraction is not None and not extraction.from_begun:
        return None
    stored = stored_weights(config.models, "generator")
    # Adapters are written with a LoRA that was merged before them; what is extracted is the change after it.
    merged = None if extraction is None else stored.lora
    if stored.path == config.models.reference.path and merged is None:
        return None
    names = [_named(path).partition("; its origin")[0] for path in (stored.path, *([merged.path] if merged else []))]
    return ", with the LoRA ".join(names) + (" merged into it" if merged else "")


def _pipeline(config: Config, form: Form, extraction: Extraction | None) -> str:
    """The place that the rest of the pipeline is loaded from."""
    if form == "pipeline":
        return "FOLDER"
    if extraction is not None and not extraction.from_begun:
        return extraction.base_id or "BASE"
    path = config.models.base or config.models.reference.path
    return "BASE" if path.startswith(("/", "package:")) else split_hub_id(path)[0]


def _put_in(form: Form, target: LoraTarget, kind: LoraFormat | None, file: str | None) -> list[str]:
    """The lines that bring what was exported into a pipeline."""
    part = f"pipeline.{target.part}"
    if form == "network":
        return [f"{part} = type({part}).from_pretrained(FOLDER)"]
    if form == "lora" and not target.loadable:
        return [f"{part} = PeftModel.from_pretrained({part}, FOLDER)"]
    if form == "lora":
        name = "" if kind == "diffusers" else f", weight_name={json.dumps(file, ensure_ascii=False)}"
        return [f"pipeline.load_lora_weights(FOLDER{name})"]
    return []


def _training(config: Config, saved: SavedGenerator | None) -> str:
    training, method, rewards, lora = config.training, config.method, config.rewards, config.models.generator.lora
    record = {} if saved is None else read_record(saved.folder)
    session, prompts = _session(saved), _literal(_prompts(config.prompts.path))
    began, reference = stored_weights(config.models, "generator").path, config.models.reference.path
    rows = {
        "method": f"{METHOD_NAMES[method.name]} (`{method.name}`), guidance scale {method.guidance_scale:g}",
        "frozen reference": _named(reference),
        "began as": ("the reference" if began == reference else _named(began)) + _initial(config, record),
        "trained": "all weights" if lora is None else f"LoRA of rank {lora.rank}, alpha {lora.alpha or lora.rank:g}",
        "data": f"{record.get('prompt_count', 'an unknown number of')} prompts of {prompts}, no pictures; "
        f"digest of their text: {record.get('prompts', 'unknown')}",
        "reward": "none"
        if rewards.optimised is None
        else f"{_literal(_factory(rewards.optimised.factory))}, scale {rewards.optimised.scale:g}",
        "held-out reward": "none" if rewards.held_out is None else _literal(_factory(rewards.held_out.factory)),
        "seed": str(config.seed),
        "updates of the generator": str(record.get("step", "unknown")),
        "samples per update": str(training.global_batch),
        "weights": "unknown" if saved is None else _which(saved, config),
        "precision": config.precision,
        "optimizer": f"{config.optimizers.generator.name}, learning rate {config.optimizers.generator.lr:g}",
        "device": _device(session),
        "code": _code(session),
    }
    return "## Training\n\n" + _table(("", ""), rows.items())


def _initial(config: Config, record: Mapping[str, Any]) -> str:
    """The LoRA that the generator began with."""
    section = config.models.generator.initial_lora
    if section is None:
        return ""
    digest = (record.get("inputs") or {}).get("generator_lora", "unknown")
    scale = "" if section.scale == 1.0 else f", scale {section.scale:g}"
    fate = "trained on" if section.keep else "merged into it"
    return f", with the LoRA {_named(section.path)} (digest {digest}{scale}), {fate}"


def _which(saved: SavedGenerator, config: Config) -> str:
    if saved.name != "generator_ema" or config.ema is None:
        return "as of the last update"
    return f"moving average, decay {config.ema.decay:g}"


def _session(saved: SavedGenerator | None) -> dict[str, Any]:
    sessions = [] if saved is None else read_sessions(saved.folder.absolute().parents[1] / "environment.json")
    return sessions[-1] if sessions else {}


def _device(session: Mapping[str, Any]) -> str:
    processes = session.get("processes", 1)
    count = "1 process" if processes == 1 else f"{processes} processes"
    return f"{session['device']}, {count}" if session.get("device") else "unknown"


def _code(session: Mapping[str, Any]) -> str:
    if not session.get("diffpp_fast"):
        return "unknown"
    packages = {"diffpp_fast": session["diffpp_fast"], **session.get("packages", {})}
    return ", ".join(f"{name} {packages[name]}" for name in ("diffpp_fast", "torch", "diffusers") if name in packages)


def _figures(saved: SavedGenerator | None, evaluation: Mapping[str, Any] | None) -> str:
    parts = ["## Figures"]
    if evaluation is not None:
        prompts, model = evaluation["prompts"], evaluation["model"]
        rows = [
            (name, _interval(score), str(evaluation["metrics"].get(name, {}).get("better", "unknown")))
            for name, score in model["scores"].items()
        ]
        rows += [
            (name, f"{found['value']:.4g}" if "value" in found else json.dumps(found), "lower")
            for name, found in model["distances"].items()
        ]
        parts.append(
            f"`diffpp-fast evaluate`: {prompts['count']} prompts of {_literal(_prompts(prompts['from']))}, "
            f"{evaluation['images_per_prompt']} pictures each, seed {evaluation['seed']}; 95 % intervals over prompts."
        )
        parts.append(_table(("metric", "mean", "better"), rows))
    scores = {} if saved is None else read_scores(saved.folder)
    own = [(said, f"{scores[name]:.4g}") for name, said in FIGURES.items() if name in scores]
    if own:
        parts.append("As the run logged them last before this checkpoint; no intervals are known.")
        parts.append(_table(("scalar", "value"), own))
    if len(parts) == 1:
        parts.append("Unknown: neither the run nor an evaluation has measured any.")
    return "\n\n".join(parts)


def _interval(score: Mapping[str, Any]) -> str:
    if score["mean"] is None:
        return "unknown"
    if score["low"] is None or score["high"] is None:
        return f"{score['mean']:.4g}"
    return f"{score['mean']:.4g} [{score['low']:.4g}, {score['high']:.4g}]"


def _extraction(extraction: Extraction) -> str:
    said = "\n".join(f"- {_text(sentence)}" for sentence in extraction.sentences())
    return f"## Extraction\n\nThe LoRA was extracted from two whole networks by singular values:\n\n{said}"


def _licence(config: Config, licence: Licence | None) -> str:
    base = _named(stored_weights(config.models, "generator").path)
    if licence is None:
        said = "Unknown: nobody has named one."
    elif licence.link is None:
        said = f"`{licence.name}`, as the person who exported it says."
    else:
        link = licence.link.replace("(", "%28").replace(")", "%29")
        said = f"[{_text(licence.name)}]({link}), as the person who exported it says."
    return (
        f"## Licence\n\n{said} The licences of the base ({base}), of the prompts and of the reward model may say what "
        "is allowed, too."
    )


def _named(path: str) -> str:
    """A network for readers elsewhere."""
    if path.startswith("/"):
        around = Path(path).parent
        pipeline = public_name(around) if exists(around / "model_index.json") else ""
        name = "/".join(filter(None, (pipeline, public_name(path))))
        called = f", {_literal(name)}" if name else ""
        return f"{'a file' if is_file(path) else 'a folder'} of the author's{called}; its origin is unknown"
    return _literal(path)


def _prompts(path: str) -> str:
    return public_name(path) or "a folder"


def _factory(factory: str) -> str:
    return re.sub(r"^.*/", "", factory)


def _text(said: str) -> str:
    """Words of others as one line of Markdown that is neither markup nor HTML."""
    return re.sub(r"([\\`*\[\]<>#|])", r"\\\1", " ".join(said.split()))


def _literal(name: object) -> str:
    """A name as code, whatever is in it."""
    line = " ".join(str(name).split())
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    space = " " if line[:1] == "`" or line[-1:] == "`" else ""
    return f"{fence}{space}{line}{space}{fence}"


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
