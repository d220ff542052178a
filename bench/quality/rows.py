"""What is compared: one row per method, and beside it the anchor to match or beat.

An anchor is the figure of a reference implementation (one-shot rows) or of the published definition (recovery rows)
under the same protocol, on two CPU cores in fp32; its seconds are orders of size.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.quality.protocol import Protocol
from perp import parts, settings


@dataclass(frozen=True)
class Anchor:
    wiki: float
    sotu: float
    seconds: float


@dataclass(frozen=True)
class Training:
    """Which parts are trained, at which peak learning rate.

    epochs: passes over the windows, of reconstruction. distil: of retraining (`perp.RetrainSettings`).
    """

    parts: tuple[str, ...]
    lr: float
    epochs: int = 3
    distil: float = 0.0
    precision: str = "model"


@dataclass(frozen=True)
class Row:
    """One model: pruned (`method` at `pattern`, shares of zeros by `allocate`), its masks refined, its kept weights
    refitted, its units reconstructed, then retrained; each of these or not.

    start: the row whose model this one continues, at the same seed, instead of the dense model. windows: how many
    calibrate, instead of the protocol's; they are then among those that retraining sees, so that the row has no more
    data than that. cycles: prune and retrain so often on the way to the pattern, the steps divided among them. seed:
    what every seed of the row is raised by, as by `perp run --seed`.
    """

    name: str
    label: str
    method: str | None = None
    pattern: str | None = None
    allocate: str = "uniform"
    refine: str | None = None
    refit: bool = False
    granularity: str = "half-block"
    reconstruct: Training | None = None
    retrain: Training | None = None
    start: str | None = None
    windows: int | None = None
    cycles: int = 1
    seed: int = 0
    anchor: Anchor | None = None

    @property
    def source(self) -> Row | None:
        """The row of `start` at this seed."""
        return ROWS[self.start].at_seed(self.seed) if self.start else None

    def at_seed(self, seed: int) -> Row:
        """This row at another seed, under a name of its own; seed 0 is the row itself, which alone has an anchor."""
        if not seed:
            return self
        return replace(
            self, name=f"{self.name}{SEED}{seed}", label=f"{self.label}, seed {seed}", seed=seed, anchor=None
        )

    def at_rate(self, lr: float) -> Row:
        """This row with another rate in its last training stage, under a name of its own."""
        stage = "retrain" if self.retrain else "reconstruct"
        training = getattr(self, stage)
        if training is None:
            raise ValueError(f"{self.name} trains nothing, so that it has no learning rate to set.")
        changed = replace(training, lr=lr)
        return replace(
            self, name=f"{self.name}@{lr:g}", label=f"{self.label}, lr {lr:g}", **{stage: changed}, anchor=None
        )

    def settings(self, protocol: Protocol) -> dict[str, Any]:
        """All that the row's model depends on, as JSON holds it."""
        return json.loads(json.dumps({**self._choices(), "protocol": asdict(protocol)}))

    def _choices(self) -> dict[str, Any]:
        own = asdict(self)
        for described in ("name", "label", "anchor"):
            del own[described]
        # Left out where they say nothing, so that what was measured before they were is still what is described.
        for name in ("allocate", "refine", "refit", "windows", "cycles", "seed"):
            if own[name] == getattr(_PLAIN, name):
                del own[name]
        plain = asdict(Training((), 0.0))
        for training in filter(None, (own["reconstruct"], own["retrain"])):
            for name in ("epochs", "distil", "precision"):
                if training[name] == plain[name]:
                    del training[name]
        return {**own, "start": self.source._choices() if self.source else None}


# Between a row's name and its seed.
SEED = "@seed="
_PLAIN = Row("", "")
# Rates without a word in the label are the package's defaults, chosen on validation text.
KEPT_AND_NORMS, MASK_LORA, NORMS = ("kept", "norms"), ("mask_lora",), ("norms",)
WANDA_24 = "wanda-2:4"


def _default(*trained: str) -> Training:
    """These parts retrained at their default rate."""
    return Training(trained, parts.default_rate(parts.RETRAIN_RATES, trained))


_ALL = (
    Row("dense", "dense", anchor=Anchor(13.188, 20.889, 0)),
    Row(
        "dense-mask-lora",
        "dense, MaskLoRA r=16 trained",
        retrain=Training(MASK_LORA, 2e-3),
        anchor=Anchor(10.382, 20.442, 999),
    ),
    Row("magnitude-50", "magnitude 50 %", "magnitude", "0.5", anchor=Anchor(339.038, 401.114, 38)),
    Row("wanda-50", "Wanda 50 %", "wanda", "0.5", anchor=Anchor(32.309, 45.042, 74)),
    Row("sparsegpt-50", "SparseGPT 50 %", "sparsegpt", "0.5", anchor=Anchor(26.332, 41.799, 137)),
    Row(
        "wanda-50-half",
        "Wanda 50 % + half-block reconstruction",
        "wanda",
        "0.5",
        reconstruct=Training(KEPT_AND_NORMS, 3e-3),
        anchor=Anchor(28.962, 43.486, 470),
    ),
    Row(
        "magnitude-50-half",
        "magnitude 50 % + half-block reconstruction",
        "magnitude",
        "0.5",
        reconstruct=Training(KEPT_AND_NORMS, 3e-3),
        anchor=Anchor(145.451, 208.751, 398),
    ),
    Row("wanda-60", "Wanda 60 %", "wanda", "0.6", anchor=Anchor(90.296, 115.054, 71)),
    Row(WANDA_24, "Wanda 2:4", "wanda", "2:4", anchor=Anchor(121.0, 162.596, 74)),
    Row("sparsegpt-2:4", "SparseGPT 2:4", "sparsegpt", "2:4", anchor=Anchor(50.407, 94.841, 120)),
    Row("wanda-70", "Wanda 70 %", "wanda", "0.7"),
    Row("wanda-4:8", "Wanda 4:8", "wanda", "4:8"),
    # Rivals of --best, which 50 % and 2:4 have above and below.
    *(
        row
        for short, pattern, text in (("60", "60 %", "0.6"), ("70", "70 %", "0.7"), ("4:8", "4:8", "4:8"))
        for row in (
            Row(f"sparsegpt-{short}", f"SparseGPT {pattern}", "sparsegpt", text),
            Row(
                f"wanda-{short}-half",
                f"Wanda {pattern} + half-block reconstruction",
                "wanda",
                text,
                reconstruct=Training(KEPT_AND_NORMS, 3e-3),
            ),
        )
    ),
    Row("ria-60", "RIA 60 %", "ria", "0.6"),
    Row("ria-2:4", "RIA 2:4", "ria", "2:4"),
    Row("wanda-60-matrix", "Wanda 60 % per matrix", "wanda", "0.6/matrix"),
    Row("wanda-60-owl", "Wanda 60 %, OWL", "wanda", "0.6", allocate="owl"),
    *(
        Row(f"wanda-{short}-{method}", f"Wanda {pattern} + {name}", "wanda", text, refine=method)
        for short, pattern, text in (("60", "60 %", "0.6"), ("2:4", "2:4", "2:4"))
        for method, name in (("sparseswaps", "SparseSwaps"), ("sparsefw", "SparseFW"))
    ),
    Row("wanda-2:4-refit", "Wanda 2:4 + refit", "wanda", "2:4", refit=True),
    Row("wanda-2:4-swaps-refit", "Wanda 2:4 + SparseSwaps + refit", "wanda", "2:4", refine="sparseswaps", refit=True),
    Row(
        "wanda-2:4-swaps-refit-half",
        "Wanda 2:4 + SparseSwaps + refit + half-block reconstruction",
        "wanda",
        "2:4",
        refine="sparseswaps",
        refit=True,
        reconstruct=Training(KEPT_AND_NORMS, 3e-3),
    ),
    Row(
        "wanda-2:4-half",
        "Wanda 2:4 + half-block reconstruction",
        "wanda",
        "2:4",
        reconstruct=Training(KEPT_AND_NORMS, 3e-3),
        anchor=Anchor(90.444, 140.12, 440),
    ),
    Row(
        "wanda-2:4-block-1e-3",
        "Wanda 2:4 + block MaskLoRA reconstruction, lr 1e-3",
        "wanda",
        "2:4",
        granularity="block",
        reconstruct=Training(MASK_LORA, 1e-3),
        anchor=Anchor(60.634, 98.441, 411),
    ),
    Row(
        "wanda-2:4-block-5e-3",
        "Wanda 2:4 + block MaskLoRA reconstruction, lr 5e-3",
        "wanda",
        "2:4",
        granularity="block",
        reconstruct=Training(MASK_LORA, 5e-3),
        anchor=Anchor(48.055, 86.601, 384),
    ),
    Row(
        "wanda-2:4-block",
        "Wanda 2:4 + block MaskLoRA and norms reconstruction",
        "wanda",
        "2:4",
        granularity="block",
        reconstruct=Training((*MASK_LORA, *NORMS), 1e-2),
        anchor=Anchor(48.055, 86.601, 384),
    ),
    *(
        Row(
            f"wanda-2:4-norms{suffix}",
            f"Wanda 2:4 + norms retrained{words}",
            retrain=Training(NORMS, lr),
            start=WANDA_24,
            anchor=Anchor(40.261, 64.457, 808),
        )
        for suffix, words, lr in (("-2e-3", ", lr 2e-3", 2e-3), ("", "", 5e-3))
    ),
    Row(
        "wanda-2:4-mask-lora",
        "Wanda 2:4 + MaskLoRA r=16 retrained",
        retrain=Training(MASK_LORA, 2e-3),
        start=WANDA_24,
        anchor=Anchor(29.861, 55.075, 934),
    ),
    # Not biases, of which the protocol's model has none, nor lora, which never merges.
    *(
        Row(f"wanda-2:4-{name}", f"Wanda 2:4 + {label} retrained", retrain=_default(part), start=WANDA_24)
        for part, name, label in (
            ("full", "full", "all weights, masked,"),
            ("head", "head", "LoRA r=16 on the head"),
            ("lora_prune", "lora-prune", "LoRA-Prune r=16"),
            ("scale_lora", "scale-lora", "ScaleLoRA r=16"),
            ("spp", "spp", "SPP r=16"),
        )
    ),
    Row(
        "wanda-2:4-half-mask-lora-norms",
        "Wanda 2:4 + half-block reconstruction + MaskLoRA and norms retrained",
        retrain=_default(*MASK_LORA, *NORMS),
        start="wanda-2:4-half",
    ),
    # At 50 %, since 2:4 has no two patterns between itself and dense. Each beside the same steps after pruning at once.
    Row(
        "magnitude-50-full",
        "magnitude 50 % + all weights, masked, retrained",
        retrain=_default("full"),
        start="magnitude-50",
    ),
    Row("imp-50", "IMP 50 %: magnitude, all weights, 3 cycles", "magnitude", "0.5", retrain=_default("full"), cycles=3),
    Row("wanda-50-mask-lora", "Wanda 50 % + MaskLoRA r=16 retrained", retrain=_default(*MASK_LORA), start="wanda-50"),
    Row(
        "wanda-50-cycles",
        "Wanda 50 %, MaskLoRA r=16, 3 cycles",
        "wanda",
        "0.5",
        retrain=_default(*MASK_LORA),
        cycles=3,
    ),
)
_BEST = tuple(
    Row(
        f"best-{pattern}",
        f"perp run --best, {pattern}",
        settings.BEST["method"],
        pattern,
        windows=settings.BEST["windows"],
        reconstruct=Training(
            KEPT_AND_NORMS, 3e-3, epochs=settings.BEST["epochs"], precision=settings.BEST["precision"]
        ),
        retrain=Training(
            (*MASK_LORA, *NORMS), 2e-3, distil=settings.BEST["distil"], precision=settings.BEST["precision"]
        ),
    )
    for pattern in ("0.5", "0.6", "0.7", "4:8", "2:4")
)
ROWS = {row.name: row for row in (*_ALL, *_BEST)}


def named(name: str) -> Row:
    """The row of that name, at the seed that the name may end with; KeyError for another, one at another rate too."""
    plain, _, seed = name.partition(SEED)
    return ROWS[plain].at_seed(int(seed or 0))
