"""Records: the frozen, plain values that cross modules or reach files.

A record is built, passed on and written; nothing in it changes afterwards. `save_json` writes a file whole (to a
neighbour, then renamed) and `load_json` refuses unknown fields, wrong types and another schema version. Tables are CSV
through `rows_to_csv` and `rows_from_csv`. Units are part of every name: `_ns` nanoseconds, `_bytes` bytes, `_s` seconds;
a share or an accuracy is a fraction from 0 to 1.
"""

from __future__ import annotations

import csv
import io
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from toolkit.errors import UsageError

SCHEMA = 1
NO_BUDGET = "none"  # as a budget is written

GroupKind = Literal["conv", "neurons", "residual", "heads", "head_dim"]
Category = Literal["critical", "neutral", "detrimental", "undecided"]
Statistic = Literal["median", "p90", "p95", "p99"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
Format = Literal["onnx", "openvino", "tensorrt"]
Method = Literal["causal", "cswap", "psap", "crespr", "taylor", "l1", "l2", "random"]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all records."""


# --- request -------------------------------------------------------------------------------------------------------------


class Preprocess(Record, frozen=True, kw_only=True):
    """How an image becomes an input: resize the short side, centre crop, scale to 0..1, subtract `mean`, divide by `std`."""

    input: tuple[int, int, int, int] = (1, 3, 224, 224)
    resize: int = 0  # 0: no resize
    crop: int = 0  # 0: the input's size
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


class Budget(Record, frozen=True, kw_only=True):
    """A latency budget: absolute in nanoseconds, or relative to the dense model measured in the same session."""

    text: str
    latency_ns: float = 0.0
    ratio: float = 0.0

    @property
    def unlimited(self) -> bool:
        """No budget: only what does no harm goes."""
        return self.text == NO_BUDGET


class Training(Record, frozen=True, kw_only=True):
    """How weights are trained, by PSAP and by fine-tuning. `data` empty: the images of the run, without those it is judged on."""

    data: str = ""
    images: Annotated[int, msgspec.Meta(ge=0)] = 0  # at most so many; 0: all
    loss: Literal["distill", "labels"] = "distill"  # from the dense network, or cross-entropy
    features: Annotated[float, msgspec.Meta(ge=0)] = 0.5  # weight of what the last layer reads, beside the outputs
    augment: Literal["none", "crop", "crop+flip"] = "crop"  # crop: shifted by up to an eighth; flip suits photographs
    optimizer: Literal["sgd", "adamw"] = "sgd"
    batch: Annotated[int, msgspec.Meta(ge=1)] = 128
    lr: Annotated[float, msgspec.Meta(gt=0)] = 0.1  # at its highest; it ends at 0
    momentum: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 1e-4
    clip: Annotated[float, msgspec.Meta(ge=0)] = 1.0  # the gradient's norm is at most this; 0: no limit
    warmup: Annotated[int, msgspec.Meta(ge=0)] = 20  # steps in which the rate rises
    statistics: Literal["updated", "frozen"] = "updated"  # of batch norms
    checkpoint_steps: Annotated[int, msgspec.Meta(ge=1)] = 100


class Psap(Record, frozen=True, kw_only=True):
    """PSAP's own choices."""

    epochs: Annotated[int, msgspec.Meta(ge=1)] = 10  # in all
    soft: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.25  # share of them with soft masks, before surgery
    steps: Annotated[int, msgspec.Meta(ge=1)] = 20  # times that the masks are chosen anew
    ratios: Literal["sparsity", "threshold", "uniform"] = "sparsity"  # how pruning is dealt to the layers
    protect: bool = True  # keep gradients from shrinking filters that are not masked
    scratch: bool = False  # begin with random weights


class Crespr(Record, frozen=True, kw_only=True):
    """CRESPR's own choices."""

    modules: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0  # 0: chosen on measured latency
    coupling: Literal["saliency", "activations", "weights"] = "saliency"  # what connections are weighed by
    clustering: Literal["spectral", "random"] = "spectral"  # random: for comparison


class RunRequest(Record, frozen=True, kw_only=True):
    """The whole of what `edgekit run` was asked. `preprocess` None: the model's own, where it has one."""

    model: str
    data: str
    out: str
    budget: Budget
    profile: str = "local-onnxruntime"
    weights: str = ""
    eval_data: str = ""
    classes: str = ""
    preprocess: Preprocess | None = None
    statistic: Statistic = "median"
    method: Method = "causal"
    repair: bool = True
    samples: int = 512
    seed: int = 0
    threads: int = 0  # 0: the profile's
    on: str = ""  # ssh://[user@]host[:port]; empty: this machine
    precision: Precision | Literal["auto"] = "fp32"  # auto: whichever is predicted to lose less at the budget
    max_drop: float = 1.0  # points that int8 may cost before layers go back to float
    keep: tuple[str, ...] = ()
    min_width: int = 1
    rounds: int = 0  # 0: chosen by the budget
    max_memory_bytes: float = 0.0  # of weights and activations together; 0: no limit
    finetune: int = 0  # epochs after pruning; 0: none
    train: Training = Training()
    psap: Psap = Psap()
    crespr: Crespr = Crespr()


# --- model -> graph -------------------------------------------------------------------------------------------------


class Place(Record, frozen=True, kw_only=True):
    """One place where a channel group is sliced: `parameter` along `axis`, `elements` entries a channel, together or apart."""

    parameter: str
    axis: int
    elements: int


class ChannelGroup(Record, frozen=True, kw_only=True):
    """Channels that must be removed together.

    `width` channels before pruning; `floor` is the least width a plan may leave (0: the whole branch may go).
    `producers` make the channels, `consumers` mix them; both are node names of the traced program.
    """

    name: str
    kind: GroupKind
    width: int
    floor: int
    places: tuple[Place, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    prunable: bool = True
    reason: str = ""


class DimForm(Record, frozen=True, kw_only=True):
    """A dimension as a function of the plan: const + sum of elements x the product of some groups' widths.

    A term is (names of these groups, elements): one name mostly, two for heads x head size. Names are sorted, and one is repeated
    where its width is squared; terms are sorted too.
    """

    const: int
    terms: tuple[tuple[tuple[str, ...], int], ...] = ()

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups that it depends on."""
        return tuple(sorted({name for names, _ in self.terms for name in names}))

    def at(self, widths: Mapping[str, int]) -> int:
        """The dimension at these group widths."""
        return self.const + sum(elements * math.prod(widths[name] for name in names) for names, elements in self.terms)

    def fixed(self, widths: Mapping[str, int]) -> DimForm:
        """The form where these groups have these widths; equal terms are one, and none counts nothing."""
        counts: dict[tuple[str, ...], int] = {}
        for names, elements in self.terms:
            left = tuple(name for name in names if name not in widths)
            counts[left] = counts.get(left, 0) + elements * math.prod(widths[name] for name in names if name in widths)
        const = self.const + counts.pop((), 0)
        return DimForm(const=const, terms=tuple(sorted(term for term in counts.items() if term[1])))


# --- latency table ----------------------------------------------------------------------------------------------------


class Fingerprint(Record, frozen=True, kw_only=True):
    """What a latency is a property of. Two tables mix only when every field agrees."""

    device: str
    runtime: str
    runtime_version: str
    precision: Precision
    threads: int
    batch: int
    instruction_set: str

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that identify the fingerprint."""
        import hashlib

        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:12]


class Law(Record, frozen=True, kw_only=True):
    """What a kernel costs on a simulated device: launch_ns + max(work / rate, bytes / bandwidth).

    Channels in and out are rounded up to their blocks, each for itself, and the work is their product: a staircase with a joint
    cost. With `tiles` > 0 the output is cut into tiles of `block_out` channels x `tile_pixels` pixels, of which so many run at a
    time, and the last wave is paid whole.
    """

    macs_per_s: float
    bytes_per_s: float
    launch_ns: float  # per kernel
    inference_ns: float  # once per inference
    block_in: int = 1
    block_out: int = 1
    tiles: int = 0
    tile_pixels: int = 1
    grouped_rate: float = 1.0  # share of the rate that grouped and depthwise convolutions get
    int8_rate: float = 0.0  # times the rate that convolutions and products of 8-bit integers get; 0: the device has none
    opaque: bool = False  # the runtime's profile shows one kernel for all


class Drift(Record, frozen=True, kw_only=True):
    """Speed that wanders: its logarithm is an Ornstein-Uhlenbeck process of this deviation and correlation time."""

    deviation: float = 0.0
    correlation_s: float = 1.0


class Burst(Record, frozen=True, kw_only=True):
    """Foreign load that comes and goes: present for `share` of the time, `length_s` at a time, and taking `takes` of the core."""

    share: float = 0.0
    length_s: float = 1.0
    takes: float = 0.5


class Heat(Record, frozen=True, kw_only=True):
    """Power that warms the device with time constant `tau_s`; above `limit_c` the clock falls by `slope` per degree."""

    ambient_c: float = 25.0
    rise_c: float = 30.0  # over ambient, after a long time at full clock
    tau_s: float = 20.0
    limit_c: float = 1000.0
    slope: float = 0.03
    power_w: float = 5.0
    clock_hz: float = 1e9


class Simulation(Record, frozen=True, kw_only=True):
    """A simulated device. The same seed gives the same samples; for determinism, never for a claim about speed."""

    law: Law
    noise: float = 0.0  # relative size of the right tail of each kernel's time
    drift: Drift = Drift()
    burst: Burst = Burst()
    heat: Heat = Heat()
    seed: int = 0


class Fact(Record, frozen=True, kw_only=True):
    """Something that was read about a device, and the document it was read in. Units are in its name."""

    value: int | float | str
    source: str


class Profile(Record, frozen=True, kw_only=True):
    """A hardware profile: one way to run a model on one device. `hw_profiles/<id>/profile.json`.

    `extends` names a profile that the file builds on: what the file says wins, facts one by one. It is empty once read.
    `status`: ready (measured when first used), measured (its latency table comes with it), or template (facts, nothing measured).
    """

    schema: int = SCHEMA
    id: str
    extends: str = ""
    status: Literal["ready", "measured", "template"] = "ready"
    device: str
    runtime: Literal["onnxruntime", "openvino", "simulated", "tensorrt", "tensorrt_rtx"]
    format: Format
    precision: Precision = "fp32"
    threads: int = 1
    batch: int = 1
    description: str = ""
    simulation: Simulation | None = None  # of a simulated device, and of no other
    compute_capability: str = ""  # of an NVIDIA GPU, such as 8.7: what an engine is built for
    openvino_device: Literal["CPU", "GPU", "NPU"] = "CPU"  # that OpenVINO runs on; of no other runtime
    facts: dict[str, Fact] = {}


class TableRow(Record, frozen=True, kw_only=True):
    """One measured point of a kernel inside whole networks: `key` as the runtime executes it, at (`c_in`, `c_out`)."""

    key: str
    c_in: int
    c_out: int
    latency_ns: float  # median over networks, profiler time normalised by the reference
    iqr_ns: float
    n: int
    ratio: float  # latency_ns / reference latency
    kernels: str  # what the runtime executed there most often, as operator/implementation
    measured_at: str


class RegimeEvidence(Record, frozen=True, kw_only=True):
    """The kernels that were executed at the widths of one regime, most often first, with how often."""

    regime: str
    samples: int
    kernels: tuple[tuple[str, int], ...]


class AlignmentEvidence(Record, frozen=True, kw_only=True):
    """How a runtime treats the channels of an operator family, and why that is believed.

    Errors are on channel pairs left out of the fit, summed and over the summed time: with these steps and regimes, and without.
    """

    kind: str
    step_in: int
    step_out: int
    block: int
    block_out: int
    multiple: int
    multiple_out: int
    error: float
    error_without: float
    regimes: tuple[RegimeEvidence, ...]


class HeldOut(Record, frozen=True, kw_only=True):
    """Predicted against measured latency on networks that were not used for fitting."""

    networks: int
    mape: float
    bias: float
    spearman: float


class MeasuredModel(Record, frozen=True, kw_only=True):
    """What a model brought to a table, and how right its latency model is."""

    networks: int
    coverage: float
    held_out: HeldOut


class TableHeader(Record, frozen=True, kw_only=True):
    """The JSON beside a table's CSV: whose table it is and how far to believe it."""

    schema: int = SCHEMA
    fingerprint: Fingerprint
    reference_ns: float
    created_at: str
    rows: str  # file name of the CSV
    rows_sha256: str
    models: dict[str, MeasuredModel]  # by the model's structure and when
    alignments: tuple[AlignmentEvidence, ...] = ()


class TableSummary(Record, frozen=True, kw_only=True):
    """What the report says of the table that was used."""

    id: str
    rows: int
    coverage: float  # share of the dense latency whose kernels have rows
    held_out: HeldOut
    alignments: tuple[AlignmentEvidence, ...] = ()
    path: str = ""  # folder it is kept in


# --- effects -> plan ------------------------------------------------------------------------------------------------


class Effect(Record, frozen=True, kw_only=True):
    """Causal effect of removing one channel: mean paired change over the calibration set, with its 95 % interval.

    `effect` is on the relative scale (p_n - p) / max(p, eps); `effect_logodds` on the log-odds. `source` says whether the
    channel was really removed (`intervention`) or screened by its gradient estimate (`gradient`).
    """

    group: str
    channel: int
    effect: float
    effect_logodds: float
    ci_low: float
    ci_high: float
    q_value: float
    category: Category
    source: Literal["intervention", "gradient"]


class Response(Record, frozen=True, kw_only=True):
    """What a group's predictions lose at one width: `distortion` is E|f_w - f|^2 / E|f - E f|^2 over calibration images."""

    group: str
    width: int
    distortion: float
    agreement: float
    order: str
    repaired: bool
    round: int


class CategoryCounts(Record, frozen=True, kw_only=True):
    critical: int = 0
    neutral: int = 0
    detrimental: int = 0
    undecided: int = 0

    @property
    def total(self) -> int:
        """Channels of any category; none where no effects were measured."""
        return self.critical + self.neutral + self.detrimental + self.undecided


class GroupPlan(Record, frozen=True, kw_only=True):
    """Decision for one group: `kept` lists the surviving channel indices in ascending order; empty drops the branch."""

    name: str
    kind: GroupKind
    width_before: int
    width_after: int
    kept: tuple[int, ...]
    removed: CategoryCounts = CategoryCounts()


class ModulePlan(Record, frozen=True, kw_only=True):
    """Modules of the delivered network: these operators (by weight) have no connections from one module to another.

    `units` has the module of every channel that stays, by group, in the order of `GroupPlan.kept`. In the delivered network the
    channels of a module stand together. `orders` are buffers with the order that a tensor is brought into on the way.
    """

    count: int
    operators: tuple[str, ...]
    units: dict[str, tuple[int, ...]]
    orders: tuple[str, ...] = ()


class Plan(Record, frozen=True, kw_only=True):
    """Everything surgery needs, and why it was chosen."""

    schema: int = SCHEMA
    model: str
    method: str
    seed: int
    profile: str
    table: str
    dense_ns: float
    budget_ns: float
    target_ns: float
    predicted_ns: float
    optimality_gap: float
    rounds: int
    groups: tuple[GroupPlan, ...]
    modules: ModulePlan | None = None


class ModuleLink(Record, frozen=True, kw_only=True):
    """What flows from one module to another: `share` of an operator's couplings, |w|^2 x E[a^2].

    -1 is no module: the image, the classes, channels that were not clustered.
    """

    operator: str
    source: int
    target: int
    share: float


class ModuleEffect(Record, frozen=True, kw_only=True):
    """Mean change of each class's log-odds, over images of that class, when a module is removed: from a group, or whole ("")."""

    module: int
    group: str
    classes: tuple[float | None, ...]  # None: no image of that class


class ModuleOption(Record, frozen=True, kw_only=True):
    """What was chosen among numbers of modules and operators: predictions, and what the unpruned network then measured."""

    count: int
    operators: int
    predicted_share: float  # of the dense latency, all widths as they were
    measured_share: float
    modules_loss: float  # summed distortion of its operators, each alone
    widths_loss: float


class ModuleGraph(Record, frozen=True, kw_only=True):
    """`modules.json`: the modules of the delivered network from the image to the classes."""

    schema: int = SCHEMA
    count: int
    units: dict[str, tuple[int, ...]]
    links: tuple[ModuleLink, ...]
    effects: tuple[ModuleEffect, ...]
    images: int  # that effects were measured on; their classes are those that the network predicts
    option: ModuleOption


# --- artefact -> measurement ------------------------------------------------------------------------------------------


class Shape(Record, frozen=True, kw_only=True):
    name: str
    dtype: str
    dims: tuple[int, ...]


class Parity(Record, frozen=True, kw_only=True):
    """Agreement of one step's output with the PyTorch program: max |a - b| over max |b|, per kind of input."""

    step: str
    inputs: str
    max_relative_error: float
    tolerance: float


class FloatLayer(Record, frozen=True, kw_only=True):
    """A layer left in float: `distortion` of the outputs when it alone was quantized; 0 where it was left by request."""

    layer: str
    distortion: float


class Quantization(Record, frozen=True, kw_only=True):
    """How a network became int8, and what that did to its outputs on the calibration images."""

    recipe: str  # the runtime whose kernels the Q/DQ pairs are laid for
    ranges: Literal["minmax", "percentile", "mse"]  # how activation ranges were taken
    images: int
    layers: int  # with weights, that run in integers
    weight_bits: Literal[7, 8] = 8  # 7 where products of 8 saturate in the runtime that judged
    kept_float: tuple[FloatLayer, ...]
    distortion: float  # E|q - f|^2 / E|f - E f|^2
    agreement: float  # share of images with the same top-1
    expected_drop: float  # points of accuracy, by the fp32 network's own probabilities
    max_drop: float  # what was allowed
    judged_by: Literal["probabilities", "variance"] = "probabilities"  # variance: no classes; the drop is 100 x distortion
    distortion_by_ranges: dict[str, float] = {}


class Artefact(Record, frozen=True, kw_only=True):
    """A deliverable file (for OpenVINO the .xml; its .bin is in `companions`), with what was read back from it."""

    path: str
    role: Literal["dense", "pruned"]
    format: Format
    sha256: str
    size_bytes: int  # with its companions
    companions: tuple[tuple[str, str], ...] = ()  # (relative path, sha256)
    opset: int = 0
    precision: Precision
    executed_precision: str
    executed_precision_read_from: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    parity: tuple[Parity, ...]
    quantization: Quantization | None = None


class JointLength(Record, frozen=True, kw_only=True):
    """An axis of a parameter whose length after a plan is `form`, as several groups divide its entries among them."""

    parameter: str
    axis: int
    form: DimForm


class Groups(Record, frozen=True, kw_only=True):
    """`groups.json`: the dense program's channel groups and the shapes of its parameters and buffers.

    An axis is shortened by what its places say, each by itself; `joint` has those where groups multiply, as heads and their size.
    """

    schema: int = SCHEMA
    groups: tuple[ChannelGroup, ...]
    dense_shapes: dict[str, tuple[int, ...]]
    joint: tuple[JointLength, ...] = ()


class Evaluation(Record, frozen=True, kw_only=True):
    """`evaluation.json`: the images that accuracy and agreement were counted on."""

    schema: int = SCHEMA
    data: str
    classes: str
    indices: tuple[int, ...]


class Manifest(Record, frozen=True, kw_only=True):
    """`manifest.json`: the artefacts of a run and the hashes of the files that explain them."""

    schema: int = SCHEMA
    artefacts: tuple[Artefact, ...]
    plan_sha256: str
    weights_sha256: str
    program_sha256: str
    profile: Profile
    fingerprint: Fingerprint
    versions: dict[str, str]


class Conditions(Record, frozen=True, kw_only=True):
    """What the machine was doing during a measurement. What is None is in `absent` with the reason."""

    waiting: float | None = None  # threads of ours that wanted a core and had none, on average over the time
    cpu_pressure: float | None = None  # share of the time in which some task of the machine waited for a core
    steal: float | None = None  # share of the core time that the hypervisor gave to others
    run_queue: float | None = None  # runnable tasks of the machine, ours among them, on average over the readings
    clock_hz: tuple[float, float] | None = None  # 10th and 90th percentile of the readings
    temperature_c: tuple[float, float] | None = None  # at the beginning and at the end
    throttled: int | None = None  # times the processor slowed itself down
    accelerator_hz: tuple[float, float] | None = None  # the fastest devfreq device, a GPU mostly; percentiles as of clock_hz
    power_w: tuple[float, float] | None = None  # all power rails together; percentiles as of clock_hz
    absent: dict[str, str] = {}


class Measurement(Record, frozen=True, kw_only=True):
    """Latency of one artefact, with its raw samples. `rounds_ns[r]` are the samples of round r, in the order taken.

    What is None is in `absent` with the reason: a percentile that has too few samples, energy that nothing counts.
    """

    schema: int = SCHEMA
    artefact: str
    sha256: str
    scope: str  # what is inside the timed region
    statistic: Statistic
    latency_ns: float
    latency_ci95_ns: tuple[float, float]
    median_ns: float | None
    p90_ns: float | None
    p95_ns: float | None
    p99_ns: float | None
    energy_j: float | None  # of the whole processor, per inference
    samples: int
    warmup: int
    rounds_ns: tuple[tuple[int, ...], ...]
    split_half: float  # |median(even rounds) - median(odd rounds)| / median
    drift: float  # change of the reference over the session, relative
    conditions: Conditions
    executed_precision: str
    fresh_process: bool
    measured_at: str
    valid: bool
    invalid_reasons: tuple[str, ...]
    absent: dict[str, str] = {}


class Comparison(Record, frozen=True, kw_only=True):
    """A run's two artefacts timed interleaved (A B B A). `ratio`: statistic of pruned over that of dense."""

    schema: int = SCHEMA
    dense: Measurement
    pruned: Measurement
    ratio: float
    ratio_ci95: tuple[float, float]


class Ratio(Record, frozen=True, kw_only=True):
    """Statistic of `artefact` over that of the first one, with its 95 % bootstrap interval over rounds."""

    artefact: str
    value: float
    ci95: tuple[float, float]


class Startup(Record, frozen=True, kw_only=True):
    """What comes before the first answer, in a process that has loaded the runtime and nothing else."""

    artefact: str
    load_ns: float  # file to ready session: read, optimise, compile
    first_inference_ns: float
    reload_ns: float  # the same file again, in the same process
    memory_peak_bytes: int | None  # growth of the resident memory, from before the load to after the first inferences
    absent: dict[str, str] = {}


class ProfiledKernel(Record, frozen=True, kw_only=True):
    """One kernel of an artefact in the runtime's own profile, tied to the nodes of the file.

    `name` is the weight it uses, where it has one, and equal for the same place of another artefact. `macs` and `channels` (out)
    are the file's, 0 where it does not say; shapes are as the runtime lays the activations out, padding included.
    """

    name: str
    op: str
    implementation: str
    nodes: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]
    macs: int
    channels: int
    latency_ns: float  # median
    iqr_ns: float


class KernelProfile(Record, frozen=True, kw_only=True):
    """Where one inference of an artefact goes. Profiling slows it: the kernels' sum is not its latency."""

    artefact: str
    runs: int
    kernels: tuple[ProfiledKernel, ...]


class KernelChange(Record, frozen=True, kw_only=True):
    """One kernel of two artefacts. `before_ns` or `after_ns` None: it is not there."""

    name: str
    before_ns: float | None
    after_ns: float | None
    verdict: Literal["faster", "slower", "unchanged", "gone", "new"]
    why: str


class KernelDifference(Record, frozen=True, kw_only=True):
    """What got faster from the first artefact to `artefact`, what did not, and why; the largest difference first."""

    artefact: str
    changes: tuple[KernelChange, ...]


class Gate(Record, frozen=True, kw_only=True):
    """A latency held against another: `ratio` is its own over that one's. What is not valid does not pass."""

    against: str
    limit: float  # the largest ratio that passes
    ratio: float
    ratio_ci95: tuple[float, float]
    passed: bool
    notes: tuple[str, ...] = ()


class Benchmark(Record, frozen=True, kw_only=True):
    """What `edgekit bench` answers: artefacts timed interleaved with each other and with the reference network."""

    schema: int = SCHEMA
    profile: Profile
    fingerprint: Fingerprint
    sustained_s: float
    measurements: tuple[Measurement, ...]
    ratios: tuple[Ratio, ...]  # of the second and later ones to the first
    reference_ns: tuple[tuple[int, ...], ...]  # samples of the reference network, by round
    startup: tuple[Startup, ...] = ()
    kernels: tuple[KernelProfile, ...] = ()
    differences: tuple[KernelDifference, ...] = ()
    gates: tuple[Gate, ...] = ()


# --- export ------------------------------------------------------------------------------------------------------------


class ExportRequest(Record, frozen=True, kw_only=True):
    """The whole of what `edgekit export` was asked. `preprocess` None: the model's own, where it has one."""

    model: str  # as `run` takes it, or a file that ends in .onnx
    out: str
    profile: str = "local-onnxruntime"
    weights: str = ""
    preprocess: Preprocess | None = None
    precision: Precision | None = None  # the profile's
    data: str = ""  # calibration images; int8 needs them
    samples: int = 256
    seed: int = 0
    ranges: Literal["auto", "minmax", "percentile", "mse"] = "auto"
    max_drop: float = 1.0
    keep_float: tuple[str, ...] = ()
    opset: int = 0  # 0: edgekit's own, or the file's
    dynamic_batch: bool = False
    compute_capability: str = ""  # empty: the profile's
    on: str = ""  # the device, as ssh://[user@]host[:port]; empty: this machine


class Exported(Record, frozen=True, kw_only=True):
    """`export.json`: what was asked, what was written, and its latency as a share of the fp32 file's.

    Where layers were left in float, the second ratio is that of the file with none: the difference is what they cost.
    """

    schema: int = 1
    request: ExportRequest
    profile: Profile
    artefacts: tuple[Artefact, ...]
    ratios: tuple[Ratio, ...] = ()
    fp32_ns: float = 0.0
    notes: tuple[str, ...] = ()


class Pruned(Record, frozen=True, kw_only=True):
    """`pruned.json`: what applying a plan gave. Nothing of it was measured on the device."""

    schema: int = SCHEMA
    model: str
    plan: str
    profile: str
    widths: dict[str, int]
    parameters_dense: int
    parameters_pruned: int
    macs_dense: int
    macs_pruned: int
    proof_max_relative_error: float
    distortion: tuple[float, float] | None  # on held-back images before and after the repair; None: there was none
    repaired: bool
    artefacts: tuple[Artefact, ...]
    next_command: str


# --- report -------------------------------------------------------------------------------------------------------------


class Iteration(Record, frozen=True, kw_only=True):
    """One turn of the closed loop: what was aimed at, predicted and measured."""

    target_ns: float
    predicted_ns: float
    measured_ns: float
    ratio: float
    scale: float


class GroupReport(Record, frozen=True, kw_only=True):
    name: str
    kind: GroupKind
    width_before: int
    width_after: int
    effect_mean: float  # log-odds, mean over channels; the interval's ends likewise
    effect_ci95: tuple[float, float]
    categories: CategoryCounts
    removed: CategoryCounts
    responses: tuple[Response, ...] = ()


class QuantizedDense(Record, frozen=True, kw_only=True):
    """The dense network at the delivered precision: what lowering the precision gives without any pruning."""

    ratio: float  # its latency over the fp32 network's
    ratio_ci95: tuple[float, float]
    accuracy: float | None
    quantization: Quantization


class PrecisionChoice(Record, frozen=True, kw_only=True):
    """What a precision was predicted to lose at the budget, pruning and rounding together; None: it cannot reach the budget."""

    precision: Precision
    distortion: float | None
    reason: str = ""  # why it is out of reach


class FineTuned(Record, frozen=True, kw_only=True):
    """What fine-tuning did to the delivered network. `held_back_*`: what it was trained to lessen, on images apart."""

    epochs: int
    images: int
    loss: Literal["distill", "labels"]
    held_back_before: float
    held_back_after: float
    kept: bool  # whether what is delivered is the fine-tuned network
    seconds: float
    accuracy_one_shot: float | None  # before fine-tuning, of the artefact in its own runtime; None without labels
    agreement_one_shot: float


class KernelTime(Record, frozen=True, kw_only=True):
    """Profiled time of one place of the network, dense and pruned; `note` says what a cut bought or why it did not."""

    name: str
    key: str
    dense_ns: float
    pruned_ns: float
    note: str = ""


class Report(Record, frozen=True, kw_only=True):
    """`report.json`: the answer, what it cost, and whether to believe it."""

    schema: int = SCHEMA
    verdict: Literal["met", "missed"]
    valid: bool
    invalid_reasons: tuple[str, ...]
    model: str
    method: str
    profile: str
    runtime: str
    budget: str  # as the user wrote it
    budget_ns: float
    statistic: Statistic
    dense_ns: float
    measured_ns: float
    measured_ci95_ns: tuple[float, float]
    predicted_ns: float
    speedup: float
    speedup_ci95: tuple[float, float]
    accuracy_dense: float | None
    accuracy_pruned: float | None
    accuracy_change_ci95: tuple[float, float] | None
    agreement: float
    evaluation_images: int
    calibration_images: int
    parameters_dense: int
    parameters_pruned: int
    macs_dense: int
    macs_pruned: int
    size_dense_bytes: int
    size_pruned_bytes: int
    memory_dense_bytes: float  # weights and the tensors alive at once, counted on the graph
    memory_pruned_bytes: float
    memory_limit_bytes: float = 0.0  # 0: none was asked for
    precision: Precision = "fp32"  # of the delivered network; the dense one is in fp32
    quantization: Quantization | None = None
    quantized_dense: QuantizedDense | None = None
    precision_choices: tuple[PrecisionChoice, ...] = ()  # where the precision was left to edgekit
    finetuned: FineTuned | None = None
    prunable_macs_share: float
    prunable_latency_share: float
    floor_ns: float
    optimality_gap: float
    iterations: tuple[Iteration, ...]
    table: TableSummary
    groups: tuple[GroupReport, ...]
    unprunable: tuple[tuple[str, str], ...]  # (group, reason)
    critical_removed: int
    kernels: tuple[KernelTime, ...]
    proof_max_relative_error: float
    repair: str  # what the repair did, and what was kept
    wall_s: dict[str, float]
    seed: int
    environment: dict[str, str]
    command: str
    notes: tuple[str, ...] = ()

    @property
    def judged(self) -> bool:
        """Whether channels were told apart by cause and effect; not every method does."""
        return any(group.categories != CategoryCounts() for group in self.groups)


class DryRun(Record, frozen=True, kw_only=True):
    """What a run would do. Times are rough; the dense latency is from a short measurement."""

    schema: int = SCHEMA
    model: str
    profile: str
    runtime: str
    budget: str
    budget_ns: float
    dense_ns: float
    groups: dict[str, tuple[int, ...]]  # candidate widths of what can be cut, 0: the whole branch
    held: dict[str, str]  # what stays whole, and why
    parameters: int
    macs: int
    calibration_images: int
    evaluation_images: int
    rounds: int
    table_known: bool
    table_s: float  # to measure a latency table; 0 where there is one
    scoring_s: float
    total_s: float
    out: str


class SweepPoint(Record, frozen=True, kw_only=True):
    """One budget of a sweep. `refused`: there is no such network, `reason` says why; what it would have measured is None then."""

    budget: str  # as the user wrote it
    folder: str  # of the run's files, within the sweep's
    verdict: Literal["met", "missed", "refused"]
    valid: bool = False
    reason: str = ""
    budget_ns: float
    measured_ns: float | None = None
    measured_ci95_ns: tuple[float, float] | None = None
    speedup: float | None = None
    speedup_ci95: tuple[float, float] | None = None
    accuracy: float | None = None
    accuracy_change_ci95: tuple[float, float] | None = None
    agreement: float | None = None
    parameters: int | None = None
    size_bytes: int | None = None
    rounds: int = 0  # of scoring and cutting that led to it
    wall_s: float = 0.0  # what this point took beside what all share


class Sweep(Record, frozen=True, kw_only=True):
    """`sweep.json`: several budgets of one model on one device, from one table and one first scoring."""

    schema: int = SCHEMA
    verdict: Literal["met", "missed"]  # met: all budgets, validly
    model: str
    method: str
    profile: str
    runtime: str
    fingerprint: str
    statistic: Statistic
    precision: Precision
    dense_ns: float | None  # of the point with the loosest budget; None where all were refused
    accuracy_dense: float | None
    parameters_dense: int | None
    evaluation_images: int | None
    points: tuple[SweepPoint, ...]  # from the loosest budget to the tightest
    knee: str  # budget of the point after which accuracy falls fastest for the time that is saved; empty: there is none
    knee_why: str
    wall_s: dict[str, float]  # what all points share, and `points`
    command: str


class Compared(Record, frozen=True, kw_only=True):
    """One finished run beside others."""

    folder: str
    budget: str
    verdict: Literal["met", "missed"]
    valid: bool
    model: str
    method: str
    precision: Precision
    profile: str
    statistic: Statistic
    dense_ns: float
    measured_ns: float
    measured_ci95_ns: tuple[float, float]
    speedup: float
    speedup_ci95: tuple[float, float]
    accuracy_dense: float | None
    accuracy: float | None
    accuracy_change_ci95: tuple[float, float] | None
    agreement: float
    parameters: int
    size_bytes: int
    best: bool  # no other run that it may be compared with is both as fast and as accurate, and better in one
    differs: tuple[str, ...] = ()  # in what it may not be compared with the first


class RunComparison(Record, frozen=True, kw_only=True):
    """What `edgekit report A B ...` answers. Runs that differ in device, runtime or images are shown and not ranked."""

    schema: int = SCHEMA
    runs: tuple[Compared, ...]
    comparable: bool  # all of them


# --- files --------------------------------------------------------------------------------------------------------------

R = TypeVar("R", bound=Record)


def to_json(record: Record) -> str:
    """The record as indented JSON with a final newline; `from_json` gives an equal record back.

    Raises:
        ValueError: a value that would not come back, such as nan, which JSON cannot hold.
    """
    encoded = msgspec.json.encode(record)
    try:
        msgspec.json.decode(encoded, type=type(record))
    except msgspec.ValidationError as error:
        raise ValueError(f"{type(record).__name__} has a value that cannot be written: {error}") from None
    return msgspec.json.format(encoded, indent=1).decode() + "\n"


def from_json(kind: type[R], text: str | bytes, source: str = "text") -> R:
    """Parse and check one record.

    Raises:
        UsageError: truncated JSON, an unknown or missing field, a wrong type, another schema version.
    """
    try:
        record = msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{source} is not a valid {kind.__name__} record: {error}.", "Remove the file and run the step that writes it again."
        ) from None
    version = getattr(record, "schema", SCHEMA)
    if version != SCHEMA:
        raise UsageError(
            f"{source} has schema {version}; this edgekit reads schema {SCHEMA}.",
            "Run the step that writes it again with this version.",
        )
    return record


def write_text(path: Path, text: str) -> None:
    """Write a file whole: into a temporary neighbour, then renamed over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_json(path: Path, record: Record) -> None:
    """Write one record as a file, whole."""
    write_text(path, to_json(record))


def load_json(kind: type[R], path: Path) -> R:
    """Read one record from a file; errors as `from_json`, and UsageError where the file is missing."""
    try:
        return from_json(kind, path.read_bytes(), str(path))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist.", "Run the step that writes it first (see `edgekit --help`).") from None


def rows_to_csv(kind: type[R], rows: Iterable[R]) -> str:
    """Flat records as CSV with a header line."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(kind.__struct_fields__)
    for row in rows:
        writer.writerow([getattr(row, name) for name in kind.__struct_fields__])
    return stream.getvalue()


def rows_from_csv(kind: type[R], text: str, source: str = "text") -> list[R]:
    """Parse flat records from CSV; UsageError names the line that does not fit."""
    reader = csv.reader(io.StringIO(text))
    if next(reader, None) != list(kind.__struct_fields__):
        raise UsageError(f"{source} does not start with the columns of {kind.__name__}.", "Run the step that writes it again.")
    rows: list[R] = []
    for cells in reader:
        try:
            fields: dict[str, Any] = dict(zip(kind.__struct_fields__, cells, strict=True))
            rows.append(msgspec.convert(fields, type=kind, strict=False))
        except (ValueError, msgspec.ValidationError) as error:
            raise UsageError(f"{source}, line {reader.line_num}: {error}.", "Run the step that writes it again.") from None
    return rows
