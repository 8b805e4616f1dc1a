"""The command: mutate the sources, run the tests that must notice, name the survivors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ops.output import AsJson, aside, console, errors_reported, print_json, table
from tests.mutants.catalogue import MUTANTS, Mutant
from tests.mutants.sandbox import Run, Sandbox, sandbox

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Judged:
    """What became of one mutant."""

    mutant: Mutant
    run: Run

    def as_document(self) -> dict[str, Any]:
        """The verdict for programs."""
        return {
            "name": self.mutant.name,
            "meaning": self.mutant.meaning,
            "outcome": self.run.outcome,
            "seconds": round(self.run.seconds, 1),
            "killed_by": self.run.killer,
        }


def _chosen(names: Sequence[str] | None) -> list[Mutant]:
    known = {mutant.name: mutant for mutant in MUTANTS}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise typer.BadParameter(f"no mutant {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names] if names else list(MUTANTS)


@app.command()
def main(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Mutants; all unless named.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take safeguards out of a copy of the sources, one at a time, and see that tests fail.

    Exits with 1 if a mutant survives or cannot be run, and with 2 if the tests fail without any.
    """
    mutants = _chosen(names)
    with errors_reported(as_json=as_json), sandbox() as copy:
        _require_green(copy, mutants)
        judged = [_judge(copy, mutant) for mutant in mutants]
    if as_json:
        print_json({"mutants": [one.as_document() for one in judged]})
    else:
        _show(judged)
    if any(one.run.outcome != "killed" for one in judged):
        raise typer.Exit(1)


def _require_green(copy: Sandbox, mutants: Sequence[Mutant]) -> None:
    aside.print("without any mutant: ", end="")
    run = copy.test([test for mutant in mutants for test in mutant.tests])
    green = run.outcome == "survived"
    aside.print(f"{'green' if green else 'red'} in {run.seconds:.1f} s", highlight=False)
    if not green:
        aside.print(run.output, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2)


def _judge(copy: Sandbox, mutant: Mutant) -> Judged:
    aside.print(f"{mutant.name}: ", end="", highlight=False)
    with copy.mutated(mutant):
        run = copy.test(mutant.tests)
    aside.print(f"{run.outcome} in {run.seconds:.1f} s", highlight=False)
    if run.outcome == "broken":
        aside.print(run.output, markup=False, highlight=False, soft_wrap=True)
    return Judged(mutant, run)


def _show(judged: Sequence[Judged]) -> None:
    rows = [
        (one.mutant.name, one.run.outcome, round(one.run.seconds, 1), one.run.killer)
        for one in judged
    ]
    console.print(table("Mutants", ("mutant", "outcome", "seconds", "killed by"), rows))
    for one in judged:
        if one.run.outcome != "killed":
            aside.print(f"{one.mutant.name} {one.run.outcome}: {one.mutant.meaning}", style="red")


if __name__ == "__main__":
    app()
