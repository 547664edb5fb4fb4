"""Time of drawing one image on a page of `demo`, in headless Chromium, and pictures of the page.

    python benchmarks/demo_speed.py PAGE [--text 7] [--steps 50,4] [--repeats 15] [--pictures FOLDER]

PAGE is the folder of the page, opened from the disk. A row per model and number of steps: median, least and most milliseconds of
one drawing, by the page's own clock, of `--repeats` drawings after two that do not count. A model of few steps has its own number.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from browser import Page, browser, find_browser
from shared import table

READY = "document.documentElement.dataset.ready === 'true'"
COMPLETE = "tinyfusionPage.complete && !tinyfusionPage.playing"
_SETTLED_S = 300.0


def change(page: Page, id: str, value: str) -> None:
    """Set a control of the page, and wait for the drawing."""
    page.evaluate(
        f"(() => {{ const e = document.getElementById('{id}'); e.value = '{value}'; e.dispatchEvent(new Event('input')); }})()"
    )
    page.wait(COMPLETE, _SETTLED_S)


def rows(page: Page, text: str, wanted: list[int], repeats: int) -> list[list[str]]:
    """The rows of the table."""
    change(page, "classes", text)
    models = json.loads(page.evaluate("JSON.stringify(tinyfusionFacts.models)"))
    found = []
    for i, model in enumerate(models):
        offered = sorted(map(int, model["samplers"][0]["steps"]))
        for steps in [number for number in wanted if number in offered] if len(offered) > 1 else offered:
            times = []
            for _ in range(repeats + 2):
                if len(offered) > 1:
                    change(page, f"steps-{i}", str(offered.index(steps)))
                else:
                    change(page, "classes", text)
                times.append(page.evaluate(f"tinyfusionPage.sides[{i}].film.at(-1).ms"))
            times = times[2:]
            spread = f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
            found.append([model["name"], str(model["depth"]), str(steps), spread])
    return found


def pictures(page: Page, folder: Path) -> None:
    """Write pictures of the page: three quarters through a drawing of five images, and the end at phone width, light and dark."""
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(5):  # the first drawings are slower
        change(page, "classes", "31415")
    page.size(1160, 900)
    page.evaluate(
        "document.getElementById('clock').value = 760; document.getElementById('clock').dispatchEvent(new Event('input'))"
    )
    page.picture(folder / "desktop.png", whole=True)
    page.size(375, 740, mobile=True, scale=2)
    for dark in (False, True):
        page.prefer(dark=dark)
        page.picture(folder / f"phone-{'dark' if dark else 'light'}.png", whole=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--text", default="7", help="classes to draw")
    parser.add_argument("--steps", default="50,4", help="numbers of steps, separated by commas")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--pictures", type=Path, help="folder for pictures of the page")
    options = parser.parse_args()
    program = find_browser()
    if program is None:
        parser.error("needs Chromium on the path")
    with browser(program) as page:
        page.size(1160, 900)
        page.open((options.page.resolve() / "index.html").as_uri())
        page.wait(READY, _SETTLED_S)
        page.wait(COMPLETE, _SETTLED_S)
        if options.pictures:
            pictures(page, options.pictures)
            page.size(1160, 900)
        steps = [int(number) for number in options.steps.split(",")]
        print(
            *table(["model", "blocks", "steps", "ms per image"], *rows(page, options.text, steps, options.repeats)),
            sep="\n",
        )
        assert page.errors == [], page.errors


if __name__ == "__main__":
    main()
