"""The report in a browser: what is drawn, what hover, sliders and keys do, at the width of a desk and of a phone."""

import random
import re
import shutil
from pathlib import Path

import pytest
from written_runs import HOSTILE, LONG_WORD, ppo_metrics, write_lines, write_run

from engine.report import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright, to look at the report")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
WIDTHS = {"desk": 1280, "phone": 390}

# Blue pixels of each chart's canvas: lines and areas are blue, grid, labels and warnings are not.
BLUE_PIXELS = """() => Object.fromEntries([...document.querySelectorAll('figure.chart')].map((figure) => {
  const canvas = figure.querySelector('canvas');
  if (!canvas) return [figure.dataset.metric, null];
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let i = 0; i < data.length; i += 4) count += data[i + 3] > 100 && data[i + 2] - data[i] > 60;
  return [figure.dataset.metric, count];
}))"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def opened(browser):
    """`opened(file, width=..., dark=...)` -> the page, which afterwards must have said and asked for nothing."""
    seen, contexts = [], []

    def open_page(file: Path, *, width: int = WIDTHS["desk"], dark: bool = False):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: seen.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: seen.append(f"error: {error}"))
        page.on("request", lambda request: seen.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert seen == []


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return write_report([write_run(tmp_path_factory.mktemp("one") / "ppo")])


def wait_until(page, condition: str) -> None:
    """Playwright's own waiting evaluates strings, which the page's content security policy forbids."""
    for _ in range(1200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"This did not become true: {condition}")


def look_through(page) -> None:
    """Open every group and bring every chart into view."""
    page.evaluate("document.querySelectorAll('details').forEach((group) => { group.open = true })")
    for plot in page.locator("figure.chart .plot").all():
        plot.scroll_into_view_if_needed()
    wait_until(page, "[...document.querySelectorAll('figure.chart .plot')].every((plot) => plot.firstChild)")


def overflow(page) -> int:
    """Pixels by which the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


def first_chart(page, metric: str = "score/mean"):
    figure = page.locator(f"figure.chart[data-metric='{metric}']")
    figure.scroll_into_view_if_needed()
    figure.locator("canvas").wait_for()
    return figure


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_every_curve_is_drawn_and_the_page_is_as_wide_as_the_window(opened, report, width):
    page = opened(report, width=width)
    look_through(page)
    drawn = page.evaluate(BLUE_PIXELS)
    names = {name for name in ppo_metrics(1, 2, random.Random(0)) if name != "memory/planned_gib"}
    assert names | {"eval/win_rate", "seconds per iteration"} <= drawn.keys()
    assert all(drawn.values()), {name: count for name, count in drawn.items() if not count}
    assert min(drawn.values()) > 50
    assert overflow(page) <= 0
    assert page.evaluate(
        "[...document.querySelectorAll('.text')].every((text) => text.scrollWidth <= text.clientWidth)"
    )


def test_nothing_is_drawn_before_it_is_looked_at(opened, report):
    page = opened(report)
    first_chart(page)
    assert page.locator("figure[data-metric='skipped/steps'] canvas").count() == 0


def test_texts_of_a_run_stay_texts(opened, report):
    page = opened(report)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, #report script, .text b, .text i:not(.empty), .warning i").count() == 0
    assert page.locator("#samples .text").get_by_text(HOSTILE, exact=True).count() == 1
    assert "<i>why</i>" in page.locator("#health").inner_text()
    assert LONG_WORD in page.locator("#samples").inner_text()
    assert " <b>" in page.locator(".token").all_inner_texts()


def test_the_header_says_what_the_run_came_to(opened, tmp_path):
    write_run(tmp_path / "ppo", iterations=12, num_iterations=40)
    rows = [{"iteration": 1, "score/mean": 0.25, "time/train_s": 60}, {"iteration": 2, "score/mean": 0.5}]
    write_lines(tmp_path / "ppo" / "metrics.jsonl", rows)
    said = opened(write_report([tmp_path / "ppo"])).locator("header").inner_text()
    for expected in ("ppo", "tiny/actor-0", "2 of 40", "1 min", "0.5", "at first 0.25", "2 × H100"):
        assert expected in said


def test_pointing_at_a_curve_says_its_values_in_all_charts(opened, report):
    page = opened(report)
    figure = first_chart(page)
    assert figure.locator(".at").inner_text() == "last"
    figure.locator(".u-over").hover()
    iteration = figure.locator(".at").inner_text()
    assert re.fullmatch(r"iteration 1[3-8]", iteration)
    assert page.locator("figure[data-metric='score/std'] .at").inner_text() == iteration


def test_dragging_zooms_all_charts_and_a_double_click_shows_the_whole_run(opened, report):
    page = opened(report)
    box = first_chart(page).locator(".u-over").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.25, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, middle, steps=4)
    page.mouse.up()
    ranges = "[...charts.drawn].map(({ plot }) => [plot.scales.x.min, plot.scales.x.max].map(Math.round).join('-'))"
    wait_until(page, "charts.zoom !== null")
    page.wait_for_timeout(100)  # uPlot puts changes together
    assert set(page.evaluate(ranges)) == {"8-15"}
    page.mouse.dblclick(box["x"] + 50, middle)
    page.wait_for_timeout(100)
    assert set(page.evaluate(ranges)) == {"0-30"}


def test_a_curve_is_read_by_keys(opened, report):
    page = opened(report)
    figure = first_chart(page)
    plot = figure.locator(".plot")
    assert "between" in plot.get_attribute("aria-label")
    plot.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert figure.locator(".at").inner_text() == "iteration 2"
    page.keyboard.press("+")
    wait_until(page, "charts.zoom !== null")
    page.keyboard.press("Escape")
    wait_until(page, "charts.zoom === null")


def test_smoothing_draws_another_line_and_leaves_the_numbers(opened, report):
    page = opened(report)
    figure = first_chart(page, "loss/policy")
    before, last = page.evaluate(BLUE_PIXELS)["loss/policy"], figure.locator("b").inner_text()
    page.locator("#smoothing").fill("0.9")
    assert page.evaluate(BLUE_PIXELS)["loss/policy"] != before
    assert figure.locator("b").inner_text() == last


def test_the_slider_goes_through_the_samples(opened, report):
    page = opened(report)
    section = page.locator("#samples")
    assert "(30) Rembrandt" in section.inner_text()
    section.locator("input[type=range]").focus()
    page.keyboard.press("Home")
    assert "iteration 1" in section.inner_text() and "(1) Rembrandt" in section.inner_text()
    section.get_by_role("button", name="Next iteration").click()
    assert "(2) Rembrandt" in section.inner_text() and "(1) Rembrandt" not in section.inner_text()


def test_evaluated_responses_stand_beside_the_initial_ones(opened, report):
    page = opened(report)
    section = page.locator("#evaluation")
    assert "eval/win_rate\t0.5\t0.85\t+0.35" in section.inner_text()
    card = section.locator(".card").first
    left, right = (card.locator(".pair > div").nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"] and left["x"] < right["x"]
    assert "I was born in 1642." in card.inner_text() and "[30] Rembrandt" in card.inner_text()
    assert "worse by 0.1" in card.inner_text()
    section.locator("select").select_option("better than at first")
    assert section.locator(".card").count() == 2


def test_tokens_are_coloured_by_what_is_chosen_and_say_their_numbers(opened, report):
    page = opened(report)
    section = page.locator("#tokens")
    colours = "[...document.querySelectorAll('.token')].map((token) => getComputedStyle(token).backgroundColor)"
    advantages = page.evaluate(colours)
    assert len(set(advantages)) > 10
    assert {colour.split(",")[0] for colour in advantages} == {"rgba(0", "rgba(230"}  # blue below zero, orange above
    steps = [float(step) for step in section.locator(".step").all_inner_texts()]
    assert steps == sorted(steps) and steps[2] == 0 and steps[0] == -steps[4] < 0
    section.locator("select").select_option("Reward")
    rewards = page.evaluate(colours)
    assert len(set(rewards)) == 2 and rewards[-1] == "rgba(230, 129, 0, 0.8)"
    section.locator(".token").last.hover()
    assert "Token 15 of 15" in section.inner_text()
    assert section.locator(".numbers .chosen").inner_text() == "Reward\n0.8"
    section.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    assert 'Token 2 of 15: " don"' in section.inner_text()


def test_memory_stands_beside_the_plan(opened, report):
    said = opened(report).locator("#memory").inner_text()
    assert "21 GiB, 2 % below what was measured" in said
    assert "494 M" in said and "KV cache" in said and "measured\n21.5 GiB" in said


def test_what_a_process_takes_on_a_cpu_is_not_held_against_the_plan(opened, tmp_path):
    plan = write_run(tmp_path, iterations=2) / "memory_plan.json"
    plan.write_text(plan.read_text().replace("cuda", "cpu"))
    page = opened(write_report([tmp_path]))
    assert page.evaluate("metricChart('memory/peak_gib').querySelectorAll('.swatch').length") == 0  # one line alone
    said = page.locator("#memory").inner_text()
    assert "Measured: 21.5 GiB of the whole process" in said and "measured\n" not in said


def test_two_runs_are_told_apart_by_colour_and_dash(opened, tmp_path):
    folders = [write_run(tmp_path / "with_kl"), write_run(tmp_path / "without_kl", iterations=20, seed=3)]
    page = opened(write_report(folders, tmp_path / "both.html"), width=WIDTHS["phone"])
    look_through(page)
    assert overflow(page) <= 0
    for place in ("header", "figure[data-metric='score/mean'] figcaption", "#time", "#config"):
        said = page.locator(place).first.inner_text()
        assert "with_kl" in said and "without_kl" in said, place
    lines = "[...charts.drawn].find(({ title }) => title === 'score/mean').lines"
    assert page.evaluate(f"new Set({lines}.map((line) => line.dash.join())).size") == 2
    assert page.evaluate(f"new Set({lines}.map((line) => colour(line.colour))).size") == 2
    assert page.evaluate(f"{lines}.map((line) => line.y.length)") == [30, 20]
    assert re.search(r"seed\s+0\s+3", page.locator("#config").inner_text())
    page.locator("#run").select_option("without_kl")
    assert "(20) Rembrandt" in page.locator("#samples").inner_text()


def test_what_nobody_scored_is_neither_better_nor_worse(opened, tmp_path):
    write_run(tmp_path, iterations=2)
    scores = [(None, 0.5), (0.5, None), (0.5, 0.5), (0.5, 0.1)]
    row = {"iteration": 0, "prompt": "p", "response": "r", "initial_response": "i"}
    rows = [row | {"score": score, "initial_score": initial} for score, initial in scores]
    write_lines(tmp_path / "evaluation_samples.jsonl", rows)
    section = opened(write_report([tmp_path])).locator("#evaluation")
    kinds = ("better than at first", "worse than at first", "the same score", "no score to compare")
    for kind, count in zip(kinds, (1, 0, 1, 2), strict=True):
        section.locator("select").select_option(kind)
        assert section.locator(".card").count() == count, kind
    assert "worse by" not in section.inner_text() and "same score" not in section.locator(".stack").inner_text()


def test_only_a_run_that_was_watched_is_called_healthy(opened, tmp_path):
    runs = {"skipping": {"score/mean": 1, "skipped/steps": 3}, "sft": {"train/loss": 1, "skipped/steps": 0}}
    runs["sound"] = {"score/mean": 1, "skipped/steps": 0}
    said = {}
    for name, metrics in runs.items():
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "metrics.jsonl", [{"iteration": 1, **metrics}])
        said[name] = opened(write_report([tmp_path / name])).locator("#health").inner_text()
    assert "left out for numbers that are not finite: 3." in said["skipping"]
    assert "not checked for signs of trouble" in said["sft"]
    assert [name for name, text in said.items() if "No health warnings" in text] == ["sound"]


def test_many_runs_are_all_told_apart(opened, report):
    styles = "new Set([...Array(36).keys()].map((i) => JSON.stringify(lineStyle(i)))).size"
    assert opened(report).evaluate(styles) == 36


def test_dark_is_dark(opened, report):
    shades = [
        opened(report, dark=dark).evaluate("getComputedStyle(document.body).backgroundColor") for dark in (False, True)
    ]
    light, dark = (sum(map(int, re.findall(r"\d+", shade))) for shade in shades)
    assert light > 600 and dark < 150


@pytest.mark.parametrize("rows", [None, [], [{"iteration": 1, "score/mean": 0.5, "loss/value": None}]])
def test_what_is_missing_is_said_in_its_section(opened, tmp_path, rows):
    if rows is not None:
        write_lines(tmp_path / "metrics.jsonl", rows)
    page = opened(write_report([tmp_path]))
    look_through(page)
    said = page.locator("main").inner_text()
    files = ("memory_plan.json", "evaluation.jsonl", "samples.jsonl", "token_views.jsonl", "config.yaml")
    assert all(file in said for file in (*files, "versions.json"))
    assert "There are no metrics" in said if not rows else "No health warnings" in said
    if rows:
        assert "No finite number was reported" in said
        assert page.evaluate(BLUE_PIXELS)["score/mean"] > 5
    else:
        assert "There are no curves: metrics.jsonl is missing" in said


def test_a_file_of_another_form_costs_its_section_only(opened, tmp_path):
    write_run(tmp_path, iterations=3)
    (tmp_path / "memory_plan.json").write_text('{"phases": {"train": null}}')
    write_lines(tmp_path / "token_views.jsonl", [{"iteration": 1, "prompt": "p", "values": [0.1]}])
    page = opened(write_report([tmp_path]))
    assert "This section cannot be shown" in page.locator("#memory").inner_text()
    assert "This section cannot be shown" in page.locator("#tokens").inner_text()
    assert "(3) Rembrandt" in page.locator("#samples").inner_text()
    assert "deepspeed" in page.locator("#config").inner_text()


def test_a_supervised_run_is_shown_as_well(opened, tmp_path):
    rows = [{"iteration": 0, "eval/accuracy": 0.5}]
    for i in range(1, 21):
        step = {"iteration": i, "train/loss": 1 / i, "grad_norm": 1.0, "lr": 1e-3, "time/step_s": 0.1}
        rows.append(step | ({"eval/accuracy": 0.9} if i % 10 == 0 else {}))
    write_lines(tmp_path / "metrics.jsonl", rows)
    page = opened(write_report([tmp_path]), width=WIDTHS["phone"])
    look_through(page)
    drawn = page.evaluate(BLUE_PIXELS)
    assert {"train/loss", "grad_norm", "lr", "eval/accuracy", "seconds per iteration"} <= drawn.keys() and min(
        drawn.values()
    ) > 50
    assert page.evaluate("column(runs[0], 'eval/accuracy').x") == [0, 10, 20]
    assert "0.5\t0.9\t+0.4" in page.locator("#evaluation").inner_text()


def test_ten_thousand_iterations_open(opened, tmp_path):
    noise = random.Random(0)
    more = {f"extra/metric_{i}": noise.random() for i in range(14)}
    rows = [{"iteration": i, **ppo_metrics(i, 10_000, noise), **more} for i in range(1, 10_001)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    write_lines(
        tmp_path / "samples.jsonl", [{"iteration": i, "prompt": "p", "response": "r" * 2000} for i in range(10_000)]
    )
    file = write_report([tmp_path])
    assert file.stat().st_size < 8_000_000
    page = opened(file)
    first_chart(page)
    assert page.evaluate(BLUE_PIXELS)["score/mean"] > 50
    assert page.evaluate("column(runs[0], 'score/mean').x.length") == 10_000
    assert re.search(r"\d+ of 10000 iterations, evenly spread", page.locator("#samples").inner_text())
