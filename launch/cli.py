"""`emotion-launch`: check a run, start it on this machine or on each node, list runs and pull adapters."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from emotion_train.errors import EXIT_CODES, exit_code
from launch.command import accelerate_line, choose, printable


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return exit_code("emotion-launch", lambda: int(arguments.verb(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="emotion-launch", description=__doc__, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    run = verbs.add_parser(
        "run",
        help="start the training by accelerate launch; with several nodes (SkyPilot, srun) it is started on each",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_config(run)
    run.add_argument(
        "--allow-unfenced",
        action="store_true",
        help="train also on a store that ignores create-only writes: nothing then keeps two writers of one run apart",
    )
    run.add_argument(
        "--processes", type=_positive, metavar="N", help="processes on each node (default: one for each visible GPU; one on the CPU)"
    )
    run.add_argument("--dry-run", action="store_true", help="print the accelerate launch line and start nothing")
    run.set_defaults(verb=_run)

    check = verbs.add_parser("check", help="look at config, data, output, base and GPU without loading anything")
    _add_config(check)
    check.set_defaults(verb=_check)

    runs = verbs.add_parser("runs", help="list the runs below an output URL")
    runs.add_argument("output_url", metavar="OUTPUT_URL", help="s3://bucket/prefix or a folder")
    runs.set_defaults(verb=_runs)

    pull = verbs.add_parser("pull", help="download a published adapter, verified by sha256")
    pull.add_argument("run_url", metavar="OUTPUT_URL/RUN_ID", help="a run that `emotion-launch runs` lists as published")
    pull.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="new folder for the adapter; its report/ holds the report")
    pull.set_defaults(verb=_pull)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="run config in YAML (emotion_train/configs/ has examples)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="values that win over the file")
    parser.add_argument(
        "--accelerate-config", metavar="FILE", help="accelerate config, a path or a name in accelerate_configs/ (default: by the GPUs)"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _run(arguments: argparse.Namespace) -> int:
    from emotion_train.config import load_config
    from emotion_train.preemption import hold_seconds
    from launch.processes import run_to_end
    from launch.topology import gpus

    config = load_config(arguments.config, arguments.overrides)
    choice = choose(gpus(), arguments.accelerate_config, config, processes=arguments.processes)
    topology = choice.topology
    line = accelerate_line(
        choice.config_file, arguments.config, arguments.overrides, arguments.allow_unfenced, topology, config.distributed.timeout_s
    )
    print(f"{choice.config_file.stem}: {choice.reason}\n{printable(line)}", flush=True)
    if arguments.dry_run:
        return 0
    environment = dict(os.environ)
    if topology.on_cpu:  # accelerate would take the physical cores, with a warning
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // topology.processes_per_node)))
    return run_to_end(line, environment, hold_seconds(config.preemption.hold_s, os.environ))


def _check(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from emotion_train.config import load_config
    from launch.preflight import run_checks
    from launch.topology import gpus

    checks = run_checks(load_config(arguments.config, arguments.overrides), gpus(), arguments.accelerate_config)
    console = Console(highlight=False, soft_wrap=True)
    for check in checks:
        mark = "[green]ok[/]   " if check.ok else "[red]wrong[/]"
        console.print(f"{mark} {check.name:<11} ", end="")
        console.print(check.finding, markup=False)
    return 0 if all(check.ok for check in checks) else 2


def _runs(arguments: argparse.Namespace) -> int:
    from launch.runs import list_runs

    rows = list_runs(arguments.output_url)
    if not rows:
        print(f"no runs at {arguments.output_url}")
        return 0
    width = max(len("run"), *(len(run_id) for run_id, _ in rows))
    print(f"{'run':<{width}}  {'state':<10}  {'step':>7}  {'macro-F1':>8}  {'on':<10}  updated")
    for run_id, facts in rows:
        score = facts["macro_f1"]
        shown, split = (f"{score:.3f}", facts["split"]) if isinstance(score, float) else ("-", "-")
        print(f"{run_id:<{width}}  {facts['state']:<10}  {facts['step']:>7}  {shown:>8}  {split:<10}  {facts['updated']}")
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    from launch.runs import pull

    entry = pull(arguments.run_url, arguments.to)
    total = sum(part.bytes for part in entry.parts)
    print(f"{len(entry.parts)} files, {total / 2**20:.1f} MiB, sha256 verified: {arguments.to}")
    print(f'next: emotion-train predict --adapter {arguments.to} "what a lovely mess"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
