"""report.html: what is packed comes back, what is text stays text, and a real browser shows it without a request."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps

import induction_head_detection
import qk_circuit_analysis
from common.circuits import maps
from common.heads import scores
from common.heads.detection import Detection
from common.results import figures_heads, page
from common.results.figures_heads import name_of
from common.results.spec import Axis, Entry, Figure, Heatmap, Marks, Outline, Panel, Scale
from tests import browser

HOSTILE = [
    "BOS",
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<b>bold</b>&amp;",
    "a\u2028b",
    "$x_2$%{x}",
    "\u202eabc",
]
REPEATS = "the cat sat on </script> the cat sat on </script>"


FIRST_FIGURES = (
    "mosaic", "effects", "ablation", "thresholds", "budget", "text-0-pattern", "text-1-pattern",
)  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    out = tmp_path_factory.mktemp("first") / "out"
    texts = ["--text", REPEATS, "--text", "the quick brown fox"]
    assert induction_head_detection.main(["--model", "mini", "--out", str(out), *texts]) == 0
    return out


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    out = tmp_path_factory.mktemp("second") / "out"
    assert qk_circuit_analysis.main(["--model", "mini", "--out", str(out), "--interventions", "--text", REPEATS]) == 0
    return out


@pytest.fixture(scope="module")
def results(first):
    return json.loads((first / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    driver = browser.start(tmp_path_factory.mktemp("chromium") / "profile")
    yield driver
    driver.quit()


def show(driver, path) -> None:
    """Open a page, with nothing noted of the pages before."""
    driver.get("about:blank")
    browser.requested(driver)
    browser.complaints(driver)
    driver.get(path.as_uri())


def hover(driver, figure: str, x: float, y: float) -> str:
    """What a figure says at a place given as shares of its width and height."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    read = "return document.getElementById('bubble').hidden ? '' : document.getElementById('bubble').textContent"
    area = driver.find_element("css selector", f"#{figure} .panel")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", area)
    width, height = area.size["width"], area.size["height"]
    place = ActionChains(driver).move_to_element_with_offset(area, 0, 0)
    place = place.move_to_element_with_offset(area, round((x - 0.5) * width), round((y - 0.5) * height))
    place.perform()
    return WebDriverWait(driver, 10).until(lambda driver: driver.execute_script(read))


def click(driver) -> None:
    """Click where the pointer is."""
    from selenium.webdriver import ActionChains

    ActionChains(driver).click().perform()


def in_mosaic(results, head) -> tuple[float, float]:
    """The middle of a head's square, as shares of the width and height of the mosaic."""
    layers, heads = (1 + max(one[axis] for one in results["heads"]) for axis in ("layer", "head"))
    return (head["head"] + 0.5) / heads, (head["layer"] + 0.5) / layers


def drawn(driver, figure: str) -> np.ndarray:
    """The values of a drawn map, queries after BOS × keys; NaN where blank."""
    cells = driver.execute_script(f"return document.querySelector('#{figure} canvas').cells")
    return np.array(cells[1:], dtype=float)


def painted(driver, figure: str) -> np.ndarray:
    """The colours of a drawn map, queries after BOS × keys × red, green, blue; NaN where blank."""
    read = f"""
        const canvas = document.querySelector('#{figure} canvas'), {{ width, height }} = canvas;
        return [width, height, [...canvas.getContext('2d').getImageData(0, 0, width, height).data]];
    """
    width, height, data = driver.execute_script(read)
    pixels = np.array(data, dtype=float).reshape(height, width, 4)
    return np.where(pixels[..., 3:] == 0, np.nan, pixels[..., :3])


def is_shown(driver, figure: str) -> bool:
    """Whether the picture of a figure is there and the browser could read it."""
    return driver.execute_script(f"const one = document.querySelector('#{figure} img'); "
                                 "return Boolean(one && one.complete && one.naturalWidth)")  # fmt: skip


def unpacked(packed, places: int) -> np.ndarray:
    codes = np.frombuffer(base64.b64decode(packed["codes"]), dtype="<i2").reshape(len(packed["scale"]), -1)
    maps = np.full((len(codes), places, places), np.nan)
    for head, scale in enumerate(packed["scale"]):
        cells = iter(codes[head])
        for query in range(places):
            for key in range(query + 1):
                code = next(cells)
                maps[head, query, key] = np.nan if code == -32768 else code * scale / 32767
    return maps


def big_found(layers: int, heads: int) -> Detection:
    """A model of that size in which one head is an induction head."""
    zeros = np.zeros((layers, heads))
    verdict = np.full((layers, heads), "none", dtype="<U20")
    verdict[1, 0] = "induction"
    return Detection(zeros, zeros, zeros, zeros, zeros, zeros, verdict, *[(verdict == "induction")[None]] * 2)


def mosaic(found: Detection):
    return figures_heads.mosaic_figure(found, "title")


def induction_page(results, said, texts, figures) -> str:
    chosen = max(results["heads"], key=lambda head: head["prefix_matching"])
    return page.report(results, "Induction heads of", name_of(chosen), said, texts, figures)


def text_maps(tokens, maps, *, cells=(), text="a text") -> page.TextMaps:
    return page.TextMaps(1, text, tokens, "said", cells, range(len(tokens)), maps)


@given(st.integers(1, 3), st.integers(2, 9), st.floats(1e-6, 1e4), st.integers(0, 2**32 - 1))
def test_maps_come_back_within_a_step_of_the_scale_they_say(heads, places, size, seed):
    rng = np.random.default_rng(seed)
    maps = rng.normal(0, size, (heads, places, places))
    maps[rng.random(maps.shape) < 0.2] = np.nan
    lower = np.where(np.tri(places, dtype=bool), maps, np.nan)
    packed = page.pack(maps)
    back = unpacked(packed, places)
    assert (np.isnan(back) == np.isnan(lower)).all()
    steps = np.array(packed["scale"])[:, None, None] / 32767
    assert (np.nan_to_num(np.abs(back - lower)) <= 0.51 * steps).all()
    assert len(packed["codes"]) == page.packed_size(maps)


@given(st.text())
def test_json_in_a_script_element_cannot_end_it_and_comes_back(text):
    written = page.in_script({"text": text})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {"text": text}


def test_a_page_of_gpt2_small_with_four_texts_stays_small(results):
    heads = [{**results["heads"][0], "layer": at, "head": of} for at in range(12) for of in range(12)]
    pattern = np.random.default_rng(0).random((144, 13, 13))
    tokens = [f"token{place}" for place in range(13)]
    big = {**results, "heads": heads, "induction_heads": [], "sequences": results["sequences"][:1] * 4}
    figures = {"mosaic": mosaic(big_found(12, 12)), "effects": figures_heads.effect_figure(heads, "title")}
    written = induction_page(big, [], [text_maps(tokens, {"pattern": pattern})] * 4, figures)
    assert len(written.encode()) < 2_000_000


def test_what_does_not_fit_is_left_out_and_said(results, monkeypatch):
    pattern = np.zeros((24, 3, 3))
    one = text_maps(["BOS", "a", "b"], {"pattern": pattern})
    monkeypatch.setattr(page, "MOST_PACKED", 2 * page.packed_size(pattern))
    five = {**results, "sequences": results["sequences"][:1] * 5}
    written = induction_page(five, [], iter([one] * 5), {"mosaic": mosaic(big_found(4, 6))})
    assert written.count('class="tokens"') == 2
    assert "3 further texts are left out here" in written


def test_a_long_text_is_cut_to_its_window_and_says_so(mini):
    places = figures_heads.drawn_places(200, [(150, 120), (151, 121)])
    assert places[0] == 0 and len(places) == 49 and {120, 121, 150, 151} <= set(places)
    tokens = np.array([mini.bos, *mini.ordinary()[:199]])
    (part,) = scores.patterns(mini, tokens, [(1, 2)], places)
    (whole,) = scores.patterns(mini, tokens, [(1, 2)])
    np.testing.assert_allclose(part, whole[np.ix_(places, places)])
    one = page.TextMaps(1, "text", ["x"] * 200, "said", [], places, {"pattern": part[None]})
    assert f"tokens {places[1]} to {places[-1]} of 199" in page._cut(one)


def test_figures_without_a_section_are_not_on_the_page_and_a_section_has_all_of_its_name(results):
    shown = mosaic(big_found(4, 6))
    written = induction_page(results, [], [], {"mosaic": shown, "parts_1.0": shown, "parts_1.1": shown, "x": shown})
    data = json.loads(re.search('type="application/json" id="page">(.*?)</script>', written)[1])
    assert set(data["figures"]) == {"mosaic", "parts_1-0", "parts_1-1"}
    assert written.count("One part of a head replaced") == 1
    assert all(f'id="{key}"' in written for key in data["figures"])


def test_no_plots_leaves_the_page_out(tmp_path, first, second, results):
    assert "report.html" in results["files"]
    assert "report.html" in json.loads((second / "results.json").read_text())["files"]
    for script, quick in ((induction_head_detection, "--no-ablate"), (qk_circuit_analysis, "--no-interventions")):
        out = tmp_path / script.PROGRAM
        assert script.main(["--model", "mini", "--no-plots", quick, "--text", "a b a b", "--out", str(out)]) == 0
        assert "report.html" not in {path.name for path in out.iterdir()}


def test_the_page_needs_nothing_from_outside(first):
    written = (first / "report.html").read_text(encoding="utf-8")
    outside = re.sub(r"<script[^>]*>.*?</script>", "", written, flags=re.DOTALL)
    assert "http://" not in outside and "https://" not in outside and "<link" not in outside


def test_the_first_page_renders_says_values_and_follows_clicks(chromium, first, results, mini):
    show(chromium, first / "report.html")
    assert chromium.title == "Induction heads of mini"
    for figure in FIRST_FIGURES:
        assert is_shown(chromium, figure), figure
    assert [one.text for one in chromium.find_elements("css selector", "section.text h3")] == ["Text 1", "Text 2"]
    heads = results["heads"]
    for head in (max(heads, key=lambda one: one["prefix_matching"]), heads[-1], heads[0]):
        assert f"head {name_of(head)}" in hover(chromium, "mosaic", *in_mosaic(results, head))
        said = chromium.find_element("id", "numbers").text
        assert f"Head {name_of(head)}" in said
        for column, value in head.items():  # as in heads.csv
            if isinstance(value, float):
                assert f"{column} {value:.4g}" in said
        click(chromium)
        assert f"Head {name_of(head)}:" in chromium.find_element("id", "chosen").text
        (pattern,) = scores.patterns(mini, mini.encode(REPEATS), [(head["layer"], head["head"])])
        seen = np.where(np.tri(len(pattern), dtype=bool), pattern, np.nan)[1:]
        np.testing.assert_allclose(drawn(chromium, "text-0-pattern"), seen, atol=2e-5)
    last = len(pattern) - 1
    said = hover(chromium, "text-0-pattern", 0.5 / (last + 1), (last - 0.5) / last)
    assert f"attention {pattern[last, 0]:.3f}" in said and "BOS" in said
    assert browser.complaints(chromium) == []
    assert all(address.startswith(("file:", "data:", "blob:")) for address in browser.requested(chromium))


def test_a_map_has_the_colours_of_its_values_and_bos_its_own(chromium, first):
    show(chromium, first / "report.html")
    values, colours = drawn(chromium, "text-0-pattern"), painted(chromium, "text-0-pattern")
    assert (np.isnan(values) == np.isnan(colours[..., 0])).all()
    limit = np.nanmax(values[:, 1:])
    for query, key in np.argwhere(np.isfinite(values)):
        name, most = ("Blues", limit) if key else ("Greys", 1.0)
        expected = 255 * np.array(colormaps[name](float(values[query, key] / most)))[:3]
        np.testing.assert_allclose(colours[query, key], expected, atol=6)
    ends = [one.text for one in chromium.find_elements("css selector", "#text-0-pattern .mark")]
    assert [float(end) for end in ends] == pytest.approx([limit, limit / 2, 0.0], rel=0.06)


def test_marks_bars_and_cells_say_what_they_are_and_a_mark_chooses_its_head(chromium, first, results):
    show(chromium, first / "report.html")
    data = json.loads(chromium.find_element("id", "page").get_attribute("textContent"))
    heads = {name_of(head): head for head in results["heads"]}
    for x, y, *_, text, name in data["figures"]["effects"][0]["spots"][:4]:
        said = hover(chromium, "effects", x, y)
        assert text.startswith(f"head {name}\n") and said.startswith("head ")
        number = heads[said.split("\n")[0].removeprefix("head ")]["total_effect"]
        assert f"total_effect {number:.4g}" in said
        click(chromium)
        assert f"Head {said.split()[1]}:" in chromium.find_element("id", "chosen").text
    ring = chromium.find_element("css selector", "#mosaic .ring").rect
    box = chromium.find_element("css selector", "#mosaic .panel").rect
    x, y = in_mosaic(results, heads[said.split()[1]])
    middle = ring["x"] + ring["width"] / 2 - box["x"], ring["y"] + ring["height"] / 2 - box["y"]
    assert middle == pytest.approx((x * box["width"], y * box["height"]), abs=2)
    top = max(results["heads"], key=lambda head: head["prefix_matching"])
    said = hover(chromium, "budget", top["budget_targets"] / 2, 0.5 / len(heads))
    assert float(said) == pytest.approx(top["budget_targets"], abs=6e-4)
    assert hover(chromium, "thresholds", (top["prefix_matching"] + 0.02) / 1.04, 0.5 / len(heads)) == (
        f"{top['prefix_matching']:.4g}"
    )
    assert browser.complaints(chromium) == []


def test_the_page_fits_a_narrow_window(chromium, first, second):
    for folder in (first, second):
        show(chromium, folder / "report.html")
        size = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert chromium.execute_script("return document.documentElement.scrollWidth") <= 400
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_choosing_from_the_list_does_what_clicking_does(chromium, first):
    show(chromium, first / "report.html")
    before = drawn(chromium, "text-0-pattern")
    options = chromium.find_elements("css selector", "#head option")
    assert len(options) == 24
    options[-1].click()
    assert chromium.find_element("id", "chosen").text.startswith("Head 3.5")
    assert np.nanmax(np.abs(drawn(chromium, "text-0-pattern") - before)) > 0.01


def test_the_second_page_shows_scores_patterns_and_the_decomposition(chromium, second, mini):
    results = json.loads((second / "results.json").read_text(encoding="utf-8"))
    show(chromium, second / "report.html")
    assert chromium.title == f"Layer {results['layer']} of mini"
    name = results["decomposition"][0]["head"]
    chosen, under = int(name.split(".")[1]), name.replace(".", "-")
    for figure in ("text-0-figure-0", "composition", f"circuits_{under}", f"parts_{under}", f"paths_{under}"):
        assert is_shown(chromium, figure), figure
    tokens = mini.encode(REPEATS)
    met = maps.interact(mini, tokens[None], results["layer"])
    lower = np.tri(len(tokens), dtype=bool)
    for kind, values in (("scores", met.scores), ("pattern", met.pattern)):
        size = np.abs(values[0, chosen][lower]).max()
        seen = np.where(lower, values[0, chosen], np.nan)[1:]
        np.testing.assert_allclose(drawn(chromium, f"text-0-{kind}"), seen, atol=2e-5 * size)
    top = results["decomposition"][0]["terms"][0]
    sources = results["decomposition"][0]["sources"]
    x, y = ((sources.index(top[side]) + 0.5) / len(sources) for side in ("key", "query"))
    said = hover(chromium, "text-0-figure-0", x, y)
    assert f"part of the score advantage {top['value']:+.3f}" in said
    assert browser.complaints(chromium) == []
    assert all(address.startswith(("file:", "data:", "blob:")) for address in browser.requested(chromium))


def hostile_figure():
    """A figure whose texts are markup, wherever a figure has texts."""
    marks = Marks([0.0], [0.0], "circle", hover=[HOSTILE[2]], names=[HOSTILE[3]], right=[True], heads=[HOSTILE[2]])
    values = np.zeros((len(HOSTILE), len(HOSTILE)))
    map_ = Heatmap(values, Scale("Blues", 0.0, 1.0, HOSTILE[2]), [Outline(0, 0, name=HOSTILE[2])],
                   np.full(values.shape, HOSTILE[2]))  # fmt: skip
    panel = Panel(Axis(HOSTILE[2], HOSTILE), Axis(HOSTILE[2], HOSTILE), [map_, marks], HOSTILE[2],
                  headings=[(1, HOSTILE[2])])  # fmt: skip
    return Figure(HOSTILE[2], [[panel]], 8.0, 6.0, [Entry(HOSTILE[2], "circle", "0.2")], caption=HOSTILE[2])


@pytest.fixture(scope="module")
def hostile_page(results, tmp_path_factory):
    """A page whose tokens, sentences and model name are markup."""
    pattern = np.tril(np.random.default_rng(0).random((24, len(HOSTILE), len(HOSTILE))))
    model = {"name": HOSTILE[1], "source": HOSTILE[2], "fingerprint": "0" * 64}
    one = page.TextMaps(
        1,
        HOSTILE[2], HOSTILE, HOSTILE[2], [(3, 2)], range(len(HOSTILE)), {"pattern": pattern},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hostile")
    shown = {**results, "model": model, "sequences": results["sequences"][:1]}
    figures = {"mosaic": mosaic(big_found(4, 6)), f"parts_{HOSTILE[2]}": hostile_figure()}
    page.save_page(induction_page(shown, [HOSTILE[1]], [one], figures), folder)
    return folder / "report.html"


def test_a_hostile_token_stays_text(chromium, hostile_page):
    show(chromium, hostile_page)
    assert chromium.title == f"Induction heads of {HOSTILE[1]}"
    tokens = chromium.execute_script(
        "return [...document.querySelectorAll('.tokens bdi')].map((one) => one.textContent)"
    )
    assert tokens == HOSTILE
    assert len(chromium.find_elements("css selector", "script")) == 2
    pictures = chromium.find_elements("css selector", "img")
    assert pictures and all(one.get_attribute("src").startswith("data:image/svg+xml;base64,") for one in pictures)
    rows = len(HOSTILE) - 1
    for query, token in enumerate(HOSTILE[1:], start=1):
        said = hover(chromium, "text-0-pattern", 0.5 / len(HOSTILE), (query - 0.5) / rows)
        assert " ".join(token.split()) in " ".join(said.split())
    figure = chromium.find_element("css selector", "[id^='parts_']").get_attribute("id")
    chromium.execute_script(f"document.getElementById({json.dumps(figure)}).id = 'hostile'")
    assert chromium.execute_script("return document.querySelector('#hostile img').naturalWidth") > 0
    assert hover(chromium, "hostile", 0.5 / len(HOSTILE), 0.5 / len(HOSTILE)).count(HOSTILE[2]) == 3
    assert HOSTILE[1] in hover(chromium, "hostile", 1.5 / len(HOSTILE), 0.5 / len(HOSTILE))
    assert not chromium.find_elements("css selector", "#bubble *")
    assert browser.complaints(chromium) == []


def test_the_policy_stops_what_escaping_might_miss(chromium, hostile_page, tmp_path):
    written = hostile_page.read_text(encoding="utf-8")
    bad = (
        "<script>document.title='owned'</script><img src='http://127.0.0.1:9/x.png' onerror=\"document.title='owned'\">"
    )
    for number, content in enumerate((written, re.sub("<meta http-equiv[^>]*>", "", written))):
        path = tmp_path / f"{number}.html"
        path.write_text(content.replace("</body>", bad + "</body>"), encoding="utf-8")
    show(chromium, tmp_path / "0.html")
    assert chromium.title != "owned"
    assert any("Content Security Policy" in line for line in browser.complaints(chromium))
    show(chromium, tmp_path / "1.html")  # without the policy: what these tests look for can be seen
    assert chromium.title == "owned"
    assert any(address.startswith("http://127.0.0.1:9") for address in browser.requested(chromium))
