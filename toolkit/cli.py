"""The command line: parse, call, print. Results go to stdout, progress and errors to stderr; only this module prints or exits.

Nothing heavy is imported before a command needs it, so that `edgekit --help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from toolkit.errors import EdgekitError, MissingError, UsageError

if TYPE_CHECKING:
    from toolkit.schema import Budget, Preprocess, Profile, Report, RunRequest, Sweep

Progress = Callable[[str, float, float], None]
METHODS = ("causal", "cswap", "psap", "crespr", "taylor", "l1", "l2", "random")
INTERRUPTED, UNEXPECTED = 130, 70
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


# --- progress -----------------------------------------------------------------------------------------------------------


class Plain:
    """One line on stderr as a step ends: what a log wants."""

    def __init__(self) -> None:
        self.step, self.started = "", 0.0

    def __call__(self, step: str, done: float, total: float) -> None:
        if step != self.step:
            self.close()
            self.step, self.started = step, time.monotonic()
            if not done and total > 1:  # a step that begins with a count will take a while
                click.echo(f"{step} ...", err=True)

    def close(self, failed: bool = False) -> None:
        if self.step:
            outcome = "stopped" if failed else f"{time.monotonic() - self.started:.1f} s"
            click.echo(f"{self.step}  {outcome}", err=True)
        self.step = ""


class Live:
    """A bar with the time left for the step that runs, a line for each one done."""

    def __init__(self, between: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.between = between
        self.bars = Progress(*columns, console=Console(stderr=True), auto_refresh=not between)
        self.bars.start()
        self.tasks: dict[str, Any] = {}

    def __call__(self, step: str, done: float, total: float) -> None:
        if step not in self.tasks:
            for other in self.tasks.values():
                self.bars.stop_task(other)
            self.tasks[step] = self.bars.add_task(step, total=total or None)
        self.bars.update(self.tasks[step], completed=done, total=total or None, refresh=self.between)

    def close(self, failed: bool = False) -> None:
        self.bars.stop()


@contextmanager
def progress(between: bool = False) -> Iterator[Progress]:
    """What long calls report to: a live display on a terminal, plain lines elsewhere.

    With `between` the display is drawn only when something is reported, so that it never runs beside a measurement.
    """
    shown = Live(between) if sys.stderr.isatty() else Plain()
    try:
        yield shown
    except BaseException:
        shown.close(failed=True)
        raise
    shown.close()


# --- errors ---------------------------------------------------------------------------------------------------------------


def fail(error: EdgekitError) -> NoReturn:
    """The error as a paragraph with its hint, and its exit code."""
    import textwrap

    text = f"Error: {error.message}" + (f" {error.hint}" if error.hint else "")
    click.echo(textwrap.fill(" ".join(text.split()), 100, break_long_words=False, break_on_hyphens=False), err=True)
    raise SystemExit(error.exit_code)


class Command(click.Command):
    """A command whose help starts with its example, and whose errors are paragraphs."""

    def __init__(self, *args: Any, example: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example

    def format_help(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"  {self.example}\n\n")
        super().format_help(context, formatter)

    def invoke(self, context: click.Context) -> Any:
        if os.environ.get("EDGEKIT_DEBUG"):
            return super().invoke(context)
        try:
            return super().invoke(context)
        except EdgekitError as error:
            fail(error)
        except (click.ClickException, click.exceptions.Exit, click.Abort, KeyboardInterrupt, BrokenPipeError):
            raise
        except ImportError as error:
            fail(MissingError(f"{error}.", 'Run: python -m pip install "edgekit[all]"'))
        except OSError as error:  # a path that is no folder, no permission, a full disk
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            fail(UsageError(f"{what}.", "Check the folder, its permissions and the free space there, then run it again."))
        except Exception as error:
            click.echo(
                f"Unexpected {type(error).__name__}: {error}\nRun it again with EDGEKIT_DEBUG=1 and report the trace.", err=True
            )
            raise SystemExit(UNEXPECTED) from None


class Group(click.Group):
    """The verbs in the order they are used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)

    def format_help(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write("  edgekit run resnet18 --weights w.safetensors --data images/ --budget 8ms -o out/\n\n")
        super().format_help(context, formatter)


def show_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    from importlib import metadata

    if value:
        try:
            click.echo(f"edgekit {metadata.version('edgekit')}")
        except metadata.PackageNotFoundError:
            click.echo("edgekit, run from its sources")
        context.exit()


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=show_version, help="Show the version.")
def cli() -> None:
    """Make a trained vision model fit a device: give the milliseconds, get a smaller model that was measured to meet them."""


def settle_process() -> None:
    """Make torch a good neighbour, before it loads: on a busy machine threads that spin while they wait cost dearly.

    Freed activations are kept for the next operator too, where the C library allows it, instead of being paged in anew.
    """
    import ctypes

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def main() -> None:
    """Entry point of the command."""
    settle_process()
    try:
        if not os.environ.get("EDGEKIT_DEBUG"):
            logging.disable(logging.WARNING)  # what libraries say in passing would bury the progress and the error
        cli(prog_name="edgekit", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        fail(UsageError(error.format_message(), f"Run: {context.command_path if context else 'edgekit'} --help"))
    except BrokenPipeError:  # the reader of stdout, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted. Measured tables are kept: run the same command again to go on.", err=True)
        os._exit(INTERRUPTED)  # an orderly exit would wait for the runtimes' threads, or end by the signal itself


# --- options ---------------------------------------------------------------------------------------------------------------


def numbers(kind: type, separator: str) -> Callable[[click.Context, click.Parameter, str | None], tuple[Any, ...] | None]:
    """A callback that splits an option's text into numbers."""

    def parse(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[Any, ...] | None:
        if value is None:
            return None
        try:
            return tuple(kind(part) for part in value.lower().split(separator))
        except ValueError:
            raise click.BadParameter(f"{value!r} is not a list of numbers separated by {separator!r}.") from None

    return parse


def options(*chosen: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(function: Any) -> Any:
        for option in reversed(chosen):
            function = option(function)
        return function

    return apply


profile_option = click.option(
    "-p", "--profile", default="local-onnxruntime", show_default=True, help="Hardware profile: an id or a folder."
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(1),
    callback=lambda context, parameter, value: value or 0,
    help="Default: the profile's.",
)
on_option = click.option("--on", default="", metavar="URL", help="ssh://[user@]host[:port] to measure on.")
seed_option = click.option("--seed", default=0, show_default=True)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the record as JSON on stdout.")
statistic_option = click.option(
    "--statistic",
    type=click.Choice(["median", "p90", "p95", "p99"]),
    default="median",
    show_default=True,
    metavar="NAME",
    help="median, p90, p95, p99.",
)


def out_option(default: str) -> Callable[[Any], Any]:
    """-o, refused at once where results could not be written in the end."""

    def check(context: click.Context, parameter: click.Parameter, value: str) -> str:
        there = next(path for path in (Path(value).absolute(), *Path(value).absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            why = "may not be written to" if there.is_dir() else "is a file"
            raise click.BadParameter(f"{there} {why}; give a folder for the results, such as -o {default}.")
        return value

    return click.option("-o", "--out", default=default, show_default=True, callback=check, help="Folder for the results.")


weights_option = click.option("--weights", default="", help="State dict, .safetensors or .pt: data only.")
budget_option = click.option("--budget", required=True, help="8ms, 350us, 0.5x of the dense, or none.")
input_options = options(
    click.option("--input", "input_", callback=numbers(int, "x"), metavar="1xCxHxW", help="Input shape, e.g. 1x3x224x224."),
    click.option("--resize", type=int, help="Short side before the crop."),
    click.option("--crop", type=int, help="Side of the centre crop."),
    click.option("--mean", callback=numbers(float, ","), help="Per channel, of pixels scaled to 0..1."),
    click.option("--std", callback=numbers(float, ","), help="Per channel."),
)


def preprocess_of(options: dict[str, Any]) -> Preprocess | None:
    """The preprocessing that was asked for, None where nothing of it was."""
    from toolkit.schema import Preprocess

    given = {name: options.pop(key) for name, key in (("input", "input_"), *((n, n) for n in ("resize", "crop", "mean", "std")))}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None
    shape = given.get("input", Preprocess().input)
    if len(shape) != 4 or min(shape) < 1:
        raise UsageError(
            f"--input {'x'.join(map(str, shape))} is not four positive sizes.",
            "Give batch x channels x height x width: 1x3x224x224.",
        )
    for name in ("mean", "std"):
        values = given.get(name, getattr(Preprocess(), name)[: shape[1]] if shape[1] <= 3 else ())
        given[name] = values * shape[1] if len(values) == 1 else values
        if len(given[name]) != shape[1]:
            raise UsageError(
                f"--{name} has {len(given[name])} values, the input {shape[1]} channels.",
                f"Give {shape[1]} values separated by commas.",
            )
    if min(given["std"]) <= 0:
        raise UsageError("--std has a value that is not positive.", "Give the standard deviation of each channel.")
    return Preprocess(**given)


def finish(report: Report, as_json: bool) -> NoReturn:
    """Print a report, its verdict last, and exit with what it says."""
    from rich.console import Console

    from toolkit import report as reports
    from toolkit.schema import to_json

    if as_json:
        click.echo(to_json(report), nl=False)
        click.echo(reports.verdict_line(report), err=True)
    else:
        Console(soft_wrap=False).print(reports.summary_text(report))
        click.echo(reports.verdict_line(report))
    raise SystemExit(0 if report.verdict == "met" and report.valid else 1)


# --- verbs ------------------------------------------------------------------------------------------------------------------


@cli.command(
    cls=Command, example="edgekit run net.py:model --weights w.safetensors --data images/ --input 1x3x32x32 --budget 0.6x"
)
@click.argument("model")
@click.option("--data", required=True, help="Image folder or .npz; see the README.")
@click.option("--eval-data", default="", help="For accuracy; default: a part of --data.")
@click.option("--classes", default="", help="File, one class name a line.")
@weights_option
@budget_option
@profile_option
@out_option("edgekit-out")
@input_options
@statistic_option
@click.option(
    "--method", type=click.Choice(METHODS), default="causal", show_default=True, metavar="NAME", help=f"{', '.join(METHODS)}."
)
@click.option("--no-repair", is_flag=True, help="Leave the remaining weights as they are.")
@click.option("--samples", type=click.IntRange(8), default=512, show_default=True, help="Calibration images.")
@click.option("--rounds", type=click.IntRange(0, 8), default=0, help="Of scoring; 0: as needed.")
@click.option("--keep", multiple=True, metavar="GLOB", help="Groups to leave whole; repeatable.")
@click.option("--min-width", type=click.IntRange(1), default=1, metavar="N", help="Fewest channels of a group.")
@click.option("--max-memory", default="", metavar="SIZE", help="Weights + activations: 512KB, 2MB.")
@threads_option
@click.option("--precision", type=click.Choice(["fp32", "int8", "auto"]), default="fp32", show_default=True)
@click.option("--max-drop", type=click.FloatRange(0), default=1.0, metavar="POINTS", help="int8 may cost by itself; default: 1.")
@click.option("--finetune", type=click.IntRange(0), default=0, metavar="EPOCHS", help="Train after pruning.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Choices of a method: psap.epochs=20.")
@seed_option
@on_option
@click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")
@json_option
def run(budget: str, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Prune MODEL to a latency budget, export, measure and report.

    MODEL is a torchvision name, package.module:function, file.py:function or a .pt2 program.
    """
    from toolkit.budget import parse_budget

    request = request_of(parse_budget(budget), **given)
    if dry_run:
        show_dry_run(request, as_json)
        return
    from toolkit import api

    with progress() as shown:
        report = api.run(request, shown)
    finish(report, as_json)


def show_dry_run(request: RunRequest, as_json: bool) -> None:
    """Print what a run would do."""
    from toolkit.report import terminal
    from toolkit.run.dry import dry_run
    from toolkit.schema import to_json

    with progress() as shown:
        found = dry_run(request, shown)
    if as_json:
        click.echo(to_json(found), nl=False)
        return
    for line in terminal.dry_run(found):
        click.echo(line)


def request_of(
    budget: Budget, model: str, max_memory: str, no_repair: bool, settings: tuple[str, ...], **given: Any
) -> RunRequest:
    """What `run` was asked, from its options."""
    from toolkit.budget import parse_size
    from toolkit.schema import RunRequest
    from toolkit.settings import apply_settings

    preprocess, memory = preprocess_of(given), parse_size(max_memory) if max_memory else 0.0
    request = RunRequest(
        model=model, budget=budget, max_memory_bytes=memory, repair=not no_repair, preprocess=preprocess, **given
    )
    return apply_settings(request, settings)


@cli.command(
    cls=Command,
    example="edgekit sweep net.py:model --weights w.safetensors --data images/ --input 1x3x32x32 --budgets 0.9x,0.7x,0.5x",
)
@click.option("--budgets", default="0.9x,0.75x,0.6x,0.45x,0.3x", show_default=True, help="Separated by commas: 0.7x, 8ms, 350us.")
@out_option("sweep-out")
@json_option
def sweep(budgets: str, out: str, as_json: bool, **given: Any) -> None:
    """Prune MODEL to several budgets, and find the knee.

    One table, one dense measurement and one first scoring serve all. DIR/BUDGET/ holds what `run` leaves, DIR/sweep.html the
    curve. Run again, it keeps what is finished.
    """
    from toolkit.budget import parse_budget

    parsed = [parse_budget(text) for text in budgets.split(",") if text.strip()]
    if not parsed:
        raise UsageError("A sweep needs budgets.", "Give them like --budgets 0.9x,0.7x,0.5x.")
    request = request_of(parsed[0], out=out, **given)
    from toolkit import api

    with progress() as shown:
        found = api.sweep(request, parsed, shown)
    finish_sweep(found, Path(out), as_json)


def finish_sweep(found: Sweep, out: Path, as_json: bool) -> NoReturn:
    """Print a sweep, its verdict last, and exit with what it says."""
    from rich.console import Console

    from toolkit import report as reports
    from toolkit.schema import to_json

    if as_json:
        click.echo(to_json(found), nl=False)
    else:
        Console(soft_wrap=False).print(reports.sweep_text(found))
        click.echo(f"{out / 'sweep.html'} has the curve; the folder of each budget beside it the files to ship")
    click.echo(reports.sweep_line(found), err=as_json)
    raise SystemExit(0 if found.verdict == "met" else 1)


sweep.params += [option for option in run.params if option.name not in ("budget", "out", "as_json", "dry_run")]


@cli.command(cls=Command, example="edgekit demo --budget 0.5x -o demo-out")
@click.option("--budget", default="0.5x", show_default=True)
@profile_option
@out_option("demo-out")
@seed_option
@json_option
def demo(budget: str, profile: str, out: str, seed: int, as_json: bool) -> None:
    """The whole job on the network and images in the package."""
    from toolkit import api

    request = api.demo_request(budget, out, profile, seed)
    with progress() as shown:
        report = api.run(request, shown)
    finish(report, as_json)


@cli.command(cls=Command, example="edgekit prune resnet18 --weights w.safetensors --plan out/plan.json --data images/ -o edited")
@click.argument("model")
@click.option("--plan", required=True, help="plan.json of a run, edited or not.")
@click.option("--data", default="", help="Calibration images, as for `run`; the repair needs them.")
@weights_option
@profile_option
@out_option("edgekit-pruned")
@input_options
@click.option("--no-repair", is_flag=True, help="Leave the remaining weights as they are; needs no images.")
@click.option("--samples", type=click.IntRange(8), default=512, show_default=True, help="Calibration images.")
@seed_option
@json_option
def prune(model: str, plan: str, no_repair: bool, as_json: bool, **given: Any) -> None:
    """Apply a plan to MODEL: cut, prove, repair, export.

    A plan lists for every channel group the channels that stay (`kept`, ascending); change `kept` and `width_after` together.
    Groups that the plan does not name stay whole. Nothing is measured: `edgekit bench` is the next command.
    """
    preprocess = preprocess_of(given)
    from toolkit import api
    from toolkit.report import terminal
    from toolkit.schema import to_json

    with progress() as shown:
        found = api.prune(model, plan, progress=shown, preprocess=preprocess, repair=not no_repair, **given)
    if as_json:
        click.echo(to_json(found), nl=False)
        return
    for line in terminal.pruned(found, given["out"]):
        click.echo(line)


@cli.command(cls=Command, example="edgekit measure resnet18 -p local-onnxruntime -o my_board")
@click.argument("model")
@weights_option
@profile_option
@input_options
@threads_option
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16", "int8"]),
    help="Default: the profile's. bf16 is OpenVINO's.",
)
@seed_option
@on_option
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write a measured profile: a folder that -p takes elsewhere.")
@json_option
def measure(
    model: str,
    profile: str,
    weights: str,
    threads: int,
    precision: str | None,
    seed: int,
    on: str,
    out: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure the latency table of MODEL, as `run` does when needed.

    It says first how long it takes; interrupted, it goes on where it stopped. The table is kept in the cache and shared by all
    models that run the same kernels. The profile's batch size and threads are what is measured.
    """
    preprocess = preprocess_of(given)
    from toolkit import api
    from toolkit.report import terminal
    from toolkit.schema import to_json

    with progress() as shown:
        table = api.measure(
            model,
            profile,
            shown,
            weights=weights,
            preprocess=preprocess,
            threads=threads,
            precision=precision,  # type: ignore[arg-type]
            seed=seed,
            out=out,
            on=on,
        )
    if as_json:
        click.echo(to_json(table), nl=False)
        return
    held = table.held_out
    click.echo(
        f"table {table.id}: {table.rows} rows, coverage {table.coverage:.1%}, error {held.mape:.1%} (bias {held.bias:+.1%})"
        f" on {held.networks} networks it was not fitted to"
    )
    for found in table.alignments:
        click.echo(f"  {found.kind}: {terminal.alignment(found)}")
    click.echo(f"  {table.path}")


def parse_seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> float:
    """`60s`, `90`, `1500ms` in seconds."""
    from toolkit.budget import parse_budget

    if not value:
        return 0.0
    try:
        found = parse_budget(value if value[-1].isalpha() else f"{value}s")
    except UsageError:
        found = None
    if found is None or not found.latency_ns:
        raise click.BadParameter(f"{value!r} is not a time; write it like 60s.")
    return found.latency_ns / 1e9


def parse_share(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """`5%` or `0.05`."""
    if value is None:
        return None
    try:
        found = float(value.rstrip("% ")) / (100 if value.endswith("%") else 1)
    except ValueError:
        found = -1.0
    if not 0 <= found < (10 if value.endswith("%") else 1):
        raise click.BadParameter(f"{value!r} is not a share; write it like 5%.")
    return found


@cli.command(cls=Command, example="edgekit bench out/dense.onnx out/model.onnx --kernels")
@click.argument("artefacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@profile_option
@on_option
@threads_option
@statistic_option
@click.option("--sustained", callback=parse_seconds, metavar="TIME", help="Run for so long first, such as 60s: the warm device.")
@click.option("--kernels", is_flag=True, help="Where the time goes; of several, what got faster and why.")
@click.option("--no-startup", is_flag=True, help="Leave out load times and memory.")
@click.option("--against", type=click.Path(path_type=Path), help="An earlier -o FILE; exit 1 if something became slower.")
@click.option("--fail-over", callback=parse_share, metavar="SHARE", help="How much slower passes, such as 5% (the default).")
@click.option("-o", "--out", "file", type=click.Path(path_type=Path), help="Write the record as JSON, raw samples included.")
@json_option
def bench(
    artefacts: tuple[Path, ...],
    profile: str,
    on: str,
    threads: int,
    statistic: str,
    sustained: float,
    kernels: bool,
    no_startup: bool,
    against: Path | None,
    fail_over: float | None,
    file: Path | None,
    as_json: bool,
) -> None:
    """Time model files, interleaved.

    \b
    edgekit bench model.onnx -o earlier.json                  keep a figure
    edgekit bench model.onnx --against earlier.json           and hold later ones against it, in your CI
    edgekit bench old.onnx new.onnx --fail-over 5%            or both files in one session: more exact
    edgekit bench model.onnx --sustained 60s                  when the device is as warm as in steady use
    """
    from rich.console import Console

    from toolkit import api
    from toolkit import report as reports
    from toolkit.schema import to_json

    with progress(between=True) as shown:
        found = api.bench(
            artefacts,
            profile,
            shown,
            threads=threads,
            on=on,
            statistic=statistic,
            sustained_s=sustained,
            with_startup=not no_startup,
            with_kernels=kernels,
            against=against,
            fail_over=fail_over,
            out=file,
        )
    verdicts = [reports.gate_line(gate) for gate in found.gates]
    reasons = dict.fromkeys(reason for each in found.measurements for reason in each.invalid_reasons)
    verdicts += [f"not valid: {reason}" for reason in reasons] or ["valid"]
    if as_json:
        click.echo(to_json(found), nl=False)
    else:
        Console(soft_wrap=False).print(reports.benchmark_text(found))
    for line in verdicts:
        click.echo(line, err=as_json)
    raise SystemExit(0 if not reasons and all(gate.passed for gate in found.gates) else 1)


@cli.command(cls=Command, example="edgekit export net.onnx -p local-openvino --precision int8 --data images/")
@click.argument("model")
@weights_option
@profile_option
@out_option("edgekit-export")
@input_options
@click.option("--precision", type=click.Choice(["fp32", "fp16", "int8"]), help="Default: the profile's.")
@click.option("--data", default="", help="Calibration images, as for `run`; int8 needs them.")
@click.option("--samples", type=click.IntRange(8), default=256, show_default=True, help="Calibration images.")
@click.option(
    "--ranges",
    type=click.Choice(["auto", "minmax", "percentile", "mse"]),
    default="auto",
    show_default=True,
    help="Of activations; auto keeps the one that changes the outputs least.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    metavar="POINTS",
    help="Of expected accuracy; layers that cost most stay in float until it holds.",
)
@click.option("--keep-float", multiple=True, metavar="LAYER", help="Node of the ONNX file to leave in float; repeatable.")
@click.option("--opset", type=click.IntRange(7), callback=lambda c, p, value: value or 0, help="Written, or an error.")
@click.option("--dynamic-batch", is_flag=True, help="Leave the batch size open.")
@click.option("--compute-capability", default="", metavar="X.Y", help="GPU that an engine is for; default: the profile's.")
@on_option
@seed_option
@json_option
def export(model: str, as_json: bool, **given: Any) -> None:
    """Export MODEL, or an ONNX file, as it is: no pruning.

    \b
    edgekit export net.py:model --input 1x3x32x32 -p tensorrt-rtx
    edgekit export resnet18 --weights w.safetensors --precision fp16
    """
    preprocess = preprocess_of(given)
    from toolkit import api
    from toolkit.report import terminal
    from toolkit.schema import to_json

    with progress() as shown:
        found = api.export(api.ExportRequest(model=model, preprocess=preprocess, **given), shown)
    if as_json:
        click.echo(to_json(found), nl=False)
        return
    for line in terminal.exported(found.request.out, found.artefacts, found.ratios, found.fp32_ns, found.notes):
        click.echo(line)


@cli.command(cls=Command, example="edgekit report out/ other-out/ -o compared.html")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", "file", type=click.Path(path_type=Path), help="Of several runs: write a page with their picture.")
@json_option
def report(folders: tuple[Path, ...], file: Path | None, as_json: bool) -> None:
    """Show a finished run or sweep; compare several.

    \b
    edgekit report out/                   one run: report.html, as `run` wrote it
    edgekit report out/ other-out/        several, and the points of sweeps: one table, the best marked

    Runs of another device or with other evaluation images are shown, not ranked, and the exit code is 1.
    """
    from toolkit import api
    from toolkit import report as reports
    from toolkit.schema import Comparison, ModuleGraph, Sweep, load_json, write_text

    if len(folders) > 1:
        show_compared(folders, file, as_json)
    if file is not None:
        raise UsageError("One run has a page of its own.", f"Look at {folders[0] / 'report.html'}, or give a second folder.")
    folder = folders[0]
    if (folder / "sweep.json").exists() and not (folder / "report.json").exists():
        swept = load_json(Sweep, folder / "sweep.json")
        write_text(folder / "sweep.html", reports.sweep_html(swept))
        finish_sweep(swept, folder, as_json)
    found = api.load_report(folder)
    comparison = load_json(Comparison, folder / "measurements" / "comparison.json")
    modules = load_json(ModuleGraph, folder / "modules.json") if (folder / "modules.json").exists() else None
    with progress() as shown:
        shown("report", 0, 1)
        write_text(folder / "report.html", reports.html(found, comparison, modules))
    finish(found, as_json)


def show_compared(folders: tuple[Path, ...], file: Path | None, as_json: bool) -> NoReturn:
    """Print several finished runs beside each other, and exit with whether they may be compared."""
    from rich.console import Console

    from toolkit import api
    from toolkit import report as reports
    from toolkit.schema import to_json, write_text

    found = api.compare(folders)
    if file is not None:
        write_text(file, reports.comparison_html(found))
    if as_json:
        click.echo(to_json(found), nl=False)
    else:
        Console(soft_wrap=False).print(reports.comparison_text(found))
    click.echo(reports.comparison_line(found), err=as_json)
    raise SystemExit(0 if found.comparable else 1)


@cli.command(cls=Command, example="edgekit profiles local-openvino")
@click.argument("profile", required=False)
@json_option
def profiles(profile: str | None, as_json: bool) -> None:
    """List the hardware profiles, or show one with its latency table."""
    import msgspec

    from toolkit import api
    from toolkit import profiles as known

    found = [known.load(profile)] if profile else list(api.list_profiles())
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
        return
    for each in found:
        click.echo(f"{each.id:<26} {each.status:<8} {each.runtime:<12} {each.format:<8} {each.description}")
    if profile:
        for name, fact in found[0].facts.items():
            click.echo(f"  {name:<24} {fact.value}  ({fact.source})")
        from toolkit.report import terminal
        from toolkit.run.prepare import measured_table

        try:
            lines = terminal.table(profile, *measured_table(profile))
        except EdgekitError as error:  # the profile is shown all the same
            lines = [f"latency table: none to show here. {error.message} {error.hint}"]
        for line in lines:
            click.echo(line)


@cli.command(cls=Command, example="edgekit doctor")
@json_option
def doctor(as_json: bool) -> None:
    """What is installed, what can run here, what to do else."""
    import json

    facts = examine()
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    for title, entries in facts.items():
        click.echo(f"{title}:")
        for name, value in entries.items():
            click.echo(f"  {name:<20} {value}")


def writable(folder: Path) -> str:
    """What to do where the folder cannot be written to, else nothing."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return "" if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else "  cannot be written: set EDGEKIT_CACHE to a folder"


def examine() -> dict[str, dict[str, str]]:
    """Versions, machine, profiles and caches, without importing a framework."""
    import platform
    from importlib import metadata, util

    from toolkit import profiles as known
    from toolkit.devices import local

    versions = {}
    for name in (
        "edgekit",
        "torch",
        "torchvision",
        "onnx",
        "onnxruntime",
        "onnxsim",
        "openvino",
        "tensorrt",
        "tensorrt_rtx",
        "nncf",
    ):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            extra = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx", "nncf": "nncf"}.get(name, "all")
            versions[name] = f'not installed; python -m pip install "edgekit[{extra}]"'
    facts = local.facts()

    def usable(profile: Profile) -> str:
        if profile.status == "template":
            return f"template: nothing measured; {known.next_step(profile)}"
        if not profile.simulation and not util.find_spec(profile.runtime):
            return f'runtime missing; python -m pip install "edgekit[{profile.runtime.replace("_", "-")}]"'
        if profile.format == "tensorrt":
            return "builds engines, runs none: `edgekit export -p ...` here, then trtexec on the device"
        elsewhere = known.measured_on(profile.id)
        if elsewhere in ("", facts.cpu):
            return "ready"
        return f"measured on another device: {elsewhere}; your own: edgekit measure MODEL -p local-{profile.runtime}"

    cache = known.cache_dir()
    tables = sorted(path.parent.name for path in cache.rglob("header.json")) if cache.exists() else []
    machine = {
        "python": platform.python_version(),
        "cpu": facts.cpu,
        "cores": str(facts.cores),
        "instruction sets": facts.instruction_set,
    }
    return {
        "packages": versions,
        "machine": machine,
        "profiles": {profile.id: usable(profile) for profile in known.list_profiles()},
        "cache": {"folder": str(cache) + writable(cache), "tables": ", ".join(tables) or "none; the first run measures one"},
    }
