"""What a job is told, and what is refused before it begins."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from perp import checkpoints, choice, distributed, machine, manifest, models, pruners, record
from perp.errors import UserError
from perp.granularity import Granularity
from perp.iterate import divided, schedule
from perp.modes import MODES
from perp.optim import OPTIMIZERS
from perp.parts import PARTS, UNIT_PARTS
from perp.reconstruct import ReconstructSettings
from perp.refine import METHODS as REFINE
from perp.refine import RefineSettings
from perp.retrain import RetrainSettings
from perp_kernels import Pattern

COMPARE = ("pruned", "dense-retrained")
CALIBRATION = ("joined", "documents")
_COUNTS = ("windows", "seqlen", "eval_windows", "refine_steps", "epochs", "reconstruct_batch", "steps", "batch", "rank")

# What gives the best quality for the time: on a model of 135M parameters at 2:4, perplexity 20.7 where Wanda with
# MaskLoRA retraining has 27.7, from the windows that retraining alone would have seen. Each choice was the one expected
# to be best and the first tried: none is tuned.
BEST: dict[str, Any] = {"method": "sparsegpt", "windows": 96, "epochs": 1, "distil": 0.5, "precision": "bf16"}


@dataclass(frozen=True)
class RunSettings:
    """One job. `windows` and `seqlen` left at None become 128 x 2048 on a GPU and 32 x 512 on a CPU.

    `skip` names linears that stay dense (`perp.skipped`). `refine` names how masks are improved ("none": not), `refit`
    fits the kept weights in closed form, `allocate` spreads a share over the blocks. `cycles` and `schedule` are those
    of `perp.iterate`, which divide the steps of retraining. `reconstruct` is the unit of reconstruction
    (`perp.granularity`) or "none"; `inputs`, `targets`, `loss` are those of `ReconstructSettings`. `retrain` names the
    parts trained on the language-model loss (empty: none); `compare` the further lines measured: "pruned" (no recovery)
    and "dense-retrained" (the dense model trained on the same text). Learning rates left at None are those that suit
    the parts. `distil`, `temperature`, `optimizer` and `shard` are those of `RetrainSettings`, `precision` that of both
    kinds of training; `keep_adapters` saves adapters that do not merge (lora) beside the pruned model. `data` is judged
    on its test part, `eval_data` whole. `calibration` draws windows of the "joined" text, or of single "documents" that
    are longer (`perp.data.document_windows`). `overwrite` replaces what is in `out`, also an unfinished run, which
    otherwise is gone on with (`perp.record`). `packed` writes the packed file beside the plain model. `stream` keeps
    one block at a time in memory (`perp.streamed_run`); None leaves it to the plan, by the memory that may be used:
    `gpu_memory`, `cpu_memory` such as "20GB" (None: what is free).
    """

    model: str
    out: Path
    pattern: str = "0.5"
    method: str = "wanda"
    allocate: str = "uniform"
    skip: tuple[str, ...] = ()
    refine: str = "none"
    refine_steps: int | None = None
    refine_alpha: float | None = None
    refit: bool = False
    cycles: int = 1
    schedule: str = "geometric"
    reconstruct: str = "half-block"
    reconstruct_parts: tuple[str, ...] = ("kept", "norms")
    inputs: str = "sparse"
    targets: str = "dense-weights"
    loss: str = "mse"
    reconstruct_lr: float | None = None
    reconstruct_batch: int = 2
    epochs: int = 3
    retrain: tuple[str, ...] = ("mask_lora", "norms")
    retrain_lr: float | None = None
    steps: int = 64
    batch: int = 4
    checkpointing: bool = True
    distil: float = 0.0
    temperature: float = 1.0
    optimizer: str = "adamw"
    precision: str = "model"
    shard: bool = False
    keep_adapters: bool = False
    rank: int = 16
    alpha: float = 32.0
    data: str = "demo"
    eval_data: tuple[str, ...] = ()
    windows: int | None = None
    calibration: str = "joined"
    seqlen: int | None = None
    eval_windows: int = 32
    compare: tuple[str, ...] = ("pruned",)
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    packed: bool = False
    stream: bool | None = None
    gpu_memory: str | None = None
    cpu_memory: str | None = None

    @property
    def title(self) -> str:
        added = [self.refine] * (self.refine != "none") + ["refit"] * self.refit
        spread = f" {self.allocate}" * (self.allocate != "uniform")
        return " + ".join([f"{self.method} {self.pattern}{spread}", *added])

    @property
    def for_refine(self) -> RefineSettings | None:
        if self.refine == "none":
            return None
        return RefineSettings(method=self.refine, steps=self.refine_steps, alpha=self.refine_alpha)

    @property
    def for_reconstruct(self) -> ReconstructSettings | None:
        if self.reconstruct == "none":
            return None
        return ReconstructSettings(
            parts=self.reconstruct_parts,
            inputs=self.inputs,
            targets=self.targets,
            loss=self.loss,
            lr=self.reconstruct_lr,
            epochs=self.epochs,
            batch=self.reconstruct_batch,
            r=self.rank,
            alpha=self.alpha,
            seed=self.seed,
            precision=self.precision,
        )

    @property
    def for_retrain(self) -> RetrainSettings | None:
        if not self.retrain:
            return None
        return RetrainSettings(
            parts=self.retrain,
            lr=self.retrain_lr,
            steps=self.steps,
            batch=self.batch,
            checkpointing=self.checkpointing,
            distil=self.distil,
            temperature=self.temperature,
            optimizer=self.optimizer,
            precision=self.precision,
            shard=self.shard,
            r=self.rank,
            alpha=self.alpha,
            # Not the seed that drew the calibration windows, so that training does not begin with the very same.
            seed=self.seed + 1,
        )


def best(settings: RunSettings, chosen: Collection[str] = ()) -> RunSettings:
    """These settings with what `BEST` has instead, but for the fields that were `chosen`, and for bf16 where the device
    is slower in it."""
    slower = not machine.multiplies_bf16(machine.find_device(settings.device))
    kept = {*chosen, "precision"} if slower else chosen
    return replace(settings, **{name: value for name, value in BEST.items() if name not in kept})


def check(settings: RunSettings, weights: bool = True) -> Pattern:
    """Refuse what cannot work before any weight or text is read; gives the parsed pattern.

    Without `weights` those need not be there: for a plan, the configuration will do.
    """
    pattern = Pattern.parse(settings.pattern)
    scoped = pruners.resolve(settings.method, pattern)[1]
    for name, given, known in (
        ("refine", [settings.refine], ("none", *REFINE)),
        ("reconstruct parts", settings.reconstruct_parts, UNIT_PARTS),
        ("retrain", settings.retrain, PARTS),
        ("optimizer", [settings.optimizer], OPTIMIZERS),
        ("compare", settings.compare, COMPARE),
        ("calibration", [settings.calibration], CALIBRATION),
    ):
        if unknown := sorted(set(given) - set(known)):
            raise UserError(f"{name} cannot be {unknown[0]!r}; choose among {', '.join(known)}.")
    for name in _COUNTS:
        least = 2 if name == "seqlen" else 1
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"{name.replace('_', ' ')} is {value}; it must be at least {least}.")
    for name in ("reconstruct_lr", "retrain_lr", "alpha"):
        value = getattr(settings, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{name.replace('_lr', ' learning rate')} is {value}; it must be a positive number.")
    if settings.refine == "none" and settings.refine_alpha is not None:
        raise UserError("--refine-alpha is of refinement by sparsefw, and --refine is none; add --refine sparsefw.")
    refine = settings.for_refine
    choice.check(settings.method, scoped, refine, settings.refit, settings.allocate)
    if refine and settings.windows is not None:
        refine.windows(settings.windows)
    machine.find_device(settings.device)
    machine.check_dtype(settings.dtype)
    _check_reconstruction(settings)
    _check_cycles(settings)
    _check_ranks(settings)
    # Parts that exclude each other are refused by the settings they go to.
    _ = settings.for_reconstruct, settings.for_retrain
    if ("lora" in settings.retrain) != settings.keep_adapters:
        raise UserError(
            "lora adapters cannot be merged without filling the zeros; add --keep-adapters to save them beside the "
            "pruned model, or retrain mask_lora, which merges."
            if "lora" in settings.retrain
            else "--keep-adapters keeps what lora trains, and lora is not retrained; leave it out, all else merges."
        )
    for size in (settings.gpu_memory, settings.cpu_memory):
        machine.parse_size(size)
    # Where a run is unfinished, what is there is its own: whether this one may go on with it is decided later.
    checkpoints.check_output(settings.out, settings.overwrite or record.unfinished(settings.out))
    models.check_model(settings.model, settings.trust_remote_code, weights)
    return pattern


def _check_cycles(settings: RunSettings) -> None:
    """Refuse cycles that the pattern or the retraining cannot be divided into."""
    schedule(settings.pattern, settings.cycles, settings.schedule)
    if settings.for_retrain is not None:
        divided(settings.for_retrain, settings.cycles)
    elif settings.cycles > 1:
        raise UserError(
            f"{settings.cycles} cycles retrain after each, and nothing is retrained; choose parts to retrain."
        )


def _check_reconstruction(settings: RunSettings) -> None:
    """Refuse a unit of reconstruction that does not exist, and choices that it leaves without meaning."""
    if settings.reconstruct == "none":
        default = {field.name: field.default for field in fields(settings)}
        for name in ("inputs", "targets", "loss"):
            if getattr(settings, name) != default[name]:
                raise UserError(f"--{name} is of reconstruction, and --granularity is none; choose a granularity too.")
        return
    granularity = Granularity.parse(settings.reconstruct)
    if granularity.name == "matrix" and set(settings.reconstruct_parts) == {"norms"}:
        raise UserError("single matrices have no norms to reconstruct with; add kept, or choose half-block.")


def check_streamed(job: RunSettings) -> None:
    """Refuse what only a model in memory can do: UserError."""
    inexact = {name for name, mode in MODES.items() if not mode.exact}
    for refused, what in (
        (job.retrain and "dense-retrained" in job.compare, "retrain the dense model; leave dense-retrained out"),
        (bool(inexact & set(job.retrain)), "retrain adapters that lose something when merged; retrain mask_lora"),
        (bool({"kept", "full"} & set(job.retrain)), "retrain all weights; retrain mask_lora, norms, biases or head"),
    ):
        if refused:
            raise UserError(f"a streamed run cannot {what}, or pass --no-stream where the model fits in memory.")


def _check_ranks(settings: RunSettings) -> None:
    """Refuse what several processes cannot do, and what one cannot."""
    ranks = distributed.size()
    if ranks == 1:
        if settings.shard:
            raise UserError("--shard shares weights out among the processes of torchrun; leave it out without them.")
        return
    if settings.stream:
        raise UserError("--stream is of a run of one process; leave it out, or start without torchrun.")
    if settings.retrain:
        distributed.check_batch(settings.batch)
    if settings.windows is not None:
        distributed.check_windows(settings.windows)


def demo(out: Path) -> list[RunSettings]:
    """The demo's two jobs, at sizes for two CPU cores, a quarter of an hour and 6 GB; its own older output may go."""
    places = {pattern: out / f"wanda-{pattern.replace(':', '-')}" for pattern in ("0.5", "2:4")}
    return [
        RunSettings(
            model="demo",
            out=place,
            pattern=pattern,
            epochs=1,
            reconstruct_batch=1,
            steps=12,
            batch=1,
            checkpointing=False,
            windows=16,
            seqlen=512,
            eval_windows=8,
            compare=COMPARE,
            device="cpu",
            # What is unfinished is gone on with.
            overwrite=(place / manifest.NAME).exists() and not record.unfinished(place),
        )
        for pattern, place in places.items()
    ]
